"""What layers with SparseK and with heavy hitters must both do: their caches, and Linen beside NNX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from module_cases import BATCH, HEADS, LENGTH, SEED, assert_close
from module_cases import WIDE_FEATURES as FEATURES
from module_cases import wide_tokens as tokens

import scfa_jax.linen


def assert_decodes_with_a_cache_of_constant_size(parts, kind, whole):
    """A prompt, single tokens and more at once, wherever chunks begin, past the length that the cache was made for."""
    graph, params, _ = parts
    module = nnx.merge(graph, params, nnx.State({}))
    module.init_cache((BATCH, 12, FEATURES))
    graph, cache, rest = nnx.split(module, nnx.Cache, ...)
    sizes = jax.tree.map(jnp.shape, nnx.to_pure_dict(cache))
    assert sizes["cached_key"] == (BATCH, kind.window - 1 + kind.chunk_size, 2, FEATURES // HEADS)

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


def assert_linen_is_the_same_layer(params, kind, options, whole):
    """The same parameters and cache by shape, and the outputs of a prompt."""
    module = scfa_jax.linen.CausalSelfAttention(FEATURES, HEADS, decode=True, **options)
    shapes = jax.eval_shape(module.init, SEED, tokens())
    assert jax.tree.map(jnp.shape, shapes["params"]) == jax.tree.map(jnp.shape, params)
    empty = kind.empty_cache(module.bind({"params": params}).layout, BATCH, jnp.float32)
    assert jax.tree.map(jnp.shape, shapes["cache"]) == jax.tree.map(jnp.shape, empty)
    apply = jax.jit(functools.partial(module.apply, mutable=["cache"]))
    outputs, _ = apply({"params": params, "cache": empty}, tokens())
    assert_close(outputs, whole)
