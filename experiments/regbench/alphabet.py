"""The characters of RegBench and their ids: '.' pads (0), letters, '|' separates words (last)."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Int32

VOCAB_SIZE = 20
PAD_ID = 0
SEPARATOR_ID = VOCAB_SIZE - 1
IGNORED_LABEL = -100


def characters(vocab_size: int = VOCAB_SIZE) -> str:
    """List the characters in the order of their ids.

    >>> characters(5)
    '.abc|'
    """
    if not 3 <= vocab_size <= 28:
        raise ValueError(f"vocab_size: expected 3 to 28, got {vocab_size}")
    return "." + "abcdefghijklmnopqrstuvwxyz"[: vocab_size - 2] + "|"


def encode(text: str, vocab_size: int = VOCAB_SIZE) -> Int32[np.ndarray, " T"]:
    """Turn characters into ids.

    Raises:
        ValueError: a character is not in the vocabulary.

    >>> encode("ab|r").tolist()
    [1, 2, 19, 18]
    """
    ids = {character: number for number, character in enumerate(characters(vocab_size))}
    unknown = sorted(set(text) - ids.keys())
    if unknown:
        raise ValueError(f"text: expected characters of {''.join(ids)!r}, got {unknown}")
    return np.array([ids[character] for character in text], np.int32)


def decode(ids: Iterable[int] | np.ndarray, vocab_size: int = VOCAB_SIZE) -> str:
    """Turn ids into characters.

    Raises:
        ValueError: an id is negative or not below `vocab_size`.

    >>> decode([1, 2, 19, 18])
    'ab|r'
    """
    alphabet = characters(vocab_size)
    numbers = [int(number) for number in ids]
    unknown = [number for number in numbers if not 0 <= number < vocab_size]
    if unknown:
        raise ValueError(f"ids: expected 0 to {vocab_size - 1}, got {unknown[:5]}")
    return "".join(alphabet[number] for number in numbers)
