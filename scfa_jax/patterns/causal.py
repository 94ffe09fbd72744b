"""Patterns of contiguous keys: all earlier ones, windows with sinks, given ranges."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Unpack

import jax.numpy as jnp
import numpy as np

from scfa_jax import _checks, _options, _positions
from scfa_jax._positions import Positions
from scfa_jax.backends import ordering
from scfa_jax.backends.ordering import iota
from scfa_jax.index import NEVER, SparseIndex
from scfa_jax.patterns._build import WINDOW_DENSITY, index_in_line, up_to

if TYPE_CHECKING:
    from jaxtyping import Array, Int

    Window = int | np.integer | Int[Array | np.ndarray, "*#B_N"]


@_options.documented
def causal_index(
    query_length: int,
    key_length: int,
    *,
    window: Window | None = None,
    **options: Unpack[_options.PositionOptions],
) -> SparseIndex:
    """Every query attends to all keys at or before its position.

    Args:
        query_length: Number of queries `T`.
        key_length: Number of keys `S`.
        window: How many positions up to its own a query may see: a static int, or int32 `[]`, `[N]` or `[B, N]`; 0 for
            none, None for all. Heads that share keys may have windows of their own.
        **options: Positions and implementation.

    Returns:
        The index, with a batch axis of 1 or `B` and one head, or as many as there are windows.

    Raises:
        TypeError: The windows, offsets or segment ids are not int32.
        ValueError: Shapes do not fit each other, or the lengths differ and there is no `query_offset`.

    Examples:
        >>> import scfa_jax
        >>> scfa_jax.causal_index(2, 6, query_offset=3).high.tolist()
        [[[3, 4]]]
    """
    options["query_offset"] = _positions.resolved_offset(options.get("query_offset"), query_length, key_length)
    line = _positions.line_up(query_length, key_length, window=_positions.checked_window(window), **options)
    key_code, high = iota(key_length)[None, None], line.last()
    is_aligned = options.get("key_segment_ids") is None and _positions.starts_at_zero(options["query_offset"])
    all_met = window is None and (isinstance(line, Positions) or is_aligned)
    index = index_in_line(
        line,
        key_place=None,
        # Before `index_in_line` gives each head a `high` of its own, which devices may share out.
        key_code=up_to(key_code, high) if all_met else key_code,
        query_place=None,
        low=line.first(),
        high=high,
    )
    density = WINDOW_DENSITY if window is not None else 1.0 if isinstance(line, Positions) else 0.25
    return dataclasses.replace(index, all_met=all_met, density=density)


@_options.documented
def window_index(
    query_length: int,
    key_length: int,
    window: Window,
    num_sinks: int = 0,
    **options: Unpack[_options.PositionOptions],
) -> list[SparseIndex]:
    """Every query attends to the last positions, and to the first ones of all as far as they lie before these.

    Sources: Beltagy et al. 2020, "Longformer", for the window; Xiao et al. 2023, "Efficient Streaming Language Models
    with Attention Sinks".

    Args:
        query_length: Number of queries `T`.
        key_length: Number of keys `S`.
        window: How many positions up to its own a query sees: a static int, or int32 `[]`, `[N]` or `[B, N]`.
        num_sinks: Static number of first positions (of each segment) that all later queries see too.
        **options: Positions and implementation.

    Returns:
        One index, or two with sinks.

    Raises:
        TypeError: As in `causal_index`, or `num_sinks` is no static int.
        ValueError: As in `causal_index`, or `num_sinks` is below 0.

    Examples:
        >>> import scfa_jax
        >>> near, sinks = scfa_jax.window_index(6, 6, window=2, num_sinks=1)
        >>> near.low.tolist(), sinks.high.tolist()  # the first key of the window, the last sink before it
        ([[[0, 0, 1, 2, 3, 4]]], [[[-1, -1, 0, 0, 0, 0]]])
    """
    _checks.static_int("num_sinks", num_sinks, least=0)
    near = causal_index(query_length, key_length, window=window, **options)
    if num_sinks == 0:
        return [near]
    every = causal_index(query_length, key_length, **options)
    last_sink = jnp.minimum(every.low, NEVER - num_sinks) + (num_sinks - 1)
    high = jnp.minimum(jnp.minimum(last_sink, near.low - 1), every.high)
    low = jnp.broadcast_to(every.low, high.shape)
    return [near, dataclasses.replace(every, low=low, high=high, all_met=False, density=near.density)]


@_options.documented
def range_index(
    key_start: Int[Array | np.ndarray, "*#B #T #N"],
    key_stop: Int[Array | np.ndarray, "*#B #T #N"],
    key_length: int,
    *,
    query_length: int | None = None,
    **options: Unpack[_options.SegmentOptions],
) -> SparseIndex:
    """Query `t` attends to the keys `key_start[t] .. key_stop[t] - 1`, whatever their position.

    Args:
        key_start: int32, clipped to `[0, key_length]`.
        key_stop: int32, likewise. A range that ends before it starts is empty.
        key_length: Number of keys `S`.
        query_length: Number of queries `T`, where the axis of both is 1.
        **options: Segments and implementation.

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
    start = _checks.per_token("key_start", key_start, jnp.int32, query_length)
    stop = _checks.per_token("key_stop", key_stop, jnp.int32, query_length)
    try:
        shape = np.broadcast_shapes(start.shape, stop.shape)
    except ValueError:
        raise ValueError(
            f"key_start {key_start.shape} and key_stop {key_stop.shape} must have equal axes or axes of 1."
        ) from None
    start, stop = (jnp.broadcast_to(jnp.clip(x, 0, key_length), shape) for x in (start, stop))
    start, stop, key_order, num_keys = _positions.line_up_ranges(start, stop, key_length, **options)
    key_code = iota(key_length)[None, None]
    if num_keys is not None:
        key_code = jnp.where(key_code < num_keys, key_code, NEVER)
    empty = start >= stop
    low, high, order = ordering.sorted_ranges(jnp.where(empty, NEVER, start), jnp.where(empty, -1, stop - 1))
    return SparseIndex(key_order, key_code, order, low, high, ascending=False)
