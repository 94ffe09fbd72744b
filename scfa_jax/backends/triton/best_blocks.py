"""Choosing the best blocks of each query as a Pallas kernel for Triton.

A program walks over the blocks that a tile of queries may choose and keeps the best of them, so that no score is ever
written to memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from scfa_jax._bounds import next_power_of_two, num_tiles
from scfa_jax.backends import tile
from scfa_jax.backends.triton import _compat
from scfa_jax.backends.triton.rows import Rows, batch_spec, padded_head_spec, shared_entry

if TYPE_CHECKING:
    from scfa_jax._selection import Overlap

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
    (length, heads, _), (num_blocks, key_heads, _) = query_ref.shape, block_key_ref.shape
    head, out_heads = pl.program_id(1), chosen_ref.shape[1]
    group = heads // out_heads
    key_head = shared_entry(head, out_heads, key_heads)
    rows = _rows(length)
    last, query_segment = (_load(ref, rows.original, rows.valid, -1) for ref in (last_ref, query_segment_ref))
    dot = tile.dot_for(jnp.float32, "float32", in_triton=in_triton)

    def scores_of(numbers):
        at = jnp.minimum(numbers, num_blocks - 1)
        block_key = _load_rows(block_key_ref, at, key_head, head_dim)

        def add_head(g, scores):
            query = rows.load(query_ref, head * np.int32(group) + g, head_dim).astype(jnp.float32)
            return scores + dot(query, block_key.T)

        scores = _over_group(group, add_head, jnp.zeros((_ROWS, block), jnp.float32))
        may = query_segment[:, None] == _load(block_segment_ref, at, None, 0)[None, :]
        return jnp.where(may & (numbers < num_blocks)[None, :], scores, -jnp.inf)

    rows.store(chosen_ref, head, k, _best(scores_of, last, num_blocks, k, chosen_ref.shape[2], block))


def most_important_blocks(
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
    interpret: bool,
) -> jax.Array:
    """Does what `_selection.plain_most_important_blocks` does."""
    batch, length, _, head_dim = query.shape
    out = jax.ShapeDtypeStruct((batch, length, compressed_key.shape[2], k), jnp.int32)
    vectors = (last, query_segment, key_segment, last_block)
    logsumexp = jnp.where(logsumexp == -jnp.inf, tile.NO_KEY, logsumexp).swapaxes(1, 2)
    block = min(_ROWS, max(16, next_power_of_two(num_blocks)))
    return _compat.triton_call(
        functools.partial(
            _importance_kernel,
            overlap=overlap,
            first=first,
            num_blocks=num_blocks,
            k=k,
            scale=scale,
            head_dim=head_dim,
            block=block,
            in_triton=not interpret,
        ),
        num_warps=4,
        num_stages=2,
        interpret=interpret,
        grid=(num_tiles(length, _ROWS), out.shape[2], batch),
        in_specs=[
            *(batch_spec(x.shape, batch, 2) for x in (*vectors, logsumexp)),
            *(padded_head_spec(x.shape, 2) for x in (query, compressed_key)),
        ],
        out_specs=padded_head_spec(out.shape, 2),
        out_shape=out,
        name="scfa_most_important_blocks",
    )(*vectors, logsumexp, query, compressed_key)


def _importance_kernel(
    last_ref,
    query_segment_ref,
    key_segment_ref,
    last_block_ref,
    logsumexp_ref,
    query_ref,
    key_ref,
    chosen_ref,
    *,
    overlap: Overlap,
    first: int,
    num_blocks: int,
    k: int,
    scale: float,
    head_dim: int,
    block: int,
    in_triton: bool,
):
    (length, heads, _), (num_keys, key_heads, _) = query_ref.shape, key_ref.shape
    head, group = pl.program_id(1), heads // key_heads
    rows = _rows(length)
    vectors = (last_ref, query_segment_ref, last_block_ref)
    last, query_segment, last_block = (_load(ref, rows.original, rows.valid, -1) for ref in vectors)
    dot = tile.dot_for(key_ref.dtype, "float32", in_triton=in_triton)

    def scores_of(numbers):
        def add_head(g, importance):
            query = rows.load(query_ref, head * np.int32(group) + g, head_dim)
            logsumexp = rows.load_original_vector(logsumexp_ref, head * np.int32(group) + g, other=tile.NO_KEY)
            for i, weight in enumerate(overlap.weights()):
                key_number = numbers * np.int32(overlap.of_block) + np.int32(i - overlap.of_key + 1)
                at = jnp.clip(key_number, 0, num_keys - 1)
                products = dot(query, _load_rows(key_ref, at, head, head_dim).T)
                may = query_segment[:, None] == _load(key_segment_ref, at, None, 0)[None, :]
                may = (
                    may
                    & (key_number[None, :] <= last[:, None])
                    & ((key_number >= 0) & (key_number < num_keys))[None, :]
                )
                exponents = jnp.where(may, products * scale - logsumexp[:, None], -jnp.inf)
                importance = importance + float(weight) * jnp.exp2(exponents * tile.LOG2_E)
            return importance

        importance = _over_group(group, add_head, jnp.zeros((_ROWS, block), jnp.float32))
        may = ((numbers >= first) & (numbers < num_blocks))[None, :] & (importance > 0)
        return jnp.where(may, importance, -jnp.inf)

    rows.store(chosen_ref, head, k, _best(scores_of, last_block, num_blocks, k, chosen_ref.shape[2], block))


def _rows(length: int) -> Rows:
    """The queries of a program; the last ones have the most blocks to choose from, and start first."""
    return Rows(pl.num_programs(0) - 1 - pl.program_id(0), _ROWS, length, None, None)


def _over_group(group: int, add_head: Callable, total: jax.Array) -> jax.Array:
    return add_head(np.int32(0), total) if group == 1 else jax.lax.fori_loop(0, group, add_head, total)


def _best(
    scores_of: Callable[[jax.Array], jax.Array], last: jax.Array, num_blocks: int, k: int, width: int, block: int
) -> jax.Array:
    """The numbers of the `k` best blocks up to `last`, int32 `[rows, width]`, given the scores of a few at a time."""
    places = jnp.arange(width, dtype=jnp.int32)[None, :]
    columns = jnp.arange(block, dtype=jnp.int32)

    def visit(i, best):
        numbers = i * block + columns
        scores = scores_of(numbers)
        scores = jnp.where((numbers[None, :] <= last[:, None]) & (scores > -jnp.inf), scores, -jnp.inf)

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
    return jax.lax.fori_loop(0, stop, visit, (kept, chosen))[1]


def _load(ref, at: jax.Array, where: jax.Array | None, other: int) -> jax.Array:
    return plgpu.load(ref.at[at]) if where is None else plgpu.load(ref.at[at], mask=where, other=other)


def _load_rows(ref, at: jax.Array, head: jax.Array, head_dim: int) -> jax.Array:
    """Loads the rows `at` of `ref[:, head]`, with 0 in the columns past the end."""
    columns = jnp.arange(ref.shape[-1], dtype=jnp.int32)[None, :]
    rows = ref.at[at[:, None], head, columns]
    return plgpu.load(rows) if ref.shape[-1] == head_dim else plgpu.load(rows, mask=columns < head_dim, other=0.0)
