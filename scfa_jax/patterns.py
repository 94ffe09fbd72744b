"""Patterns from disjoint parts: sinks, Longformer, BigBird, strided and fixed, and a window beside hash buckets.

A query attends to a union of sets of keys, none of which has a key of another. Each set is one `SparseIndex`, so that
a pattern is a short list of them, and `union_attention` attends to each and merges by the log-sum-exp. Memory stays
linear in length. All positions are the tokens' own, also within segments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from scfa_jax import _checks, dispatch
from scfa_jax.index import NEVER, SparseIndex, causal_index, hash_index, keep_index, range_index
from scfa_jax.merge import merge_attention
from scfa_jax.sorting import Implementation, Precision, iota
from scfa_jax.tiling import BlockSizes, num_tiles


def union_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    indices: Sequence[SparseIndex],
    *,
    scale: float | None = None,
    implementation: Implementation = None,
    precision: Precision = "float32",
    block_sizes: BlockSizes | None = None,
    output_dtype: jax.typing.DTypeLike | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention to all pairs that any of several indices allows; no two may allow the same pair.

    One launch an index, merged in float32 (`merge_attention`). The remaining arguments, the results and the errors
    are those of `sparse_attention`.

    Args:
        query: float32, bfloat16 or float16 `[B, T, N, H]` or `[T, N, H]`.
        key: `[B, S, K, H]` or `[S, K, H]`; `K` divides `N`.
        value: The shape of `key`.
        indices: One or more, as from the functions of `scfa_jax.patterns`. A pair that two of them allow would
            count twice.
        scale: As `sparse_attention` takes it.
        implementation: As `sparse_attention` takes it.
        precision: As `sparse_attention` takes it.
        block_sizes: As `sparse_attention` takes it.
        output_dtype: As `sparse_attention` takes it.
        return_residual: As `sparse_attention` takes it.

    Returns:
        The output, or (output, log-sum-exp).

    Raises:
        TypeError: As in `sparse_attention`.
        ValueError: Likewise, or there are no indices.
        NotImplementedError: Likewise.

    Examples:
        >>> import jax, scfa_jax
        >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 16))
        >>> indices = scfa_jax.patterns.strided(64, 64, stride=8)
        >>> jax.jit(scfa_jax.union_attention)(query, key, value, indices).shape
        (1, 64, 2, 16)
    """
    if not indices:
        raise ValueError("indices must be at least one, got none.")
    dtype = _checks.output_dtype(output_dtype, query.dtype)
    attend = lambda index, dtype: dispatch.attend(
        query, key, value, index, scale, implementation, precision, block_sizes, dtype, True
    )
    if len(indices) == 1:
        output, logsumexp = attend(indices[0], dtype)
    else:
        parts = [attend(index, jnp.float32) for index in indices]
        output, logsumexp = merge_attention(*zip(*parts, strict=True), output_dtype=dtype)
    return (output, logsumexp) if return_residual else output


