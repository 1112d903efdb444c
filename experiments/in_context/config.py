"""What a command of this experiment can be told, and the presets it starts from."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from experiments.methods import PAPER
from experiments.regbench import AutomataConfig
from experiments.runs.experiment import check_counts, check_heads, check_runs


@dataclass(frozen=True)
class Data:
    """The benchmark: a token sequence per random automaton, the same for all methods and seeds."""

    train: int = 1000
    """Automata to learn from; the published ladder is 1000, 2500, 5000, 10000, 20000, 40000."""
    validation: int = 500
    """Held-out automata that choose the checkpoint."""
    test: int = 500
    """Held-out automata that the result is measured on."""
    seed: int = 0
    """Seed of the benchmark; the runs' own seeds do not touch it."""
    automata: AutomataConfig = field(default_factory=AutomataConfig)
    """The distribution of automata and of their strings."""


@dataclass(frozen=True)
class Model:
    """Memory Mosaics; the method only changes how its contextual memories are read."""

    layers: int = 2
    """Blocks of a contextual and a persistent memory."""
    heads: int = 8
    """Memories side by side in a block."""
    width: int = 128
    """Embedding size."""
    slots: int = 448
    """Learned pairs of every persistent memory."""
    attention_dropout: float = 0.05
    """Dropout of the regression weights."""
    hidden_dropout: float = 0.05
    """Dropout after every output projection."""


@dataclass(frozen=True)
class Training:
    """AdamW with weight decay on every parameter, warm-up over a tenth of the steps, cosine."""

    epochs: int = 200
    """Passes over the training sequences."""
    batch_size: int = 32
    """Sequences in a step; the last batch of an epoch may be smaller."""
    learning_rate: float = 1e-4
    """Peak learning rate; it ends at a tenth of it."""
    weight_decay: float = 0.01
    """Decay of every parameter, as the benchmark's own trainer does it."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    evaluations: int = 200
    """Evaluations on the validation automata; the lowest loss among them is tested."""


@dataclass(frozen=True)
class Config:
    """Train Memory Mosaics on random automata and test them on unseen ones.

    A sequence holds a few strings of one random automaton; the model has to infer the automaton
    from the strings it has read. One run a method and seed; finished runs are skipped, unfinished
    ones go on. `table OUT...` and `figure OUT...` in place of the options redo the table and the
    figure from the folders. Exit status: 0 done, or stopped by SIGTERM, 2 impossible, 3 runs left.
    """

    preset: Literal["smoke", "small", "paper"] = "smoke"
    """Where all other options start from. smoke: tiny automata, half a minute a method on a laptop.
    small: the official automata cut to 256 tokens, about 3 minutes a method. paper: the published
    setting, for an accelerator; choose --data.train."""
    methods: tuple[str, ...] = tuple(PAPER)
    """The paper's names (softmax, triweight, biweight, epanechnikov, norm_relu, relumax,
    top16_softmax, top16_uniform, entmax:1.25) or any kernel@rule (biweight@anchored,
    triweight@fixed, epanechnikov@nearest:8); all: every kernel under every rule."""
    seeds: tuple[int, ...] = (0,)
    """A run each: initial weights, order of the data and dropout."""
    learning_rates: tuple[float, ...] = ()
    """Runs for each of them, in place of training.learning-rate; a row of the table each."""
    out: Path | None = None
    """Folder of the runs; by default runs/in_context/ and the preset with what departs from it."""
    time_limit: float | None = None
    """Stop cleanly after this many minutes; the same command goes on from there."""
    together: str = "auto"
    """Seeds of a method in one program: a number, or auto (all on an accelerator, 1 on a CPU).
    A run's folder does not show it, and a run that was stopped goes on with others or alone."""
    devices: str = ""
    """How a run is split over devices, such as data=2,fsdp=4 or sequence=8: rows of a batch over
    the first two, parameters over fsdp, time over sequence. As many as there are, in all processes;
    on CPU they are made, and data=CORES may train faster.
    Nothing for one. A run that was stopped goes on with any other."""
    compat: Literal["dense", "eft"] | None = None
    """Compute the methods as one of the authors' two files does, faults included."""
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    training: Training = field(default_factory=Training)

    @property
    def folder(self) -> Path:
        """The folder of the runs: `out`, or a name made of the preset and what departs from it."""
        if self.out is not None:
            return self.out
        name = self.preset
        if self.preset == "paper" or self.data.train != PRESETS[self.preset].data.train:
            name += f"-n{self.data.train}"
        return Path("runs/in_context") / (f"{name}-{self.compat}" if self.compat else name)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.data.train / self.training.batch_size)

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.training.epochs

    def experiment(self) -> dict[str, Any]:
        """Return what the runs of a folder share: all that matters but method and seed."""
        shared = ("preset", "compat", "data", "model", "training")
        return {name: value for name, value in dataclasses.asdict(self).items() if name in shared}


SMOKE = Config(
    preset="smoke",
    data=Data(
        train=4000,
        validation=100,
        test=200,
        automata=AutomataConfig(
            letters=6,
            min_nodes=3,
            max_nodes=6,
            max_alphabet=6,
            max_out_degree=2,
            min_words=4,
            max_words=8,
            max_word_length=20,
            max_tokens=64,
        ),
    ),
    model=Model(layers=2, heads=4, width=64, slots=32),
    training=Training(epochs=2, batch_size=16, learning_rate=3e-3, evaluations=10),
)
SMALL = Config(
    preset="small",
    data=Data(train=10000, validation=200, test=500, automata=AutomataConfig(max_tokens=256)),
    model=Model(layers=2, heads=4, width=64, slots=64),
    training=Training(epochs=2, batch_size=8, learning_rate=3e-3, evaluations=20),
)
PRESETS = {"smoke": SMOKE, "small": SMALL, "paper": Config(preset="paper")}


def check(config: Config) -> None:
    """Raise ValueError for a value that no run could start with, before anything is written."""
    check_runs(config)
    counts = {
        "data": ("train", "validation", "test"),
        "model": ("layers", "heads", "width", "slots"),
        "training": ("epochs", "batch_size", "evaluations"),
    }
    check_counts(config, counts)
    check_heads(config, "model")
