"""The in-context experiment on a tiny scale: command line, runs, resuming, reports, mistakes."""

import dataclasses
import functools
import hashlib
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.in_context import task
from experiments.in_context.config import Model
from experiments.in_context.experiment import EXPERIMENT
from experiments.in_context.objective import (
    Rows,
    blank,
    evaluate,
    held_out,
    make_loss,
    make_measure,
    summary,
)
from experiments.in_context.task import TASK, make_model
from experiments.regbench import AutomataConfig, Score, make_split, metrics, ngram
from experiments.runs import command as run_command
from experiments.runs import command_line
from experiments.runs.results import read_experiment
from experiments.runs.sweep import settings
from kreg.training import load_params
from kreg.training.data import filled, stack

main = functools.partial(run_command.command, EXPERIMENT)
parse = functools.partial(command_line.parse, EXPERIMENT)

METHODS = ("softmax", "relumax")
# Ten sequences in batches of four: the last batch of an epoch is filled up.
MICRO = [
    *("--data.train", "10", "--data.validation", "5", "--data.test", "6"),
    *("--data.automata.max-tokens", "24"),
    *("--model.layers", "1", "--model.heads", "2", "--model.width", "8", "--model.slots", "4"),
    *("--training.epochs", "4", "--training.batch-size", "4", "--training.evaluations", "4"),
]
STEPS = 12
CLOCK = ("seconds", "tokens_per_second", "ms_per_step")


