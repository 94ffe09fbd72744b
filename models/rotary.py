"""Rotary position embedding (Su et al. 2021)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rotary(x: jax.Array, positions: jax.Array, *, base: float = 10_000.0) -> jax.Array:
    """Turns pairs of features by angles that grow with the position.

    Args:
        x: float `[B, T, N, H]` with an even `H`; feature `i` is paired with `i + H // 2`.
        positions: int32 `[1 or B, T]`.
        base: How far apart the slowest and the fastest rotation are.

    Returns:
        `[B, T, N, H]` in the dtype of `x`, computed in float32.
    """
    head_dim = x.shape[3]
    frequency = base ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency  # [1 or B, T, 1, H // 2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
