"""Every operator, on every implementation: values, gradients, and what rows that take no part may not do."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    CHOSEN,
    PATTERNS,
    SMALL_BLOCKS,
    Case,
    Shape,
    chosen_case,
    chosen_cases,
    drawn_cases,
    hash_mask,
    make_case,
)
from conftest import AS_USERS_COMPILE, HAS_GPU, IMPLEMENTATIONS, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_as_exact_as_plain, cotangents, results_and_gradients

import scfa_jax
from scfa_jax import BlockSizes, TileShape, reference


def options(implementation):
    return {"implementation": implementation, "block_sizes": SMALL_BLOCKS}


def run(case: Case, implementation, **more):
    """Output, log-sum-exp and gradients for random cotangents."""
    given = cotangents(np.random.default_rng(0), case.query)
    return case.compiled(**options(implementation), **more)(case.query, case.key, case.value, *given)


def check(case: Case, implementation, **more):
    """Asserts that results and gradients are as exact as plain attention's."""
    arrays = (case.query, case.key, case.value)
    scale = more.get("scale")
    assert_as_exact_as_plain(case.compiled(**{**options(implementation), **more}), *arrays, case.mask, scale=scale)


INTERPRETER = "triton_interpret"  # slow: where one pattern stands for others in it, plain JAX and a GPU run all
EXACT = [
    (implementation, pattern, dtype)
    for implementation in IMPLEMENTATIONS
    for pattern, dtype in CHOSEN
    if implementation != INTERPRETER or dtype == jnp.float32 or pattern in ("causal", "hash")
]


@pytest.mark.parametrize(("implementation", "pattern", "dtype"), EXACT, ids=lambda x: getattr(x, "__name__", x))
def test_results_and_gradients_are_as_exact_as_plain_attention(implementation, pattern, dtype):
    for case in chosen_cases(pattern, dtype):
        check(case, implementation)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=examples(16))
@given(data=st.data())
def test_random_cases_are_as_exact_as_plain_attention(implementation, pattern, data):
    check(data.draw(drawn_cases(pattern)), implementation)


@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "xla"])
@pytest.mark.parametrize("head_dim", [72, 256])
def test_head_sizes_of_kernels(implementation, head_dim):
    shape = Shape(1, 40, 40, 1, 1, head_dim)
    check(make_case("hash", np.random.default_rng(head_dim), shape, jnp.float32, kind="2"), implementation)


@pytest.mark.parametrize("head_dim", [1, 7, 300])
def test_any_head_size_on_xla(head_dim):
    shape = Shape(1, 40, 40, 2, 1, head_dim)
    check(make_case("hash", np.random.default_rng(head_dim), shape, jnp.float32, kind="2"), "xla")


@pytest.mark.parametrize("scale", [-0.5, 0])
def test_scale_of_any_sign(one_implementation, scale):
    check(make_case("hash", np.random.default_rng(3), Shape(), jnp.float32), one_implementation, scale=scale)


@pytest.mark.parametrize("pattern", ["causal", "hash"])
def test_large_scores_do_not_overflow(implementation, pattern):
    case = chosen_cases(pattern, jnp.float32)[0]  # compiled above
    check(replace(case, query=case.query * 40, key=case.key * 40), implementation)


def test_default_block_sizes(implementation):
    for pattern in ("hash",) if implementation == INTERPRETER else ("causal", "hash"):
        case = make_case(pattern, np.random.default_rng(5), Shape(1, 150, 170, 2, 1, 16), jnp.bfloat16)
        check(case, implementation, block_sizes=None)


