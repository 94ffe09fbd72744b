"""The same tile loops in plain JAX, one head at a time: for CPUs, TPUs and GPUs without Triton.

Memory is linear in length, and only the tiles that the index touches are visited. The backward pass walks once,
by tiles of queries, and adds to the gradients of keys and values in place.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from scfa_jax import tiling
from scfa_jax.index import NEVER, SparseIndex
from scfa_jax.kernels import tile
from scfa_jax.partitioning import varying_as
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

    Returns:
        The output `[B, T, N, H]` and the natural log-sum-exp, float32 `[B, N, T]`.
    """
    batch, _, num_heads, _ = query.shape
    bounds = tiling.key_tile_bounds(index, block.block_q, block.block_k)
    group = num_heads // key.shape[2]
    sign, scale2 = tile.split_scale(scale)

    def one_head(b: jax.Array, n: jax.Array) -> tuple[jax.Array, jax.Array]:
        head = _Head.read(index, bounds, b, n, num_heads, block)
        queries = head.query_tiles(query[b, :, n] * jnp.asarray(sign, query.dtype))
        keys, values = (head.sorted_keys(x[b, :, n // group]) for x in (key, value))

        def one_tile(tile_inputs):
            rows, low, high, bounds = tile_inputs

            def visit(j, softmax, edge):
                mask, has_query = head.mask(j, low, high) if edge else (None, None)
                value_tile = silenced(head.key_tile(values, j), has_query)
                return tile.add_keys(softmax, rows, head.key_tile(keys, j), value_tile, mask, scale2, dot)

            softmax = tile.walk(tuple(bounds), visit, tile.empty_softmax(*rows.shape))
            return tile.finish(softmax, scale2)

        output, logsumexp = jax.lax.map(one_tile, (queries, head.low, head.high, head.bounds))
        return head.original_queries(output).astype(output_dtype), head.original_queries(logsumexp)

    output, logsumexp = over_heads(batch, num_heads, one_head)
    return output.swapaxes(1, 2), logsumexp


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
    block: Tile,
    dot: tile.Dot,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of the forward pass; arguments and results as `triton_backward.backward` has them."""
    batch, _, num_heads, _ = query.shape
    key_heads = key.shape[2]
    group = num_heads // key_heads
    bounds = tiling.key_tile_bounds(index, block.block_q, block.block_k)

    def one_query_head(b: jax.Array, n: jax.Array, keys_gradient):
        head = _Head.read(index, bounds, b, n, num_heads, block)
        lse = head.query_vector(logsumexp[b, n], -jnp.inf)
        has_key = lse != -jnp.inf
        queries, outputs, cotangents = (
            silenced(head.query_tiles(x[b, :, n]), has_key) for x in (query, output, output_gradient)
        )
        lse_cotangents = head.query_vector(logsumexp_gradient[b, n], 0)
        deltas = jnp.where(has_key, tile.delta(outputs, cotangents, lse_cotangents), 0.0)
        keys, values = (head.sorted_keys(x[b, :, n // group]) for x in (key, value))

        def one_tile(keys_gradient, tile_inputs):
            rows, cotangent, lse, delta, low, high, bounds = tile_inputs

            def visit(j, carry, edge):
                dq, dk, dv = carry
                mask, has_query = head.mask(j, low, high) if edge else (None, None)
                key_tile, value_tile = (silenced(head.key_tile(x, j), has_query) for x in (keys, values))
                weights, score_gradient = tile.weights_and_score_gradient(
                    dot(rows, key_tile.T),
                    dot(cotangent, value_tile.T),
                    lse[:, None],
                    delta[:, None],
                    mask,
                    scale * tile.LOG2_E,
                )
                weights, score_gradient = (x.astype(rows.dtype) for x in (weights, score_gradient))
                dq += dot(score_gradient, key_tile)
                return (
                    dq,
                    head.add(dk, j, dot(score_gradient.T, rows)),
                    head.add(dv, j, dot(weights.T, cotangent)),
                )

            dq = jnp.zeros(rows.shape, jnp.float32)
            dq, *keys_gradient = tile.walk(tuple(bounds), visit, (dq, *keys_gradient))
            return tuple(keys_gradient), dq * scale

        inputs = (
            queries,
            cotangents,
            jnp.where(has_key, lse, jnp.inf),
            deltas,
            head.low,
            head.high,
            head.bounds,
        )
        keys_gradient, dq = jax.lax.scan(one_tile, keys_gradient, inputs)
        return keys_gradient, head.original_queries(dq).astype(query.dtype)

    def one_key_head(b: jax.Array, k: jax.Array):
        length = tiling.num_tiles(key.shape[1], block.block_k) * block.block_k
        zeros = jnp.zeros((length, key.shape[3]), jnp.float32)
        (dk, dv), dq = jax.lax.scan(
            lambda carry, g: one_query_head(b, k * group + g, carry),
            varying_as(key, (zeros, zeros)),
            jnp.arange(group, dtype=jnp.int32),
        )
        head = _Head.read(index, bounds, b, k * group, num_heads, block)
        return (
            dq,
            head.original_keys(dk * scale).astype(key.dtype),
            head.original_keys(dv).astype(value.dtype),
        )

    dq, dk, dv = over_heads(batch, key_heads, one_key_head)
    dq = dq.reshape(batch, num_heads, *dq.shape[3:])
    return dq.swapaxes(1, 2), dk.swapaxes(1, 2), dv.swapaxes(1, 2)


@dataclass(frozen=True)
class _Head:
    """The pattern of one query head, cut into tiles and padded to whole ones.

    Attributes:
        key_order: int32 `[S]` or None.
        code: int32 `[padded S]`.
        query_order: int32 `[T]` or None.
        low: int32 `[query tiles, block_q]`.
        high: int32 `[query tiles, block_q]`.
        bounds: int32 `[query tiles, 4]`.
        query_length: `T`.
        key_length: `S`.
        block: Tile sizes.
    """

    key_order: jax.Array | None
    code: jax.Array
    query_order: jax.Array | None
    low: jax.Array
    high: jax.Array
    bounds: jax.Array
    query_length: int
    key_length: int
    block: Tile

    @classmethod
    def read(cls, index: SparseIndex, bounds, b, n, num_heads: int, block: Tile) -> _Head:
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
            query_length=index.query_length,
            key_length=index.key_length,
            block=block,
        )

    def query_tiles(self, x: jax.Array) -> jax.Array:
        """Sorts the rows of `[T, ...]` and cuts them into tiles, with zeros past the end."""
        return _tiles(x if self.query_order is None else x[self.query_order], self.block.block_q, 0)

    def query_vector(self, x: jax.Array, fill: float) -> jax.Array:
        """Sorts `[T]` and cuts it into tiles, with `fill` past the end."""
        return _tiles(x if self.query_order is None else x[self.query_order], self.block.block_q, fill)

    def sorted_keys(self, x: jax.Array) -> jax.Array:
        """Sorts the rows of `[S, H]` and pads them with zeros."""
        return _padded(x if self.key_order is None else x[self.key_order], self.block.block_k, 0)

    def key_tile(self, x: jax.Array, j: jax.Array) -> jax.Array:
        """The rows of tile `j`."""
        return jax.lax.dynamic_slice_in_dim(x, j * self.block.block_k, self.block.block_k)

    def add(self, x: jax.Array, j: jax.Array, rows: jax.Array) -> jax.Array:
        """Adds to the rows of tile `j`."""
        return jax.lax.dynamic_update_slice_in_dim(x, self.key_tile(x, j) + rows, j * self.block.block_k, 0)

    def mask(self, j: jax.Array, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The allowed pairs of a tile, and which of its keys have any."""
        code = self.key_tile(self.code, j)
        mask = (code[None, :] >= low[:, None]) & (code[None, :] <= high[:, None])
        return mask, mask.any(axis=0)

    def original_queries(self, tiles: jax.Array) -> jax.Array:
        """Undoes `query_tiles`."""
        return _unsorted(tiles.reshape(-1, *tiles.shape[2:])[: self.query_length], self.query_order)

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
