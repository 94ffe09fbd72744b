"""What the hash layers of a model hash tokens to."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from models.transformer import Transformer
from scfa_jax import lsh_hash


class Buckets(NamedTuple):
    """Bucket ids of one layer, int32 `[B, T, N]`."""

    query: jax.Array
    key: jax.Array | None  # None where keys are the queries


def hash_layers(model: Transformer, tokens: jax.Array, *, segment_ids: jax.Array | None = None) -> list[Buckets]:
    """Runs a model and tells the buckets of its hash layers, by the hashes of evaluation.

    Args:
        model: The model.
        tokens: int `[B, T]`.
        segment_ids: As in `Transformer.features`.

    Returns:
        Those of each layer of the kind "hash", first to last.
    """
    batch, length = tokens.shape
    x, draws, found = model.embed(tokens), model.draw(batch, length, None), []
    for kind, block, draw in zip(model.config.layer_kinds(), model.blocks, draws, strict=True):
        if kind == "hash":
            attention, normed = block.attention, block.norm1(x)

            def ids(x: jax.Array, attention=attention, rotations=draw["rotations"]) -> jax.Array:
                if attention.rotary is not None and not attention.sparsity.before_rotary:
                    x = attention.rotary(x, jnp.arange(x.shape[1])[None])
                return lsh_hash(x, rotations)

            shared = attention.layout.share_query_key
            found.append(Buckets(ids(attention.query(normed)), None if shared else ids(attention.key(normed))))
        x = block(x, draw, segment_ids)
    return found
