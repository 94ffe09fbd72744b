"""The arithmetic of one tile, shared by the Triton kernels and the plain JAX loops.

Scores are kept without their scale; `scale2 = scale * log2(e)` turns them into exponents of 2. Everything is
float32 except the operands of the dots, which have the dtype of the inputs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from scfa_jax.partitioning import varying_as
from scfa_jax.sorting import Precision

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)

Dot = Callable[[jax.Array, jax.Array], jax.Array]

# Which of the three loops a tile belongs to. In the tiles at the stop one end of every range lies beyond the tile,
# and only the other end needs a comparison; in full tiles (None) neither does.
Edge = Literal["start", "stop"] | None


class Softmax(NamedTuple):
    """Running softmax of a tile of queries.

    Attributes:
        acc: float32 `[block_q, H]`, the weighted sum of values so far.
        peak: float32 `[block_q]`, the largest (unscaled) score so far, or `-inf`.
        total: float32 `[block_q]`, the sum of weights so far.
    """

    acc: jax.Array
    peak: jax.Array
    total: jax.Array


def walk(bounds, visit: Callable, carry):
    """Visits the tiles of `bounds` in three plain loops: edge, full, edge.

    Args:
        bounds: Four int32 scalars, as from `tiling.key_tile_bounds`.
        visit: `(tile number, carry, edge) -> carry`, with a static `Edge`.
        carry: What the loops carry.

    Returns:
        The carry after the last tile.
    """
    start, full_start, full_stop, stop = bounds
    carry = varying_as(start, carry)
    carry = jax.lax.fori_loop(start, full_start, lambda i, c: visit(i, c, "start"), carry)
    carry = jax.lax.fori_loop(full_start, full_stop, lambda i, c: visit(i, c, None), carry)
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


def split_scale(scale: float) -> tuple[float, float]:
    """Splits `scale * log2(e)` into a sign-like factor for the queries and a positive one for the exponents.

    The running softmax needs a positive factor, since it finds its peak among unscaled scores.
    """
    if scale == 0:
        return 0.0, 1.0
    return math.copysign(1.0, scale), abs(scale) * LOG2_E


def empty_softmax(block_q: int, head_dim: int) -> Softmax:
    """The softmax of no keys at all."""
    return Softmax(
        acc=jnp.zeros((block_q, head_dim), jnp.float32),
        peak=jnp.full((block_q,), -jnp.inf, jnp.float32),
        total=jnp.zeros((block_q,), jnp.float32),
    )


def add_keys(
    softmax: Softmax,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    scale2: float,
    dot: Dot,
) -> Softmax:
    """Adds a tile of keys to a running softmax.

    Args:
        softmax: The state so far.
        query: `[block_q, H]`.
        key: `[block_k, H]`.
        value: `[block_k, H]`, zero in rows whose mask column is all False.
        mask: bool `[block_q, block_k]`, or None where every pair is allowed.
        scale2: Positive factor of the scores, in units of log2.
        dot: Matrix product with a float32 result.

    Returns:
        The new state.
    """
    scores = dot(query, key.T)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    peak = jnp.maximum(softmax.peak, jnp.max(scores, axis=1))
    # Rows without a key so far have a peak of -inf; any finite stand-in gives them weights of 0.
    shift = (peak if mask is None else jnp.where(peak == -jnp.inf, 0.0, peak)) * scale2
    weights = jnp.exp2(scores * scale2 - shift[:, None])
    decay = jnp.exp2(softmax.peak * scale2 - shift)
    return Softmax(
        acc=softmax.acc * decay[:, None] + dot(weights.astype(value.dtype), value),
        peak=peak,
        total=softmax.total * decay + jnp.sum(weights, axis=1),
    )


def finish(softmax: Softmax, scale2: float) -> tuple[jax.Array, jax.Array]:
    """Returns the output `[block_q, H]` and the natural log-sum-exp `[block_q]`; 0 and `-inf` without keys."""
    is_empty = softmax.total == 0  # a NaN is not
    total = jnp.where(is_empty, 1.0, softmax.total)
    output = softmax.acc / total[:, None]
    logsumexp = jnp.where(is_empty, -jnp.inf, softmax.peak * (scale2 * LN_2) + jnp.log(total))
    return output, logsumexp


def delta(output: jax.Array, output_gradient: jax.Array, logsumexp_gradient: jax.Array) -> jax.Array:
    """The dot of output `[..., H]` and its cotangent, less the cotangent of the log-sum-exp `[...]`, in float32."""
    products = output.astype(jnp.float32) * output_gradient.astype(jnp.float32)
    return jnp.sum(products, axis=-1) - logsumexp_gradient


def weights_and_score_gradient(
    scores: jax.Array,
    weight_gradient: jax.Array,
    logsumexp: jax.Array,
    delta: jax.Array,
    mask: jax.Array | None,
    scale2: float,
) -> tuple[jax.Array, jax.Array]:
    """Recomputes the weights of a tile and the gradient of its scaled scores.

    Where the mask is False the weight is 0, and the gradient is as long as `weight_gradient` and `delta` are finite.

    Args:
        scores: float32, unscaled, `[block_q, block_k]` or its transpose.
        weight_gradient: float32 of that shape, the dot of the output's cotangent and the values.
        logsumexp: float32 that broadcasts to that shape, natural log.
        delta: float32 likewise, from the function of that name.
        mask: bool of that shape, or None where every pair is allowed.
        scale2: Factor of the scores, in units of log2; of any sign.

    Returns:
        The weights and the gradient of the scores before the factor `scale`, both float32.
    """
    exponents = scores * scale2 - logsumexp * LOG2_E
    if mask is not None:
        # `where`, not a product: what is masked may be inf or NaN.
        exponents = jnp.where(mask, exponents, -jnp.inf)
    weights = jnp.exp2(exponents)
    return weights, weights * (weight_gradient - delta)
