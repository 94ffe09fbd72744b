"""The operators: attention over an index, and one for each pattern."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, Unpack, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from scfa_jax import _checks, _options, _partitioning, backends, index, patterns, remat
from scfa_jax.backends import Backend, Call, Choice
from scfa_jax.backends.protocol import BlockSizes, Inputs, Residuals
from scfa_jax.backends.tile import NO_KEY, Logits
from scfa_jax.index import SparseIndex
from scfa_jax.merge import merged

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Float32, Int

    from scfa_jax.patterns.causal import Window

    Query: TypeAlias = Float[Array | np.ndarray, "*B T N H"]
    Key: TypeAlias = Float[Array | np.ndarray, "*B S K H"]
    Value: TypeAlias = Float[Array | np.ndarray, "*B S K V"]
    Result: TypeAlias = Float[Array, "*B T N V"] | tuple[Float[Array, "*B T N V"], Float32[Array, "*B T N"]]


@_options.documented
def sparse_attention(
    query: Query,
    key: Key,
    value: Value,
    index: SparseIndex | Sequence[SparseIndex],
    **options: Unpack[_options.AttentionOptions],
) -> Result:
    """Exact attention over the pairs that an index allows, visiting only the tiles that hold some.

    Memory is linear in length. The same inputs give the same bits, gradients included. It can be differentiated once,
    in reverse mode: for forward mode or second derivatives use `scfa_jax.reference`.

    Args:
        query: float32, bfloat16 or float16. The batch axis may be omitted from all three arrays.
        key: Of the dtype of `query`. `K` must divide `N`: query head `n` reads key head `n // (N // K)`.
        value: Of the dtype of `query`. Its heads may have a size of their own.
        index: The pattern, from one of the `*_index` functions; it can serve many layers. Or several indices, no two of
            which allow the same pair: one softmax is taken over all their pairs. Under `jax.experimental.checkify` a
            pair that is in two of them raises; elsewhere it counts twice.
        **options: How attention is computed.

    Returns:
        The output; with `return_residual` also the natural log-sum-exp of the logits, through which gradients flow. A
        query without keys has output 0, log-sum-exp `-inf` and gradients of 0. NaN and inf never propagate from rows
        that take no part: queries without keys, and keys and values that no query attends to.

    Raises:
        TypeError: An argument has a dtype that is not supported, or an option is unknown.
        ValueError: Shapes do not fit each other.
        NotImplementedError: The chosen implementation cannot do this, or "triton" finds no GPU.

    Examples:
        >>> import jax, jax.numpy as jnp, scfa_jax
        >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 16))
        >>> index = scfa_jax.hash_index(jnp.arange(64, dtype=jnp.int32)[:, None] % 4, num_buckets=4)  # serves any heads
        >>> scfa_jax.sparse_attention(query, key, value, index).shape
        (1, 64, 2, 16)
        >>> indices = scfa_jax.patterns.strided_index(64, 64, stride=8)  # a window, and columns before it
        >>> scfa_jax.sparse_attention(query, key, value, indices).shape
        (1, 64, 2, 16)
    """
    has_batch = getattr(query, "ndim", 4) == 4
    query, key, value = _checks.attention_arrays(query, key, value)
    indices = _checked_indices(index, query.shape, key.shape)
    call, sink_logits, implementation, return_residual = _read(query, key, value, **options)
    choice = backends.choose(implementation, call)
    shape = (*query.shape[:3], value.shape[3])
    if query.size == 0 or key.size == 0:
        output, logsumexp = jnp.zeros(shape, call.output_dtype), jnp.full(shape[:3], NO_KEY, jnp.float32)
    else:
        of_key = _of_key(key)
        arrays, axes = [query, key, value], [_ROWS, of_key, of_key]
        if sink_logits is not None:
            arrays, axes = [*arrays, sink_logits], [*axes, _HEADS]
        query, key, value, *sinks = _partitioning.aligned(arrays, axes)
        sink_logits = sinks[0] if sinks else None
        output, logsumexp = _attend(choice, call, query, key, value, sink_logits, tuple(indices))
    if not has_batch:
        output, logsumexp = output[0], logsumexp[0]
    return (output, jnp.where(logsumexp == NO_KEY, -jnp.inf, logsumexp)) if return_residual else output


@_options.documented
def causal_attention(
    query: Query,
    key: Key,
    value: Value,
    *,
    window: Window | None = None,
    **options: Unpack[_options.CausalAttentionOptions],
) -> Result:
    """Dense causal flash attention: every query attends to all keys at or before its position.

    Source: Dao 2023, "FlashAttention-2".

    Args:
        query: float32, bfloat16 or float16. The batch axis may be omitted from all three arrays.
        key: Of the dtype of `query`. `K` must divide `N`.
        value: Of the dtype of `query`.
        window: How many positions up to its own a query may see: a static int, or int32 `[]`, `[N]` or `[B, N]`; 0 for
            none, None for all. Time falls with it.
        **options: Positions, and how attention is computed.

    Returns:
        The output; with `return_residual` also the natural log-sum-exp of the logits. A query without keys has output
        0, log-sum-exp `-inf` and gradients of 0.

    Raises:
        TypeError: An argument has a dtype that is not supported, or an option is unknown.
        ValueError: Shapes do not fit each other, or `T` differs from `S` and there is no
            `query_offset`.
        NotImplementedError: The chosen implementation cannot do this, or "triton" finds no GPU.

    Examples:
        >>> import jax, scfa_jax
        >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 16))
        >>> output = scfa_jax.causal_attention(query, key, value)
        >>> bool(jax.numpy.allclose(output[:, 0], value[:, 0]))  # the first query sees one key
        True
    """
    positions, more = _options.split(options)
    return sparse_attention(
        query, key, value, patterns.causal_index(*_lengths(query, key), window=window, **positions), **more
    )


@_options.documented
def window_attention(
    query: Query,
    key: Key,
    value: Value,
    window: Window,
    *,
    num_sinks: int = 0,
    **options: Unpack[_options.CausalAttentionOptions],
) -> Result:
    """Sliding-window attention with sinks: to the last `window` positions, and to the first ones of all.

    All heads' windows run in one launch, whatever their lengths, and all sinks in a second one. Sources: Beltagy et
    al. 2020, "Longformer", for the window; Xiao et al. 2023, "Efficient Streaming Language Models with Attention
    Sinks".

    Args:
        query: float32, bfloat16 or float16. The batch axis may be omitted from all three arrays.
        key: Of the dtype of `query`. `K` must divide `N`.
        value: Of the dtype of `query`.
        window: How many positions up to its own a query sees: a static int, or int32 `[]`, `[N]` or `[B, N]`.
        num_sinks: Static number of first positions (of each segment) that all later queries see too.
        **options: Positions, and how attention is computed.

    Returns:
        The output; with `return_residual` also the natural log-sum-exp of the logits. A query without keys has output
        0, log-sum-exp `-inf` and gradients of 0.

    Raises:
        TypeError: An argument has a dtype that is not supported, or an option is unknown.
        ValueError: Shapes do not fit each other, `num_sinks` is below 0, or `T` differs from `S`
            and there is no `query_offset`.
        NotImplementedError: The chosen implementation cannot do this, or "triton" finds no GPU.

    Examples:
        >>> import jax, jax.numpy as jnp, scfa_jax
        >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 16))
        >>> lengths = jnp.array([8, 32], jnp.int32)  # one for each head
        >>> scfa_jax.window_attention(query, key, value, lengths, num_sinks=4).shape
        (1, 64, 2, 16)
    """
    positions, more = _options.split(options)
    return sparse_attention(
        query, key, value, patterns.window_index(*_lengths(query, key), window, num_sinks, **positions), **more
    )


@_options.documented
def hash_sparse_attention(
    query: Query,
    key: Key,
    value: Value,
    query_hash: Int[Array | np.ndarray, "*#R_B #T #N"],
    key_hash: Int[Array | np.ndarray, "*#R_B #S #K"] | None = None,
    *,
    exclude_self: bool = False,
    num_buckets: int | None = None,
    window: Window | None = None,
    **options: Unpack[_options.CausalAttentionOptions],
) -> Result:
    """Hash-sparse causal attention: every query attends to all keys of its bucket at or before its position.

    Source: Pagliardini et al. 2023, "Faster Causal Attention Over Large Sequences Through Sparse Flash Attention".

    Args:
        query: float32, bfloat16 or float16. The batch axis may be omitted from all three arrays.
        key: Of the dtype of `query`. `K` must divide `N`.
        value: Of the dtype of `query`.
        query_hash: int32 `[B, T, N]` or `[T, N]`, the bucket of each query; any axis may be 1. With `R` rounds of
            hashing `[R, B, T, N]`: a query attends once to each key that shares its bucket in any round. This takes
            `2**R - 1` launches, those beyond the first `R` over the few pairs that share several buckets.
        key_hash: int32 `[B, S, K]`, `[S, K]` or `[R, B, S, K]`, likewise. None means the same as `query_hash`, and
            `S = T`, `K = N`; both sides are then sorted once.
        exclude_self: Whether a query may not attend to the key at its own position.
        num_buckets: A static promise that all ids lie in `[0, num_buckets)`, which makes sorting cheaper. Without it
            any int32 is an id. If it is broken the result is undefined, and stays within memory; under
            `jax.experimental.checkify` it raises.
        window: How many positions up to its own a query may see: a static int, or int32 `[]`, `[N]` or `[B, N]`; 0 for
            none, None for all. Time falls with it.
        **options: Positions, and how attention is computed.

    Returns:
        The output; with `return_residual` also the natural log-sum-exp of the logits. A query without keys has output
        0, log-sum-exp `-inf` and gradients of 0.

    Raises:
        TypeError: An argument has a dtype that is not supported, or an option is unknown.
        ValueError: Shapes do not fit each other, or `T` differs from `S` and there is no
            `query_offset`.
        NotImplementedError: The chosen implementation cannot do this, or "triton" finds no GPU.

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
    positions, more = _options.split(options)
    query_length, key_length = _lengths(query, key)
    hashed = patterns.hash_index(
        query_hash,
        key_hash,
        exclude_self=exclude_self,
        num_buckets=num_buckets,
        window=window,
        query_length=query_length,
        key_length=key_length,
        **positions,
    )
    return sparse_attention(query, key, value, hashed, **more)


