"""The influence of pairs on the loss: tiles against a dense matrix, that against what masking does to first order."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import models.influence
from models import ModelConfig
from models.influence import hang_taps, influential_attention
from train.config import OptimizerConfig
from train.data import Batch
from train.moa.profile import profile_step
from train.step import init

LENGTH, HEADS, SINKS = 20, 2, 3


def dense_weights(query, key, mask):
    """`A[b, n, i, j]`."""
    scores = np.einsum("bqnh,bknh->bnqk", query, key) * query.shape[3] ** -0.5
    weights = np.exp(np.where(mask, scores - scores.max(axis=3, keepdims=True), -np.inf))
    return weights / weights.sum(axis=3, keepdims=True)


def dense_influence(weights, by_weights):
    """`E[b, n, i, j]` of the paper, term by term: by how each weight of a row changes when key j is taken out."""
    influence = np.zeros_like(weights)
    for taken_out in range(weights.shape[3]):
        without = weights.copy()
        without[..., taken_out] = 0
        total = without.sum(axis=3, keepdims=True)
        without /= np.where(total > 0, total, 1)
        influence[..., taken_out] = ((without - weights) * by_weights).sum(axis=3)
    return influence


def expected_profile(weights, by_weights, num_sinks, begins=(0,)):
    """`[3, N, T]`: sums over the batch and rows of `|E|` by distance, of keys behind sinks and of sinks, and of `|J|`.

    `J` by its meaning: the change from the weights to those that are left by a window, which sum to 1 again.
    """
    influence = dense_influence(weights, by_weights)
    _, heads, length, _ = influence.shape
    column = np.arange(length)
    is_sink = np.any([(column >= begin) & (column < begin + num_sinks) for begin in begins], axis=0)
    sums = np.zeros((3, heads, length))
    for row in range(length):
        for distance in range(1, row + 1):
            sums[int(is_sink[row - distance]), :, distance] += np.abs(influence[:, :, row, row - distance]).sum(axis=0)
            left = weights[:, :, row] * ((row - column < distance) | is_sink)
            left /= left.sum(axis=2, keepdims=True)
            sums[2, :, distance] += np.abs(((left - weights[:, :, row]) * by_weights[:, :, row]).sum(axis=2)).sum(
                axis=0
            )
    return sums


@pytest.mark.parametrize("documents", [1, 3])
def test_the_profile_is_the_dense_one_summed_by_distance(documents, monkeypatch):
    monkeypatch.setattr(models.influence, "BLOCK", 8)  # 3 blocks, of which the last is not full
    draw = np.random.default_rng(documents).normal
    query, key, value, by_output = 3 * draw(size=(4, 2, LENGTH, HEADS, 8)).astype(np.float32)
    ids = np.broadcast_to(np.arange(LENGTH) * documents // LENGTH, (2, LENGTH)).astype(np.int32)

    @jax.jit
    def profiled(*arrays):
        tap = jnp.ones((3, HEADS, LENGTH))
        segment_ids = None if documents == 1 else ids
        attend = functools.partial(influential_attention, segment_ids=segment_ids, num_sinks=SINKS)
        return jax.vjp(attend, *arrays, tap)[1](by_output)[3]

    found = profiled(query, key, value)
    mask = np.tril(np.ones((LENGTH, LENGTH), bool)) & (ids[0][:, None] == ids[0])
    query, key, value, by_output = (x.astype(np.float64) for x in (query, key, value, by_output))
    weights = dense_weights(query, key, mask)
    assert weights[:, :, 1:].max() > 0.9999  # where differences from 1 would be lost to rounding
    by_weights = np.einsum("bqnh,bknh->bnqk", by_output, value)
    expected = expected_profile(weights, by_weights, SINKS, np.unique(ids[0], return_index=True)[1])
    assert (expected[:, :, 1:4] > 0).all()
    np.testing.assert_allclose(found[:2], expected[:2], rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(found[2], expected[2], rtol=2e-5, atol=2e-6 * expected[2].max())  # differences of means


def test_influence_is_what_taking_a_key_out_does_to_the_loss_to_first_order():
    """By finite differences: the row of weights moves a little from what it is to what it is without the key."""
    draw = np.random.default_rng(0).normal
    query, key, value = draw(size=(3, 1, 6, 1, 4))
    mixing = draw(size=(6, 6))

    def loss(weights):
        """Not linear in the weights, and mixes the rows' outputs."""
        output = np.einsum("qk,kh->qh", weights, value[0, :, 0])
        return np.sum(np.tanh(mixing @ output) ** 2)

    weights = dense_weights(query, key, np.tril(np.ones((6, 6), bool)))[0, 0]
    hidden = np.tanh(mixing @ weights @ value[0, :, 0])
    by_output = mixing.T @ (2 * hidden * (1 - hidden**2))
    influence = dense_influence(weights[None, None], (by_output @ value[0, :, 0].T)[None, None])[0, 0]
    step = 1e-5
    for row in range(1, 6):
        for column in range(row):
            without = weights[row] * (np.arange(6) != column)
            change = np.zeros_like(weights)
            change[row] = without / without.sum() - weights[row]
            slope = (loss(weights + step * change) - loss(weights - step * change)) / (2 * step)
            assert influence[row, column] == pytest.approx(slope, rel=1e-6, abs=1e-9)


