"""Attention to a window, and to the earlier keys that received the most attention."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from scfa_jax import sparsek_state
from scfa_jax.received import attention_received
from scfa_jax.sparsek import Selection
from scfa_jax.sparsek_state import SparseKState
from scfa_jax.sparsity.base import Implementation, Operands
from scfa_jax.sparsity.selecting import Selecting


@dataclasses.dataclass(frozen=True)
class HeavyHitters(Selecting):
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

    def selection(self) -> Selection:
        """As many candidates as keys, so that all gates are 1; as in `Selecting.selection`."""
        return Selection.of(self.num_keys, self.window, self.chunk_size, self.num_keys)

    def scores(self, operands: Operands, **options: Any) -> jax.Array:
        """Calls `attention_received`; all as in `Selecting.scores`."""
        query, key = operands[:2]
        return attention_received(query, key, window=self.window, **options)

    def next_scores(
        self, state: SparseKState, operands: Operands, implementation: Implementation
    ) -> tuple[SparseKState, jax.Array]:
        """Adds what the next tokens give to what keys received so far; all as in `Selecting.next_scores`."""
        query, key = operands[:2]
        return sparsek_state.receive_next(state, query, key, self.selection(), implementation=implementation)
