"""The figures' numbers: peak heights of Figure 1, supports, and h(q) against its definition."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kreg
from experiments.kernel_figures import densities, effective_bandwidth, first_weights, main


def test_peaks_are_those_of_figure_1():
    u = np.linspace(-2, 2, 4001)
    # 35/32, 15/16, 3/4, 1/2 by integration; the Gaussians cut at 2 and at 1 by the normal table.
    expected = {
        "Gaussian": 0.39894 / 0.95450,
        "triweight": 35 / 32,
        "biweight": 15 / 16,
        "Epanechnikov": 3 / 4,
        "Gaussian kNN": 0.39894 / 0.68269,
        "uniform kNN": 1 / 2,
    }
    peaks = {name: y.max() for name, y in densities(u).items()}
    assert peaks == pytest.approx(expected, rel=1e-3)


def test_sparse_maps_have_a_zero_region_and_softmax_has_none():
    weights = first_weights(size=21, reach=4.0)
    assert (weights["softmax (1-entmax)"] > 0).all()
    for name in ("4/3-entmax", "1.5-entmax", "sparsemax (2-entmax)", "ReLUmax"):
        assert (weights[name] == 0).any(), name
    zeros = [np.sum(weights[n] == 0) for n in ("4/3-entmax", "1.5-entmax", "sparsemax (2-entmax)")]
    assert zeros == sorted(zeros)


@pytest.mark.parametrize("kernel", [kreg.epanechnikov, kreg.biweight, kreg.triweight])
def test_effective_bandwidth_prescribes_the_unnormalised_sum(kernel):
    """sum_i K_r(|q - k_i| / h(q)) = (2 r / (theta h(q)^2))^r with theta = 1 / h^2."""
    points = jax.random.normal(jax.random.key(1), (40, 5))
    points /= jnp.linalg.norm(points, axis=-1, keepdims=True)
    queries, keys, h, r = points[:8], points[8:], 0.6, kernel.order
    width = effective_bandwidth(queries, keys, kernel, h)
    distance = jnp.linalg.norm(queries[:, None] - keys[None], axis=-1)
    total = jnp.sum(kernel(distance / width[:, None]), axis=-1)
    np.testing.assert_allclose(total, (2 * r * h**2 / width**2) ** r, rtol=2e-5)


@pytest.mark.nightly
def test_the_command_writes_both_figures_and_refuses_a_file_as_folder(
    tmp_path, monkeypatch, capsys
):
    pytest.importorskip("matplotlib")

    def command(out):
        monkeypatch.setattr(sys, "argv", ["kernel_figures", "--out", str(out)])
        main()

    command(tmp_path / "figures")
    written = sorted(path.name for path in (tmp_path / "figures").iterdir())
    names = ("effective_bandwidth", "kernels")
    assert written == sorted(f"{name}.{kind}" for name in names for kind in ("pdf", "png"))
    (tmp_path / "file").write_text("kept")
    with pytest.raises(SystemExit) as failed:
        command(tmp_path / "file" / "below")
    assert failed.value.code == 2 and "--out" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"
