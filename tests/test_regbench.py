"""RegBench: what is drawn, the minimiser and n-grams against their definitions, conventions."""

import doctest
import importlib
import itertools
import pkgutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

import experiments.regbench
from experiments.regbench import (
    Automata,
    AutomataConfig,
    LoopScore,
    Score,
    canonical,
    decode,
    encode,
    make_split,
    metrics,
    minimise,
    ngram,
)
from experiments.regbench.instances import sample_instances
from experiments.regbench.sampling import sample_automata, sample_raw, walk

MODULES = [module.name for module in pkgutil.iter_modules(experiments.regbench.__path__)]
# So few languages that two draws of a few dozen automata always share some.
TINY = AutomataConfig(
    letters=2,
    min_alphabet=2,
    max_alphabet=2,
    max_out_degree=2,
    min_nodes=3,
    max_nodes=4,
    min_words=2,
    max_words=4,
    max_tokens=24,
)


@pytest.fixture(scope="module")
def drawn():
    """Official-size instances."""
    return sample_instances(AutomataConfig(), 2000, np.random.default_rng(0))


@pytest.fixture(scope="module")
def benchmark():
    return make_split(TINY, train=300, validation=40, test=50, seed=3)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(f"experiments.regbench.{name}")
    assert doctest.testmod(module).failed == 0


def test_import_needs_no_jax():
    code = "import sys, experiments.regbench; print({'jax', 'kreg', 'flax'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# The distribution of the automata


def test_sizes_after_minimising():
    # Shares of 1 to 12 states in 20,000 draws of the original generator, rounded to 0.001.
    shares = [0.002, 0.018, 0.032, 0.140, 0.138, 0.133, 0.130, 0.126, 0.111, 0.087, 0.059, 0.024]
    original, count = 20_000, 20_000
    automata = sample_automata(AutomataConfig(), count, np.random.default_rng(0))
    ours = np.bincount(automata.sizes, minlength=13)[1:] / count
    error = np.sqrt(np.maximum(shares, 0.002) * (1 / original + 1 / count))
    assert np.all(np.abs(ours - shares) < 4 * error + 0.0005)
    assert automata.sizes.mean() == pytest.approx(6.9, abs=0.1)
    # About 0.8 % of 20,000 repeat an earlier one. Repeats come in clumps, hence the wide band.
    assert 1 - len(set(automata.keys())) / count == pytest.approx(0.008, abs=0.002)


def test_raw_automata():
    count = 6000
    config = AutomataConfig()
    raw = sample_raw(config, count, np.random.default_rng(1))
    nodes = np.count_nonzero(raw.degrees, axis=1)
    assert_uniform(nodes, range(config.min_nodes, config.max_nodes + 1))
    degrees = raw.degrees[raw.degrees > 0]
    assert_uniform(degrees, range(1, config.max_out_degree + 1))
    assert_uniform(raw.symbols[raw.symbols > 0][::25], range(1, config.letters + 1))

    own = np.arange(config.max_nodes)[:, None]
    assert not np.any(raw.targets == own), "a raw node leads to itself"
    assert np.all(raw.targets < nodes[:, None, None])
    for slot, other in itertools.combinations(range(config.max_out_degree), 2):
        both = raw.targets[..., other] >= 0
        assert not np.any((raw.targets[..., slot] == raw.targets[..., other]) & both)
        assert np.all((raw.symbols[..., slot] < raw.symbols[..., other])[both])
    # In a graph of 4 nodes each of the three others is as likely.
    small = raw[nodes == 4].targets[:, 0]
    assert_uniform(small[small >= 0], (1, 2, 3))


def assert_uniform(values, support) -> None:
    """Every value of the support within 4.5 standard errors of its share, and nothing else."""
    counts = Counter(np.ravel(values).tolist())
    assert set(counts) == set(support)
    share, total = 1 / len(support), counts.total()
    error = np.sqrt(share * (1 - share) / total)
    for value, count in counts.items():
        assert abs(count / total - share) < 4.5 * error, f"{value}: {count} of {total}"


