"""Three Moons: the data, causality, and a short training by the command itself."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.moons import orbits
from experiments.moons.experiment import EXPERIMENT
from experiments.moons.findings import findings, matched
from experiments.moons.model import Map, MoonsConfig, MoonsModel, rotations
from experiments.moons.task import MODELS, clipped_error, make_model
from experiments.runs.command import command


def test_systems_repeat_after_their_common_period():
    step = 0.25
    for periods in orbits.SYSTEMS:
        around = round(orbits.common_period(periods) / step)
        points = orbits.positions(periods, 3, 2 * around, step)
        np.testing.assert_allclose(points[around:], points[:around], atol=1e-5)
        for moon, period in enumerate(periods):
            turn, own = round(period / step), points[:, 2 * moon : 2 * moon + 2]
            np.testing.assert_allclose(own[turn:], own[:-turn], atol=1e-5)


def test_windows_are_drawn_by_number():
    windows = orbits.Windows(rows=50, length=20, seed=3)
    again = orbits.Windows(rows=50, length=20, seed=3)
    other = orbits.Windows(rows=50, length=20, seed=4)
    rows = np.stack([windows[i]["points"] for i in range(50)])
    assert rows.shape == (50, 21, 6) and rows.dtype == np.float32
    np.testing.assert_array_equal(rows[7], again[7]["points"])
    assert np.any(rows[7] != other[7]["points"])
    assert len(np.unique(rows[:, 0], axis=0)) > 25
    np.testing.assert_allclose(rows[..., 0::2] ** 2 + rows[..., 1::2] ** 2, 1, rtol=1e-5)


def test_predictions_see_no_future():
    model = MoonsModel(MoonsConfig(3, 2), rngs=nnx.Rngs(0))
    x = jnp.asarray(orbits.held_out(12, 1, 0)[:, :-1])
    changed = model(x.at[:, 7:].set(0.5))
    np.testing.assert_array_equal(changed[:, :7], model(x)[:, :7])
    assert np.all(np.any(changed[:, 7:] != model(x)[:, 7:], axis=-1))


def test_rotations_are_complex_numbers():
    """The map of pairs is a complex matrix, and what is one already stays."""
    weight = rotations(jax.random.normal(jax.random.key(0), (4, 6)))
    matrix = weight[::2, ::2] + 1j * weight[1::2, ::2]
    x = jax.random.normal(jax.random.key(1), (6,))
    y = weight @ x
    np.testing.assert_allclose(y[::2] + 1j * y[1::2], matrix @ (x[::2] + 1j * x[1::2]), rtol=1e-5)
    np.testing.assert_array_equal(rotations(weight), weight)


def test_the_findings_name_heads_and_moons():
    """A model made by hand: head n reads and predicts moon (n + 1) mod 3."""
    windows = jnp.asarray(orbits.held_out(100, 4, 0))
    model = make_model("biweight", (3, 2), 0)
    wanted = np.roll(np.eye(3), 1, axis=1)
    blocks = jnp.asarray(np.kron(wanted, np.eye(2)), jnp.float32)
    for part, matrix in ((model.keys, blocks), (model.values, blocks), (model.out, blocks.T)):
        assert isinstance(part, Map)
        part.weight[...] = matrix
    found = findings(model, windows)
    # The heads are told in the order of their moons.
    np.testing.assert_allclose(found["outputs"], np.eye(3))
    np.testing.assert_allclose(found["keys"], np.eye(3))
    assert found["disentanglement"] == 1
    # Three heads need not wait until the whole system has come round.
    assert found["error_after_moons"] < 0.2 * found["error"][1]
    one = findings(make_model("softmax", (1, 6), 0), windows)
    assert one["disentanglement"] is None and np.shape(one["outputs"]) == (1, 3)
    assert matched(wanted) == [2, 0, 1]
    # Softmax gives weight to all the points that a query sees, biweight to some.
    assert one["support"] == pytest.approx(np.arange(100).mean())
    assert 1 < found["support"] < one["support"] / 2


def test_errors_are_clipped():
    points = jnp.zeros((1, 3, 2))
    assert float(clipped_error(jnp.full((1, 2, 2), 9.0), points)) == 0.25
    assert float(clipped_error(jnp.full((1, 2, 2), 0.1), points)) == pytest.approx(0.01)


TINY = [
    *("--data.length", "40", "--data.windows", "4"),
    *("--training.steps", "20", "--training.batch-size", "4", "--training.evaluations", "2"),
]


@pytest.mark.slow
def test_the_command_trains_resumes_and_draws(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    words = [*TINY, "--methods", "biweight", "--seeds", "0", "1", "--out", str(tmp_path)]
    assert command(EXPERIMENT, [*words, "--time-limit", "1e-9"]) == 3
    assert "goes on from there" in capsys.readouterr().err
    assert command(EXPERIMENT, words) == 0
    text = capsys.readouterr().out
    assert "## Three Moons: smoke" in text and "±" in text
    assert sum(line.startswith("| biweight") for line in text.splitlines()) == len(MODELS)
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    found = json.loads((tmp_path / "biweight" / "seed1" / "result.json").read_text())
    assert np.shape(found["three heads"]["keys"]) == (3, 3)
    windows = jnp.asarray(orbits.held_out(40, 4, 0))
    for name, heads in MODELS.items():
        before = np.mean(findings(make_model("biweight", heads, 1), windows)["error"])
        assert np.mean(found[name]["error"]) < before
    # Another length must not write here.
    assert command(EXPERIMENT, [*words, "--data.length", "41"]) == 2
    assert "length" in capsys.readouterr().err


def test_a_model_trains_as_it_would_alone():
    """What the other model is changes none of its updates."""
    program = EXPERIMENT.load_task().build(EXPERIMENT.presets["smoke"], "softmax")
    batch = {"points": jnp.asarray(orbits.held_out(20, 2, 0))}
    optimizer = program.optimizer(0.01)

    @jax.jit
    def update(params):
        gradient = jax.grad(lambda p: program.loss(p, batch, jax.random.key(0))[0])(params)
        return optimizer.update(gradient, optimizer.init(params), params)[0]

    both = program.init(0)
    changed = both | {"three heads": program.init(1)["three heads"]}
    found, other = update(both), update(changed)
    jax.tree.map(np.testing.assert_array_equal, found["one head"], other["one head"])
    moved = jax.tree.leaves(found["three heads"]), jax.tree.leaves(other["three heads"])
    assert all(np.any(a != b) for a, b in zip(*moved, strict=True))


def test_bad_words(capsys):
    assert command(EXPERIMENT, ["--methods", "epanecnikov"]) == 2
    assert "unknown name 'epanecnikov'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="head_dim: expected 6 where heads are summed, got 2"):
        MoonsConfig(3, 2, project=False)
    with pytest.raises(ValueError, match="head_dim: rotations take pairs"):
        MoonsConfig(2, 3)
