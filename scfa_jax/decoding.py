"""Attention of new tokens to those before them, whose keys and values are kept: what both Flax modules decode with.

Nothing here imports Flax, and every shape is static: one compilation serves all steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from scfa_jax.sparsity import Drop, Hash, Implementation, Layout, Operands, Sparsity, operands


class Cache(NamedTuple):
    """What attention keeps of `S` places, filled one after another; the fields have Flax's names."""

    cached_key: jax.Array  # [B, S, K, H], as keys enter attention: rotated, normalised
    cached_value: jax.Array  # [B, S, K, H]
    cache_index: jax.Array  # int32 [], the next place
    cached_hash: jax.Array | None = None  # int32 [B, S, K], the bucket of each key; in hash mode
    cached_keep: jax.Array | None = None  # bool [B, S, K], whether the key takes part; in drop mode


def empty_cache(
    layout: Layout, sparsity: Sparsity, batch_size: int, max_length: int, dtype: jax.typing.DTypeLike
) -> Cache:
    """Makes a cache without tokens.

    Args:
        layout: That of the module.
        sparsity: Likewise.
        batch_size: `B`.
        max_length: `S`, the most tokens that it can hold.
        dtype: That of the keys and values, which is that of the computation.

    Returns:
        The cache.

    Raises:
        ValueError: `max_length` is below 1.
    """
    if max_length < 1:
        raise ValueError(f"A cache must have room for at least 1 token, got {max_length}.")
    places = (batch_size, max_length, layout.num_key_value_heads)
    return Cache(
        cached_key=jnp.zeros((*places, layout.head_dim), dtype),
        cached_value=jnp.zeros((*places, layout.head_dim), dtype),
        cache_index=jnp.zeros((), jnp.int32),
        cached_hash=jnp.zeros(places, jnp.int32) if isinstance(sparsity, Hash) else None,
        cached_keep=jnp.zeros(places, bool) if isinstance(sparsity, Drop) else None,
    )


def attend_cached(
    cache: Cache,
    query: jax.Array,
    key: jax.Array | None,
    value: jax.Array,
    sparsity: Sparsity = None,
    *,
    positions: jax.Array | None = None,
    query_keep: jax.Array | None = None,
    key_keep: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: Implementation = None,
    **options: Any,
) -> tuple[jax.Array, Cache]:
    """Adds any number of tokens to a cache, and attends from them to all tokens in it.

    Equal to `scfa_jax.sparsity.attend` over the whole sequence, whatever the parts it comes in. One token reads the
    whole cache once, in plain JAX; several go through the operators, which skip tiles.

    Args:
        cache: What came before.
        query: float `[B, T, N, H]`.
        key: float `[B, T, K, H]`, or None to make it of the query.
        value: float `[B, T, K, H]`.
        sparsity: None, `Hash` or `Drop`, that of the cache.
        positions: int32 `[1 or B, T]` for `rotary`; if None, they go on from `cache.cache_index`.
        query_keep: bool `[B, T, N]`, for `Drop`; everything is kept if None.
        key_keep: bool `[B, T, K]`, given if and only if `query_keep` is.
        segment_ids: Must be None.
        implementation: As in `scfa_jax.causal_attention`; one token at a time makes no difference.
        **options: The further options of `scfa_jax.sparsity.operands`.

    Returns:
        `[B, T, N, H]` in the dtype of `query`, and the cache with the new tokens. Once more tokens were added than
        there is room for, the output is NaN: how full a cache is, is data, which cannot raise.

    Raises:
        ValueError: The new tokens do not fit the cache, or as in `operands`.
        TypeError: The cache has another dtype than the computation.
        NotImplementedError: There are segments.
    """
    if segment_ids is not None:
        raise NotImplementedError("segment_ids must be None in decoding: the cache holds one sequence a batch element.")
    (batch, length, heads, _), (cached_batch, max_length, key_heads, _) = query.shape, cache.cached_key.shape
    if batch != cached_batch or length > max_length:
        raise ValueError(
            f"x must have the batch size of the cache, {cached_batch}, and at most its {max_length} tokens, "
            f"got {batch} and {length}."
        )
    start = cache.cache_index
    if options.get("rotary") is not None and positions is None:
        positions = start + jnp.arange(length, dtype=jnp.int32)[None]
    if isinstance(sparsity, Drop) and query_keep is None and key_keep is None:
        query_keep, key_keep = jnp.ones((batch, length, heads), bool), jnp.ones((batch, length, key_heads), bool)
    new = operands(
        query, key, value, sparsity, positions=positions, query_keep=query_keep, key_keep=key_keep, **options
    )
    cache = _extended(cache, new)
    seen = new._replace(
        key=cache.cached_key, value=cache.cached_value, key_hash=cache.cached_hash, key_keep=cache.cached_keep
    )
    if length == 1:
        output = _attend_from_one(seen, start - int(isinstance(sparsity, Hash) and sparsity.exclude_self))
    else:
        # Places behind the new tokens are later than they are: causality hides them.
        output = seen.attend(sparsity, query_offset=start, implementation=implementation)
    return jnp.where(cache.cache_index <= max_length, output, jnp.nan), cache


def _extended(cache: Cache, new: Operands) -> Cache:
    """The cache with the keys of `new` written at its index."""
    if cache.cached_key.dtype != new.key.dtype:
        raise TypeError(
            f"The cache must have the dtype of the computation, {new.key.dtype}, got {cache.cached_key.dtype}."
        )
    rows = {
        "cached_key": new.key,
        "cached_value": new.value,
        "cached_hash": new.query_hash if new.key_hash is None else new.key_hash,
        "cached_keep": new.key_keep,
    }
    length = new.query.shape[1]
    written = {
        name: jax.lax.dynamic_update_slice_in_dim(getattr(cache, name), row, cache.cache_index, axis=1)
        for name, row in rows.items()
        if row is not None
    }
    return cache._replace(cache_index=cache.cache_index + length, **written)


def _attend_from_one(seen: Operands, last: jax.Array) -> jax.Array:
    """Attention of one query a head to the keys at or before the place `last`: `[B, 1, N, H]`."""
    batch, _, heads, head_dim = seen.query.shape
    length, key_heads = seen.key.shape[1:3]

    def on_query(x: jax.Array) -> jax.Array:
        """`[B, 1, N, ...]` by key head and place in its group: `[B, K, N // K, ...]`."""
        return x.reshape(batch, key_heads, heads // key_heads, *x.shape[3:])

    def on_key(x: jax.Array) -> jax.Array:
        """`[B, S, K]` beside `on_query`: `[B, K, 1, S]`."""
        return x.swapaxes(1, 2)[:, :, None]

    mask = jnp.broadcast_to(jnp.arange(length) <= last, (batch, key_heads, heads // key_heads, length))
    if seen.query_hash is not None and seen.key_hash is not None:
        mask &= on_query(seen.query_hash)[..., None] == on_key(seen.key_hash)
    if seen.query_keep is not None and seen.key_keep is not None:
        mask &= on_query(seen.query_keep)[..., None] & on_key(seen.key_keep)

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
