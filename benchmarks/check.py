"""A spot check of results against float32 arithmetic over the mask itself, row by row and never as a T x S array.

A row's error is the length of its difference, relative to the length that the row's terms would add up to if their
directions were random (or to the row itself if that is longer). Rounding to bfloat16 costs a few parts in a thousand
of that whatever the number of terms; a tile left out costs more.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.inputs import Inputs

BOUNDS = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-14}
QUERY_ROWS = 256
KEY_ROWS = 128
_BLOCK = 256

NAMES = ("output", "dq", "dk", "dv")


class _Side(NamedTuple):
    """Rows of queries of one head, with what they may attend to."""

    query: jax.Array
    cotangent: jax.Array
    id: jax.Array
    low: jax.Array
    high: jax.Array
    blocks: jax.Array | None  # the own one too; None for all


class _Keys(NamedTuple):
    """All keys of one head."""

    key: jax.Array
    value: jax.Array
    id: jax.Array
    position: jax.Array
    block: jax.Array


def spot_check(inputs: Inputs, results: Sequence[jax.Array], *, scale: float | None = None) -> dict[str, Any]:
    """Compares sampled rows of results with the definition.

    Args:
        inputs: What was given.
        results: The output, or the output and the gradients of query, key and value.
        scale: Of the scores; `H ** -0.5` if None.

    Returns:
        The largest error of a row for each result, the bound, and `ok`: whether all are within it (a NaN is not).
    """
    batch, length, heads, head_dim = inputs.query.shape
    rng = np.random.default_rng(length)
    rows, columns = (_sample(rng, length, size) for size in (QUERY_ROWS, KEY_ROWS))
    scale = head_dim**-0.5 if scale is None else scale
    errors = dict.fromkeys(NAMES[: len(results)], 0.0)
    for b, n in {(0, 0), (batch - 1, heads - 1)}:
        one_head = [np.asarray(x[b, :, n].astype(jnp.float32)) for x in results]
        wants = _reference(inputs, b, n, rows, columns, scale, with_keys=len(results) > 1)
        picks = (rows, rows, columns, columns)
        for name, got, want, pick in zip(NAMES, one_head, wants, picks, strict=False):
            errors[name] = _worse(errors[name], _row_error(got[pick], *want))
    bound = BOUNDS[str(inputs.query.dtype)]
    return {"errors": errors, "bound": bound, "ok": all(error <= bound for error in errors.values())}


def _reference(inputs: Inputs, b: int, n: int, rows, columns, scale: float, *, with_keys: bool):
    """Pairs of (reference, length of a row's terms), for the output, dq, dk and dv at the sampled rows."""
    length, heads = inputs.query.shape[1:3]
    group = heads // inputs.key.shape[2]
    keys = _Keys(
        inputs.key[b, :, n // group].astype(jnp.float32),
        inputs.value[b, :, n // group].astype(jnp.float32),
        jnp.asarray(inputs.pattern.key_id[b, :, n]),
        jnp.arange(length, dtype=jnp.int32),
        jnp.arange(length, dtype=jnp.int32) // inputs.pattern.block_size,
    )
    queries = _queries(inputs, b, n)
    wants = list(_query_rows(jax.tree.map(lambda x: x[rows], queries), keys, scale))
    if with_keys:
        of_keys: Any = None
        for head in range(n // group * group, n // group * group + group):
            sums = _key_rows(_queries(inputs, b, head), keys, jax.tree.map(lambda x: x[columns], keys), scale)
            of_keys = sums if of_keys is None else jax.tree.map(jnp.add, of_keys, sums)
        dk, dk_terms, dv, dv_terms = of_keys
        wants += [(dk, jnp.sqrt(dk_terms)), (dv, jnp.sqrt(dv_terms))]
    return [(np.asarray(want), np.asarray(norm)) for want, norm in wants]


def _queries(inputs: Inputs, b: int, n: int) -> _Side:
    pattern, blocks = inputs.pattern, None
    if pattern.blocks is not None:
        own = (pattern.high // pattern.block_size)[:, None]
        blocks = jnp.asarray(np.concatenate([pattern.blocks[b, :, n], own], axis=1))
    return _Side(
        query=inputs.query[b, :, n].astype(jnp.float32),
        cotangent=inputs.cotangent[b, :, n].astype(jnp.float32),
        id=jnp.asarray(pattern.query_id[b, :, n]),
        low=jnp.asarray(pattern.low),
        high=jnp.asarray(pattern.high),
        blocks=blocks,
    )


@jax.jit
def _query_rows(rows: _Side, keys: _Keys, scale):
    """Output and dq of a few queries."""
    weights, logsumexp = _weights(rows, keys, scale)
    del logsumexp
    output = _dot(weights, keys.value)
    deltas = jnp.sum(output * rows.cotangent, axis=1)
    gradient = _dot(rows.cotangent, keys.value.T)
    dq = _dot(weights * (gradient - deltas[:, None]), keys.key) * scale
    bounds = weights * _typical_gradient(rows, output, keys.value) * scale
    return (output, _terms(weights, keys.value)), (dq, _terms(bounds, keys.key))


@jax.jit
def _key_rows(queries: _Side, keys: _Keys, columns: _Keys, scale):
    """dk and dv of a few keys from all queries, tile by tile, each with the squared length of its terms."""
    length = queries.id.shape[0]
    padding = -length % _BLOCK
    padded = jax.tree.map(lambda x: jnp.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1))), queries)
    # Rows past the end attend to nothing.
    padded = padded._replace(high=jnp.where(jnp.arange(length + padding) < length, padded.high, -1))
    tiles = jax.tree.map(lambda x: x.reshape(-1, _BLOCK, *x.shape[1:]), padded)

    def add(sums, rows: _Side):
        weights, logsumexp = _weights(rows, keys, scale)
        output = _dot(weights, keys.value)
        deltas = jnp.sum(output * rows.cotangent, axis=1)
        scores = jnp.where(_mask(rows, columns), _dot(rows.query, columns.key.T) * scale, -jnp.inf)
        weights = jnp.exp(scores - logsumexp[:, None])
        gradient = _dot(rows.cotangent, columns.value.T)
        bounds = weights * _typical_gradient(rows, output, columns.value) * scale
        terms = (
            _dot((weights * (gradient - deltas[:, None])).T, rows.query) * scale,
            _terms(bounds.T, rows.query) ** 2,
            _dot(weights.T, rows.cotangent),
            _terms(weights.T, rows.cotangent) ** 2,
        )
        return jax.tree.map(jnp.add, sums, terms), None

    shape, count = columns.key.shape, columns.key.shape[:1]
    zeros = tuple(jnp.zeros(s, jnp.float32) for s in (shape, count, shape, count))
    sums, _ = jax.lax.scan(add, zeros, tiles)
    return sums


def _weights(rows: _Side, keys: _Keys, scale):
    """Softmax over the allowed keys, 0 where there are none; and the log-sum-exp, there a finite stand-in."""
    scores = jnp.where(_mask(rows, keys), _dot(rows.query, keys.key.T) * scale, -jnp.inf)
    peak = jnp.max(scores, axis=1)
    peak = jnp.where(peak == -jnp.inf, 0.0, peak)
    weights = jnp.exp(scores - peak[:, None])
    total = jnp.sum(weights, axis=1)
    total = jnp.where(total == 0, 1.0, total)
    return weights / total[:, None], peak + jnp.log(total)


def _typical_gradient(rows: _Side, output, values):
    """What the gradients of weights would be in size if cotangents, values and outputs had random directions.

    The gradients themselves may cancel by chance where a query has few keys; the errors of their parts do not.
    """
    cotangent, value, output = (jnp.linalg.norm(x, axis=1) for x in (rows.cotangent, values, output))
    return cotangent[:, None] * (value[None, :] + output[:, None]) * values.shape[1] ** -0.5


def _mask(rows: _Side, keys: _Keys):
    same = rows.id[:, None] == keys.id[None, :]
    if rows.blocks is not None:
        same = same & (rows.blocks[:, :, None] == keys.block).any(axis=1)
    return same & (keys.position >= rows.low[:, None]) & (keys.position <= rows.high[:, None])


_dot = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)


def _terms(weights, vectors):
    """Root of the sum of squares of the terms of `weights @ vectors`, for each row."""
    return jnp.sqrt(_dot(weights**2, jnp.sum(vectors**2, axis=1)))


def _row_error(got: np.ndarray, want: np.ndarray, terms: np.ndarray) -> float:
    """The largest relative error of a row; a row without terms must be 0."""
    size = np.maximum(terms, np.linalg.norm(want, axis=1))
    difference = np.linalg.norm(got - want, axis=1)
    errors = np.where(size > 0, difference / np.where(size > 0, size, 1), np.where(difference == 0, 0.0, np.inf))
    return float(errors.max())  # a NaN stays one


def _worse(a: float, b: float) -> float:
    return float(np.maximum(a, b))


def _sample(rng: np.random.Generator, length: int, size: int) -> np.ndarray:
    """The first, the last, and random rows between them."""
    chosen = rng.choice(length, min(size, length), replace=False)
    return np.unique([0, length - 1, *chosen])
