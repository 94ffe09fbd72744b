"""Attention of one query a head to a run of keys in an order: one head at a time on a CPU."""

from __future__ import annotations

import jax

from scfa_jax._partitioning import varying_as
from scfa_jax.backends import tile
from scfa_jax.backends.protocol import Call, Run
from scfa_jax.backends.xla.attention import over_heads, silenced

_BLOCK = 256  # rows that are gathered at once, up to 255 of them behind a run


def forward(call: Call, query: jax.Array, key: jax.Array, value: jax.Array, run: Run) -> tuple[jax.Array, jax.Array]:
    """As `Backend.decode`."""
    order, start, stop = run
    batch, _, num_heads, _ = query.shape
    group, block = num_heads // key.shape[2], min(_BLOCK, key.shape[1])
    dot = tile.dot_for(call.dtype, call.precision, in_triton=False)

    def one_head(b: jax.Array, n: jax.Array) -> tuple[jax.Array, jax.Array]:
        first, last, row = start[b, n], stop[b, n], call.logits.signed(query[b, :, n])

        def visit(i: jax.Array, softmax: tile.Softmax) -> tile.Softmax:
            place = first + i * block + jax.lax.iota("int32", block)
            in_run = place < last
            rows = order.at[b, n // group, place].get(mode="clip")
            keys, values = (x.at[b, rows, n // group].get(mode="clip") for x in (key, value))
            values = silenced(values, in_run)
            return tile.add_keys(softmax, row, keys, values, in_run[None], call.logits, dot)

        softmax = varying_as(first, tile.empty_softmax(1, call.value_dim))
        softmax = jax.lax.fori_loop(0, (last - first + block - 1) // block, visit, softmax)
        return tile.finish(softmax, call.logits)

    output, logsumexp = over_heads(batch, num_heads, one_head)
    return output.swapaxes(1, 2), logsumexp
