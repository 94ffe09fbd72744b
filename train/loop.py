"""The training loop: keeps the device busy, evaluates, saves, stops if asked."""

from __future__ import annotations

import dataclasses
import functools
import math
import signal
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import tqdm
from jax.sharding import Mesh

from models.buckets import HASHING
from scfa_jax.layers.moba import ChosenBlocks
from train.blocks import recall_step, recalls
from train.buckets import bucket_sizes, bucket_step
from train.checkpoint import Checkpoints
from train.config import Config, DataConfig
from train.data import Batch, Corpus, held_out_batches
from train.errors import TrainError
from train.mesh import lower, lower_step, make_mesh, on_all, over_batch, place, place_rows
from train.metrics import Metrics, Units
from train.processes import Agreement
from train.progress import LAG, NotFiniteError, Progress
from train.step import LanguageModel, Measured, TrainState, eval_step
from train.stop import StopRequest

TIME_IS_UP = 1  # no signal that is caught has this number

# What is measured of layers of some kinds at an evaluation: arrays in a step, and what metrics keep of them.
MEASURES = ((HASHING, bucket_step, bucket_sizes), (ChosenBlocks, recall_step, recalls))


class Compiled(NamedTuple):
    """What a run calls, compiled once: other shapes raise instead of compiling again."""

    train_step: Callable[[TrainState, Batch], tuple[TrainState, Measured]]
    eval_step: Callable[[Any, Any, Batch, np.ndarray], jax.Array]
    measures: Sequence[Callable[[Any, Any, Batch], dict[str, Any]]]  # those of `MEASURES` that have a layer


def compile_steps(config: Config, corpus: Corpus, model: LanguageModel, state: TrainState) -> Compiled:
    """Compiles the steps for a configuration; the training step donates the state it is given."""
    mesh, batch_size = make_mesh(config.run.mesh), config.data.batch_size
    cut = None if mesh is None else over_batch(mesh)
    part, weights = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cut),
        next(held_out_batches(corpus, _evaluated(config), max_tokens=1)),
    )
    batch = jax.tree.map(lambda x: x.update(shape=(batch_size, *x.shape[1:])), part)
    # Per compilation, not in XLA_FLAGS: those are read once, and hold for all that the process computes.
    options: dict[str, str | bool] | None = {"xla_gpu_deterministic_ops": True} if config.run.deterministic else None

    outputs = None if mesh is None else on_all(mesh)
    evaluation = lower(
        mesh, functools.partial(eval_step, model), state.params, state.fixed, part, weights, out_shardings=outputs
    )
    measures = []
    for kinds, step, told in MEASURES:
        if any(isinstance(layer.kind, kinds) for layer in config.model.layer_kinds()):
            measured = functools.partial(step, model)
            lowered = lower(mesh, measured, state.params, state.fixed, part, out_shardings=outputs)
            measures.append(functools.partial(_told, told, lowered.compile(compiler_options=options)))
    steps = Compiled(
        lower_step(mesh, model, config.optimizer, state, batch).compile(compiler_options=options),
        evaluation.compile(compiler_options=options),
        measures,
    )
    return steps if mesh is None else _placing(mesh, steps, batch_size)


def _placing(mesh: Mesh, steps: Compiled, batch_size: int) -> Compiled:
    """Steps that take what a process has read: its rows of a training batch, or all of an evaluation's."""
    train_step, eval_step, measures = steps
    return Compiled(
        lambda state, batch: train_step(state, place_rows(mesh, batch, batch_size)),
        lambda params, fixed, *batch: eval_step(params, fixed, *place(mesh, batch)),
        [functools.partial(_placed, mesh, measure) for measure in measures],
    )


def _placed(mesh: Mesh, measure: Callable[..., dict[str, Any]], params: Any, fixed: Any, batch: Batch):
    return measure(params, fixed, place(mesh, batch))


