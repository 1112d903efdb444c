"""Several real processes train one model, are killed, and end with what nobody disturbed gives."""

import functools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from killing import lines, signal_when, start

from experiments.in_context.config import Model
from experiments.in_context.task import make_model
from kreg.training import load_params, read_metrics

TINY = [
    *("--methods", "biweight", "--data.train", "32", "--data.validation", "8", "--data.test", "8"),
    *("--data.automata.max-tokens", "24", "--training.batch-size", "8"),
    *("--model.layers", "1", "--model.heads", "2", "--model.width", "32", "--model.slots", "32"),
]
SPLITS = {"2 of 2": (2, 2, "data=2,fsdp=2"), "1 of 4": (1, 4, "fsdp=4"), "4 of 1": (4, 1, "data=4")}


def train(out: Path, split: str = "2 of 2", epochs: int = 8):
    """Four steps and an evaluation an epoch."""
    processes, devices, layout = SPLITS[split]
    length = ("--training.epochs", str(epochs), "--training.evaluations", str(epochs))
    return start(
        *("-m", "experiments.launch.local", "--processes", str(processes)),
        *("--devices-per-process", str(devices), sys.executable),
        *("-m", "experiments.in_context", *TINY, *length, "--devices", layout),
        *("--out", str(out)),
    )


def log(out: Path) -> Path:
    return out / "biweight" / "seed0" / "metrics.jsonl"


def finish(process) -> None:
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err


def kill(process, out: Path, reached: int, one: bool, rng: random.Random) -> None:
    """Kill one of the processes, or all, as soon as the log has so many lines, or soon after."""
    deadline = time.monotonic() + 300
    while lines(log(out)) < reached and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.3))
    assert process.poll() is None, "the run ended before it was killed"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in rng.sample(children, 1) if one else children:
        os.kill(int(child), signal.SIGKILL)
    # The launcher ends when one of them dies, within the time that the others have.
    process.communicate(timeout=60)
    assert process.returncode != 0


def parameters(out: Path):
    config = Model(layers=1, heads=2, width=32, slots=32)
    like = nnx.to_pure_dict(nnx.state(make_model("biweight", config, None, 0), nnx.Param))
    return jax.tree.map(np.asarray, load_params(log(out).parent, "last", like))


def losses(out: Path) -> list[float]:
    return [event["loss"] for event in read_metrics(log(out))]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Callable[..., Path]:
    """The run of a split that nobody disturbs."""
    pytest.importorskip("matplotlib")

    @functools.cache
    def run(split: str, epochs: int = 8) -> Path:
        out = tmp_path_factory.mktemp("undisturbed")
        finish(train(out, split, epochs))
        return out

    return run


@pytest.mark.nightly
def test_killed_twenty_times_it_ends_as_if_nobody_had(undisturbed, tmp_path):
    """One process or all; the same processes go on, and end with the same bits."""
    # So long that it does not come to its end while a busy machine looks away.
    epochs = 40
    alone = undisturbed("2 of 2", epochs)
    rng, last = random.Random(0), lines(log(alone))
    for number, planned in enumerate(sorted(rng.randrange(last * 3 // 4) for _ in range(20))):
        process = train(tmp_path, epochs=epochs)
        kill(process, tmp_path, max(planned, lines(log(tmp_path))), number % 2, rng)
    finish(train(tmp_path, epochs=epochs))
    jax.tree.map(np.testing.assert_array_equal, parameters(tmp_path), parameters(alone))
    assert losses(tmp_path) == losses(alone)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "splits", [("1 of 4", "2 of 2"), ("2 of 2", "4 of 1"), ("4 of 1", "1 of 4", "2 of 2")]
)
def test_other_processes_go_on(splits, undisturbed, tmp_path):
    """All but the last are asked to stop, save, and end with status 0."""
    *stopped, last = splits
    alone = undisturbed(splits[0])
    for number, split in enumerate(stopped, 1):
        planned = number * lines(log(alone)) // len(splits)
        process = train(tmp_path, split)
        signal_when(
            process, signal.SIGTERM, lambda planned=planned: lines(log(tmp_path)) >= planned
        )
        finish(process)
        assert not (log(tmp_path).parent / "result.json").exists()
    finish(train(tmp_path, last))
    np.testing.assert_allclose(losses(tmp_path), losses(alone), rtol=1e-5)


@pytest.mark.nightly
def test_a_language_model_of_two_processes_is_that_of_one(tmp_path):
    """Time and parameters are split between them; the numbers of a result are those of one."""
    pytest.importorskip("matplotlib")
    tiny = [
        *("--methods", "biweight", "--text.stories", "200", "--text.validation-stories", "20"),
        *("--text.block", "64", "--training.steps", "12", "--training.warmup", "2"),
        *("--training.evaluations", "2", "--training.batch-size", "8", "--sizes.layers", "1"),
        *("--sizes.width", "32", "--sizes.heads", "2", "--sizes.slots", "32"),
        *("--tokens", str(tmp_path / "tokens")),
    ]
    one, other = of_one_and_of_two(tmp_path, "experiments.language", *tiny)
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert one["by_position"] == pytest.approx(other["by_position"], rel=1e-5)
    np.testing.assert_allclose(one["support"], other["support"], rtol=1e-2)


@pytest.mark.nightly
@pytest.mark.parametrize("model", ["mosaic", "transformer"])
def test_sequences_drawn_by_two_processes_are_those_of_one(model, tmp_path):
    """Learned from, read, counted and generated, numbers that the devices do not divide."""
    pytest.importorskip("matplotlib")
    tiny = [
        *("--task", "copy", "--model", model, "--methods", "biweight", "--data.seq-len", "5"),
        *("--data.vary-len", "2", "--data.validation", "6", "--testing.samples", "6"),
        *("--testing.generated", "3", "--testing.generated-lengths", "2"),
        *("--testing.multiples", "1", "2", "--training.steps", "12", "--training.warmup", "2"),
        *("--training.evaluations", "2", "--training.batch-size", "8", "--sizes.layers", "1"),
        *("--sizes.width", "32", "--sizes.heads", "2", "--sizes.hidden", "40"),
    ]
    one, other = of_one_and_of_two(tmp_path, "experiments.length", *tiny)
    for found, expected in zip(other["lengths"].values(), one["lengths"].values(), strict=True):
        assert found.pop("loss") == pytest.approx(expected.pop("loss"), rel=1e-5)
        np.testing.assert_allclose(found.pop("support"), expected.pop("support"), rtol=1e-2)
        assert found == expected


def of_one_and_of_two(folder: Path, *command: str) -> tuple[dict, dict]:
    """Results of a command as one process on one device, and as two on two each."""
    two = ("-m", "experiments.launch.local", "--processes", "2", "--devices-per-process", "2")
    devices = ("--devices", "fsdp=2,sequence=2")
    finish(start("-m", *command, "--out", str(folder / "one")))
    finish(start(*two, sys.executable, "-m", *command, *devices, "--out", str(folder / "two")))
    one, other = (
        json.loads((folder / name / "biweight/seed0/result.json").read_text())
        for name in ("one", "two")
    )
    return one, other
