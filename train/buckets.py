"""How evenly the hash layers fill their buckets: arrays in a jitted step, and what metrics keep of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.buckets import hash_layers
from scfa_jax import causal_index, hash_index
from train.data import Batch
from train.step import LanguageModel, inputs_and_targets


def bucket_step(model: LanguageModel, params: Any, fixed: Any, batch: Batch) -> list[dict[str, jax.Array]]:
    """Measures the buckets of queries on a batch `[B, T + 1]`, by the hashes of evaluation.

    Returns:
        For each hash layer, means over sequences and heads:
        - `shares`, float32 `[num_buckets]`: the share of the tokens in each bucket, the largest first;
        - `effective`, float32 `[]`: how many buckets of equal size have the entropy of these;
        - `pairs`, float32 `[]`: allowed pairs of a query and a key over those of dense attention.
    """
    transformer = model.merge(params, fixed)
    tokens, _, segment_ids = inputs_and_targets(batch)
    segments: Any = {} if segment_ids is None else {"query_segment_ids": segment_ids, "key_segment_ids": segment_ids}
    layers = hash_layers(transformer, tokens, segment_ids=segment_ids)
    batch_size, length = tokens.shape
    dense = jnp.broadcast_to(causal_index(length, length, **segments).stats()["pairs"], (batch_size, 1))
    config, measured = transformer.config, []
    for query, key in layers:
        sizes = (query[..., None] == jnp.arange(config.num_buckets)).sum(axis=1)  # [B, N, num_buckets]
        shares = jnp.sort(sizes / length, axis=-1, descending=True)
        entropy = -jnp.sum(jax.scipy.special.xlogy(shares, shares), axis=-1)
        index = hash_index(query, key, exclude_self=config.exclude_self, num_buckets=config.num_buckets, **segments)
        measured.append(
            {
                "shares": shares.mean((0, 1)),
                "effective": jnp.exp(entropy).mean(),
                "pairs": (index.stats()["pairs"] / dense).mean(),
            }
        )
    return measured


def bucket_sizes(measured: list[dict[str, jax.Array]]) -> dict[str, list[Any]]:
    """What a line of metrics says of buckets: a list of one entry a hash layer for each quantity."""
    layers = jax.device_get(measured)
    return {
        "bucket_largest_share": [float(layer["shares"][0]) for layer in layers],
        "bucket_effective": [float(layer["effective"]) for layer in layers],
        "bucket_pairs": [float(layer["pairs"]) for layer in layers],
        "bucket_shares": [np.round(layer["shares"].astype(float), 4).tolist() for layer in layers],
    }
