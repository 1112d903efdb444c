"""The length experiment on a tiny scale: options, runs, resuming, scores, table and figure."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nightly import nightly

from experiments.length.batches import Numbers
from experiments.length.config import Config, check
from experiments.length.evaluate import (
    generate_length,
    make_measure,
    make_write,
    measure_length,
)
from experiments.length.experiment import EXPERIMENT
from experiments.length.model import make_model
from experiments.length.presets import complete
from experiments.length.published import EXACT, others
from experiments.length.task import TASK
from experiments.length_tasks import MQMTAR, TASKS, NBack, Sort, asentmax_layout, batch_key
from experiments.paper import EXPERIMENTS
from experiments.runs import command as run_command
from experiments.runs import command_line
from experiments.runs.results import read_experiment

main = functools.partial(run_command.command, EXPERIMENT)
parse = functools.partial(command_line.parse, EXPERIMENT)

MICRO = [
    *("--task", "copy", "--model", "mosaic", "--methods", "softmax"),
    *("--data.seq-len", "3", "--data.vary-len", "1", "--data.validation", "6"),
    *("--sizes.layers", "1", "--sizes.heads", "2", "--sizes.width", "8", "--sizes.hidden", "4"),
    *("--training.steps", "8", "--training.warmup", "2", "--training.evaluations", "2"),
    *("--training.batch-size", "4", "--testing.multiples", "1", "1.5", "2"),
    *("--testing.samples", "6", "--testing.generated", "3", "--testing.generated-lengths", "2"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which everything has been run."""
    out = tmp_path_factory.mktemp("length") / "out"
    assert main([*MICRO, "--out", str(out)]) == 0
    return out


def result(out):
    return json.loads((out / "softmax" / "seed0" / "result.json").read_text())


# Options


def test_task_and_model_decide_the_defaults():
    found = parse(["--preset", "paper", "--task", "reverse", "--model", "transformer"])
    assert (found.sizes.layers, found.sizes.heads, found.training.steps) == (6, 8, 234_375)
    assert found.lengths == (64, 96, 128, 256, 512, 1024, 2048, 4096)
    mosaic = parse(["--preset", "paper", "--task", "reverse", "--model=mosaic"])
    assert (mosaic.sizes.hidden, mosaic.training.warmup) == (2688, 40_000)
    assert parse(["--preset", "paper", "--task", "mqmtar"]).lengths[-1] == 65_536
    overridden = parse(["--preset", "paper", "--task", "copy", "--training.learning-rate", "0.5"])
    assert (overridden.training.learning_rate, overridden.sizes.heads) == (0.5, 16)
    assert parse(["--preset", "small"]).data.seq_len == 12


@pytest.mark.parametrize("preset", ["smoke", "small", "paper"])
@pytest.mark.parametrize("model", ["mosaic", "transformer"])
def test_every_preset_of_every_task_is_possible(preset, model):
    tasks = ("mqmtar", "sort", "reverse", "copy", "flip_flop", "nback", "local_count")
    configs = [complete(Config(preset=preset, task=task, model=model)) for task in tasks]
    for config in configs:
        check(config)
    assert len({config.folder for config in configs}) == len(tasks)


@pytest.mark.parametrize("preset", ["smoke", "small", "paper"])
def test_one_command_has_a_folder_a_task(preset):
    configs = [parse(words) for words in EXPERIMENTS["length"].commands(preset, [])]
    assert {config.task for config in configs} >= {"sort", "copy"}
    assert len({config.folder for config in configs}) == len(configs)
    for config in configs:
        check(config)


