"""Sorting by bucket and looking up ranges before attention begins, as Pallas kernels for Triton.

The sort is a stable counting sort: with few buckets it is cheaper than comparing. A pass sorts by one digit of the
bucket, the least first. Its first kernel counts the digits of each chunk of rows; the second works out from those
counts where each digit of its chunk begins, and writes every row to its place. Nothing is added atomically.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from scfa_jax._bounds import num_tiles
from scfa_jax._search import count_leading, is_up_to
from scfa_jax.backends.triton import _compat
from scfa_jax.backends.triton.rows import Rows, batch_spec, row_call, shared_entry

_DIGIT_BITS = 4
_ONE_HOT = 8192  # size of the one-hot tables, rows times digits, that a program holds
_MAX_CHUNKS = 128


def sorted_codes(ids: jax.Array, num_buckets: int, *, interpret: bool) -> jax.Array:
    """Sorts rows by bucket, and by position within a bucket.

    Args:
        ids: int32 `[B, N, L]`, in `[0, num_buckets)`.
        num_buckets: Number of buckets; `num_buckets * L` fits int32.
        interpret: Whether to run in Pallas's interpreter.

    Returns:
        int32 `[B, N, L]`, ascending: `id * L + position`.
    """
    codes = ids * np.int32(ids.shape[-1]) + jnp.arange(ids.shape[-1], dtype=jnp.int32)[None, None]
    bits = max((num_buckets - 1).bit_length(), 1)
    passes = pl.cdiv(bits, _DIGIT_BITS)
    digit_bits = pl.cdiv(bits, passes)
    for shift in range(0, bits, digit_bits):
        codes = _sorted_by_digit(codes, shift, digit_bits, interpret)
    return codes


def _sorted_by_digit(codes: jax.Array, shift: int, digit_bits: int, interpret: bool) -> jax.Array:
    batch, heads, length = codes.shape
    step = min(1024, _ONE_HOT >> digit_bits)
    chunk = max(step, pl.next_power_of_2(pl.cdiv(length, _MAX_CHUNKS)))
    grid = (num_tiles(length, chunk), heads, batch)
    counts = jax.ShapeDtypeStruct((batch, heads, grid[0], 1 << digit_bits), jnp.int32)
    call = functools.partial(_compat.triton_call, num_warps=4, num_stages=3, interpret=interpret, grid=grid)
    spec = functools.partial(batch_spec, batch=batch, grid_axis=2)
    options = {"step": step, "chunk": chunk, "shift": shift}
    counts = call(
        functools.partial(_count_kernel, **options),
        in_specs=[spec(codes.shape)],
        out_specs=spec(counts.shape),
        out_shape=counts,
        name="scfa_count",
    )(codes)
    return call(
        functools.partial(_place_kernel, **options),
        in_specs=[spec(codes.shape), spec(counts.shape)],
        out_specs=spec(codes.shape),
        out_shape=jax.ShapeDtypeStruct(codes.shape, codes.dtype),
        name="scfa_place",
    )(codes, counts)


def _count_kernel(codes_ref, counts_ref, *, step: int, chunk: int, shift: int):
    chunk_number, head = pl.program_id(0), pl.program_id(1)
    digits = jnp.arange(counts_ref.shape[-1], dtype=jnp.int32)

    def add(i, counts):
        _, _, is_digit = _load(codes_ref, head, chunk_number * chunk + i * step, step, shift, digits)
        return counts + jnp.sum(is_digit, axis=0, dtype=jnp.int32)

    counts = jax.lax.fori_loop(0, chunk // step, add, jnp.zeros_like(digits))
    plgpu.store(counts_ref.at[head, chunk_number, digits], counts)


def _place_kernel(codes_ref, counts_ref, placed_ref, *, step: int, chunk: int, shift: int):
    chunk_number, head = pl.program_id(0), pl.program_id(1)
    length = codes_ref.shape[-1]
    _, num_chunks, num_digits = counts_ref.shape
    digits = jnp.arange(num_digits, dtype=jnp.int32)

    chunks = jnp.arange(pl.next_power_of_2(num_chunks), dtype=jnp.int32)[:, None]
    at = counts_ref.at[head, jnp.minimum(chunks, num_chunks - 1), digits[None, :]]
    counts = jnp.where(chunks < num_chunks, plgpu.load(at), 0)
    in_digit = jnp.sum(counts, axis=0, dtype=jnp.int32)
    in_chunks_before = jnp.sum(jnp.where(chunks < chunk_number, counts, 0), axis=0, dtype=jnp.int32)
    start = jnp.cumsum(in_digit, dtype=jnp.int32) - in_digit + in_chunks_before

    def place(i, start):
        rows, codes, is_digit = _load(codes_ref, head, chunk_number * chunk + i * step, step, shift, digits)
        place = start[None, :] + jnp.cumsum(is_digit, axis=0, dtype=jnp.int32) - 1
        place = jnp.sum(is_digit * place, axis=1, dtype=jnp.int32)
        is_row = rows < length
        # Rows past the end stay out of bounds, so that not even a masked store can touch a real one.
        plgpu.store(placed_ref.at[head, jnp.where(is_row, place, length)], codes, mask=is_row)
        return start + jnp.sum(is_digit, axis=0, dtype=jnp.int32)

    jax.lax.fori_loop(0, chunk // step, place, start)


def _load(codes_ref, head: jax.Array, first: jax.Array, step: int, shift: int, digits: jax.Array):
    """The row numbers of a step, their codes, and int32 `[rows, digits]`, 1 where a row has the digit."""
    length = codes_ref.shape[-1]
    rows = first + jnp.arange(step, dtype=jnp.int32)
    codes = plgpu.load(codes_ref.at[head, rows], mask=rows < length, other=0)
    digit = jax.lax.div(codes, np.int32(length)) >> shift & np.int32(digits.size - 1)
    digit = jnp.where(rows < length, digit, -1)
    return rows, codes, (digit[:, None] == digits[None, :]).astype(jnp.int32)


def key_ranges(
    query_id: jax.Array, last_position: jax.Array, key_id: jax.Array, key_position: jax.Array, *, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """Does what `ordering.plain_key_ranges` does."""
    out = jax.ShapeDtypeStruct(query_id.shape, jnp.int32)
    operands = (query_id, last_position, key_id, key_position)
    low, high = row_call(_range_kernel, operands, (out, out), interpret, "scfa_ranges")
    return low, high


def _range_kernel(query_id_ref, last_ref, key_id_ref, key_position_ref, low_ref, high_ref, *, block: int):
    head = pl.program_id(1)
    (heads, query_length), (key_heads, key_length) = query_id_ref.shape, key_id_ref.shape
    on_key = shared_entry(head, heads, key_heads)
    queries = Rows(pl.program_id(0), block, query_length, None, None)
    query_id = queries.load_vector(query_id_ref, head, other=0)
    last_position = queries.load_vector(last_ref, head, other=0)

    def is_seen(i):
        key_id, position = (plgpu.load(ref.at[on_key, i]) for ref in (key_id_ref, key_position_ref))
        return is_up_to(key_id, position, query_id, last_position)

    is_before = lambda i: plgpu.load(key_id_ref.at[on_key, i]) < query_id
    before, seen = count_leading((is_before, is_seen), key_length, query_id)
    queries.store_vector(low_ref, head, before)
    queries.store_vector(high_ref, head, seen - 1)
