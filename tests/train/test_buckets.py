"""How bucket sizes are measured: against counting them one by one."""

from __future__ import annotations

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import ModelConfig
from models.buckets import hashing_layers
from scfa_jax import patterns
from train.buckets import bucket_sizes, bucket_step
from train.config import OptimizerConfig
from train.data import Batch
from train.step import init

LENGTH = 20


@pytest.mark.parametrize(
    ("more", "exclude_self", "window", "documents"),
    [("", True, 0, 1), (", exclude_self=False, local_window=3, share_query_key=False", False, 3, 3)],
)
def test_buckets_are_counted_by_layer(more, exclude_self, window, documents):
    kinds = f"hash(4{more}), dense, hash(2{more})"
    config = ModelConfig(layers=3, width=16, heads=2, attention=kinds, dtype="float32")
    model, state = init(config, OptimizerConfig(), vocab_size=256, max_length=LENGTH)
    tokens = np.random.default_rng(0).integers(0, 256, (2, LENGTH + 1)).astype(np.uint8)
    document = np.arange(LENGTH + 1) * documents // (LENGTH + 1)
    ids = None if documents == 1 else np.broadcast_to(document, tokens.shape).astype(np.int32)
    measured = bucket_sizes(
        jax.jit(functools.partial(bucket_step, model))(state.params, state.fixed, Batch(tokens, ids))
    )

    segment_ids = None if ids is None else ids[:, :-1]

    @jax.jit
    def found(params, fixed):
        layers = hashing_layers(model.merge(params, fixed), tokens[:, :-1], segment_ids=segment_ids)
        return [layer._replace(kind=None) for layer in layers]

    layers = found(state.params, state.fixed)
    together = document[:-1, None] == document[:-1]
    dense = np.tril(together).sum()
    assert len(layers) == len(measured["bucket_pairs"]) == 2
    for number, (layer, buckets) in enumerate(zip(layers, (4, 2), strict=True)):
        query = np.asarray(layer.query)
        key = query if layer.key is None else np.asarray(layer.key)
        assert (layer.key is None) == exclude_self  # as in the options
        shares, effective, pairs = [], [], []
        for row in range(2):
            for head in range(2):
                one, other = query[row, :, head], key[row, :, head]
                sizes = np.array([Counter(one.tolist())[bucket] for bucket in range(buckets)]) / LENGTH
                shares.append(sorted(sizes, reverse=True))
                effective.append(np.prod([size**-size for size in sizes if size]))
                earlier = np.tril(together, -1 if exclude_self else 0)
                near = np.tri(LENGTH, dtype=bool) & ~np.tri(LENGTH, k=-window, dtype=bool)
                pairs.append((earlier & ((one[:, None] == other) | near)).sum() / dense)
        np.testing.assert_allclose(measured["bucket_shares"][number], np.mean(shares, axis=0), atol=6e-5)
        assert measured["bucket_largest_share"][number] == pytest.approx(np.mean(shares, axis=0)[0], rel=1e-6)
        assert measured["bucket_effective"][number] == pytest.approx(np.mean(effective), rel=1e-5)
        assert measured["bucket_pairs"][number] == pytest.approx(np.mean(pairs), rel=1e-6)
    assert measured.get("bucket_coverage") == ([1, 1] if exclude_self else None)


def test_what_the_reformer_takes_of_its_buckets_is_measured_in_every_round():
    rounds, chunk = 2, 3
    config = ModelConfig(
        **{"layers": 2, "width": 16, "heads": 2, "dtype": "float32"},
        attention=f"hash(4), reformer(4, rounds={rounds}, chunk_size={chunk})",
    )
    model, state = init(config, OptimizerConfig(), vocab_size=256, max_length=LENGTH)
    tokens = np.random.default_rng(0).integers(0, 256, (2, LENGTH + 1)).astype(np.uint8)
    document = np.arange(LENGTH + 1) // 11
    ids = jnp.asarray(np.broadcast_to(document, tokens.shape).astype(np.int32))

    def both(params, fixed):
        layers = hashing_layers(model.merge(params, fixed), tokens[:, :-1], segment_ids=ids[:, :-1])
        return bucket_step(model, params, fixed, Batch(tokens, ids)), layers[1].query

    measured, query = jax.jit(both)(state.params, state.fixed)
    assert query.shape == (rounds * 2, LENGTH, 2)
    together = document[:-1, None] == document[:-1]
    taken, shares = 0, []
    for one in np.moveaxis(np.asarray(query), 1, 2).reshape(-1, LENGTH):  # a round, sequence and head
        slot = np.empty(LENGTH, int)
        slot[np.argsort(one, kind="stable")] = np.arange(LENGTH)
        in_bucket = np.tril(together & (one[:, None] == one), -1)
        seen = (slot[:, None] // chunk - slot // chunk) <= 1
        taken += (in_bucket & seen).sum()
        shares.append((in_bucket & seen).sum() / in_bucket.sum())
    found = bucket_sizes(measured)
    assert found["bucket_coverage"] == [1, pytest.approx(np.mean(shares), rel=1e-6)]
    assert min(shares) < 1
    assert found["bucket_pairs"][1] == pytest.approx(taken / np.tril(together).sum() / (rounds * 4), rel=1e-6)


@pytest.mark.parametrize("before_rotary", [False, True])
def test_they_are_the_buckets_that_attention_uses(before_rotary, monkeypatch):
    attention = f"hash(4, before_rotary={before_rotary})"
    config = ModelConfig(layers=2, width=16, heads=2, attention=attention, dtype="float32")
    model, state = init(config, OptimizerConfig(), vocab_size=256, max_length=LENGTH)
    transformer = model.merge(state.params, state.fixed)
    tokens = np.random.default_rng(0).integers(0, 256, (2, LENGTH)).astype(np.uint8)
    seen = []
    unpatched = patterns.hash_index

    def note(query_hash, *arguments, **options):
        seen.append(query_hash)
        return unpatched(query_hash, *arguments, **options)

    monkeypatch.setattr(patterns, "hash_index", note)
    transformer.features(tokens)
    for layer, ids in zip(hashing_layers(transformer, tokens), seen[:2], strict=True):
        np.testing.assert_array_equal(layer.query, ids)
