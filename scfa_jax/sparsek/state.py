"""SparseK attention in parts, one after another: what a sequence leaves behind for its next tokens.

It has the same size however many tokens there were, and every shape is static: one compilation serves all steps.
"""

from __future__ import annotations

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp

from scfa_jax import _options
from scfa_jax.backends.ordering import iota
from scfa_jax.index import SparseIndex
from scfa_jax.sparsek.gather import gather_rows
from scfa_jax.sparsek.operator import Selection, attend_to_both, best_so_far, gated


class SparseKState(NamedTuple):
    """The tokens that the next ones may attend to; the fields are named as variables of Flax's modules.

    The `W - 1 + L` local places begin one window before the chunk that the next token is in. Those of positions that
    are not there (yet) have scores of -inf.
    """

    cached_key: jax.Array  # [B, W - 1 + L, K, H]
    cached_value: jax.Array  # [B, W - 1 + L, K, H]
    cached_score: jax.Array  # float32 [B, W - 1 + L, K]
    cached_best_key: jax.Array  # [B, num_keys, K, H], those selected for the chunk, best first
    cached_best_value: jax.Array  # [B, num_keys, K, H]
    cached_best_score: jax.Array  # float32 [B, num_candidates, K], descending
    cache_index: jax.Array  # int32 [], the position of the next token


def empty_state(
    selection: Selection, batch_size: int, num_heads: int, head_dim: int, dtype: jax.typing.DTypeLike
) -> SparseKState:
    """The state before the first token.

    Args:
        selection: Its options.
        batch_size: `B`.
        num_heads: `K`, of keys.
        head_dim: `H`.
        dtype: Of keys and values.

    Returns:
        The state.
    """
    local = (batch_size, selection.window - 1 + selection.chunk_size, num_heads)
    best = (batch_size, selection.num_keys, num_heads)
    return SparseKState(
        cached_key=jnp.zeros((*local, head_dim), dtype),
        cached_value=jnp.zeros((*local, head_dim), dtype),
        cached_score=jnp.full(local, -jnp.inf),
        cached_best_key=jnp.zeros((*best, head_dim), dtype),
        cached_best_value=jnp.zeros((*best, head_dim), dtype),
        cached_best_score=jnp.full((batch_size, selection.num_candidates, num_heads), -jnp.inf),
        cache_index=jnp.zeros((), jnp.int32),
    )


def attend_next(
    state: SparseKState,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scores: jax.Array,
    selection: Selection,
    **options: Unpack[_options.AttentionOptions],
) -> tuple[jax.Array, SparseKState]:
    """Attends from the next tokens, any number of them, to all that `sparsek_attention` over the whole would show them.

    Args:
        state: What the tokens before them left.
        query: `[B, T, N, H]`.
        key: `[B, T, K, H]`.
        value: `[B, T, K, H]`.
        scores: float32 `[B, T, K]`, -inf for what shall not be selected.
        selection: Its options, those of the state.
        **options: How attention is computed, but for `return_residual`.

    Returns:
        `[B, T, N, H]` in the dtype of `query`, and the state after these tokens.
    """
    length, chunk_size, num_keys = query.shape[1], selection.chunk_size, selection.num_keys
    lead = selection.window - 1
    num_chunks = 1 + (chunk_size - 1 + length) // chunk_size  # the first one is under way
    into_chunk, num_missing = _begin(state, selection)

    def extended(local, new, filler):
        """The local places and those of all chunks that follow; chunk `m` begins at place `lead + m * chunk_size`."""
        missing = lead + num_chunks * chunk_size - local.shape[1]
        local = jnp.pad(local, [(0, 0), (0, missing)] + [(0, 0)] * (local.ndim - 2), constant_values=filler)
        return jax.lax.dynamic_update_slice_in_dim(local, new.astype(local.dtype), lead + into_chunk, axis=1)

    local_key, local_value = extended(state.cached_key, key, 0), extended(state.cached_value, value, 0)
    local_score = extended(state.cached_score, scores, -jnp.inf)

    # So chunk `m` may select from places below `m * chunk_size`. The carried candidates come before all of them.
    pool = local_score[:, : (num_chunks - 1) * chunk_size].swapaxes(1, 2)
    carried = state.cached_best_score.swapaxes(1, 2)
    before = carried, jnp.broadcast_to(iota(selection.num_candidates) - selection.num_candidates, carried.shape)
    highest, place = (x.transpose(0, 2, 3, 1) for x in best_so_far(pool, selection, before))  # [B, M, C, K]
    # A candidate that is not among the `num_keys` best will never be: only of those are keys and values kept.
    row = jnp.where(place < 0, place + selection.num_candidates, place + num_keys)[:, :, :num_keys]
    row, is_row = (x.reshape(x.shape[0], -1, x.shape[3]) for x in (row, highest[:, :, :num_keys] > -jnp.inf))
    best_key = gather_rows(jnp.concatenate([state.cached_best_key, local_key], axis=1), row, is_row)
    best_value = gather_rows(jnp.concatenate([state.cached_best_value, local_value], axis=1), row, is_row)

    place_of_query = into_chunk + iota(length)
    chunk = place_of_query // chunk_size
    first = jnp.maximum(chunk * chunk_size, num_missing)[None, None]
    places = iota(local_key.shape[1])[None, None]
    local = SparseIndex(None, places, None, low=first, high=(lead + place_of_query)[None, None])
    far = gated(best_key, best_value, highest, chunk, selection)
    output = attend_to_both(query, (local_key, local_value, local), far, **options)

    last = (into_chunk + length) // chunk_size
    from_chunk = lambda x, size, per_chunk: jax.lax.dynamic_slice_in_dim(x, last * per_chunk, size, axis=1)
    return output, SparseKState(
        cached_key=from_chunk(local_key, lead + chunk_size, chunk_size),
        cached_value=from_chunk(local_value, lead + chunk_size, chunk_size),
        cached_score=from_chunk(local_score, lead + chunk_size, chunk_size),
        cached_best_key=from_chunk(best_key, num_keys, num_keys),
        cached_best_value=from_chunk(best_value, num_keys, num_keys),
        cached_best_score=jax.lax.dynamic_index_in_dim(highest, last, axis=1, keepdims=False),
        cache_index=state.cache_index + length,
    )


def _begin(state: SparseKState, selection: Selection) -> tuple[jax.Array, jax.Array]:
    """How far the next token is into its chunk, and how many local places have positions below 0."""
    into_chunk = state.cache_index % selection.chunk_size
    return into_chunk, jnp.maximum(selection.window - 1 - (state.cache_index - into_chunk), 0)
