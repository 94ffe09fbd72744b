"""The default tiles fit the GPU that they are for, and the table is one that the kernels can use."""

import jax.numpy as jnp
import pytest

from scfa_jax import block_sizes
from scfa_jax.block_table import TABLE
from scfa_jax.tiling import Tile

H100, CONSUMER = block_sizes.shared_memory("NVIDIA H100 80GB HBM3"), block_sizes.shared_memory("NVIDIA RTX 4090")


def bytes_needed(blocks, row: int) -> list[int]:
    """Rows that a program holds and rows in its pipeline, in bytes."""
    forward, dq, dkv = blocks.forward, blocks.dq, blocks.dkv
    return [
        row * (forward.block_q + 2 * forward.num_stages * forward.block_k),
        row * (2 * dq.block_q + 2 * dq.num_stages * dq.block_k),
        row * (2 * dkv.block_k + 2 * dkv.num_stages * dkv.block_q),
    ]


@pytest.mark.parametrize("device", [H100, CONSUMER])
@pytest.mark.parametrize("density", [1.0, 0.25, 0.05])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_default_tiles_fit_into_shared_memory(dtype, density, device):
    for head_dim in range(16, 257, 8):
        blocks = block_sizes.triton_block_sizes(head_dim, dtype, density, device)
        row = (1 << (head_dim - 1).bit_length()) * jnp.dtype(dtype).itemsize
        assert max(bytes_needed(blocks, row)) <= device


def test_a_smaller_device_gets_smaller_tiles_only_where_it_must():
    large, small = (block_sizes.triton_block_sizes(256, jnp.bfloat16, 1.0, m) for m in (H100, CONSUMER))
    assert max(bytes_needed(large, 512)) > CONSUMER >= max(bytes_needed(small, 512))
    narrow = [block_sizes.triton_block_sizes(16, jnp.bfloat16, 0.05, m) for m in (H100, CONSUMER)]
    assert narrow[0] == narrow[1]


def test_devices_are_told_apart_by_name():
    assert H100 == 232448
    assert block_sizes.shared_memory("NVIDIA A100-SXM4-80GB") == 166912
    assert CONSUMER == block_sizes.shared_memory("") == block_sizes.shared_memory("NVIDIA RTX A3000") == 101376


def test_the_table_holds_tiles():
    for (width, itemsize, density), tiles in TABLE.items():
        assert width in (16, 32, 64, 128, 256)
        assert itemsize in (2, 4)
        assert density in ("dense", "middling", "sparse")
        assert len([Tile(*t) for t in tiles]) == 3
