"""Whole models against the authors': logits, loss and gradients, training, initial values."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from golden_files import (
    assert_close,
    description,
    exclusion,
    float32_error,
    folder_of,
    group_names,
    mosaic_config,
    open_group,
)
from nightly import nightly

from kreg.nn import MemoryMosaic, MosaicConfig, from_torch, to_torch

# The golden files that a test here or in a neighbouring file opens, by that test's file.
TESTED = {
    "test_golden_blocks.py": ("context_block", "persistent_block", "eft_block", "wkv"),
    "test_golden_nano.py": ("nano",),
    "test_golden_moons.py": ("threemoons",),
    "test_golden_models.py": ("stack", "trajectory", "eft_task_stack", "init_stats"),
    "test_golden_entmax.py": ("entmax_activations",),
    "test_golden_losses.py": ("entmax_losses",),
}

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def test_golden_every_file_is_known():
    """What lies in the folder is opened by a test, or excluded with a reason."""
    folder = folder_of("stack")
    if folder is None:
        pytest.skip("stack.npz is neither in KREG_GOLDEN nor in the committed subset")
    names = {path.stem for path in folder.glob("*.json")} - {"excluded_cases"}
    tested = {name for names in TESTED.values() for name in names}
    for test, opened in TESTED.items():
        text = (Path(__file__).parent / test).read_text()
        assert all(f'"{name}"' in text for name in opened), f"{test} does not open {opened}"
    unknown = {n for n in names - tested if exclusion(f"{n}/*") is None}
    assert not unknown, f"golden files neither tested nor excluded: {sorted(unknown)}"


def loss_of(model, tokens, targets):
    """Mean cross-entropy over targets other than -1, and the logits."""
    logits = model(tokens)
    targets = targets[:, targets.shape[1] - logits.shape[1] :]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    real = targets != -1
    return jnp.sum(jnp.where(real, losses, 0)) / jnp.sum(real), logits


loss_and_gradient = quick_jit(jax.value_and_grad(loss_of, has_aux=True))


def check_gradients(group, method, info, gradients):
    """Compare every saved gradient; the others must be 0 and be listed as unreached."""
    what = f"{group.name}/{method}/grad"
    saved = group.under(f"{method}/grad/param")
    for name, array in saved.items():
        error = float32_error(info, "grad", name)
        assert_close(gradients[name], array, f"{what}/{name}", error)
    rest = gradients.keys() - saved.keys()
    unreached = {name.removeprefix("param/") for name in info["grad_is_none"]}
    assert rest == unreached, f"{what}: {rest} without golden gradient, {unreached} expected"
    assert not any(np.any(gradients[name]) for name in rest), f"{what}: expected zeros: {rest}"


# Whole models take seconds to compile, and the blocks' tests have all methods.
QUICK = {
    "base": ("softmax", "norm_relu"),
    "variant_bias": ("relumax",),
    "variant_attn_only_post_ln_untied": ("biweight",),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "name", nightly(sorted(QUICK.keys() & set(group_names("stack"))), but=["base"])
)
def test_golden_stack(name):
    check_stack(name, rest=False)


@pytest.mark.nightly
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", group_names("stack"))
def test_golden_stack_with_the_other_methods(name):
    check_stack(name, rest=True)


def check_stack(name, rest):
    group = open_group("stack", name)
    methods = group.chosen("logits", among=QUICK.get(name, ()), rest=rest)
    tokens, targets = jnp.asarray(group["tokens"]), jnp.asarray(group["targets"])
    for method in methods:
        info = group.info["methods"][method]
        config = mosaic_config(group.info["constructor"], method, "dense")
        model = from_torch(config, group.under("param"))
        (loss, logits), by_parameter = loss_and_gradient(model, tokens, targets)
        what = f"{name}/{method}"
        for key, actual in (("logits", logits), ("loss", loss), ("last_logits", logits[:, -1:])):
            error = float32_error(info, "logits" if key == "last_logits" else key)
            assert_close(actual, group[f"{method}/{key}"], f"{what}/{key}", error)
        check_gradients(group, method, info, to_torch(by_parameter))
    group.finish(len(methods))


def dense_names(gradients, parameters):
    """Undo the eft file's names for its key projections and decays."""
    back = {}
    for name in parameters:
        dense = name.replace("leaky_average.linear.weight", "k_featurizer.conv.weight")
        dense = dense.replace("leaky_average.leaky_beta_w_under", "leaky_key_beta")
        back[name] = gradients[dense].reshape(parameters[name].shape)
    return back


