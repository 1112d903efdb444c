"""Length-generalisation tasks: the law of what is drawn, on host and device alike, and batches."""

import itertools
import tracemalloc
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nightly import nightly
from scipy import stats

from experiments.length_tasks import (
    IGNORED,
    MQMTAR,
    TASKS,
    Copy,
    FlipFlop,
    LocalCount,
    NBack,
    Parity,
    Reverse,
    Sample,
    Sort,
    add,
    asentmax_layout,
    batch_key,
    collate,
    device_batch,
    encode,
    host_batch,
    metrics,
    prompts,
    sparse_attention_layout,
    teacher_forced,
)
from experiments.length_tasks.batches import device_samples
from experiments.length_tasks.layout import bucket, sparse_attention_mask
from experiments.length_tasks.randomness import DeviceRandom, host_random

WHERE = pytest.mark.parametrize("where", ["host", "device"])
# Small ones of every kind, with varying lengths.
SMALL = [
    Copy(6, 2, vocab_size=5),
    Reverse(6, 2, vocab_size=5),
    Sort(6, 2, vocab_size=5),
    FlipFlop(8, 3, write_prob=0.3),
    Parity(6, 2),
    NBack(6, 2, vocab_size=5, num_steps=3),
    LocalCount(10, 4, vocab_size=3, max_reps=4),
    MQMTAR(36, 8, abc_size=6, vocab_size=12, k_len=2, v_len=2, num_kv=0.5, num_q=2),
    MQMTAR(30, 3, abc_size=9, vocab_size=7, k_len=1, v_len=3, num_kv=1.0, num_q=3),
]
EACH = pytest.mark.parametrize("task", SMALL, ids=lambda task: type(task).__name__)
draw_samples = jax.jit(device_samples, static_argnums=(0, 2))
draw_batch = jax.jit(device_batch, static_argnums=(0, 1, 3))


@cache
def samples(task, where: str, count: int = 3000) -> list[Sample]:
    """Samples of a task without their padding, of split "law" and seed 5."""
    if where == "host":
        return [task.sample(5, "law", index) for index in range(count)]
    drawn = draw_samples(task, batch_key(5, "law", 0), count, task.tables(5, "law"))
    drawn = jax.device_get(drawn)
    return [Sample(*(x[row] for x in drawn)).trimmed() for row in range(count)]


def draws(where: str, draw, count: int) -> np.ndarray:
    """What `draw(random)` gives from many sources."""
    if where == "host":
        return np.stack([draw(host_random(3, "law", index)) for index in range(count)])
    return np.asarray(
        jax.vmap(lambda key: draw(DeviceRandom(key)))(jax.random.split(jax.random.key(3), count))
    )


def assert_law(values, law: dict) -> None:
    """Nothing outside the support, and a chi-square test of the counts."""
    outcomes = [tuple(v) if isinstance(v, np.ndarray | list | tuple) else int(v) for v in values]
    support = {outcome: share for outcome, share in law.items() if share > 0}
    assert set(outcomes) <= set(support)
    shares = np.array(list(support.values()))
    assert shares.sum() == pytest.approx(1)
    counts = np.array([outcomes.count(outcome) for outcome in support])
    assert (shares * len(outcomes)).min() >= 5, "too few draws for the test"
    if len(support) > 1:
        assert stats.chisquare(counts, shares * len(outcomes)).pvalue > 1e-4


def uniform(outcomes) -> dict:
    outcomes = list(outcomes)
    return dict.fromkeys(outcomes, 1 / len(outcomes))


# Sources of random numbers


@WHERE
def test_integers_and_booleans(where):
    drawn = draws(where, lambda random: random.integers(2, 6, (3,)), 1000)
    assert_law(drawn.ravel(), uniform(range(2, 7)))
    drawn = draws(where, lambda random: random.bernoulli(0.8, 2), 2000)
    pairs = itertools.product([(0, 0.2), (1, 0.8)], repeat=2)
    assert_law(drawn.astype(int), {(a, b): p * q for (a, p), (b, q) in pairs})


@WHERE
def test_calls_are_independent(where):
    xp = np if where == "host" else jnp
    drawn = draws(
        where, lambda random: xp.stack([random.integers(0, 3), random.integers(0, 3)]), 3000
    )
    assert_law(drawn, uniform(itertools.product(range(4), repeat=2)))


