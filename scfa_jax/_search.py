"""Binary search for many values at once, in plain JAX; kernels use it too."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from scfa_jax._partitioning import varying_as


def count_leading(
    holds: Sequence[Callable[[jax.Array], jax.Array]], length: int, like: jax.Array
) -> tuple[jax.Array, ...]:
    """Counts the leading elements of sequences for which a condition holds: first it does, then no longer.

    Args:
        holds: Conditions, searched side by side. Each takes int32 element numbers of the shape of `like`, in
            `[0, length)`, and tells whether it holds there.
        length: Length of the sequences, at least 1.
        like: One search for each element. It varies over the devices of a mesh as the conditions do.

    Returns:
        int32 of that shape for each condition, in `[0, length]`.
    """

    def halve(_, ends):
        return tuple(halve_one(condition, *pair) for condition, pair in zip(holds, ends, strict=True))

    def halve_one(condition, first, last):  # the count lies in [first, last]
        middle = jax.lax.div(first + last, np.int32(2))
        is_open = first < last
        held = condition(jnp.minimum(middle, np.int32(length - 1)))
        return jnp.where(is_open & held, middle + 1, first), jnp.where(is_open & ~held, middle, last)

    ends = (jnp.zeros(like.shape, jnp.int32), jnp.full(like.shape, length, jnp.int32))
    ends = varying_as(like, ends)
    return tuple(first for first, _ in jax.lax.fori_loop(0, length.bit_length(), halve, (ends,) * len(holds)))


def is_up_to(key_id: jax.Array, key_position: jax.Array, query_id: jax.Array, last_position: jax.Array) -> jax.Array:
    """Whether (id, position) of a key comes no later than that of a query."""
    return (key_id < query_id) | ((key_id == query_id) & (key_position <= last_position))
