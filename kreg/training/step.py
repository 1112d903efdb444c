"""One update: loss, gradient, optimizer, compiled together with the state's buffers donated."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Key, PyTree

from kreg.training.devices import Devices
from kreg.training.state import TrainState

type LossFn = Callable[
    [PyTree[Array], PyTree[Array], Key[Array, ""]], tuple[Array, dict[str, Array]]
]
type StepFn = Callable[[TrainState, PyTree[Array]], tuple[TrainState, dict[str, Array]]]


def make_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    compute_dtype: DTypeLike | None = None,
    devices: Devices | None = None,
) -> StepFn:
    """Compile theta <- theta + tx(grad loss(theta)).

    Args:
        loss_fn: `(params, batch, key) -> (loss, metrics)`; the key is `fold_in(state.key,
            state.step)`, another one at every update.
        tx: the optimizer.
        compute_dtype: the type the floating-point parameters are cast to for the loss. The
            parameters themselves, their gradients and the optimizer keep their own type
            (bfloat16 compute, float32 masters).
        devices: how the state stays split; on one device None.

    Returns:
        `step(state, batch) -> (state, metrics)`. It donates `state`: use the returned one.
        `metrics` holds what loss_fn gave, `loss`, and `grad_norm` before any clipping.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from kreg import training
        >>> tx = optax.sgd(0.25)
        >>> step = training.make_step(lambda params, x, key: (((params - x) ** 2).sum(), {}), tx)
        >>> state = training.init_state(jnp.zeros(2), tx, jax.random.key(0))
        >>> state, metrics = step(state, jnp.ones(2))
        >>> state.params.tolist(), float(metrics["loss"])
        ([0.5, 0.5], 2.0)
    """

    def step(state: TrainState, batch: PyTree[Array]) -> tuple[TrainState, dict[str, Array]]:
        return update(loss_fn, tx, compute_dtype, state, batch)

    if devices is None:
        return jax.jit(step, donate_argnums=0)
    options = devices.compiler_options
    return jax.jit(devices.keeping(step), donate_argnums=0, compiler_options=options)


def update(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    compute_dtype: DTypeLike | None,
    state: TrainState,
    batch: PyTree[Array],
) -> tuple[TrainState, dict[str, Array]]:
    """Do what `make_step` compiles."""
    key = jax.random.fold_in(state.key, state.step)

    def objective(params):
        loss, metrics = loss_fn(cast(params, compute_dtype), batch, key)
        return loss.astype(jnp.promote_types(loss.dtype, jnp.float32)), metrics

    (loss, metrics), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    metrics = {**metrics, "loss": loss, "grad_norm": optax.tree.norm(grads)}
    params = optax.apply_updates(state.params, updates)
    return TrainState(params, opt_state, state.step + 1, state.key), metrics


def cast(params: PyTree[Array], dtype: DTypeLike | None) -> PyTree[Array]:
    """Cast the floating-point leaves and leave the others; None changes nothing."""
    if dtype is None:
        return params
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
        params,
    )
