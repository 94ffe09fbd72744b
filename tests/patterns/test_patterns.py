"""Patterns of several parts: these are disjoint, and together they are what the papers say, causally."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SEGMENT_KINDS, SMALL_BLOCKS, Shape, arrays, segment_ids
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from test_index import as_mask
from tolerance import assert_as_exact_as_plain, results_and_gradients

import scfa_jax
from scfa_jax import patterns, reference
from scfa_jax.patterns import published

QUERIES, KEYS, HEADS = 50, 77, 2
NEAR, BLOCK, GLOBAL, RANDOM, BUCKETS = 8, 6, 7, 3, 4


def drawn(seed, kind):
    """What the patterns are made of, as arrays: one compilation serves all."""
    rng = np.random.default_rng(seed)
    return {
        "window": np.array([[rng.integers(40), rng.integers(40)], [rng.integers(200), 0]], np.int32),
        "query_global": rng.random((2, QUERIES, HEADS)) < 0.1,
        "key_global": rng.random((2, KEYS, 1)) < 0.1,
        "query_offset": rng.choice(np.array([-9, 0, 5, 38], np.int32), 2),  # from the last, past all keys
        "query_segment_ids": segment_ids(rng, (2, QUERIES), kind),
        "key_segment_ids": segment_ids(rng, (2, KEYS), kind),
        "query_hash": rng.integers(0, BUCKETS, (2, QUERIES, HEADS), dtype=np.int32),
        "key_hash": rng.integers(0, BUCKETS, (2, KEYS, 1), dtype=np.int32),
    }


def line(given):
    """Offset and segments."""
    return {name: given[name] for name in ("query_offset", "query_segment_ids", "key_segment_ids")}


def hashes(given):
    return given["query_hash"], given["key_hash"]


PARTS = {
    "sinks": lambda x: scfa_jax.window_index(QUERIES, KEYS, x["window"], 5, **line(x)),
    "local_hash": lambda x: scfa_jax.local_hash_index(*hashes(x), NEAR, num_buckets=BUCKETS, **line(x)),
    "others": lambda x: scfa_jax.local_hash_index(*hashes(x), NEAR, exclude_self=True, **line(x)),
    "longformer": lambda x: patterns.longformer_index(x["query_global"], x["key_global"], x["window"][0, 0], **line(x)),
    "strided": lambda x: patterns.strided_index(QUERIES, KEYS, BLOCK, **line(x)),
    "fixed": lambda x: patterns.fixed_index(QUERIES, KEYS, BLOCK, 2, **line(x)),
    "bigbird": lambda x: patterns.bigbird_index(
        QUERIES,
        KEYS,
        NEAR,
        jax.random.key(0),
        num_global=GLOBAL,
        num_random=RANDOM,
        block_size=BLOCK,
        num_heads=HEADS,
        **line(x),
    ),
}


def causal(given):
    """Pairs that are causal and within a segment, positions of queries and keys: all broadcast to `[B, N, T, S]`."""
    query = (given["query_offset"][:, None] + np.arange(QUERIES))[:, None, :, None]
    key = np.arange(KEYS)
    ids, key_ids = given["query_segment_ids"][:, None, :, None], given["key_segment_ids"][:, None, None, :]
    return (key <= query) & (ids == key_ids) & (ids >= 0), query, key


def sinks(given, query, key):
    window = given["window"][:, :, None, None]
    ids = given["key_segment_ids"]
    rank = np.array([[np.sum(row[:s] == row[s]) for s in range(KEYS)] for row in ids])
    return (key > query - window) | (rank < 5)[:, None, None]


def local_hash(given, query, key):
    of_query, of_key = (x.swapaxes(1, 2) for x in hashes(given))
    return (key > query - NEAR) | (of_query[..., None] == of_key[:, :, None])


def others(given, query, key):
    """Those of a window and buckets but the token itself."""
    return (key != query) & local_hash(given, query, key)


def longformer(given, query, key):
    of_query, of_key = (given[name].swapaxes(1, 2) for name in ("query_global", "key_global"))
    return (key > query - given["window"][0, 0]) | of_query[..., None] | of_key[:, :, None]


def strided(given, query, key):
    return (query - key < BLOCK) | ((query - key) % BLOCK == 0)


def fixed(given, query, key):
    return (query // BLOCK == key // BLOCK) | (key % BLOCK >= BLOCK - 2)


SEEN = {"sinks": sinks, "local_hash": local_hash, "others": others}
SEEN |= {"longformer": longformer, "strided": strided, "fixed": fixed}
COMPILED = {name: jax.jit(parts) for name, parts in PARTS.items()}


def union(indices):
    """The mask `[B, N, T, S]` of indices that share no pair."""
    count = sum(as_mask(index).astype(int) for index in indices)
    assert count.max() <= 1
    return count > 0


@pytest.mark.parametrize("name", SEEN)
@settings(max_examples=examples(24))
@given(kind=st.sampled_from(SEGMENT_KINDS), seed=st.integers(0, 2**32 - 1))
def test_disjoint_parts_make_the_pattern(name, kind, seed):
    given = drawn(seed, kind)
    is_causal, query, key = causal(given)
    np.testing.assert_array_equal(
        *np.broadcast_arrays(union(COMPILED[name](given)), is_causal & SEEN[name](given, query, key))
    )


@settings(max_examples=examples(24))
@given(kind=st.sampled_from(SEGMENT_KINDS), seed=st.integers(0, 2**32 - 1))
def test_bigbird_adds_random_blocks_to_window_and_first_tokens(kind, seed):
    given = drawn(seed, kind)
    near, first, *drawn_blocks = COMPILED["bigbird"](given)
    is_causal, query, key = causal(given)
    want = is_causal & ((key > query - NEAR) | (key < GLOBAL))
    np.testing.assert_array_equal(*np.broadcast_arrays(union([near, first]), want))
    mask = union([near, first, *drawn_blocks])
    assert not (mask & ~is_causal).any()
    # What is drawn shows where segments hide nothing.
    given |= {"query_segment_ids": np.zeros((2, QUERIES), np.int32), "key_segment_ids": np.zeros((2, KEYS), np.int32)}
    _, _, *drawn_blocks = COMPILED["bigbird"](given)
    mask = union(drawn_blocks)
    query_block = query // BLOCK
    # Blocks that begin after the global tokens and end before the window of the first query of the block.
    is_eligible = (key // BLOCK * BLOCK >= GLOBAL) & ((key // BLOCK + 1) * BLOCK <= query_block * BLOCK - NEAR + 1)
    assert not (mask & ~is_eligible).any()
    is_eligible = np.broadcast_to(is_eligible, mask.shape)
    np.testing.assert_array_equal(mask.sum(3), np.minimum(is_eligible.sum(3), RANDOM * BLOCK))
    whole = np.add.reduceat(mask, np.arange(0, KEYS, BLOCK), axis=3)
    assert set(np.unique(whole)) <= {0, BLOCK}


def test_what_bigbird_draws_depends_on_position_and_head_alone():
    none = {"query_segment_ids": np.zeros((2, QUERIES), np.int32), "key_segment_ids": np.zeros((2, KEYS), np.int32)}
    given = drawn(0, "one") | none | {"query_offset": np.array([0, 27], np.int32)}
    zero, later = union(COMPILED["bigbird"](given))
    np.testing.assert_array_equal(zero[:, 27:], later[:, : QUERIES - 27])
    blocks = later[:, -1].reshape(HEADS, KEYS)
    assert (blocks[0] != blocks[1]).any()


def test_every_choice_of_blocks_is_equally_likely():
    number = jnp.full(6000, 12, jnp.int32)
    keys = jax.random.split(jax.random.key(0), number.size)
    draw = jax.vmap(lambda key, i: published._random_blocks(key, i[None], NEAR, GLOBAL, 2, BLOCK, 1)[0, 0])
    pairs = np.sort(jax.jit(draw)(keys, number), axis=1)
    _, counts = np.unique(pairs, axis=0, return_counts=True)
    assert len(counts) == 8 * 7 // 2  # 12 blocks before, two of global tokens and two in the window
    deviation = (number.size / len(counts)) ** 0.5
    assert np.abs(counts - number.size / len(counts)).max() < 4 * deviation


def test_window_attention_with_sinks_is_as_exact_as_plain_attention():
    shape = Shape(2, QUERIES, KEYS, HEADS, 1, 16)

    @jax.jit
    def results(given, *arrays):
        attend = partial(
            scfa_jax.window_attention,
            window=given["window"],
            num_sinks=5,
            **line(given),
            implementation="xla",
            block_sizes=SMALL_BLOCKS,
            return_residual=True,
        )
        return results_and_gradients(attend, *arrays)

    for seed, kind in ((0, "one"), (1, "padded")):
        given = drawn(seed, kind)
        is_causal, query, key = causal(given)
        mask = jnp.asarray(is_causal & sinks(given, query, key))
        inputs = arrays(np.random.default_rng(seed), shape, jnp.float32)
        assert_as_exact_as_plain(partial(results, given), *inputs, mask)
        dense = jax.jit(partial(reference.window_attention, num_sinks=5))
        np.testing.assert_array_equal(
            dense(*inputs, given["window"], **line(given)), jax.jit(reference.attention)(*inputs, mask)[0]
        )


def test_a_window_beside_buckets_is_as_exact_as_plain_attention(implementation):
    options = {"implementation": implementation, "block_sizes": SMALL_BLOCKS, "return_residual": True}

    @jax.jit
    def results(indices, *arrays):
        return results_and_gradients(partial(scfa_jax.sparse_attention, index=indices, **options), *arrays)

    given = drawn(0, "padded")
    is_causal, query, key = causal(given)
    mask = jnp.asarray(is_causal & others(given, query, key))
    inputs = arrays(np.random.default_rng(0), Shape(2, QUERIES, KEYS, HEADS, 1, 16), jnp.float32)
    assert_as_exact_as_plain(partial(results, COMPILED["others"](given)), *inputs, mask)


def test_parts_are_rounded_once_after_they_are_merged():
    query, key, value = arrays(np.random.default_rng(0), Shape(1, 16, 16, 1, 1, 16), jnp.bfloat16)

    @jax.jit
    def results(*qkv):
        indices = scfa_jax.window_index(16, 16, 4, num_sinks=3)
        return [scfa_jax.sparse_attention(*qkv, indices, output_dtype=x) for x in (None, jnp.float32)]

    rounded, exact = results(query, key, value)
    np.testing.assert_array_equal(rounded, exact.astype(jnp.bfloat16))


X = jnp.zeros((1, 128, 2, 64), jnp.bfloat16)


def test_only_the_tiles_of_the_parts_are_visited():
    """A window of 128 has three tiles of 64 each, sinks one tile, of a thousand."""

    @jax.jit
    def tiles():
        indices = scfa_jax.window_index(4096, 4096, jnp.array([0, 128], jnp.int32), 4)
        return [index.stats(64, 64)["tiles"][0] for index in indices]

    near, first = tiles()
    np.testing.assert_array_equal(near, [0, 3 * 64 - 3])
    np.testing.assert_array_equal(first, [64, 62])


BAD = {
    "no index": (
        lambda: scfa_jax.sparse_attention(X, X, X, []),
        ValueError,
        "index must hold at least one SparseIndex, got none",
    ),
    "sinks of an array": (
        lambda: scfa_jax.window_attention(X, X, X, 4, num_sinks=jnp.int32(2)),
        TypeError,
        "num_sinks must be a static int, got",
    ),
    "sinks below 0": (
        lambda: scfa_jax.window_attention(X, X, X, 4, num_sinks=-1),
        ValueError,
        "num_sinks must be at least 0, got -1",
    ),
    "no stride": (lambda: patterns.strided_index(8, 8, 0), ValueError, "stride must be at least 1, got 0"),
    "summaries": (
        lambda: patterns.fixed_index(8, 8, 4, 5),
        ValueError,
        "num_summaries must be at most stride, 4, got 5",
    ),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("offset", [0, np.int8(0), np.array(0, np.int16), np.array(-(2**31), np.int32)], ids=repr)
def test_what_lies_before_a_window_is_found_at_offsets_of_any_dtype(offset):
    """Nothing does here, however long the window is and wherever its length would wrap around."""
    one = np.zeros((4, 1), np.int32)
    _, before = scfa_jax.local_hash_index(one, None, 2**15, num_buckets=2, query_offset=offset)
    _, *globals_before = patterns.longformer_index(one == 0, one == 0, 2**15, query_offset=offset)
    for index in (before, *globals_before):
        assert (np.asarray(index.high) < np.asarray(index.low)).all()
