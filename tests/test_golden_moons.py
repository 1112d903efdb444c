"""Three Moons against the authors' MLX model and data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_files import assert_close, exclusion, group_names, open_group
from test_golden_models import float64, quick_jit  # noqa: F401 - a fixture

from experiments.moons import orbits
from experiments.moons.model import MoonsConfig, MoonsModel, continued

GROUPS = group_names("threemoons")
# MLX's exponential in float64 is a float32 approximation.
CLOSE = {"relative": 1e-6}


def moons_config(theirs) -> MoonsConfig:
    assert not theirs["bias"] and theirs["out_proj"] != theirs["out_sum"]
    scale = theirs["attn_scale"]
    return MoonsConfig(
        num_heads=theirs["n_head"],
        head_dim=theirs["h_dim"],
        input_dim=theirs["input_dim"],
        score_scale=1.0 if scale is None else scale,
        value_shift=theirs["v_shift"],
        blind=theirs["v_ban"],
        rotations=theirs["complex"],
        unit_keys=theirs["norm_keys"],
        learned_scale=theirs["scale_keys"],
        unit_values=theirs["norm_vals"],
        project=theirs["out_proj"],
        embed=theirs["emb"],
    )


NAMES = {
    ("embedding", "weight"): "emb.weight",
    ("keys", "weight"): "k_lin.weight",
    ("values", "weight"): "v_lin.weight",
    ("out", "weight"): "out_proj.weight",
    ("key_scale",): "k_scale",
}


def build(config, parameters) -> MoonsModel:
    graph, state = nnx.split(nnx.eval_shape(lambda: MoonsModel(config, rngs=nnx.Rngs(0))))
    flat = nnx.to_flat_state(state)
    assert {NAMES[path] for path, _ in flat} == parameters.keys()
    values = [(path, leaf.replace(jnp.asarray(parameters[NAMES[path]]))) for path, leaf in flat]
    return nnx.merge(graph, nnx.from_flat_state(values))


@quick_jit
def evaluate(model, x, cotangent):
    """Everything the model computes, and the gradients of its answer against a cotangent."""

    def total(model, x):
        y = model(x)
        return jnp.sum(y * cotangent), y

    (_, y), (by_parameter, by_input) = jax.value_and_grad(total, (0, 1), has_aux=True)(model, x)
    key, value = model.pairs(x)
    one = jnp.broadcast_to(jnp.eye(x.shape[1])[None, :, None], (*key.shape[:3], x.shape[1]))
    weights = model.recall(key, one)
    return y, by_parameter, by_input, key, value, weights


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", [name for name in GROUPS if not name.startswith("planets")])
def test_golden_moons(name):
    group = open_group("threemoons", name)
    model = build(moons_config(group.info["config"]), group.under("param"))
    found = evaluate(model, jnp.asarray(group["x"]), jnp.asarray(group["cot"]))
    y, by_parameter, by_input, *inner = found
    assert_close(y, group["y"], f"{name}/y", **CLOSE)
    for key, array in zip(("keys", "values", "att"), inner, strict=True):
        assert_close(np.swapaxes(array, 1, 2), group[key], f"{name}/{key}", **CLOSE)
    assert_close(by_input, group["grad/x"], f"{name}/grad/x", **CLOSE)
    gradients = {NAMES[p]: v[...] for p, v in nnx.to_flat_state(nnx.state(by_parameter))}
    golden = group.under("grad/param")
    assert gradients.keys() == golden.keys()
    for key, array in golden.items():
        assert_close(gradients[key], array, f"{name}/grad/{key}", **CLOSE)
    if "generate_prompt" in group:
        steps = group.info["generate"]["steps"]
        longer = quick_jit(continued, static_argnums=2)(model, group["generate_prompt"], steps)
        # Errors feed on themselves, step by step.
        assert_close(longer, group["generate_nocache"], f"{name}/generate", relative=1e-4)
        assert exclusion(f"threemoons/{name}/generate_cached")
    group.finish(1)


@pytest.mark.parametrize("name", [name for name in GROUPS if name.startswith("planets")])
def test_golden_orbits(name):
    """The systems and their order, and a window of one of them."""
    group = open_group("threemoons", name)
    info = group.info
    assert orbits.PHASE == info["offset"]
    np.testing.assert_array_equal(group["all_train_periods"], orbits.TRAINED)
    np.testing.assert_array_equal(group["val_period"], [orbits.HELD_OUT])
    periods = [orbits.common_period(periods) for periods in orbits.SYSTEMS]
    np.testing.assert_array_equal(group["full_periods"].ravel(), periods)
    step = orbits.spacing(info["block_size"])
    np.testing.assert_allclose(step, info["spacing"])
    start = info["first_start_point_with_the_same_window"]
    points = orbits.positions(
        orbits.SYSTEMS[info["index"]],
        start,
        info["block_size"] + 1,
        step,
        from_last=name.endswith("planet"),
    )
    np.testing.assert_allclose(points[:-1], group["x"].reshape(-1, 6), atol=2e-5)
    np.testing.assert_allclose(points[1:], group["y"].reshape(-1, 6), atol=2e-5)
    group.finish(1)
