"""How close a model's next-symbol distributions are to the automaton's.

Axes: B sequences, T input positions, V vocabulary. Scores are sums and counts that add up.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from experiments.regbench.alphabet import IGNORED_LABEL, SEPARATOR_ID

_KL_FLOOR = 1e-7
_NGRAM_FLOOR = 1e-5


@dataclass(frozen=True)
class Score:
    """Pool total variation, greedy accuracy and Kullback-Leibler divergence over positions.

    `tvd` = sum |P - D| / 2, `accuracy` = share of positions with D[argmax P] > 0 (the first of
    equal maxima), `kl` = sum D (ln(D + 1e-7) - ln(P + 1e-7)), each the mean over all input
    positions, those before and at a separator included. An empty score has NaN for each.

    >>> model, truth = np.array([[[0.5, 0.5], [1.0, 0.0]]]), np.array([[[0.0, 1.0], [1.0, 0.0]]])
    >>> score = Score.of(model, truth, np.array([2]))
    >>> score.tvd, score.accuracy, score.positions, (score + score).tvd
    (0.25, 0.5, 2, 0.25)
    """

    l1_sum: float = 0.0
    legal: int = 0
    kl_sum: float = 0.0
    positions: int = 0

    @classmethod
    def of(
        cls,
        probabilities: Float[np.ndarray, "B T V"],
        reference: Float[np.ndarray, "B T V"],
        lengths: Int[np.ndarray, " B"],
    ) -> Score:
        """Score the first `lengths` positions of each sequence.

        Raises:
            ValueError: the shapes do not agree.
        """
        model = np.asarray(probabilities, np.float64)
        truth = np.asarray(reference, np.float64)
        inside = _inside(model, truth, lengths)
        model, truth = model[inside], truth[inside]
        divergence = truth * (np.log(truth + _KL_FLOOR) - np.log(model + _KL_FLOOR))
        return cls(
            l1_sum=float(np.abs(model - truth).sum()),
            legal=int(legal_guesses(model, truth).sum()),
            kl_sum=float(divergence.sum()),
            positions=int(inside.sum()),
        )

    def __add__(self, other: Score) -> Score:
        return _add(self, other)

    @property
    def tvd(self) -> float:
        return self._mean(self.l1_sum) / 2

    @property
    def accuracy(self) -> float:
        return self._mean(self.legal)

    @property
    def kl(self) -> float:
        return self._mean(self.kl_sum)

    def _mean(self, total: float) -> float:
        return total / self.positions if self.positions else float("nan")


@dataclass(frozen=True)
class LoopScore:
    """Hold what the original training loop logs, as sums weighted by sequences.

    Each field but `sequences` is the mean over the positions of a batch times its sequences;
    `means` divides. Differences are L1 distances without the half, `ngram` is the 3-gram with
    back-off.
    """

    sequences: int = 0
    dfa_accuracy: float = 0.0
    model_dfa_diff: float = 0.0
    model_ngram_diff: float = 0.0
    dfa_ngram_diff: float = 0.0
    n_gram_loss: float = 0.0
    n_gram_dfa_acc: float = 0.0

    @classmethod
    def of(
        cls,
        probabilities: Float[np.ndarray, "B T V"],
        ngram: Float[np.ndarray, "B T V"],
        reference: Float[np.ndarray, "B T V"],
        input_ids: Int[np.ndarray, "B T"],
        labels: Int[np.ndarray, "B T"],
        lengths: Int[np.ndarray, " B"],
        *,
        separator_id: int = SEPARATOR_ID,
    ) -> LoopScore:
        """Score one batch.

        `dfa_accuracy` leaves out the positions whose next input is a separator; `n_gram_loss` =
        -ln(p[label] + 1e-5) and `n_gram_dfa_acc` take the labelled positions only.
        """
        model, ngram, truth = (
            np.asarray(rows, np.float64) for rows in (probabilities, ngram, reference)
        )
        inside = _inside(model, truth, lengths)
        _inside(ngram, truth, lengths)
        scored = within_word(input_ids, lengths, separator_id=separator_id)
        labelled = labels != IGNORED_LABEL
        likelihood = np.take_along_axis(
            ngram[labelled], labels[labelled].astype(np.int64)[:, None], axis=-1
        )
        batch = dict(
            dfa_accuracy=legal_guesses(model, truth)[scored].mean(),
            model_dfa_diff=np.abs(model - truth).sum(axis=-1)[inside].mean(),
            model_ngram_diff=np.abs(model - ngram).sum(axis=-1)[inside].mean(),
            dfa_ngram_diff=np.abs(truth - ngram).sum(axis=-1)[inside].mean(),
            n_gram_loss=-np.log(likelihood + _NGRAM_FLOOR).mean(),
            n_gram_dfa_acc=legal_guesses(ngram, truth)[labelled].mean(),
        )
        weight = len(model)
        return cls(weight, **{name: weight * float(value) for name, value in batch.items()})

    def __add__(self, other: LoopScore) -> LoopScore:
        return _add(self, other)

    def means(self) -> dict[str, float]:
        """Divide by the number of sequences."""
        sums = dataclasses.asdict(self)
        count = sums.pop("sequences")
        return {name: total / count if count else float("nan") for name, total in sums.items()}


def legal_guesses(
    probabilities: Float[np.ndarray, "*B V"], reference: Float[np.ndarray, "*B V"]
) -> Bool[np.ndarray, "*B"]:
    """Tell where the likeliest symbol (the first of equal ones) is one the automaton allows.

    >>> legal_guesses(np.array([[0.6, 0.4], [0.5, 0.5]]), np.array([[1.0, 0.0], [0.0, 1.0]]))
    array([ True, False])
    """
    guess = np.argmax(probabilities, axis=-1)[..., None]
    return np.take_along_axis(np.asarray(reference), guess, axis=-1)[..., 0] > 0


def within_word(
    input_ids: Int[np.ndarray, "B T"],
    lengths: Int[np.ndarray, " B"],
    *,
    separator_id: int = SEPARATOR_ID,
) -> Bool[np.ndarray, "B T"]:
    """Mark the positions whose next input is not a separator; the last position counts.

    >>> within_word(np.array([[1, 19, 2, 0]]), np.array([3]))
    array([[False,  True,  True, False]])
    """
    following = np.pad(input_ids[:, 1:], ((0, 0), (0, 1)))
    return (np.arange(input_ids.shape[1]) < lengths[:, None]) & (following != separator_id)


def cross_entropy(logits: Float[np.ndarray, "B T V"], labels: Int[np.ndarray, "B T"]) -> float:
    """Average -ln softmax(logits)[label] over the labels that are not -100.

    >>> round(cross_entropy(np.zeros((1, 2, 4)), np.array([[3, -100]])), 4)
    1.3863
    """
    labelled = labels != IGNORED_LABEL
    rows = np.asarray(logits, np.float64)[labelled]
    rows = rows - rows.max(axis=-1, keepdims=True)
    chosen = np.take_along_axis(rows, labels[labelled].astype(np.int64)[:, None], axis=-1)[:, 0]
    return float(np.mean(np.log(np.exp(rows).sum(axis=-1)) - chosen))


def _inside(
    model: np.ndarray, truth: np.ndarray, lengths: Int[np.ndarray, " B"]
) -> Bool[np.ndarray, "B T"]:
    """Mark the positions below the lengths, after checking the shapes."""
    if model.ndim != 3 or model.shape != truth.shape:
        raise ValueError(
            f"probabilities: expected the reference's [B, T, V] {truth.shape}, got {model.shape}"
        )
    lengths = np.asarray(lengths)
    if lengths.shape != model.shape[:1] or lengths.max(initial=0) > model.shape[1]:
        raise ValueError(
            f"lengths: expected [B] {model.shape[:1]} of at most T = {model.shape[1]}, "
            f"got {lengths.shape} of at most {lengths.max(initial=0)}"
        )
    return np.arange(model.shape[1]) < lengths[:, None]


def _add[S: (Score, LoopScore)](one: S, other: S) -> S:
    pairs = zip(dataclasses.astuple(one), dataclasses.astuple(other), strict=True)
    return type(one)(*(first + second for first, second in pairs))
