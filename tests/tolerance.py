"""The rule of `tools.tolerance` as an assertion."""

import jax
import jax.numpy as jnp
import numpy as np
from conftest import HAS_GPU

from tools import tolerance
from tools.tolerance import NAMES, dense_results, plain_attention, problems, results_and_gradients

__all__ = ["NAMES", "assert_as_exact_as_plain", "cotangents", "plain_attention", "results_and_gradients"]

rounded_terms = jax.jit(tolerance.rounded_terms, static_argnames="scale")


def cotangents(rng: np.random.Generator, query):
    """Random cotangents of the output and of the log-sum-exp."""
    normal = lambda shape: rng.normal(size=shape).astype(np.float32)
    return jnp.asarray(normal(query.shape).astype(query.dtype)), jnp.asarray(normal(query.shape[:3]))


def assert_as_exact_as_plain(results, query, key, value, mask, *, scale=None, in_kernels=True):
    """Asserts the rule for an operator's output, log-sum-exp and all gradients.

    Args:
        results: Function of query, key, value and two cotangents, as from `Case.compiled`.
        query: `[B, T, N, H]`.
        key: `[B, S, K, H]`.
        value: `[B, S, K, H]`.
        mask: bool `[B or 1, N or 1, T, S]`.
        scale: Factor of the scores.
        in_kernels: Whether kernels compute it, which on a GPU take float32 apart into TF32.
    """
    arrays = query, key, value
    given = cotangents(np.random.default_rng(1), query)
    dense = dense_results(*arrays, mask, *given, scale=scale)
    in_tf32_products = HAS_GPU and in_kernels and query.dtype == jnp.float32
    found = problems(results(*arrays, *given), dense, query.dtype, in_tf32_products=in_tf32_products)
    assert not found, "; ".join(found)
