"""Checks of arguments: on static facts only, so that they work under `jit`, with errors that name the argument."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FLOAT_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
OFFSET_LIMIT = 2**30  # far past any length, and such that adding a length stays within int32


def attention_arrays(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Checks query, key and value against each other and adds a batch axis where they have none.

    Returns:
        The three as `[B, T, N, H]`, `[B, S, K, H]`, `[B, S, K, H]`.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        _check_array(name, x)
        if x.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16 or float16, got {x.dtype}.")
        if x.ndim not in (3, 4):
            raise ValueError(f"{name} must be [B, T, N, H] or [T, N, H], got shape {x.shape}.")
        if x.dtype != query.dtype:
            raise TypeError(f"{name} must have the dtype of query, {query.dtype}, got {x.dtype}.")
        if x.ndim != query.ndim:
            raise ValueError(f"{name} must have the rank of query, {query.ndim}, got shape {x.shape}.")
    query, key, value = (jnp.asarray(x)[None] if x.ndim == 3 else jnp.asarray(x) for x in (query, key, value))
    if key.shape != value.shape:
        raise ValueError(f"value must have the shape of key, {key.shape}, got {value.shape}.")
    if key.shape[0] != query.shape[0]:
        raise ValueError(f"key must have the batch size of query, {query.shape[0]}, got {key.shape[0]}.")
    if key.shape[3] != query.shape[3]:
        raise ValueError(f"key must have the head size of query, {query.shape[3]}, got {key.shape[3]}.")
    if query.shape[3] == 0:
        raise ValueError(f"query must have a head size of at least 1, got shape {query.shape}.")
    heads, key_heads = query.shape[2], key.shape[2]
    if heads == 0 or key_heads == 0 or heads % key_heads:
        raise ValueError(f"key must have a number of heads that divides that of query, got {key_heads} and {heads}.")
    return query, key, value


def per_token(name: str, x: jax.Array, dtype) -> jax.Array:
    """Checks a value per token and head, `[B, L, N]` or `[L, N]`, and returns it with a batch axis."""
    _check_array(name, x)
    if dtype == jnp.bool_:
        if x.dtype != jnp.bool_:
            raise TypeError(f"{name} must be boolean (True = take part), got {x.dtype}.")
    elif x.dtype not in (jnp.int32, jnp.int16, jnp.int8):
        raise TypeError(f"{name} must be int32, got {x.dtype}.")
    if x.ndim not in (2, 3):
        raise ValueError(f"{name} must be [B, length, heads] or [length, heads], got shape {x.shape}.")
    x = jnp.asarray(x, dtype)
    return x[None] if x.ndim == 2 else x


def length(name: str, x: jax.Array) -> int:
    """The length of the sequence `x`, `[B, L, N, H]` or `[L, N, H]`."""
    _check_array(name, x)
    if len(x.shape) not in (3, 4):
        raise ValueError(f"{name} must be [B, length, heads, H] or [length, heads, H], got shape {x.shape}.")
    return x.shape[-3]


def index_fits(index, query_shape: tuple[int, ...], key_shape: tuple[int, ...]) -> None:
    """Checks the lengths, batch and heads of a `SparseIndex` against those of the attention call."""
    if not hasattr(index, "key_code"):
        raise TypeError(f"index must be a SparseIndex, got {type(index).__name__}.")
    for side, array, shape in (("query", index.low, query_shape), ("key", index.key_code, key_shape)):
        batch, heads, rows = array.shape
        if rows != shape[1]:
            raise ValueError(f"{side} has {shape[1]} rows, but the index was built for {rows}.")
        if batch not in (1, shape[0]):
            raise ValueError(f"{side} has batch size {shape[0]}, but the index was built for {batch}.")
        if heads == 0 or query_shape[2] % heads or (side == "key" and shape[2] % heads):
            raise ValueError(f"{side} has {shape[2]} heads, but the index was built for {heads}.")


def query_offset(offset: Any) -> jax.Array:
    """Checks the position of the first query and returns it as int32 `[B or 1, 1, 1]`."""
    if isinstance(offset, int | np.integer) and not isinstance(offset, bool):
        return jnp.full((1, 1, 1), np.clip(offset, -OFFSET_LIMIT, OFFSET_LIMIT), jnp.int32)
    _check_array("query_offset", offset)
    if offset.dtype not in (jnp.int32, jnp.int16, jnp.int8):
        raise TypeError(f"query_offset must be an int or an int32 array, got {offset.dtype}.")
    if offset.ndim > 1:
        raise ValueError(f"query_offset must be an int, [] or [B], got shape {offset.shape}.")
    return jnp.clip(jnp.asarray(offset, jnp.int32), -OFFSET_LIMIT, OFFSET_LIMIT).reshape(-1, 1, 1)


def earlier(offset: Any, by: Any) -> Any:
    """A `query_offset` less `by`, which wraps around in no dtype that `query_offset` takes."""
    if getattr(offset, "dtype", None) in (jnp.int32, jnp.int16, jnp.int8):
        offset = jnp.clip(jnp.asarray(offset, jnp.int32), -OFFSET_LIMIT, OFFSET_LIMIT)
    return offset - by


def window(value: Any) -> jax.Array | None:
    """Checks the lengths of windows and returns them as int32 `[B or 1, N or 1, 1]`, or None for no window."""
    if value is None:
        return None
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        if value < 0:
            raise ValueError(f"window must be at least 0, got {value}.")
        return jnp.full((1, 1, 1), min(value, OFFSET_LIMIT), jnp.int32)
    if not hasattr(value, "dtype") or value.dtype not in (jnp.int32, jnp.int16, jnp.int8):
        got = value.dtype if hasattr(value, "dtype") else repr(value)
        raise TypeError(f"window must be None, an int or an int32 array, got {got}.")
    if value.ndim > 2:
        raise ValueError(f"window must be an int, [], [N] or [B, N], got shape {value.shape}.")
    value = jnp.clip(jnp.asarray(value, jnp.int32), 0, OFFSET_LIMIT)
    return value.reshape(value.shape[0] if value.ndim == 2 else 1, -1, 1)


def segment_ids(name: str, x: jax.Array, length: int) -> jax.Array:
    """Checks segment ids, `[B, L]` or `[L]`, and returns int32 `[B or 1, L]`."""
    _check_array(name, x)
    if x.dtype not in (jnp.int32, jnp.int16, jnp.int8):
        raise TypeError(f"{name} must be int32, got {x.dtype}.")
    if x.ndim not in (1, 2) or x.shape[-1] != length:
        raise ValueError(f"{name} must be [B, {length}] or [{length}], got shape {x.shape}.")
    x = jnp.asarray(x, jnp.int32)
    return x[None] if x.ndim == 1 else x


def batches(**arrays: jax.Array) -> None:
    """Checks that the first axes of named arrays are equal or 1."""
    sizes = {name: x.shape[0] for name, x in arrays.items() if x.shape[0] != 1}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"{' and '.join(sizes)} must have the same batch size or 1, got {' and '.join(map(str, sizes.values()))}."
        )


def starts_at_zero(query_offset: Any) -> bool:
    """Whether queries are known to count from 0, as keys do."""
    return isinstance(query_offset, int) and query_offset == 0


def static_int(name: str, value: Any, least: int) -> None:
    """Checks a number that decides shapes or launches."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be a static int, got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def num_buckets(value: int | None) -> None:
    """Checks the promise about bucket ids."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer)):
        raise TypeError(f"num_buckets must be a static int or None, got {value!r}.")
    if value is not None and value < 1:
        raise ValueError(f"num_buckets must be at least 1, got {value}.")


def scale(value: float | None, head_dim: int) -> float:
    """Returns the factor of the scores as a static float."""
    if value is None:
        return head_dim**-0.5
    if isinstance(value, jax.core.Tracer):
        raise TypeError("scale must be a static float; multiply query by a traced one instead.")
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(f"scale must be a float or None, got {value!r}.")
    if not math.isfinite(value):
        raise ValueError(f"scale must be finite, got {value}.")
    return float(value)


def precision(value: Any) -> None:
    """Checks how float32 is multiplied."""
    if not isinstance(value, str) or value not in ("float32", "tf32"):
        raise ValueError(f'precision must be "float32" or "tf32", got {value!r}.')


def output_dtype(dtype, default: jnp.dtype) -> jnp.dtype:
    """Returns the dtype of the output."""
    dtype = default if dtype is None else jnp.dtype(dtype)
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"output_dtype must be float32, bfloat16 or float16, got {dtype}.")
    return dtype


def parts(outputs: list, logsumexps: list, dtype) -> jnp.dtype:
    """Checks results that are to be merged and returns the dtype of what they merge to."""
    if not outputs or len(outputs) != len(logsumexps):
        raise ValueError(
            f"outputs and logsumexps must be as many, at least one, got {len(outputs)} and {len(logsumexps)}."
        )
    for name, arrays in (("outputs", outputs), ("logsumexps", logsumexps)):
        for x in arrays:
            _check_array(name, x)
            if x.dtype not in (FLOAT_DTYPES if name == "outputs" else (jnp.float32,)):
                supported = "float32, bfloat16 or float16" if name == "outputs" else "float32"
                raise TypeError(f"{name} must be {supported}, got {x.dtype}.")
            expected = outputs[0].shape if name == "outputs" else outputs[0].shape[:-1]
            if x.shape != expected:
                raise ValueError(f"{name} must have shape {expected} like the first of the outputs, got {x.shape}.")
    return output_dtype(dtype, jnp.result_type(*outputs))


def _check_array(name: str, x) -> None:
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        raise TypeError(f"{name} must be an array, got {type(x).__name__}.")
