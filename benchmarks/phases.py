"""What each phase of a call costs: hashing, the index, tile bounds, forward, backward, and the kernels by name.

All that the benchmarks know of the library's inside is in this file. Phases that a release does not have, or names
otherwise, are recorded with the error.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import scfa_jax
from benchmarks import calls, measure, profile, timing
from benchmarks.cases import FORWARD, FORWARD_BACKWARD, Case
from benchmarks.inputs import Inputs, make_inputs

# Parts of the names of the attention kernels: everything else that runs is overhead.
KERNELS = {"forward": "scfa_forward", "dq": "scfa_dq", "dkv": "scfa_dkv", "backward": "scfa_backward"}

Phase = tuple[str, str, Callable[..., Any], list[tuple[Any, ...]]]


def measure_phases(case: Case, *, repeats: int, with_profile: bool, tell: Callable[[str], None]) -> dict[str, Any]:
    """Times the phases of a case one by one.

    Args:
        case: The case.
        repeats: Samples of each phase.
        with_profile: Whether to list the kernels of the whole calls too.
        tell: Where lines of text go.

    Returns:
        The row: `phases` has a time or an error for each, in order; differences are marked as such.
    """
    start = time.perf_counter()
    row: dict[str, Any] = {"name": case.name, "case": case.as_json(), "status": "ok", "passes": {}, "phases": {}}
    try:
        sets = [make_inputs(case, seed) for seed in range(measure.INPUT_SETS)]
        for name, what, function, args in _phases(case, sets):
            row["phases"][name] = {"what": what, **_time(function, args, repeats)}
            if "error" in row["phases"][name]:
                row["status"] = "failed"
        _difference(row["phases"], "dk and dv", "backward", "delta and dq", "backward less delta and dq")
        if with_profile:
            row["kernels"] = {which: _kernels(case, which, sets[0], tell) for which in (FORWARD, FORWARD_BACKWARD)}
    except Exception as error:
        row |= {"status": "failed", "error": measure.one_line(error)}
    for line in lines(row):
        tell(line)
    row["seconds"] = round(time.perf_counter() - start, 2)
    return row


def lines(row: dict[str, Any]) -> list[str]:
    """The phases of a row as lines of text."""
    text = []
    for name, record in row["phases"].items():
        amount = f"{record['median_ms']:9.4f} ms" if "median_ms" in record else "        failed"
        text.append(f"  {amount}  {name}: {record.get('error', record['what'])}")
    return text


def _phases(case: Case, sets: list[Inputs]) -> Iterator[Phase]:
    qkv = [(x.query, x.key, x.value) for x in sets]
    if case.pattern == "hash":
        rotations = scfa_jax.random_rotations(jax.random.key(0), case.heads, case.head_dim, int(case.parameter))
        both = lambda q, k, r: (scfa_jax.lsh_hash(q, r), scfa_jax.lsh_hash(k, r))
        yield "hash", "lsh_hash of queries and keys", both, [(x.query, x.key, rotations) for x in sets]

    build = jax.jit(calls.index(case))
    yield "sort and index", "the index builder", build, [x.extra for x in sets]

    indices = [build(*x.extra) for x in sets]
    bounds = functools.partial(_bounds, case.implementation)
    yield "bounds", "both tables of tile bounds, 64 x 64", bounds, [(index,) for index in indices]

    # sparse_attention works out the bounds too: they belong to its kernels, whose tile sizes they need.
    attend: Callable[..., Any] = functools.partial(_attend, case.implementation)
    forward_args = [(*x, index) for x, index in zip(qkv, indices, strict=True)]
    yield "forward", "given the index; its bounds included", attend, forward_args

    # The backward pass as a pytree that holds what the forward pass left for it; one trace, one tree.
    pull = jax.jit(lambda q, k, v, index: jax.vjp(lambda *qkv: attend(*qkv, index), q, k, v)[1])
    pulls = [pull(*args) for args in forward_args]
    backward_args = [(pull, x.cotangent) for pull, x in zip(pulls, sets, strict=True)]
    yield "backward", "given index and output; its bounds included", _backward, backward_args
    yield "delta and dq", "the backward pass where dk and dv are not asked for", _backward_dq, backward_args

    delta_args = [(attend(*args), x.cotangent) for args, x in zip(forward_args, sets, strict=True)]
    yield "delta alone", "as XLA computes it; part of the backward pass", _delta, delta_args

    call = calls.ours(case)
    for which in (FORWARD, FORWARD_BACKWARD):
        yield f"whole {which}", "everything", call.function(which), [call.arguments(x, which) for x in sets]


def _attend(implementation: str | None, query, key, value, index) -> Any:
    return scfa_jax.sparse_attention(query, key, value, index, implementation=implementation)


def _bounds(implementation: str | None, index: scfa_jax.SparseIndex) -> Any:
    if implementation == "triton" or (implementation is None and jax.default_backend() == "gpu"):
        from scfa_jax.backends.triton import bounds as kernels

        return [table(index, 64, 64, interpret=False) for table in (kernels.key_tile_bounds, kernels.query_tile_bounds)]
    from scfa_jax import _bounds as plain

    return [table(index.ranges, 64, 64) for table in (plain.key_tile_bounds, plain.query_tile_bounds)]


def _backward(pull: Callable[..., Any], cotangent: jax.Array) -> Any:
    return pull(cotangent)


def _backward_dq(pull: Callable[..., Any], cotangent: jax.Array) -> jax.Array:
    return pull(cotangent)[0]


def _delta(output: jax.Array, cotangent: jax.Array) -> jax.Array:
    return jnp.sum(output.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1)


def _time(function: Callable[..., Any], args: list[tuple[Any, ...]], repeats: int) -> dict[str, Any]:
    try:
        compiled = timing.compile_ahead(function, args[0])
        times, errors = timing.take_turns({"phase": (compiled.function, args)}, samples=repeats)
        if errors:
            raise errors["phase"]
        return times["phase"]
    except Exception as error:
        return {"error": measure.one_line(error)}


def _difference(phases: dict[str, Any], name: str, whole: str, part: str, what: str) -> None:
    """Adds a phase that cannot be had alone, after its whole's part."""
    if "median_ms" in phases.get(whole, {}) and "median_ms" in phases.get(part, {}):
        entry = {"what": what, "median_ms": phases[whole]["median_ms"] - phases[part]["median_ms"], "difference": True}
        items = list(phases.items())
        at = [key for key, _ in items].index(part) + 1
        phases.clear()
        phases |= dict([*items[:at], (name, entry), *items[at:]])


def _kernels(case: Case, which: str, inputs: Inputs, tell: Callable[[str], None]) -> dict[str, Any]:
    """Every kernel of a whole call, the sums of our own, and what is left: the overhead."""
    call = calls.ours(case)
    try:
        times = profile.kernel_times(jax.jit(call.function(which)), *call.arguments(inputs, which))
    except Exception as error:
        return {"error": measure.one_line(error)}
    sums = {part: sum(ms for name, _, ms in times if text in name) for part, text in KERNELS.items()}
    ours = sum(ms for name, _, ms in times if any(text in name for text in KERNELS.values()))
    tell(f"kernels of {case.name}, {which}:\n{profile.listing(times)}")
    tell(f"{profile.total(times) - ours:9.4f} ms outside the attention kernels")
    return {"list": [list(row) for row in times], **sums, "outside": profile.total(times) - ours}
