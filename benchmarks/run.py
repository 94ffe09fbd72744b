"""Runs a suite: case by case, with the results on disk after each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tqdm

from benchmarks import phases, report, results, suites, targets
from benchmarks.cases import Case
from benchmarks.measure import Meter

SUITES = ("headline", "blocks", "full", "cpu", "phases")
RESULTS = Path(__file__).resolve().parent / "results"


def help_text(text: str) -> Any:
    """What the command line says about an option; nothing where tyro is not installed."""
    try:
        import tyro
    except ImportError:
        return text
    return tyro.conf.arg(help=text)


@dataclass(frozen=True)
class Options:
    """What a run measures."""

    suite: Annotated[
        Literal["headline", "blocks", "full", "cpu", "phases"] | None,
        help_text("Which cases. By default headline on a GPU, cpu elsewhere."),
    ] = None
    out: Annotated[Path | None, help_text("Folder for results and plots. By default benchmarks/results/DEVICE.")] = None
    repeats: Annotated[int, help_text("Samples of each function; the median counts.")] = 9
    only: Annotated[str | None, help_text("Only cases whose name contains this.")] = None
    time_limit: Annotated[
        float | None, help_text("Seconds after which no further case is begun. By default none, full: 480.")
    ] = None
    resume: Annotated[
        bool, help_text("Go on with the results that are in the folder: measure what they left out. The same device.")
    ] = False
    profile: Annotated[bool, help_text("List the kernels that ran, with their counts and times.")] = False


def run(options: Options, cases: Sequence[Case] | None = None) -> tuple[dict[str, Any], Path]:
    """Measures and writes results and plots.

    Args:
        options: As from the command line.
        cases: Measured in place of those of the suite.

    Returns:
        The results and their file.

    Raises:
        ValueError: An option is impossible.
    """
    options = _complete(options)
    suite = str(options.suite)
    cases = suites.suite(suite) if cases is None else cases
    chosen = [case for case in cases if options.only is None or options.only in case.name]
    if not chosen:
        raise ValueError(f"no case of {suite} has {options.only!r} in its name: {', '.join(c.name for c in cases)}")
    folder = options.out or RESULTS / results.device_slug()
    # A part of a suite does not replace the results of the whole.
    file = folder / (f"{suite}.json" if len(chosen) == len(cases) else f"{suite}-partial.json")
    record: dict[str, Any] = {
        "format": results.FORMAT,
        "suite": suite,
        "environment": results.environment(_command(options)),
        "repeats": options.repeats,
        "rows": [],
        "left_out": [case.name for case in chosen],
        "left_out_because": "interrupted",
    }
    if options.resume:
        _take_over(results.read(file), record)
    _measure_all(options, chosen, record, file)
    _finish(record, file)
    return record, file


def _take_over(earlier: dict[str, Any], record: dict[str, Any]) -> None:
    """Puts the good rows of earlier results into a record, each with the environment that it was measured in."""
    was, now = earlier["environment"], record["environment"]
    for name in ("device", "jax", "jaxlib"):
        if was[name] != now[name]:
            raise ValueError(f"--resume needs the {name} of the earlier results, {was[name]}, got {now[name]}")
    record["rows"] = [
        {"environment": was, **row}
        for row in earlier["rows"]
        if row["status"] == "ok" and row["name"] in record["left_out"]
    ]
    known = {row["name"] for row in record["rows"]}
    record["left_out"] = [name for name in record["left_out"] if name not in known]


def _measure_all(options: Options, cases: Sequence[Case], record: dict[str, Any], file: Path) -> None:
    start = time.monotonic()
    meter = Meter(repeats=options.repeats, profile=options.profile, tell=tqdm.tqdm.write)
    results.write(file, record)
    missing = [case for case in cases if case.name in record["left_out"]]
    with tqdm.tqdm(total=len(cases), initial=len(record["rows"]), unit="case", disable=None) as bar:
        for case in missing:
            if options.time_limit is not None and time.monotonic() - start > options.time_limit:
                record["left_out_because"] = f"the time limit of {options.time_limit:g} s was reached"
                break
            bar.set_description(case.name)
            if record["suite"] == "phases":
                row = phases.measure_phases(
                    case, repeats=options.repeats, with_profile=options.profile, tell=tqdm.tqdm.write
                )
            else:
                row = meter.measure(case)
            record["rows"].append(row)
            record["left_out"].remove(case.name)
            targets.judge(record["rows"], {case.name: case for case in cases})
            results.write(file, record)
            tqdm.tqdm.write(f"[{len(record['rows'])}/{len(cases)}] {report.line(row)}")
            bar.update()
    if not record["left_out"]:
        record["left_out_because"] = None
    results.write(file, record)


def _finish(record: dict[str, Any], file: Path) -> None:
    print()
    print(report.table(record))
    print()
    print(f"results: {_shown(file)}")
    if record["suite"] == "phases":
        return
    try:
        from benchmarks import plots
    except ImportError as error:
        print(f"no plots: {error}")
        return
    for path in plots.plot(record, file.with_suffix("")):
        print(f"plot: {_shown(path)}")


def _complete(options: Options) -> Options:
    if options.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {options.repeats}")
    if options.time_limit is not None and not options.time_limit > 0:
        raise ValueError(f"--time-limit must be above 0, got {options.time_limit}")
    suite = options.suite or ("headline" if jax.default_backend() == "gpu" else "cpu")
    limit = 480.0 if suite == "full" and options.time_limit is None else options.time_limit
    return replace(options, suite=suite, time_limit=limit)


def _command(options: Options) -> str:
    """The command line that repeats this, without the folder."""
    parts = ["python -m benchmarks", f"--suite {options.suite}", f"--repeats {options.repeats}"]
    if options.only is not None:
        parts.append(f"--only {options.only}")
    if options.time_limit is not None:
        parts.append(f"--time-limit {options.time_limit:g}")
    return " ".join([*parts, *(f"--{name}" for name in ("resume", "profile") if getattr(options, name))])


def _shown(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
