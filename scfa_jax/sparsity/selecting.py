"""What the kinds share that attend to a window and to selected keys before it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from scfa_jax import sparsek_state
from scfa_jax.sparsek import Selection, sparsek_attention
from scfa_jax.sparsek_state import SparseKState
from scfa_jax.sparsity.base import Implementation, Layout, Marks, Operands, Sparsity


class Selecting(Sparsity):
    """Attention to a window and to the highest-scored keys before it: see `scfa_jax.sparsek_attention`.

    A kind says how many keys (`selection`) and what scores them (`scores`, and `next_scores` in decoding). In decoding,
    window and candidates are all that is kept, however long the sequence gets.
    """

    caches_every_token = False

    def __post_init__(self):
        self.selection()

    def selection(self) -> Selection:
        """Tells what is selected.

        Returns:
            The options, checked.
        """
        raise NotImplementedError

    def scores(self, operands: Operands, **options: Any) -> jax.Array:
        """Scores keys.

        Args:
            operands: What attends to what.
            **options: As `scfa_jax.sparsek_attention` takes them.

        Returns:
            float32 `[B, S, K]`.
        """
        raise NotImplementedError

    def next_scores(
        self, state: SparseKState, operands: Operands, implementation: Implementation
    ) -> tuple[SparseKState, jax.Array]:
        """Scores the tokens after those of a state.

        Args:
            state: What the tokens before them left.
            operands: Those of the next tokens.
            implementation: As `scfa_jax.sparse_attention` takes it.

        Returns:
            The state, and float32 `[B, T, K]`.
        """
        raise NotImplementedError

    def mask(
        self, query_marks: Marks, key_marks: Marks, query_position: jax.Array, key_position: jax.Array
    ) -> jax.Array:
        """Raises: the selection of a chunk and its gates are no mask.

        Args:
            query_marks: As in `Sparsity.mask`.
            key_marks: Likewise.
            query_position: Likewise.
            key_position: Likewise.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(f"{self!r} has no mask: see reference.sparsek_attention and attention_received.")

    def attend(self, operands: Operands, **options: Any) -> jax.Array:
        """Calls `sparsek_attention`.

        Args:
            operands: What attends to what.
            **options: As in `Sparsity.attend`.

        Returns:
            `[B, T, N, H]` in the dtype of the query.
        """
        query, key, value = operands[:3]
        options["segment_ids"] = options.pop("query_segment_ids", None)
        scores = self.scores(operands, **options)
        output: Any = sparsek_attention(query, key, value, scores, **dataclasses.asdict(self.selection()), **options)
        return output

    def empty_cache(self, layout: Layout, batch_size: int, dtype: jax.typing.DTypeLike) -> dict[str, jax.Array]:
        """Makes a `SparseKState` without tokens; arguments and result as in `Sparsity.empty_cache`."""
        heads, head_dim = layout.num_key_value_heads, layout.head_dim
        return sparsek_state.empty_state(self.selection(), batch_size, heads, head_dim, dtype)._asdict()

    def attend_next(
        self, cache: dict[str, jax.Array], operands: Operands, *, implementation: Implementation
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Attends from the tokens after those of a `SparseKState`; all as in `Sparsity.attend_next`."""
        state, scores = self.next_scores(SparseKState(**cache), operands, implementation)
        output, state = sparsek_state.attend_next(
            state, *operands[:3], scores, self.selection(), implementation=implementation
        )
        return output, state._asdict()
