"""How fast a Memory Mosaic trains on this machine, beside the same model in PyTorch.

A turn is a whole training step: loss, gradients, clipping, AdamW. Both start from the same
parameters and see the same tokens, without dropout; losses are compared before anything is timed.
PyTorch's denormals are flushed, and it is timed as it comes and compiled: the better one counts.
kreg is timed on one device, whose products use all cores, and with the rows of the batch split over
as many CPU devices as there are cores, as `--devices data=2` trains (kreg.training.Devices): cores
then wait for each other once a step, not after every product.
Needs torch and entmax (pip install torch entmax).
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from experiments.bench import Contestant, devices_for, optional, run, show, write
from experiments.methods import method
from experiments.torch_mosaic import Mosaic, torch
from kreg.nn import MemoryMosaic, MosaicConfig, to_torch
from kreg.training import Devices, adamw, init_state, make_step, mean_token_cross_entropy

VOCABULARY = 20
METHODS = ("softmax", "biweight", "epanechnikov", "triweight")
DECAY, CLIP, RATE = 0.01, 1.0, 1e-4


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.mosaic_bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=METHODS)
    add("--batch", type=int, default=32, help="sequences in a step")
    add("--length", type=int, default=375, help="their tokens; the benchmark's mean is 375")
    add("--layers", type=int, default=2)
    add("--heads", type=int, default=8)
    add("--width", type=int, default=128)
    add("--slots", type=int, default=448, help="learned pairs of every persistent memory")
    add("--devices", type=int, help="CPU devices; by default one a core, if rows suffice")
    add("--rounds", type=int, default=5, help="turns of each, a turn being two steps")
    add("--eager", action="store_true", help="do not compile PyTorch's model")
    add("--out", type=Path, default=Path("runs/mosaic_bench"))
    given = parser.parse_args(arguments)
    given.devices = devices_for(parser, given.batch, given.devices)
    return given


def main(options: argparse.Namespace) -> None:
    if torch is None or optional("entmax") is None:
        raise SystemExit("mosaic_bench: needs torch and entmax (pip install torch entmax)")
    comparisons = {}
    sizes = {k: v for k, v in vars(options).items() if isinstance(v, int)}
    for name in options.methods:
        title = f"train step, {name}, B{options.batch} T{options.length}"
        comparisons[title] = run(contestants(options, name), options.rounds)
        show(title, comparisons[title])
        found = {"method": __doc__, "sizes": sizes, "results": comparisons}
        write(options.out / "mosaic_bench", found)
    print(f"written: {options.out / 'mosaic_bench.json'}, {options.out / 'mosaic_bench.md'}")


def contestants(options: argparse.Namespace, name: str) -> dict[str, Contestant]:
    """Make the training steps, and see that they start from the same loss."""
    model = make_model(options, name)
    tokens = np.random.default_rng(0).integers(
        0, VOCABULARY, (options.batch, options.length + 1), dtype=np.int32
    )
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    turns = {"kreg": ours(model, inputs, labels)}
    if options.devices > 1:
        split = Devices(data=options.devices)
        parts = make_model(options, name, split)
        turns[f"kreg, {options.devices} devices"] = ours(parts, inputs, labels, split)
    state = to_torch(model)
    turns["torch"] = theirs(options, state, name, inputs, labels, compiled=False)
    if not options.eager:
        turns["torch compiled"] = theirs(options, state, name, inputs, labels, compiled=True)
    losses = {who: [turn(), turn()] for who, turn in turns.items()}
    for who, found in losses.items():
        np.testing.assert_allclose(found, losses["kreg"], rtol=1e-5, err_msg=who)
    return {who: Contestant(turn) for who, turn in turns.items()}


def make_model(
    options: argparse.Namespace, name: str, devices: Devices | None = None
) -> MemoryMosaic:
    config = MosaicConfig(
        vocab_size=VOCABULARY,
        num_layers=options.layers,
        num_heads=options.heads,
        embed_dim=options.width,
        memory_size=options.slots,
        layout=None if devices is None else devices.layout,
        **method(name)._asdict(),
    )
    return MemoryMosaic(config, rngs=nnx.Rngs(0))


def ours(
    model: MemoryMosaic, inputs: np.ndarray, labels: np.ndarray, devices: Devices | None = None
) -> Callable[[], float]:
    """A step of kreg's, that keeps its state and returns the loss before it."""
    graph, params = nnx.split(model, nnx.Param)

    def loss(params, batch, key):
        logits = nnx.merge(graph, params)(batch[0])
        return mean_token_cross_entropy(logits, batch[1], ignore=-1), {}

    tx = adamw(optax.constant_schedule(RATE), weight_decay=DECAY, clip=CLIP)
    step = make_step(loss, tx, devices=devices)
    state = init_state(nnx.to_pure_dict(params), tx, jax.random.key(0))
    batch = jax.device_put((inputs, labels))
    if devices is not None:
        state, batch = devices.place(state), devices.place_batch(batch)

    def turn():
        nonlocal state
        with nullcontext() if devices is None else jax.set_mesh(devices.mesh):
            state, metrics = step(state, batch)
        return float(metrics["loss"])

    return turn


def theirs(
    options: argparse.Namespace, state: dict, name: str, inputs, labels, *, compiled: bool
) -> Callable[[], float]:
    """The same of PyTorch's."""
    torch.set_flush_denormal(True)
    model: Any = Mosaic(state, options.layers, options.heads, name)
    optimizer = torch.optim.AdamW(
        model.parameters(), RATE, betas=(0.9, 0.999), weight_decay=DECAY, fused=True
    )
    given = torch.from_numpy(inputs).long(), torch.from_numpy(labels).long()
    forward = torch.compile(model.loss) if compiled else model.loss

    def turn():
        loss = forward(*given)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return turn


if __name__ == "__main__":
    main(parse())
