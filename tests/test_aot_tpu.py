"""The kernels compiled for TPUs that are not there: instructions, spills, memory, collectives."""

import functools
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tpu_schedules
import tpus
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from nightly import NIGHTLY
from tpu_steps import HOLDS, STEPS, compiled_apart

import kreg
from experiments.scaling.check import check
from experiments.scaling.model import Sizes, Split
from pallas_kernels.mosaic_tpu.sizes import sizes_of

pytestmark = pytest.mark.aot
MOST_SPILLS = {"v4": 400, "v5e": 130, "v5p": 130, "v6e": 50, "v7x": 8}
SMALL = Sizes(2, 256, 512, 2048, rows=8, length=512, density=1.0)
KERNELS = ["gradient_of_keys", "gradient_of_queries", "threshold_and_average"]


def attend(generation="v5e", **options) -> tpus.Program:
    """Compile attention with its gradients."""
    return tpus.compiled(*tpu_schedules.attention(**options), generation=generation)


def names(program: tpus.Program) -> list[str]:
    return [kernel.name for kernel in program.kernels]


CORE = ("v5e", 64), ("v6e", 64)


@pytest.mark.parametrize(
    ("generation", "width"),
    [
        pytest.param(*case, marks=pytest.mark.core if case in CORE else [])
        for case in itertools.product(tpus.GENERATIONS, (64, 128))
    ],
)
def test_kernels_are_no_larger_than_the_table_says(generation, width):
    """What `make schedules` wrote, and a tenth more: compilers differ a little."""
    table = json.loads(Path(__file__).with_name("tpu_schedules.json").read_text())["kernels"]
    (program,) = (name for name in tpu_schedules.PROGRAMS if name == f"width {width}")
    known = {
        r["name"]: r for r in table if (r["program"], r["generation"]) == (program, generation)
    }
    found = attend(generation, width=width)
    assert names(found) == KERNELS
    for kernel in found.kernels:
        row = known[kernel.name]
        assert kernel.bundles <= 1.1 * row["bundles"], kernel
        assert kernel.spill_stores <= 1.1 * row["spill_stores"] + 8, kernel
        assert kernel.spill_fills <= 1.1 * row["spill_fills"] + 8, kernel
        # A tile has 4 pieces: so much of each goes to memory and back, of 32 registers of scores.
        assert kernel.bundles <= 5500 and kernel.spill_stores <= MOST_SPILLS[generation], kernel
    # Numbers of rows and bits of tiles, nothing of the size of keys times queries.
    assert found.temporary_bytes <= 10 * 2 * 2048 * width


WIDEST = {"width": 256, "dtype": jnp.float32}


@pytest.mark.parametrize(
    ("generation", "options"),
    [
        pytest.param(x, y, marks=NIGHTLY if x not in ("v4", "v6e") or y is WIDEST else [])
        for x, y in itertools.product(tpus.GENERATIONS, ({"width": 64}, WIDEST))
    ],
    ids=str,
)
def test_the_most_scores_that_are_kept_fit(generation, options):
    given = sizes_of(tpus.GENERATIONS[generation].device_kind)
    length = given.scores // (4 * given.block)
    assert names(attend(generation, length=length, **options)) == KERNELS


@pytest.mark.nightly
@pytest.mark.parametrize("generation", tpus.GENERATIONS)
@pytest.mark.parametrize(
    ("most", "more", "why"),
    [
        ({"length": 2**20, "keys": 512, "heads": 19}, {"heads": 20}, "lists of tiles"),
        ({"length": 512, "keys": 2**24, "heads": 1}, {"keys": 2**24 + 1}, "16,777,216 keys"),
    ],
    ids=["heads at a million queries", "keys"],
)
def test_the_longest_lists_that_are_taken_fit_into_scalar_memory(generation, most, more, why):
    """The kernel of keys has lists of blocks of queries, those of queries lists of tiles."""
    options = {"width": 16, "is_causal": False} | most
    assert names(attend(generation, **options)) == KERNELS
    with pytest.raises(NotImplementedError, match=why):
        attend(generation, **options | more)


