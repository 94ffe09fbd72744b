"""Choosing blocks of keys by score, with nothing in memory that has a number for every query and block."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

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
        kernel = backend.block_chooser(query.shape[3], k) if backend else None
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
    (batch, length, heads, head_dim), (_, num_blocks, key_heads, _) = query.shape, block_key.shape
    chunk = max(16, _SCORES_AT_ONCE // (batch * heads * num_blocks))
    chunk = min(chunk, length)
    cut = lambda x: jnp.pad(x, ((0, 0), (0, -length % chunk), *((0, 0),) * (x.ndim - 2)))
    cut_all = lambda x: cut(x).reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    def choose(inputs):
        query, last, query_segment = inputs
        grouped = query.astype(jnp.float32).reshape(batch, chunk, key_heads, heads // key_heads, head_dim)
        exact = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
        scores = jnp.einsum("bckgh,bmkh->bckgm", grouped, block_key, **exact)
        scores = scores.sum(axis=3) if share_in_group else scores.reshape(batch, chunk, heads, num_blocks)
        may = iota(num_blocks) <= last[..., None]
        may = may & (query_segment[..., None] == block_segment[:, None, :])
        scores = jnp.where(may[:, :, None, :] & (scores > -jnp.inf), scores, -jnp.inf)
        best, chosen = jax.lax.top_k(scores, min(k, num_blocks))
        return jnp.where(best > -jnp.inf, chosen.astype(jnp.int32), -1)

    chosen = jax.lax.map(choose, tuple(cut_all(x) for x in (query, last, query_segment)))
    chosen = chosen.swapaxes(0, 1).reshape(batch, -1, *chosen.shape[3:])[:, :length]
    return jnp.pad(chosen, ((0, 0), (0, 0), (0, 0), (0, k - chosen.shape[3])), constant_values=-1)
