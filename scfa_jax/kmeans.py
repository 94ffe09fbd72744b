"""Online k-means over the directions of queries and keys: buckets that follow the data without an optimizer.

Source: Roy et al. 2021, "Efficient Content-Based Sparse Attention with Routing Transformers". They route to each
centroid the tokens nearest to it, which looks at the whole sequence; here each token goes to its nearest centroid,
which is causal, and attends to all earlier ones there.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from scfa_jax import _checks
from scfa_jax.hashing import check_hashed

LEAK = 1e-3  # of every token, to every centroid: see `member_sums`


def random_centroids(key: jax.Array, num_heads: int, head_dim: int, num_buckets: int) -> jax.Array:
    """Draws centroids to begin with: random directions, which the first update replaces.

    Source: as of the module, Roy et al. 2021.

    Args:
        key: A JAX random key.
        num_heads: Number of heads, `N`.
        head_dim: Width `H` of the vectors to hash.
        num_buckets: Number of centroids a head.

    Returns:
        float32 `[N, num_buckets, H]`, rows of unit length.

    Raises:
        ValueError: `num_buckets` is below 1.
        TypeError: `num_buckets` is no static integer.

    Examples:
        >>> import jax
        >>> from scfa_jax.kmeans import random_centroids
        >>> random_centroids(jax.random.key(0), num_heads=2, head_dim=16, num_buckets=8).shape
        (2, 8, 16)
    """
    _checks.static_int("num_buckets", num_buckets, least=1)
    directions = jax.random.normal(key, (num_heads, num_buckets, head_dim), jnp.float32)
    return directions / jnp.linalg.norm(directions, axis=2, keepdims=True)


def kmeans_hash(x: jax.Array, centroids: jax.Array) -> jax.Array:
    """Hashes vectors by the centroid at the smallest angle.

    Source: as of the module, Roy et al. 2021. Products are taken in float32 at the highest precision, as in `lsh_hash`.

    Args:
        x: float `[..., T, N, H]`; the length of vectors does not matter.
        centroids: float `[N, num_buckets, H]`; their length does not matter, and one of length 0 is never nearer than
            any at an acute angle.

    Returns:
        int32 `[..., T, N]` of bucket ids in `[0, num_buckets)`. No gradient flows through it.

    Raises:
        ValueError: The number of heads or their width differ.
        TypeError: `x` does not hold floats.

    Examples:
        >>> import jax, scfa_jax
        >>> from scfa_jax.kmeans import member_sums, random_centroids, update_centroids
        >>> x = jax.random.normal(jax.random.key(0), (1, 64, 2, 16))
        >>> centroids = random_centroids(jax.random.key(1), num_heads=2, head_dim=16, num_buckets=8)
        >>> hashes = scfa_jax.kmeans_hash(x, centroids)
        >>> centroids = update_centroids(centroids, member_sums(x, hashes, 8), decay=0.9)  # of the next step
        >>> hashes.shape, centroids.shape
        ((1, 64, 2), (2, 8, 16))
    """
    check_hashed(x, "centroids", centroids, "N, num_buckets, H")
    x, centroids = jax.lax.stop_gradient((x.astype(jnp.float32), centroids.astype(jnp.float32)))
    nearness = jnp.einsum("...tnh,nmh->...tnm", x, _unit(centroids), precision=jax.lax.Precision.HIGHEST)
    return jnp.argmax(nearness, axis=-1).astype(jnp.int32)


def member_sums(x: jax.Array, ids: jax.Array, num_buckets: int) -> jax.Array:
    """Sums the directions of the members of each bucket: what `update_centroids` moves centroids by.

    Source: as of the module, Roy et al. 2021.

    Every centroid also gets a thousandth of all tokens (leaky learning, Rumelhart and Zipser 1985): no matter beside
    the members of a bucket that has some, and what leads an empty one to where tokens are.

    Args:
        x: float `[B, T, N, H]`; each vector counts with length 1.
        ids: int32 `[B, T, N]`, from `kmeans_hash`.
        num_buckets: Number of buckets.

    Returns:
        float32 `[N, num_buckets, H]`. No gradient flows through it.

    Raises:
        ValueError: `x` or `ids` have other shapes, or `num_buckets` is below 1.
        TypeError: `x` does not hold floats, or `num_buckets` is no static integer.

    Examples:
        >>> import jax.numpy as jnp
        >>> from scfa_jax.kmeans import member_sums
        >>> x = jnp.array([[3.0, 0.0], [0.0, 2.0], [0.0, 5.0]])[None, :, None]
        >>> member_sums(x, jnp.array([[[0], [1], [1]]]), num_buckets=2).round(1).tolist()
        [[[1.0, 0.0], [0.0, 2.0]]]
    """
    _checks.static_int("num_buckets", num_buckets, least=1)
    if x.ndim != 4 or ids.shape != x.shape[:3]:
        raise ValueError(f"ids must be [B, T, N] as x is [B, T, N, H], got ids {ids.shape} and x {x.shape}.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must hold floats, got {x.dtype}.")
    unit = _unit(jax.lax.stop_gradient(x).astype(jnp.float32))
    member = jax.nn.one_hot(ids, num_buckets, dtype=jnp.float32) + LEAK
    return jnp.einsum("btnm,btnh->nmh", member, unit, precision=jax.lax.Precision.HIGHEST)


def update_centroids(centroids: jax.Array, sums: jax.Array, decay: jax.Array | float) -> jax.Array:
    """Moves centroids after a step, in place of an optimizer.

    Source: as of the module, Roy et al. 2021.

    Args:
        centroids: float32 `[N, num_buckets, H]` as they stood before the step: moving averages of `sums`, of which only
            the direction matters.
        sums: float32 `[N, num_buckets, H]`, `member_sums` of the step's queries and keys together.
        decay: The share of the old average that stays, in `[0, 1)`.

    Returns:
        float32 `[N, num_buckets, H]`, those of the next step.

    Raises:
        ValueError: `sums` has another shape than `centroids`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from scfa_jax.kmeans import update_centroids
        >>> update_centroids(jnp.ones((1, 1, 2)), jnp.array([[[3.0, 1.0]]]), decay=0.5).tolist()
        [[[2.0, 1.0]]]
    """
    if sums.shape != centroids.shape:
        raise ValueError(f"sums must have the shape of centroids, {centroids.shape}, got {sums.shape}.")
    return decay * centroids + (1 - decay) * sums


@jax.custom_vjp
def with_gradient(x: jax.Array, array: jax.Array, gradient: jax.Array) -> jax.Array:
    """Returns `x`, and makes `gradient` the gradient of `array`, whatever the loss.

    A step that differentiates by `array` too thus gets statistics of the forward pass: summed over the parts of a
    batch, and through rematerialisation and scans, as any gradient. Flax carries the scales of its float8 layers so.

    Args:
        x: Any array on the way to the loss.
        array: Any float array.
        gradient: Of the shape and dtype of `array`.

    Returns:
        `x`.
    """
    del array, gradient
    return x


def _forward(x, array, gradient):
    return with_gradient(x, array, gradient), gradient


def _backward(gradient, cotangent):
    return cotangent, gradient, jnp.zeros_like(gradient)


with_gradient.defvjp(_forward, _backward)


def _unit(x: jax.Array) -> jax.Array:
    """Vectors at length 1; those without length stay 0."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-30))