@_options.documented
def qk_sparse_attention(
    query: Query,
    key: Key,
    value: Value,
    query_keep: Bool[Array | np.ndarray, "*#B #T #N"],
    key_keep: Bool[Array | np.ndarray, "*#B #S #K"],
    *,
    window: Window | None = None,
    **options: Unpack[_options.CausalAttentionOptions],
) -> Result:
    """QK-sparse causal attention: each head drops queries and keys of its own.

    A dropped query gives output 0, as does one that has lost all its keys. Time falls with what is dropped. Source:
    Pagliardini et al. 2023, "Faster Causal Attention Over Large Sequences Through Sparse Flash Attention".

    Args:
        query: float32, bfloat16 or float16. The batch axis may be omitted from all three arrays.
        key: Of the dtype of `query`. `K` must divide `N`.
        value: Of the dtype of `query`.
        query_keep: True where the query takes part.
        key_keep: True where the key takes part.
        window: How many positions up to its own a query may see: a static int, or int32 `[]`, `[N]` or `[B, N]`; 0 for
            none, None for all. Time falls with it.
        **options: Positions, and how attention is computed.

    Returns:
        The output; with `return_residual` also the natural log-sum-exp of the logits. A query without keys has output
        0, log-sum-exp `-inf` and gradients of 0.

    Raises:
        TypeError: An argument has a dtype that is not supported, or an option is unknown.
        ValueError: Shapes do not fit each other, or `T` differs from `S` and there is no
            `query_offset`.
        NotImplementedError: The chosen implementation cannot do this, or "triton" finds no GPU.

    Examples:
        >>> import jax, scfa_jax
        >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 16))
        >>> keep = jax.random.bernoulli(jax.random.key(1), 0.5, (1, 64, 2))
        >>> output = scfa_jax.qk_sparse_attention(query, key, value, keep, keep)
        >>> bool((output[~keep] == 0).all())
        True
    """
    positions, more = _options.split(options)
    query_length, key_length = _lengths(query, key)
    kept = patterns.keep_index(
        query_keep, key_keep, window=window, query_length=query_length, key_length=key_length, **positions
    )
    return sparse_attention(query, key, value, kept, **more)


