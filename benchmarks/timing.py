"""Time of compiled functions: many calls enqueued, one wait at the end, functions taking turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Compiled:
    """A function compiled ahead of time.

    Attributes:
        function: What to call.
        seconds: How long tracing, lowering and compiling took.
        memory: Bytes of arguments, outputs and temporaries, and of the last two together as "peak".
    """

    function: Callable[..., Any]
    seconds: float
    memory: dict[str, int]


def compile_ahead(function: Callable[..., Any], args: Sequence[Any]) -> Compiled:
    """Compiles a function for its arguments.

    Args:
        function: To be jitted.
        args: Arrays.
    """
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    seconds = time.perf_counter() - start
    return Compiled(compiled, seconds, _memory(compiled))


def take_turns(
    functions: Mapping[str, tuple[Callable[..., Any], Sequence[Sequence[Any]]]],
    *,
    samples: int,
    min_seconds: float = 0.02,
    max_seconds: float = 120,
) -> tuple[dict[str, dict[str, Any]], dict[str, Exception]]:
    """Times functions side by side: one sample of each in turn, so that drifts of the clock hit all of them.

    Args:
        functions: By name: a compiled function and its sets of arguments, which take turns from call to call.
        samples: Number of samples of each function.
        min_seconds: A sample takes at least about so long, in as many calls as that needs.
        max_seconds: A function that has taken so long in all is left with the samples it has, if they are three.

    Returns:
        By name: median, quartiles and samples in milliseconds a call, and the calls of a sample; and by name the
        exceptions of functions that failed.
    """
    counts: dict[str, int] = {}
    times: dict[str, list[float]] = {}
    errors: dict[str, Exception] = {}
    for name, (function, sets) in functions.items():
        try:
            estimate = _warm_up(function, sets)
        except Exception as error:
            errors[name] = error
            continue
        calls = max(1, round(min_seconds / estimate + 0.5))
        # A whole number of rounds through the sets, unless calls are so long that one sample is one call.
        counts[name] = calls if calls == 1 else -(-calls // len(sets)) * len(sets)
        times[name] = []
    for sample in range(samples):
        for name, calls in counts.items():
            if name in errors or (sample >= 3 and sum(times[name]) / 1e3 * calls > max_seconds):
                continue
            function, sets = functions[name]
            try:
                times[name].append(_seconds_per_call(function, sets, calls, first=sample) * 1e3)
            except Exception as error:
                errors[name] = error
    results = {name: {**summary(times[name]), "calls": counts[name]} for name in counts if name not in errors}
    return results, errors


def summary(milliseconds: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles of samples, and the samples."""
    low, median, high = (
        statistics.quantiles(milliseconds, n=4, method="inclusive") if len(milliseconds) > 1 else [*milliseconds] * 3
    )
    samples = [round(x, 5) for x in milliseconds]
    return {"median_ms": median, "lower_quartile_ms": low, "upper_quartile_ms": high, "samples_ms": samples}


def _warm_up(function: Callable[..., Any], sets: Sequence[Sequence[Any]]) -> float:
    """Calls a function until it is warm, and returns seconds a call."""
    first = _seconds_per_call(function, sets, 1)
    if first > 1:  # nothing that comes with a first call matters beside this
        return first
    _seconds_per_call(function, sets, len(sets))
    return _seconds_per_call(function, sets, len(sets))


def _seconds_per_call(function: Callable[..., Any], sets: Sequence[Sequence[Any]], calls: int, first: int = 0) -> float:
    # A GPU works through its queue in order. A CPU may run calls side by side, so there each is waited for.
    wait = jax.default_backend() == "cpu"
    results = None
    start = time.perf_counter()
    for call in range(first, first + calls):
        results = function(*sets[call % len(sets)])
        if wait:
            jax.block_until_ready(results)
    jax.block_until_ready(results)
    return (time.perf_counter() - start) / calls


def _memory(compiled: Any) -> dict[str, int]:
    analysis = compiled.memory_analysis()
    if analysis is None:
        return {}
    sizes = {name: int(getattr(analysis, f"{name}_size_in_bytes", 0)) for name in ("argument", "output", "temp")}
    return {**sizes, "peak": sizes["output"] + sizes["temp"]}
