"""RegBench against the golden cases of the original generator, minimiser, n-gram model and metrics.

The folder is $KREG_GOLDEN_TASKS; without it, the subset committed below tests/golden/tasks (some of
the instances, n-gram texts cut short: predictions do not look ahead). Every case in a file is used,
and a key that is neither read nor excluded below fails.
"""

import json
import re

import numpy as np
import pytest
from golden_tasks import Record, excluded, folder, open_record

from experiments.regbench import (
    Automata,
    AutomataConfig,
    LoopScore,
    Score,
    baum_welch,
    canonical,
    decode,
    encode,
    make_split,
    metrics,
    minimise,
    ngram,
)
from experiments.regbench.alphabet import IGNORED_LABEL, characters
from experiments.regbench.instances import shift

EXCLUSIONS = {
    "encode_*": "test_golden_length_tasks.py has them",
    "gen_*": "test_golden_length_tasks.py has them",
    "metrics_asentmax": "test_golden_length_tasks.py has them",
    "metrics_sa": "test_golden_length_tasks.py has them",
    "mqmtar_tables": "test_golden_length_tasks.py has them",
    "published_numbers": "numbers read off papers, not cases",
    "*/pythonhashseed": "how the original was run",
    "*/config/seed": "our draws follow the original in distribution only",
    "*/config/batch_size": "says nothing about the data",
    "*/config/num*_examples": "sizes of the sets; the cases are a selection of them",
    "*/dfa/outgoing_order": "order of a Python dictionary; no meaning in the language",
    "*/dfas/outgoing_order": "order of a Python dictionary; no meaning in the language",
    "*/result/outgoing_order": "order of a Python dictionary; no meaning in the language",
    "regbench_dfas/instances/split": "which set of the original the instance was in",
    "regbench_dfas/instances/index": "its place there",
    "regbench_minimise/note": "prose",
    "regbench_ngram_baselines/split": "which sequences of the original; they are not stored",
}


def parts(pattern: str, name: str) -> tuple[str, ...]:
    """Read what a key says about its case."""
    match = re.fullmatch(pattern, name)
    assert match, f"{name}: a case of an unknown kind, neither used nor excluded"
    return match.groups()


@pytest.fixture
def golden(request):
    """The file named by the test's parameter; afterwards, nothing in it may be left unread."""
    record = open_record(request.param)
    yield record
    record.finish(EXCLUSIONS)


def file(name: str):
    USED.add(name)
    return pytest.mark.parametrize("golden", [name], indirect=True, ids=[name])


USED: set[str] = set()


def machine(dfa: Record) -> list[dict[str, int]]:
    """The golden automaton with its states numbered from the start; all of them accept."""
    assert sorted(dfa["accepting"]) == sorted(dfa["states"])
    names = sorted(dfa["states"], key=lambda state: state != dfa["initial"])
    number = {name: place for place, name in enumerate(names)}
    edges = dfa.whole("transitions")
    return [
        {letter: number[target] for letter, target in edges[str(name)].items()} for name in names
    ]


def configuration(config: Record) -> AutomataConfig:
    """Our ranges include both ends, the original's upper ends are exclusive."""
    degree, letters = config["max_outgoing_edges"], config["vocab_size"] - 2
    # The original cuts its text, one space a token, here: the longest instance has to fit.
    longest = (config["max_num_in_context_examples"] - 1) * config["max_len_per_example"]
    assert 2 * longest <= config["input_seq_len"]
    return AutomataConfig(
        letters=letters,
        min_nodes=degree,
        max_nodes=config["max_num_nodes"],
        min_alphabet=degree,
        max_alphabet=letters,
        max_out_degree=degree - 1,
        min_words=config["min_num_in_context_examples"],
        max_words=config["max_num_in_context_examples"] - 1,
        max_word_length=config["max_len_per_example"] - 1,
    )


def test_golden_files_are_used_or_excluded():
    names = {path.stem for path in folder().glob("*.json")}
    assert names & USED, f"no golden file of RegBench in {folder()}"
    left = {name for name in names - USED if not excluded(name, EXCLUSIONS)}
    assert not left, f"neither used nor excluded: {sorted(left)}"


