"""Static patterns of the literature: which keys a token attends to depends on positions alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scfa_jax import _checks, patterns
from scfa_jax.index import SparseIndex
from scfa_jax.patterns import union_attention
from scfa_jax.sparsity.base import Marks, Operands, Projections, Sparsity


class StaticPattern(Sparsity):
    """A kind whose keys are a union of disjoint sets, from positions alone; `mask` says the same densely."""

    def indices(self, query_length: int, key_length: int, num_heads: int, **options: Any) -> list[SparseIndex]:
        """The disjoint parts.

        Args:
            query_length: Number of queries `T`.
            key_length: Number of keys `S`.
            num_heads: Number of query heads `N`.
            **options: Offset, segment ids and implementation, as `causal_index` takes them.

        Returns:
            One index a part.
        """
        raise NotImplementedError

    def keys_seen(self, position: np.ndarray) -> np.ndarray:
        """Counts the keys of queries.

        Args:
            position: int `[T]`, where they stand.

        Returns:
            int `[T]`, how many keys each sees, itself included.
        """
        raise NotImplementedError

    def pairs(self, length: int) -> float:
        """Counts the pairs of queries and keys at a length.

        Args:
            length: Of the sequence.

        Returns:
            The number.
        """
        return float(self.keys_seen(np.arange(length)).sum())

    def attend(self, operands: Operands, **options: Any) -> jax.Array:
        """Calls `union_attention`.

        Args:
            operands: What attends to what.
            **options: As in `Sparsity.attend`.

        Returns:
            `[B, T, N, H]` in the dtype of the query.
        """
        query, key, value, *_ = operands
        indices = self.indices(query.shape[1], key.shape[1], query.shape[2], **options)
        output: Any = union_attention(query, key, value, indices, implementation=options.get("implementation"))
        return output


@dataclasses.dataclass(frozen=True)
class Longformer(StaticPattern):
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

    def indices(self, query_length: int, key_length: int, num_heads: int, **options: Any) -> list[SparseIndex]:
        """As in `StaticPattern`."""
        del num_heads
        query_position, key_position = patterns.positions(query_length, key_length, options)
        query_global, key_global = query_position % self.stride == 0, key_position % self.stride == 0
        return patterns.longformer(query_global, key_global, self.window, **options)

    def mask(
        self, query_marks: Marks, key_marks: Marks, query_position: jax.Array, key_position: jax.Array
    ) -> jax.Array:
        """As in `Sparsity`."""
        del query_marks, key_marks
        is_global = (query_position % self.stride == 0) | (key_position % self.stride == 0)
        return (key_position <= query_position) & ((query_position - key_position < self.window) | is_global)

    def keys_seen(self, position: np.ndarray) -> np.ndarray:
        """As in `StaticPattern`."""
        before = np.maximum(position - self.window + 1, 0)  # keys before the window
        is_global = position % self.stride == 0
        return position + 1 - before + np.where(is_global, before, -(-before // self.stride))


@dataclasses.dataclass(frozen=True)
class BigBird(StaticPattern):
    """A window, the first tokens as global ones, and random blocks.

    Source: Zaheer et al. 2020, "Big Bird: Transformers for Longer Sequences" (BigBird-ITC), made causal.

    Args:
        window: Positions up to its own that a token sees.
        num_global: First positions of the sequence that all later tokens see too.
        num_random: Random blocks before the window that the tokens of a block see, drawn for each head.
        block: Positions in a block.
        seed: Of the random key that the blocks are drawn from. They are the same at every call.

    Raises:
        ValueError: A number is too small.
        TypeError: A number is no static integer.
    """

    window: int
    num_global: int
    num_random: int
    block: int = 64
    seed: int = 0

    def __post_init__(self):
        for name in ("window", "num_global", "num_random", "seed"):
            _checks.static_int(name, getattr(self, name), least=0)
        _checks.static_int("block", self.block, least=1)

    def indices(self, query_length: int, key_length: int, num_heads: int, **options: Any) -> list[SparseIndex]:
        """As in `StaticPattern`."""
        numbers = {"num_global": self.num_global, "num_random": self.num_random, "block": self.block}
        rng_key = jax.random.key(self.seed)
        return patterns.big_bird(
            query_length, key_length, self.window, rng_key, **numbers, num_heads=num_heads, **options
        )

    def marks(self, projections: Projections) -> tuple[Marks, Marks]:
        """Marks queries by their head, which has blocks of its own; as in `Sparsity`."""
        return {"head": jnp.arange(projections.query.shape[2], dtype=jnp.int32)[None, None]}, {}

    def mask(
        self, query_marks: Marks, key_marks: Marks, query_position: jax.Array, key_position: jax.Array
    ) -> jax.Array:
        """As in `Sparsity`."""
        del key_marks
        head = query_marks["head"]  # [1, K, N // K, 1, 1]
        drawn = patterns.random_blocks(
            jax.random.key(self.seed),
            query_position[:, 0] // self.block,
            self.window,
            self.num_global,
            self.num_random,
            self.block,
            head.size,
        )
        of_head = drawn.swapaxes(0, 1)[head[..., 0, 0]]  # [1, K, N // K, T, num_random]
        is_drawn = jnp.any(of_head[..., None] == key_position // self.block, axis=-2)
        seen = (query_position - key_position < self.window) | (key_position < self.num_global) | is_drawn
        return (key_position <= query_position) & seen

    def keys_seen(self, position: np.ndarray) -> np.ndarray:
        """As in `StaticPattern`."""
        before = np.maximum(position - self.window + 1, 0)
        first_block = -(-self.num_global // self.block)
        blocks = np.maximum((position // self.block * self.block - self.window + 1) // self.block - first_block, 0)
        drawn = np.minimum(blocks, self.num_random) * self.block
        return position + 1 - before + np.minimum(before, self.num_global) + drawn


@dataclasses.dataclass(frozen=True)
class Strided(StaticPattern):
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

    def indices(self, query_length: int, key_length: int, num_heads: int, **options: Any) -> list[SparseIndex]:
        """As in `StaticPattern`."""
        del num_heads
        return patterns.strided(query_length, key_length, self.stride, **options)

    def mask(
        self, query_marks: Marks, key_marks: Marks, query_position: jax.Array, key_position: jax.Array
    ) -> jax.Array:
        """As in `Sparsity`."""
        del query_marks, key_marks
        distance = query_position - key_position
        return (distance >= 0) & ((distance < self.stride) | (distance % self.stride == 0))

    def keys_seen(self, position: np.ndarray) -> np.ndarray:
        """As in `StaticPattern`."""
        return np.minimum(position + 1, self.stride) + position // self.stride


@dataclasses.dataclass(frozen=True)
class Fixed(StaticPattern):
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

    def indices(self, query_length: int, key_length: int, num_heads: int, **options: Any) -> list[SparseIndex]:
        """As in `StaticPattern`."""
        del num_heads
        return patterns.fixed(query_length, key_length, self.stride, self.num_summaries, **options)

    def mask(
        self, query_marks: Marks, key_marks: Marks, query_position: jax.Array, key_position: jax.Array
    ) -> jax.Array:
        """As in `Sparsity`."""
        del query_marks, key_marks
        is_summary = key_position % self.stride >= self.stride - self.num_summaries
        in_block = key_position // self.stride == query_position // self.stride
        return (key_position <= query_position) & (in_block | is_summary)

    def keys_seen(self, position: np.ndarray) -> np.ndarray:
        """As in `StaticPattern`."""
        return position % self.stride + 1 + position // self.stride * self.num_summaries
