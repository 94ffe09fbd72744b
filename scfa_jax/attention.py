"""The public operators: each builds the index of its pattern and attends to it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from scfa_jax import _checks, dispatch, rounds
from scfa_jax import index as indices
from scfa_jax.index import SparseIndex
from scfa_jax.sorting import Implementation, Precision
from scfa_jax.tiling import BlockSizes


def causal_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    window: jax.Array | int | None = None,
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
    """Dense causal flash attention: every query attends to all keys at or before its position.

    Source: Dao 2023, "FlashAttention-2". The remaining arguments, the results and the errors are those of
    `sparse_attention`.

    Args:
        query: float32, bfloat16 or float16 `[B, T, N, H]` or `[T, N, H]`.
        key: `[B, S, K, H]` or `[S, K, H]`; `K` divides `N`.
        value: The shape of `key`.
        window: How many positions up to its own a query may see: a static int, or int32 `[]`, `[N]` or `[B, N]`; 0 for
            none, None for all. Time falls with it.
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
        ValueError: Likewise.
        NotImplementedError: Likewise.

    Examples:
        >>> import jax, scfa_jax
        >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 16))
        >>> output = scfa_jax.causal_attention(query, key, value)
        >>> bool(jax.numpy.allclose(output[:, 0], value[:, 0]))  # the first query sees one key
        True
    """
    query_length, key_length = (_checks.length(name, x) for name, x in (("query", query), ("key", key)))
    index = indices.causal_index(
        query_length,
        key_length,
        window=window,
        query_offset=query_offset,
        query_segment_ids=query_segment_ids,
        key_segment_ids=key_segment_ids,
        implementation=implementation,
    )
    return dispatch.attend(
        query, key, value, index, scale, implementation, precision, block_sizes, output_dtype, return_residual
    )


def hash_sparse_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_hash: jax.Array,
    key_hash: jax.Array | None = None,
    *,
    exclude_self: bool = False,
    num_buckets: int | None = None,
    window: jax.Array | int | None = None,
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
    """Hash-sparse causal attention: every query attends to all keys of its bucket at or before its position.

    Source: Pagliardini et al. 2023, "Faster Causal Attention Over Large Sequences Through Sparse Flash
    Attention". The remaining arguments, the results and the errors are those of `sparse_attention`.

    Args:
        query: float32, bfloat16 or float16 `[B, T, N, H]` or `[T, N, H]`.
        key: `[B, S, K, H]` or `[S, K, H]`; `K` divides `N`.
        value: The shape of `key`.
        query_hash: int32 `[B, T, N]` or `[T, N]`, the bucket of each query; any axis may be 1. With `R` rounds of
            hashing `[R, B, T, N]`: a query attends once to each key that shares its bucket in any round. This takes
            `2**R - 1` calls, those beyond the first `R` over the few pairs that share several.
        key_hash: int32 `[B, S, K]` or `[S, K]`, or `[R, B, S, K]`, likewise. None means the same as `query_hash`,
            and `S = T`, `K = N`; both sides are then sorted once.
        exclude_self: Whether a query may not attend to the key at its own position.
        num_buckets: A promise that all ids lie in `[0, num_buckets)`, which makes sorting cheaper. Without it
            any int32 is an id. The result is undefined if the promise is broken.
        window: How many positions up to its own a query may see: a static int, or int32 `[]`, `[N]` or `[B, N]`; 0 for
            none, None for all. Time falls with it.
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
        ValueError: Likewise.
        NotImplementedError: Likewise.

    Examples:
        >>> import jax, scfa_jax
        >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 16))
        >>> rotations = scfa_jax.random_rotations(jax.random.key(1), num_heads=2, head_dim=16, num_buckets=8)
        >>> hashes = scfa_jax.lsh_hash(query, rotations), scfa_jax.lsh_hash(key, rotations)
        >>> scfa_jax.hash_sparse_attention(query, key, value, *hashes, num_buckets=8).shape
        (1, 64, 2, 16)
    """
    if key_hash is None and getattr(query, "shape", None) != getattr(key, "shape", None):
        raise ValueError(
            f"key_hash may be None only where query and key have one shape, got {query.shape} and {key.shape}."
        )
    if getattr(query_hash, "ndim", None) == 4:
        one_round: Callable[..., Any] = functools.partial(
            hash_sparse_attention,
            query,
            key,
            value,
            exclude_self=exclude_self,
            window=window,
            query_offset=query_offset,
            query_segment_ids=query_segment_ids,
            key_segment_ids=key_segment_ids,
            scale=scale,
            implementation=implementation,
            precision=precision,
            block_sizes=block_sizes,
            output_dtype=jnp.float32,
            return_residual=True,
        )
        output, logsumexp = rounds.attend_to_union(one_round, query_hash, key_hash, num_buckets)
        output = output.astype(_checks.output_dtype(output_dtype, query.dtype))
        return (output, logsumexp) if return_residual else output
    index = indices.hash_index(
        query_hash,
        key_hash,
        exclude_self=exclude_self,
        num_buckets=num_buckets,
        window=window,
        query_offset=query_offset,
        query_segment_ids=query_segment_ids,
        key_segment_ids=key_segment_ids,
        query_length=_checks.length("query", query),
        key_length=_checks.length("key", key),
        implementation=implementation,
    )
    return dispatch.attend(
        query, key, value, index, scale, implementation, precision, block_sizes, output_dtype, return_residual
    )


def qk_sparse_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_keep: jax.Array,
    key_keep: jax.Array,
    *,
    window: jax.Array | int | None = None,
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
    """QK-sparse causal attention: each head drops queries and keys of its own.

    A dropped query gives output 0, as does one that has lost all its keys. Time falls with what is dropped.
    Source: Pagliardini et al. 2023, "Faster Causal Attention Over Large Sequences Through Sparse Flash
    Attention". The remaining arguments, the results and the errors are those of `sparse_attention`.

    Args:
        query: float32, bfloat16 or float16 `[B, T, N, H]` or `[T, N, H]`.
        key: `[B, S, K, H]` or `[S, K, H]`; `K` divides `N`.
        value: The shape of `key`.
        query_keep: bool `[B, T, N]` or `[T, N]`, True where the query takes part; any axis may be 1.
        key_keep: bool `[B, S, K]` or `[S, K]`, likewise.
        window: How many positions up to its own a query may see: a static int, or int32 `[]`, `[N]` or `[B, N]`; 0 for
            none, None for all. Time falls with it.
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
        ValueError: Likewise.
        NotImplementedError: Likewise.

    Examples:
        >>> import jax, scfa_jax
        >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 16))
        >>> keep = jax.random.bernoulli(jax.random.key(1), 0.5, (1, 64, 2))
        >>> output = scfa_jax.qk_sparse_attention(query, key, value, keep, keep)
        >>> bool((output[~keep] == 0).all())
        True
    """
    index = indices.keep_index(
        query_keep,
        key_keep,
        window=window,
        query_offset=query_offset,
        query_segment_ids=query_segment_ids,
        key_segment_ids=key_segment_ids,
        query_length=_checks.length("query", query),
        key_length=_checks.length("key", key),
        implementation=implementation,
    )
    return dispatch.attend(
        query, key, value, index, scale, implementation, precision, block_sizes, output_dtype, return_residual
    )


def range_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_start: jax.Array,
    key_stop: jax.Array,
    *,
    query_segment_ids: jax.Array | None = None,
    key_segment_ids: jax.Array | None = None,
    scale: float | None = None,
    implementation: Implementation = None,
    precision: Precision = "float32",
    block_sizes: BlockSizes | None = None,
    output_dtype: jax.typing.DTypeLike | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention to a range of keys per query: `key_start[t] <= key < key_stop[t]`, with no causal mask.

    The remaining arguments, the results and the errors are those of `sparse_attention`.

    Args:
        query: float32, bfloat16 or float16 `[B, T, N, H]` or `[T, N, H]`.
        key: `[B, S, K, H]` or `[S, K, H]`; `K` divides `N`.
        value: The shape of `key`.
        key_start: int32 `[B, T, N]` or `[T, N]`; any axis may be 1. Clipped to the keys that there are.
        key_stop: int32, likewise. A range that ends before it starts is empty.
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
        ValueError: Likewise.
        NotImplementedError: Likewise.

    Examples:
        >>> import jax, jax.numpy as jnp, scfa_jax
        >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 16))
        >>> position = jnp.arange(64, dtype=jnp.int32)[:, None]  # [T, 1]: the same for all heads
        >>> window = scfa_jax.range_attention(query, key, value, position - 7, position + 1)
        >>> whole = scfa_jax.causal_attention(query, key, value)
        >>> bool(jnp.allclose(window[:, :8], whole[:, :8], atol=1e-5))
        True
    """
    query_length, key_length = (_checks.length(name, x) for name, x in (("query", query), ("key", key)))
    index = indices.range_index(
        key_start,
        key_stop,
        key_length,
        query_segment_ids=query_segment_ids,
        key_segment_ids=key_segment_ids,
        query_length=query_length,
        implementation=implementation,
    )
    return dispatch.attend(
        query, key, value, index, scale, implementation, precision, block_sizes, output_dtype, return_residual
    )


