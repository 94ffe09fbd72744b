"""What the layers of a model that hash, hash tokens to."""

from __future__ import annotations

from typing import NamedTuple

import jax

from models.reformer import Reformer
from models.transformer import Transformer
from scfa_jax.layers import Hash, State
from scfa_jax.nnx import CausalSelfAttention

HASHING = (Hash, Reformer)


class Buckets(NamedTuple):
    """Bucket ids of one layer, int32 `[B, T, N]`; of several rounds one after the other, `[R * B, T, N]`."""

    kind: Hash | Reformer
    query: jax.Array
    key: jax.Array | None  # None where keys are the queries


def hashing_layers(model: Transformer, tokens: jax.Array, *, segment_ids: jax.Array | None = None) -> list[Buckets]:
    """Runs a model and tells the buckets of its layers that hash, by the hashes of evaluation.

    Args:
        model: The model.
        tokens: int `[B, T]`.
        segment_ids: As in `Transformer.features`.

    Returns:
        Those of each layer of a kind in `HASHING`, first to last.
    """
    x, found = model.embed(tokens), []
    for block, draw in zip(model.blocks, model.draw(tokens.shape[0], tokens.shape[1], None), strict=True):
        if isinstance(block.attention.layout.kind, HASHING):
            found.append(_buckets(block.attention, block.norm1(x), draw))
        x = block(x, draw, segment_ids)
    return found


def _buckets(attention: CausalSelfAttention, x: jax.Array, draw: State) -> Buckets:
    layout, kind = attention.layout, attention.layout.kind
    key = None if layout.share_query_key else attention.key(x)
    heads = layout.heads(attention.query(x), key, attention.value(x), tokens=x, rotary=attention.rotary)
    state = {**(draw or attention.draw(*x.shape[:2], deterministic=True)), **attention.own_parameters()}
    if isinstance(kind, Reformer):
        rounds = kind.buckets(heads, state)
        return Buckets(kind, rounds.reshape(-1, *rounds.shape[2:]), None)
    assert isinstance(kind, Hash)
    marked = kind.marks(heads, state)
    of_key = None if marked.key is marked.query else marked.key["hash"]
    return Buckets(kind, marked.query["hash"], of_key)
