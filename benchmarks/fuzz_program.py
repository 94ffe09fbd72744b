"""What computes the random cases of `fuzz`, under any transformation, and what says whether the results are right."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import scfa_jax
from benchmarks import tolerance
from benchmarks.fuzz import NUM_SINKS, PROMISE, Case, Signature
from scfa_jax import BlockSizes, Tile, bucket_cache

Program: TypeAlias = Callable[[Case], tuple[jax.Array, ...]]

# Small and unequal, so that short sequences have several tiles and each kernel its own shape.
SMALL_TILES = BlockSizes(Tile(16, 32), Tile(32, 16), Tile(16, 16))


def program(signature: Signature) -> Program:
    """What computes cases of a signature: one compiled function, whose results are the first of `tolerance.NAMES`."""
    attend = _transformed(functools.partial(_attend, signature), signature)

    def results(pattern: dict[str, jax.Array], *arrays: jax.Array) -> tuple[jax.Array, ...]:
        if signature.transform == "forward" or signature.operator == "decode":
            return attend(pattern, *arrays[:3])
        return tolerance.results_and_gradients(functools.partial(attend, pattern), *arrays)

    compiled = jax.jit(results)

    def run(case: Case) -> tuple[jax.Array, ...]:
        pattern, arrays = case.pattern, case.with_junk()
        if signature.transform not in ("auto_mesh", "explicit_mesh"):
            return compiled(pattern, *arrays)
        mesh = _mesh(signature)
        put = lambda x: jax.device_put(x, NamedSharding(mesh, _spec(signature, x)))
        explicit = signature.transform == "explicit_mesh"
        with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
            return compiled(jax.tree.map(put, pattern), *map(put, arrays))

    return run


def check(signature: Signature, case: Case, results: Sequence[jax.Array]) -> list[str]:
    """What is wrong with the results of a case, by the rule of `tolerance`; empty if nothing is."""
    if not case.mask.size:
        query, key, value = case.arrays[:3]
        empty = np.full(query.shape[:3], -np.inf, np.float32)
        want = (*(x.astype(np.float32) * 0 for x in (query,)), empty, *(x * 0 for x in (query, key, value)))
        return [
            f"{name}: not what nothing gives"
            for name, x, y in zip(tolerance.NAMES, results, want, strict=False)
            if x.shape != y.shape or not np.array_equal(np.asarray(x, np.float32), y.astype(np.float32))
        ]
    query, key, value, *given = case.arrays
    dense = tolerance.dense_results(query, key, value, case.mask, *given, scale=signature.scale)
    kernels = jax.default_backend() == "gpu" and signature.implementation in ("default", "triton")
    has_dots = signature.operator != "decode"
    in_tf32_products = kernels and has_dots and signature.dtype == "float32" and signature.shape[-1] % 8 == 0
    return tolerance.problems(results, dense, signature.dtype, in_tf32_products=in_tf32_products)


def _attend(
    signature: Signature, pattern: dict[str, jax.Array], query: jax.Array, key: jax.Array, value: jax.Array
) -> Any:
    """Output and log-sum-exp by the operator; decoding has no log-sum-exp."""
    operators: Any = scfa_jax
    hashed: dict[str, Any] = {name: x for name, x in pattern.items() if name.endswith("segment_ids")}
    hashed |= {name: pattern[name] for name in ("query_offset", "window") if name in pattern}
    if signature.implementation != "default":
        hashed["implementation"] = signature.implementation
    blocks = SMALL_TILES if signature.tiles == "small" else None
    options: dict[str, Any] = {"scale": signature.scale, "block_sizes": blocks, "return_residual": True}
    common = {**hashed, **options}
    hashed["exclude_self"] = signature.exclude_self
    if signature.operator == "promised_hash":
        hashed["num_buckets"] = PROMISE
    qkv = query, key, value
    hashes = pattern.get("query_hash"), pattern.get("key_hash")
    match signature.operator:
        case "causal":
            return operators.causal_attention(*qkv, **common)
        case "keep":
            return operators.qk_sparse_attention(*qkv, pattern["query_keep"], pattern["key_keep"], **common)
        case "window":
            return operators.window_attention(*qkv, num_sinks=NUM_SINKS, **common)
        case "range":
            return operators.range_attention(*qkv, pattern["key_start"], pattern["key_stop"], **common)
        case "merged":
            attend = functools.partial(operators.qk_sparse_attention, *qkv, pattern["query_keep"], **common)
            first, keep = pattern["is_first"], pattern["key_keep"]
            parts = [attend(keep & part, output_dtype=jnp.float32) for part in (first, ~first)]
            return operators.merge_attention(*zip(*parts, strict=True), output_dtype=query.dtype)
        case "index":
            lengths = {"query_length": query.shape[1], "key_length": key.shape[1]}
            if "implementation" in common:
                options["implementation"] = common["implementation"]
            return operators.sparse_attention(*qkv, operators.hash_index(*hashes, **hashed, **lengths), **options)
        case "union":
            hashed.pop("exclude_self")
            masks = pattern["query_global"], pattern["key_global"]
            indices = operators.patterns.longformer(*masks, hashed.pop("window"), **hashed)
            if "implementation" in common:
                options["implementation"] = common["implementation"]
            return operators.union_attention(*qkv, indices, **options)
        case "decode":
            position = hashed.pop("query_offset")
            order = bucket_cache.order_of(pattern["key_hash"], position)
            hashed.setdefault("implementation", None)
            cached = pattern["query_hash"], pattern["key_hash"], order, position
            output, _ = bucket_cache.attend_from_one(*qkv, *cached, **hashed)
            return (output,)
        case _:
            return operators.hash_sparse_attention(*qkv, *hashes, **hashed, **options)


def _transformed(attend: Callable[..., Any], signature: Signature) -> Callable[..., Any]:
    """`(pattern, query, key, value)` to what `attend` gives, the same whatever the transformation."""
    whole = signature.shape[0]

    def in_parts(function: Callable[..., Any]) -> Callable[..., Any]:
        """Splits the batch into two parts on a new axis, where an array has it; `function` takes a part's arrays."""

        def run(pattern: dict[str, jax.Array], *arrays: jax.Array) -> tuple[jax.Array, ...]:
            named = {**pattern, **dict(zip("qkv", arrays, strict=True))}
            axes = {name: _batch_axis(x, whole) for name, x in named.items()}
            split = lambda x, axis: x.reshape(*x.shape[:axis], 2, whole // 2, *x.shape[axis + 1 :])
            parted = {name: split(x, axes[name]) for name, x in named.items() if axes[name] is not None}
            rest = {name: x for name, x in named.items() if axes[name] is None}
            joined = function(parted, rest, {name: axes[name] for name in parted})
            return tuple(x.reshape(whole, *x.shape[2:]) for x in joined)

        return run

    def call(named: dict[str, jax.Array]) -> Any:
        return attend({name: x for name, x in named.items() if name not in "qkv"}, *(named[name] for name in "qkv"))

    match signature.transform:
        case "vmap":
            return in_parts(lambda parted, rest, axes: jax.vmap(lambda x: call({**rest, **x}), (axes,))(parted))
        case "scan":

            def scan(parted, rest, axes):
                leading = {name: jnp.moveaxis(x, axes[name], 0) for name, x in parted.items()}
                return jax.lax.scan(lambda _, part: (None, call({**rest, **part})), None, leading)[1]

            return in_parts(scan)
        case "checkpoint":
            return jax.checkpoint(attend, policy=scfa_jax.remat.save_attention)
        case "shard_map":

            def on_devices(pattern, *arrays):
                specs = jax.tree.map(functools.partial(_spec, signature), (pattern, *arrays))
                rows = PartitionSpec("data", None, "model")
                return jax.shard_map(attend, mesh=_mesh(signature), in_specs=specs, out_specs=rows)(pattern, *arrays)

            return on_devices
        case _:
            return attend


def _mesh(signature: Signature) -> jax.sharding.Mesh:
    kind = AxisType.Explicit if signature.transform == "explicit_mesh" else AxisType.Auto
    devices = jax.devices()[: math.prod(signature.mesh)]
    return jax.make_mesh(signature.mesh, ("data", "model"), axis_types=(kind,) * 2, devices=devices)


def _batch_axis(x: jax.Array, batch: int) -> int | None:
    """The axis of the batch, if the array has one of its own for each."""
    axis = 1 if x.ndim == 4 and x.dtype == jnp.int32 else 0  # behind that of the rounds
    return axis if x.ndim and x.shape[axis] == batch else None


def _spec(signature: Signature, x: jax.Array) -> PartitionSpec:
    """Batch over `data`, heads over `model`, where the array has these axes."""
    batch_axis = _batch_axis(x, signature.shape[0])
    names: list[str | None] = [None] * x.ndim
    if batch_axis is not None:
        names[batch_axis] = "data"
    head_axis = (batch_axis or 0) + 2 if x.dtype != jnp.int32 or x.ndim < 4 else 3
    if x.ndim > head_axis and x.shape[head_axis] > 1:
        names[head_axis] = "model"
    return PartitionSpec(*names)
