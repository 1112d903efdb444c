"""Stories of the grammar: the same everywhere, clean English, and true to what they said before."""

import hashlib
import re

import pytest

from experiments.text import lexicon, story
from experiments.text.grammar import _HOLE, _cast, _Draw, _swaps
from experiments.text.lexicon import Person, Phrase
from experiments.text.plots import RULES

COUNT = 4000


@pytest.fixture(scope="module")
def told():
    return [story(5, index) for index in range(COUNT)]


def test_same_in_every_python():
    # Changes with the rules and words, and with nothing else.
    text = "\n".join(story(seed, index) for seed in (0, 1, 2**70) for index in (0, 1, 2**63))
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest == "cc57d140601e371e2ce308dc2798aaef6c4b8aef179f66886fa8a53c6a020b8e"


def test_distinct(told):
    assert len(set(told)) == COUNT
    assert not set(told) & {story(6, index) for index in range(500)}
    assert not set(told) & {story(5, COUNT + index) for index in range(500)}


def test_rules_are_closed():
    slots = _cast(_Draw(0, 0))
    used = {"story"}
    for alternatives in RULES.values():
        assert alternatives
        for text in alternatives:
            for symbol, slot, attribute in _HOLE.findall(text):
                if symbol:
                    used.add(symbol)
                else:
                    assert isinstance(getattr(slots[slot], attribute or "__str__"), object)
            assert not set("<>{}") & set(_HOLE.sub("", text))
    assert used == set(RULES)


def test_reads_well(told):
    lengths = [len(text.split()) for text in told]
    assert 60 < min(lengths) and max(lengths) < 200
    for text in told:
        assert re.fullmatch(r"[A-Za-z ,.!?:\"'\n]+", text), text
        assert "  " not in text and " \n" not in text and "\n " not in text
        assert re.search(r'[.!?]"?$', text)
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n (?!hour)[^aeiou]", text), text
        # Sentences and paragraphs begin with a capital; quotes are closed.
        assert not re.search(r'(^|\n|[.!?] )"?[a-z]', text), text
        for paragraph in text.split("\n"):
            assert paragraph.count('"') % 2 == 0, text


def plot(told, beginning: str) -> list[re.Match[str]]:
    found = [match for text in told if (match := re.search(beginning, text, re.DOTALL))]
    assert len(found) > COUNT / 20
    return found


def test_one_elder_throughout(told):
    elders = [name for name, _ in lexicon.ELDERS]
    for text in told:
        assert len({elder for elder in elders if re.search(rf"\b{elder}\b", text)}) <= 1


def test_pronouns_agree(told):
    # Where all that have a name are of one kind, and the elder too, the other pronouns are absent.
    she, he = r"\b(she|her|hers)\b", r"\b(he|him|his)\b"
    males = [*lexicon.BOYS, *(name for name, they in lexicon.ELDERS if they == "he")]
    females = [*lexicon.GIRLS, *(name for name, they in lexicon.ELDERS if they == "she")]
    checked = 0
    for people, pronoun in ((males, he), (females, she)):
        for text in told:
            if not re.search(rf"\b({'|'.join(people)})\b", text):
                checked += 1
                assert not re.search(pronoun, text, re.IGNORECASE), text
    assert checked > COUNT / 10


def test_errands_are_remembered(told):
    thing = r"an? (\w+ \w+)"
    for match in plot(told, rf"bring me {thing}, {thing} and {thing}\.\"(.*)$"):
        *things, rest = match.groups()
        brought = re.findall("|".join(things), rest.split("\n")[-1])
        assert brought in (things, things[::-1])


def test_passwords_are_remembered(told):
    for match in plot(told, r"They are: (\w+), (\w+), (\w+)\. (.*)$"):
        *words, rest = match.groups()
        (said,) = re.findall(r"(\w+), (\w+), (\w+)[.,]", rest.split("\n")[-1])
        expected = words[::-1] if "backwards" in rest else words
        assert [word.lower() for word in said] == expected


def test_hidden_things_stay_where_they_are(told):
    for match in plot(told, r"hid (?:the|it) .*\n(.*)\n(.*)$"):
        text = match.string
        spots = dict(re.findall(r"hid the (\w+ \w+) ([a-z ]+?)(?=[.,])", text))
        assert len(spots) == 2
        ending = match.group(2).lower()
        first, second = spots
        if "where did i put" in ending:
            answers = re.findall(rf'"({"|".join(lexicon.SPOTS)}),"', ending)
            assert answers == [spots[first], spots[second]]
        elif "now find" in ending:
            assert f"my {second}" in ending
            assert re.search(rf"looked {spots[second]}, .* looked {spots[first]} and", ending)
        else:
            assert f"the {first} was {spots[first]}." in ending


def test_presents_and_finds(told):
    for match in plot(told, r"(?:took it everywhere|loved it dearly|For \w+ birthday)"):
        text = match.string
        (thing,) = set(re.findall(r"My (\w+ \w+) is gone|my (\w+ \w+)\?|the (\w+ \w+) down", text))
        thing = "".join(thing)
        assert text.count(thing) >= 3
        paragraphs = text.split("\n")
        spots = re.findall(rf"({'|'.join(lexicon.SPOTS)})", "\n".join(paragraphs[-2:]))
        assert len(set(spots)) == 1


@pytest.mark.parametrize("index", range(40))
def test_swaps_are_kept_account_of(index):
    people = [Person("Ada", "she"), Person("Max", "he"), Person("Una", "she")]
    things = [Phrase("red ball"), Phrase("old boat"), Phrase("new hat")]
    slots = _swaps(people, things, _Draw(3, index))
    owned = dict(zip(people, things, strict=True))
    pairs = []
    for number in (1, 2):
        giver, taker = slots[f"giver{number}"], slots[f"taker{number}"]
        assert (slots[f"given{number}"], slots[f"taken{number}"]) == (owned[giver], owned[taker])
        owned[giver], owned[taker] = owned[taker], owned[giver]
        pairs.append({giver, taker})
    assert pairs[0] != pairs[1] and all(len(pair) == 2 for pair in pairs)
    assert {slots[f"owner{n}"]: slots[f"owned{n}"] for n in (1, 2, 3)} == owned


def test_mistakes():
    with pytest.raises(ValueError, match="seed: expected 0 or more, got -1"):
        story(-1, 0)
    for index in (-1, 2**64):
        with pytest.raises(ValueError, match="index: expected 0 to"):
            story(0, index)
