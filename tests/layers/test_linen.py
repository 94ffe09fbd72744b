"""`scfa_jax.linen`: the common specification, and what is particular to Linen."""

from __future__ import annotations

import functools
from typing import ClassVar

import chex
import flax.errors
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factory_cases import FactorySpecification
from flax import linen as nn
from module_cases import (
    BATCH,
    FEATURES,
    HEADS,
    KINDS,
    LENGTH,
    PUBLIC,
    SEED,
    Case,
    ModuleSpecification,
    each_random_kind,
    outputs_and_gradients,
    tokens,
)

import scfa_jax.linen
from scfa_jax.linen import CausalSelfAttention, Hash, causal_attention_fn

BIASES = nn.initializers.normal(0.3)


def layer(sparsity, *, num_heads=HEADS, cls=CausalSelfAttention, **options):
    return cls(FEATURES, num_heads, sparsity=sparsity, bias_init=BIASES, **options)


@functools.cache
def initialised(module, seed=0):
    return jax.jit(functools.partial(module.init, deterministic=True))(jax.random.key(seed), tokens())


jitted = functools.partial(jax.jit, static_argnames=("module", "deterministic"))


@jitted
def apply(module, variables, x, rngs=None, **call):
    return module.apply(variables, x, rngs=rngs, **call)


class TestCausalSelfAttention(ModuleSpecification):
    @staticmethod
    @functools.cache
    def make(sparsity, *, seed=0, **options) -> Case:
        module = layer(sparsity, **options)
        variables = initialised(module, seed)
        kept = variables.get("sparsity", {})

        @jax.jit
        def apply(params, x, *, kept=kept, seed=None, rngs=None, **call):
            variables = {"params": params, "sparsity": kept} if kept else {"params": params}
            rngs = seed if rngs is None else rngs
            rngs = {} if rngs is None else {"sparsity": rngs}
            return module.apply(variables, x, deterministic=seed is None, rngs=rngs, **call)

        def draw(seed, length=LENGTH):
            rngs = {"sparsity": seed}
            return module.apply(variables, BATCH, length, deterministic=False, rngs=rngs, method="draw")

        def load(saved):
            loaded = flax.serialization.from_bytes(variables, saved)
            return loaded["params"], loaded.get("sparsity", {})

        return Case(
            params=variables["params"],
            kept=kept,
            apply=apply,
            draw=draw,
            save=lambda: flax.serialization.to_bytes(variables),
            load=load,
        )

    @pytest.mark.parametrize(("kind", "drawn"), [("hash", "outside"), ("drop", "outside"), ("hash", "inside")])
    def test_linen_remat_changes_nothing(self, kind, drawn):
        case = self.make(KINDS[kind])
        draw = case.draw(SEED)
        module = layer(KINDS[kind], cls=nn.remat(CausalSelfAttention), deterministic=False)

        def attend(params, x, **draw):
            return module.apply({"params": params, "sparsity": case.kept}, x, **draw, rngs={"sparsity": SEED})

        remat = jax.jit(functools.partial(outputs_and_gradients, attend))
        given = case.params, tokens(), tokens(1)
        got, expected = remat(*given, draw if drawn == "outside" else {}), case.outputs_and_gradients(*given, draw)
        chex.assert_trees_all_close(got, expected, rtol=1e-6, atol=1e-6)


class TestFactories(FactorySpecification):
    flax_attention = staticmethod(nn.dot_product_attention)
    flax_causal: ClassVar = {"mask": nn.make_causal_mask(jnp.ones((BATCH, LENGTH)))}

    @staticmethod
    def attention(attention_fn, **options):
        flax = nn.MultiHeadDotProductAttention(HEADS, attention_fn=nn.dot_product_attention)
        params = initialised(flax)
        module = nn.MultiHeadDotProductAttention(HEADS, attention_fn=attention_fn, **options)
        return lambda *x, **call: module.apply(params, *x, rngs={"dropout": SEED}, **call)

    def test_decoding_in_flax_raises_and_points_here(self):
        module = nn.MultiHeadDotProductAttention(HEADS, attention_fn=causal_attention_fn(), decode=True)
        variables = module.init(jax.random.key(0), tokens())
        with pytest.raises(NotImplementedError, match=r"decode=True.*scfa_jax\.linen\.CausalSelfAttention"):
            module.apply(variables, tokens()[:, :1], mutable=["cache"])

    def test_custom_einsums_raise(self):
        options = dict.fromkeys(("qk_attn_weights_einsum_cls", "attn_weights_value_einsum_cls"), lambda: jnp.einsum)
        with pytest.raises(NotImplementedError, match="qk_attn_weights_einsum must be None"):
            self.attention(causal_attention_fn(), **options)(tokens())


@each_random_kind
def test_deterministic_belongs_to_the_module_or_to_the_call(kind):
    variables = initialised(layer(KINDS[kind]))
    by_call = apply(layer(KINDS[kind]), variables, tokens(), deterministic=True)
    by_module = apply(layer(KINDS[kind], deterministic=True), variables, tokens())
    np.testing.assert_array_equal(by_call, by_module)
    with pytest.raises(ValueError, match="deterministic"):
        layer(KINDS[kind]).apply(variables, tokens())


def test_dense_attention_needs_no_deterministic():
    module = layer(None)
    assert jax.eval_shape(module.apply, initialised(module), tokens()).shape == tokens().shape


@each_random_kind
def test_a_missing_stream_raises(kind):
    module = layer(KINDS[kind])
    with pytest.raises(flax.errors.InvalidRngError, match="sparsity"):
        module.apply(initialised(module), tokens(), deterministic=False)


def test_training_needs_no_kept_rotations_but_evaluation_does():
    module = layer(KINDS["hash"])
    params = {"params": initialised(module)["params"]}
    trained = jax.eval_shape(lambda: module.apply(params, tokens(), deterministic=False, rngs={"sparsity": SEED}))
    assert trained.shape == tokens().shape
    with pytest.raises(ValueError, match="variables must have the collection 'sparsity'"):
        module.apply(params, tokens(), deterministic=True)


def test_only_hash_mode_keeps_a_variable_and_it_is_no_parameter():
    for kind, sparsity in KINDS.items():
        variables = initialised(layer(sparsity))
        assert set(variables) == ({"params", "sparsity"} if kind == "hash" else {"params"})
        assert "rotations" not in variables["params"]


def test_an_odd_number_of_buckets_raises():
    with pytest.raises(ValueError, match="num_buckets"):
        initialised(layer(Hash(5)))


def test_public_names():
    for name in PUBLIC:
        assert hasattr(scfa_jax.linen, name)
