"""What a command of this experiment can be told, and the presets it starts from."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from experiments.language import corpus
from experiments.runs.experiment import check_counts, check_heads, check_runs, check_warmup

METHODS = ("softmax", "biweight", "relumax")


@dataclass(frozen=True)
class Text:
    """What becomes of the documents before a model reads them."""

    tokenizer: Literal["bytes", "gpt2"] = "bytes"
    """bytes: 257 tokens. gpt2: 50,257, by the package tiktoken and its files."""
    block: int = 512
    """Positions of a window."""
    windows: Literal["random", "packed"] = "random"
    """random: at any place, documents run on into each other, as in the papers. packed: whole
    documents that know nothing of each other."""
    stories: int = 20000
    """Stories of the grammar to learn from; another data set brings its own."""
    validation_stories: int = 500
    """Stories of the grammar to validate on."""
    held_out: float = 0.05
    """Share of the documents of a file or folder that is validated on: the last ones."""
    tail: Literal["drop", "keep"] = "drop"
    """What becomes of that which follows the last <|endoftext|> of a file, where a file may have
    been cut off. A file without one is a document."""
    ngrams: tuple[int, ...] = (3,)
    """Orders of the Kneser-Ney baselines; none for none."""


@dataclass(frozen=True)
class Sizes:
    """The model; the method only changes how its contextual memories, or its attention, read."""

    layers: int = 12
    """Blocks."""
    heads: int = 12
    """Memories, or heads, side by side in a block."""
    width: int = 768
    """Embedding size."""
    slots: int = 2688
    """Learned pairs of every persistent memory of a Memory Mosaic; at 3.5 widths it has as many
    parameters as a Transformer, whose perceptrons have 4 widths."""
    attention_dropout: float = 0.05
    """Dropout of the regression weights."""
    hidden_dropout: float = 0.05
    """Dropout after every output projection; a Transformer's embeddings have it, too."""
    remat: bool = False
    """Compute each block twice, so as not to keep its activations."""


@dataclass(frozen=True)
class Training:
    """AdamW with weight decay on matrices alone, a linear warm-up, a cosine to a floor."""

    steps: int = 80000
    """Updates."""
    batch_size: int = 32
    """Windows at a time."""
    accumulate: int = 16
    """So many batches make an update; the average of their gradients."""
    learning_rate: float = 5e-3
    """Peak learning rate."""
    floor: float = 1e-4
    """Learning rate at the end."""
    warmup: int = 2000
    """Updates until the peak."""
    weight_decay: float = 0.1
    """Decay of matrices, the embedding and the stored pairs among them."""
    beta2: float = 0.95
    """How much of the second moment an update keeps; of the first, 0.9."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the matrices while they multiply; parameters and updates are float32."""
    evaluations: int = 80
    """Passes over the validation set; the lowest loss among them is the result."""


