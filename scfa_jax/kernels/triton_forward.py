"""The forward pass as a Pallas kernel for Triton: one program computes one tile of queries of one head."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from scfa_jax import tiling
from scfa_jax.index import NEVER, SparseIndex
from scfa_jax.kernels import _compat, tile, triton_bounds, triton_search
from scfa_jax.kernels.triton_common import Rows, batch_spec, load_bounds, order_entry, padded_head_spec, shared_entry
from scfa_jax.tiling import Tile


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    index: SparseIndex,
    *,
    scale: float,
    block: Tile,
    output_dtype: jnp.dtype,
    dot: tile.Dot,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Attends to the keys of `index`.

    Args:
        query: `[B, T, N, H]`, no axis empty.
        key: `[B, S, K, H]`, no axis empty.
        value: `[B, S, K, H]`.
        index: The pattern.
        scale: Factor of the scores.
        block: Tile sizes.
        output_dtype: dtype of the output.
        dot: Matrix product with a float32 result.
        interpret: Whether to run in Pallas's interpreter.

    Returns:
        The output `[B, T, N, H]` and the natural log-sum-exp, float32 `[B, N, T]`.
    """
    batch, query_length, num_heads, head_dim = query.shape
    bounds = triton_bounds.key_tile_bounds(index, block.block_q, block.block_k, interpret=interpret)
    code = triton_search.marked_codes(index, key.shape[2], interpret=interpret)
    operands = (bounds, index.low, index.high, code, index.query_order, index.key_order)
    kernel = functools.partial(_kernel, scale=scale, block=block, head_dim=head_dim, dot=dot)
    rows = padded_head_spec(query.shape, 2)
    logsumexp = jax.ShapeDtypeStruct((batch, num_heads, query_length), jnp.float32)
    return _compat.triton_call(
        kernel,
        tile=block,
        interpret=interpret,
        # Neighbouring programs share a head, and so its keys in the L2 cache.
        grid=(tiling.num_tiles(query_length, block.block_q), num_heads, batch),
        in_specs=[
            *(None if x is None else batch_spec(x.shape, batch, 2) for x in operands),
            rows,
            padded_head_spec(key.shape, 2),
            padded_head_spec(value.shape, 2),
        ],
        out_specs=[rows, batch_spec(logsumexp.shape, batch, 2)],
        out_shape=[jax.ShapeDtypeStruct(query.shape, output_dtype), logsumexp],
        name="scfa_forward",
    )(*operands, query, key, value)


def _kernel(
    bounds_ref,
    low_ref,
    high_ref,
    code_ref,
    query_order_ref,
    key_order_ref,
    query_ref,
    key_ref,
    value_ref,
    output_ref,
    logsumexp_ref,
    *,
    scale: float,
    block: Tile,
    head_dim: int,
    dot: tile.Dot,
):
    # The last tiles see the most keys where ranges are causal: start with them.
    query_tile = pl.num_programs(0) - 1 - pl.program_id(0)
    head = pl.program_id(1)
    (query_length, num_heads, width), key_length = query_ref.shape, key_ref.shape[0]
    entry = functools.partial(shared_entry, head, num_heads)
    key_head, on_query, on_key = (entry(r.shape[-n]) for r, n in ((key_ref, 2), (low_ref, 2), (code_ref, 2)))
    on_query_order, on_key_order = (order_entry(r, head, num_heads) for r in (query_order_ref, key_order_ref))

    queries = Rows(query_tile, block.block_q, query_length, query_order_ref, on_query_order)
    low = queries.load_vector(low_ref, on_query, other=NEVER)
    high = queries.load_vector(high_ref, on_query, other=-1)
    sign, scale2 = tile.split_scale(scale)
    query = queries.load(query_ref, head, head_dim)
    query = query if sign == 1 else query * jnp.asarray(sign, query.dtype)

    def visit(key_tile, softmax, edge):
        keys = Rows(key_tile, block.block_k, key_length, key_order_ref, on_key_order, is_whole=edge is None)
        mask = is_met = None
        if edge is not None:
            code = keys.load_vector(code_ref, on_key, other=NEVER)
            mask = code[None, :] <= high[:, None]
            if edge == "start":
                mask &= code[None, :] >= low[:, None]
            is_met = code != NEVER
        key = keys.load(key_ref, key_head, head_dim)
        # A weight of 0 does not silence a NaN: rows that take no part are not even loaded.
        value = keys.load(value_ref, key_head, head_dim, where=is_met)
        return tile.add_keys(softmax, query, key, value, mask, scale2, dot)

    bounds_head = entry(bounds_ref.shape[0])
    bounds = load_bounds(bounds_ref, bounds_head, query_tile)
    softmax = tile.walk(bounds, visit, tile.empty_softmax(block.block_q, width))
    output, logsumexp = tile.finish(softmax, scale2)
    queries.store(output_ref, head, head_dim, output)
    queries.store_original_vector(logsumexp_ref, head, logsumexp)
