"""A small Pallas kernel that marks the keys which no query attends to: one search per key, all at once."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from scfa_jax._bounds import NEVER
from scfa_jax._search import count_leading
from scfa_jax.backends.triton.rows import Rows, row_call, shared_entry
from scfa_jax.index import SparseIndex


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
    return row_call(_mark_kernel, (low, reach, code), (marked,), interpret, "scfa_marks")[0]


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
        (begun,) = count_leading((begins,), query_length, code)
        reach = plgpu.load(reach_ref.at[on_query, jnp.maximum(begun - 1, 0)])
        return is_met | ((begun > 0) & (reach >= code)).astype(jnp.int32)

    is_met = jax.lax.fori_loop(0, group, meets_head, jnp.zeros_like(code))
    keys.store_vector(marked_ref, key_head, jnp.where(is_met > 0, code, NEVER))
