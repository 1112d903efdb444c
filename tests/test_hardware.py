"""The command for accelerators: on a CPU, without what such machines lack, and when it is cut."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import toy_experiment

from experiments.hardware import contract as contract_part
from experiments.hardware import queue as queue_part
from experiments.hardware import timing as timing_part
from experiments.hardware.carry import pack, unpack
from experiments.hardware.contract import contract
from experiments.hardware.deadline import Deadline
from experiments.hardware.findings import Check, Finding
from experiments.hardware.jobs import read_queue, state
from experiments.hardware.options import QUEUE, SMOKE_QUEUE, parse
from experiments.hardware.queue import work_on_queue
from experiments.hardware.report import Report
from experiments.hardware.stopwatch import Entry
from experiments.hardware.timing import timing
from experiments.language.config import Text
from experiments.methods import PRODUCT
from experiments.paper import EXPERIMENTS, METHODS
from experiments.paper import Entry as PaperEntry

ROOT = Path(__file__).parents[1]
LACKING = ("beartype", "grain", "matplotlib", "pytest", "tyro")
ABOUT = {"commit": "none", "device": {"kind": "Test Device 1"}}

# The paper's text and GPT-2's tokens need not be here.
STORIES = {"lm-paper": {"data": "stories", "text": Text(ngrams=())}}

# Python imports this by itself in every process whose PYTHONPATH holds it.
BLOCK = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {LACKING!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


def command(*words: str, **environment: str) -> subprocess.CompletedProcess:
    """Run `python -m experiments.hardware` as its users do."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    line = [sys.executable, "-m", "experiments.hardware", *words]
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)


