"""Cross-entropy of next tokens, without the logits of a long sequence ever existing at once."""

from __future__ import annotations

import functools
import math
import string

import jax
import jax.numpy as jnp

from scfa_jax._partitioning import SUMMED, WHOLE, split

# Logits that exist at once: 2**28 in float32 are 1 GiB, those of 4,096 tokens of a vocabulary of 50,304.
MAX_LOGITS = 2**28


def cross_entropy(
    features: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int | None = None
) -> jax.Array:
    """The weighted sum of `-log softmax(features @ table.T)[target]`, chunk by chunk.

    Where gradients are wanted, the forward pass makes them while a chunk's logits are there, so that these are computed
    once; the backward pass only scales them. Matrix products take the dtype of `features` and accumulate in float32,
    as does the table's gradient over the chunks; all between them is float32. The idea is that of Liger Kernel's fused
    linear cross-entropy (Hsu et al. 2024).

    Args:
        features: float `[..., D]`, what the model makes of the tokens so far.
        table: float `[V, D]`, the embeddings that score each token.
        targets: int `[...]` in `[0, V)`.
        weights: float32 `[...]`, of each target in the sum; no gradient reaches them.
        chunk: Tokens whose logits exist at once, on each device that has some of them; None for the power of two that
            keeps to `MAX_LOGITS`.

    Returns:
        float32 `[]`, nats.

    Raises:
        ValueError: The shapes do not fit, or `chunk` is below 1.
    """
    if features.shape[:-1] != targets.shape or weights.shape != targets.shape:
        raise ValueError(
            f"targets and weights must be {list(features.shape[:-1])} for features {list(features.shape)}, "
            f"got {list(targets.shape)} and {list(weights.shape)}."
        )
    if table.ndim != 2 or table.shape[1] != features.shape[-1]:
        raise ValueError(f"table must be [V, {features.shape[-1]}], got {list(table.shape)}.")
    if chunk is None:
        chunk = 1 << max(0, (MAX_LOGITS // table.shape[0]).bit_length() - 1)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}.")
    return _summed(chunk, features, table, targets.astype(jnp.int32), weights.astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(chunk: int, features: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """The sum; where the tokens are sharded, each device adds up its own in its own chunks."""

    def total(*arrays: jax.Array) -> tuple[jax.Array]:
        features, table, targets, weights = arrays
        table = table.astype(features.dtype)

        def add(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            return total + _chunk_loss(table, *chunk)[0], None

        return (jax.lax.scan(add, jnp.float32(0), _chunks(chunk, features, targets, weights))[0],)

    axes = _axes(targets)
    return split(total, _in_axes(axes), [SUMMED])(features, table, targets, weights)[0]


def _forward(
    chunk: int, features: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The sum, and its gradients by features and table."""
    axes = _axes(targets)
    run = split(
        functools.partial(_with_gradients, chunk), _in_axes(axes), [SUMMED, axes + WHOLE, WHOLE + WHOLE + SUMMED]
    )
    total, *gradients = run(features, table, targets, weights)
    return total, tuple(gradients)


def _with_gradients(
    chunk: int, features: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    table_dtype, table = table.dtype, table.astype(features.dtype)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def add(
        sums: tuple[jax.Array, jax.Array], chunk: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        total, by_table = sums
        features, targets, weights = chunk
        loss, logits, logsumexp = _chunk_loss(table, features, targets, weights)
        is_target = jnp.arange(table.shape[0], dtype=jnp.int32) == targets[:, None]
        by_logits = ((jnp.exp(logits - logsumexp[:, None]) - is_target) * weights[:, None]).astype(features.dtype)
        by_features = product("nv,vd->nd", by_logits, table).astype(features.dtype)
        return (total + loss, by_table + product("nv,nd->vd", by_logits, features)), by_features

    zeros = (jnp.float32(0), jnp.zeros(table.shape, jnp.float32))
    (total, by_table), by_chunks = jax.lax.scan(add, zeros, _chunks(chunk, features, targets, weights))
    by_features = by_chunks.reshape(-1, features.shape[-1])[: targets.size].reshape(features.shape)
    return total, by_features, by_table.astype(table_dtype)


def _backward(chunk: int, gradients: tuple[jax.Array, jax.Array], by_total: jax.Array) -> tuple[jax.Array | None, ...]:
    by_features, by_table = ((gradient * by_total).astype(gradient.dtype) for gradient in gradients)
    return by_features, by_table, None, None


_summed.defvjp(_forward, _backward)


def _axes(targets: jax.Array) -> str:
    """A letter for each axis of the tokens, for `split`."""
    return string.ascii_lowercase[: targets.ndim]


def _in_axes(axes: str) -> list[str]:
    """Those of features, table, targets and weights."""
    return [axes + WHOLE, WHOLE + WHOLE, axes, axes]


def _chunks(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Features `[..., D]`, targets and weights `[...]` in chunks of at most `chunk` tokens: `[C, N, ...]`."""
    tokens, lead = arrays[1].size, arrays[1].ndim
    chunks = max(1, math.ceil(tokens / chunk))
    padding = chunks * math.ceil(tokens / chunks) - tokens  # fewer than there are chunks, and of weight 0

    def cut(x: jax.Array) -> jax.Array:
        flat = x.reshape(tokens, *x.shape[lead:])
        flat = jnp.pad(flat, [(0, padding), *[(0, 0)] * (flat.ndim - 1)])
        return flat.reshape(chunks, (tokens + padding) // chunks, *x.shape[lead:])

    return tuple(map(cut, arrays))


def _chunk_loss(
    table: jax.Array, features: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The weighted loss of one chunk `[N, ...]`, its logits `[N, V]` and their log-sum-exp `[N]`, all float32."""
    logits = jnp.einsum("nd,vd->nv", features, table, preferred_element_type=jnp.float32)
    logsumexp = jax.nn.logsumexp(logits, axis=1)
    scores = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return jnp.sum((logsumexp - scores) * weights), logits, logsumexp
