"""The memories against the authors' blocks: outputs, weights and gradients in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_files import assert_close, float32_error, group_names, mosaic_config, open_group

from kreg.nn import ContextualMemory, PersistentMemory, to_torch
from kreg.nn.compat import wkv
from kreg.nn.convert import load
from kreg.nn.leaky import magnitude

# eft's top-k uniform runs in float32 (golden README, sections 2 and 6).
FLOAT32_UNIFORM = 2e-6

# Compiles in half the time, and each function runs on a few rows.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@functools.cache
def empty(kind, config):
    """A module whose parameters are shapes only."""
    return nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0)))


def with_gradients(function, cotangent, *arguments):
    """y and the derivatives of sum(y c) in the arguments."""
    y, pull = jax.vjp(function, *arguments)
    return y, pull(cotangent)


@quick_jit
def run_persistent(module, x, cotangent):
    return with_gradients(lambda module, x: module(x), cotangent, module, x)


@quick_jit
def run_recall(module, keys, cotangent):
    return with_gradients(lambda module, keys: module.recall(keys), cotangent, module, keys)


@quick_jit
def run_features(module, x, cotangents):
    """Keys and values of a contextual memory."""
    return with_gradients(
        lambda module, x: (module.keys(x), module.values(x)), cotangents, module, x
    )


@quick_jit
def run_answer(module, keys, values, cotangent):
    """What a contextual memory makes of keys and values; its weights [B, N, T, T]."""

    def function(module, keys, values):
        return module.out(module.regress(keys, values))

    y, gradients = with_gradients(function, cotangent, module, keys, values)
    length = keys.shape[1]
    one_hot = jnp.broadcast_to(jnp.eye(length)[None, :, None], (*keys.shape[:3], length))
    return y, gradients, jnp.moveaxis(module.regress(keys, one_hot), 1, 2)


def run_contextual(module, featurizer, x, cotangent):
    """Chain `run_features`, compiled once for all methods of a group, and `run_answer`."""
    shape = (*x.shape[:2], module.config.num_heads, module.config.head_dim)
    (keys, values), _ = run_features(featurizer, x, (jnp.zeros(shape),) * 2)
    y, (by_module, *onward), weights = run_answer(module, keys, values, cotangent)
    _, (by_featurizer, by_x) = run_features(featurizer, x, tuple(onward))
    by_module, by_featurizer = to_torch(by_module), to_torch(by_featurizer)
    by_parameter = {name: by_module[name] + by_featurizer[name] for name in by_module}
    return y, by_parameter, by_x, weights


def check_case(group, case, info, y, by_parameter, by_x, relative=1e-11):
    """Compare output and gradients of one case, and account for every gradient."""
    what = f"{group.name}/{case}"

    def close(actual, key, *path):
        error = float32_error(info, *path)
        assert_close(actual, group[f"{case}/{key}"], f"{what}/{key}", error, relative)

    close(y, "y", "y")
    close(by_x, "grad/x", "grad", "x")
    saved = group.names_under(f"{case}/grad/param")
    for name in saved:
        close(by_parameter[name], f"grad/param/{name}", "grad", f"param/{name}")
    unreached = {name.removeprefix("param/") for name in info["grad_is_none"]}
    for name in by_parameter.keys() - set(saved):
        if name in unreached:
            assert not np.any(by_parameter[name]), f"{what}: expected no gradient of {name}"
        else:
            matrix = by_parameter[name].ndim >= 2
            assert matrix and not info["grad_of_matrices_saved"], f"{what}: no gradient of {name}"


def contextual_modules(group, methods, compat):
    """One module a method, with the group's parameters."""
    parameters = group.under("param")
    for method in methods:
        config = mosaic_config(group.info["constructor"], method, compat)
        yield load(empty(ContextualMemory, config), parameters)


def quick(name):
    """The methods of a group that CI has: all at the smallest sizes, one of a variant."""
    if name.startswith("variant"):
        return {"variant_k_lowr": "softmax", "variant_vconv3_bias": "relumax"}.get(name, "biweight")
    return {"c32": "biweight", "c64": "none"}.get(name[:3], "all")


CONTEXTS = group_names("context_block")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if quick(name) == "all" else pytest.mark.nightly)
        for name in CONTEXTS
        if quick(name) != "none"
    ],
)
def test_golden_context_block(name):
    check_context_block(name, rest=False)


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in CONTEXTS if quick(name) != "all"])
def test_golden_context_block_with_the_other_methods(name):
    check_context_block(name, rest=True)


def check_context_block(name, rest):
    group = open_group("context_block", name)
    among = group.members("y") if quick(name) == "all" else (quick(name),)
    methods = group.chosen("y", among=among, rest=rest)
    x, cotangent = jnp.asarray(group["x"]), jnp.asarray(group["cot"])
    modules = list(contextual_modules(group, methods, "dense"))
    for method, module in zip(methods, modules, strict=True):
        info = group.info["methods"][method]
        *results, weights = run_contextual(module, modules[0], x, cotangent)
        check_case(group, method, info, *results)
        if f"{method}/att" in group:
            error = float32_error(info, "att")
            assert_close(weights, group[f"{method}/att"], f"{name}/{method}/att", error)
    group.finish(len(methods))


