"""Parameters under the authors' names: round trips, the other sets, and what does not fit."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nn_models import config, logits, model, module, tokens
from test_nn_mosaic import VARIANTS

from kreg.nn import ContextualMemory, PersistentMemory, from_torch, to_torch
from kreg.nn.convert import load


@pytest.mark.parametrize("variant", [*VARIANTS, "default"])
def test_round_trips_are_exact(variant):
    made = config(**VARIANTS.get(variant, {}))
    small = model(made)
    state = to_torch(small)
    rebuilt = to_torch(from_torch(made, state))
    assert state.keys() == rebuilt.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(rebuilt[name], array)
        assert rebuilt[name].dtype == array.dtype
    total = sum(array.size for array in state.values())
    assert total == sum(leaf.size for leaf in jax.tree.leaves(small))


def test_layouts_are_torch_layouts():
    """y = x W^T, and a convolution reads its newest input with its last tap."""
    made = config(value_kernel=3, low_rank_values=False)
    memory = module(ContextualMemory, made)
    state = to_torch(memory)
    x = np.random.default_rng(0).normal(size=(1, 5, 8)).astype(np.float32)
    taps = state["v_featurizer.conv.weight"]
    assert taps.shape == (8, 8, 3)
    padded = np.pad(x, ((0, 0), (1, 1), (0, 0)))
    wanted = sum(padded[:, i : i + 5] @ taps[:, :, i].T for i in range(3))
    found = memory.values.projection(jnp.asarray(x)).reshape(1, 5, 8)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    out = memory.out(jnp.asarray(x).reshape(1, 5, 2, 4))
    np.testing.assert_allclose(out, x @ state["c_proj.weight"].T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [ContextualMemory, PersistentMemory])
def test_memories_alone(kind):
    memory = module(kind, config(memory_count=2))
    state = to_torch(memory)
    for name, array in to_torch(load(memory, state)).items():
        np.testing.assert_array_equal(array, state[name])


def eft_state(state):
    found = {}
    for name, array in state.items():
        if name.endswith("k_featurizer.conv.weight"):
            name, array = name.replace("k_featurizer.conv", "leaky_average.linear"), array[:, :, 0]
        found[name.replace("leaky_key_beta", "leaky_average.leaky_beta_w_under")] = array
    decays = [name for name in found if name.endswith("w_under")]
    return found | {name.replace("_w_", "_u_"): found[name] for name in decays}


NANO = {
    "emb.weight": "mosaic.wte.weight",
    "ln_out.": "mosaic.ln_f.",
    "blocks.": "mosaic.h.",
    ".ln1.": ".ln_1.",
    ".ln2.": ".ln_2.",
    ".pmem.kernel_beta": ".mlp.k_featurizer.key_scale",
    ".pmem.value_beta": ".mlp.out_scale",
    ".pmem.leaky_key_beta": ".mlp.k_featurizer.leaky_avg.leaky_key_beta",
    ".pmem.": ".mlp.",
    ".attn.kernel_beta": ".attn.k_featurizer.key_scale",
    ".attn.value_beta": ".attn.v_featurizer.val_scale",
    ".attn.leaky_key_beta": ".attn.k_featurizer.leaky_avg.leaky_key_beta",
    "k_featurizer.conv.": "k_featurizer.W_k.",
    "v_featurizer.linear.": "v_featurizer.W_v.",
}


def nano_state(state):
    """Rename a dense state as nanoMosaics does."""
    found, memories = {}, {}
    for name, array in state.items():
        if match := re.fullmatch(r"blocks\.(\d+)\.pmem\.pmem\.M_([kv])\d", name):
            memories.setdefault(f"mosaic.h.{match[1]}.mlp.P_{match[2]}", []).append(array)
            continue
        for dense, nano in NANO.items():
            name = name.replace(dense, nano)
        per_head = name.endswith(("_beta", "_scale", "coef"))
        array = array.reshape(1, -1, 1, 1) if per_head else array
        found[name] = array[:, :, 0] if name.endswith("W_k.weight") else array
    return found | {name: np.stack(arrays) for name, arrays in memories.items()}


def test_the_nano_names_are_read():
    """nanoMosaics does not divide its logits."""
    made = config(memory_count=2)
    small, row = model(made), tokens(1, 5)
    state = to_torch(small)
    rebuilt = from_torch(made, nano_state(state))
    for name, array in to_torch(rebuilt).items():
        np.testing.assert_array_equal(array, state[name])
    np.testing.assert_allclose(logits(rebuilt, row), logits(small, row) * 8**0.5, rtol=1e-5)


def test_the_eft_names_are_read():
    made = config()
    state = to_torch(model(made))
    for name, array in to_torch(from_torch(made, eft_state(state))).items():
        np.testing.assert_array_equal(array, state[name])


def test_bad_states():
    made = config()
    state = to_torch(model(made))
    with pytest.raises(ValueError, match=r"missing=\['emb.weight'\], unknown=\['wte'\]"):
        from_torch(made, {("wte" if k == "emb.weight" else k): v for k, v in state.items()})
    wrong = state | {"blocks.1.attn.kernel_beta": np.zeros(3)}
    message = r"blocks.1.attn.kernel_beta of shape \(2,\), got \(3,\)"
    with pytest.raises(ValueError, match=message):
        from_torch(made, wrong)
