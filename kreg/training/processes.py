"""Several processes that train as one: JAX's own runtime, held against what the launcher said.

    with start() as processes:  # before anything touches a device
        train(...)

A launcher starts the same command many times over. SLURM, Open MPI, Kubernetes and Cloud TPU tell
JAX all that it needs; on plain hosts three environment variables do:

    KREG_COORDINATOR   address:port of process 0, which must be free there
    KREG_PROCESSES     how many processes there are
    KREG_PROCESS       which of them this one is, from 0

Where JAX finds the others by itself, KREG_PROCESSES alone says how many it has to find.
"""

import atexit
import os
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import jax

# Where launchers say how many processes they start. Kubernetes only numbers them; JAX asks it.
_COUNTS = ("KREG_PROCESSES", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
_NUMBERED_BY_KUBERNETES = "JOB_COMPLETION_INDEX"

_RESUME = "The same command goes on from the last checkpoint."

# JAX ends a process from a thread that is not Python's, so its last words are said by another.
_LAST_WORDS = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
while os.getppid() == int(sys.argv[1]):
    time.sleep(0.2)
sys.stderr.write(sys.argv[2])
"""


@dataclass(frozen=True)
class Processes:
    """Tell which of the processes this is; as a context, end it at once where an error comes out.

    A process that failed must not wait for the others, which may be waiting for it. They hear of
    it when its connections close, at the latest after the timeout of `start`. `sys.exit` is no
    error. With one process the context does nothing.

    Examples:
        >>> with Processes() as processes:
        ...     print(processes.index, processes.count, processes.is_first)
        0 1 True
    """

    _watch: subprocess.Popen | None = None

    @property
    def index(self) -> int:
        """Which process this is, from 0."""
        return jax.process_index()

    @property
    def alone(self) -> bool:
        """Whether no launcher started others; to ask this touches no device."""
        return self._watch is None

    @property
    def count(self) -> int:
        """How many processes there are."""
        return jax.process_count()

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes what only one may write."""
        return self.index == 0

    def __str__(self) -> str:
        devices = f"{jax.local_device_count()} of {jax.device_count()} devices"
        return f"process {self.index} of {self.count}, {devices}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._watch is None or error is None or isinstance(error, SystemExit):
            return
        traceback.print_exception(error)
        _say(
            f"process {self.index} of {self.count} ends with an error, and so will the others: "
            f"a lost connection means that another one ended first. {_RESUME}"
        )
        self._watch.kill()
        if self.is_first:
            # The others end with this one. Those that fail alike may say so before.
            time.sleep(2)
        sys.stdout.flush()
        os._exit(1)


def start(
    processes: int | None = None,
    index: int | None = None,
    coordinator: str | None = None,
    *,
    timeout: int = 30,
    patience: int = 300,
) -> Processes:
    """Join the processes that a launcher started; without one, do nothing.

    To be called before anything touches a device, and after settings such as
    `jax_num_cpu_devices`. An argument that is None is read from the environment. At its end the
    program waits for the others, at most five minutes.

    Args:
        processes: how many there are; 1 to stay alone whatever the launcher says.
        index: which of them this is, from 0.
        coordinator: address:port of process 0.
        timeout: seconds after which the others end where one has died.
        patience: seconds to wait for the others to start.

    Raises:
        ValueError: on a plain host, where one of the three is missing.
        RuntimeError: JAX finds none of the processes that a launcher announced. Where it finds
            other than that many, the process prints the same error and ends.

    Examples:
        >>> from kreg.training.processes import start
        >>> with start() as processes:
        ...     processes.count
        1
    """
    source, count = ("processes", processes) if processes is not None else _announced()
    index = _whole("KREG_PROCESS") if index is None else index
    coordinator = coordinator or os.environ.get("KREG_COORDINATOR")
    named = {"KREG_COORDINATOR": coordinator, "KREG_PROCESSES": count, "KREG_PROCESS": index}
    by_hand = coordinator is not None or index is not None
    if count == 1 or not (by_hand or source):
        return Processes()
    if by_hand and None in named.values():
        raise ValueError(f"expected all of {', '.join(named)} or arguments for them, got {named}")
    # JAX would take SIGTERM for itself, and between trainings nobody would end.
    jax.config.update("jax_enable_preemption_service", False)
    watch = _watch(index, count, timeout, patience)
    try:
        jax.distributed.initialize(
            coordinator,
            count if by_hand else None,
            index,
            cluster_detection_method="deactivate" if by_hand else None,
            initialization_timeout=patience,
            heartbeat_timeout_seconds=timeout,
        )
    except Exception as error:
        watch.kill()
        if by_hand or not isinstance(error, ValueError):
            raise
        raise RuntimeError(
            f"{source} announced {count or 'several'} processes, JAX found 1 ({error}). "
            "Start each by the launcher (srun, mpirun), or alone with KREG_PROCESSES=1"
        ) from error
    atexit.register(_leave, watch)
    joined = Processes(watch)
    with joined:
        if count is not None and joined.count != count:
            raise RuntimeError(f"{source} announced {count} processes, JAX found {joined.count}")
    _say(str(joined))
    return joined


def _announced() -> tuple[str | None, int | None]:
    """Find who says that there are several processes, if anybody, and how many, if it does."""
    for name in _COUNTS:
        if (count := _whole(name)) is not None:
            return name, count
    if _NUMBERED_BY_KUBERNETES in os.environ:
        return _NUMBERED_BY_KUBERNETES, None
    return None, None


def _whole(name: str) -> int | None:
    word = os.environ.get(name)
    try:
        return None if word is None else int(word)
    except ValueError:
        raise ValueError(f"{name}: expected a whole number, got {word!r}") from None


def _watch(index: int | None, count: int | None, timeout: int, patience: int) -> subprocess.Popen:
    """Start a small process that says what happened when this one is gone."""
    who = "one of the processes" if None in (index, count) else f"process {index} of {count}"
    text = (
        f"{who} (pid {os.getpid()}) is gone: it was killed, or JAX ended it (see above) because "
        f"another one died or did not start within {patience} seconds. "
        f"All end within {timeout} seconds. {_RESUME}\n"
    )
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _LAST_WORDS, str(os.getpid()), text],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        # Signals from the terminal are for this process alone.
        start_new_session=True,
    )


def _leave(watch: subprocess.Popen) -> None:
    """Wait for the others, who may still die, and end."""
    jax.distributed.shutdown()
    watch.kill()
    watch.wait()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
