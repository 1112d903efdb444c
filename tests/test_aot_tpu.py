"""Kernels compiled for TPUs that are not there: instructions, spills, memory, collectives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_schedules
import tpus
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from toy_tpu_kernel import TILE, listed_products

pytestmark = pytest.mark.aot


def floats(*shape, sharding=None):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


@pytest.mark.parametrize("generation", tpus.GENERATIONS)
def test_the_toy_compiles_for_every_generation(generation):
    """Stands in for the kernels until they are there."""
    (row,) = tpu_schedules.schedules({"toy": tpu_schedules.toy}, [generation])
    assert row["name"] == "listed_products" and row["slots"]["MXU"] > 0
    assert row["spill_stores"] == row["spill_fills"] == 0
    # Twice what libtpu 0.0.50 makes of it.
    assert 100 < row["bundles"] < 600, row


def test_the_toy_does_what_is_compiled():
    rng = np.random.default_rng(0)
    query, keys = (rng.normal(size=(n * TILE, TILE)).astype(np.float32) for n in (3, 4))
    lists = [[0, 3], [], [1, 2, 3]]
    count = np.array([len(tiles) for tiles in lists], np.int32)
    listed = np.array([[tiles + [9] * (4 - len(tiles))] for tiles in lists], np.int32)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        out = listed_products(count, listed, query, keys)
    query, keys, out = (x.reshape(-1, TILE, TILE) for x in (query, keys, np.asarray(out)))
    for i, tiles in enumerate(lists):
        np.testing.assert_allclose(out[i], query[i] @ keys[tiles].sum(0), rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("generation", ["v5e", "v6e"])
def test_collectives_are_counted(generation):
    mesh = tpus.mesh(generation, batch=4, heads=2)
    spec = P("batch", None, "heads")
    shape = floats(8, 16, 256, sharding=NamedSharding(mesh, spec))

    def kernel(x, out):
        assert str(pltpu.get_tpu_info().chip_version) == generation
        out[...] = x[...] * 2

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    def doubled(x):
        return pl.pallas_call(kernel, floats(*x.shape), name="doubled")(x)

    program = tpus.compiled(doubled, shape, generation=generation)
    assert [kernel.name for kernel in program.kernels] == ["doubled"]
    assert not program.collectives
    assert tpus.compiled(lambda x: doubled(x).sum(0), shape, generation=generation).collectives == {
        "all-reduce": 1
    }
