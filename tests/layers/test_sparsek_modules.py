"""SparseK as a kind of sparsity of both Flax modules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import IMPLEMENTATIONS
from flax import nnx
from module_cases import BATCH, HEADS, LENGTH, SEED, assert_close, turned, with_sinks
from module_cases import WIDE_FEATURES as FEATURES
from module_cases import wide_tokens as tokens

import scfa_jax.linen
import scfa_jax.nnx
from scfa_jax import reference
from scfa_jax.layers import Layout
from scfa_jax.nnx import SparseK

KIND = SparseK(num_keys=3, window=4, chunk_size=5, slope=0.05)
PLAIN = {"num_key_value_heads": 2, "sparsity": KIND, "rotary": turned, "implementation": IMPLEMENTATIONS[0]}
OPTIONS = {"plain": PLAIN, "with a cap and sinks": PLAIN | {"logits_soft_cap": 0.3, "use_sink_logits": True}}
each_layer = pytest.mark.parametrize("name", OPTIONS)


@functools.cache
def parts(name: str):
    """The module's graph, its parameters as NNX makes them, but sinks that weigh something, and the rest."""
    module = scfa_jax.nnx.CausalSelfAttention(FEATURES, HEADS, rngs=nnx.Rngs(0), **OPTIONS[name])
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    return graph, with_sinks(nnx.to_pure_dict(params)), rest


@functools.partial(jax.jit, static_argnums=0)
def outputs_and_gradients(name, x, cotangent):
    graph, params, rest = parts(name)
    apply = lambda params, x: nnx.merge(graph, nnx.State(params), rest)(x, deterministic=True)
    outputs, pull = jax.vjp(apply, params, x)
    return outputs, *pull(cotangent)


@each_layer
def test_equals_the_dense_definition_and_teaches_the_scores(name):
    @jax.jit
    def by_hand(params, x):
        def project(name):
            head = jnp.einsum("bte,enh->btnh", x, params[name]["kernel"], precision="highest") + params[name]["bias"]
            return head if name == "value" else turned(head, jnp.arange(LENGTH)[None])

        scores = x @ params["score_kernel"] + 0.05 * jnp.arange(LENGTH)[:, None]
        logits = {"logits_soft_cap": OPTIONS[name].get("logits_soft_cap"), "sink_logits": params.get("sink_logits")}
        attended = reference.sparsek_attention(
            *map(project, ("query", "key", "value")), scores, num_keys=3, window=4, chunk_size=5, **logits
        )
        output = jnp.einsum("btnh,nhe->bte", attended, params["out"]["kernel"], precision="highest")
        return output + params["out"]["bias"]

    _, params, _ = parts(name)
    assert params["score_kernel"].shape == (FEATURES, 2)
    outputs, *gradients = outputs_and_gradients(name, tokens(), tokens(1))
    expected, pull = jax.vjp(by_hand, params, tokens())
    assert_close(outputs, expected)
    assert_close(tuple(gradients), pull(tokens(1)))
    assert np.all(np.any(np.asarray(gradients[0]["score_kernel"]), axis=0))


def test_later_tokens_change_neither_earlier_outputs_nor_receive_their_gradients():
    for seen in (1, 10, 11, LENGTH - 1):
        replaced = lambda x, y: np.concatenate([np.asarray(x)[:, :seen], np.asarray(y)[:, seen:]], axis=1)  # noqa: B023
        cotangent = replaced(tokens(1), jnp.zeros_like(tokens()))
        outputs, _, gradient = outputs_and_gradients("plain", tokens(), cotangent)
        changed, *_ = outputs_and_gradients("plain", replaced(tokens(), tokens(2)), cotangent)
        np.testing.assert_allclose(outputs[:, :seen], changed[:, :seen], rtol=1e-5, atol=1e-6)
        assert not np.any(gradient[:, seen:])


