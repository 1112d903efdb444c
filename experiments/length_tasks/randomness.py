"""Where random numbers come from: a NumPy generator on the host, a JAX key on the device.

A task draws from either through one interface, so that both follow one law. What depends on a drawn
length has exactly that size on the host; on the device, where shapes are static, it has the largest
size and the surplus is never read.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

type Ints = np.ndarray | jax.Array
type Int = int | np.integer | Ints

SAMPLES, TABLES = range(2)
"""What a generator is for."""


class Random(Protocol):
    """What tasks draw from. Every range includes both ends."""

    def size(self, wanted: Int, most: int) -> int:
        """The number of values to draw where `wanted` will be read."""
        ...

    def lookup(self, values: Sequence[int], index: Int) -> Ints:
        """Read a short list at a drawn place."""
        ...

    def integers(self, low: Int, high: Int, shape: tuple[int, ...] = ()) -> Ints:
        """Independent and uniform."""
        ...

    def bernoulli(self, probability: float, count: int) -> Ints:
        """Independent booleans, True with that probability."""
        ...

    def distinct(self, total: int, count: int) -> Ints:
        """Different integers below `total`, every ordered choice equally likely."""
        ...

    def hypergeometric(self, good: Int, bad: Int, draws: Int, most: int, count: int) -> Ints:
        """The number of good ones among `draws` (at most `most`) of good + bad, `count` times."""
        ...

    def chain(self, values: int, length: Int, most: int) -> Ints:
        """Integers below `values` without equal neighbours among the first `length`.

        Uniform ones; then, again and again, all that equal their right neighbour are drawn anew at
        once, until there are none. (This is not quite uniform over such sequences.)
        """
        ...


class HostRandom:
    """Draw from a NumPy generator."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator

    def size(self, wanted: Int, most: int) -> int:
        return int(wanted)

    def lookup(self, values: Sequence[int], index: Int) -> np.ndarray:
        return np.asarray(values[int(index)])

    def integers(self, low: Int, high: Int, shape: tuple[int, ...] = ()) -> np.ndarray:
        drawn: Any = self._generator.integers(low, high, shape, np.int32, endpoint=True)
        return np.asarray(drawn)

    def bernoulli(self, probability: float, count: int) -> np.ndarray:
        return self._generator.random(count) < probability

    def distinct(self, total: int, count: int) -> np.ndarray:
        return self._generator.choice(total, count, replace=False)

    def hypergeometric(self, good: Int, bad: Int, draws: Int, most: int, count: int) -> np.ndarray:
        return self._generator.hypergeometric(int(good), int(bad), int(draws), count)

    def chain(self, values: int, length: Int, most: int) -> np.ndarray:
        drawn = self.integers(0, values - 1, (int(length),))
        while len(same := np.flatnonzero(drawn[:-1] == drawn[1:])):
            drawn[same] = self.integers(0, values - 1, (len(same),))
        return drawn


class DeviceRandom:
    """Draw from a JAX key, a fresh one for every call; to be made anew inside each trace."""

    def __init__(self, key: jax.Array) -> None:
        self._key, self._calls = key, 0

    def _next(self) -> jax.Array:
        self._calls += 1
        return jax.random.fold_in(self._key, self._calls)

    def size(self, wanted: Int, most: int) -> int:
        return most

    def lookup(self, values: Sequence[int], index: Int) -> jax.Array:
        return jnp.asarray(values, jnp.int32)[index]

    def integers(self, low: Int, high: Int, shape: tuple[int, ...] = ()) -> jax.Array:
        return jax.random.randint(self._next(), shape, low, high + 1)

    def bernoulli(self, probability: float, count: int) -> jax.Array:
        return jax.random.bernoulli(self._next(), probability, (count,))

    def distinct(self, total: int, count: int) -> jax.Array:
        """The first places of a shuffle by swaps: exact, and `count` steps whatever the total."""
        place = jnp.arange(count)
        other = self.integers(place, total - 1, (count,))

        def swap(step: Int, order: jax.Array) -> jax.Array:
            pair = jnp.stack([place[step], other[step]])
            return order.at[pair].set(order[pair[::-1]])

        return jax.lax.fori_loop(0, count, swap, jnp.arange(total))[:count]

    def hypergeometric(self, good: Int, bad: Int, draws: Int, most: int, count: int) -> jax.Array:
        """One ball after the other."""
        balls = jnp.maximum(good + bad - jnp.arange(most), 1)
        drawn = self.integers(0, balls[:, None] - 1, (most, count))

        def take(step: Int, found: jax.Array) -> jax.Array:
            return found + ((drawn[step] < good - found) & (step < draws))

        start = jnp.zeros(count, jnp.int32)
        return jax.lax.fori_loop(0, most, take, start) if most else start

    def chain(self, values: int, length: Int, most: int) -> jax.Array:
        key = self._next()
        left = jnp.arange(most - 1) + 1 < length

        def draw(number: Int) -> jax.Array:
            return jax.random.randint(jax.random.fold_in(key, number), (most,), 0, values)

        def same(drawn: jax.Array) -> jax.Array:
            return jnp.append((drawn[:-1] == drawn[1:]) & left, False)

        def again(state: tuple[Int, jax.Array]) -> tuple[Int, jax.Array]:
            number, drawn = state
            return number + 1, jnp.where(same(drawn), draw(number), drawn)

        state = (jnp.int32(1), draw(0))
        return jax.lax.while_loop(lambda state: same(state[1]).any(), again, state)[1]


def host_random(seed: int, split: str, index: int = 0, *, purpose: int = SAMPLES) -> HostRandom:
    """Return what draws sample `index` of a split: a function of the arguments alone.

    A Philox generator with its key from (seed, split) and its counter from (index, purpose): each
    has 2^128 blocks of its own, on any machine, in any order.

    Raises:
        ValueError: the seed is negative, or the index not in 0..2^64-1.

    >>> draws = [host_random(0, "test", 7).integers(0, 999) for _ in range(2)]
    >>> bool(draws[0] == draws[1])
    True
    """
    _require_seed(seed)
    if not 0 <= index < 2**64:
        raise ValueError(f"index: expected 0 to 2^64 - 1, got {index}")
    words = np.frombuffer(_digest(split), "<u4")
    key = np.random.SeedSequence(seed, spawn_key=tuple(words.tolist())).generate_state(2, np.uint64)
    counter = np.array([0, 0, index, purpose], np.uint64)
    return HostRandom(np.random.Generator(np.random.Philox(key=key, counter=counter)))


def batch_key(seed: Int, split: str, step: Int) -> jax.Array:
    """Return the key of batch `step` of a split; both numbers may be traced.

    Args:
        seed: where it is traced, one of `device_seed`.

    Raises:
        ValueError: the seed is negative or above 2^32 - 1.
    """
    seed = seed if isinstance(seed, jax.Array) else device_seed(int(seed))
    key = jax.random.fold_in(jax.random.key(0), seed)
    for word in np.frombuffer(_digest(split), "<u4"):
        key = jax.random.fold_in(key, word)
    return jax.random.fold_in(key, step)


def device_seed(seed: int) -> np.uint32:
    """Return a seed as the device takes it.

    Raises:
        ValueError: it is negative or above 2^32 - 1.
    """
    _require_seed(seed)
    if seed >= 2**32:
        raise ValueError(f"seed: expected at most 2^32 - 1 on the device, got {seed}")
    return np.uint32(seed)


def _require_seed(seed: int) -> None:
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {seed}")


def _digest(split: str) -> bytes:
    return hashlib.blake2b(split.encode(), digest_size=16).digest()