def _told(told: Callable[[Any], dict[str, Any]], step: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    return told(step(*arguments))


def evaluate(
    eval_step: Callable[..., jax.Array],
    state: TrainState,
    corpus: Corpus,
    data: DataConfig,
    max_tokens: int,
    part: str = "held_out",
) -> float:
    """Mean loss on a part of the text, nats a token; arguments as of `held_out_batches`, and a step of `Compiled`."""
    sums, tokens = [], 0.0
    for batch, weights in held_out_batches(corpus, data, max_tokens, part):
        sums.append(eval_step(state.params, state.fixed, batch, weights))
        tokens += float(weights.sum()) * (batch.tokens.shape[1] - 1)
    return math.fsum(float(part) for part in sums) / tokens


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
        TrainError: A loss or a gradient is not finite any more, or something cannot be written.
    """
    run, units, agree = config.run, Units(corpus, read=(_evaluated(config), config.run.eval_tokens)), Agreement(LAG)
    step, stop = int(state.step), min(config.optimizer.steps, run.stop_at or config.optimizer.steps)
    seconds = math.inf if run.seconds is None else run.seconds
    tokens_per_step = config.data.batch_size * config.data.seq_len

    def evaluated() -> float:
        loss = evaluate(compiled.eval_step, state, corpus, _evaluated(config), run.eval_tokens)
        if not math.isfinite(loss):
            raise NotFiniteError(f"The held-out loss is {loss} at step {step}.")
        record = metrics.write(step, {**units.held_out(loss), **_measured(compiled, state, config, corpus)})
        bits = f"{units.bits(loss):.3f} bits per {units.name}"
        tqdm.tqdm.write(f"step {step}: held-out {bits}, {record['seconds']:.0f} s")
        return loss

    def wish() -> int:
        """Why to stop: a signal's number, above `TIME_IS_UP`; 0 to go on."""
        return stop_request.signal or (TIME_IS_UP if metrics.clock.seconds >= seconds else 0)

    try:
        with (
            StopRequest() as stop_request,
            Progress(metrics, units, tokens_per_step, run.log_every, step, config.optimizer.steps) as progress,
        ):
            if step == 0:
                evaluated()
            progress.start()
            while not (ended := agree(wish())) and step < stop:
                state, measured = compiled.train_step(state, next(batches))
                step += 1
                progress.push(step, measured)
                due_evaluation, due_checkpoint = (step % every == 0 for every in (run.eval_every, run.checkpoint_every))
                if step < stop and (due_evaluation or due_checkpoint):
                    progress.drain()  # also makes sure that no checkpoint holds a state gone wrong
                    loss = evaluated() if due_evaluation else None
                    if due_checkpoint or (loss is not None and loss < checkpoints.best_loss):
                        checkpoints.save(step, state, batches, loss)
                    progress.start()
            progress.drain()
            progress.record_rest()
            # Whoever sent a signal is in a hurry.
            known = any(record["step"] == step and "held_out_loss" in record for record in metrics.history)
            loss = None if known or ended > TIME_IS_UP else evaluated()
            checkpoints.save(step, state, batches, loss)
    except NotFiniteError as error:
        raise TrainError(f"{error} {_last_good(checkpoints)} Start again with a lower --lr.") from None
    return state, signal.Signals(ended) if ended > TIME_IS_UP else None


def _measured(compiled: Compiled, state: TrainState, config: Config, corpus: Corpus) -> dict[str, Any]:
    """What `MEASURES` tell of the layers, on a held-out batch."""
    if not compiled.measures:
        return {}
    batch, _ = next(held_out_batches(corpus, _evaluated(config), config.run.eval_tokens))
    of_all = [measure(state.params, state.fixed, batch) for measure in compiled.measures]
    return {name: value for told in of_all for name, value in told.items()}


def _evaluated(config: Config) -> DataConfig:
    """The data in batches that fit where a part of a training step does."""
    return dataclasses.replace(config.data, batch_size=config.data.batch_size // config.optimizer.accumulate)


def _last_good(checkpoints: Checkpoints) -> str:
    checkpoints.wait()
    step = checkpoints.latest_step
    if step is None:
        return "No checkpoint was written before."
    return f"The last good checkpoint is {checkpoints.path(step)}."
