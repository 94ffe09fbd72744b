"""Attention inside the buckets of a hash, and to a window beside them."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from scfa_jax import _checks, bucket_cache
from scfa_jax.attention import hash_sparse_attention
from scfa_jax.hashing import check_num_buckets, lsh_hash, random_rotations
from scfa_jax.patterns import union_attention, window_and_buckets
from scfa_jax.sparsity.base import Implementation, Layout, Marks, Operands, Projections, Sparsity


@dataclasses.dataclass(frozen=True)
class Hash(Sparsity):
    """Attention inside the buckets of an angular hash: Hash-sparse.

    Source: Pagliardini et al. 2023, "Faster Causal Attention Over Large Sequences Through Sparse Flash Attention".

    Args:
        num_buckets: Number of buckets, even.
        exclude_self: Whether a token may not attend to itself. With shared queries and keys it should not: it
            would mostly see itself. The first token of a bucket then attends to nothing and its output is 0.
        before_rotary: Whether to hash queries and keys before they are rotated, in modules with `rotary`: buckets
            then depend on what a token is and not on where it stands.
        window: Positions up to its own that a token sees whatever their bucket, before which it sees those of its
            bucket. Its own is among them, and left out of both parts with `exclude_self`. 0 for the bucket alone.

    Raises:
        ValueError: `num_buckets` is odd or below 2, or `window` below 0.
        TypeError: A number is no static integer.
    """

    num_buckets: int
    exclude_self: bool = True
    before_rotary: bool = False
    window: int = dataclasses.field(default=0, kw_only=True)

    shares_query_key = True
    kept_draw: ClassVar[tuple[str, ...]] = ("rotations",)
    cached_marks: ClassVar = {"hash": np.int32(0)}

    def __post_init__(self):
        check_num_buckets(self.num_buckets)
        _checks.static_int("window", self.window, least=0)

    def draws(self, deterministic: bool) -> bool:
        """Tells whether a call draws anew: in training.

        Args:
            deterministic: Whether it evaluates.

        Returns:
            Whether `draw` is to be called.
        """
        return not deterministic

    def draw(self, key: jax.Array, batch_size: int, length: int, layout: Layout) -> dict[str, jax.Array]:
        """Draws what one call needs.

        Args:
            key: A JAX random key.
            batch_size: Ignored: all batch elements share the rotations.
            length: Ignored, likewise.
            layout: That of the module.

        Returns:
            `rotations`, float32 `[K, H, num_buckets // 2]`.
        """
        del batch_size, length
        heads, head_dim = layout.num_key_value_heads, layout.head_dim
        return {"rotations": random_rotations(key, heads, head_dim, self.num_buckets)}

    def marks(self, projections: Projections, rotations: jax.Array | None = None) -> tuple[Marks, Marks | None]:
        """Hashes.

        Args:
            projections: Those of a call.
            rotations: float `[K, H, num_buckets // 2]`; needed.

        Returns:
            The buckets `hash` of queries, and of keys.

        Raises:
            ValueError: `rotations` is missing or has another shape.
        """
        query, key = self.hashed(projections)
        rotations = self.checked(rotations, key)
        group = query.shape[2] // key.shape[2]
        query_hash = lsh_hash(query, jnp.repeat(rotations, group, axis=0))
        return {"hash": query_hash}, None if key is query else {"hash": lsh_hash(key, rotations)}

    def hashed(self, projections: Projections) -> tuple[jax.Array, jax.Array]:
        """Tells what is hashed.

        Args:
            projections: Those of a call.

        Returns:
            Queries `[B, T, N, H]`, and keys `[B, T, K, H]`: the same object where queries are the keys.
        """
        if self.before_rotary:
            return projections.query, projections.key
        return projections.rotated_query, projections.rotated_key

    def checked(self, rotations: jax.Array | None, key: jax.Array) -> jax.Array:
        """Checks rotations.

        Args:
            rotations: What was given.
            key: float `[B, T, K, H]`, what they hash.

        Returns:
            They.

        Raises:
            ValueError: They are missing or have another shape.
        """
        expected = (*key.shape[2:], self.num_buckets // 2)
        if rotations is None or rotations.shape != expected:
            got = None if rotations is None else rotations.shape
            raise ValueError(f"rotations must be [K, H, num_buckets // 2] = {expected}, got {got}.")
        return rotations

    def mask(
        self, query_marks: Marks, key_marks: Marks, query_position: jax.Array, key_position: jax.Array
    ) -> jax.Array:
        """Tells which queries and keys meet: those of one bucket, and those within the window.

        Args:
            query_marks: As in `Sparsity.mask`.
            key_marks: Likewise.
            query_position: Likewise.
            key_position: Likewise.

        Returns:
            Likewise.
        """
        last, window = query_position - int(self.exclude_self), min(self.window, _checks.OFFSET_LIMIT)
        seen = (query_marks["hash"] == key_marks["hash"]) | (query_position - key_position < window)
        return (key_position <= last) & seen

    def keeps_order(self, max_length: int, head_dim: int) -> bool:
        """Calls `bucket_cache.pays`, unless there is a window, which no bucket holds; as in `Sparsity.keeps_order`."""
        return self.window == 0 and bucket_cache.pays(max_length, head_dim)

    def attend_in_bucket(
        self, cached: Operands, order: jax.Array, position: jax.Array, *, implementation: Implementation
    ) -> tuple[jax.Array, jax.Array]:
        """Calls `bucket_cache.attend_from_one`; all as in `Sparsity.attend_in_bucket`."""
        query, key, value, query_marks, key_marks = cached
        assert key_marks is not None
        return bucket_cache.attend_from_one(
            query,
            key,
            value,
            query_marks["hash"],
            key_marks["hash"],
            order,
            position,
            exclude_self=self.exclude_self,
            implementation=implementation,
        )

    def attend(self, operands: Operands, **options: Any) -> jax.Array:
        """Calls `hash_sparse_attention`, or with a window `union_attention`.

        Args:
            operands: What attends to what.
            **options: As in `Sparsity.attend`.

        Returns:
            `[B, T, N, H]` in the dtype of the query.
        """
        query, key, value, query_marks, key_marks = operands
        key_hash = None if key_marks is None else key_marks["hash"]
        options |= {"exclude_self": self.exclude_self, "num_buckets": self.num_buckets}
        output: Any
        if self.window:
            indices = window_and_buckets(query_marks["hash"], key_hash, self.window, **options)
            output = union_attention(query, key, value, indices, implementation=options.get("implementation"))
        else:
            output = hash_sparse_attention(query, key, value, query_marks["hash"], key_hash, **options)
        return output
