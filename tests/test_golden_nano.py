"""The nanoMosaics models and the GPT baselines: logits, loss and gradients of the authors' code."""

import jax
import jax.numpy as jnp
import pytest
from golden_files import assert_close, float32_error, group_names, open_group
from nightly import NIGHTLY
from test_golden_models import float64, loss_and_gradient  # noqa: F401 - a fixture
from test_nn_convert import nano_state

import kreg
from kreg.nn import MosaicConfig, TransformerConfig, from_torch, to_torch

GROUPS = group_names("nano")


def gpt_config(group) -> TransformerConfig:
    """The configuration of a GPT group: dropout is 0, the position table has one row a position."""
    theirs = group.info["config"]
    return TransformerConfig(
        vocab_size=theirs["vocab_size"],
        num_layers=theirs["n_layer"],
        num_heads=theirs["n_head"],
        embed_dim=theirs["n_embd"],
        max_length=theirs["block_size"],
        kernel=kreg.gaussian,
        use_bias=theirs["bias"],
        exact_gelu="exact GELU" in group.info["model"],
    )


def check(group, model, names=lambda gradients: gradients) -> None:
    """Compare everything that a group holds; `names` maps gradients to the names of the group."""
    tokens, targets = jnp.asarray(group["tokens"]), jnp.asarray(group["targets"])
    (loss, logits), by_parameter = loss_and_gradient(model, tokens, targets)
    for key, found in (("logits", logits), ("loss", loss), ("last_logits", logits[:, -1:])):
        error = float32_error(group.info, "logits" if key == "last_logits" else key)
        assert_close(found, group[key], f"{group.name}/{key}", error)
    gradients, golden = names(to_torch(by_parameter)), group.under("grad/param")
    assert gradients.keys() == golden.keys()
    for name, array in golden.items():
        error = float32_error(group.info, "grad", name)
        assert_close(gradients[name], array, f"{group.name}/grad/{name}", error)
    group.finish(1)


def groups(kind):
    """Whole models take seconds to compile: most wait for the night."""
    when = dict.fromkeys(("gpt_bias", "mosaic_rand"), ())
    when |= dict.fromkeys(("baseline_gpt_nobias", "mosaic_bias_pmem2"), pytest.mark.slow)
    return [pytest.param(name, marks=when.get(name, NIGHTLY)) for name in GROUPS if kind in name]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", groups("gpt"))
def test_golden_gpt(name):
    group = open_group("nano", name)
    model = from_torch(gpt_config(group), group.under("param"))
    assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(model))
    check(group, model)


def mosaic_config(group) -> MosaicConfig:
    theirs = group.info["config"]
    return MosaicConfig(
        vocab_size=theirs["vocab_size"],
        num_layers=theirs["n_layer"],
        num_heads=theirs["n_head"],
        embed_dim=theirs["n_embd"],
        memory_size=theirs["pmem_size"],
        memory_count=theirs["pmem_count"],
        kernel=kreg.gaussian,
        use_bias=theirs["bias"],
        compat="nano",
    )


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", groups("mosaic"))
def test_golden_nano_mosaic(name):
    group = open_group("nano", name)
    check(group, from_torch(mosaic_config(group), group.under("param")), nano_state)