def test_walks_take_every_edge_alike():
    fork = Automata.from_transitions([[{"a": 0, "b": 1, "c": 0}, {"d": 0, "e": 1}]])
    symbols, states = walk(fork, 4000, 6, np.random.default_rng(2))
    before = np.concatenate([np.zeros_like(states[..., :1]), states[..., :-1]], axis=-1)
    # Steps of one walk do not depend on each other given the state.
    assert_uniform(symbols[before == 0], (1, 2, 3))
    assert_uniform(symbols[before == 1], (4, 5))


# The minimiser


def words_of(machine: list[dict[str, int]], state: int, length: int) -> frozenset[str]:
    """Every word of at most `length` letters that can be read from a state."""
    found, frontier = {""}, [("", state)]
    for _ in range(length):
        frontier = [
            (word + letter, target)
            for word, place in frontier
            for letter, target in machine[place].items()
        ]
        found.update(word for word, _ in frontier)
    return frozenset(found)


def random_machines(count: int) -> list[list[dict[str, int]]]:
    """Machines of 1 to 4 states over two letters, dead ends and loops included."""
    rng = np.random.default_rng(4)
    return [
        [
            {letter: int(rng.integers(nodes)) for letter in "ab" if rng.random() < 0.7}
            for _ in range(nodes)
        ]
        for nodes in rng.integers(1, 5, count)
    ]


def test_minimiser_against_languages():
    """Two machines of at most 4 states differ, if at all, on a word of at most 4 + 4 letters."""
    machines = random_machines(150)
    smallest = minimise(Automata.from_transitions(machines))
    languages = [words_of(machine, 0, 8) for machine in machines]
    assert len(set(languages)) < len(languages), "the cases hold no two equal languages"
    keys = smallest.keys()
    for one, other in itertools.combinations(range(len(machines)), 2):
        assert (languages[one] == languages[other]) == (keys[one] == keys[other])

    for number in range(len(machines)):
        result = smallest.transitions(number)
        assert words_of(result, 0, 8) == languages[number]
        residuals = {words_of(result, state, 4) for state in range(len(result))}
        assert len(residuals) == len(result), "two states read the same words"


def test_canonical_form_forgets_the_numbering():
    rng = np.random.default_rng(5)
    for machine in random_machines(60):
        order = np.concatenate([[0], 1 + rng.permutation(len(machine) - 1)])
        place = np.argsort(order)
        shuffled = [
            {letter: int(place[target]) for letter, target in reversed(machine[state].items())}
            for state in order
        ]
        one, other = (canonical(Automata.from_transitions([m])) for m in (machine, shuffled))
        assert one.transitions(0) == other.transitions(0)
        assert one.keys() == other.keys()


def test_minimise_is_idempotent_and_pads_alike():
    automata = sample_raw(AutomataConfig(), 200, np.random.default_rng(6))
    once = minimise(automata)
    np.testing.assert_array_equal(minimise(once).symbols, once.symbols)
    np.testing.assert_array_equal(minimise(once).targets, once.targets)
    wider = Automata(
        np.pad(automata.symbols, ((0, 0), (0, 3), (0, 2))),
        np.pad(automata.targets, ((0, 0), (0, 3), (0, 2)), constant_values=-1),
    )
    assert minimise(wider).keys() == once.keys()


# Instances


def test_token_statistics(drawn):
    words = [text.split("|") for text in texts_of(drawn)]
    assert_uniform([len(parts) for parts in words], range(10, 20))
    lengths = [len(word) for parts in words for word in parts]
    assert_uniform(lengths, range(1, 50))
    tokens = drawn.lengths + 1
    # 14.5 words of 25 letters and a separator, less the last: 376. The original's 20,000 had mean
    # 375 and went from 106 to 687; 949 is the most there can be.
    assert tokens.mean() == pytest.approx(376, abs=4 * tokens.std() / np.sqrt(len(tokens)))
    assert 90 <= tokens.min() and tokens.max() <= 800


