"""Sorting of ids and looking up ranges in what was sorted, by kernels where the code is compiled for CUDA.

Results are named for checkpoint policies: what follows from them is cheap to compute again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from scfa_jax import _partitioning, backends, remat
from scfa_jax._search import count_leading, is_up_to
from scfa_jax.backends import Implementation


def sorted_ids(*sides: jax.Array) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """Of the ids `[B, N, L]` of one or both sides: ascending, and where each stood, ascending among equal ids."""

    def by_comparison(ids):
        # Rows as a second key need no stable sort, and take half the room in one where 16 bits hold them.
        dtype = jnp.uint16 if ids.shape[-1] <= 2**16 else jnp.int32
        row = jax.lax.broadcasted_iota(dtype, ids.shape, ids.ndim - 1)
        result, order = jax.lax.sort((ids, row), num_keys=2, is_stable=False)
        return result, order.astype(jnp.int32)

    return _sorted(by_comparison, 2, sides)


def sorted_codes(*sides: jax.Array, num_buckets: int, implementation: Implementation) -> tuple[jax.Array, ...]:
    """Sorts `[B, N, L]` rows of one or both sides by (bucket, row), both packed into one int32: `id * L + row`."""

    def by_comparison(ids):
        return jax.lax.sort(ids * ids.shape[-1] + iota_like(ids), is_stable=False)

    def sort(ids):
        ids = jnp.clip(ids, 0, num_buckets - 1)  # so that a broken promise stays within memory
        backend = backends.for_small_kernels(implementation)
        return (on_cuda(backend.sorter(num_buckets) if backend else None, by_comparison, ids),)

    return tuple(codes for (codes,) in _sorted(sort, 1, sides))


def _sorted(sort: Callable, num_results: int, sides: Sequence[jax.Array]) -> tuple:
    """Sorts each side: at once where they are alike, since a sort costs mostly its kernel launches."""
    if len({x.shape for x in sides}) > 1:
        return tuple(result for x in sides for result in _sorted(sort, num_results, (x,)))

    def at_once(*sides):
        results = sort(jnp.concatenate(sides))
        return [x for parts in zip(*(jnp.split(x, len(sides)) for x in results), strict=True) for x in parts]

    flat = _partitioning.split(at_once, ["bh."] * len(sides), ["bh."] * (len(sides) * num_results))(*sides)
    flat = remat.named_index(flat)
    return tuple(flat[i : i + num_results] for i in range(0, len(flat), num_results))


def divided(codes: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """Quotients and remainders of int32 `[B, N, L]`, none below 0, by a static length, taken as 1 if it is 0.

    Split, since XLA for GPUs (JAX 0.11.2) fails to compile the division of a split result by a power of two on a mesh.
    """
    divisor = np.int32(max(length, 1))
    parts = lambda x: (jax.lax.div(x, divisor), jax.lax.rem(x, divisor))
    return _partitioning.split(parts, ["bh."], ["bh."] * 2)(codes)


def kept_first(keep: jax.Array, implementation: Implementation) -> tuple[jax.Array, jax.Array]:
    """Order of rows `[B, N, L]` with the kept ones first, otherwise as they are, and whether each row in it is kept."""
    length = keep.shape[-1]
    (packed,) = sorted_codes(jnp.where(keep, 0, 1).astype(jnp.int32), num_buckets=2, implementation=implementation)
    kept = packed < length
    return jnp.where(kept, packed, packed - length), kept


def sorted_ranges(
    start: jax.Array, stop: jax.Array, *, by_both: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Both `[B, N, L]` in ascending order of `start`, or of `start` and `stop`, and where each stood."""
    sort = lambda *ranges: jax.lax.sort((*ranges, iota_like(ranges[0])), num_keys=2 if by_both else 1)
    return remat.named_index(_partitioning.split(sort, ["bh.", "bh."], ["bh."] * 3)(start, stop))


def take(x: jax.Array, place: jax.Array) -> jax.Array:
    """The entries of `[B, N, L]` at places `[B, N, M]` of the last axis; either side may have axes of 1."""
    at = lambda x, place: (jnp.take_along_axis(x, place, axis=-1, mode="clip"),)
    return _partitioning.split(at, ["bh.", "bh."], ["bh."])(x, place)[0]


def run_start(sorted_id: jax.Array, value: jax.Array) -> jax.Array:
    """The (ascending) value where the run of equal ids began, for every element."""
    begins = jnp.concatenate([jnp.ones_like(sorted_id[..., :1], bool), sorted_id[..., 1:] != sorted_id[..., :-1]], -1)
    return remat.named_index(jax.lax.cummax(jnp.where(begins, value, 0), axis=value.ndim - 1))


def key_ranges(
    query_id: jax.Array,
    last_position: jax.Array,
    key_id: jax.Array,
    key_position: jax.Array,
    implementation: Implementation,
) -> tuple[jax.Array, jax.Array]:
    """As `plain_key_ranges`, on axes of any length."""
    if query_id.size == 0 or key_id.size == 0:
        return jnp.zeros_like(query_id), jnp.full_like(query_id, -1)

    def find(*operands):
        backend = backends.for_small_kernels(implementation)
        return on_cuda(backend.range_finder() if backend else None, plain_key_ranges, *operands)

    operands = (query_id, last_position, key_id, key_position)
    return remat.named_index(_partitioning.split(find, ["bh."] * 4, ["bh."] * 2)(*operands))


def plain_key_ranges(
    query_id: jax.Array, last_position: jax.Array, key_id: jax.Array, key_position: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Ranks of the first and the last key of each query's bucket, up to a position.

    Args:
        query_id: int32 `[B, N, T]`, bucket ids.
        last_position: int32 `[B, N, T]`, the largest position that a query may see.
        key_id: int32 `[B, K, S]`, ascending, no axis empty; consecutive query heads share one of keys.
        key_position: int32 `[B, K, S]`, ascending among equal ids.

    Returns:
        `low` and `high`, int32 `[B, N, T]`; `high = low - 1` where there is no such key.
    """
    key_id, key_position = (jnp.repeat(x, query_id.shape[1] // x.shape[1], axis=1) for x in (key_id, key_position))
    at = lambda x, i: jnp.take_along_axis(x, i, axis=-1)
    is_before = lambda i: at(key_id, i) < query_id
    is_seen = lambda i: is_up_to(at(key_id, i), at(key_position, i), query_id, last_position)
    before, seen = count_leading((is_before, is_seen), key_id.shape[-1], query_id)
    return before, seen - 1


def iota(length: int) -> jax.Array:
    """int32 `[length]`: 0, 1, 2, ..."""
    return jnp.arange(length, dtype=jnp.int32)


def iota_like(x: jax.Array) -> jax.Array:
    """int32 of the shape of `x`: 0, 1, 2, ... along the last axis."""
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)


def on_cuda(kernel: Callable | None, plain: Callable, *operands: jax.Array):
    """Runs a kernel, if there is one, where the code is compiled for CUDA, and plain JAX elsewhere."""
    if kernel is None or operands[0].size == 0:
        return plain(*operands)
    return jax.lax.platform_dependent(*operands, cuda=kernel, default=plain)
