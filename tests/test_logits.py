"""What decoders of today do: soft caps of logits, sinks in the denominator, values of a size of their own."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import HAS_GPU
from lowering import lowered_for_cuda, number_of_kernels

import scfa_jax
from scfa_jax import index as indices
from scfa_jax import reference

BATCH, LENGTH, HEADS, KEY_HEADS, HEAD_DIM, VALUE_DIM = 2, 70, 4, 2, 16, 24
NAMES = ("output", "log-sum-exp", "query", "key", "value", "sinks")


def hashes(heads: int, seed: int) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (2, BATCH, LENGTH, heads), 0, 3, jnp.int32)


QUERY_HASH, KEY_HASH = hashes(HEADS, 1), hashes(KEY_HEADS, 2)
PATTERNS = {
    "causal": lambda: scfa_jax.causal_index(LENGTH, LENGTH),
    "window with sinks": lambda: scfa_jax.window_index(LENGTH, LENGTH, 8, 4),
    "hash": lambda: scfa_jax.hash_index(QUERY_HASH[0], KEY_HASH[0], num_buckets=3),
    "rounds": lambda: scfa_jax.hash_index(QUERY_HASH, KEY_HASH, exclude_self=True),
    "keep": lambda: scfa_jax.keep_index(QUERY_HASH[0] > 0, KEY_HASH[0] > 0),
    "range": lambda: scfa_jax.range_index(10 * QUERY_HASH[0], 20 * QUERY_HASH[1], LENGTH),
}


@functools.cache
def pattern(name: str):
    """An index or several, and what they say densely, bool `[B, N, T, S]`."""
    made = PATTERNS[name]()
    mask = np.asarray(indices.mask(made))
    return made, np.broadcast_to(np.repeat(mask, HEADS // mask.shape[1], axis=1), (BATCH, HEADS, LENGTH, LENGTH))


def arrays(dtype=jnp.float32, head_dim: int = HEAD_DIM, value_dim: int = VALUE_DIM, spread: float = 1.0):
    """Query, key, value, sinks, and cotangents of the output and the log-sum-exp."""
    keys = jax.random.split(jax.random.key(3), 6)
    sizes = ((HEADS, head_dim), (KEY_HEADS, head_dim), (KEY_HEADS, value_dim))
    query, key, value = (
        (spread * jax.random.normal(k, (BATCH, LENGTH, *size))).astype(dtype)
        for k, size in zip(keys, sizes, strict=False)
    )
    sinks, by_output, by_logsumexp = (
        jax.random.normal(k, shape)
        for k, shape in zip(
            keys[3:], ((HEADS,), (BATCH, LENGTH, HEADS, value_dim), (BATCH, LENGTH, HEADS)), strict=True
        )
    )
    return query, key, value, sinks, by_output.astype(dtype), by_logsumexp


@functools.partial(jax.jit, static_argnames=("implementation", "soft_cap", "with_sinks"))
def results(index, query, key, value, sinks, by_output, by_logsumexp, *, implementation, soft_cap, with_sinks=True):
    """Output, log-sum-exp, and the gradients of all four arrays."""

    def attend(query, key, value, sinks):
        return scfa_jax.sparse_attention(
            *(query, key, value, index),
            logits_soft_cap=soft_cap,
            sink_logits=sinks if with_sinks else None,
            implementation=implementation,
            return_residual=True,
        )

    found, pull_back = jax.vjp(attend, query, key, value, sinks)
    return *found, *pull_back((by_output, by_logsumexp))


def expected(mask, query, key, value, sinks, by_output, by_logsumexp, soft_cap, with_sinks=True):
    """The same by definition, in float64."""
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x.astype(jnp.float32)), jnp.float64) for x in (query, key, value, sinks)]

        def attend(query, key, value, sinks):
            key, value = (jnp.repeat(x, HEADS // KEY_HEADS, axis=2) for x in (key, value))
            logits = jnp.einsum("btnh,bsnh->bnts", query, key) * query.shape[3] ** -0.5
            logits = logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
            numerators = jnp.where(mask, jnp.exp(logits), 0)
            total = numerators.sum(axis=3) + (jnp.exp(sinks)[:, None] if with_sinks else 0)
            has_key = mask.any(axis=3)
            total = jnp.where(has_key, total, 1)
            output = jnp.einsum("bnts,bsnh->btnh", numerators / total[..., None], value)
            return output, jnp.where(has_key, jnp.log(total), 0).swapaxes(1, 2)

        found, pull_back = jax.vjp(attend, *wide)
        given = (jnp.asarray(np.asarray(x.astype(jnp.float32)), jnp.float64) for x in (by_output, by_logsumexp))
        output, logsumexp = found
        logsumexp = jnp.where(mask.any(axis=3).swapaxes(1, 2), logsumexp, -jnp.inf)
        return [np.asarray(x) for x in (output, logsumexp, *pull_back(tuple(given)))]


def assert_close(found, wanted, tolerance: float) -> None:
    for name, one, other in zip(NAMES, found, wanted, strict=False):
        assert one.shape == other.shape, name
        one = np.asarray(one.astype(jnp.float32), np.float64)
        np.testing.assert_array_equal(np.isneginf(one), np.isneginf(other), err_msg=name)
        one, other = (np.where(np.isneginf(x), 0, x) for x in (one, other))
        assert np.abs(one - other).max() <= tolerance * np.abs(other).max(), name


@pytest.mark.parametrize(("name", "soft_cap"), [*((name, 0.7) for name in PATTERNS), ("hash", None)])
def test_results_and_gradients_are_exact(name, soft_cap, implementation):
    index, mask = pattern(name)
    given = arrays()
    found = results(index, *given, implementation=implementation, soft_cap=soft_cap)
    assert_close(found, expected(mask, *given, soft_cap), 1e-5)


@pytest.mark.parametrize(("name", "dtype"), [("hash", jnp.float16), ("window with sinks", jnp.bfloat16)])
def test_in_16_bits_they_are_as_exact_as_their_rounding(name, dtype, implementation):
    index, mask = pattern(name)
    given = arrays(dtype)
    found = results(index, *given, implementation=implementation, soft_cap=0.7)
    assert [x.dtype for x in found[2:]] == [dtype, dtype, dtype, jnp.float32]
    assert_close(found, expected(mask, *given, 0.7), 2 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("sizes", [(16, 64), (192, 128)], ids=str)
def test_values_have_a_size_of_their_own(sizes, implementation):
    index, mask = pattern("hash")
    given = arrays(jnp.float32, *sizes)
    found = results(index, *given, implementation=implementation, soft_cap=None, with_sinks=False)
    wanted = expected(mask, *given, None, with_sinks=False)
    assert found[0].shape == (BATCH, LENGTH, HEADS, sizes[1])
    assert_close(found, wanted, 1e-5)


def test_any_size_of_values_on_xla():
    index, mask = pattern("causal")
    given = arrays(jnp.float32, 5, 3)
    found = results(index, *given, implementation="xla", soft_cap=None, with_sinks=False)
    assert_close(found, expected(mask, *given, None, with_sinks=False), 1e-5)


def test_values_of_a_size_that_kernels_lack_go_to_xla():
    query, key, value, *_ = arrays(jnp.float32, 16, 20)
    with pytest.raises(NotImplementedError, match=r'"triton.*" cannot do this: .*20'):
        scfa_jax.causal_attention(query, key, value, implementation="triton_interpret")
    assert scfa_jax.causal_attention(query, key, value).shape == (BATCH, LENGTH, HEADS, 20)


@pytest.mark.parametrize("name", ["causal", "hash"])
@pytest.mark.parametrize("sizes", [(192, 128), (64, 256)], ids=str)
def test_they_lower_for_cuda_to_as_many_kernels(name, sizes):
    index, _ = pattern(name)

    def loss(options, query, key, value, sinks):
        options = {"sink_logits": sinks, "logits_soft_cap": 30.0} if options else {}
        return scfa_jax.sparse_attention(query, key, value, index, implementation="triton", **options).sum()

    query, key, value, sinks, *_ = arrays(jnp.bfloat16, *sizes)
    plain, capped = (
        number_of_kernels(
            lowered_for_cuda(jax.grad(functools.partial(loss, options), (0, 1, 2)), query, key, value, sinks)
        )
        for options in (False, True)
    )
    assert plain == capped > 2


def test_every_operator_takes_them_and_the_reference_defines_them(one_implementation):
    query, key, value, sinks, *_ = arrays()
    options = {"logits_soft_cap": 0.7, "sink_logits": sinks}
    start, stop = 10 * QUERY_HASH[0], 20 * QUERY_HASH[1]
    for name, more in (
        ("causal_attention", ()),
        ("window_attention", (8,)),
        ("hash_sparse_attention", (QUERY_HASH[0], KEY_HASH[0])),
        ("qk_sparse_attention", (QUERY_HASH[0] > 0, KEY_HASH[0] > 0)),
        ("range_attention", (start, stop)),
    ):
        ours = jax.jit(functools.partial(getattr(scfa_jax, name), implementation=one_implementation, **options))
        defined = jax.jit(functools.partial(getattr(reference, name), **options))
        found, wanted = (attend(query, key, value, *more) for attend in (ours, defined))
        np.testing.assert_allclose(found, wanted, atol=3e-6, err_msg=name)


@pytest.mark.parametrize("name", ["rounds"])
def test_rows_that_take_no_part_do_not_leak(name, implementation):
    index, mask = pattern(name)
    given = [*arrays()]
    has_key = jnp.asarray(mask.any(axis=3).swapaxes(1, 2))  # [B, T, N]
    met = jnp.asarray(mask.any(axis=2).reshape(BATCH, KEY_HEADS, -1, LENGTH).any(axis=2).swapaxes(1, 2))
    clean = results(index, *given, implementation=implementation, soft_cap=0.7)
    for place, taken in ((0, has_key), (1, met), (2, met), (4, has_key), (5, has_key)):
        taken = taken if given[place].ndim == 3 else taken[..., None]
        given[place] = jnp.where(taken, given[place], jnp.nan)
    found = results(index, *given, implementation=implementation, soft_cap=0.7)
    for one, other in zip(found, clean, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_stranded_query_gives_its_sink_no_gradient(implementation):
    query, key, value, sinks, by_output, by_logsumexp = arrays()
    nothing = scfa_jax.range_index(
        jnp.zeros((1, 1, 1), jnp.int32), jnp.zeros((1, 1, 1), jnp.int32), LENGTH, query_length=LENGTH
    )
    output, logsumexp, *gradients = results(
        nothing, query, key, value, sinks, by_output, by_logsumexp, implementation=implementation, soft_cap=None
    )
    assert np.isneginf(logsumexp).all()
    for x in (output, *gradients):
        np.testing.assert_array_equal(x, 0)


def test_a_sink_of_minus_infinity_is_none_and_a_large_one_takes_all(implementation):
    index, _ = pattern("hash")
    query, key, value, sinks, *given = arrays()
    attend = functools.partial(results, index, query, key, value, implementation=implementation, soft_cap=None)
    without = attend(sinks, *given, with_sinks=False)
    none = attend(jnp.full_like(sinks, -jnp.inf), *given)
    for one, other in zip(none[:5], without[:5], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(none[5], 0)
    output, logsumexp, *gradients = attend(jnp.full_like(sinks, 1e4), *given)
    np.testing.assert_array_equal(output, 0)
    assert (np.isneginf(logsumexp) | (logsumexp == 1e4)).all()
    assert all(np.isfinite(x).all() for x in gradients)


def test_large_scores_stay_below_the_cap(implementation):
    index, mask = pattern("hash")
    given = arrays(spread=100.0)
    found = results(index, *given, implementation=implementation, soft_cap=5.0)[:2]
    logsumexp = np.asarray(found[1])
    assert logsumexp[np.isfinite(logsumexp)].max() < 5 + np.log(LENGTH + np.exp(np.abs(given[3]).max()))
    wanted = expected(mask, *given, 5.0)
    assert_close(found, wanted, 1e-4 if HAS_GPU else 1e-5)


def test_a_cap_far_above_the_logits_changes_nothing(implementation):
    index, _ = pattern("hash")
    given = arrays()
    found, plain = (
        results(index, *given, implementation=implementation, soft_cap=soft_cap) for soft_cap in (1e4, None)
    )
    for one, other in zip(found, plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)


BAD = {
    "cap of zero": ({"logits_soft_cap": 0.0}, ValueError, "logits_soft_cap must be above 0, got 0.0"),
    "cap of an array": ({"logits_soft_cap": jnp.ones(())}, TypeError, "logits_soft_cap must be a number"),
    "sinks of another shape": ({"sink_logits": jnp.zeros(3)}, ValueError, r"sink_logits must be \[N\] with N = 4"),
    "sinks of integers": ({"sink_logits": jnp.zeros(4, jnp.int32)}, TypeError, "sink_logits must be float32"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_named(case, unchecked):
    options, error, message = BAD[case]
    query, key, value, *_ = arrays()
    with pytest.raises(error, match=message):
        scfa_jax.causal_attention(query, key, value, **options)
