"""Rotary position embedding (Su et al. 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def rotary(
    x: Float[Array, "B T N H"], positions: Int[Array, "#B T"], *, base: float = 10_000.0
) -> Float[Array, "B T N H"]:
    """Turns pairs of features by angles that grow with the position.

    Source: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding".

    Args:
        x: Queries or keys, with an even `H`; feature `i` is paired with `i + H // 2`.
        positions: Where they stand.
        base: How far apart the slowest and the fastest rotation are.

    Returns:
        The turned vectors in the dtype of `x`, computed in float32.

    Raises:
        ValueError: `H` is odd.

    Examples:
        >>> import jax.numpy as jnp
        >>> from scfa_jax.rotary import rotary
        >>> x = jnp.ones((1, 4, 2, 16))
        >>> bool((rotary(x, jnp.arange(4)[None])[:, 0] == x[:, 0]).all())  # position 0 turns nothing
        True
    """
    head_dim = x.shape[3]
    if head_dim % 2:
        raise ValueError(f"x must have an even head size, got shape {x.shape}.")
    frequency = base ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency[None, None, None]  # [1 or B, T, 1, H // 2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
