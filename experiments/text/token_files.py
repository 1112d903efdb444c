"""Tokens on disk, written once: uint16 numbers, where each document begins, and what they are.

FOLDER/about.json            data set, tokenizer, counts; a folder that has it is whole
FOLDER/train.tokens          the documents one after the other, each with its end token
FOLDER/train.offsets.npy     int64 [documents + 1]: where each begins, and the end of the last
FOLDER/validation...         the same
"""

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Int64, UInt16

from experiments.text.sources import Dataset
from experiments.text.tokenizers import TOKENIZERS, Tokenizer

_ABOUT = "about.json"
_FORMAT = 1
_BATCH = 1024
_DTYPE = np.dtype("<u2")


@dataclass(frozen=True, eq=False)
class Tokens:
    """Documents as one row of ids; document d is `ids[offsets[d]:offsets[d + 1]]`, with its end.

    `end` closes every document, and is what a document's first token is predicted from.
    `text_bytes` is the length of the documents in UTF-8.

    >>> tokens = Tokens.of([[5, 6], [7]], vocab_size=9, end=8)
    >>> tokens.ids.tolist(), tokens.offsets.tolist(), len(tokens), tokens.documents
    ([5, 6, 8, 7, 8], [0, 3, 5], 5, 2)
    """

    ids: UInt16[np.ndarray, " n"]
    offsets: Int64[np.ndarray, " d_plus_1"]
    vocab_size: int
    end: int
    text_bytes: int = 0

    @classmethod
    def of(cls, documents: list[list[int]], *, vocab_size: int, end: int) -> "Tokens":
        """Join documents given without their ends."""
        ids = [number for document in documents for number in [*document, end]]
        lengths = [len(document) + 1 for document in documents]
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        return cls(np.array(ids, np.uint16), offsets.astype(np.int64), vocab_size, end)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True, eq=False)
class Corpus:
    """The two parts of a data set as tokens, and what about.json says of them."""

    train: Tokens
    validation: Tokens
    tokenizer: Tokenizer
    about: dict[str, Any]


def prepare(folder: Path, dataset: Dataset, tokenizer: Tokenizer) -> Corpus:
    """Open the token files in `folder`, after writing them where there are none.

    The folder appears in one step when all of it is on the disk. A process that is killed on the
    way leaves a folder `.unfinished_...` beside it, which may be deleted. Memory is bounded by a
    thousand documents and 8 bytes for each.

    Raises:
        ValueError: the folder holds something else, or tokens of other documents or by another
            tokenizer; a part of the data set has no document. Nothing has been changed.
    """
    folder = Path(folder)
    if tokenizer.vocab_size > 2**16:
        raise ValueError(f"tokenizer: expected at most 65,536 ids, got {tokenizer.vocab_size:,}")
    wanted = _identity(dataset, tokenizer)
    if not (folder / _ABOUT).is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(
                f"folder: expected a new folder, or one with token files, got {folder} with "
                "something else in it. Name another folder."
            )
        _write(folder, dataset, tokenizer, wanted)
    return open_corpus(folder, wanted)


def open_corpus(folder: Path, wanted: dict[str, Any] | None = None) -> Corpus:
    """Open token files; the documents themselves are not needed, and not looked at.

    Args:
        wanted: what about.json must say, of the keys given.

    Raises:
        ValueError: they are not there, damaged, of a later format, or not what is wanted.
    """
    path = Path(folder) / _ABOUT
    try:
        about = json.loads(path.read_text())
        found = {name: about[name] for name in ("format", "dataset", "tokenizer")}
        tokenizer = TOKENIZERS[about["tokenizer"]["name"]]
        parts = {name: about[name] for name in ("train", "validation")}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path}: expected the description of token files, got {error!r}"
        ) from error
    for name, value in ({"format": _FORMAT} | (wanted or {})).items():
        if found[name] != value:
            raise ValueError(
                f"{name}: expected {_short(value)}, but the token files in {folder} were made with "
                f"{_short(found[name])}. Name another folder for the new ones, or delete this one."
            )
    opened = [_open_part(Path(folder), name, tokenizer, parts[name]) for name in parts]
    return Corpus(*opened, tokenizer=tokenizer, about=about)


