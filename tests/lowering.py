"""What tests of lowering for CUDA share: kernels lower on a machine without a GPU, and are counted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh

H100 = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu"))


def lowered_for_cuda(function, *arguments) -> str:
    with jax.sharding.use_abstract_mesh(H100):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def gradients(case, implementation, **options):
    def loss(query, key, value, pattern):
        output, logsumexp = case.operator(
            query,
            key,
            value,
            *pattern,
            **case.options,
            implementation=implementation,
            return_residual=True,
            **options,
        )
        return jnp.sum(output.astype(jnp.float32)) + jnp.sum(logsumexp)

    return jax.grad(loss, (0, 1, 2)), (case.query, case.key, case.value, case.pattern)


def number_of_kernels(text: str) -> int:
    return text.count("custom_call @__gpu$xla.gpu.triton") + text.count("custom_call @triton_kernel_call_ffi")


ATTENTION = 3  # forward, dq, dk with dv
MARKS = 2  # which keys take part, in either pass
RANGES = 1  # where the ranges of queries begin and end, if the ids have no bound
BOUNDS = 3  # which tiles meet, for each of the three, if the ranges ascend
SORT = 2  # count and place, for each side of its own shape
