"""The kernels for Hopper, compiled to machine code without one: registers, spills, memory."""

import functools
import itertools

import h200
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from mosaic_steps import length_step, mosaic_step
from nightly import NIGHTLY

import kreg
from experiments.scaling.check import check
from experiments.scaling.collectives import messages
from experiments.scaling.model import Sizes, Split, activation_bytes

pytestmark = pytest.mark.aot


def attend(length, width, dtype=jnp.bfloat16, heads=2, key_heads=1, backward=True, **options):
    """Compile attention of such shapes, with its gradients."""
    options = {"implementation": "mosaic_gpu", "is_causal": True} | options
    function = functools.partial(kreg.attention, **options)
    query, key = (jax.ShapeDtypeStruct((1, length, n, width), dtype) for n in (heads, key_heads))

    def both(query, key, value, dout):
        out, pull = jax.vjp(function, query, key, value)
        return out, pull(dout)

    shapes = (query, key, key, query) if backward else (query, key, key)
    return h200.compiled(both if backward else function, *shapes)


@pytest.mark.nightly
def test_keys_are_split_over_eight_gpus():
    """Kernels for the keys here; only sums go around."""
    mesh = jax.make_mesh((8,), ("sequence",), devices=h200.devices(8))
    attend = functools.partial(
        kreg.sharding.attention, sequence="sequence", form="keys", mesh=mesh, is_causal=True,
        implementation="mosaic_gpu",
    )  # fmt: skip

    def both(query, key, value, dout):
        out, pull = jax.vjp(attend, query, key, value)
        return out, pull(dout)

    whole, parts = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in ((), (None, "sequence")))
    places = (2, whole), (1, parts), (1, parts), (2, whole)
    shapes = [
        jax.ShapeDtypeStruct((1, 2048, n, 64), jnp.bfloat16, sharding=where) for n, where in places
    ]
    found = messages(jax.jit(both).lower(*shapes).compile().as_text())
    assert {message.kind for message in found} == {"all-reduce"}
    # A round of the search sends two numbers a row; the averages that it forms stay here.
    rounds = [message.bytes for message in found if None in message.loops]
    assert rounds and max(rounds) <= 16 * 2 * 2048


@pytest.mark.nightly
@pytest.mark.parametrize("split", [Split(fsdp=8), Split(2, 2, 2)])
def test_a_train_step_is_split_over_eight_gpus(split):
    """With the kernels; parameters and moments take an eighth of the memory under fsdp."""
    sizes = Sizes(2, 256, 512, 2048, rows=8, length=512, density=1.0)
    found = check(sizes, split, tuple(h200.devices(8)), None)
    assert 0.5 * found.predicted <= found.compiled <= 1.5 * found.predicted
    whole = 3 * 4 * sizes.parameters / split.fsdp
    assert 0.9 * whole <= found.state_bytes <= 1.1 * whole + 2**16


@pytest.mark.nightly
@pytest.mark.parametrize(
    "changes",
    [
        *({}, {"rows": 8}, {"width": 512}, {"vocabulary": 8000}, {"slots": 1024}),
        {"layers": 12, "width": 768, "slots": 2688, "vocabulary": 50257, "rows": 2},
    ],
    ids=str,
)
def test_what_a_train_step_keeps_is_what_the_formula_says(changes):
    """Beside the state: gradients, and activations."""
    sizes = Sizes(6, 256, 512, 1000, rows=4, length=512)._replace(**changes)
    found = check(sizes, Split(), tuple(h200.devices(1)), None)
    expected = 4 * sizes.parameters + activation_bytes(sizes, Split())
    assert found.temporary_bytes == pytest.approx(expected, rel=0.12)


# Each order and each width once, on the oldest jax one of them; all at night.
WIDTHS = {1: 16, 2: 64, 3: 128}


