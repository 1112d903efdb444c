"""One command an experiment of the paper, and one page of results."""

import base64
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import toy_experiment
import training_run

from experiments.__main__ import main
from experiments.in_context.experiment import EXPERIMENT as IN_CONTEXT
from experiments.length.experiment import EXPERIMENT as LENGTH
from experiments.methods import method
from experiments.paper import EXPERIMENTS, LADDER, Entry
from experiments.runs import command_line
from experiments.runs.cost import Cost
from experiments.runs.forecast import forecast
from experiments.runs.html import to_html
from experiments.runs.results import Results, Run

EXPERIMENTS_FOLDER = Path(__file__).parents[1] / "experiments"
TINY = [
    *("--data.train", "10", "--data.validation", "5", "--data.test", "6"),
    *("--data.automata.max-tokens", "24", "--training.epochs", "4"),
    *("--model.layers", "1", "--model.heads", "2", "--model.width", "8", "--model.slots", "4"),
]


@pytest.fixture
def toy(monkeypatch):
    """The toy as if it were an experiment of the paper."""
    for module in ("experiments.toy", "experiments.toy.experiment"):
        monkeypatch.setitem(sys.modules, module, toy_experiment)
    monkeypatch.setitem(EXPERIMENTS, "toy", Entry("A toy", "toy", methods=("softmax",)))


def refused(words, capsys, *names):
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    for name in names:
        assert name in line


# The table of experiments


