"""Blocks that queries choose: `block_index` allows exactly those and the local ones, whatever was chosen."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    CHOICES,
    SEGMENT_KINDS,
    SMALL_BLOCKS,
    Shape,
    arrays,
    blocks_mask,
    chosen_blocks,
    in_segments,
    make_case,
    of_each,
    segment_ids,
    segment_mask,
)
from conftest import HAS_GPU, IMPLEMENTATIONS, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from test_index import as_mask, assert_marked_if_known
from tolerance import assert_as_exact_as_plain, cotangents, results_and_gradients

import scfa_jax
from scfa_jax.index import NEVER
from tools.tolerance import dense_results, problems

# Shape; block size, local blocks, blocks that a query may choose, heads that choose; dtype; whether in segments. No
# block size divides a length, but those of 1 and of more than all keys.
SETUPS = {
    "query heads choose": (Shape(2, 50, 77, 4, 2, 16), (7, 1, 3, 4), jnp.float32, False),
    "key heads choose": (Shape(1, 90, 33, 4, 2, 16), (5, 3, 2, 2), jnp.float32, True),
    "all heads choose more than there are": (Shape(2, 33, 33, 3, 1, 16), (16, 2, 5, 1), jnp.float32, True),
    "in bfloat16": (Shape(2, 50, 77, 4, 2, 24), (24, 1, 4, 4), jnp.bfloat16, False),
    "blocks of one key": (Shape(1, 20, 20, 2, 2, 16), (1, 1, 4, 1), jnp.float32, False),
    "one block": (Shape(1, 20, 20, 2, 2, 16), (1000, 1, 1, 2), jnp.float32, False),
    "nothing to choose": (Shape(1, 20, 20, 2, 2, 16), (6, 2, 0, 2), jnp.float32, False),
}
OFTEN = list(SETUPS)[:4]
EXACT = [
    (implementation, name)
    for implementation in IMPLEMENTATIONS
    for name in OFTEN
    if implementation != "triton_interpret" or name in (OFTEN[0], OFTEN[2])  # which is slow
]
# From the first, beside the first key, before all keys, past all keys, and past what an index knows.
OFFSETS = (0, 5, -5, -1000, 44, 1000, 2**31 - 1, -(2**31))


def drawn(name, kind, offset, segments, seed):
    """A case of one of `SETUPS`; batch elements stand at offsets of their own."""
    shape, (block_size, num_local, k, heads), dtype, _ = SETUPS[name]
    offset = jnp.array([offset, 3][: shape.batch], jnp.int32)
    sizes = {"block_size": block_size, "num_local": num_local, "k": k, "heads": heads}
    rng = np.random.default_rng(seed)
    case = make_case("blocks", rng, shape, dtype, kind=kind, offset=offset, **sizes)
    return in_segments(case, rng, segments) if segments else case


draws = given(
    kind=st.sampled_from(CHOICES),
    offset=st.sampled_from(OFFSETS),
    segments=st.sampled_from(SEGMENT_KINDS),
    seed=st.integers(0, 2**32 - 1),
)


@pytest.mark.parametrize(("implementation", "name"), EXACT)
@settings(max_examples=examples(20))
@draws
def test_results_and_gradients_are_as_exact_as_plain_attention(implementation, name, kind, offset, segments, seed):
    case = drawn(name, kind, offset, segments if SETUPS[name][-1] else None, seed)
    results = case.compiled(implementation=implementation, block_sizes=SMALL_BLOCKS)
    assert_as_exact_as_plain(results, case.query, case.key, case.value, case.mask)


@pytest.mark.parametrize("name", [name for name in SETUPS if name not in OFTEN])
def test_extreme_sizes_are_as_exact_as_plain_attention(one_implementation, name):
    for seed, kind in enumerate(("any", "twice")):
        case = drawn(name, kind, 0, None, seed)
        results = case.compiled(implementation=one_implementation, block_sizes=SMALL_BLOCKS)
        assert_as_exact_as_plain(results, case.query, case.key, case.value, case.mask)


@partial(jax.jit, static_argnames=("lengths", "block_size", "num_local"))
def indexed(blocks, ids, offset, *, lengths, block_size, num_local):
    """An index, and what it says of itself."""
    query_length, key_length = lengths
    index = scfa_jax.block_index(
        blocks,
        block_size,
        num_local=num_local,
        query_length=query_length,
        key_length=key_length,
        query_offset=offset,
        **dict(zip(("query_segment_ids", "key_segment_ids"), ids, strict=False)),
    )
    return index, index.mask(), index.pairs(), index.stats(16, 16), scfa_jax.index.is_disjoint(index)


@pytest.mark.parametrize("in_segments", [False, True], ids=["one segment", "segments"])
@pytest.mark.parametrize("name", SETUPS)
@settings(max_examples=examples(40))
@draws
def test_an_index_says_exactly_what_was_chosen(name, in_segments, kind, offset, segments, seed):
    shape, (block_size, num_local, k, heads), *_ = SETUPS[name]
    lengths, rng = (shape.query_length, shape.key_length), np.random.default_rng(seed)
    blocks = chosen_blocks(rng, (shape.batch, lengths[0], heads, k), kind, -(-lengths[1] // block_size))
    offset = np.array([offset, 3][: shape.batch], np.int32)
    sizes = {"block_size": block_size, "num_local": num_local}
    ids = [segment_ids(rng, (shape.batch, length), segments) for length in lengths] if in_segments else []
    index, mask, pairs, stats, is_disjoint = indexed(blocks, ids, offset, lengths=lengths, **sizes)
    want = blocks_mask(blocks, *lengths, **sizes, query_offset=of_each(offset))
    if in_segments:
        want = want & np.asarray(segment_mask(*ids))
    assert index.slots == k + num_local
    np.testing.assert_array_equal(*np.broadcast_arrays(mask, want))
    np.testing.assert_array_equal(as_mask(index), mask)
    np.testing.assert_array_equal(pairs, np.sum(mask, axis=(2, 3)))
    np.testing.assert_array_equal(stats["pairs"], pairs)
    assert is_disjoint
    low, high = (np.asarray(x, np.int64) for x in (index.low, index.high))
    assert index.ascending
    assert (np.diff(low, axis=-1) >= 0).all()
    assert (np.diff(high, axis=-1) >= 0).all()
    assert high.max() < NEVER


def test_only_tiles_of_chosen_blocks_are_visited():
    """Of 64 blocks every query names the first one and has its own."""
    first = np.zeros((1, 1, 1, 1), np.int32)
    index = scfa_jax.block_index(first, 64, query_length=4096)
    tiles = index.stats(64, 64)["tiles"].item()
    assert tiles == 63 + 1 + 63  # the first block for others, for its own queries, and the other own ones


@pytest.mark.parametrize("ids", [None, np.repeat(np.array([4, 1, -1], np.int32), (9, 8, 3))], ids=["one", "padded"])
def test_an_index_that_says_so_leaves_no_code_to_a_key_that_no_query_attends_to(ids):
    blocks = np.full((20, 1, 2), -1, np.int32)
    index = scfa_jax.block_index(blocks, 6, query_segment_ids=ids)
    assert index.all_met
    assert_marked_if_known(index)
    assert not scfa_jax.block_index(blocks, 6, query_offset=3).all_met


def test_axes_of_one_serve_all():
    """Of the batch, of the rows and of the heads; without a batch, too."""
    rng = np.random.default_rng(0)
    mask_of = jax.jit(lambda blocks: scfa_jax.block_index(blocks, 6, query_length=20).mask())
    for size in ((1, 20, 2, 3), (2, 1, 2, 3), (2, 20, 1, 3), (1, 1, 1, 3)):
        narrow = rng.integers(-1, 5, size, dtype=np.int32)
        wide = np.broadcast_to(narrow, (2, 20, 2, 3))
        got, want = (mask_of(x) for x in (narrow, wide))
        np.testing.assert_array_equal(np.broadcast_to(got, want.shape), want)
        if size[0] == 1:
            np.testing.assert_array_equal(mask_of(narrow[0]), got)


def test_a_block_counts_once_however_often_it_is_named():
    once = np.array([2, -1, -1, -1], np.int32)
    often = np.array([2, 2, 5, 2], np.int32)  # the fifth is the own one
    masks = [scfa_jax.block_index(np.tile(x, (40, 1, 1)), 7).mask()[0, 0, 35:] for x in (once, often)]
    np.testing.assert_array_equal(*masks)
    np.testing.assert_array_equal(masks[0].sum(axis=1), 7 + np.arange(1, 6))


def test_rows_that_take_no_part_do_not_leak(implementation):
    """NaN in keys and values of blocks that nobody chose, and in queries past all keys, changes no bit."""
    case = drawn("query heads choose", "late", 49, None, 0)
    mask = np.asarray(case.mask)
    stranded = ~mask.any(3).swapaxes(1, 2)  # [B, T, N]
    unseen = ~mask.any(2).reshape(2, 2, 2, 77).any(2).swapaxes(1, 2)  # [B, S, K]
    assert stranded.any()
    assert unseen[0, :49].all()  # before those that are seen, as well as behind them
    results = case.compiled(implementation=implementation, block_sizes=SMALL_BLOCKS)
    given = cotangents(np.random.default_rng(0), case.query)

    def spoiled(by):
        key, value = (jnp.where(unseen[..., None], by, x) for x in (case.key, case.value))
        return results(jnp.where(stranded[..., None], by, case.query), key, value, *given)

    clean = spoiled(0.5)
    for poison in (np.nan, np.inf):
        for x, y in zip(spoiled(poison), clean, strict=True):
            np.testing.assert_array_equal(x, y)
            assert not np.isnan(x).any()


@partial(jax.jit, static_argnames=("implementation", "soft_cap", "output_dtype"))
def results_of(index, *given, implementation, soft_cap=None, output_dtype=None):
    """Results and gradients over any index; `given` as `results_and_gradients` has it."""

    def attend(query, key, value, sink_logits=None):
        options = {"implementation": implementation, "block_sizes": SMALL_BLOCKS, "output_dtype": output_dtype}
        options |= {"logits_soft_cap": soft_cap, "sink_logits": sink_logits, "return_residual": True}
        return scfa_jax.sparse_attention(query, key, value, index, **options)

    return results_and_gradients(attend, *given)


def chosen_of(shape, block_size, num_local, k, least=-1):
    """Random blocks from number `least` on, and their mask for each query head."""
    num_blocks = -(-shape.key_length // block_size)
    size = shape.batch, shape.query_length, shape.heads, k
    blocks = np.random.default_rng(3).integers(least, num_blocks, size, dtype=np.int32)
    return blocks, blocks_mask(blocks, shape.query_length, shape.key_length, block_size=block_size, num_local=num_local)


def test_sinks_and_caps_of_logits_and_values_of_another_size(one_implementation):
    shape, rng = Shape(2, 50, 50, 4, 2, 16), np.random.default_rng(1)
    blocks, mask = chosen_of(shape, 7, 2, 2)
    query, key, _ = arrays(rng, shape, jnp.float32)
    value = jnp.asarray(rng.normal(size=(*key.shape[:3], 40)), jnp.float32)
    sinks = jnp.asarray(rng.normal(size=4), jnp.float32)
    given = cotangents(rng, jnp.zeros((*query.shape[:3], 40)))
    index = scfa_jax.block_index(blocks, 7, num_local=2)
    got = results_of(index, query, key, value, *given, sinks, implementation=one_implementation, soft_cap=0.7)
    dense = dense_results(query, key, value, mask, *given, logits_soft_cap=0.7, sink_logits=sinks)
    assert not problems(got, dense, jnp.float32, in_tf32_products=HAS_GPU)


def test_a_float32_output_is_merged_from_float32(one_implementation):
    """Otherwise the results of slots have the dtype of the output."""
    shape = Shape(2, 50, 50, 4, 2, 16)
    blocks, mask = chosen_of(shape, 7, 1, 3)
    inputs = arrays(np.random.default_rng(2), shape, jnp.bfloat16)
    given = cotangents(np.random.default_rng(0), inputs[0])
    index = scfa_jax.block_index(blocks, 7)
    dense = dense_results(*inputs, mask, *given)
    errors = []
    for dtype in (jnp.float32, jnp.bfloat16):
        got = results_of(index, *inputs, *given, implementation=one_implementation, output_dtype=dtype)
        assert [x.dtype for x in got] == [dtype, jnp.float32, *(jnp.bfloat16,) * 3]
        assert not problems(got, dense, jnp.bfloat16)
        errors.append(np.std(np.asarray(got[0], np.float32) - dense.want[0]))
    assert errors[0] < errors[1] / 1.5


def test_sinks_beside_chosen_blocks(one_implementation):
    """A list: every query sees the first three keys, and its blocks are those behind the first one."""
    shape, block_size, num_sinks = Shape(2, 50, 50, 4, 2, 16), 7, 3
    blocks, mask = chosen_of(shape, block_size, 1, 3, least=1)
    is_behind = (np.arange(50) >= block_size)[:, None]

    @jax.jit
    def built(blocks, stop):
        sinks = scfa_jax.range_index(jnp.zeros_like(stop), stop, 50)
        index = [scfa_jax.block_index(blocks, block_size), sinks]
        in_window = [index[0], scfa_jax.causal_index(50, 50, window=8)]
        said = scfa_jax.index.mask(index), scfa_jax.index.pairs(index)
        return index, said, [scfa_jax.index.is_disjoint(x) for x in (index, in_window)]

    index, said, are_disjoint = built(blocks, num_sinks * is_behind.astype(np.int32))
    mask = mask | (is_behind & (np.arange(50) < num_sinks))
    np.testing.assert_array_equal(*np.broadcast_arrays(said[0], mask))
    np.testing.assert_array_equal(*np.broadcast_arrays(said[1], mask.sum(axis=(2, 3))))
    assert [bool(x) for x in are_disjoint] == [True, False]
    inputs = arrays(np.random.default_rng(4), shape, jnp.float32)
    assert_as_exact_as_plain(partial(results_of, index, implementation=one_implementation), *inputs, jnp.asarray(mask))


def test_reruns_give_the_same_bits(implementation):
    case = drawn("query heads choose", "any", 44, None, 5)  # compiled above
    given = case.query, case.key, case.value, *cotangents(np.random.default_rng(0), case.query)
    results = case.compiled(implementation=implementation, block_sizes=SMALL_BLOCKS)
    for x, y in zip(results(*given), results(*given), strict=True):
        np.testing.assert_array_equal(x, y)


def test_no_query_sees_a_key_behind_it(one_implementation):
    """By gradient: whatever was chosen, later keys and values get none from the first 20 queries."""
    case = drawn("query heads choose", "any", 0, None, 6)
    by_output, by_logsumexp = cotangents(np.random.default_rng(0), case.query)
    is_first = np.arange(50) < 20
    given = jnp.where(is_first[:, None, None], by_output, 0), jnp.where(is_first[:, None], by_logsumexp, 0)
    results = case.compiled(implementation=one_implementation, block_sizes=SMALL_BLOCKS)
    *_, dkey, dvalue = results(case.query, case.key, case.value, *given)
    for x in (dkey, dvalue):
        assert np.asarray(x)[0, :20].any()
        np.testing.assert_array_equal(x[0, 20:], 0)


BLOCKS = np.zeros((2, 8, 4, 3), np.int32)
BAD = {
    "blocks of floats": ((BLOCKS * 1.0, 4), {}, TypeError, "blocks must be int32, got float64"),
    "no array": (([[[0]]], 4), {}, TypeError, "blocks must be an array, got list"),
    "blocks without slots": ((BLOCKS[0, 0], 4), {}, ValueError, r"blocks must be \[B, T, N, k\].* got shape \(4, 3\)"),
    "blocks of a row less": ((BLOCKS, 4), {"query_length": 9}, ValueError, r"blocks must have 9 rows or 1, got .*8"),
    "a block of nothing": ((BLOCKS, 0), {}, ValueError, "block_size must be at least 1, got 0"),
    "a block of an array": ((BLOCKS, jnp.int32(4)), {}, TypeError, "block_size must be a static int, got"),
    "no local block": ((BLOCKS, 4), {"num_local": 0}, ValueError, "num_local must be at least 1, got 0"),
    "local blocks of a float": ((BLOCKS, 4), {"num_local": 1.0}, TypeError, "num_local must be a static int, got 1.0"),
    "no offset": ((BLOCKS, 4), {"key_length": 12}, ValueError, "query_offset must be given where query has 8"),
    "offsets of another batch": (
        (BLOCKS, 4),
        {"query_offset": np.zeros(3, np.int32)},
        ValueError,
        "blocks and query_offset must have the same batch size or 1, got 2 and 3",
    ),
    "ids of another batch": (
        (BLOCKS, 4),
        {"query_segment_ids": np.zeros((3, 8), np.int32)},
        ValueError,
        "query_segment_ids and .* must have the same batch size or 1, got 3",
    ),
    "ids of another length": (
        (BLOCKS, 4),
        {"query_segment_ids": np.zeros(9, np.int32)},
        ValueError,
        r"query_segment_ids must be \[B, 8\] or \[8\], got shape \(9,\)",
    ),
    "an unknown option": ((BLOCKS, 4), {"window": 3}, TypeError, "window is no option of block_index"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    arguments, options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        scfa_jax.block_index(*arguments, **options)


@pytest.mark.usefixtures("unchecked")
def test_heads_that_do_not_divide_are_named():
    x = jnp.zeros((2, 8, 4, 16))
    with pytest.raises(ValueError, match=r"index .*3"):
        scfa_jax.sparse_attention(x, x, x, scfa_jax.block_index(BLOCKS[:, :, :3], 4))