def window_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    window: jax.Array | int,
    *,
    num_sinks: int = 0,
    query_offset: jax.Array | int = 0,
    query_segment_ids: jax.Array | None = None,
    key_segment_ids: jax.Array | None = None,
    scale: float | None = None,
    implementation: Implementation = None,
    precision: Precision = "float32",
    block_sizes: BlockSizes | None = None,
    output_dtype: jax.typing.DTypeLike | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Sliding-window attention with sinks: the last `window` positions, and the first ones of all.

    All heads' windows run in one launch, whatever their lengths, and all sinks in a second one. Sources: Beltagy et
    al. 2020, "Longformer", for the window; Xiao et al. 2023, "Efficient Streaming Language Models with Attention
    Sinks". The remaining arguments, the results and the errors are those of `sparse_attention`.

    Args:
        query: float32, bfloat16 or float16 `[B, T, N, H]` or `[T, N, H]`.
        key: `[B, S, K, H]` or `[S, K, H]`; `K` divides `N`.
        value: The shape of `key`.
        window: How many positions up to its own a query sees: a static int, or int32 `[]`, `[N]` or `[B, N]`.
        num_sinks: Static number of first positions (of each segment) that all later queries see too.
        query_offset: Position of the first query: a static int, or int32 `[]` or `[B]`. Keys start at 0.
        query_segment_ids: int32 `[B, T]` or `[T]`: attention stays among equal ids, and rows with an id below 0
            (padding) take no part. Any ids in any order; None for one segment.
        key_segment_ids: int32 `[B, S]` or `[S]`, likewise. None means those of the queries, and `S = T`.
        scale: As `sparse_attention` takes it.
        implementation: As `sparse_attention` takes it.
        precision: As `sparse_attention` takes it.
        block_sizes: As `sparse_attention` takes it.
        output_dtype: As `sparse_attention` takes it.
        return_residual: As `sparse_attention` takes it.

    Returns:
        The output, or (output, log-sum-exp).

    Raises:
        TypeError: As in `sparse_attention`.
        ValueError: Likewise, or `num_sinks` is below 0.
        NotImplementedError: Likewise.

    Examples:
        >>> import jax, jax.numpy as jnp, scfa_jax
        >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 16))
        >>> lengths = jnp.array([8, 32], jnp.int32)  # one for each head
        >>> scfa_jax.window_attention(query, key, value, lengths, num_sinks=4).shape
        (1, 64, 2, 16)
    """
    query_length, key_length = (_checks.length(name, x) for name, x in (("query", query), ("key", key)))
    indices = window_and_sinks(
        query_length,
        key_length,
        window,
        num_sinks,
        query_offset=query_offset,
        query_segment_ids=query_segment_ids,
        key_segment_ids=key_segment_ids,
        implementation=implementation,
    )
    return union_attention(
        query,
        key,
        value,
        indices,
        scale=scale,
        implementation=implementation,
        precision=precision,
        block_sizes=block_sizes,
        output_dtype=output_dtype,
        return_residual=return_residual,
    )


def window_and_sinks(
    query_length: int, key_length: int, window: jax.Array | int, num_sinks: int = 0, **options: Any
) -> list[SparseIndex]:
    """The last `window` positions, and the first `num_sinks` (of each segment) as far as they lie before the window.

    Sources: as of `window_attention`, Beltagy et al. 2020 and Xiao et al. 2023.

    Args:
        query_length: Number of queries `T`.
        key_length: Number of keys `S`.
        window: A static int, or int32 `[]`, `[N]` or `[B, N]`.
        num_sinks: A static int.
        **options: Offset, segment ids and implementation, as `causal_index` takes them.

    Returns:
        One index, or two with sinks.

    Raises:
        TypeError: As in `causal_index`, or `num_sinks` is no static int.
        ValueError: As in `causal_index`, or `num_sinks` is below 0.

    Examples:
        >>> import scfa_jax
        >>> near, sinks = scfa_jax.patterns.window_and_sinks(6, 6, window=2, num_sinks=1)
        >>> near.low.tolist(), sinks.high.tolist()  # the first key of the window, the last sink before it
        ([[[0, 0, 1, 2, 3, 4]]], [[[-1, -1, 0, 0, 0, 0]]])
    """
    _checks.static_int("num_sinks", num_sinks, least=0)
    near = causal_index(query_length, key_length, window=window, **options)
    if num_sinks == 0:
        return [near]
    every = causal_index(query_length, key_length, **options)
    last_sink = jnp.minimum(every.low, NEVER - num_sinks) + (num_sinks - 1)
    high = jnp.minimum(jnp.minimum(last_sink, near.low - 1), every.high)
    sinks = dataclasses.replace(
        every, low=jnp.broadcast_to(every.low, high.shape), high=high, all_met=False, density=near.density
    )
    return [near, sinks]


def window_and_buckets(
    query_hash: jax.Array,
    key_hash: jax.Array | None,
    window: int,
    *,
    exclude_self: bool = False,
    num_buckets: int | None = None,
    **options: Any,
) -> list[SparseIndex]:
    """The last `window` positions, and before them all keys of the query's bucket.

    Source: of the buckets, as of `hash_sparse_attention`, Pagliardini et al. 2023.

    Args:
        query_hash: int32 `[B, T, N]` or `[T, N]`, the bucket of each query; `B` and `N` may be 1.
        key_hash: int32 `[B, S, K]` or `[S, K]`, likewise; None means the same as `query_hash`.
        window: Static number of positions up to its own that a query sees whatever their bucket.
        exclude_self: Whether a query may not attend to the key at its own position, which the window counts all the
            same: it then holds one key less.
        num_buckets: As `hash_index` takes it.
        **options: Offset, segment ids and implementation, as `causal_index` takes them.

    Returns:
        Two indices: the window, and the bucket before it; the latter alone where the window holds no key.

    Raises:
        TypeError: As in `hash_index`, or `window` is no static int.
        ValueError: As in `hash_index`, or `window` is below 0.

    Examples:
        >>> import numpy as np, scfa_jax
        >>> parity = np.arange(6, dtype=np.int32)[:, None] % 2
        >>> near, in_bucket = scfa_jax.patterns.window_and_buckets(parity, None, window=2, num_buckets=2)
        >>> int(near.stats()["pairs"].sum()), int(in_bucket.stats()["pairs"].sum())  # of 21
        (11, 6)
    """
    _checks.static_int("window", window, least=0)
    window, own = min(window, _checks.OFFSET_LIMIT), int(exclude_self)
    offset = options.pop("query_offset", 0)
    # Keys at or before a query that stands as far back are those before the window.
    offset_before = _checks.earlier(offset, max(window, own))
    before = hash_index(query_hash, key_hash, num_buckets=num_buckets, query_offset=offset_before, **options)
    if window <= own:
        return [before]
    lengths = before.query_length, before.key_length
    own_offset = _checks.earlier(offset, own)
    return [causal_index(*lengths, window=window - own, query_offset=own_offset, **options), before]


def longformer(
    query_global: jax.Array, key_global: jax.Array, window: jax.Array | int, **options: Any
) -> list[SparseIndex]:
    """A window, and global tokens, which attend to all before them and are attended to by all after them.

    Source: Beltagy et al. 2020, "Longformer: The Long-Document Transformer", made causal.

    Args:
        query_global: bool `[B, T, N]` or `[T, N]`, True for global tokens; `B` and `N` may be 1.
        key_global: bool `[B, S, K]` or `[S, K]`, likewise; in self-attention the same tokens.
        window: How many positions up to its own a query sees: a static int or int32 `[]`.
        **options: Offset, segment ids and implementation, as `causal_index` takes them.

    Returns:
        Three indices: the window; global keys before it; before it also the other keys, for global queries.

    Raises:
        TypeError: As in `keep_index`.
        ValueError: Likewise.

    Examples:
        >>> import numpy as np, scfa_jax
        >>> is_global = np.array([True, False, False, True, False, False])[:, None]
        >>> near, to_global, from_global = scfa_jax.patterns.longformer(is_global, is_global, window=2)
        >>> to_global.key_order.tolist(), from_global.query_order.tolist()  # global ones come first
        ([[[0, 3, 1, 2, 4, 5]]], [[[0, 3, 1, 2, 4, 5]]])
    """
    query_length, key_length = query_global.shape[-2], key_global.shape[-2]
    every_query = jnp.ones((query_length, 1), bool)
    before = {**options, "query_offset": _checks.earlier(options.get("query_offset", 0), window)}
    return [
        causal_index(query_length, key_length, window=window, **options),
        keep_index(every_query, key_global, **before),
        keep_index(query_global, ~key_global, **before),
    ]


def big_bird(
    query_length: int,
    key_length: int,
    window: int,
    rng_key: jax.Array,
    *,
    num_global: int,
    num_random: int,
    block: int = 64,
    num_heads: int = 1,
    **options: Any,
) -> list[SparseIndex]:
    """A window, the first tokens as global ones, and random blocks before the window.

    Source: Zaheer et al. 2020, "Big Bird: Transformers for Longer Sequences" (BigBird-ITC), made causal: the first
    tokens then attend to all before them, which are global too.

    Args:
        query_length: Number of queries `T`.
        key_length: Number of keys `S`.
        window: Static number of positions up to its own that a query sees.
        rng_key: A JAX random key. What it draws for a query depends on its position and head and on nothing else.
        num_global: Static number of first positions of the sequence that all later queries see.
        num_random: Static number of random blocks that the queries of a block see, or all blocks there are if fewer.
        block: Static number of positions in a block.
        num_heads: Number of heads `N` that have blocks of their own; 1 for the same.
        **options: Offset, segment ids and implementation, as `causal_index` takes them.

    Returns:
        The indices: the window, the global tokens before it if there are any, and one for each random block.

    Raises:
        TypeError: As in `causal_index`, or a number is no static int.
        ValueError: Likewise, or a number is too small.

    Examples:
        >>> import jax, scfa_jax
        >>> numbers = {"num_global": 4, "num_random": 2, "block": 8}
        >>> draw = jax.jit(lambda key: scfa_jax.patterns.big_bird(64, 64, 8, key, **numbers))
        >>> near, to_global, *to_blocks = draw(jax.random.key(0))
        >>> [int(blocks.high.max() % 8) for blocks in to_blocks]  # each ends with a block
        [7, 7]
    """
    for name, number in (("window", window), ("num_global", num_global), ("num_random", num_random)):
        _checks.static_int(name, number, least=0)
    _checks.static_int("block", block, least=1)
    window = min(window, _checks.OFFSET_LIMIT)
    offset = options.pop("query_offset", 0)
    indices = [causal_index(query_length, key_length, window=window, query_offset=offset, **options)]
    if num_global:
        every_query, is_global = jnp.ones((query_length, 1), bool), (iota(key_length) < num_global)[:, None]
        before = _checks.earlier(offset, window)
        indices.append(keep_index(every_query, is_global, query_offset=before, **options))
    position = _checks.query_offset(offset)[:, 0] + iota(query_length)  # [B or 1, T]
    first_block = _checks.query_offset(offset)[:, 0] // block
    blocks = first_block + iota(num_tiles(query_length, block) + 1)
    drawn = random_blocks(rng_key, blocks, window, num_global, num_random, block, num_heads)
    at_query = (position // block - first_block)[:, :, None, None]
    drawn = jnp.take_along_axis(drawn, at_query, axis=1)  # [B or 1, T, N, num_random]
    for chosen in jnp.moveaxis(drawn, 3, 0):
        start = jnp.maximum(chosen, 0) * block
        stop = jnp.where(chosen < 0, start, start + block)
        indices.append(range_index(start, stop, key_length, **options))
    return indices


def random_blocks(
    rng_key: jax.Array,
    query_block: jax.Array,
    window: int,
    num_global: int,
    num_random: int,
    block: int,
    num_heads: int,
) -> jax.Array:
    """Draws different blocks of keys for blocks of queries, after the global tokens and before all windows.

    By Floyd's algorithm: any choice is equally likely, in memory linear in length.

    Args:
        rng_key: A JAX random key.
        query_block: int32 `[...]`, the numbers of the blocks of queries.
        window: As `big_bird` takes it, like all that follow.
        num_global: Likewise.
        num_random: Likewise.
        block: Likewise.
        num_heads: Likewise.

    Returns:
        int32 `[..., num_heads, num_random]`, the numbers of the blocks of keys, -1 for none.
    """
    first = num_tiles(num_global, block)
    count = jnp.maximum((query_block * block - window + 1) // block - first, 0)
    last = count[..., None] - num_random + iota(num_random)  # each draw may take one block more

    def draw(number, last):
        key = jax.random.fold_in(rng_key, jnp.maximum(number, 0))
        return jax.random.randint(key, (num_heads, num_random), 0, jnp.maximum(last, 0) + 1)

    drawn = jax.vmap(draw)(query_block.reshape(-1), last.reshape(-1, num_random))
    drawn = drawn.reshape(*query_block.shape, num_heads, num_random)
    chosen: list[jax.Array] = []
    for i in range(num_random):
        is_taken = jnp.any(jnp.stack([c == drawn[..., i] for c in chosen]), axis=0) if chosen else False
        block_number = jnp.where(is_taken, last[..., None, i], drawn[..., i])
        chosen.append(jnp.where(last[..., None, i] < 0, -1, block_number))
    chosen = [jnp.where(c < 0, -1, c + first) for c in chosen]
    return jnp.stack(chosen, axis=-1) if chosen else drawn


def strided(query_length: int, key_length: int, stride: int, **options: Any) -> list[SparseIndex]:
    """The last `stride` positions, and before them every `stride`-th one, counted back from the query.

    Source: Child et al. 2019, "Generating Long Sequences with Sparse Transformers". The second part is a hash of
    `position % stride`.

    Args:
        query_length: Number of queries `T`.
        key_length: Number of keys `S`.
        stride: A static int.
        **options: Offset, segment ids and implementation, as `causal_index` takes them.

    Returns:
        Two indices: the window, and the column before it.

    Raises:
        TypeError: As in `causal_index`, or `stride` is no static int.
        ValueError: Likewise, or `stride` is below 1.

    Examples:
        >>> import scfa_jax
        >>> near, column = scfa_jax.patterns.strided(6, 6, stride=3)
        >>> column.key_order.tolist()  # one column after another
        [[[0, 3, 1, 4, 2, 5]]]
    """
    _checks.static_int("stride", stride, least=1)
    query_position, key_position = positions(query_length, key_length, options)
    # Within the window the column holds the query's own position alone.
    column = hash_index(
        query_position % stride, key_position % stride, exclude_self=True, num_buckets=stride, **options
    )
    return [causal_index(query_length, key_length, window=stride, **options), column]


def fixed(query_length: int, key_length: int, stride: int, num_summaries: int = 1, **options: Any) -> list[SparseIndex]:
    """The query's own block of `stride` positions, and the last `num_summaries` positions of every earlier block.

    Source: Child et al. 2019, "Generating Long Sequences with Sparse Transformers".

    Args:
        query_length: Number of queries `T`.
        key_length: Number of keys `S`.
        stride: Static length of a block.
        num_summaries: Static number of positions at the end of each block that later blocks see.
        **options: Offset, segment ids and implementation, as `causal_index` takes them.

    Returns:
        Two indices: keys of the own block that are no summaries; and summaries.

    Raises:
        TypeError: As in `causal_index`, or a number is no static int.
        ValueError: Likewise, `stride` is below 1, or `num_summaries` is not in `1 .. stride`.

    Examples:
        >>> import scfa_jax
        >>> own, summaries = scfa_jax.patterns.fixed(6, 6, stride=3)
        >>> summaries.key_order.tolist()  # the last of each block come first
        [[[2, 5, 0, 1, 3, 4]]]
    """
    check_fixed(stride, num_summaries)
    query_position, key_position = positions(query_length, key_length, options)
    num_blocks = num_tiles(key_length, stride)
    is_summary = key_position % stride >= stride - num_summaries
    # Queries past all keys have a block without keys, and summaries are in a block without queries.
    query_block = jnp.clip(query_position // stride, 0, num_blocks)
    key_block = jnp.where(is_summary, num_blocks + 1, key_position // stride)
    return [
        hash_index(query_block, key_block, num_buckets=num_blocks + 2, **options),
        keep_index(jnp.ones((query_length, 1), bool), is_summary, **options),
    ]


def check_fixed(stride: int, num_summaries: int) -> None:
    """Checks what `fixed` takes."""
    _checks.static_int("stride", stride, least=1)
    _checks.static_int("num_summaries", num_summaries, least=1)
    if num_summaries > stride:
        raise ValueError(f"num_summaries must be at most stride, {stride}, got {num_summaries}.")


def positions(query_length: int, key_length: int, options: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """Positions of queries, int32 `[B or 1, T, 1]`, and of keys, `[1, S, 1]`, for the options of an index."""
    offset = _checks.query_offset(options.get("query_offset", 0))
    return offset + iota(query_length)[:, None], iota(key_length)[None, :, None]
