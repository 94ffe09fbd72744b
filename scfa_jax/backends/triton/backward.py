"""The backward pass as two Pallas kernels for Triton: dq by tile of queries, then dk and dv by tile of keys.

Each recomputes the weights of the tiles that it visits from the log-sum-exp. Nothing is accumulated across programs,
so that the same inputs give the same bits. Where queries are read through an order, the first kernel leaves behind
what the second needs of each of them, its log-sum-exp and delta, in that order.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from scfa_jax._bounds import NEVER, num_tiles
from scfa_jax.backends import tile
from scfa_jax.backends.protocol import Call, Inputs, Residuals
from scfa_jax.backends.triton import _compat, bounds, marks, tile_sizes
from scfa_jax.backends.triton.rows import (
    IndexRefs,
    QueryTile,
    Rows,
    batch_spec,
    load_bounds,
    order_entry,
    padded_head_spec,
    shared_entry,
)
from scfa_jax.backends.triton.tile_sizes import TritonTile


def backward(
    call: Call, inputs: Inputs, residuals: Residuals, dtype: jnp.dtype, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `Backend.backward`, or in Pallas's interpreter."""
    (query, key, value, index), (logsumexp, delta, output_gradient) = inputs, residuals
    (batch, _, num_heads, head_dim), num_rows = query.shape, index.low.shape[2]
    key_length, key_heads = key.shape[1:3]
    _, dq_block, dkv_block = tile_sizes.for_call(call, index)
    code = marks.marked_codes(index, key.shape[2], interpret=interpret)
    index_arrays = (index.low, index.high, code, index.query_order, index.key_order)
    key_bounds = functools.partial(bounds.key_tile_bounds, index, interpret=interpret)
    query_bounds = functools.partial(bounds.query_tile_bounds, index, interpret=interpret)

    def run(kernel, block: TritonTile, grid, vectors, arrays, vectors_out, arrays_out, name):
        results = (*vectors_out, *(jax.ShapeDtypeStruct(x.shape, dtype) for x in arrays_out))
        return _compat.triton_call(
            functools.partial(kernel, call=call, block=block, slots=index.slots, in_triton=not interpret),
            num_warps=block.num_warps,
            num_stages=block.num_stages,
            interpret=interpret,
            grid=(*grid, batch),
            in_specs=[
                *(None if x is None else batch_spec(x.shape, batch, 2) for x in (*index_arrays, *vectors)),
                *(padded_head_spec(x.shape, 2) for x in arrays),
            ],
            out_specs=[
                *(batch_spec(x.shape, batch, 2) for x in vectors_out),
                *(padded_head_spec(x.shape, 2) for x in arrays_out),
            ],
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
            name=name,
        )(*index_arrays, *vectors, *arrays)

    *in_order, dq = run(
        _dq_kernel,
        dq_block,
        (num_tiles(num_rows, dq_block.block_q), num_heads),
        (key_bounds(dq_block.block_q, dq_block.block_k), logsumexp, delta),
        (query, key, value, output_gradient),
        () if index.query_order is None else (jax.ShapeDtypeStruct((batch, num_heads, num_rows), jnp.float32),) * 2,
        (jax.ShapeDtypeStruct((batch, num_rows, num_heads, head_dim), dtype),),
        "scfa_dq",
    )
    # Only where the ranges do not ascend may a walk over tiles of queries pass some that it does not meet.
    met = None if index.ascending else key_bounds(dkv_block.block_q, dkv_block.block_k)
    dk, dv = run(
        _dkv_kernel,
        dkv_block,
        (num_tiles(key_length, dkv_block.block_k), key_heads),
        (query_bounds(dkv_block.block_q, dkv_block.block_k), met, *(in_order or (logsumexp, delta))),
        (query, key, value, output_gradient),
        (),
        (key, value),
        "scfa_dkv",
    )
    return dq, dk, dv


