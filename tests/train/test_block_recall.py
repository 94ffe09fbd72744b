"""How well layers choose blocks: against counting the blocks one by one."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from models import ModelConfig
from models.layers import heads_of_layers
from scfa_jax.layers.moba import ChosenBlocks
from train.blocks import recall_step, recalls
from train.config import OptimizerConfig
from train.data import Batch
from train.step import init

LENGTH = 34


def recall_by_hand(chosen: np.ndarray, query: np.ndarray, key: np.ndarray, ids: np.ndarray, size: int) -> float:
    """The share of the heaviest blocks among those chosen, `[B, T, N, k]`, where there is a choice."""
    k, shares = chosen.shape[3], []
    for b, t, n in np.ndindex(chosen.shape[:3]):
        met = (np.arange(LENGTH) <= t) & (ids == ids[t])
        weights = np.where(met, np.exp(key[b, :, n] @ query[b, t, n] / query.shape[3] ** 0.5), 0)
        may = [block for block in range(t // size) if ids[(block + 1) * size - 1] == ids[t]]
        if len(may) > k:
            weight = lambda block: weights[block * size : (block + 1) * size].sum()  # noqa: B023
            best = sorted(may, key=weight)[-k:]
            shares.append(np.isin(best, chosen[b, t, n]).mean())
    return np.mean(shares)


def test_recall_is_counted_by_layer():
    kinds = "moba(4, top_k=3), dense, moba(3, 3, share_in_group=True), oracle_blocks(4, 3)"
    config = ModelConfig(layers=4, width=16, heads=2, attention=kinds, dtype="float32")
    model, state = init(config, OptimizerConfig(), vocab_size=256, max_length=LENGTH)
    tokens = np.random.default_rng(0).integers(0, 256, (2, LENGTH + 1)).astype(np.uint8)
    document = np.arange(LENGTH + 1) // 18
    ids = np.broadcast_to(document, tokens.shape).astype(np.int32)

    @jax.jit
    def both(params, fixed):
        options = {"segment_ids": ids[:, :-1]}
        layers = heads_of_layers(model.merge(params, fixed), tokens[:, :-1], ChosenBlocks, **options)
        choices = [
            (attention.layout.kind.blocks(heads, state, **options), heads.rotated_query, heads.attended_key)
            for attention, heads, state in layers
        ]
        return choices, recall_step(model, params, fixed, Batch(tokens, ids))

    choices, measured = both(state.params, state.fixed)
    expected = [
        recall_by_hand(*map(np.asarray, arrays), document[:-1], size)
        for arrays, size in zip(choices, (4, 3, 4), strict=True)
    ]
    assert recalls(measured)["block_recall"] == pytest.approx(expected, rel=1e-5)
    assert 0.1 < min(expected) < 1
    assert expected[2] == 1


def test_where_there_is_no_choice_recall_is_1():
    kinds = "moba(20, top_k=3), moba(4, top_k=1)"
    config = ModelConfig(layers=2, width=16, heads=2, attention=kinds, dtype="float32")
    model, state = init(config, OptimizerConfig(), vocab_size=256, max_length=LENGTH)
    tokens = np.zeros((1, LENGTH + 1), np.uint8)
    measured = jax.jit(functools.partial(recall_step, model))(state.params, state.fixed, Batch(tokens, None))
    assert recalls(measured) == {"block_recall": [1, 1]}
