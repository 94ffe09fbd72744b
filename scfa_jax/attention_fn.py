"""Factories of `attention_fn`s for the multi-head attention modules that Flax itself has, linen or NNX."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from scfa_jax.attention import causal_attention, qk_sparse_attention
from scfa_jax.sparsity import Hash, Implementation, attend


def causal_attention_fn(
    *, segment_ids: jax.Array | None = None, implementation: Implementation = None
) -> Callable[..., jax.Array]:
    """Makes dense causal attention an `attention_fn` of Flax's multi-head attention (linen and nnx).

    Causality is built in, so pass no mask; `is_causal` may be either. A mask, bias or active dropout, Flax's
    `decode=True` (it makes a mask), `input_positions`, `sow_weights` and custom einsums can't be honoured and
    raise. The softmax is always computed in float32, products at least as precisely as any `precision`.

    Args:
        segment_ids: int32 `[..., T]` for self-attention: it stays among equal ids, and rows with an id below 0
            (padding) take no part; None for one segment.
        implementation: As in `scfa_jax.causal_attention`.

    Returns:
        A function of `query [..., T, N, H]`, `key`, `value [..., S, K, H]` and the keywords that Flax passes.

    Raises:
        ValueError: `segment_ids` has no axis.
    """
    segment_ids = _one_segment_axis(segment_ids)
    return _for_flax(
        lambda query, key, value: causal_attention(
            query, key, value, query_segment_ids=segment_ids, implementation=implementation
        )
    )


def hash_attention_fn(
    rotations: jax.Array,
    *,
    exclude_self: bool = True,
    segment_ids: jax.Array | None = None,
    implementation: Implementation = None,
) -> Callable[..., jax.Array]:
    """Makes Hash-sparse attention an `attention_fn` of Flax's multi-head attention (linen and nnx).

    Queries and keys, which Flax projects separately, are hashed with the same rotations. For the shared and
    normalised ones of the paper use `CausalSelfAttention`. What raises is as in `causal_attention_fn`.

    Args:
        rotations: float `[K, H, num_buckets // 2]`, from `scfa_jax.random_rotations`; fixed as long as the
            returned function is used.
        exclude_self: Whether a token may not attend to itself.
        segment_ids: As in `causal_attention_fn`.
        implementation: As in `scfa_jax.hash_sparse_attention`.

    Returns:
        A function of `query [..., T, N, H]`, `key`, `value [..., S, K, H]` and the keywords that Flax passes.

    Raises:
        ValueError: `rotations` does not have three axes, or `segment_ids` has none.
    """
    if rotations.ndim != 3:
        raise ValueError(f"rotations must be [K, H, num_buckets // 2], got {rotations.shape}.")
    sparsity, segment_ids = Hash(2 * rotations.shape[2], exclude_self), _one_segment_axis(segment_ids)
    return _for_flax(
        lambda query, key, value: attend(
            query,
            key,
            value,
            sparsity,
            rotations=rotations,
            segment_ids=segment_ids,
            implementation=implementation,
        )
    )


def qk_attention_fn(
    query_keep: jax.Array,
    key_keep: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    implementation: Implementation = None,
) -> Callable[..., jax.Array]:
    """Makes QK-sparse attention an `attention_fn` of Flax's multi-head attention (linen and nnx).

    What raises is as in `causal_attention_fn`.

    Args:
        query_keep: bool `[..., T, N]`, True where a query takes part.
        key_keep: bool `[..., S, K]`, True where a key takes part.
        segment_ids: As in `causal_attention_fn`.
        implementation: As in `scfa_jax.qk_sparse_attention`.

    Returns:
        A function of `query [..., T, N, H]`, `key`, `value [..., S, K, H]` and the keywords that Flax passes.

    Raises:
        ValueError: A mask has fewer than two axes, or `segment_ids` has none.
    """
    for name, keep in (("query_keep", query_keep), ("key_keep", key_keep)):
        if keep.ndim < 2:
            raise ValueError(f"{name} must be [..., length, heads], got {keep.shape}.")
    query_keep, key_keep = (_one_batch_axis(x, 2) for x in (query_keep, key_keep))
    segment_ids = _one_segment_axis(segment_ids)
    return _for_flax(
        lambda query, key, value: qk_sparse_attention(
            query,
            key,
            value,
            query_keep,
            key_keep,
            query_segment_ids=segment_ids,
            implementation=implementation,
        )
    )


def _for_flax(attend_fn: Callable[..., Any]) -> Callable[..., jax.Array]:
    """Gives `attend_fn(query, key, value)` the keywords that Flax passes, and refuses what it can't honour.

    Every keyword is named: linen passes only those of the signature, so with a bare `**kwargs` a mask would
    be lost without a word.
    """

    def attention_fn(
        query,
        key,
        value,
        bias=None,
        mask=None,
        broadcast_dropout=True,
        dropout_rng=None,
        dropout_rate=0.0,
        deterministic=False,
        dtype=None,
        precision=None,
        module=None,
        is_causal=True,
        force_fp32_for_softmax=True,
        qk_attn_weights_einsum=None,
        attn_weights_value_einsum=None,
        input_positions=None,
    ):
        """Attends as the factory's docstring says."""
        del broadcast_dropout, dropout_rng  # without active dropout they change nothing
        del is_causal, force_fp32_for_softmax  # always on
        ours = "scfa_jax.nnx.CausalSelfAttention or scfa_jax.linen.CausalSelfAttention"
        refused = {
            "mask": (mask, f"causality is built in; for decode=True, which makes a mask, see {ours}"),
            "bias": (bias, "the scores are never stored"),
            "module": (module, "sow_weights=True asks for attention weights, which are never stored"),
            "qk_attn_weights_einsum": (qk_attn_weights_einsum, "the kernels have their own products"),
            "attn_weights_value_einsum": (attn_weights_value_einsum, "the kernels have their own products"),
            "input_positions": (
                input_positions,
                f"nothing here depends on it; for rotary positions see {ours}",
            ),
        }
        for name, (given, why) in refused.items():
            if given is not None:
                raise NotImplementedError(f"{name} must be None: {why}; got {type(given).__name__}.")
        if dropout_rate > 0 and not deterministic:
            raise NotImplementedError(
                f"dropout_rate must be 0 unless deterministic=True: attention weights are never stored; "
                f"got {dropout_rate}."
            )
        _check_precision(precision)
        dtype = jnp.result_type(query, key, value) if dtype is None else dtype
        leading = query.shape[:-3]
        query, key, value = (_one_batch_axis(x.astype(dtype), 3) for x in (query, key, value))
        output = attend_fn(query, key, value)
        return output.reshape(*leading, *output.shape[1:])

    return attention_fn


def _check_precision(precision: Any) -> None:
    """Lets pass what float32 accuracy satisfies: any `jax.lax.Precision`, its name, or a pair of them."""
    for one in precision if isinstance(precision, tuple | list) else (precision,):
        try:
            jax.lax.Precision(one)
        except ValueError:
            raise NotImplementedError(
                f"precision must be None or a jax.lax.Precision, algorithms can't be chosen; got {one!r}."
            ) from None


def _one_batch_axis(x: jax.Array, inner: int) -> jax.Array:
    """Folds the axes before the last `inner` into one."""
    return x.reshape(math.prod(x.shape[:-inner]), *x.shape[-inner:])


def _one_segment_axis(segment_ids: jax.Array | None) -> jax.Array | None:
    if segment_ids is None:
        return None
    if segment_ids.ndim < 1:
        raise ValueError(f"segment_ids must be [..., length], got {segment_ids.shape}.")
    return _one_batch_axis(segment_ids, 1)
