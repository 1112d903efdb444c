"""The contract: what the core promises, checked on this device against the float64 oracle."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from experiments.hardware.cell_checks import cell_checks
from experiments.hardware.deadline import Deadline
from experiments.hardware.findings import Check, Finding
from experiments.hardware.kernel_checks import kernel_checks
from experiments.hardware.map_checks import map_checks
from experiments.hardware.promise_checks import promise_checks
from experiments.hardware.report import Report, say


def checks(*, smoke: bool) -> list[Check]:
    """List all checks, those that matter most first: time may be short; smoke: one of each kind."""
    dtypes = ("float32",) if smoke else ("float32", "bfloat16", "float16", "float64")
    if jax.default_backend() == "tpu":
        # XLA imitates it there.
        dtypes = tuple(dtype for dtype in dtypes if dtype != "float64")
    found = kernel_checks(smoke=smoke) + promise_checks(smoke=smoke)
    for dtype in dtypes:
        found += map_checks(dtype, smoke=smoke) + cell_checks(dtype)
    if smoke:
        found = list({check.kind: check for check in reversed(found)}.values())
    return found


def contract(report: Report, deadline: Deadline, *, smoke: bool = False) -> int:
    """Run the checks until the time is up; return 1 where one failed, else 0."""
    everything = checks(smoke=smoke)
    findings: list[Finding] = []
    unreached = [check.name for check in everything]
    report.write("contract", _content(findings, unreached))
    for check, found in _run(everything, deadline):
        if found is None:
            continue
        findings += found
        unreached.remove(check.name)
        for finding in found:
            say(str(finding))
        report.write("contract", _content(findings, unreached))
    failed = [finding for finding in findings if not finding.passed]
    passed = len(findings) - len(failed)
    say(f"contract: {passed} passed, {len(failed)} failed, {len(unreached)} checks not reached")
    for finding in failed:
        say(f"  {finding}")
    if unreached:
        say(f"  not reached: {', '.join(unreached[:8])}{', ...' if len(unreached) > 8 else ''}")
    return int(bool(failed))


def _run(
    everything: list[Check], deadline: Deadline
) -> Iterator[tuple[Check, list[Finding] | None]]:
    """Run checks side by side, since most of their time is the compiler's; None: no time left."""

    def run(check: Check) -> list[Finding] | None:
        return None if deadline.passed else check.run()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from zip(everything, pool.map(run, everything), strict=True)


def _content(findings: list[Finding], unreached: list[str]) -> dict[str, Any]:
    failed = [finding.name for finding in findings if not finding.passed]
    summary = {"passed": len(findings) - len(failed), "failed": len(failed)}
    return {
        "summary": summary | {"not_reached": len(unreached)},
        "failures": failed,
        "not_reached": unreached,
        "findings": [finding.as_json() for finding in findings],
    }
