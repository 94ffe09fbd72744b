"""Where rows stand: offsets, windows, segments (packed documents) and padding.

Codes are made of where rows stand in line, their *places*. Without segments that is their position. With segment
ids, rows line up by (segment, position) and padding comes last. A segment is then a run of places, and what a query
sees of it under any pattern, up to its own position or between two others, is one range of places: exact for any
ids, ascending and contiguous or not.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scfa_jax import _checks
from scfa_jax.backends import Implementation, ordering
from scfa_jax.backends.ordering import iota, iota_like

_SIGN_BIT = np.int32(-(2**31))
LIMIT = 2**30  # of positions and windows: far past any length, and such that adding a length stays within int32


def resolved_offset(query_offset: Any, query_length: int, key_length: int) -> Any:
    """The position of the first query: the option `query_offset`, or 0 where it need not be given."""
    if query_offset is None:
        if query_length == key_length:
            return 0
        raise ValueError(
            f"query_offset must be given where query has {query_length} rows and key {key_length}: 0 if the first "
            f"query stands beside the first key, {key_length - query_length} if the last query stands beside the last."
        )
    if isinstance(query_offset, int | np.integer) and not isinstance(query_offset, bool):
        _checks.static_int("query_offset", query_offset, least=1 - LIMIT, most=LIMIT - 1)
        return int(query_offset)
    if not hasattr(query_offset, "dtype") or query_offset.dtype not in _checks.INTS:
        got = query_offset.dtype if hasattr(query_offset, "dtype") else repr(query_offset)
        raise TypeError(f"query_offset must be None, an int or an int32 array, got {got}.")
    if query_offset.ndim > 1:
        raise ValueError(f"query_offset must be an int, [] or [B], got shape {query_offset.shape}.")
    offset = jnp.asarray(query_offset, jnp.int32)
    _checks.in_debugging(_is_within_limit, "query_offset must be below 2**30, got {}.", offset)
    return jnp.clip(offset, 1 - LIMIT, LIMIT - 1)


def _is_within_limit(offset: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.all((offset > -LIMIT) & (offset < LIMIT)), offset


def earlier(offset: Any, by: Any) -> Any:
    """A resolved offset less `by`, from 0 to `LIMIT`; before all keys it does not matter how far."""
    if isinstance(offset, int) and isinstance(by, int):
        return max(offset - by, 1 - LIMIT)
    return jnp.maximum(jnp.asarray(offset, jnp.int32) - jnp.asarray(by, jnp.int32), 1 - LIMIT)


def first_position(offset: Any) -> jax.Array:
    """A resolved offset as int32 `[B or 1, 1, 1]`."""
    return jnp.asarray(offset, jnp.int32).reshape(-1, 1, 1)


def starts_at_zero(offset: Any) -> bool:
    """Whether queries are known to count from 0, as keys do."""
    return isinstance(offset, int) and offset == 0


def checked_window(value: Any) -> jax.Array | None:
    """Checks the lengths of windows and returns them as int32 `[B or 1, N or 1, 1]`, or None for no window."""
    if value is None:
        return None
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        _checks.static_int("window", value, least=0)
        return jnp.full((1, 1, 1), min(value, LIMIT), jnp.int32)
    if not hasattr(value, "dtype") or value.dtype not in _checks.INTS:
        got = value.dtype if hasattr(value, "dtype") else repr(value)
        raise TypeError(f"window must be None, an int or an int32 array, got {got}.")
    if value.ndim > 2:
        raise ValueError(f"window must be an int, [], [N] or [B, N], got shape {value.shape}.")
    value = jnp.clip(jnp.asarray(value, jnp.int32), 0, LIMIT)
    return value.reshape(value.shape[0] if value.ndim == 2 else 1, -1, 1)


@dataclass(frozen=True)
class Positions:
    """A line without segments: every row's place is its position.

    Attributes:
        last_of_first: int32 `[B or 1, 1, 1]`, position of the last key that the first query may see.
        first_of_first: int32 `[B or 1, N or 1, 1]`, that of the first one, which may be negative; None for no window.
        query_length: `T`.
        key_length: `S`.
    """

    last_of_first: jax.Array
    first_of_first: jax.Array | None
    query_length: int
    key_length: int

    def queries(self, x: jax.Array, padding) -> jax.Array:
        """Lines up `[B, N, T]`."""
        return x

    def keys(self, x: jax.Array, padding) -> jax.Array:
        """Lines up `[B, K, S]`."""
        return x

    def key_rows(self, place: jax.Array) -> jax.Array:
        """The rows of keys at places `[B, K, M]`."""
        return place

    def first(self, place: jax.Array | None = None) -> jax.Array:
        """The place of the first key that queries may see; of all queries, or of those at `place`."""
        place = iota(self.query_length)[None, None] if place is None else place
        if self.first_of_first is None:
            return jnp.zeros_like(place)
        return jnp.clip(self.first_of_first + place, 0, self.key_length)

    def last(self, place: jax.Array | None = None) -> jax.Array:
        """The place of the last key that queries may see; before the first if there is none."""
        place = iota(self.query_length)[None, None] if place is None else place
        return jnp.clip(self.last_of_first + place, -1, self.key_length - 1)

    def ranges(
        self, query_id: jax.Array, place: jax.Array, key_id: jax.Array, key_place: jax.Array, how: Implementation
    ) -> tuple[jax.Array, jax.Array]:
        """Ranks, among keys sorted by (id, place), of the first and last key with a query's id that it may see."""
        if self.first_of_first is None:
            return ordering.key_ranges(query_id, self.last(place), key_id, key_place, how)
        return _ranges_between(self.first(place), self.last(place), query_id, key_id, key_place, how)


