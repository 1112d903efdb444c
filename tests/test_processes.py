"""Several real processes on loopback: they start, agree, miscount, fail and are killed."""

import json
import signal
import socket
import subprocess
import sys

import killing
import one_of_several
import pytest
from nightly import NIGHTLY

from kreg.training.processes import start

LAUNCHERS = {
    "by hand": {
        "KREG_COORDINATOR": "localhost:{port}",
        "KREG_PROCESSES": "2",
        "KREG_PROCESS": "{index}",
    },
    "SLURM": {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "{index}",
        "SLURM_LOCALID": "{index}",
        "JAX_COORDINATOR_PORT": "{port}",
    },
    "Open MPI": {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:1",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": "{index}",
        "OMPI_COMM_WORLD_LOCAL_RANK": "{index}",
        "JAX_COORDINATOR_PORT": "{port}",
    },
}


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Start both processes of a pair as a launcher would; none of them outlives the test."""
    running = []

    def pair(what: str, launcher: str = "by hand", timeout: int = 30, **second: str):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        for index in range(2):
            said = LAUNCHERS[launcher] | (second if index else {})
            for name, value in said.items():
                monkeypatch.setenv(name, value.format(port=port, index=index))
            words = (one_of_several.__file__, what, str(tmp_path), str(timeout))
            running.append(killing.start(*words))
        return running

    yield pair
    for process in running:
        process.kill()
        process.communicate()


def _ends(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Wait for them; nothing here may take longer, except that it hangs."""
    outputs = [process.communicate(timeout=90) for process in processes]
    return [(p.returncode, *output) for p, output in zip(processes, outputs, strict=True)]


def _told(out: str) -> dict:
    (line,) = (line for line in out.splitlines() if line.startswith("{"))
    return json.loads(line)


def _all_ready(folder) -> bool:
    return all((folder / f"ready{index}").exists() for index in range(2))


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param("by hand", marks=pytest.mark.core),
        pytest.param("SLURM", marks=NIGHTLY),
        pytest.param("Open MPI", marks=NIGHTLY),
    ],
)
def test_two_processes_are_one(launch, launcher):
    for index, (code, out, err) in enumerate(_ends(launch("add", launcher))):
        assert code == 0, err
        assert _told(out) == {"index": index, "count": 2, "sum": 1 + 2 + 3 + 4}
        assert f"process {index} of 2, 2 of 4 devices" in err.splitlines()


@pytest.mark.nightly
def test_who_counts_otherwise_than_the_others_fails(launch):
    (first, _, _), (second, _, err) = _ends(launch("add", timeout=10, KREG_PROCESSES="3"))
    assert first != 0 and second == 1
    assert "KREG_PROCESSES announced 3 processes, JAX found 2" in err


@pytest.mark.nightly
def test_who_finds_other_than_the_launcher_announced_fails(launch, monkeypatch):
    monkeypatch.setenv("KREG_PROCESSES", "3")
    for code, _, err in _ends(launch("add", "Open MPI", timeout=10)):
        assert code == 1
        assert "KREG_PROCESSES announced 3 processes, JAX found 2" in err


def test_announced_to_be_many_but_started_alone(monkeypatch, tmp_path):
    """As a batch script of SLURM does that forgets srun."""
    monkeypatch.setenv("SLURM_NTASKS", "8")
    process = killing.start(one_of_several.__file__, "add", str(tmp_path), "30")
    ((code, out, err),) = _ends([process])
    assert code == 1 and out == ""
    assert "SLURM_NTASKS announced 8 processes, JAX found 1" in err


def test_one_process_needs_no_runtime(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "8")
    with start(1) as processes:
        assert (processes.index, processes.count, processes.is_first) == (0, 1, True)


