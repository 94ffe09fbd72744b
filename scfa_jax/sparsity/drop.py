"""Attention among random subsets of queries and keys."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from scfa_jax.attention import causal_attention, qk_sparse_attention
from scfa_jax.sparsity.base import Layout, Marks, Operands, Projections, Sparsity


@dataclasses.dataclass(frozen=True)
class Drop(Sparsity):
    """Attention among random subsets of queries and keys: QK-sparse.

    Source: Pagliardini et al. 2023, "Faster Causal Attention Over Large Sequences Through Sparse Flash Attention".

    Args:
        rate: Probability in `[0, 1)` with which each query and each key is dropped, independently for each
            batch element, position and head.
        drop_at_evaluation: Whether to drop at evaluation too; otherwise everything is kept there.

    Raises:
        ValueError: `rate` is outside `[0, 1)`.
        TypeError: `rate` is no static number.
    """

    rate: float
    drop_at_evaluation: bool = False

    cached_marks: ClassVar = {"keep": np.bool_(True)}

    def __post_init__(self):
        if isinstance(self.rate, bool) or not isinstance(self.rate, int | float | np.number):
            raise TypeError(f"rate must be a static number, got {self.rate!r}.")
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate must be at least 0 and below 1, got {self.rate}.")

    def draws(self, deterministic: bool) -> bool:
        """Tells whether a call draws anew: in training, and at evaluation if asked for.

        Args:
            deterministic: Whether it evaluates.

        Returns:
            Whether `draw` is to be called.
        """
        return self.drop_at_evaluation or not deterministic

    def draw(self, key: jax.Array, batch_size: int, length: int, layout: Layout) -> dict[str, jax.Array]:
        """Draws what one call needs.

        Args:
            key: A JAX random key.
            batch_size: `B`.
            length: `T`.
            layout: That of the module.

        Returns:
            `query_keep`, bool `[B, T, N]`, and `key_keep`, bool `[B, T, K]`.
        """
        heads = {"query_keep": layout.num_heads, "key_keep": layout.num_key_value_heads}
        return {
            name: jax.random.bernoulli(one_key, 1 - self.rate, (batch_size, length, count))
            for one_key, (name, count) in zip(jax.random.split(key), heads.items(), strict=True)
        }

    def marks(
        self,
        projections: Projections,
        query_keep: jax.Array | None = None,
        key_keep: jax.Array | None = None,
    ) -> tuple[Marks, Marks | None]:
        """Marks what is kept.

        Args:
            projections: Those of a call.
            query_keep: bool `[B, T, N]`; everything is kept if None.
            key_keep: bool `[B, T, K]`, given if and only if `query_keep` is.

        Returns:
            `keep` of queries, and of keys; no marks where everything is kept.

        Raises:
            ValueError: Only one of the two is given.
        """
        if (query_keep is None) != (key_keep is None):
            missing = "query_keep" if query_keep is None else "key_keep"
            raise ValueError(f"query_keep and key_keep must be given together, got {missing}=None.")
        if query_keep is None or key_keep is None:
            return {}, None
        return {"keep": query_keep}, {"keep": key_keep}

    def mask(
        self, query_marks: Marks, key_marks: Marks, query_position: jax.Array, key_position: jax.Array
    ) -> jax.Array:
        """Tells which queries and keys meet: those that are kept.

        Args:
            query_marks: As in `Sparsity.mask`.
            key_marks: Likewise.
            query_position: Likewise.
            key_position: Likewise.

        Returns:
            Likewise.
        """
        return (key_position <= query_position) & query_marks.get("keep", True) & key_marks.get("keep", True)

    def attend(self, operands: Operands, **options: Any) -> jax.Array:
        """Calls `qk_sparse_attention`, or `causal_attention` where everything is kept.

        Args:
            operands: What attends to what.
            **options: As in `Sparsity.attend`.

        Returns:
            `[B, T, N, H]` in the dtype of the query.
        """
        query, key, value, query_marks, key_marks = operands
        output: Any
        if not query_marks and not key_marks:
            output = causal_attention(query, key, value, **options)
        else:
            everything = {"keep": jnp.ones((1, 1, 1), bool)}
            keep = ((marks or everything)["keep"] for marks in (query_marks, key_marks))
            output = qk_sparse_attention(query, key, value, *keep, **options)
        return output
