"""`python -m train`."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from train.errors import TrainError
from train.evaluate import EvaluateOptions, evaluate_run
from train.moa.command import MoaOptions, moa
from train.options import parse
from train.processes import leave
from train.report import ReportOptions, report
from train.run import run
from train.sample import SampleOptions, sample_run
from train.stop import Terminated, sigterm_like_ctrl_c

# Commands beside training: what their options are and what does them.
COMMANDS: dict[str, tuple[type[Any], Callable[[Any], int]]] = {
    "sample": (SampleOptions, sample_run),
    "evaluate": (EvaluateOptions, evaluate_run),
    "report": (ReportOptions, report),
    "moa": (MoaOptions, moa),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, samples, evaluates, reports or plans as the command line says.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        The exit code: 0, 2 for what the user can put right, 128 + the signal that ended it early.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A log file is up to date while it runs, and no text or file name is one it cannot take.
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    # Orbax logs tracebacks of what it raises as well, and this program says in one line; its loop of writes does so
    # for all that fail after the one that was raised.
    for logger in ("absl", "asyncio"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments.pop(0) if arguments and arguments[0] in COMMANDS else None
    try:
        with sigterm_like_ctrl_c():
            if name is not None:
                options, command = COMMANDS[name]
                return command(tyro.cli(options, args=arguments, prog=f"python -m train {name}"))
            return run(parse(arguments))
    except TrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return leave(2)
    except KeyboardInterrupt as interruption:
        # Training itself stops with a checkpoint; this is before it, after it, or a second signal.
        remedy = "--resume continues from the last checkpoint, if any" if name is None else f"{name} does it anew"
        print(f"interrupted: python -m train {remedy}", file=sys.stderr)
        return leave(128 + (signal.SIGTERM if isinstance(interruption, Terminated) else signal.SIGINT))
    except BrokenPipeError:
        # Whoever read the output has enough, as `head` has. What is still to be written when Python ends goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return leave(128 + signal.SIGPIPE)


def _without_late_writes(unraisable: Any) -> None:
    """Prints what could not be raised, but for writes of a checkpoint that fail after one that was raised."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


if __name__ == "__main__":
    sys.unraisablehook = _without_late_writes
    sys.exit(main())
