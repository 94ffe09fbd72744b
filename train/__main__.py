"""`python -m train`."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Sequence

from train.config import parse
from train.errors import TrainError
from train.run import run


def main(argv: Sequence[str] | None = None) -> int:
    """Trains as the command line says.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        The exit code: 0, 2 for what the user can put right, 128 + the signal that ended it early.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A log file is up to date while it runs, and no text or file name is one it cannot take.
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        return run(parse(argv))
    except TrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # Training itself stops with a checkpoint; this is before it, after it, or a second Ctrl-C.
        print("interrupted: python -m train --resume continues from the last checkpoint, if any", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
