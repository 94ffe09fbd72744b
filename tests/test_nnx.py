"""`scfa_jax.nnx`: the common specification, and what is particular to NNX."""

from __future__ import annotations

import inspect
from typing import ClassVar

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
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
    each_kind,
    each_random_kind,
    tokens,
)
from module_cases import test_factories_name_what_they_refuse as test_factories_name_what_they_refuse
from module_cases import test_impossible_kinds_raise as test_impossible_kinds_raise

import scfa_jax.nnx
from scfa_jax.nnx import CausalSelfAttention, Hash, Rotations, causal_attention_fn


def layer(sparsity, *, seed=0, num_heads=HEADS, **options):
    options.setdefault("bias_init", nnx.initializers.normal(0.3))
    return CausalSelfAttention(FEATURES, num_heads, sparsity=sparsity, rngs=nnx.Rngs(seed), **options)


class TestCausalSelfAttention(ModuleSpecification):
    @staticmethod
    def make(sparsity, *, draw_length=LENGTH, **options) -> Case:
        module = layer(sparsity, **options)
        graph, params, kept = nnx.split(module, nnx.Param, ...)

        def apply(params, x, *, seed=None, rngs=None, **call):
            module = nnx.merge(graph, nnx.State(params), kept)
            rngs = seed if rngs is None else rngs
            rngs = None if rngs is None else nnx.Rngs(sparsity=rngs)
            return module(x, deterministic=seed is None, rngs=rngs, **call)

        def load(saved, x):
            template = nnx.to_pure_dict(nnx.state(module))
            state = nnx.state(module)
            nnx.replace_by_pure_dict(state, flax.serialization.from_bytes(template, saved))
            return nnx.merge(nnx.graphdef(module), state)(x, deterministic=True)

        return Case(
            params=nnx.to_pure_dict(params),
            kept=nnx.to_pure_dict(kept),
            apply=jax.jit(apply),
            draw=lambda seed: module.draw(BATCH, draw_length, rngs=nnx.Rngs(sparsity=seed)),
            save=lambda: flax.serialization.to_bytes(nnx.to_pure_dict(nnx.state(module))),
            load=load,
        )


class TestFactories(FactorySpecification):
    flax_attention = staticmethod(nnx.dot_product_attention)
    flax_causal: ClassVar = {"is_causal": True}

    @staticmethod
    def attention(attention_fn, **options):
        return nnx.MultiHeadAttention(
            HEADS, FEATURES, attention_fn=attention_fn, decode=False, rngs=nnx.Rngs(0), **options
        )

    def test_grouped_heads_equal_flax(self):
        flax, ours = (
            self.attention(attention_fn, num_kv_heads=2)(tokens(), is_causal=True)
            for attention_fn in (nnx.dot_product_attention, causal_attention_fn())
        )
        np.testing.assert_allclose(flax, ours, rtol=1e-4, atol=1e-5)

    def test_decoding_in_flax_raises_and_points_here(self):
        attend = self.attention(causal_attention_fn())
        attend.init_cache((BATCH, LENGTH, FEATURES))
        with pytest.raises(NotImplementedError, match=r"decode=True.*scfa_jax\.nnx\.CausalSelfAttention"):
            attend(tokens()[:, :1], decode=True)

    def test_input_positions_raise(self):
        if "input_positions" not in inspect.signature(nnx.MultiHeadAttention.__call__).parameters:
            pytest.skip("this Flax does not pass input_positions")
        with pytest.raises(NotImplementedError, match=r"input_positions must be None.*rotary"):
            self.attention(causal_attention_fn())(tokens(), input_positions=jnp.arange(LENGTH)[None])