def test_two_buckets_in_one_tile_of_keys(implementation):
    """Where a tile of keys spans two buckets, positions in it do not ascend: the authors' kernels fail here."""
    rng = np.random.default_rng(6)
    ids = rng.permutation(np.repeat(np.arange(3, dtype=np.int32), (192, 256, 320)))
    query_hash = jnp.asarray(ids)[None, :, None]
    key_hash = jnp.asarray(rng.permutation(ids))[None, :, None]
    query, key, value = (jnp.asarray(rng.normal(size=(1, 768, 1, 16)), jnp.float32) for _ in range(3))
    for exclude_self, size in ((False, 32), (True, 128)):
        case = Case(
            query,
            key,
            value,
            hash_mask(query_hash, key_hash, exclude_self=exclude_self),
            scfa_jax.hash_sparse_attention,
            reference.hash_sparse_attention,
            (query_hash, key_hash),
            {"exclude_self": exclude_self},
        )
        check(case, implementation, block_sizes=BlockSizes(*(TileShape(size, size),) * 3))


STRANDED = {  # of the shapes and options that are compiled above
    "all queries dropped": ("keep", {"query_density": 0.0, "offset": (27, 27)}),
    "all keys dropped": ("keep", {"key_density": 0.0, "offset": (27, 27)}),
    "first keys dropped": ("keep", {"query_density": 1.0, "key_density": 0.1, "offset": (0, 0)}),
    "empty ranges": ("range", {"longest": 0.0}),
    "every bucket distinct, self excluded": (
        "shared_hash",
        {"kind": "distinct", "exclude_self": True, "offset": (0, 0)},
    ),
    "first of each bucket, self excluded": ("shared_hash", {"kind": "4", "exclude_self": True, "offset": (0, 0)}),
    "queries before all keys": ("causal", {"offset": (-10, -60)}),
    "no block chosen, and none local": ("blocks", {"kind": "none", "num_local": 2, "offset": (100, -60)}),
    "few buckets in common": ("hash", {"kind": "distinct", "exclude_self": True, "offset": (0, 0)}),
}


@pytest.mark.parametrize("name", STRANDED)
def test_stranded_queries_give_exact_zeros(implementation, name):
    pattern, more = STRANDED[name]
    case = chosen_case(pattern, jnp.float32, 7, more)
    output, logsumexp, dquery, dkey, dvalue = map(np.asarray, run(case, implementation))
    (batch, _, heads, _), key_heads = case.query.shape, case.key.shape[2]
    mask = np.broadcast_to(case.mask, (batch, heads, *case.mask.shape[2:]))
    stranded = ~mask.any(3).swapaxes(1, 2)  # [B, T, N]
    unseen = ~mask.any(2).reshape(batch, key_heads, -1, mask.shape[3]).any(2).swapaxes(1, 2)  # [B, S, K]
    assert stranded.any()
    np.testing.assert_array_equal(output[stranded], 0)
    np.testing.assert_array_equal(logsumexp[stranded], -np.inf)
    np.testing.assert_array_equal(dquery[stranded], 0)
    np.testing.assert_array_equal(dkey[unseen], 0)
    np.testing.assert_array_equal(dvalue[unseen], 0)
    for x in (output, dquery, dkey, dvalue, logsumexp[~stranded]):
        assert np.isfinite(x).all()


LEAKS = [
    (implementation, pattern, grouped)
    for implementation in IMPLEMENTATIONS
    for pattern, grouped in (
        *(("hash", True), ("hash", False), ("keep", False), ("range", True), ("causal", False), ("blocks", False)),
    )
    if implementation != INTERPRETER or (pattern, grouped) in (("hash", True), ("keep", False))
]


