"""What steps measure, read late so that the device stays busy: recorded, and shown as a bar or in lines."""

from __future__ import annotations

import math
import time
from collections import deque
from types import TracebackType

import jax
import tqdm

from train.metrics import Metrics, Units
from train.processes import is_first
from train.step import Measured

# Steps in flight before the host waits for one: enough to hide its own work behind the device's.
LAG = 4
# Seconds from one line of progress to the next where there is no bar, as in a log file.
LINE_EVERY = 10.0


class NotFiniteError(ArithmeticError):
    """A loss or a gradient is NaN or infinite."""


class Progress:
    """Reads what steps measured `LAG` steps late and records the mean every so many steps; a context manager.

    The clock of `metrics` runs while steps do: from `start` to `drain`.

    Args:
        metrics: Where to record.
        units: What to tell losses in.
        tokens_per_step: Tokens that a step is trained on.
        every: Steps between two records.
        step: Steps done.
        steps: Steps in all, for the bar.
    """

    def __init__(self, metrics: Metrics, units: Units, tokens_per_step: int, every: int, step: int, steps: int):
        self._metrics, self._units = metrics, units
        self._tokens_per_step, self._every = tokens_per_step, every
        self._in_flight: deque[tuple[int, Measured]] = deque()
        self._read: list[dict[str, float]] = []  # since the last record
        self._step = step  # of the last one read
        self._recorded_at = metrics.clock.seconds
        self._last_line = -math.inf
        # disable=None: no bar where nobody watches, as in a log file.
        self._bar = tqdm.tqdm(total=steps, initial=step, unit="step", disable=None if is_first() else True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def start(self) -> None:
        """Starts the clock: steps follow."""
        self._metrics.clock.start()

    def push(self, step: int, measured: Measured) -> None:
        """Takes what a step measured.

        Raises:
            NotFiniteError: An earlier step's loss or gradient is not finite.
        """
        for array in measured:
            array.copy_to_host_async()
        self._in_flight.append((step, measured))
        self._bar.update()
        if len(self._in_flight) > LAG:
            self._read_one()

    def drain(self) -> None:
        """Waits for the steps under way and stops the clock.

        Raises:
            NotFiniteError: A loss or gradient is not finite.
        """
        while self._in_flight:
            self._read_one()
        self._metrics.clock.stop()

    def record_rest(self) -> None:
        """Records the steps since the last record: fewer than usual, at the end."""
        if self._read:
            self._record()

    def _read_one(self) -> None:
        self._step, arrays = self._in_flight.popleft()
        measured: dict[str, float] = {name: float(array) for name, array in arrays._asdict().items()}
        for name, said in (("loss", "loss"), ("gradient_norm", "gradient's norm")):
            if not math.isfinite(measured[name]):
                raise NotFiniteError(f"The {said} is {measured[name]} at step {self._step}.")
        self._read.append(measured)
        if self._step % self._every == 0:
            self._record()

    def _record(self) -> None:
        count, now = len(self._read), self._metrics.clock.seconds
        rate = count * self._tokens_per_step / max(now - self._recorded_at, 1e-9)
        loss = math.fsum(measured["loss"] for measured in self._read) / count
        self._metrics.write(
            self._step,
            {
                **self._units.training(loss),
                "tokens_per_second": round(rate, 1),
                "gradient_norm": math.fsum(measured["gradient_norm"] for measured in self._read) / count,
                "learning_rate": self._read[-1]["learning_rate"],
                "peak_memory_bytes": peak_memory(),
            },
        )
        self._read.clear()
        self._recorded_at = now
        bits = f"{self._units.bits(loss):.3f} bits/{self._units.name}"
        progress = f"loss {loss:.3f}, {bits}, {rate:,.0f} tokens/s"
        self._bar.set_postfix_str(progress)
        if self._bar.disable and time.monotonic() >= self._last_line + LINE_EVERY:
            self._last_line = time.monotonic()
            print(f"step {self._step}: {progress}")


def peak_memory() -> int | None:
    """The most bytes that the (first) device has had in use at once, if it reports them."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
