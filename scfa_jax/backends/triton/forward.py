"""The forward pass as a Pallas kernel for Triton: one program computes one tile of queries of one head."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from scfa_jax._bounds import num_tiles
from scfa_jax.backends import tile
from scfa_jax.backends.protocol import Call, Inputs
from scfa_jax.backends.triton import _compat, bounds, marks, tile_sizes
from scfa_jax.backends.triton.rows import IndexRefs, QueryTile, batch_spec, padded_head_spec
from scfa_jax.backends.triton.tile_sizes import TritonTile


def forward(call: Call, inputs: Inputs, dtype: jnp.dtype, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """As `Backend.forward`, or in Pallas's interpreter."""
    query, key, value, index = inputs
    (batch, _, num_heads, _), num_rows = query.shape, index.low.shape[2]
    block, _, _ = tile_sizes.for_call(call, index)
    tile_bounds = bounds.key_tile_bounds(index, block.block_q, block.block_k, interpret=interpret)
    code = marks.marked_codes(index, key.shape[2], interpret=interpret)
    index_arrays = (index.low, index.high, code, index.query_order, index.key_order)
    output = jax.ShapeDtypeStruct((batch, num_rows, num_heads, call.value_dim), dtype)
    logsumexp = jax.ShapeDtypeStruct((batch, num_heads, num_rows), jnp.float32)
    return _compat.triton_call(
        functools.partial(_kernel, call=call, block=block, slots=index.slots, in_triton=not interpret),
        num_warps=block.num_warps,
        num_stages=block.num_stages,
        interpret=interpret,
        # Neighbouring programs share a head, and so its keys in the L2 cache.
        grid=(num_tiles(num_rows, block.block_q), num_heads, batch),
        in_specs=[
            *(None if x is None else batch_spec(x.shape, batch, 2) for x in (*index_arrays, tile_bounds)),
            *(padded_head_spec(x.shape, 2) for x in (query, key, value)),
        ],
        out_specs=[padded_head_spec(output.shape, 2), batch_spec(logsumexp.shape, batch, 2)],
        out_shape=[output, logsumexp],
        name="scfa_forward",
    )(*index_arrays, tile_bounds, query, key, value)


def _kernel(*refs, call: Call, block: TritonTile, slots: int, in_triton: bool):
    index = IndexRefs(*refs[:5])
    bounds_ref, query_ref, key_ref, value_ref, output_ref, logsumexp_ref = refs[5:]
    queries = QueryTile(index, slots, bounds_ref, query_ref, key_ref, block.block_q, block.block_k)
    query = call.logits.signed(queries.rows.load(query_ref, queries.head, call.head_dim))
    dot = tile.dot_for(call.dtype, call.precision, in_triton=in_triton)

    def visit(key_tile, softmax, stretch):
        keys, mask, is_met = queries.keys(key_tile, stretch)
        key = keys.load(key_ref, queries.key_head, call.head_dim)
        # A weight of 0 does not silence a NaN: rows that take no part are not even loaded.
        value = keys.load(value_ref, queries.key_head, call.value_dim, where=is_met)
        return tile.add_keys(softmax, query, key, value, mask, call.logits, dot)

    softmax = tile.walk(queries.bounds, visit, tile.empty_softmax(block.block_q, value_ref.shape[-1]))
    output, logsumexp = tile.finish(softmax, call.logits)
    queries.rows.store(output_ref, queries.head, call.value_dim, output)
    queries.rows.store_slot_vector(logsumexp_ref, queries.head, logsumexp)
