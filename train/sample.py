"""Text from a trained model."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.step import LanguageModel


def sample(
    model: LanguageModel,
    params: Any,
    fixed: Any,
    prompt: bytes,
    *,
    length: int,
    window: int,
    temperature: float,
    seed: int,
) -> bytes:
    """Continues a prompt byte by byte, in one compiled loop.

    Each byte costs a pass over a window of fixed size: nothing is kept between bytes or compiled twice.

    Args:
        model: The model.
        params: Its parameters.
        fixed: Its other variables.
        prompt: At least one byte.
        length: Bytes to add.
        window: The longest context the model may see.
        temperature: Divides the logits; 0 takes the likeliest byte.
        seed: Decides the draw.

    Returns:
        The added bytes.
    """
    total = len(prompt) + length
    text = np.zeros(total, np.uint8)
    text[: len(prompt)] = np.frombuffer(prompt, np.uint8)
    continued = _continue(model, params, fixed, text, len(prompt), seed, temperature, min(window, total))
    return np.asarray(continued)[len(prompt) :].tobytes()


@functools.partial(jax.jit, static_argnames=("model", "window"))
def _continue(
    model: LanguageModel,
    params: Any,
    fixed: Any,
    text: jax.Array,
    start: jax.Array,
    seed: jax.Array,
    temperature: jax.Array,
    window: int,
) -> jax.Array:
    """Fills `text` from `start` on."""
    transformer = model.merge(params, fixed)
    base_key = jax.random.key(seed)

    def add_one(place: jax.Array, text: jax.Array) -> jax.Array:
        # Until the text is as long as the window, what stands behind `place` is seen by nothing before it.
        first = jnp.maximum(0, place - window)
        context = jax.lax.dynamic_slice(text, (first,), (window,))
        features = transformer.features(context[None])[0, place - 1 - first]
        logits = transformer.logits(features)
        drawn = jax.random.categorical(jax.random.fold_in(base_key, place), logits / jnp.maximum(temperature, 1e-6))
        token = jnp.where(temperature > 0, drawn, logits.argmax())
        return text.at[place].set(token.astype(text.dtype))

    return jax.lax.fori_loop(start, text.shape[0], add_one, text)