@pytest.mark.parametrize(("implementation", "pattern", "grouped"), LEAKS)
def test_rows_that_take_no_part_do_not_leak(implementation, pattern, grouped):
    """NaN or inf in unseen keys and values, in stranded queries and in their cotangents changes no bit."""
    shape = Shape(1, 60, 70, 2, 1 if grouped else 2, 16)
    more = {
        "hash": {"kind": "4", "exclude_self": True},
        "keep": {"query_density": 0.6, "key_density": 0.4},
        "range": {"longest": 0.02},
        "causal": {"offset": -3},
        "blocks": {"kind": "none", "offset": -3},
    }[pattern]
    case = make_case(pattern, np.random.default_rng(8), shape, jnp.float32, **more)
    mask = np.broadcast_to(case.mask, (1, 2, 60, 70))
    stranded = ~mask.any(3).swapaxes(1, 2)
    seen = mask.any(2).swapaxes(1, 2)
    unseen = ~seen.reshape(1, 70, shape.key_heads, -1).any(3)
    assert stranded.any()
    assert unseen.any()
    given = cotangents(np.random.default_rng(0), case.query)

    def results_of(attend):
        def results(query, key, value, output_cotangent, logsumexp_cotangent):
            # Not `results_and_gradients`: the cotangents of stranded queries are to be poisoned too.
            (output, logsumexp), pull = jax.vjp(attend, query, key, value)
            return output, logsumexp, *pull((output_cotangent, logsumexp_cotangent))

        return jax.jit(results)

    # Poison for the rows at hand; any finite value for the comparison.
    spoil = lambda x, rows, by: jnp.where(rows.reshape(*rows.shape, *(1,) * (x.ndim - 3)), by, x)

    def spoiled(by):
        return (
            spoil(case.query, stranded, by),
            spoil(case.key, unseen, by),
            spoil(case.value, unseen, by),
            spoil(given[0], stranded, by),
            spoil(given[1], stranded, by),
        )

    ours = results_of(lambda *qkv: case.attend(*qkv, **options(implementation)))
    dense = results_of(lambda *qkv: case.dense(*qkv, *case.pattern, **case.options, return_residual=True))
    for attend in (ours, dense) if implementation == IMPLEMENTATIONS[0] else (ours,):
        clean = attend(*spoiled(0.5))
        for poison in (np.nan, np.inf):
            for x, y in zip(attend(*spoiled(poison)), clean, strict=True):
                np.testing.assert_array_equal(x, y)
                assert not np.isnan(x).any()


def test_keys_that_one_head_of_a_shared_mask_alone_attends_to_do_not_leak_into_others(implementation):
    """Two key heads share one mask of the index, and only the first of them has queries behind row 8."""
    query, key, value, cotangent = np.random.default_rng(8).normal(size=(4, 1, 32, 4, 16)).astype(np.float32)
    query_keep = np.arange(32)[:, None] < np.array([32, 8, 32, 32])
    unseen = np.arange(32)[:, None] >= np.array([32, 8, 32, 32])
    index = scfa_jax.keep_index(jnp.asarray(query_keep), jnp.ones((32, 2), bool))

    @jax.jit
    def results(*arrays):
        attend = partial(scfa_jax.sparse_attention, index=index, **options(implementation))
        output, pull = jax.vjp(attend, *arrays)
        return output, *pull(cotangent)

    clean = results(query, key, value)
    planted = results(query, *(np.where(unseen[..., None], np.float32(np.nan), x) for x in (key, value)))
    for x, y in zip(planted, clean, strict=True):
        np.testing.assert_array_equal(x, y)


def test_nan_in_a_row_that_takes_part_is_not_hidden(implementation):
    case = make_case("causal", np.random.default_rng(9), Shape(1, 40, 40, 1, 1, 16), jnp.float32)
    value = case.value.at[0, 7].set(jnp.nan)
    output, _ = case.attend(case.query, case.key, value, **options(implementation))
    assert np.isnan(output[0, 7:]).all()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_reruns_give_the_same_bits(one_implementation, pattern):
    dtypes = [dtype for name, dtype in CHOSEN if name == pattern]  # float32, and one of 16 bits: compiled above
    case = chosen_cases(pattern, dtypes[-1 if HAS_GPU else 0])[0]
    for x, y in zip(run(case, one_implementation), run(case, one_implementation), strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0)], ids=str)
@pytest.mark.parametrize("pattern", ["causal", "hash", "keep", "range", "blocks"])
def test_empty_sequences(one_implementation, pattern, lengths):
    check_short(pattern, lengths, one_implementation)


@pytest.mark.parametrize("lengths", [(1, 9), (9, 1)], ids=str)
@pytest.mark.parametrize("pattern", ["causal", "hash", "keep", "range", "blocks"])
def test_sequences_of_one(one_implementation, pattern, lengths):
    check_short(pattern, lengths, one_implementation)


