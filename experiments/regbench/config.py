"""The sizes of a RegBench problem: how large the automata are and how much of each is shown."""

from dataclasses import dataclass

from experiments.regbench.alphabet import VOCAB_SIZE


@dataclass(frozen=True)
class AutomataConfig:
    """Hold the sizes of the automata and of the instances; the defaults are the benchmark's.

    Every range includes both ends. The number of nodes is counted before minimising.
    Smaller machines make a smaller problem; the ids stay those of the full vocabulary.

    Raises:
        ValueError: a range is empty, or a node could not find enough symbols or targets.

    References:
        Akyürek et al., `In-Context Language Learning: Architectures and Algorithms
        <https://arxiv.org/abs/2401.12973>`_, 2024.

    >>> AutomataConfig(letters=6, max_alphabet=6, max_nodes=5).max_out_degree
    3
    """

    letters: int = 18
    """Letters an alphabet is drawn from: the first so many of a..r."""
    min_nodes: int = 4
    max_nodes: int = 12
    min_alphabet: int = 4
    max_alphabet: int = 18
    max_out_degree: int = 3
    """Edges of a node are 1 to this many, each to another node."""
    min_words: int = 10
    max_words: int = 19
    min_word_length: int = 1
    max_word_length: int = 49
    max_tokens: int | None = None
    """Longest input kept, in positions; the label of its last position is one token further."""

    def __post_init__(self) -> None:
        self._require_range("letters", 1, self.letters, VOCAB_SIZE - 2)
        self._require_range("max_out_degree", 1, self.max_out_degree, self.min_alphabet)
        self._require_range("max_alphabet", self.min_alphabet, self.max_alphabet, self.letters)
        self._require_range("min_nodes", self.max_out_degree + 1, self.min_nodes, self.max_nodes)
        # States are stored in eight bits.
        self._require_range("max_nodes", self.min_nodes, self.max_nodes, 127)
        self._require_range("min_words", 1, self.min_words, self.max_words)
        self._require_range("min_word_length", 1, self.min_word_length, self.max_word_length)
        if self.min_words * (self.min_word_length + 1) < 3:
            raise ValueError(
                "min_words: expected instances of at least two tokens, got one word of one letter"
            )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens: expected None or at least 1, got {self.max_tokens}")

    @staticmethod
    def _require_range(name: str, low: int, value: int, high: int) -> None:
        if not low <= value <= high:
            raise ValueError(f"{name}: expected {low} to {high}, got {value}")
