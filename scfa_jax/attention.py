"""The public operators: check the arguments, build the index, choose an implementation, differentiate."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from scfa_jax import _checks, remat
from scfa_jax import block_sizes as defaults
from scfa_jax import index as indices
from scfa_jax.index import Implementation, SparseIndex
from scfa_jax.kernels import _compat, xla
from scfa_jax.tiling import BlockSizes

IMPLEMENTATIONS = ("triton", "triton_interpret", "xla")


def causal_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    query_offset: jax.Array | int = 0,
    query_segment_ids: jax.Array | None = None,
    key_segment_ids: jax.Array | None = None,
    scale: float | None = None,
    implementation: Implementation = None,
    block_sizes: BlockSizes | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Dense causal flash attention: every query attends to all keys at or before its position.

    Source: Dao 2023, "FlashAttention-2". The remaining arguments, the results and the errors are those of
    `sparse_attention`.

    Args:
        query: float32, bfloat16 or float16 `[B, T, N, H]` or `[T, N, H]`.
        key: `[B, S, K, H]` or `[S, K, H]`; `K` divides `N`.
        value: The shape of `key`.
        query_offset: Position of the first query: a static int, or int32 `[]` or `[B]`. Keys start at 0.
        query_segment_ids: int32 `[B, T]` or `[T]`: attention stays among equal ids, and rows with an id below 0
            (padding) take no part. Any ids in any order; None for one segment.
        key_segment_ids: int32 `[B, S]` or `[S]`, likewise. None means those of the queries, and `S = T`.
        scale: As `sparse_attention` takes it.
        implementation: As `sparse_attention` takes it.
        block_sizes: As `sparse_attention` takes it.
        return_residual: As `sparse_attention` takes it.

    Returns:
        The output, or (output, log-sum-exp).
    """
    query_length, key_length = (_checks.length(name, x) for name, x in (("query", query), ("key", key)))
    index = indices.causal_index(
        query_length,
        key_length,
        query_offset=query_offset,
        query_segment_ids=query_segment_ids,
        key_segment_ids=key_segment_ids,
        implementation=implementation,
    )
    return _sparse_attention(query, key, value, index, scale, implementation, block_sizes, return_residual)


def hash_sparse_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_hash: jax.Array,
    key_hash: jax.Array | None = None,
    *,
    exclude_self: bool = False,
    num_buckets: int | None = None,
    query_offset: jax.Array | int = 0,
    query_segment_ids: jax.Array | None = None,
    key_segment_ids: jax.Array | None = None,
    scale: float | None = None,
    implementation: Implementation = None,
    block_sizes: BlockSizes | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Hash-sparse causal attention: every query attends to all keys of its bucket at or before its position.

    Source: Pagliardini et al. 2023, "Faster Causal Attention Over Large Sequences Through Sparse Flash
    Attention". The remaining arguments, the results and the errors are those of `sparse_attention`.

    Args:
        query: float32, bfloat16 or float16 `[B, T, N, H]` or `[T, N, H]`.
        key: `[B, S, K, H]` or `[S, K, H]`; `K` divides `N`.
        value: The shape of `key`.
        query_hash: int32 `[B, T, N]` or `[T, N]`, the bucket of each query; any axis may be 1.
        key_hash: int32 `[B, S, K]` or `[S, K]`, likewise. None means the same as `query_hash`, and `S = T`,
            `K = N`; both sides are then sorted once.
        exclude_self: Whether a query may not attend to the key at its own position.
        num_buckets: A promise that all ids lie in `[0, num_buckets)`, which makes sorting cheaper. Without it
            any int32 is an id. The result is undefined if the promise is broken.
        query_offset: Position of the first query: a static int, or int32 `[]` or `[B]`. Keys start at 0.
        query_segment_ids: int32 `[B, T]` or `[T]`: attention stays among equal ids, and rows with an id below 0
            (padding) take no part. Any ids in any order; None for one segment.
        key_segment_ids: int32 `[B, S]` or `[S]`, likewise. None means those of the queries, and `S = T`.
        scale: As `sparse_attention` takes it.
        implementation: As `sparse_attention` takes it.
        block_sizes: As `sparse_attention` takes it.
        return_residual: As `sparse_attention` takes it.

    Returns:
        The output, or (output, log-sum-exp).
    """
    if key_hash is None and getattr(query, "shape", None) != getattr(key, "shape", None):
        raise ValueError(
            f"key_hash may be None only where query and key have one shape, got {query.shape} and {key.shape}."
        )
    index = indices.hash_index(
        query_hash,
        key_hash,
        exclude_self=exclude_self,
        num_buckets=num_buckets,
        query_offset=query_offset,
        query_segment_ids=query_segment_ids,
        key_segment_ids=key_segment_ids,
        query_length=_checks.length("query", query),
        key_length=_checks.length("key", key),
        implementation=implementation,
    )
    return _sparse_attention(query, key, value, index, scale, implementation, block_sizes, return_residual)


def qk_sparse_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_keep: jax.Array,
    key_keep: jax.Array,
    *,
    query_offset: jax.Array | int = 0,
    query_segment_ids: jax.Array | None = None,
    key_segment_ids: jax.Array | None = None,
    scale: float | None = None,
    implementation: Implementation = None,
    block_sizes: BlockSizes | None = None,
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
        query_offset: Position of the first query: a static int, or int32 `[]` or `[B]`. Keys start at 0.
        query_segment_ids: int32 `[B, T]` or `[T]`: attention stays among equal ids, and rows with an id below 0
            (padding) take no part. Any ids in any order; None for one segment.
        key_segment_ids: int32 `[B, S]` or `[S]`, likewise. None means those of the queries, and `S = T`.
        scale: As `sparse_attention` takes it.
        implementation: As `sparse_attention` takes it.
        block_sizes: As `sparse_attention` takes it.
        return_residual: As `sparse_attention` takes it.

    Returns:
        The output, or (output, log-sum-exp).
    """
    index = indices.keep_index(
        query_keep,
        key_keep,
        query_offset=query_offset,
        query_segment_ids=query_segment_ids,
        key_segment_ids=key_segment_ids,
        query_length=_checks.length("query", query),
        key_length=_checks.length("key", key),
        implementation=implementation,
    )
    return _sparse_attention(query, key, value, index, scale, implementation, block_sizes, return_residual)


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
    block_sizes: BlockSizes | None = None,
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
        block_sizes: As `sparse_attention` takes it.
        return_residual: As `sparse_attention` takes it.

    Returns:
        The output, or (output, log-sum-exp).
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
    return _sparse_attention(query, key, value, index, scale, implementation, block_sizes, return_residual)


