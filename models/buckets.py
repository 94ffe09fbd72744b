"""What the layers of a model that hash, hash tokens to."""

from __future__ import annotations

from typing import NamedTuple

import jax

from models.layers import heads_of_layers
from models.reformer import Reformer
from models.transformer import Transformer
from scfa_jax.layers import Hash, Heads, Kind, State

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
    layers = heads_of_layers(model, tokens, HASHING, segment_ids=segment_ids)
    return [_buckets(attention.layout.kind, heads, state) for attention, heads, state in layers]


def _buckets(kind: Kind, heads: Heads, state: State) -> Buckets:
    if isinstance(kind, Reformer):
        rounds = kind.buckets(heads, state)
        return Buckets(kind, rounds.reshape(-1, *rounds.shape[2:]), None)
    assert isinstance(kind, Hash)
    marked = kind.marks(heads, state)
    of_key = None if marked.key is marked.query else marked.key["hash"]
    return Buckets(kind, marked.query["hash"], of_key)
