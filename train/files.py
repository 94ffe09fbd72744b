"""Files: written whole or not at all, and what is said of one that cannot be read or written."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Literal

from train.errors import TrainError


def cannot_be(done: Literal["read", "written"], path: object, error: OSError, remedy: str) -> TrainError:
    """What to raise where an `OSError` came of a file.

    Args:
        done: To it.
        path: The file.
        error: Says why; those of Python's and other libraries may have no `strerror`.
        remedy: What the user can do.
    """
    return TrainError(f"{path} cannot be {done} ({error.strerror or error}). {remedy}")


def write_whole(path: Path, text: str) -> None:
    """Writes a file beside its place and moves it there; if that fails, what stood there stays, and nothing else.

    Raises:
        OSError: It cannot be written.
    """
    temporary = _beside(path)
    try:
        temporary.write_text(text)
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):  # it has moved, or was never made
            temporary.unlink()


def try_to_write(path: Path) -> None:
    """Makes the folder of a file, and finds out whether `write_whole` could put the file there; leaves it as it is.

    Raises:
        OSError: It could not.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    temporary.touch()
    temporary.unlink()


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".part")
