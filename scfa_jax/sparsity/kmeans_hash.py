"""Attention inside the clusters of online k-means."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from scfa_jax.kmeans import kmeans_hash, member_sums, random_centroids, with_gradient
from scfa_jax.sparsity.base import Layout, Marks, Projections
from scfa_jax.sparsity.hash import Hash


@dataclasses.dataclass(frozen=True)
class KMeansHash(Hash):
    """Attention among tokens with the same nearest centroid: clusters, exact and causal.

    Source: Roy et al. 2021, "Efficient Content-Based Sparse Attention with Routing Transformers".

    The module keeps `centroids`, which no optimizer trains. A call takes them as it finds them. The gradient of a loss
    with respect to them is none, but the sums that `scfa_jax.kmeans.update_centroids` moves them by after the step:
    differentiate by them too, as `train.step` does, or they stay where they are.

    Args:
        num_buckets: Number of buckets, even.
        exclude_self: As in `Hash`.
        before_rotary: As in `Hash`.
        window: As in `Hash`.
    """

    kept_draw = ("centroids",)

    def draws(self, deterministic: bool) -> bool:
        """Tells whether a call draws anew: never, the first centroids alone are random.

        Args:
            deterministic: Ignored.

        Returns:
            False.
        """
        del deterministic
        return False

    def draw(self, key: jax.Array, batch_size: int, length: int, layout: Layout) -> dict[str, jax.Array]:
        """Draws the first centroids.

        Args:
            key: A JAX random key.
            batch_size: Ignored: all batch elements share the centroids.
            length: Ignored, likewise.
            layout: That of the module.

        Returns:
            `centroids`, float32 `[K, num_buckets, H]`.
        """
        del batch_size, length
        heads, head_dim = layout.num_key_value_heads, layout.head_dim
        return {"centroids": random_centroids(key, heads, head_dim, self.num_buckets)}

    def marks(self, projections: Projections, centroids: jax.Array | None = None) -> tuple[Marks, Marks | None]:
        """Finds the nearest centroids, and gates values so that the sums of their members come out as a gradient.

        Args:
            projections: Those of a call.
            centroids: float `[K, num_buckets, H]`; needed.

        Returns:
            The buckets `hash` of queries, and of keys with their `gate` of ones.

        Raises:
            ValueError: `centroids` is missing or has another shape.
        """
        query, key = self.hashed(projections)
        heads, head_dim = key.shape[2:]
        expected = (heads, self.num_buckets, head_dim)
        if centroids is None or centroids.shape != expected:
            got = None if centroids is None else centroids.shape
            raise ValueError(f"centroids must be [K, num_buckets, H] = {expected}, got {got}.")
        key_hash = kmeans_hash(key, centroids)
        sums, query_marks = member_sums(key, key_hash, self.num_buckets), None
        if key is not query:
            group = query.shape[2] // heads
            query_hash = kmeans_hash(query, jnp.repeat(centroids, group, axis=0))
            query_marks = {"hash": query_hash}
            sums += member_sums(query, query_hash, self.num_buckets).reshape(heads, group, *sums.shape[1:]).sum(axis=1)
        gate = with_gradient(jnp.ones(key_hash.shape, jnp.float32), centroids, sums.astype(centroids.dtype))
        key_marks = {"hash": key_hash, "gate": gate}
        return (key_marks, None) if query_marks is None else (query_marks, key_marks)
