"""The pattern of QK-sparse attention: each head keeps some queries and some keys."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Unpack

import jax.numpy as jnp
import numpy as np

from scfa_jax import _checks, _options, _positions
from scfa_jax._positions import Positions
from scfa_jax.backends import ordering
from scfa_jax.index import NEVER, SparseIndex
from scfa_jax.patterns._build import WINDOW_DENSITY, check_sides, index_in_line, up_to

if TYPE_CHECKING:
    from jaxtyping import Array, Bool

    from scfa_jax.patterns.causal import Window


@_options.documented
def keep_index(
    query_keep: Bool[Array | np.ndarray, "*#B #T #N"],
    key_keep: Bool[Array | np.ndarray, "*#B #S #K"],
    *,
    window: Window | None = None,
    query_length: int | None = None,
    key_length: int | None = None,
    **options: Unpack[_options.PositionOptions],
) -> SparseIndex:
    """Every kept query attends to all kept keys at or before its position; dropped queries attend to nothing.

    Source: Pagliardini et al. 2023, "Faster Causal Attention Over Large Sequences Through Sparse Flash Attention".

    Args:
        query_keep: True where the query takes part.
        key_keep: True where the key takes part.
        window: How many positions up to its own a query may see: a static int, or int32 `[]`, `[N]` or `[B, N]`; 0 for
            none, None for all.
        query_length: Number of queries `T`, where the axis of `query_keep` is 1.
        key_length: Number of keys `S`, where the axis of `key_keep` is 1.
        **options: Positions and implementation.

    Returns:
        The index: kept rows first, by position, and dropped rows after them.

    Raises:
        TypeError: The masks are not boolean, or the windows, offsets or segment ids not int32.
        ValueError: Shapes do not fit each other, or the lengths differ and there is no `query_offset`.

    Examples:
        >>> import numpy as np, scfa_jax
        >>> keep = np.array([True, False, True])[:, None]
        >>> scfa_jax.keep_index(keep, keep).query_order.tolist()
        [[[0, 2, 1]]]
    """
    query_keep = _checks.per_token("query_keep", query_keep, jnp.bool_, query_length)
    key_keep = _checks.per_token("key_keep", key_keep, jnp.bool_, key_length)
    query_length, key_length = query_keep.shape[-1], key_keep.shape[-1]
    windows = _positions.checked_window(window)
    options["query_offset"] = _positions.resolved_offset(options.get("query_offset"), query_length, key_length)
    line = _positions.line_up(query_length, key_length, window=windows, **options)
    check_sides(line, windows, query_keep=query_keep, key_keep=key_keep)

    implementation = options.get("implementation")
    key_place, key_kept = ordering.kept_first(line.keys(key_keep, padding=False), implementation)
    query_place, query_kept = ordering.kept_first(line.queries(query_keep, padding=False), implementation)
    high = line.last(query_place)
    # Dropped queries come last; repeating the largest `high` keeps the row ascending.
    last_high = jnp.max(jnp.where(query_kept, high, -1), axis=-1, keepdims=True, initial=-1)
    # Heads that share their keys' mask need not share their queries', and a segment may end in dropped queries.
    all_met = isinstance(line, Positions) and window is None and (query_keep.shape[1] == 1 or key_keep.shape[1] > 1)
    key_code = jnp.where(key_kept, key_place, NEVER)
    index = index_in_line(
        line,
        key_place=key_place,
        key_code=up_to(key_code, last_high) if all_met else key_code,
        query_place=query_place,
        low=jnp.where(query_kept, line.first(query_place), NEVER),
        high=jnp.where(query_kept, high, last_high),
    )
    return dataclasses.replace(index, all_met=all_met, density=0.25 if window is None else WINDOW_DENSITY)
