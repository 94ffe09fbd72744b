"""Which tiles of keys a tile of queries meets, and the reverse.

Bounds are four tile numbers, `start <= full_start <= full_stop <= stop`: the tiles in `[start, stop)` hold every
allowed pair, those in `[full_start, full_stop)` hold nothing else and need no mask. They come from the first and last
rows of tiles alone, never from pairs or from a search per row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from scfa_jax._search import count_leading

NEVER = np.int32(2**31 - 1)
"""The code of a key that nobody may attend to: no query's `high` reaches it."""

# What a row holds, by the number of its tile: a look-up in an array, or a load of a kernel.
ByTile: TypeAlias = Callable[[jax.Array], jax.Array]
Bounds: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


class Ranges(NamedTuple):
    """The arrays of a `SparseIndex` that bounds come from."""

    low: jax.Array  # int32 [B, N, T], ascending
    high: jax.Array  # int32 [B, N, T]
    code: jax.Array  # int32 [B, K, S], ascending
    ascending: bool  # whether `high` ascends


def num_tiles(length: int, block: int) -> int:
    """Number of tiles that cover `length` rows."""
    return -(-length // block)


def next_power_of_two(x: int) -> int:
    """The least power of two that is not below `x`."""
    return 1 << max(x - 1, 0).bit_length()


def align_heads(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Repeats the head axis (1) of each array to that of the largest, so that consecutive heads share an entry."""
    heads = max(x.shape[1] for x in arrays)
    return tuple(x if x.shape[1] in (1, heads) else jnp.repeat(x, heads // x.shape[1], axis=1) for x in arrays)


def key_tile_bounds(ranges: Ranges, block_q: int, block_k: int) -> jax.Array:
    """Which tiles of keys each tile of queries meets.

    Args:
        ranges: The pattern.
        block_q: Queries in a tile.
        block_k: Keys in a tile.

    Returns:
        int32 `[B, N, tiles of queries, 4]`: start, full_start, full_stop, stop. Axes are as small as the pattern has.
    """
    ends = _ends(ranges, block_q, block_k)
    if ends.low_min.size == 0 or ends.first.size == 0:
        return jnp.zeros((*ends.low_min.shape, 4), jnp.int32)
    of_queries = (ends.low_min, ends.low_max, ends.high_min, ends.high_max)
    bounds = key_bounds(*of_queries, _at(ends.first), _at(ends.last), ranges.code.shape[-1], block_k)
    return jnp.stack(bounds, axis=-1)


def query_tile_bounds(ranges: Ranges, block_q: int, block_k: int) -> jax.Array:
    """Which tiles of queries each tile of keys meets.

    Where the ranges do not ascend on both sides, the tiles in `[start, stop)` include some that the tile of keys
    does not meet (`key_tile_bounds` tells which), and none is called full.

    Args:
        ranges: The pattern.
        block_q: Queries in a tile.
        block_k: Keys in a tile.

    Returns:
        int32 `[B, N, tiles of keys, 4]`: start, full_start, full_stop, stop. Axes are as small as the pattern has.
    """
    ends = _ends(ranges, block_q, block_k)
    if ends.low_min.size == 0 or ends.first.size == 0:
        return jnp.zeros((*ends.first.shape, 4), jnp.int32)
    high_max = ends.high_max if ranges.ascending else jax.lax.cummax(ends.high_max, axis=2)
    tile = jax.lax.broadcasted_iota(jnp.int32, ends.first.shape, 2)
    rows = (_at(ends.low_min), _at(ends.low_max), _at(ends.high_min), _at(high_max))
    lengths = (ranges.low.shape[-1], ranges.code.shape[-1])
    start, full_start, full_stop, stop = query_bounds(tile, ends.first, ends.last, *rows, *lengths, block_q, block_k)
    if not ranges.ascending:
        full_start = full_stop = stop
    return jnp.stack([start, full_start, full_stop, stop], axis=-1)


def key_bounds(
    low_min: jax.Array,
    low_max: jax.Array,
    high_min: jax.Array,
    high_max: jax.Array,
    first: ByTile,
    last: ByTile,
    key_length: int,
    block_k: int,
) -> Bounds:
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
    start, full_start, full_stop, stop = count_leading(
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
    low_min: ByTile,
    low_max: ByTile,
    high_min: ByTile,
    high_max: ByTile,
    query_length: int,
    key_length: int,
    block_q: int,
    block_k: int,
) -> Bounds:
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
    start, full_start, full_stop, stop = count_leading(
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


class _Ends(NamedTuple):
    """What the rows of all tiles begin and end with, int32 `[B, N, tiles]` each."""

    low_min: jax.Array
    low_max: jax.Array
    high_min: jax.Array
    high_max: jax.Array
    first: jax.Array  # code of a tile of keys
    last: jax.Array


def _ends(ranges: Ranges, block_q: int, block_k: int) -> _Ends:
    length = ranges.low.shape[-1]
    low_min, low_max = _first_and_last_rows(ranges.low, block_q)
    if ranges.ascending:
        high_min, high_max = _first_and_last_rows(ranges.high, block_q)
    else:
        padding = num_tiles(length, block_q) * block_q - length
        high_max = _by_tile(ranges.high, padding, -1, block_q).max(-1)
        high_min = _by_tile(ranges.high, padding, NEVER, block_q).min(-1)
    first, last = _first_and_last_rows(ranges.code, block_k)
    ends = align_heads(low_min, low_max, high_min, high_max, first, last)
    entries = np.broadcast_shapes(*(x.shape[:2] for x in ends))
    return _Ends(*(jnp.broadcast_to(x, (*entries, x.shape[2])) for x in ends))


def _first_and_last_rows(x: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    every = functools.partial(jax.lax.slice_in_dim, x, limit_index=None, stride=block, axis=2)
    length = x.shape[2]
    first, last = every(0), every(min(block - 1, length))
    return first, last if length % block == 0 else jnp.concatenate([last, x[..., -1:]], axis=2)


def _at(rows: jax.Array) -> ByTile:
    return lambda tile: jnp.take_along_axis(rows, tile, axis=-1)


def _by_tile(x: jax.Array, padding: int, fill: int | np.int32, block: int) -> jax.Array:
    x = jnp.pad(x, ((0, 0), (0, 0), (0, padding)), constant_values=fill)
    return x.reshape(*x.shape[:2], -1, block)


def _nested(start: jax.Array, full_start: jax.Array, full_stop: jax.Array, stop: jax.Array) -> Bounds:
    """Makes `start <= full_start <= full_stop <= stop`; what meets nothing is empty."""
    stop = jnp.maximum(stop, start)
    full_start = jnp.clip(full_start, start, stop)
    full_stop = jnp.clip(full_stop, full_start, stop)
    return start, full_start, full_stop, stop
