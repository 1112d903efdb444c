"""What the model is trained on and what it is judged by.

Axes: B sequences, T input positions, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from experiments.regbench import IGNORED_LABEL, PAD_ID, Instances, Score
from kreg.training import mean_token_cross_entropy, token_cross_entropy
from kreg.training.data import Row
from kreg.training.writer import fetch

# What keeps the logarithms of the Kullback-Leibler divergence finite, as in `Score`.
KL_FLOOR = 1e-7

# (parameters, tokens, dropout key or None) -> logits
type Apply = Callable[[PyTree[Array], Int[Array, "B T"], Array | None], Float[Array, "B T V"]]


@dataclass(frozen=True)
class Rows:
    """The sequences one by one, as a data loader wants them."""

    instances: Instances

    def __len__(self) -> int:
        return len(self.instances)

    def __getitem__(self, index: int) -> Row:
        return {"tokens": self.instances.input_ids[index], "labels": self.instances.labels[index]}


def blank(row: Row) -> Row:
    """Return a sequence without labels, of the length of this one.

    The loss pools labelled positions, so that a batch filled up with it changes nothing but the
    number of shapes to compile: an epoch's last batch has the shape of the others.
    """
    return {
        "tokens": np.full_like(row["tokens"], PAD_ID),
        "labels": np.full_like(row["labels"], IGNORED_LABEL),
    }


def make_loss(apply: Apply) -> Callable[..., tuple[Array, dict[str, Array]]]:
    """Return the mean cross-entropy of a batch over its labelled positions, with dropout."""

    def loss(params: PyTree[Array], batch: dict[str, Array], key: Array):
        logits = apply(params, batch["tokens"], key)
        return mean_token_cross_entropy(logits, batch["labels"], ignore=IGNORED_LABEL), {}

    return loss


def make_measure(apply: Apply) -> Callable[[PyTree[Array], dict[str, Array]], dict[str, Array]]:
    """Compile the sums that a batch of `held_out` adds to the loss and to a `Score`; no dropout.

    `Score.of` says the same of arrays on the host. Here nothing but six numbers leaves the device,
    which matters where a run is evaluated hundreds of times.
    """

    @jax.jit
    def measure(params: PyTree[Array], batch: dict[str, Array]) -> dict[str, Array]:
        logits = apply(params, batch["tokens"], None)
        loss, labels = token_cross_entropy(logits, batch["labels"], ignore=IGNORED_LABEL)
        model = jax.nn.softmax(logits)
        truth = jnp.take_along_axis(batch["table"], batch["states"][..., None], axis=1)
        guess = jnp.argmax(model, axis=-1)[..., None]
        inside = jnp.arange(model.shape[1])[None, :] < batch["lengths"][:, None]
        divergence = truth * (jnp.log(truth + KL_FLOOR) - jnp.log(model + KL_FLOOR))
        legal = jnp.take_along_axis(truth, guess, axis=-1)[..., 0] > 0
        return {
            "loss": loss,
            "labels": labels,
            "l1_sum": jnp.sum(jnp.abs(model - truth), where=inside[..., None]),
            "legal": jnp.sum(legal, where=inside),
            "kl_sum": jnp.sum(divergence, where=inside[..., None]),
            "positions": jnp.sum(inside),
        }

    return measure


def held_out(instances: Instances, batch_size: int) -> list[dict[str, Array]]:
    """Put the instances on the device in batches of one shape, filled up with empty sequences.

    `table` holds the next-symbol distributions of an automaton's states [B, S, V], `states` the
    state after each position [B, T].
    """
    table = instances.automata.next_symbols().astype(np.float32)
    columns = {
        "tokens": (instances.input_ids, PAD_ID),
        "labels": (instances.labels, IGNORED_LABEL),
        "lengths": (instances.lengths, 0),
        "states": (np.maximum(instances.states, 0).astype(np.int32), 0),
        "table": (table, 0),
    }

    def batch(start: int) -> dict[str, Array]:
        rows = {name: (a[start : start + batch_size], fill) for name, (a, fill) in columns.items()}
        return {name: jnp.asarray(_fill(a, batch_size, fill)) for name, (a, fill) in rows.items()}

    return [batch(start) for start in range(0, len(instances), batch_size)]


def evaluate(
    measure: Callable[..., dict[str, Array]],
    params: PyTree[Array],
    data: Sequence[dict[str, Array]],
) -> dict[str, Any]:
    """Return the mean `loss` over the labels, and `tvd`, `accuracy`, `kl` over the `positions`."""
    found = fetch([measure(params, batch) for batch in data])
    total = {name: sum(part[name].item() for part in found) for name in found[0]}
    loss, labels = total.pop("loss"), total.pop("labels")
    return {"loss": loss / max(labels, 1)} | summary(Score(**total))


def summary(score: Score) -> dict[str, Any]:
    """Return what is reported of a score."""
    return {name: getattr(score, name) for name in ("tvd", "accuracy", "kl", "positions")}


def _fill(rows: np.ndarray, count: int, value: float) -> np.ndarray:
    """Append rows of one value until there are `count`."""
    widths = [(0, count - len(rows))] + [(0, 0)] * (rows.ndim - 1)
    return np.pad(rows, widths, constant_values=value)
