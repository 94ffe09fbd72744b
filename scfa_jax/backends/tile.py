"""The arithmetic of one tile, and its one mask rule: what every backend's kernels are made of.

A product of a query and a key becomes a score, and a score times a factor is the logit in units of log2, so that
weights are powers of 2. Everything is float32 but for the operands of products, which have the dtype of the inputs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from scfa_jax._partitioning import varying_as

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)

NO_KEY = 1e30
"""Inside the library, the log-sum-exp of a query without keys: `exp(score - NO_KEY)` is 0, and no NaN."""

Precision = Literal["float32", "tf32"]
Dot = Callable[[jax.Array, jax.Array], jax.Array]

# The stretch of the walk that a tile is in. At the start both ends of a range may lie in the tile, at the stop one end
# of every range lies beyond it, and in between every pair is allowed.
Stretch = Literal["start", "full", "stop"]


def pair_mask(
    low: jax.Array, code: jax.Array, high: jax.Array, stretch: Stretch, walks: Literal["keys", "queries"]
) -> jax.Array | None:
    """Which pairs of a tile are allowed: the mask rule, with no more comparisons than the stretch needs.

    Args:
        low: int32, the first codes of the tile's queries; it broadcasts with the next two to the tile.
        code: int32, the codes of its keys.
        high: int32, the last codes of its queries.
        stretch: Where in the walk the tile is.
        walks: Whether the walk goes over tiles of keys, whose codes ascend, or of queries, whose ranges do.

    Returns:
        bool of the shape of the tile; None where every pair is allowed.
    """
    if stretch == "full":
        return None
    up_to, down_to = code <= high, code >= low
    if stretch == "start":
        return up_to & down_to
    return up_to if walks == "keys" else down_to


def walk(bounds, visit: Callable, carry):
    """Visits the tiles of `bounds` in three plain loops, one a stretch.

    Args:
        bounds: Four int32 scalars, as from `_bounds.key_tile_bounds`.
        visit: `(tile number, carry, stretch) -> carry`, with a static `Stretch`.
        carry: What the loops carry.

    Returns:
        The carry after the last tile.
    """
    start, full_start, full_stop, stop = bounds
    carry = varying_as(start, carry)
    carry = jax.lax.fori_loop(start, full_start, lambda i, c: visit(i, c, "start"), carry)
    carry = jax.lax.fori_loop(full_start, full_stop, lambda i, c: visit(i, c, "full"), carry)
    return jax.lax.fori_loop(full_stop, stop, lambda i, c: visit(i, c, "stop"), carry)


def dot_for(dtype: jax.typing.DTypeLike, precision: Precision, *, in_triton: bool) -> Dot:
    """Matrix product with a float32 result; the precision is that of float32 operands.

    In Triton float32 takes three TF32 products, and TF32 one. XLA takes the platform's own float32, and TF32 where it
    has that: a CPU computes both alike.
    """
    chosen: jax.lax.PrecisionLike = None
    if jnp.dtype(dtype) == jnp.float32:
        presets, precisions = jax.lax.DotAlgorithmPreset, jax.lax.Precision
        in_float32 = presets.TF32_TF32_F32_X3 if in_triton else precisions.HIGHEST
        in_tf32 = presets.TF32_TF32_F32 if in_triton else precisions.HIGH
        chosen = in_tf32 if precision == "tf32" else in_float32
    return functools.partial(jax.lax.dot, precision=chosen, preferred_element_type=jnp.float32)


@dataclass(frozen=True)
class Logits:
    """How products of queries and keys become logits: `scale * product`, or `cap * tanh(scale * product / cap)`.

    Attributes:
        scale: Factor of the products, of any sign.
        soft_cap: The cap, positive; None for none.
    """

    scale: float
    soft_cap: float | None = None

    @property
    def sign(self) -> float:
        """What queries are multiplied by in the forward pass, where the running softmax needs a positive `factor`."""
        if self.soft_cap is not None:
            return 1.0
        return math.copysign(1.0, self.scale) if self.scale else 0.0

    @property
    def factor(self) -> float:
        """Positive factor of scores, to logits in units of log2, where queries were multiplied by `sign`."""
        if self.soft_cap is not None:
            return self.soft_cap * LOG2_E
        return abs(self.scale) * LOG2_E if self.scale else 1.0

    @property
    def signed_factor(self) -> float:
        """Factor of scores, to logits in units of log2, of queries as they are."""
        return self.scale * LOG2_E if self.soft_cap is None else self.soft_cap * LOG2_E

    def signed(self, query: jax.Array) -> jax.Array:
        """Queries times `sign`."""
        return query if self.sign == 1 else query * jnp.asarray(self.sign, query.dtype)

    def scores(self, products: jax.Array) -> jax.Array:
        """Scores of products."""
        return products if self.soft_cap is None else jnp.tanh(products * (self.scale / self.soft_cap))

    def slope(self, scores: jax.Array, gradient: jax.Array) -> jax.Array:
        """The gradient of products but for the factor `scale`, given that of logits."""
        return gradient if self.soft_cap is None else gradient * (1.0 - scores * scores)


class Softmax(NamedTuple):
    """Running softmax of a tile of queries.

    Attributes:
        acc: float32 `[block_q, V]`, the weighted sum of values so far.
        peak: float32 `[block_q]`, the largest score so far, or `-inf`.
        total: float32 `[block_q]`, the sum of weights so far.
    """

    acc: jax.Array
    peak: jax.Array
    total: jax.Array


def empty_softmax(block_q: int, head_dim: int) -> Softmax:
    """The softmax of no keys at all, for values of a head size."""
    return Softmax(
        acc=jnp.zeros((block_q, head_dim), jnp.float32),
        peak=jnp.full((block_q,), -jnp.inf, jnp.float32),
        total=jnp.zeros((block_q,), jnp.float32),
    )


def add_scores(
    peak: jax.Array, scores: jax.Array, mask: jax.Array | None, factor: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Takes the scores of a tile into a running softmax, all but its sums.

    Args:
        peak: As in `Softmax`.
        scores: float32 `[block_q, block_k]`.
        mask: bool `[block_q, block_k]`, or None where every pair is allowed.
        factor: Positive factor of the scores, in units of log2.

    Returns:
        The new peak, the weights `[block_q, block_k]`, and what to multiply earlier sums by, `[block_q]`.
    """
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    new_peak = jnp.maximum(peak, jnp.max(scores, axis=1))
    # Rows without a key so far have a peak of -inf; any finite stand-in gives them weights of 0.
    shift = (new_peak if mask is None else jnp.where(new_peak == -jnp.inf, 0.0, new_peak)) * factor
    return new_peak, jnp.exp2(scores * factor - shift[:, None]), jnp.exp2(peak * factor - shift)


