"""`python -m tools.soak` sends random cases through few compiled functions in one process and looks for faults.

Every case is compared with the dense reference; some are computed twice and must give the same bits. After the first
pass over all signatures nothing may be compiled any more, and neither the device's memory nor the host's may grow.
`--signature ... --case ...`, as printed for each failure, repeats one case.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm

from benchmarks import results
from tools import fuzz, fuzz_program
from tools.fuzz import Signature
from tools.fuzz_program import Program

# What a pass may add and the run still counts as without growth. The host's own pools come and go by tens of MiB.
ALLOWED_BYTES = {"arrays": 0, "device": 2**20, "host": 64 * 2**20}
RERUN_EVERY = 10
COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclass(frozen=True)
class Options:
    """What to run."""

    cases: int = 2000
    """Random cases in all."""
    signatures: int = 60
    """Compiled functions that they go through, each with a reference of its own shape."""
    seed: int = 0
    """Decides all signatures and cases."""
    time_limit: float = 480
    """Seconds after which no further pass begins."""
    out: Path = Path("benchmarks/results")
    """Folder of soak.json."""
    signature: str | None = None
    """Instead of all that: repeat one case of this signature."""
    case: int = 0
    """Its number."""

    def problem(self) -> str | None:
        """What is wrong with these options, in one line; None if nothing is."""
        if not 1 <= self.signatures <= self.cases:
            return f"--signatures must be from 1 to --cases, got {self.signatures} and {self.cases}"
        return None


def line_for(signature: Signature, number: int) -> str:
    """The command that repeats a case."""
    devices = "XLA_FLAGS=--xla_force_host_platform_device_count=8 " if _simulates_devices() else ""
    return f"{devices}python -m tools.soak --signature '{signature}' --case {number}"


def soak(options: Options, make_program: Callable[[Signature], Program] = fuzz_program.program) -> dict[str, Any]:
    """Runs all cases.

    Args:
        options: What to run.
        make_program: What computes the cases of a signature.

    Returns:
        What was found, with `ok`: whether all cases ran in time and nothing was wrong.
    """
    signatures = drawn_signatures(options)
    start = time.monotonic()
    programs = _compile(signatures, make_program)
    compile_seconds = time.monotonic() - start
    failures: list[dict[str, Any]] = []
    memory: list[dict[str, int]] = []
    done = reruns = 0
    with _compilations() as compiled, tqdm.tqdm(total=options.cases, unit="case", disable=None) as bar:
        while done < options.cases and time.monotonic() - start < options.time_limit:
            number = len(memory)
            for signature, run in zip(signatures, programs, strict=True):
                if done == options.cases:
                    break
                twice = (done + number) % RERUN_EVERY == 0
                problems = run_case(signature, number, run, twice=twice)
                if problems:
                    failures.append({"problems": problems, "repeat": line_for(signature, number)})
                    tqdm.tqdm.write(f"FAILED: {'; '.join(problems)}\n  {failures[-1]['repeat']}")
                done += 1
                reruns += twice
                bar.update()
            memory.append(_memory())
            if number == 0:
                compiled.clear()
    growth = {name: _growth([sample[name] for sample in memory if name in sample]) for name in ALLOWED_BYTES}
    record = {
        "cases": done,
        "asked": options.cases,
        "seconds": round(time.monotonic() - start, 1),
        "compile_seconds": round(compile_seconds, 1),
        "reruns": reruns,
        "failures": failures,
        "compilations_after_the_first_pass": len(compiled) if len(memory) > 1 else None,
        "growth_bytes": growth,
        "allowed_growth_bytes": ALLOWED_BYTES,
        "memory": memory,
        "signatures": [str(signature) for signature in signatures],
    }
    return {**record, "faults": faults(record), "ok": not faults(record)}


def faults(record: dict[str, Any]) -> list[str]:
    """What is wrong in what `soak` found, a line each."""
    found = []
    if record["failures"]:
        found.append(f"{len(record['failures'])} of {record['cases']} cases failed")
    if record["cases"] < record["asked"]:
        found.append(f"only {record['cases']} of {record['asked']} cases ran within the time limit")
    if record["compilations_after_the_first_pass"]:
        found.append(f"{record['compilations_after_the_first_pass']} functions were compiled after the first pass")
    if record["compilations_after_the_first_pass"] is None:
        found.append("there was one pass only: nothing is known of memory and compilations")
    for name, grown in record["growth_bytes"].items():
        if grown is not None and grown > record["allowed_growth_bytes"][name]:
            found.append(f"memory grew: {grown:,} bytes ({name})")
    return found


def drawn_signatures(options: Options) -> list[Signature]:
    """The signatures for the devices that are here: longer ones, with the default tiles, on a GPU."""
    space = fuzz.Space(implementations=("xla",), devices=len(jax.devices()))
    if jax.default_backend() == "gpu":
        space = dataclasses.replace(
            space,
            implementations=("default", "triton", "default", "xla"),
            tiles=("default", "default", "small"),
            lengths=fuzz.LONG,
        )
    return fuzz.draw_signatures(options.signatures, options.seed, space)


def run_case(signature: Signature, number: int, run: Program, *, twice: bool = False) -> list[str]:
    """Computes and checks one case, and its bits a second time if asked; returns what is wrong."""
    case = fuzz.draw_case(signature, number)
    try:
        got = run(case)
        problems = fuzz_program.check(signature, case, got)
        if twice and _bits(run(case)) != _bits(got):
            problems.append("a second run gave other bits")
    except Exception as error:  # whatever it is, it is this case's, and the others go on
        return [f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"]
    return problems


def _compile(signatures: Sequence[Signature], make_program: Callable[[Signature], Program]) -> list[Program]:
    """Compiles all programs and references side by side, by their first cases."""
    programs = [make_program(signature) for signature in signatures]
    with ThreadPoolExecutor() as pool:
        first = pool.map(lambda signature, run: run_case(signature, 0, run), signatures, programs)
        list(tqdm.tqdm(first, "compiling", len(signatures), unit="signature", disable=None))
    return programs


def _bits(arrays: Sequence[jax.Array]) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in arrays]


@contextlib.contextmanager
def _compilations() -> Iterator[list[str]]:
    """Lists what is compiled from here on."""
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **rest: str | int) -> None:
        if event == COMPILED:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _memory() -> dict[str, int]:
    """Bytes of all arrays that are alive, of the device's memory in use if it tells, and of the host's."""
    gc.collect()
    sample = {"arrays": sum(x.nbytes for x in jax.live_arrays())}
    statistics_of_device = jax.devices()[0].memory_stats()
    if statistics_of_device and "bytes_in_use" in statistics_of_device:
        sample["device"] = statistics_of_device["bytes_in_use"]
    with contextlib.suppress(OSError):  # Linux alone has it
        resident = int(Path("/proc/self/statm").read_text().split()[1])
        sample["host"] = resident * 4096
    return sample


def _growth(samples: Sequence[int]) -> int | None:
    """From the first third of the passes to the last one, medians; the first pass does not count."""
    samples = samples[1:]
    if len(samples) < 2:
        return None
    third = max(1, len(samples) // 3)
    return round(statistics.median(samples[-third:]) - statistics.median(samples[:third]))


def _simulates_devices() -> bool:
    return jax.default_backend() == "cpu" and len(jax.devices()) > 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        The exit code: 0, 1 if anything was wrong, 2 for a mistake in the arguments.
    """
    import tyro

    argv = sys.argv[1:] if argv is None else argv
    options = tyro.cli(Options, args=argv, prog="python -m tools.soak", description=__doc__)
    try:
        if problem := options.problem():
            raise ValueError(problem)
        if options.signature is not None:
            return _repeat(fuzz.parse(options.signature), options.case)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = soak(options)
    command = " ".join(["python -m tools.soak", *argv])
    file = options.out / "soak.json"
    results.write(file, {"format": results.FORMAT, "environment": results.environment(command), **found})
    print(f"{found['cases']} cases in {found['seconds']} s, {len(found['signatures'])} signatures: wrote {file}")
    print("\n".join(f"FAULT: {fault}" for fault in found["faults"]) or "no fault")
    return int(not found["ok"])


def _repeat(signature: Signature, number: int) -> int:
    problems = run_case(signature, number, fuzz_program.program(signature), twice=True)
    print("\n".join(f"FAILED: {problem}" for problem in problems) or "as the reference has it")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