@WHERE
def test_distinct_takes_every_ordered_choice_alike(where):
    drawn = draws(where, lambda random: random.distinct(5, 3), 3000)
    assert_law(drawn, uniform(itertools.permutations(range(5), 3)))
    drawn = draws(where, lambda random: random.distinct(4, 4), 2000)
    assert_law(drawn, uniform(itertools.permutations(range(4))))


@WHERE
@pytest.mark.parametrize("good, bad, taken", [(6, 3, 4), (2, 7, 5), (3, 3, 0), (3, 2, 5)])
def test_hypergeometric(where, good, bad, taken):
    def draw(random):
        return random.hypergeometric(good, bad, taken, 6 if where == "device" else taken, 2)

    law = {left: stats.hypergeom.pmf(left, good + bad, good, taken) for left in range(taken + 1)}
    law = {left: share for left, share in law.items() if share > 0}
    drawn = draws(where, draw, 3000)
    assert_law(drawn.ravel(), law)
    assert_law(drawn, {(a, b): p * q for a, p in law.items() for b, q in law.items()})


def chain_law(values: int, length: int) -> dict:
    """Where redrawing all that equal their right neighbour ends, by solving the Markov chain."""
    states = list(itertools.product(range(values), repeat=length))
    number = {state: place for place, state in enumerate(states)}
    step = np.zeros((len(states), len(states)))
    for state in states:
        same = [i for i in range(length - 1) if state[i] == state[i + 1]]
        for fresh in itertools.product(range(values), repeat=len(same)):
            after = list(state)
            for place, value in zip(same, fresh, strict=True):
                after[place] = value
            step[number[state], number[tuple(after)]] += values ** -len(same)
    ended = np.linalg.matrix_power(step, 2**12).mean(axis=0)
    return {state: ended[number[state]] for state in states if ended[number[state]] > 1e-9}


@WHERE
def test_chain_follows_the_redrawing(where):
    drawn = draws(where, lambda random: random.chain(3, 4, 6 if where == "device" else 4), 6000)
    law = chain_law(3, 4)
    assert len(law) == 3 * 2**3
    assert_law(drawn[:, :4], law)
    # Uniform on the same sequences would be another law.
    counts = [sum((row[:4] == state).all() for row in drawn) for state in law]
    assert stats.chisquare(counts).pvalue < 1e-6


# Samples


@EACH
@pytest.mark.parametrize("where", nightly(["host", "device"], but=["device"]))
def test_length_is_uniform(task, where):
    if isinstance(task, MQMTAR | LocalCount | FlipFlop):
        of_length = {
            MQMTAR: lambda length: (task.pairs(length), task.source_length(length)),
            LocalCount: lambda length: task.blocks(length),
            FlipFlop: lambda length: task.source_length(length),
        }[type(task)]
    else:
        of_length = task.source_length
    law: dict = {}
    for length in task.lengths:
        key = of_length(length)
        law[key] = law.get(key, 0) + 1 / len(task.lengths)

    def seen(sample: Sample):
        if isinstance(task, LocalCount):
            return int((sample.target == 0).sum())
        if isinstance(task, MQMTAR):
            return int((sample.source == 1).sum()), len(sample.source)
        return len(sample.source)

    assert_law([seen(sample) for sample in samples(task, where)], law)


