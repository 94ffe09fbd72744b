"""What attention in the layers of a model computes on."""

from __future__ import annotations

from collections.abc import Iterator

import jax

from models.transformer import Transformer
from scfa_jax.layers import Heads, Kind, State
from scfa_jax.nnx import CausalSelfAttention


def heads_of_layers(
    model: Transformer,
    tokens: jax.Array,
    kinds: type[Kind] | tuple[type[Kind], ...],
    *,
    segment_ids: jax.Array | None = None,
) -> Iterator[tuple[CausalSelfAttention, Heads, State]]:
    """Runs a model and tells what its layers of some kinds attend by, in evaluation.

    Args:
        model: The model.
        tokens: int `[B, T]`.
        kinds: The kinds.
        segment_ids: As in `Transformer.features`.

    Yields:
        Each such layer, first to last, with its projections, and what it drew or keeps and its parameters.
    """
    x = model.embed(tokens)
    for block, draw in zip(model.blocks, model.draw(tokens.shape[0], tokens.shape[1], None), strict=True):
        attention, layout = block.attention, block.attention.layout
        if isinstance(layout.kind, kinds):
            seen = block.norm1(x)
            key = None if layout.share_query_key else attention.key(seen)
            rows = attention.query(seen), key, attention.value(seen)
            heads = layout.heads(*rows, tokens=seen, rotary=attention.rotary)
            drawn = draw or attention.draw(*seen.shape[:2], deterministic=True)
            yield attention, heads, {**drawn, **attention.own_parameters()}
        x = block(x, draw, segment_ids)