@_options.documented
def range_attention(
    query: Query,
    key: Key,
    value: Value,
    key_start: Int[Array | np.ndarray, "*#B #T #N"],
    key_stop: Int[Array | np.ndarray, "*#B #T #N"],
    **options: Unpack[_options.RangeAttentionOptions],
) -> Result:
    """Attention to a range of keys per query: `key_start[t] <= key < key_stop[t]`, with no causal mask.

    Args:
        query: float32, bfloat16 or float16. The batch axis may be omitted from all three arrays.
        key: Of the dtype of `query`. `K` must divide `N`.
        value: Of the dtype of `query`.
        key_start: int32, clipped to the keys that there are.
        key_stop: int32, likewise. A range that ends before it starts is empty.
        **options: Segments, and how attention is computed.

    Returns:
        The output; with `return_residual` also the natural log-sum-exp of the logits. A query without keys has output
        0, log-sum-exp `-inf` and gradients of 0.

    Raises:
        TypeError: An argument has a dtype that is not supported, or an option is unknown.
        ValueError: Shapes do not fit each other.
        NotImplementedError: The chosen implementation cannot do this, or "triton" finds no GPU.

    Examples:
        >>> import jax, jax.numpy as jnp, scfa_jax
        >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 16))
        >>> position = jnp.arange(64, dtype=jnp.int32)[:, None]  # [T, 1]: the same for all heads
        >>> window = scfa_jax.range_attention(query, key, value, position - 7, position + 1)
        >>> whole = scfa_jax.causal_attention(query, key, value)
        >>> bool(jnp.allclose(window[:, :8], whole[:, :8], atol=1e-5))
        True
    """
    segments, more = _options.split(options)
    query_length, key_length = _lengths(query, key)
    ranges = patterns.range_index(key_start, key_stop, key_length, query_length=query_length, **cast(Any, segments))
    return sparse_attention(query, key, value, ranges, **more)


