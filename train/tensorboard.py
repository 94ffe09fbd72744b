"""Metrics for TensorBoard."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

TENSORBOARD_FOLDER = "tensorboard"


class TensorBoard:
    """Writes one event file, at once: no thread that could fail on its own or hold the last lines back.

    Args:
        folder: The run's folder.
        step: Where training (re)starts; later steps of earlier files are hidden.

    Raises:
        OSError: The file cannot be written; from `write` too.
    """

    def __init__(self, folder: Path, step: int):
        (folder / TENSORBOARD_FOLDER).mkdir(exist_ok=True)
        prefix = str(folder / TENSORBOARD_FOLDER / "events")
        self._writer = EventsWriter(prefix, f".{os.getpid()}.{step}")  # two sessions may begin in the same second
        self._add(step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Adds the numbers of a line of metrics; of a list with one a layer, each under the layer's name."""
        numbers: dict[str, float] = {}
        for name, value in values.items():
            if isinstance(value, int | float):
                numbers[name] = value
            elif value and isinstance(value[0], int | float):
                numbers |= {f"{name}/{layer}": number for layer, number in enumerate(value)}
        self._add(step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=x) for tag, x in numbers.items()]))

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        self._writer.write_event(Event(step=step, wall_time=time.time(), **content))
        self._writer.flush()
