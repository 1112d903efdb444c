"""What `attention` promises beyond its formula: empty rows, padding, lengths, dropout, memory."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kreg
from experiments.hardware.cell_checks import IMPLEMENTATIONS
from experiments.hardware.findings import Check, Finding, apart, largest, wide
from experiments.hardware.from_tests import load

KERNELS = ("epanechnikov", "biweight", "gaussian")
LENGTHS = (1024, 2048, 4096, 8192)


def promise_checks(*, smoke: bool) -> list[Check]:
    """List the checks that each implementation has to pass, and those between the two."""
    checks = []
    for name in IMPLEMENTATIONS:
        for kernel in KERNELS:
            checks.append(Check(f"empty rows {kernel} {name}", _empty_rows, (kernel, name)))
            checks.append(Check(f"padding {kernel} {name}", _padding, (kernel, name)))
        for length in (63, 130, 257, 300):
            checks.append(Check(f"ragged T={length} {name}", _ragged, (length, name)))
        checks.append(Check(f"flat rows {name}", _flat_rows, (513 if smoke else 65_536, name)))
        checks.append(Check(f"large scores {name}", _large_scores, (name,)))
        checks.append(Check(f"threshold {name}", _certificate, (name,)))
    checks.append(Check("dropout", _dropout))
    checks.append(Check("one compilation", _one_compilation))
    lengths = (128, 256) if smoke else LENGTHS
    return [*checks, Check("memory xla", _memory, (lengths, smoke))]


def _draw(spherical: bool = True, **sizes: int) -> tuple[np.ndarray, ...]:
    inputs = load("attention_inputs")
    return inputs.draw(inputs.Shape(**sizes), spherical=spherical)


def _singles(*arrays: np.ndarray) -> list[jax.Array]:
    return [jnp.asarray(a, "float32") for a in arrays]


def _both(attend: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """Compile a function of query, key, value and cotangent: the output and the gradients."""

    @jax.jit
    def both(query, key, value, cotangent):
        output, pull = jax.vjp(attend, query, key, value)
        return output, pull(cotangent)

    return both


def _empty_rows(kernel: str, implementation: str) -> Iterator[Finding]:
    """Causal with offset -1, and one batch entry masked out: exact zeros."""
    *arrays, cotangent = _draw(B=2, T=17, S=17)
    mask = np.ones((2, 1, 1, 17), bool)
    mask[1] = False

    def attend(query, key, value):
        options = {"is_causal": True, "causal_offset": -1, "implementation": implementation}
        chosen = getattr(kreg, kernel)
        return kreg.attention(query, key, value, mask=jnp.asarray(mask), kernel=chosen, **options)

    output, gradients = _both(attend)(*_singles(*arrays, cotangent))
    # The last key is visible to nobody.
    dead = [output[0, 0], output[1], gradients[0][0, 0], gradients[0][1]]
    dead += [g[0, -1] for g in gradients[1:]] + [g[1] for g in gradients[1:]]
    yield Finding(f"empty rows {kernel} {implementation}: not zero", largest(*dead), 0.0)
    cell = load("cells").Cell(kernel, "adaptive", 1.0)
    want = load("oracle").attention(
        *arrays, mask=mask, order=cell.order, rule=cell.rule, is_causal=True, causal_offset=-1
    )
    bound = load("tolerances").TOLERANCES["float32"].output(
        want.rows.largest_score, largest(arrays[2])
    )  # fmt: skip
    name = f"causal offset -1 {kernel} {implementation}: output"
    yield Finding(name, apart(output, want.output), bound)


def _padding(kernel: str, implementation: str) -> Iterator[Finding]:
    """NaN and inf at keys that nobody may use change no bit of anything."""
    *arrays, cotangent = _draw(B=2, T=9, S=13)
    mask = np.random.default_rng(3).random((2, 1, 9, 13)) < 0.8
    hidden = [0, 5, 12]
    mask[:, :, :, hidden] = False

    def attend(query, key, value):
        chosen = {"kernel": getattr(kreg, kernel), "implementation": implementation}
        return kreg.attention(query, key, value, mask=jnp.asarray(mask), scale=1.0, **chosen)

    both = _both(attend)
    clean = jax.tree.leaves(both(*_singles(*arrays, cotangent)))
    for bad in (np.nan, np.inf):
        dirty = [a.copy() for a in arrays]
        for array in dirty[1:]:
            array[:, hidden] = bad
        leaves = jax.tree.leaves(both(*_singles(*dirty, cotangent)))
        error = largest(*(wide(a) - wide(b) for a, b in zip(leaves, clean, strict=True)))
        yield Finding(f"padding of {bad} {kernel} {implementation}: leaks", error, 0.0)


class _Comparison:
    """Compare outputs in float32 with the oracle's; every call shares one compilation."""

    def __init__(self, kernel: str, implementation: str, **options: Any):
        self.cell, self.options = load("cells").Cell(kernel, "adaptive", 1.0), options
        chosen = {"implementation": implementation, **self.cell.arguments, **options}
        self.attend = jax.jit(functools.partial(kreg.attention, **chosen))

    def __call__(self, name: str, *arrays: np.ndarray) -> Finding:
        output = self.attend(*_singles(*arrays))
        cell = self.cell
        want = load("oracle").attention(*arrays, order=cell.order, rule=cell.rule, **self.options)
        tolerance = load("tolerances").TOLERANCES["float32"]
        bound = tolerance.output(want.rows.largest_score, largest(arrays[2]))
        return Finding(f"{name}: output", apart(output, want.output), bound)


