"""Checks of arguments: on static facts alone, so that they work under `jax.jit`, with errors that name the argument."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

FLOATS = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
LARGEST = 2**31 - 1  # of int32
INTS = (jnp.dtype(jnp.int32), jnp.dtype(jnp.int16), jnp.dtype(jnp.int8))


class Axes:
    """Checks shapes against each other: what an axis is called decides which others it must equal.

    Args:
        **sizes: Sizes that are known beforehand, by the letter of the axis.
    """

    def __init__(self, **sizes: int):
        self.sizes = sizes

    def __getitem__(self, letter: str) -> int:
        return self.sizes[letter]

    def check(self, name: str, x: Any, layout: str) -> None:
        """Checks one argument and remembers the sizes of its axes.

        Args:
            name: Of the argument, for errors.
            x: The argument.
            layout: Its axes, as in `"B T N"`; an axis marked as in `"#B"` may also be 1.

        Raises:
            ValueError: The shape has another rank, or an axis another size.
        """
        letters = layout.replace("#", "").split()
        expected = [
            f"{letter} = {self.sizes[letter]}{' or 1' if f'#{letter}' in layout.split() else ''}"
            for letter in letters
            if letter in self.sizes
        ]
        problem = f"{name} must be [{', '.join(letters)}]" + (f" with {', '.join(expected)}" if expected else "")
        if len(x.shape) != len(letters):
            raise ValueError(f"{problem}, got shape {tuple(x.shape)}.")
        for axis, letter, size in zip(layout.split(), letters, x.shape, strict=True):
            if axis.startswith("#") and size == 1:
                continue
            if self.sizes.setdefault(letter, size) != size:
                raise ValueError(f"{problem}, got shape {tuple(x.shape)}.")


def array(name: str, x: Any, dtypes: Sequence[Any], described: str) -> None:
    """Checks that an argument is an array of one of some dtypes."""
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        raise TypeError(f"{name} must be an array, got {type(x).__name__}.")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be {described}, got {x.dtype}.")


def floats(name: str, x: Any) -> None:
    """Checks that an argument is an array of floats that the operators compute with."""
    array(name, x, FLOATS, "float32, bfloat16 or float16")


def integers(name: str, x: Any) -> None:
    """Checks that an argument is an array of int32, or of what int32 holds."""
    array(name, x, INTS, "int32")


def booleans(name: str, x: Any) -> None:
    """Checks that an argument is a mask."""
    array(name, x, [jnp.dtype(bool)], "boolean (True = take part)")


def attention_arrays(query: Any, key: Any, value: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Checks query, key and value against each other and adds a batch axis where they have none.

    Returns:
        The three as `[B, T, N, H]`, `[B, S, K, H]`, `[B, S, K, V]`.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        floats(name, x)
        if x.dtype != query.dtype:
            raise TypeError(f"{name} must have the dtype of query, {query.dtype}, got {x.dtype}.")
    batch = "" if len(query.shape) == 3 else "B "
    axes = Axes()
    axes.check("query", query, f"{batch}T N H")
    axes.check("key", key, f"{batch}S K H")
    axes.check("value", value, f"{batch}S K V")
    if axes["H"] == 0 or axes["V"] == 0:
        raise ValueError(f"query and value must have a head size of at least 1, got {query.shape} and {value.shape}.")
    if axes["N"] == 0 or axes["K"] == 0 or axes["N"] % axes["K"]:
        raise ValueError(
            f"key must have a number of heads that divides that of query, got {axes['K']} and {axes['N']}."
        )
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    return (query, key, value) if batch else (query[None], key[None], value[None])


def length(name: str, x: Any) -> int:
    """The length of the sequence `x`, `[B, L, N, H]` or `[L, N, H]`."""
    if not hasattr(x, "shape"):
        raise TypeError(f"{name} must be an array, got {type(x).__name__}.")
    if len(x.shape) not in (3, 4):
        raise ValueError(f"{name} must be [B, length, heads, H] or [length, heads, H], got shape {tuple(x.shape)}.")
    return x.shape[-3]


def per_token(name: str, x: Any, dtype: Any, length: int | None = None) -> jax.Array:
    """Checks what each token of each head has, `[B, L, N]` or `[L, N]` (`L` may be 1), and returns `[B, N, L]`."""
    (booleans if dtype == jnp.bool_ else integers)(name, x)
    if len(x.shape) not in (2, 3):
        raise ValueError(f"{name} must be [B, length, heads] or [length, heads], got shape {tuple(x.shape)}.")
    if length is not None and x.shape[-2] not in (1, length):
        raise ValueError(f"{name} must have {length} rows or 1, got shape {tuple(x.shape)}.")
    x = jnp.asarray(x, dtype)
    x = x[None] if x.ndim == 2 else x
    length = x.shape[1] if length is None else length
    return jnp.broadcast_to(x, (x.shape[0], length, x.shape[2])).swapaxes(1, 2)


def batches(**arrays: jax.Array) -> None:
    """Checks that the first axes of named arrays are equal or 1."""
    sizes = {name: x.shape[0] for name, x in arrays.items() if x.shape[0] != 1}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"{' and '.join(sizes)} must have the same batch size or 1, got {' and '.join(map(str, sizes.values()))}."
        )


def static_int(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Checks a number that decides shapes or launches."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be a static int, got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")
    if most is not None and value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}.")


def static_number(name: str, value: Any) -> float:
    """Checks a finite number that is no data, and returns it as a float."""
    if isinstance(value, jax.core.Tracer):
        raise TypeError(f"{name} must be a static number, got a traced value.")
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}.")
    return float(value)


def num_buckets(value: int | None) -> None:
    """Checks the promise about bucket ids."""
    if value is not None:
        static_int("num_buckets", value, least=1)


def precision(value: Any) -> None:
    """Checks how float32 is multiplied."""
    if not isinstance(value, str) or value not in ("float32", "tf32"):
        raise ValueError(f'precision must be "float32" or "tf32", got {value!r}.')


def output_dtype(dtype: Any, default: Any) -> jnp.dtype:
    """Returns the dtype of the output."""
    dtype = jnp.dtype(default if dtype is None else dtype)
    if dtype not in FLOATS:
        raise TypeError(f"output_dtype must be float32, bfloat16 or float16, got {dtype}.")
    return dtype


def at_least_float32(dtype: Any) -> jnp.dtype:
    """The dtype to compute in: float32 for narrower floats. Unlike `jnp.promote_types`, strict promotion allows it."""
    return jnp.dtype(dtype if jnp.finfo(dtype).bits > 32 else jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def in_debugging(condition: Callable[..., tuple[jax.Array, ...]], message: str, *arrays: Any) -> None:
    """Checks values under `jax.experimental.checkify`; elsewhere it computes nothing.

    Args:
        condition: A function of the arrays: whether all is well, and the values that the message tells.
        message: With a `{}` for each of those values.
        *arrays: What to check.
    """
    holds, *values = condition(*arrays)
    checkify.debug_check(holds, message, *values)