def _identity(dataset: Dataset, tokenizer: Tokenizer) -> dict[str, Any]:
    described = {"name": tokenizer.name, "vocab_size": tokenizer.vocab_size, "end": tokenizer.end}
    return {"dataset": dataset.fingerprint(), "tokenizer": described}


def _short(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _open_part(folder: Path, name: str, tokenizer: Tokenizer, about: dict[str, int]) -> Tokens:
    path = folder / f"{name}.tokens"
    try:
        ids = np.memmap(path, _DTYPE, mode="r")
        offsets = np.load(folder / f"{name}.offsets.npy", allow_pickle=False)
        sizes = (len(ids), int(offsets[-1]), len(offsets) - 1)
    except (OSError, ValueError, IndexError) as error:
        raise ValueError(
            f"{path}: expected token files, got {error!r}. Delete {folder}."
        ) from error
    if sizes != (about["tokens"], about["tokens"], about["documents"]):
        raise ValueError(
            f"{path}: expected {about['tokens']:,} tokens of {about['documents']:,} documents, got "
            f"{sizes[0]:,} and {sizes[2]:,}; the files are damaged. Delete {folder}."
        )
    return Tokens(ids, offsets, tokenizer.vocab_size, tokenizer.end, about["text_bytes"])


def _write(folder: Path, dataset: Dataset, tokenizer: Tokenizer, identity: dict[str, Any]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".unfinished_{folder.name}_", dir=folder.parent))
    try:
        counts = {
            name: _write_part(unfinished, name, documents, tokenizer)
            for name, documents in _parts(dataset).items()
        }
        with open(unfinished / _ABOUT, "w") as file:
            json.dump({"format": _FORMAT} | identity | counts, file, indent=2)
            _settle(file)
        unfinished.chmod(0o755)
        try:
            unfinished.rename(folder)
        except OSError:
            # Another process was faster: its files are opened, and compared, next.
            if not (folder / _ABOUT).is_file():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _parts(dataset: Dataset) -> dict[str, Iterator[str]]:
    if dataset.validation is not None:
        return {"train": iter(dataset.train), "validation": iter(dataset.validation)}
    total = sum(1 for _ in dataset.train)
    if total < 2:
        raise ValueError(f"dataset: expected at least 2 documents to divide, got {total}")
    last = min(max(round(dataset.held_out * total), 1), total - 1)
    return {
        "train": itertools.islice(dataset.train, total - last),
        "validation": itertools.islice(dataset.train, total - last, None),
    }


def _write_part(
    folder: Path, name: str, documents: Iterator[str], tokenizer: Tokenizer
) -> dict[str, int]:
    lengths, text_bytes = [np.zeros(1, np.int64)], 0
    with open(folder / f"{name}.tokens", "wb") as file:
        for texts in itertools.batched(documents, _BATCH):
            found = [np.append(ids, np.uint16(tokenizer.end)) for ids in tokenizer.encode(texts)]
            lengths.append(np.array([len(ids) for ids in found], np.int64))
            text_bytes += sum(len(text.encode(errors="replace")) for text in texts)
            file.write(np.concatenate(found).astype(_DTYPE).tobytes())
        _settle(file)
    offsets = np.cumsum(np.concatenate(lengths))
    if len(offsets) == 1:
        raise ValueError(f"dataset: expected documents in the {name} part, got none")
    with open(folder / f"{name}.offsets.npy", "wb") as file:
        np.save(file, offsets)
        _settle(file)
    counts = {"documents": len(offsets) - 1, "tokens": int(offsets[-1])}
    return counts | {"text_bytes": text_bytes}


def _settle(file: IO[Any]) -> None:
    """Wait until what was written is on the disk."""
    file.flush()
    os.fsync(file.fileno())
