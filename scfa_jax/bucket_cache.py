"""The order by bucket in which a cache keeps its keys' places, so that a new token reads its bucket alone.

The order, int32 `[B, K, S]`, holds the places filled so far by (bucket, position); what stands behind them does not
matter. The keys of a bucket are one run of it. Keys and values themselves never move.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from scfa_jax import dispatch, partitioning, sorting
from scfa_jax.kernels import _compat
from scfa_jax.sorting import Implementation, iota

# Places from which on a cache keeps the order, by what reads it: with fewer, reading all keys is about as fast.
LEAST_ROOM = {
    "cpu": 2048,  # two cores of an AMD EPYC, 16 buckets, presets "cpu" and "bytes" of `python -m benchmarks.decoding`
    "triton": 4096,  # an H200, preset "gpt2-small": 1% more time at 4,096 tokens, 22% less at 16,384
}


def pays(max_length: int, head_dim: int) -> bool:
    """Tells whether one token reads its bucket faster than all keys, on the platform at hand.

    Args:
        max_length: Places of the cache, `S`.
        head_dim: `H`.

    Returns:
        Whether; never on a GPU or TPU without kernels, where each small gather is a launch.
    """
    has_kernel = _compat.gpu_problem() is None and dispatch.choose(None, head_dim) is None
    least = LEAST_ROOM.get("triton" if has_kernel else jax.default_backend())
    return least is not None and max_length >= least


def order_of(key_hash: jax.Array, count: jax.Array) -> jax.Array:
    """Sorts the places of a cache.

    Args:
        key_hash: int32 `[B, S, K]`, any ids.
        count: int32 `[]`, how many places are filled.

    Returns:
        The order, int32 `[B, K, S]`.
    """
    is_filled = iota(key_hash.shape[1])[:, None] < count
    # Among equal ids places ascend, so that those to be filled are last whatever ids there are.
    ids = jnp.where(is_filled, key_hash, np.iinfo(np.int32).max)
    ((_, order),) = sorting.sorted_ids(ids.swapaxes(1, 2))
    return order


def attend_from_one(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_hash: jax.Array,
    key_hash: jax.Array,
    order: jax.Array,
    position: jax.Array,
    *,
    exclude_self: bool,
    implementation: Implementation,
) -> tuple[jax.Array, jax.Array]:
    """Attends from one token to the cached keys of its bucket, and puts it in order. It has no derivative.

    Args:
        query: float `[B, 1, N, H]`.
        key: float `[B, S, K, H]`, the cache with the token's own key.
        value: float `[B, S, K, H]`, likewise.
        query_hash: int32 `[B, 1, N]`, any ids.
        key_hash: int32 `[B, S, K]`, those of the cache with the token's own.
        order: int32 `[B, K, S]`, that of the tokens before.
        position: int32 `[]`, how many those are.
        exclude_self: Whether the token may not attend to itself.
        implementation: As in `scfa_jax.causal_attention`.

    Returns:
        `[B, 1, N, H]` in the dtype of `query`, and the order with the token in it.
    """
    options = _Options(dispatch.choose(implementation, query.shape[3]), query.shape[3] ** -0.5)

    if query.size == 0:
        return query, order

    def run(query, key, value, query_hash, key_hash, order, position):
        order = _with_token(order, key_hash, position)
        start, stop = _runs(query_hash, key_hash, position, exclude_self)
        return dispatch.by_platform(options, _forward, query, key, value, order, start, stop), order

    in_axes = ("b.h.", "b.h.", "b.h.", "b.h", "b.h", "bh.", "")
    return partitioning.split(run, in_axes, ("b.h.", "bh."))(query, key, value, query_hash, key_hash, order, position)


@dataclass(frozen=True)
class _Options:
    """What is static in a call, as `dispatch.by_platform` takes it."""

    implementation: str | None
    scale: float


def _forward(implementation: str, options: _Options, *arrays: jax.Array) -> jax.Array:
    if implementation == "xla":
        from scfa_jax.kernels import xla_decode

        return xla_decode.forward(*arrays, scale=options.scale)
    from scfa_jax.kernels import triton_decode  # here, so that a JAX without the backend can import the rest

    return triton_decode.forward(*arrays, scale=options.scale, interpret=implementation == "triton_interpret")


def _with_token(order: jax.Array, key_hash: jax.Array, position: jax.Array) -> jax.Array:
    """Puts the token at a position behind all that have a bucket up to its own."""
    place, length = iota(order.shape[2]), order.shape[2]
    is_before = place[:, None] < position
    own_hash = jax.lax.dynamic_slice_in_dim(key_hash, position, 1, axis=1)
    rank = jnp.sum(is_before & (key_hash <= own_hash), axis=1, dtype=jnp.int32)[..., None]
    shifted = jnp.concatenate([order[..., :1], order[..., :-1]], axis=2)
    token = jnp.minimum(position, length - 1)  # in a cache that is full, so that all rows are within memory
    return jnp.where(place < rank, order, jnp.where(place == rank, token, shifted))


def _runs(
    query_hash: jax.Array, key_hash: jax.Array, position: jax.Array, exclude_self: bool
) -> tuple[jax.Array, jax.Array]:
    """Where in the order, with the token in it, the keys that each head meets start and stop: int32 `[B, N]` both."""
    (batch, length, key_heads), heads = key_hash.shape, query_hash.shape[2]
    query_hash = query_hash.reshape(batch, 1, key_heads, heads // key_heads)
    key_hash, place = key_hash[..., None], iota(length)[:, None, None]
    count = functools.partial(jnp.sum, axis=1, dtype=jnp.int32)
    start = count((place <= position) & (key_hash < query_hash))
    # The token is the last of its bucket.
    met = count((place <= position - int(exclude_self)) & (key_hash == query_hash))
    return start.reshape(batch, heads), (start + met).reshape(batch, heads)
