"""Attention of one query a head to a run of keys in an order, in plain JAX: one head at a time on a CPU."""

from __future__ import annotations

import jax

from scfa_jax.kernels import tile, xla
from scfa_jax.partitioning import varying_as
from scfa_jax.sorting import iota

_BLOCK = 256  # rows that are gathered at once


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    order: jax.Array,
    start: jax.Array,
    stop: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """Does what `triton_decode.forward` does, whose arguments it takes; reads up to 255 rows behind each run."""
    batch, _, num_heads, head_dim = query.shape
    group, block = num_heads // key.shape[2], min(_BLOCK, key.shape[1])
    scale2, dot = scale * tile.LOG2_E, tile.dot_for(query.dtype, "float32", in_triton=False)

    def one_head(b: jax.Array, n: jax.Array) -> jax.Array:
        first, last = start[b, n], stop[b, n]

        def visit(i: jax.Array, softmax: tile.Softmax) -> tile.Softmax:
            place = first + i * block + iota(block)
            in_run = place < last
            rows = order.at[b, n // group, place].get(mode="clip")
            keys, values = (x.at[b, rows, n // group].get(mode="clip") for x in (key, value))
            values = xla.silenced(values, in_run)
            return tile.add_keys(softmax, query[b, :, n], keys, values, in_run[None], scale2, dot)

        softmax = varying_as(first, tile.empty_softmax(1, head_dim))
        softmax = jax.lax.fori_loop(0, (last - first + block - 1) // block, visit, softmax)
        output, _ = tile.finish(softmax, scale2)
        return output.astype(query.dtype)

    return xla.over_heads(batch, num_heads, one_head).swapaxes(1, 2)
