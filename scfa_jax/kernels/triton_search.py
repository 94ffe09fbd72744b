"""Small Pallas kernels that search sorted codes before attention begins: one search per row, all rows at once."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from scfa_jax import search, tiling
from scfa_jax.index import NEVER, SparseIndex
from scfa_jax.kernels import _compat
from scfa_jax.kernels.triton_common import Rows, batch_spec, shared_entry
from scfa_jax.tiling import Tile

_ROWS_PER_PROGRAM = 512


def marked_codes(index: SparseIndex, key_heads: int, *, interpret: bool) -> jax.Array:
    """Returns the codes of the keys, with `NEVER` in place of those that no query attends to.

    A weight of 0 does not silence a NaN, so the kernels must not load rows that no query attends to. A test over
    the queries of every tile would cost a reduction there; one search per key costs next to nothing.

    Args:
        index: The pattern, with keys and queries.
        key_heads: Number of key heads `K` in all, since heads that share codes need not share queries.
        interpret: Whether to run in Pallas's interpreter.

    Returns:
        int32 `[B, K, S]`, with axes as small as can be. It does not ascend where keys are left out.
    """
    low, code = index.low, index.key_code
    # Key heads that share codes may differ in who attends to them, and then each gets its own.
    heads = key_heads if low.shape[1] > code.shape[1] else code.shape[1]
    if index.all_met and heads == code.shape[1]:
        return code
    # With low ascending, some query attends to a key if the furthest reach of those that begin before it does.
    reach = index.high if index.ascending else jax.lax.cummax(index.high, axis=2)
    batch = max(low.shape[0], code.shape[0])
    marked = jax.ShapeDtypeStruct((batch, heads, code.shape[2]), code.dtype)
    return _call(_mark_kernel, (low, reach, code), (marked,), interpret, "scfa_marks")[0]


def key_ranges(
    query_id: jax.Array, last_position: jax.Array, key_id: jax.Array, key_position: jax.Array, *, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """Does what `search.key_ranges` does. The keys may have fewer heads: consecutive query heads share one."""
    out = jax.ShapeDtypeStruct(query_id.shape, jnp.int32)
    operands = (query_id, last_position, key_id, key_position)
    low, high = _call(_range_kernel, operands, (out, out), interpret, "scfa_ranges")
    return low, high


def _call(kernel, operands, results, interpret: bool, name: str):
    batch, heads, length = results[0].shape
    block = Tile(16, _ROWS_PER_PROGRAM).fit(16, length)
    return _compat.triton_call(
        functools.partial(kernel, block=block.block_k),
        tile=block,
        interpret=interpret,
        grid=(tiling.num_tiles(length, block.block_k), heads, batch),
        in_specs=[batch_spec(x.shape, batch, 2) for x in operands],
        out_specs=[batch_spec(x.shape, batch, 2) for x in results],
        out_shape=results,
        name=name,
    )(*operands)


def _mark_kernel(low_ref, reach_ref, code_ref, marked_ref, *, block: int):
    key_head, (key_heads, key_length) = pl.program_id(1), marked_ref.shape
    query_entries, query_length = low_ref.shape
    heads = math.lcm(query_entries, key_heads)
    group = heads // key_heads
    keys = Rows(pl.program_id(0), block, key_length, None, None)
    code = keys.load_vector(code_ref, shared_entry(key_head, key_heads, code_ref.shape[0]), other=NEVER)

    def meets_head(g, is_met):
        on_query = shared_entry(key_head * np.int32(group) + g, heads, query_entries)
        begins = lambda i: plgpu.load(low_ref.at[on_query, i]) <= code
        (begun,) = search.count_leading((begins,), query_length, code)
        reach = plgpu.load(reach_ref.at[on_query, jnp.maximum(begun - 1, 0)])
        return is_met | ((begun > 0) & (reach >= code)).astype(jnp.int32)

    is_met = jax.lax.fori_loop(0, group, meets_head, jnp.zeros_like(code))
    keys.store_vector(marked_ref, key_head, jnp.where(is_met > 0, code, NEVER))


def _range_kernel(query_id_ref, last_ref, key_id_ref, key_position_ref, low_ref, high_ref, *, block: int):
    head = pl.program_id(1)
    (heads, query_length), (key_heads, key_length) = query_id_ref.shape, key_id_ref.shape
    on_key = shared_entry(head, heads, key_heads)
    queries = Rows(pl.program_id(0), block, query_length, None, None)
    query_id = queries.load_vector(query_id_ref, head, other=0)
    last_position = queries.load_vector(last_ref, head, other=0)

    def is_seen(i):
        key_id, position = (plgpu.load(ref.at[on_key, i]) for ref in (key_id_ref, key_position_ref))
        return search.is_up_to(key_id, position, query_id, last_position)

    is_before = lambda i: plgpu.load(key_id_ref.at[on_key, i]) < query_id
    before, seen = search.count_leading((is_before, is_seen), key_length, query_id)
    queries.store_vector(low_ref, head, before)
    queries.store_vector(high_ref, head, seen - 1)
