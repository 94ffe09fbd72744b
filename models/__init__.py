"""Language models built on `scfa_jax`."""

from models.config import ATTENTION_KINDS, ModelConfig
from models.presets import PRESETS, preset
from models.transformer import Block, Transformer

__all__ = ["ATTENTION_KINDS", "PRESETS", "Block", "ModelConfig", "Transformer", "preset"]
