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
from scfa_jax import BlockSizes, SparseIndex, TileShape
from scfa_jax.layers import bucket_order
from tools import tolerance
from tools.fuzz import (
    BLOCK_SIZES,
    LOCAL_WINDOW,
    NUM_CHOSEN,
    NUM_LOCAL,
    NUM_SINKS,
    NUM_SUMMARIES,
    PROMISE,
    STRIDE,
    Case,
    Signature,
)

Arrays: TypeAlias = dict[str, Any]  # by the names that the operators give them
Program: TypeAlias = Callable[[Case], tuple[jax.Array, ...]]

# Small and unequal, so that short sequences have several tiles and each kernel its own shape.
SMALL_TILES = BlockSizes(TileShape(16, 32), TileShape(32, 16), TileShape(16, 16))


def program(signature: Signature) -> Program:
    """What computes cases of a signature: one compiled function, whose results are in the order of `tolerance`."""
    attend = _transformed(functools.partial(_attend, signature), signature)

    @jax.jit
    def results(inputs: Arrays, output_cotangent: jax.Array, logsumexp_cotangent: jax.Array) -> tuple[jax.Array, ...]:
        if signature.transform == "forward" or signature.operator == "decode":
            return attend(inputs)
        names = ("query", "key", "value", "sink_logits")
        of = lambda *arrays: attend({**inputs, **dict(zip(names, arrays, strict=False))})
        given = output_cotangent, logsumexp_cotangent, inputs.get("sink_logits")
        return tolerance.results_and_gradients(of, inputs["query"], inputs["key"], inputs["value"], *given)

    def run(case: Case) -> tuple[jax.Array, ...]:
        query, key, value, *cotangents = case.with_junk()
        inputs = {**case.pattern, "query": query, "key": key, "value": value}
        if case.sink_logits is not None:
            inputs["sink_logits"] = case.sink_logits
        if signature.transform not in ("auto_mesh", "explicit_mesh"):
            return results(inputs, *cotangents)
        mesh = _mesh(signature)
        put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
        inputs = {name: put(x, _spec(signature, name, x)) for name, x in inputs.items()}
        explicit = signature.transform == "explicit_mesh"
        with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
            return results(inputs, *(put(x, _spec(signature, "cotangent", x)) for x in cotangents))

    return run


def check(signature: Signature, case: Case, results: Sequence[jax.Array]) -> list[str]:
    """What is wrong with the results of a case, by the rule of `tolerance`; empty if nothing is."""
    query, key, value, *given = case.arrays
    if not case.mask.size:
        nothing = [np.zeros((*query.shape[:3], value.shape[3])), np.full(query.shape[:3], -np.inf)]
        nothing += [np.zeros(x.shape) for x in (query, key, value, case.sink_logits) if x is not None]
        return [
            f"{name}: not what nothing gives"
            for name, x, y in zip((*tolerance.NAMES, tolerance.SINKS), results, nothing, strict=False)
            if x.shape != y.shape or not np.array_equal(np.asarray(x, np.float32), y)
        ]
    options = {"scale": signature.scale, "logits_soft_cap": signature.logits_soft_cap}
    dense = tolerance.dense_results(query, key, value, case.mask, *given, sink_logits=case.sink_logits, **options)
    kernels = jax.default_backend() == "gpu" and signature.implementation in ("default", "triton")
    has_dots = signature.operator != "decode" and all(size % 8 == 0 for size in signature.shape[-2:])
    in_tf32_products = kernels and has_dots and signature.dtype == "float32"
    return tolerance.problems(results, dense, signature.dtype, in_tf32_products=in_tf32_products)


