"""One call of attention over an index: its options are checked, an implementation chosen, the derivative defined."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from scfa_jax import _checks, partitioning, remat
from scfa_jax import block_sizes as defaults
from scfa_jax.kernels import _compat, tile, xla
from scfa_jax.sorting import Implementation, Precision
from scfa_jax.tiling import BlockSizes

IMPLEMENTATIONS = ("triton", "triton_interpret", "xla")


def attend(query, key, value, index, scale, implementation, precision, block_sizes, output_dtype, return_residual):
    """Does what `scfa_jax.sparse_attention` does, whose arguments it takes."""
    has_batch = getattr(query, "ndim", 4) == 4
    query, key, value = _checks.attention_arrays(query, key, value)
    _checks.index_fits(index, query.shape, key.shape)
    _checks.precision(precision)
    options = _Options(
        scale=_checks.scale(scale, query.shape[3]),
        implementation=choose(implementation, query.shape[3]),
        precision=precision,
        blocks=_fit_blocks(block_sizes, query, key),
        output_dtype=_checks.output_dtype(output_dtype, query.dtype),
    )
    if query.size == 0 or key.size == 0:
        output = jnp.zeros(query.shape, options.output_dtype)
        logsumexp = jnp.full(query.shape[:3], -jnp.inf, jnp.float32)
    else:
        query, key, value = partitioning.aligned((query, key, value), (_ROWS, _of_key(key), _of_key(key)))
        output, logsumexp = _attend(options, query, key, value, index)
    if not has_batch:
        output, logsumexp = output[0], logsumexp[0]
    return (output, logsumexp) if return_residual else output


@dataclass(frozen=True)
class _Options:
    """What is static in a call: one compilation for each."""

    scale: float
    implementation: str | None
    precision: Precision
    blocks: BlockSizes | None
    output_dtype: jnp.dtype


def choose(implementation: Implementation, head_dim: int) -> str | None:
    """The first implementation that can do it, or None to leave the choice to the platform."""
    if implementation is None:
        return None if _compat.has_triton() and _triton_problem(head_dim) is None else "xla"
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    if not names or any(name not in IMPLEMENTATIONS for name in names):
        raise ValueError(
            f"implementation must be one of {IMPLEMENTATIONS}, a sequence of them, or None, got {implementation!r}."
        )
    problems = []
    for name in names:
        problem = None if name == "xla" else _triton_problem(head_dim)
        if name == "triton" and problem is None:
            problem = _compat.gpu_problem()
        if problem is None:
            return name
        problems.append(f'implementation "{name}" cannot do this: {problem}')
    raise NotImplementedError("; ".join(problems) + '. "xla" runs anywhere.')


def _triton_problem(head_dim: int) -> str | None:
    if head_dim % 8 or not 16 <= head_dim <= 256:
        return f"the head size must be a multiple of 8 from 16 to 256, got {head_dim}"
    return None


def _fit_blocks(block_sizes, query, key) -> BlockSizes | None:
    if block_sizes is not None and not isinstance(block_sizes, BlockSizes):
        raise TypeError(f"block_sizes must be a scfa_jax.BlockSizes or None, got {block_sizes!r}.")
    return None if block_sizes is None else block_sizes.fit(query.shape[1], key.shape[1])


def _raise_on_second_derivative(*_):
    raise NotImplementedError(
        "scfa_jax attention can be differentiated once, in reverse mode; "
        "use the same function of scfa_jax.reference for forward mode and second derivatives."
    )


def _differentiated_no_further(function):
    """Makes derivatives of what already belongs to a derivative raise, the same on every implementation."""
    function = jax.custom_vjp(function, nondiff_argnums=(0,))
    function.defvjp(_raise_on_second_derivative, _raise_on_second_derivative)
    return function


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: _Options, query, key, value, index):
    output, logsumexp = _results(options, query, key, value, index)
    return output, logsumexp.swapaxes(1, 2)


def _attend_forward(options: _Options, query, key, value, index):
    output, logsumexp = _results(options, query, key, value, index)
    output = checkpoint_name(output, remat.OUTPUT)
    logsumexp = checkpoint_name(logsumexp, remat.LOGSUMEXP)
    return (output, logsumexp.swapaxes(1, 2)), (query, key, value, index, output, logsumexp)


def _attend_backward(options: _Options, residuals, cotangents):
    return (*_gradients(options, *residuals, *cotangents), None)


_attend.defvjp(_attend_forward, _attend_backward)


# Axes of batch and heads, along which devices share the work.
_ROWS, _VECTORS = "b.h.", "bh."


def _of_key(key: jax.Array) -> str:
    return _ROWS if key.shape[2] > 1 else "b..."


@_differentiated_no_further
def _results(options: _Options, query, key, value, index):
    run = functools.partial(by_platform, options, _forward)
    arrays = (_ROWS, _ROWS, _ROWS, _VECTORS)
    return partitioning.split(run, arrays, (_ROWS, _VECTORS))(query, key, value, index)


@_differentiated_no_further
def _gradients(options: _Options, query, key, value, index, output, logsumexp, output_gradient, logsumexp_gradient):
    gradients = (output_gradient.astype(query.dtype), logsumexp_gradient.swapaxes(1, 2))
    run = functools.partial(by_platform, options, _backward)
    arrays = (_ROWS, _ROWS, _ROWS, _VECTORS, _ROWS, _VECTORS, _ROWS, _VECTORS)
    of_key = _of_key(key) + partitioning.SUMMED
    return partitioning.split(run, arrays, (_ROWS, of_key, of_key))(
        query, key, value, index, output, logsumexp, *gradients
    )


@functools.partial(jax.jit, static_argnums=(0, 1))  # else each call outside of jit compiles its loops again
def by_platform(options, run, *arrays):
    """Calls `run(options.implementation, options, *arrays)`; for None the platform that it is lowered for decides."""
    if options.implementation is not None:
        return run(options.implementation, options, *arrays)
    return jax.lax.platform_dependent(
        *arrays,
        cuda=functools.partial(run, "triton", options),
        default=functools.partial(run, "xla", options),
    )


def _forward(implementation: str, options: _Options, query, key, value, index):
    blocks = _blocks_for(implementation, options, query, key, index)
    dot = tile.dot_for(query.dtype, options.precision, in_triton=implementation == "triton")
    common: dict[str, Any] = {
        "scale": options.scale,
        "block": blocks.forward,
        "output_dtype": options.output_dtype,
        "dot": dot,
    }
    if implementation == "xla":
        return xla.forward(query, key, value, index, **common)
    from scfa_jax.kernels import triton_forward  # here, so that a JAX without the backend can import the rest

    return triton_forward.forward(query, key, value, index, **common, interpret=implementation == "triton_interpret")


def _backward(implementation: str, options: _Options, query, key, value, index, *rest):
    blocks = _blocks_for(implementation, options, query, key, index)
    dot = tile.dot_for(query.dtype, options.precision, in_triton=implementation == "triton")
    arrays = (query, key, value, index, *rest)
    if implementation == "xla":
        return xla.backward(*arrays, scale=options.scale, block=blocks.dq, dot=dot)
    from scfa_jax.kernels import triton_backward

    return triton_backward.backward(
        *arrays, scale=options.scale, blocks=blocks, dot=dot, interpret=implementation == "triton_interpret"
    )


def _blocks_for(implementation: str, options: _Options, query, key, index) -> BlockSizes:
    if options.blocks is not None:
        return options.blocks
    if implementation == "xla":
        blocks = defaults.xla_block_sizes()
    else:
        blocks = defaults.triton_block_sizes(query.shape[3], query.dtype, index.density, _compat.gpu_kind())
    return blocks.fit(query.shape[1], key.shape[1])
