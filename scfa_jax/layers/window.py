"""Attention to the last positions, as many as each head's span says, and to the first ones."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from scfa_jax import _checks, patterns
from scfa_jax.index import SparseIndex
from scfa_jax.layers.kind import Layout
from scfa_jax.layers.pattern import Marks, Pattern, Rows


@dataclasses.dataclass(frozen=True)
class Window(Pattern):
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
            if not 0 <= _checks.static_number("slope", slope) <= 1:
                raise ValueError(f"slope must be from 0 to 1, got {self.slope}.")
        for window in windows:
            _checks.static_int("window", window, least=-(2**31) if any(slopes) else 1)
        if len(windows) != len(slopes) and 1 not in (len(windows), len(slopes)):
            raise ValueError(f"slope must be one number, or one for each of {len(windows)} windows, got {len(slopes)}.")

    def in_layout(self, layout: Layout) -> Window:
        windows = len(self.lengths(1))
        if windows not in (1, layout.num_heads):
            raise ValueError(
                f"window and slope must be one, or one for each of {layout.num_heads} heads, got {windows}."
            )
        return self

    @property
    def is_elastic(self) -> bool:
        """Whether a window depends on the length."""
        return any(_numbers(self.slope))

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

    def index(self, query: Marks, key: Marks, rows: Rows) -> list[SparseIndex]:
        windows = jnp.array(self.lengths(rows.key_length), jnp.int32)
        return patterns.window_index(*rows.lengths, windows, self.num_sinks, **rows.positions)

    def places(self, position: jax.Array, length: int) -> jax.Array | None:
        """Those of the longest window, and sinks."""
        longest = max(self.lengths(length))
        if self.num_sinks + longest >= length:
            return None
        first = jnp.maximum(position - longest + 1, self.num_sinks)
        return jnp.concatenate([jnp.arange(self.num_sinks), first + jnp.arange(longest)])


def _numbers(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)
