"""The train step, the token loss, the batches, the log and the progress line."""

import io
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kreg.training import (
    Progress,
    adamw,
    batches,
    init_state,
    make_step,
    mean_token_cross_entropy,
    read_metrics,
    token_cross_entropy,
)
from kreg.training.metrics import MetricsFile


def _linear(params, batch, key):
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2), {
        "drawn": jax.random.uniform(key)
    }


BATCH = {
    "x": np.array([[1.0, 2.0], [3.0, -1.0]], np.float32),
    "y": np.array([1.0, 0.5], np.float32),
}


def test_step_follows_the_gradient_and_reports_its_norm_before_clipping():
    tx = optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(1.0))
    state = init_state({"w": jnp.array([1.0, -1.0])}, tx, jax.random.key(0))
    gradient = 2 * BATCH["x"].T @ (BATCH["x"] @ np.array([1.0, -1.0]) - BATCH["y"]) / 2
    norm = np.linalg.norm(gradient)
    state, metrics = make_step(_linear, tx)(state, BATCH)
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-6)
    expected = np.array([1.0, -1.0]) - 0.01 * gradient / norm
    np.testing.assert_allclose(state.params["w"], expected, rtol=1e-6)
    assert int(state.step) == 1 and set(metrics) == {"loss", "grad_norm", "drawn"}


def test_step_donates_its_state_and_draws_a_key_of_its_own_each_time():
    tx = optax.sgd(0.0)
    params, key = {"w": jnp.ones(2)}, jax.random.key(3)
    first, step = init_state(params, tx, key), make_step(_linear, tx)
    second, one = step(first, BATCH)
    assert first.params["w"].is_deleted()
    assert not params["w"].is_deleted() and not key.is_deleted()
    _, two = step(second, BATCH)
    for number, metrics in enumerate((one, two)):
        expected = jax.random.uniform(jax.random.fold_in(jax.random.key(3), number))
        assert float(metrics["drawn"]) == float(expected)


def test_bfloat16_compute_keeps_float32_masters():
    seen = set()

    def loss(params, batch, key):
        seen.add(params["w"].dtype.name)
        return jnp.sum(params["w"] * batch["x"].astype(params["w"].dtype)), {}

    tx = adamw(1e-4)
    state = init_state({"w": jnp.ones(4)}, tx, jax.random.key(0))
    step = make_step(loss, tx, compute_dtype=jnp.bfloat16)
    for _ in range(3):
        state, metrics = step(state, {"x": np.ones(4, np.float32)})
    assert seen == {"bfloat16"}
    floats = [x for x in jax.tree.leaves((state, metrics)) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert len(floats) == 5 and all(x.dtype == jnp.float32 for x in floats)
    # Three updates of 1e-4 from 1: bfloat16, with a spacing of 2^-8 there, would not move.
    np.testing.assert_allclose(state.params["w"], 1 - 3e-4, atol=1e-6)


def test_init_refuses_a_raw_key():
    with pytest.raises(ValueError, match=r"key: expected a typed key"):
        init_state({}, optax.sgd(1.0), jnp.zeros(2, jnp.uint32))


@pytest.mark.parametrize("ignore", [-1, -100])
def test_token_loss_is_pooled_over_the_labelled_positions(ignore):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(2, 5, 7)), rng.integers(0, 7, (2, 5))
    labels[0, :4] = ignore
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    nll = [-math.log(probabilities[i][labels[i]]) for i in np.ndindex(2, 5) if labels[i] != ignore]
    with jax.enable_x64(True):
        total, count = token_cross_entropy(jnp.asarray(logits), jnp.asarray(labels), ignore=ignore)
        mean = mean_token_cross_entropy(jnp.asarray(logits), jnp.asarray(labels), ignore=ignore)
        assert float(total) == pytest.approx(sum(nll), rel=1e-13) and int(count) == 6
        # Pooled: not the mean of the rows' means (one row has one label, the other five).
        assert float(mean) == pytest.approx(sum(nll) / 6, rel=1e-13)


