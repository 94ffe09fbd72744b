"""How much the loss would change if attention left a pair out, summed by distance: what MoA profiles.

Source: Fu et al. 2024, "MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression"
(arXiv 2406.14909). Take one key `j` out of a query's row of attention weights `A[i]`: its weight goes, and the others
grow by `1 / (1 - A[i, j])`, so that they sum to 1 again. To first order the loss changes by

    E[i, j] = sum over k of dL/dA[i, k] * change of A[i, k]
            = A[i, j] / (1 - A[i, j]) * (sum over k of A[i, k] * G[i, k] - G[i, j]),    G = dL/dA,

where `G[i, j]` is the product of the cotangent of the query's output and the key's value. As in the authors' code
(github.com/thu-nics/MoA), influences are summed by size, `|E|`: those of pairs left out together would not cancel.

Beyond the paper: where a window `w` leaves out all that lies beyond it at once, the weights that are kept grow alike,
and to first order the loss of that row changes by

    J[i, w] = (sum over kept k of A[i, k] * G[i, k]) / (sum over kept k of A[i, k]) - sum over k of A[i, k] * G[i, k].
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models.transformer import Transformer
from scfa_jax import causal_attention

# Rows and columns of the tiles in which influences exist.
BLOCK = 512


def hang_taps(model: Transformer, taps: Sequence[jax.Array], num_sinks: int) -> None:
    """Makes the attention of every layer `influential_attention`; the loss's gradients by the taps are then a profile.

    Attention becomes dense and causal, whatever the layer's kind: queries, keys and values remain its own.

    Args:
        model: A model with queries, keys and values in every layer; it is changed.
        taps: One of each layer, as `influential_attention` takes it.
        num_sinks: As there.
    """
    for block, tap in zip(model.blocks, taps, strict=True):
        tapped: Any = _Tapped(block.attention, tap, num_sinks)
        block.attention = tapped


class _Tapped(nnx.Module):
    """The projections of a `CausalSelfAttention` around `influential_attention`."""

    def __init__(self, attention: nnx.Module, tap: jax.Array, num_sinks: int):
        self.attention, self.tap, self.num_sinks = attention, nnx.Variable(tap), num_sinks

    def __call__(self, x: jax.Array, *, segment_ids: jax.Array | None = None, **options: Any) -> jax.Array:
        attention: Any = self.attention
        key = None if attention.layout.share_query_key else attention.key(x)
        heads = attention.layout.heads(attention.query(x), key, attention.value(x), rotary=attention.rotary)
        arrays = heads.rotated_query, heads.attended_key, heads.value, self.tap[...], segment_ids
        return attention.out(influential_attention(*arrays, num_sinks=self.num_sinks))


def influential_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    tap: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    num_sinks: int = 0,
) -> jax.Array:
    """Dense causal attention; what the backward pass gives as the gradient of `tap` is the influence of its pairs.

    Influence is computed tile by tile, in memory linear in length, and added up by distance `i - j` at once. No window
    leaves out a token itself, so that distance 0 is not asked for: its entry is 0.

    Args:
        query: float `[B, T, N, H]`.
        key: The like.
        value: The like.
        tap: float32 `[3, N, T]`; its values do not matter. Its gradient `[0, n, d]` is the sum of `|E[i, i - d]|` over
            the batch and the queries of head `n`, but for pairs with the first `num_sinks` keys, which are in
            `[1, n, d]`; and `[2, n, w]` the sum of `|J[i, w]|`, for windows of 1 and more beside these sinks.
        segment_ids: int32 `[B, T]`, equal ids side by side: tokens attend inside their own segment alone. Or None.
        num_sinks: Keys at the beginning of the sequence, or of each segment, that are kept apart.

    Returns:
        `[B, T, N, H]`.

    Raises:
        ValueError: The arrays have no such shapes.
    """
    _, length, heads, _ = query.shape
    if not query.shape == key.shape == value.shape:
        raise ValueError(f"query, key and value must have one shape, got {query.shape}, {key.shape} and {value.shape}.")
    if tap.shape != (3, heads, length):
        raise ValueError(f"tap must be [3, N, T] = {(3, heads, length)}, got {tap.shape}.")
    return _attention(num_sinks, query, key, value, tap, segment_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    num_sinks: int,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    tap: jax.Array,
    segment_ids: jax.Array | None,
) -> jax.Array:
    return causal_attention(query, key, value, query_segment_ids=segment_ids)  # type: ignore[return-value]


def _forward(num_sinks: int, *arguments: Any) -> tuple[jax.Array, Any]:
    del num_sinks
    query, key, value, _, segment_ids = arguments

    def attend(*arrays: jax.Array) -> Any:
        return causal_attention(*arrays, query_segment_ids=segment_ids, return_residual=True)

    (output, logsumexp), pull_back = jax.vjp(attend, query, key, value)
    return output, (query, key, value, segment_ids, logsumexp, pull_back)


def _backward(num_sinks: int, residuals: Any, by_output: jax.Array) -> tuple[jax.Array | None, ...]:
    query, key, value, segment_ids, logsumexp, pull_back = residuals
    by_tap = _by_distance(query, key, value, by_output, logsumexp, segment_ids, num_sinks)
    return *pull_back((by_output, jnp.zeros_like(logsumexp))), by_tap, None


_attention.defvjp(_forward, _backward)


class _Row(NamedTuple):
    """Sums over the keys of each query, float32 `[B, N, block]`."""

    weights: jax.Array  # of all weights: 1, but for rounding
    by_weights: jax.Array  # of the products of weights and their cotangents
    small: jax.Array  # of the weights up to 1 / 2
    by_small: jax.Array  # of the products of these and their cotangents
    kept: jax.Array  # of the weights that a window keeps: of the sinks, and then of ever more keys
    by_kept: jax.Array  # of the products of these and their cotangents


def _by_distance(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    by_output: jax.Array,
    logsumexp: jax.Array,
    segment_ids: jax.Array | None,
    num_sinks: int,
) -> jax.Array:
    """The gradient of `tap`: of arrays `[B, T, N, H]` and the log-sum-exp, float32 `[B, T, N]`."""
    batch, length, heads, head_dim = query.shape
    block = min(BLOCK, length)
    blocks = -(-length // block)

    def cut(x: jax.Array, fill: float = 0) -> jax.Array:
        """`[B, T, ...]` to `[blocks, B, block, ...]`."""
        x = jnp.pad(x, [(0, 0), (0, blocks * block - length)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
        return x.reshape(batch, blocks, block, *x.shape[2:]).swapaxes(0, 1)

    # A row without keys, or behind the end, has weights of 0.
    logsumexp = cut(jnp.where(logsumexp == -jnp.inf, jnp.inf, logsumexp), jnp.inf)
    query, key, value, by_output = map(cut, (query, key, value, by_output))
    ids = jnp.zeros((batch, length), jnp.int32) if segment_ids is None else segment_ids
    segments, sinks = cut(ids), cut(_is_first(ids, num_sinks))
    product = functools.partial(
        jnp.einsum, "bqnh,bknh->bnqk", precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    place = jnp.arange(block, dtype=jnp.int32)

    def tile(row: jax.Array, column: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The weights `[B, N, block, block]`, their cotangents, and each pair's distance, `[block, block]`."""
        distance = (row * block + place)[:, None] - (column * block + place)
        scores = head_dim**-0.5 * product(query[row], key[column])
        mask = (distance >= 0) & (segments[row][:, :, None] == segments[column][:, None])[:, None]
        weights = jnp.where(mask, jnp.exp(scores - logsumexp[row].swapaxes(1, 2)[..., None]), 0)
        return weights, product(by_output[row], value[column]), distance

    def add_to_row(row: jax.Array, column: jax.Array, sums: _Row) -> _Row:
        weights, by_weights, _ = tile(row, column)
        small = jnp.where(weights > 0.5, 0, weights)
        of_sinks = jnp.where(sinks[column][:, None, None], weights, 0)
        parts = weights, weights * by_weights, small, small * by_weights, of_sinks, of_sinks * by_weights
        return _Row(*(total + part.sum(axis=3) for total, part in zip(sums, parts, strict=True)))

    def add_to_distances(row: jax.Array, step: jax.Array, carry: tuple[_Row, jax.Array]) -> tuple[_Row, jax.Array]:
        of_row, sums = carry
        column = row - step  # from near to far
        weights, by_weights, distance = tile(row, column)
        whole, total, small, by_small, kept, by_kept = (x[..., None] for x in of_row)
        # E / A, the mean cotangent of the other weights less this one's. Beside a weight near 1 the others' sums are
        # taken as such: as differences from the sums over all they would be lost to rounding.
        beside_large = by_small / jnp.where(small > 0, small, 1) - by_weights
        change = jnp.where(weights > 0.5, beside_large, (total - by_weights) / (1 - jnp.minimum(weights, 0.5)))
        influence = jnp.where(distance > 0, jnp.abs(weights * change), 0)
        is_sink = sinks[column][:, None, None]
        mean = total / jnp.where(whole > 0, whole, 1)
        # A window of a pair's distance keeps the keys behind that of the pair, and the sinks.
        here = jnp.where(is_sink, 0, weights)
        near, by_near = (jnp.cumsum(x[..., ::-1], axis=3)[..., ::-1] for x in (here, here * by_weights))
        kept, by_kept = (before + _behind(sums) for before, sums in ((kept, near), (by_kept, by_near)))
        together = jnp.where((distance > 0) & (kept > 0), jnp.abs(by_kept / jnp.where(kept > 0, kept, 1) - mean), 0)
        apart = jnp.stack([jnp.where(is_sink, 0, influence), jnp.where(is_sink, influence, 0), together]).sum(axis=1)
        of_row = of_row._replace(kept=of_row.kept + near[..., 0], by_kept=of_row.by_kept + by_near[..., 0])
        start = (row - column) * block
        before = jax.lax.dynamic_slice_in_dim(sums, start, 2 * block - 1, axis=2)
        return of_row, jax.lax.dynamic_update_slice_in_dim(sums, before + _diagonal_sums(apart), start, axis=2)

    def add_row(row: jax.Array, sums: jax.Array) -> jax.Array:
        none = _Row(*[jnp.zeros((batch, heads, block), jnp.float32)] * len(_Row._fields))
        of_row = jax.lax.fori_loop(0, row + 1, functools.partial(add_to_row, row), none)
        return jax.lax.fori_loop(0, row + 1, functools.partial(add_to_distances, row), (of_row, sums))[1]

    # Distance d is at d + block - 1: a tile on the diagonal has negative ones too.
    sums = jnp.zeros((3, heads, (blocks + 1) * block - 1), jnp.float32)
    return jax.lax.fori_loop(0, blocks, add_row, sums)[..., block - 1 : block - 1 + length]


