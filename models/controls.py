"""Kinds of attention to compare with: cuDNN's dense kernels, no attention at all, and buckets that ignore content."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from scfa_jax import _checks
from scfa_jax.layers import Cache, Dense, HashBy, Hashes, Heads, Kind, Layout, State


@dataclasses.dataclass(frozen=True)
class Cudnn(Dense):
    """Dense causal attention by cuDNN. It decodes as `Dense` does."""

    def attend(self, heads: Heads, state: State, *, segment_ids: jax.Array | None = None, **options: Any) -> jax.Array:
        del state
        query, key, value = heads.rotated_query, heads.attended_key, heads.value
        if jax.default_backend() != "gpu":
            raise NotImplementedError(f"cudnn needs an NVIDIA GPU, and JAX runs on {jax.default_backend()}.")
        if query.dtype not in (jnp.bfloat16, jnp.float16):
            raise TypeError(f"cudnn computes in bfloat16 or float16, got {query.dtype}.")
        if segment_ids is not None:  # which it takes as a mask of T * T alone
            raise NotImplementedError("cudnn takes no segment_ids: use dense, or documents that are not separate.")
        for name in ("logits_soft_cap", "sink_logits"):
            if options.get(name) is not None:
                raise NotImplementedError(f"cudnn takes no {name}: use dense.")
        return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn")


@dataclasses.dataclass(frozen=True)
class Identity(Kind):
    """The values as they are: what a step takes without attention, and so the bound on speed."""

    def pairs(self, length: int, num_heads: int) -> float:
        return 0.0

    def attend(self, heads: Heads, state: State, *, segment_ids: jax.Array | None = None, **options: Any) -> jax.Array:
        """Returns the values.

        Queries and keys come in with a factor that is next to nothing, in place of 0: else the compiler would leave out
        their projections, forward and backward, and the bound would be too good. They come in as a product, since those
        of a sum would have one gradient, and the compiler would compute it once.
        """
        return heads.value + 2.0**-30 * heads.rotated_query * heads.attended_key

    def empty_cache(self, layout: Layout, batch_size: int, max_length: int, dtype: jax.typing.DTypeLike) -> Cache:
        return {"cache_index": jnp.zeros((), jnp.int32)}

    def attend_next(self, cache: Cache, heads: Heads, state: State, **options: Any) -> tuple[jax.Array, Cache]:
        return self.attend(heads, state), {"cache_index": cache["cache_index"] + heads.value.shape[1]}


@dataclasses.dataclass(frozen=True)
class Permutation(HashBy):
    """Buckets of positions that are drawn at random: as sparse as a hash, and blind to what tokens are.

    What other hashes do better than this one they owe to what is in their buckets. Training draws anew in each call,
    and evaluation keeps one draw.
    """

    @property
    def drawn(self) -> tuple[str, ...]:
        return ("seed",)

    @property
    def kept(self) -> tuple[str, ...]:
        return ("seed",)

    def draws(self, deterministic: bool) -> bool:
        return not deterministic

    def draw(self, key: jax.Array, layout: Layout, num_buckets: int) -> State:
        return {"seed": jax.random.bits(key, (), jnp.uint32)}

    def hashes(self, query: jax.Array, key: jax.Array, num_buckets: int, state: State, start: Any) -> Hashes:
        if "seed" not in state:
            raise ValueError(f"seed must be given for {self}, got None.")
        (batch, length, query_heads, _), key_heads = query.shape, key.shape[2]
        ids = permutation_hash(jax.random.key(state["seed"]), length, key_heads, num_buckets, start=start)
        ids = jnp.broadcast_to(ids, (batch, length, key_heads))
        return Hashes(jnp.repeat(ids, query_heads // key_heads, axis=2), None if query_heads == key_heads else ids)


def permutation_hash(
    key: jax.Array, length: int, num_heads: int, num_buckets: int, *, start: jax.Array | int = 0
) -> jax.Array:
    """Assigns positions to buckets at random, in equal numbers.

    Every `num_buckets` positions in a row, counted from 0, are spread over all buckets by a random permutation of their
    own, one per head. So buckets are balanced in every prefix, and a position has the same bucket however long
    the sequence is and whatever part of it is asked for.

    Args:
        key: A JAX random key; the same key gives the same buckets.
        length: Number of positions, `T`.
        num_heads: `N`.
        num_buckets: Number of buckets, at least 1.
        start: The first position, an int or int32 `[]`.

    Returns:
        int32 `[1, T, N]` of bucket ids in `[0, num_buckets)`.

    Raises:
        ValueError: `length`, `num_heads` or `num_buckets` is below 0, 1 and 1.
        TypeError: One of them is no static integer.
    """
    for name, number, least in (("length", length, 0), ("num_heads", num_heads, 1), ("num_buckets", num_buckets, 1)):
        _checks.static_int(name, number, least)
    first = start // num_buckets
    blocks = first + jnp.arange(-(-length // num_buckets) + 1)

    def one_block(block: jax.Array) -> jax.Array:
        """`[num_buckets, N]`: every column a permutation."""
        order = jnp.broadcast_to(jnp.arange(num_buckets, dtype=jnp.int32)[:, None], (num_buckets, num_heads))
        return jax.random.permutation(jax.random.fold_in(key, block), order, axis=0, independent=True)

    ids = jax.vmap(one_block)(blocks).reshape(-1, num_heads)
    return jax.lax.dynamic_slice_in_dim(ids, start - first * num_buckets, length)[None]