@file("regbench_dfas")
def test_golden_dfas(golden):
    size = len(golden["vocab"])
    assert golden["vocab"] == list(characters(size))
    special = golden["special"]
    assert encode(special["pad"] + special["separator"], size).tolist() == [
        special["pad_id"],
        special["sep_id"],
    ]
    config = configuration(golden["config"])
    assert golden["instances"]
    for instance in golden["instances"]:
        check_automaton(instance, config, size)
        check_sequence(instance, config, size)


def check_automaton(instance: Record, config: AutomataConfig, size: int) -> None:
    raw, where = instance["raw"], f"instance {instance['golden_index']}"
    nodes = raw.whole("transitions")
    # The raw automaton is one that our sampler can draw.
    assert config.min_nodes <= len(nodes) == raw["num_nodes"] <= config.max_nodes, where
    assert config.min_alphabet <= len(raw["alphabet"]) <= config.max_alphabet, where
    assert raw["max_outgoing_edge"] == config.max_out_degree + 1
    for state, edges in enumerate(nodes):
        assert 1 <= len(edges) <= config.max_out_degree, where
        assert set(edges) <= set(raw["alphabet"]), where
        assert state not in edges.values() and len(set(edges.values())) == len(edges), where

    smallest = minimise(Automata.from_transitions([nodes], size))
    assert smallest.transitions(0, size) == instance["dfa"].whole("canonical"), where
    given = Automata.from_transitions([machine(instance["dfa"])], size)
    assert canonical(given).keys() == smallest.keys() == minimise(given).keys(), where


def check_sequence(instance: Record, config: AutomataConfig, size: int) -> None:
    text, where = instance["input_string"], f"instance {instance['golden_index']}"
    length, padded = instance["input_len"], instance["padded_len"]
    assert config.min_words <= instance["n_words"] == text.count("|") + 1 <= config.max_words, where

    tokens = np.zeros((1, padded + 1), np.int32)
    tokens[0, :length] = encode(text, size)
    tokens[0, length] = instance["labels"][-1]
    inputs, labels, lengths = shift(tokens, np.array([length + 1]), size - 1)
    assert lengths == length == len(text), where
    assert inputs[0, :length].tolist() == instance["input_ids"], where
    assert decode(inputs[0], size) == text + "." * (padded - length), where
    assert labels[0, :length].tolist() == instance["labels"], where
    ignored = bool((labels[0, length:] == IGNORED_LABEL).all())
    assert ignored == instance["labels_after_len_all_minus100"], where

    automaton = minimise(Automata.from_transitions([machine(instance["dfa"])], size))
    states = automaton.read(inputs, size - 1)[0, :length]
    legal = instance["dfa_next_symbols"]
    wanted = np.zeros((length, size))
    for position, letters in enumerate(legal):
        wanted[position, encode(letters, size)] = 1 / len(letters)
    assert len(legal) == length
    np.testing.assert_array_equal(automaton.next_symbols(size)[0, states], wanted, where)


@file("regbench_minimise")
def test_golden_minimise(golden):
    cases = golden["cases"]
    results = minimise(Automata.from_transitions([case.whole("raw") for case in cases]))
    assert len(cases) == len(results) > 0
    for number, case in enumerate(cases):
        where = f"case {number}"
        assert results.transitions(number) == case["result"].whole("canonical"), where
        assert results.sizes[number] == len(case["result"]["states"]), where
        named = Automata.from_transitions([machine(case["result"])])
        assert canonical(named).keys() == [results.keys()[number]], where
        reached = canonical(Automata.from_transitions([case.value["raw"]]))
        assert reached.sizes[0] == case["n_reachable_before"], where


NGRAM_VARIANTS = {
    "backoff": {},
    "backoff_uniform": dict(uniform=True),
    "nobackoff": dict(backoff=False),
}