def command(out, *more, methods=METHODS):
    return ["--methods", *methods, "--out", str(out), *MICRO, *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which everything has been run."""
    out = tmp_path_factory.mktemp("micro") / "out"
    assert main(command(out)) == 0
    return out


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def checksums(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def without_clock(values):
    return {name: value for name, value in values.items() if name not in CLOCK}


def result(out, method, seed=0):
    return json.loads((out / method / f"seed{seed}" / "result.json").read_text())


def events(out, method):
    lines = (out / method / "seed0" / "metrics.jsonl").read_text().splitlines()
    return [without_clock(json.loads(line)) for line in lines]


# Objective and measures


@pytest.fixture(scope="module")
def benchmark():
    return make_split(AutomataConfig(max_tokens=40), train=6, validation=2, test=7, seed=0)


def bigram_model(params, tokens, key):
    return params[tokens]


def test_measures_on_the_device_are_those_of_the_benchmark(benchmark):
    test = benchmark.test
    logits = np.random.default_rng(0).normal(size=(20, 20)).astype(np.float32)
    found = evaluate(make_measure(bigram_model), jnp.asarray(logits), held_out(test, 4))
    model = np.asarray(jax.nn.softmax(logits[test.input_ids]), np.float64)
    score = Score.of(model, test.next_symbols(slice(None)), test.lengths)
    loss = metrics.cross_entropy(logits[test.input_ids], test.labels)
    assert found == pytest.approx({"loss": loss} | summary(score), abs=2e-6)
    assert found["positions"] == test.lengths.sum()


def test_filling_a_batch_up_changes_no_loss(benchmark):
    rows = [Rows(benchmark.train)[index] for index in range(3)]
    params = jnp.asarray(np.random.default_rng(1).normal(size=(20, 20)), jnp.float32)
    loss = jax.value_and_grad(make_loss(bigram_model), has_aux=True)
    (exact, _), gradient = loss(params, stack(rows), None)
    (more, _), other = loss(params, stack(filled(rows, 8, blank)), None)
    np.testing.assert_allclose(more, exact, rtol=1e-6)
    np.testing.assert_allclose(other, gradient, atol=1e-6)


def test_model_takes_the_method_and_the_authors_variant():
    sizes = Model(layers=1, heads=2, width=8, slots=4)
    model = make_model("relumax", sizes, "dense", 0)
    assert model.config.compat == "dense"
    assert model.config.kernel.order == 1
    assert (model.config.num_layers, model.config.memory_size) == (sizes.layers, sizes.slots)


# Runs


@pytest.mark.slow
def test_a_run_leaves_its_folder(finished):
    for method in METHODS:
        folder = finished / method / "seed0"
        found = result(finished, method)
        assert found["steps"] == STEPS
        assert 0 < found["accuracy"] < 1 and 0 < found["tvd"] < 1 and found["kl"] > 0
        assert np.shape(found["support"]) == (1, 2) and 1 < found["visible"] < 24
        record = json.loads((folder / "run.json").read_text())
        assert (record["method"], record["seed"]) == (method, 0)
        assert record["sessions"][0]["versions"]["jax"] == jax.__version__
        assert record["experiment"]["data"]["train"] == 10
        evaluations = [event for event in events(finished, method) if event["event"] == "eval"]
        assert [event["step"] for event in evaluations] == [3, 6, 9, 12]
        best = min(evaluations, key=lambda event: event["loss"])
        assert found["best_step"] == best["step"]


@pytest.mark.slow
def test_methods_differ(finished):
    softmax, relumax = (result(finished, method) for method in METHODS)
    assert softmax["loss"] != relumax["loss"]
    # Softmax gives weight to all that it sees.
    np.testing.assert_allclose(softmax["support"], softmax["visible"], atol=1e-3)
    assert np.max(relumax["support"]) < relumax["visible"] == softmax["visible"]


@pytest.mark.slow
def test_baselines_are_those_of_the_same_positions(finished):
    config = parse(command(finished))
    benchmark = make_split(config.data.automata, train=10, validation=5, test=6, seed=0)
    found = json.loads((finished / "baselines.json").read_text())
    for name, order in (("2-gram", 2), ("3-gram", 3)):
        assert found[name] == summary(ngram.score(benchmark.test, order))
    assert found["2-gram"]["positions"] == result(finished, "softmax")["positions"]


@pytest.mark.slow
def test_result_is_the_best_checkpoints(finished):
    config = parse(command(finished))
    setting = settings(config)[0]
    params = load_params(setting.folder, "best", TASK.build(config, "softmax").init(0))
    model = make_model("softmax", config.model, None, seed=1)
    nnx.update(model, params)
    benchmark = make_split(config.data.automata, train=10, validation=5, test=6, seed=0)
    test = benchmark.test
    logits = np.asarray(model(jnp.asarray(test.input_ids)), np.float64)
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    score = Score.of(
        shifted / shifted.sum(axis=-1, keepdims=True), test.next_symbols(slice(None)), test.lengths
    )
    found = result(finished, "softmax")
    assert {name: found[name] for name in summary(score)} == pytest.approx(summary(score), abs=1e-5)


@pytest.mark.slow
def test_finished_runs_are_skipped(copy, capsys):
    before = checksums(copy / "softmax")
    assert main(command(copy)) == 0
    assert checksums(copy / "softmax") == before
    assert "2 of 2 runs are finished already" in capsys.readouterr().err


@pytest.mark.nightly
def test_seeds_share_the_benchmark_and_nothing_else(copy):
    assert main(command(copy, "--seeds", "0", "1", methods=("softmax",))) == 0
    first, second = (result(copy, "softmax", seed) for seed in (0, 1))
    assert first["positions"] == second["positions"]
    assert first["loss"] != second["loss"]
    assert "±" in (copy / "table.md").read_text()


class Killed(BaseException):
    """What no code of ours catches: the process is gone."""


@pytest.mark.nightly
def test_resuming_after_a_kill_gives_the_same_run(finished, tmp_path, monkeypatch):
    batches = task.batches

    def killed_in_the_eighth_step(*arguments, **options):
        whole = batches(*arguments, **options)

        class Interrupted:
            steps = 0

            def __next__(self):
                self.steps += 1
                if self.steps == 8:
                    raise Killed
                return next(whole)

            get_state, set_state, close = whole.get_state, whole.set_state, whole.close

        return Interrupted()

    words = command(tmp_path, methods=("relumax",))
    with monkeypatch.context() as patch:
        patch.setattr(task, "batches", killed_in_the_eighth_step)
        with pytest.raises(Killed):
            main(words)
    assert not (tmp_path / "relumax" / "seed0" / "result.json").exists()
    assert main(words) == 0
    assert without_clock(result(tmp_path, "relumax")) == without_clock(result(finished, "relumax"))
    assert events(tmp_path, "relumax") == events(finished, "relumax")
    record = json.loads((tmp_path / "relumax" / "seed0" / "run.json").read_text())
    assert len(record["sessions"]) == 2


@pytest.mark.slow
def test_time_limit_stops_and_the_same_command_goes_on(finished, tmp_path, capsys):
    assert main(command(tmp_path, "--time-limit", "1e-9")) == 3
    assert "softmax, seed 0: not started" in (tmp_path / "table.md").read_text()
    assert "relumax, seed 0: not started" in capsys.readouterr().out
    assert main(command(tmp_path, methods=("softmax",))) == 0
    assert without_clock(result(tmp_path, "softmax")) == without_clock(result(finished, "softmax"))


# Table and figure


@pytest.mark.slow
def test_table_comes_from_the_folders_alone(finished, copy, capsys):
    (copy / "table.md").unlink()
    assert main(["table", str(copy)]) == 0
    text = capsys.readouterr().out
    assert (copy / "table.md").read_text() == (finished / "table.md").read_text() == text[:-1]
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    cells = {row[1]: row[2:] for row in rows if len(row) > 2}
    for method in METHODS:
        assert cells[method][0] == "1"
        assert cells[method][1] == f"{result(finished, method)['accuracy']:.3f}"
        assert cells[method][2] == f"{result(finished, method)['tvd']:.3f}"
    baselines = json.loads((finished / "baselines.json").read_text())
    assert cells["2-gram"][1] == f"{baselines['2-gram']['accuracy']:.3f}"
    assert "pixels" in text and "n = 1,000" in text and "Not the task above" in text
    assert "Measured on 6 automata" in text


@pytest.mark.slow
def test_old_results_have_a_table_too(copy, capsys):
    file = copy / "softmax" / "seed0" / "result.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({k: content[k] for k in content if k not in ("support", "visible")}))
    assert main(["table", str(copy)]) == 0
    rows = {line.split("|")[1].strip(): line for line in capsys.readouterr().out.splitlines()[4:8]}
    assert "%" in rows["relumax"] and "%" not in rows["softmax"]


@pytest.mark.slow
def test_official_tasks_are_told_from_others(copy):
    stored = copy / "experiment.json"
    content = json.loads(stored.read_text())
    content["experiment"]["data"]["automata"] = dataclasses.asdict(AutomataConfig())
    stored.write_text(json.dumps(content))
    assert main(["table", str(copy)]) == 0
    text = (copy / "table.md").read_text()
    assert "The benchmark's own automata" in text and "Not the task above" not in text


@pytest.mark.slow
def test_unfinished_runs_are_named(copy, capsys):
    (copy / "softmax" / "seed0" / "result.json").unlink()
    assert main(["table", str(copy)]) == 0
    text = capsys.readouterr().out
    assert "- softmax, seed 0: trained, not tested" in text
    assert [run.method for run in read_experiment(copy).unfinished] == ["softmax"]
    metrics_file = copy / "softmax" / "seed0" / "metrics.jsonl"
    metrics_file.write_text("".join(metrics_file.read_text().splitlines(keepends=True)[:5]))
    assert main(["table", str(copy)]) == 0
    assert f"of {STEPS}" in capsys.readouterr().out.split("unfinished:")[1]


@pytest.mark.slow
def test_figure_comes_from_the_folders_alone(copy):
    image = pytest.importorskip("matplotlib.image")
    for name in ("figure.png", "figure.pdf"):
        (copy / name).unlink()
    assert main(["figure", str(copy)]) == 0
    pixels = image.imread(copy / "figure.png")
    assert pixels.shape[1] > 1000 and pixels[..., :3].std() > 0.05
    assert (copy / "figure.pdf").read_bytes().startswith(b"%PDF")


# Mistakes: one line that names the thing, exit status 2, nothing changed


def refused(words, capsys, *names):
    assert main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    for name in names:
        assert str(name) in lines[0]


@pytest.mark.parametrize(
    "words, names",
    [
        (["--methods", "softmax", "sofmax"], ["sofmax", "relumax"]),
        (["--preset", "tiny"], ["--preset", "tiny", "smoke"]),
        (["--methods", "relumax", "relumax"], ["--methods"]),
        (["--training.epochs", "0"], ["--training.epochs", "0"]),
        (["--model.width", "9"], ["--model.width", "9"]),
        (["--time-limit", "-1"], ["--time-limit", "-1"]),
    ],
    ids=lambda words: words[0],
)
def test_impossible_values_are_refused(words, names, tmp_path, capsys):
    out = tmp_path / "out"
    refused([*command(out), *words], capsys, *names)
    assert not out.exists()


def test_folder_below_a_file_is_refused(tmp_path, capsys):
    blocker = tmp_path / "file"
    blocker.write_text("keep")
    refused(command(blocker / "runs"), capsys, blocker)
    assert checksums(tmp_path) == {blocker: hashlib.sha256(b"keep").hexdigest()}


@pytest.mark.slow
def test_folder_of_another_experiment_is_refused(copy, capsys):
    before = checksums(copy)
    refused(command(copy, "--training.learning-rate", "0.5"), capsys, "learning_rate", "0.5", copy)
    refused(command(copy, "--compat", "dense"), capsys, "compat", "dense")
    refused(command(copy, "--data.seed", "9"), capsys, "data.seed", "9")
    assert checksums(copy) == before


def test_folder_without_runs_has_no_table(tmp_path, capsys):
    refused(["table", str(tmp_path)], capsys, tmp_path)
    refused(["figure", str(tmp_path / "nowhere")], capsys, "nowhere")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_damaged_result_is_named(copy, capsys):
    damaged = copy / "softmax" / "seed0" / "result.json"
    damaged.write_text('{"accuracy": 0.')
    refused(["table", str(copy)], capsys, damaged)


@pytest.mark.slow
def test_missing_matplotlib_is_named(copy, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused(["figure", str(copy)], capsys, "matplotlib")
