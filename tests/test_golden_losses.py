"""Golden cases of the entmax package's losses: values and gradients, also through its modules.

Groups, functions, parameters, reductions and ignored classes are read from the files.
"""

import functools
import re

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kreg

FILE = "entmax_losses"
# The gradient is p - y: it has the accuracy of the map (golden/README.md, section 6).
GRADIENT = 1e-11


@functools.partial(jax.jit, static_argnames="name")
def loss_and_pullback(name, x, target, cot, alpha):
    """Return the losses of the rows and the gradient of their sum weighted by `cot`."""
    parameter = () if alpha is None else (alpha,)
    loss, pull = jax.vjp(lambda x: getattr(kreg, name)(x, target, *parameter), x)
    return loss, pull(cot)[0]


def evaluate(function: str, info: dict, x: np.ndarray, target: np.ndarray, cot: np.ndarray):
    """Evaluate one of their functions (entmax_bisect_loss_a2) or modules (EntmaxBisectLoss_sum)."""
    plain = function.lower().replace("_", "")
    name = re.match(r"(sparsemax|entmax15|entmax|normmax)(?=(bisect)?loss)", plain)[0]
    alpha = info.get("parameter", info.get("alpha"))
    alpha = None if name in ("sparsemax", "entmax15") else jnp.asarray(float(alpha))
    loss, gradient = loss_and_pullback(f"{name}_loss", x, target, cot, alpha)
    return np.asarray(loss), np.asarray(gradient)


def compare(what: str, loss, gradient, golden_loss: np.ndarray, golden_gradient: np.ndarray):
    golden_files.assert_close(loss, golden_loss, f"{what}/loss", relative=1e-12)
    assert gradient.shape == golden_gradient.shape
    error = np.max(np.abs(gradient - golden_gradient))
    assert error <= GRADIENT, f"{what}: gradient off by {error:.2e}, allowed {GRADIENT:.0e}"


def check_module(group, function: str, info: dict, x: np.ndarray, target: np.ndarray) -> None:
    """Reduce as the modules do: ignored rows count nothing, in the mean's denominator neither."""
    kept = target != info["ignore_index"]
    share = kept / kept.sum() if info["reduction"] == "elementwise_mean" else kept * 1.0
    loss, gradient = evaluate(function, info, x, target, share)
    loss = loss * share
    if info["reduction"] != "none":
        loss = loss.sum()
    golden = group[f"{function}/loss"], group[f"{function}/grad_x_of_sum"]
    compare(f"{group.name}/{function}", loss, gradient, *golden)


@pytest.mark.parametrize("name", golden_files.group_names(FILE))
def test_golden_losses(name):
    group = golden_files.open_group(FILE, name)
    count = 0
    with jax.enable_x64(True):
        x, target = group["x"], group["target"]
        for function in group.members("loss"):
            info = group.info["funcs"][function]
            if "reduction" in info:
                check_module(group, function, info, x, target)
            else:
                loss, gradient = evaluate(function, info, x, target, group["cot"])
                golden = group[f"{function}/loss"], group[f"{function}/vjp_x"]
                compare(f"{name}/{function}", loss, gradient, *golden)
            count += 1
    group.finish(count)
