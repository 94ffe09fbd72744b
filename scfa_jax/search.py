"""Binary search for many values at once, in plain JAX; the Triton kernels use it too."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def count_leading(holds: Callable[[jax.Array], jax.Array], length: int, shape: tuple[int, ...]) -> jax.Array:
    """Counts the leading elements of sequences for which a condition holds: first it does, then no longer.

    Args:
        holds: Takes int32 element numbers of `shape`, in `[0, length)`, and tells whether the condition holds there.
        length: Length of the sequences, at least 1.
        shape: One search for each element.

    Returns:
        int32 of `shape`, in `[0, length]`.
    """

    def halve(_, ends):
        first, last = ends  # the count lies in [first, last]
        middle = jax.lax.div(first + last, np.int32(2))
        is_open = first < last
        held = holds(jnp.minimum(middle, np.int32(length - 1)))
        return jnp.where(is_open & held, middle + 1, first), jnp.where(is_open & ~held, middle, last)

    ends = jnp.zeros(shape, jnp.int32), jnp.full(shape, length, jnp.int32)
    return jax.lax.fori_loop(0, length.bit_length(), halve, ends)[0]


def key_ranges(
    query_id: jax.Array, last_position: jax.Array, key_id: jax.Array, key_position: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Ranks of the first and the last key of each query's bucket, up to a position.

    Args:
        query_id: int32 `[B, N, T]`, bucket ids.
        last_position: int32 `[B, N, T]`, the largest position that a query may see.
        key_id: int32 `[B, N, S]`, ascending, no axis empty.
        key_position: int32 `[B, N, S]`, ascending among equal ids.

    Returns:
        `low` and `high`, int32 `[B, N, T]`; `high = low - 1` where there is no such key.
    """
    length = key_id.shape[-1]
    at = lambda x, i: jnp.take_along_axis(x, i, axis=-1)

    def is_seen(i):
        return is_up_to(at(key_id, i), at(key_position, i), query_id, last_position)

    low = count_leading(lambda i: at(key_id, i) < query_id, length, query_id.shape)
    high = count_leading(is_seen, length, query_id.shape) - 1
    return low, high


def is_up_to(key_id: jax.Array, key_position: jax.Array, query_id: jax.Array, last_position: jax.Array) -> jax.Array:
    """Whether (id, position) of a key comes no later than that of a query."""
    return (key_id < query_id) | ((key_id == query_id) & (key_position <= last_position))