@pytest.mark.parametrize("lengths", [(1, 9), (9, 1)], ids=str)
def test_kernels_take_sequences_of_one(implementation, lengths):
    check_short("hash", lengths, implementation)


def check_short(pattern, lengths, implementation):
    case = make_case(pattern, np.random.default_rng(11), Shape(2, *lengths, 2, 2, 16), jnp.float32)
    output, logsumexp, *gradients = run(case, implementation)
    dense = jax.jit(partial(case.dense, **case.options, return_residual=True))
    want, want_logsumexp = dense(case.query, case.key, case.value, *case.pattern)
    np.testing.assert_allclose(output, want, atol=1e-5)
    np.testing.assert_allclose(logsumexp, want_logsumexp, atol=1e-5)
    for gradient, x in zip(gradients, (case.query, case.key, case.value), strict=True):
        assert gradient.shape == x.shape
        assert np.isfinite(gradient).all()


def test_empty_batch(implementation):
    empty = jnp.zeros((0, 5, 2, 16))
    assert scfa_jax.causal_attention(empty, empty, empty, implementation=implementation).shape == empty.shape


@pytest.mark.parametrize("pattern", PATTERNS)
def test_without_a_batch_axis(one_implementation, pattern):
    case = make_case(pattern, np.random.default_rng(12), Shape(1, 30, 40, 2, 2, 16), jnp.float32)
    attend = partial(case.operator, **case.options, **options(one_implementation), return_residual=True)
    both = lambda *arrays: (attend(*arrays), attend(*(x[0] for x in arrays)))
    compiled = jax.jit(both, compiler_options=AS_USERS_COMPILE)
    (want, want_logsumexp), (output, logsumexp) = compiled(case.query, case.key, case.value, *case.pattern)
    np.testing.assert_array_equal(output, want[0])
    np.testing.assert_array_equal(logsumexp, want_logsumexp[0])


@pytest.mark.parametrize(("pattern", "axes"), [("hash", (1,)), ("hash", (0, 2)), ("keep", (0, 2)), ("range", (1,))])
def test_axes_of_one_broadcast(one_implementation, pattern, axes):
    case = make_case(pattern, np.random.default_rng(13), Shape(2, 40, 40, 2, 2, 16), jnp.float32)
    narrow = tuple(x[tuple(slice(1) if i in axes else slice(None) for i in range(3))] for x in case.pattern)
    wide = tuple(jnp.broadcast_to(x, y.shape) for x, y in zip(narrow, case.pattern, strict=True))
    attend = partial(case.operator, **case.options, **options(one_implementation))
    compiled = jax.jit(attend, compiler_options=AS_USERS_COMPILE)
    results = [compiled(case.query, case.key, case.value, *pattern) for pattern in (narrow, wide)]
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize(
    ("heads", "promise"),
    [((4, 2, 4, 1), None), ((4, 2, 1, 2), 5), ((6, 2, 6, 2), None), ((4, 4, 1, 4), 5), ((4, 1, 4, 1), 5)],
    ids=str,
)
def test_hashes_of_grouped_and_shared_heads(implementation, heads, promise):
    query_heads, key_heads, query_hash_heads, key_hash_heads = heads
    rng = np.random.default_rng(14)
    shape = Shape(2, 40, 50, query_heads, key_heads, 16)
    case = make_case("hash", rng, shape, jnp.float32)
    query_hash = jnp.asarray(rng.integers(0, 5, (2, 40, query_hash_heads)), jnp.int32)
    key_hash = jnp.asarray(rng.integers(0, 5, (1, 50, key_hash_heads)), jnp.int32)

    @jax.jit
    def both(*arrays):
        got = scfa_jax.hash_sparse_attention(*arrays, num_buckets=promise, query_offset=0, **options(implementation))
        return got, reference.hash_sparse_attention(*arrays, query_offset=0)

    np.testing.assert_allclose(*both(case.query, case.key, case.value, query_hash, key_hash), atol=2e-5)