@pytest.mark.parametrize(
    ("order", "width"),
    [
        pytest.param(
            r,
            w,
            marks=pytest.mark.core if (r, w) == (2, 64) else [] if WIDTHS[r] == w else NIGHTLY,
        )
        for r, w in itertools.product(WIDTHS, WIDTHS.values())
    ],
)
def test_kernels_compile_without_spills(width, order):
    # A length of its own: the compiler tells of a kernel once, and 16 is padded to 64.
    program = attend(2048 + width, width, kernel=kreg.Kernel(order))
    assert len(program.registers) == 3  # output, gradient of queries, of keys and values
    assert not any(program.spilled_bytes), program
    # As pallas_kernels/README.md has it: three passes over tiles, each with its own scores, the
    # last with two averages; gradients of queries; of keys and values.
    scores = -(-width // 64) * 4
    assert sorted(program.products) == sorted([3 * scores + 8, 2 * scores + 4, 2 * scores + 8])


@pytest.mark.parametrize(
    ("length", "width", "tiles", "options"),
    [
        (1024, 64, 4 + 1, {}),
        pytest.param(256, 16, 4, {}, marks=NIGHTLY),
        pytest.param(512, 64, 4, {"kernel": kreg.epanechnikov}, marks=NIGHTLY),
        pytest.param(1024, 64, 4 + 1, {"kernel": kreg.Kernel(4)}, marks=NIGHTLY),
        pytest.param(1024, 64, 4 + 1, {"kernel": kreg.Kernel(2.5)}, marks=NIGHTLY),
        pytest.param(1024, 64, 4 + 1, {"bandwidth": kreg.Anchored()}, marks=NIGHTLY),
        pytest.param(1024, 64, 4 + 1, {"dtype": jnp.float16, "return_stats": True}, marks=NIGHTLY),
        pytest.param(
            1024,
            64,
            4 + 1,
            {"dropout_rate": 0.1, "dropout_key": jax.random.key(0)},
            marks=NIGHTLY,
        ),
        pytest.param(256, 128, 3 + 1, {}, marks=NIGHTLY),
        pytest.param(768, 128, 3 + 1, {"kernel": kreg.triweight}, marks=NIGHTLY),
        pytest.param(896, 128, 3 + 1, {"return_stats": True}, marks=NIGHTLY),
        pytest.param(
            512,
            128,
            2 + 1,
            {"dropout_rate": 0.1, "dropout_key": jax.random.key(0)},
            marks=NIGHTLY,
        ),
        pytest.param(
            512,
            128,
            2 + 1,
            {"segment_ids": np.zeros((1, 512), np.int32)},
            marks=NIGHTLY,
        ),
    ],
    ids=lambda x: str(list(x)) if isinstance(x, dict) else str(x),
)
def test_few_keys_have_their_scores_formed_once(length, width, tiles, options):
    """Tiles in registers are written one by one, those in shared memory in a loop; no spills."""
    program = attend(length, width, backward=False, **options)
    assert len(program.registers) == 1
    assert not any(program.spilled_bytes), program
    # Scores of a tile, and its values in two averages.
    assert program.products == [tiles * (-(-width // 64) * 4 + 8)]


@pytest.mark.nightly
@pytest.mark.parametrize("width", [16, 64, 128])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel": kreg.Kernel(4)},
        {"kernel": kreg.rectified_polynomial(2.5)},
        {"bandwidth": kreg.Anchored()},
        {"bandwidth": kreg.Fixed(1.0), "scale": 1.0},
        {"local_window_size": 100},  # as causality, lengths and ranges: the same code
        {"dtype": jnp.float16},
        {"dropout_rate": 0.1, "dropout_key": jax.random.key(0)},
    ],
    ids=str,
)
def test_variants_compile_without_spills(width, options):
    program = attend(3072 + width, width, **options)
    assert len(program.registers) >= 2
    assert not any(program.spilled_bytes), program


@pytest.mark.nightly
@pytest.mark.parametrize("length", [100, 1003])
def test_odd_lengths_compile(length):
    program = attend(length, 64)
    assert len(program.registers) == 3 and not any(program.spilled_bytes), program


@pytest.mark.nightly
@pytest.mark.parametrize("width", [64, 128])
def test_packed_sequences_compile_without_spills(width):
    program = attend(1024, width, segment_ids=jnp.zeros((1, 1024), int))
    assert len(program.registers) == 3
    assert not any(program.spilled_bytes), program


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("width", "dtype"), [(256, jnp.bfloat16), (64, jnp.float32), (128, jnp.float32)]
)
def test_the_widest_compile(width, dtype):
    """These spill: float32 is three bfloat16 parts, width 256 twice the sums; slower, not wrong."""
    assert attend(2048, width, dtype).registers


def for_hopper():
    """A trace on this machine is meant for another by its mesh."""
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def test_a_program_for_hopper_has_the_kernels_without_naming_them():
    with for_hopper():
        assert attend(256, 64, implementation=None).registers
        assert not attend(256, 64, implementation=None, kernel=kreg.gaussian).registers


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("length", "heads", "width", "documents"),
    [(512, 8, 128, False), (1024, 12, 768, False), (1024, 4, 256, True)],
    ids=["in-context learning", "language modelling", "packed documents"],
)
def test_train_steps_of_mosaics_compile_with_the_kernels(length, heads, width, documents):
    """Kernels for the contextual memory, dropout and all; the persistent one is a softmax."""
    step, state = mosaic_step(num_heads=heads, embed_dim=width, documents=documents)
    tokens = jax.ShapeDtypeStruct((2, length), jnp.int32)
    with for_hopper():
        program = h200.compiled(step, state, tokens)
    assert len(program.registers) == 3 and not any(program.spilled_bytes), program


@pytest.mark.nightly
def test_the_train_step_of_length_generalisation_compiles_with_the_kernels():
    """Three seeds side by side, in float32: these spill, as the test of the widest says."""
    step, *arguments = length_step()
    with for_hopper():
        assert len(h200.compiled(step, *arguments).registers) == 3


LONG = pytest.param(131072, marks=NIGHTLY)


@pytest.mark.parametrize("length", [4096, LONG])
def test_memory_is_linear_but_for_a_bit_a_tile(length):
    width, heads = 64, 4
    program = attend(length, width, heads=heads, key_heads=heads)
    numbers, bits = length * width, (length // 64) ** 2 / 8
    # The bits are there twice, turned for keys.
    assert program.temporary_bytes <= heads * (3 * numbers + 2 * bits)
    # To 128k the second map is within another sixteenth of a byte a number.
    assert program.temporary_bytes <= heads * ((3 + 1 / 16) * numbers + bits)
