"""Kinds of attention to compare with.

They are cuDNN's dense kernels, no attention at all, buckets that ignore content, and blocks that are chosen at random
or by the true attention.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from scfa_jax import _checks
from scfa_jax.backends.ordering import iota
from scfa_jax.backends.tile import Logits
from scfa_jax.layers import Cache, Dense, HashBy, Hashes, Heads, Kind, Layout, State
from scfa_jax.layers.moba import ChosenBlocks


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


class _Seeded:
    """Draws one seed in each call of training, and keeps one for evaluation."""

    @property
    def drawn(self) -> tuple[str, ...]:
        return ("seed",)

    @property
    def kept(self) -> tuple[str, ...]:
        return ("seed",)

    def draws(self, deterministic: bool) -> bool:
        return not deterministic

    def draw(self, key: jax.Array, *shape: Any) -> State:
        return {"seed": jax.random.bits(key, (), jnp.uint32)}


@dataclasses.dataclass(frozen=True)
class Permutation(_Seeded, HashBy):
    """Buckets of positions that are drawn at random: as sparse as a hash, and blind to what tokens are.

    What other hashes do better than this one they owe to what is in their buckets. Training draws anew in each call,
    and evaluation keeps one draw.
    """

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


@dataclasses.dataclass(frozen=True)
class RandomBlocks(_Seeded, ChosenBlocks):
    """Blocks as in `MoBA` that each query draws at random among its candidates: as sparse, and blind to content.

    What MoBA does better than this it owes to its choice. Training draws anew in each call, and evaluation keeps one
    draw. All sequences of a batch share a draw.
    """

    def blocks(self, heads: Heads, state: State, *, segment_ids: jax.Array | None = None, **options: Any) -> jax.Array:
        if "seed" not in state:
            raise ValueError(f"seed must be given for {self}, got None.")
        (_, length, num_heads, _), key = heads.query.shape, jax.random.key(state["seed"])
        may = block_candidates(self, length, segment_ids)
        num_blocks = may.shape[2]

        def of_query(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
            position, may = inputs
            at_position = jax.random.fold_in(key, position)
            of_block = lambda block: jax.random.bits(jax.random.fold_in(at_position, block), (num_heads,), jnp.uint32)
            scores = jax.vmap(of_block)(iota(num_blocks)).T >> 9
            return _best(scores.astype(jnp.float32), may, self.top_k - 1)

        chosen = jax.lax.map(of_query, (iota(length), may.swapaxes(0, 1)), batch_size=_at_once(num_heads * num_blocks))
        return chosen.swapaxes(0, 1)


@dataclasses.dataclass(frozen=True)
class OracleBlocks(ChosenBlocks):
    """Blocks as in `MoBA` that have the largest share of the attention of all keys: what a choice can reach.

    It computes all pairs to find them, and so takes longer than dense attention.
    """

    def blocks(self, heads: Heads, state: State, *, segment_ids: jax.Array | None = None, **options: Any) -> jax.Array:
        rows = heads.rotated_query, heads.attended_key
        return oracle_blocks(self, *rows, segment_ids=segment_ids, logits_soft_cap=options.get("logits_soft_cap"))


def oracle_blocks(
    kind: ChosenBlocks,
    query: jax.Array,
    key: jax.Array,
    *,
    num_chosen: int | None = None,
    segment_ids: jax.Array | None = None,
    logits_soft_cap: float | None = None,
) -> jax.Array:
    """Chooses the candidates that dense attention gives the most weight, in float32. No gradient passes.

    Memory is linear in length: scores exist for some queries at a time.

    Args:
        kind: Says which blocks are candidates.
        query: float `[B, T, N, H]`.
        key: float `[B, T, K, H]`.
        num_chosen: How many blocks to choose; `kind.top_k - 1` if None.
        segment_ids: int32 `[1 or B, T]`, or None.
        logits_soft_cap: As in `scfa_jax.sparse_attention`.

    Returns:
        int32 `[B, T, N, num_chosen]`, the heaviest block first; -1 where there are fewer candidates.
    """
    query, key = jax.lax.stop_gradient((query, key))
    batch, length, num_heads, head_dim = query.shape
    may = block_candidates(kind, length, segment_ids)
    num_chosen, num_blocks = kind.top_k - 1 if num_chosen is None else num_chosen, may.shape[2]
    ids = jnp.zeros((1, length), jnp.int32) if segment_ids is None else segment_ids
    shape = num_blocks, kind.block_size
    in_blocks = lambda x: x[:, : math.prod(shape)].reshape(x.shape[0], *shape, *x.shape[2:])
    key, key_ids, logits = in_blocks(key), in_blocks(ids), Logits(head_dim**-0.5, logits_soft_cap)
    exact: dict[str, Any] = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}

    def of_query(inputs: tuple[jax.Array, ...]) -> jax.Array:
        query, ids, may = inputs
        grouped = query.reshape(batch, key.shape[3], -1, head_dim)
        products = jnp.einsum("bkgh,bmskh->bkgms", grouped, key, **exact)
        scores = logits.scores(products) * (logits.scale if logits_soft_cap is None else logits_soft_cap)
        is_met = (ids[:, None, None] == key_ids)[:, None, None]
        weight = jax.nn.logsumexp(jnp.where(is_met, scores, -jnp.inf), axis=-1)
        return _best(weight.reshape(batch, num_heads, num_blocks), may, num_chosen)

    rows = tuple(x.swapaxes(0, 1) for x in (query, ids, may))
    return jax.lax.map(of_query, rows, batch_size=_at_once(batch * num_heads * length)).swapaxes(0, 1)


def block_candidates(kind: ChosenBlocks, length: int, segment_ids: jax.Array | None = None) -> jax.Array:
    """The blocks that each query may choose, as in `scfa_jax.moba_blocks`: bool `[1 or B, T, length // block_size]`."""
    own = iota(length) // kind.block_size
    may = (iota(length // kind.block_size) <= own[:, None] - kind.num_local)[None]
    if segment_ids is None:
        return may
    last_of_block = segment_ids[:, None, kind.block_size - 1 :: kind.block_size]
    return may & (segment_ids[..., None] == last_of_block) & (last_of_block >= 0)


def _best(scores: jax.Array, may: jax.Array, k: int) -> jax.Array:
    """The `k` best of scores `[1 or B, N, M]` among candidates `[1 or B, M]`: int32 `[1 or B, N, k]`, -1 for none."""
    scores = jnp.where(may[:, None], scores, -jnp.inf)
    best, chosen = jax.lax.top_k(scores, min(k, scores.shape[-1]))
    chosen = jnp.where(best > -jnp.inf, chosen.astype(jnp.int32), -1)
    return jnp.pad(chosen, ((0, 0), (0, 0), (0, k - chosen.shape[2])), constant_values=-1)


def _at_once(scores: int) -> int:
    """How many queries to score together, of so many scores each."""
    return max(1, (1 << 25) // max(scores, 1))
