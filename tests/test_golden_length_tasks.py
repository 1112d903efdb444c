"""Length-generalisation tasks against the golden cases of the authors' generators and metrics.

The generators' cases were drawn from NumPy's legacy generator: our tasks draw from it through the
same interface as from ours, and have to give the same bits. The free spaces of MQMTAR, which the
original drew without a seed, are recorded.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_tasks import Record, excluded, folder, open_record

from experiments.length_tasks import (
    IGNORED,
    MQMTAR,
    Copy,
    FlipFlop,
    LocalCount,
    NBack,
    Parity,
    Reverse,
    Sample,
    Sort,
    asentmax_layout,
    collate,
    encode,
    metrics,
    prompts,
    sparse_attention_layout,
)
from experiments.length_tasks.layout import sparse_attention_mask
from experiments.length_tasks.mqmtar import (
    FIRST_LETTER,
    KEY_VALUE_SEPARATOR,
    QUERY_SEPARATOR,
    SPACE,
    draw_tables,
    spell,
)
from kreg.training import mean_token_cross_entropy

EXCLUSIONS = {
    "regbench_*": "test_golden_regbench.py has them",
    "published_numbers": "numbers read off papers, not cases",
    "gen_flip_flop/cases/params/vocab_size": "an argument of the script that the task ignores",
    "gen_parity/cases/params/vocab_size": "an argument of the script that the task ignores",
    "encode_asentmax/*/special/mask_token": "an id that no sequence has; the vocabulary counts it",
    "encode_asentmax/cases/*_pattern": "prose for what the items show",
    "encode_asentmax/cases/pairs/seq_len": "how MQMTAR's pair was drawn: see gen_mqmtar",
    "encode_asentmax/cases/pairs/*_idx": "how MQMTAR's pair was drawn: see gen_mqmtar",
    "encode_asentmax/cases/pairs/num_kv": "how MQMTAR's pair was drawn: see gen_mqmtar",
    "encode_asentmax/cases/pairs/removed_slots": "how MQMTAR's pair was drawn: see gen_mqmtar",
    "encode_asentmax/cases/batch_right_pad/source_*": "training does not read sources alone",
    "encode_asentmax/cases/batch_left_pad/input_*": "evaluation generates from the sources",
    "encode_asentmax/cases/batch_left_pad/target*": "evaluation generates from the sources",
    "encode_loss_sa/*/model_loss_float32_unrounded_logits": "of logits that are not stored",
    "encode_loss_sa/edge_mask_case/note": "prose",
    "metrics_sa/reverse_like/note": "prose",
    "metrics_sa/*/fixed_row_len": "follows from the batches",
    "metrics_sa/*/n_pairs_in_shard": "how many samples the original drew from",
    "metrics_sa/*/avg_loss": "the fake model's constant",
    "metrics_sa/*/log_line": "the rates once more, rounded",
    "metrics_asentmax/bleu/impl": "prose",
}
TASKS = {
    "mqmtar": MQMTAR,
    "reverse": Reverse,
    "sort": Sort,
    "copy": Copy,
    "flip_flop": FlipFlop,
    "flip-flop": FlipFlop,
    "nback": NBack,
    "count": LocalCount,
    "parity": Parity,
}
USED: set[str] = set()


def file(*names: str):
    USED.update(names)
    return pytest.mark.parametrize("golden", names, indirect=True, ids=names)


@pytest.fixture
def golden(request):
    """The file named by the test's parameter; afterwards, nothing in it may be left unread."""
    record = open_record(request.param)
    yield record
    record.finish(EXCLUSIONS)


class Legacy:
    """Draw as the authors' script does, from the legacy generator; free spaces as recorded."""

    def __init__(self, seed: int) -> None:
        self.state = np.random.RandomState(seed)
        self.left: list[int] = []

    def size(self, wanted, most):
        return int(wanted)

    def lookup(self, values, index):
        return np.asarray(values[int(index)])

    def integers(self, low, high, shape=()):
        return np.asarray(self.state.randint(low, high + 1, shape))

    def bernoulli(self, probability, count):
        return self.state.random_sample(count) < probability

    def distinct(self, total, count):
        return self.state.choice(total, count, replace=False)

    def hypergeometric(self, good, bad, draws, most, count):
        assert len(self.left) == count and all(0 <= left <= draws <= most for left in self.left)
        return np.array(self.left)

    def chain(self, values, length, most):
        # An odd number is drawn with a dummy at the end, which equals nothing.
        drawn = self.state.randint(0, values, int(length))
        drawn = np.append(drawn, [-1] * (int(length) % 2))
        while len(same := np.flatnonzero(drawn[:-1] == drawn[1:])):
            drawn[same] = self.state.randint(0, values, len(same))
        return drawn[: int(length)]


