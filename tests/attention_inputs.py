"""Random inputs of attention, as NumPy arrays already rounded to the type under test."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Shape:
    """B batch, T queries, S keys, N heads, K key heads, H key width, V value width."""

    B: int = 2
    T: int = 63
    S: int = 63
    N: int = 4
    K: int = 2
    H: int = 8
    V: int = 5

    def __str__(self) -> str:
        return "-".join(f"{axis}{size}" for axis, size in self.__dict__.items())


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """Round to `dtype` and return the values, exactly, as float64."""
    if dtype == "float64":
        return np.asarray(x, np.float64)
    return np.asarray(jnp.asarray(x, "float32").astype(dtype).astype("float32"), np.float64)


def unit(x: np.ndarray) -> np.ndarray:
    """Scale the last axis to length 1."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def draw(shape: Shape, seed: int = 0, dtype: str = "float32", spherical: bool = True):
    """Return query, key, value and a cotangent of the output; spherical: unit queries and keys."""
    rng = np.random.default_rng(seed)
    query = rng.normal(size=(shape.B, shape.T, shape.N, shape.H))
    key = rng.normal(size=(shape.B, shape.S, shape.K, shape.H))
    if spherical:
        query, key = unit(query), unit(key)
    value = rng.normal(size=(shape.B, shape.S, shape.K, shape.V))
    cotangent = rng.normal(size=(shape.B, shape.T, shape.N, shape.V))
    return tuple(rounded(x, dtype) for x in (query, key, value, cotangent))
