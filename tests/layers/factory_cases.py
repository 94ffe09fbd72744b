"""What `attention_fn` for Flax's own modules must do: test_nnx.py and test_linen.py run it."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from module_cases import BATCH, HEAD_DIM, HEADS, LENGTH, SEED, assert_close, tokens

from scfa_jax import lsh_hash, random_rotations, reference
from scfa_jax.layers.attention_fn import causal_attention_fn, hash_attention_fn, qk_attention_fn


class FactorySpecification:
    """`attention(attention_fn, **options)` gives Flax's multi-head attention as a function of `x, **call`.

    flax_attention: Flax's default attention_fn.
    flax_causal: The keywords of a call that make that one causal.
    """

    attention: Callable[..., Callable[..., jax.Array]]  # to be jitted by the caller
    flax_attention: Callable[..., jax.Array]
    flax_causal: dict[str, Any]

    def test_causal_attention_fn_equals_flax(self):
        results = []
        for attention_fn, call in ((self.flax_attention, self.flax_causal), (causal_attention_fn(), {})):
            attend = self.attention(attention_fn)
            results.append(_outputs_and_gradient(functools.partial(attend, **call), tokens()))
        for flax, ours in zip(*results, strict=True):
            assert_close(ours, flax)

    @pytest.mark.parametrize("exclude_self", [True, False])
    def test_hash_attention_fn_equals_the_reference(self, exclude_self):
        rotations = random_rotations(SEED, HEADS, HEAD_DIM, 4)

        def dense(query, key, value):
            hashes = (lsh_hash(x, rotations) for x in (query, key))
            return reference.hash_sparse_attention(query, key, value, *hashes, exclude_self=exclude_self)

        options = {"exclude_self": True} if exclude_self else {}
        self._assert_equal(dense, hash_attention_fn(rotations, **options))

    def test_qk_attention_fn_equals_the_reference(self):
        query_keep, key_keep = jax.random.bernoulli(SEED, 0.6, (2, BATCH, LENGTH, HEADS))
        dense = lambda query, key, value: reference.qk_sparse_attention(query, key, value, query_keep, key_keep)
        self._assert_equal(dense, qk_attention_fn(query_keep, key_keep))

    def _assert_equal(self, dense, attention_fn, **options):
        attends = [self.attention(f, **options) for f in (_named(dense), attention_fn)]
        expected, got = jax.jit(lambda x: [attend(x) for attend in attends])(tokens())
        assert_close(got, expected)

    @pytest.mark.parametrize("shape", [(BATCH, LENGTH), (LENGTH,)], ids=["of each sequence", "of all"])
    def test_segment_ids_come_with_the_call_as_a_mask(self, shape):
        """Attention stays within a document, and each compilation serves all ids."""
        ids = jnp.broadcast_to(jnp.repeat(jnp.array([4, 1, -1], jnp.int32), jnp.array([9, 11, 4])), shape)
        query_keep, key_keep = jax.random.bernoulli(SEED, 0.6, (2, BATCH, LENGTH, HEADS))
        dense = lambda ids: (
            lambda *qkv: reference.qk_sparse_attention(*qkv, query_keep, key_keep, query_segment_ids=ids)
        )
        attend = jax.jit(self.attention(qk_attention_fn(query_keep, key_keep)))
        for packed in (ids, jnp.roll(ids, 5, axis=-1)):
            expected = jax.jit(self.attention(_named(dense(packed))))(tokens())
            assert_close(attend(tokens(), mask=packed), expected)
        assert attend._cache_size() == 1
        of_each = jnp.broadcast_to(packed, (BATCH, LENGTH))
        made_with_ids = self.attention(qk_attention_fn(query_keep, key_keep, segment_ids=of_each))
        assert_close(jax.jit(made_with_ids)(tokens()), expected)

    def test_every_keyword_of_flax_is_named(self):
        parameters = inspect.signature(causal_attention_fn()).parameters
        assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())
        # Flax's modules pass on neither of these two.
        flax = set(inspect.signature(self.flax_attention).parameters) - {
            "einsum_dot_general",
            "promote_dtype",
        }
        assert flax <= set(parameters)

    def test_what_cannot_be_honoured_raises(self):
        mask = jnp.tril(jnp.ones((1, 1, LENGTH, LENGTH), bool))
        attend = self.attention(causal_attention_fn())
        with pytest.raises(NotImplementedError, match=r"mask must be None or segment ids, .* built in; .* got bool"):
            attend(tokens(), mask=mask)
        with pytest.raises(NotImplementedError, match=rf"causal self-attention, got {LENGTH} and 20 rows.*cross"):
            attend(tokens(), tokens()[:, :20])
        with pytest.raises(NotImplementedError, match="module must be None"):
            attend(tokens(), sow_weights=True)
        with pytest.raises(NotImplementedError, match="dropout_rate must be 0"):
            self.attention(causal_attention_fn(), dropout_rate=0.1, deterministic=False)(tokens())
        with pytest.raises(NotImplementedError, match="precision must be"):
            self.attention(causal_attention_fn(), precision=jax.lax.DotAlgorithmPreset.F32_F32_F32)(tokens())

    def test_what_changes_nothing_is_accepted(self):
        options = {"dropout_rate": 0.1, "deterministic": True, "precision": "highest"}
        attends = [self.attention(causal_attention_fn(), **more) for more in ({}, options)]
        plain, outputs = jax.jit(lambda x: [attend(x) for attend in attends])(tokens())
        assert_close(outputs, plain)

    def test_leading_axes_and_dtype_are_honoured(self):
        half = self.attention(causal_attention_fn(), dtype=jnp.bfloat16)
        assert jax.eval_shape(half, tokens()).dtype == jnp.bfloat16
        attend = self.attention(causal_attention_fn())
        plain, more, fewer = jax.jit(lambda x: (attend(x), attend(x[:, None])[:, 0], attend(x[0])))(tokens())
        assert_close(more, plain)
        assert_close(fewer, plain[0])


@functools.partial(jax.jit, static_argnums=0)
def _outputs_and_gradient(attend, x):
    outputs, pull = jax.vjp(attend, x)
    return outputs, pull(jnp.cos(outputs))[0]


FACTORIES = {
    "causal": lambda: causal_attention_fn(),
    "hash": lambda: hash_attention_fn(jnp.ones((2, 4, 1))),
    "qk": lambda: qk_attention_fn(*jnp.ones((2, 1, 8, 2), bool)),
}
each_factory = pytest.mark.parametrize("factory", FACTORIES)


@each_factory
def test_factories_name_what_they_refuse(factory):
    x = jnp.ones((1, 8, 2, 4))
    attention_fn = FACTORIES[factory]()
    for name in ("bias", "module", "qk_attn_weights_einsum", "attn_weights_value_einsum", "input_positions"):
        with pytest.raises(NotImplementedError, match=f"^{name} must be None.* got ArrayImpl"):
            attention_fn(x, x, x, **{name: jnp.ones(())})
    for mask, got in ((jnp.ones((1, 8)), "float32"), (jnp.ones((1, 8), jnp.int8), "int8"), ([0] * 8, "list")):
        with pytest.raises(NotImplementedError, match=f"^mask must be None or segment ids, int32 .* got {got}"):
            attention_fn(x, x, x, mask=mask)
    for rows in (3, 9):
        other = jnp.ones((1, rows, 2, 4))
        with pytest.raises(NotImplementedError, match=f"^query and key must be as long: .* got 8 and {rows} rows"):
            attention_fn(x, other, other)
    for deterministic in (False, None):
        with pytest.raises(NotImplementedError, match=r"^dropout_rate must be 0.* got 0\.1"):
            attention_fn(x, x, x, dropout_rate=0.1, dropout_rng=SEED, deterministic=deterministic)
    with pytest.raises(TypeError, match="unheard_of"):
        attention_fn(x, x, x, unheard_of=1)


@each_factory
def test_a_token_attends_to_itself_unless_told_otherwise(factory):
    """So that no output is 0."""
    x = jnp.ones((1, 8, 2, 4))
    np.testing.assert_allclose(FACTORIES[factory]()(x, x, x), x, rtol=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_factories_refuse_what_does_not_fit():
    keep = jnp.ones((1, 8, 2), bool)
    with pytest.raises(ValueError, match=r"rotations must be .* got \(2, 4\)"):
        hash_attention_fn(jnp.ones((2, 4)))
    for given in ((keep[0, :, 0], keep), (keep, keep[0, :, 0])):
        with pytest.raises(ValueError, match=r"_keep must be \[\.\.\., length, heads\], got \(8,\)"):
            qk_attention_fn(*given)
    x = jnp.ones((1, 8, 2, 4))
    with pytest.raises(ValueError, match=r"rotations must be .* with K, H = \(2, 4\), got \(3, 4, 1\)"):
        hash_attention_fn(jnp.ones((3, 4, 1)))(x, x, x)
    with pytest.raises(TypeError, match="query_keep must be boolean"):
        qk_attention_fn(keep.astype(jnp.float32), keep)(x, x, x)
    ids = jnp.zeros((1, 8), jnp.int32)
    with pytest.raises(ValueError, match=r"segment_ids must be \[\.\.\., length\], got \(\)"):
        causal_attention_fn(segment_ids=jnp.int32(0))
    with pytest.raises(ValueError, match="mask must be None where segment_ids were given when the attention_fn was"):
        causal_attention_fn(segment_ids=ids)(x, x, x, mask=ids)
    for shape in ((1, 7), (2, 8), (1, 1, 8)):
        with pytest.raises(
            ValueError, match=rf"mask must be segment ids of shape \(1, 8\), got {re.escape(str(shape))}"
        ):
            causal_attention_fn()(x, x, x, mask=jnp.zeros(shape, jnp.int32))


def _named(attend):
    """Takes the keywords that nnx always passes, which change nothing here."""

    def attention_fn(
        query, key, value, mask=None, dropout_rng=None, dropout_rate=0.0, broadcast_dropout=True, **others
    ):
        assert mask is None
        return attend(query, key, value)

    return attention_fn