@pytest.mark.parametrize("entry", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_methods_and_seeds_of_every_preset(entry):
    for name in entry.methods:
        method(name)
    for preset in ("smoke", "small", "paper"):
        assert entry.seeds[preset] == (0, 1, 2)[: len(entry.seeds[preset])]


def test_the_papers_ladder_is_a_folder_a_rung():
    entry = EXPERIMENTS["icl"]
    commands = entry.commands("paper", ["--together", "3"])
    configs = [command_line.parse(IN_CONTEXT, words) for words in commands]
    assert [config.data.train for config in configs] == [int(rung[1]) for rung in LADDER]
    assert len({config.folder for config in configs}) == len(LADDER)
    for config in configs:
        assert (config.preset, config.seeds, config.together) == ("paper", (0, 1, 2), "3")
        assert config.methods == entry.methods
    (one,) = entry.commands(
        "paper", ["--data.train", "100", "--seeds", "7", "--methods", "relumax"]
    )
    config = command_line.parse(IN_CONTEXT, one)
    assert (config.data.train, config.seeds, config.methods) == (100, (7,), ("relumax",))
    assert len(entry.commands("small", [])) == 1


def test_what_is_not_there_is_said(capsys, monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "later", Entry("What comes later", "later"))
    refused(["reproduce", "later"], capsys, "What comes later", "experiments.later.experiment")
    refused(["reproduce", "icml"], capsys, "icl", "moons", "icml")
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "What comes later (not in this version)" in " ".join(capsys.readouterr().out.split())


def ticked(cell):
    return re.findall(r"`([^`]+)`", cell)


def test_the_readme_names_the_folders_and_what_is_kept():
    text = (EXPERIMENTS_FOLDER / "README.md").read_text()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    _, *claims = [row for row in rows if len(row) == 5 and ticked(row[1])]
    assert {ticked(row[1])[0].split()[0] for row in claims} == {*EXPERIMENTS}
    results = EXPERIMENTS_FOLDER / "results"
    for _, command, folder, _, kept in claims:
        name, option, preset = ticked(command)[0].split()
        entry = EXPERIMENTS[name]
        assert option == "--preset"
        configs = [command_line.parse(entry.load(), w) for w in entry.commands(preset, [])]
        wanted = [config.folder.relative_to("runs").as_posix() for config in configs]
        assert ticked(folder) == wanted
        assert kept.strip().startswith("nothing") or (results / ticked(kept)[0]).is_dir()
    named = {ticked(row[0])[0]: row[1] for row in rows if len(row) == 3 and ticked(row[0])}
    assert named.keys() == {path.name for path in results.iterdir()}
    for name, commit in named.items():
        for file in (results / name).glob("*/*/run.json"):
            sessions = json.loads(file.read_text())["sessions"]
            assert {session["commit"][:12] for session in sessions} <= {*ticked(commit)}


# Reproducing


def test_what_is_missing_is_trained_and_the_cost_is_written(toy, tmp_path, capsys):
    words = ["reproduce", "toy", "--out", str(tmp_path)]
    assert main(words) == 0
    assert "1 runs of" in capsys.readouterr().err
    for name in ("table.md", "figure.png", "figure.pdf"):
        assert (tmp_path / name).stat().st_size > 0
    cost = json.loads((tmp_path / "cost.json").read_text())
    result = json.loads((tmp_path / "softmax" / "seed0" / "result.json").read_text())
    assert (cost["runs"], cost["seeds"]) == (1, [0])
    assert cost["seconds"] == pytest.approx(result["seconds"], abs=0.06)
    assert cost["tokens"] == pytest.approx(12 * 16) and len(cost["commits"]) == 1
    before = training_run.checksums(tmp_path / "softmax")
    assert main(words) == 0 and training_run.checksums(tmp_path / "softmax") == before
    capsys.readouterr()
    refused([*words, "--training.steps", "13"], capsys, "steps", "13")


@pytest.mark.nightly
def test_a_dry_run_writes_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    words = ["reproduce", "icl", *TINY, "--out", str(out), "--seeds", "0", "1", "--dry-run"]
    assert main([*words, "--rate", "1000"]) == 0
    text = capsys.readouterr().out
    assert f"in_context in {out}: 16 runs (16 to do) of 582 parameters" in text
    assert "4 steps" in text and "by formula" in text and "1,000 tokens a second" in text
    assert main(words) == 0
    measured = capsys.readouterr().out
    assert "measured with softmax" in measured and "as XLA counts them" in measured
    assert not out.exists()
    refused([*words, "--rate", "-1"], capsys, "--rate")


def test_the_hours_of_several_folders_add_up(toy, monkeypatch, capsys):
    rungs = (("--training.steps", "12"), ("--training.steps", "24"))
    entry = Entry("A toy", "toy", methods=("softmax",), folders={"smoke": rungs})
    monkeypatch.setitem(EXPERIMENTS, "toy", entry)
    assert main(["reproduce", "toy", "--dry-run", "--rate", "16"]) == 0
    assert capsys.readouterr().out.endswith("2 folders: 36 s\n")


def test_a_forecast_reckons_with_what_is_left(tmp_path):
    config = toy_experiment.Config(seeds=(0, 1, 2), out=tmp_path, together="3")
    found = forecast(toy_experiment.EXPERIMENT, config)
    assert (found.runs, found.left, found.tokens) == (6, 6, 12 * 16)
    assert found.parameters == 2 * 64 + 16 + 32 and found.operations is None
    assert found.measured is not None and found.measured.runs == 3
    least = 2 * 12 * found.measured.step_seconds
    assert found.seconds > least
    stated = forecast(toy_experiment.EXPERIMENT, config, rate=96.0)
    assert stated.seconds == pytest.approx(6 * 2.0)
    done = tmp_path / "softmax" / "seed1" / "result.json"
    done.parent.mkdir(parents=True)
    done.write_text("{}")
    left = forecast(toy_experiment.EXPERIMENT, config, rate=96.0)
    assert (left.left, left.seconds) == (5, pytest.approx(5 * 2.0))


# The page


ATTRIBUTES = {
    "html": {"lang"},
    "meta": {"charset", "name", "content"},
    "table": {"class"},
    "div": {"class"},
    "th": {"class"},
    "td": {"class"},
    "img": {"alt", "src"},
}
PLAIN = {
    *("head", "title", "style", "body", "h1", "h2", "h3", "p", "section", "ul", "li"),
    *("thead", "tbody", "tr", "strong", "code", "dl", "dt", "dd"),
}
VOID = {"meta", "img"}


class Reader(HTMLParser):
    """Read a page, and refuse what is not well-formed or could reach beyond the page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self.open, self.rows = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open
        assert all(len(set(map(len, rows))) == 1 for rows in self.rows)

    def handle_starttag(self, tag, attributes):
        assert {name for name, _ in attributes} <= ATTRIBUTES.get(tag, set()), tag
        assert tag in PLAIN or tag in ATTRIBUTES
        # No block may stand in a paragraph, which it would end.
        assert "p" not in self.open or tag in ("strong", "code")
        self.tags.append(tag)
        self.attributes += attributes
        if tag == "table":
            self.rows.append([])
        elif tag == "tr":
            self.rows[-1].append([])
        elif tag in ("td", "th"):
            self.rows[-1][-1].append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_a_page_stands_alone(toy, tmp_path, capsys):
    image = pytest.importorskip("matplotlib.image")
    assert main(["reproduce", "toy", "--out", str(tmp_path / "a<b")]) == 0
    assert main(["report", str(tmp_path / "a<b"), "--to", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    page = Reader(text)
    assert text.startswith("<!DOCTYPE html>")
    for tag in ("html", "head", "title", "style", "body", "h1"):
        assert page.tags.count(tag) == 1
    (source,) = [value for name, value in page.attributes if name == "src"]
    kind, drawn = source.split(",")
    assert kind == "data:image/png;base64"
    pixels = image.imread(io.BytesIO(base64.b64decode(drawn, validate=True)))
    assert (pixels == image.imread(tmp_path / "a<b" / "figure.png")).all()
    assert "color-scheme: light dark" in text
    assert not any(reach in text.replace(drawn, "") for reach in ("http", "//", "url(", "@import"))
    assert ("name", "viewport") in page.attributes and ("charset", "utf-8") in page.attributes
    words = " ".join(page.words)
    record = json.loads((tmp_path / "a<b" / "softmax" / "seed0" / "run.json").read_text())
    for told in ("softmax", "a<b", "1, seeds 0", record["sessions"][0]["commit"][:12]):
        assert told in words
    capsys.readouterr()
    refused(["report", str(tmp_path)], capsys, str(tmp_path))


@pytest.mark.parametrize(
    ("experiment", "tables", "told"),
    [
        (IN_CONTEXT, 2, (".951/.145", "Read off the pixels", "0.935")),
        (LENGTH, 4, ("2506.16640", "Second-hand", "doubtful")),
    ],
    ids=["icl", "length"],
)
def test_published_numbers_are_marked_and_say_where_they_come_from(experiment, tables, told):
    page = Reader(f"<body>{to_html(experiment.published)}</body>")
    assert page.attributes.count(("class", "published")) == tables == page.tags.count("table")
    words = " ".join(page.words)
    assert all(part in words for part in told)


@pytest.mark.parametrize("text", ["<p>a", "<p><ul></ul></p>", "<img src=x onerror=y>", "<b></b>"])
def test_the_reader_refuses(text):
    with pytest.raises(AssertionError):
        Reader(text)


def test_runs_of_an_unknown_experiment_are_refused(tmp_path, capsys):
    content = {"name": "chess", "experiment": {}, "benchmark": {}}
    (tmp_path / "experiment.json").write_text(json.dumps(content))
    to = tmp_path / "page.html"
    refused(["report", str(tmp_path), "--to", str(to)], capsys, "chess", str(tmp_path))
    assert not to.exists()


def test_tables_keep_their_columns():
    text = to_html("| a | b |\n|---|--:|\n| x | 1 |\n| y |  |")
    page = Reader(text)
    assert page.tags.count("td") == 4 and page.attributes.count(("class", "r")) == 3
    assert '<td>y</td><td class="r"></td>' in text


def test_costs_add_up(tmp_path):
    session = {"commit": "abc", "modified": True, "device": {"kind": "K", "machine": "m"}}
    result = {"steps": 10, "seconds": 60.0, "tokens_per_second": 50.0, "ms_per_step": 200.0}
    runs = [Run(tmp_path, "softmax", seed, result, [], [session]) for seed in (1, 0)]
    waiting = Run(tmp_path, "softmax", 2, {}, [], [])
    cost = Cost.of(Results(tmp_path, "toy", {}, {}, {}, [*runs, waiting]))
    assert (cost.runs, cost.seconds, cost.tokens, cost.seeds) == (2, 120.0, 200.0, (0, 1))
    assert (cost.machines, cost.commits) == (("K (m)",), ("abc*",))