@file("regbench_ngram")
def test_golden_ngram(golden):
    assert golden["vocab"] == list(characters(len(golden["vocab"])))
    size = len(golden["vocab"])
    texts = instance_texts()
    used = 0
    for case in golden["cases"]:
        text, predictions = case["text"], case["preds"]
        if case["instance"] in texts:
            assert texts[case["instance"]].startswith(text)
        for name in predictions.value:
            order, variant = parts(r"N(\d+)_(\w+)", name)
            options = NGRAM_VARIANTS[variant]
            actual = ngram.predict(text, int(order), vocab_size=size, **options)
            check_rows(actual, predictions.whole(name), f"{name} of {text[:20]}")
            used += 1
    for name in golden.value.keys() - {"vocab", "cases"}:
        order, text = parts(r"addone_N(\d+)_backoff_(.*)", name)
        actual = ngram.predict(text, int(order), vocab_size=size, add_one=True)
        check_rows(actual, golden.whole(name), name)
        used += 1
    assert used > 0


def instance_texts() -> dict[int, str]:
    path = folder() / "regbench_dfas.json"
    instances = json.loads(path.read_text())["instances"] if path.exists() else []
    return {instance["golden_index"]: instance["input_string"] for instance in instances}


def check_rows(actual: np.ndarray, rows: list[dict[str, float]], what: str) -> None:
    """Golden rows hold the nonzero probabilities, rounded to twelve decimals."""
    wanted = np.zeros_like(actual)
    assert len(rows) == len(wanted), what
    for position, row in enumerate(rows):
        wanted[position, encode("".join(row), actual.shape[1])] = list(row.values())
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-12, err_msg=what)


@file("regbench_metrics")
def test_golden_metrics(golden):
    size = len(golden["vocab"])
    assert golden["vocab"] == list(characters(size))
    assert golden["config"]["vocab_size"] == size and configuration(golden["config"])
    inputs, labels = np.array(golden["inputs"]), np.array(golden["labels"])
    texts = golden["input_strings"]
    lengths = np.array([len(text) for text in texts])
    for text, ids in zip(texts, inputs, strict=True):
        assert decode(ids, size) == text.ljust(inputs.shape[1], ".")

    automata = Automata.from_transitions([machine(dfa) for dfa in golden["dfas"]], size)
    for number, dfa in enumerate(golden["dfas"]):
        assert canonical(automata).transitions(number, size) == dfa.whole("canonical")
    rows = np.arange(len(texts))[:, None]
    reference = automata.next_symbols(size)[rows, automata.read(inputs, size - 1)]
    # The original's logits were the float32 numbers next to these decimals.
    logits = np.array(golden["logits"], np.float32).astype(np.float64)
    weights = np.exp(logits)
    model = weights / weights.sum(axis=-1, keepdims=True)

    # The original computed in float32.
    close = dict(rel=2e-6)
    plot = golden["plot_metrics"]
    score = sum(
        (Score.of(model[[row]], reference[[row]], lengths[[row]]) for row in range(len(texts))),
        Score(),
    )
    assert score.positions == lengths.sum() > 0
    assert 2 * score.tvd == pytest.approx(plot["l1"], **close)
    assert score.tvd == pytest.approx(plot["tvd"], **close)
    assert score.kl == pytest.approx(plot["kl"], **close)
    assert score.accuracy == pytest.approx(plot["greedy_acc"], **close)
    orders = {int(parts(r"\w+_(\d+)gram", name)[0]) for name in plot.value if "gram" in name}
    assert orders
    for order in orders:
        predicted = ngram.predict_batch(inputs, lengths, order, vocab_size=size)
        score = Score.of(predicted, reference, lengths)
        assert score.tvd == pytest.approx(plot[f"tvd_{order}gram"], **close)
        assert score.accuracy == pytest.approx(plot[f"acc_{order}gram"], **close)

    check_loop_metrics(golden["train_metrics"], model, reference, inputs, labels, lengths, texts)
    entropy = metrics.cross_entropy(logits, labels)
    assert entropy == pytest.approx(golden["cross_entropy_float64"], rel=1e-12)


def check_loop_metrics(train, model, reference, inputs, labels, lengths, texts) -> None:
    size = model.shape[-1]
    trigram = ngram.predict_batch(inputs, lengths, 3, vocab_size=size)
    score = LoopScore.of(model, trigram, reference, inputs, labels, lengths, separator_id=size - 1)
    assert score.sequences == len(texts)
    for name, mean in score.means().items():
        assert mean == pytest.approx(train[name], rel=2e-6), name

    scored = metrics.within_word(inputs, lengths, separator_id=size - 1)
    legal = metrics.legal_guesses(model, reference)
    marks = [legal[row, scored[row]].astype(int).tolist() for row in range(len(texts))]
    assert marks == train["char_labels"]

    # Where the next input is a separator the original writes it in place of the guess.
    guesses = np.where(scored, np.argmax(model, axis=-1), size - 1)
    lines = train["generation_file_first_lines"]
    assert 0 < len(lines) <= len(texts)
    for row, line in enumerate(lines):
        last = decode(labels[row, lengths[row] - 1 : lengths[row]], size)
        guess = decode(guesses[row, : lengths[row]], size)
        assert line == f"{texts[row]}\t{texts[row][1:]}{last}\t{guess}"


