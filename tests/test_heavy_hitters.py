"""Keys that received the most attention, as a kind of sparsity of both Flax modules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import IMPLEMENTATIONS
from flax import nnx
from module_cases import HEADS, LENGTH, assert_close, outputs_and_gradients, turned
from module_cases import WIDE_FEATURES as FEATURES
from module_cases import wide_tokens as tokens
from selecting_cases import assert_decodes_with_a_cache_of_constant_size, assert_linen_is_the_same_layer

import scfa_jax.nnx
from models import ModelConfig, Transformer
from scfa_jax import reference
from scfa_jax.nnx import HeavyHitters

KIND = HeavyHitters(num_keys=3, window=4, chunk_size=5)
OPTIONS = {"num_key_value_heads": 2, "sparsity": KIND, "rotary": turned, "implementation": IMPLEMENTATIONS[0]}
WHOLE = np.zeros((1, LENGTH), np.int32)
DOCUMENTS = np.arange(LENGTH, dtype=np.int32)[None] // 13  # the second begins within a chunk


@functools.cache
def parts():
    """The module's graph and parameters, as NNX makes them; sharp enough that some keys receive more than others."""
    module = scfa_jax.nnx.CausalSelfAttention(FEATURES, HEADS, rngs=nnx.Rngs(0), **OPTIONS)
    module.query.kernel[...] = 4 * module.query.kernel[...]
    return nnx.split(module, nnx.Param, ...)


def parameters():
    return nnx.to_pure_dict(parts()[1])


@functools.cache
def results():
    """Outputs and gradients: a function of tokens, their segments and a cotangent."""
    graph, _, rest = parts()
    apply = lambda params, x, ids: nnx.merge(graph, nnx.State(params), rest)(x, deterministic=True, segment_ids=ids)
    run = jax.jit(lambda x, cotangent, ids: outputs_and_gradients(apply, parameters(), x, cotangent, {"ids": ids}))
    return lambda x, ids=WHOLE, cotangent=None: run(x, tokens(1) if cotangent is None else cotangent, ids)


def test_equals_the_dense_definition():
    """Also within documents. The choice has no gradient: what it is made by counts as given."""

    def by_hand(params, x, ids):
        def project(name):
            head = jnp.einsum("bte,enh->btnh", x, params[name]["kernel"], precision="highest") + params[name]["bias"]
            return head if name == "value" else turned(head, jnp.arange(LENGTH)[None])

        query, key, value = map(project, ("query", "key", "value"))
        received = reference.attention_received(*jax.lax.stop_gradient((query, key)), window=4, segment_ids=ids)
        attended = reference.sparsek_attention(
            query, key, value, received, num_keys=3, window=4, chunk_size=5, num_candidates=3, segment_ids=ids
        )
        return jnp.einsum("btnh,nhe->bte", attended, params["out"]["kernel"], precision="highest")

    dense = jax.jit(lambda x, ids: outputs_and_gradients(by_hand, parameters(), x, tokens(1), {"ids": ids}))
    whole, packed = (results()(tokens(), ids) for ids in (WHOLE, DOCUMENTS))
    for got, ids in ((whole, WHOLE), (packed, DOCUMENTS)):
        outputs, (of_params, of_x) = dense(tokens(), ids)
        of_params["out"]["bias"] = tokens(1).sum(axis=(0, 1))  # the one that `by_hand` leaves out
        assert_close(got[0], outputs)
        assert_close(got[1], (of_params, of_x))
    assert not np.allclose(whole[0][:, 13:], packed[0][:, 13:], atol=1e-3)


def test_later_tokens_change_neither_earlier_outputs_nor_receive_their_gradients():
    for seen in (1, 10, 11, LENGTH - 1):
        replaced = lambda x, y: np.concatenate([np.asarray(x)[:, :seen], np.asarray(y)[:, seen:]], axis=1)  # noqa: B023
        cotangent = replaced(tokens(1), np.zeros_like(tokens()))
        outputs, (_, gradient) = results()(tokens(), cotangent=cotangent)
        changed, _ = results()(replaced(tokens(), tokens(2)), cotangent=cotangent)
        np.testing.assert_allclose(outputs[:, :seen], changed[:, :seen], rtol=1e-5, atol=1e-6)
        assert not np.allclose(outputs[:, seen:], changed[:, seen:])
        np.testing.assert_array_equal(gradient[:, seen:], 0)


def test_decoding_equals_the_whole_with_a_cache_of_constant_size():
    assert_decodes_with_a_cache_of_constant_size(parts(), KIND, results()(tokens())[0])


def test_linen_is_the_same_layer():
    assert_linen_is_the_same_layer(parameters(), KIND, OPTIONS, results()(tokens())[0])


def test_the_language_model_has_it():
    sizes = {"sparsek_keys": 3, "sparsek_window": 5, "sparsek_chunk": 7}
    config = ModelConfig(attention="heavy", layers=1, width=16, heads=2, dtype="float32", **sizes)

    model = nnx.eval_shape(lambda: Transformer(config, vocab_size=8, max_length=8, rngs=nnx.Rngs(0)))
    assert model.blocks[0].attention.sparsity == HeavyHitters(3, 5, 7)


def test_impossible_options_raise():
    with pytest.raises(ValueError, match="num_keys must be at least 1, got 0"):
        HeavyHitters(0, 4)
    with pytest.raises(TypeError, match=r"window must be a static int, got 4\.0"):
        HeavyHitters(3, 4.0)