@dataclass(frozen=True)
class Segments:
    """A line by (segment, position), padding last; the methods are those of `Positions`.

    Attributes:
        query_order: int32 `[B, 1, T]`, the row at each place.
        key_order: int32 `[B, 1, S]`, likewise.
        num_queries: int32 `[B, 1, 1]`, how many are no padding.
        num_keys: int32 `[B, 1, 1]`, likewise.
        first_key: int32 `[B, N or 1, T]`, for the query at each place, that of the first key of its segment it may see.
        last_key: int32 `[B, 1, T]`, the place of the last one; before `first_key` if it may see none.
    """

    query_order: jax.Array
    key_order: jax.Array
    num_queries: jax.Array
    num_keys: jax.Array
    first_key: jax.Array
    last_key: jax.Array

    def queries(self, x: jax.Array, padding) -> jax.Array:
        """Lines up `[B, N, T]`, with `padding` in the rows that take no part."""
        return _lined_up(x, self.query_order, self.num_queries, padding)

    def keys(self, x: jax.Array, padding) -> jax.Array:
        """Lines up `[B, K, S]`, with `padding` in the rows that take no part."""
        return _lined_up(x, self.key_order, self.num_keys, padding)

    def key_rows(self, place: jax.Array) -> jax.Array:
        return at_places(self.key_order, place)

    def first(self, place: jax.Array | None = None) -> jax.Array:
        return at_places(self.first_key, place)

    def last(self, place: jax.Array | None = None) -> jax.Array:
        return at_places(self.last_key, place)

    def ranges(
        self, query_id: jax.Array, place: jax.Array, key_id: jax.Array, key_place: jax.Array, how: Implementation
    ) -> tuple[jax.Array, jax.Array]:
        return _ranges_between(self.first(place), self.last(place), query_id, key_id, key_place, how)


