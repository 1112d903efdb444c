"""Language models: the model of a method, its windows and its judges."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, PyTree

from experiments import supports, text
from experiments.language import corpus
from experiments.language.config import Config, Sizes, Training
from experiments.language.models import make_model
from experiments.language.objective import (
    blank,
    by_position,
    edges,
    held_out,
    make_loss,
    make_measure,
    summary,
)
from experiments.runs.experiment import DataError
from experiments.runs.task import Program, Task, devices_of, layout_of, matrix_decay, operations
from kreg.sharding import Layout
from kreg.training import batches, decay_matrices
from kreg.training.data import Batch, BatchIterator, Source
from kreg.training.optimizer import names
from kreg.training.writer import fetch


@dataclass(frozen=True, eq=False)
class Data:
    """The tokens, and the rows of the validation set."""

    corpus: text.Corpus
    block: int
    packed: bool
    batch_size: int
    ngrams: tuple[int, ...]

    @property
    def validation(self) -> text.Tokens:
        return self.corpus.validation

    @cached_property
    def rows(self) -> Source:
        """Rows in which every token of the validation set is a label once."""
        if self.packed:
            return text.PackedDocuments(self.validation, self.block)
        return text.EvaluationWindows(self.validation, self.block)

    @cached_property
    def training_rows(self) -> text.PackedDocuments:
        """The packed documents to learn from."""
        return text.PackedDocuments(self.corpus.train, self.block)

    def held_out(self) -> Iterator[Batch]:
        return held_out(self.rows, self.batch_size, self.validation.end)

    def judged(self, nats: float, tokens: int) -> dict[str, Any]:
        return summary(nats, tokens, self.validation.text_bytes)


def _load(config: Config) -> Data:
    found = corpus.tokens(config.tokens, config.dataset(), config.text.tokenizer)
    block, packed = config.text.block, config.text.windows == "packed"
    if not packed and len(found.train) <= block:
        raise DataError(
            f"--text.block: expected less than the {len(found.train):,} tokens of the training "
            f"set, got {block}"
        )
    return Data(found, block, packed, config.training.batch_size, config.text.ngrams)


def _describe(config: Config, data: Data) -> tuple[dict[str, Any], str]:
    parts = {"train": data.corpus.train, "validation": data.validation}
    facts = {
        name: {"documents": p.documents, "tokens": len(p), "text_bytes": p.text_bytes}
        for name, p in parts.items()
    } | {"vocab_size": data.validation.vocab_size}
    told = (f"{len(p):,} tokens of {p.documents:,} documents" for p in parts.values())
    return facts, " to learn from, ".join(told) + " to validate on"


def _baselines(data: Data) -> dict[str, dict[str, Any]]:
    """Score the n-grams on the same tokens, with the documents apart where a model has them so."""
    found = {}
    for order in data.ngrams:
        model = text.KneserNey.fit(data.corpus.train, order=order, across_documents=not data.packed)
        score = model.score(data.validation)
        found[f"Kneser-Ney {order}-gram"] = data.judged(score.nats, score.tokens)
    return found


def _build(config: Config, name: str) -> Program:
    vocab_size = text.TOKENIZERS[config.text.tokenizer].vocab_size
    # The learning rate is the optimizer's argument, the evaluations are the loop's.
    training = (config.training, config.text.block, vocab_size)
    return _program(config.model, name, config.sizes, config.compat, layout_of(config), *training)


@functools.cache
def _program(
    kind: str,
    name: str,
    sizes: Sizes,
    compat: str | None,
    layout: Layout | None,
    training: Training,
    block: int,
    vocab_size: int,
) -> Program:
    def model(seed: int):
        options: dict[str, Any] = {"vocab_size": vocab_size, "block": block, "compat": compat}
        return make_model(kind, name, sizes, seed=seed, layout=layout, **options)

    graph, _ = nnx.split(nnx.eval_shape(lambda: model(0)), nnx.Param)
    narrow = functools.partial(_cast, dtype=jnp.dtype(training.dtype))

    def apply(params, tokens, segment_ids, key):
        built = nnx.merge(graph, narrow(params))
        return built(tokens, segment_ids=segment_ids, dropout_key=key)

    measure = make_measure(apply)

    @jax.jit
    def count(params, batch: dict[str, Array]) -> supports.Counts:
        built = nnx.merge(graph, narrow(params))
        # All positions of the rows that are not there to fill the batch.
        given = jnp.any(batch["labels"] != text.IGNORED_LABEL, axis=1, keepdims=True)
        inside = jnp.broadcast_to(given, batch["labels"].shape)
        return supports.count(built, batch["tokens"], batch.get("segment_ids"), inside)

    def init(seed: int) -> PyTree[Array]:
        return nnx.to_pure_dict(nnx.state(model(seed), nnx.Param))

    def optimizer(rate):
        return matrix_decay(training, rate, accumulate=training.accumulate)

    def validate(params: PyTree[Array], data: Data) -> dict[str, float]:
        found = by_position(measure, params, data.held_out())
        judged = data.judged(float(found.sums.sum()), int(found.counts.sum()))
        return {name: judged[name] for name in ("loss", "bits_per_byte")}

    def test(params: PyTree[Array], data: Data) -> dict[str, Any]:
        found = by_position(measure, params, data.held_out())
        # A short validation set does not reach far.
        reached = int(np.flatnonzero(found.counts).max()) + 1
        bins = edges(reached)
        return (
            data.judged(float(found.sums.sum()), int(found.counts.sum()))
            | {
                "edges": bins,
                "by_position": found.binned(bins).tolist(),
            }
            | _support(count, params, data)
        )

    return Program(init, make_loss(apply), optimizer, validate, test)


def _cast(params: PyTree[Array], dtype: jnp.dtype) -> PyTree[Array]:
    """Narrow the matrices, which is what decays."""
    if dtype == jnp.float32:
        return params
    matrix = decay_matrices()
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.astype(dtype) if matrix(names(path), leaf) else leaf, params
    )


def _support(count: Any, params: PyTree[Array], data: Data) -> dict[str, Any]:
    """Average the support over the first rows; [] where a method has none."""
    rows = [data.rows[index] for index in range(min(supports.ROWS, len(data.rows)))]
    batches = held_out(rows, data.batch_size, data.validation.end)
    try:
        found = [fetch(count(params, batch)) for batch in batches]
    except NotImplementedError:
        return {"support": []}
    return supports.summary(found)


def _batches(config: Config, data: Data, seed: int) -> BatchIterator:
    size, devices = config.training.batch_size, devices_of(config)
    if data.packed:
        empty = functools.partial(blank, end=data.validation.end)
        return batches(data.training_rows, size, seed=seed, blank=empty, devices=devices)
    rows = text.RandomWindows(data.corpus.train, data.block, rows=config.steps * size, seed=seed)
    return batches(rows, size, seed=seed, shuffle=False, devices=devices)


def _tokens_per_batch(config: Config, data: Data) -> int:
    positions = config.training.batch_size * data.block
    if not data.packed:
        return positions
    rows = len(data.training_rows)
    return round(len(data.corpus.train) / -(-rows // config.training.batch_size))


def _operations(config: Config, data: Data, parameters: int) -> float:
    return operations(
        parameters,
        layers=config.sizes.layers,
        width=config.sizes.width,
        batch=config.training.batch_size,
        length=data.block,
    )


TASK = Task(
    load=_load,
    describe=_describe,
    baselines=_baselines,
    build=_build,
    batches=_batches,
    tokens_per_batch=_tokens_per_batch,
    operations=_operations,
)
