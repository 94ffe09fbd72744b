"""Dense definitions of every operator in plain `jax.numpy`: what the kernels must equal.

Each function builds its boolean mask `[B or 1, N or 1, T, S]` and calls `attention`. Memory grows with `T * S`. They
can be differentiated in both modes and any number of times, so this is also where to go for forward mode or second
derivatives. They take the arguments of the operators in `scfa_jax`, with the same shapes and dtypes, except for
`implementation`, `precision` and `block_sizes`, and return the same.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from scfa_jax._checks import at_least_float32


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    sink_logits: jax.Array | None = None,
    output_dtype: jax.typing.DTypeLike | None = None,
    gates: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Dense attention over the pairs that `mask` allows.

    Rows that take no part (a query without keys, a key or value that no query attends to) are replaced by zeros
    first, so that NaN or inf in them reaches neither results nor gradients.

    Args:
        query: float `[B, T, N, H]`.
        key: float `[B, S, K, H]`; `K` must divide `N`.
        value: float `[B, S, K, V]`.
        mask: bool `[B or 1, N or 1, T, S]`, True where the query may attend to the key.
        scale: Factor of the products; `H ** -0.5` if None.
        logits_soft_cap: The logits are `cap * tanh(logit / cap)`; None for no cap.
        sink_logits: float `[N]`, a logit of each head that stands in the denominator for no key; None for none.
        output_dtype: dtype of the output; that of `query` if None.
        gates: float `[B, N, T, S]`, with which each query multiplies keys and values; None for ones.

    Returns:
        The output `[B, T, N, V]`, and the log-sum-exp of the logits, at least float32, `[B, T, N]`. A query without
        keys has output 0 and log-sum-exp `-inf`.
    """
    batch, query_length, num_heads, head_dim = query.shape
    key_length, num_key_heads = key.shape[1:3]
    group = num_heads // num_key_heads
    scale = head_dim**-0.5 if scale is None else scale
    dtype = at_least_float32(query.dtype)
    if 1 < mask.shape[1] < num_heads:
        mask = jnp.repeat(mask, num_heads // mask.shape[1], axis=1)
    mask = jnp.broadcast_to(mask, (batch, num_heads, query_length, key_length))

    has_key = mask.any(axis=3)  # [B, N, T]
    has_query = mask.any(axis=2).reshape(batch, num_key_heads, group, key_length).any(axis=2)  # [B, K, S]
    q = jnp.where(has_key.swapaxes(1, 2)[..., None], query.astype(dtype), 0)
    k = jnp.where(has_query.swapaxes(1, 2)[..., None], key.astype(dtype), 0)
    v = jnp.where(has_query.swapaxes(1, 2)[..., None], value.astype(dtype), 0)
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))

    highest = jax.lax.Precision.HIGHEST
    logits = scale * jnp.einsum("btnh,bsnh->bnts", q, k, precision=highest)
    logits = logits if gates is None else gates.astype(dtype) * logits
    logits = logits if logits_soft_cap is None else logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    logits = jnp.where(mask, logits, -jnp.inf)
    # Empty rows get one finite logit here and are overwritten below: no NaN arises on either side of a `where`.
    safe = jnp.where(has_key[..., None], logits, 0)
    logsumexp = jax.nn.logsumexp(safe, axis=3) if key_length else jnp.zeros(has_key.shape, dtype)
    if sink_logits is not None:
        logsumexp = jnp.logaddexp(logsumexp, sink_logits.astype(dtype)[None, :, None])
    weights = jnp.where(mask, jnp.exp(safe - logsumexp[..., None]), 0)
    weights = weights if gates is None else gates.astype(dtype) * weights
    output = jnp.einsum("bnts,bsnh->btnh", weights, v, precision=highest)
    output = jnp.where(has_key.swapaxes(1, 2)[..., None], output, 0).astype(
        query.dtype if output_dtype is None else output_dtype
    )
    return output, jnp.where(has_key, logsumexp, -jnp.inf).swapaxes(1, 2)


def causal_mask(query_length: int, key_length: int, query_offset: jax.Array | int = 0) -> jax.Array:
    """True where a key stands at or before the query.

    Args:
        query_length: `T`.
        key_length: `S`.
        query_offset: Position of the first query, int or int32 `[]` or `[B]`.

    Returns:
        bool `[B or 1, 1, T, S]`.
    """
    return _distance(query_length, key_length, query_offset) >= 0


