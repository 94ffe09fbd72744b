"""Attention of one query a head to a run of keys in an order, as a Pallas kernel for Triton.

Each run is shared out among several programs, since there are few queries and a GPU has many multiprocessors. It is
bound by memory, so products are summed elementwise: a dot would ask for 16 queries.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from scfa_jax import tiling
from scfa_jax.kernels import _compat, tile
from scfa_jax.kernels.triton_common import Rows, batch_spec, padded_head_spec, shared_entry
from scfa_jax.tiling import Tile

# Programs in all, so that each of 132 multiprocessors has a few. No GPU has measured either number.
_PROGRAMS = 512
_ELEMENTS = 4096  # of keys in a tile


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    order: jax.Array,
    start: jax.Array,
    stop: jax.Array,
    *,
    scale: float,
    interpret: bool,
) -> jax.Array:
    """Attends to the rows that stand at `start .. stop - 1` of the order, and reads no others.

    Args:
        query: `[B, 1, N, H]`.
        key: `[B, S, K, H]`.
        value: `[B, S, K, H]`.
        order: int32 `[B, K, S]`, rows below `S`.
        start: int32 `[B, N]`, from 0.
        stop: int32 `[B, N]`, at most `S`.
        scale: Factor of the scores, positive.
        interpret: Whether to run in Pallas's interpreter.

    Returns:
        `[B, 1, N, H]` in the dtype of the query; zeros where a run is empty.
    """
    batch, _, num_heads, head_dim = query.shape
    block_k = min(64, max(16, _ELEMENTS // pl.next_power_of_2(head_dim)))
    block = Tile(16, block_k, num_stages=2).fit(16, key.shape[1])
    num_splits = min(math.ceil(_PROGRAMS / (batch * num_heads)), tiling.num_tiles(key.shape[1], block.block_k))
    outputs = jax.ShapeDtypeStruct((batch, num_heads, num_splits, head_dim), jnp.float32)
    logsumexps = jax.ShapeDtypeStruct((batch, num_heads, num_splits), jnp.float32)
    outputs, logsumexps = _compat.triton_call(
        functools.partial(_kernel, scale2=scale * tile.LOG2_E, block=block.block_k, head_dim=head_dim),
        tile=block,
        interpret=interpret,
        grid=(num_splits, num_heads, batch),
        in_specs=[
            *(batch_spec(x.shape, batch, 2) for x in (start, stop, order)),
            *(padded_head_spec(x.shape, 2) for x in (query, key, value)),
        ],
        out_specs=[padded_head_spec(outputs.shape, 2), batch_spec(logsumexps.shape, batch, 2)],
        out_shape=[outputs, logsumexps],
        name="scfa_decode",
    )(start, stop, order, query, key, value)
    return _merged(outputs, logsumexps)[:, None].astype(query.dtype)


def _kernel(
    start_ref,
    stop_ref,
    order_ref,
    query_ref,
    key_ref,
    value_ref,
    output_ref,
    logsumexp_ref,
    *,
    scale2: float,
    block: int,
    head_dim: int,
):
    split, head = pl.program_id(0), pl.program_id(1)
    (_, num_heads, width), (key_length, key_heads, _) = query_ref.shape, key_ref.shape
    num_splits = np.int32(output_ref.shape[1])
    key_head = shared_entry(head, num_heads, key_heads)
    start, stop = (plgpu.load(ref.at[head]) for ref in (start_ref, stop_ref))
    columns = jnp.arange(width, dtype=jnp.int32)[None, :]
    query = plgpu.load(query_ref.at[np.int32(0), head, columns], mask=columns < head_dim, other=0.0)

    # Programs take turns with the tiles that the run touches.
    first = jax.lax.div(start, np.int32(block)) + split
    num_tiles = jax.lax.div(stop + np.int32(block - 1), np.int32(block)) - first
    turns = jax.lax.div(jnp.maximum(num_tiles, 0) + (num_splits - 1), num_splits)

    def visit(turn, softmax):
        number = first + turn * num_splits
        keys = Rows(number, block, key_length, order_ref, key_head)
        place = number * block + jnp.arange(block, dtype=jnp.int32)
        in_run = (place >= start) & (place < stop)
        # A weight of 0 does not silence a NaN: rows of other buckets are not even loaded.
        key, value = (keys.load(ref, key_head, head_dim, where=in_run) for ref in (key_ref, value_ref))
        return tile.add_keys(softmax, query, key, value, in_run[None, :], scale2, _dot)

    softmax = jax.lax.fori_loop(0, turns, visit, tile.empty_softmax(1, width))
    output, logsumexp = tile.finish(softmax, scale2)
    plgpu.store(output_ref.at[head, split, columns], output, mask=columns < head_dim)
    plgpu.store(logsumexp_ref.at[head, jnp.full((1,), split)], logsumexp)


def _dot(row: jax.Array, matrix: jax.Array) -> jax.Array:
    """`[1, M]` times `[M, L]`."""
    return jnp.sum(row.T.astype(jnp.float32) * matrix.astype(jnp.float32), axis=0)[None, :]


def _merged(outputs: jax.Array, logsumexps: jax.Array) -> jax.Array:
    """`merge_attention` along the last axis of log-sum-exps, for any number of parts and without gradients."""
    peak = jnp.max(logsumexps, axis=-1, keepdims=True)
    weights = jnp.exp(logsumexps - jnp.where(peak == -jnp.inf, 0.0, peak))
    total = jnp.sum(weights, axis=-1)
    merged = jnp.sum(weights[..., None] * outputs, axis=-2)  # outputs of parts without keys are 0
    return merged / jnp.where(total == 0, 1.0, total)[..., None]
