"""Kinds whose layers attend by an index: what they mark tokens by, and which of them meet."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from scfa_jax import index, patterns
from scfa_jax.attention import sparse_attention
from scfa_jax.index import SparseIndex
from scfa_jax.layers import token_cache
from scfa_jax.layers.kind import Cache, Heads, Kind, Layout, State

Marks: TypeAlias = dict[str, jax.Array]
"""What decides, beside positions, which queries and keys meet: `[1 or B, 1 or T, heads]` each, by name."""


class Marked(NamedTuple):
    """The marks of both sides."""

    query: Marks
    key: Marks  # the same object where the keys are the queries
    gate: jax.Array | None = None  # float [B, T, K]: multiplies values, for gradients to what marks are made by


class Rows(NamedTuple):
    """The queries and keys of a call, for the functions of `scfa_jax.patterns`."""

    query_length: int  # T
    key_length: int  # S
    num_heads: int  # N
    positions: dict[str, Any]  # offset, segments and implementation

    @property
    def lengths(self) -> tuple[int, int]:
        """`T` and `S`."""
        return self.query_length, self.key_length


class Pattern(Kind):
    """A kind that is defined by its index: which keys each query attends to, given the marks of both."""

    cached_marks: ClassVar[dict[str, np.bool_ | np.number]] = {}
    """The keys' marks that decoding keeps, and what stands for those of keys without."""

    def marks(self, heads: Heads, state: State) -> Marked:
        """Marks queries and keys.

        Args:
            heads: The projections.
            state: What the kind drew or the layer keeps, and its parameters.

        Returns:
            The marks.
        """
        del heads, state
        none: Marks = {}
        return Marked(none, none)

    @abc.abstractmethod
    def index(self, query: Marks, key: Marks, rows: Rows) -> SparseIndex | list[SparseIndex]:
        """Says which keys each query attends to.

        Args:
            query: The marks of queries.
            key: The marks of keys; the same object where the keys are the queries.
            rows: How many there are, and where they stand.

        Returns:
            The index, or several.
        """

    def example_marks(self, length: int) -> Marked:
        """Marks of one batch element and head that are typical of the kind, to count its pairs by."""
        del length
        none: Marks = {}
        return Marked(none, none)

    def pairs(self, length: int, num_heads: int) -> float:
        """Counts the pairs of a query and a key in a sequence, in the mean over heads.

        Args:
            length: Of the sequence.
            num_heads: `N`.

        Returns:
            The number, for typical marks where it depends on what tokens are.
        """
        query, key, _ = self.example_marks(length)
        return float(index.pairs(self.index(query, key, Rows(length, length, num_heads, {}))).mean())

    def attend(self, heads: Heads, state: State, *, segment_ids: jax.Array | None = None, **options: Any) -> jax.Array:
        query, key, gate = self.marks(heads, state)
        return self._attend(
            heads.rotated_query, heads.attended_key, gated(heads.value, gate), query, key, options, segment_ids
        )

    def empty_cache(self, layout: Layout, batch_size: int, max_length: int, dtype: jax.typing.DTypeLike) -> Cache:
        return token_cache.empty(layout, batch_size, max_length, dtype, self.cached_marks)

    def attend_next(self, cache: Cache, heads: Heads, state: State, **options: Any) -> tuple[jax.Array, Cache]:
        query, key, gate = self.marks(heads, state)
        value, marks = gated(heads.value, gate), {name: key[name] for name in self.cached_marks if name in key}
        cache = token_cache.extended(cache, heads.attended_key, value, marks)
        output, cache = self._attend_cached(cache, heads, query, options)
        return token_cache.nan_past_the_end(output, cache), cache

    def row(self, query: Marks, key: Marks, position: jax.Array, key_length: int, num_heads: int) -> jax.Array:
        """Says which keys one query attends to: what decoding a token computes by.

        A kind overrides it where that is faster than an index.

        Args:
            query: The marks of the query.
            key: Those of the cached keys.
            position: int32 `[]`, where the query stands.
            key_length: `S`.
            num_heads: `N`.

        Returns:
            bool `[1 or B, 1 or N, S]`.
        """
        mask = index.mask(self.index(query, key, Rows(1, key_length, num_heads, {"query_offset": position})))[:, :, 0]
        return mask if mask.shape[1] == 1 else jnp.repeat(mask, num_heads // mask.shape[1], axis=1)

    def places(self, position: jax.Array, length: int) -> jax.Array | None:
        """Tells which places of a cache one token can meet, so that decoding need not read the others.

        Args:
            position: int32 `[]`, where the token stands.
            length: Number of places `S`.

        Returns:
            int32, each place at most once; None for all of them.
        """
        del position, length
        return None

    def _attend_cached(
        self, cache: Cache, heads: Heads, query: Marks, options: dict[str, Any]
    ) -> tuple[jax.Array, Cache]:
        """Attends from the last tokens of a cache, which they have joined."""
        rows, length = heads.rotated_query, heads.rotated_query.shape[1]
        key, value, marks, start = token_cache.contents(cache, length)
        if length != 1:
            # Places behind the new tokens are later than they are: causality hides them.
            return self._attend(rows, key, value, query, marks, options, query_offset=start), cache
        mask = self.row(query, marks, start, key.shape[1], rows.shape[2])
        places = self.places(start, key.shape[1])
        return token_cache.attend_from_one(rows, key, value, mask, places, **options), cache

    def _attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        query_marks: Marks,
        key_marks: Marks,
        options: dict[str, Any],
        segment_ids: jax.Array | None = None,
        query_offset: jax.Array | int = 0,
    ) -> jax.Array:
        positions = {
            "query_offset": query_offset,
            "query_segment_ids": segment_ids,
            "implementation": options.get("implementation"),
        }
        made = self.index(query_marks, key_marks, Rows(query.shape[1], key.shape[1], query.shape[2], positions))
        output: Any = sparse_attention(query, key, value, made, **options)
        return output


@dataclasses.dataclass(frozen=True)
class Dense(Pattern):
    """Dense causal attention. Source: Dao 2023, "FlashAttention-2"."""

    def index(self, query: Marks, key: Marks, rows: Rows) -> SparseIndex:
        return patterns.causal_index(*rows.lengths, **rows.positions)


def gated(value: jax.Array, gate: jax.Array | None) -> jax.Array:
    """Values times their gates, if there are any."""
    return value if gate is None else (value.astype(gate.dtype) * gate[..., None]).astype(value.dtype)