@pytest.mark.parametrize("length", [8192, pytest.param(131072, marks=NIGHTLY)])
@pytest.mark.parametrize("generation", ["v6e", pytest.param("v4", marks=NIGHTLY)])
def test_memory_is_linear_but_for_bits_of_tiles(generation, length):
    heads, width = 4, 64
    found = attend(generation, width=width, length=length, heads=heads, key_heads=heads)
    numbers, bits = length * width, (length // 64) ** 2 / 8
    # The bits are there twice, turned for keys.
    assert found.temporary_bytes <= heads * (4 * numbers + 2 * bits)


@pytest.mark.nightly
@pytest.mark.parametrize("generation", tpus.GENERATIONS)
@pytest.mark.parametrize(
    "options",
    [
        {"width": 16, "length": 1003},
        {"width": 256},
        {"width": 256, "dtype": jnp.float32},
        {"width": 64, "kernel": kreg.epanechnikov},
        {"width": 64, "kernel": kreg.Kernel(4)},
        {"width": 64, "bandwidth": kreg.Fixed(1.0), "scale": 1.0},
        {"width": 64, "local_window_size": 100, "return_stats": False},
        {"width": 64, "segment_ids": jnp.zeros((1, 2048), int)},
        {"width": 64, "dropout_rate": 0.1, "dropout_key": jax.random.key(0)},
        {"width": 64, "length": 32768},
        {"width": 128, "length": 131072},
    ],
    ids=str,
)
def test_variants_compile(generation, options):
    assert names(attend(generation, **options)) == KERNELS


def test_a_program_for_a_tpu_has_the_kernels_without_naming_them():
    assert names(attend(width=64, length=256, implementation=None)) == KERNELS
    assert not attend(width=64, length=256, implementation=None, kernel=kreg.gaussian).kernels


@pytest.mark.parametrize("generation", ["v5e", "v6e"])
def test_batch_and_heads_are_split_over_eight_chips_without_a_word(generation):
    mesh = tpus.mesh(generation, batch=4, heads=2)
    spec = P("batch", None, "heads")
    shapes = [
        jax.ShapeDtypeStruct((8, 512, n, 64), jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for n in (4, 2, 2, 4)
    ]
    both, *_ = tpu_schedules.attention(width=64)
    split = jax.shard_map(both, mesh=mesh, in_specs=(spec,) * 4, out_specs=spec, check_vma=False)
    found = tpus.compiled(split, *shapes, generation=generation)
    assert names(found) == KERNELS and not found.collectives


def over_eight(form: str) -> tpus.Program:
    """Compile attention and its gradients with a sequence that is split over eight chips."""
    mesh = tpus.mesh("v6e", sequence=8)
    parts, whole = (NamedSharding(mesh, spec) for spec in (P(None, "sequence"), P()))
    of_queries = parts if form == "gather" else whole
    attend = functools.partial(
        kreg.sharding.attention, sequence="sequence", form=form, is_causal=True
    )

    def both(query, key, value, cotangent):
        out, pull = jax.vjp(attend, query, key, value)
        return out, pull(cotangent)

    places = (2, of_queries), (1, parts), (1, parts), (2, of_queries)
    shapes = [
        jax.ShapeDtypeStruct((1, 2048, n, 64), jnp.bfloat16, sharding=where) for n, where in places
    ]
    return tpus.compiled(both, *shapes, generation="v6e")


def test_queries_are_split_over_eight_chips():
    """Kernels for an early and a late part of the queries; keys and values are gathered once."""
    found = over_eight("gather")
    assert names(found) == KERNELS
    assert found.collectives["all-gather"] == 2 and found.collectives["all-to-all"] == 0


def test_keys_are_split_over_eight_chips():
    """Kernels for the keys here; only sums go around."""
    found = over_eight("keys")
    assert sorted(set(names(found))) == KERNELS
    assert set(found.collectives) == {"all-reduce"}


@pytest.mark.nightly
@pytest.mark.parametrize("split", [Split(fsdp=8), Split(data=8), Split(sequence=8), Split(2, 2, 2)])
def test_a_train_step_is_split_over_eight_chips(split):
    """With the kernels; parameters and moments take an eighth of the memory under fsdp."""
    chips = tuple(tpus.devices("v6e"))
    found = check(SMALL, split, chips, None)
    assert found.compiled <= 1.7 * found.predicted
    whole = 3 * 4 * SMALL.parameters / split.fsdp
    assert 0.9 * whole <= found.state_bytes <= 1.35 * whole + 2**16


@pytest.mark.nightly
@pytest.mark.parametrize("generation", HOLDS)
@pytest.mark.parametrize("name", STEPS)
def test_train_steps_of_mosaics_compile_with_the_kernels(generation, name):
    """Kernels for the contextual memories, dropout and all; the persistent ones are a softmax."""
    found = compiled_apart(name, generation)
    assert sorted(set(found["calls"])) == KERNELS
    # The state is given up for the next one: it is there once.
    assert found["reused_bytes"] >= 0.99 * found["output_bytes"]
    assert found["bytes"] < HOLDS[generation]


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize("generation", tpus.GENERATIONS)
def test_a_trace_knows_what_it_is_meant_for(generation):
    device = tpus.devices(generation)[0]
    with tpus.meant_for(generation):
        meant = jax.sharding.get_abstract_mesh().abstract_device
        assert str(pltpu.get_tpu_info().chip_version) in (generation, generation[1:])
    assert (meant.device_kind, meant.num_cores) == (device.device_kind, device.num_cores)
    assert len(tpus.devices(generation)) == 8


def test_spills_are_counted():
    """More is carried through a loop than there are registers."""

    def kernel(x, out):
        def step(_, carried):
            first, second = carried
            return first * second, first + second

        out[...] = lax.fori_loop(0, 100, step, (x[...], x[...] + 1))[0]

    def kernels(rows):
        program = tpus.compiled(pl.pallas_call(kernel, floats(rows, 128)), floats(rows, 128))
        return program.kernels[0]

    few, many = kernels(64), kernels(512)
    assert few.spill_stores == few.spill_fills == 0
    # 64 registers of 8 rows: what is more of twice 512 rows goes to memory and back in each step.
    assert min(many.spill_stores, many.spill_fills) >= 2 * 512 // 8 - 64, many


@pytest.mark.parametrize(("generation", "most"), [("v5e", 15), ("v6e", 31)])
def test_memory_that_is_not_there_is_refused(generation, most):
    """Unless a kernel asks for more, it has 16 MiB, from v6e 32."""

    def kernel(n, x, out, scratch):
        def fill(i, _):
            scratch[pl.ds(i, 1)] = x[...] * i

        lax.fori_loop(0, n[0], fill, None)
        out[...] = scratch[pl.ds(n[1], 1)]

    def compiled(mebibytes):
        call = pl.pallas_call(
            kernel,
            floats(1, 8, 128),
            in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec()],
            scratch_shapes=[pltpu.VMEM((mebibytes * 256, 8, 128), jnp.float32)],
        )
        numbers = jax.ShapeDtypeStruct((2,), jnp.int32)
        return tpus.compiled(call, numbers, floats(1, 8, 128), generation=generation)

    compiled(most)
    with pytest.raises(jax.errors.JaxRuntimeError, match="memory space vmem"):
        compiled(most + 1)