@dataclass(frozen=True)
class Config:
    """Train Memory Mosaics, or a Transformer, to predict the next token of a text.

    One run a method and seed; finished runs are skipped, unfinished ones go on. `table OUT...` and
    `figure OUT...` in place of the options redo the table and the figure from the folders. Exit
    status: 0 done, or stopped by SIGTERM, 2 impossible, 3 stopped with runs left to do.
    """

    preset: Literal["smoke", "small", "paper"] = "smoke"
    """Where all other options start from. smoke: small stories, a minute and a half a method on two
    cores. small: 7 minutes a method and seed. paper: the published setting, for an accelerator."""
    data: str = "stories"
    """stories (of a grammar; nothing to fetch), a text file or a folder of *.txt with documents
    separated by <|endoftext|>, or tinystories or babistories, :FOLDER behind it where its files
    are not in runs/data/."""
    model: Literal["mosaic", "transformer"] = "mosaic"
    """mosaic: Memory Mosaics. transformer: GPT-2 with the method's attention."""
    methods: tuple[str, ...] = METHODS
    """The paper's names (softmax, triweight, biweight, epanechnikov, norm_relu, relumax,
    top16_softmax, top16_uniform, entmax:1.25) or any kernel@rule (biweight@anchored,
    triweight@fixed, epanechnikov@nearest:8); all: every kernel under every rule."""
    seeds: tuple[int, ...] = (0,)
    """A run each: initial weights, windows and dropout."""
    learning_rates: tuple[float, ...] = ()
    """Runs for each of them, in place of training.learning-rate; a row of the table each."""
    out: Path | None = None
    """Folder of the runs; by default runs/language/ and the preset with what departs from it."""
    tokens: Path = Path("runs/tokens")
    """Folder of token files, written once a data set and tokenizer; a dry run writes them, too."""
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
    """Compute the methods of Memory Mosaics as one of the authors' two files does, faults too."""
    text: Text = field(default_factory=Text)
    sizes: Sizes = field(default_factory=Sizes)
    training: Training = field(default_factory=Training)

    @property
    def folder(self) -> Path:
        """The folder of the runs: `out`, or a name made of the preset and what departs from it."""
        if self.out is not None:
            return self.out
        parts: list[str] = [self.preset]
        if self.data != PRESETS[self.preset].data:
            kind, path = corpus.parse(self.data)
            parts.append(path.stem if kind == "text" else kind)
        parts += ["transformer"] * (self.model == "transformer")
        parts += [self.compat] if self.compat else []
        return Path("runs/language") / "-".join(parts)

    @property
    def steps(self) -> int:
        """The batches of a run."""
        return self.training.steps * self.training.accumulate

    def dataset(self) -> corpus.Source:
        """The documents that the options name; DataError where they are not there."""
        text = self.text
        return corpus.Source.of(
            self.data,
            stories=(text.stories, text.validation_stories),
            held_out=text.held_out,
            whole_only=text.tail == "drop",
        )

    def experiment(self) -> dict[str, Any]:
        """Return what the runs of a folder share: all that matters but method and seed.

        A file is known by its contents, not by its name.
        """
        shared = ("preset", "model", "compat", "text", "sizes", "training")
        found = {n: value for n, value in dataclasses.asdict(self).items() if n in shared}
        source = self.dataset()
        return found | {"data": {"name": source.dataset.name, "sha256": source.digest}}


SMOKE = Config(
    preset="smoke",
    text=Text(block=128, stories=4000, validation_stories=60, ngrams=(3, 6)),
    sizes=Sizes(layers=2, heads=4, width=96, slots=192),
    training=Training(
        steps=1000,
        batch_size=8,
        accumulate=1,
        learning_rate=1e-2,
        floor=1e-4,
        warmup=50,
        beta2=0.99,
        evaluations=8,
    ),
)
SMALL = Config(
    preset="small",
    text=Text(block=256, stories=20000, validation_stories=150, held_out=0.0708, ngrams=(3, 6)),
    sizes=Sizes(layers=3, heads=4, width=128, slots=320),
    training=Training(
        steps=1600,
        batch_size=8,
        accumulate=1,
        learning_rate=1e-2,
        floor=1e-4,
        warmup=100,
        beta2=0.99,
        evaluations=10,
    ),
)
PAPER = Config(
    preset="paper",
    data="babistories",
    text=Text(tokenizer="gpt2"),
    sizes=Sizes(remat=True),
    training=Training(dtype="bfloat16"),
)
PRESETS = {"smoke": SMOKE, "small": SMALL, "paper": PAPER}


def check(config: Config) -> None:
    """Raise ValueError for a value that no run could start with, before anything is written."""
    check_runs(config)
    counts = {
        "text": ("block", "stories", "validation_stories"),
        "sizes": ("layers", "heads", "width", "slots"),
        "training": ("steps", "batch_size", "accumulate", "evaluations"),
    }
    check_counts(config, counts)
    training = config.training
    check_heads(config, "sizes")
    check_warmup(config)
    for name, rate in (("floor", training.floor), ("weight-decay", training.weight_decay)):
        if not rate >= 0:
            raise ValueError(f"--training.{name}: expected 0 or more, got {rate}")
    if not 0 < config.text.held_out < 1:
        raise ValueError(f"--text.held-out: expected between 0 and 1, got {config.text.held_out}")
    if config.compat and config.model != "mosaic":
        raise ValueError(f"--compat: expected none with --model {config.model}")
    # First what is on the disk: a tokenizer may be looked for in the network.
    config.dataset()
    corpus.check_tokenizer(config.text.tokenizer, config.text.ngrams)
