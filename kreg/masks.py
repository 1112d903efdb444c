"""Which keys each query may see: ranges, diagonals, segments; an array only where one came."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int

from kreg.shapes import broadcasts_to

type Diagonal = int | Int[Array, " #B"] | None


@jax.tree_util.register_pytree_node_class
class Mask:
    r"""Admits key j to query i where every part that is given says so.

    Parts take memory linear in length; nothing of size T S is formed but `array`, where the caller
    brings one. `a & b` admits what both admit. B batch, N heads, T queries, S keys; arrays may have
    size 1 along any axis.

    Args:
        array: boolean, at most [B, N, T, S]; True takes part.
        key_start: query i sees keys from key_start[i] on; number, [T] or [B, T].
        key_stop: and before key_stop[i].
        query_start: key j is seen by queries from query_start[j] on; number, [S] or [B, S].
        query_stop: and before query_stop[j].
        segment_ids: queries see keys of their own segment; [B, T] or [T] when T == S, or a pair.
        is_causal: key j is visible to query i when j <= i + causal_offset.
        causal_offset: number, or one a batch entry.
        local_window_size: how far before and after i + causal_offset a query sees; number or pair.
        query_seq_lengths: [B]; queries from this index on see nothing.
        key_value_seq_lengths: [B]; keys from this index on are invisible.

    Examples:
        >>> import kreg
        >>> causal = kreg.Mask(is_causal=True)
        >>> (causal & kreg.Mask(local_window_size=1)).dense(3, 3)[0, 0].astype(int).tolist()
        [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """

    array: Bool[Array, "#B #N #T #S"] | None
    key_start: Int[Array, "#B #T"] | None
    key_stop: Int[Array, "#B #T"] | None
    query_start: Int[Array, "#B #S"] | None
    query_stop: Int[Array, "#B #S"] | None
    segments: tuple[tuple[Int[Array, "#B T"], Int[Array, "#B S"]], ...]
    # Key j is admissible to query i when lower <= j - i <= upper; static where Python numbers.
    lower: Diagonal
    upper: Diagonal

    def __init__(
        self,
        array: ArrayLike | None = None,
        *,
        key_start: ArrayLike | None = None,
        key_stop: ArrayLike | None = None,
        query_start: ArrayLike | None = None,
        query_stop: ArrayLike | None = None,
        segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
        is_causal: bool = False,
        causal_offset: int | Int[Array, " B"] = 0,
        local_window_size: int | tuple[int, int] | None = None,
        query_seq_lengths: Int[Array, " B"] | None = None,
        key_value_seq_lengths: Int[Array, " B"] | None = None,
    ):
        offset = _offset(causal_offset)
        if not is_causal and isinstance(offset, int) and offset:
            raise ValueError(f"causal_offset: expected 0 without is_causal, got {offset}")
        self.array = None if array is None else _array(array)
        self.key_start = _range("key_start", key_start)
        self.key_stop = _range("key_stop", key_stop)
        self.query_start = _range("query_start", query_start)
        self.query_stop = _range("query_stop", query_stop)
        self.segments = () if segment_ids is None else (_segments(segment_ids),)
        self.lower, self.upper = None, offset if is_causal else None
        window = _window(local_window_size)
        if window is not None:
            self.lower = offset - window[0]
            self.upper = _meet(self.upper, offset + window[1], min)
        self.key_stop = _meet(
            self.key_stop, _lengths("key_value_seq_lengths", key_value_seq_lengths), min
        )
        self.query_stop = _meet(
            self.query_stop, _lengths("query_seq_lengths", query_seq_lengths), min
        )

    def __and__(self, other: "Mask") -> "Mask":
        if not isinstance(other, Mask):
            return NotImplemented
        both = _bare()
        both.array = _meet(self.array, other.array, jnp.logical_and)
        both.segments = self.segments + other.segments
        for name, meet in _RANGES.items():
            setattr(both, name, _meet(getattr(self, name), getattr(other, name), meet))
        return both

    def __repr__(self) -> str:
        parts = {name: getattr(self, name) for name in ("array", *_RANGES, "segments")}
        given = [
            f"{k}={v!r}" for k, v in parts.items() if not (v is None or (k == "segments" and not v))
        ]
        return f"Mask({', '.join(given)})"

    @property
    def is_static(self) -> bool:
        """True where diagonals known when the function is traced say everything."""
        return not jax.tree.leaves(self)

    def dense(self, queries: int, keys: int) -> Bool[Array, "#B #N T S"]:
        """Forms the boolean array."""
        return self.admissible(jnp.arange(queries), jnp.arange(keys))

    def admissible(
        self, rows: Int[Array, " T"], columns: Int[Array, " S"]
    ) -> Bool[Array, "#B #N T S"]:
        """Forms the boolean array of the queries and keys with the given indices.

        The mask's own arrays must have been cut to these rows and columns already.
        """
        i, j = rows[None, :, None], columns[None, None, :]
        where = jnp.ones((1, rows.shape[0], columns.shape[0]), bool)
        if self.lower is not None:
            where &= j - i >= _stand(self.lower)
        if self.upper is not None:
            where &= j - i <= _stand(self.upper)
        if self.key_start is not None:
            where &= j >= self.key_start[:, :, None]
        if self.key_stop is not None:
            where &= j < self.key_stop[:, :, None]
        if self.query_start is not None:
            where &= i >= self.query_start[:, None, :]
        if self.query_stop is not None:
            where &= i < self.query_stop[:, None, :]
        for of_queries, of_keys in self.segments:
            where &= of_queries[:, :, None] == of_keys[:, None, :]
        where = where[:, None]
        return where if self.array is None else where & self.array

    def seen_from(self, row: int | Array, column: int | Array) -> "Mask":
        """The mask of a part of the queries and keys, whose first ones had these numbers.

        Its arrays must have been cut to the part already.
        """
        if isinstance(row, int) and isinstance(column, int) and row == column == 0:
            return self
        moved = _bare()
        moved.array, moved.segments = self.array, self.segments
        by = {"key": -column, "query": -row, "lower": row - column, "upper": row - column}
        for name in _RANGES:
            value = getattr(self, name)
            if value is not None:
                # What says "no limit" by the greatest of integers still does when it has moved.
                value = jnp.clip(jnp.asarray(value), -_FAR, _FAR) + by[name.split("_")[0]]
                value = _offset(value) if name in ("lower", "upper") else value
            setattr(moved, name, value)
        return moved

    def tiles(self, queries: int, keys: int, rows: int, columns: int) -> Int[Array, "#B #N I J"]:
        """Tells of each tile of rows x columns what is proven: 0 empty, 2 full; 1 is not known.

        Takes memory linear in length and in the number of tiles, but for `array`.
        """
        i, j = np.arange(0, queries, rows), np.arange(0, keys, columns)
        last_i, last_j = np.minimum(i + rows, queries) - 1, np.minimum(j + columns, keys) - 1
        i, last_i = i[None, :, None], last_i[None, :, None]
        j, last_j = j[None, None, :], last_j[None, None, :]
        full = jnp.ones((1, i.size, j.size), bool)
        empty = ~full
        if self.lower is not None:
            empty |= last_j - i < _stand(self.lower)
            full &= j - last_i >= _stand(self.lower)
        if self.upper is not None:
            empty |= j - last_i > _stand(self.upper)
            full &= last_j - i <= _stand(self.upper)
        if self.key_start is not None:
            least, most = _extent(self.key_start, rows)
            empty, full = empty | (last_j < least[..., None]), full & (j >= most[..., None])
        if self.key_stop is not None:
            least, most = _extent(self.key_stop, rows)
            empty, full = empty | (j >= most[..., None]), full & (last_j < least[..., None])
        if self.query_start is not None:
            least, most = _extent(self.query_start, columns)
            empty, full = empty | (last_i < least[:, None]), full & (i >= most[:, None])
        if self.query_stop is not None:
            least, most = _extent(self.query_stop, columns)
            empty, full = empty | (i >= most[:, None]), full & (last_i < least[:, None])
        for of_queries, of_keys in self.segments:
            first, last = (x[..., None] for x in _extent(of_queries, rows))
            least, most = (x[:, None] for x in _extent(of_keys, columns))
            empty |= (last < least) | (most < first)
            full &= (first == last) & (least == most) & (first == least)
        empty, full = empty[:, None], full[:, None]
        if self.array is not None:
            some, every = _any_and_all(self.array, rows, columns)
            empty, full = empty | ~some, full & every
        return jnp.where(empty, 0, jnp.where(full, 2, 1)).astype(jnp.int8)

    def axes(self) -> Any:
        """Names the axes of every array, in a tree of the mask's structure."""
        names = {
            "array": "bnts", "key_start": "bt", "key_stop": "bt", "query_start": "bs",
            "query_stop": "bs", "lower": "b", "upper": "b",
        }  # fmt: skip
        mask: Any = _bare()
        for name, axes in names.items():
            value = getattr(self, name)
            setattr(mask, name, value if value is None or isinstance(value, int) else axes)
        mask.segments = tuple(("bt", "bs") for _ in self.segments)
        return mask

    def check(self, batch: int, heads: int, queries: int, keys: int) -> None:
        """Raises ValueError where a part does not fit the shapes of the queries and keys."""
        sizes = {"b": batch, "n": heads, "t": queries, "s": keys}
        parts = {name: getattr(self, name) for name in ("array", *_RANGES)}
        axes = self.axes()
        for name, part in parts.items():
            if part is not None and not isinstance(part, int):
                _check_shape("mask" if name == "array" else name, part, getattr(axes, name), sizes)
        for of_queries, of_keys in self.segments:
            given = of_queries.shape, of_keys.shape
            wanted = (queries, keys)
            if any(
                shape[0] not in (1, batch) or shape[1] != size
                for shape, size in zip(given, wanted, strict=True)
            ):
                raise ValueError(
                    f"segment_ids: expected [B, T] = {[batch, queries]} (T == S), or a pair of it "
                    f"and [B, S] = {[batch, keys]}, got shapes {given[0]} and {given[1]}"
                )

    def tree_flatten(self):
        values = {name: getattr(self, name) for name in _RANGES}
        # Leaves may be anything while JAX transforms a tree, booleans too.
        static = tuple((k, v) for k, v in values.items() if type(v) is int)
        arrays = {k: None if type(v) is int else v for k, v in values.items()}
        return (self.array, tuple(arrays.values()), self.segments), static

    @classmethod
    def tree_unflatten(cls, static: tuple, children: tuple) -> "Mask":
        mask = _bare()
        mask.array, ranges, mask.segments = children
        for name, value in zip(_RANGES, ranges, strict=True):
            setattr(mask, name, value)
        for name, value in static:
            setattr(mask, name, value)
        return mask


# Further than any query is from any key.
_FAR = 2**30
_RANGES = {
    "key_start": jnp.maximum,
    "key_stop": jnp.minimum,
    "query_start": jnp.maximum,
    "query_stop": jnp.minimum,
    "lower": max,
    "upper": min,
}


def _bare() -> Mask:
    return object.__new__(Mask)


def _meet(a: Any, b: Any, meet) -> Any:
    """Joins two parts of a mask, either of which may be absent or a Python number."""
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, int) and isinstance(b, int):
        return meet(a, b)
    return {max: jnp.maximum, min: jnp.minimum}.get(meet, meet)(a, b)


