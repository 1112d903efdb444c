"""AdamW, clipping, decay groups, accumulation and schedules against hand-written NumPy."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kreg.training.optimizer import adamw, clip_by_norm, decay_mask, decay_matrices
from kreg.training.schedules import (
    language_modelling,
    length_generalisation,
    regbench,
    warmup_cosine,
)

BETAS, EPS, DECAY, CLIP = (0.9, 0.95), 1e-8, 0.1, 0.5
# Optax's trees are typed as anything; the tests know what they hold.
apply_updates: Any = optax.apply_updates
DECAYING = {"matrix": True, "scale": False}


def _tree(rng: np.random.Generator) -> dict:
    """A stacked layer: one matrix and one normalisation scale for each of two layers."""
    return {"blocks": {"matrix": rng.normal(size=(2, 3, 4)), "scale": rng.normal(size=(2, 3))}}


def _numpy_adamw(params: dict, gradients: list[dict], rates: list[float]) -> list[dict]:
    """Five lines of the paper's algorithm, in torch's order: decay first, then the step."""
    params = {name: value.copy() for name, value in params["blocks"].items()}
    moments = {name: (np.zeros_like(v), np.zeros_like(v)) for name, v in params.items()}
    history = []
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        gradient = gradient["blocks"]
        norm = math.sqrt(sum(float(np.sum(g**2)) for g in gradient.values()))
        scale = min(1.0, CLIP / (norm + 1e-6))
        for name, g in gradient.items():
            m, v = moments[name]
            m = BETAS[0] * m + (1 - BETAS[0]) * g * scale
            v = BETAS[1] * v + (1 - BETAS[1]) * (g * scale) ** 2
            moments[name] = m, v
            params[name] = params[name] * (1 - rate * DECAY * DECAYING[name])
            denominator = np.sqrt(v / (1 - BETAS[1] ** t)) + EPS
            params[name] = params[name] - rate * m / (1 - BETAS[0] ** t) / denominator
        history.append(dict(params))
    return history


def _torch_rate(t: int, peak: float, warmup: int, steps: int, floor: float) -> float:
    """The schedule in the words of the authors' script."""
    if t < warmup:
        return peak * t / warmup
    if t > steps:
        return floor
    return floor + 0.5 * (1 + math.cos(math.pi * (t - warmup) / (steps - warmup))) * (peak - floor)


def _run(tx, params, gradients) -> list[dict]:
    state, history = tx.init(params), []
    for gradient in gradients:
        updates, state = jax.jit(tx.update)(gradient, state, params)
        params = apply_updates(params, updates)
        history.append(params["blocks"])
    return history


@pytest.mark.parametrize(
    ("x64", "tolerance"), [(False, 2e-6), (True, 1e-13)], ids=["float32", "float64"]
)
def test_adamw_reproduces_numpy_over_warmup_clip_and_decay(x64, tolerance):
    rng = np.random.default_rng(0)
    start = _tree(rng)
    # The second gradient is below the clipping norm, the others are above it.
    gradients = [_tree(rng) for _ in range(5)]
    gradients[1] = jax.tree.map(lambda g: 0.01 * g, gradients[1])
    expected = _numpy_adamw(start, gradients, [_torch_rate(t, 0.1, 2, 5, 0.01) for t in range(5)])
    with jax.enable_x64(x64):
        tx: Any = adamw(
            warmup_cosine(0.1, warmup_steps=2, decay_steps=5, floor=0.01),
            betas=BETAS,
            eps=EPS,
            weight_decay=DECAY,
            decays=decay_matrices(),
            clip=CLIP,
        )
        # float32 or float64, by the flag.
        found = _run(tx, jax.tree.map(jnp.asarray, start), jax.tree.map(jnp.asarray, gradients))
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for name in DECAYING:
            np.testing.assert_allclose(
                ours[name], theirs[name], atol=tolerance, rtol=0, err_msg=f"{step=} {name}"
            )
    # The first rate is 0, so the first step leaves every bit alone.
    unchanged = start["blocks"]["scale"].astype(found[0]["scale"].dtype)
    np.testing.assert_array_equal(found[0]["scale"], unchanged)


def test_step_of_rate_zero_moves_the_moments():
    params = {"w": jnp.ones(3)}
    tx: Any = adamw(warmup_cosine(1.0, warmup_steps=1, decay_steps=9, floor=0.0))
    updates, state = tx.update({"w": jnp.full(3, 2.0)}, tx.init(params), params)
    np.testing.assert_array_equal(updates["w"], np.zeros(3))
    moments = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose(moments["w"], 0.2, rtol=1e-6)


def test_decay_groups_go_by_path_where_layers_are_stacked():
    shapes = {
        "embedding": (20, 8),
        "norm": {"scale": (8,)},
        "blocks": {
            "norm": {"scale": (6, 8)},
            "out": {"kernel": (6, 8, 8), "bias": (6, 8)},
            "gate": {"kernel": (6, 8, 8)},
        },
    }
    params = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))
    mask = decay_mask(params, decay_matrices(never=("gate",)))
    assert mask == {
        "embedding": True,
        "norm": {"scale": False},
        "blocks": {
            "norm": {"scale": False},
            "out": {"kernel": True, "bias": False},
            "gate": {"kernel": False},
        },
    }
    # Zero gradients leave the decay alone: only the marked leaves shrink.
    params = jax.tree.map(jnp.ones_like, params)
    tx: Any = adamw(0.5, weight_decay=0.1, decays=decay_matrices(never=("gate",)))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    for update, decays in zip(jax.tree.leaves(updates), jax.tree.leaves(mask), strict=True):
        np.testing.assert_allclose(update, -0.05 if decays else 0.0, rtol=1e-6)


