"""What the patterns share: from places in line to an index."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from scfa_jax import _checks, _positions
from scfa_jax._positions import Positions, Segments
from scfa_jax.backends.ordering import iota_like
from scfa_jax.index import NEVER, SparseIndex

WINDOW_DENSITY = 0.1  # of windows, whose lengths may be data


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
    is_query = is_query | jnp.zeros_like(high, bool)  # sharded as `high` is: `where` asks for that on explicit axes
    last_high = jnp.max(jnp.where(is_query, high, -1), axis=-1, keepdims=True, initial=-1)
    return SparseIndex(
        key_order=_positions.at_places(line.key_order, key_place),
        key_code=jnp.where(is_key, key_code, NEVER),
        query_order=_positions.at_places(line.query_order, query_place),
        low=jnp.where(is_query, low, NEVER),
        high=jnp.where(is_query, high, last_high),
    )


def up_to(code: jax.Array, high: jax.Array) -> jax.Array:
    """The codes `[B, K, S]`, with `NEVER` beyond the largest `high` `[B, N, T]` of the heads that share a key head."""
    last = jnp.max(high, axis=-1, initial=-1)
    groups = min(code.shape[1], last.shape[1])
    last = jnp.max(last.reshape(last.shape[0], groups, -1), axis=-1)[..., None]
    return jnp.where(code <= last, code, NEVER)


def check_sides(line: Positions | Segments, window: jax.Array | None, **sides: jax.Array) -> None:
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
