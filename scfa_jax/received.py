"""The attention that keys receive, summed over queries: what tells the heavy hitters among them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from scfa_jax import _checks, dispatch, remat
from scfa_jax.index import SparseIndex, causal_index
from scfa_jax.sorting import Implementation, Precision
from scfa_jax.tiling import BlockSizes


def attention_received(
    query: jax.Array,
    key: jax.Array,
    *,
    window: jax.Array | int,
    segment_ids: jax.Array | None = None,
    scale: float | None = None,
    implementation: Implementation = None,
    precision: Precision = "float32",
    block_sizes: BlockSizes | None = None,
) -> jax.Array:
    """The attention that each key receives while it is in the window: sums of sliding-window attention's weights.

    Source: Zhang et al. 2023, "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
    which accumulates the attention of all later queries that still see the key.

    The query at position `i` gives its weights, which sum to 1, to the keys at positions `i - window + 1 .. i` of its
    segment. So the key at position `j` receives from the queries `j .. j + window - 1`, as far as they exist, and
    nothing that comes later changes its sum. Time and memory are linear in length for a fixed window.

    Args:
        query: float32, bfloat16 or float16 `[B, T, N, H]` or `[T, N, H]`.
        key: `[B, T, K, H]` or `[T, K, H]`; `K` divides `N`, and the query heads of a group give to their key head.
        window: As `causal_index` takes it: the keys of a query, its own among them.
        segment_ids: int32 `[B, T]` or `[T]`: attention stays among equal ids, and rows with an id below 0 (padding)
            neither give nor receive. Any ids in any order; None for one segment.
        scale: As `sparse_attention` takes it.
        implementation: As `sparse_attention` takes it.
        precision: As `sparse_attention` takes it, for float32. 16-bit arrays are multiplied in TF32, which holds them
            exactly, so that sums are not rounded to 16 bits.
        block_sizes: As `sparse_attention` takes it.

    Returns:
        float32 `[B, T, K]` or `[T, K]`. No gradient flows through it.

    Raises:
        TypeError: As in `sparse_attention` and `causal_index`.
        ValueError: Likewise, or the lengths of queries and keys differ.
        NotImplementedError: As in `sparse_attention`.

    Examples:
        >>> import jax, scfa_jax
        >>> query, key = jax.random.normal(jax.random.key(0), (2, 1, 64, 2, 16))
        >>> receive = jax.jit(lambda query, key: scfa_jax.attention_received(query, key, window=8))
        >>> jax.eval_shape(receive, query, key)  # all sum to 128: each of 64 queries gives 1 in each of 2 heads
        ShapeDtypeStruct(shape=(1, 64, 2), dtype=float32)
    """
    has_batch = getattr(query, "ndim", 4) == 4
    query, key, _ = _checks.attention_arrays(query, key, key)
    length = query.shape[1]
    if key.shape[1] != length:
        raise ValueError(f"key must have the length of query, {length}, got {key.shape[1]}.")
    if segment_ids is not None:
        segment_ids = _checks.segment_ids("segment_ids", segment_ids, length)
        if segment_ids.shape[0] not in (1, query.shape[0]):
            raise ValueError(f"segment_ids must be [1 or {query.shape[0]}, {length}], got shape {segment_ids.shape}.")
    index = causal_index(length, length, window=window, query_segment_ids=segment_ids, implementation=implementation)
    received = weight_sums(
        query,
        key,
        index,
        scale=scale,
        implementation=implementation,
        precision=precision,
        block_sizes=block_sizes,
    )
    received = remat.named_index(received)
    return received if has_batch else received[0]


def weight_sums(
    query: jax.Array,
    key: jax.Array,
    index: SparseIndex,
    *,
    scale: float | None = None,
    implementation: Implementation = None,
    precision: Precision = "float32",
    block_sizes: BlockSizes | None = None,
) -> jax.Array:
    """Sums the weights of each key over the queries that attend to it, in the kernels of the backward pass.

    The output is linear in the values. Its derivative by the value of a key, for cotangents of 1, is the sum of the
    key's weights, in every component and whatever the values are.

    Args:
        query: `[B, T, N, H]`.
        key: `[B, S, K, H]`.
        index: Who attends to whom.
        scale: As `sparse_attention` takes it.
        implementation: As `sparse_attention` takes it.
        precision: As `attention_received` takes it.
        block_sizes: As `sparse_attention` takes it.

    Returns:
        float32 `[B, S, K]`. No gradient flows through it.
    """
    if query.dtype != jnp.float32:  # derivatives have the dtype of the values, and values that of the queries
        precision = "tf32"
    query, key = (jax.lax.stop_gradient(x).astype(jnp.float32) for x in (query, key))

    def attend(value: jax.Array) -> jax.Array:
        return dispatch.attend(
            query, key, value, index, scale, implementation, precision, block_sizes, jnp.float32, False
        )

    output, pull = jax.vjp(attend, key)
    (sums,) = pull(jnp.ones_like(output))
    return sums[..., 0]