def sparse_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    index: SparseIndex,
    *,
    scale: float | None = None,
    implementation: Implementation = None,
    precision: Precision = "float32",
    block_sizes: BlockSizes | None = None,
    output_dtype: jax.typing.DTypeLike | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Exact attention over the pairs that an index allows, visiting only the tiles that hold some.

    Memory is linear in length. Reverse mode only, once: for forward mode or second derivatives use
    `scfa_jax.reference`. The same inputs give the same bits, gradients included.

    Args:
        query: float32, bfloat16 or float16 `[B, T, N, H]` or `[T, N, H]`.
        key: `[B, S, K, H]` or `[S, K, H]`, of the dtype of `query`. `K` divides `N`: query head `n` reads key
            head `n // (N // K)`.
        value: The shape and dtype of `key`.
        index: The pattern, from one of the `*_index` builders. It can serve many layers.
        scale: Static factor of the scores, `H ** -0.5` if None.
        implementation: "triton" (Pallas kernels on an NVIDIA GPU; head sizes that are a multiple of 8 from 16
            to 256), "triton_interpret" (the same kernels in Pallas's interpreter, for tests), "xla" (plain JAX,
            anywhere), a sequence of these to try in order, or None: "triton" where the code is compiled for
            CUDA and the head size allows, else "xla".
        precision: How products of float32 arrays are computed, gradients included; static. "float32": to a relative
            error below 1e-5, whatever the default matmul precision; on a GPU in three TF32 products. "tf32": on a GPU
            in one, of 11 significant bits an operand; elsewhere at least as exactly. 16-bit arrays are not affected.
        block_sizes: Tile sizes; None picks them by head size and dtype.
        output_dtype: float32, bfloat16 or float16; that of `query` if None. Partial results that are to be merged
            (`merge_attention`) stay exact in float32.
        return_residual: Whether to return the log-sum-exp of the scores too.

    Returns:
        The output, of the shape of `query`; with `return_residual` also the natural log-sum-exp,
        float32 `[B, T, N]` (or `[T, N]`), through which gradients flow. A query without keys has output 0,
        log-sum-exp `-inf` and gradients of 0. NaN and inf in rows that take no part reach nothing.

    Raises:
        TypeError: An argument has a dtype that is not supported.
        ValueError: Shapes do not fit each other, or an option is unknown.
        NotImplementedError: The chosen implementation cannot do this, or "triton" finds no GPU.

    Examples:
        >>> import jax, jax.numpy as jnp, scfa_jax
        >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 16))
        >>> index = scfa_jax.hash_index(jnp.arange(64, dtype=jnp.int32)[:, None] % 4, num_buckets=4)  # serves any heads
        >>> scfa_jax.sparse_attention(query, key, value, index).shape
        (1, 64, 2, 16)
    """
    return dispatch.attend(
        query, key, value, index, scale, implementation, precision, block_sizes, output_dtype, return_residual
    )
