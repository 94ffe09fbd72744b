"""Attention to a window, and to the earlier keys that a learned score selects."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from scfa_jax import _checks
from scfa_jax.layers import token_cache
from scfa_jax.layers.kind import Cache, Heads, Kind, Layout, Parameter, State
from scfa_jax.sparsek import state as sparsek_state
from scfa_jax.sparsek.operator import Selection, pairs, sparsek_attention


@dataclasses.dataclass(frozen=True)
class SparseK(Kind):
    """Attention to a window and to the highest-scored keys before it: SparseK attention.

    Source: Lou et al. 2024, "Sparser is Faster and Less is More: Efficient Sparse Attention for Long-Range
    Transformers".

    The score of a token is a linear map of what the layer reads, one for each key head; it has no bias, to which gates
    would not respond. In decoding, window and candidates are all that is kept, however long the sequence gets.

    Args:
        num_keys: Keys to select.
        window: Keys of the window, the token's own among them: at least 1.
        chunk_size: Queries that share a selection.
        num_candidates: Scores that the gates come from, at least `num_keys`; twice as many if None.
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
        self.selection()
        _checks.static_number("slope", self.slope)

    def selection(self) -> Selection:
        """The options of the operator, checked."""
        return Selection.of(self.num_keys, self.window, self.chunk_size, self.num_candidates)

    def parameters(self, layout: Layout) -> dict[str, Parameter]:
        shape = (layout.in_features, layout.num_key_value_heads)
        return {"score_kernel": Parameter(jax.nn.initializers.lecun_normal(), shape)}

    def scores(self, heads: Heads, state: State, start: jax.Array | int = 0) -> jax.Array:
        """Scores tokens, in float32 whatever the layer computes in.

        Args:
            heads: The projections.
            state: Holds `score_kernel`, float `[E, K]`.
            start: The place of the first token, an int or int32 `[]`.

        Returns:
            float32 `[B, T, K]`.

        Raises:
            ValueError: There are no tokens, or `score_kernel` has another shape.
        """
        tokens, score_kernel, expected = heads.tokens, state.get("score_kernel"), heads.key.shape[2]
        if tokens is None:
            raise ValueError(f"tokens must be given for {self!r}, which scores them.")
        if score_kernel is None or score_kernel.shape != (tokens.shape[2], expected):
            got = None if score_kernel is None else score_kernel.shape
            raise ValueError(f"score_kernel must be [E, K] = {(tokens.shape[2], expected)}, got {got}.")
        wide = (x.astype(jnp.float32) for x in (tokens, score_kernel))
        scores = jnp.einsum("bte,ek->btk", *wide, precision=jax.lax.Precision.HIGHEST)
        place = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        return scores + self.slope * place[None, :, None].astype(jnp.float32)

    def pairs(self, length: int, num_heads: int) -> float:
        """Counts the pairs of a query and a key in a sequence, in the mean over heads.

        Args:
            length: Of the sequence.
            num_heads: `N`.

        Returns:
            The number.
        """
        del num_heads
        return pairs(length, self.selection())

    def attend(self, heads: Heads, state: State, *, segment_ids: jax.Array | None = None, **options: Any) -> jax.Array:
        query, key, value = heads.rotated_query, heads.attended_key, heads.value
        output: Any = sparsek_attention(
            query,
            key,
            value,
            self.scores(heads, state),
            query_segment_ids=segment_ids,
            **dataclasses.asdict(self.selection()),
            **options,
        )
        return output

    def empty_cache(self, layout: Layout, batch_size: int, max_length: int, dtype: jax.typing.DTypeLike) -> Cache:
        shape = (batch_size, layout.num_key_value_heads, layout.head_dim)
        return sparsek_state.empty_state(self.selection(), *shape, dtype)._asdict()

    def attend_next(self, cache: Cache, heads: Heads, state: State, **options: Any) -> tuple[jax.Array, Cache]:
        token_cache.check(cache, heads.attended_key, has_places=False)
        before = sparsek_state.SparseKState(**cache)
        scores = self.scores(heads, state, before.cache_index)
        rows = (heads.rotated_query, heads.attended_key, heads.value, scores)
        output, after = sparsek_state.attend_next(before, *rows, self.selection(), **options)
        return output, after._asdict()
