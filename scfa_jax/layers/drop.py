"""Attention among random subsets of queries and keys."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from scfa_jax import _checks, patterns
from scfa_jax.index import SparseIndex
from scfa_jax.layers.kind import Heads, Layout, State
from scfa_jax.layers.pattern import Marked, Marks, Pattern, Rows


@dataclasses.dataclass(frozen=True)
class Drop(Pattern):
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
        if not 0 <= _checks.static_number("rate", self.rate) < 1:
            raise ValueError(f"rate must be at least 0 and below 1, got {self.rate}.")

    @property
    def drawn(self) -> tuple[str, ...]:
        return ("query_keep", "key_keep")

    def draws(self, deterministic: bool) -> bool:
        return self.drop_at_evaluation or not deterministic

    def draw(self, key: jax.Array, batch_size: int, length: int, layout: Layout) -> State:
        heads = {"query_keep": layout.num_heads, "key_keep": layout.num_key_value_heads}
        return {
            name: jax.random.bernoulli(one_key, 1 - self.rate, (batch_size, length, count))
            for one_key, (name, count) in zip(jax.random.split(key), heads.items(), strict=True)
        }

    def marks(self, heads: Heads, state: State) -> Marked:
        """Marks what is kept; without a draw everything is."""
        given = [name for name in self.drawn if name in state]
        if len(given) == 1:
            missing = next(name for name in self.drawn if name not in state)
            raise ValueError(f"query_keep and key_keep must be given together, got {missing}=None.")
        if not given:
            return super().marks(heads, state)
        return Marked({"keep": state["query_keep"]}, {"keep": state["key_keep"]})

    def index(self, query: Marks, key: Marks, rows: Rows) -> SparseIndex:
        if not query and not key:
            return patterns.causal_index(*rows.lengths, **rows.positions)
        everything = jnp.ones((1, 1, 1), bool)
        query_keep, key_keep = query.get("keep", everything), key.get("keep", everything)
        return patterns.keep_index(
            query_keep, key_keep, query_length=rows.query_length, key_length=rows.key_length, **rows.positions
        )

    def example_marks(self, length: int) -> Marked:
        """One draw of training."""
        query, key = jax.random.bernoulli(jax.random.key(0), 1 - self.rate, (2, 1, length, 1))
        return Marked({"keep": query}, {"keep": key})
