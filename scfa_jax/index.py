"""Which keys each query attends to, as one contiguous range of codes: a pattern is a function of this file.

Every key has an int32 code, keys stand in ascending order of code, and a query attends exactly to the keys with
`low <= code <= high`. A key that nobody may attend to has the code `NEVER`, which no `high` reaches; a query that
attends to nothing has `low > high`. All builders work on traced arrays and give arrays of static shapes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from scfa_jax import _checks, remat, search
from scfa_jax.kernels import _compat

NEVER = np.int32(2**31 - 1)

Implementation = str | Sequence[str] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SparseIndex:
    """The key range of every query, with the orders that make the ranges contiguous: a pytree.

    The axes `B`, `N` and `K` may be smaller than those of the attention call: 1, or a divisor of the number of
    heads, in which case consecutive heads share an entry.

    Attributes:
        key_order: int32 `[B, K, S]`, the original row of each key in code order; None if it is the identity.
        key_code: int32 `[B, K, S]`, ascending.
        query_order: int32 `[B, N, T]`, the original row of each query as tiled; None if it is the identity.
        low: int32 `[B, N, T]`, the first code that each query (in query order) attends to; ascending.
        high: int32 `[B, N, T]`, the last code, inclusive.
        ascending: Whether `high` ascends too, so that the ends of a tile bound all of it. Static.
        all_met: Whether every key that no query attends to is known to have the code `NEVER`. Static.
        density: Share of the causal pairs that are allowed, roughly: a hint for the choice of tile sizes. Static.
    """

    key_order: jax.Array | None
    key_code: jax.Array
    query_order: jax.Array | None
    low: jax.Array
    high: jax.Array
    ascending: bool = dataclasses.field(default=True, metadata={"static": True})
    all_met: bool = dataclasses.field(default=False, metadata={"static": True})
    density: float = dataclasses.field(default=0.1, metadata={"static": True})

    @property
    def query_length(self) -> int:
        """Number of queries `T`."""
        return self.low.shape[-1]

    @property
    def key_length(self) -> int:
        """Number of keys `S`."""
        return self.key_code.shape[-1]

    def stats(self, block_q: int = 64, block_k: int = 64) -> dict[str, jax.Array]:
        """Counts, per head, the tiles that a forward pass visits and the pairs it needs.

        Args:
            block_q: Queries in a tile.
            block_k: Keys in a tile.

        Returns:
            Arrays `[B, N]` (heads that share an entry appear once): int32 `tiles` visited, `full` ones that need
            no mask, `edge` ones that do, `total` tiles of the dense matrix, and float32 `pairs` allowed.
        """
        from scfa_jax import tiling  # here, since tiling is built upon this file

        bounds = tiling.key_tile_bounds(self, block_q, block_k)
        start, full_start, full_stop, stop = (bounds[..., i] for i in range(4))
        visited = (stop - start).sum(-1)
        full = (full_stop - full_start).sum(-1)
        total = tiling.num_tiles(self.query_length, block_q) * tiling.num_tiles(self.key_length, block_k)

        low, high, code = tiling.align_heads(self.low, self.high, self.key_code)
        rank = jnp.vectorize(
            lambda code, x, side: jnp.searchsorted(code, x, side=side),
            signature="(s),(t)->(t)",
            excluded=("side",),
        )
        pairs = rank(code, high, side="right") - rank(code, low, side="left")
        return {
            "tiles": visited,
            "full": full,
            "edge": visited - full,
            "total": jnp.full_like(visited, total),
            "pairs": jnp.maximum(pairs, 0).astype(jnp.float32).sum(-1),
        }


def causal_index(query_length: int, key_length: int, *, query_offset: jax.Array | int = 0) -> SparseIndex:
    """Every query attends to all keys at or before its position.

    Args:
        query_length: Number of queries `T`.
        key_length: Number of keys `S`.
        query_offset: Position of the first query: an int, or int32 `[]` or `[B]`.

    Returns:
        The index, with a batch axis of 1 or `B` and one head.
    """
    offset = _checks.query_offset(query_offset)
    high = _last_position(offset, _iota(query_length), key_length)
    return SparseIndex(
        key_order=None,
        key_code=_up_to(_iota(key_length)[None, None], high),
        query_order=None,
        low=jnp.zeros_like(high),
        high=high,
        all_met=True,
        density=1.0,
    )


def hash_index(
    query_hash: jax.Array,
    key_hash: jax.Array | None = None,
    *,
    exclude_self: bool = False,
    num_buckets: int | None = None,
    query_offset: jax.Array | int = 0,
    query_length: int | None = None,
    key_length: int | None = None,
    implementation: Implementation = None,
) -> SparseIndex:
    """Every query attends to all keys of its bucket at or before its position.

    Args:
        query_hash: int32 `[B, T, N]` or `[T, N]`, the bucket of each query; any axis may be 1.
        key_hash: int32 `[B, S, K]` or `[S, K]`, likewise; None means the same as `query_hash`.
        exclude_self: Whether a query may not attend to the key at its own position.
        num_buckets: A promise that all ids lie in `[0, num_buckets)`, for a cheaper sort. Without it any int32
            will do. The result is undefined if the promise is broken.
        query_offset: Position of the first query: an int, or int32 `[]` or `[B]`.
        query_length: Number of queries, where the axis of `query_hash` is 1.
        key_length: Number of keys, where the axis of `key_hash` is 1.
        implementation: As `sparse_attention` takes it. Unless it leaves Triton out, kernels sort on a GPU.

    Returns:
        The index.

    Raises:
        TypeError: The hashes are not int32.
        ValueError: Shapes do not fit each other, or `num_buckets` is below 1.
    """
    query_id = _per_head("query_hash", query_hash, jnp.int32, query_length)
    offset = _checks.query_offset(query_offset)
    _checks.num_buckets(num_buckets)
    # Equal positions on both sides let one sort serve both.
    shared = key_hash is None and key_length in (None, query_id.shape[-1])
    if key_hash is None:
        key_hash, key_length = query_hash, query_id.shape[-1] if key_length is None else key_length
    key_id = _per_head("key_hash", key_hash, jnp.int32, key_length)
    _check_sides(query_id, key_id, "query_hash", "key_hash")
    longest = max(query_id.shape[-1], key_id.shape[-1], 1)
    is_aligned = isinstance(query_offset, int) and query_offset == 0 and query_id.shape[-1] == key_id.shape[-1]
    if num_buckets is not None and num_buckets * longest < 2**31:
        sort = functools.partial(_sorted_codes, num_buckets=num_buckets, implementation=implementation)
        index = _packed_hash_index(query_id, None if shared else key_id, sort, offset, exclude_self)
    elif shared and is_aligned:
        index = _shared_rank_hash_index(query_id, exclude_self)
    else:
        index = _rank_hash_index(query_id, key_id, offset, exclude_self, implementation)
    # Then the query at its own position attends to every key.
    all_met = shared and is_aligned and not exclude_self
    return dataclasses.replace(index, all_met=all_met, density=1 / (num_buckets or 16))


def keep_index(
    query_keep: jax.Array,
    key_keep: jax.Array,
    *,
    query_offset: jax.Array | int = 0,
    query_length: int | None = None,
    key_length: int | None = None,
    implementation: Implementation = None,
) -> SparseIndex:
    """Every kept query attends to all kept keys at or before its position; dropped queries to nothing.

    Args:
        query_keep: bool `[B, T, N]` or `[T, N]`, True where the query takes part; any axis may be 1.
        key_keep: bool `[B, S, K]` or `[S, K]`, likewise.
        query_offset: Position of the first query: an int, or int32 `[]` or `[B]`.
        query_length: Number of queries, where the axis of `query_keep` is 1.
        key_length: Number of keys, where the axis of `key_keep` is 1.
        implementation: As `sparse_attention` takes it. Unless it leaves Triton out, kernels sort on a GPU.

    Returns:
        The index: kept rows first, by position, and dropped rows after them.

    Raises:
        TypeError: The masks are not boolean.
        ValueError: Shapes do not fit each other.
    """
    query_keep = _per_head("query_keep", query_keep, jnp.bool_, query_length)
    key_keep = _per_head("key_keep", key_keep, jnp.bool_, key_length)
    offset = _checks.query_offset(query_offset)
    _check_sides(query_keep, key_keep, "query_keep", "key_keep")
    query_length, key_length = query_keep.shape[-1], key_keep.shape[-1]

    key_order, key_kept = _kept_first(key_keep, implementation)
    query_order, query_kept = _kept_first(query_keep, implementation)
    high = _last_position(offset, query_order, key_length)
    # Dropped queries come last; repeating the largest `high` keeps the row ascending.
    last_high = jnp.max(jnp.where(query_kept, high, -1), axis=-1, keepdims=True, initial=-1)
    return SparseIndex(
        key_order=key_order,
        key_code=_up_to(jnp.where(key_kept, key_order, NEVER), last_high),
        query_order=query_order,
        low=jnp.where(query_kept, 0, NEVER),
        high=jnp.where(query_kept, high, last_high),
        # Heads that share their keys' mask need not share their queries'.
        all_met=query_keep.shape[1] == 1 or key_keep.shape[1] > 1,
        density=0.25,
    )


def range_index(
    key_start: jax.Array, key_stop: jax.Array, key_length: int, *, query_length: int | None = None
) -> SparseIndex:
    """Query `t` attends to the keys `key_start[t] .. key_stop[t] - 1`, whatever their position.

    Args:
        key_start: int32 `[B, T, N]` or `[T, N]`; any axis may be 1. Clipped to `[0, key_length]`.
        key_stop: int32, likewise. A range that ends before it starts is empty.
        key_length: Number of keys `S`.
        query_length: Number of queries, where the axis of both is 1.

    Returns:
        The index, with queries in order of where their range starts and empty ranges last.

    Raises:
        TypeError: The ranges are not int32.
        ValueError: Shapes do not fit each other.
    """
    start = _per_head("key_start", key_start, jnp.int32, query_length)
    stop = _per_head("key_stop", key_stop, jnp.int32, query_length)
    try:
        shape = np.broadcast_shapes(start.shape, stop.shape)
    except ValueError:
        raise ValueError(
            f"key_start {key_start.shape} and key_stop {key_stop.shape} must have equal axes or axes of 1."
        ) from None
    start, stop = (jnp.broadcast_to(jnp.clip(x, 0, key_length), shape) for x in (start, stop))
    empty = start >= stop
    ranges = (jnp.where(empty, NEVER, start), jnp.where(empty, -1, stop - 1), _iota_like(start))
    low, high, order = remat.named_index(jax.lax.sort(ranges, num_keys=1))
    return SparseIndex(
        key_order=None,
        key_code=_iota(key_length)[None, None],
        query_order=order,
        low=low,
        high=high,
        ascending=False,
    )


def _packed_hash_index(
    query_id: jax.Array, key_id: jax.Array | None, sort, offset: jax.Array, exclude_self: bool
) -> SparseIndex:
    """Sorts (bucket, position) packed into one int32, which is the code as well."""
    query_length = query_id.shape[-1]
    if key_id is None:
        sorted_query = sorted_key = sort(query_id)
    else:
        sorted_query, sorted_key = _both(sort, query_id, key_id)
    key_length = sorted_key.shape[-1]
    low = jax.lax.div(sorted_query, _length(query_length)) * key_length
    query_order = jax.lax.rem(sorted_query, _length(query_length))
    return SparseIndex(
        key_order=jax.lax.rem(sorted_key, _length(key_length)),
        key_code=sorted_key,
        query_order=query_order,
        low=low,
        high=low + _last_position(offset - int(exclude_self), query_order, key_length),
    )


def _shared_rank_hash_index(ids: jax.Array, exclude_self: bool) -> SparseIndex:
    """Both sides have the same ids at the same positions: the code is the rank of one stable sort."""
    rank = _iota_like(ids)
    sorted_id, order = _sorted_ids(ids)
    return SparseIndex(
        key_order=order,
        key_code=rank,
        query_order=order,
        low=_run_start(sorted_id, rank),
        high=rank - int(exclude_self),
    )


def _rank_hash_index(
    query_id: jax.Array, key_id: jax.Array, offset: jax.Array, exclude_self: bool, implementation: Implementation
) -> SparseIndex:
    """Any ids on both sides: the code is the key's rank, and each query looks up where its range begins and ends."""
    batch = max(query_id.shape[0], key_id.shape[0], offset.shape[0])
    heads, key_heads = max(query_id.shape[1], key_id.shape[1]), key_id.shape[1]
    query_id = jnp.broadcast_to(query_id, (batch, heads, query_id.shape[-1]))
    key_id = jnp.broadcast_to(key_id, (batch, key_heads, key_id.shape[-1]))
    key_length = key_id.shape[-1]
    (query_id, query_order), (key_id, key_order) = _both(_sorted_ids, query_id, key_id)
    last_position = _last_position(offset - int(exclude_self), query_order, key_length)
    low, high = _key_ranges(query_id, last_position, key_id, key_order, implementation)
    return SparseIndex(
        key_order=key_order,
        key_code=_iota_like(key_id),
        query_order=query_order,
        low=low,
        high=high,
    )


