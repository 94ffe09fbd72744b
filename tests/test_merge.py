"""Merging: results over disjoint sets of keys combine to those over all of them, gradients included."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PATTERNS, SMALL_BLOCKS, Shape, make_case
from conftest import AS_USERS_COMPILE
from tolerance import assert_as_exact_as_plain, cotangents, results_and_gradients

import scfa_jax
from scfa_jax import reference

SHAPE = Shape(1, 40, 60, 4, 2, 16)
PARTIAL = {"output_dtype": "float32", "return_residual": True}


def in_parts(case, cuts, attend, merge):
    """A function of query, key and value: the range attention of a case, cut at keys `cuts` and merged."""
    start, stop = case.pattern
    edges = [0, *cuts, SHAPE.key_length]

    def attend_in_parts(query, key, value):
        parts = [
            attend(query, key, value, jnp.clip(start, low, high), jnp.clip(stop, low, high), **PARTIAL)
            for low, high in pairwise(edges)
        ]
        return merge(*zip(*parts, strict=True), output_dtype=query.dtype)

    return attend_in_parts


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("cuts", [(30,), (1, 1, 50)], ids=str)
def test_parts_merge_to_the_whole(one_implementation, cuts, dtype):
    """As exact as one call: parts are not rounded before they are merged."""
    case = make_case("range", np.random.default_rng(0), SHAPE, dtype, longest=0.8)
    attend = partial(scfa_jax.range_attention, implementation=one_implementation, block_sizes=SMALL_BLOCKS)
    results = jax.jit(partial(results_and_gradients, in_parts(case, cuts, attend, scfa_jax.merge_attention)))
    assert not np.asarray(case.mask).any(-1).all()
    assert_as_exact_as_plain(results, case.query, case.key, case.value, case.mask)


def test_the_reference_merges_too():
    case = make_case("range", np.random.default_rng(1), SHAPE, jnp.float32, longest=0.8)
    given = cotangents(np.random.default_rng(2), case.query)
    merged = in_parts(case, (9, 30), reference.range_attention, reference.merge_attention)
    whole = lambda *qkv: reference.range_attention(*qkv, *case.pattern, return_residual=True)
    got, want = (
        jax.jit(partial(results_and_gradients, f))(case.query, case.key, case.value, *given) for f in (merged, whole)
    )
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("merge", [scfa_jax.merge_attention, reference.merge_attention], ids=["scfa_jax", "reference"])
def test_empty_rows_merge_to_nothing(merge):
    """0, -inf and gradients of 0, also where one part is empty, and whatever stands in outputs and cotangents."""
    rng = np.random.default_rng(3)
    is_empty = np.array([[True, False, True, False], [True, True, False, False]])  # [parts, rows]
    outputs = jnp.asarray(rng.normal(size=(2, 4, 1, 3)), jnp.float32)
    logsumexps = jnp.where(is_empty[..., None], -jnp.inf, jnp.asarray(rng.normal(size=(2, 4, 1)), jnp.float32))

    @jax.jit
    def results(outputs, cotangent, logsumexp_cotangent):
        merged, pull = jax.vjp(lambda *parts: merge(*map(list, parts)), outputs, logsumexps)
        return *merged, *pull((cotangent, logsumexp_cotangent))

    everywhere_empty = is_empty.all(0)
    poisoned = outputs.at[is_empty].set(jnp.nan)
    ones = jnp.ones((4, 1, 3)), jnp.ones((4, 1))
    bad = tuple(x.at[everywhere_empty].set(jnp.nan) for x in ones)
    output, logsumexp, of_outputs, of_logsumexps = map(np.asarray, results(poisoned, *bad))
    np.testing.assert_array_equal(output[everywhere_empty], 0)
    np.testing.assert_array_equal(logsumexp[everywhere_empty], -np.inf)
    np.testing.assert_array_equal(of_outputs[is_empty], 0)
    np.testing.assert_array_equal(of_logsumexps[is_empty], 0)
    for x, y in zip((output, logsumexp, of_outputs, of_logsumexps), results(outputs, *ones), strict=True):
        np.testing.assert_array_equal(x, y)
    # A part without keys leaves the other as it is.
    np.testing.assert_allclose(output[1:3, 0], [outputs[0, 1, 0], outputs[1, 2, 0]], rtol=1e-6)


def test_large_scores_do_not_overflow():
    outputs = [jnp.full((1, 1, 2), x) for x in (1.0, 3.0)]
    for shift in (-1e4, 0.0, 1e4):
        logsumexps = [jnp.full((1, 1), shift), jnp.full((1, 1), shift)]
        output, logsumexp = scfa_jax.merge_attention(outputs, logsumexps)
        np.testing.assert_allclose(output, 2.0)
        np.testing.assert_allclose(logsumexp, shift + np.log(2), rtol=1e-6)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_operator_gives_outputs_of_another_dtype(implementation, pattern):
    case = make_case(pattern, np.random.default_rng(4), Shape(1, 40, 40, 2, 2, 16), jnp.bfloat16)
    for dtype in ("float32", jnp.float16):
        for attend in (partial(case.attend, implementation=implementation), partial(dense_of, case)):
            output, logsumexp = jax.eval_shape(partial(attend, output_dtype=dtype), case.query, case.key, case.value)
            assert (output.dtype, logsumexp.dtype) == (dtype, jnp.float32)


def dense_of(case, *qkv, **options):
    return case.dense(*qkv, *case.pattern, **case.options, return_residual=True, **options)


def test_a_float32_output_rounds_to_the_bfloat16_one(one_implementation):
    case = make_case("hash", np.random.default_rng(4), Shape(1, 40, 40, 2, 2, 16), jnp.bfloat16)
    attend = partial(case.attend, implementation=one_implementation, block_sizes=SMALL_BLOCKS)

    @partial(jax.jit, compiler_options=AS_USERS_COMPILE)
    def results(query, key, value):
        exact, pull = jax.vjp(partial(attend, output_dtype="float32"), query, key, value)
        return exact, attend(query, key, value), pull(jax.tree.map(jnp.ones_like, exact))

    (exact, logsumexp), (rounded, same), gradients = results(case.query, case.key, case.value)
    np.testing.assert_array_equal(exact.astype(jnp.bfloat16).astype(jnp.float32), rounded.astype(jnp.float32))
    np.testing.assert_array_equal(logsumexp, same)
    assert not np.array_equal(exact, rounded.astype(jnp.float32))
    assert all(gradient.dtype == jnp.bfloat16 for gradient in gradients)


ONE, LSE = jnp.zeros((2, 8, 4, 16)), jnp.zeros((2, 8, 4))
BAD = {
    "no parts": (([], []), ValueError, "outputs and logsumexps must be as many, at least one, got 0 and 0"),
    "one lacks": (([ONE, ONE], [LSE]), ValueError, "outputs and logsumexps must be as many.* got 2 and 1"),
    "unequal outputs": (([ONE, ONE[:1]], [LSE, LSE]), ValueError, r"outputs must have shape \(2, 8, 4, 16\).*\(1, 8"),
    "unequal log-sum-exps": (([ONE], [LSE[..., :1]]), ValueError, r"logsumexps must have shape \(2, 8, 4\).*\(2, 8, 1"),
    "bfloat16 log-sum-exps": (([ONE], [LSE.astype(jnp.bfloat16)]), TypeError, "logsumexps must be float32, got bfloat"),
    "integer outputs": (([ONE.astype(int)], [LSE]), TypeError, "outputs must be float32, .* got int32"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", BAD)
def test_bad_parts_are_named(name):
    parts, error, message = BAD[name]
    with pytest.raises(error, match=message):
        scfa_jax.merge_attention(*parts)


def test_bad_output_dtypes_are_named():
    for call in (
        lambda dtype: scfa_jax.merge_attention([ONE], [LSE], output_dtype=dtype),
        lambda dtype: scfa_jax.causal_attention(ONE, ONE, ONE, output_dtype=dtype),
    ):
        with pytest.raises(TypeError, match="output_dtype must be float32, bfloat16 or float16, got int8"):
            call(jnp.int8)