def test_half_of_a_plain_host_s_variables(monkeypatch):
    monkeypatch.setenv("KREG_PROCESS", "0")
    with pytest.raises(ValueError, match=r"expected all of .*'KREG_PROCESSES': None"):
        start()
    monkeypatch.delenv("KREG_PROCESS")
    monkeypatch.setenv("KREG_PROCESSES", "2")
    with pytest.raises(ValueError, match=r"expected all of KREG_COORDINATOR, .*'KREG_PROCESS': 1"):
        start(index=1)
    with pytest.raises(ValueError, match="expected all of"):
        start(coordinator="localhost:1")
    monkeypatch.setenv("KREG_PROCESSES", "two")
    with pytest.raises(ValueError, match="KREG_PROCESSES: expected a whole number, got 'two'"):
        start()


@pytest.mark.parametrize(
    ("what", "victim", "number"),
    [
        # The first holds all together: its death is noticed at once.
        ("idle", 0, signal.SIGKILL),
        pytest.param("idle", 1, signal.SIGKILL, marks=NIGHTLY),
        pytest.param("step", 0, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("step", 1, signal.SIGKILL, marks=NIGHTLY),
        # Outside of a training nobody keeps this signal.
        pytest.param("idle", 0, signal.SIGTERM, marks=NIGHTLY),
    ],
)
def test_where_one_is_killed_the_other_ends_and_says_why(launch, tmp_path, what, victim, number):
    processes = launch(what, timeout=10)
    killing.signal_when(processes[victim], number, lambda: _all_ready(tmp_path))
    ends = _ends(processes)
    assert ends[victim][0] == -number
    code, _, err = ends[1 - victim]
    assert code != 0
    last = err.splitlines()[-1]
    assert last.startswith(f"process {1 - victim} of 2"), err
    assert "another one" in last and last.endswith("goes on from the last checkpoint.")


@pytest.mark.nightly
def test_where_one_fails_the_other_does_not_wait(launch):
    (first, _, waiting), (second, _, err) = _ends(launch("fail", timeout=10))
    assert first != 0 and "goes on from the last checkpoint." in waiting
    assert second == 1 and "ArithmeticError: on purpose" in err


@pytest.mark.slow
def test_the_status_that_all_leave_with_is_kept(launch):
    for code, _, err in _ends(launch("leave")):
        assert code == 3 and "error" not in err


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=NIGHTLY)])
def test_a_signal_to_one_stops_both_at_the_same_step(launch, tmp_path, number):
    processes = launch("step")
    killing.signal_when(processes[1], number, lambda: _all_ready(tmp_path))
    found = []
    for code, out, err in _ends(processes):
        assert code == 0, err
        found.append(_told(out))
    assert found[0]["steps"] == found[1]["steps"] > 5
    assert found[0]["reason"] == found[1]["reason"] == number.name


@pytest.mark.nightly
def test_the_time_of_one_stops_both_at_the_same_step(launch):
    found = [_told(out) for _, out, _ in _ends(launch("step_in_time"))]
    assert found[0]["steps"] == found[1]["steps"]
    assert found[0]["reason"] == found[1]["reason"] == "time"


@pytest.mark.nightly
def test_the_local_launcher_starts_and_stops_all(tmp_path):
    """It gives each a place among them, hands signals on, and ends all where one fails."""

    def launcher(what: str) -> subprocess.Popen:
        command = [sys.executable, one_of_several.__file__, what, str(tmp_path), "10"]
        return killing.start("-m", "experiments.launch.local", "--processes", "2", *command)

    stopped = launcher("step")
    killing.signal_when(stopped, signal.SIGTERM, lambda: _all_ready(tmp_path))
    ((code, out, err),) = _ends([stopped])
    assert code == 0, err
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert sorted(line["index"] for line in lines) == [0, 1]
    assert {(line["steps"], line["reason"]) for line in lines} == {(lines[0]["steps"], "SIGTERM")}

    ((code, _, err),) = _ends([launcher("fail")])
    assert code == 1
    assert "process 1 ended with status 1; all end now" in err
