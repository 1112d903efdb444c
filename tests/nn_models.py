"""Small Memory Mosaics for the tests of kreg.nn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import kreg
from kreg.nn import MemoryMosaic, MosaicConfig

# Compiles in half the time, and each function runs on a few rows.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

VOCAB = 11
nearest = functools.partial(kreg.Nearest, 3)

# One method of each rule, and each kernel at least once.
METHODS = {
    "softmax": (kreg.gaussian, kreg.Adaptive),
    "epanechnikov": (kreg.epanechnikov, kreg.Adaptive),
    "biweight": (kreg.biweight, kreg.Adaptive),
    "triweight@fixed": (kreg.triweight, kreg.Fixed),
    "norm_relu": (kreg.epanechnikov, kreg.Fixed),
    "relumax": (kreg.epanechnikov, kreg.Anchored),
    "top3_softmax": (kreg.gaussian, nearest),
    "top3_uniform": (kreg.box, nearest),
    "biweight@nearest": (kreg.biweight, nearest),
}


def config(method: str = "biweight", **options) -> MosaicConfig:
    """Two layers, two heads of width 4, three stored pairs."""
    kernel, bandwidth = METHODS[method]
    sizes = {"num_layers": 2, "num_heads": 2, "embed_dim": 8, "memory_size": 3} | options
    return MosaicConfig(VOCAB, **sizes, kernel=kernel, bandwidth=bandwidth)


# Around which values the parameters of a kind are spread; all others around 0, more widely.
CENTRES = {"kernel_beta": 0.1, "value_beta": -0.05, "decay": 0.2, "mix": 0.5, "scale": 1.0}


@functools.cache
def module(kind: type[nnx.Module], config: MosaicConfig) -> nnx.Module:
    """A float32 module with spread-out parameters, without the compilations of a real draw."""
    numbers = np.random.default_rng(7)

    def fill(path, leaf):
        kinds = [name for name in CENTRES if name in jax.tree_util.keystr(path)]
        centre, spread = (CENTRES[kinds[0]], 0.05) if kinds else (0.0, 0.4)
        return jnp.asarray(centre + spread * numbers.normal(size=leaf.shape), jnp.float32)

    # Tests in float64 widen what they get, so that what is kept here is the same for all.
    with jax.enable_x64(False):
        shapes = nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0)))
        return jax.tree_util.tree_map_with_path(fill, shapes)


def model(config: MosaicConfig) -> MemoryMosaic:
    """A whole model."""
    return module(MemoryMosaic, config)


def tokens(batch: int, length: int, seed: int = 0) -> jax.Array:
    """Random tokens [B, T]."""
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, VOCAB, jnp.int32)


@quick_jit
def logits(model, tokens, segment_ids=None, dropout_key=None):
    """The model's answer, compiled once for each configuration and shape."""
    return model(tokens, segment_ids=segment_ids, dropout_key=dropout_key)