def test_token_loss_without_labels_is_zero_and_ignored_logits_do_not_matter():
    labels = jnp.array([[-100, 2], [-100, -100]])
    logits = jnp.where(labels[..., None] == -100, jnp.nan, jnp.ones((2, 2, 3)))

    def mean(x, y):
        return mean_token_cross_entropy(x, y, ignore=-100)

    value, gradient = jax.value_and_grad(mean)(logits, labels)
    assert float(value) == pytest.approx(math.log(3), rel=1e-6)
    np.testing.assert_allclose(gradient[0, 1], [1 / 3, 1 / 3, -2 / 3], rtol=1e-6)
    assert not np.any(gradient[1]) and not np.any(gradient[0, 0])
    value, gradient = jax.value_and_grad(mean)(logits, jnp.full((2, 2), -100))
    assert float(value) == 0.0 and not np.any(gradient)


def test_token_loss_reduces_bfloat16_in_float32_and_names_wrong_shapes():
    # Summed in bfloat16, 4096 equal terms would stop growing at 256 of them.
    total, _ = token_cross_entropy(
        jnp.zeros((4096, 4), jnp.bfloat16), jnp.zeros(4096, jnp.int32), ignore=-1
    )
    assert total.dtype == jnp.float32
    assert float(total) == pytest.approx(4096 * math.log(4), rel=1e-5)
    with pytest.raises(ValueError, match=r"labels: expected shape \(2,\) for logits \(2, 3\)"):
        token_cross_entropy(jnp.zeros((2, 3)), jnp.zeros(3, jnp.int32), ignore=-1)


ROWS = [{"x": np.array([i, -i])} for i in range(10)]


@pytest.fixture(params=["grain", "stand-in"])
def iterate(request, monkeypatch):
    """`batches`, with Grain and without; closes what it made."""
    made = []

    def make(*args, **options):
        made.append(batches(*args, **options))
        return made[-1]

    if request.param == "grain":
        pytest.importorskip("grain")
    else:
        monkeypatch.setitem(sys.modules, "grain", None)
    yield make
    for iterator in made:
        iterator.close()


def _numbers(iterator, count: int) -> list[list[int]]:
    return [next(iterator)["x"][:, 0].tolist() for _ in range(count)]


def test_batches_cover_every_epoch_in_another_order(iterate):
    found = _numbers(iterate(ROWS, 4, seed=0), 6)
    assert [len(batch) for batch in found] == [4, 4, 2] * 2
    first, second = ([i for batch in epoch for i in batch] for epoch in (found[:3], found[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second and first != sorted(first)
    assert _numbers(iterate(ROWS, 4, seed=0), 6) == found != _numbers(iterate(ROWS, 4, seed=1), 6)


def test_batches_drop_the_remainder_keep_the_order_and_collate_as_told(iterate):
    found = _numbers(iterate(ROWS, 4, seed=0, drop_remainder=True), 4)
    assert [len(batch) for batch in found] == [4] * 4
    plain = iterate(ROWS, 4, seed=0, shuffle=False)
    assert _numbers(plain, 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1, 2, 3]]

    whole = iterate(ROWS, 4, seed=0, shuffle=False, blank=lambda row: {"x": row["x"] * 0 - 1})
    assert _numbers(whole, 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, -1, -1], [0, 1, 2, 3]]
    sums = iterate(ROWS, 5, seed=0, shuffle=False, collate=lambda rows: sum(r["x"] for r in rows))
    assert next(sums).tolist() == [10, -10]


def test_batches_go_on_from_a_saved_state(iterate):
    iterator = iterate(ROWS, 4, seed=5)
    _numbers(iterator, 4)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = _numbers(iterator, 5)
    fresh = iterate(ROWS, 4, seed=5)
    fresh.set_state(state)
    assert _numbers(fresh, 5) == expected


def test_grain_and_its_stand_in_give_the_same(monkeypatch):
    pytest.importorskip("grain")
    with_grain = batches(ROWS, 4, seed=2)
    monkeypatch.setitem(sys.modules, "grain", None)
    without = batches(ROWS, 4, seed=2)
    assert type(with_grain) is not type(without)
    assert _numbers(with_grain, 7) == _numbers(without, 7)
    assert with_grain.get_state() == without.get_state()
    with_grain.close()


def test_batches_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"^batch_size"):
        batches(ROWS, 0, seed=0)
    with pytest.raises(ValueError, match=r"^source: expected at least one batch of 11 rows"):
        batches(ROWS, 11, seed=0, drop_remainder=True)
    with pytest.raises(ValueError, match=r"^source"):
        batches([], 1, seed=0)