def test_one_offset_for_each_batch_element(one_implementation):
    case = make_case("causal", np.random.default_rng(15), Shape(3, 20, 40, 2, 2, 16), jnp.float32)
    offsets = jnp.array([0, 20, -30], jnp.int32)
    attend = jax.jit(partial(scfa_jax.causal_attention, **options(one_implementation)))
    got = attend(case.query, case.key, case.value, query_offset=offsets)
    dense = jax.jit(reference.causal_attention)
    for b, offset in enumerate((0, 20, -30)):
        one = [x[b : b + 1] for x in (case.query, case.key, case.value)]
        np.testing.assert_allclose(got[b : b + 1], dense(*one, query_offset=offset), atol=2e-5)


def test_chunked_prefill_equals_one_pass(one_implementation):
    """Queries in two chunks, the second with an offset, see what they see together."""
    case = make_case("shared_hash", np.random.default_rng(16), Shape(1, 60, 60, 2, 2, 16), jnp.float32)
    (ids,) = case.pattern

    @jax.jit
    def in_one_and_in_chunks(query, key, value, ids):
        attend = partial(scfa_jax.hash_sparse_attention, **options(one_implementation))
        parts = slice(0, 37), slice(37, 60)
        chunks = [attend(query[:, at], key, value, ids[:, at], ids, query_offset=at.start) for at in parts]
        return attend(query, key, value, ids), jnp.concatenate(chunks, 1)

    whole, chunks = in_one_and_in_chunks(case.query, case.key, case.value, ids)
    np.testing.assert_allclose(chunks, whole, atol=2e-5)


def test_one_index_serves_many_calls(one_implementation):
    case = make_case("hash", np.random.default_rng(18), Shape(), jnp.float32)
    index = scfa_jax.hash_index(*case.pattern, exclude_self=True)
    want = scfa_jax.hash_sparse_attention(
        case.query, case.key, case.value, *case.pattern, exclude_self=True, **options(one_implementation)
    )
    attend = jax.jit(
        lambda q, index: scfa_jax.sparse_attention(q, case.key, case.value, index, **options(one_implementation))
    )
    np.testing.assert_array_equal(attend(case.query, index), want)


def test_float32_is_exact_to_float32_whatever_the_default_precision(implementation):
    case = make_case("hash", np.random.default_rng(19), Shape(1, 128, 128, 2, 2, 64), jnp.float32, kind="2")
    with jax.default_matmul_precision("bfloat16"):
        got = run(case, implementation)
    given = cotangents(np.random.default_rng(0), case.query)
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        wide = (x.astype(jnp.float64) for x in (case.query, case.key, case.value))
        dense = lambda *qkv: reference.attention(*qkv, case.mask)
        want = [np.asarray(x) for x in jax.jit(partial(results_and_gradients, dense))(*wide, *given)]
    for name, x, y in zip(("output", "logsumexp", "dq", "dk", "dv"), got, want, strict=True):
        x, y = (np.where(np.isfinite(y), z, 0) for z in (np.asarray(x, np.float64), y))
        assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y), name


def test_under_x64(implementation):
    case = make_case("hash", np.random.default_rng(20), Shape(), jnp.float32, promise=4)
    want = run(case, implementation)
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        got = run(case, implementation)
        if implementation != INTERPRETER:
            run(make_case("range", np.random.default_rng(20), Shape(), jnp.float32), implementation)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_the_default_implementation_runs_here():
    case = chosen_cases("shared_hash", jnp.bfloat16)[0]
    expected = "triton" if HAS_GPU else "xla"
    for x, y in zip(run(case, None), run(case, expected), strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


def test_a_sequence_of_implementations_takes_the_first_that_can():
    case = make_case("causal", np.random.default_rng(22), Shape(1, 20, 20, 1, 1, 12), jnp.float32)
    got, _ = case.attend(case.query, case.key, case.value, implementation=("triton", "triton_interpret", "xla"))
    want, _ = case.attend(case.query, case.key, case.value, implementation="xla")
    np.testing.assert_array_equal(got, want)
