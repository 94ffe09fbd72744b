"""Merging: attention over a set of keys from results over its parts, by their log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from scfa_jax import _checks

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32


def merge_attention(
    outputs: Sequence[Float[Array, "*B N V"]] | Float[Array, "P *B N V"],
    logsumexps: Sequence[Float32[Array, "*B N"]] | Float32[Array, "P *B N"],
    *,
    output_dtype: jax.typing.DTypeLike | None = None,
) -> tuple[Float[Array, "*B N V"], Float32[Array, "*B N"]]:
    """Combines attention of the same queries over disjoint sets of keys into attention over all of them.

    The result is exact, and so are its gradients: they flow to the outputs and the log-sum-exps, and through these to
    queries, keys and values. Ask the operators for `return_residual=True` and `output_dtype="float32"`, so that
    nothing is rounded before the end. To attend to several indices over the same keys, give `sparse_attention` a list
    instead. Source: Milakov & Gimelshein 2018, "Online normalizer calculation for softmax".

    Args:
        outputs: The output of each part, in a sequence or along a first axis.
        logsumexps: The log-sum-exp of each part, likewise; `-inf` where a query has no key in that part.
        output_dtype: float32, bfloat16 or float16; that of the outputs if None.

    Returns:
        The output, and its log-sum-exp. A query without keys in any part has output 0, log-sum-exp `-inf` and
        gradients of 0, whatever its outputs and cotangents hold.

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
    outputs, logsumexps = _parts("outputs", outputs), _parts("logsumexps", logsumexps)
    if not outputs or len(outputs) != len(logsumexps):
        raise ValueError(
            f"outputs and logsumexps must be as many, at least one, got {len(outputs)} and {len(logsumexps)}."
        )
    for output, logsumexp in zip(outputs, logsumexps, strict=True):
        _checks.floats("outputs", output)
        _checks.array("logsumexps", logsumexp, [jnp.dtype(jnp.float32)], "float32")
        for name, x, expected in (
            ("outputs", output, outputs[0].shape),
            ("logsumexps", logsumexp, outputs[0].shape[:-1]),
        ):
            if x.shape != expected:
                raise ValueError(f"{name} must have shape {expected} like the first of the outputs, got {x.shape}.")
    dtype = _checks.output_dtype(output_dtype, jnp.result_type(*outputs))
    output, logsumexp = merged(outputs, logsumexps, [1] * len(outputs), no_key=-jnp.inf)
    return output.astype(dtype), logsumexp


def merged(
    outputs: Sequence[jax.Array],
    logsumexps: Sequence[jax.Array],
    signs: Sequence[int],
    *,
    no_key: float,
    sink_logits: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As `merge_attention`, in float32.

    Args:
        outputs: float `[..., V]` each.
        logsumexps: float32 `[...]` each.
        signs: 1 for each part, or -1 where its sums are taken away; the parts that are added hold all of its pairs.
        no_key: The log-sum-exp that stands for no keys, given and returned.
        sink_logits: float32, of the shape of a log-sum-exp: what stands in the denominator for no key. It leaves
            queries without keys as they are.

    Returns:
        The output, and its log-sum-exp.
    """
    has_key = [logsumexp != no_key for logsumexp in logsumexps]
    known = [jnp.where(has, x, -jnp.inf) for has, x in zip(has_key, logsumexps, strict=True)]
    peak = known[0]
    for x in known[1:]:
        peak = jnp.maximum(peak, x)
    is_empty = peak == -jnp.inf
    if sink_logits is not None:
        peak = jnp.maximum(peak, sink_logits)
    peak = jax.lax.stop_gradient(jnp.where(is_empty, 0.0, peak))
    total = jnp.zeros_like(peak) if sink_logits is None else jnp.exp(sink_logits - peak)
    weighted = jnp.zeros(outputs[0].shape, jnp.float32)
    for output, logsumexp, has, sign in zip(outputs, logsumexps, has_key, signs, strict=True):
        # `where`, not a product: neither an output nor a cotangent of a part without keys may pass.
        weight = jnp.where(has, sign * jnp.exp(jnp.where(has, logsumexp, peak) - peak), 0.0)
        total = total + weight
        weighted = weighted + weight[..., None] * jnp.where(has[..., None], output.astype(jnp.float32), 0.0)
    total = jnp.where(is_empty, 1.0, total)
    output = jnp.where(is_empty[..., None], 0.0, weighted / total[..., None])
    return output, jnp.where(is_empty, no_key, peak + jnp.log(total))


def _parts(name: str, x: Sequence[jax.Array] | jax.Array) -> list[jax.Array]:
    if hasattr(x, "shape") and len(x.shape) == 0:
        raise ValueError(f"{name} must be a sequence of arrays or have an axis of parts, got a scalar.")
    return list(x)
