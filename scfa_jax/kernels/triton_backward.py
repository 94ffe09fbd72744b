"""The backward pass as two Pallas kernels for Triton: dq by tile of queries, then dk and dv by tile of keys.

Each recomputes the weights of the tiles that it visits from the log-sum-exp. Nothing is accumulated across
programs, so that the same inputs give the same bits. The first leaves behind, in sorted order, what the second
needs of every query: its log-sum-exp, `inf` if it has no key, and its delta.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from scfa_jax import tiling
from scfa_jax.index import NEVER, SparseIndex
from scfa_jax.kernels import _compat, tile, triton_bounds, triton_search
from scfa_jax.kernels.triton_common import Rows, batch_spec, load_bounds, order_entry, padded_head_spec, shared_entry
from scfa_jax.tiling import BlockSizes, Tile


def backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    index: SparseIndex,
    output: jax.Array,
    logsumexp: jax.Array,
    output_gradient: jax.Array,
    logsumexp_gradient: jax.Array,
    *,
    scale: float,
    blocks: BlockSizes,
    dot: tile.Dot,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of the forward pass.

    Args:
        query: `[B, T, N, H]`, no axis empty.
        key: `[B, S, K, H]`, no axis empty.
        value: `[B, S, K, H]`.
        index: The pattern.
        output: `[B, T, N, H]`, of the forward pass.
        logsumexp: float32 `[B, N, T]`, of the forward pass.
        output_gradient: `[B, T, N, H]`, the cotangent of the output, in its dtype.
        logsumexp_gradient: float32 `[B, N, T]`, the cotangent of the log-sum-exp.
        scale: Factor of the scores.
        blocks: Tile sizes.
        dot: Matrix product with a float32 result.
        interpret: Whether to run in Pallas's interpreter.

    Returns:
        The gradients of query, key and value.
    """
    batch, query_length, num_heads, head_dim = query.shape
    key_length, key_heads = key.shape[1:3]
    code = triton_search.marked_codes(index, key.shape[2], interpret=interpret)
    ranges = (index.low, index.high, code, index.query_order, index.key_order)

    def call(kernel, block, grid, vectors, arrays, vectors_out, arrays_out, name):
        return _compat.triton_call(
            functools.partial(kernel, block=block, scale=scale, head_dim=head_dim, dot=dot),
            tile=block,
            interpret=interpret,
            grid=(*grid, batch),
            in_specs=[
                *(None if x is None else batch_spec(x.shape, batch, 2) for x in vectors),
                *(padded_head_spec(x.shape, 2) for x in arrays),
            ],
            out_specs=[
                *(batch_spec(x.shape, batch, 2) for x in vectors_out),
                *(padded_head_spec(x.shape, 2) for x in arrays_out),
            ],
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*vectors_out, *arrays_out)],
            name=name,
        )(*vectors, *arrays)

    key_bounds = functools.partial(triton_bounds.key_tile_bounds, interpret=interpret)
    block = blocks.dq
    sorted_logsumexp, sorted_delta, dq = call(
        _dq_kernel,
        block,
        (tiling.num_tiles(query_length, block.block_q), num_heads),
        (key_bounds(index, block.block_q, block.block_k), *ranges, logsumexp, logsumexp_gradient),
        (query, key, value, output, output_gradient),
        (logsumexp, logsumexp),
        (query,),
        "scfa_dq",
    )
    block = blocks.dkv
    # Only where the ranges do not ascend may a walk over tiles of queries pass some that it does not meet.
    met = None if index.ascending else key_bounds(index, block.block_q, block.block_k)
    dk, dv = call(
        _dkv_kernel,
        block,
        (tiling.num_tiles(key_length, block.block_k), key_heads),
        (
            triton_bounds.query_tile_bounds(index, block.block_q, block.block_k, interpret=interpret),
            met,
            *ranges,
            sorted_logsumexp,
            sorted_delta,
        ),
        (query, key, value, output_gradient),
        (),
        (key, value),
        "scfa_dkv",
    )
    return dq, dk, dv


