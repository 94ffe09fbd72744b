"""Language models built on `scfa_jax`."""

from models.config import ModelConfig
from models.presets import PRESETS, preset
from models.transformer import Block, Transformer

__all__ = ["PRESETS", "Block", "ModelConfig", "Transformer", "preset"]