def test_training_imports_where_the_optional_packages_are_absent():
    script = """
import sys
for name in ("grain", "tyro", "beartype", "matplotlib", "rich", "tqdm"):
    sys.modules[name] = None
import kreg.training
print(next(kreg.training.batches([{"x": 1}], 1, seed=0)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and done.stdout == "{'x': array([1])}\n"


def test_log_keeps_numbers_exactly_and_what_json_lacks(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsFile(path, step=0)
    values = {"loss": float(np.float32(0.1)), "a": math.inf, "b": -math.inf, "n": 3, "none": None}
    log.write("train", 1, values)
    log.write("eval", 1, {"val_loss": math.nan})
    log.close()
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert read_metrics(path, "train") == [{"event": "train", "step": 1, **values}]
    assert math.isnan(read_metrics(path, "eval")[0]["val_loss"])


def test_log_drops_what_lies_past_the_restored_step_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsFile(path, step=0)
    for step in range(1, 6):
        log.write("train", step, {})
    log.close()
    with open(path, "a") as file:
        file.write('{"event": "train", "st')
    assert [entry["step"] for entry in read_metrics(path)] == [1, 2, 3, 4, 5]
    log = MetricsFile(path, step=3)
    log.write("train", 4, {})
    log.mark()
    log.write("train", 5, {})
    log.rollback()
    log.close()
    assert [entry["step"] for entry in read_metrics(path)] == [1, 2, 3, 4]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _report(stream: io.StringIO, **options) -> str:
    progress = Progress("biweight", stream=stream, **options)
    progress.update(1, 100, loss=2.0)
    progress.update(2, 100, loss=1.5, seconds_per_step=0.5, tokens_per_second=12_345.0)
    progress.note("val_loss 1.25")
    progress.update(100, 100, loss=0.5, seconds_per_step=0.5, tokens_per_second=12_345.0)
    progress.close()
    return stream.getvalue()


def test_progress_writes_plain_lines_where_there_is_no_terminal():
    assert _report(io.StringIO()).splitlines() == [
        "biweight  step 1/100  loss 2.0000",
        "biweight  val_loss 1.25",
        "biweight  step 100/100  loss 0.5000  12.3k tokens/s  0:00 left",
    ]
    assert "step 2/100  loss 1.5000  12.3k tokens/s  0:49 left" in _report(
        io.StringIO(), seconds_between_lines=0.0
    )


def test_progress_draws_a_bar_on_a_terminal_and_nothing_when_quiet(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = _report(_Terminal())
    assert text.count("\r") >= 2 and "[" in text and "biweight  val_loss 1.25\n" in text
    assert "#" * 20 in text and text.endswith("0:00 left\n")
    lines = text.replace("\r\x1b[2K", "\n").splitlines()
    assert max(map(len, lines)) < 100
    assert _report(_Terminal(), quiet=True) == ""


def test_progress_survives_a_closed_stream():
    stream = io.StringIO()
    progress = Progress(stream=stream)
    stream.close()
    progress.note("nobody reads this")
    progress.update(1, 1, loss=0.0)
    progress.close()
