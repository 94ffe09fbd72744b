"""Tiles: their sizes, and which tiles of keys a tile of queries meets (and the reverse).

Bounds are four tile numbers, `start <= full_start <= full_stop <= stop`: the tiles in `[start, stop)` hold every
allowed pair, those in `[full_start, full_stop)` hold nothing else and need no mask. They come from the edges of
tiles alone, never from pairs or from a search per element.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from scfa_jax import search
from scfa_jax.index import NEVER, SparseIndex


@dataclass(frozen=True)
class Tile:
    """The shape of a kernel's tiles and how the GPU runs one.

    Attributes:
        block_q: Queries in a tile: a power of two, at least 16.
        block_k: Keys in a tile: a power of two, at least 16.
        num_warps: Warps that work on one program.
        num_stages: Depth of the software pipeline over tiles.

    Raises:
        ValueError: A size is no power of two, or a side below 16.

    Examples:
        >>> import scfa_jax
        >>> scfa_jax.Tile(block_q=128, block_k=64, num_warps=8)
        Tile(block_q=128, block_k=64, num_warps=8, num_stages=3)
    """

    block_q: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self):
        for name in ("block_q", "block_k", "num_warps"):
            size = getattr(self, name)
            if size < 1 or size & (size - 1):
                raise ValueError(f"{name} must be a power of two, got {size}.")
        if min(self.block_q, self.block_k) < 16:
            raise ValueError(f"block_q and block_k must be at least 16, got {self.block_q}, {self.block_k}.")

    def fit(self, query_length: int, key_length: int) -> Tile:
        """Returns a tile no larger than the (padded) sequences."""
        block_q = min(self.block_q, max(16, next_power_of_two(query_length)))
        block_k = min(self.block_k, max(16, next_power_of_two(key_length)))
        # A tile of one sequence's leftovers has too little work for many warps.
        num_warps = self.num_warps if (block_q, block_k) == (self.block_q, self.block_k) else min(4, self.num_warps)
        return Tile(block_q, block_k, num_warps, self.num_stages)


@dataclass(frozen=True)
class BlockSizes:
    """The tiles of the three kernels.

    Attributes:
        forward: Of the forward pass.
        dq: Of the kernel for the queries' gradients.
        dkv: Of the kernel for those of keys and values.

    Examples:
        >>> import scfa_jax
        >>> tile = scfa_jax.Tile(block_q=64, block_k=64)
        >>> scfa_jax.BlockSizes(forward=tile, dq=tile, dkv=tile).fit(query_length=20, key_length=100).dq
        Tile(block_q=32, block_k=64, num_warps=4, num_stages=3)
    """

    forward: Tile
    dq: Tile
    dkv: Tile

    def fit(self, query_length: int, key_length: int) -> BlockSizes:
        """Returns tiles no larger than the (padded) sequences."""
        return BlockSizes(*(t.fit(query_length, key_length) for t in (self.forward, self.dq, self.dkv)))


def num_tiles(length: int, block: int) -> int:
    """Number of tiles that cover `length` rows."""
    return -(-length // block)


def key_tile_bounds(index: SparseIndex, block_q: int, block_k: int) -> jax.Array:
    """Which tiles of keys each tile of queries meets.

    Args:
        index: The pattern.
        block_q: Queries in a tile.
        block_k: Keys in a tile.

    Returns:
        int32 `[B, N, tiles of queries, 4]`: start, full_start, full_stop, stop. Axes as small as the index has.
    """
    low_min, low_max, high_min, high_max, first, last = _edges(index, block_q, block_k)
    if low_min.size == 0 or first.size == 0:
        return jnp.zeros((*low_min.shape, 4), jnp.int32)
    ends = (low_min, low_max, high_min, high_max)
    return jnp.stack(key_bounds(*ends, _at(first), _at(last), index.key_length, block_k), axis=-1)


def query_tile_bounds(index: SparseIndex, block_q: int, block_k: int) -> jax.Array:
    """Which tiles of queries each tile of keys meets.

    Where the ranges do not ascend on both sides, the tiles in `[start, stop)` include some that the tile of keys
    does not meet (`key_tile_bounds` tells which), and none is called full.

    Args:
        index: The pattern.
        block_q: Queries in a tile.
        block_k: Keys in a tile.

    Returns:
        int32 `[B, N, tiles of keys, 4]`: start, full_start, full_stop, stop. Axes as small as the index has.
    """
    low_min, low_max, high_min, high_max, first, last = _edges(index, block_q, block_k)
    if low_min.size == 0 or first.size == 0:
        return jnp.zeros((*first.shape, 4), jnp.int32)
    high_max = high_max if index.ascending else jax.lax.cummax(high_max, axis=2)
    tile = jnp.broadcast_to(jnp.arange(first.shape[-1], dtype=jnp.int32), first.shape)
    rows = (_at(low_min), _at(low_max), _at(high_min), _at(high_max))
    start, full_start, full_stop, stop = query_bounds(
        tile, first, last, *rows, index.query_length, index.key_length, block_q, block_k
    )
    if not index.ascending:
        full_start = full_stop = stop
    return jnp.stack([start, full_start, full_stop, stop], axis=-1)


# Edges of tiles, by the number of the tile: values of an array, or loads of a kernel.
Edge: TypeAlias = Callable[[jax.Array], jax.Array]


def key_bounds(
    low_min: jax.Array,
    low_max: jax.Array,
    high_min: jax.Array,
    high_max: jax.Array,
    first: Edge,
    last: Edge,
    key_length: int,
    block_k: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The bounds of tiles of queries, given the least and greatest ends of their ranges; for kernels too.

    Args:
        low_min: int32, any shape, one element a tile of queries; like the next three.
        low_max: The greatest `low` of the tile.
        high_min: The least `high`.
        high_max: The greatest `high`.
        first: The first code of tiles of keys.
        last: The last code of tiles of keys.
        key_length: Number of keys, at least 1.
        block_k: Keys in a tile.

    Returns:
        start, full_start, full_stop, stop.
    """
    start, full_start, full_stop, stop = search.count_leading(
        (
            lambda tile: last(tile) < low_min,
            lambda tile: first(tile) < low_max,
            lambda tile: last(tile) <= high_min,
            lambda tile: first(tile) <= high_max,
        ),
        num_tiles(key_length, block_k),
        low_min,
    )
    full_stop = jnp.minimum(full_stop, key_length // block_k)  # the rows past the end are no keys
    return _nested(start, full_start, full_stop, jnp.where(low_min <= high_max, stop, 0))


def query_bounds(
    tile: jax.Array,
    first: jax.Array,
    last: jax.Array,
    low_min: Edge,
    low_max: Edge,
    high_min: Edge,
    high_max: Edge,
    query_length: int,
    key_length: int,
    block_q: int,
    block_k: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The bounds of tiles of keys, given their first and last codes; for kernels too.

    Args:
        tile: int32, any shape: numbers of the tiles of keys.
        first: int32, their first codes.
        last: int32, their last codes.
        low_min: The least `low` of tiles of queries.
        low_max: The greatest `low`.
        high_min: The least `high`.
        high_max: The greatest `high`, ascending.
        query_length: Number of queries, at least 1.
        key_length: Number of keys, at least 1.
        block_q: Queries in a tile.
        block_k: Keys in a tile.

    Returns:
        start, full_start, full_stop, stop.
    """
    # No query spans a tile of keys that the end cuts short.
    padded_last = jnp.where(tile < key_length // block_k, last, NEVER)
    # Queries that attend to nothing have `low == NEVER`, as have the codes of dropped keys: they must not meet.
    met_last = jnp.minimum(last, NEVER - 1)
    start, full_start, full_stop, stop = search.count_leading(
        (
            lambda rows: high_max(rows) < first,
            lambda rows: high_min(rows) < padded_last,
            lambda rows: low_max(rows) <= first,
            lambda rows: low_min(rows) <= met_last,
        ),
        num_tiles(query_length, block_q),
        first,
    )
    # The rows past the end of a last, partial tile attend to nothing.
    return _nested(start, full_start, jnp.minimum(full_stop, query_length // block_q), stop)


def align_heads(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Repeats the head axis (1) of each array to that of the largest, so that consecutive heads share an entry."""
    heads = max(x.shape[1] for x in arrays)
    return tuple(x if x.shape[1] in (1, heads) else jnp.repeat(x, heads // x.shape[1], 1) for x in arrays)


def _edges(index: SparseIndex, block_q: int, block_k: int) -> list[jax.Array]:
    """Edges of all tiles: low_min, low_max, high_min, high_max `[B, N, tiles]`; first and last code, likewise."""
    length = index.query_length
    low_min, low_max = _first_and_last_rows(index.low, block_q)
    if index.ascending:
        high_min, high_max = _first_and_last_rows(index.high, block_q)
    else:
        padding = num_tiles(length, block_q) * block_q - length
        high_max = _by_tile(index.high, padding, -1, block_q).max(-1)
        high_min = _by_tile(index.high, padding, NEVER, block_q).min(-1)
    first, last = _first_and_last_rows(index.key_code, block_k)
    edges = align_heads(low_min, low_max, high_min, high_max, first, last)
    entries = np.broadcast_shapes(*(x.shape[:2] for x in edges))
    return [jnp.broadcast_to(x, (*entries, x.shape[2])) for x in edges]


def _first_and_last_rows(x: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    every = functools.partial(jax.lax.slice_in_dim, x, limit_index=None, stride=block, axis=2)
    length = x.shape[2]
    first, last = every(0), every(min(block - 1, length))
    return first, last if length % block == 0 else jnp.concatenate([last, x[..., -1:]], axis=2)


def _at(edges: jax.Array) -> Edge:
    return lambda tile: jnp.take_along_axis(edges, tile, axis=-1)


def _by_tile(x: jax.Array, padding: int, fill: int | np.int32, block: int) -> jax.Array:
    x = jnp.pad(x, ((0, 0), (0, 0), (0, padding)), constant_values=fill)
    return x.reshape(*x.shape[:2], -1, block)


def _nested(
    start: jax.Array, full_start: jax.Array, full_stop: jax.Array, stop: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Makes `start <= full_start <= full_stop <= stop`; what meets nothing is empty."""
    stop = jnp.maximum(stop, start)
    full_start = jnp.clip(full_start, start, stop)
    full_stop = jnp.clip(full_stop, full_start, stop)
    return start, full_start, full_stop, stop


def next_power_of_two(x: int) -> int:
    """The least power of two that is not below `x`."""
    return 1 << max(x - 1, 0).bit_length()
