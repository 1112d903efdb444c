"""Length generalisation over devices: each draws its own rows, and the numbers are those of one."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from experiments.length.config import Config, Data, Sizes, Training
from experiments.length.presets import complete
from experiments.length.task import TASK
from experiments.length.tasks import task_of
from experiments.length_tasks import asentmax_layout
from experiments.runs.task import devices_of, step_of
from kreg.training import Devices, init_state

# No other axis has so many entries.
ROWS, STEPS = 24, 4
# Parameters have about a thousand numbers and more, so that some of them are split.
SIZES = Sizes(layers=1, heads=2, width=32, hidden=40, dropout=0.1)
SPLITS = "data=4,fsdp=2", "data=2,fsdp=2,sequence=2", "sequence=8"
# Sequences of labels have an odd number of positions.
CASES = list(itertools.product(("copy", "nback"), ("mosaic", "transformer"), SPLITS))


def tiny(task: str, model: str, devices: str) -> Config:
    config = complete(Config(task=task, model=model))
    return dataclasses.replace(
        config,
        devices=devices,
        data=Data(5, 2),
        sizes=SIZES,
        training=Training(steps=STEPS, batch_size=ROWS, warmup=1),
        testing=dataclasses.replace(config.testing, multiples=(1,), samples=6, generated=3),
    )


@functools.cache
def trained(task: str, model: str, devices: str) -> tuple[list[float], str, float]:
    """Losses of a few steps, and the text and the operations, on each device, of the program."""
    config = tiny(task, model, devices)
    program, split = TASK.build(config, "softmax"), devices_of(config)
    over, losses = split or Devices(), []
    batches = map(over.place_batch, TASK.batches(config, None, 0))
    with jax.set_mesh(over.mesh):
        state = init_state(program.init(0), program.optimizer(3e-3), jax.random.key(0))
        state, batch = over.place(state), next(batches)
        step = step_of(program, 3e-3, split).lower(state, batch).compile()
        for _ in range(STEPS):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
            batch = next(batches)
    return losses, step.as_text(), step.cost_analysis()["flops"]


@pytest.mark.nightly
@pytest.mark.parametrize("task, model, devices", CASES)
def test_devices_draw_and_learn_from_their_own_rows(task, model, devices):
    losses, text, operations = trained(task, model, devices)
    expected, whole_text, whole_operations = trained(task, model, "")
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=0)
    about = task_of(tiny(task, model, devices))
    drawn = f"s32[{ROWS},{asentmax_layout(about).width(about)}]"
    assert drawn in whole_text
    if devices == "sequence=8":
        # All rows are on each device; and 9 positions are 16, split in 8.
        assert operations < whole_operations / 3
    else:
        assert drawn not in text
        assert operations < whole_operations / 6


@pytest.mark.nightly
@pytest.mark.parametrize(
    "model, devices",
    [
        ("transformer", "data=4,fsdp=2"),
        ("mosaic", "data=2,fsdp=2,sequence=2"),
        ("mosaic", "sequence=8"),
    ],
)
def test_scores_are_those_of_one_device(model, devices):
    """Of a number of sequences that the devices do not divide: read, counted and generated."""

    def scores(config):
        program, over = TASK.build(config, "relumax"), devices_of(config) or Devices()
        # Parameters as they are drawn make all keys alike: others have something to say.
        params = jax.tree.map(lambda x: 3 * x, program.init(0))
        with jax.set_mesh(over.mesh):
            return program.test(over.place(params), None)["lengths"]["7"]

    found, expected = (scores(tiny("copy", model, split)) for split in (devices, ""))
    assert {"loss", "exact", "released_exact", "support", "generated_exact", "bleu"} <= set(found)
    assert found.pop("loss") == pytest.approx(expected.pop("loss"), rel=1e-5)
    np.testing.assert_allclose(found.pop("support"), expected.pop("support"), atol=0.01)
    assert found == expected
