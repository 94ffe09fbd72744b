"""How well layers choose blocks: arrays in a jitted step, and what metrics keep of these."""

from __future__ import annotations

from typing import Any

import jax

from models.blocks import block_recall
from train.data import Batch
from train.step import LanguageModel, inputs_and_targets


def recall_step(model: LanguageModel, params: Any, fixed: Any, batch: Batch) -> list[jax.Array]:
    """Measures `models.blocks.block_recall` on a batch `[B, T + 1]`: float32 `[]` for each layer that chooses."""
    tokens, _, segment_ids = inputs_and_targets(batch)
    return block_recall(model.merge(params, fixed), tokens, segment_ids=segment_ids)


def recalls(measured: list[jax.Array]) -> dict[str, list[float]]:
    """What a line of metrics says of the choice of blocks: one number a layer."""
    return {"block_recall": [float(recall) for recall in jax.device_get(measured)]}