@pytest.mark.parametrize("norm", [0.1, 0.5, 3.0])
def test_clip_scales_as_torch_does(norm):
    gradient = {
        "a": jnp.full((4,), norm / math.sqrt(8)),
        "b": jnp.full((2, 2), norm / math.sqrt(8)),
    }
    clip: Any = clip_by_norm(0.5)
    clipped, _ = clip.update(gradient, clip.init(gradient))
    scale = min(1.0, 0.5 / (norm + 1e-6))
    np.testing.assert_allclose(clipped["a"], gradient["a"] * scale, rtol=3e-7)
    np.testing.assert_allclose(clipped["b"], gradient["b"] * scale, rtol=3e-7)


def test_accumulation_equals_the_big_batch():
    rng = np.random.default_rng(1)
    inputs, targets = rng.normal(size=(3, 8, 4)), rng.normal(size=(3, 8))

    def loss(params, x, y):
        return jnp.mean((x @ params["w"] - y) ** 2)

    def options() -> dict[str, Any]:
        return dict(schedule=regbench(0.1, total_steps=10), weight_decay=0.1, clip=0.2)

    with jax.enable_x64(True):
        start = {"w": jnp.asarray(rng.normal(size=4))}
        small: Any = adamw(**options(), accumulate=4)
        big: Any = adamw(**options())
        small_update, big_update = jax.jit(small.update), jax.jit(big.update)
        gradient_of = jax.jit(jax.grad(loss))
        params, other = start, start
        state, other_state = small.init(start), big.init(start)
        for x, y in zip(inputs, targets, strict=True):
            for part in range(4):
                rows = slice(2 * part, 2 * part + 2)
                before = params
                gradient = gradient_of(params, jnp.asarray(x[rows]), jnp.asarray(y[rows]))
                updates, state = small_update(gradient, state, params)
                params = apply_updates(params, updates)
                moved = not np.array_equal(before["w"], params["w"])
                assert moved == (part == 3), "an update after every fourth batch, none in between"
            gradient = gradient_of(other, jnp.asarray(x), jnp.asarray(y))
            updates, other_state = big_update(gradient, other_state, other)
            other = apply_updates(other, updates)
            # Not 1e-12: optax.MultiSteps divides by an int32 count, which rounds in float32.
            np.testing.assert_allclose(params["w"], other["w"], rtol=1e-8)


def test_regbench_schedule_in_the_words_of_its_specification():
    peak, total = 5e-4, 6400
    rate: Any = regbench(peak, total_steps=total)
    with jax.enable_x64(True):
        for t in (0, 1, 320, 639, 640, 641, 3200, 6399, 6400, 9999):
            if t < 640:
                expected = 1e-6 + t * (peak - 1e-6) / 640
            elif t < total:
                expected = 0.1 * peak + 0.45 * peak * (1 + math.cos(math.pi * t / total))
            else:
                expected = 0.1 * peak
            assert float(rate(jnp.int32(t))) == pytest.approx(expected, rel=1e-12), t
        # Not restarted: the rate drops where the warm-up ends.
        assert float(rate(640)) / peak == pytest.approx(0.978, abs=5e-4)


@pytest.mark.parametrize(
    ("schedule", "constants"),
    [
        (language_modelling(), (5e-3, 2_000, 80_000, 1e-4)),
        (length_generalisation(), (1e-3, 40_000, 156_250, 5e-5)),
    ],
    ids=["language_modelling", "length_generalisation"],
)
def test_schedules_of_the_authors_scripts(schedule, constants):
    peak, warmup, steps, floor = constants
    with jax.enable_x64(True):
        for t in (0, 1, warmup - 1, warmup, warmup + 1, (warmup + steps) // 2, steps, 2 * steps):
            expected = _torch_rate(t, peak, warmup, steps, floor)
            assert float(schedule(jnp.int32(t))) == pytest.approx(expected, rel=1e-12), t


def test_schedules_run_without_a_python_number():
    rates = jax.jit(jax.vmap(regbench(1.0, total_steps=20)))(jnp.arange(30))
    assert rates.shape == (30,) and bool(jnp.isfinite(rates).all())
    no_warmup: Any = warmup_cosine(1.0, warmup_steps=0, decay_steps=10, floor=0.5)
    assert [float(no_warmup(t)) for t in (0, 10)] == [1.0, 0.5]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: warmup_cosine(1.0, warmup_steps=5, decay_steps=5, floor=0.0), "warmup_steps"),
        (lambda: regbench(1.0, total_steps=0), "total_steps"),
        (lambda: adamw(1.0, accumulate=0), "accumulate"),
        (lambda: adamw(1.0, clip=0.0), "clip"),
    ],
)
def test_wrong_numbers_are_named(call, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        call()
