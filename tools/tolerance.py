"""How close is close enough: a rule without constants, after FlashAttention's own tests.

The error against a float32 (or wider) reference may be at most twice that of a plain implementation in the same
dtype, plus a floor: one rounding of what is stored in that dtype, and one in float32 of the terms that are summed.
The largest error must obey it, and the root mean square of all, which shows an error of 1% even in bfloat16, where a
single rounding may be as large. The tests, the random cases and the soak run go by it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scfa_jax import reference

NAMES = ("output", "logsumexp", "dquery", "dkey", "dvalue")
SINKS = "dsinks"  # the last result, where there are sink logits

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class Dense(NamedTuple):
    """What results are compared with; each a tuple in the order of `NAMES`, with `SINKS` last where there are any.

    Attributes:
        want: The reference's results in float32.
        rough: Those of a plain implementation in the dtype of the inputs.
        stored: float32, of the same shapes: what one rounding to the dtype of the inputs is relative to.
        summed: float32, of the same shapes: the sums of absolute terms, which roundings to float32 are relative to.
    """

    want: tuple[jax.Array, ...]
    rough: tuple[jax.Array, ...]
    stored: tuple[jax.Array, ...]
    summed: tuple[jax.Array, ...]


def results_and_gradients(
    attend: Callable[..., tuple[jax.Array, jax.Array]],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    output_cotangent: jax.Array,
    logsumexp_cotangent: jax.Array,
    sink_logits: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """Output, log-sum-exp and the gradients of query, key, value and any sink logits, for the cotangents of both."""
    arrays = (query, key, value) if sink_logits is None else (query, key, value, sink_logits)
    (output, logsumexp), pull = jax.vjp(attend, *arrays)
    # A query without keys has a constant log-sum-exp of -inf: its cotangent means nothing.
    cotangent = jnp.where(jnp.isfinite(logsumexp), logsumexp_cotangent.astype(logsumexp.dtype), 0)
    return output, logsumexp, *pull((output_cotangent.astype(output.dtype), cotangent))


def plain_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    sink_logits: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Dense attention as one would write it in the dtype of the inputs, dots at the highest precision."""
    heads = query.shape[2]
    key, value, mask = _for_each_head(key, value, mask, heads)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = _einsum("btnh,bsnh->bnts", query, key) * jnp.asarray(scale, query.dtype)
    if logits_soft_cap is not None:
        cap = jnp.asarray(logits_soft_cap, query.dtype)
        logits = cap * jnp.tanh(logits / cap)
    logits = jnp.where(mask, logits.astype(jnp.float32), -jnp.inf)
    has_key = mask.any(-1, keepdims=True)
    logsumexp = jax.nn.logsumexp(jnp.where(has_key, logits, 0), axis=-1, keepdims=True)
    if sink_logits is not None:
        logsumexp = jnp.logaddexp(logsumexp, _of_heads(sink_logits))
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, logits, logsumexp) - logsumexp), 0).astype(query.dtype)
    output = _einsum("bnts,bsnh->btnh", weights, value)
    return output, jnp.where(has_key, logsumexp, -jnp.inf)[..., 0].swapaxes(1, 2)


