"""`python -m tools.sanitize` runs the kernels' small cases, decoding's too, under NVIDIA's compute-sanitizer.

memcheck looks for accesses out of bounds, with every array allocated by itself. That it would see one is proved by a
kernel that writes past its array. racecheck looks for hazards in shared memory.
Triton's pipelines and reductions may look like hazards to it by themselves, so plain Pallas kernels with these parts
run beside ours: a report of ours counts as explained where a plain kernel has one of the same kind. What decoding
gives is compared with the dense reference, on the CPU, since the sanitizer watches whatever runs on the GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import results
from scfa_jax.backends import tile
from scfa_jax.backends.triton import _compat
from tools import fuzz, fuzz_program

TOOL = "compute-sanitizer"
# What runs under each of its tools.
WORKLOADS = {"memcheck": ("overrun", "plain", "kernels"), "racecheck": ("plain", "kernels")}
FLAGS = {
    # Padding, or what lies behind an array might be the next one. JAX's own probing of the driver is no fault.
    "memcheck": ("--padding", "512", "--report-api-errors", "no"),
    "racecheck": (),
}
ENVIRONMENT = {
    # JAX's "platform" allocates whole pages: there memcheck missed writes 16 KiB past an array, and saw them at 4 MiB.
    "XLA_PYTHON_CLIENT_ALLOCATOR": "cuda_async",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_FLAGS": "--xla_gpu_autotune_level=0",
}
DONE = "scfa sanitize: done"
WRONG = "scfa sanitize: wrong: "
LENGTH = 128
# Each dtype, head sizes that are no power of two and one that is, heads that share keys. Caches of several tiles, the
# last cut short, which are shared out among programs, or visited by one program where the batch alone makes enough.
_decoding = functools.partial(fuzz.Signature, "decode", transform="forward", implementation="triton", offset="one")
DECODING = (
    _decoding((2, 1, 182, 4, 2, 64, 64), "bfloat16", exclude_self=True, capped=True),
    _decoding((128, 1, 182, 4, 1, 80, 80), "float32", sinks=True),
    _decoding((2, 1, 182, 6, 2, 24, 24), "float16", exclude_self=True),
)


@dataclass(frozen=True)
class Options:
    """What to run."""

    out: Path = Path("benchmarks/results")
    """Folder of sanitize.json, and of the logs under sanitize/."""
    tools: tuple[str, ...] = ("memcheck", "racecheck")
    """Tools of the sanitizer."""
    signatures: int = 18
    """Random signatures of the kernels, besides three of decoding."""
    cases: int = 2
    """Cases of each signature."""
    time_limit: float = 500
    """Seconds for each of the runs, three under memcheck and two under racecheck, all at once."""

    def problem(self) -> str | None:
        """What is wrong with these options or with this machine, in one line; None if nothing is."""
        if not self.tools or not set(self.tools) <= WORKLOADS.keys():
            return f"--tools takes {' and '.join(WORKLOADS)}, got {' '.join(self.tools) or 'none'}"
        if shutil.which(TOOL) is None:
            return f"{TOOL} is not on PATH: it comes with the CUDA toolkit, in its folder bin or {TOOL}"
        return None if jax.default_backend() == "gpu" else f"there is no GPU: JAX runs on {jax.default_backend()}"


@dataclass(frozen=True)
class Findings:
    """What a log says.

    Attributes:
        errors: As its summaries count them, hazards of racecheck included; None if there is no summary.
        reports: By kind of report, without addresses and sizes of kernels: how many, by kernel.
        finished: Whether the program came to its end.
        wrong: Cases with wrong results, and what was wrong.
    """

    errors: int | None
    reports: dict[str, dict[str, int]]
    finished: bool
    wrong: tuple[str, ...] = ()


_SUMMARY = re.compile(r"========= (?:ERROR SUMMARY: ([\d,]+) error|RACECHECK SUMMARY: ([\d,]+) hazard)")
_RACE = re.compile(r"========= ((?:Error|Warning): Race reported) between (\w+) access at (.*)")
_OTHER_ACCESS = re.compile(r"=========     and (\w+) access at")
_HAZARDS = re.compile(r"\[([\d,]+) hazards?\]")
_ERROR = re.compile(
    r"========= ((?:Error|Warning): Potential \w+ hazard|Invalid __\w+__ \w+ of size \d+"
    r"|(?:Error: )?(?:Misaligned|Barrier error|Uninitialized|Leaked|Internal|Process|Target|Program hit)\b[\w ]*)"
)
_WHERE = re.compile(r"=========     (?:(?:Write|Read) Thread .*? )?at (.*)")


def parse(log: str) -> Findings:
    """Reads what the sanitizer printed.

    Args:
        log: Standard output and error of a run.
    """
    errors: int | None = None
    reports: defaultdict[str, Counter[str]] = defaultdict(Counter)
    lines = log.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if summary := _SUMMARY.match(line):
            errors = (errors or 0) + _number(summary[1] or summary[2])
        elif race := _RACE.match(line):
            other = _OTHER_ACCESS.match(following)
            kind = f"{race[1]} between {race[2]} and {other[1] if other else 'unknown'}"
            hazards = sum(map(_number, _HAZARDS.findall(line + following)))
            reports[kind][_kernel(race[3])] += max(1, hazards)
        elif error := _ERROR.match(line):
            where = _WHERE.match(following)
            reports[error[1].strip()][_kernel(where[1]) if where else "unknown"] += 1
    wrong = tuple(line.removeprefix(WRONG) for line in lines if line.startswith(WRONG))
    return Findings(errors, {kind: dict(kernels) for kind, kernels in reports.items()}, DONE in lines, wrong)


def _number(text: str) -> int:
    return int(text.replace(",", ""))


def _kernel(where: str) -> str:
    """The kernel in `name(arguments)+0x70 in file.cu:5`, or in the older `0x70 in name(arguments)`."""
    where = re.sub(r"^0x[0-9a-f]+ in ", "", where)
    return re.split(r"\(|\+0x| in ", where)[0].strip() or "unknown"


def faults(runs: dict[str, dict[str, Findings]]) -> list[str]:
    """What is wrong, a line each.

    Args:
        runs: By tool and by what ran under it.
    """
    found = []
    for tool, workloads in runs.items():
        for workload, findings in workloads.items():
            if findings.errors is None:
                found.append(f"{tool} of {workload}: the log has no summary")
            elif not findings.finished and workload != "overrun":  # such a write may end the program
                found.append(f"{tool} of {workload}: the program did not come to its end")
            found += [f"{tool} of {workload}: {wrong}" for wrong in findings.wrong]
    for workload, findings in runs.get("memcheck", {}).items():
        seen = any(kind.startswith("Invalid __global__ write") for kind in findings.reports)
        if workload == "overrun" and not seen:
            found.append("memcheck of overrun: it did not see the write out of bounds, so it proves nothing")
        if workload != "overrun" and findings.errors:
            found.append(f"memcheck of {workload}: {findings.errors} errors")
    racecheck = runs.get("racecheck", {})
    if {"plain", "kernels"} <= racecheck.keys():
        for kind, kernels in racecheck["kernels"].reports.items():
            if kind not in racecheck["plain"].reports:
                where = ", ".join(f"{count} in {kernel}" for kernel, count in kernels.items())
                found.append(f"racecheck of kernels: {kind!r}, which no plain kernel has: {where}")
    return found


def overrun(x: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Writes the array `[L]` one element further on than it may: its last one past the end."""
    from jax.experimental.pallas import triton as plgpu

    def kernel(x_ref, out_ref):
        place = jnp.arange(x.shape[0], dtype=jnp.int32)
        plgpu.store(out_ref.at[place + 1], plgpu.load(x_ref.at[place]))

    return _call(kernel, jax.ShapeDtypeStruct(x.shape, x.dtype), interpret)(x)


