"""Several processes, on one host or on many: how they meet, what only the first does, and how they agree."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train.errors import TrainError

# Seconds that processes wait at the end for the first one, which may have a long sample to make.
PATIENCE = 3600


def connect(distributed: str | None) -> None:
    """Joins the other processes; nothing of JAX may have run before.

    Args:
        distributed: As `--distributed` has it: None for one process.

    Raises:
        TrainError: It cannot be read, or the processes do not find each other.
    """
    if distributed is None or jax.distributed.is_initialized():
        return
    where: dict[str, Any] = {}
    if distributed != "auto":
        address, count, number = [*distributed.split(","), "", ""][:3]
        if ":" not in address or not count.isdecimal() or not number.isdecimal() or int(number) >= int(count):
            raise TrainError(
                f"--distributed takes auto or HOST:PORT,COUNT,ID with an ID below COUNT, got {distributed!r}."
            )
        where = {"coordinator_address": address, "num_processes": int(count), "process_id": int(number)}
    try:
        jax.distributed.initialize(**where, shutdown_timeout_seconds=PATIENCE)
    except (RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise TrainError(f"--distributed {distributed}: the processes did not meet ({said}).") from None


def leave(code: int) -> int:
    """The exit code of what went wrong in this process; one of several ends at once, without waiting for the others.

    They could not go on without it, and JAX ends them.
    """
    if jax.distributed.is_initialized():
        os._exit(code)
    return code


def is_first() -> bool:
    """Whether this process is the one that writes and prints; where there is only one, it is."""
    return jax.process_index() == 0


@contextlib.contextmanager
def one_speaks() -> Iterator[None]:
    """Drops what processes but the first print: they would all say the same."""
    if is_first():
        yield
        return
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        yield


def first_does(action: Callable[[], Any]) -> None:
    """Has the first process do something that the others wait for.

    Raises:
        TrainError: It could not, in all processes.
    """
    error = None
    if is_first():
        try:
            action()
        except TrainError as raised:
            error = raised
    if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(np.int32(error is not None)) and not error:
        error = TrainError("The first process could not go on: see what it said.")
    if error is not None:
        raise error


class Agreement:
    """The largest of the numbers that all processes name at each call, told to all some calls late.

    So they stop at the same step, and no step waits for the host. With one process it is what that one named, at once.

    Args:
        lag: How many calls late.
    """

    def __init__(self, lag: int):
        self._lag = lag
        self._asked: deque[jax.Array] = deque()
        if jax.process_count() > 1:
            mesh = Mesh(np.array(jax.devices()), ("all",))
            self._cut = NamedSharding(mesh, P("all"))
            self._largest = jax.jit(lambda numbers: numbers.max(), out_shardings=NamedSharding(mesh, P()))

    def __call__(self, number: int) -> int:
        """Names a number of at least 0; returns the largest of `lag` calls ago, 0 at first."""
        if jax.process_count() == 1:
            return number
        named = np.full(jax.local_device_count(), number, np.int32)
        self._asked.append(self._largest(jax.make_array_from_process_local_data(self._cut, named)))
        return int(self._asked.popleft()) if len(self._asked) > self._lag else 0
