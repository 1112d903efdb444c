"""Data that the authors' generators wrote, scored by the experiments' own measures.

The files are in $KREG_DATA. What a model says is made up, so that its scores are known beforehand.
"""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from text_data import data

from experiments.in_context.objective import evaluate, held_out, make_measure
from experiments.length.evaluate import make_measure as make_length_measure
from experiments.length.evaluate import scores
from experiments.length_tasks import MQMTAR, Copy, Reverse, Sort, asentmax_layout, collate
from experiments.length_tasks.files import SampleFiles
from experiments.regbench import ngram, read_instances

# Length generalisation


@pytest.mark.parametrize(
    "name, task, stem",
    [
        ("mqmtar", MQMTAR(), "test_0_64"),
        ("sort", Sort(), "test_1_128"),
        ("reverse", Reverse(), "test_2_256"),
        ("copy", Copy(), "test_4_1024"),
    ],
)
def test_length_files_are_scored(tmp_path, name, task, stem):
    for end in (".src", ".trg"):
        shutil.copy(data(f"generated_asentmax/{name}/{stem}{end}"), tmp_path)
    files, layout = SampleFiles(tmp_path / stem), asentmax_layout(task)
    batch = collate([files[index] for index in range(len(files))], layout)
    targets = [list(map(int, line.split())) for line in (tmp_path / f"{stem}.trg").open()]
    tokens, rows = sum(map(len, targets)), len(targets)
    assert rows == 20 and tokens == batch.mask.sum() - rows

    def says(params, inputs, key):
        return 30.0 * jax.nn.one_hot(params, layout.classes)

    measure = make_length_measure(says, task, layout)
    right = scores(measure, jnp.asarray(batch.targets), [batch])
    assert right.pop("loss") < 1e-6 and set(right.values()) == {1.0}

    # Five sequences with a wrong token (of MQMTAR a value's), two others with a wrong EOS.
    said, first, last = batch.targets.copy(), batch.mask.argmax(1), batch.mask.sum(1) - 1
    said[range(5), first[:5] + 2] += 1
    said[[5, 6], (first + last)[5:7]] = 0
    wrong = scores(measure, jnp.asarray(said), [batch])
    assert wrong["exact"] == wrong["released_exact"] == 15 / 20
    assert wrong["exact_with_eos"] == 13 / 20
    assert wrong["token_accuracy"] == pytest.approx(1 - 5 / tokens)
    assert wrong["loss"] == pytest.approx(30 * 7 / (tokens + rows), rel=1e-5)
    if name == "mqmtar":
        assert wrong["associative_recall"] == pytest.approx(1 - 5 / (rows * task.num_q))

    often = targets[0][0]
    constant = scores(measure, jnp.full_like(batch.targets, often), [batch])
    share = sum(target.count(often) for target in targets) / tokens
    assert constant["token_accuracy"] == pytest.approx(share) and constant["exact"] == 0


# In-context learning


def walked(path):
    """The letters legal after every position but the last, by walking the automata of a file."""
    for line in path.open():
        content = json.loads(line)
        state, legal = str(content["initial_state"]), []
        for letter in content["text"].split():
            start = str(content["initial_state"])
            state = start if letter == "|" else str(content["transitions"][state][letter])
            legal.append(sorted(content["transitions"][state]))
        yield legal[:-1]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_automata_files_are_read(split):
    folder = data("generated_regbench")
    found, written = read_instances(folder / f"{split}.jsonl"), np.load(folder / f"{split}.npz")
    np.testing.assert_array_equal(found.input_ids, written["inputs"])
    np.testing.assert_array_equal(found.labels, written["targets"])


def test_automata_files_are_scored():
    file = data("generated_regbench/test.jsonl")
    found, legal = read_instances(file), list(walked(file))
    assert list(map(len, legal)) == found.lengths.tolist()
    positions = [letters for row in legal for letters in row]

    truth = found.next_symbols(slice(None))
    measure = make_measure(lambda params, tokens, key: params)
    batches = held_out(found, len(found))

    def score(logits):
        return evaluate(measure, jnp.asarray(logits, jnp.float32), batches)

    oracle = score(np.log(np.maximum(truth, 1e-30)))
    assert oracle["accuracy"] == 1 and oracle["positions"] == len(positions)
    assert oracle["tvd"] < 1e-6 and abs(oracle["kl"]) < 1e-6
    nats = [
        math.log(len(letters))
        for row, labels in zip(legal, found.labels, strict=True)
        for letters, label in zip(row, labels, strict=False)
        if label >= 0
    ]
    assert oracle["loss"] == pytest.approx(np.mean(nats), rel=1e-5)

    always_a = score(np.where(np.arange(20) == 1, 50.0, np.zeros(truth.shape)))
    assert always_a["accuracy"] == pytest.approx(np.mean(["a" in p for p in positions]))
    missed = [1 - ("a" in letters) / len(letters) for letters in positions]
    assert always_a["tvd"] == pytest.approx(np.mean(missed), rel=1e-5)
    # The first of equal maxima is the padding, which is never legal.
    uniform = score(np.zeros(truth.shape))
    assert uniform["accuracy"] == 0 and uniform["loss"] == pytest.approx(math.log(20), rel=1e-5)
    spread = np.mean([1 - len(letters) / 20 for letters in positions])
    assert uniform["tvd"] == pytest.approx(spread, rel=1e-5)


def test_n_grams_score_on_the_authors_automata_what_theirs_did():
    """On 120 sequences of theirs; on these 100 the means may differ as those of two samples do."""
    score = ngram.score(read_instances(data("generated_regbench/test.jsonl")), 3)
    assert score.accuracy == pytest.approx(0.935, abs=0.02)
    assert score.tvd == pytest.approx(0.255, abs=0.03)


def test_lines_that_are_no_instances_are_named(tmp_path):
    good = {"text": "a b | a", "initial_state": 4, "transitions": {"3": {"b": 4}, "4": {"a": 3}}}
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps(good))
    found = read_instances(file)
    assert found.input_ids.tolist() == [[1, 2, 19]] and found.labels.tolist() == [[2, -100, 1]]
    assert found.automata.transitions(0) == [{"a": 1}, {"b": 0}]
    for bad in ({"text": "a a"}, {"text": "a B"}, {"initial_state": 7}, {"transitions": {}}):
        file.write_text("\n".join([json.dumps(good), json.dumps(good | bad)]))
        with pytest.raises(ValueError, match=r"test\.jsonl, line 2: expected"):
            read_instances(file)
    file.write_text("")
    with pytest.raises(ValueError, match="an empty file"):
        read_instances(file)
