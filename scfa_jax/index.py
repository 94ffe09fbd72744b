"""Which keys each query attends to, as one contiguous range of codes: a pattern is a function of this file.

Every key has an int32 code, keys stand in ascending order of code, and a query attends exactly to the keys with
`low <= code <= high`. A key that nobody may attend to has the code `NEVER`, which no `high` reaches; a query that
attends to nothing has `low > high`. All builders work on traced arrays and give arrays of static shapes. Codes are
made of places in line, which are positions unless there are segments (segments.py).
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from scfa_jax import _checks, segments, sorting
from scfa_jax.segments import Positions, Segments
from scfa_jax.sorting import Implementation, iota, iota_like

NEVER = np.int32(2**31 - 1)
_WINDOWED = 0.1  # the density of windows, whose lengths may be data


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

    Examples:
        >>> import numpy as np, scfa_jax
        >>> index = scfa_jax.hash_index(np.array([[[1], [0], [1], [1]]], np.int32), num_buckets=2)
        >>> index.key_order[0, 0].tolist()  # bucket 0, then bucket 1
        [1, 0, 2, 3]
        >>> index.key_code[0, 0].tolist()  # bucket * length + position
        [1, 4, 6, 7]
        >>> index.low[0, 0].tolist(), index.high[0, 0].tolist()
        ([0, 4, 4, 4], [1, 4, 6, 7])
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

    @functools.partial(jax.jit, static_argnames=("block_q", "block_k"))
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


def causal_index(
    query_length: int,
    key_length: int,
    *,
    window: jax.Array | int | None = None,
    query_offset: jax.Array | int = 0,
    query_segment_ids: jax.Array | None = None,
    key_segment_ids: jax.Array | None = None,
    implementation: Implementation = None,
) -> SparseIndex:
    """Every query attends to all keys at or before its position.

    Args:
        query_length: Number of queries `T`.
        key_length: Number of keys `S`.
        window: How many positions up to its own a query may see: an int, or int32 `[]`, `[N]` or `[B, N]`; 0 for none,
            None for all. Heads that share keys may have windows of their own.
        query_offset: Position of the first query: an int, or int32 `[]` or `[B]`.
        query_segment_ids: int32 `[B, T]` or `[T]`: attention stays among equal ids, and rows with an id below 0
            (padding) take no part. Any ids in any order; None for one segment.
        key_segment_ids: int32 `[B, S]` or `[S]`, likewise. None means those of the queries, and `S = T`.
        implementation: As `sparse_attention` takes it. Unless it leaves Triton out, kernels search on a GPU.

    Returns:
        The index, with a batch axis of 1 or `B` and one head, or as many as there are windows.

    Raises:
        TypeError: The windows or segment ids are not int32.
        ValueError: Shapes do not fit each other.

    Examples:
        >>> import scfa_jax
        >>> scfa_jax.causal_index(2, 6, query_offset=3).high.tolist()
        [[[3, 4]]]
    """
    windows = _checks.window(window)
    line = segments.line_up(
        query_segment_ids, key_segment_ids, query_length, key_length, query_offset, implementation, window=windows
    )
    key_code, high = iota(key_length)[None, None], line.last()
    is_aligned = key_segment_ids is None and _checks.starts_at_zero(query_offset)
    all_met = window is None and (isinstance(line, Positions) or is_aligned)
    index = index_in_line(
        line,
        key_place=None,
        # Before `index_in_line` gives each head a `high` of its own, which devices may share out.
        key_code=_up_to(key_code, high) if all_met else key_code,
        query_place=None,
        low=line.first(),
        high=high,
    )
    return dataclasses.replace(
        index,
        all_met=all_met,
        density=_WINDOWED if window is not None else 1.0 if isinstance(line, Positions) else 0.25,
    )


def hash_index(
    query_hash: jax.Array,
    key_hash: jax.Array | None = None,
    *,
    exclude_self: bool = False,
    num_buckets: int | None = None,
    window: jax.Array | int | None = None,
    query_offset: jax.Array | int = 0,
    query_segment_ids: jax.Array | None = None,
    key_segment_ids: jax.Array | None = None,
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
        window: As `causal_index` takes it.
        query_offset: Position of the first query: an int, or int32 `[]` or `[B]`.
        query_segment_ids: As `causal_index` takes it.
        key_segment_ids: As `causal_index` takes it.
        query_length: Number of queries, where the axis of `query_hash` is 1.
        key_length: Number of keys, where the axis of `key_hash` is 1.
        implementation: As `sparse_attention` takes it. Unless it leaves Triton out, kernels sort on a GPU.

    Returns:
        The index.

    Raises:
        TypeError: The hashes, windows or segment ids are not int32.
        ValueError: Shapes do not fit each other, or `num_buckets` is below 1.

    Examples:
        >>> import numpy as np, scfa_jax
        >>> buckets = np.arange(256, dtype=np.int32)[:, None] % 4
        >>> stats = scfa_jax.hash_index(buckets, num_buckets=4).stats(block_q=64, block_k=64)
        >>> int(stats["tiles"][0, 0]), int(stats["total"][0, 0]), int(stats["pairs"][0, 0])
        (4, 16, 8320)
    """
    query_id = _per_head("query_hash", query_hash, jnp.int32, query_length)
    _checks.num_buckets(num_buckets)
    # Equal places on both sides let one sort serve both.
    shared = key_hash is None and key_length in (None, query_id.shape[-1]) and key_segment_ids is None
    if key_hash is None:
        key_hash, key_length = query_hash, query_id.shape[-1] if key_length is None else key_length
    key_id = _per_head("key_hash", key_hash, jnp.int32, key_length)
    query_length, key_length = query_id.shape[-1], key_id.shape[-1]
    windows = _checks.window(window)
    line = segments.line_up(
        query_segment_ids,
        key_segment_ids,
        query_length,
        key_length,
        query_offset,
        implementation,
        window=windows,
        exclude_self=exclude_self,
    )
    _check_sides(line, windows, query_hash=query_id, key_hash=key_id)
    is_aligned = query_length == key_length and _checks.starts_at_zero(query_offset)
    if num_buckets is not None and num_buckets * max(query_length, key_length, 1) < 2**31:
        # Padding is last in line, and so in the last bucket.
        query_id = line.queries(query_id, padding=num_buckets - 1)
        other_id = None if shared else line.keys(key_id, padding=num_buckets - 1)
        sort = functools.partial(sorting.sorted_codes, num_buckets=num_buckets, implementation=implementation)
        index = _packed_hash_index(line, query_id, other_id, sort)
    elif shared and is_aligned and window is None and isinstance(line, Positions):
        index = _shared_rank_hash_index(query_id, exclude_self)
    else:
        query_id, key_id = line.queries(query_id, padding=NEVER), line.keys(key_id, padding=NEVER)
        index = _rank_hash_index(line, windows, query_id, key_id, implementation)
    # Then the query at its own position attends to every key.
    all_met = shared and is_aligned and window is None and not exclude_self
    density = 1 / (num_buckets or 16)
    return dataclasses.replace(index, all_met=all_met, density=density if window is None else min(density, _WINDOWED))