def _behind(sums: jax.Array) -> jax.Array:
    """Of sums over a column and all behind it, `[..., R]`, those without the column itself; no rounding takes part."""
    return jnp.pad(sums[..., 1:], [(0, 0)] * (sums.ndim - 1) + [(0, 1)])


def _is_first(segment_ids: jax.Array, count: int) -> jax.Array:
    """Which tokens are among the first `count` of their segment: bool `[B, T]`."""
    place = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    begins = jnp.concatenate([jnp.zeros_like(segment_ids[:, :1]), jnp.diff(segment_ids, axis=1)], axis=1) != 0
    return place - jax.lax.cummax(jnp.where(begins, place, 0), axis=1) < count


def _diagonal_sums(x: jax.Array) -> jax.Array:
    """Sums of `[..., R, R]` over places of one `row - column`, from `1 - R` to `R - 1`: `[..., 2 * R - 1]`."""
    size = x.shape[-1]
    # With the columns turned round these are of one row + column. Rows of 2 * R read as rows of 2 * R - 1 move by one
    # place to the right from each row to the next.
    wide = jnp.pad(x[..., ::-1], [(0, 0)] * (x.ndim - 1) + [(0, size)])
    skewed = wide.reshape(*x.shape[:-2], 2 * size * size)[..., :-size]
    return skewed.reshape(*x.shape[:-1], 2 * size - 1).sum(axis=-2)
