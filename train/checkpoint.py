"""Checkpoints: the training state and the place in the data, written by orbax beside the running training."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from models import ModelConfig
from train.errors import TrainError
from train.processes import is_first
from train.step import TrainState

CHECKPOINT_FOLDER = "checkpoints"
KEPT = 2  # of the last ones; the best one is kept besides


class Checkpoints:
    """The last checkpoints of a run and the best one; a context manager that waits until they are written.

    Args:
        folder: The run's folder.
        model: Stands in each checkpoint, and is compared where one is read: layers of many kinds have parameters of the
            same shapes. None for neither.

    Attributes:
        best_loss: The lowest held-out loss of a checkpoint, nats a token; infinite if there is none.

    Raises:
        TrainError: The folder or a checkpoint in it is damaged. A checkpoint could not be written: from `save`, or when
            it is left.
    """

    def __init__(self, folder: Path, model: ModelConfig | None = None):
        self._path = (folder / CHECKPOINT_FOLDER).resolve()
        self._model = {} if model is None else _meaning(model)
        best = BestN(get_metric_fn=_held_out_loss, reverse=True, n=1)
        options = ocp.CheckpointManagerOptions(
            best_fn=_held_out_loss,
            best_mode="min",
            preservation_policy=AnyPreservationPolicy([LatestN(KEPT), best]),
            create=True,
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "data": grain.checkpoint.CheckpointHandler()}
        try:
            self._manager = ocp.CheckpointManager(self._path, options=options, item_handlers=handlers)
        except OSError as error:
            raise self._cannot_write(error) from error
        except ValueError as error:  # it reads the held-out losses of all checkpoints, and does not say whose failed
            raise self._cannot_restore(self._without_loss(), error) from error
        self._has_saved = False
        best_step = self._manager.best_step()
        self.best_loss = math.inf if best_step is None else _held_out_loss(self._manager.metrics(best_step))

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._manager.close()
        except Exception as error:
            if exception[0] is None:  # else it is told what went wrong first
                raise self._cannot_write(error) from error
        finally:
            # A whole one has another name. Whoever only reads leaves them: the run may be training at this moment.
            for partial in self._path.glob("*.orbax-checkpoint-tmp") if self._has_saved and is_first() else ():
                shutil.rmtree(partial, ignore_errors=True)

    @property
    def latest_step(self) -> int | None:
        """The step of the last whole checkpoint."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """The step of the one with the lowest held-out loss, if it is known of any."""
        return None if math.isinf(self.best_loss) else self._manager.best_step()

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self._path / str(step)

    def wait(self) -> None:
        """Waits until all is written.

        Raises:
            TrainError: Something could not be.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def save(
        self, step: int, state: TrainState, batches: grain.DatasetIterator, held_out_loss: float | None = None
    ) -> None:
        """Begins to write a checkpoint; one of the same step is left as it is.

        Args:
            step: Steps done.
            state: The state after them. It may be donated as soon as this returns.
            batches: The data, standing behind the last batch trained on.
            held_out_loss: Of this state, if it is known.
        """
        if step == self.latest_step:
            return
        if held_out_loss is not None:
            self.best_loss = min(self.best_loss, held_out_loss)
        self._has_saved = True
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state._asdict()), data=grain.checkpoint.CheckpointSave(batches)
                ),
                metrics={"held_out_loss": held_out_loss},
                custom_metadata={"model": self._model},
            )

    def restore(self, step: int, like: TrainState, batches: grain.DatasetIterator | None = None) -> TrainState:
        """Reads a checkpoint.

        Args:
            step: Which one.
            like: A state of the same shapes: arrays, or what `jax.eval_shape` gives.
            batches: Moved to where it stood, if given.

        Returns:
            The state, cut over devices as `like` is, whatever it was saved on.

        Raises:
            TrainError: The checkpoint is damaged, or of another model or optimizer.
        """
        try:
            self._check_fits(step, like)
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
            restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
            if batches is not None:
                # Each process wrote a file, and all the same: another number of processes may go on.
                file = next((self.path(step) / "data").glob("process_*.json"))
                batches.set_state(json.loads(file.read_text()))
        except TrainError:
            raise
        except Exception as error:  # orbax raises whatever its storage layers do
            raise self._cannot_restore(self.path(step), error) from error
        return TrainState(**restored["state"])

    def _check_fits(self, step: int, like: TrainState) -> None:
        there, here = (_shapes(tree) for tree in (self._manager.item_metadata(step)["state"].tree, like._asdict()))
        # Earlier versions wrote no model, or one with fewer options.
        model = (self._manager.metadata(step).custom_metadata or {}).get("model", {})
        known = model.keys() & self._model.keys()
        there, here = ({**{name: x[name] for name in known}, **y} for x, y in ((model, there), (self._model, here)))
        differing = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
        if differing:
            name = differing[0]
            raise TrainError(
                f"{self.path(step)} is a checkpoint of another configuration: {name} is {there.get(name, 'absent')} "
                f"there and {here.get(name, 'absent')} here. Bring back the config.json that it was written with."
            )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of this checkpoint, or of the last one, which was written beside the training
            raise self._cannot_write(error) from error

    def _without_loss(self) -> Path:
        """The checkpoint whose record of its held-out loss is damaged."""
        for file in self._path.glob("*/metrics/metrics"):
            try:
                json.loads(file.read_text())
            except ValueError:
                return file.parent.parent
        return self._path

    def _cannot_restore(self, path: Path, error: Exception) -> TrainError:
        return TrainError(
            f"{path} cannot be restored ({_summary(error)}). "
            f"Delete that folder to continue from the checkpoint before it."
        )

    def _cannot_write(self, error: Exception) -> TrainError:
        return TrainError(
            f"A checkpoint in {self._path} cannot be written ({_summary(error)}). "
            f"Make room or mend its folder; --resume continues from the last whole checkpoint."
        )


def has_checkpoint(folder: Path) -> bool:
    """Whether a run's folder holds a whole checkpoint."""
    return any(path.name.isdecimal() for path in (folder / CHECKPOINT_FOLDER).glob("*"))


def _held_out_loss(metrics: Any) -> float:
    """Infinite where it is not known: orbax warns of checkpoints without metrics."""
    loss = metrics["held_out_loss"]
    return math.inf if loss is None else loss


def _meaning(model: ModelConfig) -> dict[str, Any]:
    """The options that decide what parameters are for, as JSON gives them back."""
    options = json.loads(json.dumps(dataclasses.asdict(model)))
    return {name: value for name, value in options.items() if name not in ("preset", "dtype", "remat")}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(_name(key) for key in path): tuple(leaf.shape) for path, leaf in leaves}


def _name(key: Any) -> str:
    """A part of a path: what names it in a dict, a tuple or a named tuple."""
    return str(next(getattr(key, part) for part in ("key", "name", "idx") if hasattr(key, part)))


def _summary(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
