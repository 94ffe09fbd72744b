"""Merging: attention over a set of keys from results over its parts, by their log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from scfa_jax import _checks


def merge_attention(
    outputs: Sequence[jax.Array], logsumexps: Sequence[jax.Array], *, output_dtype: jax.typing.DTypeLike | None = None
) -> tuple[jax.Array, jax.Array]:
    """Combines attention of the same queries over disjoint sets of keys into attention over all of them.

    Exact, gradients included: they flow to the outputs and the log-sum-exps, and through these to queries, keys and
    values. Ask the operators for `return_residual=True` and `output_dtype="float32"`, so that nothing is rounded
    before the end. Source: Milakov & Gimelshein 2018, "Online normalizer calculation for softmax".

    Args:
        outputs: One or more of float `[..., N, H]`, all of one shape.
        logsumexps: As many of float32 `[..., N]`, natural log; `-inf` where a query has no key in that part.
        output_dtype: float32, bfloat16 or float16; that of the outputs if None.

    Returns:
        The output, and its log-sum-exp in float32. A query without keys in any part has output 0, log-sum-exp
        `-inf` and gradients of 0, whatever its outputs and cotangents hold.

    Raises:
        TypeError: A dtype is not supported.
        ValueError: There are no parts, or their shapes do not fit each other.

    Examples:
        >>> import jax, jax.numpy as jnp, scfa_jax
        >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 16))
        >>> zero, half, all_keys = (jnp.full((1, 1, 1), n, jnp.int32) for n in (0, 32, 64))
        >>> attend = lambda *keys: scfa_jax.range_attention(query, key, value, *keys, return_residual=True)
        >>> merged, _ = scfa_jax.merge_attention(*zip(attend(zero, half), attend(half, all_keys)))
        >>> bool(jnp.allclose(merged, attend(zero, all_keys)[0], atol=1e-5))
        True
    """
    outputs, logsumexps = list(outputs), list(logsumexps)
    dtype = _checks.parts(outputs, logsumexps, output_dtype)
    output, logsumexp = signed_merge(outputs, logsumexps, [1] * len(outputs))
    return output.astype(dtype), logsumexp


def signed_merge(
    outputs: Sequence[jax.Array], logsumexps: Sequence[jax.Array], signs: Sequence[int]
) -> tuple[jax.Array, jax.Array]:
    """As `merge_attention`, in float32, where the sums of parts with a sign of -1 are taken away.

    Parts without keys are passed over; the parts that are added must hold all pairs of those that are taken away.
    """
    peak = jax.lax.stop_gradient(jnp.max(jnp.stack(logsumexps), axis=0))
    is_empty = peak == -jnp.inf
    peak = jnp.where(is_empty, 0.0, peak)
    total, weighted = jnp.zeros_like(peak), jnp.zeros(outputs[0].shape, jnp.float32)
    for output, logsumexp, sign in zip(outputs, logsumexps, signs, strict=True):
        has_key = logsumexp != -jnp.inf
        # `where`, not a product: neither an output nor a cotangent of a part without keys may pass.
        weight = jnp.where(has_key, sign * jnp.exp(jnp.where(has_key, logsumexp, peak) - peak), 0.0)
        total = total + weight
        weighted = weighted + weight[..., None] * jnp.where(has_key[..., None], output.astype(jnp.float32), 0.0)
    total = jnp.where(is_empty, 1.0, total)
    output = jnp.where(is_empty[..., None], 0.0, weighted / total[..., None])
    return output, jnp.where(is_empty, -jnp.inf, peak + jnp.log(total))