def _stand(diagonal: int | Int[Array, " #B"]):
    return diagonal if isinstance(diagonal, int) else diagonal[:, None, None]


def _extent(x: Int[Array, "#B #L"], block: int) -> tuple[Array, Array]:
    """Finds least and greatest of each block of the last axis; of all where its size is 1."""
    if x.shape[-1] == 1:
        return x, x
    pad = -x.shape[-1] % block
    x = jnp.pad(x, ((0, 0), (0, pad)), mode="edge").reshape(x.shape[0], -1, block)
    return jnp.min(x, axis=-1), jnp.max(x, axis=-1)


def _any_and_all(array: Bool[Array, "#B #N #T #S"], rows: int, columns: int):
    """Tells of each tile of the array whether some and whether all of its entries are True."""
    batch, heads, queries, keys = array.shape
    rows, columns = 1 if queries == 1 else rows, 1 if keys == 1 else columns
    pad = ((0, 0), (0, 0), (0, -queries % rows), (0, -keys % columns))
    shape = (batch, heads, -(-queries // rows), rows, -(-keys // columns), columns)
    some = jnp.pad(array, pad, constant_values=False).reshape(shape)
    every = jnp.pad(array, pad, constant_values=True).reshape(shape)
    return jnp.any(some, axis=(3, 5)), jnp.all(every, axis=(3, 5))


def _array(array) -> Bool[Array, "..."]:
    array = jnp.asarray(array)
    if array.dtype != bool:
        raise ValueError(f"mask: expected bool, got {array.dtype}")
    if array.ndim > 4:
        raise ValueError(f"mask: expected at most [B, N, T, S], got shape {array.shape}")
    return array.reshape((1,) * (4 - array.ndim) + array.shape)


def _range(name: str, x) -> Int[Array, "..."] | None:
    if x is None:
        return None
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer) or x.ndim > 2:
        raise ValueError(
            f"{name}: expected integers of at most two axes, got {x.dtype} of shape {x.shape}"
        )
    return x.reshape((1,) * (2 - x.ndim) + x.shape)


def _lengths(name: str, x) -> Int[Array, "B 1"] | None:
    if x is None:
        return None
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer) or x.ndim > 1:
        raise ValueError(
            f"{name}: expected integers of shape [B], got {x.dtype} of shape {x.shape}"
        )
    return x.reshape(-1, 1)