def keep_index(
    query_keep: jax.Array,
    key_keep: jax.Array,
    *,
    window: jax.Array | int | None = None,
    query_offset: jax.Array | int = 0,
    query_segment_ids: jax.Array | None = None,
    key_segment_ids: jax.Array | None = None,
    query_length: int | None = None,
    key_length: int | None = None,
    implementation: Implementation = None,
) -> SparseIndex:
    """Every kept query attends to all kept keys at or before its position; dropped queries to nothing.

    Args:
        query_keep: bool `[B, T, N]` or `[T, N]`, True where the query takes part; any axis may be 1.
        key_keep: bool `[B, S, K]` or `[S, K]`, likewise.
        window: As `causal_index` takes it.
        query_offset: Position of the first query: an int, or int32 `[]` or `[B]`.
        query_segment_ids: As `causal_index` takes it.
        key_segment_ids: As `causal_index` takes it.
        query_length: Number of queries, where the axis of `query_keep` is 1.
        key_length: Number of keys, where the axis of `key_keep` is 1.
        implementation: As `sparse_attention` takes it. Unless it leaves Triton out, kernels sort on a GPU.

    Returns:
        The index: kept rows first, by position, and dropped rows after them.

    Raises:
        TypeError: The masks are not boolean, or the windows or segment ids not int32.
        ValueError: Shapes do not fit each other.

    Examples:
        >>> import numpy as np, scfa_jax
        >>> keep = np.array([True, False, True])[:, None]
        >>> scfa_jax.keep_index(keep, keep).query_order.tolist()
        [[[0, 2, 1]]]
    """
    query_keep = _per_head("query_keep", query_keep, jnp.bool_, query_length)
    key_keep = _per_head("key_keep", key_keep, jnp.bool_, key_length)
    query_length, key_length = query_keep.shape[-1], key_keep.shape[-1]
    windows = _checks.window(window)
    line = segments.line_up(
        query_segment_ids, key_segment_ids, query_length, key_length, query_offset, implementation, window=windows
    )
    _check_sides(line, windows, query_keep=query_keep, key_keep=key_keep)

    key_place, key_kept = sorting.kept_first(line.keys(key_keep, padding=False), implementation)
    query_place, query_kept = sorting.kept_first(line.queries(query_keep, padding=False), implementation)
    high = line.last(query_place)
    # Dropped queries come last; repeating the largest `high` keeps the row ascending.
    last_high = jnp.max(jnp.where(query_kept, high, -1), axis=-1, keepdims=True, initial=-1)
    # Heads that share their keys' mask need not share their queries', and a segment may end in dropped queries.
    all_met = isinstance(line, Positions) and window is None and (query_keep.shape[1] == 1 or key_keep.shape[1] > 1)
    key_code = jnp.where(key_kept, key_place, NEVER)
    index = index_in_line(
        line,
        key_place=key_place,
        key_code=_up_to(key_code, last_high) if all_met else key_code,
        query_place=query_place,
        low=jnp.where(query_kept, line.first(query_place), NEVER),
        high=jnp.where(query_kept, high, last_high),
    )
    return dataclasses.replace(index, all_met=all_met, density=0.25 if window is None else _WINDOWED)


