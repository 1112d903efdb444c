"""Support sizes: how many keys have weight, and how many are visible, on models that are known."""

import numpy as np
import pytest

from experiments import supports
from experiments.language.config import Sizes
from experiments.language.models import make_model

SIZES = Sizes(layers=2, heads=2, width=8, slots=4)
TOKENS = np.random.default_rng(0).integers(0, 257, (2, 9))
SEGMENTS = np.array([[1] * 9, [1] * 4 + [2] * 5])
# Positions before one, in a row; of segments of 4 and 5.
WHOLE, PARTS = 9 * 8 / 2, 4 * 3 / 2 + 5 * 4 / 2


def found(kind, method, *more, compat=None):
    model = make_model(kind, method, SIZES, vocab_size=257, block=9, compat=compat)
    counts = supports.count(model, TOKENS, *more)
    told = supports.summary([counts, counts])
    assert np.shape(told["support"]) == (2, 2)
    return told


@pytest.mark.parametrize(
    "kind, own", [("mosaic", 0), pytest.param("transformer", 1, marks=pytest.mark.nightly)]
)
def test_softmax_gives_weight_to_all_that_is_visible(kind, own):
    """A Transformer's queries see themselves, too."""
    for more, mean in (((), WHOLE / 9 + own), ((SEGMENTS,), (WHOLE + PARTS) / 18 + own)):
        told = found(kind, "softmax", *more)
        np.testing.assert_allclose(told["support"], mean, atol=1e-3)
        assert told["visible"] == pytest.approx(mean, abs=1e-3)


def test_sparse_supports_are_smaller():
    told = found("mosaic", "top2_uniform")
    np.testing.assert_allclose(told["support"], (0 + 1 + 7 * 2) / 9, atol=1e-3)
    assert told["visible"] == WHOLE / 9


def test_only_the_queries_inside_count():
    inside = np.arange(9)[None] < np.array([4, 0])[:, None]
    told = found("mosaic", "softmax", None, inside)
    np.testing.assert_allclose(told["support"], (0 + 1 + 2 + 3) / 4)
    assert told["visible"] == 1.5


def test_what_the_authors_files_see():
    """In the one file three of the methods see one key less; in the other one has no support."""
    told = found("mosaic", "relumax", compat="eft")
    assert told["visible"] == pytest.approx((WHOLE - 8) / 9, abs=1e-3)
    with pytest.raises(NotImplementedError, match="dense"):
        found("mosaic", "norm_relu", compat="dense")
