"""Checkpoints: the training state and the place in the data, written by orbax beside the running training."""

from __future__ import annotations

from pathlib import Path

import grain
import jax
import orbax.checkpoint as ocp

from train.errors import TrainError
from train.step import TrainState

CHECKPOINT_FOLDER = "checkpoints"
KEPT = 2


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last one to be written.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: Path):
        self._path = (folder / CHECKPOINT_FOLDER).resolve()
        self._manager = ocp.CheckpointManager(
            self._path, options=ocp.CheckpointManagerOptions(max_to_keep=KEPT, create=True)
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """The step of the last whole checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, batches: grain.DatasetIterator) -> None:
        """Begins to write a checkpoint; one of the same step is left as it is.

        Args:
            step: Steps done.
            state: The state after them. It may be donated as soon as this returns.
            batches: The data, standing behind the last batch trained on.
        """
        if step == self.latest_step:
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state._asdict()), data=grain.checkpoint.CheckpointSave(batches)
            ),
        )

    def restore(self, like: TrainState, batches: grain.DatasetIterator) -> TrainState:
        """Reads the last checkpoint.

        Args:
            like: A state of the same shapes.
            batches: Moved to where it stood.

        Returns:
            The state, on the devices of `like`.

        Raises:
            TrainError: The checkpoint is damaged.
        """
        step = self.latest_step
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract), data=grain.checkpoint.CheckpointRestore(batches)
                ),
            )
        except Exception as error:  # orbax raises whatever its storage layers do
            summary = " ".join(str(error).split())[:200]
            raise TrainError(
                f"{self._path / str(step)} cannot be restored ({type(error).__name__}: {summary}). "
                f"Delete that folder to continue from the checkpoint before it."
            ) from error
        return TrainState(**restored["state"])