def line_up(
    query_length: int,
    key_length: int,
    *,
    query_offset: Any = None,
    query_segment_ids: jax.Array | None = None,
    key_segment_ids: jax.Array | None = None,
    implementation: Implementation = None,
    window: jax.Array | None = None,
    exclude_self: bool = False,
) -> Positions | Segments:
    """Lines up the rows of both sides for a causal pattern.

    Args:
        query_length: `T`.
        key_length: `S`.
        query_offset: As resolved.
        query_segment_ids: int32 `[B, T]` or `[T]`, below 0 for padding; None for no segments.
        key_segment_ids: int32 `[B, S]` or `[S]`; None means those of the queries.
        implementation: Of attention: whether kernels may search.
        window: int32 `[B or 1, N or 1, 1]`, how many positions up to its own a query may see; None for all.
        exclude_self: Whether a query may not see the key at its own position.

    Returns:
        The line.

    Raises:
        TypeError: The ids are not int32.
        ValueError: Shapes do not fit each other.
    """
    position = first_position(query_offset)
    windows = {} if window is None else {"window": window}
    _checks.batches(query_offset=position, **windows)
    last_of_first, first_of_first = position - int(exclude_self), None
    if window is not None:
        # A window that holds nothing begins past all keys, and no tile is visited for it.
        first_of_first = jnp.where(window > int(exclude_self), position - window + 1, LIMIT)
    _check_both_given(query_segment_ids, key_segment_ids, query_length, key_length)
    if query_segment_ids is None:
        return Positions(last_of_first, first_of_first, query_length, key_length)
    queries = _side("query_segment_ids", query_segment_ids, query_length)
    keys = queries if key_segment_ids is None else _side("key_segment_ids", key_segment_ids, key_length)
    _checks.batches(query_segment_ids=queries.order, key_segment_ids=keys.order, query_offset=position, **windows)
    count_up_to = functools.partial(_count_up_to, queries, keys, implementation)
    if keys is queries and starts_at_zero(query_offset):
        place = iota_like(queries.order)
        first, last = ordering.run_start(queries.segment, place), place - int(exclude_self)
    else:
        first, count = count_up_to(jnp.clip(last_of_first + queries.order, -1, key_length - 1))
        last = count - 1
    if first_of_first is not None:
        _, first = count_up_to(jnp.clip(first_of_first + queries.order, 0, key_length) - 1)
    return Segments(queries.order, keys.order, queries.count, keys.count, first, last)


