"""What the three Triton kernels share: reading rows through an order, and finding an index entry."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


class Rows:
    """One tile of rows of a sequence, which may be cut short by the sequence's end or read through an order.

    Attributes:
        sorted: Slice of the rows in sorted order, for codes, ranges and the like.
        original: int32 `[block]`, the rows in the original arrays; read from `order_ref` unless its entry is None.
        valid: bool `[block]`, False past the end, or None where the tile is known to be whole.
    """

    def __init__(
        self, tile: jax.Array, block: int, length: int, order_ref, entry: jax.Array | None, is_whole: bool = False
    ):
        self.sorted = pl.ds(tile * block, block)
        self._rows = rows = tile * block + jnp.arange(block, dtype=jnp.int32)
        self.valid = None if is_whole or length % block == 0 else rows < length
        # Rows past the end stay out of bounds, so that not even a masked store can touch a real one.
        self.original = rows if entry is None else self.load_vector(order_ref, entry, other=length)

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
        at = self._at(ref, head)
        return plgpu.load(at) if mask is None else plgpu.load(at, mask=mask, other=0.0)

    def store(self, ref, head: jax.Array, head_dim: int, x: jax.Array) -> None:
        """Stores `[block, padded H]` to `ref[:, head]`."""
        plgpu.store(self._at(ref, head), x.astype(ref.dtype), mask=self._mask(ref, head_dim, self.valid))

    def store_vector(self, ref, head: jax.Array, x: jax.Array) -> None:
        """Stores `[block]` to `ref[head]`, which is in sorted order."""
        plgpu.store(ref.at[head, self._rows], x, mask=self.valid)

    def store_original_vector(self, ref, head: jax.Array, x: jax.Array) -> None:
        """Stores `[block]` to `ref[head]`, which is in original order."""
        plgpu.store(ref.at[head, self.original], x, mask=self.valid)

    def _load_vector(self, at, other) -> jax.Array:
        return plgpu.load(at) if self.valid is None else plgpu.load(at, mask=self.valid, other=other)

    def _at(self, ref, head: jax.Array):
        # All integers, never a slice: the interpreter takes no mixture, and no constant slice under x64.
        return ref.at[self.original[:, None], head, jnp.arange(ref.shape[-1], dtype=jnp.int32)[None, :]]

    def _mask(self, ref, head_dim: int, keep: jax.Array | None) -> jax.Array | None:
        width = ref.shape[-1]
        columns = None if width == head_dim else (jnp.arange(width, dtype=jnp.int32) < head_dim)[None, :]
        if keep is None:
            return columns
        return keep[:, None] if columns is None else keep[:, None] & columns


def load_bounds(bounds_ref, head: jax.Array, tile: jax.Array) -> tuple[jax.Array, ...]:
    """The four int32 bounds of a tile, as from `tiling.key_tile_bounds`."""
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
