"""How close is close enough: a rule without constants, after FlashAttention's own tests.

The error against a float32 (or wider) reference may be at most twice that of a plain implementation in the same
dtype, plus a floor: one rounding of the terms that are summed.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from scfa_jax import reference

NAMES = ("output", "logsumexp", "dquery", "dkey", "dvalue")


def results_and_gradients(attend, query, key, value, output_cotangent, logsumexp_cotangent):
    """Output, log-sum-exp and the gradients of query, key and value for the cotangents of both."""
    (output, logsumexp), pull = jax.vjp(attend, query, key, value)
    # A query without keys has a constant log-sum-exp of -inf: its cotangent means nothing.
    cotangent = jnp.where(jnp.isfinite(logsumexp), logsumexp_cotangent.astype(logsumexp.dtype), 0)
    return output, logsumexp, *pull((output_cotangent.astype(output.dtype), cotangent))


def plain_attention(query, key, value, mask, *, scale=None):
    """Dense attention as one would write it in the dtype of the inputs, dots at the highest precision."""
    heads = query.shape[2]
    key, value = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (key, value))
    if 1 < mask.shape[1] < heads:
        mask = jnp.repeat(mask, heads // mask.shape[1], axis=1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    highest = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("btnh,bsnh->bnts", query, key, precision=highest) * jnp.asarray(scale, query.dtype)
    scores = jnp.where(mask, scores.astype(jnp.float32), -jnp.inf)
    has_key = mask.any(-1, keepdims=True)
    logsumexp = jax.nn.logsumexp(jnp.where(has_key, scores, 0), axis=-1, keepdims=True)
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, scores, logsumexp) - logsumexp), 0).astype(query.dtype)
    output = jnp.einsum("bnts,bsnh->btnh", weights, value, precision=highest)
    return output, jnp.where(has_key, logsumexp, -jnp.inf)[..., 0].swapaxes(1, 2)


def summed_terms(query, key, value, mask, output_cotangent, logsumexp_cotangent, *, scale=None):
    """The largest sum of absolute terms in each of the results: what rounding errors are relative to."""
    query, key, value, cotangent = (np.asarray(x, np.float64) for x in (query, key, value, output_cotangent))
    heads, key_heads = query.shape[2], key.shape[2]
    group = heads // key_heads
    key, value = (np.repeat(x, group, axis=2) for x in (key, value))
    mask = np.asarray(mask)
    mask = np.repeat(mask, heads // mask.shape[1], axis=1) if 1 < mask.shape[1] < heads else mask
    mask = np.broadcast_to(mask, (query.shape[0], heads, query.shape[1], key.shape[1]))
    scale = query.shape[-1] ** -0.5 if scale is None else abs(scale)
    score_terms = scale * np.einsum("btnh,bsnh->bnts", abs(query), abs(key)) * mask
    scores = np.where(mask, scale * np.einsum("btnh,bsnh->bnts", query, key), -np.inf)
    peak = np.max(scores, axis=-1, keepdims=True, initial=-1e30)
    weights = np.exp(scores - peak)
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    weight_terms = np.einsum("btnh,bsnh->bnts", abs(cotangent), abs(value))
    delta_terms = (weights * weight_terms).sum(-1, keepdims=True)
    delta_terms = delta_terms + abs(np.asarray(logsumexp_cotangent, np.float64)).swapaxes(1, 2)[..., None]
    # A rounding of a score changes its weight by that much, relatively.
    roundings = 1 + score_terms
    score_gradient = weights * (weight_terms + delta_terms) * roundings
    by_key_head = lambda x: x.reshape(*x.shape[:2], key_heads, group, -1).sum(3)
    terms = (
        np.einsum("bnts,bsnh->btnh", weights * roundings, abs(value)),
        score_terms + 1,
        scale * np.einsum("bnts,bsnh->btnh", score_gradient, abs(key)),
        by_key_head(scale * np.einsum("bnts,btnh->bsnh", score_gradient, abs(query))),
        by_key_head(np.einsum("bnts,btnh->bsnh", weights * roundings, abs(cotangent))),
    )
    return tuple(float(np.max(x, initial=0.0)) for x in terms)


def cotangents(rng: np.random.Generator, query):
    """Random cotangents of the output and of the log-sum-exp."""
    output = jnp.asarray(rng.normal(size=query.shape), jnp.float32).astype(query.dtype)
    return output, jnp.asarray(rng.normal(size=query.shape[:3]), jnp.float32)


@partial(jax.jit, static_argnames=("attend", "scale"))
def _dense_results(attend, query, key, value, mask, output_cotangent, logsumexp_cotangent, scale):
    dense = lambda *qkv: attend(*qkv, mask, scale=scale)
    return results_and_gradients(dense, query, key, value, output_cotangent, logsumexp_cotangent)


def assert_as_exact_as_plain(results, query, key, value, mask, *, scale=None):
    """Asserts the rule for an operator's output, log-sum-exp and all gradients.

    Args:
        results: Function of query, key, value and two cotangents, as from `Case.compiled`.
        query: `[B, T, N, H]`.
        key: `[B, S, K, H]`.
        value: `[B, S, K, H]`.
        mask: bool `[B or 1, N or 1, T, S]`.
        scale: Factor of the scores.
    """
    given = cotangents(np.random.default_rng(1), query)
    wide = tuple(x.astype(jnp.float32) for x in (query, key, value))
    got = results(query, key, value, *given)
    want = _dense_results(reference.attention, *wide, mask, *given, scale)
    rough = _dense_results(plain_attention, query, key, value, mask, *given, scale)
    terms = summed_terms(query, key, value, mask, *given, scale=scale)
    rounding = float(jnp.finfo(query.dtype).eps)
    for name, x, exact, rougher, term in zip(NAMES, got, want, rough, terms, strict=True):
        x, exact, rougher = (np.asarray(y, np.float64) for y in (x, exact, rougher))
        assert x.shape == exact.shape, name
        empty = np.isneginf(exact)
        np.testing.assert_array_equal(np.isneginf(x), empty, err_msg=f"{name}: other rows are empty")
        error, allowed = (float(np.max(np.abs(y[~empty] - exact[~empty]), initial=0.0)) for y in (x, rougher))
        # The reference itself is rounded in float32.
        floor = (rounding + float(jnp.finfo(jnp.float32).eps)) * term
        assert np.isfinite(x[~empty]).all(), f"{name} is not finite"
        assert error <= 2 * allowed + floor, f"{name}: error {error:.3g}, plain {allowed:.3g}, floor {floor:.3g}"
