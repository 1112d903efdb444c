"""What the finished runs of a folder took: time, tokens, machines, commits."""

from dataclasses import asdict, dataclass
from typing import Any

from experiments.runs.results import Results


@dataclass(frozen=True)
class Cost:
    """Hold the sums over the finished runs of a folder, from their own records.

    Args:
        seconds: training and evaluation, over all sessions; a run's share where it had company.
        tokens: trained on, without padding; None where a run did not measure its speed.
        machines: what the runs were trained on.
        commits: of the code, a star where tracked files differed from it.
    """

    runs: int
    seconds: float
    parameters: int
    tokens: float | None
    machines: tuple[str, ...]
    commits: tuple[str, ...]
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, found: Results) -> "Cost":
        """Add up what a folder's runs say."""
        runs = [run for run in found.runs if run.finished]
        sessions = [session for run in runs for session in run.sessions]
        tokens = [_tokens(run.result) for run in runs]
        return cls(
            runs=len(runs),
            seconds=round(sum(run.result["seconds"] for run in runs), 1),
            parameters=max((run.result.get("parameters", 0) for run in runs), default=0),
            tokens=None if None in tokens else sum(t for t in tokens if t is not None),
            machines=tuple(dict.fromkeys(map(_machine, sessions))),
            commits=tuple(dict.fromkeys(map(_commit, sessions))),
            seeds=tuple(sorted({run.seed for run in runs})),
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def told(self) -> str:
        """Put it in a sentence."""
        tokens = "" if self.tokens is None else f", {self.tokens:.3g} tokens"
        return (
            f"{self.runs} runs of {self.parameters:,} parameters took {minutes(self.seconds)}"
            f"{tokens} on {', '.join(self.machines) or 'an unknown machine'}"
        )


def minutes(seconds: float) -> str:
    """Write a duration.

    >>> minutes(42), minutes(750), minutes(86400)
    ('42 s', '12.5 min', '24.0 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _tokens(result: dict[str, Any]) -> float | None:
    speed, pace = result.get("tokens_per_second"), result.get("ms_per_step")
    return result["steps"] * speed * pace / 1000 if speed and pace else None


def _machine(session: dict[str, Any]) -> str:
    device = session.get("device", {})
    count = device.get("count", 1)
    name = f"{device.get('kind', 'unknown')} ({device.get('machine', 'unknown')})"
    return name if count == 1 else f"{count} x {name}"


def _commit(session: dict[str, Any]) -> str:
    commit = session.get("commit") or "unknown"
    return commit[:12] + ("*" if session.get("modified") else "")
