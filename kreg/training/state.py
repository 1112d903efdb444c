"""What a run carries from one update to the next, as one pytree."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key, PyTree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Hold the parameters, the optimizer's state, the number of updates done and the run's key.

    The key never changes: update number t draws from `fold_in(key, t)`, so a resumed run draws
    what the uninterrupted one would have drawn.

    Examples:
        >>> import jax, optax
        >>> tx = optax.sgd(0.1, momentum=0.9)
        >>> state = init_state({"w": jax.numpy.ones(3)}, tx, jax.random.key(0))
        >>> [leaf.shape for leaf in jax.tree.leaves(state)]  # w, its momentum, step, key
        [(3,), (3,), (), ()]
    """

    params: PyTree[Array]
    opt_state: PyTree[Array]
    step: Int[Array, ""]
    key: Key[Array, ""]


def init_state(
    params: PyTree[Array], tx: optax.GradientTransformation, key: Key[Array, ""]
) -> TrainState:
    """Start a run at step 0.

    The arrays are copied, because the step donates its state: what the caller passed stays
    usable, and two leaves that share one buffer are no error.

    Examples:
        >>> import jax, optax
        >>> state = init_state({"w": jax.numpy.ones(3)}, optax.sgd(0.1), jax.random.key(0))
        >>> int(state.step)
        0
    """
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise ValueError(f"key: expected a typed key from jax.random.key, got {key!r}")
    # With its type spelt out, for a weakly typed leaf would compile the step twice.
    params = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.asarray(leaf).dtype, copy=True), params)
    return TrainState(
        params=params,
        opt_state=tx.init(params),
        step=jnp.zeros((), jnp.int32),
        key=jnp.array(key, copy=True),
    )


def settled(state: TrainState) -> TrainState:
    """Tie arrays to the device where they are, as those of a checkpoint are.

    Else functions of parameters would be compiled twice, for trained and for restored ones.
    """
    return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding), state)
