"""The attention of the Reformer (Kitaev et al. 2020) in plain JAX: the baseline that hash attention is held against."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from scfa_jax import _checks, lsh_hash, random_rotations
from scfa_jax.layers import Heads, Kind, Layout, State, normalize
from scfa_jax.remat import LOGSUMEXP, OUTPUT, named_index

# What a token's score with itself is: it counts only where the token may attend to nothing else.
SELF_SCORE = -1e5
# How many float32 scores exist at once: chunks beyond that are computed one batch after the other.
SCORES_AT_ONCE = 2**27


@dataclasses.dataclass(frozen=True)
class Reformer(Kind):
    """Several rounds of hashing into buckets that are cut into chunks: see `reformer_attention`.

    It cannot decode: which chunk a token is in depends on later tokens too.

    Args:
        num_buckets: Buckets in a round, even.
        num_rounds: How many rounds.
        chunk_size: Tokens in a chunk; None for twice as many as are in a bucket on average.
        before_rotary: Whether to hash queries before they are rotated.
        unit_keys: Whether keys are scaled to unit length; None for what the layer does with its keys.

    Raises:
        ValueError: A number is too small, or `num_buckets` odd.
        TypeError: A number is no static integer.
    """

    num_buckets: int
    num_rounds: int = 1
    chunk_size: int | None = None
    before_rotary: bool = False
    unit_keys: bool | None = None

    shares_query_key = True

    def __post_init__(self):
        _checks.static_int("num_buckets", self.num_buckets, least=2)
        if self.num_buckets % 2:
            raise ValueError(f"num_buckets must be even, got {self.num_buckets}.")
        _checks.static_int("num_rounds", self.num_rounds, least=1)
        if self.chunk_size is not None:
            _checks.static_int("chunk_size", self.chunk_size, least=1)

    def in_layout(self, layout: Layout) -> Reformer:
        if not layout.share_query_key or layout.num_heads != layout.num_key_value_heads:
            raise ValueError("share_query_key must not be False in a reformer layer: its keys are its queries.")
        return dataclasses.replace(self, unit_keys=layout.normalize_key if self.unit_keys is None else self.unit_keys)

    @property
    def drawn(self) -> tuple[str, ...]:
        return ("rotations",)

    @property
    def kept(self) -> tuple[str, ...]:
        return ("rotations",)

    def draws(self, deterministic: bool) -> bool:
        return not deterministic

    def draw(self, key: jax.Array, batch_size: int, length: int, layout: Layout) -> State:
        """Draws `rotations`, float32 `[R, N, H, num_buckets // 2]`."""
        one = functools.partial(
            random_rotations, num_heads=layout.num_heads, head_dim=layout.head_dim, num_buckets=self.num_buckets
        )
        return {"rotations": jnp.stack([one(round_key) for round_key in jax.random.split(key, self.num_rounds)])}

    def buckets(self, heads: Heads, state: State) -> jax.Array:
        """The bucket of each token in each round, int32 `[R, B, T, N]`."""
        hashed = heads.query if self.before_rotary else heads.rotated_query
        return jax.vmap(lsh_hash, (None, 0))(hashed, state["rotations"])

    def chunk_length(self, length: int) -> int:
        """Tokens in a chunk of a sequence of `length`."""
        return min(self.chunk_size or default_chunk_size(length, self.num_buckets), length)

    def pairs(self, length: int, num_heads: int) -> float:
        """Those of buckets of equal size, whatever chunks miss of them."""
        return length * (length + 1) / 2 / self.num_buckets

    def attend(self, heads: Heads, state: State, *, segment_ids: jax.Array | None = None, **options: Any) -> jax.Array:
        return reformer_attention(
            heads.rotated_query,
            heads.value,
            self.buckets(heads, state),
            num_buckets=self.num_buckets,
            chunk_size=self.chunk_size,
            normalize_key=self.unit_keys is not False,
            segment_ids=segment_ids,
        )


def default_chunk_size(length: int, num_buckets: int) -> int:
    """Twice as many tokens as are in a bucket on average: the paper's choice.

    Args:
        length: Tokens in the sequence, `T`.
        num_buckets: Buckets in a round.

    Returns:
        `2 * T / num_buckets` rounded up, and at most `T`.
    """
    return min(length, -(-2 * length // num_buckets))


def reformer_attention(
    query: jax.Array,
    value: jax.Array,
    buckets: jax.Array,
    *,
    num_buckets: int,
    chunk_size: int | None = None,
    normalize_key: bool = True,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Causal attention inside buckets that are cut into chunks, where queries are keys too.

    Every round sorts the tokens by (bucket, position) and cuts them into chunks of one size. A round lets token `i`
    attend to token `j` if `j` stands earlier, both are in one bucket, and the chunk of `j` is that of `i` or the one
    before: what a bucket holds beyond that is missed. A token attends to itself only where no round leaves it
    anything else. Rounds are merged by their log-sum-exp, and a pair that several rounds see is divided by their
    number: the result is attention over the union of what they see.

    Source: Kitaev, Kaiser and Levskaya 2020, "Reformer: The Efficient Transformer", section 2 and appendix A. The
    mask to a token's own bucket is the paper's, and was the default of its authors' code
    (`attend_across_buckets=False`); later code, theirs and others', lets a token see its two chunks whole.

    No gradient and no value comes from a later token, but later tokens share the chunks: where these miss part of a
    bucket, which part it is depends on them too. So it is in the Reformer; exact hash attention has no such leak.

    The backward pass computes the scores again. Memory grows with `R * T * H`, and with `chunk_size ** 2` for the
    chunks that are computed at once.

    Args:
        query: float `[B, T, N, H]`; the keys are made of it.
        value: float `[B, T, N, H]`.
        buckets: int32 `[R, B, T, N]` in `[0, num_buckets)`: the bucket of each token in each of `R` rounds.
        num_buckets: Buckets in a round.
        chunk_size: Tokens in a chunk; `default_chunk_size` if None. The last chunk of a round may be shorter.
        normalize_key: Whether keys are scaled to unit length.
        segment_ids: int32 `[B, T]`: tokens attend inside their own segment alone; below 0 is padding, whose output
            is 0. Or None.

    Returns:
        `[B, T, N, H]` in the dtype of `query`; scores and softmax are float32.

    Raises:
        ValueError: A shape does not fit, `chunk_size` is below 1, or there are too many buckets for the length.
    """
    _check(query, value, buckets, num_buckets, chunk_size, segment_ids)
    rounds, batch, length, _ = buckets.shape
    size = min(chunk_size or default_chunk_size(length, num_buckets), length)
    num_chunks = -(-length // size)

    by_head = buckets.swapaxes(2, 3)  # [R, B, N, T]
    code = named_index(jnp.sort(1 + by_head * length + jnp.arange(length, dtype=jnp.int32), axis=3))
    order = (code - 1) % length  # the position of the token in each slot
    slots = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), order.shape)
    slot = jnp.put_along_axis(jnp.zeros_like(order), order, slots, axis=3, inplace=False)
    slot = named_index(slot)  # of the token at each position

    segment = place = None
    if segment_ids is not None:
        segment = segment_ids[jnp.arange(batch)[:, None, None], order]
    if rounds > 1:
        # Two places of a round are equal or one apart only if bucket and chunk allow the later token to see the
        # other. Every slot of every round needs its token's places in all rounds.
        place = by_head * (num_chunks + 1) + slot // size
        place = named_index(_sorted(place.transpose(1, 3, 2, 0), order))  # [R, B, N, T, R]
    vector = _sort_rows(query, order, slot)
    asking = _chunks(_Rows(vector, code, segment, place), size)
    asked = _with_previous(asking._replace(vector=normalize(asking.vector) if normalize_key else asking.vector))
    values = _with_previous(_chunks(_sort_rows(value, order, slot), size))

    attend = jax.checkpoint(functools.partial(_attend, length=length, narrow=rounds == 1))
    at_once = max(1, SCORES_AT_ONCE // (2 * size * size))
    output, logsumexp = _map_chunks(attend, (asking, asked, values), at_once)
    # [R, B, N, C, size, ...] to [R, B, T, N, ...]
    output, logsumexp = (
        _unsort_rows(x.reshape(*x.shape[:3], num_chunks * size, -1)[:, :, :, :length], order, slot)
        for x in (output, logsumexp)
    )
    output, logsumexp = checkpoint_name(output, OUTPUT), checkpoint_name(logsumexp, LOGSUMEXP)
    output = output[0] if rounds == 1 else (jax.nn.softmax(logsumexp, axis=0) * output).sum(axis=0)
    if segment_ids is not None:
        output = jnp.where(segment_ids[:, :, None, None] < 0, 0, output)
    return output.astype(query.dtype)


class _Rows(NamedTuple):
    """What is known of tokens on one side of the scores, in sorted order."""

    vector: jax.Array  # float [..., H]: queries or keys
    code: jax.Array  # int32 [...]: 1 + bucket * length + position; 0 where there is no token
    segment: jax.Array | None  # int32 [...]
    place: jax.Array | None  # int32 [..., R]


def _attend(asking: _Rows, asked: _Rows, value: jax.Array, *, length: int, narrow: bool):
    """One chunk: output `[m, H]`, in the dtype of the values if `narrow`, and log-sum-exp `[m]`, float32."""
    exact = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    scores = jnp.einsum("qh,kh->qk", asking.vector, asked.vector, **exact) * asking.vector.shape[-1] ** -0.5
    bucket_start = asking.code - (asking.code - 1) % length
    code = asked.code[None, :]
    allowed = (bucket_start[:, None] <= code) & (code < asking.code[:, None])
    if asking.segment is not None and asked.segment is not None:
        allowed &= asking.segment[:, None] == asked.segment[None, :]
    if asking.place is not None and asked.place is not None:
        apart = [asking.place[:, None, r] - asked.place[None, :, r] for r in range(asking.place.shape[1])]
        seen = sum(((x == 0) | (x == 1)).astype(jnp.float32) for x in apart)  # in how many rounds
        scores -= jnp.log(jnp.maximum(seen, 1))
    # Slots without a token all have the code 0 and attend to each other: their results are finite, and cut off.
    itself = jnp.where(asking.code[:, None] == code, SELF_SCORE, -jnp.inf)
    scores = jnp.where(allowed, scores, itself)
    logsumexp = jax.nn.logsumexp(scores, axis=1)
    weights = jnp.exp(scores - logsumexp[:, None]).astype(value.dtype)
    output = jnp.einsum("qk,kh->qh", weights, value, **exact)
    return output.astype(value.dtype) if narrow else output, logsumexp


def _chunks(rows, size: int):
    """Cuts axis 3 of every array, `[R, B, N, T, ...]`, into chunks: `[R, B, N, C, size, ...]`, filled up with 0."""

    def cut(x: jax.Array) -> jax.Array:
        filled = jnp.pad(x, [(0, -x.shape[3] % size if axis == 3 else 0) for axis in range(x.ndim)])
        return filled.reshape(*x.shape[:3], -1, size, *x.shape[4:])

    return jax.tree.map(cut, rows)


def _with_previous(chunks):
    """Puts the chunk before in front of every chunk, zeros in front of the first: `[R, B, N, C, 2 * size, ...]`."""

    def join(x: jax.Array) -> jax.Array:
        before = jnp.concatenate([jnp.zeros_like(x[:, :, :, :1]), x[:, :, :, :-1]], axis=3)
        return jnp.concatenate([before, x], axis=4)

    return jax.tree.map(join, chunks)


def _map_chunks(function, chunks, at_once: int):
    """Applies `function` to every chunk of arrays `[R, B, N, C, ...]`, so many at once."""
    lead = jax.tree.leaves(chunks)[0].shape[:4]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[4:]), chunks)
    count = jax.tree.leaves(flat)[0].shape[0]
    if at_once >= count:
        results = jax.vmap(lambda chunk: function(*chunk))(flat)
    else:
        results = jax.lax.map(lambda chunk: function(*chunk), flat, batch_size=at_once)
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), results)