def rounded_terms(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    output_cotangent: jax.Array,
    logsumexp_cotangent: jax.Array,
    *,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    sink_logits: jax.Array | None = None,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """What rounding errors of each element are relative to, to first order.

    Returns:
        For the gradients of query, key, value and any sink logits: what rounding the output, which the deltas of
        queries are summed from, contributes to each element. For all results: the sums of absolute terms. All float32.
    """
    query, key, value, cotangent = (x.astype(jnp.float32) for x in (query, key, value, output_cotangent))
    heads, key_heads = query.shape[2], key.shape[2]
    key, value, mask = _for_each_head(key, value, mask, heads)
    mask = jnp.broadcast_to(mask, (query.shape[0], heads, query.shape[1], key.shape[1]))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    on_query = lambda x: x.swapaxes(1, 2)[..., None]  # [B, T, N] to [B, N, T, 1]
    logit_terms = abs(scale) * _einsum("btnh,bsnh->bnts", abs(query), abs(key)) * mask
    logits = scale * _einsum("btnh,bsnh->bnts", query, key)
    slope = jnp.ones(())
    if logits_soft_cap is not None:
        share = jnp.tanh(logits / logits_soft_cap)
        logits, slope = logits_soft_cap * share, 1 - share**2
        logit_terms = slope * logit_terms + abs(logits) * mask
    logits = jnp.where(mask, logits, -jnp.inf)
    sinks = _of_heads(jnp.full(heads, -jnp.inf) if sink_logits is None else sink_logits)
    sink_terms = jnp.where(sinks > -jnp.inf, abs(sinks), 0.0)
    peak = jnp.maximum(jnp.max(logits, axis=-1, keepdims=True, initial=-1e30), sinks)
    peak_terms = jnp.maximum(jnp.max(logit_terms, axis=-1, initial=0.0), sink_terms[..., 0])
    weights, sink_weights = jnp.exp(logits - peak), jnp.exp(sinks - peak) * mask.any(-1, keepdims=True)
    total = weights.sum(-1, keepdims=True) + sink_weights
    weights, sink_weights = (x / jnp.maximum(total, 1e-30) for x in (weights, sink_weights))
    logsumexp_terms = peak_terms + 1 + jnp.log(jnp.maximum(total[..., 0], 1))
    output = _einsum("bnts,bsnh->btnh", weights, value)
    weight_gradient = _einsum("btnh,bsnh->bnts", cotangent, value)
    weight_terms = _einsum("btnh,bsnh->bnts", abs(cotangent), abs(value))
    delta = on_query(jnp.sum(output * cotangent, -1) - logsumexp_cotangent)
    delta_terms = (weights * weight_terms).sum(-1, keepdims=True) + abs(on_query(logsumexp_cotangent))
    # A rounding of a logit, or of the log-sum-exp that is taken from it, changes its weight by that much, relatively.
    roundings = 1 + logit_terms + logsumexp_terms[..., None]
    logit_gradient = weights * abs(weight_gradient - delta)
    product_gradient_terms = slope * (logit_gradient * roundings + weights * (weight_terms + delta_terms))
    product_gradient_terms += 2 * (1 - slope) * logit_gradient  # of the slope, which a square is taken from
    # The elements of the output are rounded each on its own: their errors add up as squares do.
    stored_delta = on_query(jnp.sqrt(jnp.sum(jnp.square(output * cotangent), -1)))
    stored = slope * weights * stored_delta

    by_key_head = lambda x: x.reshape(*x.shape[:2], key_heads, heads // key_heads, x.shape[3]).sum(3)
    to_query = lambda x: abs(scale) * _einsum("bnts,bsnh->btnh", x, abs(key))
    to_key = lambda x: by_key_head(abs(scale) * _einsum("bnts,btnh->bsnh", x, abs(query)))
    summed_values = _einsum("bnts,bsnh->btnh", weights * roundings, abs(value))
    summed_cotangents = by_key_head(_einsum("bnts,btnh->bsnh", weights * roundings, abs(cotangent)))
    deltas = to_query(stored), to_key(stored), jnp.zeros_like(summed_cotangents)
    summed = (
        summed_values,
        (logsumexp_terms + peak_terms).swapaxes(1, 2),  # by way of exponents of 2 and back: rounded once more
        to_query(product_gradient_terms),
        to_key(product_gradient_terms),
        summed_cotangents,
    )
    if sink_logits is None:
        return deltas, summed
    sink_roundings = 1 + sink_terms + logsumexp_terms[..., None]
    summed_sinks = jnp.sum(sink_weights * (abs(delta) * sink_roundings + delta_terms), axis=(0, 2, 3))
    stored_sinks = jnp.sqrt(jnp.sum(jnp.square(sink_weights * stored_delta), axis=(0, 2, 3)))
    return (*deltas, stored_sinks), (*summed, summed_sinks)


@functools.partial(jax.jit, static_argnames=("scale", "logits_soft_cap"))
def dense_results(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    output_cotangent: jax.Array,
    logsumexp_cotangent: jax.Array,
    *,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    sink_logits: jax.Array | None = None,
) -> Dense:
    """What results are to be compared with.

    Args:
        query: `[B, T, N, H]`.
        key: `[B, S, K, H]`.
        value: `[B, S, K, V]`.
        mask: bool `[B or 1, N or K or 1, T, S]`, what may be attended to.
        output_cotangent: `[B, T, N, V]`.
        logsumexp_cotangent: `[B, T, N]`.
        scale: Factor of the products; `H ** -0.5` if None.
        logits_soft_cap: Cap of the logits; None for none.
        sink_logits: `[N]`, a logit of each head for no key; None for none.
    """
    given = output_cotangent, logsumexp_cotangent
    options: dict[str, Any] = {"scale": scale, "logits_soft_cap": logits_soft_cap}
    arrays = (query, key, value, sink_logits)

    def results(attend: Callable[..., Any], q, k, v, sinks) -> tuple[jax.Array, ...]:
        of = lambda q, k, v, sinks=None: attend(q, k, v, mask, sink_logits=sinks, **options)
        return results_and_gradients(of, q, k, v, *given, sinks)

    wide = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), arrays)
    want = results(reference.attention, *wide)
    deltas, summed = rounded_terms(query, key, value, mask, *given, sink_logits=sink_logits, **options)
    # A result is rounded once. Gradients twice: the weights, or gradients of scores, that they are summed from as well.
    # Independent errors of half of eps each hardly ever add up to twice that times the root of the squares.
    stored = tuple(abs(x) for x in want[:2]) + tuple(2 * (abs(x) + y) for x, y in zip(want[2:], deltas, strict=True))
    return Dense(want, results(plain_attention, *arrays), stored, summed)


