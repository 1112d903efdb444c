"""Where documents come from: the grammar, plain text, lines of JSON; and what makes a data set."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from experiments.text import lexicon, plots
from experiments.text.grammar import story

SEPARATOR = "<|endoftext|>"


class Documents(Protocol):
    """Texts in a fixed order, read anew by every iteration."""

    def __iter__(self) -> Iterator[str]: ...

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells these documents from others, fit for JSON."""
        ...


@dataclass(frozen=True)
class Dataset:
    """Documents to train on and to validate on.

    Where `validation` is None, the last `held_out` of the training documents are held out instead
    (their number rounded, but at least one, and at least one is left).
    """

    name: str
    train: Documents
    validation: Documents | None = None
    held_out: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out: expected a fraction between 0 and 1, got {self.held_out}")

    def fingerprint(self) -> dict[str, Any]:
        """Return what decides the documents of both parts."""
        official = self.validation and self.validation.fingerprint()
        rest = {"held_out": self.held_out} if official is None else {"validation": official}
        return {"name": self.name, "train": self.train.fingerprint()} | rest


@dataclass(frozen=True)
class Stories:
    """Stories number `first` to `first + count - 1` of the grammar."""

    first: int
    count: int
    seed: int

    def __iter__(self) -> Iterator[str]:
        return (story(self.seed, self.first + number) for number in range(self.count))

    def fingerprint(self) -> dict[str, Any]:
        """Return the numbers, and a checksum of the grammar: its rules, words and a few stories."""
        words = {name: value for name, value in vars(lexicon).items() if name.isupper()}
        told = [story(self.seed, number) for number in range(16)]
        grammar = repr((plots.RULES, sorted(words.items()), told)).encode()
        numbers = {"first": self.first, "count": self.count, "seed": self.seed}
        return numbers | {"sha256": hashlib.sha256(grammar).hexdigest()}


@dataclass(frozen=True)
class PlainText:
    """The documents of a text file, or of all files *.txt below a folder in the order of names.

    A file's documents are separated by `<|endoftext|>`; without one, a file is one document. White
    space around a document is dropped, and so are empty ones.

    Args:
        whole_only: leave out what follows the last separator of a file, where a file was cut off.

    Raises:
        ValueError: there is no such file, or one is not UTF-8.
    """

    path: Path
    whole_only: bool = False
    _files: tuple[Path, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        path = Path(self.path)
        files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
        files = tuple(file for file in files if file.is_file())
        if not files:
            raise ValueError(f"path: expected a text file or a folder of *.txt, got {path}")
        object.__setattr__(self, "_files", files)

    def __iter__(self) -> Iterator[str]:
        for file in self._files:
            yield from filter(None, map(str.strip, self._documents(file)))

    def _documents(self, file: Path) -> Iterator[str]:
        lines: list[str] = []
        for _, line in numbered_lines(file):
            first, *others = line.split(SEPARATOR)
            lines.append(first)
            for part in others:
                yield "".join(lines)
                lines = [part]
        if not self.whole_only:
            yield "".join(lines)

    def fingerprint(self) -> dict[str, Any]:
        """Return the checksum of the file; of names and checksums where there are several."""
        return {"sha256": _digest(self._files, Path(self.path)), "whole_only": self.whole_only}


@dataclass(frozen=True)
class JsonLines:
    """A file with a document a line, each a JSON string; documents are taken as they are.

    Raises:
        ValueError: a line holds something else, the file is not UTF-8 or not there.
    """

    path: Path

    def __post_init__(self) -> None:
        if not Path(self.path).is_file():
            raise ValueError(f"path: expected a file with a JSON string a line, got {self.path}")

    def __iter__(self) -> Iterator[str]:
        for number, line in numbered_lines(Path(self.path)):
            try:
                text = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{self.path}, line {number}: expected JSON, got {error}"
                ) from error
            if not isinstance(text, str):
                raise ValueError(
                    f"{self.path}, line {number}: expected a string, got {line[:40]!r}"
                )
            yield text

    def fingerprint(self) -> dict[str, Any]:
        """Return the checksum of the file."""
        return {"sha256": _digest((Path(self.path),), Path(self.path))}


def numbered_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Read lines of UTF-8, their ends as they are but for "\\r\\n"."""
    with open(file, encoding="utf-8") as stream:
        try:
            yield from enumerate(stream, start=1)
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: expected UTF-8, got {error}") from error


def stories(train: int, validation: int, *, seed: int = 0) -> Dataset:
    """Take stories of the grammar; the validation stories are the next ones after the others.

    Raises:
        ValueError: a number of stories is below 1.

    >>> len(list(stories(3, 2).train))
    3
    """
    for name, count in (("train", train), ("validation", validation)):
        if count < 1:
            raise ValueError(f"{name}: expected at least 1 story, got {count}")
    return Dataset("stories", Stories(0, train, seed), Stories(train, validation, seed))


def plain_text(path: Path, *, held_out: float = 0.05, whole_only: bool = False) -> Dataset:
    """Take the documents of a file or folder, see `PlainText`; the last `held_out` validate."""
    return Dataset("text", PlainText(path, whole_only), held_out=held_out)


def _digest(files: tuple[Path, ...], root: Path) -> str:
    """SHA-256 of a file's contents; of several, SHA-256 of their names and checksums."""
    sums = {file: file_digest(file) for file in files}
    if files == (root,):
        return sums[root]
    listing = "".join(f"{digest}  {file.relative_to(root)}\n" for file, digest in sums.items())
    return hashlib.sha256(listing.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
