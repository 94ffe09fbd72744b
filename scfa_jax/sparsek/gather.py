"""Copies of rows, each as often as it is named, with gradients that are summed in one order."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from scfa_jax import _partitioning
from scfa_jax.backends.ordering import iota, iota_like


def gather_rows(x: jax.Array, rows: jax.Array, is_row: jax.Array) -> jax.Array:
    """Copies rows of each batch element and head.

    The gradient of a row is the sum over its copies, in float32 and always in the same order: the copies are sorted
    by row and added up along the runs of equal rows, where a scattered sum would add as threads come along.

    Args:
        x: float `[B, S, K, F]`.
        rows: int32 `[B, R, K]`, below `S`.
        is_row: bool `[B, R, K]`, False where zeros shall stand.

    Returns:
        `[B, R, K, F]` in the dtype of `x`.
    """
    return _gather(x.shape[1], x, jnp.where(is_row, rows, x.shape[1]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(length: int, x: jax.Array, rows: jax.Array) -> jax.Array:
    def copies(x, rows):
        copied = jnp.take_along_axis(x, rows[..., None], axis=1, mode="clip")
        return (jnp.where((rows < length)[..., None], copied, 0),)

    return _partitioning.split(copies, ["b.h.", "b.h"], ["b.h."])(x, rows)[0]


def _gather_forward(length: int, x: jax.Array, rows: jax.Array):
    return _gather(length, x, rows), rows


def _gather_backward(length: int, rows: jax.Array, cotangent: jax.Array):
    by_head = jax.vmap(functools.partial(_sum_by_row, length), in_axes=(1, 1), out_axes=1)
    sums = _partitioning.split(lambda *arrays: (jax.vmap(by_head)(*arrays),), ["b.h", "b.h."], ["b.h."])
    return *sums(rows, cotangent), None


_gather.defvjp(_gather_forward, _gather_backward)


def _sum_by_row(length: int, rows: jax.Array, copies: jax.Array) -> jax.Array:
    """Adds up `[R, F]` by row: `[length, F]`. Rows from `length` on are left out."""
    if rows.size == 0:
        return jnp.zeros((length, copies.shape[1]), copies.dtype)
    rows, order = jax.lax.sort((rows, iota_like(rows)), num_keys=2, is_stable=False)
    changes = rows[1:] != rows[:-1]

    def add(left, right):
        (left_begins, left_sum), (right_begins, right_sum) = left, right
        total = jnp.where(right_begins[:, None], right_sum, left_sum + right_sum)
        return left_begins | right_begins, total

    begins = jnp.pad(changes, (1, 0), constant_values=True)
    _, sums = jax.lax.associative_scan(add, (begins, copies[order].astype(jnp.float32)))
    is_last = jnp.pad(changes, (0, 1), constant_values=True) & (rows < length)
    # Every target is another one, those past the end too: then no order of writing can matter.
    target = jnp.where(is_last, rows, length + iota(rows.shape[0]))
    empty = jnp.zeros((length, copies.shape[1]), jnp.float32)
    return empty.at[target].set(sums, mode="drop", unique_indices=True).astype(copies.dtype)