def problems(
    got: Sequence[jax.Array | np.ndarray],
    dense: Dense,
    dtype: jax.typing.DTypeLike,
    *,
    in_tf32_products: bool = False,
) -> list[str]:
    """What breaks the rule.

    Args:
        got: Results in the order of `NAMES` and `SINKS`, or the first few of them.
        dense: From `dense_results`.
        dtype: Of query, key and value.
        in_tf32_products: Whether float32 operands were taken apart into two TF32 numbers each, of 11 significant bits,
            and multiplied in three products, as the kernels do on a GPU. The fourth product, of both second numbers, is
            left out: up to 2^-22 of a term. In float32 the plain implementation may equal the reference bit for bit,
            and then the floor decides alone.

    Returns:
        One line for each result that is wrong.
    """
    found = []
    stored_rounding = float(jnp.finfo(dtype).eps) / 2
    # The reference itself is rounded in float32.
    summed_rounding = 2 * float(jnp.finfo(jnp.float32).eps) + in_tf32_products * 2.0**-22
    for name, *arrays in zip((*NAMES, SINKS), got, *dense, strict=False):
        x, want, rough, stored, summed = (np.asarray(y, np.float64) for y in arrays)
        if x.shape != want.shape:
            found.append(f"{name}: shape {x.shape}, not {want.shape}")
            continue
        empty = np.isneginf(want)
        if (np.isneginf(x) != empty).any():
            found.append(f"{name}: other rows are empty")
        elif not np.isfinite(x[~empty]).all():
            found.append(f"{name}: {(~np.isfinite(x[~empty])).sum()} of {x.size} are not finite")
        else:
            floors = stored_rounding * stored + summed_rounding * summed
            errors = x[~empty] - want[~empty], rough[~empty] - want[~empty], floors[~empty]
            for size, measure in (("largest", _largest), ("root mean square", _root_mean_square)):
                error, plain, floor = map(measure, errors)
                if not error <= 2 * plain + floor:
                    found.append(f"{name}: error {error:.3g}, plain {plain:.3g}, floor {floor:.3g} ({size})")
                    break
    return found


def _largest(x: np.ndarray) -> float:
    return float(np.max(np.abs(x), initial=0.0))


def _root_mean_square(x: np.ndarray) -> float:
    return float(np.sqrt(np.sum(np.square(x)) / max(x.size, 1)))


def _of_heads(sink_logits: jax.Array) -> jax.Array:
    """`[N]` as float32 `[1, N, 1, 1]`."""
    return sink_logits.astype(jnp.float32)[None, :, None, None]


def _for_each_head(
    key: jax.Array, value: jax.Array, mask: jax.Array, heads: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Repeats key heads, and masks of key heads, for the query heads that read them."""
    key, value = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (key, value))
    if 1 < mask.shape[1] < heads:
        mask = jnp.repeat(mask, heads // mask.shape[1], axis=1)
    return key, value, mask