def targets_after(tokens, targets, special):
    """The eft file's loss mask: targets from the separator on, without padding."""
    separator = np.argmax(tokens == special["<sep>"], axis=1)[:, None]
    real = (np.arange(tokens.shape[1])[None] >= separator) & (targets != special["<pad>"])
    return np.where(real, targets, -1)


@pytest.mark.nightly
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", group_names("eft_task_stack"))
def test_golden_eft_task_stack(name):
    group = open_group("eft_task_stack", name)
    methods = group.members("logits")
    tokens, special = group["tokens"], group.info["special"]
    targets = targets_after(tokens, group["targets"], special)
    lengths = np.sum(tokens != special["<pad>"], axis=1)
    np.testing.assert_array_equal(group["ctx"], lengths)
    # See the exclusions: rows of padding have other keys in the eft file.
    assert exclusion("eft_task_stack/logits at padding")
    real = (np.arange(tokens.shape[1])[None] < lengths[:, None])[..., None]
    parameters = group.under("param")
    for method in methods:
        info = group.info["methods"][method]
        config = mosaic_config(group.info["constructor"], method, "eft")
        model = from_torch(config, parameters)
        (loss, logits), by_parameter = loss_and_gradient(model, tokens, jnp.asarray(targets))
        golden = group[f"{method}/logits"] * real
        assert_close(logits * real, golden, f"{name}/{method}/logits")
        assert_close(loss, group[f"{method}/loss"], f"{name}/{method}/loss")
        gradients = dense_names(to_torch(by_parameter), parameters)
        check_gradients(group, method, info, gradients)
    group.finish(len(methods))


@functools.partial(quick_jit, static_argnames=("betas", "eps"))
def train(model, decays, batches, rates, clip, weight_decay, *, betas, eps):
    """Clip and take AdamW steps as torch does; return all models, losses and gradient norms."""
    adam = optax.scale_by_adam(*betas, eps=eps)

    def step(carry, batch):
        model, moments = carry
        tokens, targets, rate = batch
        (loss, _), gradients = jax.value_and_grad(loss_of, has_aux=True)(model, tokens, targets)
        norm = optax.tree.norm(gradients)
        clipped = jax.tree.map(lambda g: jnp.minimum(1, clip / (norm + 1e-6)) * g, gradients)
        steps, moments = adam.update(clipped, moments)
        decay = jax.tree.map(jnp.multiply, decays, reached(gradients))
        model = jax.tree.map(
            lambda p, s, d: p - rate * (s + weight_decay * d * p), model, steps, decay
        )
        return (model, moments), (model, loss, norm)

    _, found = jax.lax.scan(step, (model, adam.init(model)), (*batches, rates))
    return found


def reached(gradients):
    """Whether a gradient reaches a parameter of the authors': torch leaves the others alone."""

    def any_of(path, gradient):
        stacked = "blocks" in jax.tree_util.keystr(path)
        axes = tuple(range(1 if stacked else 0, gradient.ndim))
        return jnp.any(gradient != 0, axis=axes, keepdims=True)

    return jax.tree_util.tree_map_with_path(any_of, gradients)


def check_parameters(models, index, golden, what):
    found = to_torch(jax.tree.map(lambda x: x[index], models))
    assert found.keys() == golden.keys()
    for name, array in golden.items():
        error = np.max(np.abs(found[name] - array))
        assert error <= 1e-8, f"{what}/{name}: off by {error:.3e}"


