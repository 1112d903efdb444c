"""TinyStories and BabiStories: where their files are, how they are fetched, what is in them.

Eldan and Li, `TinyStories <https://arxiv.org/abs/2305.07759>`_, 2023, the first version; Zhang et
al., `Memory Mosaics <https://arxiv.org/abs/2405.06394>`_, 2024. Both come with validation files.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments.text.archive import extract
from experiments.text.download import Report, download
from experiments.text.sources import Dataset, JsonLines, PlainText


@dataclass(frozen=True)
class Official:
    """Hold what there is to fetch: file names with their SHA-256, where it is known."""

    base: str
    files: dict[str, str | None]
    train: str
    validation: str
    archived: bool = False
    """Whether the files are the parts of an archive with the two that are read."""

    def missing(self, folder: Path) -> list[str]:
        """Name the files of the data set that are not in a folder."""
        names = (self.train, self.validation)
        return [name for name in names if not (Path(folder) / name).is_file()]


OFFICIAL = {
    "tinystories": Official(
        base="https://huggingface.co/datasets/roneneldan/TinyStories/resolve/"
        "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/",
        files={
            "TinyStories-train.txt": "c5cf5e22ff13614e830afbe61a99fbcb"
            "e8bcb7dd72252b989fa1117a368d401f",
            "TinyStories-valid.txt": "94e431816c4cce81ff71e4408ff8d3bd"
            "a9a42e8d2663986697c3954288cb38b4",
        },
        train="TinyStories-train.txt",
        validation="TinyStories-valid.txt",
    ),
    # No checksums are published. The archive holds those of its files, which are compared.
    "babistories": Official(
        base="https://github.com/facebookresearch/MemoryMosaics/raw/main/BabiStories/data/",
        files={f"babistories-dataset.7z.{number:03d}": None for number in range(1, 6)},
        train="traindataset.txt",
        validation="valdataset.txt",
        archived=True,
    ),
}

# Each of the unpacked files of BabiStories has 2 GB or less.
_MOST = 2**33


def fetch(
    name: str,
    folder: Path,
    *,
    mirror: str | None = None,
    report: Callable[[str], Report] = lambda file: lambda done, total: None,
) -> Path:
    """Download a data set of `OFFICIAL` into a folder, and unpack it; the rest where some is there.

    Args:
        mirror: an address that has the files under the same names.
        report: makes what is told of the bytes of a file, from its name.

    Raises:
        ValueError: no such data set, a wrong checksum, a damaged archive, no package to unpack it.
        OSError: a transfer broke off; the same call goes on.
    """
    found = _official(name)
    folder = Path(folder)
    if not found.missing(folder):
        return folder
    base = (mirror or found.base).rstrip("/") + "/"
    for file, sha256 in found.files.items():
        download(base + file, folder / file, sha256=sha256, report=report(file))
    if found.archived:
        parts = [folder / file for file in found.files]
        extract(parts, [found.train, found.validation], folder, most=_MOST)
    return folder


def tinystories(folder: Path) -> Dataset:
    """Take TinyStories from its two text files.

    Raises:
        ValueError: a file is not there; the message says how to fetch it.
    """
    train, validation = _files("tinystories", folder)
    return Dataset("tinystories", PlainText(train), PlainText(validation))


def babistories(folder: Path) -> Dataset:
    """Take BabiStories from its two files, which have a JSON string a line.

    Raises:
        ValueError: a file is not there; the message says how to fetch it.
    """
    train, validation = _files("babistories", folder)
    return Dataset("babistories", JsonLines(train), JsonLines(validation))


def _files(name: str, folder: Path) -> tuple[Path, Path]:
    found = _official(name)
    if missing := found.missing(folder):
        raise ValueError(
            f"folder: expected {' and '.join(missing)} in {folder}, got none. To download: "
            f"python -m experiments.text fetch {name} {folder}"
        )
    return Path(folder) / found.train, Path(folder) / found.validation


def _official(name: str) -> Official:
    if name not in OFFICIAL:
        raise ValueError(f"name: expected one of {', '.join(OFFICIAL)}, got {name!r}")
    return OFFICIAL[name]
