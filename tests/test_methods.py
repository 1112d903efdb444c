"""The names of the methods: what each stands for, and what an unknown one is told."""

import jax.numpy as jnp
import numpy as np
import pytest

import kreg
from experiments import methods
from experiments.methods import PAPER, PRODUCT, expand, folder_name, method, rank

NAMED = {
    "softmax": (kreg.gaussian, kreg.Adaptive),
    "epanechnikov": (kreg.epanechnikov, kreg.Adaptive),
    "biweight": (kreg.biweight, kreg.Adaptive),
    "triweight": (kreg.triweight, kreg.Adaptive),
    "norm_relu": (kreg.epanechnikov, kreg.Fixed),
    "relumax": (kreg.epanechnikov, kreg.Anchored),
    "entmax:1.25": (kreg.rectified_polynomial(4), kreg.Adaptive),
    "entmax:2": (kreg.epanechnikov, kreg.Adaptive),
    "entmax:1": (kreg.gaussian, kreg.Adaptive),
    "biweight@anchored": (kreg.biweight, kreg.Anchored),
    "triweight@fixed": (kreg.triweight, kreg.Fixed),
    "entmax:1.25@anchored": (kreg.rectified_polynomial(4), kreg.Anchored),
}
NEAREST = {
    "top16_softmax": (kreg.gaussian, 16),
    "top3_uniform": (kreg.box, 3),
    "epanechnikov@nearest:8": (kreg.epanechnikov, 8),
    "box@nearest:16": (kreg.box, 16),
}


@pytest.mark.parametrize("name", NAMED)
def test_name_stands_for_kernel_and_rule(name):
    kernel, rule = NAMED[name]
    found = method(name)
    assert found.kernel == kernel
    assert isinstance(found.bandwidth(0.5), rule)
    assert found.bandwidth(0.5).h == 0.5


@pytest.mark.parametrize("name", NEAREST)
def test_number_in_a_name_is_the_number_of_neighbours(name):
    kernel, count = NEAREST[name]
    found = method(name)
    assert found.kernel == kernel
    rule = found.bandwidth(0.5)
    assert isinstance(rule, kreg.Nearest)
    assert (rule.k, rule.h) == (count, 0.5)


def test_two_names_of_one_method_share_the_factory():
    # Factories are compared by identity, and a model's compilation depends on its factory.
    assert method("top8_softmax") == method("gaussian@nearest:8")
    assert method("biweight@nearest:8").bandwidth is method("box@nearest:8").bandwidth


def test_all_is_every_kernel_under_every_rule_once():
    found = [method(name) for name in PRODUCT]
    pairs = {(m.kernel, type(m.bandwidth(0.5))) for m in found}
    assert len(pairs) == len(PRODUCT)
    for kernel in (kreg.epanechnikov, kreg.biweight, kreg.triweight):
        for rule in (kreg.Adaptive, kreg.Fixed, kreg.Anchored, kreg.Nearest):
            assert (kernel, rule) in pairs
    assert {rule for kernel, rule in pairs if kernel == kreg.box} == {kreg.Fixed, kreg.Nearest}
    assert {rule for kernel, rule in pairs if kernel == kreg.gaussian} == {
        kreg.Adaptive,
        kreg.Nearest,
    }
    assert expand(["relumax", "all", "entmax:1.25"]) == (*PRODUCT, "entmax:1.25")
    assert expand(["relumax", "relumax"]) == ("relumax", "relumax")


def _formula(name, s, h):
    """The weights of one row of cosines, as the paper writes them."""
    top = np.sort(s)[-2] if name.startswith("top2") else -np.inf
    weights = {
        "softmax": np.exp(s / h**2),
        "norm_relu": np.maximum(s - (1 - h**2 / 2), 0),
        "relumax": np.maximum(s - s.max() + h**2, 0),
        "top2_softmax": np.exp(s / h**2) * (s >= top),
        "top2_uniform": 1.0 * (s >= top),
    }[name]
    return weights / weights.sum()


@pytest.mark.parametrize(
    "name", ["softmax", "norm_relu", "relumax", "top2_softmax", "top2_uniform"]
)
def test_methods_compute_the_papers_formulas(name):
    vectors = np.random.default_rng(0).normal(size=(1, 7, 1, 3))
    vectors = jnp.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), jnp.float32)
    query, key = vectors[:, :1], vectors[:, 1:]
    kernel, bandwidth = method(name)
    found = kreg.attention(
        query, key, jnp.eye(6)[None, :, None, :], kernel=kernel, bandwidth=bandwidth(0.9), scale=1.0
    )
    cosines = np.asarray(key, np.float64)[0, :, 0] @ np.asarray(query, np.float64)[0, 0, 0]
    np.testing.assert_allclose(found[0, 0, 0], _formula(name, cosines, 0.9), atol=2e-6)


@pytest.mark.parametrize(
    "name",
    [
        "sofmax",
        "",
        "biweight@",
        "@adaptive",
        "biweight@wide",
        "biweight@nearest:0",
        "biweight@nearest:x",
        "entmax:0.5",
        "entmax:nan",
        "entmax:",
        "top0_softmax",
        "topx_uniform",
        "top16_relu",
        "softmax@fixed",
    ],
)
def test_unknown_name_is_told_what_is_known(name):
    with pytest.raises(ValueError, match=r"method: unknown name") as caught:
        method(name)
    message = str(caught.value)
    assert repr(name) in message
    assert "\n" not in message
    for known in (*PAPER, *methods.KERNELS, *methods.RULES, "nearest:K", "entmax:ALPHA"):
        assert known in message


@pytest.mark.parametrize("name", ["box@adaptive", "box@anchored"])
def test_box_without_a_given_width_is_refused(name):
    with pytest.raises(ValueError, match=f"box takes the rules fixed and nearest:K, got '{name}'"):
        method(name)


def test_order_of_a_table():
    names = ["zebra@x", "relumax", "biweight", "entmax:1.25", "softmax"]
    assert sorted(names, key=rank) == ["softmax", "biweight", "relumax", "entmax:1.25", "zebra@x"]


def test_folder_names_have_no_colon_and_stay_apart():
    names = [*NAMED, *NEAREST]
    folders = {folder_name(name) for name in names}
    assert len(folders) == len(names)
    assert not any(":" in folder or "/" in folder for folder in folders)