def _ragged(length: int, implementation: str) -> Iterator[Finding]:
    *arrays, _ = _draw(spherical=False, B=2, T=length, S=length, N=2, K=1)
    lengths = {
        "query_seq_lengths": np.array([length, length // 2], np.int32),
        "key_value_seq_lengths": np.array([length - 5, 0], np.int32),
    }
    for title, options in (("causal", {}), ("causal, lengths", lengths)):
        compare = _Comparison("biweight", implementation, is_causal=True, **options)
        yield compare(f"ragged T={length} {title} {implementation}", *arrays)


def _flat_rows(keys: int, implementation: str) -> Iterator[Finding]:
    """Nearly equal scores over many keys: a sum that is off shows in values near 1."""
    rounded = load("attention_inputs").rounded
    query, key, value, _ = _draw(spherical=False, B=1, T=2, S=keys, N=1, K=1, H=2, V=1)
    value = rounded(1 + 0.1 * np.tanh(value), "float32")
    for kernel in ("epanechnikov", "biweight"):
        compare = _Comparison(kernel, implementation)
        for spread in (0.0, 1e-3, 0.1, 1.0):
            name = f"rows of {keys} spread {spread} {kernel} {implementation}"
            yield compare(name, rounded(spread * query, "float32"), key, value)


def _large_scores(implementation: str) -> Iterator[Finding]:
    query, key, value, _ = _draw(spherical=False, B=2, T=9, S=13)
    compare = _Comparison("biweight", implementation)
    for size in (30.0, 1e3, 1e6):
        larger = load("attention_inputs").rounded(size * query, "float32")
        yield compare(f"scores of {size:g} biweight {implementation}", larger, key, value)


def _certificate(implementation: str) -> Iterator[Finding]:
    """The threshold is within its own residual, which says something."""
    *arrays, _ = _draw(spherical=False, B=1, T=65, S=129)
    for kernel in ("epanechnikov", "biweight", "triweight"):
        cell = load("cells").Cell(kernel, "adaptive", 1.0)
        options = {"return_stats": True, "implementation": implementation, **cell.arguments}
        call = jax.jit(functools.partial(kreg.attention, **options))
        _, stats = call(*_singles(*arrays))
        want = load("oracle").attention(*arrays, order=cell.order, rule=cell.rule).rows
        error = np.abs(wide(stats.threshold).swapaxes(1, 2) - want.t[..., 0])
        residual = wide(stats.residual).swapaxes(1, 2)
        name = f"threshold {kernel} {implementation}"
        yield Finding(f"{name}: error over residual", largest(error / residual), 1.0)
        bound = 1e-4 * cell.order**0.5 * (1 + want.largest_score)
        yield Finding(f"{name}: residual", largest(residual), bound)


def _dropout() -> Iterator[Finding]:
    """One mask in every implementation, dropping as often as it was told."""
    query, key, *_ = _draw(spherical=False, B=2, T=40, S=33)
    value = np.broadcast_to(np.eye(33)[:, None, :], (2, 33, 2, 33))
    rate = 0.3

    def weights(implementation: str, rate: float) -> np.ndarray:
        options = {"kernel": kreg.gaussian, "implementation": implementation}
        options |= {"dropout_rate": rate, "dropout_key": jax.random.key(0)}
        call = jax.jit(functools.partial(kreg.attention, **options))
        return wide(call(*_singles(query, key, value)))

    reference, xla = (weights(name, rate) for name in IMPLEMENTATIONS)
    differ = float(((reference != 0) != (xla != 0)).sum())
    yield Finding("dropout: weights dropped by one implementation alone", differ, 0.0)
    whole, kept = weights("reference", 0.0), reference != 0
    error = largest(reference[kept] - whole[kept] / (1 - rate))
    # An eighth of the weights stays below 1/8; the rest is the map's own tolerance, rescaled.
    bound = load("tolerances").TOLERANCES["float32"].output(largest(query) * 8) / (1 - rate)
    yield Finding("dropout: kept weights", error, bound)
    spread = 5 * (rate * (1 - rate) / kept.size) ** 0.5
    yield Finding("dropout: rate", abs(float(kept.mean()) - (1 - rate)), spread)


def _one_compilation() -> Iterator[Finding]:
    """A traced alpha and a traced h compile once for all their values."""
    arrays = _singles(*_draw(B=1, T=5, S=7)[:3])
    for implementation in IMPLEMENTATIONS:
        traces = []

        @jax.jit
        def both(alpha, h, implementation=implementation, traces=traces):
            traces.append(implementation)

            def attend(alpha, h):
                kernel, rule = kreg.Kernel.from_alpha(alpha), kreg.Adaptive(h)
                options = {"kernel": kernel, "bandwidth": rule, "implementation": implementation}
                output: Any = kreg.attention(*arrays, **options)
                return output.sum()

            return jax.value_and_grad(attend, (0, 1))(alpha, h)

        finite = True
        for alpha, h in ((1.0, 1.0), (1.0001, 0.7), (1.5, 0.5), (2.0, 1.1), (2.5, 2.0)):
            found = jax.tree.leaves(both(jnp.float32(alpha), jnp.float32(h)))
            finite &= all(bool(jnp.isfinite(leaf)) for leaf in found)
        name = f"one compilation for all alpha and h {implementation}"
        yield Finding(f"{name}: traces", float(len(traces)), 1.0)
        yield Finding(f"{name}: values not finite", float(not finite), 0.0)


def _memory(lengths: tuple[int, ...], smoke: bool) -> Iterator[Finding]:
    """Twice the length, at most 2.2 times the temporary memory; a quadratic term tends to 4."""

    def attend(query, key, value):
        return kreg.attention(query, key, value, is_causal=True, implementation="xla")

    def vjp(*arrays):
        output, pull = jax.vjp(attend, *arrays)
        return pull(output)

    def jvp(*arrays):
        return jax.jvp(attend, arrays, arrays)

    for name, call in (("forward", attend), ("vjp", vjp), ("jvp", jvp)):
        sizes = []
        for length in lengths:
            shape = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
            compiled = jax.jit(call).lower(shape, shape, shape).compile()
            if (analysis := compiled.memory_analysis()) is None:
                raise NotImplementedError("this device does not tell what memory programs take")
            sizes.append(analysis.temp_size_in_bytes)
        growth = max(b / max(a, 1) for a, b in itertools.pairwise(sizes))
        # In tiny sizes a block is the whole length.
        yield Finding(f"memory xla {name}: growth", growth, 4.5 if smoke else 2.2)
