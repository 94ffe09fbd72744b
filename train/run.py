"""One run from beginning to end: read, compile, train; a sample, a plot and a summary in the run's folder."""

from __future__ import annotations

import time
from pathlib import Path

import jax

from train.checkpoint import Checkpoints, has_checkpoint
from train.config import Config
from train.data import Corpus, load_corpus, training_batches
from train.files import cannot_be
from train.flops import model_flops
from train.folder import open_folder
from train.loop import compile_steps, train
from train.memory import out_of_memory_in_one_line
from train.mesh import gathered, init_on, make_mesh, rows_to_read
from train.metrics import Metrics, Units
from train.plot import PLOT_FILE, plot_losses
from train.processes import is_first, one_speaks
from train.restore import variables_of
from train.sample import SampleOptions, write_sample
from train.step import LanguageModel, TrainState


def run(config: Config) -> int:
    """Runs what `config` describes.

    Args:
        config: From `train.options.parse`.

    Returns:
        The exit code: 0, or 128 + the number of the signal that ended training early.

    Raises:
        TrainError: Something the user can put right; nothing was overwritten.
    """
    with one_speaks():
        mesh = make_mesh(config.run.mesh)
        corpus = load_corpus(config.data)
        with out_of_memory_in_one_line(_remedy):
            model, state = init_on(mesh, config, corpus.vocab_size)
        if config.run.start_from is not None and not config.run.resume:
            params, fixed = variables_of(config.run.start_from, corpus, state)
            as_before = lambda new, old: jax.device_put(new, jax.tree.map(lambda x: x.sharding, old))
            state = state._replace(params=as_before(params, state.params), fixed=as_before(fixed, state.fixed))
        folder = open_folder(config, corpus)
        with out_of_memory_in_one_line(lambda: _remedy(folder)):
            return _run(config, corpus, folder, mesh, model, state)


def _run(
    config: Config,
    corpus: Corpus,
    folder: Path,
    mesh: jax.sharding.Mesh | None,
    model: LanguageModel,
    state: TrainState,
) -> int:
    data = config.data
    parameters = sum(array.size for array in jax.tree.leaves(state.params))
    device = jax.devices()[0].device_kind if mesh is None else f"{mesh.size} x {jax.devices()[0].device_kind}"
    print(f"{corpus.name}: {corpus.train.size:,} {corpus.unit}s to train on, {corpus.held_out.size:,} held out")
    print(f"{parameters:,} parameters, {config.model.attention} attention, {config.model.dtype} on {device}")
    print(f"writing to {folder}")

    batches = training_batches(corpus, data, config.optimizer.seed, *rows_to_read(mesh, data.batch_size))
    with Checkpoints(folder, config.model) as checkpoints:
        if config.run.resume:
            if checkpoints.latest_step is None:
                print("no checkpoint was written yet: starting from step 0")
            else:
                state = checkpoints.restore(checkpoints.latest_step, state, batches)
                print(f"continuing from step {int(state.step)}")
        step = int(state.step)
        with Metrics(folder, step) as metrics:
            start = time.monotonic()
            compiled = compile_steps(config, corpus, model, state)
            seconds = time.monotonic() - start
            print(f"compiled in {seconds:.1f} s")
            facts = {
                "compile_seconds": round(seconds, 3),
                "parameters": parameters,
                "flops_per_step": model_flops(config.model, state.params, data.batch_size, data.seq_len),
            }
            metrics.write(step, facts)
            state, stopped_by = train(config, corpus, compiled, state, batches, checkpoints, metrics)
    step = int(state.step)
    if stopped_by is not None:
        print(f"{stopped_by.name} at step {step}, checkpoint saved: python -m train --resume --out {folder}")
        return 128 + stopped_by
    # A sample is made by one device of the first process.
    params, fixed = gathered(mesh, (state.params, state.fixed))
    if is_first():
        _finish(config, corpus, folder, model, state._replace(params=params, fixed=fixed), metrics)
    if step < config.optimizer.steps:
        print(f"stopped as asked at step {step}, checkpoint saved: python -m train --resume --out {folder}")
    return 0


def _remedy(folder: Path | None = None) -> str:
    kept = folder is not None and has_checkpoint(folder)
    return (
        "Start a new run with a smaller --batch-size, with --accumulate (a step in that many parts), or with "
        f"--remat save_attention or full.{f' All checkpoints of this one are whole: {folder}.' if kept else ''}"
    )


def _finish(
    config: Config, corpus: Corpus, folder: Path, model: LanguageModel, state: TrainState, metrics: Metrics
) -> None:
    """Writes the sample, draws the plot and says how it went."""
    title = f"{corpus.name}\n{config.model.attention} attention, {config.data.seq_len} tokens a sequence"
    unit = Units(corpus).name
    held_out = [record for record in metrics.history if "held_out_loss" in record][-1]
    summary = (
        f"held-out {held_out[f'held_out_bits_per_{unit}']:.3f} bits per {unit} at step {int(state.step)} of "
        f"{config.optimizer.steps}, {held_out['train_seconds']:.0f} s of training; {corpus.name}"
    )
    options = SampleOptions(
        run=str(folder),
        prompt=config.run.prompt,
        length=config.run.sample_length,
        temperature=config.run.temperature,
        seed=config.optimizer.seed,
    )
    files = []
    try:
        if config.run.sample_length:
            files.append(write_sample(options, summary, corpus, model, state, config.data.seq_len))
        files.append(_draw(folder, title, metrics))
    finally:
        print(summary)
    print(f"wrote {', '.join(map(str, files))}")


def _draw(folder: Path, title: str, metrics: Metrics) -> Path:
    path = folder / PLOT_FILE
    try:
        plot_losses({folder.name: metrics.history}, title, path)
    except OSError as error:
        raise cannot_be("written", path, error, f"python -m train report {folder} draws it anew.") from None
    return path
