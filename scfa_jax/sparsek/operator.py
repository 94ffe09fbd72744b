"""SparseK attention: a window, and beyond it the keys that a learned score selects.

Source: Lou, Jia, Zheng & Tu 2024, "Sparser is Faster and Less is More: Efficient Sparse Attention for Long-Range
Transformers". The definition here, for chunks of queries, is in the docstring of `sparsek_attention`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from scfa_jax import _checks, _options, _partitioning, _positions, remat
from scfa_jax.attention import sparse_attention
from scfa_jax.backends.ordering import iota, iota_like
from scfa_jax.index import SparseIndex
from scfa_jax.merge import merge_attention
from scfa_jax.patterns._build import index_in_line
from scfa_jax.sparsek.gather import gather_rows

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Float32, Int


def sparsek_gates(
    scores: Float[Array, "*A n"], k: int, *, where: Bool[Array, "*A n"] | None = None
) -> Float32[Array, "*A n"]:
    """The SparseK operator: the vector nearest to the scores with entries from 0 to 1 that sum to `k`.

    It is `clip(scores - threshold, 0, 1)`, and exact: the threshold comes from sorting, not from iteration. The
    derivative is that of the projection, identity minus mean over the entries strictly between 0 and 1 and nothing
    elsewhere. Source: Lou et al. 2024, section 3.

    Args:
        scores: float32, bfloat16 or float16. Entries that are -inf or NaN take no part.
        k: The sum, a static int of at least 0.
        where: True where an entry takes part; None for all.

    Returns:
        The gates. Entries that take no part have gates and gradients of 0. Where at most `k`
        entries take part, their gates are 1.

    Raises:
        TypeError: `scores` does not hold floats, `where` no booleans, or `k` is no static int.
        ValueError: `k` is below 0, or the shapes differ.

    Examples:
        >>> import jax.numpy as jnp
        >>> from scfa_jax.sparsek import sparsek_gates
        >>> sparsek_gates(jnp.array([3.0, 1.0, 0.5, -2.0]), 2).tolist()
        [1.0, 0.75, 0.25, 0.0]
    """
    _checks.static_int("k", k, least=0)
    _checks.floats("scores", scores)
    if scores.ndim == 0:
        raise ValueError(f"scores must be [..., n], got shape {scores.shape}.")
    if where is not None:
        _checks.booleans("where", where)
        if where.shape != scores.shape:
            raise ValueError(f"where must have the shape of scores, {scores.shape}, got {where.shape}.")
    takes_part = scores > -jnp.inf  # not NaN either
    takes_part = takes_part if where is None else takes_part & where
    return _gates(int(k), scores.astype(jnp.float32), takes_part)


@_options.documented
def sparsek_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B T K H"],
    value: Float[Array, "*B T K V"],
    scores: Float[Array, "*B T K"],
    *,
    num_keys: int,
    window: int,
    chunk_size: int = 128,
    num_candidates: int | None = None,
    query_segment_ids: Int[Array, "#C T"] | Int[Array, " T"] | None = None,
    **options: Unpack[_options.AttentionOptions],
) -> Float[Array, "*B T N V"] | tuple[Float[Array, "*B T N V"], Float32[Array, "*B T N"]]:
    """SparseK attention: the last tokens, and the `num_keys` earlier ones of the highest scores, gated by them.

    Source: Lou et al. 2024, "Sparser is Faster and Less is More: Efficient Sparse Attention for Long-Range
    Transformers".

    Positions are cut into chunks of `chunk_size`. The queries of the chunk that begins at position `c` attend

    - to all keys from position `c - window + 1` up to their own: the window of the chunk's first query, which grows
      with the chunk so that no key is in neither part;
    - to those `num_keys` of the keys before them, at positions up to `c - window`, that have the highest scores (of
      equal ones the earlier), with key and value multiplied by their gate. Gates are `sparsek_gates(scores,
      num_keys)` over the `num_candidates` highest of these scores.

    Both parts share one softmax. With `chunk_size=1`, and no more positive gates than candidates, this is the
    attention of Lou et al. 2024. The set of candidates is found from chunk to chunk: a key that has `num_candidates`
    better ones before it has them for ever. For fixed options time and memory are linear in length; the selected keys
    and values are copied for each chunk, `num_keys / chunk_size` times the size of `key` and `value`.

    With segments a query attends to those of these keys that are of its own segment, and selects among them alone. What
    is said of positions then holds for places in line: rows stand by segment id, then position, and padding comes last.
    Documents packed one after another with ascending ids stand as they are.

    Args:
        query: float32, bfloat16 or float16. The batch axis may be omitted from all arrays.
        key: Of the dtype of `query`. `K` must divide `N`.
        value: Of the dtype of `query`.
        scores: float32, bfloat16 or float16, one of each key. Gradients flow to it through the gates. A key with a
            score of -inf or NaN is never selected.
        num_keys: Keys to select.
        window: Keys of the window, the query's own among them: at least 1.
        chunk_size: Queries that share a selection.
        num_candidates: Scores that the gates come from, at least `num_keys`; twice as many if None. With just
            `num_keys` all gates are 1, and no gradient reaches the scores.
        query_segment_ids: int32 `[B, T]` or `[T]`: attention stays among equal ids, and rows with an id below 0
            (padding) take no part. Ids may stand in any order. None for one segment.
        **options: How attention is computed.

    Returns:
        The output; with `return_residual` also the natural log-sum-exp of the logits. A query without keys has output
        0, log-sum-exp `-inf` and gradients of 0.

    Raises:
        TypeError: An argument has a dtype that is not supported, or an option is no static int.
        ValueError: Shapes do not fit each other, or an option is too small.
        NotImplementedError: The chosen implementation cannot do this, or "triton" finds no GPU.

    Examples:
        >>> import jax, scfa_jax
        >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 16))
        >>> scores = jax.random.normal(jax.random.key(1), (1, 64, 2))
        >>> attend = jax.jit(lambda *arrays: scfa_jax.sparsek_attention(*arrays, num_keys=8, window=8, chunk_size=32))
        >>> attend(query, key, value, scores).shape
        (1, 64, 2, 16)
    """
    selection = Selection.of(num_keys, window, chunk_size, num_candidates)
    has_batch = getattr(query, "ndim", 4) == 4
    query, key, value = _checks.attention_arrays(query, key, value)
    length, segment_ids = query.shape[1], query_segment_ids
    if key.shape[1] != length:
        raise ValueError(f"key must have the length of query, {length}, got {key.shape[1]}.")
    scores = checked_scores(scores, key.shape[:3], has_batch)
    implementation = options.get("implementation")
    if segment_ids is not None and (segment_ids.ndim > 1 and segment_ids.shape[0] not in (1, query.shape[0])):
        raise ValueError(f"query_segment_ids must be [1 or {query.shape[0]}, {length}], got shape {segment_ids.shape}.")
    line = _positions.line_up(
        length, length, query_offset=0, query_segment_ids=segment_ids, implementation=implementation
    )
    place, begins = iota(length), line.first()  # of each query, and where its segment begins
    chunk = place // chunk_size
    start = chunk * chunk_size

    # The places of a pool begin one window before place 0, so that chunk `m` adds the places of chunk `m - 1`.
    num_chunks, lead = max(1, -(-length // chunk_size)), window - 1
    pool = line.keys(jax.lax.stop_gradient(scores).swapaxes(1, 2), padding=-jnp.inf)
    pool = jnp.pad(pool, ((0, 0), (0, 0), (lead, chunk_size)), constant_values=-jnp.inf)
    pool = pool[..., : (num_chunks - 1) * chunk_size]
    of_chunks = None
    if segment_ids is not None:
        of_chunks = lead + jnp.pad(begins, ((0, 0), (0, 0), (0, chunk_size)))
        of_chunks = of_chunks[..., : num_chunks * chunk_size : chunk_size]
    highest, found = best_so_far(pool, selection, begins=of_chunks)
    flat = (*found.shape[:2], math.prod(found.shape[2:]))
    row = line.key_rows((found - lead).reshape(flat)).reshape(found.shape)
    row, is_candidate = (x.transpose(0, 2, 3, 1) for x in (row, highest > -jnp.inf))  # [B, M, C, K]
    by_chunk = lambda x, count: gather_rows(x, *(_one_axis(y[:, :, :count]) for y in (row, is_candidate)))
    chosen_scores = by_chunk(scores[..., None], selection.num_candidates)[..., 0].reshape(row.shape)
    chosen_scores = jnp.where(is_candidate, chosen_scores, -jnp.inf)
    chosen = by_chunk(jnp.concatenate([key, value], axis=3), num_keys)
    chosen_key, chosen_value = jnp.split(chosen, [key.shape[3]], axis=3)

    low, keys = jnp.maximum((start - lead)[None, None], begins), iota(length)[None, None]
    near = index_in_line(line, key_place=None, key_code=keys, query_place=None, low=low, high=line.last())
    # Of the segments in a chunk, only the one that the chunk begins in has keys before the window.
    takes_part = begins <= start[None, None]
    far = gated(chosen_key, chosen_value, chosen_scores, chunk, selection, takes_part, near.query_order)
    result = attend_to_both(query, (key, value, near), far, **options)
    if has_batch:
        return result
    return jax.tree.map(lambda x: x[0], result)


def attend_to_both(
    query: jax.Array,
    near: tuple[jax.Array, jax.Array, SparseIndex],
    far: tuple[jax.Array, jax.Array, SparseIndex],
    **options: Unpack[_options.AttentionOptions],
) -> Any:
    """One softmax over keys and values of two arrays, each with an index; options of `sparse_attention`."""
    dtype = _checks.output_dtype(options.get("output_dtype"), query.dtype)
    partial: Any = {**options, "output_dtype": jnp.float32, "return_residual": True}
    parts: list[Any] = [sparse_attention(query, *near, **partial)]
    partial.pop("sink_logits", None)  # stand in the denominator once
    parts.append(sparse_attention(query, *far, **partial))
    output, logsumexp = merge_attention(*zip(*parts, strict=True), output_dtype=dtype)
    return (output, logsumexp) if options.get("return_residual") else output


def pairs(length: int, selection: Selection) -> float:
    """Counts the pairs of a query and a key: those of the windows, and those selected before them."""
    position = np.arange(length)
    before = np.maximum(0, position // selection.chunk_size * selection.chunk_size - selection.window + 1)
    return float(np.sum(position + 1 - before + np.minimum(before, selection.num_keys)))


@dataclass(frozen=True)
class Selection:
    """The options of a selection, checked and with the default filled in, as `sparsek_attention` takes them."""

    num_keys: int
    window: int
    chunk_size: int
    num_candidates: int

    @classmethod
    def of(cls, num_keys: int, window: int, chunk_size: int, num_candidates: int | None) -> Selection:
        """Checks the options; errors are those of `sparsek_attention`."""
        for name, number in (("num_keys", num_keys), ("window", window), ("chunk_size", chunk_size)):
            _checks.static_int(name, number, least=1)
        if num_candidates is not None:
            _checks.static_int("num_candidates", num_candidates, least=num_keys)
        return cls(num_keys, window, chunk_size, 2 * num_keys if num_candidates is None else num_candidates)


def checked_scores(scores: jax.Array, shape: tuple[int, ...], has_batch: bool = True) -> jax.Array:
    """Checks scores against the `[B, T, K]` of keys, and returns them in float32 with -inf for NaN."""
    _checks.floats("scores", scores)
    expected = shape if has_batch else shape[1:]
    if scores.shape != expected:
        raise ValueError(f"scores must be {expected}, one of each key, got shape {scores.shape}.")
    scores = scores.astype(jnp.float32).reshape(shape)
    return jnp.where(scores > -jnp.inf, scores, -jnp.inf)


def best_so_far(
    pool: jax.Array,
    selection: Selection,
    before: tuple[jax.Array, jax.Array] | None = None,
    begins: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Finds the candidates of every chunk: the highest scores of what was before and of all chunks' places so far.

    A score that has `C` higher ones before it has them in every longer prefix. So the best of a prefix and of what
    follows it are all that is needed for the best of both, and chunks can be merged in any grouping.

    Args:
        pool: float32 `[B, K, (M - 1) * chunk_size]` of scores: chunk `m` sees the first `m * chunk_size`.
        selection: Its options; `C` is `selection.num_candidates`.
        before: Scores that all chunks see, float32 `[B, K, C]`, descending, and their places, int32, ascending among
            equal scores and below 0; None for none.
        begins: int32 `[B or 1, 1, M]`, ascending: a chunk sees no place before this one. Where it differs from that of
            the chunk before, it is past all places that this one sees. None for all places.

    Returns:
        Scores float32 `[B, K, M, C]`, descending, -inf where there are no more; and their places in the pool, int32,
        ascending among equal scores. No gradient flows through them.
    """
    find = _partitioning.split(functools.partial(_best_so_far, selection), ["bh.", "bh.", "bh."], ["bh..", "bh.."])
    return remat.named_index(find(*jax.lax.stop_gradient((pool, before)), begins))


