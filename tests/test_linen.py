"""`scfa_jax.linen`: the common specification, and what is particular to Linen."""

from __future__ import annotations

from typing import ClassVar

import chex
import flax.errors
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from module_cases import (
    BATCH,
    FEATURES,
    HEADS,
    KINDS,
    LENGTH,
    SEED,
    Case,
    FactorySpecification,
    ModuleSpecification,
    each_random_kind,
    tokens,
)
from module_cases import test_factories_name_what_they_refuse as test_factories_name_what_they_refuse
from module_cases import test_impossible_kinds_raise as test_impossible_kinds_raise

import scfa_jax.linen
from scfa_jax.linen import CausalSelfAttention, Hash, causal_attention_fn


def layer(sparsity, *, num_heads=HEADS, **options):
    options.setdefault("bias_init", nn.initializers.normal(0.3))
    return CausalSelfAttention(FEATURES, num_heads, sparsity=sparsity, **options)


def initialised(module, seed=0):
    return module.init(jax.random.key(seed), tokens(), deterministic=True)


class TestCausalSelfAttention(ModuleSpecification):
    @staticmethod
    def make(sparsity, *, draw_length=LENGTH, seed=0, **options) -> Case:
        module = layer(sparsity, **options)
        variables = jax.jit(module.init, static_argnames="deterministic")(
            jax.random.key(seed), tokens(), deterministic=True
        )
        kept = {name: value for name, value in variables.items() if name != "params"}

        def apply(params, x, *, seed=None, rngs=None, **call):
            rngs = seed if rngs is None else rngs
            rngs = {} if rngs is None else {"sparsity": rngs}
            return module.apply({"params": params, **kept}, x, deterministic=seed is None, rngs=rngs, **call)

        def draw(seed):
            rngs = {"sparsity": seed}
            return module.apply(variables, BATCH, draw_length, deterministic=False, rngs=rngs, method="draw")

        return Case(
            params=variables["params"],
            kept=kept.get("sparsity", {}),
            apply=jax.jit(apply),
            draw=draw,
            save=lambda: flax.serialization.to_bytes(variables),
            load=lambda saved, x: module.apply(flax.serialization.from_bytes(variables, saved), x, deterministic=True),
        )


class TestFactories(FactorySpecification):
    flax_attention = staticmethod(nn.dot_product_attention)
    flax_causal: ClassVar = {"mask": nn.make_causal_mask(jnp.ones((BATCH, LENGTH)))}

    @staticmethod
    def attention(attention_fn, **options):
        flax = nn.MultiHeadDotProductAttention(HEADS, attention_fn=nn.dot_product_attention)
        params = flax.init(jax.random.key(0), tokens())
        module = nn.MultiHeadDotProductAttention(HEADS, attention_fn=attention_fn, **options)
        return lambda x, **call: module.apply(params, x, rngs={"dropout": SEED}, **call)

    def test_decoding_in_flax_raises_and_points_here(self):
        module = nn.MultiHeadDotProductAttention(HEADS, attention_fn=causal_attention_fn(), decode=True)
        variables = module.init(jax.random.key(0), tokens())
        with pytest.raises(NotImplementedError, match=r"decode=True.*scfa_jax\.linen\.CausalSelfAttention"):
            module.apply(variables, tokens()[:, :1], mutable=["cache"])

    def test_custom_einsums_raise(self):
        options = dict.fromkeys(("qk_attn_weights_einsum_cls", "attn_weights_value_einsum_cls"), lambda: jnp.einsum)
        with pytest.raises(NotImplementedError, match="qk_attn_weights_einsum must be None"):
            self.attention(causal_attention_fn(), **options)(tokens())


@pytest.mark.parametrize(("kind", "drawn"), [("hash", "outside"), ("drop", "outside"), ("hash", "inside")])
def test_linen_remat_changes_nothing(kind, drawn):
    variables = initialised(layer(KINDS[kind]))
    rngs = {"sparsity": SEED}
    draw = layer(KINDS[kind]).apply(variables, BATCH, LENGTH, deterministic=False, rngs=rngs, method="draw")
    gradients = []
    for cls in (CausalSelfAttention, nn.remat(CausalSelfAttention)):
        module = cls(FEATURES, HEADS, sparsity=KINDS[kind], deterministic=False)

        def loss(variables, module=module):
            return jnp.sum(
                jnp.sin(module.apply(variables, tokens(), **(draw if drawn == "outside" else {}), rngs=rngs))
            )

        gradients.append(jax.jit(jax.grad(loss))(variables)["params"])
    chex.assert_trees_all_close(*gradients, rtol=1e-6, atol=1e-6)


@each_random_kind
def test_deterministic_belongs_to_the_module_or_to_the_call(kind):
    variables = initialised(layer(KINDS[kind]))
    by_call = layer(KINDS[kind]).apply(variables, tokens(), deterministic=True)
    by_module = layer(KINDS[kind], deterministic=True).apply(variables, tokens())
    np.testing.assert_array_equal(by_call, by_module)
    with pytest.raises(ValueError, match="deterministic"):
        layer(KINDS[kind]).apply(variables, tokens())


def test_dense_attention_needs_no_deterministic():
    module = layer(None)
    assert module.apply(initialised(module), tokens()).shape == tokens().shape


@each_random_kind
def test_a_missing_stream_raises(kind):
    module = layer(KINDS[kind])
    with pytest.raises(flax.errors.InvalidRngError, match="sparsity"):
        module.apply(initialised(module), tokens(), deterministic=False)


def test_training_needs_no_kept_rotations_but_evaluation_does():
    module = layer(KINDS["hash"])
    params = {"params": initialised(module)["params"]}
    assert module.apply(params, tokens(), deterministic=False, rngs={"sparsity": SEED}).shape == tokens().shape
    with pytest.raises(ValueError, match="variables must have the collection 'sparsity'"):
        module.apply(params, tokens(), deterministic=True)


def test_only_hash_mode_keeps_a_variable_and_it_is_no_parameter():
    for kind, sparsity in KINDS.items():
        variables = initialised(layer(sparsity))
        assert set(variables) == ({"params", "sparsity"} if kind == "hash" else {"params"})
        assert "rotations" not in variables["params"]


def test_layers_can_be_scanned():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + layer(KINDS["hash"], deterministic=False)(x), None

    blocks = nn.scan(
        Block,
        variable_axes={"params": 0, "sparsity": 0},
        split_rngs={"params": True, "sparsity": True},
        length=2,
    )()
    variables = blocks.init({"params": SEED, "sparsity": SEED}, tokens())
    (rotations,) = jax.tree.leaves(variables["sparsity"])
    assert not np.array_equal(*rotations)
    outputs, _ = blocks.apply(variables, tokens(), rngs={"sparsity": SEED})
    assert outputs.shape == tokens().shape


def test_an_odd_number_of_buckets_raises():
    with pytest.raises(ValueError, match="num_buckets"):
        initialised(layer(Hash(5)))


def test_public_names():
    for name in (
        "CausalSelfAttention",
        "Hash",
        "Drop",
        "causal_attention_fn",
        "hash_attention_fn",
        "qk_attention_fn",
    ):
        assert hasattr(scfa_jax.linen, name)
