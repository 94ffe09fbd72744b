"""The model of a run that was trained before."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from train.checkpoint import Checkpoints
from train.config import Config
from train.data import Corpus
from train.errors import TrainError
from train.step import LanguageModel, TrainState, init


def restored(
    folder: Path, config: Config, corpus: Corpus, which: Literal["best", "last"]
) -> tuple[LanguageModel, TrainState]:
    """Reads a checkpoint of a run.

    Args:
        folder: The run's folder.
        config: Its options.
        corpus: What it was trained on, or one of the same tokens.
        which: The checkpoint with the lowest held-out loss, if that is known of any, or the last one.

    Returns:
        The model and its state.

    Raises:
        TrainError: There is no checkpoint, or it cannot be restored.
    """
    model, like = init(config.model, config.optimizer, vocab_size=corpus.vocab_size, max_length=config.data.seq_len)
    with Checkpoints(folder) as checkpoints:
        step = checkpoints.latest_step
        if step is None:
            raise TrainError(f"{folder} holds no checkpoint yet. Train it first.")
        if which == "best" and checkpoints.best_step is not None:
            step = checkpoints.best_step
        return model, checkpoints.restore(step, like)
