r"""The paper's Figure 1 and the effective bandwidth, drawn by the library itself.

`python -m experiments.kernel_figures --out runs/figures` writes, as PNG and PDF:

kernels             the kernels as densities in one dimension, and the weight that each attention
                    gives the first of three keys, over the scores [0, u1, u2] (Figure 1 of
                    arXiv 2601.22766)
effective_bandwidth how wide each adaptive kernel is around a query, h(q)^2 = 2 (1 - h^2 t(q)) for
                    unit vectors, as the query moves round a circle of unevenly spread keys
"""

import argparse
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import kreg

_PROFILES = {
    "Gaussian": kreg.gaussian,
    "triweight": kreg.triweight,
    "biweight": kreg.biweight,
    "Epanechnikov": kreg.epanechnikov,
}

_MAPS = {
    "softmax (1-entmax)": kreg.softmax,
    "4/3-entmax": lambda x: kreg.entmax(x, alpha=4 / 3),
    "1.5-entmax": kreg.entmax15,
    "sparsemax (2-entmax)": kreg.sparsemax,
    "top-2 softmax": lambda x: kreg.topk_softmax(x, k=2),
    "top-2 uniform": lambda x: kreg.topk_uniform(x, k=2),
    "normalised ReLU": kreg.normalized_relu,
    "ReLUmax": kreg.relumax,
}

# Colours of Okabe and Ito, told apart by readers with any colour vision.
_COLOURS = ("#000000", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00")


def densities(u: Float[np.ndarray, " n"]) -> dict[str, Float[np.ndarray, " n"]]:
    """Evaluates each kernel at u, normalised to integrate to 1 over the grid; kNN has radius 1."""
    curves = {name: np.asarray(kernel(u)) for name, kernel in _PROFILES.items()}
    inside = np.asarray(kreg.box(u))
    curves["Gaussian kNN"] = curves["Gaussian"] * inside
    curves["uniform kNN"] = inside
    return {name: y / np.trapezoid(y, u) for name, y in curves.items()}


def first_weights(size: int = 161, reach: float = 3.0) -> dict[str, Float[np.ndarray, "n n"]]:
    """Weighs the scores [0, u1, u2] for u1, u2 in [-reach, reach]; returns the weight of the 0."""
    u = jnp.linspace(-reach, reach, size)
    u1, u2 = jnp.meshgrid(u, u)
    scores = jnp.stack([jnp.zeros_like(u1), u1, u2], axis=-1)
    return {name: np.asarray(f(scores)[..., 0]) for name, f in _MAPS.items()}


def effective_bandwidth(
    queries: Float[Array, "T D"], keys: Float[Array, "S D"], kernel: kreg.Kernel, h: float
) -> Float[Array, " T"]:
    r"""Computes the bandwidth $h(q)$ at which $K_r$ is zero, $h(q)^2 = 2 (1 - h^2 t(q))$.

    Queries and keys are unit vectors; t is the adaptive rule's threshold in units of z = q.k / h^2.
    """
    q, k = queries[None, :, None], keys[None, :, None]
    _, stats = kreg.attention(
        q, k, k, kernel=kernel, bandwidth=kreg.Adaptive(h), scale=1.0, return_stats=True
    )
    return jnp.sqrt(2 * (1 - h**2 * stats.threshold[0, :, 0]))


def draw_kernels(plt):
    """Draws Figure 1: densities on the left, weights of the first key on the right."""
    figure = plt.figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.6))
    axes = left.subplots()
    u = np.linspace(-2, 2, 801)
    for (name, y), colour in zip(densities(u).items(), _COLOURS, strict=True):
        axes.plot(u, y, label=name, color=colour, linestyle="--" if "kNN" in name else "-")
    axes.set(xlabel="distance / bandwidth", ylabel="density", title="Kernels")
    axes.legend(frameon=False, fontsize=8)
    grid = right.subplots(2, 4, sharex=True, sharey=True)
    for panel, (name, p) in zip(grid.flat, first_weights().items(), strict=True):
        image = panel.imshow(p, origin="lower", extent=(-3, 3, -3, 3), vmin=0, vmax=1)
        panel.contour(p, levels=[1e-6], colors="white", linewidths=1, extent=(-3, 3, -3, 3))
        panel.set_title(name, fontsize=9)
    right.supxlabel("u1")
    right.supylabel("u2")
    right.suptitle("Weight of the first of the scores [0, u1, u2]; white: where it becomes 0")
    right.colorbar(image, ax=grid, shrink=0.8)
    return figure


def draw_bandwidth(plt, h: float = math.exp(-1)):
    """Draws h(q) round a circle with dense and sparse stretches of keys."""
    angle = jax.random.normal(jax.random.key(0), (48,)) * 0.5
    angle = jnp.concatenate([angle, jnp.linspace(-jnp.pi, jnp.pi, 17)[:-1]])
    around = jnp.linspace(-jnp.pi, jnp.pi, 721)
    point = jax.jit(lambda a: jnp.stack([jnp.cos(a), jnp.sin(a)], axis=-1))
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    names = ("Epanechnikov", "biweight", "triweight")
    for name, colour in zip(names, _COLOURS[1:], strict=False):
        width = effective_bandwidth(point(around), point(angle), _PROFILES[name], h)
        label = f"{name} (alpha = {_PROFILES[name].alpha:.3g})"
        axes.plot(around, width, label=label, color=colour)
    axes.plot(angle, jnp.zeros_like(angle), "|", color="black", markersize=12, label="keys")
    axes.set(
        xlabel="angle of the query",
        ylabel="effective bandwidth h(q)",
        title=f"Adaptive rule, h = {h:.3f}: narrow where keys are dense, wide where they are rare",
    )
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure


def main() -> None:
    """Writes the figures and says where."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/figures"), help="folder to write to")
    out = parser.parse_args().out
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: expected a folder that can be written, got {out} ({error.strerror})")
    for name, draw in (("kernels", draw_kernels), ("effective_bandwidth", draw_bandwidth)):
        figure = draw(plt)
        for suffix in (".png", ".pdf"):
            figure.savefig(out / (name + suffix), dpi=150)
        print(out / f"{name}.png", out / f"{name}.pdf", sep="\n")


if __name__ == "__main__":
    main()
