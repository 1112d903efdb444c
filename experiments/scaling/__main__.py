"""What training costs on many devices, by formula; `check` compares with compiled programs."""

import argparse
import os
import sys
from collections.abc import Sequence

from experiments.scaling.machines import MACHINES
from experiments.scaling.model import (
    Sizes,
    Split,
    activation_bytes,
    break_even,
    predict,
    sent,
    state_bytes,
)

COUNTS = (8, 64, 512, 4096)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print Markdown."""
    reader = argparse.ArgumentParser(prog="python -m experiments.scaling", description=__doc__)
    reader.add_argument("what", nargs="?", default="predict", choices=("predict", "check"))
    reader.add_argument(
        "--devices", type=int, nargs="+", help="how many, 8 to 4096, for check to 512"
    )
    for name, value in Sizes()._asdict().items():
        help = f"of the model and its batch; by default {value}, for check smaller ones"
        reader.add_argument(f"--{name}", type=type(value), help=help)
    options = vars(reader.parse_args(arguments))
    given = {k: options[k] for k in Sizes._fields if options[k] is not None}
    if options["what"] == "check":
        return _check(options["devices"] or (8,), given)
    _predict(options["devices"] or COUNTS, Sizes()._replace(**given))
    return 0


def splits(devices: int, sizes: Sizes) -> list[Split]:
    """Ways to split a step that make sense: rows while there are some, then time."""
    rows = min(devices, sizes.rows)
    eight = min(8, rows)
    found = [
        Split(data=rows, sequence=devices // rows),
        Split(fsdp=rows, sequence=devices // rows),
        Split(data=rows // eight, fsdp=eight, sequence=devices // rows),
    ]
    return list(dict.fromkeys(found))


def _predict(counts: Sequence[int], sizes: Sizes) -> None:
    print(
        f"{sizes.parameters / 1e6:.0f} million parameters, {sizes.rows} x {sizes.length} positions "
        f"a step, {sizes.flops:.3g} operations, {sizes.density:.0%} of the pairs with weight\n"
    )
    print("| devices | data x fsdp x sequence | sent, MB | state, MB | activations, MB | ", end="")
    print(" | ".join(f"{m.name}: compute ms | messages ms | share" for m in MACHINES.values()), "|")
    print("|---" * (5 + 3 * len(MACHINES)) + "|")
    for count in counts:
        for split in splits(count, sizes):
            cells = [
                count,
                " x ".join(map(str, split)),
                f"{sum(sent(sizes, split)) / 1e6:.0f}",
                f"{state_bytes(sizes, split) / 1e6:.0f}",
                f"{activation_bytes(sizes, split) / 1e6:.0f}",
            ]
            for machine in MACHINES.values():
                found = predict(machine, sizes, split)
                cells += [f"{1e3 * found.compute:.2f}", f"{1e3 * found.messages:.2f}"]
                cells += [f"{found.share:.0%}"]
            print(f"| {' | '.join(map(str, cells))} |")
    print(
        f"\nKeys that stay send less than keys that are gathered below {break_even():.2f} queries "
        f"a key (width 64, bfloat16), and below {break_even() / 8:.2f} with 8 heads to a key head."
    )


def _check(counts: Sequence[int], given: dict) -> int:
    # Before JAX makes its devices.
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.config.update("jax_num_cpu_devices", max(counts))
    from experiments.scaling.check import check

    print("| data x fsdp x sequence | by formula, MB | compiled, MB | collectives | state, MB |")
    print("|---|---|---|---|---|")
    off = 0.0
    for count in counts:
        small = Sizes(2, 512, 1024, 4096, rows=count, length=max(256, 4 * count), density=1.0)
        sizes = small._replace(**given)
        for split in (Split(data=count), Split(fsdp=count), Split(sequence=count)):
            found = check(sizes, split)
            kinds = sorted(message.kind for message in found.messages)
            told = ", ".join(f"{kinds.count(k)} {k}" for k in dict.fromkeys(kinds))
            megabytes = [x / 1e6 for x in (found.predicted, found.compiled, found.state_bytes)]
            print(
                f"| {' x '.join(map(str, split))} | {megabytes[0]:.2f} | {megabytes[1]:.2f} | "
                f"{told} | {megabytes[2]:.2f} |",
                flush=True,
            )
            off = max(off, abs(found.compiled / found.predicted - 1))
    print(f"\nAt most {off:.0%} apart.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
