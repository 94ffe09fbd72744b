"""Attention of new tokens to those before them, whose keys and values are kept: what both Flax modules decode with.

Nothing here imports Flax, and every shape is static: one compilation serves all steps.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from scfa_jax import bucket_cache
from scfa_jax.sparsity import Implementation, Layout, Operands, Sparsity, kind_of, operands

# What attention keeps of `S` places, filled one after another, under Flax's names: `cached_key` and `cached_value`
# `[B, S, K, H]`, as they enter attention; `cached_<mark>` `[B, S, K]` for each mark of a key; `cached_order`, int32
# `[B, K, S]`, as `bucket_cache` has it, for kinds that keep one; and `cache_index`, int32 `[]`, the next place. Kinds
# that do not keep every token have a cache of their own.
Cache: TypeAlias = dict[str, jax.Array]


def empty_cache(
    layout: Layout, sparsity: Sparsity | None, batch_size: int, max_length: int, dtype: jax.typing.DTypeLike
) -> Cache:
    """Makes a cache without tokens.

    Args:
        layout: That of the module.
        sparsity: Likewise.
        batch_size: `B`.
        max_length: `S`, the most tokens that it can hold; it makes no difference to a kind that forgets tokens.
        dtype: That of the keys and values, which is that of the computation.

    Returns:
        The cache.

    Raises:
        ValueError: `max_length` is below 1.
    """
    if max_length < 1:
        raise ValueError(f"A cache must have room for at least 1 token, got {max_length}.")
    kind = kind_of(sparsity)
    if not kind.caches_every_token:
        return kind.empty_cache(layout, batch_size, dtype)
    places = (batch_size, max_length, layout.num_key_value_heads)
    marks, keeps_order = kind.cached_marks, kind.keeps_order(max_length, layout.head_dim)
    return {
        "cached_key": jnp.zeros((*places, layout.head_dim), dtype),
        "cached_value": jnp.zeros((*places, layout.head_dim), dtype),
        "cache_index": jnp.zeros((), jnp.int32),
        **{f"cached_{name}": jnp.full(places, fill) for name, fill in marks.items()},
        **({"cached_order": jnp.zeros((batch_size, places[2], max_length), jnp.int32)} if keeps_order else {}),
    }


def attend_cached(
    cache: Cache,
    query: jax.Array,
    key: jax.Array | None,
    value: jax.Array,
    sparsity: Sparsity | None = None,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: Implementation = None,
    **options: Any,
) -> tuple[jax.Array, Cache]:
    """Adds any number of tokens to a cache, and attends from them to all tokens in it.

    Equal to `scfa_jax.sparsity.attend` over the whole sequence, whatever the parts it comes in. One token reads the
    cache once, in plain JAX, or as much of it as the kind says; with an order by bucket it reads the keys of its bucket
    alone. Several go through the operators, which skip tiles.

    Args:
        cache: What came before.
        query: float `[B, T, N, H]`.
        key: float `[B, T, K, H]`, or None to make it of the query.
        value: float `[B, T, K, H]`.
        sparsity: A kind or None, that of the cache.
        positions: int32 `[1 or B, T]` for `rotary`; if None, they go on from `cache.cache_index`.
        segment_ids: Must be None.
        implementation: As in `scfa_jax.causal_attention`; for one token it matters only with an order by bucket.
        **options: The further options of `scfa_jax.sparsity.operands`.

    Returns:
        `[B, T, N, H]` in the dtype of `query`, and the cache with the new tokens. Once more tokens were added than
        there is room for, the output is NaN: how full a cache is, is data, which cannot raise. One that forgets tokens
        always has room.

    Raises:
        ValueError: The new tokens do not fit the cache, or as in `operands`.
        TypeError: The cache has another dtype than the computation.
        NotImplementedError: There are segments.
    """
    if segment_ids is not None:
        raise NotImplementedError("segment_ids must be None in decoding: the cache holds one sequence a batch element.")
    start, kind = cache["cache_index"], kind_of(sparsity)
    (batch, length), (cached_batch, max_length) = query.shape[:2], cache["cached_key"].shape[:2]
    if batch != cached_batch or (length > max_length and kind.caches_every_token):
        raise ValueError(
            f"x must have the batch size of the cache, {cached_batch}, and at most its {max_length} tokens, "
            f"got {batch} and {length}."
        )
    new = operands(query, key, value, sparsity, positions=positions, start=start, **options)
    if cache["cached_key"].dtype != new.key.dtype:
        raise TypeError(
            f"The cache must have the dtype of the computation, {new.key.dtype}, got {cache['cached_key'].dtype}."
        )
    if not kind.caches_every_token:
        return kind.attend_next(cache, new, implementation=implementation)
    cache = _extended(cache, new)
    marks = {name: cache[f"cached_{name}"] for name in kind.cached_marks}
    seen = new._replace(key=cache["cached_key"], value=cache["cached_value"], key_marks=marks)
    order = cache.get("cached_order")
    if length != 1:
        # Places behind the new tokens are later than they are: causality hides them.
        output = kind.attend(seen, query_offset=start, implementation=implementation)
        order = None if order is None else bucket_cache.order_of(marks["hash"], cache["cache_index"])
    elif order is not None:
        output, order = kind.attend_in_bucket(seen, order, start, implementation=implementation)
    else:
        output = _attend_from_one(seen, kind, start)
    cache |= {} if order is None else {"cached_order": order}
    return jnp.where(cache["cache_index"] <= max_length, output, jnp.nan), cache


def _extended(cache: Cache, new: Operands) -> Cache:
    """The cache with the keys of `new` written at its index."""
    marks = new.query_marks if new.key_marks is None else new.key_marks
    rows = {"key": new.key, "value": new.value} | marks
    written = {
        f"cached_{name}": jax.lax.dynamic_update_slice_in_dim(
            cache[f"cached_{name}"], row, cache["cache_index"], axis=1
        )
        for name, row in rows.items()
    }
    return cache | written | {"cache_index": cache["cache_index"] + new.query.shape[1]}


def _attend_from_one(seen: Operands, kind: Sparsity, position: jax.Array) -> jax.Array:
    """Attention of one query a head, at a position, to all the keys that it meets: `[B, 1, N, H]`."""
    batch, _, heads, head_dim = seen.query.shape
    length, key_heads = seen.key.shape[1:3]

    def on_query(x: jax.Array) -> jax.Array:
        """`[_, 1, N, ...]` by key head and place in its group: `[_, K, N // K, ...]`."""
        return x.reshape(x.shape[0], key_heads, heads // key_heads, *x.shape[3:])

    mask = kind.mask(
        {name: on_query(x)[..., None, None] for name, x in seen.query_marks.items()},
        {name: x.swapaxes(1, 2)[:, :, None, None] for name, x in (seen.key_marks or {}).items()},
        jnp.full((1, 1), position),
        jnp.arange(length),
    )
    mask = jnp.broadcast_to(mask, (batch, key_heads, heads // key_heads, 1, length))[..., 0, :]
    places = kind.places(position, length)
    if places is not None:
        mask = mask[..., places]
        seen = seen._replace(key=seen.key[:, places], value=seen.value[:, places])

    # As in the operators: sums in float32, and a row that takes no part reaches nothing, be it NaN.
    exact: dict[str, Any] = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    scores = head_dim**-0.5 * jnp.einsum("bkgh,bskh->bkgs", on_query(seen.query), seen.key, **exact)
    scores = jnp.where(mask, scores, -jnp.inf)
    peak = jnp.maximum(scores.max(axis=3, keepdims=True), jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - peak)
    value = jnp.where(mask.any(axis=2).swapaxes(1, 2)[..., None], seen.value, 0)
    output = jnp.einsum("bkgs,bskh->bkgh", weights.astype(value.dtype), value, **exact)
    total = weights.sum(axis=3)[..., None]
    output = output / jnp.where(total > 0, total, 1)
    return output.reshape(seen.query.shape).astype(seen.query.dtype)
