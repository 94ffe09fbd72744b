"""The record of a run: one JSON object a line, read back by the plot and by a resumed run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from train.step import BITS_PER_NAT

METRICS_FILE = "metrics.jsonl"


class Metrics:
    """Writes `metrics.jsonl`; a context manager.

    A line has `step`, `seconds` (spent training, over all sessions) and either `loss` (nats a token, the mean
    since the line before), `bits_per_byte` and `tokens_per_second`, or `held_out_loss` and
    `held_out_bits_per_byte`.

    Args:
        folder: The run's folder.
        step: Where training (re)starts. Later lines, of steps that no checkpoint kept, are dropped.
    """

    def __init__(self, folder: Path, step: int):
        path = folder / METRICS_FILE
        self.history: list[dict[str, Any]] = []
        if path.exists():
            lines = path.read_text().splitlines()
            self.history = [record for record in map(_parse, lines) if record and record["step"] <= step]
        if step == 0:
            self.history = []
        temporary = folder / (METRICS_FILE + ".part")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in self.history))
        temporary.replace(path)
        self._file = path.open("a")
        spent = self.history[-1]["seconds"] if self.history else 0.0
        self._start = time.monotonic() - spent

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    @property
    def seconds(self) -> float:
        """Time spent training, in this session and those before."""
        return time.monotonic() - self._start

    def training(self, step: int, loss: float, tokens_per_second: float) -> dict[str, Any]:
        """Records the training loss in nats."""
        bits = loss * BITS_PER_NAT
        return self._write(
            step, {"loss": loss, "bits_per_byte": bits, "tokens_per_second": round(tokens_per_second, 1)}
        )

    def held_out(self, step: int, loss: float) -> dict[str, Any]:
        """Records the loss on held-out text in nats."""
        return self._write(step, {"held_out_loss": loss, "held_out_bits_per_byte": loss * BITS_PER_NAT})

    def _write(self, step: int, values: dict[str, Any]) -> dict[str, Any]:
        record = {"step": step, "seconds": round(self.seconds, 3), **values}
        self.history.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        return record


def _parse(line: str) -> dict[str, Any] | None:
    """One line, or None where a crash cut it short."""
    try:
        return json.loads(line)
    except ValueError:
        return None
