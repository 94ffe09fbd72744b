"""The loss of a run's checkpoint on a part of its data: `python -m train evaluate`."""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import tyro

from train.data import load_corpus
from train.errors import TrainError
from train.files import cannot_be, write_whole
from train.folder import check_corpus, expanded, load_config, moved
from train.loop import evaluate
from train.memory import out_of_memory_in_one_line
from train.metrics import Units
from train.restore import restored
from train.step import eval_step

EVALUATION_FILE = "evaluation.json"


@dataclass(frozen=True)
class EvaluateOptions:
    """Tell the loss of a checkpoint on a part of the data that its run was trained on; also in evaluation.json."""

    run: tyro.conf.Positional[str]
    """Folder of the run."""
    part: Literal["test", "held_out"] = "test"
    """What enwik8 and MNIST keep for the end, or what the evaluations of training read."""
    checkpoint: Literal["best", "last"] = "best"
    """The one with the lowest held-out loss, or the last one."""
    tokens: int = 0
    """Read this many at most, spread evenly; 0 for all."""
    data: str | None = None
    """Where the run's data lie now, if they were moved."""
    bpe: str | None = None
    """Likewise, of the files of its byte pairs."""


def evaluate_run(options: EvaluateOptions) -> int:
    """Evaluates a run's checkpoint.

    Args:
        options: From the command line.

    Returns:
        The exit code 0.

    Raises:
        TrainError: The folder holds no run or no checkpoint, the data is gone or has no such part, or an option makes
            no sense.
    """
    if options.tokens < 0:
        raise TrainError(f"--tokens must not be negative, got {options.tokens}.")
    folder = expanded("run", options.run)
    config = moved(load_config(folder), options.data, options.bpe)
    corpus = load_corpus(config.data)
    check_corpus(folder, corpus)  # what this text holds out may be what the run was trained on
    corpus.part(options.part)  # before the model is read
    model, state = restored(folder, config, corpus, options.checkpoint)
    # In batches that fit where a part of a training step does.
    data = dataclasses.replace(config.data, batch_size=config.data.batch_size // config.optimizer.accumulate)
    step = jax.jit(functools.partial(eval_step, model))
    with out_of_memory_in_one_line(lambda: "Use a device with more memory."):
        loss = evaluate(step, state, corpus, data, options.tokens, options.part)
    units = Units(corpus, options.part, (data, options.tokens))
    found = {
        "part": options.part,
        "checkpoint": options.checkpoint,
        "step": int(state.step),
        "tokens": options.tokens,
        "loss": loss,
        f"bits_per_{units.name}": units.bits(loss),
    }
    try:
        known = {**_read(folder), options.part: found}
        write_whole(folder / EVALUATION_FILE, json.dumps(known, indent=2) + "\n")
    except OSError as error:
        raise cannot_be("written", folder / EVALUATION_FILE, error, "Make room or mend its folder.") from None
    bits = f"{units.bits(loss):.4f} bits per {units.name}"
    print(f"{options.part}: {bits}, {options.checkpoint} checkpoint, step {found['step']}")
    return 0


def read_evaluation(folder: Path, part: str = "test") -> dict[str, Any] | None:
    """What `evaluate_run` last wrote of a part of a run's data; None if it did not.

    Args:
        folder: The run's folder.
        part: "test" or "held_out".

    Raises:
        TrainError: It is damaged.
    """
    return _read(folder).get(part)


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    """The evaluations of a run, by the part."""
    path = folder / EVALUATION_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and "part" in found:
            found = {found["part"]: found}  # as earlier versions wrote it
        if not isinstance(found, dict) or not all(isinstance(entry, dict) for entry in found.values()):
            raise ValueError("it holds no evaluation")
    except FileNotFoundError:
        return {}
    except (OSError, TypeError, ValueError) as error:
        raise TrainError(f"{path} cannot be read ({error}). Make it anew: delete it and call evaluate.") from None
    return found
