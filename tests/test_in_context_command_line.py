"""What the in-context experiment reads from a command line, with tyro and without."""

import dataclasses
import functools
import sys

import pytest

from experiments.in_context.config import PRESETS, Config
from experiments.in_context.experiment import EXPERIMENT
from experiments.methods import PRODUCT
from experiments.regbench import AutomataConfig
from experiments.runs import command_line
from experiments.runs.sweep import settings

parse = functools.partial(command_line.parse, EXPERIMENT)


@pytest.fixture(params=["tyro", "argparse"])
def reader(request, monkeypatch):
    if request.param == "tyro":
        pytest.importorskip("tyro")
    else:
        monkeypatch.setitem(sys.modules, "tyro", None)
    return request.param


def test_options_override_the_preset(reader, tmp_path):
    words = ["--preset", "small", "--methods", "softmax", "entmax:1.25", "--seeds", "0", "1", "2"]
    words += ["--out", str(tmp_path), "--compat", "dense", "--time-limit", "7.5"]
    words += ["--training.learning-rate", "0.5", "--data.automata.max-tokens", "None"]
    small = PRESETS["small"]
    assert parse(words) == dataclasses.replace(
        small,
        methods=("softmax", "entmax:1.25"),
        seeds=(0, 1, 2),
        out=tmp_path,
        compat="dense",
        time_limit=7.5,
        training=dataclasses.replace(small.training, learning_rate=0.5),
        data=dataclasses.replace(small.data, automata=AutomataConfig()),
    )


def test_all_methods_are_the_product(reader):
    assert parse(["--methods", "all"]).methods == PRODUCT


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_unchanged_without_options(reader, preset):
    assert parse(["--preset", preset]) == PRESETS[preset]
    assert parse([f"--preset={preset}"]) == PRESETS[preset]


def test_help_teaches(reader, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for taught in (
        "biweight@anchored",
        "smoke: tiny automata",
        "--training.learning-rate",
        "--seeds",
    ):
        assert taught in text


def test_unknown_option_is_named(reader, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--modle.width", "8"])
    assert caught.value.code == 2
    assert "--modle.width" in capsys.readouterr().err


def test_paper_preset_is_the_published_setting():
    paper = PRESETS["paper"]
    assert dataclasses.astuple(paper.model) == (2, 8, 128, 448, 0.05, 0.05)
    assert dataclasses.astuple(paper.training) == (200, 32, 1e-4, 0.01, 1.0, 200)
    assert paper.data.automata == AutomataConfig()
    assert (paper.data.validation, paper.data.test) == (500, 500)
    ladder = {1000: 6400, 2500: 15800, 5000: 31400, 10000: 62600, 20000: 125000, 40000: 250000}
    for train, steps in ladder.items():
        config = dataclasses.replace(paper, data=dataclasses.replace(paper.data, train=train))
        assert config.steps == steps
        assert config.folder.name == f"paper-n{train}"


def test_default_folders_keep_experiments_apart():
    smoke = PRESETS["smoke"]
    fewer = dataclasses.replace(smoke, data=dataclasses.replace(smoke.data, train=7))
    variants = (smoke, PRESETS["small"], fewer, dataclasses.replace(smoke, compat="eft"))
    assert len({config.folder for config in variants}) == len(variants)


def test_first_seed_of_every_method_comes_first():
    order = settings(dataclasses.replace(Config(), methods=("softmax", "relumax"), seeds=(3, 5)))
    pairs = [(setting.method, setting.seed) for setting in order]
    assert pairs == [("softmax", 3), ("relumax", 3), ("softmax", 5), ("relumax", 5)]