def _sorted(x: jax.Array, order: jax.Array) -> jax.Array:
    """Rows `[B, T, N, ...]` in the order `[R, B, N, T]` of every round: `[R, B, N, T, ...]`."""
    _, batch, heads, _ = order.shape
    places = (jnp.arange(batch)[:, None, None], order, jnp.arange(heads)[:, None])
    return x.at[places].get(mode="promise_in_bounds")


def _unsorted(x: jax.Array, slot: jax.Array) -> jax.Array:
    """Rows `[R, B, N, T, ...]` of every round as the tokens stand: `[R, B, T, N, ...]`."""
    rounds, batch, heads, _ = slot.shape
    lead = (jnp.arange(rounds)[:, None, None, None], jnp.arange(batch)[:, None, None], jnp.arange(heads))
    return x.at[*lead, slot.swapaxes(2, 3)].get(mode="promise_in_bounds")


@jax.custom_vjp
def _sort_rows(x: jax.Array, order: jax.Array, slot: jax.Array) -> jax.Array:
    """`_sorted`, whose gradient is a gather too: left to itself it would be a scatter, which is slow."""
    return _sorted(x, order)


@jax.custom_vjp
def _unsort_rows(x: jax.Array, order: jax.Array, slot: jax.Array) -> jax.Array:
    """`_unsorted`, likewise."""
    return _unsorted(x, slot)


