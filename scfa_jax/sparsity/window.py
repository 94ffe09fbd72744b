"""Attention to the last positions, as many as each head's span says, and to the first ones."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scfa_jax import _checks
from scfa_jax.patterns import window_attention
from scfa_jax.sparsity.base import Marks, Operands, Projections, Sparsity


@dataclasses.dataclass(frozen=True)
class Window(Sparsity):
    """Sliding windows, per head and elastic, with sinks.

    Sources: Fu et al. 2024, "MoA"; Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks".

    A head sees the last `window + slope * length` positions, rounded down, at least the token itself. The length is
    that of the sequence, and in decoding the room of the cache, so that decoding gives what one pass over as many
    tokens does.

    Args:
        window: Positions up to its own that a token sees; one number for all heads, or a tuple of one for each.
        num_sinks: First positions of the sequence (or of each segment) that all later tokens see too.
        slope: How much of the length to add, from 0 to 1; likewise. With a slope, windows may be below 0.

    Raises:
        ValueError: A number is too small or too large, or there are not as many slopes as windows.
        TypeError: A number is of another kind.
    """

    window: int | tuple[int, ...]
    num_sinks: int = 0
    slope: float | tuple[float, ...] = 0.0

    def __post_init__(self):
        _checks.static_int("num_sinks", self.num_sinks, least=0)
        windows, slopes = _numbers(self.window), _numbers(self.slope)
        for slope in slopes:
            if isinstance(slope, bool) or not isinstance(slope, int | float | np.number):
                raise TypeError(f"slope must be a static number or a tuple of them, got {self.slope!r}.")
            if not 0 <= slope <= 1:
                raise ValueError(f"slope must be from 0 to 1, got {self.slope}.")
        for window in windows:
            _checks.static_int("window", window, least=-(2**31) if any(slopes) else 1)
        if len(windows) != len(slopes) and 1 not in (len(windows), len(slopes)):
            raise ValueError(f"slope must be one number, or one for each of {len(windows)} windows, got {len(slopes)}.")

    def lengths(self, length: int) -> tuple[int, ...]:
        """The windows at a length.

        Args:
            length: Of the sequence, `S`.

        Returns:
            One for all heads, or one for each, from 1 to `length`.
        """
        windows, slopes = _numbers(self.window), _numbers(self.slope)
        heads = max(len(windows), len(slopes))
        rules = zip(windows * (heads // len(windows)), slopes * (heads // len(slopes)), strict=True)
        return tuple(max(1, min(math.floor(window + slope * length), length)) for window, slope in rules)

    def pairs(self, length: int) -> float:
        """Counts the pairs of queries and keys at a length, in the mean over heads.

        Args:
            length: Of the sequence.

        Returns:
            The number.
        """
        before = np.maximum(
            np.arange(length)[:, None] - np.array(self.lengths(length)) + 1, 0
        )  # keys before the window
        return float((np.arange(1, length + 1)[:, None] - np.maximum(before - self.num_sinks, 0)).sum(axis=0).mean())

    def marks(self, projections: Projections) -> tuple[Marks, Marks]:
        """Marks queries by their head, which decides on the window.

        Args:
            projections: Those of a call.

        Returns:
            The number `head` of the queries' heads, and nothing of keys.

        Raises:
            ValueError: There are not as many heads as windows.
        """
        heads, windows = projections.query.shape[2], len(self.lengths(1))
        if windows not in (1, heads):
            raise ValueError(f"window and slope must be one, or one for each of {heads} heads, got {windows}.")
        return {"head": jnp.arange(heads, dtype=jnp.int32)[None, None]}, {}

    def mask(
        self, query_marks: Marks, key_marks: Marks, query_position: jax.Array, key_position: jax.Array
    ) -> jax.Array:
        """Tells which queries and keys meet: those within the window, and sinks.

        Args:
            query_marks: As in `Sparsity.mask`.
            key_marks: Likewise.
            query_position: Likewise.
            key_position: Likewise.

        Returns:
            Likewise.
        """
        lengths = jnp.array(self.lengths(key_position.shape[0]), jnp.int32)
        window = lengths[query_marks["head"]] if lengths.size > 1 else lengths[0]
        seen = (query_position - key_position < window) | (key_position < self.num_sinks)
        return seen & (key_position <= query_position)

    def places(self, position: jax.Array, length: int) -> jax.Array | None:
        """Tells which places of a cache a token can meet: the longest window, and sinks.

        Args:
            position: int32 `[]`, where the token stands.
            length: Number of places `S`.

        Returns:
            int32 `[num_sinks + longest window]`, each at most once; None for all.
        """
        longest = max(self.lengths(length))
        if self.num_sinks + longest >= length:
            return None
        first = jnp.maximum(position - longest + 1, self.num_sinks)
        return jnp.concatenate([jnp.arange(self.num_sinks), first + jnp.arange(longest)])

    def attend(self, operands: Operands, **options: Any) -> jax.Array:
        """Calls `window_attention`.

        Args:
            operands: What attends to what.
            **options: As in `Sparsity.attend`.

        Returns:
            `[B, T, N, H]` in the dtype of the query.
        """
        query, key, value, *_ = operands
        windows = jnp.array(self.lengths(key.shape[1]), jnp.int32)
        output: Any = window_attention(query, key, value, windows, num_sinks=self.num_sinks, **options)
        return output


def _numbers(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)
