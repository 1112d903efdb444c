"""The xla implementation in linear memory: what the executable asks for, 1k to 32k positions."""

import itertools

import jax
import jax.numpy as jnp
import pytest

import kreg

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)


def temporary_bytes(length: int, mode: str, implementation: str, cell: dict) -> int:
    """Compile a derivative of causal attention at one length; return its temporary memory."""
    shape = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)

    def attend(query, key, value):
        options = {"is_causal": True, "scale": 1.0, "implementation": implementation}
        return kreg.attention(query, key, value, **options, **cell)

    def vjp(*arrays):
        output, pull = jax.vjp(attend, *arrays)
        return pull(output)

    def jvp(*arrays):
        return jax.jvp(attend, arrays, arrays)

    call = {"vjp": vjp, "jvp": jvp}[mode]
    compiled = jax.jit(call).lower(shape, shape, shape).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.nightly
@pytest.mark.parametrize("mode", ["vjp", "jvp"])
def test_xla_is_linear(mode):
    sizes = [temporary_bytes(n, mode, "xla", {"kernel": kreg.biweight}) for n in LENGTHS]
    # Never more than in proportion to the length, counted from 2k, for up to 1k blocks have half as
    # many queries; and twice the length is at most twice the memory: a square would give 4.
    for length, size in zip(LENGTHS[1:], sizes[1:], strict=True):
        assert size <= 1.5 * sizes[1] * length / LENGTHS[1], f"T = {length}: {sizes}"
    for small, large in itertools.pairwise(sizes[1:]):
        assert large <= 2.1 * small, f"{sizes}"
    dense = 2 * LENGTHS[-1] ** 2 * 4  # one array of scores, two heads
    assert sizes[-1] < dense / 4, f"{sizes[-1]} bytes at T = {LENGTHS[-1]}"


@pytest.mark.parametrize(
    "rule",
    [kreg.Adaptive(), kreg.Fixed(1.2), kreg.Nearest(8)],
    ids=repr,
)
@pytest.mark.nightly
def test_xla_is_linear_under_every_rule(rule):
    cell = {"kernel": kreg.epanechnikov, "bandwidth": rule}
    small, large = (temporary_bytes(n, "vjp", "xla", cell) for n in (2048, 8192))
    # Four times the length and some padding of buffers; a square would be 16 times.
    assert large <= 5 * small, f"{small} -> {large} bytes"


def test_the_measure_sees_a_dense_implementation():
    cell = {"kernel": kreg.biweight}
    small, large = (temporary_bytes(n, "vjp", "reference", cell) for n in (1024, 2048))
    assert large > 3.5 * small


@pytest.mark.parametrize("kernel", [kreg.gaussian, kreg.biweight], ids=repr)
def test_blocks_of_queries_share_memory(kernel):
    scores = 2 * 256 * 2048 * 4  # the last block's; those of all blocks are 4.5 times as much
    assert temporary_bytes(2048, "vjp", "xla", {"kernel": kernel}) < 5 * scores
