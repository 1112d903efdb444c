"""Real text and GPT-2's files from the folder that $KREG_DATA names; tests skip without."""

import os
import shutil
from pathlib import Path

import pytest


def data(name: str) -> Path:
    """A file or folder of it."""
    folder = os.environ.get("KREG_DATA")
    if not folder:
        pytest.skip("KREG_DATA names no folder of texts")
    path = Path(folder) / name
    if not path.exists():
        pytest.skip(f"KREG_DATA has no {name}")
    return path


def tinystories_sample() -> Path:
    """The first 2 MiB of TinyStories' training file."""
    return data("tinystories_train_2MiB/tinystories_sample.txt")


def gpt2_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tiktoken find a copy of its files: it deletes those that it does not like."""
    pytest.importorskip("tiktoken")
    cache = shutil.copytree(data("gpt2_bpe/tiktoken_cache"), tmp_path / "tiktoken")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
