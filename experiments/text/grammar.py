"""Short stories from a probabilistic grammar, each a function of a seed and its number.

Every story draws its people, things and places first; then the rules of `plots` are expanded. A
model that reads one learns, besides English, that what was said about somebody stays true: who gave
what, who owns what after two swaps, three words in their order, where something is hidden.
"""

import random
import re
from collections.abc import Callable, Sequence

from experiments.text import lexicon
from experiments.text.lexicon import Person, Phrase
from experiments.text.plots import RULES

_HOLE = re.compile(r"<(\w+)>|\{(\w+)(?:\.(\w+))?\}")

type Slots = dict[str, Person | Phrase | str]


class _Draw:
    """Choices from a generator of which only `random()` is used: that is the same in any Python."""

    def __init__(self, seed: int, index: int) -> None:
        self.uniform: Callable[[], float] = random.Random((seed << 64) + index).random

    def one[T](self, options: Sequence[T]) -> T:
        return options[int(self.uniform() * len(options))]

    def several[T](self, options: Sequence[T], count: int) -> list[T]:
        """Draw different ones."""
        left = list(options)
        return [left.pop(int(self.uniform() * len(left))) for _ in range(count)]


def story(seed: int, index: int) -> str:
    """Tell story number `index`: 50 to 150 words, paragraphs on lines of their own.

    Raises:
        ValueError: a number is negative, or the index has more than 64 bits.

    >>> story(0, 3) == story(0, 3) != story(1, 3)
    True
    """
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {seed}")
    if not 0 <= index < 2**64:
        raise ValueError(f"index: expected 0 to 2^64 - 1, got {index}")
    draw = _Draw(seed, index)
    return _expand("<story>", _cast(draw), draw)


def _expand(text: str, slots: Slots, draw: _Draw) -> str:
    def fill(hole: re.Match[str]) -> str:
        symbol, slot, attribute = hole.groups()
        if symbol is not None:
            return _expand(draw.one(RULES[symbol]), slots, draw)
        value = slots[slot]
        return str(getattr(value, attribute) if attribute else value)

    return _HOLE.sub(fill, text)


def _cast(draw: _Draw) -> Slots:
    """Draw everybody and everything that a plot may name."""
    names = [(name, "she") for name in lexicon.GIRLS] + [(name, "he") for name in lexicon.BOYS]
    people = [Person(*drawn) for drawn in draw.several(names, 3)]
    looks, nouns = draw.several(lexicon.LOOKS, 3), draw.several(lexicon.TOYS, 3)
    things = [Phrase(f"{look} {noun}") for look, noun in zip(looks, nouns, strict=True)]
    slots: Slots = {
        "child": "girl" if people[0].they == "she" else "boy",
        "elder": Person(*draw.one(lexicon.ELDERS)),
        "animal": Phrase(draw.one(lexicon.ANIMALS)),
        "trait": draw.one(lexicon.TRAITS),
        "weather": draw.one(lexicon.WEATHER),
        "treat": draw.one(lexicon.TREATS),
    }
    slots |= zip(("hero", "friend", "pal"), people, strict=True)
    slots |= zip(("toy", "thing2", "thing3"), things, strict=True)
    slots |= zip(("home", "place"), draw.several(lexicon.PLACES, 2), strict=True)
    slots |= zip(
        ("spot", "spot2", "spot3"), map(Phrase, draw.several(lexicon.SPOTS, 3)), strict=True
    )
    words = map(Phrase, draw.several(lexicon.SECRETS, 3))
    slots |= zip(("secret1", "secret2", "secret3"), words, strict=True)
    return slots | _swaps(people, things, draw)


def _swaps(people: Sequence[Person], things: Sequence[Phrase], draw: _Draw) -> Slots:
    """Let two pairs of people swap what they have, one after the other; say who owns what then."""
    owned = dict(zip(people, things, strict=True))
    slots: Slots = {}
    # The one who sits out changes, so that nobody swaps back.
    for number, idle in enumerate(draw.several(people, 2), start=1):
        giver, taker = draw.several([person for person in people if person != idle], 2)
        slots |= {f"giver{number}": giver, f"taker{number}": taker}
        slots |= {f"given{number}": owned[giver], f"taken{number}": owned[taker]}
        owned[giver], owned[taker] = owned[taker], owned[giver]
    for number, person in enumerate(draw.several(people, 3), start=1):
        slots |= {f"owner{number}": person, f"owned{number}": owned[person]}
    return slots
