"""`scfa_jax.nnx`: the common specification, and what is particular to NNX."""

from __future__ import annotations

import functools
import inspect
from typing import ClassVar

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from factory_cases import FactorySpecification
from factory_cases import (
    test_a_token_attends_to_itself_unless_told_otherwise as test_a_token_attends_to_itself_unless_told_otherwise,
)
from factory_cases import test_factories_name_what_they_refuse as test_factories_name_what_they_refuse
from factory_cases import test_factories_refuse_what_does_not_fit as test_factories_refuse_what_does_not_fit
from flax import nnx
from module_cases import (
    BATCH,
    FEATURES,
    HEAD_DIM,
    HEADS,
    KINDS,
    LENGTH,
    PUBLIC,
    SEED,
    Case,
    ModuleSpecification,
    assert_close,
    each_kind,
    each_random_kind,
    tokens,
)
from module_cases import test_impossible_kinds_raise as test_impossible_kinds_raise
from module_cases import test_normalised_vectors as test_normalised_vectors

import scfa_jax.nnx
from scfa_jax import lsh_hash, random_rotations, reference
from scfa_jax.nnx import CausalSelfAttention, Hash, KeptDraw, causal_attention_fn, hash_attention_fn


def layer(sparsity, *, seed=0, num_heads=HEADS, **options):
    options.setdefault("bias_init", nnx.initializers.normal(0.3))
    return CausalSelfAttention(FEATURES, num_heads, sparsity=sparsity, rngs=nnx.Rngs(seed), **options)


