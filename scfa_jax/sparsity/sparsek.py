"""Attention to a window, and to the earlier keys that a learned score selects."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scfa_jax.sparsek import Selection
from scfa_jax.sparsek_state import SparseKState
from scfa_jax.sparsity.base import Implementation, Layout, Marks, Operands, Projections
from scfa_jax.sparsity.selecting import Selecting


@dataclasses.dataclass(frozen=True)
class SparseK(Selecting):
    """Attention to a window and to the highest-scored keys before it: SparseK attention.

    Source: Lou et al. 2024, "Sparser is Faster and Less is More: Efficient Sparse Attention for Long-Range
    Transformers".

    The score of a token is a linear map of what the layer reads, one for each key head; it has no bias, to which gates
    would not respond. In decoding, window and candidates are all that is kept, however long the sequence gets.

    Args:
        num_keys: As in `scfa_jax.sparsek_attention`, like the next three.
        window: Keys of the window.
        chunk_size: Queries that share a selection.
        num_candidates: Scores that the gates come from.
        slope: What each position adds to the scores, so that of two tokens that score alike the later is selected.

    Raises:
        ValueError: A number is too small, or `slope` is not finite.
        TypeError: A number is not static.
    """

    num_keys: int
    window: int
    chunk_size: int = 128
    num_candidates: int | None = None
    slope: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.slope, bool) or not isinstance(self.slope, int | float | np.number):
            raise TypeError(f"slope must be a static number, got {self.slope!r}.")
        if not math.isfinite(self.slope):
            raise ValueError(f"slope must be finite, got {self.slope}.")

    def parameters(self, layout: Layout) -> dict[str, tuple[Callable[..., jax.Array], tuple[int, ...]]]:
        """Tells what scores tokens.

        Args:
            layout: That of the module.

        Returns:
            `score_kernel`, `[E, K]`, with its initialiser.
        """
        return {
            "score_kernel": (jax.nn.initializers.lecun_normal(), (layout.in_features, layout.num_key_value_heads)),
        }

    def marks(self, projections: Projections, score_kernel: jax.Array | None = None) -> tuple[Marks, Marks | None]:
        """Scores tokens, in float32 whatever the layer computes in.

        Args:
            projections: Those of a call.
            score_kernel: float `[E, K]`; needed.

        Returns:
            Nothing for the queries, and the `score` of keys, without the slope.

        Raises:
            ValueError: There are no tokens, or `score_kernel` is missing or has another shape.
        """
        tokens, expected = projections.tokens, projections.key.shape[2]
        if tokens is None:
            raise ValueError(f"tokens must be given for {self!r}, which scores them.")
        if score_kernel is None or score_kernel.shape != (tokens.shape[2], expected):
            got = None if score_kernel is None else score_kernel.shape
            raise ValueError(f"score_kernel must be [E, K] = {(tokens.shape[2], expected)}, got {got}.")
        wide = (x.astype(jnp.float32) for x in (tokens, score_kernel))
        return {}, {"score": jnp.einsum("bte,ek->btk", *wide, precision=jax.lax.Precision.HIGHEST)}

    def selection(self) -> Selection:
        """As in `Selecting.selection`."""
        return Selection.of(self.num_keys, self.window, self.chunk_size, self.num_candidates)

    def scores(self, operands: Operands, **options: Any) -> jax.Array:
        """Those of the marks, with the slope; all as in `Selecting.scores`."""
        del options
        return self._with_slope(operands, 0)

    def next_scores(
        self, state: SparseKState, operands: Operands, implementation: Implementation
    ) -> tuple[SparseKState, jax.Array]:
        """The same, from the state's next position on; all as in `Selecting.next_scores`."""
        del implementation
        return state, self._with_slope(operands, state.cache_index)

    def _with_slope(self, operands: Operands, start: jax.Array | int) -> jax.Array:
        assert operands.key_marks is not None
        score = operands.key_marks["score"]
        return score + self.slope * (start + jnp.arange(score.shape[1]))[:, None].astype(jnp.float32)
