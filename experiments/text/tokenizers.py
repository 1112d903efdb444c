"""Text to token ids and back: bytes, and the byte-pair encoding of GPT-2."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt16


class Tokenizer(Protocol):
    """Turn documents into ids below `vocab_size`; `end` closes each document and is in no text."""

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def end(self) -> int: ...

    def encode(self, texts: Sequence[str]) -> list[UInt16[np.ndarray, " T"]]:
        """Return the ids of each text, without the end."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text, the end as `<|endoftext|>`, broken characters as U+FFFD."""
        ...


@dataclass(frozen=True)
class Bytes:
    """The bytes of UTF-8 as ids 0 to 255, and 256 for the end of a document.

    >>> Bytes().encode(["é!"])[0].tolist(), Bytes().decode([195, 169, 33, 256])
    ([195, 169, 33], 'é!<|endoftext|>')
    """

    name: str = "bytes"
    vocab_size: int = 257
    end: int = 256

    def encode(self, texts: Sequence[str]) -> list[UInt16[np.ndarray, " T"]]:
        """Return the bytes of each text."""
        return [
            np.frombuffer(text.encode(errors="replace"), np.uint8).astype(np.uint16)
            for text in texts
        ]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of bytes.

        Raises:
            ValueError: an id is negative or above 256.
        """
        parts, document = [], bytearray()
        for number in _within(ids, self.vocab_size):
            if number == self.end:
                parts.append(document.decode(errors="replace"))
                document = bytearray()
            else:
                document.append(number)
        return "<|endoftext|>".join([*parts, document.decode(errors="replace")])


@dataclass(frozen=True)
class GPT2:
    """GPT-2's 50,257 tokens by `tiktoken`; 50,256 is the end of a document.

    `tiktoken` downloads its two files once, or finds them in the folder that the environment
    variable TIKTOKEN_CACHE_DIR names. It deletes files there that are damaged: keep a copy.

    Raises:
        ValueError: when first used, where `tiktoken` or its files are missing.
    """

    name: str = "gpt2"
    vocab_size: int = 50257
    end: int = 50256

    def encode(self, texts: Sequence[str]) -> list[UInt16[np.ndarray, " T"]]:
        """Return the ids of each text; `<|endoftext|>` in a text is nothing but characters."""
        found = self._encoding.encode_ordinary_batch(list(texts))
        return [np.array(ids, np.uint16) for ids in found]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of ids.

        Raises:
            ValueError: an id is negative or above 50,256.
        """
        return self._encoding.decode(_within(ids, self.vocab_size))

    @cached_property
    def _encoding(self) -> Any:
        try:
            import tiktoken
        except ImportError as error:
            raise ValueError(
                "tokenizer: expected the package tiktoken for GPT-2's tokens, got none; "
                "`pip install tiktoken`, or take bytes"
            ) from error
        try:
            return tiktoken.get_encoding(self.name)
        # Whatever its way of downloading raises: no network, a proxy, a damaged file.
        except Exception as error:
            raise ValueError(
                "tokenizer: expected GPT-2's vocab.bpe and encoder.json in TIKTOKEN_CACHE_DIR or "
                f"from the network, got {type(error).__name__}: {error}"
            ) from error


TOKENIZERS: dict[str, Tokenizer] = {"bytes": Bytes(), "gpt2": GPT2()}
"""By name, for command lines and for what stands beside token files."""


def _within(ids: Sequence[int] | np.ndarray, vocab_size: int) -> list[int]:
    numbers = [int(number) for number in ids]
    wrong = [number for number in numbers if not 0 <= number < vocab_size]
    if wrong:
        raise ValueError(f"ids: expected 0 to {vocab_size - 1}, got {wrong[:5]}")
    return numbers
