"""Several rounds of hashing: each query attends once to every key that shares its bucket in any round."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from scfa_jax import _partitioning
from scfa_jax.backends.ordering import iota_like


@dataclass(frozen=True)
class SignedHash:
    """Bucket ids of both sides, and whether their pairs are added or taken away.

    Attributes:
        of_query: int32 `[B, T, N]`.
        of_key: int32 `[B, S, K]`, or None for those of the queries.
        num_buckets: Below what ids are known to lie, if at all.
        sign: 1 or -1.
    """

    of_query: jax.Array
    of_key: jax.Array | None
    num_buckets: int | None
    sign: Literal[1, -1] = 1


def signed_parts(query_hash: Any, key_hash: Any, num_buckets: int | None) -> list[SignedHash]:
    """The union of the rounds' buckets, by inclusion and exclusion over joint hashes.

    Buckets of any set of rounds jointly are added for odd sets and taken away for even ones, so that a pair that
    collides in several rounds counts once. Little cancels: the whole is at least that of any one round, so `R` rounds
    raise rounding errors at most by `2**R - 1`, the number of parts. Parts beyond the first `R` hold the few pairs that
    share several buckets.

    Args:
        query_hash: int32 `[R, B, T, N]`; any axis but the first may be 1.
        key_hash: int32 `[R, B, S, K]`, likewise; None means the same as `query_hash`.
        num_buckets: A promise that all ids lie in `[0, num_buckets)`, or None.

    Returns:
        The parts.

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
    joint: dict[tuple[int, ...], SignedHash] = {
        (r,): SignedHash(query_hash[r], None if key_hash is None else key_hash[r], num_buckets)
        for r in range(num_rounds)
    }
    for size in range(2, num_rounds + 1):
        for rounds in itertools.combinations(range(num_rounds), size):
            joint[rounds] = _jointly(joint[rounds[:-1]], joint[rounds[-1:]])
    return list(joint.values())


def _jointly(one: SignedHash, other: SignedHash) -> SignedHash:
    """Ids that are equal where those of both hashes are, of the other sign than the first."""
    sign: Literal[1, -1] = -1 if one.sign == 1 else 1
    if one.num_buckets is not None and other.num_buckets is not None:
        num_buckets = one.num_buckets * other.num_buckets
        if num_buckets < 2**31:
            pair = lambda x, y: x.astype(jnp.int32) * other.num_buckets + y
            of_key = None if one.of_key is None else pair(one.of_key, other.of_key)
            return SignedHash(pair(one.of_query, other.of_query), of_key, num_buckets, sign)
    if one.of_key is None or other.of_key is None:
        return SignedHash(_numbered(one.of_query, other.of_query)[0], None, None, sign)
    of_key, of_query = _numbered(one.of_key, other.of_key, one.of_query, other.of_query)
    return SignedHash(of_query, of_key, None, sign)


def _numbered(one: jax.Array, other: jax.Array, *of_query: jax.Array) -> tuple[jax.Array, ...]:
    """Numbers the different pairs of ids that the keys of each head have, and finds the numbers of queries' pairs.

    The numbers say nothing about queries, so that devices which share keys agree on them.

    Args:
        one: int32 `[B, S, K]`, one id of each key.
        other: int32, the other one.
        *of_query: int32 `[B, T, N]`, both ids of each query; or nothing.

    Returns:
        int32 numbers of keys, and of queries: -1 for those with a pair that no key has.
    """
    axes = ["b.h"] * (2 + len(of_query))
    of_key = "b.h" if one.shape[2] > 1 else "b.."
    return _partitioning.split(_number, axes, [of_key, "b.h"][: len(axes) // 2])(one, other, *of_query)


def _number(one: jax.Array, other: jax.Array, *of_query: jax.Array) -> tuple[jax.Array, ...]:
    key_length, key_heads = one.shape[1:]
    sides = [(one, other), of_query] if of_query else [(one, other)]
    batch = max(x.shape[0] for side in sides for x in side)

    def by_key_head(x):
        heads = max(x.shape[2], key_heads)
        x = jnp.broadcast_to(x, (batch, x.shape[1], heads)).swapaxes(1, 2)
        return x.reshape(batch, key_heads, -1)

    one, other = (jnp.concatenate([by_key_head(x) for x in xs], axis=2) for xs in zip(*sides, strict=True))
    one, other, place = jax.lax.sort((one, other, iota_like(one)), num_keys=3, is_stable=False)
    is_key = place < key_length  # the first of their pair, if there are any
    is_new = (one[..., 1:] != one[..., :-1]) | (other[..., 1:] != other[..., :-1])
    is_new = jnp.pad(is_new, ((0, 0), (0, 0), (1, 0)), constant_values=True)[..., : one.shape[2]]
    number = jnp.cumsum(is_new & is_key, axis=2, dtype=jnp.int32)
    has_key = jax.lax.cummax(jnp.where(is_new, 2 * iota_like(place) + is_key.astype(jnp.int32), 0), axis=2) % 2 == 1
    _, number = jax.lax.sort((place, jnp.where(has_key, number, -1)), num_keys=1, is_stable=False)
    parts = jnp.split(number, [key_length], axis=2)[: len(sides)]
    lengths = [side[0].shape[1] for side in sides]
    return tuple(
        x.reshape(batch, -1 if length else key_heads, length).swapaxes(1, 2)
        for x, length in zip(parts, lengths, strict=True)
    )
