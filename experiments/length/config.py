"""What a command of this experiment can be told, and the checks before anything is written."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from experiments.runs.experiment import check_counts, check_heads, check_runs, check_warmup

type TaskName = Literal["mqmtar", "sort", "reverse", "copy", "flip_flop", "nback", "local_count"]


@dataclass(frozen=True)
class Data:
    """Training sequences, drawn as they are needed and never twice, and the held-out ones."""

    seq_len: int = 48
    """Middle of the training lengths."""
    vary_len: int = 16
    """Training lengths reach from so many below the middle to so many above it."""
    validation: int = 1000
    """Held-out sequences of the longest training length that choose the checkpoint."""
    seed: int = 0
    """Seed of the held-out sequences; the runs' own seeds do not touch it."""


@dataclass(frozen=True)
class Testing:
    """What a finished run is measured on: fresh sequences of each length."""

    multiples: tuple[float, ...] = (1, 2, 4)
    """Test lengths, as multiples of the longest training length."""
    samples: int = 1000
    """Sequences of each length."""
    generated: int = 100
    """So many of them are also generated, token by token, ..."""
    generated_lengths: int = 1
    """... at so many of the shortest test lengths."""
    positions: int = 16384
    """Most positions in a batch, of each device's rows: what bounds the memory. A batch has at
    least one sequence a device."""


@dataclass(frozen=True)
class Sizes:
    """The model; the method only changes how its attention is read."""

    layers: int = 2
    """Blocks."""
    heads: int = 8
    """Heads of attention, or memories side by side, in a block."""
    width: int = 256
    """Embedding size."""
    hidden: int = 1024
    """Width of a Transformer's perceptrons; learned pairs of a Memory Mosaic's memories."""
    dropout: float = 0.0
    """Dropout of weights and of output projections."""
    tied: bool = False
    """The output matrix is the embedding."""
    length_scaled: bool = False
    """A Transformer's scores grow with the context, in the heads without linear biases."""


@dataclass(frozen=True)
class Training:
    """AdamW, a linear warm-up, then a cosine; see `floor`."""

    steps: int = 312_500
    """Updates of a run."""
    batch_size: int = 128
    """Sequences in a step, drawn for it."""
    learning_rate: float = 4e-4
    """Peak learning rate."""
    warmup: int = 20_000
    """Updates until the peak."""
    floor: float = 0.0
    """The learning rate at the end."""
    beta2: float = 0.99
    """How much of its second moment an update keeps; 0.9 of the first."""
    weight_decay: float = 0.0
    """Decay of the matrices."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    evaluations: int = 40
    """Evaluations on the validation sequences; the lowest loss among them is tested."""


@dataclass(frozen=True)
class Config:
    """Train a model on short sequences of a task and test it on longer ones.

    One run a method and seed; finished runs are skipped, unfinished ones go on. `table OUT...` and
    `figure OUT...` in place of the options redo the table and the figure from the folders. Exit
    status: 0 done, or stopped by SIGTERM, 2 impossible, 3 stopped with runs left to do.
    """

    preset: Literal["smoke", "small", "paper"] = "smoke"
    """Where all other options start from, together with the task and the model. smoke: lengths 4 to
    8, a minute a method on a laptop. small: lengths 8 to 16, minutes a run. paper: the published
    settings, for an accelerator."""
    task: TaskName = "sort"
    """What is learned."""
    model: Literal["mosaic", "transformer"] = "transformer"
    """mosaic: Memory Mosaics. transformer: linear biases on half of the heads and no other
    positions (NAPE); with the rule fixed, cosines for scores and no positions at all."""
    methods: tuple[str, ...] = ("softmax", "biweight", "relumax")
    """The paper's names (softmax, triweight, biweight, epanechnikov, norm_relu, relumax,
    top16_softmax, top16_uniform, entmax:1.25) or any kernel@rule (biweight@anchored,
    triweight@fixed, epanechnikov@nearest:8); all: every kernel under every rule."""
    seeds: tuple[int, ...] = (0,)
    """A run each: initial weights, training sequences and dropout."""
    learning_rates: tuple[float, ...] = ()
    """Runs for each of them, in place of training.learning-rate; a row of the table each."""
    out: Path | None = None
    """Folder of the runs; by default runs/length/ and the preset, task and model."""
    time_limit: float | None = None
    """Stop cleanly after this many minutes; the same command goes on from there."""
    together: str = "auto"
    """Seeds of a method in one program: a number, or auto (all on an accelerator, 1 on a CPU).
    A run's folder does not show it, and a run that was stopped goes on with others or alone."""
    devices: str = ""
    """How a run is split over devices, such as data=2,fsdp=4 or sequence=8: rows of a batch over
    the first two, parameters over fsdp, time over sequence. As many as there are, in all processes;
    on CPU they are made, and data=CORES may train faster.
    Tokens are generated by whole rows, an equal share of them on every device. Nothing for one. A
    run that was stopped goes on with any other."""
    data: Data = field(default_factory=Data)
    sizes: Sizes = field(default_factory=Sizes)
    training: Training = field(default_factory=Training)
    testing: Testing = field(default_factory=Testing)

    @property
    def folder(self) -> Path:
        """The folder of the runs: `out`, or a name made of preset, task and model."""
        return self.out or Path("runs/length") / f"{self.preset}-{self.task}-{self.model}"

    @property
    def steps(self) -> int:
        return self.training.steps

    @property
    def trained_length(self) -> int:
        """The longest training length, which multiples are of."""
        return self.data.seq_len + self.data.vary_len

    @property
    def lengths(self) -> tuple[int, ...]:
        """The test lengths."""
        return tuple(round(multiple * self.trained_length) for multiple in self.testing.multiples)

    def experiment(self) -> dict[str, Any]:
        """Return what the runs of a folder share: all that matters but method and seed."""
        shared = ("preset", "task", "model", "data", "sizes", "training", "testing")
        return {name: value for name, value in dataclasses.asdict(self).items() if name in shared}


def check(config: Config) -> None:
    """Raise ValueError for a value that no run could start with, before anything is written."""
    from experiments.length.tasks import task_of

    check_runs(config)
    counts = {
        "data": ("validation",),
        "sizes": ("layers", "heads", "width", "hidden"),
        "training": ("steps", "batch_size", "evaluations"),
        "testing": ("samples", "generated", "positions"),
    }
    check_counts(config, counts)
    testing = config.testing
    check_heads(config, "sizes")
    check_warmup(config)
    multiples = testing.multiples
    whole = all((multiple * config.trained_length) % 1 == 0 for multiple in multiples)
    if not multiples or list(multiples) != sorted(set(multiples)) or multiples[0] <= 0 or not whole:
        raise ValueError(
            f"--testing.multiples: expected positive multiples of {config.trained_length} that are "
            f"whole numbers, in ascending order, got {multiples}"
        )
    if not 0 <= testing.generated_lengths:
        raise ValueError(
            f"--testing.generated-lengths: expected at least 0, got {testing.generated_lengths}"
        )
    task = task_of(config)
    for length in config.lengths:
        task.at(length)