BASELINE_VARIANTS = {"": {}, "_nobackoff": dict(backoff=False), "U": dict(uniform=True)}


@file("regbench_ngram_baselines")
def test_golden_ngram_baselines(golden):
    """The golden means are over sequences that are not stored: ours must agree as two samples do.

    The standard error of a mean over the golden number of sequences comes from bootstrapping ours;
    four of the difference's are allowed.
    """
    drawn = 480
    config = configuration(golden["config"])
    instances = make_split(config, train=0, validation=0, test=drawn, seed=0).test
    reference = instances.next_symbols(slice(None))
    rng = np.random.default_rng(1)
    picks = rng.integers(0, drawn, (400, golden["n_sequences"]))
    widening = np.sqrt(1 + golden["n_sequences"] / drawn)
    results = golden["results"]
    assert results.value
    for name in results.value:
        order, variant = parts(r"(\d+)gram(\w*)", name)
        predicted = ngram.predict_batch(
            instances.input_ids, instances.lengths, int(order), **BASELINE_VARIANTS[variant]
        )
        sums = sequence_sums(predicted, reference, instances.lengths)
        for metric in results[name].value:
            total, positions = sums[metric], instances.lengths
            error = widening * np.std(total[picks].sum(axis=1) / positions[picks].sum(axis=1))
            difference = total.sum() / positions.sum() - results[name][metric]
            assert abs(difference) < 4 * error, f"{name} {metric}: {difference} against {error}"
            # The bootstrap must not be so wide that anything passes.
            assert error < 0.1 * abs(results[name][metric]), f"{name} {metric}"


@file("regbench_baumwelch")
def test_golden_baum_welch(golden):
    """One fit of the original from its own draws, its fault included; it computed in float32."""
    states, vocabulary = golden["max_states"], golden["vocab"]
    assert "".join(vocabulary) == characters(len(vocabulary))
    words = [encode(text, len(vocabulary)) for text in golden["texts"]]
    allowed = baum_welch.allowed_transitions(states)
    np.testing.assert_array_equal(~allowed, np.array(golden["A_mask_true_means_forbidden"], bool))
    steps = np.array(golden["state_mask_first_8"]).T
    np.testing.assert_array_equal(baum_welch.reachable_edges(states, len(steps)), steps == 0)

    start = baum_welch.initial(np.array(golden["rand_A"]), np.array(golden["rand_B"]), states)
    options = dict(iterations=golden["iterations"])
    model = baum_welch.fit(words, start, official_fault=True, **options)
    close = dict(rtol=0, atol=2e-6)
    np.testing.assert_allclose(model.transition, golden["A"], **close)
    np.testing.assert_allclose(model.emission, golden["B"], **close)
    np.testing.assert_allclose(model.start, golden["pi"], **close)
    np.testing.assert_allclose(model.first(), golden["first_symbol_distribution"], **close)
    following = model.following(words[-1])
    np.testing.assert_allclose(following, golden["next_symbol_after_last_text"], **close)
    right = baum_welch.fit(words, start, **options)
    assert np.abs(right.emission - model.emission).max() > 0.1


def sequence_sums(predicted, reference, lengths) -> dict[str, np.ndarray]:
    """Sums of each metric over the positions of each sequence."""
    scores = [
        Score.of(predicted[[row]], reference[[row]], lengths[[row]]) for row in range(len(lengths))
    ]
    return {
        "tvd": np.array([score.l1_sum / 2 for score in scores]),
        "acc": np.array([score.legal for score in scores]),
        "kl": np.array([score.kl_sum for score in scores]),
        "mean_mass": predicted.sum(axis=(1, 2)),
    }
