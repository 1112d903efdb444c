"""Several runs in one program: the same runs as alone, on disk, too, and whatever stops them."""

import functools
import json
from contextlib import ExitStack, closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_run
from toy_experiment import EXPERIMENT, PROGRAM, TASK, Config, params_of

from experiments.in_context.config import Config as InContext
from experiments.in_context.experiment import EXPERIMENT as IN_CONTEXT
from experiments.in_context.task import TASK as AUTOMATA
from experiments.runs import command as command_part
from experiments.runs import command_line
from experiments.runs.task import step_of, steps_of
from kreg.training import (
    Progress,
    init_state,
    make_steps,
    read_metrics,
    train,
    train_together,
)
from kreg.training.run_directory import RunDirectory

SEEDS, STEPS = (0, 1, 2), 12
RATES = (1e-2, 3e-3, 1e-2)
OPTIONS = dict(
    steps=STEPS,
    evaluate=lambda params: PROGRAM.validate(params, None),
    eval_every=4,
    log_every=1,
    tokens_per_batch=16,
    best=("loss", "min"),
)


class Killed(BaseException):
    """What no code of ours catches: the process is gone."""


def started(seed, rate):
    state = init_state(PROGRAM.init(seed), PROGRAM.optimizer(rate), jax.random.key(seed))
    return state, TASK.batches(Config(), training_run.rows(), seed)


def alone(out: Path, place: int, **options):
    state, data = started(SEEDS[place], RATES[place])
    step, config = step_of(PROGRAM, RATES[place]), {"seed": SEEDS[place]}
    progress = Progress(quiet=True)
    with closing(data):
        return train(
            out / str(place),
            state,
            step,
            data,
            config=config,
            progress=progress,
            **OPTIONS | options,
        )


def together(out: Path, places=(0, 1, 2), steps_fn=None, **options):
    states, data = zip(*(started(SEEDS[i], RATES[i]) for i in places), strict=True)
    with ExitStack() as stack:
        for iterator in data:
            stack.enter_context(closing(iterator))
        return train_together(
            [out / str(i) for i in places],
            states,
            steps_fn or steps_of(PROGRAM),
            data,
            learning_rates=[RATES[i] for i in places],
            configs=[{"seed": SEEDS[i]} for i in places],
            progress=[Progress(quiet=True)] * len(places),
            **OPTIONS | options,
        )


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """The three runs, each alone."""
    out = tmp_path_factory.mktemp("apart")
    for place in range(3):
        alone(out, place)
    return out


def files(folder: Path) -> list[str]:
    """The names below a folder, but for Orbax's own, which hold sums of the contents."""
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    return sorted(path for path in paths if "/arrays/" not in path)


def assert_same_run(found: Path, wanted: Path):
    assert files(found) == files(wanted)
    assert (found / "config.json").read_text() == (wanted / "config.json").read_text()
    logs = [training_run.log_without_clock(folder) for folder in (found, wanted)]
    assert [set(event) for event in logs[0]] == [set(event) for event in logs[1]]
    for ours, theirs in zip(*logs, strict=True):
        assert ours.pop("event") == theirs.pop("event")
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    for which in ("last", "best"):
        for ours, theirs in zip(params_of(found, which), params_of(wanted, which), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)


# The same runs


