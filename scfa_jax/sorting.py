"""Sorting of ids and looking up ranges in what was sorted, by kernels where the code is compiled for CUDA.

Results are named for checkpoint policies: what follows from them is cheap to compute again.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from scfa_jax import remat, search
from scfa_jax.kernels import _compat

Implementation = str | Sequence[str] | None


def both(sort, query_id: jax.Array, key_id: jax.Array):
    """Sorts the ids of both sides: at once where they are alike, since a sort costs mostly its kernel launches."""
    if query_id.shape != key_id.shape:
        return sort(query_id), sort(key_id)
    result, batch = sort(jnp.concatenate([query_id, key_id])), query_id.shape[0]
    return jax.tree.map(lambda x: x[:batch], result), jax.tree.map(lambda x: x[batch:], result)


def sorted_ids(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The ids `[B, N, L]` in ascending order, and where each stood, ascending among equal ids."""
    # Rows as a second key need no stable sort, and take half the room in one where 16 bits hold them.
    dtype = jnp.uint16 if ids.shape[-1] <= 2**16 else jnp.int32
    row = jax.lax.broadcasted_iota(dtype, ids.shape, ids.ndim - 1)
    result, order = jax.lax.sort((ids, row), num_keys=2, is_stable=False)
    return remat.named_index((result, order.astype(jnp.int32)))


def sorted_codes(ids: jax.Array, num_buckets: int, implementation: Implementation) -> jax.Array:
    """Sorts `[B, N, L]` rows by (bucket, row), both packed into one int32: `id * L + row`."""
    ids = jnp.clip(ids, 0, num_buckets - 1)  # so that a broken promise stays within memory

    def by_comparison(ids):
        return jax.lax.sort(ids * ids.shape[-1] + iota(ids.shape[-1]), is_stable=False)

    if ids.size == 0 or not wants_kernels(implementation):
        return remat.named_index(by_comparison(ids))
    from scfa_jax.kernels import triton_sort  # here, so that a JAX without the backend can import the rest

    if num_buckets > triton_sort.MAX_BUCKETS:
        return remat.named_index(by_comparison(ids))
    by_counting = functools.partial(triton_sort.sorted_codes, num_buckets=num_buckets, interpret=False)
    return remat.named_index(jax.lax.platform_dependent(ids, cuda=by_counting, default=by_comparison))


def kept_first(keep: jax.Array, implementation: Implementation) -> tuple[jax.Array, jax.Array]:
    """Order of rows `[B, N, L]` with the kept ones first, otherwise as they are, and whether each row in it is kept."""
    length = keep.shape[-1]
    packed = sorted_codes(jnp.where(keep, 0, 1).astype(jnp.int32), 2, implementation)
    kept = packed < length
    return jnp.where(kept, packed, packed - length), kept


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
    """As `search.key_ranges`, on axes of any length; the keys may have fewer heads."""
    operands = (query_id, last_position, key_id, key_position)
    if query_id.size == 0 or key_id.size == 0:
        return jnp.zeros_like(query_id), jnp.full_like(query_id, -1)

    def plain(query_id, last_position, *keys):
        return search.key_ranges(
            query_id, last_position, *(jnp.repeat(x, query_id.shape[1] // x.shape[1], axis=1) for x in keys)
        )

    if not wants_kernels(implementation):
        return remat.named_index(plain(*operands))
    from scfa_jax.kernels import triton_search

    by_kernel = functools.partial(triton_search.key_ranges, interpret=False)
    return remat.named_index(jax.lax.platform_dependent(*operands, cuda=by_kernel, default=plain))


def wants_kernels(implementation: Implementation) -> bool:
    """Whether small kernels may prepare the index where the code is compiled for CUDA."""
    names = (implementation,) if isinstance(implementation, str) else implementation
    return _compat.has_triton() and (names is None or "triton" in names)


def iota(length: int) -> jax.Array:
    """int32 `[length]`: 0, 1, 2, ..."""
    return jnp.arange(length, dtype=jnp.int32)


def iota_like(x: jax.Array) -> jax.Array:
    """int32 of the shape of `x`: 0, 1, 2, ... along the last axis."""
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
