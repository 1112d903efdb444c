"""Training split over devices gives the numbers of one device, and can go on with others."""

import functools
import itertools
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import killing
import numpy as np
import optax
import pytest
import split_training
from split_training import BATCH, METHODS, ONE, gradients, losses

from kreg import training
from kreg.training import Devices

ROOT = Path(__file__).parents[1]
PLAIN = {name: text for name, text in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
OFTEN = (Devices(2, 2, 2),)
COUNTS = [c for c in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(c) in (4, 8)]
ALL = [
    pytest.param(devices, marks=() if devices in OFTEN else pytest.mark.nightly)
    for explicit in (False, True)
    for devices in (Devices(*counts, explicit=explicit) for counts in COUNTS)
]
ALL_METHODS = ",".join(METHODS)


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


@pytest.mark.nightly
@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_every_method(method):
    """On a mesh of explicit axes."""
    want, got = gradients(ONE, method), gradients(Devices(2, 2, 2, explicit=True), method)
    np.testing.assert_allclose(got, want, atol=1e-5 * max(np.abs(want).max(), 1), rtol=0)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("methods", "processes", "devices", "split"),
    [
        ("relumax", 2, 2, (1, 2, 2)),
        ("", 2, 2, (4, 1, 1)),
        (ALL_METHODS, 4, 1, (1, 4, 1)),
        (ALL_METHODS, 4, 2, (2, 2, 2)),
        (ALL_METHODS, 2, 4, (2, 2, 2)),
        # The sequence goes from process to process, and so all read all rows.
        ("biweight", 4, 1, (1, 1, 4)),
    ],
)
def test_several_processes_give_the_numbers_of_one(tmp_path, methods, processes, devices, split):
    """And each reads the rows of its own devices, no others."""
    counts = ("--processes", str(processes), "--devices-per-process", str(devices))
    command = (sys.executable, split_training.__file__, str(tmp_path), str(devices))
    words = (*command, ",".join(map(str, split)), methods, "float64")
    run = killing.start("-m", "experiments.launch.local", *counts, *words)
    _, err = run.communicate(timeout=1200)
    assert run.returncode == 0, err
    found = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(processes)]
    read = [told["read"] for told in found]
    shares = min(processes, split[0] * split[1])
    assert len({tuple(rows) for rows in read}) == shares
    assert {len(rows) for rows in read} == {2 * BATCH // shares}
    assert len(set().union(*read)) == 2 * BATCH
    for told in found:
        np.testing.assert_allclose(told["float32"], alone(10, "float32"), rtol=1e-5, atol=0)
        with jax.enable_x64(True):
            exact = alone(50, "float64")
        np.testing.assert_allclose(told["float64"], exact, rtol=1e-9, atol=0)
        for method in filter(None, methods.split(",")):
            want = gradients(ONE, method)
            most = 1e-5 * max(np.abs(want).max(), 1)
            np.testing.assert_allclose(told[method], want, atol=most, rtol=0)


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


def test_batches_are_split_alike_where_they_are_placed_and_where_they_are_made():
    """Rows and, where it can be, time; numbers without axes are whole."""
    devices = Devices(2, 2, 2)
    batch = {"even": np.zeros((8, 4)), "odd": np.zeros((8, 3)), "row": np.zeros(8)}
    placed = devices.place_batch(batch | {"number": np.uint32(3)})
    assert placed.pop("number").is_fully_replicated
    with jax.set_mesh(devices.mesh):
        made = jax.jit(lambda: devices.split_batch(jax.tree.map(jnp.asarray, batch)))()
    for found in (placed, made):
        rows = ("data", "fsdp")
        assert found["even"].sharding.spec == jax.P(rows, "sequence")
        assert found["odd"].sharding.spec == found["row"].sharding.spec == jax.P(rows)
    assert Devices().split_batch(batch) is batch


def test_a_run_goes_on_with_other_devices(tmp_path):
    """Checkpoints hold whole arrays: eight devices stop, one goes on, four more end it."""

    def run(folder, devices, time_limit=None):
        tx = training.adamw(1e-2)

        def loss(params, batch, key):
            return jnp.mean((batch["x"] @ params["w"] - 1) ** 2), {}

        step = training.make_step(loss, tx, devices=devices)
        state = training.init_state({"w": jnp.ones((64, 32)) / 64}, tx, jax.random.key(0))
        rows = [{"x": np.float32(np.random.default_rng(i).normal(size=64))} for i in range(64)]
        data = training.batches(rows, 16, seed=0, devices=devices)
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


def test_a_device_a_core_computes_its_products_alone(monkeypatch):
    monkeypatch.setattr("kreg.training.devices.cores", lambda: 4)
    assert Devices(data=4).compiler_options == {"xla_cpu_multi_thread_eigen": False}
    assert Devices(data=2).compiler_options is None


def test_a_run_on_cpu_has_as_many_devices_as_it_is_split_over():
    code = """
        import types, jax
        from experiments.runs.command import joined, make_devices
        assert joined().alone
        for text in ("", "data=2,fsdp=2", "data=8"):  # who has said how many is not overruled
            make_devices(types.SimpleNamespace(devices=text))
        print(jax.config.jax_num_cpu_devices, len(jax.devices("cpu")))
    """
    line = [sys.executable, "-c", textwrap.dedent(code)]
    found = subprocess.run(line, cwd=ROOT, env=PLAIN, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["4", "4"]


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
