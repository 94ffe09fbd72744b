"""The tiles of the Triton kernels, by device, head size, dtype and density, as far as the GPU has room."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp

from scfa_jax._bounds import next_power_of_two
from scfa_jax.backends.protocol import BlockSizes, Call, TileShape
from scfa_jax.backends.triton import _compat
from scfa_jax.backends.triton.tile_table import TABLE
from scfa_jax.index import SparseIndex


@dataclass(frozen=True)
class TritonTile(TileShape):
    """A tile, and how the GPU runs the program that computes it.

    Attributes:
        num_warps: Warps that work on one program: a power of two.
        num_stages: Depth of the software pipeline over tiles.

    Raises:
        ValueError: A size is no power of two, or a side below 16.

    Examples:
        >>> from scfa_jax.backends.triton.tile_sizes import TritonTile
        >>> TritonTile(block_q=128, block_k=64, num_warps=8)
        TritonTile(block_q=128, block_k=64, num_warps=8, num_stages=3)
    """

    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self):
        super().__post_init__()
        if self.num_warps < 1 or self.num_warps & (self.num_warps - 1):
            raise ValueError(f"num_warps must be a power of two, got {self.num_warps}.")

    def fit(self, query_length: int, key_length: int) -> TritonTile:
        fitted = super().fit(query_length, key_length)
        assert isinstance(fitted, TritonTile)
        # A tile of one sequence's leftovers has too little work for many warps.
        return fitted if fitted == self else dataclasses.replace(fitted, num_warps=min(4, self.num_warps))


# Whose tiles a device gets that was not searched on, as far as they fit it; the second has what the first lacks.
_SEARCHED = ("NVIDIA H100 80GB HBM3", "NVIDIA H200")
# Tiles that lower for every head size and dtype, for what the table lacks.
_SAFE = TritonTile(64, 64, num_warps=4, num_stages=2)

# Bytes of shared memory that one program may ask for, by what the device's name holds.
_SHARED_MEMORY = {
    "H100": 232448,
    "H200": 232448,
    "H20": 232448,
    "B100": 232448,
    "B200": 232448,
    "A100": 166912,
    "A30": 166912,
}
_LEAST_SHARED_MEMORY = 101376  # consumer cards since Ampere


def for_call(call: Call, index: SparseIndex) -> tuple[TritonTile, TritonTile, TritonTile]:
    """The tiles of the forward pass, of dq, and of dk with dv: those asked for, or else tuned ones."""
    blocks = call.block_sizes
    if blocks is None:
        head_dim = max(call.head_dim, call.value_dim)
        blocks = tuned(head_dim, call.dtype, index.density, _compat.gpu_kind(), in_slots=index.slots > 1)
        blocks = blocks.fit(index.low.shape[2], index.key_length)
    forward, dq, dkv = (
        tile if isinstance(tile, TritonTile) else TritonTile(tile.block_q, tile.block_k)
        for tile in (blocks.forward, blocks.dq, blocks.dkv)
    )
    return forward, dq, dkv


def density_class(density: float) -> str:
    """The name that the table has for a share of allowed pairs."""
    return "dense" if density > 0.5 else "middling" if density > 0.125 else "sparse"


def shared_memory(device_kind: str) -> int:
    """Bytes of shared memory that one program may ask for; an unknown device gets the least that is common."""
    words = device_kind.replace("-", " ").split()
    return next((size for name, size in _SHARED_MEMORY.items() if name in words), _LEAST_SHARED_MEMORY)


def tuned(head_dim: int, dtype, density: float, device_kind: str, *, in_slots: bool = False) -> BlockSizes:
    """Returns tiles that fit the device.

    Args:
        head_dim: Width of a head, the larger of those of keys and values.
        dtype: dtype of query, key and value.
        density: Share of causal pairs that are allowed, roughly.
        device_kind: The GPU's name, as JAX tells it; empty if it is not known.
        in_slots: Whether queries have several slots each, which attend to a block of keys that others attend to too.
    """
    width, itemsize = max(16, next_power_of_two(head_dim)), jnp.dtype(dtype).itemsize
    memory, devices = shared_memory(device_kind), (device_kind, *_SEARCHED)
    classes = ("blocks", density_class(density)) if in_slots else (density_class(density),)
    found = (TABLE.get(device, {}).get((width, itemsize, name)) for name in classes for device in devices)
    tiles = next(filter(None, found), None)
    forward, dq, dkv = (TritonTile(*tile) for tile in tiles) if tiles else (_SAFE,) * 3

    def needs(resident: str, copies: int) -> Callable[[TritonTile], int]:
        """Most shared memory that a program asks for: rows that stay, rows in the pipeline, one tile of weights."""
        passing = "block_k" if resident == "block_q" else "block_q"

        def of(tile: TritonTile) -> int:
            # float32 rows that stay are kept twice, taken apart for the three TF32 products.
            stay = copies * getattr(tile, resident) * (2 if itemsize == 4 else 1)
            rows = stay + tile.num_stages * 2 * getattr(tile, passing)
            return rows * width * itemsize + tile.block_q * tile.block_k * itemsize

        return of

    return BlockSizes(
        forward=_fit(forward, needs("block_q", 1), memory),
        dq=_fit(dq, needs("block_q", 2), memory),
        dkv=_fit(dkv, needs("block_k", 2), memory),
    )


def _fit(tile: TritonTile, needs: Callable[[TritonTile], int], limit: int) -> TritonTile:
    """Takes stages away, then halves the longer side, until the tile fits."""
    while needs(tile) > limit:
        if tile.num_stages > 1:
            tile = dataclasses.replace(tile, num_stages=tile.num_stages - 1)
        elif max(tile.block_q, tile.block_k) > 16:
            longer = "block_q" if tile.block_q >= tile.block_k else "block_k"
            tile = dataclasses.replace(tile, **{longer: getattr(tile, longer) // 2})
        else:
            break
    return tile