def _segments(ids) -> tuple[Int[Array, "#B T"], Int[Array, "#B S"]]:
    pair = ids if isinstance(ids, tuple) else (ids, ids)
    if len(pair) != 2:
        raise ValueError(f"segment_ids: expected an array or a pair of arrays, got {len(pair)}")
    return _ids(pair[0]), _ids(pair[1])


def _ids(x) -> Int[Array, "#B L"]:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer) or x.ndim not in (1, 2):
        raise ValueError(
            f"segment_ids: expected integers of shape [T] or [B, T], "
            f"got {x.dtype} of shape {x.shape}"
        )
    return x[None] if x.ndim == 1 else x


def _offset(offset) -> int | Int[Array, " #B"]:
    if isinstance(offset, (int, np.integer)) and not isinstance(offset, bool):
        return int(offset)
    offset = jnp.asarray(offset)
    if not jnp.issubdtype(offset.dtype, jnp.integer) or offset.ndim > 1:
        raise ValueError(
            f"causal_offset: expected an integer or integers of shape [B], "
            f"got {offset.dtype} of shape {offset.shape}"
        )
    return offset.reshape(-1)


def _window(size) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, (int, np.integer)) else tuple(size)
    if len(pair) != 2 or any(not isinstance(x, (int, np.integer)) or x < 0 for x in pair):
        raise ValueError(
            f"local_window_size: expected an integer >= 0 or a pair (before, after), got {size!r}"
        )
    return int(pair[0]), int(pair[1])


def _check_shape(name: str, part, axes: str, sizes: dict[str, int]) -> None:
    full = tuple(sizes[axis] for axis in axes)
    if not broadcasts_to(part.shape, full):
        wanted = ", ".join(axis.upper() for axis in axes)
        raise ValueError(
            f"{name}: expected a shape that broadcasts to [{wanted}] = {list(full)}, "
            f"got {part.shape}"
        )
