"""Language models built on `scfa_jax`."""

from models.config import ATTENTION_KINDS, ModelConfig
from models.transformer import Block, Transformer

__all__ = ["ATTENTION_KINDS", "Block", "ModelConfig", "Transformer"]
