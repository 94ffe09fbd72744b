"""The Reformer's attention against its dense definition, written here from the paper."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from tolerance import plain_attention

import scfa_jax
from models import reformer
from models.reformer import default_chunk_size, reformer_attention

BUCKETS = 4
attend = jax.jit(reformer_attention, static_argnames=("num_buckets", "chunk_size"))


def inputs(length: int, rounds: int = 1, seed: int = 0, batch: int = 2, heads: int = 3, width: int = 8):
    """Queries, values, buckets `[R, B, T, N]` and a cotangent."""
    keys = jax.random.split(jax.random.key(seed), 4)
    query, value, cotangent = (jax.random.normal(key, (batch, length, heads, width)) for key in keys[:3])
    buckets = jax.random.randint(keys[3], (rounds, batch, length, heads), 0, BUCKETS)
    return query, value, buckets, cotangent


def seen_pairs(buckets: np.ndarray, chunk_size: int) -> np.ndarray:
    """What one round lets tokens with these buckets `[T]` see, themselves left out: bool `[T, T]`."""
    length = len(buckets)
    ranking = sorted(range(length), key=lambda token: (buckets[token], token))
    chunk = {token: place // chunk_size for place, token in enumerate(ranking)}
    seen = np.zeros((length, length), bool)
    for i in range(length):
        for j in range(i):
            seen[i, j] = buckets[i] == buckets[j] and chunk[j] in (chunk[i], chunk[i] - 1)
    return seen


def union_mask(buckets, chunk_size: int, segment_ids=None) -> np.ndarray:
    """What all rounds together let tokens see, themselves if nothing else: bool `[B, N, T, T]`."""
    rounds, batch, length, heads = buckets.shape
    mask = np.zeros((batch, heads, length, length), bool)
    for r, b, n in np.ndindex(rounds, batch, heads):
        mask[b, n] |= seen_pairs(np.asarray(buckets[r, b, :, n]), chunk_size)
    if segment_ids is not None:
        ids = np.asarray(segment_ids)
        mask &= (ids[:, :, None] == ids[:, None, :])[:, None]
    alone = ~mask.any(axis=3, keepdims=True)
    return mask | (alone & np.eye(length, dtype=bool))


def dense(query, value, mask, normalize_key: bool = True):
    """Softmax over the pairs of the mask, all in one: what merged rounds must equal."""
    key = query / jnp.sqrt((query**2).sum(-1, keepdims=True) + 1e-6) if normalize_key else query
    return plain_attention(query, key, value, jnp.asarray(mask))[0]


def assert_equal_with_gradients(function, definition, query, value, cotangent):
    both = jax.jit(lambda *x: (with_gradients(function, *x), with_gradients(definition, *x)))
    for x, y in zip(*both(query, value, cotangent), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6)


def with_gradients(function, query, value, cotangent):
    output, pull = jax.vjp(function, query, value)
    return output, *pull(cotangent)


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize(("length", "chunk_size"), [(24, 4), (24, 24), (23, 5), (23, 1), (3, 8), (1, 1)])
def test_outputs_and_gradients_are_those_of_the_dense_definition(length, chunk_size, rounds):
    query, value, buckets, cotangent = inputs(length, rounds)
    mask = union_mask(buckets, chunk_size)
    assert_equal_with_gradients(
        lambda query, value: reformer_attention(query, value, buckets, num_buckets=BUCKETS, chunk_size=chunk_size),
        lambda query, value: dense(query, value, mask),
        query,
        value,
        cotangent,
    )


def test_one_chunk_as_long_as_the_sequence_is_exact_hash_attention():
    query, value, buckets, _ = inputs(40)
    key = query / jnp.sqrt((query**2).sum(-1, keepdims=True) + 1e-6)
    has_key = np.asarray(scfa_jax.reference.hash_mask(buckets[0], buckets[0], exclude_self=True)).any(axis=3)
    assert 0 < (~has_key).sum() <= 2 * 3 * BUCKETS  # the first token of each bucket: the Reformer lets it see itself
    rows = has_key.swapaxes(1, 2)[..., None]
    got = attend(query, value, buckets, num_buckets=BUCKETS, chunk_size=40)
    for exact in (scfa_jax.hash_sparse_attention, scfa_jax.reference.hash_sparse_attention):
        expected = jax.jit(functools.partial(exact, exclude_self=True))(query, key, value, buckets[0])
        np.testing.assert_allclose(np.where(rows, got, 0), expected, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(np.where(rows, 0, got), np.where(rows, 0, value), rtol=1e-5)


def test_by_default_a_chunk_holds_twice_the_mean_bucket():
    assert default_chunk_size(64, 4) == 32
    assert default_chunk_size(63, 4) == 32
    assert default_chunk_size(63, 1) == 63
    query, value, buckets, _ = inputs(64)
    default, given, other = (
        attend(query, value, buckets, num_buckets=BUCKETS, chunk_size=size) for size in (None, 32, 8)
    )
    np.testing.assert_array_equal(default, given)
    assert not np.allclose(default, other)


@pytest.mark.parametrize("rounds", [1, 2])
def test_segments_do_not_see_each_other(rounds):
    query, value, buckets, cotangent = inputs(24, rounds)
    segment_ids = jnp.repeat(jnp.array([[0, 1, 2], [3, 3, -1]]), 8, axis=1)
    mask = union_mask(buckets, 6, segment_ids)
    options = {"num_buckets": BUCKETS, "chunk_size": 6, "segment_ids": segment_ids}
    assert_equal_with_gradients(
        lambda query, value: reformer_attention(query, value, buckets, **options),
        lambda query, value: jnp.where(segment_ids[:, :, None, None] < 0, 0, dense(query, value, mask)),
        query,
        value,
        cotangent,
    )


def test_keys_may_keep_their_length():
    query, value, buckets, cotangent = inputs(24)
    mask = union_mask(buckets, 6)
    options = {"num_buckets": BUCKETS, "chunk_size": 6, "normalize_key": False}
    assert_equal_with_gradients(
        lambda query, value: reformer_attention(query, value, buckets, **options),
        lambda query, value: dense(query, value, mask, normalize_key=False),
        query,
        value,
        cotangent,
    )


@pytest.mark.parametrize("chunks_at_once", [1, 5])
def test_chunks_in_several_batches_give_the_same(chunks_at_once, monkeypatch):
    query, value, buckets, cotangent = inputs(24, rounds=2)
    results = []
    for at_once in (reformer.SCORES_AT_ONCE, chunks_at_once * 2 * 6 * 6):
        monkeypatch.setattr(reformer, "SCORES_AT_ONCE", at_once)
        by_chunks = lambda *x: reformer_attention(*x, buckets, num_buckets=BUCKETS, chunk_size=6)
        traced = jax.jit(functools.partial(with_gradients, by_chunks)).trace(query, value, cotangent)
        assert ("scan[" in str(traced.jaxpr)) == (at_once < 1000)
        results.append(traced.lower().compile()(query, value, cotangent))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rounds", [1, 2])
def test_bfloat16_is_as_near_to_float32_as_its_rounding(rounds):
    query, value, buckets, _ = inputs(64, rounds)
    query, value = query.astype(jnp.bfloat16), value.astype(jnp.bfloat16)
    options = {"num_buckets": BUCKETS, "chunk_size": 16}
    got = attend(query, value, buckets, **options)
    exact = attend(query.astype(jnp.float32), value.astype(jnp.float32), buckets, **options)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), exact, atol=2**-6 * float(abs(value).max()))


def test_no_later_token_reaches_an_earlier_one():
    query, value, buckets, _ = inputs(24, rounds=2)
    early = lambda query, value: reformer_attention(query, value, buckets, num_buckets=BUCKETS, chunk_size=5)[:, :15]
    for gradient in jax.jit(jax.grad(lambda *x: early(*x).sum(), (0, 1)))(query, value):
        np.testing.assert_array_equal(gradient[:, 15:], 0)
        assert (gradient[:, :15] != 0).any()


@pytest.mark.parametrize(("chunk_size", "leaks"), [(4, True), (40, False)])
def test_where_chunks_miss_something_later_tokens_decide_what(chunk_size, leaks):
    """A property of the Reformer: buckets of later tokens move the borders of the chunks."""
    query, value, buckets, _ = inputs(40)
    options = {"num_buckets": BUCKETS, "chunk_size": chunk_size}
    before = attend(query, value, buckets, **options)
    after = attend(query, value, buckets.at[:, :, 20:].set(0), **options)
    assert np.allclose(before[:, :20], after[:, :20], atol=1e-5) == (not leaks)


def test_memory_grows_with_the_length_and_rows_are_gathered_never_scattered():
    length, size = 512, 16
    query, value, buckets, _ = inputs(length, rounds=2, batch=1, heads=1)
    loss = lambda *x: reformer_attention(*x, buckets, num_buckets=BUCKETS, chunk_size=size).sum()
    largest = 0
    scattered = []

    def visit(jaxpr):
        nonlocal largest
        for equation in jaxpr.eqns:
            largest = max(largest, *(v.aval.size for v in equation.outvars))
            if equation.primitive.name.startswith("scatter"):
                scattered.append(equation.outvars[0].aval)
            for inner in jaxprs_in_params(equation.params):
                visit(inner)

    visit(jax.make_jaxpr(jax.grad(loss, (0, 1)))(query, value).jaxpr)
    assert largest <= 2 * length * max(2 * size, 2 * query.shape[3])  # two rounds of scores, or of keys
    assert largest < length * length
    assert [(x.dtype, x.size) for x in scattered] == [(jnp.int32, 2 * length)]  # the inverse of the order


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"value": jnp.zeros((2, 8, 3, 4))}, "query and value must both be"),
        ({"buckets": jnp.zeros((2, 8, 3), jnp.int32)}, r"buckets must be \[R, B, T, N\]"),
        ({"segment_ids": jnp.zeros((2, 9), jnp.int32)}, r"segment_ids must be \[B, T\]"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"num_buckets": 2**29}, "num_buckets must be at least 1, and times the length below"),
    ],
)
def test_what_does_not_fit_is_named(change, named):
    query, value, buckets, _ = inputs(8)
    arguments = {"query": query, "value": value, "buckets": buckets, "num_buckets": BUCKETS, **change}
    with pytest.raises(ValueError, match=named):
        reformer_attention(**arguments)
