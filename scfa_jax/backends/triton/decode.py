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

from scfa_jax._bounds import next_power_of_two, num_tiles
from scfa_jax.backends import tile
from scfa_jax.backends.protocol import Call, Run
from scfa_jax.backends.triton import _compat
from scfa_jax.backends.triton.rows import Rows, batch_spec, padded_head_spec, shared_entry

# Programs in all, so that each of 132 multiprocessors has a few. No GPU has measured either number.
_PROGRAMS = 512
_ELEMENTS = 4096  # of keys in a tile


def forward(
    call: Call, query: jax.Array, key: jax.Array, value: jax.Array, run: Run, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """As `Backend.decode`, or in Pallas's interpreter."""
    batch, _, num_heads, head_dim = query.shape
    widest = max(head_dim, call.value_dim)
    block = min(64, max(16, _ELEMENTS // pl.next_power_of_2(widest)), max(16, next_power_of_two(key.shape[1])))
    num_splits = min(math.ceil(_PROGRAMS / (batch * num_heads)), num_tiles(key.shape[1], block))
    outputs = jax.ShapeDtypeStruct((batch, num_heads, num_splits, call.value_dim), jnp.float32)
    logsumexps = jax.ShapeDtypeStruct((batch, num_heads, num_splits), jnp.float32)
    outputs, logsumexps = _compat.triton_call(
        functools.partial(_kernel, call=call, block=block),
        num_warps=4,
        num_stages=2,
        interpret=interpret,
        grid=(num_splits, num_heads, batch),
        in_specs=[
            *(batch_spec(x.shape, batch, 2) for x in run),
            *(padded_head_spec(x.shape, 2) for x in (query, key, value)),
        ],
        out_specs=[padded_head_spec(outputs.shape, 2), batch_spec(logsumexps.shape, batch, 2)],
        out_shape=[outputs, logsumexps],
        name="scfa_decode",
    )(*run, query, key, value)
    return _merged(outputs, logsumexps)


def _kernel(
    order_ref,
    start_ref,
    stop_ref,
    query_ref,
    key_ref,
    value_ref,
    output_ref,
    logsumexp_ref,
    *,
    call: Call,
    block: int,
):
    split, head = pl.program_id(0), pl.program_id(1)
    (_, num_heads, width), (key_length, key_heads, _) = query_ref.shape, key_ref.shape
    num_splits = np.int32(output_ref.shape[1])
    key_head = shared_entry(head, num_heads, key_heads)
    start, stop = (plgpu.load(ref.at[head]) for ref in (start_ref, stop_ref))
    columns = jnp.arange(width, dtype=jnp.int32)[None, :]
    query = plgpu.load(query_ref.at[np.int32(0), head, columns], mask=columns < call.head_dim, other=0.0)
    query = call.logits.signed(query)

    # Programs take turns with the tiles that the run touches.
    first = jax.lax.div(start, np.int32(block)) + split
    tiles = jax.lax.div(stop + np.int32(block - 1), np.int32(block)) - first
    turns = jax.lax.div(jnp.maximum(tiles, 0) + (num_splits - 1), num_splits)

    def visit(turn, softmax):
        number = first + turn * num_splits
        keys = Rows(number, block, key_length, order_ref, key_head)
        place = number * block + jnp.arange(block, dtype=jnp.int32)
        in_run = (place >= start) & (place < stop)
        # A weight of 0 does not silence a NaN: rows of other buckets are not even loaded.
        key = keys.load(key_ref, key_head, call.head_dim, where=in_run)
        value = keys.load(value_ref, key_head, call.value_dim, where=in_run)
        return tile.add_keys(softmax, query, key, value, in_run[None, :], call.logits, _dot)

    softmax = jax.lax.fori_loop(0, turns, visit, tile.empty_softmax(1, value_ref.shape[-1]))
    output, logsumexp = tile.finish(softmax, call.logits)
    columns = jnp.arange(value_ref.shape[-1], dtype=jnp.int32)[None, :]
    plgpu.store(output_ref.at[head, split, columns], output, mask=columns < call.value_dim)
    plgpu.store(logsumexp_ref.at[head, jnp.full((1,), split)], logsumexp)


def _dot(row: jax.Array, matrix: jax.Array) -> jax.Array:
    """`[1, M]` times `[M, L]`."""
    return jnp.sum(row.T.astype(jnp.float32) * matrix.astype(jnp.float32), axis=0)[None, :]


def _merged(outputs: jax.Array, logsumexps: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Merges parts along the last axis of log-sum-exps, `[B, N, splits]`, any number of them, without gradients."""
    has_key = logsumexps != tile.NO_KEY
    peak = jnp.max(jnp.where(has_key, logsumexps, -jnp.inf), axis=-1, keepdims=True)
    is_empty = peak == -jnp.inf
    peak = jnp.where(is_empty, 0.0, peak)
    weights = jnp.where(has_key, jnp.exp(jnp.where(has_key, logsumexps, 0.0) - peak), 0.0)
    total = jnp.where(is_empty, 1.0, jnp.sum(weights, axis=-1, keepdims=True))
    merged = jnp.sum(weights[..., None] * outputs, axis=-2) / total  # outputs of parts without keys are 0
    return merged[:, None], jnp.where(is_empty, tile.NO_KEY, peak + jnp.log(total))
