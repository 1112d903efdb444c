"""Token losses, pooled over the labelled positions of a batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_cross_entropy(
    logits: Float[Array, "*B C"], labels: Int[Array, "*B"], *, ignore: int
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Sum -log softmax(logits)[label] over the labels that are not `ignore`, and count them.

    Sums and counts of several batches add up to those of their union. Reduced in float32 or
    better. Logits at ignored positions do not matter, not even where they are NaN.

    Args:
        ignore: the label that means "no label here"; other labels lie in 0..C-1.

    Examples:
        >>> import jax.numpy as jnp
        >>> total, count = token_cross_entropy(jnp.zeros((3, 4)), jnp.array([1, -1, 2]), ignore=-1)
        >>> round(float(total), 4), int(count)
        (2.7726, 2)
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels: expected shape {logits.shape[:-1]} for logits {logits.shape}, "
            f"got {labels.shape}"
        )
    labelled = labels != ignore
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    # Both the logits and the labels are replaced, so that no derivative sees the ignored ones.
    logits = jnp.where(labelled[..., None], logits, 0.0)
    index = jnp.where(labelled, labels, 0)[..., None]
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), index, axis=-1)[..., 0]
    total = jnp.sum(jnp.where(labelled, -log_probs, 0.0))
    return total, jnp.sum(labelled, dtype=jnp.int32)


def mean_token_cross_entropy(
    logits: Float[Array, "*B C"], labels: Int[Array, "*B"], *, ignore: int
) -> Float[Array, ""]:
    """Average the cross-entropy over the labelled positions; 0 where there is none.

    Examples:
        >>> import jax.numpy as jnp
        >>> float(mean_token_cross_entropy(jnp.zeros((2, 4)), jnp.array([-100, -100]), ignore=-100))
        0.0
    """
    total, count = token_cross_entropy(logits, labels, ignore=ignore)
    return total / jnp.maximum(count, 1).astype(total.dtype)
