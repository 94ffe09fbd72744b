"""Several rounds of hashing: attention to the union of a query's buckets, each pair once."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SMALL_BLOCKS, Shape, arrays, bucket_ids, hash_mask
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_as_exact_as_plain, results_and_gradients

import scfa_jax
from scfa_jax import index, reference

STATIC = ("implementation", "num_buckets", "exclude_self", "return_residual")
hash_sparse_attention = jax.jit(scfa_jax.hash_sparse_attention, static_argnames=STATIC)
SHAPES = {"grouped": Shape(2, 50, 61, 4, 2, 16), "shared": Shape(1, 64, 64, 2, 2, 16)}


def drawn(rng, num_rounds, shape, dtype, kind, *, exclude_self=False):
    """Query, key, value, hashes of both sides, and the dense mask of their union."""
    qkv = arrays(rng, shape, dtype)
    sides = [
        jnp.stack([jnp.asarray(bucket_ids(rng, size[:3], kind)) for _ in range(num_rounds)])
        for size in (shape.query, shape.key)
    ]
    masks = [hash_mask(*ids, exclude_self=exclude_self) for ids in zip(*sides, strict=True)]
    return SimpleNamespace(qkv=qkv, hashes=sides, mask=np.any(masks, axis=0), collisions=np.sum(masks, axis=0))


@partial(jax.jit, static_argnames=("implementation", "num_buckets", "exclude_self"))
def results_of_union(query_hash, key_hash, *arrays, **options):
    def attend(*qkv):
        return scfa_jax.hash_sparse_attention(
            *qkv,
            query_hash,
            key_hash,
            **options,
            query_offset=0,
            block_sizes=SMALL_BLOCKS,
            return_residual=True,
        )

    return results_and_gradients(attend, *arrays)


def check(case, implementation, **options):
    """Asserts what is asked of a single call: an error at most twice that of plain attention over the union."""
    results = partial(results_of_union, *case.hashes, implementation=implementation, **options)
    assert_as_exact_as_plain(results, *case.qkv, case.mask)


@pytest.mark.parametrize(("num_rounds", "promise"), [(2, None), (3, 8)])
@settings(max_examples=examples(6))
@given(kind=st.sampled_from(("one", "2", "4", "8")), seed=st.integers(0, 2**32 - 1))
def test_the_union_is_as_exact_as_plain_attention(one_implementation, num_rounds, promise, kind, seed):
    case = drawn(np.random.default_rng(seed), num_rounds, SHAPES["grouped"], jnp.float32, kind, exclude_self=True)
    assert (case.collisions > 1).any()
    check(case, one_implementation, num_buckets=promise, exclude_self=True)


def test_in_bfloat16(one_implementation):
    for seed in range(4):
        case = drawn(np.random.default_rng(seed), 2, SHAPES["grouped"], jnp.bfloat16, "4", exclude_self=True)
        check(case, one_implementation, num_buckets=8, exclude_self=True)


@pytest.mark.parametrize("promise", [None, 2**16])
def test_joint_ids_that_do_not_fit_32_bits_are_numbered(promise):
    case = drawn(np.random.default_rng(0), 3, SHAPES["grouped"], jnp.float32, "huge" if promise is None else "4")
    if promise:
        case.hashes = [x * (promise // 4 - 1) for x in case.hashes]
    options = {"implementation": "xla", "query_offset": 0, "return_residual": True}
    attend = partial(scfa_jax.hash_sparse_attention, num_buckets=promise, **options)
    output, logsumexp = jax.jit(attend)(*case.qkv, *case.hashes)
    want, want_logsumexp = jax.jit(reference.attention)(*case.qkv, case.mask)
    np.testing.assert_allclose(output, want, atol=2e-5)
    np.testing.assert_allclose(logsumexp, want_logsumexp, atol=2e-5)


def test_equal_rounds_count_once(implementation):
    """Where all rounds are one, all pairs collide in all of them."""
    case = drawn(np.random.default_rng(1), 1, SHAPES["shared"], jnp.float32, "4")
    (hashes, _), attend = case.hashes, partial(hash_sparse_attention, implementation=implementation)
    once = attend(*case.qkv, hashes[0], num_buckets=4, return_residual=True)
    for num_rounds in (1, 2):
        again = attend(*case.qkv, jnp.repeat(hashes, num_rounds, 0), num_buckets=4, return_residual=True)
        for x, y in zip(again, once, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_a_pair_that_outweighs_the_rest_cancels_cleanly(one_implementation):
    """One key in all rounds has nearly all weight: what is left of the others is as exact as their size allows."""
    rng = np.random.default_rng(2)
    case = drawn(rng, 2, SHAPES["shared"], jnp.float32, "2")
    query, key, value = case.qkv
    case.qkv = (query.at[0, 40:].set(6.0), key.at[0, 3].set(6.0), value)
    case.hashes = [x.at[:, 0, 3].set(1).at[:, 0, 40:].set(1) for x in case.hashes]
    case.mask = np.any([hash_mask(*ids) for ids in zip(*case.hashes, strict=True)], axis=0)
    check(case, one_implementation, num_buckets=2)


def test_stranded_queries_and_segments(one_implementation):
    rng = np.random.default_rng(3)
    case = drawn(rng, 2, SHAPES["shared"], jnp.float32, "distinct")
    ids = jnp.asarray(rng.integers(-1, 2, 64), jnp.int32)
    options = {"exclude_self": True, "query_segment_ids": ids, "return_residual": True, "query_offset": 1}
    got = hash_sparse_attention(*case.qkv, *case.hashes, **options, implementation=one_implementation)
    dense = jax.jit(reference.hash_sparse_attention, static_argnames=STATIC)
    want = dense(*case.qkv, *case.hashes, **options)
    stranded = np.isneginf(want[1])
    assert stranded.any()
    assert not stranded.all()
    np.testing.assert_array_equal(np.isneginf(got[1]), stranded)
    np.testing.assert_array_equal(np.asarray(got[0])[stranded], 0)
    np.testing.assert_allclose(got[0], want[0], atol=2e-5)


def test_without_a_batch_axis_and_with_axes_of_one():
    case = drawn(np.random.default_rng(4), 2, SHAPES["shared"], jnp.float32, "4")
    hashes = case.hashes[0][..., :1]
    attend = partial(scfa_jax.hash_sparse_attention, implementation="xla")
    (got,) = attend(*case.qkv, hashes, hashes)
    alone = attend(*(x[0] for x in case.qkv), hashes, hashes)
    np.testing.assert_array_equal(alone, got)
    (want,) = reference.hash_sparse_attention(*case.qkv, hashes)
    np.testing.assert_allclose(got, want, atol=2e-5)


X, IDS = jnp.zeros((2, 8, 4, 16)), jnp.zeros((3, 2, 8, 4), jnp.int32)


@pytest.mark.usefixtures("unchecked")
def test_bad_rounds_are_named():
    with pytest.raises(ValueError, match=r"query_hash must have at least one round, got shape \(0, 2, 8, 4\)"):
        scfa_jax.hash_sparse_attention(X, X, X, IDS[:0])
    for key_hash in (IDS[:2], IDS[0]):
        with pytest.raises(ValueError, match=r"key_hash must be \[3, B, S, K\], with as many rounds as query_hash"):
            scfa_jax.hash_sparse_attention(X, X, X, IDS, key_hash)
    with pytest.raises(TypeError, match="query_hash must be int32, got float32"):
        scfa_jax.hash_sparse_attention(X, X, X, IDS * 1.0)
    with pytest.raises(ValueError, match=r"query_hash must be \[B, length, heads\].* got shape \(3, 2, 8, 4\)"):
        scfa_jax.local_hash_index(IDS, None, 2)


def test_an_index_of_rounds_takes_away_what_several_share():
    case = drawn(np.random.default_rng(5), 3, SHAPES["shared"], jnp.float32, "4")
    parts = scfa_jax.hash_index(*case.hashes, num_buckets=4)
    assert [part.sign for part in parts] == [1, 1, 1, -1, -1, -1, 1]
    np.testing.assert_array_equal(*np.broadcast_arrays(index.mask(parts), case.mask))
    np.testing.assert_array_equal(index.pairs(parts), np.sum(case.mask, axis=(2, 3)))
    assert index.is_disjoint(parts)
    assert not index.is_disjoint(parts[:3])
