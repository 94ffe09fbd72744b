"""Choosing blocks of keys by score, with nothing in memory that has a number for every query and block."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scfa_jax import _partitioning, backends, remat
from scfa_jax.backends import Implementation
from scfa_jax.backends.ordering import iota, on_cuda

_SCORES_AT_ONCE = 1 << 22


class Candidates(NamedTuple):
    """Which blocks each query may choose: those up to its last one that are of its segment."""

    last: jax.Array  # int32 [B or 1, T], the number of a block; -1 for none
    query_segment: jax.Array  # int32 [B or 1, T]
    block_segment: jax.Array  # int32 [B or 1, M]


def best_blocks(
    query: jax.Array,
    block_key: jax.Array,
    candidates: Candidates,
    k: int,
    *,
    share_in_group: bool,
    implementation: Implementation,
) -> jax.Array:
    """The `k` blocks of each query with the highest `query . block_key`, of equal ones the earlier.

    Args:
        query: float `[B, T, N, H]`.
        block_key: float32 `[B, M, K, H]`, what stands for each block. A block whose score is NaN is not chosen.
        candidates: Which blocks a query may choose.
        k: How many at the most.
        share_in_group: Whether the query heads of a key head choose together, by the sum of their scores.
        implementation: Of attention: whether a kernel may choose.

    Returns:
        int32 `[B, T, N, k]`, or `[B, T, K, k]` if shared, in any order; -1 where there are fewer.
    """
    (batch, length, heads, _), (_, num_blocks, key_heads, _) = query.shape, block_key.shape
    if k == 0 or num_blocks == 0 or query.size == 0:
        return jnp.full((batch, length, key_heads if share_in_group else heads, k), -1, jnp.int32)

    def choose(*operands):
        backend = backends.for_small_kernels(implementation)
        kernel = backend.block_chooser(query.shape[3], k, "score") if backend else None
        with_options = functools.partial(functools.partial, k=k, share_in_group=share_in_group)
        return (on_cuda(kernel and with_options(kernel), with_options(plain_best_blocks), *operands),)

    split = _partitioning.split(choose, ["b.h.", "b.h.", "b.", "b.", "b."], ["b.h."])
    return remat.named_index(split(query, block_key, *candidates))[0]


def plain_best_blocks(
    query: jax.Array,
    block_key: jax.Array,
    last: jax.Array,
    query_segment: jax.Array,
    block_segment: jax.Array,
    *,
    k: int,
    share_in_group: bool,
) -> jax.Array:
    """As `best_blocks`, in plain JAX: a chunk of queries after the other."""
    (batch, _, heads, head_dim), (_, num_blocks, key_heads, _) = query.shape, block_key.shape

    def choose(query, last, query_segment):
        grouped = query.astype(jnp.float32).reshape(batch, -1, key_heads, heads // key_heads, head_dim)
        exact = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
        scores = jnp.einsum("bckgh,bmkh->bckgm", grouped, block_key, **exact)
        scores = scores.sum(axis=3) if share_in_group else scores.reshape(batch, -1, heads, num_blocks)
        may = iota(num_blocks)[None, None] <= last[..., None]
        may = may & (query_segment[..., None] == block_segment[:, None, :])
        scores = jnp.where(may[:, :, None, :] & (scores > -jnp.inf), scores, -jnp.inf)
        best, chosen = jax.lax.top_k(scores, min(k, num_blocks))
        return jnp.where(best > -jnp.inf, chosen.astype(jnp.int32), -1)

    return _in_chunks(choose, (query, last, query_segment), batch * heads * num_blocks, k)


class Compressed(NamedTuple):
    """Which compressed keys each query sees, and which blocks it may choose."""

    last: jax.Array  # int32 [B or 1, T], the number of the last compressed key
    query_segment: jax.Array  # int32 [B or 1, T]
    key_segment: jax.Array  # int32 [B or 1, M]
    last_block: jax.Array  # int32 [B or 1, T]


class Overlap(NamedTuple):
    """How compressed keys and blocks overlap, in strides of compression."""

    of_key: int  # strides that one compressed key stands for
    of_block: int  # strides in a block

    def weights(self) -> np.ndarray:
        """Of the compressed keys from `of_block * i - of_key + 1` on: the strides that each shares with block `i`."""
        return np.convolve(np.ones(self.of_key), np.ones(self.of_block)).astype(np.float32)


def most_important_blocks(
    query: jax.Array,
    compressed_key: jax.Array,
    logsumexp: jax.Array,
    compressed: Compressed,
    overlap: Overlap,
    *,
    first: int,
    num_blocks: int,
    k: int,
    scale: float,
    implementation: Implementation,
) -> jax.Array:
    """The `k` blocks of each query to which it gives the most weight through compressed keys.

    Args:
        query: float `[B, T, N, H]`.
        compressed_key: float `[B, M, K, H]`.
        logsumexp: float32 `[B, T, N]`, `-inf` where a query sees no compressed key.
        compressed: What each query sees and may choose.
        overlap: Of compressed keys and blocks.
        first: The first block that may be chosen.
        num_blocks: How many there are.
        k: How many to choose at the most.
        scale: Factor of products.
        implementation: Of attention: whether a kernel may choose.

    Returns:
        int32 `[B, T, K, k]`, in any order; -1 where there are fewer with any weight.
    """
    (batch, length, _, _), key_heads = query.shape, compressed_key.shape[2]
    if k == 0 or compressed_key.shape[1] == 0 or query.size == 0:
        return jnp.full((batch, length, key_heads, k), -1, jnp.int32)

    def choose(*operands):
        backend = backends.for_small_kernels(implementation)
        kernel = backend.block_chooser(query.shape[3], k, "importance") if backend else None
        with_options = functools.partial(
            functools.partial, overlap=overlap, first=first, num_blocks=num_blocks, k=k, scale=scale
        )
        return (on_cuda(kernel and with_options(kernel), with_options(plain_most_important_blocks), *operands),)

    split = _partitioning.split(choose, ["b.h.", "b.h.", "b.h", "b.", "b.", "b.", "b."], ["b.h."])
    return remat.named_index(split(query, compressed_key, logsumexp, *compressed))[0]


def plain_most_important_blocks(
    query: jax.Array,
    compressed_key: jax.Array,
    logsumexp: jax.Array,
    last: jax.Array,
    query_segment: jax.Array,
    key_segment: jax.Array,
    last_block: jax.Array,
    *,
    overlap: Overlap,
    first: int,
    num_blocks: int,
    k: int,
    scale: float,
) -> jax.Array:
    """As `most_important_blocks`, in plain JAX: a chunk of queries after the other."""
    (batch, _, heads, head_dim), (_, count, key_heads, _) = query.shape, compressed_key.shape
    weights, number = overlap.weights(), iota(count)[None, None]
    # Padded so that block `i` begins at `of_block * i` and has all of its neighbours.
    before = overlap.of_key - 1
    padded = overlap.of_block * num_blocks + before
    exact = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}

    def choose(query, logsumexp, last, query_segment, last_block):
        rows = query.shape[1]
        grouped = query.reshape(batch, rows, key_heads, heads // key_heads, head_dim)
        scores = scale * jnp.einsum("bckgh,bmkh->bckgm", grouped, compressed_key, **exact)
        may = (number <= last[..., None]) & (query_segment[..., None] == key_segment[:, None, :])
        peak = jnp.where(logsumexp == -jnp.inf, 0.0, logsumexp).reshape(*grouped.shape[:4], 1)
        given = jnp.where(may[:, :, None, None], jnp.exp(scores - peak), 0.0).sum(axis=3)
        given = given[..., : padded - before]
        given = jnp.pad(given, ((0, 0), (0, 0), (0, 0), (before, padded - before - given.shape[3])))
        importance = sum(
            weight * given[..., i : i + overlap.of_block * (num_blocks - 1) + 1 : overlap.of_block]
            for i, weight in enumerate(weights)
        )
        blocks = iota(num_blocks)[None, None]
        may_choose = (blocks >= first) & (blocks <= last_block[..., None])
        importance = jnp.where(may_choose[:, :, None] & (importance > 0), importance, -jnp.inf)
        best, chosen = jax.lax.top_k(importance, min(k, num_blocks))
        return jnp.where(best > -jnp.inf, chosen.astype(jnp.int32), -1)

    return _in_chunks(choose, (query, logsumexp, last, query_segment, last_block), batch * heads * count, k)


def _in_chunks(choose: Callable[..., jax.Array], rows: tuple[jax.Array, ...], scores_of_row: int, k: int) -> jax.Array:
    """Chooses for a chunk of rows `[B or 1, T, ...]` after the other: int32 `[B, T, heads, k]`, filled up with -1."""
    length = rows[0].shape[1]
    chunk = min(max(16, _SCORES_AT_ONCE // max(scores_of_row, 1)), length)

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, -length % chunk), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    chosen = jax.lax.map(lambda inputs: choose(*inputs), tuple(cut(x) for x in rows))
    chosen = chosen.swapaxes(0, 1)
    chosen = chosen.reshape(chosen.shape[0], -1, *chosen.shape[3:])[:, :length]
    return jnp.pad(chosen, ((0, 0), (0, 0), (0, 0), (0, k - chosen.shape[3])), constant_values=-1)
