"""Instances as the original generator describes them: a file with a JSON object a line.

It has `text` (the characters, a space between them), `initial_state`, and in `transitions` to every
state's name its edges, letter to state.
"""

import json
from pathlib import Path

import numpy as np

from experiments.regbench.alphabet import PAD_ID, SEPARATOR_ID, encode
from experiments.regbench.automata import Automata
from experiments.regbench.instances import Instances, shift
from experiments.regbench.minimise import canonical


def read_instances(path: Path) -> Instances:
    """Read a file, with the states numbered from the start.

    Raises:
        ValueError: a line is not an instance, or its text not of its automaton; the message names
            the file and the line.
    """
    machines, texts = [], []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            content = json.loads(line)
            machines.append(_machine(str(content["initial_state"]), content["transitions"]))
            texts.append(encode(content["text"].replace(" ", "")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: expected an instance: {error!r}") from error
    if not texts:
        raise ValueError(f"{path}: expected an instance a line, got an empty file")
    counts = np.array([len(text) for text in texts])
    tokens = np.full((len(texts), counts.max()), PAD_ID, np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    inputs, labels, lengths = shift(tokens, counts, SEPARATOR_ID)
    automata = canonical(Automata.from_transitions(machines))
    inside = np.arange(tokens.shape[1]) < counts[:, None]
    if len(wrong := np.flatnonzero((inside & (automata.read(tokens) < 0)).any(axis=1))):
        raise ValueError(f"{path}, line {wrong[0] + 1}: expected a text of its automaton")
    states = np.where(inside[:, 1:], automata.read(inputs), np.int8(-1))
    return Instances(inputs, labels, lengths, states, automata)


def _machine(start: str, transitions: dict[str, dict[str, int]]) -> list[dict[str, int]]:
    """The edges of every state, the start first."""
    names = [start, *(name for name in transitions if name != start)]
    number = {name: place for place, name in enumerate(names)}
    return [
        {letter: number[str(target)] for letter, target in transitions[name].items()}
        for name in names
    ]
