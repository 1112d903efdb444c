"""Start a command as several processes of one program, all on this machine.

    python -m experiments.launch.local python -m experiments reproduce icl --devices data=2

They find each other by the variables that `kreg.training.processes` reads. When one fails, the
others are killed if they do not end by themselves; SIGTERM and SIGINT go to all of them. Every
process has devices of its own: GPUs in the machine's order, or virtual ones on CPU.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress

GRACE = 5  # seconds in which the others may end by themselves


def main(arguments: Sequence[str]) -> int:
    """Run the command; return 0, or the status of the first process that failed."""
    reader = argparse.ArgumentParser(prog="experiments.launch.local", description=__doc__)
    reader.formatter_class = argparse.RawDescriptionHelpFormatter
    reader.add_argument("--processes", type=int, default=2)
    reader.add_argument("--devices-per-process", type=int, default=1)
    reader.add_argument("command", nargs=argparse.REMAINDER, help="what each process runs")
    options = reader.parse_args(arguments)
    if options.processes < 1 or options.devices_per_process < 1 or not options.command:
        reader.error("expected a command, and at least one process with one device")
    coordinator = f"localhost:{_free_port()}"
    started = [
        subprocess.Popen(
            options.command,
            env=os.environ
            | _one_of(options.processes, index, coordinator)
            | _devices(options.devices_per_process, index),
            # The terminal's signals come by way of this process, and once.
            start_new_session=True,
        )
        for index in range(options.processes)
    ]
    indices = {process.pid: index for index, process in enumerate(started)}
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: _send(number, indices))
    signal.signal(signal.SIGALRM, lambda number, frame: _send(signal.SIGKILL, indices))
    return _wait(indices)


def _wait(indices: dict[int, int]) -> int:
    """Wait for all of them; once one has failed, not for long."""
    failed = 0
    while indices:
        pid, status = os.wait()
        index, code = indices.pop(pid), os.waitstatus_to_exitcode(status)
        if code and not failed:
            how = signal.Signals(-code).name if code < 0 else f"status {code}"
            print(f"process {index} ended with {how}; all end now", file=sys.stderr, flush=True)
            failed = code if code > 0 else 128 - code
            signal.alarm(GRACE)
    signal.alarm(0)
    return failed


def _send(number: int, indices: dict[int, int]) -> None:
    for pid in indices:
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, number)


def _one_of(count: int, index: int, coordinator: str) -> dict[str, str]:
    return {
        "KREG_COORDINATOR": coordinator,
        "KREG_PROCESSES": str(count),
        "KREG_PROCESS": str(index),
    }


def _devices(count: int, index: int) -> dict[str, str]:
    """The process's GPUs by their numbers, and as many virtual devices where it runs on CPU."""
    gpus = range(index * count, (index + 1) * count)
    return {"JAX_LOCAL_DEVICE_IDS": ",".join(map(str, gpus)), "JAX_NUM_CPU_DEVICES": str(count)}


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
