"""Attention to a window, and to the earlier keys that received the most attention."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from scfa_jax import sparsek_state
from scfa_jax.received import attention_received
from scfa_jax.sparsek import Selection, sparsek_attention
from scfa_jax.sparsek_state import SparseKState
from scfa_jax.sparsity.base import Implementation, Layout, Marks, Operands, Sparsity


@dataclasses.dataclass(frozen=True)
class HeavyHitters(Sparsity):
    """Attention to a window and to the keys before it that received the most attention while they were in it.

    Source: Zhang et al. 2023, "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models";
    counted over the window, by `scfa_jax.attention_received`.

    Keys are selected as by `SparseK`, without gates. Nothing is learned, and no gradient flows through the choice. In
    decoding, window and selected keys are all that is kept, however long the sequence gets.

    Args:
        num_keys: As in `scfa_jax.sparsek_attention`, like the next two.
        window: Keys of the window, and of those that receive. With 1 they all receive the same, from themselves.
        chunk_size: Queries that share a selection.

    Raises:
        ValueError: A number is too small.
        TypeError: A number is not static.
    """

    num_keys: int
    window: int
    chunk_size: int = 128

    caches_every_token = False

    def __post_init__(self):
        self._selection()

    def mask(
        self, query_marks: Marks, key_marks: Marks, query_position: jax.Array, key_position: jax.Array
    ) -> jax.Array:
        """Raises: what a key received is no mark of it; the dense definition is in `scfa_jax.reference`.

        Args:
            query_marks: As in `Sparsity.mask`.
            key_marks: Likewise.
            query_position: Likewise.
            key_position: Likewise.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("Heavy hitters depend on other queries: see reference.attention_received.")

    def attend(self, operands: Operands, **options: Any) -> jax.Array:
        """Calls `attention_received`, and `sparsek_attention` on what it says.

        Args:
            operands: What attends to what.
            **options: As in `Sparsity.attend`.

        Returns:
            `[B, T, N, H]` in the dtype of the query.
        """
        query, key, value = operands[:3]
        options["segment_ids"] = options.pop("query_segment_ids", None)
        received = attention_received(query, key, window=self.window, **options)
        output: Any = sparsek_attention(query, key, value, received, **dataclasses.asdict(self._selection()), **options)
        return output

    def empty_cache(self, layout: Layout, batch_size: int, dtype: jax.typing.DTypeLike) -> dict[str, jax.Array]:
        """Makes a `SparseKState` without tokens; arguments and result as in `Sparsity.empty_cache`."""
        heads, head_dim = layout.num_key_value_heads, layout.head_dim
        return sparsek_state.empty_state(self._selection(), batch_size, heads, head_dim, dtype)._asdict()

    def attend_next(
        self, cache: dict[str, jax.Array], operands: Operands, *, implementation: Implementation
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Attends from the tokens after those of a `SparseKState`; all as in `Sparsity.attend_next`.

        The scores in its window are what keys have received so far.
        """
        query, key, value = operands[:3]
        options = self._selection()
        state, received = sparsek_state.receive_next(
            SparseKState(**cache), query, key, options, implementation=implementation
        )
        output, state = sparsek_state.attend_next(
            state, query, key, value, received, options, implementation=implementation
        )
        return output, state._asdict()

    def _selection(self) -> Selection:
        return Selection.of(self.num_keys, self.window, self.chunk_size, self.num_keys)