def _lengths(query: Any, key: Any) -> tuple[int, int]:
    return _checks.length("query", query), _checks.length("key", key)


def _checked_indices(given: Any, query_shape: tuple[int, ...], key_shape: tuple[int, ...]) -> list[SparseIndex]:
    """The indices, which fit the arrays."""
    indices = index.as_list(given)
    for part in indices:
        sides = (
            ("query", part.low, query_shape, part.query_length),
            ("key", part.key_code, key_shape, part.key_length),
        )
        for side, array, shape, rows in sides:
            batch, heads, _ = array.shape
            if rows != shape[1]:
                raise ValueError(f"{side} has {shape[1]} rows, but the index was built for {rows}.")
            if batch not in (1, shape[0]):
                raise ValueError(f"{side} has batch size {shape[0]}, but the index was built for {batch}.")
            if heads == 0 or query_shape[2] % heads or (side == "key" and shape[2] % heads):
                raise ValueError(f"{side} has {shape[2]} heads, but the index was built for {heads}.")
    if len(indices) > 1:
        message = "index must be disjoint: no two of its parts may allow the same pair."
        _checks.in_debugging(_is_disjoint, message, indices)
    return indices


def _is_disjoint(indices: list[SparseIndex]) -> tuple[jax.Array]:
    return (index.is_disjoint(indices),)


