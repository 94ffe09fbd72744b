"""Segment ids: attention stays within a segment under every pattern, and padding neither shows nor costs anything."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import PATTERNS, SEGMENT_KINDS, SMALL_BLOCKS, Shape, drawn_cases, in_segments, make_case, segment_mask
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params
from lowering import ATTENTION, BOUNDS, MARKS, RANGES, SORT, gradients, lowered_for_cuda, number_of_kernels
from test_index import as_mask, build, index_of
from test_reference import rule
from tolerance import NAMES, assert_as_exact_as_plain, cotangents

import scfa_jax
from scfa_jax.index import NEVER


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=examples(50))
@given(data=st.data())
def test_an_index_allows_exactly_the_pattern_within_segments(pattern, data):
    case = data.draw(drawn_cases(pattern))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    # Sides of one length share their ids, and then their sort; in some signatures batch elements do too.
    shared, batch = case.query.shape[1] == case.key.shape[1], 1 if case.query.dtype == jnp.bfloat16 else 2
    kind = data.draw(st.sampled_from(SEGMENT_KINDS))
    case = in_segments(case, rng, kind, shared=shared, batch=min(batch, case.query.shape[0]))
    index = index_of(pattern, case)
    mask, want = as_mask(index), np.asarray(case.mask)
    mask = np.repeat(mask, max(1, want.shape[1] // mask.shape[1]), axis=1)
    np.testing.assert_array_equal(*np.broadcast_arrays(mask, want))
    codes, low, high = (np.asarray(x, np.int64) for x in (index.key_code, index.low, index.high))
    assert (np.diff(codes, axis=-1) >= 0).all()
    assert (np.diff(low, axis=-1) >= 0).all()
    assert high.max(initial=-1) < NEVER
    if index.ascending:
        assert (np.diff(high, axis=-1) >= 0).all()
    if index.all_met:
        met = as_mask(index).any(2)
        if index.key_order is not None:
            met = np.take_along_axis(met, np.broadcast_to(index.key_order, met.shape), axis=2)
        assert (met | (np.broadcast_to(codes, met.shape) == NEVER)).all()


@pytest.mark.parametrize("pattern", ["causal", "hash", "keep", "range", "blocks"])
@settings(max_examples=examples(8))
@given(kind=st.sampled_from(SEGMENT_KINDS), seed=st.integers(0, 2**32 - 1))
def test_results_and_gradients_are_as_exact_as_plain_attention(one_implementation, pattern, kind, seed):
    rng = np.random.default_rng(seed)
    more = {} if pattern == "range" else {"offset": jnp.array([seed % 40, -3], jnp.int32)}
    case = in_segments(make_case(pattern, rng, Shape(2, 50, 77, 4, 2, 24), jnp.float32, **more), rng, kind)
    compiled = case.compiled(implementation=one_implementation, block_sizes=SMALL_BLOCKS)
    assert_as_exact_as_plain(compiled, case.query, case.key, case.value, case.mask)


@pytest.mark.parametrize("kind", ["scattered", "huge", "padded"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_reference_equals_float64_loops(pattern, kind):
    rng = np.random.default_rng(0)
    more = {} if pattern == "range" else {"offset": 1}
    case = in_segments(make_case(pattern, rng, Shape(2, 6, 7, 2, 2, 3), jnp.float32, **more), rng, kind)
    of_query, of_key = (np.asarray(case.options[f"{side}_segment_ids"]) for side in ("query", "key"))
    without = replace(case, options={k: v for k, v in case.options.items() if "segment" not in k})
    allows = rule(pattern, without)
    same = lambda b, t, s: of_query[b, t] == of_key[b, s] and of_query[b, t] >= 0
    cotangent = rng.normal(size=case.query.shape), rng.normal(size=case.query.shape[:3])
    want = oracle.attend(
        case.query, case.key, case.value, lambda b, n, k, t, s: same(b, t, s) and allows(b, n, k, t, s), *cotangent, 0.7
    )
    given = (jnp.asarray(x, jnp.float32) for x in cotangent)
    got = case.defined(scale=0.7)(case.query, case.key, case.value, *given)
    for name, x, y in zip(NAMES, got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=3e-6, atol=3e-6, err_msg=name)


def padded_case(pattern, rng):
    """A case whose ids start with padding, end with it, and have some in between."""
    case = make_case(pattern, rng, Shape(1, 60, 60, 2, 2, 16), jnp.float32)
    ids = np.repeat(np.array([-1, 5, -3, 2, 5, -1], np.int32), 10)[None]
    mask = case.mask & segment_mask(ids, ids)
    return replace(case, mask=mask, options={**case.options, "query_segment_ids": jnp.asarray(ids)}), ids[0] < 0


@pytest.mark.parametrize("pattern", PATTERNS)
def test_padding_gives_zeros_and_hides_what_it_holds(one_implementation, pattern):
    case, is_padding = padded_case(pattern, np.random.default_rng(1))
    given = cotangents(np.random.default_rng(0), case.query)

    @jax.jit
    def results(query, key, value, *cotangent):
        attend = partial(case.attend, implementation=one_implementation, block_sizes=SMALL_BLOCKS)
        (output, logsumexp), pull = jax.vjp(attend, query, key, value)
        return output, logsumexp, *pull(cotangent)

    spoiled = lambda by: (jnp.asarray(x).at[:, is_padding].set(by) for x in (case.query, case.key, case.value, *given))
    clean = results(*spoiled(0.5))
    for poison in (np.nan, np.inf):
        for name, x, y in zip(NAMES, results(*spoiled(poison)), clean, strict=True):
            np.testing.assert_array_equal(x, y, err_msg=name)
            want = -np.inf if name == "logsumexp" else 0
            np.testing.assert_array_equal(np.asarray(x)[:, is_padding], want, err_msg=name)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_padding_adds_no_tile(pattern):
    """As many tiles are visited as without the padded rows, wherever they stand."""
    rng = np.random.default_rng(2)
    whole = make_case(pattern, rng, Shape(1, 256, 256, 2, 2, 16), jnp.float32)
    keep = np.sort(rng.permutation(256)[:128])
    ids = jnp.full((1, 256), -1, jnp.int32).at[:, keep].set(jnp.asarray(np.arange(128) // 50, jnp.int32))
    if pattern == "range":  # positions change where rows are taken out
        places = np.searchsorted(keep, np.asarray(whole.pattern))[:, :, keep]
        fewer = tuple(jnp.asarray(x, jnp.int32) for x in places)
    elif pattern == "blocks":  # of one key each: only so are they blocks without the padded rows
        whole = replace(whole, options={**whole.options, "block_size": 1})
        is_kept = np.isin(whole.pattern[0], keep)
        fewer = (jnp.asarray(np.where(is_kept, np.searchsorted(keep, whole.pattern[0]), -1)[:, keep], jnp.int32),)
    else:
        fewer = tuple(x[:, keep] for x in whole.pattern)
    part = replace(whole, query=whole.query[:, keep], key=whole.key[:, keep], pattern=fewer)
    tiles = []
    for case, segment_ids in ((whole, ids), (part, ids[:, keep])):
        case = replace(case, options={**case.options, "query_segment_ids": segment_ids})
        index = index_of(pattern, case)
        tiles.append(index.stats(16, 16)["tiles"])
    np.testing.assert_array_equal(*tiles)


def test_short_documents_visit_few_tiles():
    ids = jnp.asarray(np.arange(1024) // 64, jnp.int32)
    index = scfa_jax.causal_index(1024, 1024, query_segment_ids=ids)
    assert index.stats(64, 64)["tiles"].item() == 16


@pytest.mark.parametrize("pattern", ["hash", "range"])
def test_packed_documents_equal_documents_alone(one_implementation, pattern):
    rng = np.random.default_rng(3)
    case = make_case(pattern, rng, Shape(1, 70, 70, 2, 2, 16), jnp.float32)
    options = {"implementation": one_implementation, "block_sizes": SMALL_BLOCKS}
    cuts = (0, 13, 48, 70)
    ids = jnp.asarray(np.repeat([9, 2, 7], np.diff(cuts)), jnp.int32)
    attend = jax.jit(partial(case.operator, **case.options, **options))
    packed = attend(case.query, case.key, case.value, *case.pattern, query_segment_ids=ids)
    for start, stop in pairwise(cuts):
        part = lambda x: x[:, start:stop]  # noqa: B023
        pattern_there = tuple(part(x) - start if pattern == "range" else part(x) for x in case.pattern)
        alone = attend(*map(part, (case.query, case.key, case.value)), *pattern_there)
        np.testing.assert_allclose(part(packed), alone, atol=2e-5)


@pytest.mark.parametrize("promise", [None, 4])
def test_a_chunk_of_queries_sees_its_segments_in_all_keys(one_implementation, promise):
    rng = np.random.default_rng(4)
    case = make_case("shared_hash", rng, Shape(2, 60, 60, 2, 2, 16), jnp.float32)
    (hashes,) = case.pattern
    ids = jnp.asarray(rng.integers(-1, 3, (2, 60)), jnp.int32)
    attend = jax.jit(partial(scfa_jax.hash_sparse_attention, num_buckets=promise, implementation=one_implementation))
    whole = attend(case.query, case.key, case.value, hashes, query_segment_ids=ids)
    chunk = attend(
        case.query[:, 37:],
        case.key,
        case.value,
        hashes[:, 37:],
        hashes,
        query_segment_ids=ids[:, 37:],
        key_segment_ids=ids,
        query_offset=jnp.array([37, 37], jnp.int32),
    )
    np.testing.assert_allclose(chunk, whole[:, 37:], atol=2e-5)


@pytest.mark.parametrize("pattern", ["causal", "hash", "range"])
def test_new_ids_do_not_recompile_and_map(one_implementation, pattern):
    chex.clear_trace_counter()
    case = make_case(pattern, np.random.default_rng(5), Shape(2, 40, 40, 2, 2, 16), jnp.float32)
    rng = np.random.default_rng(6)
    many = jnp.asarray(rng.integers(-1, 3, (3, 2, 40)), jnp.int32)
    options = {**case.options, "implementation": one_implementation, "block_sizes": SMALL_BLOCKS}

    @chex.assert_max_traces(n=2)  # one of `jit`, one of `vmap`
    def attend(ids):
        return case.operator(case.query, case.key, case.value, *case.pattern, query_segment_ids=ids, **options)

    compiled = jax.jit(attend)
    one_by_one = jnp.stack([compiled(ids) for ids in many])
    dense = jax.jit(partial(case.dense, case.query, case.key, case.value, *case.pattern, **case.options))
    for ids, got in zip(many, one_by_one, strict=True):
        np.testing.assert_allclose(got, dense(query_segment_ids=ids), atol=2e-5)
    mapped = jax.jit(jax.vmap(attend, 1))(many.swapaxes(0, 1))
    np.testing.assert_allclose(mapped, one_by_one, atol=2e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_without_ids_an_index_does_no_more_than_before(pattern):
    """No gather of what lines up, and no sort or search beyond the pattern's own."""
    case = make_case(pattern, np.random.default_rng(7), Shape(1, 40, 40, 2, 2, 16), jnp.float32)
    if pattern == "hash":
        case = replace(case, options={**case.options, "num_buckets": 4})
    count = {"sort": 0, "gather": 0, "while": 0}

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in count:
                count[equation.primitive.name] += 1
            for inner in jaxprs_in_params(equation.params):
                visit(inner)

    arrays = lambda pattern_: jax.tree.leaves(build(pattern, replace(case, pattern=pattern_)))
    visit(jax.make_jaxpr(arrays)(case.pattern).jaxpr)
    sorts = {"causal": 0, "keep": 2}.get(pattern, 1)
    of_rows = int(pattern == "blocks")  # where the row of each slot ends, put into the order of the slots
    assert count == {"sort": sorts, "gather": of_rows, "while": 0}


