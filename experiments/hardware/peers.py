"""Attention of others on the same tensors: FlashAttention-2 as PyTorch has it, AdaSplash-2."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import jax

from experiments.hardware.report import one_line
from experiments.hardware.stopwatch import Entry


def peers(inputs: list[jax.Array], backward: bool) -> list[Entry]:
    """Make an entry for each, ready to be timed, or saying why not."""
    return [
        _entry("flash-attention 2", "torch", _flash, inputs, backward),
        _entry("adasplash 2", "adasplash", _adasplash, inputs, backward),
    ]


def _entry(name: str, package: str, make: Callable, inputs, backward: bool) -> Entry:
    entry = Entry(name)
    if importlib.util.find_spec(package) is None:
        entry.unavailable = f"{package} is not installed"
        return entry
    try:
        entry.call = _timed(make(), inputs, backward)
    # A peer that does not run here says so in its own way.
    except Exception as error:
        entry.unavailable = one_line(error)
    return entry


def _timed(attention: Callable, inputs: list[jax.Array], backward: bool) -> Callable[..., Any]:
    """A call that waits for the device, as blocking on JAX's arrays does."""
    torch: Any = importlib.import_module("torch")
    # [B, T, N, H] is [B, N, T, H] there.
    tensors = [torch.from_dlpack(x).transpose(1, 2).contiguous() for x in inputs]
    arrays = [x.requires_grad_(backward) for x in tensors[:3]]

    def call(*_):
        output = attention(*arrays)
        if backward:
            torch.autograd.grad(output, arrays, tensors[3])
        torch.cuda.synchronize()

    return call


def _flash() -> Callable:
    torch: Any = importlib.import_module("torch")
    backends: Any = importlib.import_module("torch.nn.attention")

    def attend(query, key, value):
        with backends.sdpa_kernel(backends.SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True
            )

    return attend


def _adasplash() -> Callable:
    attend: Any = importlib.import_module("adasplash").adasplash
    return lambda query, key, value: attend(query, key, value, alpha=1.5, is_causal=True)
