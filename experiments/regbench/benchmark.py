"""Training, validation and test sets of RegBench from one seed.

Candidates come in blocks, each from a generator of its own (seed, set, block). A set is the first
so many candidates that are allowed in it: a larger training set begins with the smaller one, and
its size does not change the held-out sets.
"""

from dataclasses import dataclass

import numpy as np

from experiments.regbench.config import AutomataConfig
from experiments.regbench.instances import Instances, concatenate, sample_instances

_BLOCK = 1024
_TEST, _VALIDATION, _TRAIN = range(3)


@dataclass(frozen=True, eq=False)
class Benchmark:
    """Hold the three sets and what they were drawn from."""

    config: AutomataConfig
    train: Instances
    validation: Instances
    test: Instances


def make_split(
    config: AutomataConfig,
    *,
    train: int,
    validation: int,
    test: int,
    seed: int,
    distinct_train: bool = False,
) -> Benchmark:
    """Draw a benchmark: one instance of each automaton, held-out languages seen nowhere else.

    No language of the validation and test sets occurs twice, in the other set or in training;
    the original does not separate its sets. Training keeps the original's repeats (about 0.8 % of
    20,000, mostly tiny automata) unless `distinct_train`. The same seed gives the same arrays; they
    reproduce the original in distribution, not its draws, which hang on CPython's hash order.

    Raises:
        ValueError: a size or the seed is negative, or there are too few languages of these sizes.

    >>> benchmark = make_split(AutomataConfig(max_tokens=64), train=8, validation=2, test=4, seed=0)
    >>> benchmark.train.input_ids.shape, len(benchmark.test.automata)
    ((8, 64), 4)
    """
    numbers = dict(train=train, validation=validation, test=test, seed=seed)
    for name, value in numbers.items():
        if value < 0:
            raise ValueError(f"{name}: expected 0 or more, got {value}")
    held_out: set[bytes] = set()
    sets = {}
    for name, stream in (("test", _TEST), ("validation", _VALIDATION)):
        sets[name] = _collect(config, numbers[name], seed, stream, held_out, distinct=True)
        held_out.update(sets[name].automata.keys())
    sets["train"] = _collect(config, train, seed, _TRAIN, held_out, distinct=distinct_train)
    return Benchmark(config, **sets)


def _generator(seed: int, stream: int, block: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream, block)))


def _collect(
    config: AutomataConfig,
    count: int,
    seed: int,
    stream: int,
    excluded: set[bytes],
    *,
    distinct: bool,
) -> Instances:
    """Take the first `count` candidates whose language is not excluded (nor taken, if distinct)."""
    seen = set(excluded)
    parts, missing = [], count
    for block in range(8 + 4 * count // _BLOCK):
        candidates = sample_instances(config, _BLOCK, _generator(seed, stream, block))
        allowed = []
        for index, key in enumerate(candidates.automata.keys()):
            if key not in seen:
                allowed.append(index)
                if distinct:
                    seen.add(key)
        parts.append(candidates[np.array(allowed[:missing], np.int64)])
        missing -= len(parts[-1])
        if not missing:
            return concatenate(parts)
    raise ValueError(
        f"config: expected {count} automata of new languages in {len(parts) * _BLOCK} draws, got "
        f"{count - missing}; larger automata or alphabets have more languages"
    )