@pytest.mark.parametrize("one_by_one", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_folders_are_those_of_runs_alone(apart, tmp_path, one_by_one):
    steps_fn = make_steps(PROGRAM.loss, PROGRAM.optimizer, one_by_one=one_by_one)
    ends = together(tmp_path, steps_fn=steps_fn)
    # Batches of 16 from 50 rows: the small one at the end of an epoch is a second shape.
    assert steps_fn._cache_size() == 2
    for place, end in enumerate(ends):
        assert (end.step, end.finished, end.stopped_by) == (STEPS, True, None)
        assert_same_run(tmp_path / str(place), apart / str(place))
        jax.tree.map(
            np.testing.assert_array_equal,
            jax.tree.leaves(end.state.params),
            params_of(tmp_path / str(place)),
        )
    one, other = (params_of(tmp_path / str(place))[0] for place in (0, 2))
    assert not np.allclose(one, other, atol=1e-3)


def automata_losses(method, dtype, rates, steps=10):
    """The losses of two seeds of Memory Mosaics, each alone and both together."""
    words = ["--data.train", "12", "--data.validation", "2", "--data.test", "2"]
    words += ["--data.automata.max-tokens", "20", "--training.batch-size", "4"]
    words += ["--model.width", "16", "--model.heads", "2", "--model.slots", "6"]
    config: InContext = command_line.parse(IN_CONTEXT, words)
    data, program = AUTOMATA.load(config), AUTOMATA.build(config, method)
    seeds = (3, 8)

    def state(seed, rate):
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), program.init(seed))
        return init_state(params, program.optimizer(rate), jax.random.key(seed))

    losses, batches = [], []
    for seed, rate in zip(seeds, rates, strict=True):
        step, now = step_of(program, rate), state(seed, rate)
        with closing(AUTOMATA.batches(config, data, seed)) as iterator:
            batches.append([next(iterator) for _ in range(steps)])
        losses.append([])
        for batch in batches[-1]:
            now, metrics = step(now, batch)
            losses[-1].append(float(metrics["loss"]))
    both = jax.tree.map(lambda *x: jnp.stack(x), *map(state, seeds, rates))
    update, found = make_steps(program.loss, program.optimizer, one_by_one=False), []
    for pair in zip(*batches, strict=True):
        stacked = jax.tree.map(lambda *x: np.stack(x), *pair)
        both, metrics = update(both, stacked, jnp.asarray(rates, dtype))
        found.append(metrics["loss"])
    assert update._cache_size() == 1
    return np.array(losses), np.stack(found, axis=1)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "method, rates",
    [("softmax", (4e-3, 4e-3)), ("biweight", (1e-3, 4e-3))],
    ids=["softmax", "biweight"],
)
def test_losses_are_those_of_each_seed_alone(method, rates):
    wanted, found = automata_losses(method, jnp.float32, rates)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert np.abs(wanted[0] - wanted[1]).min() > 1e-4


@pytest.mark.nightly
def test_losses_in_float64_are_those_of_each_seed_alone():
    with jax.enable_x64(True):
        wanted, found = automata_losses("biweight", jnp.float64, (1e-3, 4e-3))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, wanted, rtol=1e-9)


# What stops them


def test_slices_in_changing_company_add_up(apart, tmp_path):
    """Each slice is one step long, and no two have the same company until all are done."""
    assert [end.stopped_by for end in together(tmp_path, time_limit=1e-6)] == ["time"] * 3
    assert alone(tmp_path, 1, time_limit=1e-6).step == 2
    # The one behind goes first, and the other waits for it.
    assert [end.step for end in together(tmp_path, (2, 1), time_limit=1e-6)] == [2, 2]
    ends = together(tmp_path)
    assert [(end.step, end.finished) for end in ends] == [(STEPS, True)] * 3
    for place in range(3):
        assert_same_run(tmp_path / str(place), apart / str(place))


@pytest.mark.parametrize("saves", [1, pytest.param(5, marks=pytest.mark.nightly)])
def test_a_kill_between_the_saves_of_one_step(apart, tmp_path, monkeypatch, saves):
    """Some runs have saved a step, some have not; they go on from different steps."""
    save, done = RunDirectory.save, []

    def dies(directory, state, meta):
        if len(done) == saves:
            raise Killed
        save(directory, state, meta)
        done.append(meta.step)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save", dies)
        with pytest.raises(Killed):
            together(tmp_path)
    held = [len(list((tmp_path / str(place)).glob("checkpoints/step*"))) for place in range(3)]
    assert len(set(held)) == 2
    alone(tmp_path, 2)
    together(tmp_path)
    for place in range(3):
        assert_same_run(tmp_path / str(place), apart / str(place))


