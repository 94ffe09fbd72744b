"""A cache with a place for each token: keys, values and marks as they enter attention. Every shape is static."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from scfa_jax.backends.tile import Logits

if TYPE_CHECKING:
    from scfa_jax.layers.kind import Cache, Layout


def empty(
    layout: Layout,
    batch_size: int,
    max_length: int,
    dtype: jax.typing.DTypeLike,
    marks: dict[str, np.bool_ | np.number],
) -> Cache:
    """A cache without tokens: `cached_key` and `cached_value` `[B, S, K, H]`, and `cached_<mark>` `[B, S, K]` each."""
    if max_length < 1:
        raise ValueError(f"A cache must have room for at least 1 token, got {max_length}.")
    places = (batch_size, max_length, layout.num_key_value_heads)
    return {
        "cached_key": jnp.zeros((*places, layout.head_dim), dtype),
        "cached_value": jnp.zeros((*places, layout.head_dim), dtype),
        "cache_index": jnp.zeros((), jnp.int32),
        **{f"cached_{name}": jnp.full(places, fill) for name, fill in marks.items()},
    }


def check(cache: Cache, key: jax.Array, *, has_places: bool = True) -> None:
    """Checks the keys of new tokens, `[B, T, K, H]`, against a cache."""
    (batch, length), (cached_batch, max_length) = key.shape[:2], cache["cached_key"].shape[:2]
    if batch != cached_batch or (has_places and length > max_length):
        raise ValueError(
            f"x must have the batch size of the cache, {cached_batch}, and at most its {max_length} tokens, "
            f"got {batch} and {length}."
        )
    if cache["cached_key"].dtype != key.dtype:
        raise TypeError(
            f"The cache must have the dtype of the computation, {key.dtype}, got {cache['cached_key'].dtype}."
        )


def extended(cache: Cache, key: jax.Array, value: jax.Array, marks: dict[str, jax.Array]) -> Cache:
    """The cache with new tokens: `[B, T, K, H]`, and marks `[1 or B, 1 or T, 1 or K]`."""
    check(cache, key)
    start, length = cache["cache_index"], key.shape[1]
    marks = {name: jnp.broadcast_to(mark, key.shape[:3]) for name, mark in marks.items()}
    written = {
        f"cached_{name}": jax.lax.dynamic_update_slice_in_dim(cache[f"cached_{name}"], row, start, axis=1)
        for name, row in {"key": key, "value": value, **marks}.items()
    }
    return {**cache, **written, "cache_index": start + length}


def contents(cache: Cache, length: int) -> tuple[jax.Array, jax.Array, dict[str, jax.Array], jax.Array]:
    """The keys, values and marks of a cache, and where the last `length` tokens in it start."""
    apart = ("cached_key", "cached_value", "cached_order", "cache_index")
    marks = {name.removeprefix("cached_"): x for name, x in cache.items() if name not in apart}
    return cache["cached_key"], cache["cached_value"], marks, cache["cache_index"] - length


def nan_past_the_end(output: jax.Array, cache: Cache) -> jax.Array:
    """NaN once more tokens were added than there is room for: how full a cache is, is data, which cannot raise."""
    return jnp.where(cache["cache_index"] <= cache["cached_key"].shape[1], output, jnp.nan)


def attend_from_one(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    places: jax.Array | None = None,
    *,
    logits_soft_cap: float | None = None,
    sink_logits: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """Attends from one query a head in plain JAX, which reads the cache once.

    Args:
        query: `[B, 1, N, H]`.
        key: `[B, S, K, H]`.
        value: `[B, S, K, H]`.
        mask: bool `[1 or B, 1 or N, S]`, which keys each query attends to.
        places: int32, the keys to read; None for all of them.
        logits_soft_cap: As in `scfa_jax.sparse_attention`.
        sink_logits: As in `scfa_jax.sparse_attention`.
        **options: Further options of attention make no difference.

    Returns:
        `[B, 1, N, H]` in the dtype of `query`.
    """
    del options
    batch, _, heads, head_dim = query.shape
    key_heads = key.shape[2]
    group = heads // key_heads
    mask = jnp.broadcast_to(mask, (batch, heads, key.shape[1])).reshape(batch, key_heads, group, -1)
    if places is not None:
        mask, key, value = mask[..., places], key[:, places], value[:, places]

    # As in the operators: sums in float32, and a row that takes no part reaches nothing, be it NaN.
    exact: dict[str, Any] = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    logits = Logits(head_dim**-0.5, logits_soft_cap)
    products = jnp.einsum("bkgh,bskh->bkgs", query.reshape(batch, key_heads, group, head_dim), key, **exact)
    scores = logits.scores(products) * (logits.scale if logits_soft_cap is None else logits_soft_cap)
    scores = jnp.where(mask, scores, -jnp.inf)
    peak = jnp.maximum(scores.max(axis=3, keepdims=True), jnp.finfo(jnp.float32).min)
    sinks = None if sink_logits is None else sink_logits.astype(jnp.float32).reshape(1, key_heads, group, 1)
    peak = peak if sinks is None else jnp.maximum(peak, sinks)
    weights = jnp.exp(scores - peak)
    value = jnp.where(mask.any(axis=2).swapaxes(1, 2)[..., None], value, jnp.zeros((), value.dtype))
    output = jnp.einsum("bkgs,bskh->bkgh", weights.astype(value.dtype), value, **exact)
    total = weights.sum(axis=3, keepdims=True)
    total = total if sinks is None else total + jnp.exp(sinks - peak)
    output = output / jnp.where(total > 0, total, 1)
    return output.reshape(query.shape).astype(query.dtype)
