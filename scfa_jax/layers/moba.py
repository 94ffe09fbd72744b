"""Attention to the blocks of keys that each query chooses, and to the last ones."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scfa_jax import _checks, patterns
from scfa_jax._selection import Candidates, best_blocks
from scfa_jax.attention import sparse_attention
from scfa_jax.backends.ordering import iota
from scfa_jax.layers import token_cache
from scfa_jax.layers.kind import Cache, Heads, Kind, Layout, State
from scfa_jax.moba import moba_blocks


@dataclasses.dataclass(frozen=True)
class ChosenBlocks(Kind):
    """Attention to blocks of keys that each query chooses, and to the last ones: what such kinds have in common.

    Candidates are the complete blocks before the local ones.

    Args:
        block_size: Keys in a block.
        top_k: Blocks that a token attends to, its own among them: it chooses `top_k - 1`.
        num_local: Last blocks that a token attends to unasked, its own among them. Those before its own come on top of
            `top_k`.

    Raises:
        ValueError: A number is below 1.
        TypeError: A number is no static integer.
    """

    block_size: int
    top_k: int
    num_local: int = 1

    def __post_init__(self):
        for name in ("block_size", "top_k", "num_local"):
            _checks.static_int(name, getattr(self, name), least=1)

    @abc.abstractmethod
    def blocks(self, heads: Heads, state: State, *, segment_ids: jax.Array | None = None, **options: Any) -> jax.Array:
        """Chooses blocks for all tokens of a sequence.

        Args:
            heads: The projections.
            state: As in `attend`.
            segment_ids: As in `attend`.
            **options: As in `attend`.

        Returns:
            int32 `[1 or B, T, N or K, top_k - 1]`, what `scfa_jax.block_index` takes.
        """

    def pairs(self, length: int, num_heads: int) -> float:
        """Counts the pairs of a query and a key in a sequence: all queries choose as many blocks as they can."""
        place = np.arange(length)
        candidates = np.maximum(place // self.block_size + 1 - self.num_local, 0)
        local = place + 1 - candidates * self.block_size
        return float(np.sum(local + np.minimum(candidates, self.top_k - 1) * self.block_size))

    def attend(self, heads: Heads, state: State, *, segment_ids: jax.Array | None = None, **options: Any) -> jax.Array:
        blocks = self.blocks(heads, state, segment_ids=segment_ids, **options)
        rows = heads.rotated_query, heads.attended_key, heads.value
        return self._attend(*rows, blocks, options, query_segment_ids=segment_ids)

    def _attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, blocks: jax.Array, options: Any, **positions: Any
    ) -> jax.Array:
        lengths: dict[str, Any] = {"query_length": query.shape[1], "key_length": key.shape[1]}
        positions["implementation"] = options.get("implementation")
        index = patterns.block_index(blocks, self.block_size, num_local=self.num_local, **lengths, **positions)
        output: Any = sparse_attention(query, key, value, index, **options)
        return output


@dataclasses.dataclass(frozen=True)
class MoBA(ChosenBlocks):
    """Attention to the own block, and to the earlier blocks whose mean key has the largest product with the query.

    Source: Lu et al. 2025, "MoBA: Mixture of Block Attention for Long-Context LLMs".

    In decoding the cache holds the sum of the keys of each block beside the keys. A single token reads these sums, and
    of the keys and values those in its blocks.

    Args:
        block_size: Keys in a block.
        top_k: Blocks that a token attends to, its own among them: it chooses `top_k - 1`.
        num_local: Last blocks that a token attends to unasked, its own among them. Those before its own come on top of
            `top_k`.
        share_in_group: Whether the query heads that read a key head choose together, by the sum of their scores.
        before_rotary: Whether to choose by queries and keys before they are rotated and normalised, in modules with
            `rotary`: the choice then depends on what a token is and not on where it stands.

    Raises:
        ValueError: A number is below 1.
        TypeError: A number is no static integer.
    """

    share_in_group: bool = False
    before_rotary: bool = False

    def blocks(self, heads: Heads, state: State, *, segment_ids: jax.Array | None = None, **options: Any) -> jax.Array:
        return moba_blocks(
            *self._scored(heads),
            **{name: getattr(self, name) for name in ("block_size", "top_k", "num_local", "share_in_group")},
            query_segment_ids=segment_ids,
            implementation=options.get("implementation"),
        )

    def empty_cache(self, layout: Layout, batch_size: int, max_length: int, dtype: jax.typing.DTypeLike) -> Cache:
        cache = token_cache.empty(layout, batch_size, max_length, dtype, {})
        num_blocks = -(-max_length // self.block_size)
        shape = (batch_size, num_blocks, layout.num_key_value_heads, layout.head_dim)
        return {**cache, "cached_block_sum": jnp.zeros(shape, jnp.float32)}

    def attend_next(self, cache: Cache, heads: Heads, state: State, **options: Any) -> tuple[jax.Array, Cache]:
        start, rows = cache["cache_index"], heads.rotated_query
        query, key = self._scored(heads)
        cache = token_cache.extended(cache, heads.attended_key, heads.value, {})
        sums = _added(cache["cached_block_sum"], key, start, self.block_size)
        own = (start + iota(rows.shape[1])) // self.block_size
        one_segment = (jnp.zeros((1, length), jnp.int32) for length in (rows.shape[1], sums.shape[1]))
        blocks = best_blocks(
            query,
            sums / self.block_size,
            Candidates((own - self.num_local)[None], *one_segment),
            min(self.top_k - 1, sums.shape[1]),
            share_in_group=self.share_in_group,
            implementation=options.get("implementation"),
        )
        cached = cache["cached_key"], cache["cached_value"]
        if rows.shape[1] != 1:
            # Places behind the new tokens are later than they are: causality hides them.
            output = self._attend(rows, *cached, blocks, options, query_offset=start)
        else:
            chosen, local = blocks[:, 0], own - iota(min(self.num_local, sums.shape[1]))
            slots = jnp.concatenate([chosen, jnp.broadcast_to(local, (*chosen.shape[:2], local.size))], axis=2)
            output = _attend_from_one(rows, *cached, slots, start, self.block_size, **options)
        return token_cache.nan_past_the_end(output, cache), {**cache, "cached_block_sum": sums}

    def _scored(self, heads: Heads) -> tuple[jax.Array, jax.Array]:
        """The queries and keys that choose, of one dtype."""
        if self.before_rotary:
            return heads.query, heads.key.astype(heads.query.dtype)
        return heads.rotated_query, heads.attended_key


def _added(sums: jax.Array, key: jax.Array, start: jax.Array, block_size: int) -> jax.Array:
    """The sums of blocks `[B, M, K, H]` with new keys `[B, T, K, H]`, which stand from `start` on."""
    batch, length, *head = key.shape
    touched = -(-(max(length, 1) + block_size - 1) // block_size)  # at the most, wherever they start
    rows = jnp.zeros((batch, touched * block_size, *head), jnp.float32)
    rows = jax.lax.dynamic_update_slice_in_dim(rows, key.astype(jnp.float32), start % block_size, axis=1)
    added = rows.reshape(batch, touched, block_size, *head).sum(axis=2)
    padded = jnp.pad(sums, ((0, 0), (0, touched - 1), (0, 0), (0, 0)))
    first = start // block_size
    added = added + jax.lax.dynamic_slice_in_dim(padded, first, touched, axis=1)
    return jax.lax.dynamic_update_slice_in_dim(padded, added, first, axis=1)[:, : sums.shape[1]]


def _attend_from_one(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    blocks: jax.Array,
    position: jax.Array,
    block_size: int,
    **options: Any,
) -> jax.Array:
    """Attends from one query a head to its blocks, and reads no more of a cache.

    Args:
        query: `[B, 1, N, H]`.
        key: `[B, S, K, H]`.
        value: `[B, S, K, H]`.
        blocks: int32 `[B, N or K, slots]`, each block at most once; below 0 for none.
        position: int32 `[]`, where the query stands.
        block_size: Keys in a block.
        **options: As in `token_cache.attend_from_one`.

    Returns:
        `[B, 1, N, H]` in the dtype of `query`.
    """
    batch, choosers, _ = blocks.shape
    place = (blocks[..., None] * block_size + iota(block_size)[None, None, None]).reshape(batch, choosers, -1)
    mask = jnp.repeat((place >= 0) & (place <= position), query.shape[2] // choosers, axis=1)
    place = jnp.clip(place, 0, key.shape[1] - 1).swapaxes(1, 2)
    head = iota(choosers)[None, None] // (choosers // key.shape[2])
    read = lambda x: x[iota(batch)[:, None, None], place, head]
    return token_cache.attend_from_one(query, read(key), read(value), mask, **options)
