"""SparseK as a kind of sparsity of both Flax modules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import IMPLEMENTATIONS
from flax import nnx
from module_cases import HEADS, LENGTH, assert_close, turned
from module_cases import WIDE_FEATURES as FEATURES
from module_cases import wide_tokens as tokens
from selecting_cases import assert_decodes_with_a_cache_of_constant_size, assert_linen_is_the_same_layer

import scfa_jax.nnx
from models import ModelConfig, Transformer
from scfa_jax import reference
from scfa_jax.nnx import SparseK

KIND = SparseK(num_keys=3, window=4, chunk_size=5, slope=0.05)
OPTIONS = {"num_key_value_heads": 2, "sparsity": KIND, "rotary": turned, "implementation": IMPLEMENTATIONS[0]}


@functools.cache
def parts():
    """The module's graph and parameters, as NNX makes them."""
    module = scfa_jax.nnx.CausalSelfAttention(FEATURES, HEADS, rngs=nnx.Rngs(0), **OPTIONS)
    return nnx.split(module, nnx.Param, ...)


@jax.jit
def outputs_and_gradients(params, x, cotangent):
    graph, _, rest = parts()
    outputs, pull = jax.vjp(lambda params, x: nnx.merge(graph, params, rest)(x, deterministic=True), params, x)
    return outputs, *pull(cotangent)


def parameters():
    return parts()[1]


def test_equals_the_dense_definition_and_teaches_the_scores():
    @jax.jit
    def by_hand(params, x):
        def project(name):
            head = jnp.einsum("bte,enh->btnh", x, params[name]["kernel"], precision="highest") + params[name]["bias"]
            return head if name == "value" else turned(head, jnp.arange(LENGTH)[None])

        scores = x @ params["score_kernel"] + 0.05 * jnp.arange(LENGTH)[:, None]
        attended = reference.sparsek_attention(
            *map(project, ("query", "key", "value")), scores, num_keys=3, window=4, chunk_size=5
        )
        return jnp.einsum("btnh,nhe->bte", attended, params["out"]["kernel"], precision="highest")

    params = nnx.to_pure_dict(parameters())
    assert params["score_kernel"].shape == (FEATURES, 2)
    outputs, gradient, _ = outputs_and_gradients(parameters(), tokens(), tokens(1))
    assert_close(outputs, by_hand(params, tokens()))
    assert np.all(np.any(np.asarray(gradient["score_kernel"][...]), axis=0))


def test_later_tokens_change_neither_earlier_outputs_nor_receive_their_gradients():
    for seen in (1, 10, 11, LENGTH - 1):
        replaced = lambda x, y: np.concatenate([np.asarray(x)[:, :seen], np.asarray(y)[:, seen:]], axis=1)  # noqa: B023
        cotangent = replaced(tokens(1), jnp.zeros_like(tokens()))
        outputs, _, gradient = outputs_and_gradients(parameters(), tokens(), cotangent)
        changed, *_ = outputs_and_gradients(parameters(), replaced(tokens(), tokens(2)), cotangent)
        np.testing.assert_allclose(outputs[:, :seen], changed[:, :seen], rtol=1e-5, atol=1e-6)
        assert not np.any(gradient[:, seen:])


def test_decoding_equals_the_whole_with_a_cache_of_constant_size():
    whole, *_ = outputs_and_gradients(parameters(), tokens(), tokens(1))
    assert_decodes_with_a_cache_of_constant_size(parts(), KIND, whole)


def test_linen_is_the_same_layer():
    whole, *_ = outputs_and_gradients(parameters(), tokens(), tokens(1))
    assert_linen_is_the_same_layer(nnx.to_pure_dict(parameters()), KIND, OPTIONS, whole)


def test_the_language_model_has_it():
    sizes = {"sparsek_keys": 3, "sparsek_window": 5, "sparsek_chunk": 7, "sparsek_slope": 0.1}
    config = ModelConfig(attention="sparsek", layers=1, width=16, heads=2, dtype="float32", **sizes)

    def build_and_run():
        model = Transformer(config, vocab_size=8, max_length=8, rngs=nnx.Rngs(0))
        return model, model(jnp.zeros((1, 8), jnp.int32))

    model, logits = nnx.eval_shape(build_and_run)
    assert logits.shape == (1, 8, 8)
    assert model.blocks[0].attention.sparsity == SparseK(3, 5, 7, slope=0.1)


def test_packed_documents_know_nothing_of_each_other():
    graph, params, rest = parts()
    ids = jnp.arange(LENGTH)[None] // 9
    apply = jax.jit(lambda x: nnx.merge(graph, params, rest)(x, deterministic=True, segment_ids=ids))
    for first in (0, 9, 18):
        changed = jnp.where((ids == first // 9)[..., None], tokens(), tokens(1))
        outputs, expected = (np.asarray(apply(x)) for x in (changed, tokens()))
        np.testing.assert_allclose(outputs[:, first : first + 9], expected[:, first : first + 9], atol=1e-6)
        assert not np.allclose(outputs, expected)


def test_impossible_options_raise():
    with pytest.raises(ValueError, match="num_keys must be at least 1, got 0"):
        SparseK(0, 4)
    with pytest.raises(ValueError, match="num_candidates must be at least 3, got 2"):
        SparseK(3, 4, num_candidates=2)
    with pytest.raises(TypeError, match=r"slope must be a static number, got '1'"):
        SparseK(3, 4, slope="1")
    with pytest.raises(ValueError, match="slope must be finite, got nan"):
        SparseK(3, 4, slope=float("nan"))
