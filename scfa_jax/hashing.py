"""Locality-sensitive hashing: which bucket each query and each key falls into."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from scfa_jax import _checks, _partitioning

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32, Int32


def random_rotations(
    key: jax.Array, num_heads: int, head_dim: int, num_buckets: int
) -> Float32[Array, "{num_heads} {head_dim} {num_buckets}//2"]:
    """Draws random directions for angular locality-sensitive hashing, one set per head.

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


def lsh_hash(x: Float[Array, "*B T N H"], rotations: Float[Array, "N H R"]) -> Int32[Array, "*B T N"]:
    """Hashes vectors by the nearest of `rotations` and their opposites.

    Source: Andoni et al. 2015, "Practical and Optimal LSH for Angular Distance", as used by Kitaev et al. 2020
    (Reformer).

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
    x, rotations = jax.lax.stop_gradient((x, rotations))
    projected = _projected(x, rotations)
    return jnp.argmax(jnp.concatenate([projected, -projected], axis=-1), axis=-1).astype(jnp.int32)


def learned_hash(
    x: Float[Array, "B T N H"], rotations: Float[Array, "N H R"]
) -> tuple[Int32[Array, "B T N"], Float32[Array, "B T N"]]:
    """Hashes keys as `lsh_hash` does, with a gate through which the rotations can be learned.

    The bucket of a key is the argmax of its projections, which has no gradient. Their softmax has one. So let the gate
    multiply the key's value: it is exactly 1, and its gradient is that of the logarithm of the chosen bucket's
    probability, less the mean over the keys in that bucket. A key whose value lowers the loss more than its neighbours'
    becomes surer of its bucket, another one moves to the border. The router of a Switch Transformer (Fedus et al.
    2021) learns by such a gate without the mean, and needs a loss for balance, since a bucket that helps at all then
    grows; here what a bucket gains in all is 0.

    Projections are those of unit vectors on unit directions, times `sqrt(H)`: of size 1 for random ones.

    Args:
        x: float `[B, T, N, H]`.
        rotations: float `[N, H, num_buckets // 2]`; the length of its columns does not matter.

    Returns:
        The ids of `lsh_hash`, and float32 `[B, T, N]` of ones, the gate. No gradient flows to `x`: through the mean one
        token's would reach others.

    Raises:
        ValueError: As in `lsh_hash`.
        TypeError: As in `lsh_hash`.

    Examples:
        >>> import jax, scfa_jax
        >>> rotations = scfa_jax.random_rotations(jax.random.key(0), num_heads=2, head_dim=16, num_buckets=8)
        >>> x = value = jax.random.normal(jax.random.key(1), (1, 64, 2, 16))
        >>> def loss(rotations):
        ...     hashes, gate = scfa_jax.learned_hash(x, rotations)
        ...     output = scfa_jax.hash_sparse_attention(x, x, value * gate[..., None], hashes, num_buckets=8)
        ...     return (output**2).sum()
        >>> bool((jax.jit(jax.grad(loss))(rotations) != 0).all())
        True
    """
    x = jax.lax.stop_gradient(x)
    directions = rotations / jnp.linalg.norm(rotations, axis=1, keepdims=True)
    ids, projected = lsh_hash(x, directions), _projected(x, directions)
    length = jnp.linalg.norm(x.astype(jnp.float32), axis=-1, keepdims=True)
    logits = x.shape[-1] ** 0.5 * projected / jnp.maximum(length, 1e-6)
    log_probability = jax.nn.log_softmax(jnp.concatenate([logits, -logits], axis=-1))
    member = jax.nn.one_hot(ids, log_probability.shape[-1], dtype=jnp.float32)  # [B, T, N, num_buckets]
    chosen = jnp.sum(member * log_probability, axis=-1)
    mean = jnp.einsum("btnm,btn->bnm", member, chosen) / jnp.maximum(member.sum(axis=1), 1)
    gain = chosen - jnp.einsum("btnm,bnm->btn", member, mean)
    return ids, jnp.exp(gain - jax.lax.stop_gradient(gain))


def check_num_buckets(num_buckets: int) -> None:
    """Checks a number of buckets for angular hashing.

    Args:
        num_buckets: What was given.

    Raises:
        ValueError: It is odd or below 2.
        TypeError: It is no static integer.
    """
    _checks.static_int("num_buckets", num_buckets, least=-(2**31))
    if num_buckets < 2 or num_buckets % 2:
        raise ValueError(f"num_buckets must be an even number of at least 2, got {num_buckets}.")


def check_hashed(x: jax.Array, name: str, by: jax.Array, layout: str) -> None:
    """Checks vectors to hash against what they are hashed by.

    Args:
        x: What was given as `x`.
        name: Of what they are hashed by.
        by: That.
        layout: How its axes are called.

    Raises:
        ValueError: The number of heads or their width differ.
        TypeError: `x` does not hold floats.
    """
    width = layout.split(", ").index("H")
    if by.ndim != 3 or x.ndim < 3 or x.shape[-2:] != (by.shape[0], by.shape[width]):
        raise ValueError(
            f"{name} must be [{layout}] with the N and H of x [..., T, N, H], got {name} {by.shape} and x {x.shape}."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must hold floats, got {x.dtype}.")


def _projected(x: jax.Array, rotations: jax.Array) -> jax.Array:
    """float32 `[..., T, N, num_buckets // 2]`, at the highest precision."""
    check_hashed(x, "rotations", rotations, "N, H, num_buckets // 2")
    x, rotations = (jnp.asarray(array, jnp.float32) for array in (x, rotations))
    leading = string.ascii_uppercase[: x.ndim - 3]
    x, rotations = _partitioning.aligned([x, rotations], [f"{leading}tn.", "n.."])  # or heads would come together
    return jnp.einsum("...tnh,nhr->...tnr", x, rotations, precision=jax.lax.Precision.HIGHEST)
