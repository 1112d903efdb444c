"""AdamW with weight decay chosen by path, clipping as in PyTorch, and gradient accumulation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

# Is the leaf at this path, e.g. ("blocks", "norm", "scale"), subject to weight decay?
type DecayRule = Callable[[tuple[str, ...], Array], bool]


def adamw(
    schedule: optax.ScalarOrSchedule,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decays: DecayRule | None = None,
    clip: float | None = None,
    accumulate: int = 1,
) -> optax.GradientTransformation:
    """Update by theta <- theta - lr (m / (sqrt(v) + eps) + weight_decay theta).

    m and v are the bias-corrected moments of the clipped gradient; the learning rate of the first
    update is schedule(0), and its moments count even where that rate is 0.

    Args:
        schedule: the learning rate, or a function of the number of updates.
        betas: how much of m and of v each update keeps.
        decays: which leaves decay; all of them by default. See `decay_matrices`.
        clip: scale gradients by min(1, clip / (norm + 1e-6)), over all leaves together.
        accumulate: average the gradients of so many calls before each update, as if their
            batches had been one (exactly so where the batches' losses weigh alike). The schedule
            counts updates, not calls.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kreg import training
        >>> tx = training.adamw(0.1, weight_decay=0.5, decays=training.decay_matrices())
        >>> params = {"matrix": jnp.ones((1, 1)), "bias": jnp.ones(1)}
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> updates["matrix"].tolist(), updates["bias"].tolist()
        ([[-0.15]], [-0.10])

    References:
        Loshchilov and Hutter, `Decoupled Weight Decay Regularization
        <https://arxiv.org/abs/1711.05101>`_, 2019.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate: expected at least 1, got {accumulate}")
    tx = optax.adamw(
        schedule,
        b1=betas[0],
        b2=betas[1],
        eps=eps,
        weight_decay=weight_decay,
        mask=lambda params: decay_mask(params, decays or decay_all),
    )
    if clip is not None:
        tx = optax.chain(clip_by_norm(clip), tx)
    if accumulate > 1:
        tx = optax.MultiSteps(tx, accumulate).gradient_transformation()
    return tx


def decay_all(path: tuple[str, ...], leaf: Array) -> bool:
    """Let every leaf decay, scales and biases too.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kreg import training
        >>> training.decay_all(("norm", "scale"), jnp.ones(8))
        True
    """
    return True


def decay_matrices(
    *, stacked: tuple[str, ...] = ("blocks",), never: tuple[str, ...] = ()
) -> DecayRule:
    """Let leaves decay that have at least two dimensions in one layer.

    Layers are stacked, so a normalisation scale [D] is stored as [L, D]: the number of stored
    dimensions says nothing. The path does: below a name in `stacked` the first axis is the layers'.

    Args:
        stacked: names of the subtrees with a leading layer axis.
        never: leaves with one of these strings in their path do not decay.

    Examples:
        >>> import jax.numpy as jnp
        >>> rule = decay_matrices(never=("gate",))
        >>> rule(("blocks", "norm", "scale"), jnp.ones((6, 8)))
        False
        >>> rule(("blocks", "out", "kernel"), jnp.ones((6, 8, 8)))
        True
        >>> rule(("embedding",), jnp.ones((20, 8)))
        True
    """

    def rule(path: tuple[str, ...], leaf: Array) -> bool:
        if any(name in part for part in path for name in never):
            return False
        layers = any(part in stacked for part in path)
        return leaf.ndim - layers >= 2

    return rule


def decay_mask(params: PyTree[Array], decays: DecayRule) -> PyTree[bool]:
    """Tell for every leaf whether it decays."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: decays(names(path), leaf), params)


def names(path: tuple) -> tuple[str, ...]:
    """Turn a key path of jax.tree_util into plain strings."""
    return tuple(jax.tree_util.keystr((part,), simple=True) for part in path)


def clip_by_norm(limit: float) -> optax.GradientTransformation:
    """Scale updates by min(1, limit / (norm + 1e-6)), norm being that of all leaves together.

    The 1e-6 is PyTorch's; optax.clip_by_global_norm has none and would differ in the seventh digit.
    """
    if not limit > 0:
        raise ValueError(f"clip: expected a positive norm, got {limit}")

    def update(updates, state, params=None):
        del params
        scale = jnp.minimum(1.0, limit / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
