"""The rotary embedding that modules may be given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import scfa_jax.linen
import scfa_jax.nnx
from scfa_jax.rotary import rotary

LENGTH, HEAD_DIM = 7, 16
X = np.random.default_rng(0).normal(size=(2, LENGTH, 3, HEAD_DIM)).astype(np.float32)


@pytest.mark.parametrize("base", [10_000.0, 50.0])
def test_it_turns_pairs_of_features_as_complex_numbers(base):
    positions = np.array([np.arange(LENGTH), 1000 + np.arange(LENGTH)], np.int32)
    pairs = X[..., : HEAD_DIM // 2].astype(complex) + 1j * X[..., HEAD_DIM // 2 :]
    frequency = base ** (-2 * np.arange(HEAD_DIM // 2) / HEAD_DIM)
    turned = pairs * np.exp(1j * positions[..., None, None] * frequency)
    got = jax.jit(rotary, static_argnames="base")(X, positions, base=base)
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], axis=-1), atol=2e-4)


def test_scores_depend_on_distance_alone():
    query, key = X[:1, :1], X[1:, :1]
    at = lambda x, position: rotary(x, jnp.array([[position]], jnp.int32))
    near, far, longer = (jnp.sum(at(query, i) * at(key, j)) for i, j in ((3, 1), (90, 88), (90, 80)))
    np.testing.assert_allclose(near, far, rtol=1e-4)
    assert abs(near - longer) > 0.1


def test_it_computes_in_float32_and_returns_the_dtype_that_it_got():
    half = jnp.asarray(X, jnp.bfloat16)
    positions = jnp.arange(LENGTH, dtype=jnp.int32)[None]
    got = rotary(half, positions)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, rotary(half.astype(jnp.float32), positions).astype(jnp.bfloat16))


def test_an_odd_head_size_raises():
    with pytest.raises(ValueError, match=r"x must have an even head size, got shape \(2, 7, 3, 15\)"):
        rotary(jnp.asarray(X[..., :15]), jnp.arange(LENGTH, dtype=jnp.int32)[None])


def test_both_modules_offer_it():
    assert scfa_jax.nnx.rotary is scfa_jax.linen.rotary is rotary