@each_kind
def test_trains_under_nnx_jit_and_leaves_the_kept_rotations_alone(kind):
    module = layer(KINDS[kind])
    chex.clear_trace_counter()
    optimizer = nnx.Optimizer(module, optax.sgd(0.1), wrt=nnx.Param)
    rngs = nnx.Rngs(sparsity=3)
    before = nnx.to_pure_dict(nnx.state(module, Rotations))

    @nnx.jit
    @chex.assert_max_traces(n=1)
    def step(module, optimizer, rngs, x):
        loss_of = lambda module, rngs: jnp.mean(module(x, rngs=rngs) ** 2)
        loss, gradient = nnx.value_and_grad(loss_of)(module, rngs)
        optimizer.update(module, gradient)
        return loss

    losses = [float(step(module, optimizer, rngs, tokens())) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert int(rngs.sparsity.count[...]) == (0 if kind == "dense" else 4)
    chex.assert_trees_all_equal(before, nnx.to_pure_dict(nnx.state(module, Rotations)))


@each_random_kind
def test_nnx_remat_changes_nothing(kind):
    module = layer(KINDS[kind])
    draw = module.draw(BATCH, LENGTH, rngs=nnx.Rngs(sparsity=SEED))

    def attend(module, x, draw):
        return module(x, **draw)

    gradients = [
        nnx.jit(nnx.grad(lambda module: jnp.sum(jnp.sin(f(module, tokens(), draw)))))(module)  # noqa: B023
        for f in (attend, nnx.remat(attend))
    ]
    chex.assert_trees_all_close(*map(nnx.to_pure_dict, gradients), rtol=1e-6, atol=1e-6)


@each_kind
def test_train_eval_and_view_choose_between_draws(kind):
    module = layer(KINDS[kind])
    dense = kind == "dense"
    outputs = [module(tokens(), rngs=nnx.Rngs(sparsity=seed)) for seed in (0, 1)]
    assert np.array_equal(*outputs) == dense
    module.eval()
    evaluated = module(tokens())
    np.testing.assert_array_equal(evaluated, module(tokens(), deterministic=True))
    module.train()
    np.testing.assert_array_equal(outputs[0], module(tokens(), rngs=nnx.Rngs(sparsity=0)))
    np.testing.assert_array_equal(evaluated, nnx.view(module, deterministic=True)(tokens()))


@each_random_kind
def test_a_missing_stream_raises(kind):
    for rngs in (None, nnx.Rngs(dropout=0)):
        with pytest.raises(ValueError, match="rngs must have the stream 'sparsity' for a draw of"):
            layer(KINDS[kind])(tokens(), rngs=rngs)


def test_rngs_may_be_streams_a_stream_or_a_key():
    module = layer(KINDS["hash"])
    key = nnx.Rngs(sparsity=5).sparsity()
    for rngs in (nnx.Rngs(sparsity=5), nnx.Rngs(5), nnx.Rngs(sparsity=5).sparsity, key):
        drawn = module.draw(BATCH, LENGTH, rngs=rngs)
        np.testing.assert_array_equal(drawn["rotations"], module.draw(BATCH, LENGTH, rngs=key)["rotations"])


def test_only_hash_mode_keeps_a_variable_and_it_is_no_parameter():
    for kind, sparsity in KINDS.items():
        module = layer(sparsity)
        assert ("rotations" in nnx.state(module)) == (kind == "hash")
        assert "rotations" not in nnx.state(module, nnx.Param)


def test_an_odd_number_of_buckets_raises():
    with pytest.raises(ValueError, match="num_buckets"):
        layer(Hash(5))


def test_public_names():
    for name in (
        "CausalSelfAttention",
        "Hash",
        "Drop",
        "causal_attention_fn",
        "hash_attention_fn",
        "qk_attention_fn",
    ):
        assert hasattr(scfa_jax.nnx, name)


def test_a_list_of_implementations_can_be_given():
    module = layer(None, implementation=["xla"])
    assert nnx.jit(lambda module, x: module(x))(module, tokens()).shape == tokens().shape
    assert isinstance(jax.tree.leaves(nnx.state(module))[0], jax.Array)
