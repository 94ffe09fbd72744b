"""The chunked cross-entropy: what it sums, its gradients, and that no chunk's logits outlive it."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from train.loss import MAX_LOGITS, cross_entropy


def draw(batch: int, length: int, width: int, vocab: int, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    features = jax.random.normal(keys[0], (batch, length, width)).astype(dtype)
    table = 0.3 * jax.random.normal(keys[1], (vocab, width))
    targets = jax.random.randint(keys[2], (batch, length), 0, vocab).astype(jnp.uint16)
    return features, table, targets, jax.random.uniform(keys[3], (batch, length))


def definition(features, table, targets, weights):
    log_probabilities = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", features, table, precision="highest"))
    return -jnp.sum(jnp.take_along_axis(log_probabilities, targets[..., None].astype(int), axis=-1)[..., 0] * weights)


# Chunks: of one token, that do not divide the tokens, that do, all, more than there are, and the default.
@pytest.mark.parametrize("chunk", [1, 7, 10, 20, 64, None])
def test_value_and_gradients_are_those_of_the_definition(chunk):
    arguments = draw(2, 10, 8, 33)

    def both(loss):  # as the tail of a computation, so that another cotangent than 1 reaches it
        return jax.jit(jax.value_and_grad(lambda f, t, *rest: 3 * loss(f, t, *rest), argnums=(0, 1)))(*arguments)

    with jax.default_matmul_precision("highest"):
        value, gradients = both(functools.partial(cross_entropy, chunk=chunk))
    expected, expected_gradients = both(definition)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    alone = jax.jit(functools.partial(cross_entropy, chunk=chunk))(*arguments)  # without gradients: another path
    np.testing.assert_allclose(alone, expected / 3, rtol=1e-6)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-6)


def test_bfloat16_features_lose_no_more_than_their_rounding_and_the_table_keeps_float32_gradients():
    features, table, targets, weights = draw(2, 64, 16, 100, jnp.bfloat16)
    rounded = features.astype(jnp.float32), table.astype(jnp.bfloat16).astype(jnp.float32), targets, weights
    value, (by_features, by_table) = jax.value_and_grad(functools.partial(cross_entropy, chunk=32), argnums=(0, 1))(
        features, table, targets, weights
    )
    expected, (wanted_features, wanted_table) = jax.value_and_grad(definition, argnums=(0, 1))(*rounded)
    np.testing.assert_allclose(value, expected, rtol=1e-5)  # products of bfloat16 are exact in float32
    assert by_features.dtype == jnp.bfloat16
    assert by_table.dtype == jnp.float32
    for gradient, wanted in ((by_features, wanted_features), (by_table, wanted_table)):
        error = np.abs(np.asarray(gradient, np.float32) - wanted).max()
        assert error < 2**-7 * np.abs(wanted).max()


def test_a_large_cotangent_and_a_far_off_target_stay_finite():
    features, table, targets, weights = draw(1, 8, 8, 16)
    loss = functools.partial(cross_entropy, chunk=4)
    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(1e3 * features, table, targets, weights)
    assert np.isfinite(value)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_logits_of_a_long_sequence_never_exist_at_once():
    tokens, width, vocab = 16_384, 768, 50_304
    features = jax.ShapeDtypeStruct((1, tokens, width), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((vocab, width), jnp.float32)
    targets = jax.ShapeDtypeStruct((1, tokens), jnp.uint16)
    weights = jax.ShapeDtypeStruct((1, tokens), jnp.float32)
    step = jax.jit(jax.value_and_grad(cross_entropy, argnums=(0, 1)))
    largest = max(intermediates(jax.make_jaxpr(step)(features, table, targets, weights).jaxpr))
    assert largest == 4096 * vocab  # the logits of one chunk
    assert largest <= MAX_LOGITS
    # And what the compiler made of it: one chunk's logits and their gradient, the table's sum, the features' gradient.
    needed = step.lower(features, table, targets, weights).compile().memory_analysis().temp_size_in_bytes
    assert needed < 3.5 * 4 * 4096 * vocab < 4 * tokens * vocab


def intermediates(jaxpr) -> Iterator[int]:
    """The size of every array that a jaxpr makes, in the loops and calls inside it too."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from intermediates(inner)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": (2, 9)}, r"targets and weights must be \[2, 10\]"),
        ({"weights": (2,)}, r"targets and weights must be \[2, 10\]"),
        ({"table": (33, 9)}, r"table must be \[V, 8\], got \[33, 9\]"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
    ],
)
def test_arguments_that_do_not_fit_say_so(change, message):
    arguments = dict(zip(("features", "table", "targets", "weights"), draw(2, 10, 8, 33), strict=True))
    for name, value in change.items():
        arguments[name] = value if name == "chunk" else jnp.zeros(value, arguments[name].dtype)
    with pytest.raises(ValueError, match=message):
        cross_entropy(**arguments)
