"""Who and what the stories are about, and how a sentence refers to them."""

from dataclasses import dataclass

GIRLS = (
    "Ada Bella Clara Daisy Edie Flora Gwen Hattie Ivy Josie Kit Lottie Mabel Nell Olive Poppy Rosa "
    "Sally Tilly Una Vera Wren"
).split()
BOYS = (
    "Alfie Barney Caleb Dan Eddie Finn George Harry Isaac Jack Kenny Leo Max Ned Oscar Pip Ralph "
    "Sam Toby Victor Will Zack"
).split()
ELDERS = (
    *(("mother", "she"), ("grandmother", "she"), ("aunt", "she")),
    *(("father", "he"), ("grandfather", "he"), ("uncle", "he")),
)
ANIMALS = "badger crow fox frog hare hedgehog mole mouse otter owl robin squirrel".split()
TOYS = (
    "ball basket bell boat book button drum feather hat key kite lantern marble mug scarf shell "
    "spade spoon umbrella whistle"
).split()
LOOKS = (
    "big blue brown clean golden green little new old orange pink purple red round shiny silver "
    "soft striped white yellow"
).split()
TRAITS = "brave careful cheerful clever curious gentle kind patient quiet thoughtful".split()
WEATHER = ("sunny", "windy", "cool", "bright", "misty", "warm", "cloudy", "frosty")
PLACES = (
    *(
        "the park",
        "the river",
        "the beach",
        "the market",
        "the old mill",
        "the hill",
        "the orchard",
    ),
    *("the farm", "the wood", "the harbour", "the meadow", "the castle"),
)
SPOTS = (
    *("under a bench", "behind an oak tree", "in the tall grass", "beside the well", "on a wall"),
    *("inside a hollow log", "next to the pond", "under a bush", "on the bridge", "by the gate"),
    *("between two rocks", "at the foot of a ladder"),
)
TREATS = (
    *("apple pie", "warm bread", "plum jam", "honey cake", "pea soup", "ginger biscuits"),
    *("cherry tart", "hot chocolate", "pancakes", "roast potatoes"),
)
SECRETS = (
    "moon river stone honey thunder candle meadow silver pepper winter apple ribbon cloud garden"
).split()


@dataclass(frozen=True)
class Person:
    """Somebody with a name, or a word for who they are, and pronouns."""

    name: str
    they: str

    def __str__(self) -> str:
        return self.name

    @property
    def them(self) -> str:
        return "her" if self.they == "she" else "him"

    @property
    def their(self) -> str:
        return "her" if self.they == "she" else "his"

    @property
    def They(self) -> str:
        return self.they.capitalize()

    @property
    def Their(self) -> str:
        return self.their.capitalize()


class Phrase(str):
    """Words for something, with an article or at the start of a sentence.

    >>> Phrase("old boat").a, Phrase("red boat").A, Phrase("by the gate").start
    ('an old boat', 'A red boat', 'By the gate')
    """

    @property
    def a(self) -> str:
        return ("an " if self[0] in "aeiou" else "a ") + self

    @property
    def A(self) -> str:
        return self.a.capitalize()

    @property
    def start(self) -> str:
        return self[0].upper() + self[1:]

    @property
    def noun(self) -> str:
        """The last word: what it is, without its look."""
        return self.rpartition(" ")[2]
