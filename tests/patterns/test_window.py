"""Windows: each query sees the last `window` positions up to its own, under every pattern, per head, as data."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SEGMENT_KINDS, SMALL_BLOCKS, Shape, hash_mask, in_segments, make_case
from conftest import IMPLEMENTATIONS, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering import ATTENTION, BOUNDS, MARKS, gradients, lowered_for_cuda, number_of_kernels
from test_index import as_mask, assert_marked_if_known, index_of
from tolerance import assert_as_exact_as_plain, cotangents

import scfa_jax
from scfa_jax import _bounds, reference
from scfa_jax.index import NEVER

UNEQUAL = Shape(2, 50, 77, 4, 2, 16)  # pairs of heads share their keys
SHARED = Shape(2, 50, 50, 2, 2, 16)
PATTERNS = {
    "causal": ("causal", UNEQUAL, {}),
    "keep": ("keep", UNEQUAL, {}),
    "hash": ("hash", UNEQUAL, {}),
    "hash within a promise": ("shared_hash", SHARED, {"promise": 8, "exclude_self": True}),
    "hash from position 0": ("shared_hash", SHARED, {"offset": 0}),
}
WINDOW_KINDS = ("none", "one", "short", "any", "all", "extreme")


def window_lengths(rng, shape, kind):
    """Lengths of windows `[B, N]`, one for each head."""
    size = shape.batch, shape.heads
    ends = {"none": (0, 1), "one": (1, 2), "short": (0, 9), "any": (0, 120), "all": (10**6, 10**9)}
    extremes = np.array([-(2**31), -1, 0, 1, 2**31 - 1], np.int32)
    return rng.choice(extremes, size) if kind == "extreme" else rng.integers(*ends[kind], size, dtype=np.int32)


def in_window(case, windows):
    """The case within windows `[B, N]`, its mask written out from their definition."""
    query_length, key_length = case.query.shape[1], case.key.shape[1]
    offset = np.broadcast_to(np.asarray(case.options["query_offset"], np.int64), len(windows))
    position = offset[:, None, None, None] + np.arange(query_length)[:, None]
    first = position - np.asarray(windows, np.int64)[:, :, None, None] + 1
    seen = (first <= np.arange(key_length)) & (np.arange(key_length) <= position)
    options = {**case.options, "window": jnp.asarray(windows)}
    heads = windows.shape[1] // case.mask.shape[1]
    return replace(case, mask=jnp.repeat(case.mask, heads, axis=1) & jnp.asarray(seen), options=options)


def drawn(name, kind, segments, seed):
    """A case of one of `PATTERNS` within random windows, at random offsets."""
    pattern, shape, options = PATTERNS[name]
    rng = np.random.default_rng(seed)
    offset = jnp.asarray(rng.choice([-7, 0, 3, 27, 1000], shape.batch), jnp.int32)
    case = make_case(pattern, rng, shape, jnp.float32, **{"offset": offset, **options})
    case = in_window(case, window_lengths(rng, shape, kind))
    return case if segments is None else in_segments(case, rng, segments)


@pytest.mark.parametrize("name", PATTERNS)
@settings(max_examples=examples(60))
@given(
    kind=st.sampled_from(WINDOW_KINDS),
    segments=st.sampled_from((None, *SEGMENT_KINDS)),
    seed=st.integers(0, 2**32 - 1),
)
def test_an_index_allows_exactly_the_window(name, kind, segments, seed):
    case = drawn(name, kind, segments, seed)
    index = index_of(PATTERNS[name][0], case)
    np.testing.assert_array_equal(*np.broadcast_arrays(as_mask(index), case.mask))
    assert index.ascending
    low, high = (np.asarray(x, np.int64) for x in (index.low, index.high))
    assert low.shape == high.shape
    assert (np.diff(low, axis=-1) >= 0).all()
    assert (np.diff(high, axis=-1) >= 0).all()
    assert high.max() < NEVER
    assert_marked_if_known(index)


def test_a_hash_of_all_query_heads_has_a_window_for_each():
    rng = np.random.default_rng(0)
    query_hash, key_hash = (rng.integers(0, 4, size).astype(np.int32) for size in ((1, 50, 1), (1, 77, 2)))
    windows = np.array([3, 0, 40, 9], np.int32)
    index = jax.jit(scfa_jax.hash_index)(query_hash, key_hash, window=windows, query_offset=jnp.int32(0))
    mask = hash_mask(np.repeat(query_hash, 4, axis=2), key_hash) & reference.window_mask(50, 77, windows)
    np.testing.assert_array_equal(as_mask(index), mask)


def test_kernels_are_as_exact_as_plain_attention_and_read_no_key_outside_of_all_windows():
    """Tile loops in plain JAX have theirs in test_patterns."""
    options = {"implementation": IMPLEMENTATIONS[-1], "block_sizes": SMALL_BLOCKS}
    for kind, seed in (("short", 0), ("any", 1), ("extreme", 2)):
        case = drawn("causal", kind, None, seed)
        assert_as_exact_as_plain(case.compiled(**options), case.query, case.key, case.value, case.mask)

    case = drawn("causal", "short", None, 0)
    windows = np.array([[3, 0, 0, 0], [0, 2, 7, 1]], np.int32)
    case = in_window(replace(case, mask=jnp.ones((1, 1, 50, 77), bool)), windows)
    is_met = np.asarray(case.mask).any(2).reshape(2, 2, 2, 77).any(2).swapaxes(1, 2)
    assert not is_met.all()
    results, given = case.compiled(**options), cotangents(np.random.default_rng(0), case.query)
    poisoned = (jnp.where(is_met[..., None], x, jnp.nan) for x in (case.key, case.value))
    for clean, other in zip(
        results(case.query, case.key, case.value, *given), results(case.query, *poisoned, *given), strict=True
    ):
        np.testing.assert_array_equal(clean, other)


def test_the_reference_takes_windows():
    cases = [drawn(name, "any", None, 3) for name in ("causal", "keep", "hash")]

    def results(case):
        arrays = case.query, case.key, case.value
        return case.dense(*arrays, *case.pattern, **case.options), reference.attention(*arrays, case.mask)[0]

    for got, want in jax.jit(lambda: [results(case) for case in cases])():
        np.testing.assert_array_equal(got, want)


@jax.jit
def visited(buckets, windows):
    """Tiles that the queries and that the keys of each head visit, without buckets and with four."""
    indices = (
        scfa_jax.causal_index(1024, 1024, window=windows),
        scfa_jax.hash_index(buckets, num_buckets=4, window=windows),
    )
    bounds = [
        f(index.ranges, 64, 64) for index in indices for f in (_bounds.key_tile_bounds, _bounds.query_tile_bounds)
    ]
    return [jnp.sum(b[0, :, :, 3] - b[0, :, :, 0], axis=1) for b in bounds], indices[0].stats()["tiles"][0]


def test_only_the_tiles_of_the_window_are_visited():
    windows = np.array([0, 1, 64, 65, 200, 5000], np.int32)
    buckets = np.random.default_rng(0).integers(0, 4, (1, 1024, 1)).astype(np.int32)
    (of_queries, of_keys, in_buckets, _), counted = visited(buckets, windows)
    tiles = np.arange(16)
    first = (64 * tiles[:, None] - windows + 1).clip(0) // 64
    want = np.where(windows > 0, tiles[:, None] - first + 1, 0).sum(0)
    for got in (of_queries, of_keys, counted):
        np.testing.assert_array_equal(got, want)
    # Four runs of 256 positions: a window of 200 positions has 50 keys in its bucket, and so two tiles or three.
    assert in_buckets[4] <= 3 * 16 < in_buckets[5]


def test_gradients_lower_to_a_few_kernels():
    case = drawn("causal", "any", None, 0)
    assert number_of_kernels(lowered_for_cuda(*_call(gradients(case, "triton")))) == ATTENTION + BOUNDS + MARKS


X = jnp.zeros((2, 8, 4, 16))
KEY = X[:, :, :2]
BAD = {
    "a float": (2.0, TypeError, "window must be None, an int or an int32 array, got 2.0"),
    "an array of floats": (jnp.zeros(4), TypeError, "window must be None, an int or an int32 array, got float32"),
    "below 0": (-1, ValueError, "window must be at least 0, got -1"),
    "a length a token": (
        jnp.zeros((2, 8, 4), jnp.int32),
        ValueError,
        r"window must be an int, .* got shape \(2, 8, 4\)",
    ),
    "another batch": (jnp.zeros((3, 4), jnp.int32), ValueError, "window .*must have the same batch size or 1, got"),
    "other heads": (jnp.zeros(3, jnp.int32), ValueError, "window must have as many heads as query_keep, 4, .*; got 3"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", BAD)
def test_bad_windows_are_named(name):
    window, error, message = BAD[name]
    keep = jnp.ones((2, 8, 4), bool)
    with pytest.raises(error, match=message):
        scfa_jax.qk_sparse_attention(X, KEY, KEY, keep, keep[..., :2], window=window)


def _call(function_and_arguments):
    function, arguments = function_and_arguments
    return function, *arguments