def range_index(
    key_start: jax.Array,
    key_stop: jax.Array,
    key_length: int,
    *,
    query_segment_ids: jax.Array | None = None,
    key_segment_ids: jax.Array | None = None,
    query_length: int | None = None,
    implementation: Implementation = None,
) -> SparseIndex:
    """Query `t` attends to the keys `key_start[t] .. key_stop[t] - 1`, whatever their position.

    Args:
        key_start: int32 `[B, T, N]` or `[T, N]`; any axis may be 1. Clipped to `[0, key_length]`.
        key_stop: int32, likewise. A range that ends before it starts is empty.
        key_length: Number of keys `S`.
        query_segment_ids: As `causal_index` takes it.
        key_segment_ids: As `causal_index` takes it.
        query_length: Number of queries, where the axis of both is 1.
        implementation: As `sparse_attention` takes it. Unless it leaves Triton out, kernels search on a GPU.

    Returns:
        The index, with queries in order of where their range starts and empty ranges last.

    Raises:
        TypeError: The ranges or segment ids are not int32.
        ValueError: Shapes do not fit each other.

    Examples:
        >>> import numpy as np, scfa_jax
        >>> start, stop = np.array([[4, 0], [6, 2]], np.int32)[..., None]
        >>> index = scfa_jax.range_index(start, stop, key_length=8)
        >>> index.query_order.tolist(), index.low.tolist(), index.high.tolist()
        ([[[1, 0]]], [[[0, 4]]], [[[1, 5]]])
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
    start, stop, key_order, num_keys = segments.line_up_ranges(
        start, stop, query_segment_ids, key_segment_ids, key_length, implementation
    )
    key_code = iota(key_length)[None, None]
    if num_keys is not None:
        key_code = jnp.where(key_code < num_keys, key_code, NEVER)
    empty = start >= stop
    low, high, order = sorting.sorted_ranges(jnp.where(empty, NEVER, start), jnp.where(empty, -1, stop - 1))
    return SparseIndex(
        key_order=key_order,
        key_code=key_code,
        query_order=order,
        low=low,
        high=high,
        ascending=False,
    )


def _packed_hash_index(line: Positions | Segments, query_id: jax.Array, key_id: jax.Array | None, sort) -> SparseIndex:
    """Sorts (bucket, place) packed into one int32, which is the code as well."""
    query_length = query_id.shape[-1]
    if key_id is None:
        (sorted_query,) = (sorted_key,) = sort(query_id)
    else:
        sorted_query, sorted_key = sort(query_id, key_id)
    key_length = sorted_key.shape[-1]
    bucket, query_place = sorting.divided(sorted_query, query_length)
    _, key_place = sorting.divided(sorted_key, key_length)
    return index_in_line(
        line,
        key_place=key_place,
        key_code=sorted_key,
        query_place=query_place,
        low=bucket * key_length + line.first(query_place),
        high=bucket * key_length + line.last(query_place),
    )


def _shared_rank_hash_index(ids: jax.Array, exclude_self: bool) -> SparseIndex:
    """Both sides have the same ids at the same positions: the code is the rank of one stable sort."""
    rank = iota_like(ids)
    ((sorted_id, order),) = sorting.sorted_ids(ids)
    return SparseIndex(
        key_order=order,
        key_code=rank,
        query_order=order,
        low=sorting.run_start(sorted_id, rank),
        high=rank - int(exclude_self),
    )


def _rank_hash_index(
    line: Positions | Segments,
    window: jax.Array | None,
    query_id: jax.Array,
    key_id: jax.Array,
    implementation: Implementation,
) -> SparseIndex:
    """Any ids on both sides: the code is the key's rank, and each query looks up where its range begins and ends."""
    batch = max(query_id.shape[0], key_id.shape[0], line.last().shape[0])
    heads, key_heads = max(query_id.shape[1], key_id.shape[1]), key_id.shape[1]
    if window is not None and key_heads > 1:  # heads that share all they are sorted by need no sort of their own
        heads = max(heads, window.shape[1])
    query_id = jnp.broadcast_to(query_id, (batch, heads, query_id.shape[-1]))
    key_id = jnp.broadcast_to(key_id, (batch, key_heads, key_id.shape[-1]))
    (query_id, query_place), (key_id, key_place) = sorting.sorted_ids(query_id, key_id)
    low, high = line.ranges(query_id, query_place, key_id, key_place, implementation)
    return index_in_line(
        line, key_place=key_place, key_code=iota_like(key_id), query_place=query_place, low=low, high=high
    )