def texts_of(instances) -> list[str]:
    """The sequences with their last token, which only the labels hold."""
    return [
        decode(ids[:length]) + decode(labels[length - 1 : length])
        for ids, labels, length in zip(
            instances.input_ids, instances.labels, instances.lengths, strict=True
        )
    ]


def test_labels(drawn):
    inputs, labels, lengths = drawn.input_ids, drawn.labels, drawn.lengths
    assert inputs.dtype == labels.dtype == lengths.dtype == np.int32
    assert inputs.shape == labels.shape == (len(drawn), lengths.max())
    inside = np.arange(inputs.shape[1]) < lengths[:, None]
    assert np.all((inputs > 0) == inside)
    assert np.all(labels[~inside] == -100)
    # A label is the next input, or nothing where that is a separator; the last one is a letter.
    following = np.where(inputs[:, 1:] == 19, -100, inputs[:, 1:])
    assert np.all((labels[:, :-1] == following)[inside[:, 1:]])
    last = labels[np.arange(len(drawn)), lengths - 1]
    assert np.all((last >= 1) & (last <= 18))
    assert not np.any(labels == 19)


def test_reference_distributions(drawn):
    some = np.arange(0, 200, 7)
    reference = drawn.next_symbols(some)
    picked = drawn[some]
    inside = np.arange(drawn.input_ids.shape[1]) < picked.lengths[:, None]
    np.testing.assert_allclose(reference.sum(axis=-1), inside)
    assert not np.any(reference[..., [0, 19]])
    labelled = picked.labels >= 0
    of_label = np.take_along_axis(
        reference, np.where(labelled, picked.labels, 0)[..., None], axis=-1
    )
    assert np.all(of_label[labelled] > 0), "the automaton does not allow what follows"
    # The states kept with the walk are those of reading the tokens.
    states = picked.automata.read(picked.input_ids)
    np.testing.assert_array_equal(states[inside], picked.states[inside])


def test_cut_keeps_the_beginning():
    sizes = dict(train=30, validation=10, test=10, seed=8)
    whole = make_split(AutomataConfig(), **sizes).train
    short = make_split(AutomataConfig(max_tokens=100), **sizes).train
    assert short.input_ids.shape == (30, 100)
    np.testing.assert_array_equal(short.lengths, np.minimum(whole.lengths, 100))
    np.testing.assert_array_equal(short.input_ids, whole.input_ids[:, :100])
    np.testing.assert_array_equal(short.labels, whole.labels[:, :100])
    np.testing.assert_array_equal(short.next_symbols([3]), whole.next_symbols([3])[:, :100])


# The sets


def test_sets_are_disjoint(benchmark):
    train, validation, test = (
        part.automata.keys() for part in (benchmark.train, benchmark.validation, benchmark.test)
    )
    assert (len(train), len(validation), len(test)) == (300, 40, 50)
    assert len(set(validation + test)) == 90
    assert not set(train) & set(validation + test)
    free = sample_automata(TINY, 300, np.random.default_rng(11)).keys()
    assert set(free) & set(test) and set(free) & set(validation), "the languages are too many"
    # Such small automata repeat in training, as they do in the original, unless asked not to.
    assert len(set(train)) < 300
    asked = make_split(TINY, train=300, validation=40, test=50, seed=3, distinct_train=True)
    assert len(set(asked.train.automata.keys())) == 300
    assert not set(asked.train.automata.keys()) & set(validation + test)


def test_same_seed_same_arrays(benchmark):
    again = make_split(TINY, train=300, validation=40, test=50, seed=3)
    for part in ("train", "validation", "test"):
        assert_same(getattr(again, part), getattr(benchmark, part))
    other = make_split(TINY, train=300, validation=40, test=50, seed=4)
    assert other.test.automata.keys() != benchmark.test.automata.keys()


def test_size_of_training_changes_nothing_else(benchmark):
    larger = make_split(TINY, train=1500, validation=40, test=50, seed=3)
    assert_same(larger.test, benchmark.test)
    assert_same(larger.validation, benchmark.validation)
    assert len(larger.train) == 1500
    assert_same(larger.train[:300], benchmark.train)
    empty = make_split(TINY, train=0, validation=40, test=50, seed=3)
    assert len(empty.train) == 0
    assert_same(empty.test, benchmark.test)