def indices(signature: Signature, named: Arrays) -> SparseIndex | list[SparseIndex]:
    """What the operator of a signature, one of those for it, gives to `scfa_jax.sparse_attention`."""
    operators: Any = scfa_jax
    _, query_length, key_length, *_ = signature.shape
    segments, positions = _segments(signature, named), _positions(signature, named)
    hashes = named.get("query_hash"), named.get("key_hash")
    exclude_self = {"exclude_self": signature.exclude_self}
    match signature.operator:
        case "longformer":
            masks = named["query_global"], named["key_global"]
            return operators.patterns.longformer_index(*masks, named["window"], **positions)
        case "strided":
            return operators.patterns.strided_index(query_length, key_length, STRIDE, **positions)
        case "fixed":
            return operators.patterns.fixed_index(query_length, key_length, STRIDE, NUM_SUMMARIES, **positions)
        case "local_hash":
            return operators.local_hash_index(*hashes, LOCAL_WINDOW, **exclude_self, **positions)
    window = {name: x for name, x in named.items() if name == "window"}
    lengths = {"query_length": query_length, "key_length": key_length}
    if signature.operator == "blocks":
        sizes = {"block_size": BLOCK_SIZES["blocks"], "num_local": NUM_LOCAL}
        return operators.block_index(named["blocks"], **sizes, **lengths, **positions)
    hashed = operators.hash_index(*hashes, **exclude_self, **window, **lengths, **positions)
    if signature.operator == "index":
        return hashed
    ranges = operators.range_index(named["key_start"], named["key_stop"], **lengths, **segments)
    kept = operators.keep_index(named["query_keep"], named["key_keep"], **window, **lengths, **positions)
    return [ranges, kept, *hashed]


def _attend(signature: Signature, named: Arrays) -> Any:
    """Output and log-sum-exp by the operator; decoding has no log-sum-exp."""
    operators: Any = scfa_jax
    qkv = named["query"], named["key"], named["value"]
    hashes = named.get("query_hash"), named.get("key_hash")
    logits = {"logits_soft_cap": signature.logits_soft_cap, "sink_logits": named.get("sink_logits")}
    blocks = SMALL_TILES if signature.tiles == "small" else None
    attention = {**logits, "scale": signature.scale, "block_sizes": blocks, "return_residual": True}
    everything = {**_positions(signature, named), **attention}
    if "window" in named:
        everything["window"] = named["window"]
    match signature.operator:
        case "causal":
            return operators.causal_attention(*qkv, **everything)
        case "keep":
            return operators.qk_sparse_attention(*qkv, named["query_keep"], named["key_keep"], **everything)
        case "window":
            return operators.window_attention(*qkv, num_sinks=NUM_SINKS, **everything)
        case "range":
            segments = _segments(signature, named)
            return operators.range_attention(*qkv, named["key_start"], named["key_stop"], **segments, **attention)
        case "moba":
            sizes = {"block_size": BLOCK_SIZES["moba"], "top_k": 1 + NUM_CHOSEN, "num_local": NUM_LOCAL}
            return operators.moba_attention(*qkv, **sizes, **everything)
        case "merged":
            attend = functools.partial(operators.qk_sparse_attention, *qkv, named["query_keep"], **everything)
            first, keep = named["is_first"], named["key_keep"]
            parts = [attend(keep & part, output_dtype=jnp.float32) for part in (first, ~first)]
            return operators.merge_attention(*zip(*parts, strict=True), output_dtype=named["query"].dtype)
        case "decode":
            key_hash, position = named["key_hash"], named["query_offset"]
            order = bucket_order.order_of(key_hash, position)
            options = {**logits, **_implementation(signature), "exclude_self": signature.exclude_self}
            output, _ = bucket_order.attend_from_one(*qkv, named["query_hash"], key_hash, order, position, **options)
            return (output,)
        case "hash" | "promised_hash" | "shared_hash" | "rounds":
            promise = PROMISE if signature.operator == "promised_hash" else None
            options = {"num_buckets": promise, "exclude_self": signature.exclude_self}
            return operators.hash_sparse_attention(*qkv, *hashes, **options, **everything)
        case _:
            index = indices(signature, named)
            return operators.sparse_attention(*qkv, index, **attention, **_implementation(signature))


def _implementation(signature: Signature) -> Arrays:
    return {} if signature.implementation == "default" else {"implementation": signature.implementation}


