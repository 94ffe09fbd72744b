"""Several rounds of hashing: each query attends once to every key that shares its bucket in any round."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from scfa_jax.merge import signed_merge
from scfa_jax.sorting import iota_like


def attend_to_union(
    attend: Callable[..., tuple[jax.Array, jax.Array]],
    query_hash: jax.Array,
    key_hash: jax.Array | None,
    num_buckets: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Attends to the union of the rounds' buckets, by inclusion and exclusion over joint hashes.

    The sums over buckets of any set of rounds jointly are added for odd sets and taken away for even ones, so that
    a pair that collides in several rounds counts once. Little cancels: the total is at least that of any one round,
    so `R` rounds raise rounding errors at most by `2**R - 1`, the number of calls of attention.

    Args:
        attend: `(query_hash, key_hash, num_buckets=)` to a float32 output and log-sum-exp, for one hash.
        query_hash: int32 `[R, B, T, N]`; any axis but the first may be 1.
        key_hash: int32 `[R, B, S, K]`, likewise; None means the same as `query_hash`.
        num_buckets: A promise that all ids lie in `[0, num_buckets)`, or None.

    Returns:
        The output and its log-sum-exp, float32 both.

    Raises:
        ValueError: There are no rounds, or not as many on both sides.
    """
    num_rounds = query_hash.shape[0]
    if num_rounds == 0:
        raise ValueError(f"query_hash must have at least one round, got shape {query_hash.shape}.")
    if key_hash is not None and (key_hash.ndim != 4 or key_hash.shape[0] != num_rounds):
        raise ValueError(
            f"key_hash must be [{num_rounds}, B, S, K], with as many rounds as query_hash, got shape {key_hash.shape}."
        )
    joint: dict[tuple[int, ...], _Hash] = {
        (r,): _Hash(query_hash[r], None if key_hash is None else key_hash[r], num_buckets) for r in range(num_rounds)
    }
    outputs, logsumexps, signs = [], [], []
    for size in range(1, num_rounds + 1):
        for rounds in itertools.combinations(range(num_rounds), size):
            if size > 1:
                joint[rounds] = _jointly(joint[rounds[:-1]], joint[rounds[-1:]])
            hashed = joint[rounds]
            output, logsumexp = attend(hashed.of_query, hashed.of_key, num_buckets=hashed.num_buckets)
            outputs.append(output)
            logsumexps.append(logsumexp)
            signs.append(1 if size % 2 else -1)
    return signed_merge(outputs, logsumexps, signs)


@dataclass(frozen=True)
class _Hash:
    """Bucket ids of both sides, int32 `[B, L, heads]`, and below what they are known to lie, if at all."""

    of_query: jax.Array
    of_key: jax.Array | None
    num_buckets: int | None


def _jointly(one: _Hash, other: _Hash) -> _Hash:
    """Ids that are equal where those of both hashes are."""
    if one.num_buckets is not None and other.num_buckets is not None:
        num_buckets = one.num_buckets * other.num_buckets
        if num_buckets < 2**31:
            pair = lambda x, y: x.astype(jnp.int32) * other.num_buckets + y
            of_key = None if one.of_key is None else pair(one.of_key, other.of_key)
            return _Hash(pair(one.of_query, other.of_query), of_key, num_buckets)
    if one.of_key is None or other.of_key is None:
        return _Hash(_numbered_pairs([one.of_query], [other.of_query])[0], None, None)
    of_query, of_key = _numbered_pairs([one.of_query, one.of_key], [other.of_query, other.of_key])
    return _Hash(of_query, of_key, None)


def _numbered_pairs(ones: list[jax.Array], others: list[jax.Array]) -> list[jax.Array]:
    """Numbers the different pairs of ids, over all arrays of a side and their heads, within each batch element."""
    batch = max(x.shape[0] for x in ones)
    flat = [
        jnp.concatenate([jnp.broadcast_to(x, (batch, *x.shape[1:])).reshape(batch, -1) for x in xs], axis=1)
        for xs in (ones, others)
    ]
    one, other, place = jax.lax.sort((*flat, iota_like(flat[0])), num_keys=2, is_stable=False)
    is_new = (one[:, 1:] != one[:, :-1]) | (other[:, 1:] != other[:, :-1])
    number = jnp.cumsum(jnp.pad(is_new, ((0, 0), (1, 0))), axis=1, dtype=jnp.int32)[:, : one.shape[1]]
    _, number = jax.lax.sort((place, number), num_keys=1, is_stable=False)
    parts, start = [], 0
    for x in ones:
        shape = (batch, *x.shape[1:])
        size = x.shape[1] * x.shape[2]
        parts.append(number[:, start : start + size].reshape(shape))
        start += size
    return parts
