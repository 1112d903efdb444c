"""Attention over a mesh: what one device gives, whatever is split; and what is sent."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_contract as contract
from attention_inputs import Shape, draw
from cells import FOUR, Cell
from jax.sharding import AxisType
from nightly import NIGHTLY, nightly

import kreg
from experiments.scaling.collectives import messages, sent
from kreg.canonical import canonical
from kreg.sharding import zigzag
from kreg.sharding.traffic import ROUNDS, Traffic

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


# Structures of the contract, by number, with a form and a number of devices; nightly, all.
AT_ONCE = {(0, "keys", 8)}


ALL = [
    pytest.param(
        number, form, devices,
        id=f"{contract.NAMES[number]}-{form}-{devices}",
        marks=() if (number, form, devices) in AT_ONCE else pytest.mark.nightly,
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
            return jnp.sum(out * cotangent), (out, stats)

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


def often(values, *, at_once):
    """Values with each form: some cases at once, all nightly."""
    marks = dict.fromkeys(at_once, ())
    return [
        pytest.param(x, form, id=f"{x}-{form}", marks=marks.get(f"{x}-{form}", NIGHTLY))
        for x in values
        for form in FORMS
    ]


@pytest.mark.parametrize(
    ("name", "form"),
    often(OPTIONS, at_once={"dropout-gather", "dropout-keys"}),
)
def test_options(name, form):
    """What the contract does not draw; dropout takes the same weights wherever they are."""
    arrays = draw(Shape(T=41, S=50, K=2), seed=1)
    want = both(kreg.attention, arrays, **OPTIONS[name])
    same(want, both(split(form, 4), arrays, **OPTIONS[name]))


@pytest.mark.parametrize(
    ("cell", "form"),
    often(FOUR, at_once={"biweight@adaptive-keys"}),
)
def test_every_rule(cell: Cell, form):
    # Wide enough that no query is left with one key at its edge, where a gradient is all rounding.
    cell = dataclasses.replace(cell, h=1.2)
    arrays = draw(Shape(T=24, S=64), seed=2)
    options = {"scale": 1.0, **cell.arguments}
    want = both(kreg.attention, arrays, **options)
    same(want, both(split(form, 8), arrays, **options))


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        pytest.param("gather", "Auto", marks=NIGHTLY),
        ("gather", "Explicit"),
        pytest.param("keys", "Auto", marks=NIGHTLY),
        ("keys", "Explicit"),
    ],
)
def test_batch_heads_and_sequence(kind, form):
    """All three at once, on a mesh of either type, with arrays that are already split there."""
    arrays = draw(Shape(B=2, T=32, S=32, N=4, K=2))
    want = both(kreg.attention, arrays, is_causal=True)
    over = mesh(kind, data=2, model=2, sequence=2)
    spec, whole = jax.P("data", "sequence", "model"), jax.P("data", None, "model")
    specs = [spec, spec, spec, whole if form == "keys" else spec]
    placed = [
        jax.device_put(np.asarray(x, np.float32), jax.NamedSharding(over, s))
        for x, s in zip(arrays, specs, strict=True)
    ]
    with jax.set_mesh(over):
        op = functools.partial(
            kreg.sharding.attention, batch="data", heads="model", sequence="sequence", form=form
        )
        same(want, both(op, placed, is_causal=True))


@pytest.mark.parametrize("devices", nightly([2, 4, 8], but=[4]))
def test_causal_work_is_shared_evenly(devices):
    """Device i has parts i and 2 P - 1 - i of the queries: all see as many keys."""
    length = 4 * devices
    problem = canonical(*(jnp.zeros((1, length, 1, 1)),) * 3, is_causal=True)

    def seen(rows):
        part = dataclasses.replace(problem, query=problem.query[:, : rows.size], rows=rows)
        early, late = zigzag.dealt(part, "sequence")
        both = jnp.concatenate([early.rows, late.rows])
        back = zigzag.returned(early.rows[None], late.rows[None], "sequence")[0]
        return jnp.sum(both + 1)[None], both, back

    over = jax.shard_map(
        seen, mesh=mesh(sequence=devices), in_specs=jax.P("sequence"), out_specs=jax.P("sequence")
    )
    counts, rows, back = over(jnp.arange(length))
    assert len(set(counts.tolist())) == 1
    assert rows[:4].tolist() == [0, 1, length - 2, length - 1]
    assert back.tolist() == list(range(length))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.nightly
def test_blocks_of_queries(form):
    """Rows too many to be formed at once, on the path that looks at blocks of them."""
    arrays = draw(Shape(B=1, T=300, S=640, N=2, K=1), seed=4, spherical=False)
    options = {
        "kernel": kreg.triweight,
        "segment_ids": (jnp.arange(300) // 90, jnp.arange(640) // 200),
    }
    want = both(functools.partial(kreg.attention, implementation="reference"), arrays, **options)
    same(want, both(split(form, 4, "xla"), arrays, **options), 1e-4)


@pytest.mark.parametrize("devices", [pytest.param(2, marks=pytest.mark.nightly), 8])
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


@pytest.mark.nightly
def test_forward_derivatives_and_curvature():
    query, key, value, change = (
        jnp.asarray(x, jnp.float32) for x in draw(Shape(B=1, T=5, S=16, N=1, K=1, V=8))
    )

    def curvature(op):
        def f(query):
            return jnp.sum(op(query, key, value, kernel=kreg.triweight) ** 3)

        tangent = jax.jvp(f, (query,), (change,))[1]
        return tangent, jax.jit(jax.jvp, static_argnums=0)(jax.grad(f), (query,), (change,))[1]

    same(
        curvature(functools.partial(kreg.attention, implementation="reference")),
        curvature(split("keys", 4)),
    )


def compiled(form: str, devices: int, shape: Shape, gradients: bool = True, **options):
    """The collectives of attention, and of its gradients, in the order of the program."""
    q = jax.ShapeDtypeStruct((shape.B, shape.T, shape.N, shape.H), jnp.float32)
    k = jax.ShapeDtypeStruct((shape.B, shape.S, shape.K, shape.H), jnp.float32)
    v = jax.ShapeDtypeStruct((shape.B, shape.S, shape.K, shape.V), jnp.float32)
    op = functools.partial(split(form, devices), **options)

    def loss(q, k, v, g):
        return jnp.vdot(op(q, k, v), g)

    g = jax.ShapeDtypeStruct((*q.shape[:3], shape.V), jnp.float32)
    over = mesh(sequence=devices)
    by_time = jax.NamedSharding(over, jax.P(None, "sequence"))
    whole = jax.NamedSharding(over, jax.P())
    of_queries = by_time if form == "gather" else whole
    run = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1, 2))
        if gradients
        else lambda q, k, v, g: op(q, k, v),
        in_shardings=(of_queries, by_time, by_time, of_queries),
        out_shardings=(whole, (of_queries, by_time, by_time)) if gradients else of_queries,
    )
    return messages(run.lower(q, k, v, g).compile().as_text())


SPLIT_KEYS = {"b": 1, "n": 1, "k": 1, "s": 8}
FEW = Shape(B=1, T=16, S=1024, N=4, K=4, H=64, V=64)


def test_keys_that_stay_do_not_move():
    """A round of the search sends at most 16 bytes a row, and nothing is as large as the keys."""
    found = compiled("keys", 8, FEW, gradients=False)
    assert {message.kind for message in found} == {"all-reduce"}
    rows = FEW.B * FEW.N * FEW.T
    rounds = [message for message in found if None in message.loops]
    assert rounds and all(message.bytes <= 16 * rows for message in rounds)
    # What is left is sums of outputs, and numbers of rows.
    assert all(message.bytes <= 4 * rows * FEW.V for message in found)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_sent_is_what_the_rule_says(form):
    shape = FEW if form == "keys" else Shape(B=1, T=256, S=256, N=2, K=2, H=64, V=64)
    found = compiled(form, 8, shape)
    traffic = Traffic.of(canonical(*(jnp.zeros(s) for s in sizes(shape))), SPLIT_KEYS)
    assert sent(found, trips=ROUNDS) == pytest.approx(getattr(traffic, form), rel=0.1)


def sizes(shape: Shape):
    of_keys = shape.B, shape.S, shape.K
    return (shape.B, shape.T, shape.N, shape.H), (*of_keys, shape.H), (*of_keys, shape.V)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence": "time"}, "sequence: expected axes of the mesh"),
        ({"batch": "sequence", "sequence": "sequence"}, "expected axes of the mesh, each once"),
        ({"heads": "sequence"}, "heads: expected axes whose size divides the 3"),
        ({"form": "ring"}, "form: expected None"),
        ({"form": "keys"}, "sequence: expected an axis"),
        ({"sequence": "sequence", "implementation": "none"}, "implementation: expected"),
    ],
)
def test_errors(options, message):
    x = jnp.zeros((1, 8, 3, 4))
    with pytest.raises(ValueError, match=message):
        kreg.sharding.attention(x, x, x, mesh=mesh(sequence=2), **options)
    with pytest.raises(ValueError, match=r"set one with jax\.set_mesh"):
        kreg.sharding.attention(x, x, x, sequence="sequence")


@pytest.mark.parametrize("form", [pytest.param("gather", marks=pytest.mark.nightly), "keys"])
def test_no_limit_stays_none(form):
    """The greatest integer as a window's side, or as an offset, moved to where a part begins."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 2, 4)), jnp.float32)
    far = 2**31 - 1
    for options in (
        {"local_window_size": (3, far)},
        {"local_window_size": (far, 0)},
        {"is_causal": True, "causal_offset": far},
    ):
        found = jax.jit(functools.partial(split(form, 4), **options))(x, x, x)
        assert found.shape == x.shape
        same(found, kreg.attention(x, x, x, **options))