def test_golden_files_are_used_or_excluded():
    names = {path.stem for path in folder().glob("*.json")}
    if not names & USED:
        pytest.skip("the golden files of these tasks are in KREG_GOLDEN_TASKS only")
    assert names >= USED
    left = {name for name in names - USED if not excluded(name, EXCLUSIONS)}
    assert not left, f"neither used nor excluded: {sorted(left)}"


# Generators


def made(golden: Record, params: Record):
    """The task of a generator's parameters; every one of them is a setting of ours."""
    ignored = {"vocab_size"} if golden["task"] in ("flip-flop", "parity") else set()
    return TASKS[golden["task"]](**{key: params[key] for key in params.value.keys() - ignored})


def assert_sample(sample: Sample, wanted: Record, what: str) -> None:
    sample = sample.trimmed()
    assert sample.source.tolist() == wanted["src"], what
    assert sample.target.tolist() == wanted["trg"], what


@file(*(f"gen_{name}" for name in "reverse sort copy flip_flop nback count parity".split()))
def test_golden_generators(golden):
    count = 0
    for case in golden["cases"]:
        task = made(golden, case["params"])
        random = Legacy(case["numpy_legacy_seed"])
        for sample in case["samples"]:
            drawn = task.assemble(task.draw(random, ()))
            assert_sample(drawn, sample, f"{task}, sample {count}")
            count += 1
    assert count >= 24


@file("gen_mqmtar")
def test_golden_mqmtar(golden):
    count = 0
    for case in golden["cases"]:
        special = case["special"]
        ids = [special[name] for name in ("space", "kv_sep", "q_sep", "first_letter")]
        assert ids == [SPACE, KEY_VALUE_SEPARATOR, QUERY_SEPARATOR, FIRST_LETTER]
        task = made(golden, case["params"])
        random = Legacy(case["numpy_legacy_seed"])
        tables = draw_tables(random, task.abc_size, task.vocab_size, task.k_len, task.v_len)
        assert tables.keys.tolist() == case["k_vocab"]
        assert tables.values.tolist() == case["v_vocab"]
        for sample in case["samples"]:
            width = sample["seq_len"] // sample["num_kv"]
            before = width + 1 - (task.k_len + task.v_len + 1) // 2
            removed = sample["removed_slots"]
            random.left = [before - sum(slot < before for slot in row) for row in removed]
            draws = task.draw(random, tables)
            assert (draws.length, draws.pairs) == (sample["seq_len"], sample["num_kv"])
            assert draws.keys.tolist() == tables.keys[sample["key_vocab_idx"]].tolist()
            assert draws.values.tolist() == tables.values[sample["val_vocab_idx"]].tolist()
            assert draws.queries.tolist() == sample["query_pair_idx"]
            assert_sample(task.assemble(draws), sample, f"{task}, sample {count}")
            on_device = jax.jit(task.assemble)(jax.tree.map(jnp.asarray, draws))
            assert_sample(jax.device_get(on_device), sample, f"{task}, sample {count}, JAX")
            count += 1
    assert count == 24