def _best_so_far(
    selection: Selection, pool: jax.Array, before: tuple[jax.Array, jax.Array] | None, begins: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    (batch, heads, length), count = pool.shape, selection.num_candidates
    rows = (batch, heads, length // selection.chunk_size, selection.chunk_size)
    scores, places = pool.reshape(rows), iota_like(pool).reshape(rows)
    if begins is None:
        begins = jnp.zeros((1, 1, rows[2] + 1), jnp.int32)
    else:
        scores = jnp.where(places >= begins[:, :, 1:, None], scores, -jnp.inf)
    added = _descending(scores, places, count)
    if before is None:
        before = jnp.full((batch, heads, count), -jnp.inf), jnp.full((batch, heads, count), -1, jnp.int32)
    of_chunk = [jnp.concatenate([x[:, :, None], y], axis=2) for x, y in zip(before, added, strict=True)]

    def merge(left, right):
        # Of two descending rows the best are the better of the one and of the other reversed, place by place.
        (score, place, begin), (*other, other_begin) = left, right
        other_score, other_place = (jnp.flip(x, axis=-1) for x in other)
        score = jnp.where(begin == other_begin, score, -jnp.inf)
        is_left = score >= other_score  # of equal ones the earlier
        best = jnp.where(is_left, score, other_score), jnp.where(is_left, place, other_place)
        return *_descending(*best, count), other_begin

    return jax.lax.associative_scan(merge, (*of_chunk, begins[..., None]), axis=2)[:2]


def _descending(scores: jax.Array, places: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` highest scores of the last axis and their places, the earlier first of equal ones; padded."""
    lowered, places = jax.lax.sort((-scores, places), num_keys=2, is_stable=False)
    missing = [(0, 0)] * (scores.ndim - 1) + [(0, max(0, count - scores.shape[-1]))]
    pad = lambda x, filler: jnp.pad(x[..., :count], missing, constant_values=filler)
    return pad(-lowered, -jnp.inf), pad(places, -1)


def gated(
    key: jax.Array,
    value: jax.Array,
    scores: jax.Array,
    chunk: jax.Array,
    selection: Selection,
    takes_part: jax.Array | bool = True,
    query_order: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, SparseIndex]:
    """Multiplies the selected keys and values of each chunk by their gates, and says which queries attend to them.

    Args:
        key: `[B, M * num_keys, K, H]`, the selected ones of each chunk, best first.
        value: Likewise.
        scores: float32 `[B, M, C, K]` of the candidates, descending, -inf where there are no more.
        chunk: int32 `[T]`, the chunk of each query, ascending.
        selection: Its options.
        takes_part: bool `[B or 1, 1, T]`, whether a query attends to what its chunk selected, the later ones of a chunk
            not if earlier ones do not; True for all.
        query_order: int32 `[B or 1, 1, T]`, the row of each query; None if they stand in order.

    Returns:
        Keys and values like those given, and the index over them.
    """
    num_keys, num_chunks = selection.num_keys, scores.shape[1]
    is_candidate = scores > -jnp.inf
    by_candidate = lambda x: x.swapaxes(2, 3)  # [B, M, K, C]
    gates = _gates(num_keys, by_candidate(scores), by_candidate(is_candidate), in_order=True)
    gates = _one_axis(by_candidate(gates)[:, :, :num_keys])[..., None]
    key, value = ((gates * x.astype(gates.dtype)).astype(x.dtype) for x in (key, value))

    count = is_candidate[:, :, :num_keys].sum(axis=2, dtype=jnp.int32).swapaxes(1, 2)  # [B, K, M]
    count = jnp.take(count, chunk, axis=2)
    start = (chunk * num_keys)[None, None]
    low, high = start + jnp.where(takes_part, 0, count), start + count - 1
    key_code = iota(num_chunks * num_keys)[None, None]
    return key, value, SparseIndex(None, key_code, query_order, low=low, high=high)


def _one_axis(x: jax.Array) -> jax.Array:
    """Folds chunks and what each of them has: `[B, M, R, ...]` to `[B, M * R, ...]`."""
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _gates(k: int, scores: jax.Array, takes_part: jax.Array, in_order: bool = False) -> jax.Array:
    """`sparsek_gates` of float32 scores; `in_order` promises that they descend, those that take part first."""
    return _gates_forward(k, scores, takes_part, in_order)[0]


def _gates_forward(k: int, scores: jax.Array, takes_part: jax.Array, in_order: bool):
    """Finds the threshold among the scores within 1 of the `k`-th highest.

    With `y` the scores less the `k`-th highest one, the threshold `t` lies in [-1, 0): at -1 the `k` highest alone have
    gates of 1, and at 0 less than `k` of them have any. So each of the `k` highest lacks `max(0, t - (y - 1))` of 1,
    each other one has `max(0, y - t)`, and `t` is where both sums are equal. In between any two neighbours of these
    edges, `y - 1` and `y`, the sums are linear. All numbers are in [-1, 1], however large the scores.
    """
    if k == 0 or scores.shape[-1] <= k:
        return jnp.where(takes_part & (k > 0), 1.0, 0.0), jnp.zeros_like(takes_part)
    largest = jnp.finfo(jnp.float32).max
    scores = jnp.where(takes_part, jnp.clip(scores, -largest, largest), -jnp.inf)
    descending = scores if in_order else -jax.lax.sort(-scores, is_stable=False)
    kth = descending[..., k - 1 : k]
    has_more = descending[..., k : k + 1] > -jnp.inf
    y = jnp.clip(jnp.where(takes_part & has_more, scores - jnp.where(has_more, kth, 0.0), -1.0), -1.0, 1.0)
    # Of those equal to the k-th highest, the first are among the highest.
    is_above, is_equal = (scores > kth) & takes_part, (scores == kth) & takes_part
    room = k - is_above.sum(axis=-1, keepdims=True)
    is_highest = is_above | (is_equal & (jnp.cumsum(is_equal, axis=-1) <= room))
    edge = jnp.where(is_highest, y - 1.0, y)

    ascending, of_highest = jax.lax.sort((edge, is_highest), num_keys=1, is_stable=False)
    lacks, others = jnp.where(of_highest, ascending, 0.0), jnp.where(of_highest, 0.0, ascending)
    above = lambda x: x.sum(axis=-1, keepdims=True) - jnp.cumsum(x, axis=-1)
    slope = (jnp.cumsum(of_highest, axis=-1) + above(~of_highest)).astype(jnp.float32)
    excess = ascending * slope - (jnp.cumsum(lacks, axis=-1) + above(others))  # what is lacking, less what others have
    start = jnp.max(jnp.where(excess <= 0, ascending, -1.0), axis=-1, keepdims=True)
    # From there on it is linear. Summed anew, since cumulative sums are rounded more.
    is_lacking, is_other = is_highest & (edge <= start), ~is_highest & (edge > start)
    excess = jnp.where(is_lacking | is_other, start - edge, 0.0).sum(axis=-1, keepdims=True)
    number = (is_lacking | is_other).sum(axis=-1, keepdims=True)
    threshold = start - excess / jnp.maximum(number, 1).astype(jnp.float32)

    is_between = jnp.where(is_highest, edge < threshold, edge > threshold) & takes_part & has_more
    gates = jnp.where(is_between, jnp.clip(y - threshold, 0.0, 1.0), jnp.where(is_highest, 1.0, 0.0))
    return gates, is_between


def _gates_backward(k: int, in_order: bool, is_between: jax.Array, cotangent: jax.Array):
    del k, in_order
    cotangent = jnp.where(is_between, cotangent, 0.0)
    number = jnp.maximum(is_between.sum(axis=-1, keepdims=True), 1)
    mean = cotangent.sum(axis=-1, keepdims=True) / number.astype(jnp.float32)
    return jnp.where(is_between, cotangent - mean, 0.0), None


_gates.defvjp(_gates_forward, _gates_backward)
