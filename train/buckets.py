"""How layers fill their buckets and what they take of them: arrays in a jitted step, and what metrics keep of these."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.buckets import hashing_layers
from models.coverage import count_pairs, share
from models.reformer import Reformer
from scfa_jax import causal_index, index
from scfa_jax.layers import Hash
from scfa_jax.layers.pattern import Rows
from train.data import Batch
from train.step import LanguageModel, inputs_and_targets


def bucket_step(model: LanguageModel, params: Any, fixed: Any, batch: Batch) -> list[dict[str, jax.Array]]:
    """Measures the buckets of queries on a batch `[B, T + 1]`, by the hashes of evaluation.

    Returns:
        For each layer that hashes, means over sequences, heads and rounds:
        - `shares`, float32 `[num_buckets]`: the share of the tokens in each bucket, the largest first;
        - `effective`, float32 `[]`: how many buckets of equal size have the entropy of these;
        - `pairs`, float32 `[]`: the pairs of a query and a key that attention takes, over those of dense attention;
        - `coverage`, float32 `[]`, where keys are the queries: the share that attention takes of all pairs of a token
          and an earlier one of its bucket, counted from the index or the chunks.
    """
    transformer = model.merge(params, fixed)
    tokens, _, segment_ids = inputs_and_targets(batch)
    layers = hashing_layers(transformer, tokens, segment_ids=segment_ids)
    length = tokens.shape[1]
    dense = causal_index(length, length, query_segment_ids=segment_ids).pairs()  # [B or 1, 1]
    measured = []
    for kind, query, key in layers:
        sizes = (query[..., None] == jnp.arange(kind.num_buckets)).sum(axis=1)  # [B, N, num_buckets]
        shares = jnp.sort(sizes / length, axis=-1, descending=True)
        entropy = -jnp.sum(jax.scipy.special.xlogy(shares, shares), axis=-1)
        layer = {"shares": shares.mean((0, 1)), "effective": jnp.exp(entropy).mean()}
        chunk_size = kind.chunk_length(length) if isinstance(kind, Reformer) else None
        if key is None:
            ids = segment_ids if segment_ids is None else jnp.tile(segment_ids, (len(query) // len(tokens), 1))
            taken, pairs = count_pairs(query, chunk_size=chunk_size, segment_ids=ids)
            layer["coverage"] = share(taken, pairs).mean()
        if isinstance(kind, Hash):
            query_marks = {"hash": query}
            key_marks = query_marks if key is None else {"hash": key}
            rows = Rows(length, length, query.shape[2], {"query_segment_ids": segment_ids})
            taken = index.pairs(kind.index(query_marks, key_marks, rows))
        rounds = len(query) // len(tokens)
        layer["pairs"] = (taken.reshape(rounds, len(tokens), -1) / dense).mean()
        measured.append(layer)
    return measured


def bucket_sizes(measured: list[dict[str, jax.Array]]) -> dict[str, list[Any]]:
    """What a line of metrics says of buckets: a list of one entry a layer for each quantity that all of them have."""
    layers = jax.device_get(measured)
    names = {
        "bucket_largest_share": lambda layer: float(layer["shares"][0]),
        "bucket_effective": lambda layer: float(layer["effective"]),
        "bucket_pairs": lambda layer: float(layer["pairs"]),
        "bucket_coverage": lambda layer: float(layer["coverage"]),
        "bucket_shares": lambda layer: np.round(layer["shares"].astype(float), 4).tolist(),
    }
    if not all("coverage" in layer for layer in layers):
        del names["bucket_coverage"]
    return {name: [of(layer) for layer in layers] for name, of in names.items()}
