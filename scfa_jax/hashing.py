"""Locality-sensitive hashing: which bucket each query and each key falls into."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def random_rotations(key: jax.Array, num_heads: int, head_dim: int, num_buckets: int) -> jax.Array:
    """Draws random directions for angular locality-sensitive hashing, one set a head.

    Source: Andoni et al. 2015, as used by Kitaev et al. 2020 (Reformer).

    Args:
        key: A JAX random key.
        num_heads: Number of heads, each with directions of its own.
        head_dim: Width `H` of the vectors to hash.
        num_buckets: Number of buckets: even, as each direction and its opposite make one bucket each.

    Returns:
        float32 `[num_heads, head_dim, num_buckets // 2]` with columns of unit length.

    Raises:
        ValueError: `num_buckets` is odd or below 2.
        TypeError: `num_buckets` is no static integer.

    Examples:
        >>> import jax, scfa_jax
        >>> scfa_jax.random_rotations(jax.random.key(0), num_heads=2, head_dim=16, num_buckets=8).shape
        (2, 16, 4)
    """
    check_num_buckets(num_buckets)
    directions = jax.random.normal(key, (num_heads, head_dim, num_buckets // 2), jnp.float32)
    return directions / jnp.linalg.norm(directions, axis=1, keepdims=True)


def lsh_hash(x: jax.Array, rotations: jax.Array) -> jax.Array:
    """Hashes vectors by the nearest of `rotations` and their opposites.

    Vectors at a small angle tend to share a bucket; the length of a vector does not matter. The products are
    taken in float32 at the highest precision whatever the dtype of `x`, so that a vector hashes alike wherever
    it is computed.

    Args:
        x: float `[..., T, N, H]`.
        rotations: float `[N, H, num_buckets // 2]`, from `random_rotations`.

    Returns:
        int32 `[..., T, N]` of bucket ids in `[0, num_buckets)`. No gradient flows through it.

    Raises:
        ValueError: The number of heads or their width differ.
        TypeError: `x` does not hold floats.

    Examples:
        >>> import jax, scfa_jax
        >>> rotations = scfa_jax.random_rotations(jax.random.key(0), num_heads=2, head_dim=16, num_buckets=8)
        >>> x = jax.random.normal(jax.random.key(1), (1, 64, 2, 16))
        >>> hashes = scfa_jax.lsh_hash(x, rotations)
        >>> hashes.shape, bool((hashes == scfa_jax.lsh_hash(2 * x, rotations)).all())
        ((1, 64, 2), True)
    """
    if rotations.ndim != 3 or x.ndim < 3 or x.shape[-2:] != rotations.shape[:2]:
        raise ValueError(
            f"rotations must be [N, H, num_buckets // 2] with the N and H of x [..., T, N, H], "
            f"got rotations {rotations.shape} and x {x.shape}."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must hold floats, got {x.dtype}.")
    x, rotations = jax.lax.stop_gradient((x.astype(jnp.float32), rotations.astype(jnp.float32)))
    projected = jnp.einsum("...tnh,nhr->...tnr", x, rotations, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmax(jnp.concatenate([projected, -projected], axis=-1), axis=-1).astype(jnp.int32)


def check_num_buckets(num_buckets: int) -> None:
    """Checks a number of buckets for angular hashing.

    Args:
        num_buckets: What was given.

    Raises:
        ValueError: It is odd or below 2.
        TypeError: It is no static integer.
    """
    if isinstance(num_buckets, bool) or not isinstance(num_buckets, int | np.integer):
        raise TypeError(f"num_buckets must be a static int, got {num_buckets!r}.")
    if num_buckets < 2 or num_buckets % 2:
        raise ValueError(f"num_buckets must be an even number of at least 2, got {num_buckets}.")
