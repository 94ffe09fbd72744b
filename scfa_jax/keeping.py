"""Which keys to keep, decided by a score when the key comes in: content-aware dropping for `qk_sparse_attention`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from scfa_jax import partitioning


def keep_top(scores: jax.Array, fraction: jax.Array | float, *, segment_ids: jax.Array | None = None) -> jax.Array:
    """Keeps each key whose score is among the top fraction of the scores so far.

    Source: the attention to what is kept is that of Pagliardini et al. 2023 (QK-sparse); the rule is this library's.

    The key at position `t` is kept if and only if it is one of the `ceil(fraction * (t + 1))` greatest among the keys
    at positions `0 .. t`; of equal scores the earlier is the greater. It is decided once, from tokens up to `t`, and
    never revised: about `fraction` of the keys are kept where scores do not drift, more where they rise. The first
    key is always kept, so no query is left without one. Exact, in `O(T log T)` time and memory linear in `T`.

    Args:
        scores: float `[B, T, K]`.
        fraction: Of the keys to keep, in `(0, 1]`; a float or float32 `[]`, which may change without recompilation.
        segment_ids: int32 `[1 or B, T]`: every segment is a sequence of its own, with ranks and positions from 0; or
            None.

    Returns:
        bool `[B, T, K]`. No gradient flows through it.

    Raises:
        TypeError: `scores` are no floating point numbers, or the segment ids not int32.
        ValueError: `scores` or `segment_ids` have other shapes, or a static `fraction` is outside `(0, 1]`.

    Examples:
        >>> import jax, jax.numpy as jnp, scfa_jax
        >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 16))
        >>> keep = jax.jit(lambda key: scfa_jax.keep_top(jnp.linalg.norm(key, axis=-1), 0.25))(key)
        >>> everything = jnp.ones((1, 1, 1), bool)
        >>> scfa_jax.qk_sparse_attention(query, key, value, everything, keep).shape
        (1, 64, 2, 16)
    """
    _check(scores, fraction, segment_ids)
    scores, fraction = jax.lax.stop_gradient((scores.swapaxes(1, 2), jnp.asarray(fraction, jnp.float32)))
    segments = None if segment_ids is None else segment_ids[:, None]
    (keep,) = partitioning.split(_kept, ["bh.", "", "bh."], ["bh."])(scores, fraction, segments)
    return keep.swapaxes(1, 2)


def _kept(scores: jax.Array, fraction: jax.Array, segments: jax.Array | None) -> tuple[jax.Array]:
    """`keep_top` of scores `[B, K, T]` with segments `[1 or B, 1, T]`."""
    places = jnp.arange(scores.shape[2], dtype=jnp.int32)
    if segments is None:
        order = jnp.argsort(-scores, axis=2, stable=True)
        return (_smaller_before(order) < fraction * (places + 1),)
    # Segments one after another: then a rank among all keys that came before is one within the segment.
    line = jnp.argsort(jnp.broadcast_to(segments, (scores.shape[0], 1, places.size)), axis=2, stable=True)
    segments = jnp.take_along_axis(segments, line, axis=2)
    scores = jnp.take_along_axis(scores, line, axis=2)
    order = jnp.lexsort((-scores, jnp.broadcast_to(-segments, scores.shape)), axis=2)
    begins = jnp.diff(segments, axis=2, prepend=segments[..., :1] - 1) != 0
    first = jax.lax.cummax(jnp.where(begins, places, 0), axis=2)
    keep = _smaller_before(order) < fraction * (places - first + 1)
    return (jnp.take_along_axis(keep, jnp.argsort(line, axis=2), axis=2),)


def _check(scores: jax.Array, fraction: jax.Array | float, segment_ids: jax.Array | None) -> None:
    if scores.ndim != 3:
        raise ValueError(f"scores must be [B, T, K], got shape {scores.shape}.")
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise TypeError(f"scores must be floating point numbers, got {scores.dtype}.")
    if not isinstance(fraction, jax.Array) and not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}.")
    if segment_ids is None:
        return
    if segment_ids.dtype != jnp.int32:
        raise TypeError(f"segment_ids must be int32, got {segment_ids.dtype}.")
    if (
        segment_ids.ndim != 2
        or segment_ids.shape[0] not in (1, scores.shape[0])
        or segment_ids.shape[1] != scores.shape[1]
    ):
        raise ValueError(f"segment_ids must be [1 or {scores.shape[0]}, {scores.shape[1]}], got {segment_ids.shape}.")


def _smaller_before(order: jax.Array) -> jax.Array:
    """For each number of a permutation, how many smaller ones stand before it.

    A stable radix sort, from the highest bit on: numbers with equal higher bits form a group, half of which has a 0
    next; each number with a 1 counts the zeros of its group before it, and zeros move to the group's front.

    Args:
        order: int32 `[..., T]`, permutations of `0 .. T - 1`.

    Returns:
        int32 `[..., T]`: the count of each number, at the place of that number.
    """
    length = order.shape[-1]
    bits = max(length - 1, 0).bit_length()
    place = jnp.arange(2**bits, dtype=jnp.int32)
    rows = order.reshape(-1, length).astype(jnp.int32)
    rows = jnp.concatenate([rows, jnp.broadcast_to(place[length:], (rows.shape[0], 2**bits - length))], axis=1)

    def level(number: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        values, counts = state
        half = 1 << (bits - 1 - number)
        start = place & -(2 * half)  # of the group; before it stand start // 2 zeros
        one = (values & half) != 0
        zeros = jnp.cumsum(~one, axis=1, dtype=jnp.int32) - ~one - start // 2
        target = start + jnp.where(one, half + (place - start) - zeros, zeros)
        counts = counts + jnp.where(one, zeros, 0)
        move = lambda x: jax.vmap(lambda x, target: jnp.zeros_like(x).at[target].set(x, unique_indices=True))(x, target)
        return move(values), move(counts)

    _, counts = jax.lax.fori_loop(0, bits, level, (rows, jnp.zeros_like(rows)))
    return counts[:, :length].reshape(order.shape)
