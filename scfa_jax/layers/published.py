"""Static patterns of the literature: which keys a token attends to depends on positions alone."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from scfa_jax import _checks, patterns
from scfa_jax._positions import first_position
from scfa_jax.index import SparseIndex
from scfa_jax.layers.pattern import Marks, Pattern, Rows


@dataclasses.dataclass(frozen=True)
class Longformer(Pattern):
    """A window, and every `stride`-th token as a global one.

    Source: Beltagy et al. 2020, "Longformer: The Long-Document Transformer", made causal.

    Args:
        window: Positions up to its own that a token sees.
        stride: Distance of the global tokens, which see all before them and are seen by all after them.

    Raises:
        ValueError: A number is too small.
        TypeError: A number is no static integer.
    """

    window: int
    stride: int

    def __post_init__(self):
        _checks.static_int("window", self.window, least=0)
        _checks.static_int("stride", self.stride, least=1)

    def index(self, query: Marks, key: Marks, rows: Rows) -> list[SparseIndex]:
        place = first_position(rows.positions.get("query_offset", 0)) + jnp.arange(rows.query_length)[None, :, None]
        query_global = place % self.stride == 0
        key_global = jnp.arange(rows.key_length)[None, :, None] % self.stride == 0
        return patterns.longformer_index(query_global, key_global, self.window, **rows.positions)


@dataclasses.dataclass(frozen=True)
class BigBird(Pattern):
    """A window, the first tokens as global ones, and random blocks.

    Source: Zaheer et al. 2020, "Big Bird: Transformers for Longer Sequences" (BigBird-ITC), made causal.

    Args:
        window: Positions up to its own that a token sees.
        num_global: First positions of the sequence that all later tokens see too.
        num_random: Random blocks before the window that the tokens of a block see, drawn for each head.
        block_size: Positions in a block.
        seed: Of the random key that the blocks are drawn from. They are the same at every call.

    Raises:
        ValueError: A number is too small.
        TypeError: A number is no static integer.
    """

    window: int
    num_global: int
    num_random: int
    block_size: int = 64
    seed: int = 0

    def __post_init__(self):
        for name in ("window", "num_global", "num_random", "seed"):
            _checks.static_int(name, getattr(self, name), least=0)
        _checks.static_int("block_size", self.block_size, least=1)

    def index(self, query: Marks, key: Marks, rows: Rows) -> list[SparseIndex]:
        return patterns.bigbird_index(
            *rows.lengths,
            self.window,
            jax.random.key(self.seed),
            num_global=self.num_global,
            num_random=self.num_random,
            block_size=self.block_size,
            num_heads=rows.num_heads,
            **rows.positions,
        )


@dataclasses.dataclass(frozen=True)
class Strided(Pattern):
    """The last `stride` positions, and every `stride`-th one before.

    Source: Child et al. 2019, "Generating Long Sequences with Sparse Transformers".

    Args:
        stride: A static number, near the square root of the length in the paper.

    Raises:
        ValueError: It is below 1.
        TypeError: It is no static integer.
    """

    stride: int

    def __post_init__(self):
        _checks.static_int("stride", self.stride, least=1)

    def index(self, query: Marks, key: Marks, rows: Rows) -> list[SparseIndex]:
        return patterns.strided_index(*rows.lengths, self.stride, **rows.positions)


@dataclasses.dataclass(frozen=True)
class Fixed(Pattern):
    """The own block of `stride` positions, and the last ones of earlier blocks.

    Source: Child et al. 2019, "Generating Long Sequences with Sparse Transformers".

    Args:
        stride: Positions in a block.
        num_summaries: Last positions of each block that later blocks see.

    Raises:
        ValueError: A number is too small, or `num_summaries` is above `stride`.
        TypeError: A number is no static integer.
    """

    stride: int
    num_summaries: int = 1

    def __post_init__(self):
        patterns.check_fixed(self.stride, self.num_summaries)

    def index(self, query: Marks, key: Marks, rows: Rows) -> list[SparseIndex]:
        return patterns.fixed_index(*rows.lengths, self.stride, self.num_summaries, **rows.positions)
