"""Every index builder: its ranges, read back as a mask, are the pattern's dense mask."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PATTERNS, Case, Shape, drawn_cases, make_case
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st

import scfa_jax
from scfa_jax.backends import ordering
from scfa_jax.backends.triton import marks, order
from scfa_jax.index import NEVER, SparseIndex


def index_of(pattern: str, case: Case) -> SparseIndex:
    """As `build`, compiled once for all cases of the same static options and shapes."""
    is_data = lambda value: isinstance(value, jax.Array)
    static = tuple(sorted((name, value) for name, value in case.options.items() if not is_data(value)))
    data = {name: value for name, value in case.options.items() if is_data(value)}
    return _compiled(pattern, static)((case.query.shape[1], case.key.shape[1]), case.pattern, data)


@cache
def _compiled(pattern, static):
    @partial(jax.jit, static_argnums=0)
    def indexed(lengths, pattern_arrays, data):
        rows = [jax.ShapeDtypeStruct((1, length), jnp.float32) for length in lengths]
        return build(pattern, Case(*rows, None, None, None, None, pattern_arrays, {**dict(static), **data}))

    return indexed


def build(pattern: str, case: Case) -> SparseIndex:
    """The index of a case, from its builder."""
    query_length, key_length = case.query.shape[1], case.key.shape[1]
    if pattern == "causal":
        return scfa_jax.causal_index(query_length, key_length, **case.options)
    if pattern == "range":
        return scfa_jax.range_index(*case.pattern, key_length, **case.options)
    if pattern == "blocks":
        lengths = {"query_length": query_length, "key_length": key_length}
        return scfa_jax.block_index(*case.pattern, **lengths, **case.options)
    builder = scfa_jax.keep_index if pattern == "keep" else scfa_jax.hash_index
    return builder(*case.pattern, **case.options)


def as_mask(index: SparseIndex) -> np.ndarray:
    """The pairs that an index allows, in original order: bool `[B, N, T, S]`."""
    low, high, code = (np.asarray(x) for x in (index.low, index.high, index.key_code))
    batch, heads = (max(low.shape[i], code.shape[i]) for i in (0, 1))

    def spread(x):
        x = np.asarray(x)
        x = np.repeat(x, heads // x.shape[1], axis=1)
        return np.broadcast_to(x, (batch, *x.shape[1:]))

    low, high, code = (spread(x) for x in (low, high, code))
    ordered = (code[..., None, :] >= low[..., None]) & (code[..., None, :] <= high[..., None])
    rows = np.arange(low.shape[-1]) if index.query_order is None else spread(index.query_order)
    columns = np.arange(code.shape[-1]) if index.key_order is None else spread(index.key_order)
    mask = np.zeros_like(ordered)
    for b in range(batch):
        for n in range(heads):
            r = rows if rows.ndim == 1 else rows[b, n]
            c = columns if columns.ndim == 1 else columns[b, n]
            mask[b, n][np.ix_(r, c)] = ordered[b, n]
    each = mask.reshape(*mask.shape[:2], index.query_length, index.slots, -1).sum(axis=3)
    assert each.max(initial=0) <= 1  # no pair is in two slots
    return each > 0


def met_keys(index: SparseIndex, key_heads: int) -> np.ndarray:
    """Which keys, in code order, any query attends to: bool `[B, key_heads, S]`."""
    met = as_mask(index).any(axis=2)  # [B, N, S], in original order
    met = np.repeat(met, max(1, key_heads // met.shape[1]), axis=1)
    met = met.reshape(met.shape[0], key_heads, -1, met.shape[2]).any(axis=2)
    if index.key_order is None:
        return met
    return np.take_along_axis(met, np.broadcast_to(index.key_order, met.shape), axis=2)


def assert_marked_if_known(index: SparseIndex) -> None:
    """An index that says so leaves no code to a key that no query attends to."""
    if index.all_met:
        met = met_keys(index, index.key_code.shape[1])
        assert (np.broadcast_to(index.key_code, met.shape)[~met] == NEVER).all()


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=examples(40))
@given(data=st.data())
def test_an_index_allows_exactly_the_pattern(pattern, data):
    case = data.draw(drawn_cases(pattern))
    index = index_of(pattern, case)
    mask = as_mask(index)
    want = np.asarray(case.mask)
    if mask.shape[1] < want.shape[1]:
        mask = np.repeat(mask, want.shape[1] // mask.shape[1], axis=1)
    np.testing.assert_array_equal(mask, np.broadcast_to(want, np.broadcast_shapes(want.shape, mask.shape)))

    codes, low, high = (np.asarray(x, np.int64) for x in (index.key_code, index.low, index.high))
    assert (np.diff(codes, axis=-1) >= 0).all()
    assert (np.diff(low, axis=-1) >= 0).all()
    assert high.max(initial=-1) < NEVER
    if index.ascending:
        assert (np.diff(high, axis=-1) >= 0).all()
    assert_marked_if_known(index)
    for rows in (index.query_order, index.key_order):
        if rows is not None:
            np.testing.assert_array_equal(np.sort(rows, axis=-1)[0, 0], np.arange(rows.shape[-1]))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_stats_count_the_pairs_and_the_tiles(pattern):
    case = make_case(pattern, np.random.default_rng(0), Shape(2, 50, 70, 4, 2, 16), jnp.float32)
    index = index_of(pattern, case)
    stats = index.stats(16, 32)
    pairs = as_mask(index).sum((2, 3))
    np.testing.assert_array_equal(np.broadcast_to(stats["pairs"], pairs.shape), pairs)
    np.testing.assert_array_equal(stats["tiles"], stats["full"] + stats["edge"])
    rows, columns = -(-case.query.shape[1] * index.slots // 16), -(-case.key.shape[1] // 32)
    np.testing.assert_array_equal(stats["total"], rows * columns)
    assert (stats["tiles"] <= stats["total"]).all()


def test_a_promise_of_buckets_gives_codes_of_bucket_and_position():
    query_hash = jnp.array([[[2], [0], [2], [1]]], jnp.int32)
    index = scfa_jax.hash_index(query_hash, num_buckets=3)
    np.testing.assert_array_equal(index.key_code[0, 0], [0 * 4 + 1, 1 * 4 + 3, 2 * 4 + 0, 2 * 4 + 2])
    np.testing.assert_array_equal(index.key_order[0, 0], [1, 3, 0, 2])
    np.testing.assert_array_equal(index.low[0, 0], [0, 4, 8, 8])
    np.testing.assert_array_equal(index.high[0, 0], [1, 7, 8, 10])


def test_a_promise_too_large_for_a_code_falls_back_to_ranks():
    query_hash = jnp.array([[[2**30], [0], [2**30], [1]]], jnp.int32)
    index = scfa_jax.hash_index(query_hash, num_buckets=2**30 + 1)
    np.testing.assert_array_equal(index.key_code[0, 0], [0, 1, 2, 3])
    assert as_mask(index)[0, 0].sum() == 5


def test_dropped_rows_come_last():
    keep = jnp.array([[[False], [True], [False], [True]]])
    index = scfa_jax.keep_index(keep, keep)
    np.testing.assert_array_equal(index.key_order[0, 0], [1, 3, 0, 2])
    np.testing.assert_array_equal(index.key_code[0, 0], [1, 3, NEVER, NEVER])
    np.testing.assert_array_equal(index.low[0, 0], [0, 0, NEVER, NEVER])
    np.testing.assert_array_equal(index.high[0, 0], [1, 3, 3, 3])


@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
def test_the_kernel_finds_the_ranges_that_plain_search_finds(heads):
    rng = np.random.default_rng(0)
    query_id, key_id = (
        np.sort(rng.integers(-3, 3, (2, n, size)).astype(np.int32)) for n, size in zip(heads, (90, 70), strict=True)
    )
    last = np.sort(rng.integers(-1, 70, (2, heads[0], 90)).astype(np.int32))
    position = np.argsort(rng.random((2, heads[1], 70)) + 10 * key_id).astype(np.int32)
    position = np.sort(position + 1000 * key_id) - 1000 * key_id  # ascending among equal ids
    got = order.key_ranges(query_id, last, key_id, position.astype(np.int32), interpret=True)
    plain = ordering.plain_key_ranges(query_id, last, key_id, position.astype(np.int32))
    for one, other in zip(got, plain, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("pattern", ["hash", "shared_hash", "range", "blocks"])
@settings(max_examples=examples(10))
@given(data=st.data())
def test_marks_leave_out_exactly_the_keys_that_no_query_attends_to(pattern, data):
    case = data.draw(drawn_cases(pattern))
    index = build(pattern, case)
    if 0 in (index.query_length, index.key_length):
        return
    marked = np.asarray(marks.marked_codes(index, case.key.shape[2], interpret=True))
    np.testing.assert_array_equal(marked, np.where(met_keys(index, case.key.shape[2]), index.key_code, NEVER))


def test_slots_of_a_query_that_overlap_are_not_disjoint():
    rows, ends = jnp.arange(16, dtype=jnp.int32)[None, None], jnp.zeros((1, 1, 16), jnp.int32)
    index = scfa_jax.SparseIndex(None, rows[..., :8], rows, ends, ends + 7, slots=2)
    assert not scfa_jax.index.is_disjoint(index)
    assert index.mask().all()
