"""The language model: shapes, dtypes, causality, tied embeddings, rematerialisation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import ModelConfig, Transformer
from models.config import ATTENTION_KINDS
from models.rotary import rotary
from scfa_jax.nnx import Drop, Hash

VOCAB, LENGTH = 40, 24
ALL_KINDS = "dense, hash,qk"  # one layer of each


def make(seed: int = 0, **options) -> Transformer:
    defaults = {"attention": ALL_KINDS, "layers": 3, "width": 32, "heads": 2, "dtype": "float32"}
    config = ModelConfig(**{**defaults, **options})
    return Transformer(config, vocab_size=VOCAB, max_length=LENGTH, rngs=nnx.Rngs(seed, sparsity=seed))


def logits_of(model: Transformer, tokens: jax.Array, key: jax.Array | None = None) -> jax.Array:
    graph, state = nnx.split(model)
    return _apply(graph, state, tokens, key)


@functools.partial(jax.jit, static_argnums=0)
def _apply(graph, state, tokens, key):
    return nnx.merge(graph, state)(tokens, key=key)


@pytest.fixture
def tokens() -> jax.Array:
    return jax.random.randint(jax.random.key(3), (2, LENGTH), 0, VOCAB)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_the_order_of_earlier_tokens_counts(positions, tokens):
    model = make(attention="dense", layers=1, positions=positions)
    tokens = tokens.at[:, :2].set(jnp.array([3, 4]))
    before, after = logits_of(model, tokens), logits_of(model, tokens.at[:, :2].set(jnp.array([4, 3])))
    # Without positions one layer could not tell at the end, and does not up to the rounding of its sums.
    assert np.abs(before[:, -1] - after[:, -1]).max() > 1e-4


@pytest.mark.parametrize("key", [None, 5], ids=["evaluation", "training"])
def test_logits_are_float32_and_no_position_sees_a_later_one(key, tokens):
    key = None if key is None else jax.random.key(key)
    model = make()
    changed = tokens.at[:, 15:].set((tokens[:, 15:] + 1) % VOCAB)
    before, after = logits_of(model, tokens, key), logits_of(model, changed, key)
    assert before.shape == (2, LENGTH, VOCAB)
    assert before.dtype == jnp.float32
    assert np.isfinite(before).all()
    np.testing.assert_allclose(before[:, :15], after[:, :15], atol=1e-5)
    assert not np.allclose(before[:, 15:], after[:, 15:], atol=1e-3)


def test_layers_take_the_kinds_of_attention_in_turn():
    assert ModelConfig(attention="dense, hash", layers=5).layer_kinds() == (
        *("dense", "hash", "dense", "hash", "dense"),
    )


@pytest.mark.parametrize("exclude_self", [True, False])
def test_layers_are_made_of_their_kind(exclude_self):
    model = make(num_buckets=6, exclude_self=exclude_self, hash_before_rotary=not exclude_self, drop_rate=0.25)
    kinds = [block.attention.sparsity for block in model.blocks]
    assert kinds == [None, Hash(6, exclude_self=exclude_self, before_rotary=not exclude_self), Drop(0.25)]
    assert ATTENTION_KINDS == ("dense", "hash", "qk")


def test_the_embedding_is_the_output_layer(tokens):
    model = make(attention="dense", layers=1)
    parameters = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert sorted(parameters) == ["blocks", "embedding", "norm"]  # no output layer of its own
    features = jnp.ones((2, 32))
    np.testing.assert_allclose(
        model.logits(features), features @ parameters["embedding"]["embedding"].T, rtol=1e-4, atol=1e-5
    )


def test_bfloat16_computes_on_float32_parameters(tokens):
    model = make(attention="hash", layers=1, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float32")}
    features = jax.eval_shape(model.features, tokens)
    assert features.dtype == jnp.bfloat16
    logits = logits_of(model, tokens)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, logits_of(make(attention="hash", layers=1), tokens), atol=0.05)


def test_rematerialisation_changes_nothing_but_memory(tokens):
    def loss_and_gradients(remat: bool):
        graph, params, rest = nnx.split(make(attention="hash", layers=1, remat=remat), nnx.Param, ...)

        def loss(params):
            return (nnx.merge(graph, params, rest)(tokens, key=jax.random.key(1)) ** 2).mean()

        traced = jax.jit(jax.value_and_grad(loss)).trace(params)
        assert ("remat" in str(traced.jaxpr) or "checkpoint" in str(traced.jaxpr)) == remat
        return traced.lower().compile()(params)

    for kept, computed_again in zip(
        jax.tree.leaves(loss_and_gradients(False)), jax.tree.leaves(loss_and_gradients(True)), strict=True
    ):
        np.testing.assert_allclose(kept, computed_again, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("attention", ["hash", "qk"])
def test_a_training_key_decides_the_draw_and_evaluation_needs_none(attention, tokens):
    model = make(attention=attention, layers=1)
    one, again, other = (logits_of(model, tokens, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other)
    (first,), (second,) = (model.draw(2, LENGTH, None) for _ in range(2))
    if attention == "qk":
        assert first == second == {}
    else:
        np.testing.assert_array_equal(first["rotations"], second["rotations"])


def test_layers_draw_independently():
    first, second = make(attention="hash", layers=2).draw(1, LENGTH, jax.random.key(0))
    assert not np.allclose(first["rotations"], second["rotations"])


def test_rotary_scores_depend_on_distance_alone():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))
    at, other = (jnp.array([places]) for places in ([7, 104, 9], [3, 100, 3]))
    queries, keys = (jnp.broadcast_to(x, (1, 3, 1, 16)) for x in (query, key))
    near, far, longer = (rotary(queries, at) * rotary(keys, other)).sum((0, 2, 3)).tolist()
    assert near == pytest.approx(far, abs=1e-4)
    assert near != pytest.approx(longer, abs=1e-3)


def test_learned_positions_end_somewhere():
    model = make(attention="dense", layers=1, positions="learned")
    with pytest.raises(ValueError, match=rf"at most {LENGTH} long.*got {LENGTH + 1}"):
        model(jnp.zeros((1, LENGTH + 1), jnp.int32))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"heads": 3}, "--heads must divide --width, got 3"),
        ({"attention": "hash,sparse"}, "'sparse'"),
        ({"num_buckets": 3}, "--num-buckets must be an even number"),
        ({"drop_rate": 1.0}, "--drop-rate"),
        ({"layers": 0}, "--layers must be at least 1"),
        ({"width": 6, "heads": 2}, "even width a head"),
        ({"dtype": "auto"}, "dtype must be decided"),
    ],
)
def test_impossible_models_say_what_is_wrong(options, named):
    with pytest.raises(ValueError, match=named):
        make(**options)
