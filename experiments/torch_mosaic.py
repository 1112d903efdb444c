"""A Memory Mosaic in PyTorch, to be timed beside kreg's: the same maps, as fast as may be there.

Softmax weights go through scaled_dot_product_attention, sparse ones through the entmax package; the
leaky average is summed in chunks. Parameters have the names that `kreg.nn.to_torch` gives them.
Axes: B batch, T time, C width of the stream, N heads, H head width.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any


def _optional(name: str) -> Any:
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


torch: Any = _optional("torch")
entmax: Any = _optional("entmax")
functional: Any = torch and torch.nn.functional
type Tensor = Any

_CHUNK = 32
# Thirty bisections leave 1e-9 of the bracket: more would cost PyTorch time for nothing.
_BISECTIONS = 30
WEIGHTS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "softmax": None,
    "biweight": lambda s: entmax.entmax15(s, dim=-1),
    "epanechnikov": lambda s: entmax.sparsemax(s, dim=-1),
    "triweight": lambda s: entmax.entmax_bisect(s, alpha=4 / 3, dim=-1, n_iter=_BISECTIONS),
}


class Mosaic:
    """Predicts the next token; `method` is one of WEIGHTS."""

    def __init__(self, state: dict[str, Any], layers: int, heads: int, method: str) -> None:
        self.layers, self.heads, self.weights = layers, heads, WEIGHTS[method]
        self.numbers = {name: torch.tensor(x).requires_grad_() for name, x in state.items()}

    def parameters(self) -> list[Tensor]:
        return list(self.numbers.values())

    def logits(self, tokens: Tensor) -> Tensor:
        """Return logits [B, T, V] of tokens [B, T]."""
        table = self.numbers["emb.weight"]
        x = table[tokens]
        for i in range(self.layers):
            x = x + self._contextual(self._norm(x, f"blocks.{i}.ln1"), f"blocks.{i}.attn.")
            x = x + self._persistent(self._norm(x, f"blocks.{i}.ln2"), f"blocks.{i}.pmem.")
        return self._norm(x, "ln_out") @ table.T * table.shape[1] ** -0.5

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(self.logits(tokens).flatten(0, 1), labels.flatten())

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], self.numbers[f"{name}.weight"], eps=1e-5)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _joined(self, x: Tensor, prefix: str) -> Tensor:
        return x.transpose(1, 2).flatten(2) @ self.numbers[f"{prefix}c_proj.weight"].T

    def _keys(self, x: Tensor, prefix: str) -> Tensor:
        """Unit keys [B, N, T, H]; the leaky average's factor 1 - lambda does not reach them."""
        z = self._heads(x @ self.numbers[f"{prefix}k_featurizer.conv.weight"][:, :, 0].T)
        rate = (10 * self.numbers[f"{prefix}leaky_key_beta"]).abs()
        return functional.normalize(decayed_sum(z, rate), dim=-1)

    def _beta(self, prefix: str) -> Tensor:
        return (10 * self.numbers[f"{prefix}kernel_beta"]).clamp(max=5).exp()[:, None, None]

    def _contextual(self, x: Tensor, prefix: str) -> Tensor:
        key = self._keys(x, prefix) * self._beta(prefix)
        w = self._heads(x @ self.numbers[f"{prefix}v_featurizer.linear.weight"].T)
        mix = self.numbers[f"{prefix}v_featurizer.coef"][:, None, None]
        # The last value is seen by nobody.
        value = functional.normalize((1 - mix) * w[:, :, 1:] + mix * w[:, :, :-1], dim=-1)
        value = value * (10 * self.numbers[f"{prefix}value_beta"]).exp()[:, None, None]
        answer = self._attend(key[:, :, 1:], key[:, :, :-1], value)
        return self._joined(functional.pad(answer, (0, 0, 1, 0)), prefix)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attend = functional.scaled_dot_product_attention
        if self.weights is None:
            return attend(query, key, value, is_causal=True, scale=1.0)
        length = query.shape[2]
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = (query @ key.mT).masked_fill(hidden, -torch.inf)
        return self.weights(scores) @ value

    def _persistent(self, x: Tensor, prefix: str) -> Tensor:
        key = self._keys(x, prefix)
        query = (key * self._beta(prefix) ** 2).transpose(0, 1).flatten(1, 2)
        keys, values = (self.numbers[f"{prefix}pmem.M_{name}0"] for name in "kv")
        attend = functional.scaled_dot_product_attention
        answer = attend(query[None], keys, values, scale=1.0)
        answer = answer[0].unflatten(1, (key.shape[0], -1)).transpose(0, 1)
        answer = answer * (10 * self.numbers[f"{prefix}value_beta"]).exp()[:, None, None]
        return self._joined(answer, prefix)


def decayed_sum(z: Tensor, rate: Tensor) -> Tensor:
    """Sum the past of z [B, N, T, H] with weights exp(-rate lag), rate [N]."""
    length = z.shape[2]
    z = functional.pad(z, (0, 0, 0, -length % _CHUNK)).unflatten(2, (-1, _CHUNK))
    position = torch.arange(_CHUNK, dtype=z.dtype)
    lag = position[:, None] - position[None, :]
    local = (-rate[:, None, None] * lag.clamp(min=0)).exp().tril()[:, None] @ z
    # What chunks inherit from the ends of those before.
    chunk = torch.arange(z.shape[2], dtype=z.dtype)
    apart = chunk[:, None] - chunk[None, :] - 1
    across = (-rate[:, None, None] * _CHUNK * apart.clamp(min=0)).exp().tril(-1)
    inherited = across @ local[:, :, :, -1]
    fading = (-rate[:, None] * (position + 1)).exp()[:, None, :, None]
    return (local + fading * inherited[:, :, :, None]).flatten(2, 3)[:, :, :length]
