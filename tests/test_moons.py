"""Three Moons: the data, causality, and a short training by the command itself."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.moons import orbits
from experiments.moons.__main__ import main
from experiments.moons.model import Map, MoonsConfig, MoonsModel, rotations
from experiments.moons.run import PRESETS, Config, clipped_error, findings, make_model, matched


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
    config = Config(length=100, windows=4)
    model = make_model(config, (3, 2))
    wanted = np.roll(np.eye(3), 1, axis=1)
    blocks = jnp.asarray(np.kron(wanted, np.eye(2)), jnp.float32)
    for part, matrix in ((model.keys, blocks), (model.values, blocks), (model.out, blocks.T)):
        assert isinstance(part, Map)
        part.weight[...] = matrix
    found = findings(config, model)
    np.testing.assert_allclose(found["outputs"], wanted)
    np.testing.assert_allclose(found["keys"], wanted)
    assert found["disentanglement"] == 1
    # Three heads need not wait until the whole system has come round.
    assert found["error_after_moons"] < 0.2 * found["error"][1]
    one = findings(config, make_model(config, (1, 6)))
    assert one["disentanglement"] is None and np.shape(one["outputs"]) == (1, 3)
    assert matched(np.full((3, 3), 1 / 3)) == pytest.approx(1 / 3)


def test_errors_are_clipped():
    points = jnp.zeros((1, 3, 2))
    assert float(clipped_error(jnp.full((1, 2, 2), 9.0), points)) == 0.25
    assert float(clipped_error(jnp.full((1, 2, 2), 0.1), points)) == pytest.approx(0.01)


def test_the_command_trains_resumes_and_draws(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    tiny = Config(length=40, batch_size=4, steps=20, windows=4)
    monkeypatch.setitem(PRESETS, "smoke", tiny)
    words = ["--method", "biweight", "--out", str(tmp_path)]
    assert main([*words, "--time-limit", "1e-9"]) == 3
    assert "goes on from there" in capsys.readouterr().err
    assert main(words) == 0
    found = json.loads((tmp_path / "moons.json").read_text())
    assert (tmp_path / "moons.png").stat().st_size > 10_000
    assert found["models"].keys() == {"one head", "three heads"}
    assert len(found["models"]["one head"]["error"]) == tiny.length
    assert np.shape(found["models"]["three heads"]["keys"]) == (3, 3)
    before = findings(tiny, make_model(tiny, (1, 6)))["val_loss"]
    assert found["models"]["one head"]["val_loss"] < before
    # Nothing is left to do, and another method must not write here.
    assert main(words) == 0
    assert json.loads((tmp_path / "moons.json").read_text()) == found
    capsys.readouterr()
    assert main(["--out", str(tmp_path)]) == 2
    assert "method" in capsys.readouterr().err


def test_bad_words(capsys):
    assert main(["--method", "epanecnikov"]) == 2
    assert "unknown name 'epanecnikov'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="head_dim: expected 6 where heads are summed, got 2"):
        MoonsConfig(3, 2, project=False)
    with pytest.raises(ValueError, match="head_dim: rotations take pairs"):
        MoonsConfig(2, 3)
