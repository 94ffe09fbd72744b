"""How many of the blocks that matter the layers of a model choose."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from models.controls import oracle_blocks
from models.layers import heads_of_layers
from models.transformer import Transformer
from scfa_jax.layers.moba import ChosenBlocks


def block_recall(model: Transformer, tokens: jax.Array, *, segment_ids: jax.Array | None = None) -> list[jax.Array]:
    """Runs a model and compares the blocks that its queries choose with those that dense attention weighs most.

    Args:
        model: The model.
        tokens: int `[B, T]`.
        segment_ids: As in `Transformer.features`.

    Returns:
        For each layer that chooses blocks, first to last, float32 `[]`: the share of the oracle's blocks that were
        chosen, in the mean over sequences, heads, and queries with more candidates than choices; 1 if there are none.
    """
    recalls = []
    for attention, heads, state in heads_of_layers(model, tokens, ChosenBlocks, segment_ids=segment_ids):
        kind = attention.layout.kind
        options: dict[str, Any] = {"logits_soft_cap": attention.logits_soft_cap}
        assert isinstance(kind, ChosenBlocks)
        num_chosen = kind.top_k - 1
        chosen = kind.blocks(heads, state, segment_ids=segment_ids, **options)
        rows = heads.rotated_query, heads.attended_key
        wanted = oracle_blocks(kind, *rows, num_chosen=num_chosen + 1, segment_ids=segment_ids, **options)
        wanted, next_best = wanted[..., :num_chosen], wanted[..., num_chosen]
        chosen = jnp.repeat(chosen, wanted.shape[2] // chosen.shape[2], axis=2)
        found = (wanted[..., :, None] == chosen[..., None, :]).any(axis=-1)
        counts = (next_best >= 0) & (num_chosen > 0)
        recalls.append(jnp.where(counts.any(), jnp.mean(found, where=counts[..., None]), 1.0))
    return recalls
