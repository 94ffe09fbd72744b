"""What differs between JAX releases and platforms for the Triton backend of Pallas. Imported lazily."""

from __future__ import annotations

import importlib.util
from typing import Any

import jax

# XLA compiles Triton kernels for no GPU older than this one.
LEAST_COMPUTE_CAPABILITY = "8.0"


def missing(*, device: bool) -> str | None:
    """As `Backend.missing`."""
    return missing_in_jax() or (gpu_problem() if device or gpu() is not None else None)


def missing_in_jax() -> str | None:
    """Says what JAX lacks, for the interpreter too; None for nothing."""
    if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        return f"JAX {jax.__version__} has no Triton backend of Pallas"
    return None


def gpu_problem() -> str | None:
    """Why the kernels run on no GPU: neither on one that is here nor on an abstract one in context; None if they do."""
    device = gpu()
    if device is None or device.platform not in ("gpu", "cuda"):
        return "it needs an NVIDIA GPU, or an abstract one in context, and there is none"
    # An abstract GPU has no compute capability; one of AMD has a name in its place, as in "gfx942".
    capability = getattr(device, "compute_capability", LEAST_COMPUTE_CAPABILITY)
    major = capability.partition(".")[0]
    if major.isdecimal() and int(major) >= int(LEAST_COMPUTE_CAPABILITY.partition(".")[0]):
        return None
    return (
        f"it needs an NVIDIA GPU of compute capability {LEAST_COMPUTE_CAPABILITY} or later, "
        f"got {device.device_kind} ({capability})"
    )


def gpu_kind() -> str:
    """The name of the GPU that the kernels run on, or an empty one."""
    return gpu().device_kind if gpu_problem() is None else ""


def gpu() -> Any:
    """The GPU that code is compiled for, an abstract one in context first; None if there is none."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        return device
    try:
        return jax.devices("gpu")[0]
    except RuntimeError:
        return None


def triton_call(kernel, *, num_warps: int, num_stages: int, interpret: bool, out_shape, **options):
    """`pallas_call` on the Triton backend, or in the interpreter.

    Args:
        kernel: The kernel body.
        num_warps: Warps that work on one program.
        num_stages: Depth of the software pipeline of its loops.
        interpret: Whether to run the kernel as plain JAX.
        out_shape: Shapes and dtypes of the results.
        **options: Further ones of `pallas_call`.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    params = plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages)

    def call(*operands):
        # Inside of jax.shard_map the results vary over devices as the operands do, which are all alike.
        varying = jax.typeof(jax.tree.leaves(operands)[0]).mat
        typed = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying)
        shapes = jax.tree.map(typed, out_shape)
        return pl.pallas_call(kernel, interpret=interpret, compiler_params=params, out_shape=shapes, **options)(
            *operands
        )

    return call
