"""Tokenizers, sources of documents, token files: round trips, refusals, nothing half-written."""

import hashlib
import json
import subprocess
import sys
import types

import numpy as np
import pytest
from text_data import gpt2_files, tinystories_sample

import experiments.text
from experiments.text import TOKENIZERS, Dataset, open_corpus, plain_text, prepare, stories, story
from experiments.text import token_files as module
from experiments.text.sources import JsonLines, PlainText, Stories
from experiments.text.tokenizers import GPT2, Bytes

TEXTS = ["", "One day.\n", "naïve “café” 🦔", "a<|endoftext|>b", "\x00\xff"]


def test_import_needs_no_jax():
    code = "import sys, experiments.text; print({'jax', 'kreg', 'tiktoken'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Tokenizers


def round_trips(tokenizer) -> None:
    found = tokenizer.encode(TEXTS)
    assert [ids.dtype for ids in found] == [np.uint16] * len(TEXTS)
    assert [tokenizer.decode(ids) for ids in found] == TEXTS
    assert not any(np.any(ids == tokenizer.end) for ids in found)
    joined = np.concatenate([[*ids, tokenizer.end] for ids in found])
    assert tokenizer.decode(joined) == "".join(text + "<|endoftext|>" for text in TEXTS)
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"ids: expected 0 to .*got .{wrong}"):
            tokenizer.decode([1, wrong])


def test_bytes():
    round_trips(TOKENIZERS["bytes"])
    assert Bytes().encode(["ß"])[0].tolist() == [195, 159]
    assert Bytes().decode([195]) == "\ufffd"
    # Half of a pair of surrogates, which JSON may hold, is no character.
    assert Bytes().decode(Bytes().encode(["a\ud83d"])[0]) == "a?"


def test_gpt2(tmp_path, monkeypatch):
    gpt2_files(tmp_path, monkeypatch)
    tokenizer = GPT2()
    assert tokenizer.encode(["Hello world"])[0].tolist() == [15496, 995]
    round_trips(tokenizer)


def test_gpt2_without_tiktoken(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ValueError, match=r"tokenizer: .*pip install tiktoken"):
        GPT2().encode(["a"])


def test_gpt2_without_its_files(monkeypatch):
    def get_encoding(name):
        raise ConnectionError(f"no way to {name}")

    monkeypatch.setitem(sys.modules, "tiktoken", types.SimpleNamespace(get_encoding=get_encoding))
    with pytest.raises(ValueError, match=r"TIKTOKEN_CACHE_DIR .*ConnectionError: no way to gpt2"):
        GPT2().encode(["a"])


# Sources


def write(path, text: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def test_stories():
    data = stories(3, 2, seed=4)
    assert list(data.train) == list(data.train) == [story(4, n) for n in range(3)]
    assert list(data.validation) == [story(4, 3), story(4, 4)]
    assert data.fingerprint() == stories(3, 2, seed=4).fingerprint()
    others = [stories(3, 2, seed=5), stories(4, 2, seed=4), stories(3, 1, seed=4)]
    assert all(data.fingerprint() != other.fingerprint() for other in others)


def test_fingerprint_knows_the_grammar(monkeypatch):
    before = Stories(0, 1, 0).fingerprint()
    monkeypatch.setattr("experiments.text.lexicon.SPOTS", ("on the moon",) * 4)
    assert Stories(0, 1, 0).fingerprint() != before


def test_plain_text(tmp_path):
    text = "One.\n\nStill one.\n|\r\n two |\n|\nThree|4".replace("|", "<|endoftext|>")
    file = write(tmp_path / "a.txt", text)
    assert list(PlainText(file)) == ["One.\n\nStill one.", "two", "Three", "4"]
    assert list(PlainText(file, whole_only=True)) == ["One.\n\nStill one.", "two", "Three"]
    assert list(PlainText(write(tmp_path / "b.txt", "whole\nfile\n"))) == ["whole\nfile"]


def test_folder_of_text(tmp_path):
    names = ("b.txt", "a.txt", "c/a.txt", "notes.md")
    files = {name: write(tmp_path / name, f"in {name}") for name in names}
    assert list(PlainText(tmp_path)) == ["in a.txt", "in b.txt", "in c/a.txt"]
    before = PlainText(tmp_path).fingerprint()
    assert PlainText(tmp_path).fingerprint() == before
    files["c/a.txt"].rename(tmp_path / "c" / "b.txt")
    assert PlainText(tmp_path).fingerprint() != before


def test_wrong_text(tmp_path):
    with pytest.raises(ValueError, match=r"path: expected a text file or a folder of \*\.txt"):
        plain_text(tmp_path)
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"na\xefve")
    with pytest.raises(ValueError, match=r"latin.txt: expected UTF-8"):
        list(PlainText(latin))
    with pytest.raises(ValueError, match="held_out: expected a fraction between 0 and 1, got 1"):
        plain_text(latin, held_out=1)
    with pytest.raises(ValueError, match="validation: expected at least 1 story, got 0"):
        stories(3, 0)


