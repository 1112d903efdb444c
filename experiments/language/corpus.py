"""Which documents a command names, and their tokens in a folder that all experiments share."""

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from experiments import text
from experiments.runs.experiment import DataError
from experiments.text.sources import SEPARATOR

DATA = Path("runs/data")
OFFICIAL = {"tinystories": text.tinystories, "babistories": text.babistories}


def parse(name: str) -> tuple[str, Path]:
    """Split what --data says into a kind (stories, text, ...) and a path, which stories lack.

    >>> [(kind, path.as_posix()) for kind, path in map(parse, ("tinystories:stories/v1", "a.txt"))]
    [('tinystories', 'stories/v1'), ('text', 'a.txt')]
    """
    if name == "stories":
        return name, Path()
    kind, _, path = name.partition(":")
    if kind in OFFICIAL:
        return kind, Path(path) if path else DATA / kind
    return "text", Path(name)


@dataclass(frozen=True)
class Source:
    """A data set, and a checksum of what decides its documents and how they are divided."""

    dataset: text.Dataset
    digest: str

    # Cached, because a file is read for its checksum, and a command asks many times.
    @classmethod
    @functools.cache
    def of(
        cls, name: str, *, stories: tuple[int, int], held_out: float, whole_only: bool
    ) -> "Source":
        """Find the documents of --data.

        Raises:
            DataError: they are not there; the message says what was looked for.
        """
        kind, path = parse(name)
        try:
            if kind == "stories":
                dataset = text.stories(*stories)
            elif kind == "text":
                dataset = text.plain_text(
                    path, held_out=held_out, whole_only=whole_only and _separated(path)
                )
            else:
                dataset = OFFICIAL[kind](path)
        except ValueError as error:
            raise DataError(f"--data: {error}") from error
        described = json.dumps(dataset.fingerprint(), sort_keys=True)
        return cls(dataset, hashlib.sha256(described.encode()).hexdigest())


def _separated(path: Path) -> bool:
    """Tell whether every file has a document's end, so that what follows the last may be cut."""
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    return all(_holds(file, SEPARATOR.encode()) for file in files if file.is_file())


def _holds(file: Path, word: bytes) -> bool:
    with open(file, "rb") as lines:
        return any(word in line for line in lines)


def check_tokenizer(name: str, ngrams: tuple[int, ...]) -> None:
    """Raise DataError where a tokenizer is missing, ValueError for n-grams too long for it."""
    tokenizer = text.TOKENIZERS[name]
    try:
        tokenizer.encode(["a"])
    except ValueError as error:
        raise DataError(str(error)) from error
    for order in ngrams:
        if order < 1 or tokenizer.vocab_size**order > 2**64:
            raise ValueError(
                f"--text.ngrams: expected orders of at least 1 whose n-grams fit into 64 bits "
                f"(at most 4 for gpt2, 7 for bytes), got {order}"
            )


def tokens(folder: Path, source: Source, tokenizer: str) -> text.Corpus:
    """Open the token files of a data set, after writing them where there are none.

    Raises:
        DataError: documents cannot be read, or there are too few.
    """
    name = f"{source.dataset.name}-{tokenizer}-{source.digest[:12]}"
    try:
        return text.prepare(folder / name, source.dataset, text.TOKENIZERS[tokenizer])
    except ValueError as error:
        raise DataError(f"--data: {error}") from error
