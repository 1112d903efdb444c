"""Language modelling on a tiny scale: options, windows, runs that go on, table, figure, n-grams."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from experiments import text
from experiments.language import corpus, task
from experiments.language.config import PRESETS, Sizes, check
from experiments.language.experiment import EXPERIMENT
from experiments.language.models import make_model
from experiments.language.objective import by_position, edges, held_out, make_measure
from experiments.methods import method
from experiments.runs import command as run_command
from experiments.runs import command_line
from experiments.runs.results import read_experiment
from experiments.runs.sweep import settings
from kreg.training import decay_matrices
from kreg.training.optimizer import decay_mask

main = functools.partial(run_command.command, EXPERIMENT)
parse = functools.partial(command_line.parse, EXPERIMENT)

DOCUMENTS = ["the cat sat on the mat", "a dog ran", "the dog sat", "a cat ran to the dog", "rain"]
MICRO = [
    *("--text.block", "12", "--text.ngrams", "2", "3", "--text.held-out", "0.4"),
    *("--sizes.layers", "2", "--sizes.heads", "2", "--sizes.width", "8", "--sizes.slots", "4"),
    *("--training.steps", "8", "--training.warmup", "2", "--training.batch-size", "3"),
    *("--training.evaluations", "4"),
]
CLOCK = ("seconds", "tokens_per_second", "ms_per_step")
SIZES = Sizes(layers=2, heads=2, width=8, slots=4)


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "animals.txt"
    file.write_text("\n<|endoftext|>\n".join([*DOCUMENTS, "cut of"]))
    return file


def command(out, documents, *more, methods=("softmax", "relumax")):
    places = ["--data", str(documents), "--out", str(out), "--tokens", str(documents.parent / "t")]
    return ["--methods", *methods, *places, *MICRO, *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, documents):
    out = tmp_path_factory.mktemp("micro") / "out"
    assert main(command(out, documents, "--seeds", "0", "1")) == 0
    return out


def result(out, name="softmax", seed=0):
    return json.loads((out / name / f"seed{seed}" / "result.json").read_text())


def without_clock(values):
    return {name: value for name, value in values.items() if name not in CLOCK}


def checksums(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# What a command can be told


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_could_start(preset):
    config = parse(["--preset", preset])
    assert config == PRESETS[preset]
    if preset == "paper":
        # All but the files, which are the user's.
        config = dataclasses.replace(config, data="stories", text=PRESETS["smoke"].text)
        assert config.training.accumulate * config.training.batch_size == 512
    check(config)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--sizes.width", "30"], "--sizes.width"),
        (["--text.block", "0"], "--text.block"),
        (["--training.warmup", "1000"], "--training.warmup"),
        (["--training.floor", "-1"], "--training.floor"),
        (["--training.accumulate", "0"], "--training.accumulate"),
        (["--text.held-out", "1"], "--text.held-out"),
        (["--text.ngrams", "3", "8"], "--text.ngrams"),
        (["--text.ngrams", "0"], "--text.ngrams"),
        (["--data", "no/such/file.txt"], "no/such/file.txt"),
        (["--data", "tinystories:nowhere"], "experiments.text fetch tinystories nowhere"),
        (["--model", "transformer", "--compat", "eft"], "--compat"),
        (["--methods", "softmacks"], "softmacks"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(words, named, tmp_path, capsys):
    assert main([*words, "--out", str(tmp_path / "out"), "--tokens", str(tmp_path / "t")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and named in line
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["--text.block", "500"], ["--text.windows", "packed"]])
def test_text_that_does_not_suffice_is_a_mistake_not_a_crash(words, tmp_path, capsys):
    file = tmp_path / "one.txt"
    file.write_text("a<|endoftext|>b" if "500" in words else "nothing but one document")
    assert main(command(tmp_path / "out", file, *words, "--text.tail", "keep")) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --")


def test_folders_tell_what_departs_from_a_preset():
    assert parse([]).folder.as_posix() == "runs/language/smoke"
    words = ["--data", "x/animals.txt", "--model", "transformer", "--preset", "small"]
    assert parse(words).folder.as_posix() == "runs/language/small-animals-transformer"


@pytest.mark.slow
def test_a_file_is_known_by_its_contents(tmp_path, finished, documents, capsys):
    moved = shutil.copy(documents, tmp_path / "moved.txt")
    there = read_experiment(finished).experiment
    same = parse(command(finished, moved)).experiment()
    assert json.loads(json.dumps(same)) == there
    other = tmp_path / "other.txt"
    other.write_text("a<|endoftext|>b<|endoftext|>c<|endoftext|>")
    before = checksums(finished)
    assert main(command(finished, other)) == 2
    assert "data.sha256" in capsys.readouterr().err and checksums(finished) == before


# Windows and what is measured on them


@pytest.fixture(scope="module")
def tokens():
    ids = [list(document.encode()) for document in DOCUMENTS]
    return text.Tokens.of(ids, vocab_size=257, end=256)


def losses_of(model, rows, batch_size):
    measure = make_measure(lambda p, tokens, segments, key: model(tokens, segment_ids=segments))
    return by_position(measure, None, held_out(rows, batch_size, 256))


@pytest.mark.parametrize("rows", [text.EvaluationWindows, text.PackedDocuments])
def test_validation_covers_every_token_once(rows, tokens):
    windows = rows(tokens, 12)
    seen = [
        label
        for batch in held_out(windows, 4, 256)
        for label in batch["labels"].ravel().tolist()
        if label != text.IGNORED_LABEL
    ]
    assert sorted(seen) == sorted(tokens.ids.tolist())
    assert {batch["tokens"].shape for batch in held_out(windows, 4, 256)} == {(4, 12)}


@pytest.mark.parametrize("kind", ["mosaic", pytest.param("transformer", marks=pytest.mark.nightly)])
def test_packed_rows_score_what_documents_alone_score(kind, tokens):
    model = make_model(kind, "biweight", SIZES, vocab_size=257, block=32)
    packed = losses_of(model, text.PackedDocuments(tokens, 32), 2)
    log_softmax = jax.jit(lambda inputs: jax.nn.log_softmax(model(inputs)))
    alone = []
    for start, stop in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True):
        ids = tokens.ids[start:stop].astype(np.int32)
        # What follows a document does not matter, and with it all have one shape.
        inputs = np.zeros((1, 32), np.int32)
        inputs[0, : len(ids)] = [256, *ids[:-1]]
        log_p = np.asarray(log_softmax(inputs), np.float64)[0]
        alone.append(-log_p[np.arange(len(ids)), ids])
    longest = max(map(len, alone))
    sums = [sum(found[k] for found in alone if k < len(found)) for k in range(longest)]
    np.testing.assert_allclose(packed.sums[:longest], sums, rtol=2e-5)
    assert packed.counts.sum() == len(tokens) and packed.counts[longest:].sum() == 0
    # Together they would know something of each other.
    together = losses_of(model, text.EvaluationWindows(tokens, 32), 2)
    assert abs(together.loss - packed.loss) > 1e-4


def test_bins_of_positions():
    assert edges(1) == [0, 1] and edges(8) == [0, 1, 2, 4, 8]


# Models


@pytest.mark.parametrize("name", ["softmax", "norm_relu", "top16_softmax"])
def test_a_transformer_takes_every_method(name):
    model = make_model("transformer", name, SIZES, vocab_size=9, block=6)
    assert model.config.kernel == method(name).kernel
    assert model.config.cosine == (name == "norm_relu")
    assert np.isfinite(model(np.zeros((1, 6), np.int32))).all()


@pytest.mark.parametrize("kind", ["mosaic", "transformer"])
def test_matrices_alone_decay(kind):
    model = make_model(kind, "softmax", SIZES, vocab_size=257, block=9)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    mask = decay_mask(params, decay_matrices())
    shapes = jax.tree.map(lambda leaf, decays: (leaf.shape, decays), params, mask)
    assert shapes["embedding"] == ((257, 8), True) and shapes["norm"]["scale"] == ((8,), False)
    blocks = shapes["blocks"]
    if kind == "mosaic":
        assert blocks["persistent"]["memory_keys"] == ((2, 1, 4, 2, 4), True)
        assert blocks["contextual"]["kernel_beta"] == ((2, 2), False)
        assert blocks["contextual_norm"]["scale"] == ((2, 8), False)
    else:
        assert shapes["positions"] == ((9, 8), True)
        assert blocks["attention_norm"]["scale"] == ((2, 8), False)


def test_the_optimizer_decays_by_what_the_options_say():
    config = dataclasses.replace(PRESETS["smoke"], sizes=SIZES)
    program = task.TASK.build(config, "softmax")
    params = program.init(0)
    tx = program.optimizer(1.0)
    state, nothing = tx.init(params), jax.tree.map(np.zeros_like, params)
    # The first update has rate 0.
    _, state = tx.update(nothing, state, params)
    updates, _ = tx.update(nothing, state, params)
    rate = 0.1 / config.training.warmup
    np.testing.assert_allclose(updates["embedding"], -rate * params["embedding"], rtol=1e-5)
    assert not np.any(updates["norm"]["scale"])


@pytest.mark.nightly
def test_narrow_matrices_give_nearly_the_same_loss(documents, tmp_path):
    config = parse(command(tmp_path / "out", documents))
    data = task.TASK.load(config)
    narrow = dataclasses.replace(config.training, dtype="bfloat16")
    exact = task.TASK.build(config, "softmax")
    program = task.TASK.build(dataclasses.replace(config, training=narrow), "softmax")
    params = exact.init(0)
    wide, rough = (p.validate(params, data)["loss"] for p in (exact, program))
    assert rough == pytest.approx(wide, rel=1e-2) and rough != wide
    with contextlib.closing(task.TASK.batches(config, data, 0)) as rows:
        batch = next(rows)
    gradient = jax.jit(jax.grad(program.loss, has_aux=True))
    gradients = gradient(params, batch, jax.random.key(0))[0]
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(gradients))


# Runs


@pytest.mark.slow
def test_a_run_end_to_end(finished, documents):
    found = read_experiment(finished, EXPERIMENT.scores)
    assert [(run.method, run.seed) for run in found.runs] == [
        ("softmax", 0),
        ("softmax", 1),
        ("relumax", 0),
        ("relumax", 1),
    ]
    validation = found.benchmark["validation"]
    assert validation == {"documents": 2, "tokens": 26, "text_bytes": 24}
    for run in found.runs:
        scores = run.result
        assert scores["steps"] == 8 and scores["tokens"] == 26
        assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
        bits = scores["loss"] * 26 / 24 / math.log(2)
        assert scores["bits_per_byte"] == pytest.approx(bits)
        assert len(scores["by_position"]) == len(scores["edges"]) - 1
        assert np.shape(scores["support"]) == (2, 2)
        assert scores["loss"] == pytest.approx(min(run.curve("loss")[1]), rel=1e-6)
        assert run.curve("loss")[0] == [2, 4, 6, 8]
    assert found.runs[0].result["loss"] != found.runs[1].result["loss"]


@pytest.mark.slow
def test_the_n_grams_read_the_same_tokens(finished, documents):
    source = parse(command(finished, documents)).dataset()
    opened = corpus.tokens(documents.parent / "t", source, "bytes")
    score = text.KneserNey.fit(opened.train, order=3, across_documents=True).score(
        opened.validation
    )
    stored = read_experiment(finished).baselines["Kneser-Ney 3-gram"]
    assert stored["loss"] == pytest.approx(score.loss) and stored["tokens"] == 26


class InterruptedByTest(Exception):
    pass


def _broken_after(count):
    """Batches that end in an error, as if the machine had gone."""

    class Broken:
        def __init__(self, inner):
            self.inner, self.given = inner, 0

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __next__(self):
            self.given += 1
            if self.given > count:
                raise InterruptedByTest
            return next(self.inner)

    whole = task.TASK.batches
    return lambda config, data, seed: Broken(whole(config, data, seed))


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_it_had_not_been(finished, documents, tmp_path, monkeypatch):
    out, again = tmp_path / "out", command(tmp_path / "out", documents)
    config = parse(again)
    setting = settings(config)[0]
    with monkeypatch.context() as patched:
        patched.setattr(task, "TASK", dataclasses.replace(task.TASK, batches=_broken_after(5)))
        with pytest.raises(InterruptedByTest):
            main(again)
    assert not setting.finished
    assert setting.folder.is_dir()
    assert main(again) == 0
    for name in ("softmax", "relumax"):
        assert without_clock(result(out, name)) == without_clock(result(finished, name))


@pytest.mark.slow
def test_table_and_figure_come_from_the_folder(finished, documents, capsys):
    pytest.importorskip("matplotlib")
    for name in ("table.md", "figure.png", "figure.pdf"):
        (finished / name).unlink(missing_ok=True)
    assert main(["table", str(finished)]) == main(["figure", str(finished)]) == 0
    assert (finished / "figure.png").stat().st_size > 0
    table = (finished / "table.md").read_text()
    baselines = read_experiment(finished).baselines
    losses = [result(finished, "softmax", seed)["loss"] for seed in (0, 1)]
    (row,) = [line for line in table.splitlines() if line.startswith("| softmax ") and "±" in line]
    assert f"{np.mean(losses):.4f} ± {np.std(losses, ddof=1):.4f}" in row
    (row,) = [line for line in table.splitlines() if line.startswith("| Kneser-Ney 3-gram")]
    assert f"{baselines['Kneser-Ney 3-gram']['loss']:.4f}" in row
    gap = np.mean(losses) - baselines["Kneser-Ney 2-gram"]["loss"]
    assert f"- Kneser-Ney 2-gram: softmax {gap:+.4f}, relumax" in table
    assert "All 26 tokens (2 documents)" in table and "layer 2" in table


@pytest.mark.nightly
def test_packed_documents_and_a_transformer_train(documents, tmp_path):
    words = ["--text.windows", "packed", "--model", "transformer", "--training.accumulate", "2"]
    assert main(command(tmp_path, documents, *words, methods=("biweight",))) == 0
    found = result(tmp_path, "biweight")
    assert found["steps"] == 16 and found["tokens"] == 26
    curve = read_experiment(tmp_path).runs[0].curve("loss")[1]
    assert curve[-1] < math.log(257)
    assert "documents packed and apart" in (tmp_path / "table.md").read_text()
