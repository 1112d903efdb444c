"""The cost of training on many devices: formulas beside models, and beside compiled programs."""

import jax
import pytest
from flax import nnx

import kreg
from experiments.scaling.__main__ import main
from experiments.scaling.check import check
from experiments.scaling.collectives import Message, messages, sent
from experiments.scaling.model import Sizes, Split, break_even
from kreg import nn
from kreg.sharding.traffic import Traffic

SMALL = Sizes(2, 256, 512, 2048, rows=8, length=256, density=1.0)

PROGRAM = """
%body.1 (x: f32[4]) -> f32[4] {
  %a = f32[2,4]{1,0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add
}
ENTRY %main (x: f32[4]) -> f32[4] {
  %w = f32[4] while(%x), condition=%c, body=%body.1, backend_config={"known_trip_count":{"n":"3"}}
  %g = (bf16[2,8], bf16[8,8]) all-gather-start(%x), replica_groups={{0,1,2,3},{4,5,6,7}}
  %p = f32[16]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  %s = f32[2]{0} reduce-scatter(%x), replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}
}
"""


def test_collectives_are_read_from_programs():
    assert messages(PROGRAM) == [
        Message("all-reduce", 32, 4, (3,)),
        Message("all-gather", 128, 4),
        Message("collective-permute", 64, 2),
        Message("reduce-scatter", 8, 4),
    ]
    assert sent(messages(PROGRAM)) == 3 * 32 * 2 * 3 / 4 + 128 * 3 / 4 + 64 + 8 * 3


def test_parameters_are_those_of_the_model():
    config = nn.MosaicConfig(SMALL.vocabulary, SMALL.layers, 4, SMALL.width, SMALL.slots)
    model = nnx.eval_shape(lambda: nn.MemoryMosaic(config, rngs=nnx.Rngs(0)))
    matrices = [x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)) if x.size > 1000]
    assert sum(matrices) == SMALL.parameters


@pytest.mark.nightly
@pytest.mark.parametrize("split", [Split(fsdp=8), Split(data=8), Split(sequence=8)])
def test_bytes_are_those_of_the_compiled_step(split):
    found = check(SMALL, split)
    assert found.compiled == pytest.approx(found.predicted, rel=0.1)
    whole = 3 * 4 * SMALL.parameters
    assert found.state_bytes == pytest.approx(whole / split.fsdp, rel=0.02)


def test_break_even_is_where_both_forms_send_alike():
    class Shape:
        def __init__(self, *shape, dtype="bfloat16"):
            self.shape, self.dtype = shape, jax.numpy.dtype(dtype)

    class Problem:
        query, key = Shape(1, 440_000, 8, 64), Shape(1, 1_000_000, 8, 64)
        value, dtype, mask = key, jax.numpy.dtype("float32"), kreg.Mask()

    found = Traffic.of(Problem, {"b": 1, "n": 1, "k": 1, "s": 8})
    assert found.keys / found.gather == pytest.approx(0.44 / break_even(), rel=1e-6)


def test_the_command_prints_a_table(capsys):
    assert main(["--devices", "64", "--length", "4096"]) == 0
    assert "| 64 | 8 x 8 x 1 |" in capsys.readouterr().out
