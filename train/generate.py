"""Tokens from a trained model, one after another."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

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
) -> np.ndarray:
    """Continues prompts in one compiled loop.

    Each token costs a pass over a window of fixed size: nothing is kept between tokens or compiled twice.

    Args:
        model: The model.
        state: Its arrays.
        prompts: Unsigned tokens `[R, P]`, `P` at least 1.
        length: Tokens to add.
        window: The longest context the model may see.
        temperature: Divides the logits; 0 takes the likeliest token.
        seed: Decides the draw.

    Returns:
        Prompts and added tokens, `[R, P + length]`.
    """
    start = prompts.shape[1]
    tokens = np.pad(prompts, [(0, 0), (0, length)])
    window = min(window, tokens.shape[1])
    return np.asarray(_continue(model, state.params, state.fixed, tokens, start, seed, temperature, window))


@functools.partial(jax.jit, static_argnames=("model", "window"))
def _continue(
    model: LanguageModel,
    params: object,
    fixed: object,
    tokens: jax.Array,
    start: jax.Array,
    seed: jax.Array,
    temperature: jax.Array,
    window: int,
) -> jax.Array:
    """Fills `tokens` from column `start` on."""
    transformer = model.merge(params, fixed)
    base_key = jax.random.key(seed)

    def add_one(place: jax.Array, tokens: jax.Array) -> jax.Array:
        # Until the tokens fill the window, what stands behind `place` is seen by nothing before it.
        first = jnp.maximum(0, place - window)
        context = jax.lax.dynamic_slice_in_dim(tokens, first, window, axis=1)
        features = transformer.features(context)[:, place - 1 - first]
        logits = transformer.logits(features)
        drawn = jax.random.categorical(jax.random.fold_in(base_key, place), logits / jnp.maximum(temperature, 1e-6))
        token = jnp.where(temperature > 0, drawn, logits.argmax(axis=1))
        return tokens.at[:, place].set(token.astype(tokens.dtype))

    return jax.lax.fori_loop(start, tokens.shape[1], add_one, tokens)