def line_up_ranges(
    start: jax.Array,
    stop: jax.Array,
    key_length: int,
    *,
    query_segment_ids: jax.Array | None = None,
    key_segment_ids: jax.Array | None = None,
    implementation: Implementation = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """Turns ranges of positions into ranges of places, cut to the keys of each query's segment.

    Args:
        start: int32 `[B, N, T]`, the first position, in `[0, key_length]`.
        stop: int32 `[B, N, T]`, one past the last, likewise.
        key_length: `S`.
        query_segment_ids: int32 `[B, T]` or `[T]`, below 0 for padding; None for no segments.
        key_segment_ids: int32 `[B, S]` or `[S]`; None means those of the queries.
        implementation: Of attention: whether kernels may search.

    Returns:
        The first place and one past the last, int32 `[B, N, T]`; the row at each place, int32 `[B, 1, S]`; and how
        many of them are no padding, int32 `[B, 1, 1]`. The last two are None without segments.
    """
    query_length = start.shape[-1]
    _check_both_given(query_segment_ids, key_segment_ids, query_length, key_length)
    if query_segment_ids is None:
        return start, stop, None, None
    query_segment = _segments("query_segment_ids", query_segment_ids, query_length)
    keys = _side("key_segment_ids", query_segment_ids if key_segment_ids is None else key_segment_ids, key_length)
    _checks.batches(query_segment_ids=query_segment, key_segment_ids=keys.order, key_start=start)
    batch = max(x.shape[0] for x in (query_segment, keys.order, start))
    query_segment, start, stop = (jnp.broadcast_to(x, (batch, *start.shape[1:])) for x in (query_segment, start, stop))

    def count_before(position):
        _, last = ordering.key_ranges(query_segment, position - 1, keys.segment, keys.order, implementation)
        return jnp.minimum(last + 1, keys.count)  # also leaves padding nothing to see

    return count_before(start), count_before(stop), keys.order, keys.count


def _count_up_to(
    queries: _Side, keys: _Side, implementation: Implementation, position: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """For queries, how many keys come before their segment, and how many up to `position` in it: int32 `[B, N, T]`."""
    batch = max(x.shape[0] for x in (queries.order, keys.order, position))
    position = jnp.broadcast_to(position, (batch, *position.shape[1:]))
    segment = jnp.broadcast_to(queries.segment, position.shape)
    first, last = ordering.key_ranges(segment, position, keys.segment, keys.order, implementation)
    return first, last + 1


def _ranges_between(
    first: jax.Array,
    last: jax.Array,
    query_id: jax.Array,
    key_id: jax.Array,
    key_place: jax.Array,
    implementation: Implementation,
) -> tuple[jax.Array, jax.Array]:
    """Ranks of the first and last key with a query's id from place `first` on up to place `last`."""

    def last_up_to(place):
        shape = np.broadcast_shapes(query_id.shape, place.shape)
        on_query, place = jnp.broadcast_to(query_id, shape), jnp.broadcast_to(place, shape)
        return ordering.key_ranges(on_query, place, key_id, key_place, implementation)[1]

    return last_up_to(first - 1) + 1, last_up_to(last)


def both_segments(
    query_segment_ids: jax.Array | None, key_segment_ids: jax.Array | None, query_length: int, key_length: int
) -> tuple[jax.Array, jax.Array]:
    """The checked segments of queries and keys, int32 `[B or 1, L]`."""
    _check_both_given(query_segment_ids, key_segment_ids, query_length, key_length)
    assert query_segment_ids is not None
    of_query = _checked_segments("query_segment_ids", query_segment_ids, query_length)
    if key_segment_ids is None:
        return of_query, of_query
    return of_query, _checked_segments("key_segment_ids", key_segment_ids, key_length)


def _check_both_given(
    query_segment_ids: jax.Array | None, key_segment_ids: jax.Array | None, query_length: int, key_length: int
) -> None:
    if query_segment_ids is None and key_segment_ids is not None:
        raise ValueError(f"query_segment_ids must be given with key_segment_ids {key_segment_ids.shape}, got None.")
    if query_segment_ids is not None and key_segment_ids is None and query_length != key_length:
        raise ValueError(
            f"key_segment_ids may be None only where there are as many keys as queries, "
            f"got {key_length} and {query_length}."
        )


def at_places(x: jax.Array, place: jax.Array | None) -> jax.Array:
    """The entries of `[B, 1, L]` at places `[B, N, M]`, or all of them."""
    return x if place is None else ordering.take(x, place)


def _lined_up(x: jax.Array, order: jax.Array, count: jax.Array, padding) -> jax.Array:
    return jnp.where(iota_like(order) < count, ordering.take(x, order), jnp.asarray(padding, x.dtype))


@dataclass(frozen=True)
class _Side:
    """One side in order of (segment, position).

    Attributes:
        order: int32 `[B, 1, L]`, the row at each place.
        segment: int32 `[B, 1, L]`, the segment there, so flipped that padding is largest.
        count: int32 `[B, 1, 1]`, how many rows are no padding.
    """

    order: jax.Array
    segment: jax.Array
    count: jax.Array


def _side(name: str, segment_ids: jax.Array, length: int) -> _Side:
    ((segment, order),) = ordering.sorted_ids(_segments(name, segment_ids, length))
    return _Side(order, segment, jnp.sum(segment < 0, axis=-1, keepdims=True, dtype=jnp.int32))


def _segments(name: str, segment_ids: jax.Array, length: int) -> jax.Array:
    """Checked ids as `[B, 1, L]` with their sign bit flipped: padding comes after all segments."""
    return jnp.bitwise_xor(_checked_segments(name, segment_ids, length)[:, None], _SIGN_BIT)


def _checked_segments(name: str, segment_ids: jax.Array, length: int) -> jax.Array:
    """Checked ids as int32 `[B or 1, L]`."""
    _checks.integers(name, segment_ids)
    if segment_ids.ndim not in (1, 2) or segment_ids.shape[-1] != length:
        raise ValueError(f"{name} must be [B, {length}] or [{length}], got shape {segment_ids.shape}.")
    return jnp.atleast_2d(jnp.asarray(segment_ids, jnp.int32))
