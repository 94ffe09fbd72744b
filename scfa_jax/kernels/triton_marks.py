"""Which keys take part at all, found by a small Pallas kernel before attention begins.

A weight of 0 does not silence a NaN, so the kernels must not load rows that no query attends to. A test over the
queries of every tile would cost a reduction there (measured: 40% of the forward pass); one search per key costs
next to nothing.
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
from scfa_jax.index import NEVER, SparseIndex
from scfa_jax.kernels import _compat
from scfa_jax.kernels.triton_common import Rows, batch_spec, shared_entry
from scfa_jax.tiling import Tile

_KEYS_PER_PROGRAM = 512


def marked_codes(index: SparseIndex, *, interpret: bool) -> jax.Array:
    """Returns the codes of the keys, with `NEVER` in place of those that no query attends to.

    Args:
        index: The pattern, with keys and queries.
        interpret: Whether to run in Pallas's interpreter.

    Returns:
        int32 `[B, K, S]`, with axes as small as the index has. It does not ascend where keys are left out.
    """
    if index.all_met:
        return index.key_code
    low, code = index.low, index.key_code
    # With low ascending, some query attends to a key if the furthest reach of those that begin before it does.
    reach = index.high if index.ascending else jax.lax.cummax(index.high, axis=2)
    batch = max(low.shape[0], code.shape[0])
    marked = jax.ShapeDtypeStruct((batch, *code.shape[1:]), code.dtype)
    block = Tile(16, _KEYS_PER_PROGRAM).fit(16, code.shape[2])
    return _compat.triton_call(
        functools.partial(_kernel, block=block.block_k),
        tile=block,
        interpret=interpret,
        grid=(tiling.num_tiles(code.shape[2], block.block_k), code.shape[1], batch),
        in_specs=[batch_spec(x.shape, batch, 2) for x in (low, reach, code)],
        out_specs=batch_spec(marked.shape, batch, 2),
        out_shape=marked,
        name="scfa_marks",
    )(low, reach, code)


def _kernel(low_ref, reach_ref, code_ref, marked_ref, *, block: int):
    on_key = pl.program_id(1)
    query_entries, query_length = low_ref.shape
    key_entries, key_length = code_ref.shape
    heads = math.lcm(query_entries, key_entries)
    group = heads // key_entries
    keys = Rows(pl.program_id(0), block, key_length, None, on_key)
    code = keys.load_vector(code_ref, on_key, other=NEVER)

    def meets_head(g, is_met):
        on_query = shared_entry(on_key * np.int32(group) + g, heads, query_entries)

        def halve(_, ends):
            first, last = ends  # the number of queries with low <= code lies in [first, last]
            middle = (first + last) // 2
            begins = plgpu.load(low_ref.at[on_query, jnp.minimum(middle, query_length - 1)]) <= code
            is_open = first < last
            return jnp.where(is_open & begins, middle + 1, first), jnp.where(is_open & ~begins, middle, last)

        ends = jnp.zeros_like(code), jnp.full_like(code, query_length)
        begun, _ = jax.lax.fori_loop(0, query_length.bit_length(), halve, ends)
        reach = plgpu.load(reach_ref.at[on_query, jnp.maximum(begun - 1, 0)])
        return is_met | ((begun > 0) & (reach >= code)).astype(jnp.int32)

    is_met = jax.lax.fori_loop(0, group, meets_head, jnp.zeros_like(code))
    keys.store_vector(marked_ref, on_key, jnp.where(is_met > 0, code, NEVER))