def _read(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float | int | None = None,
    logits_soft_cap: float | int | None = None,
    sink_logits: jax.Array | None = None,
    implementation: backends.Implementation = None,
    precision: Any = "float32",
    block_sizes: BlockSizes | None = None,
    output_dtype: jax.typing.DTypeLike | None = None,
    return_residual: bool = False,
) -> tuple[Call, jax.Array | None, backends.Implementation, bool]:
    """Checks the options and fills in their defaults."""
    if isinstance(scale, jax.core.Tracer):
        raise TypeError("scale must be a static number; multiply query by a traced one instead.")
    scale = query.shape[3] ** -0.5 if scale is None else _checks.static_number("scale", scale)
    if logits_soft_cap is not None and _checks.static_number("logits_soft_cap", logits_soft_cap) <= 0:
        raise ValueError(f"logits_soft_cap must be above 0, got {logits_soft_cap}.")
    _checks.precision(precision)
    if block_sizes is not None and not isinstance(block_sizes, BlockSizes):
        raise TypeError(f"block_sizes must be a scfa_jax.BlockSizes or None, got {block_sizes!r}.")
    if sink_logits is not None:
        _checks.floats("sink_logits", sink_logits)
        _checks.Axes(N=query.shape[2]).check("sink_logits", sink_logits, "N")
        sink_logits = jnp.asarray(sink_logits).astype(jnp.float32)
    call = Call(
        head_dim=query.shape[3],
        value_dim=value.shape[3],
        dtype=query.dtype,
        logits=Logits(scale, None if logits_soft_cap is None else float(logits_soft_cap)),
        output_dtype=_checks.output_dtype(output_dtype, query.dtype),
        precision=precision,
        block_sizes=block_sizes and block_sizes.fit(query.shape[1], key.shape[1]),
    )
    return call, sink_logits, implementation, return_residual


# Axes of batch and heads, along which devices share the work.
_ROWS, _VECTORS, _HEADS = "b.h.", "bh.", "h"


def _of_key(key: jax.Array) -> str:
    return _ROWS if key.shape[2] > 1 else "b..."


def _raise_on_second_derivative(*_):
    raise NotImplementedError(
        "scfa_jax attention can be differentiated once, in reverse mode; "
        "use the same function of scfa_jax.reference for forward mode and second derivatives."
    )


def _differentiated_no_further(function):
    """Makes derivatives of what already belongs to a derivative raise, the same on every backend."""
    function = jax.custom_vjp(function, nondiff_argnums=(0, 1))
    function.defvjp(_raise_on_second_derivative, _raise_on_second_derivative)
    return function


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(choice: Choice, call: Call, query, key, value, sink_logits, indices):
    output, logsumexp = _results(choice, call, query, key, value, sink_logits, indices)
    return output, logsumexp.swapaxes(1, 2)


def _attend_forward(choice: Choice, call: Call, query, key, value, sink_logits, indices):
    output, logsumexp = _results(choice, call, query, key, value, sink_logits, indices)
    output = checkpoint_name(output, remat.OUTPUT)
    logsumexp = checkpoint_name(logsumexp, remat.LOGSUMEXP)
    return (output, logsumexp.swapaxes(1, 2)), (query, key, value, sink_logits, indices, output, logsumexp)


def _attend_backward(choice: Choice, call: Call, residuals, cotangents):
    *gradients, sink_gradient = _gradients(choice, call, *residuals, *cotangents)
    return *gradients, sink_gradient if residuals[3] is not None else None, None


_attend.defvjp(_attend_forward, _attend_backward)


@_differentiated_no_further
def _results(choice: Choice, call: Call, query, key, value, sink_logits, indices):
    run = functools.partial(backends.by_platform, choice, _forward, call)
    axes = (_ROWS, _ROWS, _ROWS, _HEADS, _VECTORS)
    return _partitioning.split(run, axes, (_ROWS, _VECTORS))(query, key, value, sink_logits, indices)