def test_json_lines(tmp_path):
    texts = ['He said "No"\n and left. ', "", "ünïcode 🦔"]
    file = write(tmp_path / "s", "".join(json.dumps(text) + "\n" for text in texts))
    assert list(JsonLines(file)) == texts
    for line, word in (("[1]", "a string"), ('"open', "JSON")):
        write(file, f'"fine"\n{line}\n')
        with pytest.raises(ValueError, match=f"s, line 2: expected {word}"):
            list(JsonLines(file))
    with pytest.raises(ValueError, match="path: expected a file"):
        JsonLines(tmp_path / "none")


# Token files


def contents(folder) -> dict:
    return {
        path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in folder.iterdir()
    }


def documents_of(tokens) -> list[list[int]]:
    bounds = zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)
    return [tokens.ids[start:stop].tolist() for start, stop in bounds]


@pytest.mark.parametrize("batch", [1, 2, 1024])
def test_what_is_written(batch, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BATCH", batch)
    corpus = prepare(tmp_path / "new" / "tokens", stories(5, 2, seed=1), Bytes())
    told = [story(1, number).encode() for number in range(7)]
    assert documents_of(corpus.train) == [[*text, 256] for text in told[:5]]
    assert documents_of(corpus.validation) == [[*text, 256] for text in told[5:]]
    assert isinstance(corpus.train.ids, np.memmap) and corpus.train.ids.dtype == np.dtype("<u2")
    assert not corpus.train.ids.flags.writeable
    assert (corpus.train.vocab_size, corpus.train.end) == (257, 256)
    assert corpus.about["train"] == {
        "documents": 5,
        "tokens": len(corpus.train),
        "text_bytes": sum(map(len, told[:5])),
    }
    assert corpus.about["tokenizer"] == {"name": "bytes", "vocab_size": 257, "end": 256}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tokens"]


def test_written_once(tmp_path):
    first = prepare(tmp_path / "t", stories(3, 1), Bytes())
    before = contents(tmp_path / "t")
    again = prepare(tmp_path / "t", stories(3, 1), Bytes())
    assert contents(tmp_path / "t") == before
    opened = open_corpus(tmp_path / "t")
    for other in (again, opened):
        assert documents_of(other.train) == documents_of(first.train)
        assert (other.about, other.tokenizer) == (first.about, Bytes())


def test_other_sources_are_refused(tmp_path):
    file = write(tmp_path / "text.txt", "a<|endoftext|>b<|endoftext|>c")
    prepare(tmp_path / "t", plain_text(file), Bytes())
    before = contents(tmp_path / "t")
    prepare(tmp_path / "t", plain_text(file), Bytes())
    advice = r"were made with .*Name another folder for the new ones, or delete this one"
    with pytest.raises(ValueError, match=f"tokenizer: expected .*gpt2.*{advice}"):
        prepare(tmp_path / "t", plain_text(file), GPT2())
    for other in (stories(2, 1), plain_text(file, held_out=0.5), plain_text(file, whole_only=True)):
        with pytest.raises(ValueError, match=f"dataset: expected .*{advice}"):
            prepare(tmp_path / "t", other, Bytes())
    write(file, "a<|endoftext|>b<|endoftext|>d")
    with pytest.raises(ValueError, match=f"dataset: expected .*{advice}"):
        prepare(tmp_path / "t", plain_text(file), Bytes())
    assert contents(tmp_path / "t") == before


@pytest.mark.parametrize(
    ("total", "held_out", "expected"), [(2, 0.01, 1), (2, 0.9, 1), (10, 0.25, 2), (10, 0.31, 3)]
)
def test_the_last_documents_are_held_out(total, held_out, expected, tmp_path):
    texts = [str(number) for number in range(total)]
    file = write(tmp_path / "text.txt", "<|endoftext|>".join(texts))
    corpus = prepare(tmp_path / "t", plain_text(file, held_out=held_out), Bytes())
    for part, half in ((corpus.train, texts[:-expected]), (corpus.validation, texts[-expected:])):
        assert corpus.tokenizer.decode(part.ids) == "".join(f"{t}<|endoftext|>" for t in half)


class Broken:
    """Documents that end in an error."""

    def __iter__(self):
        yield from ["a", "b"]
        raise RuntimeError("no more")

    def fingerprint(self):
        return {}


def test_nothing_is_left_of_a_failure(tmp_path):
    for dataset in (Dataset("x", Broken(), Broken()), Dataset("x", Stories(0, 2, 0), Broken())):
        with pytest.raises(RuntimeError, match="no more"):
            prepare(tmp_path / "t", dataset, Bytes())
    with pytest.raises(ValueError, match="dataset: expected documents in the validation part"):
        prepare(tmp_path / "t", Dataset("x", Stories(0, 2, 0), Stories(0, 0, 0)), Bytes())
    with pytest.raises(ValueError, match="dataset: expected at least 2 documents to divide, got 1"):
        prepare(tmp_path / "t", Dataset("x", Stories(0, 1, 0)), Bytes())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("same", [True, False])
def test_another_process_was_faster(same, tmp_path):
    class Slow(Stories):
        def __iter__(self):
            if not (tmp_path / "t").exists():
                other = stories(2, 1, seed=0 if same else 1)
                prepare(tmp_path / "t", other, Bytes())
            return super().__iter__()

    dataset = Dataset("stories", Slow(0, 2, 0), Stories(2, 1, 0))
    if same:
        assert prepare(tmp_path / "t", dataset, Bytes()).train.documents == 2
    else:
        with pytest.raises(ValueError, match="dataset: expected"):
            prepare(tmp_path / "t", dataset, Bytes())
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_folders_of_others_are_left_alone(tmp_path):
    write(tmp_path / "mine" / "thesis.txt", "do not lose")
    for folder in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt"):
        with pytest.raises(ValueError, match=r"folder: expected a new.*Name another folder"):
            prepare(folder, stories(1, 1), Bytes())
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "do not lose"
    (tmp_path / "empty").mkdir()
    assert prepare(tmp_path / "empty", stories(1, 1), Bytes()).train.documents == 1


@pytest.mark.parametrize(
    ("file", "change", "word"),
    [
        ("train.tokens", lambda data: data[:-2], "train.tokens: expected .* tokens of 2 documents"),
        ("train.tokens", lambda data: b"", "train.tokens: expected token files"),
        (
            "validation.offsets.npy",
            lambda data: data[:40],
            "validation.tokens: expected token files",
        ),
        ("about.json", lambda data: data[:-9], "about.json: expected the desc"),
        ("about.json", lambda data: b"[]", "about.json: expected the desc"),
        (
            "about.json",
            lambda data: data.replace(b"bytes", b"words"),
            "about.json: expected the desc",
        ),
        (
            "about.json",
            lambda data: data.replace(b'"format": 1', b'"format": 2'),
            "format: expected 1",
        ),
    ],
)
def test_damage_is_seen(file, change, word, tmp_path):
    prepare(tmp_path / "t", stories(2, 1), Bytes())
    path = tmp_path / "t" / file
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=word):
        prepare(tmp_path / "t", stories(2, 1), Bytes())


def test_ids_must_fit(tmp_path):
    wide = Bytes(name="wide", vocab_size=2**16 + 1)
    with pytest.raises(ValueError, match="tokenizer: expected at most 65,536 ids, got 65,537"):
        prepare(tmp_path / "t", stories(1, 1), wide)


def test_public_names():
    lines = experiments.text.__doc__.splitlines()
    for name in ("prepare", "RandomWindows", "PackedDocuments", "EvaluationWindows", "KneserNey"):
        assert any(f"text.{name}" in line for line in lines) and hasattr(experiments.text, name)


def test_tinystories_sample(tmp_path, monkeypatch):
    gpt2_files(tmp_path, monkeypatch)
    file = tinystories_sample()
    found = list(PlainText(file, whole_only=True))
    assert len(found) == len(set(found)) == 2316
    assert len(list(PlainText(file))) == 2317
    raw = file.read_bytes()[:1_886_920].decode()
    assert raw.split("<|endoftext|>")[-1].strip() == ""
    assert [text.strip() for text in raw.split("<|endoftext|>")[:-1]] == found[:2152]