def hash_mask(
    query_hash: jax.Array,
    key_hash: jax.Array,
    *,
    exclude_self: bool = False,
    query_offset: jax.Array | int = 0,
) -> jax.Array:
    """True where an earlier key (or the same token, unless `exclude_self`) shares the query's bucket.

    Args:
        query_hash: int `[B or 1, T, N or 1]`.
        key_hash: int `[B or 1, S, K or 1]`.
        exclude_self: Whether a query may not attend to the key at its own position.
        query_offset: Position of the first query, int or int32 `[]` or `[B]`.

    Returns:
        bool `[B or 1, N or 1, T, S]`.
    """
    query_hash, key_hash = _match_heads(query_hash, key_hash)
    same = query_hash.swapaxes(1, 2)[..., :, None] == key_hash.swapaxes(1, 2)[..., None, :]
    causal = causal_mask(query_hash.shape[1], key_hash.shape[1], query_offset - int(exclude_self))
    return same & causal


def keep_mask(query_keep: jax.Array, key_keep: jax.Array, *, query_offset: jax.Array | int = 0) -> jax.Array:
    """True where query and key are both kept and the key is not later.

    Args:
        query_keep: bool `[B or 1, T, N or 1]`.
        key_keep: bool `[B or 1, S, K or 1]`.
        query_offset: Position of the first query, int or int32 `[]` or `[B]`.

    Returns:
        bool `[B or 1, N or 1, T, S]`.
    """
    query_keep, key_keep = _match_heads(query_keep, key_keep)
    both = query_keep.swapaxes(1, 2)[..., :, None] & key_keep.swapaxes(1, 2)[..., None, :]
    return both & causal_mask(query_keep.shape[1], key_keep.shape[1], query_offset)


def range_mask(key_start: jax.Array, key_stop: jax.Array, key_length: int) -> jax.Array:
    """True where `key_start <= key index < key_stop`.

    Args:
        key_start: int32 `[B or 1, T, N or 1]`.
        key_stop: int32, likewise.
        key_length: `S`.

    Returns:
        bool `[B or 1, N or 1, T, S]`.
    """
    place = jnp.arange(key_length, dtype=jnp.int32)[None, None, None]
    start, stop = (x.swapaxes(1, 2)[..., None] for x in (key_start, key_stop))
    return (start <= place) & (place < stop)


def window_mask(
    query_length: int, key_length: int, window: jax.Array | int, query_offset: jax.Array | int = 0
) -> jax.Array:
    """True where a key stands less than `window` positions before the query, or after it.

    Args:
        query_length: `T`.
        key_length: `S`.
        window: int or int32 `[]`, `[N]` or `[B, N]`.
        query_offset: Position of the first query, int or int32 `[]` or `[B]`.

    Returns:
        bool `[B or 1, N or 1, T, S]`.
    """
    return _distance(query_length, key_length, query_offset) < jnp.atleast_2d(window)[:, :, None, None]


def sink_mask(
    query_length: int, key_length: int, num_sinks: int, key_segment_ids: jax.Array | None = None
) -> jax.Array:
    """True at the first `num_sinks` keys, or at as many of each segment, for all queries.

    Args:
        query_length: `T`.
        key_length: `S`.
        num_sinks: How many.
        key_segment_ids: int32 `[B or 1, S]` or `[S]`; None for one segment.

    Returns:
        bool `[B or 1, 1, T, S]`.
    """
    ids = jnp.zeros((1, key_length), jnp.int32) if key_segment_ids is None else jnp.atleast_2d(key_segment_ids)
    is_earlier = jnp.tril(ids[:, :, None] == ids[:, None, :], k=-1)
    is_sink = is_earlier.sum(axis=2)[:, None, None] < num_sinks
    return jnp.broadcast_to(is_sink, (ids.shape[0], 1, query_length, key_length))


def segment_mask(query_segment_ids: jax.Array, key_segment_ids: jax.Array) -> jax.Array:
    """True where query and key have the same segment id and it is not below 0.

    Args:
        query_segment_ids: int32 `[B or 1, T]` or `[T]`.
        key_segment_ids: int32 `[B or 1, S]` or `[S]`.

    Returns:
        bool `[B or 1, 1, T, S]`.
    """
    on_query = jnp.atleast_2d(query_segment_ids)[:, None, :, None]
    on_key = jnp.atleast_2d(key_segment_ids)[:, None, None, :]
    return (on_query == on_key) & (on_query >= 0)


