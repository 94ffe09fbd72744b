"""The tile loops, one head at a time.

Memory is linear in length, and only the tiles that the index touches are visited. The backward pass walks once,
by tiles of queries, and adds to the gradients of keys and values in place.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from scfa_jax import _bounds
from scfa_jax._partitioning import varying_as
from scfa_jax.backends import tile
from scfa_jax.backends.protocol import Call, Inputs, Residuals, TileShape
from scfa_jax.index import NEVER, SparseIndex

_TILE = TileShape(128, 128)  # large enough that a tile outweighs a loop's step on a CPU


def forward(call: Call, inputs: Inputs, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """As `Backend.forward`."""
    query, key, value, index = inputs
    batch, query_length, num_heads, _ = query.shape
    block = call.block_sizes.forward if call.block_sizes else _TILE.fit(query_length, key.shape[1])
    bounds = _bounds.key_tile_bounds(index.ranges, block.block_q, block.block_k)
    group = num_heads // key.shape[2]
    dot = tile.dot_for(call.dtype, call.precision, in_triton=False)

    def one_head(b: jax.Array, n: jax.Array) -> tuple[jax.Array, jax.Array]:
        head = _Head.read(index, bounds, b, n, num_heads, block)
        queries = head.query_tiles(call.logits.signed(query[b, :, n]))
        keys, values = (head.sorted_keys(x[b, :, n // group]) for x in (key, value))

        def one_tile(tile_inputs):
            rows, low, high, bounds = tile_inputs

            def visit(j, softmax, stretch):
                mask, has_query = head.mask(j, low, high, stretch)
                value_tile = silenced(head.key_tile(values, j), has_query)
                return tile.add_keys(softmax, rows, head.key_tile(keys, j), value_tile, mask, call.logits, dot)

            softmax = tile.walk(tuple(bounds), visit, tile.empty_softmax(block.block_q, call.value_dim))
            return tile.finish(softmax, call.logits)

        output, logsumexp = jax.lax.map(one_tile, (queries, head.low, head.high, head.bounds))
        return head.original_queries(output).astype(dtype), head.original_queries(logsumexp)

    output, logsumexp = over_heads(batch, num_heads, one_head)
    return output.swapaxes(1, 2), logsumexp


def backward(
    call: Call, inputs: Inputs, residuals: Residuals, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `Backend.backward`."""
    (query, key, value, index), (logsumexp, delta, output_gradient) = inputs, residuals
    batch, query_length, num_heads, _ = query.shape
    key_length, key_heads, _ = key.shape[1:]
    group = num_heads // key_heads
    block = call.block_sizes.dq if call.block_sizes else _TILE.fit(query_length, key_length)
    bounds = _bounds.key_tile_bounds(index.ranges, block.block_q, block.block_k)
    dot = tile.dot_for(call.dtype, call.precision, in_triton=False)

    def one_query_head(b: jax.Array, n: jax.Array, keys_gradient):
        head = _Head.read(index, bounds, b, n, num_heads, block)
        lse = head.query_tiles(logsumexp[b, n], fill=tile.NO_KEY)
        has_key = lse != tile.NO_KEY
        queries, cotangents = (silenced(head.query_tiles(x[b, :, n]), has_key) for x in (query, output_gradient))
        keys, values = (head.sorted_keys(x[b, :, n // group]) for x in (key, value))

        def one_tile(keys_gradient, tile_inputs):
            rows, cotangent, lse, delta, low, high, bounds = tile_inputs

            def visit(j, carry, stretch):
                dq, dk, dv = carry
                mask, has_query = head.mask(j, low, high, stretch)
                key_tile, value_tile = (silenced(head.key_tile(x, j), has_query) for x in (keys, values))
                products, weight_gradient = dot(rows, key_tile.T), dot(cotangent, value_tile.T)
                weights, score_gradient = tile.weights_and_score_gradient(
                    products, weight_gradient, lse[:, None], delta[:, None], mask, call.logits
                )
                weights, score_gradient = (x.astype(rows.dtype) for x in (weights, score_gradient))
                dk = head.add(dk, j, dot(score_gradient.T, rows))
                dv = head.add(dv, j, dot(weights.T, cotangent))
                return dq + dot(score_gradient, key_tile), dk, dv

            dq = jnp.zeros(rows.shape, jnp.float32)
            dq, *keys_gradient = tile.walk(tuple(bounds), visit, (dq, *keys_gradient))
            return tuple(keys_gradient), dq * call.logits.scale

        deltas = head.query_tiles(delta[b, n])
        inputs = (queries, cotangents, lse, deltas, head.low, head.high, head.bounds)
        keys_gradient, dq = jax.lax.scan(one_tile, keys_gradient, inputs)
        return keys_gradient, head.original_queries(dq).astype(dtype)

    def one_key_head(b: jax.Array, k: jax.Array):
        length = _bounds.num_tiles(key_length, block.block_k) * block.block_k
        zeros = tuple(jnp.zeros((length, x.shape[3]), jnp.float32) for x in (key, value))
        (dk, dv), dq = jax.lax.scan(
            lambda carry, g: one_query_head(b, k * group + g, carry),
            varying_as(key, zeros),
            jnp.arange(group, dtype=jnp.int32),
        )
        head = _Head.read(index, bounds, b, k * group, num_heads, block)
        dk, dv = head.original_keys(dk * call.logits.scale), head.original_keys(dv)
        return dq, dk.astype(dtype), dv.astype(dtype)

    dq, dk, dv = over_heads(batch, key_heads, one_key_head)
    dq = dq.reshape(batch, num_heads, *dq.shape[3:])
    return dq.swapaxes(1, 2), dk.swapaxes(1, 2), dv.swapaxes(1, 2)


@dataclass(frozen=True)
class _Head:
    """The pattern of one query head, cut into tiles and padded to whole ones.

    Attributes:
        key_order: int32 `[S]` or None.
        code: int32 `[padded S]`.
        query_order: int32 `[T * slots]` or None.
        low: int32 `[query tiles, block_q]`.
        high: int32 `[query tiles, block_q]`.
        bounds: int32 `[query tiles, 4]`.
        num_rows: `T * slots`.
        slots: Of a query.
        key_length: `S`.
        block: Of its tiles.
    """

    key_order: jax.Array | None
    code: jax.Array
    query_order: jax.Array | None
    low: jax.Array
    high: jax.Array
    bounds: jax.Array
    num_rows: int
    slots: int
    key_length: int
    block: TileShape

    @classmethod
    def read(cls, index: SparseIndex, bounds, b, n, num_heads: int, block: TileShape) -> _Head:
        def entry(x):
            if x is None:
                return None
            return x[b if x.shape[0] > 1 else 0, n // (num_heads // x.shape[1])]

        return cls(
            key_order=entry(index.key_order),
            code=_padded(entry(index.key_code), block.block_k, NEVER),
            query_order=entry(index.query_order),
            low=_tiles(entry(index.low), block.block_q, NEVER),
            high=_tiles(entry(index.high), block.block_q, -1),
            bounds=entry(bounds),
            num_rows=index.low.shape[2],
            slots=index.slots,
            key_length=index.key_length,
            block=block,
        )

    def query_tiles(self, x: jax.Array, fill: float = 0) -> jax.Array:
        """Sorts the rows of `[T, ...]`, one for each slot, and cuts them into tiles, with `fill` past the end."""
        rows = self.query_order
        if rows is not None and self.slots > 1:
            rows = jax.lax.div(rows, jnp.int32(self.slots))
        return _tiles(x if rows is None else x[rows], self.block.block_q, fill)

    def sorted_keys(self, x: jax.Array) -> jax.Array:
        """Sorts the rows of `[S, H]` and pads them with zeros."""
        return _padded(x if self.key_order is None else x[self.key_order], self.block.block_k, 0)

    def key_tile(self, x: jax.Array, j: jax.Array) -> jax.Array:
        """The rows of tile `j`."""
        return jax.lax.dynamic_slice_in_dim(x, j * self.block.block_k, self.block.block_k)

    def add(self, x: jax.Array, j: jax.Array, rows: jax.Array) -> jax.Array:
        """Adds to the rows of tile `j`."""
        return jax.lax.dynamic_update_slice_in_dim(x, self.key_tile(x, j) + rows, j * self.block.block_k, 0)

    def mask(
        self, j: jax.Array, low: jax.Array, high: jax.Array, stretch: tile.Stretch
    ) -> tuple[jax.Array | None, jax.Array | None]:
        """The allowed pairs of a tile, and which of its keys have any; None for all."""
        code = self.key_tile(self.code, j)
        mask = tile.pair_mask(low[:, None], code[None, :], high[:, None], stretch, walks="keys")
        return mask, None if mask is None else mask.any(axis=0)

    def original_queries(self, tiles: jax.Array) -> jax.Array:
        """Undoes `query_tiles`, but for what each slot has of its own."""
        return _unsorted(tiles.reshape(-1, *tiles.shape[2:])[: self.num_rows], self.query_order)

    def original_keys(self, x: jax.Array) -> jax.Array:
        """Undoes `sorted_keys`."""
        return _unsorted(x[: self.key_length], self.key_order)


def over_heads(batch: int, heads: int, one_head):
    """Calls `one_head(b, n)` for all heads and returns the results as `[batch, heads, ...]`.

    A CPU takes them one by one, so that each visits its own tiles only. Elsewhere they run together, each loop as
    long as its longest, since a kernel launch costs more than a tile.
    """
    index = jnp.arange(batch * heads, dtype=jnp.int32)
    pair = lambda i: one_head(i // heads, i % heads)
    result = jax.lax.platform_dependent(
        index, cpu=lambda index: jax.lax.map(pair, index), default=lambda index: jax.vmap(pair)(index)
    )
    return jax.tree.map(lambda x: x.reshape(batch, heads, *x.shape[1:]), result)


def silenced(rows: jax.Array, keep: jax.Array | None) -> jax.Array:
    """Zeros in place of rows that take no part, whatever they hold: a weight of 0 does not silence a NaN."""
    return rows if keep is None else jnp.where(keep[..., None], rows, 0)


def _padded(x: jax.Array, block: int, fill) -> jax.Array:
    padding = -x.shape[0] % block
    return jnp.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1)), constant_values=fill)


def _tiles(x: jax.Array, block: int, fill) -> jax.Array:
    x = _padded(x, block, fill)
    return x.reshape(-1, block, *x.shape[1:])


def _unsorted(x: jax.Array, order: jax.Array | None) -> jax.Array:
    return x if order is None else jnp.zeros_like(x).at[order].set(x, unique_indices=True)
