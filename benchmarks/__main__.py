"""`python -m benchmarks`, `python -m benchmarks table RESULTS.json`, `python -m benchmarks plot RESULTS.json`."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import report, results
from benchmarks.run import Options, run

DESCRIPTION = """Measures scfa_jax beside dense attention and its peers, and checks the results as it goes.

`python -m benchmarks table RESULTS.json` prints results as Markdown, `python -m benchmarks plot RESULTS.json` draws
them beside their file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        The exit code: 0, 1 if a case failed or gave wrong results, 2 for a mistake in the arguments, 130 if
        interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        if argv and argv[0] in ("table", "plot"):
            return _show(*argv)
        import tyro

        options = tyro.cli(Options, args=argv, prog="python -m benchmarks", description=DESCRIPTION)
        record, _ = run(options)
        return int(any(row["status"] != "ok" for row in record["rows"]))
    except ImportError as error:
        print(f"error: {error}; pip install '.[bench]' brings what the benchmarks need", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what was measured so far is on disk", file=sys.stderr)
        return 128 + signal.SIGINT


def _show(command: str, *paths: str) -> int:
    if len(paths) != 1:
        raise ValueError(f"{command} takes one file of results, got {len(paths)} arguments")
    file = Path(paths[0])
    record = results.read(file)
    if command == "table":
        print(report.table(record))
        return 0
    from benchmarks import plots

    written = plots.plot(record, file.with_suffix(""))
    print("\n".join(f"plot: {path}" for path in written) or "nothing to plot: too few points")
    return 0


if __name__ == "__main__":
    sys.exit(main())