def read(file: Path) -> dict:
    """Read strict JSON, which knows neither NaN nor infinity."""

    def refuse(word: str):
        raise AssertionError(f"{file}: {word} is not JSON")

    return json.loads(file.read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A PYTHONPATH on which the packages that accelerators' machines lack cannot be imported."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(BLOCK)
    return str(folder)


def test_the_block_blocks(bare):
    for name in LACKING:
        line = [sys.executable, "-c", f"import {name}"]
        ended = subprocess.run(line, env=os.environ | {"PYTHONPATH": bare}, capture_output=True)
        assert ended.returncode == 1 and b"ModuleNotFoundError" in ended.stderr


@pytest.mark.slow
def test_only_a_cpu_is_one_line_and_no_work(bare, tmp_path):
    ended = command("--out", str(tmp_path / "out"), PYTHONPATH=bare)
    assert ended.returncode == 0 and not (tmp_path / "out").exists()
    assert "only a CPU found" in ended.stdout and len(ended.stdout.splitlines()) == 1


# In tiny sizes; the shares of the budget must outlast a slow, shared machine.
TINY = ("--allow-cpu", "--smoke", "--budget", "60", "--commit", "abc")


@pytest.mark.slow
def test_a_part_ends_well_where_packages_are_lacking(bare, tmp_path):
    ended = command("timing", *TINY, "--out", str(tmp_path), PYTHONPATH=bare)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert read(tmp_path / "summary.json")["status"] == {"timing": 0}
    see_timing(tmp_path)


@pytest.mark.nightly
def test_all_parts_end_well_where_packages_are_lacking(bare, tmp_path, monkeypatch):
    """One run of the command, and all that it leaves."""
    out, results = tmp_path / "out", tmp_path / "results"
    folders = ("--out", str(out), "--results", str(results))
    ended = command(*TINY, *folders, PYTHONPATH=bare)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    summary = read(out / "summary.json")
    assert summary["status"] == {"contract": 0, "kernels": 0, "timing": 0, "queue": 0}
    for part in summary["status"]:
        about = read(out / f"{part}.json")
        assert about["summary"] == summary["parts"][part]
        assert about["device"]["platform"] == "cpu" and about["device"]["kind"]
        assert about["versions"]["jax"]
        assert about["commit"]
    see_contract(ended.stdout, out, results)
    see_timing(out)
    see_queue(ended.stdout, out, results)
    see_carried_runs_go_on(out / "queue", tmp_path, monkeypatch)


def see_contract(said: str, out: Path, results: Path) -> None:
    found = read(out / "contract.json")
    assert found["not_reached"] == found["failures"] == []
    assert found["summary"]["passed"] == len(found["findings"]) > 50
    for one in found["findings"]:
        assert one["passed"] and 0 <= one["worst_error"] <= one["bound"]
        assert f"ok   {one['name']}" in said
    assert read(results / "cpu-contract.json") == found


def see_timing(out: Path) -> None:
    found = read(out / "timing.json")
    assert found["expected"] is None and not found["not_reached"]
    assert len(found["comparisons"]) == 2  # forward, forward+backward
    for comparison in found["comparisons"].values():
        assert "unavailable" in comparison["jax cudnn"]
        for name in ("jax xla", "kreg xla biweight", "kreg reference biweight"):
            one = comparison[name]
            assert 0 < one["min_ms"] <= one["median_ms"] <= one["max_ms"]
            assert one["compile_seconds"] > 0 and one["temporary_bytes"] >= 0
            assert one["times_of"]["jax xla"] > 0
        assert comparison["jax xla"]["times_of"] == {"jax xla": 1}


def see_queue(said: str, out: Path, results: Path) -> None:
    found = read(out / "queue.json")
    (job,) = found["jobs"]
    assert job["state"] == "done" and job["runs_done"] == job["runs"] == 1
    assert job["steps_done"] == job["steps"] == 4 and job["hours_left"] == 0
    assert job["results"][0]["method"] == "biweight" and 0 <= job["results"][0]["accuracy"] <= 1
    assert found["disk"]["used_bytes"] > 0 and Path(found["carry"]["file"]).is_file()
    assert "--carry" in said and (out / "queue" / "smoke" / "table.md").is_file()
    assert read(results / "cpu-queue.json") == found


def see_carried_runs_go_on(queue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an unfinished run the archive holds the last and the best checkpoint; it goes on there."""
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(queue, first / "queue")
    run = first / "queue" / "smoke" / "biweight" / "seed0"
    archive = first / "carry.tar.gz"
    finished = pack(first / "queue", archive)
    unpack(archive, tmp_path / "without")
    assert not list((tmp_path / "without").glob("**/checkpoints/*"))
    tested = read(run / "result.json")
    (run / "result.json").unlink()
    older = run / "checkpoints" / "step_00000001"  # neither the last nor the best
    shutil.copytree(run / "checkpoints" / "step_00000004", older)
    meta = read(older / "meta.json") | {"step": 1, "metrics": {}}
    (older / "meta.json").write_text(json.dumps(meta))
    assert pack(first / "queue", archive) > finished
    report = Report(second, None, ABOUT)
    assert work_on_queue(report, Deadline(60), jobs=SMOKE_QUEUE, carry=archive) == 0
    kept = second / "queue" / "smoke" / "biweight" / "seed0"
    again = read(kept / "result.json")
    assert {n: again[n] for n in ("accuracy", "tvd")} == {n: tested[n] for n in ("accuracy", "tvd")}
    assert not (kept / "checkpoints" / "step_00000001").exists()
    monkeypatch.setattr(queue_part, "_attempt", lambda *_: pytest.fail("a finished job ran again"))
    assert work_on_queue(report, Deadline(60), jobs=SMOKE_QUEUE, carry=None) == 0
    assert work_on_queue(report, Deadline(60), jobs=SMOKE_QUEUE, carry=archive) == 2


@pytest.mark.slow
def test_every_module_imports_where_packages_are_lacking(bare):
    """Those of this command, and what the contract loads from the tests."""
    folder = ROOT / "experiments" / "hardware"
    names = [f"experiments.hardware.{file.stem}" for file in folder.glob("[!_]*.py")]
    code = "import importlib, sys; [importlib.import_module(n) for n in sys.argv[1:]]"
    code += "; from experiments.hardware.from_tests import load"
    code += "; [load(n) for n in ('oracle', 'tolerances', 'cells', 'attention_inputs')]"
    code += "; import experiments.runs.sweep"
    environment = os.environ | {"PYTHONPATH": bare, "JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-c", code, *names]
    ended = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def broken():
    yield Finding("before it broke", 0.0, 1.0)
    raise MemoryError("no room\nfor this")


def checks_that_fail():
    return [
        Check("good", lambda: iter([Finding("good", 1.0, 1.0)])),
        Check("bad", lambda: iter([Finding("bad", 1.1, 1.0)])),
        Check("nan", lambda: iter([Finding("nan", float("nan"), 1.0)])),
        Check("broken", broken),
    ]


def test_failed_checks_are_named_and_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(contract_part, "checks", lambda smoke: checks_that_fail())
    report = Report(tmp_path / "out", tmp_path / "results", ABOUT)
    assert contract(report, Deadline(1)) == 1
    found = read(tmp_path / "out" / "contract.json")
    assert found["failures"] == ["bad", "nan", "broken"]
    assert found["summary"] == {"passed": 2, "failed": 3, "not_reached": 0}
    assert found["findings"][-1]["problem"].startswith("MemoryError: no room (test_hardware.py:")
    assert read(tmp_path / "results" / "test-device-1-contract.json") == found
    ends = capsys.readouterr().out.split("2 passed, 3 failed")[1]
    assert "bad" in ends and "nan" in ends and "broken" in ends and "good" not in ends


def test_what_there_was_no_time_for_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(contract_part, "checks", lambda smoke: checks_that_fail())
    report = Report(tmp_path, None, ABOUT)
    assert contract(report, Deadline(0)) == 0
    found = read(tmp_path / "contract.json")
    assert found["not_reached"] == ["good", "bad", "nan", "broken"]
    assert found["summary"]["not_reached"] == 4 and found["findings"] == []
    assert timing(report, Deadline(0)) == 0
    left = read(tmp_path / "timing.json")
    assert left["comparisons"] == {}
    assert left["not_reached"] == [str(g) for g in timing_part.groups(smoke=False)]


def test_a_check_breaks_where_a_bound_is_too_small():
    """The real checks can fail: half an epsilon instead of the promise."""
    (check,) = [c for c in contract_part.checks(smoke=True) if c.kind == "_gradient"]
    for finding in check.run():
        assert finding.passed and not Finding(finding.name, finding.error, 1e-12).passed


def test_ratios_pair_the_rounds():
    slow, fast = Entry("slow", seconds=[2.0, 40.0, 6.0]), Entry("fast", seconds=[1.0, 10.0, 3.0])
    assert slow.over(fast) == 2 and Entry("none", unavailable="why").as_json({}) == {
        "unavailable": "why"
    }


def test_the_committed_queue(tmp_path):
    """The paper's table first, then upward, then length generalisation, then language."""
    jobs = read_queue(QUEUE, tmp_path)
    configs = {job.name: job.config() for job in jobs}
    names = [job.experiment.name for job in jobs]
    assert names == ["in_context"] * 6 + ["length"] * 4 + ["language"] * 2
    for job in jobs:
        config = configs[job.name]
        assert config.seeds == (0, 1, 2) and config.folder == tmp_path / job.name
        assert config.preset == ("small" if job.name == "lm-small" else "paper")
        job.experiment.check(dataclasses.replace(config, **STORIES.get(job.name, {})))
    ladder = [configs[job.name] for job in jobs[:6]]
    assert [c.data.train for c in ladder] == [1000, 2500, 5000, 10000, 20000, 40000]
    assert ladder[0].methods == PRODUCT and {*METHODS} <= {*PRODUCT}
    assert all(c.methods == METHODS and c.compat is None for c in ladder[1:])
    lengths = [configs[job.name] for job in jobs[6:10]]
    assert [c.task for c in lengths] == ["sort", "reverse", "copy", "mqmtar"]
    first = state(jobs[0], pace=10.0)
    assert first["state"] == "waiting" and first["runs"] == 3 * len(PRODUCT)
    assert first["steps"] == 3 * len(PRODUCT) * 32 * 200
    assert first["hours_left"] == pytest.approx(first["steps"] / 10 / 3600)
    assert state(jobs[0], pace=None)["hours_left"] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[job]]\nname = 'a'", "arguments"),
        ("job = 3", "expected"),
        ("[[job", "expected"),
        ("[[job]]\nname = 'a'\narguments = ''", "no words in a"),
        ("[[job]]\nname = '../a'\narguments = 'icl'", "names fit for folders"),
        ("[[job]]\nname = 'a'\narguments = 'icl'\n" * 2, "none twice"),
    ],
)
def test_a_bad_queue_is_named(text, message, tmp_path):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_queue(file, tmp_path)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    "words",
    ["chess", "icl --preset none", "icl --methods unknown", "icl --seeds 0 0", "length --task x"],
)
def test_a_bad_job_changes_nothing(words, tmp_path, capsys):
    file = tmp_path / "queue.toml"
    file.write_text(f"[[job]]\nname = 'wrong'\narguments = '{words}'")
    report = Report(tmp_path / "out", None, ABOUT)
    assert work_on_queue(report, Deadline(1), jobs=file, carry=None) == 2
    assert "job 'wrong'" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["queue"]


