"""Interrupted runs, bit for bit: killed, stopped, cut into slices, moved between iterators."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import training_run
from killing import lines, signal_when, start
from training_run import STEPS, checksums, initial_params, log_without_clock

from kreg.training import load_params


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("uninterrupted") / "run"
    result = training_run.run(directory)
    assert (result.step, result.finished, result.stopped_by) == (STEPS, True, None)
    return directory


def _start(directory: Path, pause: float = 0.0) -> subprocess.Popen:
    return start(training_run.__file__, str(directory), "--pause", str(pause))


def _logged(directory: Path) -> int:
    return lines(directory / "metrics.jsonl")


def _assert_same_run(directory: Path, reference: Path) -> None:
    assert log_without_clock(directory) == log_without_clock(reference)
    for which in ("last", "best"):
        ours, theirs = (load_params(d, which, initial_params()) for d in (directory, reference))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.nightly
def test_killed_at_any_moment_it_ends_as_if_nobody_had(tmp_path, uninterrupted):
    directory = tmp_path / "run"
    checkpoints = directory / "checkpoints"
    for name, moment in {
        "before anything is saved": directory.exists,
        "in the middle of a save": lambda: any(checkpoints.glob(".unfinished_step_*")),
        "in the middle of a later save": lambda: (
            _logged(directory) >= 9 and any(checkpoints.glob(".unfinished_step_*"))
        ),
    }.items():
        process = _start(directory, pause=0.05)
        signal_when(process, signal.SIGKILL, moment)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, name
    killed_at = _logged(directory)
    assert 9 <= killed_at < STEPS - 5

    process = _start(directory, pause=0.05)
    signal_when(process, signal.SIGTERM, lambda: _logged(directory) >= killed_at + 2)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    stopped = json.loads(out)
    assert stopped["stopped_by"] == "SIGTERM" and stopped["step"] < STEPS
    # Plain lines and nothing else: no warning, no traceback, no log of a library.
    assert err.startswith("going on from step")
    assert all(line.startswith(("step ", "going on")) for line in err.splitlines()), err

    result = training_run.run(directory)
    assert (result.step, result.finished) == (STEPS, True)
    _assert_same_run(directory, uninterrupted)


def test_trained_and_restored_parameters_are_evaluated_by_one_program(tmp_path):
    measure = jax.jit(lambda params: training_run.validation(params))

    def evaluate(params):
        return {"val_loss": float(measure(params))}

    for steps in (2, 4):
        training_run.run(tmp_path / "run", steps=steps, eval_every=1, evaluate=evaluate)
    measure(load_params(tmp_path / "run", "best", initial_params()))
    assert measure._cache_size() == 1


def test_a_signal_after_the_last_step_is_told(tmp_path):
    """The run is done and saved; who called it knows that nothing else is to follow."""

    def evaluate(params):
        os.kill(os.getpid(), signal.SIGTERM)
        return {"val_loss": 1.0}

    result = training_run.run(tmp_path / "run", steps=2, eval_every=2, evaluate=evaluate)
    assert (result.step, result.finished, result.stopped_by) == (2, True, "SIGTERM")
    result = training_run.run(tmp_path / "run", steps=2, eval_every=2)
    assert (result.step, result.finished, result.stopped_by) == (2, True, None)


def test_slices_of_time_add_up_to_the_whole_run(tmp_path, uninterrupted):
    directory = tmp_path / "run"
    ends = []
    while not ends or ends[-1].stopped_by == "time":
        # The first slice is over before its first step is done; each makes progress even so.
        limit = 1e-6 if not ends else 0.5
        ends.append(training_run.run(directory, pause=0.05, time_limit=limit))
        assert len(ends) <= STEPS
    steps = [end.step for end in ends]
    assert len(ends) > 2 and steps[0] == 1 and steps == sorted(set(steps)) and steps[-1] == STEPS
    assert [end.finished for end in ends] == [False] * (len(ends) - 1) + [True]
    _assert_same_run(directory, uninterrupted)


def test_a_finished_run_is_left_alone(uninterrupted):
    before = checksums(uninterrupted)
    result = training_run.run(uninterrupted)
    assert (result.step, result.finished) == (STEPS, True)
    assert checksums(uninterrupted) == before


def test_leftovers_of_a_kill_are_removed(tmp_path):
    directory = tmp_path / "run"
    training_run.run(directory, steps=8)
    folder = directory / "checkpoints"
    # A kill can leave a half-written folder, a half-removed one, or one that was to be removed.
    (folder / ".unfinished_step_00000009" / "arrays").mkdir(parents=True)
    (folder / ".unfinished_step_00000004").mkdir()
    (directory / ".unfinished_config.json").write_text("{")
    training_run.run(directory, steps=12)
    assert not list(directory.rglob(".unfinished*"))


def test_a_run_moves_between_machines_with_and_without_grain(tmp_path, uninterrupted, monkeypatch):
    directory = tmp_path / "run"
    training_run.run(directory, steps=10)
    monkeypatch.setitem(sys.modules, "grain", None)
    training_run.run(directory, steps=20)
    monkeypatch.undo()
    training_run.run(directory)
    _assert_same_run(directory, uninterrupted)


def test_the_best_checkpoint_is_the_one_with_the_best_score(tmp_path):
    directory = tmp_path / "run"
    scores = iter([0.9, float("nan"), 0.3, 0.5, 0.3, 0.8])

    def evaluate(params):
        return {"accuracy": 1.0, "val_loss": next(scores)}

    result = training_run.run(
        directory, steps=12, evaluate=evaluate, eval_every=2, save_every=4, keep_last=1
    )
    assert result.best_step == 6
    kept = sorted(path.name for path in (directory / "checkpoints").iterdir())
    assert kept == ["step_00000006", "step_00000012"]
    best, last = (load_params(directory, which, initial_params()) for which in ("best", "last"))
    assert not np.array_equal(best["head"], last["head"])
    jax.tree.map(np.testing.assert_array_equal, last, result.state.params)


def test_most_can_be_best(tmp_path):
    scores = iter([0.1, 0.7, 0.4])
    result = training_run.run(
        tmp_path / "run",
        steps=3,
        evaluate=lambda params: {"accuracy": next(scores)},
        eval_every=1,
        best=("accuracy", "max"),
    )
    assert result.best_step == 2


def test_the_callers_state_stays_usable(tmp_path):
    from kreg.training import adamw, batches, init_state, make_step, train

    params, tx = initial_params(), adamw(1e-2)
    state = init_state(params, tx, jax.random.key(1))
    data = batches(training_run.rows(), 16, seed=0)
    step, quiet = make_step(training_run.loss, tx), training_run.Progress(quiet=True)
    for directory in (tmp_path / "a", tmp_path / "b"):
        data.set_state({"next_index": 0})
        train(directory, state, step, data, steps=2, config={}, log_every=1, progress=quiet)
    data.close()
    assert log_without_clock(tmp_path / "a") == log_without_clock(tmp_path / "b")
    assert np.isfinite(params["head"]).all()