def assert_same(one, other) -> None:
    for name in ("input_ids", "labels", "lengths", "states"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.automata.keys() == other.automata.keys()


def test_too_few_languages():
    loops = AutomataConfig(
        letters=1, min_alphabet=1, max_alphabet=1, max_out_degree=1, min_nodes=2, max_nodes=2
    )
    with pytest.raises(ValueError, match="config: expected 2 automata of new languages"):
        make_split(loops, train=0, validation=0, test=2, seed=0)


# The n-gram model


def naive_ngram(text: str, order: int, *, backoff=True, uniform=False, add_one=False):
    """Predict after every prefix by counting all of it again, straight from the definition."""
    rows = []
    for end in range(1, len(text) + 1):
        words = ["_" * (order - 1) + word for word in text[:end].split("|")]
        counts = [Counter()] + [
            Counter(word[i : i + n] for word in words for i in range(len(word) - n + 1))
            for n in range(1, order + 1)
        ]
        letters = sorted(set(text[:end]) - {"|"})

        def value(n, history, counts=counts, letters=letters):
            total = counts[n - 1][history] if n > 1 else counts[1].total()
            met = len(letters) if add_one else 0
            seen = {
                letter: (counts[n][history + letter] + (1 if add_one else 0)) / (total + met)
                for letter in letters
                if counts[n][history + letter]
            }
            source = dict.fromkeys(seen, n)
            missing = [letter for letter in letters if letter not in seen]
            if backoff and missing:
                lower, below = value(n - 1, history[1:])
                scale = (1 - sum(seen.values())) / sum(lower[letter] for letter in missing)
                seen |= {letter: scale * lower[letter] for letter in missing}
                source |= {letter: below[letter] for letter in missing}
            return seen, source

        row, source = value(order, words[-1][len(words[-1]) - (order - 1) :])
        if uniform:
            groups = {n: [row[c] for c in row if source[c] == n] for n in source.values()}
            row = {letter: float(np.mean(groups[source[letter]])) for letter in row}
        rows.append(row)
    return rows


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize(
    "options",
    [{}, dict(backoff=False), dict(uniform=True), dict(add_one=True)],
    ids=["backoff", "nobackoff", "uniform", "add_one"],
)
def test_ngram_against_definition(order, options):
    rng = np.random.default_rng(order)
    for letters in ("a", "ab", "abcde"):
        text = "".join(rng.choice([*letters, "|"], 60))
        wanted = np.zeros((60, 20))
        for position, row in enumerate(naive_ngram(text, order, **options)):
            wanted[position, encode("".join(row))] = list(row.values())
        actual = ngram.predict(text, order, **options)
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-12)


def test_ngram_batch_equals_one_by_one(benchmark):
    part = benchmark.test
    batch = ngram.predict_batch(part.input_ids, part.lengths, 3)
    total = Score()
    for row, length in enumerate(part.lengths):
        alone = ngram.predict(part.input_ids[row, :length], 3)
        np.testing.assert_array_equal(batch[row, :length], alone)
        assert not batch[row, length:].any()
        total += Score.of(alone[None], part.next_symbols([row])[:, :length], np.array([length]))
    score = ngram.score(part, 3)
    assert score.positions == part.lengths.sum()
    assert (score.tvd, score.accuracy, score.kl) == pytest.approx(
        (total.tvd, total.accuracy, total.kl), rel=1e-12
    )


def test_ngram_beats_chance_and_order_helps(drawn):
    two, three = (ngram.score(drawn[:100], order) for order in (2, 3))
    assert three.accuracy > two.accuracy > 0.7
    assert three.tvd < two.tvd < 0.45


# Scores