@pytest.mark.nightly
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("rest", [False, True])
def test_golden_trajectory(rest):
    group = open_group("trajectory")
    runs = group.chosen("loss", among=("biweight", "relumax"), rest=rest)
    training = group.info["training"]
    batches = jnp.asarray(group["tokens"]), jnp.asarray(group["targets"])
    for run in runs:
        info = group.info["groups"][run]
        config = mosaic_config(training["constructor"], info["method"], "dense")
        start = group.under("init") | group.under(f"{run}/init")
        matrices = {name: np.full_like(array, array.ndim >= 2) for name, array in start.items()}
        models, losses, norms = train(
            from_torch(config, start),
            from_torch(config, matrices),
            batches,
            jnp.asarray(group["lr"]),
            info["grad_clip"],
            training["weight_decay"],
            betas=tuple(training["betas"]),
            eps=training["eps"],
        )
        for key, index in (("after_step10", 9), ("final", -1)):
            if not exclusion(f"trajectory/{run}/{key}/any"):
                check_parameters(models, index, group.under(f"{run}/{key}"), f"{run}/{key}")
        check_losses(group, run, info["comparable_steps"], np.array(losses), np.array(norms))
    group.finish(len(runs))


def check_losses(group, run, steps, losses, norms):
    """Compare the steps that are comparable: later ones amplify rounding to visible size."""
    allowed = 1e-9 + 100 * group[f"{run}/loss_sensitivity"]
    error = np.abs(losses - group[f"{run}/loss"])
    bad = np.flatnonzero(error[:steps] > allowed[:steps])
    assert not bad.size, f"{run}: loss off by {error[bad]} at steps {bad}, allowed {allowed[bad]}"
    # The README has no figure for the norms; they are first derivatives of the same losses.
    np.testing.assert_allclose(norms[:steps], group[f"{run}/grad_norm"][:steps], rtol=1e-6)


def model_options(name):
    """The numbers in a model's name in init_stats, "... n_embd=128 n_head=8 ..."."""
    return {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", name)} | {
        "weight_tying": "weight_tying=False" not in name
    }


MODELS = description("init_stats").get("models", {})
INIT_MODELS = [name for name in MODELS if not exclusion(f"init_stats/{name}")]


@pytest.mark.parametrize("name", INIT_MODELS)
def test_golden_init_stats(name):
    """Every parameter exists and is drawn with the authors' mean and spread, within 5 errors."""
    stats = description("init_stats")["models"][name]
    config = init_config(name)
    found = to_torch(quick_jit(lambda: MemoryMosaic(config, rngs=nnx.Rngs(0)))())
    assert {k: list(v.shape) for k, v in found.items()} == {k: v["shape"] for k, v in stats.items()}
    for key, golden in stats.items():
        array = found[key].astype(np.float64)
        if golden["same_for_every_seed"]:
            wanted = golden.get("values", golden["mean"])
            np.testing.assert_allclose(array, np.broadcast_to(wanted, array.shape), rtol=1e-6)
            continue
        if key.endswith("coef"):
            assert np.all((array >= 0) & (array < 1)) and np.ptp(array) > 0
            continue
        # One draw has sqrt(n_seeds) times the error of the pooled figure.
        error = golden["std"] / np.sqrt(2 * array.size) + golden["std_error_of_std"]
        assert abs(array.std() - golden["std"]) <= 5 * error, key
        assert abs(array.mean()) <= 5 * golden["std"] / np.sqrt(array.size), key
    print(f"golden init_stats/{name}: {len(stats)} parameters")


def init_config(name):
    sizes = model_options(name)
    names = ("vocab", "n_layer", "n_head", "n_embd", "pmem_size")
    return MosaicConfig(*(sizes[n] for n in names), tie_weights=sizes["weight_tying"])


def test_golden_decay_groups():
    """`decay_matrices` picks exactly the authors' decayed parameters."""
    from kreg.training.optimizer import decay_matrices

    groups = description("init_stats").get("optimizer_groups")
    if groups is None:
        pytest.skip("init_stats.json is neither in KREG_GOLDEN nor in the committed subset")
    tied = next(name for name in INIT_MODELS if model_options(name)["weight_tying"])
    shapes = nnx.eval_shape(lambda: MemoryMosaic(init_config(tied), rngs=nnx.Rngs(0)))
    rule, graph, state = decay_matrices(), *nnx.split(shapes)
    marked = [
        (path, leaf.replace(jnp.full(leaf.shape, rule(path, leaf))))
        for path, leaf in nnx.to_flat_state(state)
    ]
    model = nnx.merge(graph, nnx.from_flat_state(marked))
    found = {name: bool(array.all()) for name, array in to_torch(model).items()}
    golden = {name: g["weight_decay"] > 0 for g in groups for name in g["params"]}
    assert found == golden