@file("mqmtar_tables")
def test_golden_mqmtar_tables(golden):
    for case in golden["cartesian_word_order"]:
        letters, length = case["abc_size"], case["word_len"]
        assert case["start_id"] == FIRST_LETTER
        words = spell(np.arange(letters**length), letters, length)
        assert words.tolist() == case["words"], f"{letters} letters, {length} long"
    task = MQMTAR()
    assert golden["official_length_table"]
    for row in golden["official_length_table"]:
        length = row["seq_len"]
        pairs = task.pairs(length)
        assert (pairs, length // pairs) == (row["num_kv"], row["tokens_per_pair_row"])
        assert task.source_length(length) == row["src_len"]
        assert task.target_length(length) == row["trg_len"]
        sample = task.sample(0, "test", 0, length)
        assert (len(sample.source), len(sample.target)) == (row["src_len"], row["trg_len"])


# Layouts


def samples_of(case: Record) -> list[Sample]:
    return [Sample.of(pair["src"], pair["trg"]) for pair in case["pairs"]]


@file("encode_asentmax")
def test_golden_asentmax_layout(golden):
    for case in golden["cases"]:
        layout = check_special(case)
        samples = samples_of(case)
        for sample, item in zip(samples, case["items"], strict=True):
            one = encode(sample, layout)
            assert one.inputs.tolist() == item["input_ids"]
            assert one.targets.tolist() == item["targets"]
            assert one.mask.tolist() == [bool(mark) for mark in item["target_mask"]]
            assert prompts([sample], layout)[0][0].tolist() == item["source_ids"]
            assert " ".join(map(str, sample.target)) == item["target_str"]
        batch = collate(samples, layout)
        check_batch(batch, case["batch_right_pad"])
        padded, lengths = prompts(samples, layout)
        assert padded.tolist() == case["batch_left_pad"]["source_ids"]
        inside = np.arange(padded.shape[1]) >= padded.shape[1] - lengths[:, None]
        assert inside.astype(int).tolist() == case["batch_left_pad"]["source_mask"]
    for case in golden["token_classification"]:
        layout = check_special(case)
        samples = samples_of(case)
        for sample, item in zip(samples, case["items"], strict=True):
            one = encode(sample, layout)
            assert one.inputs.tolist() == item["input_ids"]
            assert one.targets.tolist() == one.labels.tolist() == item["targets"]
            assert one.mask.tolist() == [bool(mark) for mark in item["target_mask"]]
        check_batch(collate(samples, layout), case["batch"])


def check_special(case: Record):
    task = TASKS[case["task"]]()
    layout = asentmax_layout(task)
    special = case["special"]
    for name in ("pad", "bos", "eos", "sep"):
        assert getattr(layout, name) == special[f"{name}_token"], f"{task}: {name}"
    assert layout.vocab_size == case["tokenizer_len"]
    return layout


def check_batch(batch, wanted: Record) -> None:
    assert batch.inputs.tolist() == wanted["input_ids"]
    assert batch.targets.tolist() == wanted["targets"]
    assert batch.mask.astype(int).tolist() == wanted["target_mask"]
    inside = np.arange(batch.inputs.shape[1]) < batch.length[:, None]
    assert inside.astype(int).tolist() == wanted["input_mask"]


@file("encode_loss_sa")
def test_golden_sparse_attention_layout(golden):
    tokens = golden["special_tokens_sa"]
    for name in tokens.value:
        layout = sparse_attention_layout(TASKS[name]())
        ids = {"<bos>": layout.bos, "<sep>": layout.sep, "<eos>": layout.eos, "<pad>": layout.pad}
        assert ids == tokens.whole(name)
    for case in golden["cases"]:
        layout = sparse_attention_layout(TASKS[case["task"]]())
        samples = samples_of(case)
        for sample, item in zip(samples, case["items"], strict=True):
            one = encode(sample, layout)
            assert one.inputs.tolist() == item["x"] and one.targets.tolist() == item["y"]
            # Counted in tokens of the sequence there, one more than there are inputs.
            assert one.length + 1 == item["context_length"]
        batch = collate(samples, layout)
        assert batch.inputs.tolist() == case["batch_x"]
        assert batch.targets.tolist() == case["batch_y"]
        assert batch.length.tolist() == case["batch_ctx"]
        assert batch.mask.astype(int).tolist() == case["loss_mask"]
        np.testing.assert_array_equal(sparse_attention_mask(batch.inputs, layout), batch.mask)
        assert batch.mask.sum() == case["n_loss_positions"]
        assert layout.vocab_size == layout.classes == case["vocab_size"]
        check_loss(case, batch)
    check_mask(golden["edge_mask_case"])


def check_loss(case: Record, batch) -> None:
    """The loss of the labels is theirs. Too large, MQMTAR's logits are not stored."""
    logits, wanted = case["logits_rounded_1e3"], case["loss_from_rounded_logits"]
    if logits is None:
        assert case["task"] == "mqmtar"
        return
    loss = mean_token_cross_entropy(jnp.array(logits), jnp.asarray(batch.labels), ignore=IGNORED)
    assert float(loss) == pytest.approx(wanted, rel=2e-6)


def check_mask(case: Record) -> None:
    """Rows without SEP, with two of them and with padding."""
    mask = sparse_attention_mask(np.array(case["idx"]), sparse_attention_layout(Sort()))
    assert mask.astype(int).tolist() == case["loss_mask"]
    entropies = np.array(case["per_token_ce"])
    assert entropies.shape == np.shape(case["targets"])
    assert entropies[mask].mean() == pytest.approx(case["loss"], rel=1e-6)


# Metrics


@file("metrics_sa")
def test_golden_sparse_attention_metrics(golden):
    for case in golden["mqmtar"]:
        assert case["target"][-1] == case["eos"]
        for make in (np.array, jnp.array):
            rows = make(case["pred"])[None], make(case["target"])[None]
            counts = metrics.sparse_attention_recall(*rows, MQMTAR())
            assert (counts.pairs, counts.correct) == (case["n_pairs"], case["n_correct"])
            assert (counts.sequences, bool(counts.exact)) == (1, case["exact"])
    layout = sparse_attention_layout(Sort())
    for number, case in enumerate(golden["reverse_like"]):
        assert case["sep"] == layout.sep
        # On the device every length is another program: one will do.
        for make in (np.array, jnp.array)[: 2 if number == 0 else 1]:
            rows = make(case["pred"])[None], make(case["target"])[None]
            counts = metrics.sparse_attention_exact(*rows, layout)
            assert (counts.sequences, counts.exact) == (1, case["exact"])
            assert (counts.tokens, counts.correct) == (case["n_tokens"], case["n_match"])
    for run in golden["evaluate_shard_runs"]:
        check_shard(run)


def check_shard(run: Record) -> None:
    task = TASKS[run["task"]]()
    layout = sparse_attention_layout(task)
    total = None
    for batch in run["batches"]:
        rows = np.array(batch["pred"]), np.array(batch["target"])
        if isinstance(task, MQMTAR):
            counts = metrics.sparse_attention_recall(*rows, task)
        else:
            counts = metrics.sparse_attention_exact(*rows, layout)
        total = counts if total is None else metrics.add(total, counts)
    rates = total.rates()
    assert rates["exact"] == pytest.approx(run["exact_accuracy"], rel=1e-12)
    if isinstance(task, MQMTAR):
        assert rates["associative_recall"] == pytest.approx(run["assoc_accuracy"], rel=1e-12)
    else:
        # Where there is no recall the original leaves it at zero, and logs the token accuracy.
        assert run["assoc_accuracy"] == 0
        shown = f"token_acc={rates['token_accuracy']:.1%}"
        assert run["log_line"].endswith(shown)


@file("metrics_asentmax")
def test_golden_asentmax_metrics(golden):
    case, layout = golden["postprocess"], asentmax_layout(Sort())
    # The padding there has no meaning of its own: everything after EOS is cut off.
    assert (case["eos"], case["pad"]) == (layout.eos, layout.pad)
    rows = case["generated_ids"]
    decoded = [" ".join(map(str, metrics.before_eos(row, layout.eos))) for row in rows]
    assert decoded == case["decoded"]
    targets = [ids(text) for text in case["targets"]]
    exact = metrics.generated_exact(np.array(rows), targets, layout)
    assert exact.tolist() == case["exact_match_each"]
    assert exact.mean() == pytest.approx(case["exact_match_mean"], rel=1e-12)

    case = golden["bleu"]
    predictions, targets = ([ids(text) for text in case[name]] for name in ("preds", "targets"))
    each = [metrics.bleu([one], [other]) for one, other in zip(predictions, targets, strict=True)]
    # The original computed in float32.
    assert each == pytest.approx(case["per_pair"], rel=1e-6)
    assert metrics.bleu(predictions, targets) == pytest.approx(case["corpus"], rel=1e-6)


def ids(text: str) -> list[int]:
    return [int(word) for word in text.split()]
