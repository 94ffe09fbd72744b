"""Checkpoints: which are kept, what comes back, and what is said of those that do not fit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.checkpoint import Checkpoints
from train.config import DataConfig
from train.data import load_corpus, training_batches
from train.errors import TrainError
from train.step import TrainState


@pytest.fixture
def batches(text):
    data = DataConfig(data=str(text), seq_len=16, batch_size=2)
    return training_batches(load_corpus(data), data, seed=0)


def state_of(step: int, width: int = 3) -> TrainState:
    params = {"embedding": jnp.full((4, width), 0.5 * step)}
    return TrainState(jnp.int32(step), params, (jnp.float32(1), {"mu": params}), {})


def test_the_last_two_and_the_best_are_kept_with_the_place_in_the_data(batches, tmp_path):
    losses = {1: 3.0, 2: 2.0, 3: None, 4: 2.5, 5: None, 6: None}
    following = {}
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.latest_step, checkpoints.best_step, checkpoints.best_loss) == (None, None, np.inf)
        for step, loss in losses.items():
            next(batches)
            checkpoints.save(step, state_of(step), batches, loss)
            following[step] = [next(batches) for _ in range(2)] if step == 2 else None
            if step == 2:
                assert checkpoints.best_loss == 2.0
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "5", "6"]
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.latest_step, checkpoints.best_step, checkpoints.best_loss) == (6, 2, 2.0)
        best = checkpoints.restore(2, jax.eval_shape(lambda: state_of(0)), batches)
        jax.tree.map(np.testing.assert_array_equal, best, state_of(2))
        again = [next(batches) for _ in range(2)]
        jax.tree.map(np.testing.assert_array_equal, again, following[2])


def test_who_only_reads_leaves_what_is_being_written(batches, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1), batches)
    begun = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    begun.mkdir()
    with Checkpoints(tmp_path) as reading:
        reading.restore(1, jax.eval_shape(lambda: state_of(0)))
    assert begun.exists()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state_of(3), batches)
    assert not begun.exists()


def test_checkpoints_of_unknown_loss_are_no_best_ones(batches, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(1, 4):
            checkpoints.save(step, state_of(step), batches)
        assert checkpoints.best_step is None
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def test_a_checkpoint_of_another_configuration_names_what_differs(batches, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1), batches)
        checkpoints.wait()
        with pytest.raises(TrainError) as raised:
            checkpoints.restore(1, state_of(0, width=5))
        assert f"{tmp_path}/checkpoints/1 is a checkpoint of another configuration" in str(raised.value)
        assert "opt_state.1.mu.embedding is (4, 3) there and (4, 5) here. Bring back the config.json" in str(
            raised.value
        )
        other = state_of(0)._replace(fixed={"rotations": jnp.ones(2)})
        with pytest.raises(TrainError, match=r"fixed\.rotations is absent there and \(2,\) here"):
            checkpoints.restore(1, other)


def test_a_damaged_checkpoint_is_one_line(batches, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1), batches)
    for path in (tmp_path / "checkpoints" / "1" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(TrainError) as raised:
        checkpoints.restore(1, state_of(0))
    assert f"{tmp_path}/checkpoints/1 cannot be restored" in str(raised.value)
    assert "\n" not in str(raised.value)
