"""Tokens from a trained model, one after another."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import Transformer
from scfa_jax.layers import Window
from train.step import LanguageModel, TrainState


def generate(
    model: LanguageModel,
    state: TrainState,
    prompts: np.ndarray,
    *,
    length: int,
    window: int,
    temperature: float,
    seed: int,
    without: int | None = None,
) -> np.ndarray:
    """Continues prompts: each token is computed once and kept in a cache.

    When `window` tokens fill the cache it is made anew from the last half of them, whose positions start again at 0: no
    token is at a position that training had not. A model that cannot decode computes the last `window` tokens anew for
    each one that it adds.

    Args:
        model: The model.
        state: Its arrays.
        prompts: Unsigned tokens `[R, P]`, `P` at least 1.
        length: Tokens to add.
        window: The longest context the model may see.
        temperature: Divides the logits; 0 takes the likeliest token.
        seed: Decides the draw; from 0 to 2**32 - 1.
        without: A token that is never added.

    Returns:
        Prompts and added tokens, `[R, P + length]`.
    """
    tokens: jax.Array | np.ndarray = np.pad(prompts, [(0, 0), (0, length)])
    start, total = prompts.shape[1], tokens.shape[1]
    arrays = state.params, state.fixed
    traced_seed = np.uint32(seed)  # an int would have to fit int32
    config = model.merge(*arrays).config
    # Elastic windows follow the room that there is: it is that of training, however few tokens are asked for.
    elastic = any(isinstance(layer.kind, Window) and layer.kind.is_elastic for layer in config.layer_kinds())
    size = window if elastic else min(window, total)
    if not config.can_decode():
        padded = np.pad(tokens, [(0, 0), (0, max(0, size - total))])
        filled = _recompute(model, *arrays, padded, start, total, traced_seed, temperature, size, without)
        return np.asarray(filled)[:, :total]
    context = min(start, window)
    while start < total:
        stop = min(start + window + 1 - context, total)
        tokens = _decode(model, *arrays, tokens, start, stop, traced_seed, temperature, context, size, without)
        start, context = stop, max(1, window // 2)
    return np.asarray(tokens)


def can_decode(model: LanguageModel, state: TrainState) -> bool:
    """Whether `generate` keeps what it computed: arguments as there."""
    return model.merge(state.params, state.fixed).config.can_decode()


@functools.partial(jax.jit, static_argnames=("model", "context", "size", "without"))
def _decode(
    model: LanguageModel,
    params: object,
    fixed: object,
    tokens: jax.Array,
    start: jax.Array,
    stop: jax.Array,
    seed: jax.Array,
    temperature: jax.Array,
    context: int,
    size: int,
    without: int | None,
) -> jax.Array:
    """Fills columns `start` to `stop - 1` of `tokens` by a cache of `size` places, first with `context` tokens."""
    transformer = model.merge(params, fixed)
    transformer.init_cache(tokens.shape[0], size)
    graph, *states = nnx.split(transformer, nnx.Cache, ...)
    cache, rest = states
    base_key = jax.random.key(seed)

    def add_one(tokens: jax.Array, cache: nnx.State, place: jax.Array, read: int) -> tuple[jax.Array, nnx.State]:
        """Reads the last `read` tokens before a place into the cache, and fills the place."""
        transformer = nnx.merge(graph, cache, rest)
        new = jax.lax.dynamic_slice_in_dim(tokens, place - read, read, axis=1)
        features = transformer.features(new, decode=True)[:, -1]
        tokens = _fill(transformer, tokens, place, features, base_key, temperature, without)
        return tokens, nnx.state(transformer, nnx.Cache)

    first = add_one(tokens, cache, start, context)
    return jax.lax.fori_loop(start + 1, stop, lambda place, carry: add_one(carry[0], carry[1], place, 1), first)[0]


@functools.partial(jax.jit, static_argnames=("model", "window", "without"))
def _recompute(
    model: LanguageModel,
    params: object,
    fixed: object,
    tokens: jax.Array,
    start: jax.Array,
    stop: jax.Array,
    seed: jax.Array,
    temperature: jax.Array,
    window: int,
    without: int | None,
) -> jax.Array:
    """Fills columns `start` to `stop - 1` of `tokens`, each by a pass over the window that ends before it."""
    transformer = model.merge(params, fixed)
    base_key = jax.random.key(seed)

    def add_one(place: jax.Array, tokens: jax.Array) -> jax.Array:
        # Until the tokens fill the window, what stands behind `place` is seen by nothing before it.
        first = jnp.maximum(0, place - window)
        context = jax.lax.dynamic_slice_in_dim(tokens, first, window, axis=1)
        features = transformer.features(context)[:, place - 1 - first]
        return _fill(transformer, tokens, place, features, base_key, temperature, without)

    return jax.lax.fori_loop(start, stop, add_one, tokens)


def _fill(
    transformer: Transformer,
    tokens: jax.Array,
    place: jax.Array,
    features: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    without: int | None,
) -> jax.Array:
    """Draws the tokens of column `place` by the features `[R, width]` of those before it."""
    logits = transformer.logits(features)
    if without is not None:
        logits = logits.at[:, without].set(-jnp.inf)
    drawn = jax.random.categorical(jax.random.fold_in(key, place), logits / jnp.maximum(temperature, 1e-6))
    token = jnp.where(temperature > 0, drawn, logits.argmax(axis=1))
    return tokens.at[:, place].set(token.astype(tokens.dtype))
