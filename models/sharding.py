"""How a model is cut over a mesh of devices with the axes "data", "fsdp" and "model".

The batch is cut over "data" and "fsdp"; heads, the perceptron's width and the vocabulary over "model"; parameters, and
what an optimizer keeps of each, over "fsdp" too, along the residual stream's width. The compiler derives the rest, and
gathers along "fsdp" what a layer needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "model")
BATCH = ("data", "fsdp")  # what the batch is cut over

# By the name of a module and of its parameter. Vectors of the residual stream's width, and all else, stay whole.
_SPECS: dict[tuple[Any, ...], P] = {
    ("embedding", "embedding"): P("model", "fsdp"),
    ("position", "embedding"): P(None, "fsdp"),
    ("query", "kernel"): P("fsdp", "model"),
    ("key", "kernel"): P("fsdp", "model"),
    ("value", "kernel"): P("fsdp", "model"),
    ("query", "bias"): P("model"),
    ("key", "bias"): P("model"),
    ("value", "bias"): P("model"),
    ("out", "kernel"): P("model", None, "fsdp"),
    ("expand", "kernel"): P("fsdp", "model"),
    ("expand", "bias"): P("model"),
    ("shrink", "kernel"): P("model", "fsdp"),
}


def parameter_spec(path: tuple[Any, ...], shape: tuple[int, ...], sizes: Mapping[str, int]) -> P:
    """How a parameter of `Transformer` is cut.

    Args:
        path: Keys of a tree that end with the parameter's, as `jax.tree_util` gives them; an optimizer's too.
        shape: Of the parameter.
        sizes: Of the mesh's axes, by name.

    Returns:
        A spec of axes whose sizes divide those of the array: a vocabulary that they do not divide stays whole.
    """
    names = tuple(getattr(key, "key", None) for key in path[-2:])
    spec = _SPECS.get(names, P())
    return P(*(name if name and size % sizes[name] == 0 else None for name, size in zip(spec, shape, strict=False)))


def cut(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Cuts an array over the mesh in context (`jax.set_mesh`); without one, or with another's axes, it stays as it is.

    Args:
        x: The array.
        axes: Names of mesh axes for its first axes; one that does not divide its axis leaves it whole.

    Returns:
        The array, constrained.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.axis_names != AXES:
        return x
    fitting = []
    for names, size in zip(axes, x.shape, strict=False):
        names = (names,) if isinstance(names, str) else names or ()
        count = 1
        for name in names:
            count *= mesh.shape[name]
        fitting.append(names if size % count == 0 else None)
    return jax.lax.with_sharding_constraint(x, P(*fitting))
