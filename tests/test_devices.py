"""Training split over devices gives the numbers of one device, and can go on with others."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import kreg
from kreg import nn, training
from kreg.training import Devices

BATCH, LENGTH, VOCABULARY = 8, 32, 20
# Arrays of the model have about a thousand numbers and more, so that some of them are split.
CONFIG = nn.MosaicConfig(VOCABULARY, 1, 2, 32, 40, attention_dropout=0.1, hidden_dropout=0.1)

ONE = Devices()
OFTEN = (Devices(2, 2, 2),)
COUNTS = [c for c in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(c) in (4, 8)]
ALL = [
    pytest.param(devices, marks=() if devices in OFTEN else pytest.mark.nightly)
    for explicit in (False, True)
    for devices in (Devices(*counts, explicit=explicit) for counts in COUNTS)
]


@functools.cache
def batch(seed: int):
    rng = np.random.default_rng(seed)
    return {
        "tokens": rng.integers(0, VOCABULARY, (BATCH, LENGTH)),
        "documents": np.sort(rng.integers(0, 3, (BATCH, LENGTH))),
    }


def started(devices: Devices, tx, dtype, **changes):
    """A step and a state of a small Memory Mosaic, split over the devices."""
    config = nn.MosaicConfig(**{**vars(CONFIG), "layout": devices.layout, **changes})
    graph, params = nnx.split(nn.MemoryMosaic(config, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda x: x.astype(dtype), params)

    def loss(params, batch, key):
        logits = nnx.merge(graph, params)(
            batch["tokens"], segment_ids=batch["documents"], dropout_key=key
        )
        labels = jnp.roll(batch["tokens"], -1, axis=1)
        return training.mean_token_cross_entropy(logits, labels, ignore=-1), {}

    state = training.init_state(params, tx, jax.random.key(1))
    split = devices if devices.count > 1 else None
    return training.make_step(loss, tx, devices=split), state


def losses(devices: Devices, steps: int, dtype, **changes) -> list[float]:
    tx = training.adamw(3e-3, weight_decay=0.1, clip=1.0)
    step, state = started(devices, tx, dtype, **changes)
    found = []
    with jax.set_mesh(devices.mesh):
        state = devices.place(state)
        for i in range(steps):
            state, metrics = step(state, devices.place_batch(batch(i)))
            found.append(float(metrics["loss"]))
    return found


@functools.cache
def alone(steps: int, dtype: str) -> list[float]:
    return losses(ONE, steps, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("devices", ALL, ids=str)
@pytest.mark.parametrize(
    ("dtype", "steps", "tolerance"),
    [pytest.param("float32", 10, 1e-5, marks=pytest.mark.nightly), ("float64", 50, 1e-9)],
)
def test_losses_do_not_depend_on_the_devices(devices, dtype, steps, tolerance):
    """Dropout, packed documents, averages that go on from device to device, AdamW and clipping."""
    with jax.enable_x64(dtype == "float64"):
        found = losses(devices, steps, dtype)
        np.testing.assert_allclose(found, alone(steps, dtype), rtol=tolerance, atol=0)


METHODS = {
    "softmax": (kreg.gaussian, kreg.Adaptive),
    "biweight": (kreg.biweight, kreg.Adaptive),
    "epanechnikov": (kreg.epanechnikov, kreg.Adaptive),
    "triweight": (kreg.triweight, kreg.Adaptive),
    "norm_relu": (kreg.epanechnikov, kreg.Fixed),
    "relumax": (kreg.epanechnikov, kreg.Anchored),
    "top8_softmax": (kreg.gaussian, functools.partial(kreg.Nearest, 8)),
    "top8_uniform": (kreg.box, functools.partial(kreg.Nearest, 8)),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [pytest.param(x, marks=() if x == "relumax" else pytest.mark.nightly) for x in METHODS],
)
def test_gradients_of_every_method(method):
    """On a mesh of explicit axes."""
    kernel, bandwidth = METHODS[method]

    def gradients(devices):
        # What is subtracted from the parameters is the gradient.
        step, state = started(
            devices, optax.sgd(1.0), "float32", kernel=kernel, bandwidth=bandwidth
        )
        before = jax.tree.map(np.array, state.params)
        with jax.set_mesh(devices.mesh):
            moved, _ = step(devices.place(state), devices.place_batch(batch(0)))
        return jax.tree.map(lambda a, b: a - np.asarray(b), before, moved.params)

    want, got = gradients(ONE), gradients(Devices(2, 2, 2, explicit=True))
    largest = max(np.abs(x).max() for x in jax.tree.leaves(want))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * max(largest, 1), rtol=0),
        want,
        got,
    )


def test_what_is_split():
    """The longest axis of large arrays over fsdp, that of layers never; moments as parameters."""
    devices = Devices(data=2, fsdp=4)
    params = {
        "embedding": jnp.zeros((50, 64)),
        "blocks": {"kernel": jnp.zeros((4, 64, 128)), "scale": jnp.zeros((4, 64))},
        "odd": jnp.zeros((33, 33)),
    }
    state = training.init_state(params, optax.adam(1e-3), jax.random.key(0))
    placed = devices.place(state)
    for tree in (placed.params, placed.opt_state[0].mu):
        assert tree["embedding"].sharding.spec == jax.P(None, "fsdp")
        assert tree["blocks"]["kernel"].sharding.spec == jax.P(None, None, "fsdp")
        assert tree["blocks"]["scale"].sharding.spec == jax.P()
        assert tree["odd"].sharding.spec == jax.P()
    here = placed.params["blocks"]["kernel"].addressable_shards[0].data
    assert here.shape == (4, 64, 32)


def test_a_run_goes_on_with_other_devices(tmp_path):
    """Checkpoints hold whole arrays: eight devices stop, one goes on, four more end it."""

    def run(folder, devices, time_limit=None):
        tx = training.adamw(1e-2)

        def loss(params, batch, key):
            return jnp.mean((batch["x"] @ params["w"] - 1) ** 2), {}

        step = training.make_step(loss, tx, devices=devices)
        state = training.init_state({"w": jnp.ones((64, 32)) / 64}, tx, jax.random.key(0))
        rows = [{"x": np.float32(np.random.default_rng(i).normal(size=64))} for i in range(64)]
        data = training.batches(rows, 16, seed=0)
        result = training.train(
            folder, state, step, data, steps=6, config={}, save_every=2, time_limit=time_limit,
            devices=devices, progress=training.Progress(quiet=True),
        )  # fmt: skip
        data.close()
        return result

    whole = run(tmp_path / "whole", None)
    for devices in (Devices(2, 4), None, Devices(fsdp=4), Devices(data=8)):
        result = run(tmp_path / "parts", devices, time_limit=1e-9)
    assert result.step == 4 and result.stopped_by == "time"
    result = run(tmp_path / "parts", Devices(2, 2, 2))
    assert result.finished
    np.testing.assert_allclose(result.state.params["w"], whole.state.params["w"], rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Devices(data=0), "data: expected at least 1, got 0"),
        (lambda: Devices(data=16).mesh, "devices: expected 8, as many as there are"),
        (
            lambda: Devices(data=3).place_batch({"x": np.zeros((8, 2))}),
            "batch: expected rows that 3",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
