"""`python -m train`."""

from __future__ import annotations

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
    try:
        return run(parse(argv))
    except TrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
