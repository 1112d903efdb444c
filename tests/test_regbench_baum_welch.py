"""The Baum-Welch baseline: what it learns, what it cannot see, what it counts."""

import numpy as np
import pytest

from experiments.regbench import baum_welch, encode
from experiments.regbench.baum_welch import fit, initial, predict

STATES, VOCAB = 6, 6


def drawn(seed: int = 0) -> baum_welch.Hmm:
    rng = np.random.default_rng(seed)
    edges = STATES**2
    return initial(rng.random((edges, edges)), rng.random((edges, VOCAB)), STATES)


def likelihood(model: baum_welch.Hmm, words: list[np.ndarray]) -> float:
    """The log-probability of words, from the predictions of their symbols."""
    total = 0.0
    for word in words:
        first = model.first()
        total += np.log(first[word[0]] / first.sum())
        total += sum(np.log(model.following(word[:i])[word[i]]) for i in range(1, len(word)))
    return total


def test_fitting_raises_the_likelihood():
    words = [encode(text, VOCAB) for text in ("abcab", "abcabcab", "cabca")]
    model, values = drawn(), []
    for _ in range(6):
        values.append(likelihood(model, words))
        model = fit(words, model, iterations=1)
    assert np.all(np.diff(values) > 0)
    for rows in (model.start, model.transition, model.emission):
        np.testing.assert_allclose(rows.sum(axis=-1), 1)
        assert rows.min() > 0


def test_predictions_learn_a_cycle_and_see_no_future():
    text = "abcabcab|bcabca|cabcab|abcab"
    options = dict(states=STATES, vocab_size=VOCAB)
    rows = predict(text, np.random.default_rng(1), **options)
    assert rows.shape == (len(text), VOCAB)
    np.testing.assert_allclose(rows.sum(axis=1), 1)
    assert rows[-1].argmax() == encode("c", VOCAB)[0] and rows[-1].max() > 0.7
    start = predict(text[:12], np.random.default_rng(1), **options)
    np.testing.assert_array_equal(start, rows[:12])
    # After a separator, the first symbols of the words so far.
    assert set(rows[text.index("|", 9)].argsort()[-2:]) == set(encode("ab", VOCAB))


def test_the_fault_counts_the_last_of_equal_symbols():
    gamma = np.array([[[0.25, 0.75]], [[0.5, 0.5]], [[1.0, 0.0]]])
    symbols = np.array([[1], [1], [2]])
    right = baum_welch._count_symbols(gamma, symbols, 4, official_fault=False)
    np.testing.assert_array_equal(right, [[0, 0.75, 1, 0], [0, 1.25, 0, 0]])
    wrong = baum_welch._count_symbols(gamma, symbols, 4, official_fault=True)
    np.testing.assert_array_equal(wrong, [[0, 0.5, 1, 0], [0, 0.5, 0, 0]])


def test_bad_calls():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="states: expected at least 6, got 5"):
        predict("ab", rng, states=5)
    with pytest.raises(ValueError, match="sequence: expected ids 1 to 19, got"):
        predict(np.array([1, 0]), rng)
    with pytest.raises(ValueError, match="words: expected words of at least one symbol"):
        fit([np.array([], int)], drawn())
