r"""What one device sends for attention with a split sequence, in bytes: the rule between two forms.

P devices, T queries, S keys, N and K heads, H and V widths, B batch, e bytes a number of the keys,
w of a sum. Gathering n bytes, or scattering their sum, sends (P - 1)/P n from each device; a sum
that all receive twice that. Output and all gradients:

    gather:  (P - 1)/P  2 e B S K (H + V)   [+ 2 e B T/P N (H + V) under causality]
    keys:   2(P - 1)/P  w B N T (V + H + 8 + 2 R)

Gathering brings keys and values to all, and their gradients back; under causality queries and
outputs are exchanged, and their gradients. With keys that stay, the sums of
outputs (V), of the queries' gradients (H), and of rows go around: the best score, where the search
starts, the total, five numbers back; and two sums in each of R rounds of the search.
"""

from typing import NamedTuple

from kreg.problem import Problem

# Rounds of the search after its start on the keys here: three to five are usual.
ROUNDS = 4


class Traffic(NamedTuple):
    """Bytes that one device sends, forward and backward, by form."""

    gather: float
    keys: float

    @classmethod
    def of(cls, problem: Problem, split: dict[str, int], rounds: int = ROUNDS) -> "Traffic":
        """Of a whole problem; `split`: over how many devices batch b, heads n, k, keys s are."""
        batch, queries, heads, width = problem.query.shape
        _, keys, groups, values = problem.value.shape
        devices = split["s"]
        batch, heads = batch / split["b"], heads / split["n"]
        groups = groups / split["k"] if groups > 1 else 1
        share = (devices - 1) / devices
        narrow, wide = problem.key.dtype.itemsize, problem.dtype.itemsize
        exchanged = 2 * batch * queries / devices * heads if problem.mask.upper is not None else 0
        return cls(
            narrow * (width + values) * (share * 2 * batch * keys * groups + exchanged),
            2 * share * wide * batch * heads * queries * (values + width + 8 + 2 * rounds),
        )