@pytest.mark.parametrize("name", group_names("persistent_block"))
def test_golden_persistent_block(name):
    group = open_group("persistent_block", name)
    cases = group.members("y")
    for case in cases:
        if "n_head" in group.info["constructor"]:
            results = persistent_results(group, "dense")
        else:
            results = recall_results(group)
        check_case(group, case, group.info[case], *results)
    group.finish(len(cases))


def persistent_results(group, compat):
    config = mosaic_config(group.info["constructor"], "softmax", compat)
    module = load(empty(PersistentMemory, config), group.under("param"))
    x, cotangent = jnp.asarray(group["x"]), jnp.asarray(group["cot"])
    y, (by_parameter, by_x) = run_persistent(module, x, cotangent)
    return y, to_torch(by_parameter), by_x


def recall_results(group):
    """The authors' memory alone: it is given keys [B, N, T, H] that are scaled already."""
    made = group.info["constructor"]
    heads, sizes = made["pmem_nhead"], {k: made[k] for k in ("pmem_count", "pmem_size")}
    sizes |= {"n_head": heads, "n_embd": heads * made["pmem_dim"]}
    config = mosaic_config(sizes, "softmax", "dense")
    shapes = empty(PersistentMemory, config)
    # All else is 0, so beta = exp(0) = 1.
    parameters = to_torch(jax.tree.map(lambda x: jnp.zeros(x.shape), shapes))
    parameters |= {f"pmem.{name}": array for name, array in group.under("param").items()}
    module = load(empty(PersistentMemory, config), parameters)
    x, cotangent = (jnp.asarray(np.moveaxis(group[name], 1, 2)) for name in ("x", "cot"))
    y, (by_parameter, by_x) = run_recall(module, x, cotangent)
    gradients = {k.removeprefix("pmem."): v for k, v in to_torch(by_parameter).items() if "M_" in k}
    return jnp.moveaxis(y, 2, 1), gradients, jnp.moveaxis(by_x, 2, 1)


def eft_names(gradients):
    """Rename gradients as the eft file does, whose key projection is no convolution."""
    renamed = dict(gradients)
    kernel = renamed.pop("k_featurizer.conv.weight")
    renamed["leaky_average.linear.weight"] = kernel[:, :, 0]
    renamed["leaky_average.leaky_beta_w_under"] = renamed.pop("leaky_key_beta")
    return renamed


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.nightly if name == "context_c24_h4_t20_rand" else ())
        for name in group_names("eft_block")
    ],
)
def test_golden_eft_block(name):
    group = open_group("eft_block", name)
    cases = group.members("y")
    if "methods" not in group.info:
        y, by_parameter, by_x = persistent_results(group, "eft")
        info = {"grad_is_none": []}
        check_case(group, *cases, info, y, eft_names(by_parameter), by_x)
        return group.finish(1)
    x, cotangent = jnp.asarray(group["x"]), jnp.asarray(group["cot"])
    modules = list(contextual_modules(group, cases, "eft"))
    for method, module in zip(cases, modules, strict=True):
        info = group.info["methods"][method]
        relative = FLOAT32_UNIFORM if info["dtype"] == "float32" else 1e-11
        y, by_parameter, by_x, weights = run_contextual(module, modules[0], x, cotangent)
        check_case(group, method, info, y, eft_names(by_parameter), by_x, relative)
        if f"{method}/att_numpy" in group:
            assert_close(weights, group[f"{method}/att_numpy"], f"{name}/{method}/att_numpy")
    group.finish(len(cases))


@pytest.mark.parametrize("name", group_names("wkv"))
def test_golden_wkv(name):
    group = open_group("wkv", name)
    heads = group["raw_w"].shape[0]
    shape = (*group["x"].shape[:2], heads, -1)
    x, cotangent = (jnp.asarray(group[k]).reshape(shape) for k in ("x", "cot"))
    assert not np.any(group["k"]), f"{name}: a gated group belongs into the exclusions"
    for key, sign in (("w", -1), ("u", 1)):
        raw = np.repeat(group[f"raw_{key}"], x.shape[-1])
        np.testing.assert_array_equal(group[key], sign * np.abs(10 * raw))

    @quick_jit
    def run(*arguments):
        return with_gradients(
            lambda x, w, u: wkv(x, magnitude(10 * w), magnitude(10 * u)), cotangent, *arguments
        )

    y, gradients = run(x, jnp.asarray(group["raw_w"]), jnp.asarray(group["raw_u"]))
    assert_close(y.reshape(group["y"].shape), group["y"], f"{name}/y")
    for key, gradient in zip(("x", "raw_w", "raw_u"), gradients, strict=True):
        golden = group[f"true_grad_{key}"]
        assert_close(gradient.reshape(golden.shape), golden, f"{name}/true_grad_{key}")
    group.finish(1)
