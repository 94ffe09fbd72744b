"""Bounds of tiles in one launch: a Pallas kernel that searches the ends of tiles where they lie in the index."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from scfa_jax import _bounds
from scfa_jax._bounds import ByTile, num_tiles
from scfa_jax.backends.triton import _compat
from scfa_jax.backends.triton.rows import batch_spec, shared_entry
from scfa_jax.index import SparseIndex

_TILES_PER_PROGRAM = 128


def key_tile_bounds(index: SparseIndex, block_q: int, block_k: int, *, interpret: bool) -> jax.Array:
    """Does what `_bounds.key_tile_bounds` does."""
    if not index.ascending:  # the greatest end of a tile takes a look at all of its rows
        return _bounds.key_tile_bounds(index.ranges, block_q, block_k)
    return _call(_key_bounds_kernel, index, index.low.shape[2], block_q, block_k, interpret)


def query_tile_bounds(index: SparseIndex, block_q: int, block_k: int, *, interpret: bool) -> jax.Array:
    """Does what `_bounds.query_tile_bounds` does."""
    if not index.ascending:
        return _bounds.query_tile_bounds(index.ranges, block_q, block_k)
    return _call(_query_bounds_kernel, index, index.key_length, block_k, block_q, interpret)


def _call(kernel, index: SparseIndex, length: int, block: int, other_block: int, interpret: bool) -> jax.Array:
    operands = (index.low, index.high, index.key_code)
    batch, heads = (max(x.shape[axis] for x in operands) for axis in (0, 1))
    tiles = num_tiles(length, block)
    flat = jax.ShapeDtypeStruct((batch, heads, 4 * tiles), jnp.int32)
    bounds = _compat.triton_call(
        functools.partial(kernel, block=block, other_block=other_block),
        num_warps=4,
        num_stages=3,
        interpret=interpret,
        grid=(num_tiles(tiles, _TILES_PER_PROGRAM), heads, batch),
        in_specs=[batch_spec(x.shape, batch, 2) for x in operands],
        out_specs=batch_spec(flat.shape, batch, 2),
        out_shape=flat,
        name="scfa_bounds",
    )(*operands)
    return bounds.reshape(batch, heads, tiles, 4)


def _key_bounds_kernel(low_ref, high_ref, code_ref, bounds_ref, *, block: int, other_block: int):
    (on_query, on_key), tile = _entries(low_ref, code_ref, bounds_ref), _tiles(bounds_ref)
    first_low, last_low = _ends(low_ref, on_query, block)
    first_high, last_high = _ends(high_ref, on_query, block)
    ends = (first_low(tile), last_low(tile), first_high(tile), last_high(tile))
    bounds = _bounds.key_bounds(*ends, *_ends(code_ref, on_key, other_block), code_ref.shape[1], other_block)
    _store(bounds_ref, tile, bounds)


def _query_bounds_kernel(low_ref, high_ref, code_ref, bounds_ref, *, block: int, other_block: int):
    (on_query, on_key), tile = _entries(low_ref, code_ref, bounds_ref), _tiles(bounds_ref)
    first, last = (code(tile) for code in _ends(code_ref, on_key, block))
    rows = (*_ends(low_ref, on_query, other_block), *_ends(high_ref, on_query, other_block))
    lengths = (low_ref.shape[1], code_ref.shape[1])
    _store(bounds_ref, tile, _bounds.query_bounds(tile, first, last, *rows, *lengths, other_block, block))


def _entries(low_ref, code_ref, bounds_ref) -> tuple[jax.Array, jax.Array]:
    """The entries of queries and of keys that belong to this program."""
    head, heads = pl.program_id(1), bounds_ref.shape[0]
    return shared_entry(head, heads, low_ref.shape[0]), shared_entry(head, heads, code_ref.shape[0])


def _tiles(bounds_ref) -> jax.Array:
    """Numbers of the tiles of this program; past the end they repeat the last."""
    tile = pl.program_id(0) * _TILES_PER_PROGRAM + jnp.arange(_TILES_PER_PROGRAM, dtype=jnp.int32)
    return jnp.minimum(tile, np.int32(bounds_ref.shape[1] // 4 - 1))


def _ends(ref, entry: jax.Array, block: int) -> tuple[ByTile, ByTile]:
    """Loads of the first and the last row of tiles."""
    end = np.int32(ref.shape[1])
    first = lambda tile: plgpu.load(ref.at[entry, tile * block])
    last = lambda tile: plgpu.load(ref.at[entry, jnp.minimum(tile * block + block, end) - 1])
    return first, last


def _store(bounds_ref, tile: jax.Array, bounds: tuple[jax.Array, ...]) -> None:
    for i, bound in enumerate(bounds):
        plgpu.store(bounds_ref.at[pl.program_id(1), tile * 4 + i], bound)