def causal_attention(query, key, value, *, window=None, query_offset=None, **options):
    """Dense `scfa_jax.causal_attention`."""
    offset = _offset(query, key, query_offset)
    mask = causal_mask(query.shape[-3], key.shape[-3], offset)
    return _finish(query, key, value, _in_window(mask, window, offset), **options)


def hash_sparse_attention(
    query,
    key,
    value,
    query_hash,
    key_hash=None,
    *,
    exclude_self=False,
    num_buckets=None,
    window=None,
    query_offset=None,
    **options,
):
    """Dense `scfa_jax.hash_sparse_attention`; `num_buckets` changes nothing here."""
    del num_buckets
    offset = _offset(query, key, query_offset)
    key_hash = query_hash if key_hash is None else key_hash
    rounds = zip(query_hash, key_hash, strict=True) if query_hash.ndim == 4 else [(query_hash, key_hash)]
    masks = [
        hash_mask(
            _as_long_as(on_query, query),
            _as_long_as(on_key, key),
            exclude_self=exclude_self,
            query_offset=offset,
        )
        for on_query, on_key in rounds
    ]
    mask = functools.reduce(jnp.logical_or, masks)
    return _finish(query, key, value, _in_window(mask, window, offset), **options)


def qk_sparse_attention(query, key, value, query_keep, key_keep, *, window=None, query_offset=None, **options):
    """Dense `scfa_jax.qk_sparse_attention`."""
    offset = _offset(query, key, query_offset)
    query_keep, key_keep = _as_long_as(query_keep, query), _as_long_as(key_keep, key)
    mask = keep_mask(query_keep, key_keep, query_offset=offset)
    return _finish(query, key, value, _in_window(mask, window, offset), **options)


def range_attention(query, key, value, key_start, key_stop, **options):
    """Dense `scfa_jax.range_attention`."""
    key_start, key_stop = _as_long_as(key_start, query), _as_long_as(key_stop, query)
    mask = range_mask(key_start, key_stop, key.shape[-3])
    return _finish(query, key, value, mask, **options)


def window_attention(
    query,
    key,
    value,
    window,
    *,
    num_sinks=0,
    query_offset=None,
    query_segment_ids=None,
    key_segment_ids=None,
    **options,
):
    """Dense `scfa_jax.window_attention`."""
    lengths, offset = (query.shape[-3], key.shape[-3]), _offset(query, key, query_offset)
    key_segment_ids = query_segment_ids if key_segment_ids is None else key_segment_ids
    seen = window_mask(*lengths, window, offset) | sink_mask(*lengths, num_sinks, key_segment_ids)
    mask = causal_mask(*lengths, offset) & seen
    segments = {"query_segment_ids": query_segment_ids, "key_segment_ids": key_segment_ids}
    return _finish(query, key, value, mask, **segments, **options)


def moba_attention(
    query, key, value, *, block_size, top_k, num_local=1, share_in_group=False, query_offset=None, **options
):
    """Dense `scfa_jax.moba_attention`: scores all blocks of every query."""
    offset = _offset(query, key, query_offset)
    ids = [options.get(name) for name in ("query_segment_ids", "key_segment_ids")]
    ids[1] = ids[0] if ids[1] is None else ids[1]
    mask = moba_mask(query, key, block_size, top_k, num_local, share_in_group, offset, *ids)
    return _finish(query, key, value, mask, **options)


