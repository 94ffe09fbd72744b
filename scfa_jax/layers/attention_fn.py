"""Factories of `attention_fn`s for the multi-head attention modules that Flax itself has, linen or NNX."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from scfa_jax.attention import causal_attention, hash_sparse_attention, qk_sparse_attention
from scfa_jax.backends import Implementation
from scfa_jax.hashing import lsh_hash

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int


def causal_attention_fn(
    *, segment_ids: Int[Array, "*B T"] | None = None, implementation: Implementation = None
) -> Callable[..., jax.Array]:
    """Makes dense causal attention an `attention_fn` of Flax's multi-head attention (linen and nnx).

    Causality is built in, and `is_causal` may be either. `mask` may hold segment ids, int32 `[..., T]`, which come with
    the call: `layer(x, mask=segment_ids)`. The function refuses what it cannot do: cross-attention, boolean masks, a
    bias or active dropout, Flax's `decode=True` (it makes a mask), `input_positions`, `sow_weights` and custom einsums.
    The softmax is always computed in float32, and products at least as precisely as any `precision`.

    Args:
        segment_ids: int32: attention stays among equal ids, and rows with an id below 0 (padding) take no part; None
            for those of the call's `mask`, or for one segment.
        implementation: What computes: "triton", "triton_interpret", "xla", a sequence of these to try in order, or None
            to choose by the platform that the code is compiled for.

    Returns:
        A function of `query [..., T, N, H]`, `key`, `value [..., T, K, H]` and the keywords that Flax passes.

    Raises:
        ValueError: `segment_ids` has no axis.

    Examples:
        >>> import jax
        >>> from flax import nnx
        >>> from scfa_jax.nnx import causal_attention_fn
        >>> layer = nnx.MultiHeadAttention(2, 32, attention_fn=causal_attention_fn(), decode=False, rngs=nnx.Rngs(0))
        >>> layer(jax.numpy.ones((1, 64, 32))).shape
        (1, 64, 32)
    """
    return _for_flax(causal_attention, segment_ids, implementation)


def hash_attention_fn(
    rotations: Float[Array, "K H R"],
    *,
    exclude_self: bool = False,
    segment_ids: Int[Array, "*B T"] | None = None,
    implementation: Implementation = None,
) -> Callable[..., jax.Array]:
    """Makes Hash-sparse attention an `attention_fn` of Flax's multi-head attention (linen and nnx).

    Queries and keys, which Flax projects separately, are hashed with the same rotations. For the shared and
    normalised ones of the paper use `CausalSelfAttention`. `causal_attention_fn` says what is refused, and how segment
    ids may come with a call.

    Args:
        rotations: From `scfa_jax.random_rotations`; fixed as long as the returned function is used.
        exclude_self: Whether a token may not attend to itself. The first token of each bucket then attends to nothing.
        segment_ids: int32: attention stays among equal ids, and rows with an id below 0 (padding) take no part; None
            for those of the call's `mask`, or for one segment.
        implementation: What computes: "triton", "triton_interpret", "xla", a sequence of these to try in order, or None
            to choose by the platform that the code is compiled for.

    Returns:
        A function of `query [..., T, N, H]`, `key`, `value [..., T, K, H]` and the keywords that Flax passes.

    Raises:
        ValueError: `rotations` does not have three axes, or `segment_ids` has none.
    """
    if rotations.ndim != 3:
        raise ValueError(f"rotations must be [K, H, num_buckets // 2], got {rotations.shape}.")

    def attend(query, key, value, **options):
        expected = key.shape[2:]
        if rotations.shape[:2] != expected:
            raise ValueError(
                f"rotations must be [K, H, num_buckets // 2] with K, H = {expected}, got {rotations.shape}."
            )
        query_hash = lsh_hash(query, jnp.repeat(rotations, query.shape[2] // key.shape[2], axis=0))
        options |= {"exclude_self": exclude_self, "num_buckets": 2 * rotations.shape[2]}
        return hash_sparse_attention(query, key, value, query_hash, lsh_hash(key, rotations), **options)

    return _for_flax(attend, segment_ids, implementation)


def qk_attention_fn(
    query_keep: Bool[Array, "*B T N"],
    key_keep: Bool[Array, "*B T K"],
    *,
    segment_ids: Int[Array, "*#B T"] | None = None,
    implementation: Implementation = None,
) -> Callable[..., jax.Array]:
    """Makes QK-sparse attention an `attention_fn` of Flax's multi-head attention (linen and nnx).

    `causal_attention_fn` says what is refused, and how segment ids may come with a call.

    Args:
        query_keep: True where a query takes part.
        key_keep: True where a key takes part.
        segment_ids: int32: attention stays among equal ids, and rows with an id below 0 (padding) take no part; None
            for those of the call's `mask`, or for one segment.
        implementation: What computes: "triton", "triton_interpret", "xla", a sequence of these to try in order, or None
            to choose by the platform that the code is compiled for.

    Returns:
        A function of `query [..., T, N, H]`, `key`, `value [..., T, K, H]` and the keywords that Flax passes.

    Raises:
        ValueError: A mask has fewer than two axes, or `segment_ids` has none.
    """
    for name, keep in (("query_keep", query_keep), ("key_keep", key_keep)):
        if keep.ndim < 2:
            raise ValueError(f"{name} must be [..., length, heads], got {keep.shape}.")
    masks = _one_batch_axis(query_keep, 2), _one_batch_axis(key_keep, 2)
    return _for_flax(
        lambda query, key, value, **options: qk_sparse_attention(query, key, value, *masks, **options),
        segment_ids,
        implementation,
    )


def _for_flax(
    attend: Callable[..., Any], segment_ids: jax.Array | None, implementation: Implementation
) -> Callable[..., jax.Array]:
    """Gives `attend(query, key, value, **options)` the keywords that Flax passes, and refuses what it can't honour.

    Every keyword is named: linen passes only those of the signature, so with a bare `**kwargs` a mask would
    be lost without a word.
    """
    if segment_ids is not None and segment_ids.ndim < 1:
        raise ValueError(f"segment_ids must be [..., length], got {segment_ids.shape}.")

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
        ids = segment_ids if mask is None else _ids_of(mask, query, segment_ids)
        ours = "scfa_jax.nnx.CausalSelfAttention or scfa_jax.linen.CausalSelfAttention"
        refused = {
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
        if query.shape[-3] != key.shape[-3]:
            raise NotImplementedError(
                f"query and key must be as long: this is causal self-attention, got {query.shape[-3]} and "
                f"{key.shape[-3]} rows. For cross-attention use Flax's own function."
            )
        if dropout_rate > 0 and not deterministic:
            raise NotImplementedError(
                f"dropout_rate must be 0 unless deterministic=True: attention weights are never stored; "
                f"got {dropout_rate}."
            )
        _check_precision(precision)
        dtype = jnp.result_type(query, key, value) if dtype is None else dtype
        leading = query.shape[:-3]
        query, key, value = (_one_batch_axis(x.astype(dtype), 3) for x in (query, key, value))
        ids = None if ids is None else _one_batch_axis(ids, 1)
        output = attend(query, key, value, query_segment_ids=ids, implementation=implementation)
        return output.reshape(*leading, *output.shape[1:])

    return attention_fn


def _ids_of(mask: Any, query: Any, segment_ids: jax.Array | None) -> jax.Array:
    """The segment ids that come with a call in place of a mask."""
    ours = "scfa_jax.nnx.CausalSelfAttention or scfa_jax.linen.CausalSelfAttention"
    if getattr(mask, "dtype", None) != jnp.int32:
        raise NotImplementedError(
            f"mask must be None or segment ids, int32 [..., T]: causality is built in; for decode=True, which makes a "
            f"mask, see {ours}; got {getattr(mask, 'dtype', type(mask).__name__)}."
        )
    if segment_ids is not None:
        raise ValueError("mask must be None where segment_ids were given when the attention_fn was made.")
    if mask.shape not in (query.shape[:-2], query.shape[-3:-2]):
        raise ValueError(f"mask must be segment ids of shape {query.shape[:-2]}, got {mask.shape}.")
    return mask


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
