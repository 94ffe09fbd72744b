"""Centroids in training: they move with the data, in parts as in the whole, and are part of a checkpoint."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from models import ModelConfig
from scfa_jax.kmeans import kmeans_hash, member_sums, update_centroids
from train.checkpoint import Checkpoints
from train.config import DataConfig, OptimizerConfig
from train.data import load_corpus, training_batches
from train.folder import load_config
from train.metrics import read_metrics
from train.restore import restored, variables_of
from train.step import init, inputs_and_targets, train_step

CONFIG = ModelConfig(
    attention="hash(4, by=kmeans(0.9), before_rotary=True), sparsek(2, window=3), hash(4, by=kmeans(0.5))",
    layers=3,
    width=16,
    heads=2,
    dtype="float32",
)


@pytest.fixture
def batches(text):
    data = DataConfig(data=str(text), seq_len=24, batch_size=4)
    return training_batches(load_corpus(data), data, seed=0)


@functools.cache
def compiled():
    """A model, its first state, and a step that computes two halves of a batch, one after the other."""
    optimizer = OptimizerConfig(steps=10, lr=0.01, warmup=0, accumulate=2)
    model, state = init(CONFIG, optimizer, vocab_size=256, max_length=24)
    return model, state, jax.jit(functools.partial(train_step, model, optimizer))


def centroids(state, layer: int = 0) -> np.ndarray:
    return np.asarray(state.fixed["blocks"][layer]["attention"]["centroids"])


def test_centroids_move_by_the_members_that_they_had_before_the_step(batches):
    model, state, step = compiled()
    batch = next(batches)
    after, _ = step(state, batch)

    @jax.jit
    def expected(params, fixed, tokens):
        transformer = model.merge(params, fixed)
        attention = transformer.blocks[0].attention
        query = attention.query(transformer.blocks[0].norm1(transformer.embed(tokens)))
        before = attention.centroids[...]
        sums = member_sums(query, kmeans_hash(query, before), 4)
        return update_centroids(before, sums, 0.9)

    moved = expected(state.params, state.fixed, inputs_and_targets(batch)[0])
    np.testing.assert_allclose(centroids(after), moved, rtol=1e-5, atol=1e-5)
    assert not np.allclose(centroids(after), centroids(state), atol=0.1)
    trained = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(after.opt_state)]
    assert any("score_kernel" in path for path in trained)
    assert not any("centroids" in path for path in trained)


def test_a_start_from_another_run_takes_its_centroids(start, tmp_path):
    run = tmp_path / "run"
    assert start(attention="hash(2, by=kmeans)", out=run, steps=2, sample_length=0) == 0
    config = load_config(run)
    corpus = load_corpus(config.data)
    _, trained = restored(run, config, corpus, "best")
    sizes = {"vocab_size": corpus.vocab_size, "max_length": config.data.seq_len}
    _, other = init(config.model, dataclasses.replace(config.optimizer, seed=1), **sizes)
    assert all((x != y).any() for x, y in zip(*map(jax.tree.leaves, (trained.fixed, other.fixed)), strict=True))
    params, fixed = variables_of(str(run), corpus, other)
    jax.tree.map(np.testing.assert_array_equal, (params, fixed), (trained.params, trained.fixed))
    more = {"start_from": run, "seed": 1, "steps": 1, "sample_length": 0}  # centroids of its own would be others
    assert start(attention="hash(2, by=kmeans)", out=tmp_path / "on", **more) == 0
    best = min(line["held_out_loss"] for line in read_metrics(run) if "held_out_loss" in line)
    first = next(line["held_out_loss"] for line in read_metrics(tmp_path / "on") if "held_out_loss" in line)
    assert first == pytest.approx(best, rel=1e-6)
    dense = other._replace(fixed={})
    assert variables_of(str(run), corpus, dense)[1] == {}


def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(batches, tmp_path):
    _, start, step = compiled()
    first, _ = step(start, next(batches))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, first, batches)
        second, _ = step(first, next(batches))
        checkpoints.wait()
        restored = checkpoints.restore(1, start, batches)
    again, _ = step(restored, next(batches))
    jax.tree.map(np.testing.assert_array_equal, again, second)