def test_gradients_where_jax_keeps_no_book(monkeypatch):
    """As it is with kernels, whatever is run in the end."""
    monkeypatch.setattr("kreg.implementations.may_run_kernels", lambda *_: True)
    arrays = draw(Shape(T=24, S=64), seed=2)
    same(both(kreg.attention, arrays), both(split("keys", 4), arrays))


@pytest.mark.nightly
def test_dropout_draws_for_shared_keys_as_on_one_device():
    """Time that the devices do not divide, and a batch of one, which is not split."""
    rng = np.random.default_rng(0)
    key, value = (jnp.asarray(rng.normal(size=(5, 2, 4)), jnp.float32) for _ in range(2))
    options = {"dropout_rate": 0.4, "dropout_key": jax.random.key(1), "kernel": kreg.gaussian}
    layout = kreg.sharding.Layout(batch="data", sequence="sequence")
    for batch in (1, 4):
        query = jnp.asarray(rng.normal(size=(batch, 7, 2, 4)), jnp.float32)
        flat = query.reshape(1, -1, 2, 4)
        want = kreg.attention(flat, key[None], value[None], **options).reshape(query.shape)
        with jax.set_mesh(mesh(data=2, sequence=4)):
            same(kreg.sharding.to_shared_keys(query, key, value, layout, **options), want)


def test_inside_of_a_map_only_what_is_not_mapped_is_split():
    x, over = jnp.zeros((4, 8, 2, 4)), mesh(data=2, sequence=2)
    options = {"is_causal": True, "sequence": "sequence"}

    def attend(**more):
        inner = functools.partial(kreg.sharding.attention, **options, **more)
        spec = jax.P("data")
        return jax.shard_map(
            lambda x: inner(x, x, x), mesh=over, in_specs=spec, out_specs=spec, axis_names={"data"}
        )

    same(jax.jit(attend())(x), kreg.attention(x, x, x, is_causal=True))
    with pytest.raises(ValueError, match=r"batch: expected axes that no jax\.shard_map"):
        attend(batch="data")(x)


def test_kernels_decline_dropout_where_keys_are_split():
    x = jnp.zeros((1, 128, 2, 16))
    op = split("keys", 2, "mosaic_tpu")
    with pytest.raises(NotImplementedError, match="dropout where keys are split over a mesh"):
        op(x, x, x, dropout_rate=0.1, dropout_key=jax.random.key(0))