@WHERE
@pytest.mark.parametrize("kind", [Copy, Reverse, Sort])
def test_rearranged_symbols(kind, where):
    task = next(task for task in SMALL if isinstance(task, kind))
    drawn = samples(task, where)
    for sample in drawn:
        source = sample.source.tolist()
        wanted = {Copy: source, Reverse: source[::-1], Sort: sorted(source)}[kind]
        assert sample.target.tolist() == wanted
    everything = np.concatenate([sample.source for sample in drawn])
    assert_law(everything[: len(everything) // 2 * 2], uniform(range(5)))
    assert_law([s.source[:2] for s in drawn], uniform(itertools.product(range(5), repeat=2)))
    assert_law([s.source[-1] for s in drawn], uniform(range(5)))


@WHERE
def test_nback(where):
    task = next(task for task in SMALL if isinstance(task, NBack))
    drawn = samples(task, where)
    for sample in drawn:
        assert sample.source[0] == 0
        wanted = [0] * task.num_steps + sample.source.tolist()
        assert sample.target.tolist() == wanted[: len(sample.source)]
    assert_law(np.concatenate([s.source[1:] for s in drawn]), uniform(range(1, 5)))
    assert_law([s.source[1:3] for s in drawn], uniform(itertools.product(range(1, 5), repeat=2)))


@WHERE
def test_flip_flop(where):
    task = next(task for task in SMALL if isinstance(task, FlipFlop))
    drawn = samples(task, where)
    written, bits = [], []
    for sample in drawn:
        commands, shown = sample.source[::2].tolist(), sample.source[1::2].tolist()
        assert commands[0] == 2 and commands[-1] == 4
        stored = [bit for command, bit in zip(commands, shown, strict=False) if command == 2]
        assert sample.target.tolist() == stored[-1:]
        written += commands[1:-1]
        bits += shown
    assert_law(written, {2: 0.3, 3: 0.7})
    assert_law(bits, uniform([0, 1]))
    # Commands and bits of a pair are independent.
    long = [s.source[2:4] for s in drawn if len(s.source) > 5]
    assert_law(long, {(c, b): p / 2 for c, p in ((2, 0.3), (3, 0.7)) for b in (0, 1)})


@WHERE
def test_parity(where):
    drawn = samples(next(task for task in SMALL if isinstance(task, Parity)), where)
    for sample in drawn:
        assert sample.target.tolist() == [int(sample.source.sum() % 2 == 0)]
    assert_law(np.concatenate([s.source for s in drawn]), uniform([0, 1]))


@WHERE
def test_local_count(where):
    task = next(task for task in SMALL if isinstance(task, LocalCount))
    drawn = samples(task, where)
    lengths, firsts = [], []
    for sample in drawn:
        blocks = [(symbol, len(list(run))) for symbol, run in itertools.groupby(sample.source)]
        # Neighbours differ, so that runs are the blocks: as many as there are zeros.
        assert sample.target.tolist() == [i for _, size in blocks for i in range(size)]
        lengths.append([size for _, size in blocks])
        firsts += [[symbol for symbol, _ in blocks]] if len(blocks) == 3 else []
    assert_law(np.concatenate(lengths), uniform(range(2, 5)))
    assert_law([row[:2] for row in lengths], uniform(itertools.product(range(2, 5), repeat=2)))
    assert_law(firsts, chain_law(3, 3))


def rows(task: MQMTAR, sample: Sample):
    """Parse a source: the words of each row, the free spaces left of them, and the queries."""
    pairs = int((sample.source == 1).sum())
    asked = task.num_q * (task.k_len + 1)
    body = sample.source[:-asked].reshape(pairs, -1)
    separator = np.argmax(body == 1, axis=1)
    left = separator - task.k_len
    columns = np.arange(body.shape[1])
    inside = (columns >= left[:, None]) & (columns < left[:, None] + task.core - 1)
    # Spaces everywhere else, one of them after the value for certain.
    assert (body[~inside] == 0).all() and (left + task.core <= body.shape[1]).all()
    words = body[inside].reshape(pairs, -1)
    queries = sample.source[-asked:].reshape(task.num_q, -1)
    assert (queries[:, 0] == 2).all()
    keys, values = words[:, : task.k_len], words[:, task.k_len + 1 :]
    return keys, values, left, body.shape[1], queries[:, 1:]


@WHERE
@pytest.mark.parametrize("task", [task for task in SMALL if isinstance(task, MQMTAR)])
def test_mqmtar(task, where):
    tables = task.tables(5, "law")
    left, taken, asked = {}, {"keys": [], "values": []}, []
    for sample in samples(task, where):
        keys, values, before, width, queries = rows(task, sample)
        target = sample.target.reshape(task.num_q, -1)
        assert (target[:, 0] == 2).all()
        number = [np.flatnonzero((keys == query).all(axis=1)).item() for query in queries]
        assert (target[:, 1:] == values[number]).all()
        asked.append([len(keys), *number])
        left.setdefault(width, []).extend(before.tolist())
        for name, words in (("keys", keys), ("values", values)):
            found = (words[:, None] == getattr(tables, name)).all(axis=-1)
            assert (found.sum(axis=1) == 1).all(), "a word that is not in the table"
            numbers = np.argmax(found, axis=1)
            assert len(set(numbers.tolist())) == len(numbers), "a word twice"
            taken[name].append(numbers)
    for name in taken:
        assert_law(np.concatenate(taken[name])[::2], uniform(range(task.vocab_size)))
        assert_law([row[1] for row in taken[name]], uniform(range(task.vocab_size)))
    for pairs in {row[0] for row in asked}:
        chosen = [row[1:3] for row in asked if row[0] == pairs]
        assert_law(chosen, uniform(itertools.product(range(pairs), repeat=2)))
    assert any(width > task.core for width in left)
    for width, found in left.items():
        before = width + 1 - (task.core - 1) // 2
        others, free = 2 * (width + 1) - task.core, width - task.core
        law = stats.hypergeom.pmf(np.arange(free + 1), others, before, free)
        # Rare outcomes of the tails are pooled.
        common = [k for k in range(free + 1) if law[k] * len(found) >= 5]
        low, high = min(common), max(common)
        pooled = {k: law[k] for k in common}
        pooled[low], pooled[high] = law[: low + 1].sum(), law[high:].sum()
        assert 0 <= min(found) and max(found) <= free
        assert_law(np.clip(found, low, high), pooled)


def test_word_tables():
    task = MQMTAR()
    train, test = task.tables(0, "train"), task.tables(0, "test")
    for table in (*train, *test):
        assert table.shape == (10_000, 2) and (table.min(), table.max()) == (3, 258)
        assert len(np.unique(table, axis=0)) == len(table)
    assert all((a == b).all() for a, b in zip(train, task.at(4096).tables(0, "train"), strict=True))
    # Of 65,536 words each table has its own 10,000: about 1,526 are in two tables.
    for one, other in ((train.keys, train.values), (train.keys, test.keys)):
        both = set(map(tuple, one.tolist())) & set(map(tuple, other.tolist()))
        assert 1350 < len(both) < 1700
    assert (task.tables(1, "train").keys != train.keys).any()
    with pytest.raises(ValueError, match="read-only"):
        train.keys[0] = 0


# Reproducibility


@EACH
def test_sample_is_a_function_of_seed_split_and_index(task):
    def take(*place):
        sample = task.sample(*place)
        return sample.source.tolist(), sample.target.tolist()

    later = [take(0, "train", index) for index in (2**40, 7, 3)]
    assert later == [take(0, "train", index) for index in (2**40, 7, 3)]
    many = [take(0, "train", index) for index in range(40)]
    assert many[7] == later[1] and many[3] == later[2]
    for others in (("train", 1), ("test", 0), ("validation_0_64", 0)):
        assert many != [take(others[1], others[0], index) for index in range(40)]


@pytest.mark.parametrize("task", [SMALL[0], SMALL[-3]], ids=["Copy", "LocalCount"])
def test_device_batch_is_a_function_of_seed_and_step(task):
    layout = asentmax_layout(task)

    @jax.jit
    def at_step(step):
        return device_batch(task, layout, batch_key(0, "train", step), 64)

    five, six, again = (jax.device_get(at_step(step)) for step in (5, 6, 5))
    direct, other = (
        jax.device_get(draw_batch(task, layout, batch_key(0, split, 5), 64, ()))
        for split in ("train", "test")
    )
    for one, same, outside in zip(five, again, direct, strict=True):
        np.testing.assert_array_equal(one, same)
        np.testing.assert_array_equal(one, outside)
    for different in (six, other):
        assert (five.inputs != different.inputs).any()
    assert at_step._cache_size() == 1


def test_splits_differ_even_where_their_texts_begin_alike():
    splits = ["test", "test_0_64", "test_1_64", "", "\0", "\0\0"]
    firsts = {host_random(0, split).integers(0, 2**30).item() for split in splits}
    assert len(firsts) == len(splits)
    firsts = {host_random(seed, "test").integers(0, 2**30).item() for seed in (0, 1, 2**32, 2**64)}
    assert len(firsts) == 4


# The device's arrays are the host's


@EACH
def test_device_encoding_is_the_hosts(task):
    layout, trimmed = asentmax_layout(task), samples(task, "device")
    key, tables = batch_key(5, "law", 0), task.tables(5, "law")
    batch = jax.device_get(draw_batch(task, layout, key, len(trimmed), tables))
    assert batch.inputs.dtype == batch.targets.dtype == np.int32
    wanted = collate(trimmed[:200], layout, [layout.width(task)])
    for ours, theirs in zip(wanted, batch, strict=True):
        np.testing.assert_array_equal(ours, theirs[:200])


@EACH
def test_width_is_that_of_the_longest(task):
    layout = asentmax_layout(task)
    lengths = [int(layout.positions(sample)) for sample in samples(task, "host")]
    if isinstance(task, LocalCount):
        assert max(lengths) <= layout.width(task)
    else:
        assert max(lengths) == layout.width(task)


def test_longest_sequences_in_bounded_memory():
    task, layout = MQMTAR(), asentmax_layout(MQMTAR())
    task.tables(0, "test")
    tracemalloc.start()
    batch = host_batch(task, layout, seed=0, split="test", indices=range(2), length=65_536)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert batch.inputs.shape == (2, 61_178 + 12 + 2)
    assert batch.mask.sum() == 2 * 13
    assert peak < 16 * 2**20


@pytest.mark.parametrize("name", TASKS)
def test_official_tasks(name):
    benchmark = TASKS[name]
    task = benchmark.task
    sizes = {"mqmtar": 390_625, "sort": 312_500, "reverse": 234_375, "copy": 156_250}
    assert benchmark.steps == sizes.get(name, 78_125)
    centre = (96, 32) if name == "local_count" else (48, 16)
    assert (task.seq_len, task.vary_len) == centre
    layout = asentmax_layout(task)
    batch = draw_batch(task, layout, batch_key(0, "train", 0), 8, task.tables(0, "train"))
    assert 0 <= batch.inputs.min() and batch.inputs.max() < layout.vocab_size
    labels = np.asarray(batch.labels)
    assert labels.min() == IGNORED and labels.max() < layout.classes
    for length in benchmark.lengths:
        assert task.at(length).lengths == range(length, length + 1)
    long = host_batch(task, layout, seed=0, split="test", indices=[0], length=4096)
    assert long.inputs.shape[1] > 2000


# Layouts


@pytest.mark.parametrize("task", [MQMTAR(), Sort(), Reverse(), Copy()])
def test_layouts_differ_in_their_ids_alone(task):
    drawn = [task.sample(0, "test", index) for index in range(6)]
    makers = asentmax_layout, sparse_attention_layout
    ours, theirs = (collate(drawn, make(task)) for make in makers)
    np.testing.assert_array_equal(ours.mask, theirs.mask)
    for name in ("inputs", "labels"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        data = mine < task.data_ids
        np.testing.assert_array_equal(mine[data], other[data])
        assert (other[~data] >= task.data_ids).all() or name == "labels"
    layout = asentmax_layout(task)
    np.testing.assert_array_equal(sparse_attention_mask(ours.inputs, layout), ours.mask)


@pytest.mark.parametrize("task", [FlipFlop(), NBack(), LocalCount()])
def test_sparse_attention_layout_has_some_tasks_only(task):
    with pytest.raises(ValueError, match=f"task: .*{type(task).__name__}"):
        sparse_attention_layout(task)


def test_labelling_has_a_class_for_every_count():
    task = LocalCount()
    layout = asentmax_layout(task)
    assert (layout.vocab_size, layout.classes) == (21, 48)
    one = encode(Sample.of([3, 3, 7], [0, 1, 0]), layout, 7)
    assert one.inputs.tolist() == [17, 3, 3, 7, 18, 16, 16]
    assert one.labels.tolist() == [-1, 0, 1, 0, -1, -1, -1]


def test_padding():
    layout = asentmax_layout(Copy())
    drawn = [Sample.of([1] * n, [1] * n) for n in (3, 5)]
    assert collate(drawn, layout).inputs.shape == (2, 12)
    assert collate(drawn, layout, (8, 16, 32)).inputs.shape == (2, 16)
    assert collate(drawn, layout, (32, 12)).inputs.shape == (2, 12)
    assert bucket(8, (8, 16)) == 8
    with pytest.raises(ValueError, match=r"widths: .*at least 12.*\[4, 11\]"):
        collate(drawn, layout, (4, 11))
    with pytest.raises(ValueError, match="width: expected at least 12, got 11"):
        encode(drawn[1], layout, 11)
    with pytest.raises(ValueError, match="samples: "):
        collate([], layout)
    padded, lengths = prompts([], layout)
    assert padded.shape == (0, 0) and lengths.shape == (0,)
    flip = asentmax_layout(FlipFlop())
    assert prompts([Sample.of([2, 1, 4], [1])], flip)[0].tolist() == [[6, 2, 1, 4]]


# Metrics


def wrong(batch, rng, rate=0.03):
    """The targets with some of them changed, and noise where nothing is counted."""
    noise = rng.integers(0, 50, batch.targets.shape)
    return np.where(~batch.mask | (rng.random(noise.shape) < rate), noise, batch.targets)


@pytest.mark.parametrize("task", [Copy(6, 2), FlipFlop(), LocalCount(), MQMTAR()])
def test_teacher_forced(task):
    layout, rng = asentmax_layout(task), np.random.default_rng(0)
    drawn = [task.sample(0, "test", index) for index in range(60)]
    batch = collate(drawn, layout)
    # Rows that fill a batch up have no loss.
    batch = type(batch)(*(np.pad(x, [(0, 4)] + [(0, 0)] * (x.ndim - 1)) for x in batch))
    predictions = wrong(batch, rng)
    exact = with_eos = tokens = correct = 0
    for row, sample in zip(predictions, drawn, strict=False):
        start = 1 if layout.classifies else int(layout.positions(sample)) - len(sample.target) - 1
        said = row[start : start + len(sample.target)]
        right = said == sample.target
        eos = True if layout.classifies else row[start + len(sample.target)] == layout.eos
        exact += right.all()
        with_eos += right.all() and eos
        tokens += len(right)
        correct += right.sum()
    assert 0 < with_eos <= exact < 60 and correct < tokens
    for counts in (
        teacher_forced(predictions, batch, layout),
        jax.jit(teacher_forced, static_argnums=2)(
            jnp.array(predictions), jax.tree.map(jnp.array, batch), layout
        ),
    ):
        assert [int(x) for x in counts] == [60, exact, with_eos, tokens, correct]
    twice = add(counts, counts).rates()
    assert twice == pytest.approx(
        {"exact": exact / 60, "exact_with_eos": with_eos / 60, "token_accuracy": correct / tokens}
    )


def test_eos_and_classes_may_have_the_same_number():
    task = LocalCount(30, 0, max_reps=24)
    layout = asentmax_layout(task)
    sample = Sample.of([1] * 20, range(20))
    assert layout.eos == 18 in sample.target
    batch = collate([sample], layout)
    right = batch.targets.copy()
    assert teacher_forced(right, batch, layout).tokens == 20
    right[0, 19] = 0  # the label of the token at place 18 is 18
    counts = teacher_forced(right, batch, layout)
    assert (counts.exact, counts.correct) == (0, 19)


def test_no_sequences_have_no_rates():
    layout = asentmax_layout(Copy())
    batch = collate([Copy().sample(0, "test", 0)], layout)
    none = batch._replace(mask=np.zeros_like(batch.mask))
    counts = teacher_forced(none.targets, none, layout)
    assert [int(x) for x in counts] == [0, 0, 0, 0, 0]
    assert all(np.isnan(rate) for rate in counts.rates().values())


@pytest.mark.parametrize("kind", [Copy, Reverse, Sort])
def test_sparse_attention_metric_agrees_without_padding(kind):
    task, layout = kind(), sparse_attention_layout(kind())
    batch = host_batch(task, layout, seed=0, split="test", indices=range(40), length=16)
    predictions = wrong(batch, np.random.default_rng(1))
    theirs = metrics.sparse_attention_exact(predictions, batch.targets, layout)
    ours = teacher_forced(predictions, batch, layout)
    assert 0 < theirs.exact < 40
    for name in ("sequences", "exact", "tokens", "correct"):
        assert getattr(theirs, name) == getattr(ours, name)


def test_recall_leaves_out_the_separators():
    task, layout = MQMTAR(), asentmax_layout(MQMTAR())
    batch = host_batch(task, layout, seed=0, split="test", indices=range(2), length=64)
    predictions = batch.targets.copy()
    predictions[:, -13::3] = 0  # query separators and EOS
    counts = metrics.sparse_attention_recall(predictions, batch.targets, task)
    assert counts.rates() == {"associative_recall": 1.0, "exact": 1.0}
    assert teacher_forced(predictions, batch, layout).exact == 0
    predictions[0, -2] = 0
    counts = metrics.sparse_attention_recall(predictions, batch.targets, task)
    assert counts.rates() == {"associative_recall": 7 / 8, "exact": 1 / 2}
    with pytest.raises(ValueError, match="13 columns"):
        metrics.sparse_attention_recall(predictions[:, :12], batch.targets[:, :12], task)


def test_generated_rows():
    layout = asentmax_layout(Copy())
    eos, pad = layout.eos, layout.pad
    generated = np.array([[1, 2, eos, pad], [1, 2, 3, 4], [eos, 1, 2, 3], [1, pad, eos, pad]])
    exact = metrics.generated_exact(generated, [[1, 2], [1, 2], [], [1]], layout)
    assert exact.tolist() == [True, False, True, False]
    with pytest.raises(ValueError):
        metrics.generated_exact(generated, [[1, 2]], layout)


def test_bleu_of_hand_made_rows():
    assert metrics.bleu([[1, 2, 3, 4]], [[5, 6, 7, 8]]) == 0
    assert metrics.bleu([[1, 2, 3]], [[1, 2, 3]]) == 0  # it has no 4-grams
    # 5/6, 4/5, 3/4 and 2/3 of the n-grams are there; the target is one longer.
    wanted = (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25 * np.exp(1 - 7 / 6)
    assert metrics.bleu([[1, 2, 3, 4, 5, 9]], [[1, 2, 3, 4, 5, 6, 7]]) == pytest.approx(wanted)
    # A repeated symbol counts as often as the target has it.
    wanted = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert metrics.bleu([[1, 1, 1, 1, 1]], [[1, 1, 1, 1]]) == pytest.approx(wanted)


# What makes no task


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Copy(8, 8), "vary_len: expected 0 to 7, got 8"),
        (lambda: Copy(8, -1), "vary_len: "),
        (lambda: Sort().at(0), "vary_len: "),
        (lambda: Reverse(vocab_size=0), "vocab_size: "),
        (lambda: FlipFlop(6, 3), "seq_len: expected lengths of at least 4, got 3"),
        (lambda: FlipFlop(write_prob=1.5), "write_prob: "),
        (lambda: NBack(vocab_size=1), "vocab_size: "),
        (lambda: NBack(num_steps=0), "num_steps: "),
        (lambda: NBack(8, 2, num_steps=7), "num_steps: expected 1 to 6, got 7"),
        (lambda: LocalCount(vocab_size=1), "vocab_size: "),
        (lambda: LocalCount(20, 0), "max_reps: expected 2 to 38, got 48"),
        (lambda: MQMTAR(abc_size=8), "vocab_size: expected 1 to 64, got 10000"),
        (lambda: MQMTAR(abc_size=100, k_len=1), "vocab_size: expected 1 to 100, got 10000"),
        (lambda: MQMTAR(k_len=9), "abc_size: "),
        (lambda: MQMTAR(num_kv=1.2), "num_kv: "),
        (lambda: MQMTAR(num_q=5), "num_q: expected at most the 4 pairs of length 32, got 5"),
        (lambda: MQMTAR(num_q=0), "num_q: "),
        (lambda: Copy().sample(-1, "test", 0), "seed: "),
        (lambda: Copy().sample(0, "test", -1), "index: "),
        (lambda: Copy().sample(0, "test", 2**64), "index: "),
        (lambda: batch_key(-1, "test", 0), "seed: "),
        (lambda: batch_key(2**32, "test", 0), "seed: "),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_smallest_tasks():
    # One block, two commands, one pair: what indexes past them must not be read.
    for task in (
        LocalCount(25, 0),
        FlipFlop(4, 0),
        FlipFlop(5, 1),
        MQMTAR(6, 0, abc_size=2, vocab_size=1, num_kv=1.0, num_q=1),
        Copy(1, 0),
        Sort(1, 0, vocab_size=1),
        NBack(1, 0, vocab_size=2, num_steps=1),
    ):
        drawn = samples(task, "host", 20) + samples(task, "device", 20)
        layout = asentmax_layout(task)
        for sample in drawn:
            assert sample.source.max() < task.data_ids and len(sample.source) > 0
            assert len(encode(sample, layout).inputs) <= layout.width(task)