def _sort_gradient(saved: tuple[jax.Array, jax.Array], gradient: jax.Array):
    _, slot = saved
    return _unsorted(gradient, slot).sum(axis=0), None, None


def _unsort_gradient(saved: tuple[jax.Array, jax.Array], gradient: jax.Array):
    order, _ = saved
    return jax.vmap(_sorted)(gradient, order[:, None])[:, 0], None, None


_sort_rows.defvjp(lambda x, order, slot: (_sorted(x, order), (order, slot)), _sort_gradient)
_unsort_rows.defvjp(lambda x, order, slot: (_unsorted(x, slot), (order, slot)), _unsort_gradient)


def _check(query, value, buckets, num_buckets, chunk_size, segment_ids) -> None:
    if query.ndim != 4 or value.shape != query.shape:
        raise ValueError(f"query and value must both be [B, T, N, H], got {query.shape} and {value.shape}.")
    if buckets.ndim != 4 or buckets.shape[0] < 1 or buckets.shape[1:] != query.shape[:3]:
        raise ValueError(f"buckets must be [R, B, T, N] with [B, T, N] = {query.shape[:3]}, got {buckets.shape}.")
    if segment_ids is not None and segment_ids.shape != query.shape[:2]:
        raise ValueError(f"segment_ids must be [B, T] = {query.shape[:2]}, got {segment_ids.shape}.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 or None, got {chunk_size}.")
    if num_buckets < 1 or num_buckets * (query.shape[1] + 1) >= 2**31:
        raise ValueError(
            f"num_buckets must be at least 1, and times the length below 2**31, got {num_buckets} for a length of "
            f"{query.shape[1]}."
        )
