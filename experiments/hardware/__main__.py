"""`python -m experiments.hardware [contract | kernels | timing | queue | pytest] [options]`."""

import json
import sys
from collections.abc import Sequence

from experiments.hardware.options import Options, parse


def main(arguments: Sequence[str]) -> int:
    """Supervise the parts, or be the process of one (`--worker`); return the exit status."""
    options = parse(arguments)
    if options.worker:
        return work(options)
    from experiments.hardware.supervisor import supervise

    return supervise(options)


def work(options: Options) -> int:
    """Do one part in this process."""
    from experiments.hardware.deadline import Deadline
    from experiments.hardware.device import describe
    from experiments.hardware.report import Report

    deadline = Deadline(options.budget)
    if options.part == "device":
        print(json.dumps(describe()))
        return 0
    report = Report(options.out, options.results, describe(options.commit))
    if options.part == "contract":
        from experiments.hardware.contract import contract

        return contract(report, deadline, smoke=options.smoke)
    if options.part == "kernels":
        from experiments.hardware.kernel_timing import kernel_timing

        return kernel_timing(report, deadline, smoke=options.smoke)
    if options.part == "timing":
        from experiments.hardware.timing import timing

        return timing(report, deadline, smoke=options.smoke)
    from experiments.hardware.queue import work_on_queue

    return work_on_queue(report, deadline, jobs=options.queue, carry=options.carry)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