def _dq_kernel(
    bounds_ref,
    low_ref,
    high_ref,
    code_ref,
    query_order_ref,
    key_order_ref,
    logsumexp_ref,
    logsumexp_gradient_ref,
    query_ref,
    key_ref,
    value_ref,
    output_ref,
    output_gradient_ref,
    sorted_logsumexp_ref,
    sorted_delta_ref,
    dq_ref,
    *,
    scale: float,
    block: Tile,
    head_dim: int,
    dot: tile.Dot,
):
    query_tile = pl.num_programs(0) - 1 - pl.program_id(0)
    head = pl.program_id(1)
    (query_length, num_heads, width), key_length = query_ref.shape, key_ref.shape[0]
    entry = functools.partial(shared_entry, head, num_heads)
    key_head, on_query, on_key = (entry(r.shape[-n]) for r, n in ((key_ref, 2), (low_ref, 2), (code_ref, 2)))
    on_query_order, on_key_order = (order_entry(r, head, num_heads) for r in (query_order_ref, key_order_ref))

    queries = Rows(query_tile, block.block_q, query_length, query_order_ref, on_query_order)
    low = queries.load_vector(low_ref, on_query, other=NEVER)
    high = queries.load_vector(high_ref, on_query, other=-1)
    query = queries.load(query_ref, head, head_dim)
    output_gradient = queries.load(output_gradient_ref, head, head_dim)

    logsumexp = queries.load_original_vector(logsumexp_ref, head, other=-jnp.inf)
    has_key = logsumexp != -jnp.inf
    logsumexp = jnp.where(has_key, logsumexp, jnp.inf)
    delta = tile.delta(
        queries.load(output_ref, head, head_dim),
        output_gradient,
        queries.load_original_vector(logsumexp_gradient_ref, head, other=0.0),
    )
    delta = jnp.where(has_key, delta, 0.0)
    queries.store_vector(sorted_logsumexp_ref, head, logsumexp)
    queries.store_vector(sorted_delta_ref, head, delta)

    def visit(key_tile, dq, edge):
        keys = Rows(key_tile, block.block_k, key_length, key_order_ref, on_key_order, is_whole=edge is None)
        mask = is_met = None
        if edge is not None:
            code = keys.load_vector(code_ref, on_key, other=NEVER)
            mask = code[None, :] <= high[:, None]
            if edge == "start":
                mask &= code[None, :] >= low[:, None]
            is_met = code != NEVER
        key = keys.load(key_ref, key_head, head_dim, where=is_met)
        value = keys.load(value_ref, key_head, head_dim, where=is_met)
        _, score_gradient = tile.weights_and_score_gradient(
            dot(query, key.T),
            dot(output_gradient, value.T),
            logsumexp[:, None],
            delta[:, None],
            mask,
            scale * tile.LOG2_E,
        )
        return dq + dot(score_gradient.astype(key.dtype), key)

    bounds_head = entry(bounds_ref.shape[0])
    bounds = load_bounds(bounds_ref, bounds_head, query_tile)
    dq = tile.walk(bounds, visit, jnp.zeros((block.block_q, width), jnp.float32))
    queries.store(dq_ref, head, head_dim, jnp.where(has_key[:, None], dq * scale, 0.0))


def _dkv_kernel(
    bounds_ref,
    met_ref,
    low_ref,
    high_ref,
    code_ref,
    query_order_ref,
    key_order_ref,
    sorted_logsumexp_ref,
    sorted_delta_ref,
    query_ref,
    key_ref,
    value_ref,
    output_gradient_ref,
    dk_ref,
    dv_ref,
    *,
    scale: float,
    block: Tile,
    head_dim: int,
    dot: tile.Dot,
):
    # The first tiles of keys are seen by the most queries where ranges are causal: they start first.
    key_tile, key_head = pl.program_id(0), pl.program_id(1)
    (query_length, num_heads, width), (key_length, key_heads, _) = query_ref.shape, key_ref.shape
    group = num_heads // key_heads
    on_key = shared_entry(key_head * group, num_heads, code_ref.shape[0])

    on_key_order = order_entry(key_order_ref, key_head * group, num_heads)
    keys = Rows(key_tile, block.block_k, key_length, key_order_ref, on_key_order)
    code = keys.load_vector(code_ref, on_key, other=NEVER)
    key = keys.load(key_ref, key_head, head_dim)
    value = keys.load(value_ref, key_head, head_dim)

    def add_head(head, carry):
        entry = functools.partial(shared_entry, head, num_heads)
        on_query, bounds_head = entry(low_ref.shape[0]), entry(bounds_ref.shape[0])
        on_query_order = order_entry(query_order_ref, head, num_heads)

        def visit(query_tile, carry, edge):
            dk, dv = carry
            queries = Rows(
                query_tile, block.block_q, query_length, query_order_ref, on_query_order, is_whole=edge is None
            )
            logsumexp = queries.load_vector(sorted_logsumexp_ref, head, other=jnp.inf)
            delta = queries.load_vector(sorted_delta_ref, head, other=0.0)
            mask = has_key = None
            if edge is not None:
                low = queries.load_vector(low_ref, on_query, other=NEVER)
                mask = code[:, None] >= low[None, :]
                if edge == "start":
                    high = queries.load_vector(high_ref, on_query, other=-1)
                    mask &= code[:, None] <= high[None, :]
                has_key = logsumexp != jnp.inf
            query = queries.load(query_ref, head, head_dim, where=has_key)
            output_gradient = queries.load(output_gradient_ref, head, head_dim, where=has_key)
            weights, score_gradient = tile.weights_and_score_gradient(
                dot(key, query.T),
                dot(value, output_gradient.T),
                logsumexp[None, :],
                delta[None, :],
                mask,
                scale * tile.LOG2_E,
            )
            dv = dv + dot(weights.astype(output_gradient.dtype), output_gradient)
            return dk + dot(score_gradient.astype(query.dtype), query), dv

        def visit_if_met(query_tile, carry, edge):
            start, _, _, stop = load_bounds(met_ref, entry(met_ref.shape[0]), query_tile)
            meets = (start <= key_tile) & (key_tile < stop)
            return jax.lax.cond(meets, lambda c: visit(query_tile, c, edge), lambda c: c, carry)

        bounds = load_bounds(bounds_ref, bounds_head, key_tile)
        return tile.walk(bounds, visit if met_ref is None else visit_if_met, carry)

    zeros = jnp.zeros((block.block_k, width), jnp.float32)
    first = key_head * group
    dk, dv = (
        add_head(first, (zeros, zeros))
        if group == 1
        else jax.lax.fori_loop(first, first + group, add_head, (zeros, zeros))
    )
    # What a key that takes no part holds stays in its own row, which ends here.
    is_met = (code != NEVER)[:, None]
    keys.store(dk_ref, key_head, head_dim, jnp.where(is_met, dk * scale, 0.0))
    keys.store(dv_ref, key_head, head_dim, jnp.where(is_met, dv, 0.0))
