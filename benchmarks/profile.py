"""Every kernel that a call runs on the GPU, with its count and milliseconds, from JAX's own profiler."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

KernelTime = tuple[str, int, float]

# Timelines that a profiler derives from the streams: counting them too would count everything twice.
_DERIVED_LINES = ("XLA ", "Steps", "Framework ", "Source", "Async ", "Launch Stats", "TensorFlow ", "#")


def kernel_times(function: Callable[..., Any], *args: Any, calls: int = 5) -> list[KernelTime]:
    """Profiles a jitted function.

    Where a GPU's listing shows launches of graphs in place of kernels, set XLA_FLAGS=--xla_gpu_enable_command_buffer=
    (to nothing), which makes XLA launch kernels one by one.

    Args:
        function: What to call; it is called twice beforehand, so that compiling is not measured.
        *args: Its arguments.
        calls: Over how many calls to average.

    Returns:
        `(kernel name, times it ran in one call, milliseconds in one call)`, the slowest first. On a GPU these are
        all kernels and copies on its streams; elsewhere they are XLA's operations, where one that holds others (a
        loop, say) is counted beside them.
    """
    for _ in range(2):
        jax.block_until_ready(function(*args))

    def all_calls():
        for _ in range(calls):
            results = function(*args)
        jax.block_until_ready(results)

    counts: dict[str, int] = defaultdict(int)
    milliseconds: dict[str, float] = defaultdict(float)
    for name, duration in kernel_timeline(all_calls):
        counts[name] += 1
        milliseconds[name] += duration
    times = [(name, round(counts[name] / calls), milliseconds[name] / calls) for name in counts]
    if not times and jax.default_backend() == "gpu":
        raise RuntimeError("the profiler saw no kernel on a GPU: is CUPTI allowed to trace here?")
    return sorted(times, key=lambda row: -row[2])


def kernel_timeline(run: Callable[[], Any]) -> list[tuple[str, float]]:
    """Profiles what `run` does, which must wait for its results.

    Returns:
        `(kernel name, milliseconds)` of everything that `kernel_times` counts, in order of time.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        files = sorted(Path(folder).rglob("*.xplane.pb"))
        if not files:
            raise RuntimeError("the profiler wrote no trace")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*has no __module__ attribute", category=DeprecationWarning)
            events = sorted(_events(jax.profiler.ProfileData.from_file(str(files[-1]))))
    return [(name, nanoseconds / 1e6) for _, name, nanoseconds in events]


def total(times: Sequence[KernelTime]) -> float:
    """Milliseconds of all kernels of one call."""
    return sum(milliseconds for _, _, milliseconds in times)


def listing(times: Sequence[KernelTime]) -> str:
    """The kernels as a table in plain text, with their sum."""
    rows = [f"{milliseconds:9.4f} ms  {count:5d} x  {name}" for name, count, milliseconds in times]
    return "\n".join([*rows, f"{total(times):9.4f} ms  {sum(row[1] for row in times):5d} x  in all"])


def short_name(name: str) -> str:
    """A kernel's name without the template and call arguments of C++, and without its return type.

    >>> short_name("void cub::DeviceRadixSort<int, (bool)1>(int*, int)")
    'cub::DeviceRadixSort'
    """
    name = name.replace("(anonymous namespace)", "anonymous")
    before = None
    while before != name:
        before, name = name, re.sub(r"<[^<>]*>|\([^()]*\)", "", name)
    name = re.sub(r"^(void|int|bool)\s+", "", name).strip()
    return name or before or "?"


def _events(profile: Any) -> Iterator[tuple[float, str, float]]:
    """Starts, names and nanoseconds of what ran on the devices: on GPUs if there are any, else on the host."""
    planes = list(profile.planes)
    gpus = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    if gpus or jax.default_backend() == "gpu":
        for plane in gpus:
            yield from _stream_events(plane)
        return
    for plane in planes:
        if plane.name.startswith("/host:CPU"):
            for line in plane.lines:
                for event in line.events:
                    if any(stat[0] == "hlo_op" for stat in event.stats):
                        yield event.start_ns, event.name, event.duration_ns


def _stream_events(plane: Any) -> Iterator[tuple[float, str, float]]:
    lines = list(plane.lines)
    streams = [line for line in lines if line.name.startswith("Stream")]
    for line in streams or [line for line in lines if not line.name.startswith(_DERIVED_LINES)]:
        for event in line.events:
            yield event.start_ns, short_name(event.name), event.duration_ns
