"""How much of what a bucket holds a method attends to: all of it, or what its chunks leave."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from scfa_jax import hash_index, index


def coverage(buckets: jax.Array, *, chunk_size: int | None = None, segment_ids: jax.Array | None = None) -> jax.Array:
    """The share of (token, earlier token of its bucket) pairs that attention takes.

    Hash attention (`chunk_size=None`) takes what its index allows, which is counted there. A round of the Reformer
    takes the pairs whose chunks see each other, which follows from the slots of the sorted tokens: see
    `models.reformer.reformer_attention`. Of several rounds each is counted on its own. Time grows with
    `T * log(T)`, memory with `T`.

    Args:
        buckets: int32 `[B, T, N]`, the bucket of each token.
        chunk_size: Tokens in a chunk of the Reformer, or None for hash attention.
        segment_ids: int32 `[B, T]` that does not fall along the tokens: pairs of two segments count nowhere. Or None.

    Returns:
        float32 `[B, N]`; 1 where no bucket holds two tokens.

    Raises:
        ValueError: `chunk_size` is below 1.
    """
    return share(*count_pairs(buckets, chunk_size=chunk_size, segment_ids=segment_ids))


def share(taken: jax.Array, pairs: jax.Array) -> jax.Array:
    """`taken` over `pairs`, of `count_pairs`; 1 where there are none."""
    return jnp.where(pairs > 0, taken / jnp.maximum(pairs, 1), 1)


def count_pairs(
    buckets: jax.Array, *, chunk_size: int | None = None, segment_ids: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The pairs that attention takes, and those of a token and an earlier token of its bucket.

    Args:
        buckets: As in `coverage`, like the other arguments.
        chunk_size: Tokens in a chunk, or None.
        segment_ids: Of the tokens, or None.

    Returns:
        Both float32 `[B, N]`.

    Raises:
        ValueError: `chunk_size` is below 1.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 or None, got {chunk_size}.")
    slot = jnp.arange(buckets.shape[1], dtype=jnp.int32)[:, None]  # in the order of (bucket, position)
    ordered = [jnp.sort(buckets, axis=1)]
    if segment_ids is not None:
        order = jnp.argsort(buckets, axis=1, stable=True)
        ordered.append(jnp.take_along_axis(segment_ids[:, :, None], order, axis=1))
    changes = jnp.stack([x[:, 1:] != x[:, :-1] for x in ordered]).any(axis=0)
    begins = jnp.concatenate([jnp.ones_like(changes[:, :1]), changes], axis=1)
    earlier = slot - jax.lax.cummax(jnp.where(begins, slot, 0), axis=1)  # tokens of the bucket before this one
    if chunk_size is None:
        taken = index.pairs(hash_index(buckets, exclude_self=True, query_segment_ids=segment_ids))
    else:
        in_reach = slot - jnp.maximum(0, (slot // chunk_size - 1) * chunk_size)
        taken = jnp.minimum(earlier, in_reach).astype(jnp.float32).sum(axis=1)
    return taken, earlier.astype(jnp.float32).sum(axis=1)
