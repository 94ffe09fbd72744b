"""Tiles: their sizes, and which tiles of keys a tile of queries meets (and the reverse).

Bounds are four tile numbers, `start <= full_start <= full_stop <= stop`: the tiles in `[start, stop)` hold every
allowed pair, those in `[full_start, full_stop)` hold nothing else and need no mask. They come from the edges of
tiles alone, never from pairs or from a search per element.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from scfa_jax.index import NEVER, SparseIndex


@dataclass(frozen=True)
class Tile:
    """The shape of a kernel's tiles and how the GPU runs one.

    Attributes:
        block_q: Queries in a tile: a power of two, at least 16.
        block_k: Keys in a tile: a power of two, at least 16.
        num_warps: Warps that work on one program.
        num_stages: Depth of the software pipeline over tiles.
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
    """Tiles of the three kernels: the forward pass, dq, and dk with dv."""

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
    rows, keys = _query_edges(index, block_q), _key_edges(index, block_k)
    start = _count_below(keys.last, rows.low_min)
    full_start = _count_below(keys.first, rows.low_max)
    full_stop = _count_up_to(keys.padded_last, rows.high_min)
    stop = jnp.where(rows.low_min <= rows.high_max, _count_up_to(keys.first, rows.high_max), 0)
    return _nested(start, full_start, full_stop, stop)


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
    rows, keys = _query_edges(index, block_q), _key_edges(index, block_k)
    high_max = rows.high_max if index.ascending else jax.lax.cummax(rows.high_max, axis=2)
    start = _count_below(high_max, keys.first)
    # Queries that attend to nothing have `low == NEVER`, as have the codes of dropped keys: they must not meet.
    stop = _count_up_to(rows.low_min, jnp.minimum(keys.last, NEVER - 1))
    if index.ascending:
        full_start = _count_below(rows.high_min, keys.padded_last)
        # The rows past the end of a last, partial tile attend to nothing.
        full_stop = jnp.minimum(_count_up_to(rows.low_max, keys.first), index.query_length // block_q)
    else:
        full_start = full_stop = stop
    return _nested(start, full_start, full_stop, stop)


def align_heads(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Repeats the head axis (1) of each array to that of the largest, so that consecutive heads share an entry."""
    heads = max(x.shape[1] for x in arrays)
    return tuple(x if x.shape[1] in (1, heads) else jnp.repeat(x, heads // x.shape[1], 1) for x in arrays)


@dataclass(frozen=True)
class _QueryEdges:
    """The least and greatest ends of the ranges in each tile of queries: int32 `[B, N, tiles]`."""

    low_min: jax.Array
    low_max: jax.Array
    high_min: jax.Array
    high_max: jax.Array


@dataclass(frozen=True)
class _KeyEdges:
    """The first and last code in each tile of keys, and the last where padding is `NEVER`: int32 `[B, N, tiles]`."""

    first: jax.Array
    last: jax.Array
    padded_last: jax.Array


def _query_edges(index: SparseIndex, block_q: int) -> _QueryEdges:
    length = index.query_length
    tiles = num_tiles(length, block_q)
    first = np.arange(tiles) * block_q
    last = np.minimum(first + block_q, length) - 1
    if index.ascending:
        high_min, high_max = index.high[..., first], index.high[..., last]
    else:
        padding = tiles * block_q - length
        high_max = _by_tile(index.high, padding, -1, block_q).max(-1)
        high_min = _by_tile(index.high, padding, NEVER, block_q).min(-1)
    edges = (index.low[..., first], index.low[..., last], high_min, high_max)
    return _QueryEdges(*_match(edges, index.key_code))


def _key_edges(index: SparseIndex, block_k: int) -> _KeyEdges:
    length = index.key_length
    first = np.arange(num_tiles(length, block_k)) * block_k
    last = first + block_k - 1
    last_code = index.key_code[..., np.minimum(last, length - 1)]
    padded_last = jnp.where(last < length, last_code, NEVER)
    return _KeyEdges(*_match((index.key_code[..., first], last_code, padded_last), index.low))


def _match(edges: tuple[jax.Array, ...], other: jax.Array) -> tuple[jax.Array, ...]:
    """Repeats the edges' heads to those of the other side."""
    return tuple(align_heads(x, other[..., :1])[0] for x in edges)


def _by_tile(x: jax.Array, padding: int, fill: int | np.int32, block: int) -> jax.Array:
    x = jnp.pad(x, ((0, 0), (0, 0), (0, padding)), constant_values=fill)
    return x.reshape(*x.shape[:2], -1, block)


def _count_below(edges: jax.Array, values: jax.Array) -> jax.Array:
    """Number of (ascending) edges `< value`, for each value along the last axis."""
    return (edges[..., None, :] < values[..., :, None]).sum(-1, dtype=jnp.int32)


def _count_up_to(edges: jax.Array, values: jax.Array) -> jax.Array:
    """Number of (ascending) edges `<= value`, for each value along the last axis."""
    return (edges[..., None, :] <= values[..., :, None]).sum(-1, dtype=jnp.int32)


def _nested(start: jax.Array, full_start: jax.Array, full_stop: jax.Array, stop: jax.Array) -> jax.Array:
    """Stacks the four with `start <= full_start <= full_stop <= stop`; what meets nothing is empty."""
    stop = jnp.maximum(stop, start)
    full_start = jnp.clip(full_start, start, stop)
    full_stop = jnp.clip(full_stop, full_start, stop)
    return jnp.stack([start, full_start, full_stop, stop], axis=-1)


def next_power_of_two(x: int) -> int:
    """The least power of two that is not below `x`."""
    return 1 << max(x - 1, 0).bit_length()