def _segments(signature: Signature, named: Arrays) -> Arrays:
    """Those options of an index that are not about positions."""
    segments = {name: x for name, x in named.items() if name.endswith("segment_ids")}
    return {**segments, **_implementation(signature)}


def _positions(signature: Signature, named: Arrays) -> Arrays:
    """The options of an index."""
    _, query_length, key_length, *_ = signature.shape
    options = _segments(signature, named)
    if "query_offset" in named:
        options["query_offset"] = named["query_offset"]
    elif signature.offset == "static" or query_length != key_length:
        options["query_offset"] = signature.static_offset
    return options


def _transformed(attend: Callable[[Arrays], Any], signature: Signature) -> Callable[[Arrays], Any]:
    """What gives the same as `attend`, whatever the transformation."""
    whole = signature.shape[0]

    def in_parts(function: Callable[..., Any]) -> Callable[..., Any]:
        """Splits the batch into two parts on a new axis, where an array has it; `function` takes a part's arrays."""

        def run(named: Arrays) -> tuple[jax.Array, ...]:
            axes = {name: _batch_axis(name, x, whole) for name, x in named.items()}
            split = lambda x, axis: x.reshape(*x.shape[:axis], 2, whole // 2, *x.shape[axis + 1 :])
            parted = {name: split(x, axes[name]) for name, x in named.items() if axes[name] is not None}
            rest = {name: x for name, x in named.items() if axes[name] is None}
            joined = function(parted, rest, {name: axes[name] for name in parted})
            return tuple(x.reshape(whole, *x.shape[2:]) for x in joined)

        return run

    match signature.transform:
        case "vmap":
            return in_parts(lambda parted, rest, axes: jax.vmap(lambda x: attend({**rest, **x}), (axes,))(parted))
        case "scan":

            def scan(parted, rest, axes):
                leading = {name: jnp.moveaxis(x, axes[name], 0) for name, x in parted.items()}
                return jax.lax.scan(lambda _, part: (None, attend({**rest, **part})), None, leading)[1]

            return in_parts(scan)
        case "checkpoint":
            return jax.checkpoint(attend, policy=scfa_jax.remat.save_attention)
        case "shard_map":

            def on_devices(named):
                specs = {name: _spec(signature, name, x) for name, x in named.items()}
                rows = PartitionSpec("data", None, "model")
                return jax.shard_map(attend, mesh=_mesh(signature), in_specs=(specs,), out_specs=rows)(named)

            return on_devices
        case _:
            return attend


def _mesh(signature: Signature) -> jax.sharding.Mesh:
    kind = AxisType.Explicit if signature.transform == "explicit_mesh" else AxisType.Auto
    devices = jax.devices()[: math.prod(signature.mesh)]
    return jax.make_mesh(signature.mesh, ("data", "model"), axis_types=(kind,) * 2, devices=devices)


def _first_axis(name: str, x: jax.Array | np.ndarray) -> int:
    """The axis of the batch, if there is one: behind that of the rounds of a hash."""
    return 1 if x.ndim == 4 and name in ("query_hash", "key_hash") else 0


def _batch_axis(name: str, x: jax.Array | np.ndarray, batch: int) -> int | None:
    """The axis of the batch, if the array has one of its own for each."""
    axis = _first_axis(name, x)
    return axis if name != "sink_logits" and x.ndim and x.shape[axis] == batch else None


def _spec(signature: Signature, name: str, x: jax.Array | np.ndarray) -> PartitionSpec:
    """Batch over `data`, heads over `model`, where the array has these axes."""
    names: list[str | None] = [None] * x.ndim
    batch_axis = _batch_axis(name, x, signature.shape[0])
    if batch_axis is not None:
        names[batch_axis] = "data"
    head_axis = 0 if name == "sink_logits" else _first_axis(name, x) + 2
    if x.ndim > head_axis and x.shape[head_axis] > 1:
        names[head_axis] = "model"
    return PartitionSpec(*names)
