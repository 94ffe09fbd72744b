"""One run from beginning to end: read, compile, train; a sample, a plot and a summary in the run's folder."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any

import jax

from train.checkpoint import Checkpoints
from train.config import CONFIG_FILE, Config, load_facts, new_run_folder, save_config
from train.data import Corpus, load_corpus, training_batches
from train.errors import TrainError
from train.loop import compile_steps, train
from train.metrics import Metrics
from train.plot import PLOT_FILE, plot_loss
from train.sample import sample
from train.step import LanguageModel, TrainState, init

SAMPLE_FILE = "sample.txt"
DEFAULT_PROMPT_LENGTH = 64
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def run(config: Config) -> int:
    """Runs what `config` describes.

    Args:
        config: From `train.config.parse`.

    Returns:
        The exit code: 0, or 128 + the number of the signal that ended training early.

    Raises:
        TrainError: Something the user can put right; nothing was overwritten.
    """
    data = config.data
    corpus = load_corpus(data)
    folder = _open_folder(config, corpus)
    model, state = init(config.model, config.optimizer, vocab_size=corpus.vocab_size, max_length=data.seq_len)
    parameters = sum(array.size for array in jax.tree.leaves(state.params))
    device = jax.devices()[0].device_kind
    print(f"{corpus.name}: {corpus.train.size:,} {corpus.unit}s to train on, {corpus.held_out.size:,} held out")
    print(f"{parameters:,} parameters, {config.model.attention} attention, {config.model.dtype} on {device}")
    print(f"writing to {folder}")

    batches = training_batches(corpus, data, config.optimizer.seed)
    with Checkpoints(folder) as checkpoints:
        if config.run.resume:
            if checkpoints.latest_step is None:
                print("no checkpoint was written yet: starting from step 0")
            else:
                state = checkpoints.restore(state, batches)
                print(f"continuing from step {int(state.step)}")
        start = time.monotonic()
        compiled = compile_steps(config, corpus, model, state)
        print(f"compiled in {time.monotonic() - start:.1f} s")
        with Metrics(folder, int(state.step)) as metrics:
            state, stopped_by = train(config, corpus, compiled, state, batches, checkpoints, metrics)
    step = int(state.step)
    if stopped_by is not None:
        print(f"{stopped_by.name} at step {step}, checkpoint saved: python -m train --resume --out {folder}")
        return 128 + stopped_by
    _finish(config, corpus, folder, model, state, metrics)
    if step < config.optimizer.steps:
        print(f"stopped as asked at step {step}, checkpoint saved: python -m train --resume --out {folder}")
    return 0


def _open_folder(config: Config, corpus: Corpus) -> Path:
    """Makes the run's folder with its `config.json`, or checks that the one to resume read the same text."""
    if config.run.resume:
        folder = Path(config.run.out or "")
        facts = load_facts(folder)
        stored = facts.get("corpus", {})
        if stored.get("sha256") != corpus.sha256:
            raise TrainError(
                f"{folder / CONFIG_FILE} was written for another text ({stored.get('name')}) than the one "
                f"found now ({corpus.name}). Bring that text back, or start a new run without --resume."
            )
        changed = _changed(facts, _facts(corpus))
        if changed:
            print(f"note: the run goes on, but perhaps not bit for bit: {changed}")
        return folder
    return _make_folder(config, corpus)


def _make_folder(config: Config, corpus: Corpus) -> Path:
    folder: Path | None = None
    try:
        folder = new_run_folder(config)
        folder.mkdir(parents=True, exist_ok=True)
        save_config(folder, config, _facts(corpus))
    except OSError as error:
        if folder is not None:
            with contextlib.suppress(OSError):
                folder.rmdir()  # it is empty, unless it held something before
        name = error.filename or config.run.out
        raise TrainError(f"{name} cannot be written ({error.strerror}). Choose another folder with --out.") from None
    return folder


def _facts(corpus: Corpus) -> dict[str, Any]:
    device = jax.devices()[0]
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "corpus": corpus.facts,
        "versions": {"python": platform.python_version(), **versions},
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "cpu_cores": os.cpu_count(),
        },
    }


def _changed(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Versions and devices that differ, for people; empty if none does."""
    sections = {"versions": (*PACKAGES,), "device": ("kind", "cpu_cores")}
    pairs = [
        (name, old.get(section, {}).get(name), new[section][name])
        for section, names in sections.items()
        for name in names
    ]
    return ", ".join(f"{name} was {before}, is {now}" for name, before, now in pairs if before != now)


def _finish(
    config: Config, corpus: Corpus, folder: Path, model: LanguageModel, state: TrainState, metrics: Metrics
) -> None:
    """Writes the sample and the plot and says how it went."""
    step = int(state.step)
    title = f"{corpus.name}\n{config.model.attention} attention, {config.data.seq_len} tokens a sequence"
    plot_loss(metrics.history, title, folder / PLOT_FILE)
    if config.run.prompt is None:
        prompt = corpus.held_out[:DEFAULT_PROMPT_LENGTH].tobytes()
    else:
        prompt = config.run.prompt.encode("utf-8", "surrogateescape")  # any bytes can come from a command line
    added = sample(
        model,
        state.params,
        state.fixed,
        prompt or b"\0",
        length=config.run.sample_length,
        window=config.data.seq_len,
        temperature=config.run.temperature,
        seed=config.optimizer.seed,
    )
    shown, continued = (part.decode("utf-8", "replace").replace("\0", "\n") for part in (prompt, added))
    held_out = [record for record in metrics.history if "held_out_loss" in record][-1]
    summary = (
        f"held-out {held_out['held_out_bits_per_byte']:.3f} bits per byte at step {step} of "
        f"{config.optimizer.steps}, {held_out['seconds']:.0f} s; {corpus.name}"
    )
    (folder / SAMPLE_FILE).write_text(
        f"{summary}\n\n--- prompt\n{shown}\n--- continuation\n{continued}\n",
        encoding="utf-8",
        errors="backslashreplace",
    )
    print(f"--- {shown!r} goes on:\n{continued}\n---")
    print(summary)
    print(f"wrote {folder / PLOT_FILE}, {folder / SAMPLE_FILE}")
