"""The paper's experiments: where each lives, its methods, its seeds and folders by preset."""

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from experiments.runs.experiment import Experiment

METHODS = (
    "softmax",
    "epanechnikov",
    "biweight",
    "triweight",
    "norm_relu",
    "relumax",
    "top16_softmax",
    "top16_uniform",
)
SEEDS = {"smoke": (0,), "small": (0, 1, 2), "paper": (0, 1, 2)}
# The published ladder of in-context learning: automata to learn from.
LADDER = tuple(("--data.train", str(n)) for n in (1000, 2500, 5000, 10000, 20000, 40000))
# Length generalisation by preset: a folder a task. The paper's model throughout in its own preset;
# on a CPU Transformers learn to sort sooner, and Memory Mosaics to copy.
LENGTH = {
    "smoke": (("sort", "transformer"), ("copy", "mosaic")),
    "small": (("sort", "transformer"), ("copy", "mosaic")),
    "paper": tuple((task, "mosaic") for task in ("sort", "reverse", "copy", "mqmtar")),
}
FEW = ("softmax", "biweight", "relumax")


@dataclass(frozen=True)
class Entry:
    """An experiment of the paper.

    Args:
        title: in words.
        package: `experiments.PACKAGE.experiment` holds its EXPERIMENT.
        methods: those of the paper's table.
        seeds: by preset.
        folders: by preset, the options of each folder of runs; one folder without options where
            nothing is said.
        fewer: the methods of presets that do not have all.
    """

    title: str
    package: str
    methods: tuple[str, ...] = METHODS
    seeds: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: SEEDS)
    folders: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    fewer: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def module(self) -> str:
        return f"experiments.{self.package}.experiment"

    @property
    def exists(self) -> bool:
        """Whether this version has the experiment."""
        parent = importlib.util.find_spec(f"experiments.{self.package}")
        return parent is not None and importlib.util.find_spec(self.module) is not None

    def load(self) -> Experiment:
        """Import the experiment; ValueError where this version has none."""
        if not self.exists:
            raise ValueError(f"{self.title} is not in this version: there is no {self.module}")
        return importlib.import_module(self.module).EXPERIMENT

    def commands(self, preset: str, more: Sequence[str]) -> list[list[str]]:
        """Return the words of the experiment's own command, one list a folder.

        What `more` says itself is not said again; an option that tells folders apart leaves one.
        """
        said = {word.split("=")[0] for word in more}
        words = ["--preset", preset]
        if "--methods" not in said:
            words += ["--methods", *self.fewer.get(preset, self.methods)]
        if "--seeds" not in said:
            words += ["--seeds", *map(str, self.seeds[preset])]
        folders = self.folders.get(preset, ((),))
        if said & {"--out", *(word for folder in folders for word in folder[::2])}:
            folders = ((),)
        return [[*words, *folder, *more] for folder in folders]


EXPERIMENTS = {
    "icl": Entry("In-context learning of automata", "in_context", folders={"paper": LADDER}),
    "length": Entry(
        "Length generalisation",
        "length",
        seeds=SEEDS | {"small": (0, 1)},
        folders={
            preset: tuple(("--task", task, "--model", model) for task, model in pairs)
            for preset, pairs in LENGTH.items()
        },
        fewer={"smoke": FEW, "small": (*FEW, "epanechnikov")},
    ),
    "lm": Entry(
        "Language modelling",
        "language",
        seeds=SEEDS | {"small": (0, 1)},
        fewer={"smoke": FEW, "small": FEW},
    ),
    "moons": Entry("Three Moons", "moons"),
}


def named(name: str) -> Entry:
    """Return the entry of a name; ValueError for one that there is not."""
    if name not in EXPERIMENTS:
        raise ValueError(f"experiment: expected one of {', '.join(EXPERIMENTS)}, got {name!r}")
    return EXPERIMENTS[name]


def of_folder(package: str) -> Experiment:
    """Return the experiment whose runs a folder holds; ValueError where this version lacks it."""
    for entry in EXPERIMENTS.values():
        if entry.package == package:
            return entry.load()
    raise ValueError(f"expected runs of a known experiment, got runs of {package!r}")
