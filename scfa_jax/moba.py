"""MoBA: each query attends to its own block of keys and to the earlier blocks whose mean key it likes best."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from scfa_jax import _checks, _options, _positions, _selection
from scfa_jax.attention import sparse_attention
from scfa_jax.backends.ordering import iota
from scfa_jax.patterns import block_index

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32, Int


@_options.documented
def moba_blocks(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    *,
    block_size: int,
    top_k: int,
    num_local: int = 1,
    share_in_group: bool = False,
    **options: Unpack[_options.PositionOptions],
) -> Int[Array, "*B T M k"]:
    """Chooses blocks of keys for each query, by the product of the query and the mean key of a block, in float32.

    Candidates are the complete blocks before the local ones; of equal scores the earlier block wins. A block that holds
    a query's own position or a later one is never scored. Memory is linear in length. No gradient passes. Source: Lu
    et al. 2025, "MoBA: Mixture of Block Attention for Long-Context LLMs".

    Args:
        query: float32, bfloat16 or float16; before a rotary embedding or after it, as you like it. The batch axis may
            be omitted from both arrays.
        key: Of the dtype of `query`. `K` must divide `N`.
        block_size: Static number of keys in a block.
        top_k: Static number of blocks that a query attends to, its own among them: it chooses `top_k - 1`.
        num_local: Static number of last blocks that a query attends to unasked, its own among them. Those before its
            own come on top of `top_k`.
        share_in_group: Whether the query heads that read a key head choose together, by the sum of their scores.
        **options: Positions and implementation. Within segments, of a block that several share only the keys of the
            last one count, and queries of that segment alone may choose it.

    Returns:
        int32 `[B, T, N, top_k - 1]`, or `[B, T, K, top_k - 1]` if shared: numbers of blocks in any order, -1 where
        there are fewer candidates. It is what `block_index` takes.

    Raises:
        TypeError: An argument has a dtype that is not supported, or a size is no static int.
        ValueError: Shapes do not fit each other, or a size is below 1.

    Examples:
        >>> import jax.numpy as jnp, scfa_jax
        >>> key = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])[:, None]
        >>> query = jnp.broadcast_to(jnp.array([0.5, 1.0]), (6, 1, 2))
        >>> scfa_jax.moba_blocks(query, key, block_size=2, top_k=2)[:, 0, 0].tolist()
        [-1, -1, 0, 0, 1, 1]
    """
    has_batch = getattr(query, "ndim", 4) == 4
    query, key, _ = _checks.attention_arrays(query, key, key)
    _checks.static_int("block_size", block_size, least=1, most=_checks.LARGEST)
    for name, size in (("top_k", top_k), ("num_local", num_local)):
        _checks.static_int(name, size, least=1)
    query, key = jax.lax.stop_gradient((query, key))
    (_, query_length, *_), (_, key_length, *_) = query.shape, key.shape
    offset = _positions.resolved_offset(options.get("query_offset"), query_length, key_length)
    position = _positions.first_position(offset)[:, 0] + iota(query_length)[None]
    own = jnp.floor_divide(position, np.int32(block_size))
    query_segment, key_segment = _segments(query_length, key_length, options)
    named = {"query_offset": position, "query_segment_ids": query_segment, "key_segment_ids": key_segment}
    for name, x in named.items():
        if x.shape[0] not in (1, query.shape[0]):
            raise ValueError(f"{name} must have the batch size of query, {query.shape[0]}, or 1, got {x.shape[0]}.")
    last_of_block = key_segment[:, block_size - 1 :: block_size]
    chosen = _selection.best_blocks(
        query,
        block_means(key, key_segment, block_size),
        # Padding chooses no block, not even one of padding.
        _selection.Candidates(
            own - num_local, jnp.maximum(query_segment, -1), jnp.where(last_of_block < 0, -2, last_of_block)
        ),
        top_k - 1,
        share_in_group=share_in_group,
        implementation=options.get("implementation"),
    )
    return chosen if has_batch else chosen[0]


@_options.documented
def moba_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K V"],
    *,
    block_size: int,
    top_k: int,
    num_local: int = 1,
    share_in_group: bool = False,
    **options: Unpack[_options.CausalAttentionOptions],
) -> Float[Array, "*B T N V"] | tuple[Float[Array, "*B T N V"], Float32[Array, "*B T N"]]:
    """MoBA: causal attention to the own block, and to the best earlier ones by the mean of their keys.

    Exact on these pairs, with one softmax over all of them. It is `moba_blocks`, then `block_index`, then
    `sparse_attention`: call these instead to choose by queries and keys before a rotary embedding, or in another way.
    Source: Lu et al. 2025, "MoBA: Mixture of Block Attention for Long-Context LLMs".

    Args:
        query: float32, bfloat16 or float16. The batch axis may be omitted from all three arrays.
        key: Of the dtype of `query`. `K` must divide `N`.
        value: Of the dtype of `query`.
        block_size: Static number of keys in a block.
        top_k: Static number of blocks that a query attends to, its own among them.
        num_local: Static number of last blocks that a query attends to unasked, its own among them. Those before its
            own come on top of `top_k`.
        share_in_group: Whether the query heads that read a key head choose together, by the sum of their scores.
        **options: Positions, and how attention is computed.

    Returns:
        The output; with `return_residual` also the natural log-sum-exp of the logits. A query without keys has output
        0, log-sum-exp `-inf` and gradients of 0.

    Raises:
        TypeError: An argument has a dtype that is not supported, or a size is no static int.
        ValueError: Shapes do not fit each other, a size is below 1, or `T` differs from `S` and there is no
            `query_offset`.
        NotImplementedError: The chosen implementation cannot do this, or "triton" finds no GPU.

    Examples:
        >>> import jax, scfa_jax
        >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 16))
        >>> scfa_jax.moba_attention(query, key, value, block_size=8, top_k=3).shape
        (1, 64, 2, 16)
    """
    positions, more = _options.split(options)
    for name, size in (("block_size", block_size), ("top_k", top_k)):
        _checks.static_int(name, size, least=1)
    blocks = moba_blocks(
        query,
        key,
        block_size=block_size,
        top_k=min(top_k, 1 + _checks.length("key", key) // block_size),  # no slots that stay empty
        num_local=num_local,
        share_in_group=share_in_group,
        **positions,
    )
    lengths: dict[str, Any] = {"query_length": blocks.shape[-3], "key_length": key.shape[-3]}
    index = block_index(blocks, block_size, num_local=num_local, **lengths, **positions)
    return sparse_attention(query, key, value, index, **more)


def block_means(key: jax.Array, segment: jax.Array, block_size: int) -> jax.Array:
    """The mean key of each complete block, over the keys of the segment that its last one is of.

    Args:
        key: float `[B, S, K, H]`.
        segment: int32 `[B or 1, S]`.
        block_size: Keys in a block.

    Returns:
        float32 `[B, S // block_size, K, H]`.
    """
    whole = key.shape[1] - key.shape[1] % block_size
    in_blocks = lambda x: x[:, :whole].reshape(x.shape[0], whole // block_size, block_size, *x.shape[2:])
    of_block = in_blocks(segment)
    counts = (of_block == of_block[:, :, -1:])[..., None, None]
    # `where`, not a product: what does not count may be NaN.
    total = jnp.where(counts, in_blocks(key).astype(jnp.float32), 0.0).sum(axis=2)
    return total / counts.sum(axis=2, dtype=jnp.float32)


def _segments(query_length: int, key_length: int, options: _options.PositionOptions) -> tuple[jax.Array, jax.Array]:
    """The segments of queries and keys, int32 `[B or 1, L]`; zeros if there are none."""
    of_query, of_key = options.get("query_segment_ids"), options.get("key_segment_ids")
    if of_query is None and of_key is None:
        return jnp.zeros((1, query_length), jnp.int32), jnp.zeros((1, key_length), jnp.int32)
    return _positions.both_segments(of_query, of_key, query_length, key_length)