def test_a_job_that_breaks_leaves_time_to_the_next(tmp_path, monkeypatch, capsys):
    """What broke is remembered with its reason, the next job is tried, and the status says so."""
    file = tmp_path / "queue.toml"
    file.write_text("\n".join(f"[[job]]\nname = '{n}'\narguments = 'icl'" for n in ("one", "two")))
    (tmp_path / "out" / "queue").mkdir(parents=True)
    (tmp_path / "out" / "queue" / "one").write_text("a file where the folder should be")
    monkeypatch.setattr("experiments.runs.sweep.sweep", lambda experiment, config, say: True)
    assert work_on_queue(Report(tmp_path / "out", None, ABOUT), Deadline(1), jobs=file, carry=None)
    found = read(tmp_path / "out" / "queue.json")
    assert list(found["broken"]) == ["one"] and "Error" in found["broken"]["one"]
    assert (tmp_path / "out" / "queue" / "two").is_dir()


def test_a_stopped_slice_begins_no_other_job(tmp_path, monkeypatch):
    file = tmp_path / "queue.toml"
    file.write_text("\n".join(f"[[job]]\nname = '{n}'\narguments = 'icl'" for n in ("one", "two")))
    tried = []
    monkeypatch.setattr(
        "experiments.runs.sweep.sweep",
        lambda experiment, config, say: tried.append(config.folder.name) or "time",
    )
    assert (
        work_on_queue(Report(tmp_path / "out", None, ABOUT), Deadline(1), jobs=file, carry=None)
        == 0
    )
    assert tried == ["one"] and not read(tmp_path / "out" / "queue.json")["broken"]