def sparse_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    index: SparseIndex,
    *,
    scale: float | None = None,
    implementation: Implementation = None,
    block_sizes: BlockSizes | None = None,
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
        block_sizes: Tile sizes; None picks them by head size and dtype.
        return_residual: Whether to return the log-sum-exp of the scores too.

    Returns:
        The output, of the shape and dtype of `query`; with `return_residual` also the natural log-sum-exp,
        float32 `[B, T, N]` (or `[T, N]`), through which gradients flow. A query without keys has output 0,
        log-sum-exp `-inf` and gradients of 0. NaN and inf in rows that take no part reach nothing.

    Raises:
        TypeError: An argument has a dtype that is not supported.
        ValueError: Shapes do not fit each other, or an option is unknown.
        NotImplementedError: The chosen implementation cannot do this, or "triton" finds no GPU.
    """
    return _sparse_attention(query, key, value, index, scale, implementation, block_sizes, return_residual)


def _sparse_attention(query, key, value, index, scale, implementation, block_sizes, return_residual):
    has_batch = getattr(query, "ndim", 4) == 4
    query, key, value = _checks.attention_arrays(query, key, value)
    _checks.index_fits(index, query.shape, key.shape)
    options = _Options(
        scale=_checks.scale(scale, query.shape[3]),
        implementation=_choose(implementation, query.shape[3]),
        blocks=_fit_blocks(block_sizes, query, key),
    )
    if query.size == 0 or key.size == 0:
        output = jnp.zeros_like(query)
        logsumexp = jnp.full(query.shape[:3], -jnp.inf, jnp.float32)
    else:
        output, logsumexp = _attend(options, query, key, value, index)
    if not has_batch:
        output, logsumexp = output[0], logsumexp[0]
    return (output, logsumexp) if return_residual else output


@dataclass(frozen=True)
class _Options:
    """What is static in a call: one compilation for each."""

    scale: float
    implementation: str | None
    blocks: BlockSizes | None


def _choose(implementation: Implementation, head_dim: int) -> str | None:
    """The first implementation that can do it, or None to leave the choice to the platform."""
    if implementation is None:
        return None if _compat.has_triton() and _triton_problem(head_dim) is None else "xla"
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    if not names or any(name not in IMPLEMENTATIONS for name in names):
        raise ValueError(
            f"implementation must be one of {IMPLEMENTATIONS}, a sequence of them, or None, got {implementation!r}."
        )
    problems = []
    for name in names:
        problem = None if name == "xla" else _triton_problem(head_dim)
        if name == "triton" and problem is None and not _compat.has_gpu():
            problem = "it needs an NVIDIA GPU, or an abstract one in context, and there is none"
        if problem is None:
            return name
        problems.append(f'implementation "{name}" cannot do this: {problem}')
    raise NotImplementedError("; ".join(problems) + '. "xla" runs anywhere.')


def _triton_problem(head_dim: int) -> str | None:
    if head_dim % 8 or not 16 <= head_dim <= 256:
        return f"the head size must be a multiple of 8 from 16 to 256, got {head_dim}"
    return None


def _fit_blocks(block_sizes, query, key) -> BlockSizes | None:
    if block_sizes is not None and not isinstance(block_sizes, BlockSizes):
        raise TypeError(f"block_sizes must be a scfa_jax.BlockSizes or None, got {block_sizes!r}.")
    return None if block_sizes is None else block_sizes.fit(query.shape[1], key.shape[1])


def _raise_on_second_derivative(*_):
    raise NotImplementedError(
        "scfa_jax attention can be differentiated once, in reverse mode; "
        "use the same function of scfa_jax.reference for forward mode and second derivatives."
    )


def _differentiated_no_further(function):
    """Makes derivatives of what already belongs to a derivative raise, the same on every implementation."""
    function = jax.custom_vjp(function, nondiff_argnums=(0,))
    function.defvjp(_raise_on_second_derivative, _raise_on_second_derivative)
    return function


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: _Options, query, key, value, index):
    output, logsumexp = _results(options, query, key, value, index)
    return output, logsumexp.swapaxes(1, 2)


def _attend_forward(options: _Options, query, key, value, index):
    output, logsumexp = _results(options, query, key, value, index)
    output = checkpoint_name(output, remat.OUTPUT)
    logsumexp = checkpoint_name(logsumexp, remat.LOGSUMEXP)
    return (output, logsumexp.swapaxes(1, 2)), (query, key, value, index, output, logsumexp)


def _attend_backward(options: _Options, residuals, cotangents):
    return (*_gradients(options, *residuals, *cotangents), None)


_attend.defvjp(_attend_forward, _attend_backward)


@_differentiated_no_further
def _results(options: _Options, query, key, value, index):
    return _by_platform(options, _forward, query, key, value, index)


@_differentiated_no_further
def _gradients(options: _Options, query, key, value, index, output, logsumexp, output_gradient, logsumexp_gradient):
    gradients = (output_gradient, logsumexp_gradient.swapaxes(1, 2))
    return _by_platform(options, _backward, query, key, value, index, output, logsumexp, *gradients)


def _by_platform(options: _Options, run, *arrays):
    """Calls `run(implementation, options, *arrays)`, chosen by the platform that the code is lowered for."""
    if options.implementation is not None:
        return run(options.implementation, options, *arrays)
    return jax.lax.platform_dependent(
        *arrays,
        cuda=functools.partial(run, "triton", options),
        default=functools.partial(run, "xla", options),
    )


def _forward(implementation: str, options: _Options, query, key, value, index):
    blocks = _blocks_for(implementation, options, query, key, index)
    if implementation == "xla":
        return xla.forward(query, key, value, index, scale=options.scale, block=blocks.forward)
    from scfa_jax.kernels import triton_forward  # here, so that a JAX without the backend can import the rest

    return triton_forward.forward(
        query,
        key,
        value,
        index,
        scale=options.scale,
        block=blocks.forward,
        interpret=implementation == "triton_interpret",
    )


def _backward(implementation: str, options: _Options, query, key, value, index, *rest):
    blocks = _blocks_for(implementation, options, query, key, index)
    arrays = (query, key, value, index, *rest)
    if implementation == "xla":
        return xla.backward(*arrays, scale=options.scale, block=blocks.dq)
    from scfa_jax.kernels import triton_backward

    return triton_backward.backward(
        *arrays, scale=options.scale, blocks=blocks, interpret=implementation == "triton_interpret"
    )


def _blocks_for(implementation: str, options: _Options, query, key, index) -> BlockSizes:
    if options.blocks is not None:
        return options.blocks
    if implementation == "xla":
        blocks = defaults.xla_block_sizes()
    else:
        memory = defaults.shared_memory(_compat.gpu_kind())
        blocks = defaults.triton_block_sizes(query.shape[3], query.dtype, index.density, memory)
    return blocks.fit(query.shape[1], key.shape[1])