@_differentiated_no_further
def _gradients(choice: Choice, call: Call, query, key, value, sink_logits, indices, *rest):
    output, logsumexp, output_gradient, logsumexp_gradient = rest
    rest = output, logsumexp, output_gradient.astype(query.dtype), logsumexp_gradient.swapaxes(1, 2)
    run = functools.partial(backends.by_platform, choice, _backward, call)
    axes = (_ROWS, _ROWS, _ROWS, _HEADS, _VECTORS, _ROWS, _VECTORS, _ROWS, _VECTORS)
    of_key, of_sinks = _of_key(key) + _partitioning.SUMMED, _HEADS + _partitioning.SUMMED
    return _partitioning.split(run, axes, (_ROWS, of_key, of_key, of_sinks))(
        query, key, value, sink_logits, indices, *rest
    )


def _forward(backend: Backend, call: Call, query, key, value, sink_logits, indices):
    """The output, and the log-sum-exp `[B, N, T]`."""
    if len(indices) == 1 and indices[0].slots == 1 and sink_logits is None:
        return backend.forward(call, Inputs(query, key, value, indices[0]), call.output_dtype)
    outputs, logsumexps, signs = [], [], []
    for part in indices:
        # Many slots move many bytes: their results are rounded once more than those of other indices.
        dtype = call.output_dtype if part.slots > 1 else jnp.dtype(jnp.float32)
        output, logsumexp = backend.forward(call, Inputs(query, key, value, part), dtype)
        outputs += _of_slots(output, part.slots, axis=1)
        logsumexps += _of_slots(logsumexp.swapaxes(1, 2), part.slots, axis=1)
        signs += [part.sign] * part.slots
    output, logsumexp = merged(
        outputs,
        logsumexps,
        signs,
        no_key=NO_KEY,
        sink_logits=None if sink_logits is None else sink_logits[None, None, :],
    )
    return output.astype(call.output_dtype), logsumexp.swapaxes(1, 2)


def _backward(backend: Backend, call: Call, query, key, value, sink_logits, indices, *rest):
    """Gradients of query, key, value and the sink logits.

    With the log-sum-exp of all keys, and with one delta per query, `exp(logit - logsumexp)` is the true weight of every
    pair of every index: the gradients of the indices add up, and no index needs to know of the others.
    """
    output, logsumexp, output_gradient, logsumexp_gradient = rest
    products = output.astype(jnp.float32) * output_gradient.astype(jnp.float32)
    delta = jnp.sum(products, axis=-1).swapaxes(1, 2) - logsumexp_gradient
    delta = jnp.where(logsumexp == NO_KEY, 0.0, delta)
    dtype = query.dtype if len(indices) == 1 else jnp.dtype(jnp.float32)
    gradients: Any = None
    for part in indices:
        residuals = Residuals(logsumexp, delta, output_gradient)
        dq, *of_keys = backend.backward(call, Inputs(query, key, value, part), residuals, dtype)
        if part.slots > 1:
            dq = functools.reduce(jnp.add, (x.astype(jnp.float32) for x in _of_slots(dq, part.slots, axis=1)))
        of_part = [dq, *of_keys]
        signed = of_part if part.sign == 1 else [-x for x in of_part]
        gradients = signed if gradients is None else [x + y for x, y in zip(gradients, signed, strict=True)]
    sinks = jnp.zeros(query.shape[2], jnp.float32)
    if sink_logits is not None:
        weights = jnp.exp(sink_logits[None, :, None] - logsumexp)  # 0 without keys
        sinks = -jnp.sum(weights * delta, axis=(0, 2))
    return *(x.astype(query.dtype) for x in gradients), sinks


def _of_slots(x: jax.Array, slots: int, axis: int) -> list[jax.Array]:
    """The rows of each slot, of an axis that holds all slots of a query side by side."""
    if slots == 1:
        return [x]
    x = x.reshape(*x.shape[:axis], x.shape[axis] // slots, slots, *x.shape[axis + 1 :])
    return [jax.lax.index_in_dim(x, i, axis + 1, keepdims=False) for i in range(slots)]
