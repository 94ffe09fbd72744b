"""Attention to the keys with the best scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from scfa_jax.attention import qk_sparse_attention
from scfa_jax.keeping import keep_top
from scfa_jax.sparsity.base import Layout, Marks, Operands, Projections, Sparsity


@dataclasses.dataclass(frozen=True)
class KeepTop(Sparsity):
    """Attention of all queries to the top fraction of keys by a score, in each head: see `scfa_jax.keep_top`.

    Source: as there, Pagliardini et al. 2023 for the attention; the rule and the scores are this library's.

    Args:
        fraction: Of the keys to keep, in `(0, 1]`, in training and evaluation alike.
        score: "norm", the length of the key; or "learned", its product with a learned vector. A key's value is then
            multiplied by `2 * sigmoid(score)`, which is 1 at 0: so the score gets a gradient through the keys that
            are kept, exact but for the choice itself.

    Raises:
        ValueError: `fraction` is outside `(0, 1]`, or `score` is no such name.
        TypeError: `fraction` is no static number.
    """

    fraction: float
    score: Literal["norm", "learned"] = "norm"

    cached_marks: ClassVar = {"score": np.float32(0)}

    def __post_init__(self):
        if isinstance(self.fraction, bool) or not isinstance(self.fraction, int | float | np.number):
            raise TypeError(f"fraction must be a static number, got {self.fraction!r}.")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be above 0 and at most 1, got {self.fraction}.")
        if self.score not in ("norm", "learned"):
            raise ValueError(f"score must be 'norm' or 'learned', got {self.score!r}.")

    def parameters(self, layout: Layout) -> dict[str, tuple[Callable[..., jax.Array], tuple[int, ...]]]:
        """Tells what is trained beside the projections.

        Args:
            layout: That of the module.

        Returns:
            `scorer`, `[K, H]`, where the score is learned.
        """
        if self.score == "norm":
            return {}
        shape = (layout.num_key_value_heads, layout.head_dim)
        return {"scorer": (jax.nn.initializers.normal(layout.head_dim**-0.5), shape)}

    def marks(
        self, projections: Projections, scorer: jax.Array | None = None, fraction: jax.Array | None = None
    ) -> tuple[Marks, Marks | None]:
        """Scores keys as they are before rotary.

        Args:
            projections: Those of a call.
            scorer: float `[K, H]`, where the score is learned.
            fraction: float32 `[]` instead of that of the kind, for a schedule.

        Returns:
            The `fraction` of queries, if there is one; the `score` of keys, and their `gate` if it is learned.
        """
        key = projections.key.astype(jnp.float32)
        heads = projections.query.shape[2]
        query_marks = {} if fraction is None else {"fraction": jnp.broadcast_to(fraction, (1, 1, heads))}
        if scorer is None:
            return query_marks, {"score": jnp.sum(key * key, axis=-1)}
        scores = jnp.einsum("btkh,kh->btk", key, scorer.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        return query_marks, {"score": scores, "gate": 2 * jax.nn.sigmoid(scores)}

    def mask(
        self, query_marks: Marks, key_marks: Marks, query_position: jax.Array, key_position: jax.Array
    ) -> jax.Array:
        """Tells which queries and keys meet: all queries, and the keys that were kept when they came in.

        Args:
            query_marks: As in `Sparsity.mask`.
            key_marks: Likewise.
            query_position: Likewise.
            key_position: Likewise.

        Returns:
            Likewise.
        """
        scores = key_marks["score"]
        keep = keep_top(scores[:, :, 0, 0].swapaxes(1, 2), self._fraction(query_marks))
        return (key_position <= query_position) & keep.swapaxes(1, 2)[:, :, None, None]

    def attend(self, operands: Operands, **options: Any) -> jax.Array:
        """Calls `qk_sparse_attention`.

        Args:
            operands: What attends to what.
            **options: As in `Sparsity.attend`.

        Returns:
            `[B, T, N, H]` in the dtype of the query.
        """
        query, key, value, query_marks, key_marks = operands
        assert key_marks is not None
        segment_ids = options.get("query_segment_ids")
        keep = keep_top(key_marks["score"], self._fraction(query_marks), segment_ids=segment_ids)
        output: Any = qk_sparse_attention(query, key, value, jnp.ones((1, 1, 1), bool), keep, **options)
        return output

    def _fraction(self, query_marks: Marks) -> jax.Array | float:
        fraction = query_marks.get("fraction")
        return self.fraction if fraction is None else fraction.ravel()[0]
