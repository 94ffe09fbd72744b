"""The model of a run that was trained before."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from train.checkpoint import Checkpoints
from train.config import Config
from train.data import Corpus
from train.errors import TrainError
from train.folder import CONFIG_FILE, expanded, load_config
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
        TrainError: There is no checkpoint, it cannot be restored, or this machine cannot have the model.
    """
    wrong = config.model.problem()
    if wrong:
        raise TrainError(f"{folder / CONFIG_FILE}: {wrong}")
    model, like = init(config.model, config.optimizer, vocab_size=corpus.vocab_size, max_length=config.data.seq_len)
    with Checkpoints(folder, config.model) as checkpoints:
        step = checkpoints.latest_step
        if step is None:
            raise TrainError(f"{folder} holds no checkpoint yet. Train it first.")
        if which == "best" and checkpoints.best_step is not None:
            step = checkpoints.best_step
        return model, checkpoints.restore(step, like)


def variables_of(run: str, corpus: Corpus, like: TrainState) -> tuple[Any, Any]:
    """Reads the best parameters of a run, to start another from.

    Args:
        run: The run's folder.
        corpus: What is trained on.
        like: A state of the shapes that are wanted.

    Returns:
        The parameters; and the other variables, centroids among them, those of `like` where they have other shapes.

    Raises:
        TrainError: There are none, or they are of another model.
    """
    folder = expanded("start-from", run)
    _, state = restored(folder, load_config(folder), corpus, "best")
    if jax.tree.map(jnp.shape, state.params) != jax.tree.map(jnp.shape, like.params):
        raise TrainError(
            f"--start-from: the model of {folder} has other parameters than this one. Give this run the same --layers, "
            f"--width, --heads and --positions, and an --attention with the same share_query_key."
        )
    same = jax.tree.map(jnp.shape, state.fixed) == jax.tree.map(jnp.shape, like.fixed)
    return state.params, state.fixed if same else like.fixed
