"""Patterns of hash-sparse attention: buckets, several rounds of them, and a window beside them."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from scfa_jax import _checks, _options, _positions
from scfa_jax._positions import Positions, Segments
from scfa_jax.backends import Implementation, ordering
from scfa_jax.backends.ordering import iota_like
from scfa_jax.index import NEVER, SparseIndex
from scfa_jax.patterns import _rounds
from scfa_jax.patterns._build import WINDOW_DENSITY, check_sides, index_in_line
from scfa_jax.patterns.causal import causal_index

if TYPE_CHECKING:
    from jaxtyping import Array, Int

    from scfa_jax.patterns.causal import Window


@_options.documented
def hash_index(
    query_hash: Int[Array | np.ndarray, "*#R_B #T #N"],
    key_hash: Int[Array | np.ndarray, "*#R_B #S #K"] | None = None,
    *,
    exclude_self: bool = False,
    num_buckets: int | None = None,
    window: Window | None = None,
    query_length: int | None = None,
    key_length: int | None = None,
    **options: Unpack[_options.PositionOptions],
) -> SparseIndex | list[SparseIndex]:
    """Every query attends to all keys of its bucket at or before its position: no chunks, no missed collisions.

    Source: Pagliardini et al. 2023, "Faster Causal Attention Over Large Sequences Through Sparse Flash Attention".

    Args:
        query_hash: int32 `[B, T, N]` or `[T, N]`, the bucket of each query; any axis may be 1. With `R` rounds of
            hashing `[R, B, T, N]`: a query attends once to each key that shares its bucket in any round.
        key_hash: int32 `[B, S, K]`, `[S, K]` or `[R, B, S, K]`, likewise. None means the same as `query_hash`, and
            `S = T`; both sides are then sorted once.
        exclude_self: Whether a query may not attend to the key at its own position.
        num_buckets: A static promise that all ids lie in `[0, num_buckets)`, for a cheaper sort. Without it any int32
            is an id. If it is broken the result is undefined, and stays within memory; under
            `jax.experimental.checkify` it raises.
        window: How many positions up to its own a query may see: a static int, or int32 `[]`, `[N]` or `[B, N]`; 0 for
            none, None for all.
        query_length: Number of queries `T`, where the axis of `query_hash` is 1.
        key_length: Number of keys `S`, where the axis of `key_hash` is 1.
        **options: Positions and implementation.

    Returns:
        The index; of `R` rounds a list of `2**R - 1`, in which joint buckets of several rounds are taken away again.

    Raises:
        TypeError: The hashes, windows, offsets or segment ids are not int32.
        ValueError: Shapes do not fit each other, `num_buckets` is below 1, or the lengths differ and there is no
            `query_offset`.

    Examples:
        >>> import numpy as np, scfa_jax
        >>> parity = np.arange(6, dtype=np.int32)[:, None] % 2
        >>> scfa_jax.hash_index(parity, num_buckets=2).pairs().tolist()  # 1 + 2 + 3 in each bucket
        [[12.0]]
    """
    _checks.num_buckets(num_buckets)
    build = functools.partial(
        _one_round,
        exclude_self=exclude_self,
        window=window,
        query_length=query_length,
        key_length=key_length,
        **options,
    )
    if getattr(query_hash, "ndim", None) != 4:
        return build(query_hash, key_hash, num_buckets=num_buckets)
    parts = _rounds.signed_parts(query_hash, key_hash, num_buckets)
    return [
        dataclasses.replace(build(part.of_query, part.of_key, num_buckets=part.num_buckets), sign=part.sign)
        for part in parts
    ]


@_options.documented
def local_hash_index(
    query_hash: Int[Array | np.ndarray, "*#B #T #N"],
    key_hash: Int[Array | np.ndarray, "*#B #S #K"] | None,
    local_window: int,
    *,
    exclude_self: bool = False,
    num_buckets: int | None = None,
    **options: Unpack[_options.PositionOptions],
) -> list[SparseIndex]:
    """Every query attends to the last positions whatever their bucket, and before them to all keys of its bucket.

    Source: of the buckets, Pagliardini et al. 2023, "Faster Causal Attention Over Large Sequences Through Sparse Flash
    Attention".

    Args:
        query_hash: int32, the bucket of each query; `B` and `N` may be 1.
        key_hash: int32, likewise; None means the same as `query_hash`.
        local_window: Static number of positions up to its own that a query sees whatever their bucket.
        exclude_self: Whether a query may not attend to the key at its own position, which the window counts all the
            same: it then holds one key less.
        num_buckets: A static promise that all ids lie in `[0, num_buckets)`, for a cheaper sort; see `hash_index`.
        **options: Positions and implementation.

    Returns:
        Two indices: the window, and the bucket before it; the latter alone where the window holds no key.

    Raises:
        TypeError: As in `hash_index`, or `local_window` is no static int.
        ValueError: As in `hash_index`, or `local_window` is below 0.

    Examples:
        >>> import numpy as np, scfa_jax
        >>> parity = np.arange(6, dtype=np.int32)[:, None] % 2
        >>> near, in_bucket = scfa_jax.local_hash_index(parity, None, local_window=2, num_buckets=2)
        >>> int(near.pairs().sum()), int(in_bucket.pairs().sum())  # of 21
        (11, 6)
    """
    _checks.static_int("local_window", local_window, least=0)
    lengths = [x.shape[-2] for x in (query_hash, query_hash if key_hash is None else key_hash)]
    offset = _positions.resolved_offset(options.get("query_offset"), *lengths)
    local_window, own = min(local_window, _positions.LIMIT), int(exclude_self)
    # Keys at or before a query that stands as far back are those before the window.
    at_bucket = _options.with_offset(options, _positions.earlier(offset, max(local_window, own)))
    before = _one_round(query_hash, key_hash, num_buckets=num_buckets, **at_bucket)
    if local_window <= own:
        return [before]
    at_window = _options.with_offset(options, _positions.earlier(offset, own))
    return [causal_index(*lengths, window=local_window - own, **at_window), before]


def _one_round(
    query_hash: Any,
    key_hash: Any,
    *,
    num_buckets: int | None,
    exclude_self: bool = False,
    window: Any = None,
    query_length: int | None = None,
    key_length: int | None = None,
    **options: Unpack[_options.PositionOptions],
) -> SparseIndex:
    _checks.num_buckets(num_buckets)
    query_id = _checks.per_token("query_hash", query_hash, jnp.int32, query_length)
    # Equal places on both sides let one sort serve both.
    shared = key_hash is None and key_length in (None, query_id.shape[-1]) and options.get("key_segment_ids") is None
    if key_hash is None:
        key_hash, key_length = query_hash, query_id.shape[-1] if key_length is None else key_length
    key_id = _checks.per_token("key_hash", key_hash, jnp.int32, key_length)
    query_length, key_length = query_id.shape[-1], key_id.shape[-1]
    windows = _positions.checked_window(window)
    options["query_offset"] = offset = _positions.resolved_offset(options.get("query_offset"), query_length, key_length)
    line = _positions.line_up(query_length, key_length, window=windows, exclude_self=exclude_self, **options)
    check_sides(line, windows, query_hash=query_id, key_hash=key_id)
    _check_promise(num_buckets, query_hash=query_id, key_hash=key_id)
    is_aligned = query_length == key_length and _positions.starts_at_zero(offset)
    implementation = options.get("implementation")
    if num_buckets is not None and num_buckets * max(query_length, key_length, 1) < 2**31:
        # Padding is last in line, and so in the last bucket.
        query_id = line.queries(query_id, padding=num_buckets - 1)
        other_id = None if shared else line.keys(key_id, padding=num_buckets - 1)
        index = _packed(line, query_id, other_id, num_buckets, implementation)
    elif shared and is_aligned and window is None and isinstance(line, Positions):
        index = _shared_ranks(query_id, exclude_self)
    else:
        query_id, key_id = line.queries(query_id, padding=NEVER), line.keys(key_id, padding=NEVER)
        index = _ranks(line, windows, query_id, key_id, implementation)
    # Then the query at its own position attends to every key.
    all_met = shared and is_aligned and window is None and not exclude_self
    density = 1 / (num_buckets or 16)
    density = density if window is None else min(density, WINDOW_DENSITY)
    return dataclasses.replace(index, all_met=all_met, density=density)


def _packed(
    line: Positions | Segments,
    query_id: jax.Array,
    key_id: jax.Array | None,
    num_buckets: int,
    implementation: Implementation,
) -> SparseIndex:
    """Sorts (bucket, place) packed into one int32, which is the code as well."""
    query_length = query_id.shape[-1]
    sides = (query_id,) if key_id is None else (query_id, key_id)
    codes = ordering.sorted_codes(*sides, num_buckets=num_buckets, implementation=implementation)
    sorted_query, sorted_key = codes[0], codes[-1]
    key_length = sorted_key.shape[-1]
    bucket, query_place = ordering.divided(sorted_query, query_length)
    _, key_place = ordering.divided(sorted_key, key_length)
    return index_in_line(
        line,
        key_place=key_place,
        key_code=sorted_key,
        query_place=query_place,
        low=bucket * key_length + line.first(query_place),
        high=bucket * key_length + line.last(query_place),
    )


def _shared_ranks(ids: jax.Array, exclude_self: bool) -> SparseIndex:
    """Both sides have the same ids at the same positions: the code is the rank of one stable sort."""
    rank = iota_like(ids)
    ((sorted_id, order),) = ordering.sorted_ids(ids)
    low = ordering.run_start(sorted_id, rank)
    return SparseIndex(key_order=order, key_code=rank, query_order=order, low=low, high=rank - int(exclude_self))


def _ranks(
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
    (query_id, query_place), (key_id, key_place) = ordering.sorted_ids(query_id, key_id)
    low, high = line.ranges(query_id, query_place, key_id, key_place, implementation)
    return index_in_line(
        line, key_place=key_place, key_code=iota_like(key_id), query_place=query_place, low=low, high=high
    )


def _check_promise(num_buckets: int | None, **sides: jax.Array) -> None:
    for name, ids in sides.items() if num_buckets is not None else ():
        message = f"{name} must lie in [0, {num_buckets}), as num_buckets promises, got {{}} to {{}}."
        _checks.in_debugging(_is_below, message, ids, jnp.int32(num_buckets))


def _is_below(ids: jax.Array, num_buckets: jax.Array) -> tuple[jax.Array, ...]:
    return jnp.all((ids >= 0) & (ids < num_buckets)), jnp.min(ids, initial=0), jnp.max(ids, initial=0)
