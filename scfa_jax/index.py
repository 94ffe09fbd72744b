"""Which keys each query attends to, as one contiguous range of codes: what every pattern is made into.

Every key has an int32 code, keys stand in ascending order of code, and a query attends exactly to the keys with
`low <= code <= high`. A key that nobody may attend to has the code `NEVER`, which no `high` reaches. A query that
attends to nothing has `low > high`. Several indices, if no pair is in two of them, make a pattern together.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from scfa_jax import _bounds, _partitioning
from scfa_jax._bounds import NEVER as NEVER
from scfa_jax._bounds import align_heads

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SparseIndex:
    """The range of keys of every query, with the orders that make the ranges contiguous: a pytree.

    The axes `B`, `N` and `K` may be smaller than those of the attention call: 1, or a divisor of the number of
    heads, in which case consecutive heads share an entry.

    Attributes:
        key_order: int32 `[B, K, S]`, the original row of each key in code order; None if it is the identity.
        key_code: int32 `[B, K, S]`, ascending.
        query_order: int32 `[B, N, T * slots]`, the original row of each query as tiled; None if it is the identity.
            With several slots it is `row * slots + slot`.
        low: int32 `[B, N, T * slots]`, the first code that each query (in query order) attends to; ascending.
        high: int32 `[B, N, T * slots]`, the last code, inclusive.
        ascending: Whether `high` ascends too, so that the ends of a tile bound all of it. Static.
        all_met: Whether every key that no query attends to is known to have the code `NEVER`. Static.
        density: Share of the causal pairs that are allowed, roughly: a hint for the choice of tile sizes. Static.
        sign: 1, or -1 if these pairs are to be taken away from those of the other indices in a list, each of which
            must be in one more of them. Several rounds of hashing make such lists. Static.
        slots: How many ranges each query has, no two of which overlap. Static.

    Examples:
        >>> import numpy as np, scfa_jax
        >>> index = scfa_jax.hash_index(np.array([[[1], [0], [1], [1]]], np.int32), num_buckets=2)
        >>> index.key_order[0, 0].tolist()  # bucket 0, then bucket 1
        [1, 0, 2, 3]
        >>> index.key_code[0, 0].tolist()  # bucket * length + position
        [1, 4, 6, 7]
        >>> index.low[0, 0].tolist(), index.high[0, 0].tolist()
        ([0, 4, 4, 4], [1, 4, 6, 7])
    """

    key_order: jax.Array | None
    key_code: jax.Array
    query_order: jax.Array | None
    low: jax.Array
    high: jax.Array
    ascending: bool = dataclasses.field(default=True, metadata={"static": True})
    all_met: bool = dataclasses.field(default=False, metadata={"static": True})
    density: float = dataclasses.field(default=0.1, metadata={"static": True})
    sign: Literal[1, -1] = dataclasses.field(default=1, metadata={"static": True})
    slots: int = dataclasses.field(default=1, metadata={"static": True})

    @property
    def query_length(self) -> int:
        """Number of queries `T`."""
        return self.low.shape[-1] // self.slots

    @property
    def key_length(self) -> int:
        """Number of keys `S`."""
        return self.key_code.shape[-1]

    @property
    def ranges(self) -> _bounds.Ranges:
        """The arrays that bounds of tiles come from."""
        return _bounds.Ranges(self.low, self.high, self.key_code, self.ascending)

    @jax.jit
    def mask(self) -> Bool[Array, "B N T S"]:
        """Says the pattern densely, for tests and pictures. Memory grows with `T * S`.

        Returns:
            True where a query attends to a key, rows and columns in their original order. `B` and `N` are as small as
            the index has them.
        """
        low, high, code = _original_ranges(self)
        return _meetings(low[..., None, :], high[..., None, :], code[..., None, :, None]) > 0

    @jax.jit
    def pairs(self) -> Float[Array, "B N"]:
        """Counts the pairs of a query and a key that the pattern allows, in time that grows with `T * log(S)`.

        Returns:
            float32, a number for each batch element and head that the index tells apart.
        """
        low, high, code = align_heads(self.low, self.high, self.key_code)
        rank = jnp.vectorize(
            lambda code, x, side: jnp.searchsorted(code, x, side=side),
            signature="(s),(t)->(t)",
            excluded=("side",),
        )
        counts = rank(code, high, side="right") - rank(code, low, side="left")
        return jnp.maximum(counts, 0).astype(jnp.float32).sum(-1)

    @functools.partial(jax.jit, static_argnames=("block_q", "block_k"))
    def stats(self, block_q: int = 64, block_k: int = 64) -> dict[str, Int[Array, "B N"] | Float[Array, "B N"]]:
        """Counts the tiles that a forward pass visits and the pairs it needs.

        Args:
            block_q: Queries in a tile.
            block_k: Keys in a tile.

        Returns:
            Numbers for each batch element and head that the index tells apart: int32 `tiles` visited, `full` ones
            that need no mask, `edge` ones that do, `total` tiles of all ranges and keys, and float32 `pairs` allowed.

        Examples:
            >>> import numpy as np, scfa_jax
            >>> index = scfa_jax.hash_index(np.arange(256, dtype=np.int32)[:, None] % 4, num_buckets=4)
            >>> stats = index.stats(block_q=64, block_k=64)
            >>> int(stats["tiles"][0, 0]), int(stats["total"][0, 0]), int(stats["pairs"][0, 0])
            (4, 16, 8320)
        """
        bounds = _bounds.key_tile_bounds(self.ranges, block_q, block_k)
        start, full_start, full_stop, stop = (bounds[..., i] for i in range(4))
        visited = (stop - start).sum(-1)
        full = (full_stop - full_start).sum(-1)
        total = _bounds.num_tiles(self.low.shape[-1], block_q) * _bounds.num_tiles(self.key_length, block_k)
        return {
            "tiles": visited,
            "full": full,
            "edge": visited - full,
            "total": jnp.full_like(visited, total),
            "pairs": self.pairs(),
        }


Indices: TypeAlias = SparseIndex | Sequence[SparseIndex]


def as_list(index: Indices) -> list[SparseIndex]:
    """The indices of a pattern, which may be one.

    Args:
        index: What an operator was given.

    Returns:
        A list of at least one.

    Raises:
        TypeError: Something else was given.
        ValueError: The list is empty.
    """
    indices = [index] if isinstance(index, SparseIndex) else index
    if not isinstance(indices, list | tuple) or not all(isinstance(x, SparseIndex) for x in indices):
        kind = type(index).__name__
        raise TypeError(f"index must be a SparseIndex or a sequence of them, got {kind}.")
    if not indices:
        raise ValueError("index must hold at least one SparseIndex, got none.")
    return list(indices)


def mask(index: Indices) -> Bool[Array, "B N T S"]:
    """Says a pattern densely.

    Args:
        index: One index or several that make a pattern together.

    Returns:
        True where a query attends to a key; axes as in `SparseIndex.mask`.

    Raises:
        TypeError: Something else was given.
        ValueError: The list is empty.

    Examples:
        >>> import scfa_jax
        >>> indices = scfa_jax.window_index(4, 4, window=1, num_sinks=1)
        >>> scfa_jax.index.mask(indices)[0, 0].astype(int).tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]
    """
    parts = as_list(index)
    return _signed_sum([part.sign for part in parts], align_heads(*(part.mask() for part in parts)), jnp.int32) > 0


def is_disjoint(index: Indices) -> Bool[Array, ""]:
    """Tells whether a pattern counts each of its pairs once, in memory linear in length.

    Args:
        index: One index or several.

    Returns:
        Whether no pair is in more than one of them, each with its sign.

    Raises:
        TypeError: Something else was given.
        ValueError: The list is empty.

    Examples:
        >>> import scfa_jax
        >>> near, sinks = scfa_jax.window_index(64, 64, window=8, num_sinks=4)
        >>> all_earlier = scfa_jax.causal_index(64, 64)
        >>> [bool(scfa_jax.index.is_disjoint(x)) for x in ([near, sinks], [near, all_earlier])]
        [True, False]
    """
    # Sharded axes stay as they are: what is inside has no types for them.
    (faults,) = _partitioning.split(_count_faults, ["b.."], [_partitioning.SUMMED])(as_list(index))
    return faults == 0


def _count_faults(indices: Sequence[SparseIndex]) -> tuple[jax.Array]:
    """How many queries have a pair that is in more than one index, or in less than none, each with its sign."""
    parts = [(part.sign, _original_ranges(part)) for part in indices]

    def of_query(t: jax.Array) -> jax.Array:
        masks = align_heads(
            *(_meetings(low[..., t, None, :], high[..., t, None, :], code[..., None]) for _, (low, high, code) in parts)
        )
        total = _signed_sum([sign for sign, _ in parts], masks, jnp.int32)
        return jnp.any((total != 0) & (total != 1))

    query_length = indices[0].query_length
    return (jnp.sum(jax.lax.map(of_query, jnp.arange(query_length), batch_size=64), dtype=jnp.int32),)


def pairs(index: Indices) -> Float[Array, "B N"]:
    """Counts the pairs that a pattern allows.

    Args:
        index: One index or several that make a pattern together.

    Returns:
        float32; axes as in `SparseIndex.pairs`.

    Raises:
        TypeError: Something else was given.
        ValueError: The list is empty.

    Examples:
        >>> import scfa_jax
        >>> scfa_jax.index.pairs(scfa_jax.window_index(4, 4, window=1, num_sinks=1)).tolist()
        [[7.0]]
    """
    parts = as_list(index)
    return _signed_sum([part.sign for part in parts], align_heads(*(part.pairs() for part in parts)), jnp.float32)


def _signed_sum(signs: Sequence[int], arrays: Sequence[jax.Array], dtype: jax.typing.DTypeLike) -> jax.Array:
    shape = np.broadcast_shapes(*(x.shape for x in arrays))
    total = jnp.zeros(shape, dtype)
    for sign, x in zip(signs, arrays, strict=True):
        total = total + sign * jnp.broadcast_to(x, shape).astype(dtype)
    return total


def _original_ranges(index: SparseIndex) -> tuple[jax.Array, ...]:
    """Of rows as they stood, first and last codes `[B, N, T, slots]` and codes of keys `[B, N, S]`, as many heads."""
    low, high = (_original(x, index.query_order) for x in (index.low, index.high))
    low, high = (x.reshape(*x.shape[:2], index.query_length, index.slots) for x in (low, high))
    return align_heads(low, high, _original(index.key_code, index.key_order))


def _meetings(low: jax.Array, high: jax.Array, code: jax.Array) -> jax.Array:
    """In how many of the ranges along the last axis a code lies."""
    return jnp.sum((low <= code) & (code <= high), axis=-1, dtype=jnp.int32)


def _original(x: jax.Array, order: jax.Array | None) -> jax.Array:
    """Puts `[B, N, L]` from the order of an index back as the rows stood."""
    if order is None:
        return x
    shape = np.broadcast_shapes(x.shape, order.shape)
    x, order = (jnp.broadcast_to(y, shape) for y in (x, order))
    return jnp.put_along_axis(jnp.zeros_like(x), order, x, axis=-1, inplace=False)
