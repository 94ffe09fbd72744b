"""Blocks of keys that queries choose."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from scfa_jax import _checks, _options, _partitioning, _positions
from scfa_jax.backends import ordering
from scfa_jax.backends.ordering import iota
from scfa_jax.index import NEVER, SparseIndex

if TYPE_CHECKING:
    from jaxtyping import Array, Int


@_options.documented
def block_index(
    blocks: Int[Array | np.ndarray, "*#B #T #N k"],
    block_size: int,
    *,
    num_local: int = 1,
    query_length: int | None = None,
    key_length: int | None = None,
    **options: Unpack[_options.PositionOptions],
) -> SparseIndex:
    """Every query attends to the blocks of keys that it chose, and to the last ones up to its own position.

    Block `i` holds the keys at positions `i * block_size` to `(i + 1) * block_size - 1`. A query sees no key after its
    own position, whatever it chose. Sources: Lu et al. 2025, "MoBA: Mixture of Block Attention for Long-Context LLMs";
    Yuan et al. 2025, "Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention".

    Args:
        blocks: int32, the blocks that each query chose, in any order; any number that names no block, as -1, means
            none. A block that is named twice, or is one of the local ones, counts once. `B`, `T` and `N` may be 1, and
            `N` a number of heads that divides that of the queries: consecutive heads then share a choice.
        block_size: Static number of keys in a block.
        num_local: Static number of blocks that a query sees unasked, the one that holds its own position among them.
        query_length: `T`, where that axis of `blocks` is 1.
        key_length: Number of keys `S`; `T` if None.
        **options: Positions and implementation.

    Returns:
        The index, with a slot for each block: those chosen, then the local ones. Within segments a query attends to
        the keys of a block that are of its own segment; where ids ascend, those of an earlier block are of the block's
        last segment, or there are none.

    Raises:
        TypeError: `blocks`, offsets or segment ids are not int32, or a size is no static int.
        ValueError: Shapes do not fit each other, a size is below its least, or the lengths differ and there is no
            `query_offset`.

    Examples:
        >>> import numpy as np, scfa_jax
        >>> blocks = np.array([-1, -1, -1, -1, 0, -1], np.int32).reshape(6, 1, 1)  # of the fifth query: the first
        >>> index = scfa_jax.block_index(blocks, block_size=2)
        >>> index.mask()[0, 0].astype(int).tolist()[4:]
        [[1, 1, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1]]
    """
    _checks.integers("blocks", blocks)
    if blocks.ndim not in (3, 4):
        raise ValueError(f"blocks must be [B, T, N, k] or [T, N, k], got shape {blocks.shape}.")
    _checks.static_int("block_size", block_size, least=1, most=_checks.LARGEST)
    _checks.static_int("num_local", num_local, least=1)
    chosen = jnp.asarray(blocks, jnp.int32)
    chosen = (chosen[None] if chosen.ndim == 3 else chosen).swapaxes(1, 2)  # [B, N, T, k]
    if query_length is not None and chosen.shape[2] not in (1, query_length):
        raise ValueError(f"blocks must have {query_length} rows or 1, got shape {blocks.shape}.")
    query_length = chosen.shape[2] if query_length is None else query_length
    key_length = query_length if key_length is None else key_length
    offset = _positions.resolved_offset(options.get("query_offset"), query_length, key_length)
    position = _positions.first_position(offset) + iota(query_length)[None, None]  # [B or 1, 1, T]
    _checks.batches(blocks=chosen, query_offset=position)
    own = jnp.floor_divide(position, np.int32(block_size))
    # Split, since types of an explicit mesh let nothing be concatenated that is sharded in two ways.
    each_once = lambda chosen, own: (_each_once(chosen, own, num_local),)
    (block,) = _partitioning.split(each_once, ["bh..", "b.."], ["bh.."])(chosen, own)
    last = jnp.broadcast_to(jnp.minimum(position, key_length - 1)[..., None], block.shape)
    segment_ids = options.get("query_segment_ids"), options.get("key_segment_ids")
    implementation = options.get("implementation")
    if all(ids is None for ids in segment_ids):
        index = _in_order(block, last, block_size, key_length, implementation)
    else:
        index = _within_segments(block, last, block_size, key_length, segment_ids, implementation)
    # The query at its own position attends to every key.
    is_aligned = query_length == key_length and _positions.starts_at_zero(offset)
    # What tiles are chosen by is the share of one slot, since tiles hold slots.
    density = min(1.0, 2 * block_size / max(key_length, 1))
    return dataclasses.replace(index, all_met=is_aligned and segment_ids[1] is None, density=density)


def _each_once(chosen: jax.Array, own: jax.Array, num_local: int) -> jax.Array:
    """The blocks of every slot, int32 `[B, N, T, slots]`, each at most once and none after the own one; -1 for none."""
    slot = iota(chosen.shape[-1])
    earlier = (slot[None, :] < slot[:, None])[None, None, None]
    is_again = jnp.any((chosen[..., :, None] == chosen[..., None, :]) & earlier, axis=-1)
    is_earlier = (chosen >= 0) & (chosen <= own[..., None] - num_local)
    chosen = jnp.where(is_earlier & ~is_again, chosen, -1)
    local = own[..., None] - iota(num_local)[None, None, None]
    shape = np.broadcast_shapes(chosen.shape[:-1], local.shape[:-1])
    parts = [jnp.broadcast_to(x, (*shape, x.shape[-1])) for x in (chosen, jnp.maximum(local, -1))]
    return jnp.concatenate(parts, axis=-1)


def _in_order(block: jax.Array, last: jax.Array, block_size: int, key_length: int, implementation) -> SparseIndex:
    """Slots sorted by block: among those of a block, ranges of later rows end later, since the own block is local."""
    batch, heads, rows, slots = block.shape
    num_blocks = -(-key_length // block_size)
    bucket = jnp.where((block < 0) | (block >= num_blocks), num_blocks, block).reshape(batch, heads, rows * slots)
    if (num_blocks + 1) * rows * slots < 2**31:
        (codes,) = ordering.sorted_codes(bucket, num_buckets=num_blocks + 1, implementation=implementation)
        bucket, order = ordering.divided(codes, rows * slots)
    else:
        ((bucket, order),) = ordering.sorted_ids(bucket)
    first, row_last = bucket * block_size, ordering.take(last[..., 0], jax.lax.div(order, np.int32(slots)))
    is_block = bucket < num_blocks
    return SparseIndex(
        key_order=None,
        key_code=iota(key_length)[None, None],
        query_order=order,
        low=jnp.where(is_block, first, NEVER),
        high=jnp.where(is_block, jnp.minimum(first + (block_size - 1), row_last), key_length - 1),
        slots=slots,
    )


def _within_segments(
    block: jax.Array, last: jax.Array, block_size: int, key_length: int, segment_ids: tuple[Any, Any], implementation
) -> SparseIndex:
    """Slots sorted by the places of their ranges, in a line by (segment, position)."""
    batch, heads, rows, slots = block.shape
    start = jnp.where(block < 0, key_length, block * block_size)
    stop = jnp.minimum(start + block_size, last + 1)
    start, stop = (jnp.clip(x, 0, key_length).reshape(batch, heads, rows * slots) for x in (start, stop))
    query_ids, key_ids = _positions.both_segments(*segment_ids, rows, key_length)
    query_ids = jnp.repeat(query_ids, slots, axis=-1)
    start, stop, key_order, num_keys = _positions.line_up_ranges(
        start, stop, key_length, query_segment_ids=query_ids, key_segment_ids=key_ids, implementation=implementation
    )
    assert num_keys is not None
    is_empty = start >= stop
    low, high, order = ordering.sorted_ranges(
        jnp.where(is_empty, NEVER, start), jnp.where(is_empty, NEVER - 1, stop - 1), by_both=True
    )
    key_code = iota(key_length)[None, None]
    return SparseIndex(
        key_order=key_order,
        key_code=jnp.where(key_code < num_keys, key_code, NEVER),
        query_order=order,
        low=low,
        high=jnp.where(low == NEVER, key_length - 1, high),
        slots=slots,
    )
