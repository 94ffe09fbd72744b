"""Native sparse attention (NSA): compressed keys, the blocks that they point to, and a window, mixed by gates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from scfa_jax import _checks, _options, _partitioning, _positions, _selection
from scfa_jax.attention import sparse_attention
from scfa_jax.backends.ordering import iota
from scfa_jax.index import SparseIndex
from scfa_jax.patterns import block_index, causal_index, range_index

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def in_compression_blocks(x: Float[Array, "B S K H"], size: int, stride: int) -> Float[Array, "B M size K H"]:
    """Cuts keys or values into the overlapping blocks that NSA compresses, each to one key or value.

    Block `i` holds the rows `i * stride` to `i * stride + size - 1`; what follows the last whole block is left out.
    Source: Yuan et al. 2025, "Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention".

    Args:
        x: Keys or values.
        size: Static number of rows in a block.
        stride: Static number of rows from the start of a block to that of the next; it divides `size`.

    Returns:
        The rows of each block, `M = max(0, (S - size) // stride + 1)`.

    Raises:
        TypeError: A size is no static int.
        ValueError: A size is below 1, or `stride` does not divide `size`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from scfa_jax.nsa import in_compression_blocks
        >>> in_compression_blocks(jnp.arange(7.0).reshape(1, 7, 1, 1), size=4, stride=2)[0, :, :, 0, 0].tolist()
        [[0.0, 1.0, 2.0, 3.0], [2.0, 3.0, 4.0, 5.0]]
    """
    _check_compression(size, stride)
    count = num_compressed(x.shape[1], size, stride)
    # Whole strides side by side: no gather, and so no scatter in the gradient.
    whole = x.shape[1] // stride
    strides = x[:, : whole * stride].reshape(x.shape[0], whole, stride, *x.shape[2:])
    return jnp.concatenate([strides[:, i : i + count] for i in range(size // stride)], axis=2)


def num_compressed(length: int, size: int, stride: int) -> int:
    """How many compression blocks a sequence has: those that are whole."""
    return max(0, (length - size) // stride + 1)


@_options.documented
def compressed_index(
    query_length: int,
    key_length: int,
    *,
    compression_size: int,
    compression_stride: int,
    **options: Unpack[_options.PositionOptions],
) -> SparseIndex:
    """Every query attends to the compressed keys of the blocks that end at or before its position.

    Args:
        query_length: Number of queries `T`.
        key_length: Number of keys `S` before compression.
        compression_size: Static number of keys in a compression block.
        compression_stride: Static number of keys from the start of a block to that of the next.
        **options: Positions and implementation. Within segments a block counts if all its keys are of one segment.

    Returns:
        The index, with a key for each whole block.

    Raises:
        TypeError: A size is no static int, or offsets or segment ids are not int32.
        ValueError: Shapes do not fit each other, a size is below 1, or the lengths differ and there is no
            `query_offset`.

    Examples:
        >>> from scfa_jax.nsa import compressed_index
        >>> compressed_index(7, 7, compression_size=4, compression_stride=2).mask()[0, 0].astype(int).tolist()
        [[0, 0], [0, 0], [0, 0], [1, 0], [1, 0], [1, 1], [1, 1]]
    """
    sizes = compression_size, compression_stride
    _check_compression(*sizes, names=("compression_size", "compression_stride"))
    last, (of_query, of_key) = _last_compressed(query_length, key_length, *sizes, options)
    count = num_compressed(key_length, *sizes)
    high = jnp.minimum(last, count - 1)[:, None]
    if of_query is None:
        return SparseIndex(None, iota(count)[None, None], None, jnp.zeros_like(high), high, density=1.0)
    start, stop = jnp.zeros((1, query_length, 1), jnp.int32), (high + 1).swapaxes(1, 2)
    segments: Any = {"query_segment_ids": of_query, "key_segment_ids": of_key}
    return range_index(start, stop, count, implementation=options.get("implementation"), **segments)


@_options.documented
def nsa_blocks(
    query: Float[Array, "*B T N H"],
    compressed_key: Float[Array, "*B M K H"],
    logsumexp: Float[Array, "*B T N"],
    key_length: int,
    *,
    compression_size: int,
    compression_stride: int,
    block_size: int,
    top_k: int,
    num_initial: int = 1,
    num_local: int = 2,
    scale: float | None = None,
    **options: Unpack[_options.PositionOptions],
) -> Int[Array, "*B T K k"]:
    """Chooses blocks of keys for each query, by what its attention to compressed keys gives them.

    The importance of a block is the sum of the weights of the compressed keys that overlap it, each times the strides
    that they share, over the query heads that read a key head: these choose together. Of equal ones the earlier block
    wins. The first blocks and the last ones are chosen always. No gradient passes. Source: Yuan et al. 2025, equations
    8 to 10.

    Args:
        query: float32, bfloat16 or float16. The batch axis may be omitted from all arrays.
        compressed_key: Of the dtype of `query`, one for each compression block.
        logsumexp: float32, natural log, of the attention of `query` to `compressed_key`; `-inf` where there is none.
        key_length: Number of keys `S` before compression.
        compression_size: Static number of keys in a compression block.
        compression_stride: Static number of keys from the start of a compression block to that of the next.
        block_size: Static number of keys in a block that is chosen; a multiple of
            `compression_stride`.
        top_k: Static number of blocks that a query attends to, first and last ones among them.
        num_initial: Static number of first blocks that are chosen always.
        num_local: Static number of last blocks, the query's own among them, that `block_index` adds.
        scale: Static factor of the products of queries and compressed keys; `H ** -0.5` if None.
        **options: Positions and implementation.

    Returns:
        int32 `[B, T, K, top_k - num_local]`: numbers of blocks in any order, the first ones among them, -1 where there
        are fewer candidates. It is what `block_index` takes, with `num_local`.

    Raises:
        TypeError: An argument has a dtype that is not supported, or a size is no static int.
        ValueError: Shapes do not fit each other, or a size is too small.
    """
    sizes = compression_size, compression_stride
    _check_compression(*sizes, names=("compression_size", "compression_stride"))
    _check_selection(compression_stride, block_size, top_k, num_initial, num_local)
    has_batch = getattr(query, "ndim", 4) == 4
    query, compressed_key, _ = _checks.attention_arrays(query, compressed_key, compressed_key)
    logsumexp = logsumexp if has_batch else logsumexp[None]
    if logsumexp.shape != query.shape[:3]:
        raise ValueError(f"logsumexp must be [B, T, N] = {query.shape[:3]}, got {logsumexp.shape}.")
    _check_compressed("compressed_key", compressed_key, key_length, *sizes)
    _check_batches(query, options)
    query, compressed_key, logsumexp = jax.lax.stop_gradient((query, compressed_key, logsumexp))
    query_length = query.shape[1]
    last, (of_query, of_key) = _last_compressed(query_length, key_length, *sizes, options)
    offset = _positions.resolved_offset(options.get("query_offset"), query_length, key_length)
    position = _positions.first_position(offset)[:, 0] + iota(query_length)[None]
    own = jnp.floor_divide(position, np.int32(block_size))
    zeros = jnp.zeros((1, 1), jnp.int32)
    chosen = _selection.most_important_blocks(
        query,
        compressed_key,
        logsumexp,
        _selection.Compressed(
            last,
            jnp.broadcast_to(zeros, (1, query_length)) if of_query is None else of_query,
            jnp.broadcast_to(zeros, (1, compressed_key.shape[1])) if of_key is None else of_key,
            own - num_local,
        ),
        _selection.Overlap(compression_size // compression_stride, block_size // compression_stride),
        first=num_initial,
        num_blocks=-(-key_length // block_size),
        k=top_k - num_local - num_initial,
        scale=query.shape[3] ** -0.5 if scale is None else _checks.static_number("scale", scale),
        implementation=options.get("implementation"),
    )

    def with_initial(chosen):
        initial = jnp.broadcast_to(iota(num_initial), (*chosen.shape[:3], num_initial))
        return (jnp.concatenate([initial, chosen], axis=3),)

    # Split, since types of an explicit mesh let nothing be concatenated that is sharded in two ways.
    (chosen,) = _partitioning.split(with_initial, ["b.h."], ["b.h."])(chosen)
    return chosen if has_batch else chosen[0]


@_options.documented
def nsa_attention(
    query: Float[Array, "*B T N H"],
    compressed: tuple[Float[Array, "*B M K H"], Float[Array, "*B M K V"]],
    selected: tuple[Float[Array, "*B S K H"], Float[Array, "*B S K V"]],
    near: tuple[Float[Array, "*B S K H"], Float[Array, "*B S K V"]],
    gates: Float[Array, "*B T N 3"],
    *,
    compression_size: int,
    compression_stride: int,
    block_size: int,
    top_k: int,
    window: int,
    num_initial: int = 1,
    num_local: int = 2,
    compressed_query: Float[Array, "*B T N H"] | None = None,
    scale: float | None = None,
    **options: Unpack[_options.PositionOptions],
) -> Float[Array, "*B T N V"]:
    """NSA: attention to compressed keys, to the blocks that they point to, and to a window, each times its gate.

    Each branch has keys and values, and a softmax, of its own. Exact on its pairs. Source: Yuan et al. 2025, "Native
    Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention".

    Args:
        query: float32, bfloat16 or float16. The batch axis may be omitted from all arrays.
        compressed: Keys and values of the compressed branch, one for each block of `in_compression_blocks`.
        selected: Keys and values of the branch that attends to chosen blocks. `K` must divide `N`.
        near: Keys and values of the window.
        gates: Factors of the three branches, in this order.
        compression_size: Static number of keys in a compression block.
        compression_stride: Static number of keys from the start of a compression block to that of the next.
        block_size: Static number of keys in a block that is chosen; a multiple of
            `compression_stride`.
        top_k: Static number of blocks that a query attends to, first and last ones among them.
        window: Static number of positions up to its own that a query sees in the window.
        num_initial: Static number of first blocks that are chosen always.
        num_local: Static number of last blocks, the query's own among them, that are chosen always.
        compressed_query: Queries of the compressed branch, where they differ, as without a rotary embedding; `query`
            if None.
        scale: Static factor of the products of queries and keys; `H ** -0.5` if None.
        **options: Positions and implementation.

    Returns:
        The output, in the dtype of `query`.

    Raises:
        TypeError: An argument has a dtype that is not supported, or a size is no static int.
        ValueError: Shapes do not fit each other, a size is too small, or `T` differs from `S` and there is no
            `query_offset`.
        NotImplementedError: The chosen implementation cannot do this, or "triton" finds no GPU.

    Examples:
        >>> import jax, jax.numpy as jnp, scfa_jax
        >>> from scfa_jax.nsa import in_compression_blocks
        >>> query = jax.random.normal(jax.random.key(0), (1, 64, 4, 16))
        >>> key, value = jax.random.normal(jax.random.key(1), (2, 1, 64, 2, 16))
        >>> compressed = tuple(in_compression_blocks(x, size=8, stride=4).mean(axis=2) for x in (key, value))
        >>> sizes = {"compression_size": 8, "compression_stride": 4, "block_size": 8, "top_k": 4, "window": 16}
        >>> gates = jnp.full((1, 64, 4, 3), 1 / 3)
        >>> scfa_jax.nsa_attention(query, compressed, (key, value), (key, value), gates, **sizes).shape
        (1, 64, 4, 16)
    """
    lengths = _checks.length("query", query), _checks.length("selected", selected[0])
    in_blocks = {"compression_size": compression_size, "compression_stride": compression_stride}
    attend: dict[str, Any] = {"scale": scale, "implementation": options.get("implementation")}
    _check_compression(compression_size, compression_stride, names=("compression_size", "compression_stride"))
    _check_compressed("compressed", compressed[0], lengths[1], compression_size, compression_stride)
    _check_batches(query, options)
    compressed_query = query if compressed_query is None else compressed_query
    if compressed_query.shape != query.shape:
        raise ValueError(f"compressed_query must have the shape of query, {query.shape}, got {compressed_query.shape}.")
    if gates.shape != (*query.shape[:-1], 3):
        raise ValueError(f"gates must have shape {(*query.shape[:-1], 3)}, got {gates.shape}.")
    _check_compression(compression_size, compression_stride, names=("compression_size", "compression_stride"))
    _check_selection(compression_stride, block_size, top_k, num_initial, num_local)
    top_k = min(top_k, num_initial + num_local + lengths[1] // block_size)  # no slots that stay empty
    of_compressed: Any = sparse_attention(
        compressed_query,
        *compressed,
        compressed_index(*lengths, **in_blocks, **options),
        return_residual=True,
        **attend,
    )
    blocks = nsa_blocks(
        compressed_query,
        compressed[0],
        of_compressed[1],
        lengths[1],
        block_size=block_size,
        top_k=top_k,
        num_initial=num_initial,
        num_local=num_local,
        scale=scale,
        **in_blocks,
        **options,
    )
    chosen = block_index(blocks, block_size, num_local=num_local, key_length=lengths[1], **options)
    of_selected = sparse_attention(query, *selected, chosen, **attend)
    of_window = sparse_attention(query, *near, causal_index(*lengths, window=window, **options), **attend)
    parts: list[Any] = [of_compressed[0], of_selected, of_window]
    gates = gates.astype(_checks.at_least_float32(gates.dtype))
    return sum(gates[..., i, None] * part.astype(gates.dtype) for i, part in enumerate(parts)).astype(query.dtype)


def _last_compressed(
    query_length: int, key_length: int, size: int, stride: int, options: _options.PositionOptions
) -> tuple[jax.Array, tuple[jax.Array | None, jax.Array | None]]:
    """The last block that each query may see, int32 `[B or 1, T]`, and the segments of queries and blocks, if any."""
    offset = _positions.resolved_offset(options.get("query_offset"), query_length, key_length)
    position = _positions.first_position(offset)[:, 0] + iota(query_length)[None]
    last = jnp.floor_divide(position - (size - 1), np.int32(stride))
    ids = options.get("query_segment_ids"), options.get("key_segment_ids")
    if all(x is None for x in ids):
        return last, (None, None)
    of_query, of_key = _positions.both_segments(*ids, query_length, key_length)
    rows = in_compression_blocks(of_key[..., None, None], size, stride)[..., 0, 0]
    of_block = jnp.where((rows == rows[:, :, :1]).all(axis=2), rows[:, :, 0], -1)
    # Padding meets no block, nor any other padding.
    return last, (jnp.maximum(of_query, -1), jnp.where(of_block < 0, -2, of_block))


def _check_compression(size: int, stride: int, names: tuple[str, str] = ("size", "stride")) -> None:
    for name, value in zip(names, (size, stride), strict=True):
        _checks.static_int(name, value, least=1)
    if size % stride:
        raise ValueError(f"{names[1]} must divide {names[0]}, got {stride} and {size}.")


def _check_compressed(name: str, compressed_key: Any, key_length: int, size: int, stride: int) -> None:
    length, count = _checks.length(name, compressed_key), num_compressed(key_length, size, stride)
    if length != count:
        raise ValueError(
            f"{name} must have a row for each of the {count} compression blocks of {key_length} keys, got {length}."
        )


def _check_batches(query: Any, options: _options.PositionOptions) -> None:
    batch = query.shape[0] if query.ndim == 4 else 1
    for name, rank in (("query_offset", 1), ("query_segment_ids", 2), ("key_segment_ids", 2)):
        shape: tuple[int, ...] = getattr(options.get(name), "shape", ())
        if len(shape) == rank and shape[0] not in (1, batch):
            raise ValueError(f"{name} must have the batch size of query, {batch}, or 1, got {shape[0]}.")


def _check_selection(stride: int, block_size: int, top_k: int, num_initial: int, num_local: int) -> None:
    _checks.static_int("block_size", block_size, least=1, most=_checks.LARGEST)
    _checks.static_int("num_initial", num_initial, least=0)
    _checks.static_int("num_local", num_local, least=1)
    _checks.static_int("top_k", top_k, least=num_initial + num_local)
    if block_size % stride:
        raise ValueError(f"block_size must be a multiple of compression_stride, got {block_size} and {stride}.")
