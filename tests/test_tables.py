"""The grid of kernels and bandwidth rules below a list of methods; the panel of curves."""

import types
from pathlib import Path

import pytest

from experiments.in_context.experiment import EXPERIMENT as IN_CONTEXT
from experiments.language.experiment import EXPERIMENT as LANGUAGE
from experiments.length.experiment import EXPERIMENT as LENGTH
from experiments.methods import PRODUCT, expand
from experiments.paper import METHODS
from experiments.runs.figures import draw_curves, new_figure
from experiments.runs.results import Results, Run, run_folder
from experiments.runs.tables import grid, spread

COLUMNS = ["kernel", "adaptive", "fixed", "anchored", "nearest:16"]


def run(method, seed=0, variant="", **result):
    folder = run_folder(Path("out"), method, seed, variant)
    return Run(folder, method, seed, {"steps": 1, "seconds": 1.0} | result, [])


def groups(methods, **options):
    return {name: [run(name, score=place, **options)] for place, name in enumerate(methods)}


def score(runs):
    return spread([one.result["score"] for one in runs], digits=0)


def cells(text, first="kernel"):
    """The rows of the table whose first head is `first`."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    start = next(place for place, row in enumerate(rows) if row and row[0] == first)
    found = [rows[start]]
    for row in rows[start + 2 :]:
        if not row:
            break
        found.append(row)
    return found


def test_all_methods_are_a_grid():
    about, table = grid(groups(PRODUCT), "Score", score)
    place = {name: str(number) for number, name in enumerate(PRODUCT)}
    assert about.startswith("Score, kernels by bandwidth rules")
    assert cells(table) == [
        COLUMNS,
        ["box", "", place["box@fixed"], "", place["top16_uniform"]],
        [
            *("epanechnikov", place["epanechnikov"], place["norm_relu"], place["relumax"]),
            place["epanechnikov@nearest:16"],
        ],
        *(
            [kernel, place[kernel], *(place[f"{kernel}@{rule}"] for rule in COLUMNS[2:])]
            for kernel in ("biweight", "triweight")
        ),
        ["gaussian", place["softmax"], "", "", place["top16_softmax"]],
    ]


def test_other_kernels_and_rules_have_a_place_at_the_end():
    _, table = grid(groups([*PRODUCT, "entmax:1.25", "biweight@nearest:4"]), "Score", score)
    rows = cells(table)
    assert rows[0] == [*COLUMNS, "nearest:4"] and rows[-1][0] == "entmax:1.25"


@pytest.mark.parametrize("methods", [METHODS, ("softmax", "biweight", "biweight@fixed"), ()])
def test_a_grid_that_says_nothing_new_is_left_out(methods):
    assert grid(groups(methods), "Score", score) == []


def test_learning_rates_of_their_own_stay_in_the_list():
    several = groups(PRODUCT) | {
        "softmax, lr0.5": [run("softmax", variant="lr0.5", score=99)],
    }
    assert [runs[0].name for runs in several.values()] == list(several)
    assert "99" not in grid(several, "Score", score)[1]


# In the experiments' own tables

COST = {"steps": 1, "seconds": 6.0, "ms_per_step": 1.0, "parameters": 10}
TRAINING = {"steps": 1, "epochs": 1, "batch_size": 4, "accumulate": 1}
SIZES = {"layers": 1, "heads": 2, "width": 8, "slots": 4, "hidden": 4}


def in_context(number):
    return {"accuracy": 0.5, "tvd": number / 100, "kl": 1.0}


def length(number):
    return {"lengths": {"8": {"exact": 1.0}, "16": {"exact": number / 100}, "32": {"exact": 0.0}}}


def language(number):
    return {"loss": float(number), "perplexity": 1.0, "bits_per_byte": 1.0, "support": []}


CASES = {
    "in_context": (IN_CONTEXT, in_context, "TVD", "0.{:02d}0"),
    "length": (LENGTH, length, "Exact match in % at 16 (2x)", "{}.0"),
    "language": (LANGUAGE, language, "Loss", "{}.0000"),
}
AUTOMATA = {"min_alphabet": 2, "max_alphabet": 4, "max_out_degree": 2, "max_tokens": 24}
ABOUT = {
    "in_context": {
        "compat": None,
        "data": {"train": 10, "automata": AUTOMATA},
        "model": SIZES,
    },
    "length": {"task": "sort", "model": "mosaic", "sizes": SIZES, "testing": {"samples": 4}},
    "language": {
        "compat": None,
        "data": {"name": "stories"},
        "text": {"tokenizer": "bytes", "windows": "random", "block": 8},
        "model": "mosaic",
        "sizes": SIZES,
    },
}
TEXT = {"tokens": 9, "documents": 1}
FACTS = {
    "in_context": {"test_automata": 6, "test_positions": 60, "states": [2, 3.0, 4]},
    "length": {"trained_lengths": [4, 8], "test_lengths": [8, 16, 32], "sequences": 4},
    "language": {"train": TEXT, "validation": TEXT},
}


@pytest.mark.parametrize("name", CASES)
def test_every_experiment_lays_all_methods_out(name):
    experiment, result, told, written = CASES[name]
    runs = [run(m, **COST | result(number)) for number, m in enumerate(expand(["all"]))]
    about = ABOUT[name] | {"preset": "smoke", "training": TRAINING}
    text = experiment.table(Results(Path("out"), name, about, FACTS[name], {}, runs))
    assert f"\n{told}, kernels by bandwidth rules" in text
    rows = {row[0]: row[1:] for row in cells(text)}
    assert rows["kernel"] == COLUMNS[1:]
    biweight = [PRODUCT.index(f"biweight{rule}") for rule in ("", "@fixed", "@anchored")]
    assert rows["biweight"][:3] == [written.format(number) for number in biweight]
    few = Results(Path("out"), name, about, FACTS[name], {}, runs[:3])
    assert "kernels by" not in experiment.table(few)


@pytest.mark.parametrize("curve", [([], []), ([1, 2], [0.5, 0.25])])
def test_results_without_the_trainings_logs_have_no_curves(curve):
    axes = new_figure(4, 3).subplots()
    draw_curves(axes, {"softmax": [types.SimpleNamespace(curve=lambda key: curve)]}, "loss")
    assert axes.get_visible() == bool(curve[0])
