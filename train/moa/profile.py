"""What each head's attention is worth at each distance, measured on text that the model was trained on."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.influence import hang_taps
from train.config import DataConfig
from train.data import Batch, Corpus, held_out_batches
from train.loss import cross_entropy
from train.step import LanguageModel, TrainState, inputs_and_targets


def profile(
    model: LanguageModel, state: TrainState, corpus: Corpus, data: DataConfig, num_sinks: int, max_tokens: int
) -> np.ndarray:
    """Measures the influence of pairs on the loss, by distance.

    Args:
        model: The model, with queries, keys and values in every layer.
        state: Its arrays.
        corpus: Of which sequences are read, spread evenly over its training part.
        data: The length of these, and how many are computed at once.
        num_sinks: Keys at the beginning of a sequence that are kept apart.
        max_tokens: About how many tokens to read.

    Returns:
        float64 `[layers, 3, heads, data.seq_len]`, nats a token: the mean over sequences of what
        `models.influence.influential_attention` sums up, where the loss is the mean over the tokens of a sequence.
    """
    step = jax.jit(functools.partial(profile_step, model, num_sinks))
    total, sequences = np.zeros(()), 0.0
    for batch, weights in held_out_batches(corpus, data, max_tokens, part="train"):
        total = total + np.asarray(step(state.params, state.fixed, batch, weights), np.float64)
        sequences += float(weights.sum())
    return total / sequences


def profile_step(
    model: LanguageModel, num_sinks: int, params: Any, fixed: Any, batch: Batch, weights: jax.Array
) -> jax.Array:
    """The profile of sequences `[B, T + 1]` weighted by `[B]`: their sum, float32 `[layers, 3, heads, T]`."""
    tokens, targets, segment_ids = inputs_and_targets(batch)
    length = tokens.shape[1]
    config = model.merge(params, fixed).config

    def loss(taps: jax.Array) -> jax.Array:
        transformer = model.merge(params, fixed)
        hang_taps(transformer, list(taps), num_sinks)
        features = transformer.features(tokens, draws=[{}] * config.layers, segment_ids=segment_ids)
        share = jnp.broadcast_to(weights[:, None] / length, targets.shape)
        return cross_entropy(features, transformer.embedding.embedding[...], targets, share)

    return jax.grad(loss)(jnp.zeros((config.layers, 3, config.heads, length)))


def calibration(data: DataConfig, length: int) -> DataConfig:
    """The data of a run in sequences of another length, about as many tokens at once."""
    return dataclasses.replace(data, seq_len=length, batch_size=max(1, data.batch_size * data.seq_len // length))
