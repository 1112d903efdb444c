"""Kneser-Ney: against a slow version in dictionaries, distributions that sum to 1, real text."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_data import gpt2_files, tinystories_sample

from experiments.text import TOKENIZERS, KneserNey, Score, Tokens, ngram, plain_text, prepare
from experiments.text.ngram import discounts

VOCAB, END = 6, 5


class Slow:
    """The definition, one n-gram at a time."""

    def __init__(self, documents, order, across):
        self.order, self.across = order, across
        self.counts = [Counter() for _ in range(order + 1)]
        for gram in self.grams(documents):
            self.counts[order][gram] += 1
        for k in range(order - 1, 0, -1):
            for gram in self.counts[k + 1]:
                self.counts[k][gram[1:]] += 1
        self.followers = [defaultdict(list) for _ in range(order + 1)]
        for k in range(1, order + 1):
            for gram, count in self.counts[k].items():
                self.followers[k][gram[:-1]].append(count)
        self.discounts = [None, *(self.three(self.counts[k]) for k in range(1, order + 1))]

    def grams(self, documents):
        history = (END,) * (self.order - 1)
        for document in documents:
            if not self.across:
                history = (END,) * (self.order - 1)
            for token in [*document, END]:
                gram = (*history, token)
                yield gram
                history = gram[1:]

    @staticmethod
    def three(counts):
        n = Counter(counts.values())
        if not n[1]:
            return [0.5] * 3
        y = n[1] / (n[1] + 2 * n[2])
        if n[2] and n[3] and n[4]:
            d = [1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3]]
            if 0 <= d[0] <= 1 and 0 <= d[1] <= 2 and 0 <= d[2] <= 3:
                return d
        return [y] * 3

    def probability(self, gram):
        if not gram:
            return 1 / VOCAB
        k, lower = len(gram), self.probability(gram[1:])
        after = self.followers[k].get(gram[:-1])
        if after is None:
            return lower
        discount, total = self.discounts[k], sum(after)
        lost = sum(discount[min(count, 3) - 1] for count in after)
        own = self.counts[k].get(gram, 0)
        direct = own - discount[min(own, 3) - 1] if own else 0
        return (direct + lost * lower) / total

    def losses(self, documents):
        return [-math.log(self.probability(gram)) for gram in self.grams(documents)]


def tokens_of(documents):
    return Tokens.of(documents, vocab_size=VOCAB, end=END)


documents = st.lists(st.lists(st.integers(0, END - 1), max_size=9), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(documents, documents, st.integers(1, 5), st.booleans())
def test_against_dictionaries(train, held_out, order, across):
    slow = Slow(train, order, across)
    fast = KneserNey.fit(tokens_of(train), order=order, across_documents=across)
    found = fast.losses(tokens_of(held_out))
    np.testing.assert_allclose(found, slow.losses(held_out), rtol=1e-10)
    score = fast.score(tokens_of(held_out))
    assert score.tokens == len(found) and score.nats == pytest.approx(found.sum())


def skewed(rng, count):
    """Documents whose counts of counts are all there, as in language."""
    weights = np.array([0.6, 0.25, 0.1, 0.04, 0.01])
    return [rng.choice(5, rng.integers(0, 12), p=weights).tolist() for _ in range(count)]


@pytest.mark.parametrize("across", [False, True])
def test_three_discounts_at_work(across):
    rng = np.random.default_rng(0)
    train, held_out = skewed(rng, 60), skewed(rng, 20)
    slow = Slow(train, 4, across)
    assert len(set(slow.discounts[4])) == 3
    fast = KneserNey.fit(tokens_of(train), order=4, across_documents=across)
    np.testing.assert_allclose(fast.losses(tokens_of(held_out)), slow.losses(held_out), rtol=1e-10)


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_chunks_change_nothing(chunk, across, monkeypatch):
    rng = np.random.default_rng(1)
    train, held_out = tokens_of(skewed(rng, 40)), tokens_of(skewed(rng, 10))
    whole = KneserNey.fit(train, order=3, across_documents=across)
    losses = whole.losses(held_out)
    monkeypatch.setattr(ngram, "_CHUNK", chunk)
    pieces = KneserNey.fit(train, order=3, across_documents=across)
    for one, other in zip(pieces.tables, whole.tables, strict=True):
        for name, array in vars(one).items():
            np.testing.assert_array_equal(array, getattr(other, name))
    np.testing.assert_array_equal(pieces.losses(held_out), losses)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_distributions_sum_to_one(order):
    rng = np.random.default_rng(2)
    model = KneserNey.fit(tokens_of(skewed(rng, 30)), order=order)
    seen = {tuple(map(int, number_of(h, order))) for h in model.tables[-1].histories}
    unseen = 0
    for _ in range(60):
        history = rng.integers(0, VOCAB, rng.integers(0, order + 3)).tolist()
        unseen += tuple(([END] * order + history)[len(history) + 1 :]) not in seen
        probabilities = model.predict(history)
        assert np.all(probabilities > 0)
        assert probabilities.sum() == pytest.approx(1, abs=1e-12)
    assert order == 1 or unseen > 5


def number_of(history, order):
    """The digits of a history."""
    return [history // np.uint64(VOCAB**place) % VOCAB for place in range(order - 2, -1, -1)]


def test_predict_is_what_losses_say():
    rng = np.random.default_rng(3)
    model = KneserNey.fit(tokens_of(skewed(rng, 30)), order=3)
    document = [0, 1, 0, 2]
    expected = [
        -np.log(model.predict(document[:place])[token])
        for place, token in enumerate([*document, END])
    ]
    np.testing.assert_allclose(model.losses(tokens_of([document])), expected)


def test_periodic_text_is_learned():
    model = KneserNey.fit(tokens_of([[0, 1, 2] * 200]), order=3)
    assert model.score(tokens_of([[0, 1, 2] * 50])).perplexity < 1.1
    assert KneserNey.fit(tokens_of([[0, 1, 2] * 200]), order=1).score(
        tokens_of([[0, 1, 2] * 50])
    ).perplexity == pytest.approx(3, rel=0.1)


def test_largest_numbers():
    # 65,536^4 = 2^64: the largest n-gram is the largest number of 64 bits.
    tokens = Tokens.of([[65535] * 5, [65534, 3]], vocab_size=65536, end=65535)
    model = KneserNey.fit(tokens, order=4)
    assert model.tables[-1].grams[-1] == np.uint64(2**64 - 1)
    for history in ([], [65535, 65535, 65535], [65534], [1, 2, 3]):
        assert model.predict(history).sum() == pytest.approx(1)


def test_one_discount_where_three_are_not_to_be_had():
    assert discounts(np.array([1, 1, 2, 5])).tolist() == [0.5] * 3
    assert discounts(np.array([1, 1])).tolist() == [1.0] * 3
    assert discounts(np.array([2, 7])).tolist() == [0.5] * 3
    # n_2 = 1 and n_3 = 3: D(2) would be below 0.
    assert len(set(discounts(np.array([1] * 9 + [2, 3, 3, 3, 4])))) == 1


def test_score():
    assert math.isnan(Score().loss)
    total = Score(2.0, 1) + Score(4.0, 2)
    assert (total.loss, total.perplexity) == (2.0, math.exp(2.0))


def test_mistakes():
    tokens = tokens_of([[1, 2]])
    with pytest.raises(ValueError, match=r"order: expected at least 1 and 6\^order .*got 0"):
        KneserNey.fit(tokens, order=0)
    with pytest.raises(ValueError, match=r"order: .*got 25"):
        KneserNey.fit(tokens, order=25)
    with pytest.raises(ValueError, match="tokens: expected at least one"):
        KneserNey.fit(tokens_of([]))
    other = Tokens.of([[1]], vocab_size=7, end=6)
    with pytest.raises(ValueError, match="tokens: expected a vocabulary of 6 with end 5"):
        KneserNey.fit(tokens).score(other)


@pytest.mark.parametrize(
    ("name", "order", "perplexity"),
    [("gpt2", 3, 39.595), ("gpt2", 4, 37.344), ("bytes", 3, 5.525), ("bytes", 5, 3.168)],
)
def test_tinystories(name, order, perplexity, tmp_path, monkeypatch):
    if name == "gpt2":
        gpt2_files(tmp_path, monkeypatch)
    data = plain_text(tinystories_sample(), held_out=164 / 2316, whole_only=True)
    corpus = prepare(tmp_path / "tokens", data, TOKENIZERS[name])
    assert (corpus.train.documents, corpus.validation.documents) == (2152, 164)
    assert corpus.validation.text_bytes == 206_852
    score = KneserNey.fit(corpus.train, order=order).score(corpus.validation)
    assert score.tokens == len(corpus.validation)
    assert score.perplexity == pytest.approx(perplexity, abs=1e-3)