@each_layer
def test_decoding_equals_the_whole_with_a_cache_of_constant_size(name):
    """A prompt, single tokens and more at once, wherever chunks begin, past the length that the cache was made for."""
    whole, *_ = outputs_and_gradients(name, tokens(), tokens(1))
    graph, params, _ = parts(name)
    module = nnx.merge(graph, nnx.State(params), nnx.State({}))
    module.init_cache((BATCH, 12, FEATURES))
    graph, cache, rest = nnx.split(module, nnx.Cache, ...)
    sizes = jax.tree.map(jnp.shape, nnx.to_pure_dict(cache))
    assert sizes["cached_key"] == (BATCH, KIND.window - 1 + KIND.chunk_size, 2, FEATURES // HEADS)

    @jax.jit
    def step(cache, x):
        module = nnx.merge(graph, cache, rest)
        return module(x, decode=True), nnx.state(module, nnx.Cache)

    outputs, start = [], 0
    for length in (8, *(1,) * 8, 8):
        output, cache = step(cache, np.asarray(tokens())[:, start : start + length])
        outputs.append(output)
        start += length
    assert start == LENGTH
    assert jax.tree.map(jnp.shape, nnx.to_pure_dict(cache)) == sizes
    assert_close(np.concatenate(outputs, axis=1), whole)


@each_layer
def test_linen_is_the_same_layer(name):
    """The same parameters and cache by shape, and the outputs of a prompt."""
    whole, *_ = outputs_and_gradients(name, tokens(), tokens(1))
    _, params, _ = parts(name)
    module = scfa_jax.linen.CausalSelfAttention(FEATURES, HEADS, decode=True, **OPTIONS[name])
    shapes = jax.eval_shape(module.init, SEED, tokens())
    assert jax.tree.map(jnp.shape, shapes["params"]) == jax.tree.map(jnp.shape, params)
    empty = KIND.empty_cache(module.bind({"params": params}).layout, BATCH, LENGTH, jnp.float32)
    assert jax.tree.map(jnp.shape, shapes["cache"]) == jax.tree.map(jnp.shape, empty)
    apply = jax.jit(functools.partial(module.apply, mutable=["cache"]))
    outputs, _ = apply({"params": params, "cache": empty}, tokens())
    assert_close(outputs, whole)


def test_packed_documents_know_nothing_of_each_other():
    graph, params, rest = parts("plain")
    ids = jnp.arange(LENGTH)[None] // 9
    apply = jax.jit(lambda x: nnx.merge(graph, nnx.State(params), rest)(x, deterministic=True, segment_ids=ids))
    for first in (0, 9, 18):
        changed = jnp.where((ids == first // 9)[..., None], tokens(), tokens(1))
        outputs, expected = (np.asarray(apply(x)) for x in (changed, tokens()))
        np.testing.assert_allclose(outputs[:, first : first + 9], expected[:, first : first + 9], atol=1e-6)
        assert not np.allclose(outputs, expected)


def test_pairs_are_those_of_the_definition():
    place = np.arange(LENGTH)
    first = place // KIND.chunk_size * KIND.chunk_size - KIND.window + 1  # of the window; what is before is selected
    before = np.maximum(first, 0)
    assert KIND.pairs(LENGTH, HEADS) == np.sum(place + 1 - before + np.minimum(before, KIND.num_keys))


def test_impossible_options_raise():
    with pytest.raises(ValueError, match="num_keys must be at least 1, got 0"):
        SparseK(0, 4)
    with pytest.raises(ValueError, match="num_candidates must be at least 3, got 2"):
        SparseK(3, 4, num_candidates=2)
    with pytest.raises(TypeError, match=r"slope must be a number, got '1'"):
        SparseK(3, 4, slope="1")
    with pytest.raises(ValueError, match="slope must be finite, got nan"):
        SparseK(3, 4, slope=float("nan"))


def test_scores_need_tokens_and_their_kernel():
    layout = Layout.of(FEATURES, HEADS, 2, None, KIND, None, None)
    rows = [jnp.ones((1, 2, heads, FEATURES // HEADS)) for heads in (HEADS, 2, 2)]
    with pytest.raises(ValueError, match=r"tokens must be given for SparseK\(.*, which scores them"):
        KIND.attend(layout.heads(*rows), {})
    for state, got in (({}, "None"), ({"score_kernel": jnp.ones((FEATURES, 4))}, rf"\({FEATURES}, 4\)")):
        with pytest.raises(ValueError, match=rf"score_kernel must be \[E, K\] = \({FEATURES}, 2\), got {got}"):
            KIND.attend(layout.heads(*rows, tokens=jnp.ones((1, 2, FEATURES))), state)
