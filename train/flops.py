"""How much arithmetic a model asks for, and how much a device can do."""

from __future__ import annotations

from typing import Any

import jax

from models import ModelConfig

# Dense bfloat16 with float32 accumulation, FLOP/s, from NVIDIA's data sheets; found by the beginning of the name.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,  # SXM
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """FLOP/s that a device can do at most in bfloat16; None where that is not known, or for another dtype."""
    found = [peak for name, peak in PEAK_FLOPS.items() if device_kind.startswith(name)]
    return found[0] if found and dtype == "bfloat16" else None


def model_flops(config: ModelConfig, params: Any, sequences: int, length: int) -> float:
    """FLOPs of a training step, as counted for model FLOP utilisation (Chowdhery et al. 2022, appendix B).

    Forward and backward pass take 6 FLOPs for a token and a parameter of a matrix, and 12 for each pair of a query and
    a key and each feature of the heads. Nothing is counted for what is computed again, for hashing and sorting, and
    for looking up embeddings. Pairs are those that the kind of attention asks for, in buckets of
    equal size where there are any.

    Args:
        config: The model.
        params: Its parameters: a tree of arrays, named as in `models.Transformer`.
        sequences: Sequences a step.
        length: Tokens a sequence.

    Returns:
        FLOPs.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    matrices = sum(leaf.size for path, leaf in leaves if path[0].key != "position")
    pairs = sum(layer_densities(config, length)) * _causal_pairs(length)
    return sequences * (6.0 * matrices * length + 12.0 * pairs * config.width)


def layer_densities(config: ModelConfig, length: int) -> list[float]:
    """The pairs that the attention of each layer asks for in training, over those of dense causal attention.

    Args:
        config: The model. Its buckets count as equal in size.
        length: Tokens a sequence.

    Returns:
        One number a layer, the mean over its heads.
    """
    layouts = config.layouts()
    pairs = {layout: layout.kind.pairs(length, layout.num_heads) for layout in set(layouts)}
    return [pairs[layout] / _causal_pairs(length) for layout in layouts]


def _causal_pairs(length: int) -> float:
    return length * (length + 1) / 2
