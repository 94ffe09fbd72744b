"""Attention inside the buckets of a hash that is learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from scfa_jax.hashing import learned_hash, lsh_hash, random_rotations
from scfa_jax.sparsity.base import Layout, Marks, Projections
from scfa_jax.sparsity.hash import Hash


@dataclasses.dataclass(frozen=True)
class LearnedHash(Hash):
    """Attention inside the buckets of rotations that are parameters: `scfa_jax.learned_hash` says how they learn.

    The buckets are those of `Hash` with these rotations, in training and evaluation alike. Nothing is drawn.

    Args:
        num_buckets: Number of buckets, even.
        exclude_self: As in `Hash`.
        before_rotary: As in `Hash`.
        window: As in `Hash`. The gate weighs the keys of the window too, which are seen whatever their bucket.
    """

    kept_draw = ()

    def draws(self, deterministic: bool) -> bool:
        """Tells whether a call draws anew: never.

        Args:
            deterministic: Ignored.

        Returns:
            False.
        """
        del deterministic
        return False

    def parameters(self, layout: Layout) -> dict[str, tuple[Callable[..., jax.Array], tuple[int, ...]]]:
        """Tells what is trained beside the projections.

        Args:
            layout: That of the module.

        Returns:
            `rotations`, `[K, H, num_buckets // 2]`; the length of their columns does not matter.
        """
        shape = (layout.num_key_value_heads, layout.head_dim, self.num_buckets // 2)
        return {"rotations": (_random, shape)}

    def marks(self, projections: Projections, rotations: jax.Array | None = None) -> tuple[Marks, Marks | None]:
        """Hashes, and gates values so that the rotations get gradients.

        Args:
            projections: Those of a call.
            rotations: float `[K, H, num_buckets // 2]`; needed.

        Returns:
            The buckets `hash` of queries, and of keys with their `gate` of ones.

        Raises:
            ValueError: `rotations` is missing or has another shape.
        """
        query, key = self.hashed(projections)
        rotations = self.checked(rotations, key)
        key_hash, gate = learned_hash(key, rotations)
        key_marks = {"hash": key_hash, "gate": gate}
        if key is query:
            return key_marks, None
        directions = rotations / jnp.linalg.norm(rotations, axis=1, keepdims=True)
        return {"hash": lsh_hash(query, jnp.repeat(directions, query.shape[2] // key.shape[2], axis=0))}, key_marks


def _random(key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    heads, head_dim, half = shape
    return random_rotations(key, heads, head_dim, 2 * half).astype(dtype)