@pytest.mark.parametrize(
    ("pattern", "more", "number"),
    [
        ("causal", {}, BOUNDS),
        ("causal", {"offset": 1}, BOUNDS + MARKS + RANGES),
        ("hash", {"promise": 4}, BOUNDS + MARKS + SORT),
        ("hash", {}, BOUNDS + MARKS + 2 * RANGES),
        ("shared_hash", {"promise": 4}, BOUNDS + SORT),
        ("keep", {}, BOUNDS + MARKS + 2 * SORT),
        ("range", {}, MARKS + 2 * RANGES),
        ("blocks", {}, BOUNDS + MARKS + 2 * RANGES),
    ],
    ids=str,
)
def test_gradients_lower_to_a_few_kernels(pattern, more, number):
    rng = np.random.default_rng(8)
    case = make_case(pattern, rng, Shape(2, 100, 100, 4, 4, 64), jnp.bfloat16, **more)
    function, arguments = gradients(in_segments(case, rng, "runs", shared=True), "triton")
    assert number_of_kernels(lowered_for_cuda(function, *arguments)) == ATTENTION + number


X = jnp.zeros((2, 8, 4, 16))
IDS = jnp.zeros((2, 8), jnp.int32)
HASH = jnp.zeros((2, 8, 4), jnp.int32)
BAD = {
    "ids of floats": ({"query_segment_ids": IDS * 1.0}, TypeError, r"query_segment_ids must be int32, got float32"),
    "ids of another length": (
        {"query_segment_ids": IDS[:, :5]},
        ValueError,
        r"query_segment_ids must be .*8.*\(2, 5\)",
    ),
    "ids of three axes": (
        {"query_segment_ids": HASH},
        ValueError,
        r"query_segment_ids must be .* got shape \(2, 8, 4\)",
    ),
    "ids of another batch": (
        {"query_segment_ids": jnp.zeros((3, 8), jnp.int32)},
        ValueError,
        "query_segment_ids.* batch size .*3",
    ),
    "sides of two batches": (
        {"query_segment_ids": IDS, "key_segment_ids": jnp.zeros((3, 8), jnp.int32)},
        ValueError,
        "query_segment_ids and key_segment_ids .*must have the same batch size or 1, got 2 and 3",
    ),
    "ids of the keys alone": ({"key_segment_ids": IDS}, ValueError, "query_segment_ids must be given with key_segment"),
    "no array": ({"query_segment_ids": [0] * 8}, TypeError, "query_segment_ids must be an array, got list"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("operator", ["causal", "hash", "range"])
@pytest.mark.parametrize("name", BAD)
def test_bad_ids_are_named(name, operator):
    options, error, message = BAD[name]
    call = {
        "causal": partial(scfa_jax.causal_attention, X, X, X),
        "hash": partial(scfa_jax.hash_sparse_attention, X, X, X, HASH),
        "range": partial(scfa_jax.range_attention, X, X, X, HASH, HASH),
    }[operator]
    if (name, operator) == ("ids of another batch", "causal"):
        message = "batch size 2, .* built for 3"
    with pytest.raises(error, match=message):
        call(**options)


def test_one_row_of_ids_needs_as_many_keys_as_queries():
    with pytest.raises(ValueError, match=r"key_segment_ids may be None only where .* got 5 and 8"):
        scfa_jax.causal_attention(X, X[:, :5], X[:, :5], query_offset=0, query_segment_ids=IDS)
