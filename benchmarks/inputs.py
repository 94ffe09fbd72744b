"""Random inputs of a case, and its pattern in the plainest form: ids and a range of positions for every query.

The pattern is kept on the host and owes nothing to scfa_jax, so that it can be the judge of results. What MoBA chooses
is the exception: it is taken from `moba_blocks`, which the tests judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

import scfa_jax
from benchmarks.cases import Case


@dataclass(frozen=True)
class PatternData:
    """A query attends to the keys of its own id at positions `low .. high`, inclusive.

    Attributes:
        query_id: int32 `[B, T, N]`.
        key_id: int32 `[B, T, N]`.
        low: int32 `[T]`.
        high: int32 `[T]`.
        blocks: int32 `[B, T, N, k]`, where a query attends only to keys in these blocks and in its own; else None.
        block_size: Keys in a block.
    """

    query_id: np.ndarray
    key_id: np.ndarray
    low: np.ndarray
    high: np.ndarray
    blocks: np.ndarray | None = None
    block_size: int = 1

    def pairs(self) -> int:
        """How many pairs of query and key are allowed, over all heads and the batch."""
        if self.blocks is not None:
            own = self.high % self.block_size + 1
            chosen = sum(len(np.unique(row[row >= 0])) for row in self.blocks.reshape(-1, self.blocks.shape[-1]))
            return int(own.sum()) * self.query_id.shape[0] * self.query_id.shape[2] + chosen * self.block_size
        return sum(int(np.maximum(stop - start, 0).sum()) for start, stop in self._ranges())

    def ranges(self) -> tuple[np.ndarray, np.ndarray]:
        """The ranges `[B, N, T]` of sorted keys that sorted queries attend to, as a kernel for ranges takes them."""
        batch, length, heads = self.query_id.shape
        both = np.array(list(self._ranges()), np.int32).reshape(batch, heads, 2, length)
        return np.ascontiguousarray(both[:, :, 0]), np.ascontiguousarray(both[:, :, 1])

    def _ranges(self):
        """Head by head: start and stop among the keys in (id, position) order, queries in that order too."""
        batch, length, heads = self.query_id.shape
        for b in range(batch):
            for n in range(heads):
                query_id, key_id = (x[b, :, n].astype(np.int64) for x in (self.query_id, self.key_id))
                keys = np.sort(key_id * length + np.arange(length))
                order = np.argsort(query_id, kind="stable")
                first = query_id[order] * length
                start = np.searchsorted(keys, first + np.maximum(self.low[order], 0))
                stop = np.searchsorted(keys, first + self.high[order], side="right")
                yield start, np.maximum(stop, start)


@dataclass(frozen=True)
class Inputs:
    """One set of inputs.

    Attributes:
        query: `[B, T, N, H]`, and so is `cotangent`.
        key: `[B, T, K, H]`, and so is `value`.
        value: See `key`.
        cotangent: Of the output.
        extra: The operator's further arguments.
        pattern: What they mean.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    cotangent: jax.Array
    extra: tuple[jax.Array, ...]
    pattern: PatternData


def make_inputs(case: Case, seed: int) -> Inputs:
    """Draws one set of inputs; both sides of a pattern are drawn independently.

    Args:
        case: The case.
        seed: Another seed gives another set.
    """
    rng = np.random.default_rng((seed, case.length, int(1000 * case.parameter)))
    shapes = (case.shape, case.key_shape, case.key_shape, case.shape)
    query, key, value, cotangent = _normal(jax.random.key(seed), shapes, case.dtype)
    batch, length, heads, _ = case.shape
    tokens = (batch, length, heads)
    position = np.arange(length, dtype=np.int32)
    low, zeros = np.zeros_like(position), np.zeros(tokens, np.int32)
    extra: tuple[np.ndarray, ...] = ()
    pattern = PatternData(zeros, zeros, low, position)
    if case.pattern == "hash":
        query_id = _bucket_ids(rng, case, tokens)
        key_id = query_id if case.shared else _bucket_ids(rng, case, tokens)
        extra = (query_id,) if case.shared else (query_id, key_id)
        pattern = PatternData(query_id, key_id, low, position)
    elif case.pattern == "keep":
        query_keep, key_keep = (rng.random(tokens) < case.parameter for _ in range(2))
        extra = (query_keep, key_keep)
        # Ids that the other side never has stand for what is dropped.
        pattern = PatternData(np.where(query_keep, 0, 1), np.where(key_keep, 0, 2), low, position)
    elif case.pattern == "window":
        low = position - np.int32(case.parameter) + 1
        extra = (np.array([case.parameter], np.int32),)
        pattern = PatternData(zeros, zeros, low, position)
    elif case.pattern in ("moba", "blocks"):
        block_size = int(case.parameter)
        if case.pattern == "moba":
            blocks = np.asarray(_moba_blocks(query, key, block_size, case.chosen + 1))
        else:
            earlier = position[None, :, None, None] // block_size
            blocks = _distinct(rng, earlier, (*case.key_shape[:3], case.chosen))
            extra = (blocks,)
        blocks = np.repeat(blocks, heads // blocks.shape[2], axis=2)
        pattern = PatternData(zeros, zeros, low, position, blocks, block_size)
    return Inputs(query, key, value, cotangent, tuple(jnp.asarray(x) for x in extra), pattern)


_moba_blocks = jax.jit(
    lambda query, key, block_size, top_k: scfa_jax.moba_blocks(query, key, block_size=block_size, top_k=top_k),
    static_argnums=(2, 3),
)


def _distinct(rng: np.random.Generator, limit: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Distinct numbers below a limit along the last axis: a first one and equal steps from there; -1 where it ends."""
    first = rng.integers(0, 1 << 30, (*shape[:3], 1)) % np.maximum(limit, 1)
    place = np.arange(shape[3])
    step = np.maximum(limit // shape[3], 1)
    return np.where(place < limit, (first + place * step) % np.maximum(limit, 1), -1).astype(np.int32)


def _normal(key: jax.Array, shapes: Sequence[tuple[int, ...]], dtype: str) -> tuple[jax.Array, ...]:
    parts = jax.random.split(key, len(shapes))
    return tuple(jax.random.normal(part, shape, dtype) for part, shape in zip(parts, shapes, strict=True))


def _bucket_ids(rng: np.random.Generator, case: Case, tokens: tuple[int, ...]) -> np.ndarray:
    weights = np.arange(1, int(case.parameter) + 1) ** -float(case.zipf)
    edges = np.cumsum(weights / weights.sum())[:-1]
    return np.searchsorted(edges, rng.random(tokens), side="right").astype(np.int32)
