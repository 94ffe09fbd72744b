"""The default tiles fit the GPU that they are for, and the table is one that the kernels can use."""

import jax.numpy as jnp
import pytest

from benchmarks import tune
from scfa_jax import BlockSizes
from scfa_jax.backends.triton import tile_sizes
from scfa_jax.backends.triton.tile_sizes import TritonTile
from scfa_jax.backends.triton.tile_table import TABLE

H100, CONSUMER = "NVIDIA H100 80GB HBM3", "NVIDIA RTX 4090"


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
        blocks = tile_sizes.tuned(head_dim, dtype, density, device)
        row = (1 << (head_dim - 1).bit_length()) * jnp.dtype(dtype).itemsize
        assert max(bytes_needed(blocks, row)) <= tile_sizes.shared_memory(device)


def test_a_smaller_device_gets_smaller_tiles_only_where_it_must():
    large, small = (tile_sizes.tuned(256, jnp.bfloat16, 1.0, m) for m in (H100, CONSUMER))
    assert max(bytes_needed(large, 512)) > tile_sizes.shared_memory(CONSUMER) >= max(bytes_needed(small, 512))
    narrow = [tile_sizes.tuned(16, jnp.bfloat16, 0.05, m) for m in (H100, CONSUMER)]
    assert narrow[0] == narrow[1]


def test_devices_are_told_apart_by_name():
    assert tile_sizes.shared_memory(H100) == 232448
    assert tile_sizes.shared_memory("NVIDIA A100-SXM4-80GB") == 166912
    assert {tile_sizes.shared_memory(name) for name in (CONSUMER, "", "NVIDIA RTX A3000")} == {101376}


def test_a_device_has_the_tiles_of_its_own_search_and_another_those_of_the_h100(monkeypatch):
    tiles = lambda device, head_dim=64: tile_sizes.tuned(head_dim, jnp.bfloat16, 1.0, device)
    h100 = tiles(H100)
    own = ((16, 32, 4, 2),) * 3
    monkeypatch.setitem(TABLE, "NVIDIA H200", {(64, 2, "dense"): own, (64, 2, "blocks"): own})
    assert tiles("NVIDIA H200") == BlockSizes(*(TritonTile(*tile) for tile in own))
    assert tiles("NVIDIA H200", 128) == tiles(H100, 128)
    assert tiles("NVIDIA H20") == tiles(H100) == h100
    in_slots = lambda head_dim: tile_sizes.tuned(head_dim, jnp.bfloat16, 0.05, H100, in_slots=True)
    assert in_slots(64) == tiles("NVIDIA H200")
    assert in_slots(32) == tile_sizes.tuned(32, jnp.bfloat16, 0.05, H100)


def test_the_table_holds_tiles():
    for device in TABLE.values():
        for (width, itemsize, density), tiles in device.items():
            assert width in (16, 32, 64, 128, 256)
            assert itemsize in (2, 4)
            assert density in ("blocks", "dense", "middling", "sparse")
            assert len([TritonTile(*t) for t in tiles]) == 3


def test_the_search_writes_the_table_as_it_is():
    assert tune.source(TABLE) == tune.TABLE.read_text()
