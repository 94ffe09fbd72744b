"""Choosing the best blocks of each query as a Pallas kernel for Triton.

A program walks over the blocks that a tile of queries may choose and keeps the best of them, so that no score is ever
written to memory.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from scfa_jax._bounds import next_power_of_two, num_tiles
from scfa_jax.backends import tile
from scfa_jax.backends.triton import _compat
from scfa_jax.backends.triton.rows import Rows, batch_spec, padded_head_spec, shared_entry

_ROWS = 64
_MANY = np.int32(2**31 - 1)


def best_blocks(
    query: jax.Array,
    block_key: jax.Array,
    last: jax.Array,
    query_segment: jax.Array,
    block_segment: jax.Array,
    *,
    k: int,
    share_in_group: bool,
    interpret: bool,
) -> jax.Array:
    """Does what `_selection.plain_best_blocks` does."""
    (batch, length, heads, head_dim), (_, num_blocks, key_heads, _) = query.shape, block_key.shape
    out_heads = key_heads if share_in_group else heads
    out = jax.ShapeDtypeStruct((batch, length, out_heads, k), jnp.int32)
    vectors = (last, query_segment, block_segment)
    block = min(_ROWS, max(16, next_power_of_two(num_blocks)))
    return _compat.triton_call(
        functools.partial(_kernel, head_dim=head_dim, k=k, block=block, in_triton=not interpret),
        num_warps=4,
        num_stages=2,
        interpret=interpret,
        grid=(num_tiles(length, _ROWS), out_heads, batch),
        in_specs=[
            *(batch_spec(x.shape, batch, 2) for x in vectors),
            *(padded_head_spec(x.shape, 2) for x in (query, block_key)),
        ],
        out_specs=padded_head_spec(out.shape, 2),
        out_shape=out,
        name="scfa_best_blocks",
    )(*vectors, query, block_key)


def _kernel(
    last_ref,
    query_segment_ref,
    block_segment_ref,
    query_ref,
    block_key_ref,
    chosen_ref,
    *,
    head_dim: int,
    k: int,
    block: int,
    in_triton: bool,
):
    query_tile, head = pl.num_programs(0) - 1 - pl.program_id(0), pl.program_id(1)
    (length, heads, _), (num_blocks, key_heads, _) = query_ref.shape, block_key_ref.shape
    _, out_heads, width = chosen_ref.shape
    group = heads // out_heads
    key_head = shared_entry(head, out_heads, key_heads)
    rows = Rows(query_tile, _ROWS, length, None, None)
    last, query_segment = (_load(ref, rows.original, rows.valid, -1) for ref in (last_ref, query_segment_ref))
    dot = tile.dot_for(jnp.float32, "float32", in_triton=in_triton)
    places = jnp.arange(width, dtype=jnp.int32)[None, :]
    columns = jnp.arange(block, dtype=jnp.int32)

    def visit(i, best):
        numbers = i * block + columns
        is_block = numbers < num_blocks
        blocks = Rows(i, block, num_blocks, None, None)
        block_key = blocks.load(block_key_ref, key_head, head_dim)

        def add_head(g, scores):
            query = rows.load(query_ref, head * np.int32(group) + g, head_dim).astype(jnp.float32)
            return scores + dot(query, block_key.T)

        scores = jnp.zeros((_ROWS, block), jnp.float32)
        scores = add_head(np.int32(0), scores) if group == 1 else jax.lax.fori_loop(0, group, add_head, scores)
        block_segment = _load(block_segment_ref, jnp.minimum(numbers, num_blocks - 1), is_block, -3)
        may = (numbers[None, :] <= last[:, None]) & (query_segment[:, None] == block_segment[None, :])
        scores = jnp.where(may & (scores > -jnp.inf), scores, -jnp.inf)

        def take_best(_, carry):
            scores, kept, chosen = carry
            # The best of these blocks takes the place of the worst that was kept, unless that is as good.
            peak = jnp.max(scores, axis=1)[:, None]
            number = jnp.min(jnp.where(scores == peak, numbers[None, :], _MANY), axis=1)[:, None]
            worst = jnp.min(kept, axis=1)[:, None]
            rank = jnp.where(kept == worst, chosen * np.int32(width) + places, -_MANY)
            replace = (peak > worst) & (rank == jnp.max(rank, axis=1)[:, None])
            kept, chosen = jnp.where(replace, peak, kept), jnp.where(replace, number, chosen)
            return jnp.where(numbers[None, :] == number, -jnp.inf, scores), kept, chosen

        _, kept, chosen = jax.lax.fori_loop(0, min(k, block), take_best, (scores, *best))
        return kept, chosen

    # The places up to a power of two count as taken.
    kept = jnp.broadcast_to(jnp.where(places < k, -jnp.inf, jnp.inf), (_ROWS, width)).astype(jnp.float32)
    chosen = jnp.full((_ROWS, width), -1, jnp.int32)
    stop = jnp.minimum(jax.lax.div(jnp.max(last, axis=0) + block, np.int32(block)), num_tiles(num_blocks, block))
    _, chosen = jax.lax.fori_loop(0, stop, visit, (kept, chosen))
    rows.store(chosen_ref, head, k, chosen)


def _load(ref, at: jax.Array, where: jax.Array | None, other: int) -> jax.Array:
    return plgpu.load(ref.at[at]) if where is None else plgpu.load(ref.at[at], mask=where, other=other)