def test_a_full_disk_leaves_every_log_at_its_last_checkpoint(apart, tmp_path, monkeypatch):
    save = RunDirectory.save

    def full(directory, state, meta):
        if meta.step == 8 and directory.path.name == "1":
            raise OSError(28, "No space left on device", str(directory.path))
        save(directory, state, meta)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save", full)
        with pytest.raises(OSError, match="No space"):
            together(tmp_path)
    ends = [training_run.log_without_clock(tmp_path / str(i))[-1]["step"] for i in range(3)]
    assert ends == [8, 4, 4]
    together(tmp_path)
    for place in range(3):
        assert_same_run(tmp_path / str(place), apart / str(place))


def test_a_folder_in_use_stops_all_before_anything_changes(tmp_path):
    busy = RunDirectory(tmp_path / "1")
    with busy.opened({"seed": SEEDS[1]}), pytest.raises(OSError, match="another run"):
        together(tmp_path)
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_a_run_that_is_done_keeps_the_others_company_no_longer(apart, tmp_path):
    alone(tmp_path, 0)
    before = training_run.checksums(tmp_path / "0")
    ends = together(tmp_path)
    assert all(end.finished for end in ends) and ends[0].best_step is not None
    assert training_run.checksums(tmp_path / "0") == before
    for place in range(3):
        assert_same_run(tmp_path / str(place), apart / str(place))


def test_lists_of_different_lengths_are_refused(tmp_path):
    state, data = started(0, 1e-2)
    with closing(data), pytest.raises(ValueError, match="as many as"):
        train_together(
            [tmp_path / "a", tmp_path / "b"],
            [state],
            steps_of(PROGRAM),
            [data],
            learning_rates=[1e-2],
            steps=1,
            configs=[{}],
        )
    assert not list(tmp_path.iterdir())


# The command


command = functools.partial(command_part.command, EXPERIMENT)
CLOCK = ("seconds", "tokens_per_second", "ms_per_step")


def results(out: Path) -> dict[str, dict]:
    found = {}
    for path in sorted(out.rglob("result.json")):
        content = json.loads(path.read_text())
        name = path.parent.relative_to(out).as_posix()
        found[name] = {key: value for key, value in content.items() if key not in CLOCK}
    return found


def test_the_command_gives_the_same_results_in_company(tmp_path, capsys):
    words = ["--seeds", "0", "1", "2"]
    assert command([*words, "--out", str(tmp_path / "apart")]) == 0
    assert command([*words, "--out", str(tmp_path / "both"), "--together", "2"]) == 0
    assert "[1/4] softmax seeds 0, 1, 0.0 min so far" in capsys.readouterr().err
    ours, theirs = results(tmp_path / "both"), results(tmp_path / "apart")
    assert ours.keys() == theirs.keys() and len(ours) == 6
    for name, wanted in theirs.items():
        assert ours[name] == pytest.approx(wanted, rel=1e-5)
    assert files(tmp_path / "both") == files(tmp_path / "apart")
    record = json.loads((tmp_path / "both" / "softmax" / "seed1" / "run.json").read_text())
    assert record["sessions"][0]["together"] == 2


def test_seconds_are_a_runs_share_of_the_time(tmp_path, monkeypatch):
    """Two runs in company and one alone add up to what the clock says."""
    now = iter(range(10**6))
    monkeypatch.setattr("time.monotonic", lambda: float(next(now)))
    before = next(now)
    together(tmp_path, (0, 1))
    spent = next(now) - before
    logs = [read_metrics(tmp_path / str(i) / "metrics.jsonl") for i in (0, 1)]
    assert 0.6 * spent < sum(log[-1]["seconds"] for log in logs) <= spent
