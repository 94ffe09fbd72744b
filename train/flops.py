"""How much arithmetic a model asks for, and how much a device can do."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from models import ModelConfig
from models.attention import static_kinds

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
    a key and each feature of the heads. Nothing is counted for what is computed again, for hashing, sorting and finding
    heavy hitters, and for looking up embeddings. Pairs are those that the kind of attention asks for, in buckets of
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
        config: The model. Its buckets count as equal in size, and its share of dropped tokens as at its end.
        length: Tokens a sequence.

    Returns:
        One number a layer, the mean over its heads.
    """
    causal = _causal_pairs(length)
    density_of = {
        "dense": 1.0,
        "dense-cudnn": 1.0,
        "hash": _hash_pairs(config, length) / causal,
        "reformer": 1 / config.num_buckets,
        "qk": (1 - config.drop_rate) ** 2,
        "topk": 1 - config.drop_rate,
        "sparsek": _sparsek_pairs(config, length) / causal,
        "heavy": _sparsek_pairs(config, length) / causal,
        "identity": 0.0,
    }
    return [
        density_of[kind] if kind in density_of else static_kinds(config, layer)[kind].pairs(length) / causal
        for layer, kind in enumerate(config.layer_kinds())
    ]


def _causal_pairs(length: int) -> float:
    return length * (length + 1) / 2


def _hash_pairs(config: ModelConfig, length: int) -> float:
    """The keys of the window, and before it those of a bucket: see `scfa_jax.patterns.window_and_buckets`."""
    near = float(np.minimum(np.arange(length) + 1, config.hash_window).sum())
    own = length if config.hash_window and config.exclude_self else 0  # counted in the window, and left out
    return near - own + (_causal_pairs(length) - near) / config.num_buckets


def _sparsek_pairs(config: ModelConfig, length: int) -> float:
    """The keys of the windows, and those selected before them: see `scfa_jax.sparsek_attention`."""
    position = np.arange(length)
    before = np.maximum(0, position // config.sparsek_chunk * config.sparsek_chunk - config.sparsek_window + 1)
    return float(np.sum(position + 1 - before + np.minimum(before, config.sparsek_keys)))
