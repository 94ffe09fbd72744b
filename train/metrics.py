"""The record of a run: a JSON object a line, read back by the report and by a resumed run, and TensorBoard's files."""

from __future__ import annotations

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

from train.config import DataConfig
from train.data import Corpus, evaluated_bytes
from train.errors import TrainError
from train.files import cannot_be, write_whole
from train.processes import is_first
from train.tensorboard import TensorBoard

METRICS_FILE = "metrics.jsonl"
REMEDY = "Make room or mend its folder; --resume continues from the last checkpoint."


class Metrics:
    """Writes `metrics.jsonl` and the same for TensorBoard; a context manager. Of several processes the first writes.

    A line has `step`, `seconds` (since the run began, over all sessions, with compiling, evaluations and checkpoints)
    and `train_seconds` (those spent on steps), and then what `write` was given.

    Args:
        folder: The run's folder.
        step: Where training (re)starts. Later lines, of steps that no checkpoint kept, are dropped.

    Raises:
        TrainError: The folder cannot be written to.
    """

    def __init__(self, folder: Path, step: int):
        self._path = folder / METRICS_FILE
        self.history = [record for record in _read(self._path) if record["step"] <= step] if step else []
        if is_first():
            self._open(folder, step)
        last = self.history[-1] if self.history else {}
        self._start = time.monotonic() - last.get("seconds", 0.0)
        self.clock = Clock(last.get("train_seconds", 0.0))

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in (self._file, self._tensorboard) if is_first() else ():
            with contextlib.suppress(OSError):  # all lines were flushed, or `write` has said that one could not be
                file.close()

    def write(self, step: int, values: dict[str, Any]) -> dict[str, Any]:
        """Adds a line.

        Args:
            step: Steps done.
            values: Numbers, or lists of one number a layer; what is None is left out.

        Returns:
            The line.

        Raises:
            TrainError: It cannot be written.
        """
        values = {name: value for name, value in values.items() if value is not None}
        times = {
            "seconds": round(time.monotonic() - self._start, 3),
            "train_seconds": round(self.clock.seconds, 3),
        }
        record = {"step": step, **times, **values}
        self.history.append(record)
        if not is_first():
            return record
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            self._tensorboard.write(step, values)
        except OSError as error:
            raise cannot_be("written", self._path, error, REMEDY) from None
        return record

    def _open(self, folder: Path, step: int) -> None:
        try:
            write_whole(self._path, "".join(json.dumps(record) + "\n" for record in self.history))
            self._tensorboard = TensorBoard(folder, step)
            self._file = self._path.open("a")
        except OSError as error:
            raise cannot_be("written", self._path, error, REMEDY) from None


class Clock:
    """Adds up the time between `start` and `stop`.

    Args:
        seconds: What it shows at first.
    """

    def __init__(self, seconds: float):
        self._spent, self._since = seconds, math.nan

    @property
    def seconds(self) -> float:
        """Time spent, to this moment if it runs."""
        return self._spent if math.isnan(self._since) else self._spent + time.monotonic() - self._since

    def start(self) -> None:
        """Lets it run."""
        self._since = time.monotonic()

    def stop(self) -> None:
        """Lets it stand still."""
        self._spent, self._since = self.seconds, math.nan


class Units:
    """What losses are told in.

    Args:
        corpus: Says what a token stands for.
        part: Of the corpus, which the losses are of.
        read: How an evaluation reads that part, and its limit of tokens: byte pairs of some windows may stand for more
            or fewer bytes than those of the whole part. None for the whole.
    """

    def __init__(self, corpus: Corpus, part: str = "held_out", read: tuple[DataConfig, int] | None = None):
        self.name = "pixel" if corpus.unit == "pixel" else "byte"
        self._of_tokens = corpus.unit == "token"
        if self._of_tokens and read is not None:
            self._per_token = evaluated_bytes(corpus, *read, part)
        else:
            self._per_token = corpus.units_per_token(part)

    def bits(self, nats: float) -> float:
        """Bits a byte, or a pixel, of nats a token."""
        return nats / math.log(2) / self._per_token

    def training(self, nats: float) -> dict[str, float]:
        """The training loss, for a line of metrics."""
        return {"loss": nats, f"bits_per_{self.name}": self.bits(nats)}

    def held_out(self, nats: float) -> dict[str, float | None]:
        """The held-out loss, for a line of metrics; the perplexity where tokens are more than bytes or pixels."""
        perplexity = math.exp(min(nats, 700)) if self._of_tokens else None  # beyond it floats end
        bits = {f"held_out_bits_per_{self.name}": self.bits(nats)}
        return {"held_out_loss": nats, **bits, "held_out_perplexity": perplexity}


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All lines of a run.

    Raises:
        TrainError: There are none.
    """
    path = folder / METRICS_FILE
    records = _read(path)
    if not records:
        raise TrainError(f"{path} holds no metrics. Name the folder of a run that has trained.")
    return records


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise TrainError(f"{path} cannot be read ({error}). Mend it, or delete it to go on without it.") from None
    return [record for record in map(_parse, lines) if record is not None]


def _parse(line: str) -> dict[str, Any] | None:
    """One line, or None where a crash cut it short or it is damaged."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not all(map(_is_measured, record.values())):
        return None
    return record if isinstance(record.get("step"), int) and isinstance(record.get("seconds"), int | float) else None


def _is_measured(value: Any) -> bool:
    """Whether this is a number, or a list of such."""
    return all(map(_is_measured, value)) if isinstance(value, list) else isinstance(value, int | float)