def _key_ranges(
    query_id: jax.Array,
    last_position: jax.Array,
    key_id: jax.Array,
    key_position: jax.Array,
    implementation: Implementation,
) -> tuple[jax.Array, jax.Array]:
    """As `search.key_ranges`; the keys may have fewer heads."""
    operands = (query_id, last_position, key_id, key_position)
    if query_id.size == 0 or key_id.size == 0:
        return jnp.zeros_like(query_id), jnp.full_like(query_id, -1)

    def plain(query_id, last_position, *keys):
        return search.key_ranges(
            query_id, last_position, *(jnp.repeat(x, query_id.shape[1] // x.shape[1], axis=1) for x in keys)
        )

    if not _wants_kernels(implementation):
        return remat.named_index(plain(*operands))
    from scfa_jax.kernels import triton_search

    by_kernel = functools.partial(triton_search.key_ranges, interpret=False)
    return remat.named_index(jax.lax.platform_dependent(*operands, cuda=by_kernel, default=plain))


def _both(sort, query_id: jax.Array, key_id: jax.Array):
    """Sorts the ids of both sides: at once where they are alike, since a sort costs mostly its kernel launches."""
    if query_id.shape != key_id.shape:
        return sort(query_id), sort(key_id)
    both, batch = sort(jnp.concatenate([query_id, key_id])), query_id.shape[0]
    return jax.tree.map(lambda x: x[:batch], both), jax.tree.map(lambda x: x[batch:], both)


def _sorted_ids(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The ids `[B, N, L]` in ascending order, and the position of each, ascending among equal ids."""
    # Positions as a second key need no stable sort, and take half the room in one where 16 bits hold them.
    dtype = jnp.uint16 if ids.shape[-1] <= 2**16 else jnp.int32
    position = jax.lax.broadcasted_iota(dtype, ids.shape, ids.ndim - 1)
    sorted_ids, order = jax.lax.sort((ids, position), num_keys=2, is_stable=False)
    return remat.named_index((sorted_ids, order.astype(jnp.int32)))


def _wants_kernels(implementation: Implementation) -> bool:
    """Whether small kernels may prepare the index where the code is compiled for CUDA."""
    names = (implementation,) if isinstance(implementation, str) else implementation
    return _compat.has_triton() and (names is None or "triton" in names)


def _sorted_codes(ids: jax.Array, num_buckets: int, implementation: Implementation) -> jax.Array:
    """Sorts `[B, N, L]` rows by (bucket, position), both packed into one int32: `id * L + position`."""
    ids = jnp.clip(ids, 0, num_buckets - 1)  # so that a broken promise stays within memory

    def by_comparison(ids):
        return jax.lax.sort(ids * ids.shape[-1] + _iota(ids.shape[-1]), is_stable=False)

    if ids.size == 0 or not _wants_kernels(implementation):
        return remat.named_index(by_comparison(ids))
    from scfa_jax.kernels import triton_sort  # here, so that a JAX without the backend can import the rest

    if num_buckets > triton_sort.MAX_BUCKETS:
        return remat.named_index(by_comparison(ids))
    by_counting = functools.partial(triton_sort.sorted_codes, num_buckets=num_buckets, interpret=False)
    return remat.named_index(jax.lax.platform_dependent(ids, cuda=by_counting, default=by_comparison))


def _run_start(sorted_id: jax.Array, value: jax.Array) -> jax.Array:
    """The (ascending) value where the run of equal ids began, for every element."""
    begins = jnp.concatenate([jnp.ones_like(sorted_id[..., :1], bool), sorted_id[..., 1:] != sorted_id[..., :-1]], -1)
    return remat.named_index(jax.lax.cummax(jnp.where(begins, value, 0), axis=value.ndim - 1))


def _kept_first(keep: jax.Array, implementation: Implementation) -> tuple[jax.Array, jax.Array]:
    """Order of rows with the kept ones first, by position, and whether each row in it is kept."""
    length = keep.shape[-1]
    packed = _sorted_codes(jnp.where(keep, 0, 1).astype(jnp.int32), 2, implementation)
    kept = packed < length
    return jnp.where(kept, packed, packed - length), kept


def _last_position(offset: jax.Array, query: jax.Array, key_length: int) -> jax.Array:
    """Position of the last key that each query may see, or -1: `offset + query` within the keys."""
    return jnp.clip(offset + query, -1, key_length - 1)


def _up_to(code: jax.Array, high: jax.Array) -> jax.Array:
    """The codes `[B, K, S]`, with `NEVER` beyond the largest `high` `[B, N, T]` of the heads that share a key head."""
    last = jnp.max(high, axis=-1, initial=-1)
    groups = min(code.shape[1], last.shape[1])
    last = jnp.max(last.reshape(last.shape[0], groups, -1), axis=-1)[..., None]
    return jnp.where(code <= last, code, NEVER)


def _length(length: int) -> np.int32:
    """A divisor: the length of an axis, or 1 for an empty one."""
    return np.int32(max(length, 1))


def _iota(length: int) -> jax.Array:
    return jnp.arange(length, dtype=jnp.int32)


def _iota_like(x: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)


def _per_head(name: str, x: jax.Array, dtype, length: int | None) -> jax.Array:
    """Checks `[B, L, N]` or `[L, N]` and returns `[B, N, L]` at full length."""
    x = _checks.per_token(name, x, dtype)
    if length is not None and x.shape[1] not in (1, length):
        raise ValueError(f"{name} must have {length} or 1 rows along axis {x.ndim - 2}, got shape {x.shape}.")
    length = x.shape[1] if length is None else length
    return jnp.broadcast_to(x, (x.shape[0], length, x.shape[2])).swapaxes(1, 2)


def _check_sides(on_query: jax.Array, on_key: jax.Array, query_name: str, key_name: str) -> None:
    batches = {on_query.shape[0], on_key.shape[0]} - {1}
    if len(batches) > 1:
        raise ValueError(
            f"{query_name} and {key_name} must have the same batch size or 1, "
            f"got {on_query.shape[0]} and {on_key.shape[0]}."
        )
    heads, key_heads = on_query.shape[1], on_key.shape[1]
    if heads != 1 and (key_heads == 0 or heads % key_heads):
        raise ValueError(
            f"{key_name} must have a number of heads that divides that of {query_name}, got {key_heads} and {heads}."
        )
