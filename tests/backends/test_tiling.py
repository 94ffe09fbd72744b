"""Tile bounds: they hold every allowed pair, call nothing full that is not, and visit no tile in vain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PATTERNS, Shape, drawn_cases, make_case
from conftest import HAS_GPU, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from test_index import index_of

from scfa_jax import BlockSizes, TileShape, _bounds
from scfa_jax.backends.triton import bounds as triton_bounds

NAMES = ("key_tile_bounds", "query_tile_bounds")


def _plain(name: str):
    return jax.jit(lambda index, *blocks: getattr(_bounds, name)(index.ranges, *blocks), static_argnums=(1, 2))


PLAIN = {name: _plain(name) for name in NAMES}
KERNEL = {
    name: jax.jit(getattr(triton_bounds, name), static_argnums=(1, 2), static_argnames="interpret") for name in NAMES
}


def ordered_mask(index):
    """The allowed pairs in sorted order, `[B, N, T, S]`, and the codes and ranges behind them."""
    low, high, code = (np.asarray(x) for x in _bounds.align_heads(index.low, index.high, index.key_code))
    shape = np.broadcast_shapes(low.shape[:2], code.shape[:2])
    low, high = (np.broadcast_to(x, (*shape, x.shape[-1])) for x in (low, high))
    code = np.broadcast_to(code, (*shape, code.shape[-1]))
    mask = (code[..., None, :] >= low[..., None]) & (code[..., None, :] <= high[..., None])
    return mask, low, high, code


def members(bounds, i, j):
    """Which of tiles `j` are visited and which are full, by the bounds of tile `i`."""
    start, full_start, full_stop, stop = bounds[i]
    assert start <= full_start <= full_stop <= stop
    return start <= j < stop, full_start <= j < full_stop


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=3)  # the arithmetic is the same; only the loads differ
@given(data=st.data())
def test_the_kernel_finds_the_same_bounds(pattern, data):
    case = data.draw(drawn_cases(pattern))
    blocks = data.draw(st.sampled_from(((16, 16), (16, 32), (32, 16))))
    index = index_of(pattern, case)
    if 0 in (index.query_length, index.key_length):
        return  # the kernels are not called then
    for name in NAMES:
        plain = PLAIN[name](index, *blocks)
        np.testing.assert_array_equal(plain, KERNEL[name](index, *blocks, interpret=not HAS_GPU))


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=examples(25))
@given(data=st.data())
def test_bounds_are_exact(pattern, data):
    case = data.draw(drawn_cases(pattern))
    block_q, block_k = data.draw(st.sampled_from(((16, 16), (16, 32), (32, 16))))
    index = index_of(pattern, case)
    mask, low, high, code = ordered_mask(index)
    by_query = np.asarray(PLAIN["key_tile_bounds"](index, block_q, block_k))
    by_key = np.asarray(PLAIN["query_tile_bounds"](index, block_q, block_k))
    batch, heads, query_length, key_length = mask.shape
    shape = (batch, heads)
    by_query, by_key = (np.broadcast_to(x, (*shape, *x.shape[2:])) for x in (by_query, by_key))
    for b, n in np.ndindex(shape):
        for i in range(-(-query_length // block_q)):
            rows = slice(i * block_q, min((i + 1) * block_q, query_length))
            least, most = low[b, n, rows].min(), high[b, n, rows].max()
            for j in range(-(-key_length // block_k)):
                columns = slice(j * block_k, (j + 1) * block_k)
                allowed = mask[b, n, rows, columns]
                is_whole = j * block_k + block_k <= key_length
                codes = code[b, n, columns]
                in_hull = least <= most and codes.max() >= least and codes.min() <= most
                visited, full = members(by_query[b, n], i, j)
                # Neither more nor less than the hull; what is full is allowed throughout.
                assert visited == in_hull
                assert full == (
                    visited and is_whole and bool(allowed.all()) and index_full(low, high, codes, b, n, rows)
                )
                visited_by_key, full_by_key = members(by_key[b, n], j, i)
                assert visited_by_key or not allowed.any()
                assert not full_by_key or (allowed.all() and is_whole)
                # A tile of queries that all see nothing may lie between the codes of a tile of keys.
                if index.ascending and least <= most:
                    assert visited_by_key == visited
                    assert full_by_key == (full and rows.stop - rows.start == block_q)


def index_full(low, high, codes, b, n, rows):
    """Whether every range of the tile spans all of its codes."""
    return low[b, n, rows].max() <= codes.min() and codes.max() <= high[b, n, rows].min()


def test_dropped_tiles_are_not_visited():
    """Half the keys and queries kept: a quarter of the causal tiles, give or take the edges."""
    case = make_case("keep", np.random.default_rng(0), Shape(1, 1024, 1024, 1, 1, 16), jnp.float32)
    tiles = int(index_of("keep", case).stats(16, 16)["tiles"][0, 0])
    causal = 64 * 65 // 2
    assert tiles < 0.3 * causal


def test_buckets_divide_the_tiles():
    case = make_case("shared_hash", np.random.default_rng(0), Shape(1, 1024, 1024, 1, 1, 16), jnp.float32, kind="8")
    tiles = int(index_of("hash", case).stats(16, 16)["tiles"][0, 0])
    causal = 64 * 65 // 2
    assert tiles < 0.25 * causal  # an eighth, and the tiles that two buckets share


@pytest.mark.parametrize("sizes", [(24, 16), (16, 0), (8, 16), (16, 8)])
def test_a_tile_must_be_a_power_of_two_of_at_least_16(sizes):
    with pytest.raises(ValueError, match=r"block_q|block_k"):
        TileShape(*sizes)


def test_tiles_shrink_to_short_sequences():
    blocks = BlockSizes(TileShape(128, 64), TileShape(64, 64), TileShape(16, 32)).fit(20, 3)
    assert blocks == BlockSizes(TileShape(32, 16), TileShape(32, 16), TileShape(16, 16))