def moba_mask(
    query, key, block_size, top_k, num_local, share_in_group, query_offset, query_segment_ids, key_segment_ids
):
    """The own blocks and the best ones before them, as in `scfa_jax.moba_attention`: bool `[B, N or K, T, S]`."""
    if query.ndim == 3:
        query, key = query[None], key[None]
    (batch, query_length, heads, head_dim), (_, key_length, key_heads, _) = query.shape, key.shape
    dtype = at_least_float32(query.dtype)
    ids = [
        jnp.zeros((1, length), jnp.int32) if x is None else jnp.atleast_2d(x)
        for x, length in ((query_segment_ids, query_length), (key_segment_ids, key_length))
    ]
    number = jnp.arange(key_length) // block_size
    last_of_block = jnp.minimum(number * block_size + block_size, key_length) - 1
    counts = ids[1] == ids[1][:, last_of_block]  # [B, S]: those of the segment that the block's last key is of
    own = (jnp.asarray(query_offset).reshape(-1, 1) + jnp.arange(query_length)) // block_size
    per_block = lambda x: (
        jnp.zeros((x.shape[0], -(-key_length // block_size), *x.shape[2:]), dtype).at[:, number].add(x)
    )
    key = jnp.where(counts[..., None, None], key, 0).astype(dtype)
    means = per_block(key) / jnp.maximum(per_block(counts.astype(dtype)), 1)[..., None, None]
    grouped = query.astype(dtype).reshape(batch, query_length, key_heads, -1, head_dim)
    scores = jnp.einsum("btkgh,bmkh->bkgtm", grouped, means, precision="highest")
    scores = scores.sum(axis=2) if share_in_group else scores.reshape(batch, heads, query_length, -1)
    block = jnp.arange(scores.shape[-1])
    of_block = ids[1][:, jnp.minimum(block * block_size + block_size, key_length) - 1]
    may = (block <= own[..., None] - num_local) & (block < key_length // block_size)
    may = may & (ids[0][..., None] == of_block[:, None]) & (ids[0] >= 0)[..., None]
    scores = jnp.where(may[:, None] & (scores > -jnp.inf), scores, -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-scores, axis=-1, stable=True), axis=-1)
    chosen = (rank < top_k - 1) & (scores > -jnp.inf)
    local = (block <= own[..., None]) & (block > own[..., None] - num_local)
    seen = (chosen | local[:, None])[..., number]
    return seen & causal_mask(query_length, key_length, query_offset)


def nsa_attention(
    query,
    compressed,
    selected,
    near,
    gates,
    *,
    compression_size,
    compression_stride,
    block_size,
    top_k,
    window,
    num_initial=1,
    num_local=2,
    compressed_query=None,
    scale=None,
    query_offset=None,
    query_segment_ids=None,
    key_segment_ids=None,
):
    """Dense `scfa_jax.nsa_attention`, with batch axes: weighs all blocks of every query."""
    size, stride = compression_size, compression_stride
    compressed_query = query if compressed_query is None else compressed_query
    lengths, offset = (query.shape[1], selected[0].shape[1]), _offset(query, selected[0], query_offset)
    segments = {"query_segment_ids": query_segment_ids, "key_segment_ids": key_segment_ids}
    of_query, of_key = query_segment_ids, query_segment_ids if key_segment_ids is None else key_segment_ids
    if of_query is None:
        of_query, of_key = (jnp.zeros((1, length), jnp.int32) for length in lengths)
    position = (jnp.asarray(offset).reshape(-1, 1) + jnp.arange(lengths[0]))[..., None]
    count = compressed[0].shape[1]
    begin = jnp.arange(count) * stride
    rows = jnp.atleast_2d(of_key)[:, begin[:, None] + jnp.arange(size)]  # [B, M, size]
    is_within = (rows == rows[..., :1]).all(-1) & (rows[..., 0] >= 0)
    seen = (
        (begin + size <= position + 1)
        & is_within[:, None]
        & (jnp.atleast_2d(of_query)[..., None] == rows[:, None, :, 0])
    )
    seen = seen[:, None]
    of_compressed, logsumexp = attention(compressed_query, compressed[0], compressed[1], seen, scale=scale)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    dtype = at_least_float32(query.dtype)
    group = query.shape[2] // compressed[0].shape[2]
    products = jnp.einsum(
        "btnh,bmnh->bntm",
        compressed_query.astype(dtype),
        jnp.repeat(compressed[0], group, axis=2).astype(dtype),
        precision="highest",
    )
    logsumexp = jnp.where(logsumexp == -jnp.inf, 0, logsumexp).swapaxes(1, 2)[..., None]
    weights = jnp.where(seen, jnp.exp(scale * products - logsumexp), 0)
    start = jnp.arange(-(-lengths[1] // block_size)) * block_size
    overlap = jnp.minimum(begin[:, None] + size, start + block_size) - jnp.maximum(begin[:, None], start)
    importance = jnp.einsum("bntm,mj->bntj", weights, jnp.maximum(overlap, 0).astype(dtype) / stride)
    importance = importance.reshape(query.shape[0], -1, group, lengths[0], start.size).sum(axis=2)
    own, block = position // block_size, jnp.arange(start.size)
    may = ((block >= num_initial) & (block <= own - num_local))[:, None] & (importance > 0)
    rank = jnp.argsort(jnp.argsort(-jnp.where(may, importance, -jnp.inf), axis=-1, stable=True), axis=-1)
    always = (block < num_initial) | ((block > own - num_local) & (block <= own))
    chosen = may & (rank < top_k - num_local - num_initial) | always[:, None]
    mask = chosen[..., jnp.arange(lengths[1]) // block_size] & causal_mask(*lengths, offset)
    in_window = causal_mask(*lengths, offset) & window_mask(*lengths, window, offset)
    of_selected, of_window = (
        _finish(query, key, value, seen, scale=scale, output_dtype=dtype, **segments)
        for (key, value), seen in ((selected, mask), (near, in_window))
    )
    parts = jnp.stack([of_compressed.astype(dtype), of_selected, of_window], axis=-1)
    return (parts * gates[..., None, :]).sum(-1).astype(query.dtype)


def sparsek_gates(scores, k, *, where=None):
    """Dense `scfa_jax.sparsek.sparsek_gates`: the sum of gates, written out for every threshold where it has a kink."""
    scores = scores.astype(at_least_float32(scores.dtype))
    takes_part = (scores > -jnp.inf) if where is None else where & (scores > -jnp.inf)
    kinks = jnp.concatenate([scores, scores - 1], axis=-1)
    gates = jnp.clip(scores[..., None, :] - kinks[..., None], 0, 1)
    sums = jnp.where(takes_part[..., None, :], gates, 0).sum(axis=-1)
    is_below = (sums >= k) & jnp.concatenate([takes_part, takes_part], axis=-1)
    start = jnp.max(jnp.where(is_below, kinks, -jnp.inf), axis=-1, keepdims=True, initial=-jnp.inf)
    # Just above it these entries are below 1 and above 0, and change with the threshold.
    is_one = takes_part & (scores - 1 > start)
    is_between = takes_part & (scores > start) & ~is_one
    number = jnp.maximum(is_between.sum(axis=-1, keepdims=True), 1).astype(scores.dtype)
    total = jnp.where(is_between, scores, 0).sum(axis=-1, keepdims=True)
    threshold = (total + is_one.sum(axis=-1, keepdims=True).astype(scores.dtype) - k) / number
    gates = jnp.where(is_between, scores - threshold, is_one.astype(scores.dtype))
    has_more = takes_part.sum(axis=-1, keepdims=True) > k
    return jnp.where(has_more, gates, takes_part.astype(scores.dtype))


def sparsek_attention(
    query,
    key,
    value,
    scores,
    *,
    num_keys,
    window,
    chunk_size=128,
    num_candidates=None,
    query_segment_ids=None,
    **options,
):
    """Dense `scfa_jax.sparsek_attention`: ranks the scores of all keys for every query."""
    ids = jnp.zeros((1, query.shape[-3]), jnp.int32) if query_segment_ids is None else jnp.atleast_2d(query_segment_ids)
    if query.ndim == 3:
        results = sparsek_attention(
            *(x[None] for x in (query, key, value, scores)),
            num_keys=num_keys,
            window=window,
            chunk_size=chunk_size,
            num_candidates=num_candidates,
            query_segment_ids=ids,
            **options,
        )
        return jax.tree.map(lambda x: x[0], results)
    num_candidates = 2 * num_keys if num_candidates is None else num_candidates
    position = jnp.arange(query.shape[1])
    is_earlier_row = (position[None, :] < position[:, None])[None]
    segment = ids.astype(jnp.uint32)  # padding is last
    one, other = segment[:, :, None], segment[:, None]
    is_before = (other < one) | ((other == one) & is_earlier_row)
    place = is_before.sum(axis=2)[:, None]  # in line: [B or 1, 1, T]
    first = (place // chunk_size * chunk_size - window + 1)[..., None]  # of the window, for each query
    in_segment = segment_mask(ids, ids)  # [B or 1, 1, T, S]
    is_earlier = in_segment & (place[:, :, None] < first)
    seen = jnp.where(is_earlier, scores.astype(jnp.float32).swapaxes(1, 2)[:, :, None], -jnp.inf)  # [B, K, T, S]
    seen = jnp.where(jnp.isnan(seen), -jnp.inf, seen)
    one, other = seen[..., :, None], seen[..., None, :]
    is_better = (other > one) | ((other == one) & is_earlier_row[None, None])
    rank = is_better.sum(axis=-1)
    is_candidate = (rank < num_candidates) & (seen > -jnp.inf)
    is_selected = is_candidate & (rank < num_keys)
    is_local = in_segment & (first <= place[:, :, None]) & (place[:, :, None] <= place[..., None])
    gates = jnp.where(is_local, 1, sparsek_gates(seen, num_keys, where=is_candidate))
    gates = jnp.repeat(gates, query.shape[2] // key.shape[2], axis=1)
    return _finish(query, key, value, is_selected | is_local, gates=gates, **options)


def merge_attention(outputs, logsumexps, *, output_dtype=None):
    """Dense `scfa_jax.merge_attention`: a softmax over the parts."""
    outputs, logsumexps = list(outputs), list(logsumexps)
    dtype = jnp.result_type(*outputs) if output_dtype is None else output_dtype
    outputs, logsumexps = (jnp.stack([x.astype(jnp.float32) for x in xs]) for xs in (outputs, logsumexps))
    has_key = logsumexps > -jnp.inf
    is_empty = ~has_key.any(axis=0)
    total = jax.nn.logsumexp(jnp.where(is_empty[None], 0, logsumexps), axis=0)
    weights = jnp.where(has_key, jnp.exp(jnp.where(has_key, logsumexps, 0) - total[None]), 0)
    output = jnp.sum(weights[..., None] * jnp.where(has_key[..., None], outputs, 0), axis=0)
    return output.astype(dtype), jnp.where(is_empty, -jnp.inf, total)


def _offset(query: jax.Array, key: jax.Array, query_offset: jax.Array | int | None) -> jax.Array | int:
    """The position of the first query, which must be given where queries and keys are not as many."""
    if query_offset is None and query.shape[-3] != key.shape[-3]:
        raise ValueError(f"query_offset must be given for {query.shape[-3]} queries and {key.shape[-3]} keys.")
    return 0 if query_offset is None else query_offset


def _distance(query_length: int, key_length: int, query_offset: jax.Array | int) -> jax.Array:
    """How far each key stands before each query: int32 `[B or 1, 1, T, S]`."""
    offset = jnp.asarray(query_offset, jnp.int32).reshape(-1, 1, 1, 1)
    query, key = (jnp.arange(length, dtype=jnp.int32) for length in (query_length, key_length))
    return offset + query[None, None, :, None] - key[None, None, None, :]


def _in_window(mask: jax.Array, window: jax.Array | int | None, query_offset: jax.Array | int) -> jax.Array:
    """The part of the mask `[B or 1, N or 1, T, S]` that lies in the window, if there is one."""
    return mask if window is None else mask & window_mask(mask.shape[2], mask.shape[3], window, query_offset)


def _match_heads(on_query: jax.Array, on_key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Repeats the key side's heads so that each query head finds its own."""
    heads, key_heads = on_query.shape[2], on_key.shape[2]
    if 1 < key_heads < heads:
        on_key = jnp.repeat(on_key, heads // key_heads, axis=2)
    return on_query, on_key


def _as_long_as(x: jax.Array, rows: jax.Array) -> jax.Array:
    """Gives `[T or 1, N]` or `[B, T or 1, N]` its batch axis and the length of `rows`."""
    x = x[None] if x.ndim == 2 else x
    return jnp.broadcast_to(x, (x.shape[0], rows.shape[-3], x.shape[2]))


def _finish(
    query,
    key,
    value,
    mask,
    *,
    query_segment_ids=None,
    key_segment_ids=None,
    return_residual=False,
    **options,
):
    """What the operators share; their further options end here."""
    if query_segment_ids is not None:
        key_segment_ids = query_segment_ids if key_segment_ids is None else key_segment_ids
        mask = mask & segment_mask(query_segment_ids, key_segment_ids)
    if query.ndim == 3:
        output, logsumexp = (x[0] for x in attention(query[None], key[None], value[None], mask, **options))
    else:
        output, logsumexp = attention(query, key, value, mask, **options)
    return (output, logsumexp) if return_residual else output