@pytest.fixture
def toys(monkeypatch, tmp_path):
    """A queue of two toys, and between them one whose data are not there."""
    for module in ("experiments.toy", "experiments.toy.experiment"):
        monkeypatch.setitem(sys.modules, module, toy_experiment)
    monkeypatch.setitem(EXPERIMENTS, "toy", PaperEntry("A toy", "toy", methods=("softmax",)))
    words = {
        "first": "toy --seeds 0 1",
        "absent": "lm --data tinystories:nowhere",
        "last": "toy --seeds 0",
    }
    file = tmp_path / "queue.toml"
    jobs = (f"[[job]]\nname = '{name}'\narguments = '{words[name]}'" for name in words)
    file.write_text("\n".join(jobs))
    monkeypatch.chdir(tmp_path)
    return file


def test_any_experiment_is_a_job_and_what_is_left_stays_visible(toys, tmp_path, monkeypatch):
    report = Report(tmp_path / "out", None, ABOUT)

    def work():
        assert work_on_queue(report, Deadline(1), jobs=toys, carry=None) == 0
        jobs = {job["name"]: job for job in read(tmp_path / "out" / "queue.json")["jobs"]}
        assert list(jobs) == ["first", "absent", "last"]
        assert jobs["absent"]["state"] == "without data" and "--data" in jobs["absent"]["missing"]
        return jobs

    class Cut(BaseException):
        pass

    def cut(*arguments, **options):
        raise Cut

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr("experiments.runs.run._test", cut)
        work()
    left = {job["name"]: job["state"] for job in read(tmp_path / "out" / "queue.json")["jobs"]}
    assert left == {"first": "waiting", "absent": "without data", "last": "waiting"}
    done = work()
    assert done["first"]["state"] == done["last"]["state"] == "done"
    assert [result["seed"] for result in done["first"]["results"]] == [0, 1]
    assert all(result["error"] > 0 for result in done["first"]["results"])
    assert "softmax" in (tmp_path / "out" / "queue" / "last" / "table.md").read_text()
    sessions = read(tmp_path / "out" / "queue" / "first" / "softmax" / "seed0" / "run.json")
    assert len(sessions["sessions"]) == 2
    monkeypatch.setattr(queue_part, "_attempt", lambda *_: pytest.fail("a finished job ran again"))
    work()


def test_no_disk_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(queue_part, "FREE_BYTES", 2**80)
    report = Report(tmp_path, None, ABOUT)
    assert work_on_queue(report, Deadline(1), jobs=SMOKE_QUEUE, carry=None) == 2
    assert "free disk" in capsys.readouterr().out and not list((tmp_path / "queue").iterdir())


def test_a_bad_archive_is_named(tmp_path):
    archive = tmp_path / "carry.tar.gz"
    archive.write_bytes(b"not an archive")
    with pytest.raises(ValueError, match=str(archive)):
        unpack(archive, tmp_path / "queue")


@pytest.mark.parametrize("words", [["--budget", "0"], ["--budget", "nan"], ["nonsense"]])
def test_bad_words(words, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(words)
    assert ended.value.code == 2 and "error" in capsys.readouterr().err


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    ended = command("queue", "--allow-cpu", "--smoke", "--out", str(tmp_path / "file" / "out"))
    assert ended.returncode == 2 and str(tmp_path / "file") in ended.stdout
    assert "Traceback" not in ended.stdout + ended.stderr
