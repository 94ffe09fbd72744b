"""What is said where the device's memory does not suffice."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator

import jax

from train.errors import TrainError

# What XLA says of an allocation that failed when compiling, when a step is sent off or when its result is read.
OUT_OF_MEMORY = re.compile("RESOURCE_EXHAUSTED|Out of memory")


@contextlib.contextmanager
def out_of_memory_in_one_line(remedy: Callable[[], str]) -> Iterator[None]:
    """Turns XLA's error about memory into one that names the remedy.

    Args:
        remedy: Says what to do, in sentences.

    Raises:
        TrainError: The device's memory did not suffice.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not OUT_OF_MEMORY.search(str(error)):
            raise
        device = jax.local_devices()[0]
        limit = (device.memory_stats() or {}).get("bytes_limit")
        has = f" of {limit / 2**30:.1f} GiB" if limit else ""
        raise TrainError(f"{device.device_kind} ran out of memory{has}{_asked(str(error))}. {remedy()}") from None


def _asked(message: str) -> str:
    """How much was asked for in vain, if the message tells."""
    found = re.search(r"allocat\w* ([\d.]+) ?([KMGT]iB|bytes)", message)
    if found is None:
        return ""
    if found[2] != "bytes":
        return f", asked for {found[1]} {found[2]} more"
    return f", asked for {float(found[1]) / 2**30:.2f} GiB more"