def test_scores_add_up():
    rng = np.random.default_rng(9)
    model, truth = rng.dirichlet(np.ones(20), (2, 6, 11))
    lengths = rng.integers(1, 12, 6)
    whole = Score.of(model, truth, lengths)
    parts = Score.of(model[:2], truth[:2], lengths[:2]) + Score.of(
        model[2:], truth[2:], lengths[2:]
    )
    assert parts.positions == whole.positions == lengths.sum()
    assert (parts.tvd, parts.accuracy, parts.kl) == pytest.approx(
        (whole.tvd, whole.accuracy, whole.kl), rel=1e-12
    )
    perfect = Score.of(truth, truth, lengths)
    assert (perfect.tvd, perfect.accuracy, perfect.kl) == (0, 1, 0)
    assert np.isnan(Score().tvd)
    # What lies past the lengths does not count.
    model[np.arange(11) >= lengths[:, None]] = np.nan
    assert Score.of(model, truth, lengths) == whole


def test_loop_score_weighs_batches_by_sequences(benchmark):
    part = benchmark.test[:9]
    reference = part.next_symbols(slice(None))
    rng = np.random.default_rng(10)
    model = rng.dirichlet(np.ones(20), reference.shape[:2])
    trigram = ngram.predict_batch(part.input_ids, part.lengths, 3)

    def score(rows):
        batch = part[rows]
        return LoopScore.of(
            model[rows],
            trigram[rows],
            reference[rows],
            batch.input_ids,
            batch.labels,
            batch.lengths,
        )

    one, other = score(slice(0, 2)), score(slice(2, 9))
    for name, mean in (one + other).means().items():
        expected = (2 * one.means()[name] + 7 * other.means()[name]) / 9
        assert mean == pytest.approx(expected, rel=1e-12), name
    # Against the automaton itself nothing is lost but the n-gram's own distance.
    ideal = LoopScore.of(
        reference, trigram, reference, part.input_ids, part.labels, part.lengths
    ).means()
    assert ideal["dfa_accuracy"] == 1 and ideal["model_dfa_diff"] == 0
    assert ideal["model_ngram_diff"] == ideal["dfa_ngram_diff"] > 0


# Bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AutomataConfig(letters=19), "letters: expected 1 to 18, got 19"),
        (lambda: AutomataConfig(letters=6), "max_alphabet: expected 4 to 6, got 18"),
        (lambda: AutomataConfig(max_out_degree=5), "max_out_degree: expected 1 to 4, got 5"),
        (lambda: AutomataConfig(min_nodes=3), "min_nodes: expected 4 to 12, got 3"),
        (lambda: AutomataConfig(max_nodes=200), "max_nodes: expected 4 to 127, got 200"),
        (lambda: AutomataConfig(min_words=1), "min_words: expected instances of at least two"),
        (lambda: AutomataConfig(max_tokens=0), "max_tokens: expected None or at least 1, got 0"),
        (
            lambda: make_split(TINY, train=-1, validation=0, test=0, seed=0),
            "train: expected 0 or more, got -1",
        ),
        (lambda: encode("a-b"), "text: expected characters of"),
        (lambda: decode([3, 20]), "ids: expected 0 to 19"),
        (lambda: ngram.predict("ab", 1), "order: expected at least 2"),
        (lambda: ngram.predict("ab", 9), "order: expected at least 2"),
        (lambda: ngram.predict(np.array([1, 0, 2]), 2), "input_ids: expected 1 to 19, got 0 to 2"),
        (lambda: Automata.from_transitions([[{"a": 1}]]), "automata: expected targets 0 to 0"),
        (lambda: Automata.from_transitions([[]]), "automata: expected 1 to 127 states each"),
        (
            lambda: Score.of(np.ones((1, 2, 20)), np.ones((1, 3, 20)), np.array([2])),
            "probabilities: expected the reference's",
        ),
        (
            lambda: Score.of(np.ones((1, 2, 20)), np.ones((1, 2, 20)), np.array([3])),
            "lengths: expected",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_cross_entropy_ignores_masked_labels():
    logits = np.log(np.array([[[0.2, 0.8], [0.5, 0.5]]])) + 700.0
    assert metrics.cross_entropy(logits, np.array([[1, -100]])) == pytest.approx(-np.log(0.8))
