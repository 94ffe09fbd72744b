"""Attention inside buckets that ignore what tokens are: a control."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from scfa_jax.hashing import permutation_hash
from scfa_jax.sparsity.base import Layout, Marks, Projections
from scfa_jax.sparsity.hash import Hash


@dataclasses.dataclass(frozen=True)
class PermutationHash(Hash):
    """Attention inside buckets of positions that `scfa_jax.permutation_hash` draws: as sparse as a hash, and blind.

    What other hashes do better than this one they owe to what is in their buckets. Training draws anew in each call,
    and evaluation keeps one draw.

    Args:
        num_buckets: Number of buckets, even.
        exclude_self: As in `Hash`.
        before_rotary: Ignored: nothing is hashed.
        window: As in `Hash`.
    """

    kept_draw = ("seed",)

    def draw(self, key: jax.Array, batch_size: int, length: int, layout: Layout) -> dict[str, jax.Array]:
        """Draws what one call needs.

        Args:
            key: A JAX random key.
            batch_size: Ignored: all batch elements share the buckets.
            length: Ignored: a seed serves any.
            layout: Ignored, likewise.

        Returns:
            `seed`, uint32 `[]`.
        """
        del batch_size, length, layout
        return {"seed": jax.random.bits(key, (), jnp.uint32)}

    def marks(self, projections: Projections, seed: jax.Array | None = None) -> tuple[Marks, Marks | None]:
        """Assigns positions to buckets.

        Args:
            projections: Those of a call.
            seed: uint32 `[]`; needed.

        Returns:
            The buckets `hash` of queries, and of keys.

        Raises:
            ValueError: `seed` is missing.
        """
        if seed is None:
            raise ValueError(f"seed must be given for {self}, got None.")
        (batch, length, query_heads, _), key_heads = projections.query.shape, projections.key.shape[2]
        ids = permutation_hash(jax.random.key(seed), length, key_heads, self.num_buckets, start=projections.start)
        ids = jnp.broadcast_to(ids, (batch, length, key_heads))
        if query_heads == key_heads:
            return {"hash": ids}, None
        return {"hash": jnp.repeat(ids, query_heads // key_heads, axis=2)}, {"hash": ids}
