"""What the layers of a model that hash, hash tokens to."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from models.attention import Draw, ReformerSelfAttention, Rounds
from models.reformer import default_chunk_size
from models.transformer import Transformer
from scfa_jax.nnx import CausalSelfAttention
from scfa_jax.sparsity import operands

HASHING = ("hash", "reformer")


class Buckets(NamedTuple):
    """Bucket ids of one layer, int32 `[B, T, N]`; of several rounds one after the other, `[R * B, T, N]`."""

    query: jax.Array
    key: jax.Array | None  # None where keys are the queries
    chunk_size: int | None  # tokens in a chunk of the Reformer


def hashing_layers(model: Transformer, tokens: jax.Array, *, segment_ids: jax.Array | None = None) -> list[Buckets]:
    """Runs a model and tells the buckets of its layers that hash, by the hashes of evaluation.

    Args:
        model: The model.
        tokens: int `[B, T]`.
        segment_ids: As in `Transformer.features`.

    Returns:
        Those of each layer of a kind in `HASHING`, first to last.
    """
    batch, length = tokens.shape
    x, draws, found = model.embed(tokens), model.draw(batch, length, None), []
    for kind, block, draw in zip(model.config.layer_kinds(), model.blocks, draws, strict=True):
        if kind in HASHING:
            found.append(_buckets(block.attention, block.norm1(x), draw))
        x = block(x, draw, segment_ids)
    return found


def _buckets(attention: CausalSelfAttention, x: jax.Array, draw: Draw) -> Buckets:
    if isinstance(attention, ReformerSelfAttention):
        sparsity = attention.sparsity
        assert isinstance(sparsity, Rounds)
        length, rotations = x.shape[1], draw.get("rotations", attention.rotations[...])
        size = min(sparsity.chunk_size or default_chunk_size(length, sparsity.num_buckets), length)
        _, rounds = attention.query_and_buckets(x, rotations)
        return Buckets(rounds.reshape(-1, *rounds.shape[2:]), None, size)
    key = None if attention.layout.share_query_key else attention.key(x)
    options: dict[str, Any] = {"tokens": x, "rotary": attention.rotary, **draw, **attention.own_parameters()}
    made = operands(attention.query(x), key, attention.value(x), attention.sparsity, **options)
    return Buckets(made.query_marks["hash"], None if made.key_marks is None else made.key_marks["hash"], None)