class TestCausalSelfAttention(ModuleSpecification):
    @staticmethod
    @functools.cache
    def make(sparsity, **options) -> Case:
        module = layer(sparsity, **options)
        graph, params, kept, stream = nnx.split(module, nnx.Param, KeptDraw, ...)
        kept, stream, saved = nnx.to_pure_dict(kept), nnx.to_pure_dict(stream), (nnx.Param, KeptDraw)

        @jax.jit
        def apply(params, x, *, kept=kept, seed=None, rngs=None, **call):
            module = nnx.merge(graph, *map(nnx.State, (params, kept, stream)))
            rngs = seed if rngs is None else rngs
            rngs = None if rngs is None else nnx.Rngs(sparsity=rngs)
            return module(x, deterministic=seed is None, rngs=rngs, **call)

        def load(saved_bytes):
            loaded = nnx.clone(module)
            state = nnx.state(loaded, saved)
            nnx.replace_by_pure_dict(state, flax.serialization.from_bytes(nnx.to_pure_dict(state), saved_bytes))
            nnx.update(loaded, state)
            return tuple(map(nnx.to_pure_dict, nnx.state(loaded, *saved)))

        return Case(
            params=nnx.to_pure_dict(params),
            kept=kept,
            apply=apply,
            draw=lambda seed, length=LENGTH: module.draw(BATCH, length, rngs=nnx.Rngs(sparsity=seed)),
            save=lambda: flax.serialization.to_bytes(nnx.to_pure_dict(nnx.state(module, saved))),
            load=load,
        )

    @pytest.mark.parametrize(("kind", "drawn"), [("hash", "outside"), ("drop", "outside"), ("hash", "inside")])
    def test_nnx_remat_changes_nothing(self, kind, drawn):
        case, module = self.make(KINDS[kind]), layer(KINDS[kind])
        draw = case.draw(SEED) if drawn == "outside" else nnx.clone(module).draw(BATCH, LENGTH)
        remat = nnx.remat(lambda module, x, draw: module(x, **draw))
        loss = lambda module: jnp.sum(tokens(1) * remat(module, tokens(), draw if drawn == "outside" else {}))
        gradient = nnx.jit(nnx.grad(loss))(module)
        _, (expected, _) = case.outputs_and_gradients(case.params, tokens(), tokens(1), draw)
        chex.assert_trees_all_close(nnx.to_pure_dict(gradient), expected, rtol=1e-6, atol=1e-6)

    @each_random_kind
    def test_train_eval_and_view_choose_between_draws(self, kind):
        case, module = self.make(KINDS[kind]), layer(KINDS[kind])
        run = nnx.jit(lambda module, x, rngs=None: module(x, rngs=rngs))
        outputs = [run(module, tokens(), nnx.Rngs(sparsity=seed)) for seed in (0, 1)]
        assert not np.array_equal(*outputs)
        module.eval()
        evaluated = run(module, tokens())
        assert_close(evaluated, case.apply(case.params, tokens()))
        module.train()
        np.testing.assert_array_equal(outputs[0], run(module, tokens(), nnx.Rngs(sparsity=0)))
        np.testing.assert_array_equal(evaluated, run(nnx.view(module, deterministic=True), tokens()))


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
            self.attention(attention_fn, num_kv_heads=2)
            for attention_fn in (nnx.dot_product_attention, causal_attention_fn())
        )
        expected, got = jax.jit(lambda x: (flax(x, is_causal=True), ours(x, is_causal=True)))(tokens())
        assert_close(got, expected)

    def test_grouped_heads_hash_with_the_rotation_of_their_key_head(self):
        rotations = random_rotations(SEED, 2, HEAD_DIM, 4)

        def dense(query, key, value):
            hashes = lsh_hash(query, rotations[jnp.array([0, 0, 1, 1])]), lsh_hash(key, rotations)
            return reference.hash_sparse_attention(query, key, value, *hashes)

        self._assert_equal(dense, hash_attention_fn(rotations), num_kv_heads=2)

    def test_segment_ids_come_with_the_call_under_nnx_jit(self):
        ids = jnp.repeat(jnp.arange(2, dtype=jnp.int32), LENGTH // 2)[None].repeat(BATCH, axis=0)
        run = nnx.jit(lambda layer, x, ids: layer(x, mask=ids))
        packed = run(self.attention(causal_attention_fn()), tokens(), ids)
        for half in (slice(LENGTH // 2), slice(LENGTH // 2, None)):
            alone = run(self.attention(causal_attention_fn()), tokens()[:, half], None)
            assert_close(packed[:, half], alone)

    def test_decoding_in_flax_raises_and_points_here(self):
        attend = self.attention(causal_attention_fn())
        attend.init_cache((BATCH, LENGTH, FEATURES))
        with pytest.raises(NotImplementedError, match=r"decode=True.*scfa_jax\.nnx\.CausalSelfAttention"):
            attend(tokens()[:, :1], decode=True)

    def test_input_positions_raise(self):
        passed_on = "input_positions" in inspect.signature(nnx.MultiHeadAttention.__call__).parameters
        # Flax before 0.12.12 doesn't know them either.
        error, message = (NotImplementedError, "must be None.*rotary") if passed_on else (TypeError, "unexpected")
        with pytest.raises(error, match=f"(?=.*input_positions).*{message}"):
            self.attention(causal_attention_fn())(tokens(), input_positions=jnp.arange(LENGTH)[None])


@each_kind
@pytest.mark.parametrize("stream", ["its own", "of the call"])
def test_trains_under_nnx_jit_and_leaves_the_kept_rotations_alone(kind, stream):
    module = layer(KINDS[kind])
    chex.clear_trace_counter()
    optimizer = nnx.Optimizer(module, optax.sgd(0.1), wrt=nnx.Param)
    rngs = nnx.Rngs(sparsity=3) if stream == "of the call" else None
    before = nnx.to_pure_dict(nnx.state(module, KeptDraw))

    @nnx.jit
    @chex.assert_max_traces(n=1)
    def step(module, optimizer, rngs, x):
        loss_of = lambda module, rngs: jnp.mean(module(x, rngs=rngs) ** 2)
        loss, gradient = nnx.value_and_grad(loss_of)(module, rngs)
        optimizer.update(module, gradient)
        return loss

    losses = [float(step(module, optimizer, rngs, tokens())) for _ in range(4)]
    assert losses[-1] < losses[0]
    counts = {"its own": module.rngs, "of the call": rngs and rngs.sparsity}
    for of, counted in counts.items():
        if counted is not None:
            assert int(counted.count[...]) == (4 if of == stream and kind != "dense" else 0)
    chex.assert_trees_all_equal(before, nnx.to_pure_dict(nnx.state(module, KeptDraw)))


def call(module, x, draw):
    return module(x, **draw)


def loss(module, x, draw):
    return jnp.sum(call(module, x, draw) ** 2)


TRANSFORMED = {
    "nothing": call,
    "nnx.jit": nnx.jit(call),
    "nnx.remat": nnx.remat(call),
    "nnx.value_and_grad": nnx.value_and_grad(loss),
    "nnx.jit of nnx.value_and_grad": nnx.jit(nnx.value_and_grad(loss)),
}


@each_random_kind
@pytest.mark.parametrize("transformation", TRANSFORMED)
def test_each_call_draws_anew_from_the_modules_own_stream_under(transformation, kind):
    run, module, draws = TRANSFORMED[transformation], layer(KINDS[kind]), []
    for _ in range(2):
        draws.append(nnx.clone(module).draw(BATCH, LENGTH))  # that of the call to come
        expected = run(nnx.clone(module), tokens(), draws[-1])
        chex.assert_trees_all_close(run(module, tokens(), {}), expected, rtol=1e-5, atol=1e-5)
    for name, x in draws[0].items():
        assert not np.array_equal(x, draws[1][name])


@each_random_kind
def test_a_stream_of_the_call_comes_before_the_modules_own(kind):
    case, module = TestCausalSelfAttention.make(KINDS[kind]), layer(KINDS[kind])
    expected = case.apply(case.params, tokens(), seed=SEED)
    assert_close(nnx.jit(lambda module, rngs: module(tokens(), rngs=rngs))(module, nnx.Rngs(sparsity=SEED)), expected)
    assert int(module.rngs.count[...]) == 0


def test_a_stream_is_missing_only_where_a_module_was_made_without_one():
    made = functools.partial(CausalSelfAttention, FEATURES, HEADS, sparsity=KINDS["drop"])
    for rngs in (nnx.Rngs(params=0, sparsity=0), nnx.Rngs(0)):
        assert nnx.eval_shape(call, made(rngs=rngs), tokens(), {}).shape == tokens().shape
    module = made(rngs=nnx.Rngs(params=0))
    with pytest.raises(ValueError, match=r"rngs must have the stream 'sparsity' for a draw of .*; got None"):
        module(tokens())
    assert nnx.eval_shape(lambda module: module(tokens(), deterministic=True), module).shape == tokens().shape
    assert nnx.eval_shape(lambda module: module(tokens(), rngs=nnx.Rngs(1)), module).shape == tokens().shape


@each_random_kind
def test_streams_of_the_call_that_lack_the_one_raise(kind):
    with pytest.raises(ValueError, match=r"rngs must have the stream 'sparsity' .*; got the streams \['dropout'\]"):
        layer(KINDS[kind])(tokens(), rngs=nnx.Rngs(dropout=0))


def test_the_rotations_of_evaluation_need_a_stream():
    with pytest.raises(ValueError, match=r"rngs must have the stream 'sparsity'.* got the streams \['params'\]"):
        CausalSelfAttention(FEATURES, HEADS, sparsity=Hash(4), rngs=nnx.Rngs(params=0))


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
    for name in PUBLIC:
        assert hasattr(scfa_jax.nnx, name)


def test_a_list_of_implementations_can_be_given():
    module = layer(None, implementation=["xla"])
    assert nnx.jit(lambda module, x: module(x))(module, tokens()).shape == tokens().shape
    assert isinstance(jax.tree.leaves(nnx.state(module))[0], jax.Array)