def test_the_profile_of_a_model_is_that_of_its_dense_weights_in_every_layer(monkeypatch):
    """Against attention that adds zeros to its weights: the loss's gradients by them are dL/dA, of every layer."""
    sizes = {"layers": 2, "width": 16, "heads": HEADS, "dtype": "float32"}
    config = ModelConfig(**sizes, attention="dense, drop(0.5)", remat="save_attention")
    model, state = init(config, OptimizerConfig(), vocab_size=50, max_length=LENGTH)
    # As drawn, attention is nearly even: larger projections make it choose.
    params = jax.tree.map(lambda x: 4 * x if x.ndim == 3 else x, state.params)
    tokens = np.random.default_rng(0).integers(0, 50, (3, LENGTH + 1)).astype(np.uint8)
    weights = jnp.array([1.0, 1.0, 0.0])  # the last one fills up the batch
    profiles = jax.jit(functools.partial(profile_step, model, SINKS))(params, state.fixed, Batch(tokens, None), weights)

    @jax.jit
    def dense(zeros, tokens):
        """The loss, and the weights of every layer."""
        seen = []

        def attend(query, key, value, tap, segment_ids=None, *, num_sinks):
            scores = jnp.einsum("bqnh,bknh->bnqk", query, key) * query.shape[3] ** -0.5
            seen.append(jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), scores, -jnp.inf)))
            return jnp.einsum("bnqk,bknh->bqnh", seen[-1] + zeros[len(seen) - 1], value)

        with monkeypatch.context() as patch:
            patch.setattr(models.influence, "influential_attention", attend)
            transformer = nnx.merge(model.graph, params, state.fixed)
            transformer.config = dataclasses.replace(config, remat="none")
            hang_taps(transformer, zeros, SINKS)
            logits = transformer(tokens[:, :-1], draws=[{}, {}])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean(axis=1).sum(), jnp.stack(seen)

    zeros = jnp.zeros((2, 2, HEADS, LENGTH, LENGTH))
    by_weights, attention = jax.jit(jax.grad(dense, has_aux=True))(zeros, jnp.asarray(tokens[:2], jnp.int32))
    for layer in range(2):
        g, a = (np.asarray(x[layer], np.float64) for x in (by_weights, attention))
        expected = expected_profile(a, g, SINKS)
        assert expected.max() > 1e-4
        np.testing.assert_allclose(profiles[layer], expected, rtol=1e-3, atol=1e-4 * expected.max())


def test_memory_is_linear_in_length(monkeypatch):
    monkeypatch.setattr(models.influence, "BLOCK", 64)
    profiled = lambda tap, by_output, *arrays: jax.vjp(influential_attention, *arrays, tap)[1](by_output)[3]
    needed = []
    for length in (1024, 2048):
        arrays = [jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)] * 4
        tap = jax.ShapeDtypeStruct((3, 1, length), jnp.float32)
        compiled = jax.jit(profiled).lower(tap, *arrays).compile()
        needed.append(compiled.memory_analysis().temp_size_in_bytes)
    # The growth, since a GPU's matrix products also have a workspace of fixed size. One matrix grows by 12 MiB.
    assert needed[1] - needed[0] < 2**20
