r"""What one device sends for attention with a split sequence, in bytes: the rule between two forms.

P devices, T queries, S keys, N and K heads, H and V widths, B batch, e bytes a number of the keys,
w of a sum. Gathering n bytes, or scattering their sum, sends (P - 1)/P n from each device; a sum
that all receive twice that. Output and all gradients:

    gather:  (P - 1)/P  2 e B S K (H + V)
    keys:   2(P - 1)/P  w B N T (V + H + 8 + 2 R)

Gathering brings keys and values to all, and their gradients back. With keys that stay, the sums of
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
    def of(cls, problem: Problem, devices: int, rounds: int = ROUNDS) -> "Traffic":
        """Of a whole problem, or of the part of its batch and heads that is on a device."""
        batch, queries, heads, width = problem.query.shape
        _, keys, groups, values = problem.value.shape
        share = (devices - 1) / devices
        narrow, wide = problem.key.dtype.itemsize, problem.dtype.itemsize
        return cls(
            share * 2 * narrow * batch * keys * groups * (width + values),
            2 * share * wide * batch * heads * queries * (values + width + 8 + 2 * rounds),
        )