@pytest.mark.parametrize(
    "words, names",
    [
        (["--task", "chess"], ["--task", "chess", "mqmtar"]),
        (["--model", "lstm"], ["--model", "lstm", "mosaic"]),
        (["--methods", "sofmax"], ["sofmax"]),
        (["--sizes.width", "9"], ["--sizes.width", "9"]),
        (["--training.warmup", "8"], ["--training.warmup", "8"]),
        (["--testing.multiples", "1.1"], ["--testing.multiples", "1.1"]),
        (["--testing.multiples", "2", "1"], ["--testing.multiples"]),
        (["--data.vary-len", "3"], ["vary_len", "3"]),
        (["--testing.samples", "0"], ["--testing.samples", "0"]),
        (["--task", "mqmtar"], ["num_q"]),
        (["--devices", "data=3"], ["--devices", "data=3", "batch size 4"]),
        (["--devices", "rows=2"], ["--devices", "rows=2"]),
        (["--devices", "data=2", "--together", "2"], ["--together"]),
    ],
    ids=lambda words: " ".join(words),
)
def test_impossible_values_are_refused(words, names, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*MICRO, *words, "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and all(name in line for name in names)
    assert not out.exists()


# Scores, on models that are right or wrong by construction


def knowing(task, layout, width, *, wrong=None):
    """A model that knows the answer: it reads the source where SEP is, and sorts it.

    `wrong`: the number of the target token that it gets wrong, -1 for EOS.
    """

    def one(row):
        length = jnp.argmax(row == layout.sep) - 1
        place = jnp.arange(width)
        source = jnp.where((place >= 1) & (place <= length), row, task.vocab_size)
        target = jnp.append(jnp.sort(source), 0)
        number = place - length - 1
        said = jnp.where(number == length, layout.eos, target[jnp.clip(number, 0, width)])
        if wrong is not None:
            bad = number == (length if wrong == -1 else wrong)
            said = jnp.where(bad, (said + 1) % layout.classes, said)
        return jax.nn.one_hot(said, layout.classes)

    return lambda params, tokens, key: jax.vmap(one)(tokens)


@pytest.mark.parametrize(
    "wrong, exact, eos, tokens", [(None, 1, 1, 1), (-1, 1, 0, 1), (2, 0, 0, 4 / 5)]
)
def test_scores_of_models_that_are_right_or_wrong(wrong, exact, eos, tokens):
    task, layout = Sort(vocab_size=7), asentmax_layout(Sort(vocab_size=7))
    apply = knowing(task, layout, layout.width(task.at(5)), wrong=wrong)
    where = {"length": 5, "split": "test_5", "seed": 0, "samples": 6}
    found = [
        measure_length(make_measure(apply, task, layout), {}, task, layout, positions=p, **where)
        for p in (1, 24, 10_000)
    ]
    for scores in found:
        assert scores["exact"] == scores["released_exact"] == exact
        assert scores["exact_with_eos"] == eos
        assert scores["token_accuracy"] == pytest.approx(tokens)
        # However many go together.
        assert scores["loss"] == pytest.approx(found[0]["loss"], rel=1e-5)


def test_mqmtar_is_scored_by_values_too():
    task = MQMTAR(seq_len=40, vary_len=0, abc_size=8, vocab_size=40)
    layout = asentmax_layout(task)

    def says(token):
        def apply(params, tokens, key):
            return jnp.broadcast_to(
                jax.nn.one_hot(token, layout.classes), (*tokens.shape, layout.classes)
            )

        return make_measure(apply, task, layout)

    where = {"length": 40, "split": "test_40", "seed": 0, "samples": 4, "positions": 1000}
    scores = measure_length(says(2), {}, task, layout, **where)
    # Every third target token is the separator, and no value is.
    assert scores["token_accuracy"] == pytest.approx(1 / 3)
    assert scores["associative_recall"] == scores["exact"] == scores["released_exact"] == 0


def test_generation_wants_the_target_and_then_eos(monkeypatch):
    task, layout = Sort(vocab_size=7), asentmax_layout(Sort(vocab_size=7))
    target = task.sample(0, "test_5", 0, 5).target.tolist()

    def rate(written):
        def write(model, prompt, new, *, stop_token):
            assert stop_token == layout.eos and prompt.shape == (1, 7) and new == 6
            return jnp.concatenate([prompt, jnp.asarray([written])], axis=1)

        monkeypatch.setattr("experiments.length.evaluate.generate", write)
        where = {"length": 5, "split": "test_5", "seed": 0, "samples": 1, "positions": 1}
        return generate_length(make_write(dict, layout), {}, task, layout, **where)

    assert rate([*target, layout.eos]) == {"generated_exact": 1.0, "bleu": pytest.approx(1.0)}
    assert rate([*target, target[0]])["generated_exact"] == 0
    assert rate([layout.eos] * 6)["generated_exact"] == 0
    wrong = [*target[:-1], (target[-1] + 1) % 7, layout.eos]
    assert rate(wrong)["generated_exact"] == 0


def test_labels_are_not_generated():
    task = NBack(seq_len=4, vary_len=0)
    where = {"length": 4, "split": "test_4", "seed": 0, "samples": 1, "positions": 1}
    assert generate_length(None, {}, task, asentmax_layout(task), **where) == {}


# Batches and models


def test_batches_are_functions_of_seed_and_number():
    def key(numbers):
        batch = next(numbers)
        return jax.random.key_data(batch_key(batch["seed"], "train", batch["number"])).tolist()

    numbers, again, other = Numbers(0), Numbers(0), Numbers(1)
    first = [key(numbers) for _ in range(4)]
    assert len(set(map(tuple, first))) == 4
    again.set_state({"next_index": 2})
    assert key(again) == first[2] and again.get_state() == {"next_index": 3}
    assert key(other) != first[0]


@pytest.mark.parametrize(
    "task",
    nightly(["sort", "flip_flop", "nback", "local_count", "mqmtar"], but=["sort"]),
)
def test_loss_of_every_task_starts_at_chance(task):
    """Logits near 0: the logarithm of the number of classes."""
    config = complete(Config(task=task, model="transformer"))
    sizes = dataclasses.replace(config.sizes, layers=1, width=8, heads=2, hidden=8)
    training = dataclasses.replace(config.training, batch_size=2)
    config = dataclasses.replace(config, sizes=sizes, training=training)
    program = TASK.build(config, "softmax")
    loss, _ = jax.jit(program.loss)(program.init(0), next(Numbers(0)), jax.random.key(0))
    layout = asentmax_layout(TASKS[task].task)
    assert float(loss) == pytest.approx(np.log(layout.classes), abs=0.05)


@pytest.mark.parametrize("name, alibi, cosine", [("biweight", 2, False), ("norm_relu", 0, True)])
def test_a_fixed_threshold_is_of_cosines_without_biases(name, alibi, cosine):
    config = complete(Config(model="transformer"))
    about = make_model(config, name, asentmax_layout(Sort()), 0).config
    assert (about.alibi_heads, about.cosine, about.max_length) == (alibi, cosine, None)


# Runs


@pytest.mark.slow
def test_a_run_is_measured_at_every_length(finished):
    found = result(finished)
    assert list(found["lengths"]) == ["4", "6", "8"] and found["steps"] == 8
    for length, scores in found["lengths"].items():
        assert 0 <= scores["exact"] <= scores["token_accuracy"] < 1 and scores["loss"] > 0
        assert scores["released_exact"] == scores["exact"]
        assert ("generated_exact" in scores) == (length != "8")
        # A sequence of L is BOS, L tokens, SEP, L tokens; position n sees n keys.
        positions = 2 * int(length) + 2
        assert scores["visible"] == (positions - 1) / 2
        np.testing.assert_allclose(scores["support"], [[scores["visible"]] * 2])
    record = json.loads((finished / "experiment.json").read_text())
    assert record["benchmark"]["trained_lengths"] == [2, 4]


@pytest.mark.slow
def test_a_resumed_run_ends_as_an_undisturbed_one(finished, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    whole = Numbers.__next__

    def killed(self):
        if self.get_state()["next_index"] == 6:
            raise Killed
        return whole(self)

    words = [*MICRO, "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(Numbers, "__next__", killed)
        with pytest.raises(Killed):
            main(words)
    assert not (tmp_path / "softmax" / "seed0" / "result.json").exists()
    assert main(words) == 0
    assert result(tmp_path)["lengths"] == result(finished)["lengths"]


@pytest.mark.slow
def test_table_and_figure_come_from_the_folder(finished, tmp_path, capsys):
    copy = shutil.copytree(finished, tmp_path / "copy")
    for name in ("table.md", "figure.png", "figure.pdf"):
        (copy / name).unlink()
    changed = result(copy)
    for scores, exact in zip(changed["lengths"].values(), (0.984, 0.5, 0.021), strict=True):
        scores["exact"] = exact
    changed["lengths"]["6"] |= {"support": [[1.0, 2.0]], "visible": 6.0}
    # Older results do not have these.
    del changed["lengths"]["8"]["support"], changed["lengths"]["8"]["visible"]
    (copy / "softmax" / "seed0" / "result.json").write_text(json.dumps(changed))
    assert main(["table", str(copy)]) == 0
    text = capsys.readouterr().out
    for told in ("4 (ID)", "6 (1.5x)", "8 (2x)", "lengths 2 to 4", "generated", "1.5 (25 %)"):
        assert told in text
    row = next(line for line in text.splitlines() if line.startswith("| softmax"))
    assert [float(cell) for cell in row.split("|")[3:6]] == [98.4, 50.0, 2.1]
    pytest.importorskip("matplotlib")
    assert main(["figure", str(copy)]) == 0
    assert (copy / "figure.png").stat().st_size > 10_000
    assert (copy / "figure.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.slow
def test_seeds_have_a_spread_and_unfinished_runs_a_name(finished, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "copy")
    other = shutil.copytree(copy / "softmax" / "seed0", copy / "softmax" / "seed1")
    record = json.loads((other / "run.json").read_text()) | {"seed": 1}
    (other / "run.json").write_text(json.dumps(record))
    found = EXPERIMENT.table(read_experiment(copy, EXPERIMENT.scores))
    assert "±" in found and "unfinished" not in found
    (other / "result.json").unlink()
    found = EXPERIMENT.table(read_experiment(copy, EXPERIMENT.scores))
    assert "- softmax, seed 1: trained, not tested" in found


# What others have published


def test_published_rows_are_whole_and_say_where_they_come_from():
    for lengths, rows in EXACT.values():
        assert all(len(row) == len(lengths) for row in rows.values())
    text = others()
    assert "Second-hand" in text and "2506.16640" in text and "doubtful" in text
    assert set(EXACT["reverse"][1]) == {"softmax", "entmax 1.5", "ASEntmax"}