def plain_matmul(x: jax.Array, y: jax.Array, *, interpret: bool = False) -> jax.Array:
    """`x @ y`, `[L, L]` each, in a loop that Triton pipelines as it does those of our kernels."""
    return _plain(x, y, interpret, lambda product: product)


def plain_softmax(x: jax.Array, y: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Softmax of the rows of `x @ y`: reductions besides."""

    def softmax(product):
        weights = jnp.exp(product - jnp.max(product, axis=1)[:, None])
        return weights / jnp.sum(weights, axis=1)[:, None]

    return _plain(x, y, interpret, softmax)


def _plain(x: jax.Array, y: jax.Array, interpret: bool, finish: Callable[[jax.Array], jax.Array]) -> jax.Array:
    from jax.experimental.pallas import triton as plgpu

    length, block = x.shape[0], 32
    dot = tile.dot_for(x.dtype, "float32", in_triton=not interpret)

    def kernel(x_ref, y_ref, out_ref):
        whole = jnp.arange(length, dtype=jnp.int32)

        def add(i, product):
            part = i * block + jnp.arange(block, dtype=jnp.int32)
            left = plgpu.load(x_ref.at[whole[:, None], part[None, :]])
            right = plgpu.load(y_ref.at[part[:, None], whole[None, :]])
            return product + dot(left, right)

        zeros = jnp.zeros((length, length), jnp.float32)
        product = jax.lax.fori_loop(jnp.int32(0), jnp.int32(length // block), add, zeros)
        plgpu.store(out_ref.at[whole[:, None], whole[None, :]], finish(product))

    return _call(kernel, jax.ShapeDtypeStruct((length, length), jnp.float32), interpret)(x, y)


def _call(kernel: Callable[..., None], out_shape: jax.ShapeDtypeStruct, interpret: bool) -> Callable[..., Any]:
    return _compat.triton_call(kernel, num_warps=4, num_stages=3, interpret=interpret, out_shape=out_shape, grid=(1,))


def run_workload(name: str, signatures: int, cases: int) -> None:
    """What the sanitizer watches; prints what it begins, each wrong result of decoding, and `DONE` at its end.

    Args:
        name: "overrun", "plain" or "kernels".
        signatures: How many random ones of the kernels.
        cases: Cases of each.
    """
    rng = np.random.default_rng(0)
    if name == "overrun":
        jax.block_until_ready(jax.jit(overrun)(jnp.zeros(LENGTH, jnp.float32)))
    elif name == "plain":
        for dtype in ("bfloat16", "float32"):
            x, y = (jnp.asarray(rng.normal(size=(LENGTH, LENGTH)), dtype) for _ in range(2))
            for function in (plain_matmul, plain_softmax):
                jax.block_until_ready(jax.jit(function)(x, y))
    else:
        for signature in small_signatures(signatures):
            print(signature, flush=True)
            run = fuzz_program.program(signature)
            for number in range(cases):
                case = fuzz.draw_case(signature, number)
                got = jax.block_until_ready(run(case))
                if signature.operator == "decode":
                    with jax.default_device(jax.devices("cpu")[0]):
                        problems = fuzz_program.check(signature, case, jax.device_get(got))
                    for problem in problems:
                        print(f"{WRONG}{signature}, case {number}: {problem}")
    print(DONE, flush=True)


def small_signatures(count: int) -> list[fuzz.Signature]:
    """So many random signatures of the kernels on short sequences, forward and backward, and those of decoding."""
    space = fuzz.Space(
        implementations=("triton",),
        tiles=("default", "small"),
        lengths=((64, 64), (50, 77), (90, 33)),
        head_dims=((16, 16), (64, 64), (24, 40), (128, 64)),
    )
    drawn = fuzz.draw_signatures(count, 0, space)
    transform = lambda signature: "forward" if signature.operator == "decode" else "grad"
    plain = [dataclasses.replace(signature, transform=transform(signature), mesh=(1, 1)) for signature in drawn]
    return [*plain, *DECODING]


def sanitized(tool: str, workload: str, options: Options) -> str:
    """Runs something under a tool of the sanitizer.

    Args:
        tool: "memcheck" or "racecheck".
        workload: As `run_workload` takes it.
        options: What to run, and for how long.

    Returns:
        What it printed, up to the time limit.
    """
    child = [sys.executable, "-m", "tools.sanitize", "workload", workload]
    child += [str(options.signatures), str(options.cases)]
    environment = {**os.environ, **ENVIRONMENT}
    try:
        done = subprocess.run(
            [TOOL, "--tool", tool, *FLAGS[tool], *child],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=options.time_limit,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return f"{(error.stdout or b'').decode(errors='replace')}\nstopped after {options.time_limit:g} s\n"
    return done.stdout.decode(errors="replace")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all, writes the logs and `sanitize.json`.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        The exit code: 0, 1 if anything was wrong, 2 if it cannot run here.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] == "workload":
        run_workload(argv[1], int(argv[2]), int(argv[3]))
        return 0
    import tyro

    options = tyro.cli(Options, args=argv, prog="python -m tools.sanitize", description=__doc__)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # this process leaves the memory to the others
    if problem := options.problem():
        print(f"error: {problem}", file=sys.stderr)
        return 2
    logs = options.out / "sanitize"
    logs.mkdir(parents=True, exist_ok=True)

    def watch(tool: str, workload: str) -> Findings:
        start = time.monotonic()
        log = sanitized(tool, workload, options)
        (logs / f"{tool}-{workload}.txt").write_text(log)
        findings = parse(log)
        seconds = time.monotonic() - start
        print(f"{tool} of {workload}: {findings.errors} errors or hazards, {seconds:.0f} s", flush=True)
        return findings

    with ThreadPoolExecutor() as pool:
        watched = {tool: {name: pool.submit(watch, tool, name) for name in WORKLOADS[tool]} for tool in options.tools}
    runs = {tool: {name: future.result() for name, future in futures.items()} for tool, futures in watched.items()}
    found = faults(runs)
    record = {
        "format": results.FORMAT,
        "environment": results.environment(" ".join(["python -m tools.sanitize", *argv])),
        "runs": {tool: {name: dataclasses.asdict(x) for name, x in by_name.items()} for tool, by_name in runs.items()},
        "signatures": [str(signature) for signature in small_signatures(options.signatures)],
        "faults": found,
        "ok": not found,
    }
    results.write(options.out / "sanitize.json", record)
    print("\n".join(f"FAULT: {fault}" for fault in found) or "no fault")
    print(f"wrote {options.out / 'sanitize.json'} and {logs}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
