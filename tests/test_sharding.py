"""Attention over a mesh: what one device gives, whatever is split; and what is sent."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import test_contract as contract
from attention_inputs import Shape, draw
from cells import FOUR, Cell
from jax.sharding import AxisType

import kreg

FORMS = ("gather", "keys")


@functools.cache
def mesh(kind: str = "Auto", **axes: int) -> jax.sharding.Mesh:
    types = (AxisType[kind],) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types)


@functools.cache
def split(form: str, devices: int, implementation: str | None = None):
    """Attention with its sequence split over so many devices."""
    return functools.partial(
        kreg.sharding.attention,
        mesh=mesh(sequence=devices),
        sequence="sequence",
        form=form,
        implementation=implementation,
    )


# Structures of the contract, by number, with a form and a number of devices: some always, all
# nightly.
OFTEN = {(0, "keys", 8), (1, "gather", 4), (3, "keys", 2), (7, "keys", 4), (11, "keys", 8)}
ALL = [
    pytest.param(
        number, form, devices,
        id=f"{contract.NAMES[number]}-{form}-{devices}",
        marks=() if (number, form, devices) in OFTEN else (pytest.mark.slow, pytest.mark.nightly),
    )
    for number in range(len(contract.STRUCTURES))
    for form in FORMS
    for devices in (2, 4, 8)
]  # fmt: skip


@pytest.mark.parametrize(("number", "form", "devices"), ALL)
def test_the_contract_holds(number, form, devices):
    """Drawn masks of all kinds, biases, ragged lengths, ties, rows and shards without keys."""
    op = (split(form, devices),)
    for seed, (spread, density, parts, ties) in enumerate(
        [(1.0, 0.5, 63, False), (30.0, 0.02, 1, False), (0.3, 0.98, 62, True), (4.0, 0.5, 0, False)]
    ):
        contract.keeps_the_contract(op, number, seed, spread, density, parts, ties)


def both(op, arrays, **options):
    """Output, stats and gradients of query, key and value."""
    query, key, value, cotangent = (jnp.asarray(x, jnp.float32) for x in arrays)

    @jax.jit
    def run(query, key, value):
        def loss(*qkv):
            out, stats = op(*qkv, return_stats=True, **options)
            return jnp.vdot(out, cotangent), (out, stats)

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(query, key, value)

    (_, (out, stats)), gradients = run(query, key, value)
    return out, stats._replace(residual=0), gradients


def same(one, other, tolerance=2e-5):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance), one, other
    )


OPTIONS = {
    "null and cap": {"null_score": 0.4, "logits_soft_cap": 3.0},
    "window": {"local_window_size": (9, 2), "is_causal": True},
    "offset": {"is_causal": True, "causal_offset": jnp.array([-1, 20])},
    "dropout": {"dropout_rate": 0.3, "dropout_key": jax.random.key(3)},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, form):
    """What the contract does not draw; dropout takes the same weights wherever they are."""
    arrays = draw(Shape(T=41, S=50, K=2), seed=1)
    want = both(kreg.attention, arrays, **OPTIONS[name])
    same(want, both(split(form, 4), arrays, **OPTIONS[name]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", FOUR, ids=str)
def test_every_rule(cell: Cell, form):
    arrays = draw(Shape(T=24, S=64), seed=2)
    options = {"scale": 1.0, **cell.arguments}
    want = both(kreg.attention, arrays, **options)
    same(want, both(split(form, 8), arrays, **options))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("form", FORMS)
def test_batch_heads_and_sequence(kind, form):
    """All three at once, on a mesh of either type, with arrays that are already split there."""
    arrays = draw(Shape(B=2, T=32, S=32, N=4, K=2))
    want = both(kreg.attention, arrays, is_causal=True)
    over = mesh(kind, data=2, model=2, sequence=2)
    spec = jax.P("data", "sequence", "model")
    placed = [
        jax.device_put(np.asarray(x, np.float32), jax.NamedSharding(over, spec)) for x in arrays
    ]
    with jax.set_mesh(over):
        op = functools.partial(
            kreg.sharding.attention, batch="data", heads="model", sequence="sequence", form=form
        )
        same(want, both(op, placed, is_causal=True))


@pytest.mark.parametrize("form", FORMS)
def test_blocks_of_queries(form):
    """Rows too many to be formed at once, on the path that looks at blocks of them."""
    arrays = draw(Shape(B=1, T=300, S=640, N=2, K=1), seed=4, spherical=False)
    options = {"kernel": kreg.triweight, "segment_ids": (jnp.arange(300) // 90, jnp.arange(640) // 200)}
    want = both(functools.partial(kreg.attention, implementation="reference"), arrays, **options)
    same(want, both(split(form, 4, "xla"), arrays, **options), 1e-4)


@pytest.mark.parametrize("devices", [2, 8])
def test_a_support_in_one_shard(devices):
    """All weight is with one device, for some rows with the first, for others with the last."""
    query, key, value, cotangent = draw(Shape(B=1, T=6, S=64, N=1, K=1), spherical=False)
    key[0, :, 0] = 0.1 * key[0, :, 0]
    key[0, 1, 0, 0], key[0, 62, 0, 0], query[0, :, 0, 0] = 40, 40, [1, -1, 2, -2, 1, -1]
    key[0, 62, 0, 0] = -40
    arrays = query, key, value, cotangent
    want = both(kreg.attention, arrays)
    assert int(want[1].support.max()) == 1
    same(want, both(split("keys", devices), arrays))


def test_forward_derivatives_and_curvature():
    query, key, value, change = (
        jnp.asarray(x, jnp.float32) for x in draw(Shape(B=1, T=5, S=16, N=1, K=1, V=8))
    )

    def curvature(op):
        def f(query):
            return jnp.sum(op(query, key, value, kernel=kreg.triweight) ** 3)

        tangent = jax.jvp(f, (query,), (change,))[1]
        return tangent, jax.jit(jax.jvp, static_argnums=0)(jax.grad(f), (query,), (change,))[1]

    same(curvature(functools.partial(kreg.attention, implementation="reference")), curvature(split("keys", 4)))


class Sent:
    """What the devices of a compiled program send, by the shapes in its text."""

    PATTERN = re.compile(
        r"= \(?(\w+)\[([\d,]*)\]\S*.* (all-reduce|all-gather|reduce-scatter|collective-permute|"
        r"all-to-all)(?:-start)?\("
    )
    BYTES = {"f32": 4, "s32": 4, "bf16": 2, "f64": 8, "pred": 1, "u32": 4}

    def __init__(self, op, *shapes, devices: int):
        self.devices = devices
        text = jax.jit(op).lower(*shapes).compile().as_text()
        self.messages = [
            (kind, self.BYTES[dtype] * int(np.prod([int(n) for n in shape.split(",") if n])), at)
            for at, line in enumerate(text.splitlines())
            for dtype, shape, kind in self.PATTERN.findall(line)
        ]
        self.text = text
