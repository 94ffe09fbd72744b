"""The order by bucket in which a cache keeps its keys' places, so that a new token reads its bucket alone.

The order, int32 `[B, K, S]`, holds the places filled so far by (bucket, position); what stands behind them does not
matter. The keys of a bucket are one run of it. Keys and values themselves never move.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from scfa_jax import _partitioning, backends
from scfa_jax.backends import ordering
from scfa_jax.backends.ordering import iota
from scfa_jax.backends.protocol import Backend, Call, Run
from scfa_jax.backends.tile import NO_KEY, Logits
from scfa_jax.merge import merged

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

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
    on_cuda = backends.choose(None, _call(head_dim, jnp.float32, None)).on_cuda
    has_kernel = on_cuda is not None and on_cuda.missing(device=True) is None
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
    is_filled = iota(key_hash.shape[1])[None, :, None] < count
    # Among equal ids places ascend, so that those to be filled are last whatever ids there are.
    ids = jnp.where(is_filled, key_hash, np.iinfo(np.int32).max)
    ((_, order),) = ordering.sorted_ids(ids.swapaxes(1, 2))
    return order


def attend_from_one(
    query: Float[Array, "B 1 N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    query_hash: Int[Array, "B 1 N"],
    key_hash: Int[Array, "B S K"],
    order: Int[Array, "B K S"],
    position: Int[Array, ""],
    *,
    exclude_self: bool,
    implementation: backends.Implementation = None,
    logits_soft_cap: float | None = None,
    sink_logits: Float[Array, " N"] | None = None,
) -> tuple[Float[Array, "B 1 N H"], Int[Array, "B K S"]]:
    """Attends from one token to the cached keys of its bucket, and puts it in order. It has no derivative.

    Args:
        query: Of the token.
        key: The cache with the token's own key.
        value: Likewise.
        query_hash: Any ids.
        key_hash: Those of the cache with the token's own.
        order: That of the tokens before.
        position: How many those are.
        exclude_self: Whether the token may not attend to itself.
        implementation: As in `scfa_jax.sparse_attention`.
        logits_soft_cap: As in `scfa_jax.sparse_attention`.
        sink_logits: As in `scfa_jax.sparse_attention`.

    Returns:
        The output in the dtype of `query`, and the order with the token in it.
    """
    if query.size == 0:
        return query, order
    call = _call(query.shape[3], query.dtype, logits_soft_cap)
    choice = backends.choose(implementation, call)

    def run(query, key, value, query_hash, key_hash, order, position):
        order = _with_token(order, key_hash, position)
        start, stop = _runs(query_hash, key_hash, position, exclude_self)
        return *backends.by_platform(choice, _decode, call, query, key, value, order, start, stop), order

    in_axes = ("b.h.", "b.h.", "b.h.", "b.h", "b.h", "bh.", "")
    arrays = (query, key, value, query_hash, key_hash, order, position)
    output, logsumexp, order = _partitioning.split(run, in_axes, ("b.h.", "bh.", "bh."))(*arrays)
    if sink_logits is not None:
        sinks = sink_logits.astype(jnp.float32)[None, None]
        output, _ = merged([output], [logsumexp.swapaxes(1, 2)], [1], no_key=NO_KEY, sink_logits=sinks)
    return output.astype(query.dtype), order


def _call(head_dim: int, dtype: Any, logits_soft_cap: float | None) -> Call:
    dtype = jnp.dtype(dtype)
    return Call(head_dim, head_dim, dtype, Logits(head_dim**-0.5, logits_soft_cap), output_dtype=dtype)


def _decode(backend: Backend, call: Call, query, key, value, *run: jax.Array) -> tuple[jax.Array, jax.Array]:
    return backend.decode(call, query, key, value, Run(*run))


def _with_token(order: jax.Array, key_hash: jax.Array, position: jax.Array) -> jax.Array:
    """Puts the token at a position behind all that have a bucket up to its own."""
    length = order.shape[2]
    is_before = iota(length)[None, :, None] < position
    own_hash = jax.lax.dynamic_slice_in_dim(key_hash, position, 1, axis=1)
    rank = jnp.sum(is_before & (key_hash <= own_hash), axis=1, dtype=jnp.int32)[..., None]
    shifted = jnp.concatenate([order[..., :1], order[..., :-1]], axis=2)
    place = iota(length)[None, None]
    token = jnp.minimum(position, length - 1)  # in a cache that is full, so that all rows are within memory
    return jnp.where(place < rank, order, jnp.where(place == rank, token, shifted))


def _runs(
    query_hash: jax.Array, key_hash: jax.Array, position: jax.Array, exclude_self: bool
) -> tuple[jax.Array, jax.Array]:
    """Where in the order, with the token in it, the keys that each head meets start and stop: int32 `[B, N]` both."""
    (batch, length, key_heads), heads = key_hash.shape, query_hash.shape[2]
    query_hash = query_hash.reshape(batch, 1, key_heads, heads // key_heads)
    key_hash, place = key_hash[..., None], iota(length)[None, :, None, None]
    count = functools.partial(jnp.sum, axis=1, dtype=jnp.int32)
    start = count((place <= position) & (key_hash < query_hash))
    # The token is the last of its bucket.
    met = count((place <= position - int(exclude_self)) & (key_hash == query_hash))
    return start.reshape(batch, heads), (start + met).reshape(batch, heads)
