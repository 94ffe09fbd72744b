"""The default tiles of each implementation, by device, head size, dtype and density, as far as the GPU has room."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from scfa_jax.block_table import TABLE
from scfa_jax.tiling import BlockSizes, Tile, next_power_of_two

# Whose tiles a device gets that was not searched on, as far as they fit it.
_SEARCHED = "NVIDIA H100 80GB HBM3"
# Tiles that lower for every head size and dtype, for what the table lacks.
_SAFE = Tile(64, 64, num_warps=4, num_stages=2)

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


def density_class(density: float) -> str:
    """The name that the table has for a share of allowed pairs."""
    return "dense" if density > 0.5 else "middling" if density > 0.125 else "sparse"


def shared_memory(device_kind: str) -> int:
    """Bytes of shared memory that one program may ask for; an unknown device gets the least that is common."""
    words = device_kind.replace("-", " ").split()
    return next((size for name, size in _SHARED_MEMORY.items() if name in words), _LEAST_SHARED_MEMORY)


def triton_block_sizes(head_dim: int, dtype, density: float, device_kind: str) -> BlockSizes:
    """Returns tiles for the Triton kernels that fit the device.

    Args:
        head_dim: Width `H` of a head.
        dtype: dtype of query, key and value.
        density: Share of causal pairs that are allowed, roughly.
        device_kind: The GPU's name, as JAX tells it; empty if it is not known.
    """
    width, itemsize = max(16, next_power_of_two(head_dim)), jnp.dtype(dtype).itemsize
    key, memory = (width, itemsize, density_class(density)), shared_memory(device_kind)
    tiles = TABLE.get(device_kind, {}).get(key) or TABLE[_SEARCHED].get(key)
    blocks = BlockSizes(*(Tile(*t) for t in tiles)) if tiles else BlockSizes(_SAFE, _SAFE, _SAFE)
    row = width * itemsize
    return BlockSizes(
        forward=_fit(
            blocks.forward, lambda t: _bytes(t, row, itemsize, resident=t.block_q, passing=2 * t.block_k), memory
        ),
        dq=_fit(blocks.dq, lambda t: _bytes(t, row, itemsize, resident=2 * t.block_q, passing=2 * t.block_k), memory),
        dkv=_fit(blocks.dkv, lambda t: _bytes(t, row, itemsize, resident=2 * t.block_k, passing=2 * t.block_q), memory),
    )


def xla_block_sizes() -> BlockSizes:
    """Returns tiles for the plain JAX loops: large enough that a tile outweighs a loop's step on a CPU."""
    tile = Tile(128, 128)
    return BlockSizes(tile, tile, tile)


def _bytes(tile: Tile, row: int, itemsize: int, *, resident: int, passing: int) -> int:
    """Most shared memory that a program needs: rows that stay, rows in the pipeline, and one tile of weights.

    float32 rows that stay are kept twice, taken apart for the three TF32 products.
    """
    resident *= 2 if itemsize == 4 else 1
    return row * (resident + tile.num_stages * passing) + tile.block_q * tile.block_k * itemsize


def _fit(tile: Tile, needs, limit: int) -> Tile:
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