def add_keys(
    softmax: Softmax,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    logits: Logits,
    dot: Dot,
) -> Softmax:
    """Adds a tile of keys to a running softmax.

    Args:
        softmax: The state so far.
        query: `[block_q, H]`, times `logits.sign`.
        key: `[block_k, H]`.
        value: `[block_k, V]`, zero in rows whose mask column is all False.
        mask: bool `[block_q, block_k]`, or None where every pair is allowed.
        logits: How products become logits.
        dot: Matrix product with a float32 result.

    Returns:
        The new state.
    """
    scores = logits.scores(dot(query, key.T))
    peak, weights, decay = add_scores(softmax.peak, scores, mask, logits.factor)
    # In this order: Triton schedules the sum of weights behind the product, which may be up to a fifth faster.
    acc = softmax.acc * decay[:, None] + dot(weights.astype(value.dtype), value)
    return Softmax(acc, peak, softmax.total * decay + jnp.sum(weights, axis=1))


def finish(softmax: Softmax, logits: Logits) -> tuple[jax.Array, jax.Array]:
    """Returns the output `[block_q, V]` and the natural log-sum-exp `[block_q]`; 0 and `NO_KEY` without keys."""
    is_empty = softmax.total == 0  # a NaN is not
    total = jnp.where(is_empty, 1.0, softmax.total)
    output = softmax.acc / total[:, None]
    logsumexp = jnp.where(is_empty, NO_KEY, softmax.peak * (logits.factor * LN_2) + jnp.log(total))
    return output, logsumexp


def weights_and_score_gradient(
    products: jax.Array,
    weight_gradient: jax.Array,
    logsumexp: jax.Array,
    delta: jax.Array,
    mask: jax.Array | None,
    logits: Logits,
) -> tuple[jax.Array, jax.Array]:
    """Recomputes the weights of a tile and the gradient of its products.

    Where the mask is False the weight is 0, and the gradient is as long as `weight_gradient` and `delta` are finite.

    Args:
        products: float32, of queries and keys, `[block_q, block_k]` or its transpose.
        weight_gradient: float32 of that shape, the dot of the output's cotangent and the values.
        logsumexp: float32 that broadcasts to that shape, natural log, of all keys that the query attends to.
        delta: float32 likewise: the dot of the query's output and its cotangent, less that of the log-sum-exp.
        mask: bool of that shape, or None where every pair is allowed.
        logits: How products become logits.

    Returns:
        The weights and the gradient of the products but for the factor `logits.scale`, both float32.
    """
    scores = logits.scores(products)
    exponents = scores * logits.signed_factor - logsumexp * LOG2_E
    if mask is not None:
        # `where`, not a product: what is masked may be inf or NaN.
        exponents = jnp.where(mask, exponents, -jnp.inf)
    weights = jnp.exp2(exponents)
    return weights, logits.slope(scores, weights * (weight_gradient - delta))
