"""Patterns of the literature, as lists of disjoint indices: Longformer, BigBird, strided and fixed.

Memory stays linear in length. All positions are the tokens' own, also within segments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack, cast

import jax
import jax.numpy as jnp
import numpy as np

from scfa_jax import _checks, _options, _positions
from scfa_jax._bounds import num_tiles
from scfa_jax.backends.ordering import iota
from scfa_jax.index import SparseIndex
from scfa_jax.patterns.causal import causal_index, range_index
from scfa_jax.patterns.hash import hash_index
from scfa_jax.patterns.keep import keep_index

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int


@_options.documented
def longformer_index(
    query_global: Bool[Array | np.ndarray, "*#B T #N"],
    key_global: Bool[Array | np.ndarray, "*#B S #K"],
    window: int | np.integer | Int[Array | np.ndarray, ""],
    **options: Unpack[_options.PositionOptions],
) -> list[SparseIndex]:
    """A window, and global tokens, which attend to all before them and are attended to by all after them.

    Source: Beltagy et al. 2020, "Longformer: The Long-Document Transformer", made causal.

    Args:
        query_global: True for global tokens.
        key_global: True for global tokens; in self-attention the same ones.
        window: How many positions up to its own a query sees: a static int or int32 `[]`.
        **options: Positions and implementation.

    Returns:
        Three indices: the window; global keys before it; before it also the other keys, for global queries.

    Raises:
        TypeError: As in `keep_index`.
        ValueError: As in `keep_index`.

    Examples:
        >>> import numpy as np, scfa_jax
        >>> is_global = np.array([True, False, False, True, False, False])[:, None]
        >>> near, to_global, from_global = scfa_jax.patterns.longformer_index(is_global, is_global, window=2)
        >>> to_global.key_order.tolist(), from_global.query_order.tolist()  # global ones come first
        ([[[0, 3, 1, 2, 4, 5]]], [[[0, 3, 1, 2, 4, 5]]])
    """
    lengths = query_global.shape[-2], key_global.shape[-2]
    every_query = jnp.ones((lengths[0], 1), bool)
    offset = options["query_offset"] = _positions.resolved_offset(options.get("query_offset"), *lengths)
    before = _options.with_offset(options, _positions.earlier(offset, window))
    return [
        causal_index(*lengths, window=window, **options),
        keep_index(every_query, key_global, **before),
        keep_index(query_global, ~key_global, **before),
    ]


@_options.documented
def bigbird_index(
    query_length: int,
    key_length: int,
    window: int,
    rng_key: jax.Array,
    *,
    num_global: int,
    num_random: int,
    block_size: int = 64,
    num_heads: int = 1,
    **options: Unpack[_options.PositionOptions],
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
        block_size: Static number of positions in a block.
        num_heads: Number of heads `N` that have blocks of their own; 1 for the same.
        **options: Positions and implementation.

    Returns:
        The indices: the window, the global tokens before it if there are any, and one for each random block.

    Raises:
        TypeError: As in `causal_index`, or a number is no static int.
        ValueError: As in `causal_index`, or a number is too small.

    Examples:
        >>> import jax, scfa_jax
        >>> numbers = {"num_global": 4, "num_random": 2, "block_size": 8}
        >>> draw = jax.jit(lambda key: scfa_jax.patterns.bigbird_index(64, 64, 8, key, **numbers))
        >>> near, to_global, *to_blocks = draw(jax.random.key(0))
        >>> [int(blocks.high.max() % 8) for blocks in to_blocks]  # each ends with a block
        [7, 7]
    """
    for name, number in (("window", window), ("num_global", num_global), ("num_random", num_random)):
        _checks.static_int(name, number, least=0)
    _checks.static_int("block_size", block_size, least=1)
    window = min(window, _positions.LIMIT)
    offset = _positions.resolved_offset(options.pop("query_offset", None), query_length, key_length)
    indices = [causal_index(query_length, key_length, window=window, **_options.with_offset(options, offset))]
    if num_global:
        every_query, is_global = jnp.ones((query_length, 1), bool), (iota(key_length) < num_global)[:, None]
        before = _options.with_offset(options, _positions.earlier(offset, window))
        indices.append(keep_index(every_query, is_global, **before))
    first = _positions.first_position(offset)[:, 0]  # [B or 1, 1]
    first_block = first // block_size
    blocks = first_block + iota(num_tiles(query_length, block_size) + 1)[None]
    drawn = _random_blocks(rng_key, blocks, window, num_global, num_random, block_size, num_heads)
    at_query = ((first + iota(query_length)[None]) // block_size - first_block)[:, :, None, None]
    drawn = jnp.take_along_axis(drawn, at_query, axis=1)  # [B or 1, T, N, num_random]
    segments = cast(_options.SegmentOptions, options)  # without the offset
    for chosen in jnp.moveaxis(drawn, 3, 0):
        start = jnp.maximum(chosen, 0) * block_size
        stop = jnp.where(chosen < 0, start, start + block_size)
        indices.append(range_index(start, stop, key_length, **segments))
    return indices


def _random_blocks(
    rng_key: jax.Array,
    query_block: jax.Array,
    window: int,
    num_global: int,
    num_random: int,
    block_size: int,
    num_heads: int,
) -> jax.Array:
    """Draws different blocks of keys for blocks of queries, after the global tokens and before all windows.

    By Floyd's algorithm: any choice is equally likely, in memory linear in length. Of block numbers int32 `[...]` it
    returns int32 `[..., num_heads, num_random]`, the numbers of the blocks of keys, -1 for none.
    """
    first = num_tiles(num_global, block_size)
    count = jnp.maximum((query_block * block_size - window + 1) // block_size - first, 0)
    steps = iota(num_random).reshape(*(1,) * count.ndim, num_random)
    last = count[..., None] - num_random + steps  # each draw may take one block more

    def draw(number, last):
        key = jax.random.fold_in(rng_key, jnp.maximum(number, 0))
        most = jnp.broadcast_to(jnp.maximum(last, 0) + 1, (num_heads, num_random))
        return jax.random.randint(key, (num_heads, num_random), 0, most, jnp.int32)

    drawn = jax.vmap(draw)(query_block.reshape(-1), last.reshape(-1, num_random))
    drawn = drawn.reshape(*query_block.shape, num_heads, num_random)
    chosen: list[jax.Array] = []
    for i in range(num_random):
        is_taken = jnp.any(jnp.stack([c == drawn[..., i] for c in chosen]), axis=0) if chosen else False
        block_number = jnp.where(is_taken, last[..., None, i], drawn[..., i])
        chosen.append(jnp.where(last[..., None, i] < 0, -1, block_number))
    chosen = [jnp.where(c < 0, -1, c + first) for c in chosen]
    return jnp.stack(chosen, axis=-1) if chosen else drawn


@_options.documented
def strided_index(
    query_length: int, key_length: int, stride: int, **options: Unpack[_options.PositionOptions]
) -> list[SparseIndex]:
    """The last `stride` positions, and before them every `stride`-th one, counted back from the query.

    Source: Child et al. 2019, "Generating Long Sequences with Sparse Transformers". The second part is a hash of
    `position % stride`.

    Args:
        query_length: Number of queries `T`.
        key_length: Number of keys `S`.
        stride: A static int.
        **options: Positions and implementation.

    Returns:
        Two indices: the window, and the column before it.

    Raises:
        TypeError: As in `causal_index`, or `stride` is no static int.
        ValueError: As in `causal_index`, or `stride` is below 1.

    Examples:
        >>> import scfa_jax
        >>> near, column = scfa_jax.patterns.strided_index(6, 6, stride=3)
        >>> column.key_order.tolist()  # one column after another
        [[[0, 3, 1, 4, 2, 5]]]
    """
    _checks.static_int("stride", stride, least=1)
    query_position, key_position = _both_positions(query_length, key_length, options)
    # Within the window the column holds the query's own position alone.
    hashes = query_position % stride, key_position % stride
    column = cast(SparseIndex, hash_index(*hashes, exclude_self=True, num_buckets=stride, **options))
    return [causal_index(query_length, key_length, window=stride, **options), column]


@_options.documented
def fixed_index(
    query_length: int,
    key_length: int,
    stride: int,
    num_summaries: int = 1,
    **options: Unpack[_options.PositionOptions],
) -> list[SparseIndex]:
    """The query's own block of `stride` positions, and the last `num_summaries` positions of every earlier block.

    Source: Child et al. 2019, "Generating Long Sequences with Sparse Transformers".

    Args:
        query_length: Number of queries `T`.
        key_length: Number of keys `S`.
        stride: Static length of a block.
        num_summaries: Static number of positions at the end of each block that later blocks see.
        **options: Positions and implementation.

    Returns:
        Two indices: keys of the own block that are no summaries; and summaries.

    Raises:
        TypeError: As in `causal_index`, or a number is no static int.
        ValueError: As in `causal_index`, `stride` is below 1, or `num_summaries` is not in `1 .. stride`.

    Examples:
        >>> import scfa_jax
        >>> own, summaries = scfa_jax.patterns.fixed_index(6, 6, stride=3)
        >>> summaries.key_order.tolist()  # the last of each block come first
        [[[2, 5, 0, 1, 3, 4]]]
    """
    check_fixed(stride, num_summaries)
    query_position, key_position = _both_positions(query_length, key_length, options)
    num_blocks = num_tiles(key_length, stride)
    is_summary = key_position % stride >= stride - num_summaries
    # Queries past all keys have a block without keys, and summaries are in a block without queries.
    query_block = jnp.clip(query_position // stride, 0, num_blocks)
    key_block = jnp.where(is_summary, num_blocks + 1, key_position // stride)
    own = cast(SparseIndex, hash_index(query_block, key_block, num_buckets=num_blocks + 2, **options))
    return [own, keep_index(jnp.ones((query_length, 1), bool), is_summary, **options)]


def check_fixed(stride: int, num_summaries: int) -> None:
    """Checks what `fixed_index` takes."""
    _checks.static_int("stride", stride, least=1)
    _checks.static_int("num_summaries", num_summaries, least=1)
    if num_summaries > stride:
        raise ValueError(f"num_summaries must be at most stride, {stride}, got {num_summaries}.")


def _both_positions(
    query_length: int, key_length: int, options: _options.PositionOptions
) -> tuple[jax.Array, jax.Array]:
    """Positions of queries, int32 `[B or 1, T, 1]`, and of keys, `[1, S, 1]`; resolves the offset among the options."""
    offset = options["query_offset"] = _positions.resolved_offset(options.get("query_offset"), query_length, key_length)
    return _positions.first_position(offset) + iota(query_length)[None, :, None], iota(key_length)[None, :, None]