def index_in_line(
    line: Positions | Segments,
    *,
    key_place: jax.Array | None,
    key_code: jax.Array,
    query_place: jax.Array | None,
    low: jax.Array,
    high: jax.Array,
) -> SparseIndex:
    """The index of ranges of places: finds the rows of places (None: all, in line) and leaves out padding."""
    low, high = jnp.broadcast_arrays(low, high)  # windows may differ where nothing else does
    if isinstance(line, Positions):
        return SparseIndex(key_place, key_code, query_place, low, high)
    is_key = (iota_like(key_code) if key_place is None else key_place) < line.num_keys
    is_query = (iota_like(high) if query_place is None else query_place) < line.num_queries
    is_query |= jnp.zeros_like(high, bool)  # sharded as `high` is: `where` asks for that on explicit axes
    last_high = jnp.max(jnp.where(is_query, high, -1), axis=-1, keepdims=True, initial=-1)
    return SparseIndex(
        key_order=segments.at_places(line.key_order, key_place),
        key_code=jnp.where(is_key, key_code, NEVER),
        query_order=segments.at_places(line.query_order, query_place),
        low=jnp.where(is_query, low, NEVER),
        high=jnp.where(is_query, high, last_high),
    )


def _up_to(code: jax.Array, high: jax.Array) -> jax.Array:
    """The codes `[B, K, S]`, with `NEVER` beyond the largest `high` `[B, N, T]` of the heads that share a key head."""
    last = jnp.max(high, axis=-1, initial=-1)
    groups = min(code.shape[1], last.shape[1])
    last = jnp.max(last.reshape(last.shape[0], groups, -1), axis=-1)[..., None]
    return jnp.where(code <= last, code, NEVER)


def _per_head(name: str, x: jax.Array, dtype, length: int | None) -> jax.Array:
    """Checks `[B, L, N]` or `[L, N]` and returns `[B, N, L]` at full length."""
    x = _checks.per_token(name, x, dtype)
    if length is not None and x.shape[1] not in (1, length):
        raise ValueError(f"{name} must have {length} or 1 rows along axis {x.ndim - 2}, got shape {x.shape}.")
    length = x.shape[1] if length is None else length
    return jnp.broadcast_to(x, (x.shape[0], length, x.shape[2])).swapaxes(1, 2)


def _check_sides(line: Positions | Segments, window: jax.Array | None, **sides: jax.Array) -> None:
    """Checks what each query and each key has, `[B, N, T]` and `[B, K, S]`, and windows against each other."""
    (query_name, on_query), (key_name, on_key) = sides.items()
    _checks.batches(**sides, **({} if window is None else {"window": window}))
    if isinstance(line, Segments):
        _checks.batches(**sides, query_segment_ids=line.query_order, key_segment_ids=line.key_order)
    heads, key_heads = on_query.shape[1], on_key.shape[1]
    if heads != 1 and (key_heads == 0 or heads % key_heads):
        raise ValueError(
            f"{key_name} must have a number of heads that divides that of {query_name}, got {key_heads} and {heads}."
        )
    num_windows = 1 if window is None else window.shape[1]
    if num_windows != 1 and (heads not in (1, num_windows) or num_windows % key_heads):
        raise ValueError(
            f"window must have as many heads as {query_name}, {heads}, and a multiple of those of {key_name}, "
            f"{key_heads}, each unless that is 1; got {num_windows}."
        )
