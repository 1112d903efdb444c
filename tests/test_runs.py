"""What the experiments share, on a toy: the face to an experiment, sweeps, folders, mistakes."""

import dataclasses
import functools
import json
import os
import signal

import pytest
import toy_experiment
from toy_experiment import EXPERIMENT, Config

from experiments.runs import command as command_part
from experiments.runs import command_line
from experiments.runs.results import read_experiment
from experiments.runs.sweep import company_size, in_company, settings

command = functools.partial(command_part.command, EXPERIMENT)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy") / "out"
    assert command(["--out", str(out), "--seeds", "0", "1"]) == 0
    return out


def test_a_new_experiment_gets_folders_table_and_figure(finished):
    found = read_experiment(finished, EXPERIMENT.scores)
    assert [(run.method, run.seed) for run in found.runs] == [
        ("softmax", 0),
        ("softmax", 1),
        ("biweight", 0),
        ("biweight", 1),
    ]
    assert all(run.finished and run.result["steps"] == 12 for run in found.runs)
    assert found.benchmark == {"rows": 50} and found.baselines == {}
    text = (finished / "table.md").read_text()
    assert text.count("±") == 2 and "unfinished" not in text
    record = json.loads((finished / "softmax" / "seed0" / "run.json").read_text())
    assert record["sessions"][0]["together"] == 1 and record["sessions"][0]["versions"]["jax"]


def test_a_signal_while_the_last_step_is_judged_leaves_the_test_to_the_next_command(
    tmp_path, monkeypatch
):
    judged = []

    def validate(params, data):
        judged.append(params)
        if len(judged) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"loss": 1.0}

    words = ["--out", str(tmp_path), "--methods", "softmax", "biweight"]
    program = dataclasses.replace(toy_experiment.PROGRAM, validate=validate)
    task = dataclasses.replace(toy_experiment.TASK, build=lambda config, method: program)
    with monkeypatch.context() as patch:
        patch.setattr(toy_experiment, "TASK", task)
        assert command(words) == 0
    assert len(judged) == 3 and not list(tmp_path.rglob("result.json"))
    assert command(words) == 0
    assert len(list(tmp_path.rglob("result.json"))) == 2


def test_scores_that_a_result_lacks_are_named(finished):
    with pytest.raises(ValueError, match=r"result\.json: expected the key 'accuracy'"):
        read_experiment(finished, ("accuracy",))


def test_options_are_the_fields_of_its_config():
    words = ["--seeds", "3", "4", "--training.steps", "7", "--together", "2"]
    found = command_line.parse(EXPERIMENT, words)
    assert (found.seeds, found.training.steps, found.together) == ((3, 4), 7, "2")
    assert EXPERIMENT.program == "python -m experiments.toy"


@pytest.mark.parametrize("word", ["0", "-1", "two", "1.5", ""])
def test_company_is_auto_or_a_number(word):
    with pytest.raises(ValueError, match="--together"):
        toy_experiment.check(Config(together=word))


def test_companies_are_of_one_method_and_in_the_order_of_the_runs():
    config = Config(seeds=(5, 6, 7), together="2")
    everything = settings(config)

    def names(size):
        return [(c[0].method, [s.seed for s in c]) for c in in_company(everything, size)]

    assert names(2) == [
        ("softmax", [5, 6]),
        ("biweight", [5, 6]),
        ("softmax", [7]),
        ("biweight", [7]),
    ]
    assert names(1) == [(setting.method, [setting.seed]) for setting in everything]
    # A finished run leaves its company, not its place.
    assert [c[0].method for c in in_company(everything[1:], 1)][:2] == ["biweight", "softmax"]


def test_learning_rates_are_runs_of_their_own(tmp_path, capsys):
    """The config's own rate keeps the folder it always had; every other has a row of the table."""
    words = ["--out", str(tmp_path), "--methods", "softmax", "--training.steps", "4"]
    assert command(words) == 0
    before = (tmp_path / "softmax" / "seed0" / "result.json").read_bytes()
    more = ["--learning-rates", "0.01", "1e-05", "--seeds", "0", "1", "--together", "4"]
    assert command([*words, *more]) == 0
    assert "1 of 4 runs are finished already" in (told := capsys.readouterr().err)
    assert "[1/1] softmax seeds 0 lr1e-05, 1, 1 lr1e-05" in told
    assert (tmp_path / "softmax" / "seed0" / "result.json").read_bytes() == before
    found = read_experiment(tmp_path).by_method()
    assert {name: [run.seed for run in runs] for name, runs in found.items()} == {
        "softmax": [0, 1],
        "softmax, lr1e-05": [0, 1],
    }
    errors = [[run.result["error"] for run in runs] for runs in found.values()]
    assert min(errors[1]) > max(errors[0])
    record = json.loads((tmp_path / "softmax" / "seed0-lr1e-05" / "config.json").read_text())
    assert record["experiment"]["training"]["learning_rate"] == 1e-5
    assert "softmax, lr1e-05" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize("rates", [(0.0,), (1e-3, 1e-3), (float("nan"),)])
def test_learning_rates_are_positive_and_different(rates):
    with pytest.raises(ValueError, match="--learning-rates"):
        toy_experiment.check(Config(learning_rates=rates))


def test_auto_is_all_seeds_where_there_is_an_accelerator(monkeypatch):
    config = Config(methods=("softmax",), seeds=(0, 1, 2))
    assert company_size(config) == 1
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    assert company_size(config) == 3
    assert company_size(dataclasses.replace(config, together="2")) == 2
    assert company_size(dataclasses.replace(config, learning_rates=(1e-3, 1e-2))) == 6
