"""The training loop: keeps the device busy, reads losses late, evaluates, saves, stops if asked."""

from __future__ import annotations

import functools
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import tqdm

from train.checkpoint import Checkpoints
from train.config import Config
from train.data import Corpus, held_out_batches
from train.errors import TrainError
from train.metrics import Metrics
from train.step import BITS_PER_NAT, LanguageModel, TrainState, eval_step, make_optimizer, train_step

# Steps in flight before the host waits for a loss: enough to hide its own work behind the device's.
LAG = 4
# Seconds from one line of progress to the next where there is no bar, as in a log file.
LINE_EVERY = 10.0


class Compiled(NamedTuple):
    """The step and the evaluation, compiled once: other shapes raise instead of compiling again."""

    train_step: Callable[[TrainState, np.ndarray], tuple[TrainState, jax.Array]]
    eval_step: Callable[[Any, Any, np.ndarray, np.ndarray], jax.Array]


def compile_steps(config: Config, corpus: Corpus, model: LanguageModel, state: TrainState) -> Compiled:
    """Compiles the step and the evaluation for a configuration; the step donates the state it is given."""
    shape = (config.data.batch_size, config.data.seq_len + 1)
    batch, weights = jax.ShapeDtypeStruct(shape, corpus.tokenizer.dtype), jax.ShapeDtypeStruct(shape[:1], np.float32)
    step = functools.partial(train_step, model, make_optimizer(config.optimizer), config.optimizer.seed)
    evaluation = functools.partial(eval_step, model)
    return Compiled(
        jax.jit(step, donate_argnums=0).lower(state, batch).compile(),
        jax.jit(evaluation).lower(state.params, state.fixed, batch, weights).compile(),
    )


def evaluate(compiled: Compiled, state: TrainState, config: Config, corpus: Corpus) -> float:
    """Mean loss on held-out text, nats a token."""
    data = config.data
    batches = held_out_batches(corpus, data, config.run.eval_tokens)
    sums, sequences = [], 0.0
    for batch, weights in batches:
        sums.append(compiled.eval_step(state.params, state.fixed, batch.tokens, weights))
        sequences += float(weights.sum())
    return math.fsum(float(part) for part in sums) / (sequences * data.seq_len)


def train(
    config: Config,
    corpus: Corpus,
    compiled: Compiled,
    state: TrainState,
    batches: grain.DatasetIterator,
    checkpoints: Checkpoints,
    metrics: Metrics,
) -> tuple[TrainState, signal.Signals | None]:
    """Trains from `state.step` to the end, or until it is asked to stop.

    Args:
        config: The run's configuration.
        corpus: Where the held-out text comes from.
        compiled: From `compile_steps`.
        state: The state to start from; donated.
        batches: Training data, standing where `state` does.
        checkpoints: Where to save.
        metrics: Where to record.

    Returns:
        The last state, which was saved, and the signal that ended training early, if one did.

    Raises:
        TrainError: The loss is not finite any more.
    """
    run, tokens_per_step = config.run, config.data.batch_size * config.data.seq_len
    step, stop = int(state.step), min(config.optimizer.steps, run.stop_at or config.optimizer.steps)
    out_of_time = time.monotonic() + (math.inf if run.seconds is None else run.seconds)
    losses = _LaggedLosses(metrics, tokens_per_step, run.log_every, step)
    if step == 0:
        _report_held_out(metrics, step, evaluate(compiled, state, config, corpus))

    with (
        _StopRequest() as stop_request,
        # disable=None: no bar where nobody watches, as in a log file.
        tqdm.tqdm(total=config.optimizer.steps, initial=step, unit="step", disable=None) as bar,
    ):
        losses.restart_clock()
        while step < stop and stop_request.signal is None and time.monotonic() < out_of_time:
            state, loss = compiled.train_step(state, next(batches).tokens)
            step += 1
            bar.update()
            losses.push(step, loss, bar)
            due_evaluation = step % run.eval_every == 0 and step < stop
            due_checkpoint = step % run.checkpoint_every == 0 and step < stop
            if due_evaluation or due_checkpoint:
                losses.drain(bar)  # also makes sure that no checkpoint holds a state gone wrong
                if due_checkpoint:
                    checkpoints.save(step, state, batches)
                if due_evaluation:
                    _report_held_out(metrics, step, evaluate(compiled, state, config, corpus))
                losses.restart_clock()
        losses.drain(bar)
        losses.record_rest(bar)
        checkpoints.save(step, state, batches)
    if stop_request.signal is None and not any(
        record["step"] == step and "held_out_loss" in record for record in metrics.history
    ):
        _report_held_out(metrics, step, evaluate(compiled, state, config, corpus))
    return state, stop_request.signal


class _LaggedLosses:
    """Reads losses `LAG` steps late and records their mean every so many steps."""

    def __init__(self, metrics: Metrics, tokens_per_step: int, log_every: int, step: int):
        self._metrics, self._tokens_per_step, self._log_every = metrics, tokens_per_step, log_every
        self._in_flight: deque[tuple[int, jax.Array]] = deque()
        self._read: list[float] = []  # since the last record
        self._last_step = step
        self._clock, self._timed_steps = time.monotonic(), 0
        self._last_line = -math.inf

    def restart_clock(self) -> None:
        """Leaves the time since the last loss (an evaluation, a checkpoint) out of the tokens a second."""
        self._clock, self._timed_steps = time.monotonic(), 0

    def push(self, step: int, loss: jax.Array, bar: tqdm.tqdm) -> None:
        loss.copy_to_host_async()
        self._in_flight.append((step, loss))
        if len(self._in_flight) > LAG:
            self._read_one(bar)

    def drain(self, bar: tqdm.tqdm) -> None:
        while self._in_flight:
            self._read_one(bar)

    def _read_one(self, bar: tqdm.tqdm) -> None:
        step, array = self._in_flight.popleft()
        loss = float(array)
        if not math.isfinite(loss):
            raise TrainError(
                f"The loss is {loss} at step {step}. Start again with a lower --lr; "
                f"the checkpoints written so far are as they were."
            )
        self._read.append(loss)
        self._timed_steps += 1
        self._last_step = step
        if step % self._log_every == 0:
            self._record(bar)

    def record_rest(self, bar: tqdm.tqdm) -> None:
        """Records the losses since the last line: of less steps than usual, at the end."""
        if self._read:
            self._record(bar)

    def _record(self, bar: tqdm.tqdm) -> None:
        now = time.monotonic()
        rate = self._timed_steps * self._tokens_per_step / max(now - self._clock, 1e-9)
        self._clock, self._timed_steps = now, 0
        mean = math.fsum(self._read) / len(self._read)
        self._read.clear()
        self._metrics.training(self._last_step, mean, rate)
        progress = f"loss {mean:.3f}, {mean * BITS_PER_NAT:.3f} bits/byte, {rate:,.0f} tokens/s"
        bar.set_postfix_str(progress)
        if bar.disable and now >= self._last_line + LINE_EVERY:
            self._last_line = now
            print(f"step {self._last_step}: {progress}")


class _StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a wish that the loop reads; a second one ends the program."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signal = signal.Signals(number)
        self.__exit__()


def _report_held_out(metrics: Metrics, step: int, loss: float) -> None:
    record = metrics.held_out(step, loss)
    bits = record["held_out_bits_per_byte"]
    tqdm.tqdm.write(f"step {step}: held-out {bits:.3f} bits per byte, {record['seconds']:.0f} s")