def _dq_kernel(*refs, call: Call, block: TritonTile, slots: int, in_triton: bool):
    index = IndexRefs(*refs[:5])
    bounds_ref, logsumexp_ref, delta_ref, query_ref, key_ref, value_ref, output_gradient_ref = refs[5:12]
    *in_order_refs, dq_ref = refs[12:]
    queries = QueryTile(index, slots, bounds_ref, query_ref, key_ref, block.block_q, block.block_k)
    rows, head = queries.rows, queries.head
    query = rows.load(query_ref, head, call.head_dim)
    output_gradient = rows.load(output_gradient_ref, head, call.value_dim)
    logsumexp = rows.load_original_vector(logsumexp_ref, head, other=tile.NO_KEY)
    delta = rows.load_original_vector(delta_ref, head, other=0.0)
    for ref, x in zip(in_order_refs, (logsumexp, delta), strict=bool(in_order_refs)):
        rows.store_vector(ref, head, x)
    dot = tile.dot_for(call.dtype, call.precision, in_triton=in_triton)

    def visit(key_tile, dq, stretch):
        keys, mask, is_met = queries.keys(key_tile, stretch)
        key = keys.load(key_ref, queries.key_head, call.head_dim, where=is_met)
        value = keys.load(value_ref, queries.key_head, call.value_dim, where=is_met)
        products, weight_gradient = dot(query, key.T), dot(output_gradient, value.T)
        _, score_gradient = tile.weights_and_score_gradient(
            products, weight_gradient, logsumexp[:, None], delta[:, None], mask, call.logits
        )
        return dq + dot(score_gradient.astype(key.dtype), key)

    dq = tile.walk(queries.bounds, visit, jnp.zeros((block.block_q, query_ref.shape[-1]), jnp.float32))
    has_key = (logsumexp != tile.NO_KEY)[:, None]
    rows.store(dq_ref, head, call.head_dim, jnp.where(has_key, dq * call.logits.scale, 0.0))


def _dkv_kernel(*refs, call: Call, block: TritonTile, slots: int, in_triton: bool):
    index = IndexRefs(*refs[:5])
    bounds_ref, met_ref, logsumexp_ref, delta_ref = refs[5:9]
    query_ref, key_ref, value_ref, output_gradient_ref, dk_ref, dv_ref = refs[9:]
    # The first tiles of keys are seen by the most queries where ranges are causal: they start first.
    key_tile, key_head = pl.program_id(0), pl.program_id(1)
    (_, num_heads, _), (key_length, key_heads, _), num_rows = query_ref.shape, key_ref.shape, index.low.shape[1]
    group = num_heads // key_heads
    on_key = shared_entry(key_head * group, num_heads, index.code.shape[0])
    on_key_order = order_entry(index.key_order, key_head * group, num_heads)
    keys = Rows(key_tile, block.block_k, key_length, index.key_order, on_key_order)
    code = keys.load_vector(index.code, on_key, other=NEVER)
    key = keys.load(key_ref, key_head, call.head_dim)
    value = keys.load(value_ref, key_head, call.value_dim)
    dot = tile.dot_for(call.dtype, call.precision, in_triton=in_triton)

    def add_head(head, carry):
        entry = functools.partial(shared_entry, head, num_heads)
        on_query, on_query_order = entry(index.low.shape[0]), order_entry(index.query_order, head, num_heads)

        def visit(query_tile, carry, stretch):
            dk, dv = carry
            is_whole = stretch == "full"
            queries = Rows(query_tile, block.block_q, num_rows, index.query_order, on_query_order, is_whole, slots)
            logsumexp = queries.load_vector(logsumexp_ref, head, other=tile.NO_KEY)
            delta = queries.load_vector(delta_ref, head, other=0.0)
            mask = has_key = None
            if not is_whole:
                low = queries.load_vector(index.low, on_query, other=NEVER)
                high = queries.load_vector(index.high, on_query, other=-1)
                mask = tile.pair_mask(low[None, :], code[:, None], high[None, :], stretch, walks="queries")
                has_key = logsumexp != tile.NO_KEY
            query = queries.load(query_ref, head, call.head_dim, where=has_key)
            output_gradient = queries.load(output_gradient_ref, head, call.value_dim, where=has_key)
            products, weight_gradient = dot(key, query.T), dot(value, output_gradient.T)
            weights, score_gradient = tile.weights_and_score_gradient(
                products, weight_gradient, logsumexp[None, :], delta[None, :], mask, call.logits
            )
            dv = dv + dot(weights.astype(output_gradient.dtype), output_gradient)
            return dk + dot(score_gradient.astype(query.dtype), query), dv

        def visit_if_met(query_tile, carry, stretch):
            start, _, _, stop = load_bounds(met_ref, entry(met_ref.shape[0]), query_tile)
            meets = (start <= key_tile) & (key_tile < stop)
            return jax.lax.cond(meets, lambda c: visit(query_tile, c, stretch), lambda c: c, carry)

        tile_bounds = load_bounds(bounds_ref, entry(bounds_ref.shape[0]), key_tile)
        return tile.walk(tile_bounds, visit if met_ref is None else visit_if_met, carry)

    zeros = tuple(jnp.zeros((block.block_k, ref.shape[-1]), jnp.float32) for ref in (key_ref, value_ref))
    first = key_head * group
    dk, dv = add_head(first, zeros) if group == 1 else jax.lax.fori_loop(first, first + group, add_head, zeros)
    # What a key that takes no part holds stays in its own row, which ends here.
    is_met = (code != NEVER)[:, None]
    keys.store(dk_ref, key_head, call.head_dim, jnp.where(is_met, dk * call.logits.scale, 0.0))
    keys.store(dv_ref, key_head, call.value_dim, jnp.where(is_met, dv, 0.0))
