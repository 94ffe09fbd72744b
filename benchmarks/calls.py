"""What is called: scfa_jax itself, the baseline, and peers where they are installed."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp

import scfa_jax
from benchmarks.cases import FORWARD, PASSES, Case
from benchmarks.inputs import Inputs

OURS = "scfa_jax"
Attend = Callable[..., jax.Array]


@dataclass(frozen=True)
class Call:
    """Something to measure.

    Attributes:
        name: Stands in the results.
        attend: `(query, key, value, *extra) -> output`.
        extra: Picks the further arguments from a set of inputs.
        passes: The passes that it can do.
    """

    name: str
    attend: Attend
    extra: Callable[[Inputs], tuple[Any, ...]] = lambda inputs: ()
    passes: tuple[str, ...] = PASSES

    def arguments(self, inputs: Inputs, which: str) -> tuple[Any, ...]:
        """The arguments of `function(which)`."""
        first = () if which == FORWARD else (inputs.cotangent,)
        return (*first, inputs.query, inputs.key, inputs.value, *self.extra(inputs))

    def function(self, which: str) -> Callable[..., Any]:
        """The function of a pass, to be jitted: forward, or forward and backward in one.

        Args:
            which: One of `PASSES`.

        Returns:
            `(query, key, value, *extra) -> output`, or
            `(cotangent, query, key, value, *extra) -> (output, dq, dk, dv)`.
        """
        return self.attend if which == FORWARD else functools.partial(_with_gradients, self.attend)


def ours(case: Case) -> Call:
    """The operator of scfa_jax that a case is about."""
    return Call(OURS, operator(case), lambda inputs: inputs.extra)


def baseline(case: Case) -> Call:
    """Dense causal attention as JAX has it: cuDNN's on a GPU, elsewhere plain `jax.numpy`."""
    if jax.default_backend() == "gpu":
        return Call("cudnn", _jax_nn("cudnn"))
    return Call("dense", _jax_nn("xla"))


def peers(case: Case) -> list[Call]:
    """The further peers of a case that are installed."""
    calls = []
    has_tokamax = importlib.util.find_spec("tokamax") is not None
    if "tokamax" in case.peers and has_tokamax:
        calls.append(Call("tokamax", _tokamax))
    if "tokamax_ranges" in case.peers and has_tokamax and case.pattern != "causal":
        calls.append(Call("tokamax_ranges", _tokamax_ranges, _ready_ranges, (FORWARD,)))
    if "pallas_mha" in case.peers and jax.default_backend() == "gpu":
        calls.append(Call("pallas_mha", _pallas_mha))
    return calls


def operator(case: Case) -> Attend:
    """The public operator, with its options."""
    chosen = {"implementation": case.implementation}
    if case.pattern == "hash":
        promise = int(case.parameter) if case.promise else None
        return functools.partial(_plain, scfa_jax.hash_sparse_attention, num_buckets=promise, **chosen)
    if case.pattern == "keep":
        return functools.partial(_plain, scfa_jax.qk_sparse_attention, **chosen)
    if case.pattern == "window":
        attend = functools.partial(_plain, scfa_jax.causal_attention, **chosen)
        return lambda query, key, value, window: attend(query, key, value, window=window)
    if case.pattern == "moba":
        sizes = {"block_size": int(case.parameter), "top_k": case.chosen + 1}
        return functools.partial(_plain, scfa_jax.moba_attention, **sizes, **chosen)
    if case.pattern == "blocks":
        attend = functools.partial(_plain, scfa_jax.sparse_attention, **chosen)
        return lambda query, key, value, blocks: attend(query, key, value, index(case)(blocks))
    return functools.partial(_plain, scfa_jax.causal_attention, **chosen)


def index(case: Case) -> Callable[..., scfa_jax.SparseIndex]:
    """The public index builder `(*extra) -> index`."""
    if case.pattern == "hash":
        promise = int(case.parameter) if case.promise else None
        build = functools.partial(scfa_jax.hash_index, num_buckets=promise)
        return cast(Callable[..., scfa_jax.SparseIndex], build)  # a list is for several rounds
    if case.pattern == "keep":
        return scfa_jax.keep_index
    if case.pattern == "window":
        return lambda window: scfa_jax.causal_index(case.length, case.length, window=window)
    if case.pattern in ("moba", "blocks"):
        return lambda blocks: scfa_jax.block_index(blocks, int(case.parameter))
    return lambda: scfa_jax.causal_index(case.length, case.length)


def _plain(function: Callable[..., Any], *args: Any, **options: Any) -> jax.Array:
    output = function(*args, **options)
    assert isinstance(output, jax.Array)
    return output


def _with_gradients(attend: Attend, cotangent, query, key, value, *extra):
    output, pull = jax.vjp(lambda *qkv: attend(*qkv, *extra), query, key, value)
    return output, *pull(cotangent)


def _jax_nn(implementation: Any) -> Attend:
    return functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation=implementation)


def _pallas_mha(query, key, value):
    from jax.experimental.pallas.ops.gpu import attention

    return attention.mha(query, key, value, None, sm_scale=query.shape[-1] ** -0.5, causal=True)


def _tokamax(query, key, value):
    import tokamax

    return tokamax.dot_product_attention(query, key, value, is_causal=True, implementation="triton")


def _tokamax_ranges(query, key, value, start, stop):
    from tokamax._src.ops.attention import base, pallas_triton

    mask = base.Mask(k_start=start, k_end=stop)
    return pallas_triton.PallasTritonFlashAttention()(query, key, value, mask=mask)


def _ready_ranges(inputs: Inputs) -> tuple[jax.Array, ...]:
    """Ranges as if queries and keys stood in order already: what a kernel alone costs, without a sort."""
    return tuple(jnp.asarray(x) for x in inputs.pattern.ranges())
