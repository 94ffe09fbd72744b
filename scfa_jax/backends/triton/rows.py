"""What the Triton kernels share: rows read through an order, and a tile of queries on its walk over tiles of keys."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from scfa_jax._bounds import NEVER, next_power_of_two, num_tiles
from scfa_jax.backends.tile import Stretch, pair_mask
from scfa_jax.backends.triton import _compat

_ROWS_PER_PROGRAM = 512  # of kernels that search


class Rows:
    """One tile of rows of a sequence, which may be cut short by the sequence's end or read through an order.

    Attributes:
        sorted: Slice of the rows in sorted order, for codes, ranges and the like.
        original: int32 `[block]`, the rows in the original arrays; read from `order_ref` unless its entry is None.
        slot: int32 `[block]`, the same, but for rows that have several slots, whose number in all this is.
        valid: bool `[block]`, False past the end, or None where the tile is known to be whole.
    """

    def __init__(
        self,
        tile: jax.Array,
        block: int,
        length: int,
        order_ref,
        entry: jax.Array | None,
        is_whole: bool = False,
        slots: int = 1,
    ):
        self.sorted = pl.ds(tile * block, block)
        self._rows = rows = tile * block + jnp.arange(block, dtype=jnp.int32)
        self.valid = None if is_whole or length % block == 0 else rows < length
        # Rows past the end stay out of bounds, so that not even a masked store can touch a real one.
        self.slot = rows if entry is None else self.load_vector(order_ref, entry, other=length)
        self.original = self.slot if slots == 1 else jax.lax.div(self.slot, np.int32(slots))

    def load_vector(self, ref, head: jax.Array, other) -> jax.Array:
        """Loads `[block]` of `ref[head]`, which is in sorted order, with `other` past the end."""
        return self._load_vector(ref.at[head, self.sorted], other)

    def load_original_vector(self, ref, head: jax.Array, other) -> jax.Array:
        """Loads `[block]` of `ref[head]`, which is in original order, with `other` past the end."""
        return self._load_vector(ref.at[head, self.original], other)

    def load(self, ref, head: jax.Array, head_dim: int, where: jax.Array | None = None) -> jax.Array:
        """Loads `[block, padded H]` of `ref[:, head]`, with 0 past the ends and in rows where `where` is False."""
        keep = self.valid if where is None else where if self.valid is None else where & self.valid
        mask = self._mask(ref, head_dim, keep)
        at = self._at(ref, head, self.original)
        return plgpu.load(at) if mask is None else plgpu.load(at, mask=mask, other=0.0)

    def store(self, ref, head: jax.Array, head_dim: int, x: jax.Array) -> None:
        """Stores `[block, padded H]` to `ref[:, head]`, which has a row for each slot."""
        at = self._at(ref, head, self.slot)
        plgpu.store(at, x.astype(ref.dtype), mask=self._mask(ref, head_dim, self.valid))

    def store_vector(self, ref, head: jax.Array, x: jax.Array) -> None:
        """Stores `[block]` to `ref[head]`, which is in sorted order."""
        plgpu.store(ref.at[head, self._rows], x, mask=self.valid)

    def store_slot_vector(self, ref, head: jax.Array, x: jax.Array) -> None:
        """Stores `[block]` to `ref[head]`, which has the slots in original order."""
        plgpu.store(ref.at[head, self.slot], x, mask=self.valid)

    def _load_vector(self, at, other) -> jax.Array:
        return plgpu.load(at) if self.valid is None else plgpu.load(at, mask=self.valid, other=other)

    def _at(self, ref, head: jax.Array, rows: jax.Array):
        # All integers, never a slice: the interpreter takes no mixture, and no constant slice under x64.
        return ref.at[rows[:, None], head, jnp.arange(ref.shape[-1], dtype=jnp.int32)[None, :]]

    def _mask(self, ref, head_dim: int, keep: jax.Array | None) -> jax.Array | None:
        width = ref.shape[-1]
        columns = None if width == head_dim else (jnp.arange(width, dtype=jnp.int32) < head_dim)[None, :]
        if keep is None:
            return columns
        return keep[:, None] if columns is None else keep[:, None] & columns


class IndexRefs(NamedTuple):
    """What kernels read of an index; an order is None where it is the identity."""

    low: Any  # int32 [N or fewer, T * slots]
    high: Any
    code: Any  # int32 [K or fewer, S], of `marks.marked_codes`
    query_order: Any
    key_order: Any


class QueryTile:
    """The queries of one program, and how they meet tiles of keys: what the forward pass and dq have in common.

    Attributes:
        head: Number of the query head.
        key_head: Number of the key head that it reads.
        rows: The queries.
        low: int32 `[block_q]`, their first codes.
        high: int32 `[block_q]`, their last codes.
        bounds: Of the walk over tiles of keys.
    """

    def __init__(self, index: IndexRefs, slots: int, bounds_ref, query_ref, key_ref, block_q: int, block_k: int):
        # The last tiles see the most keys where ranges are causal: start with them.
        tile, self.head = pl.num_programs(0) - 1 - pl.program_id(0), pl.program_id(1)
        (_, num_heads, _), (self._key_length, key_heads, _) = query_ref.shape, key_ref.shape
        entry = functools.partial(shared_entry, self.head, num_heads)
        self.key_head = entry(key_heads)
        self._index, self._block_k = index, block_k
        self._on_key, on_query = entry(index.code.shape[0]), entry(index.low.shape[0])
        self._on_key_order = order_entry(index.key_order, self.head, num_heads)
        on_query_order = order_entry(index.query_order, self.head, num_heads)
        self.rows = Rows(tile, block_q, index.low.shape[1], index.query_order, on_query_order, slots=slots)
        self.low = self.rows.load_vector(index.low, on_query, other=NEVER)
        self.high = self.rows.load_vector(index.high, on_query, other=-1)
        self.bounds = load_bounds(bounds_ref, entry(bounds_ref.shape[0]), tile)

    def keys(self, tile: jax.Array, stretch: Stretch) -> tuple[Rows, jax.Array | None, jax.Array | None]:
        """The rows of a tile of keys, the mask of its pairs, and which of its keys any query attends to.

        The latter two are None where they are all True.
        """
        is_whole = stretch == "full"
        rows = Rows(tile, self._block_k, self._key_length, self._index.key_order, self._on_key_order, is_whole)
        if is_whole:
            return rows, None, None
        code = rows.load_vector(self._index.code, self._on_key, other=NEVER)
        mask = pair_mask(self.low[:, None], code[None, :], self.high[:, None], stretch, walks="keys")
        return rows, mask, code != NEVER


def load_bounds(bounds_ref, head: jax.Array, tile: jax.Array) -> tuple[jax.Array, ...]:
    """The four int32 bounds of a tile, as from `_bounds.key_tile_bounds`."""
    return tuple(plgpu.load(bounds_ref.at[head, tile, np.int32(i)]) for i in range(4))


def order_entry(order_ref, head: jax.Array, num_heads: int) -> jax.Array | None:
    """The entry of an order that serves this head, or None where the order is the identity."""
    return None if order_ref is None else shared_entry(head, num_heads, order_ref.shape[0])


def shared_entry(head: jax.Array, num_heads: int, num_entries: int) -> jax.Array:
    """The entry of an index that serves this head: consecutive heads share one."""
    return jax.lax.div(head, jnp.int32(num_heads // num_entries))


def batch_spec(shape: tuple[int, ...], batch: int, grid_axis: int) -> pl.BlockSpec:
    """Gives a program the whole of its batch element; an axis of 1 is shared by all."""
    rest = (0,) * (len(shape) - 1)

    def index_map(*program):
        return (program[grid_axis] if shape[0] == batch else 0, *rest)

    return pl.BlockSpec((None, *shape[1:]), index_map)


def padded_head_spec(shape: tuple[int, ...], grid_axis: int) -> pl.BlockSpec:
    """Gives a program all rows and heads of its batch element, with columns up to a power of two."""
    block = (None, *shape[1:-1], pl.next_power_of_2(shape[-1]))
    return pl.BlockSpec(block, lambda *program: (program[grid_axis], 0, 0, 0))


def row_call(kernel, operands, results, interpret: bool, name: str):
    """Runs a kernel with a program for every few rows of the results, `[B, N, L]` all."""
    batch, heads, length = results[0].shape
    block = min(_ROWS_PER_PROGRAM, max(16, next_power_of_two(length)))
    return _compat.triton_call(
        functools.partial(kernel, block=block),
        num_warps=4,
        num_stages=3,
        interpret=interpret,
        grid=(num_tiles(length, block), heads, batch),
        in_specs=[batch_spec(x.shape, batch, 2) for x in operands],
        out_specs=[batch_spec(x.shape, batch, 2) for x in results],
        out_shape=results,
        name=name,
    )(*operands)
