"""What shape the language model has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ATTENTION_KINDS = ("dense", "hash", "qk")


@dataclass(frozen=True)
class ModelConfig:
    """The model."""

    attention: str = "hash"
    """Attention of the layers: dense, hash (buckets) or qk (dropped queries and keys). One kind for all, or
    several separated by commas, repeated over the layers: dense,hash."""
    layers: int = 4
    """Number of transformer blocks."""
    width: int = 128
    """Width of the residual stream."""
    heads: int = 4
    """Attention heads a layer; must divide the width."""
    positions: Literal["rotary", "learned"] = "rotary"
    """How the model knows where a token stands."""
    num_buckets: int = 4
    """Hash buckets of a hash layer: even."""
    exclude_self: bool = True
    """Whether a token of a hash layer may not attend to itself."""
    hash_before_rotary: bool = False
    """Whether a hash layer hashes before it rotates, so that buckets do not depend on positions."""
    drop_rate: float = 0.3
    """Share of queries and of keys that a qk layer drops while training."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What it computes in (parameters are always float32); auto: float32 on a CPU, bfloat16 elsewhere."""
    remat: bool = False
    """Compute each block again in the backward pass, not keep its activations: less memory, more time."""

    def layer_kinds(self) -> tuple[str, ...]:
        """The attention kind of every layer, first to last."""
        pattern = [kind.strip() for kind in self.attention.split(",")]
        return tuple(pattern[layer % len(pattern)] for layer in range(self.layers))

    def problem(self) -> str | None:
        """What is wrong with these numbers, in one line; None if nothing is."""
        for name in ("layers", "width", "heads"):
            if getattr(self, name) < 1:
                return f"--{name} must be at least 1, got {getattr(self, name)}."
        unknown = [kind.strip() for kind in self.attention.split(",") if kind.strip() not in ATTENTION_KINDS]
        if unknown:
            return f"--attention takes {', '.join(ATTENTION_KINDS)} or a list of them, got {unknown[0]!r}."
        if self.width % self.heads:
            return f"--heads must divide --width, got {self.heads} heads for a width of {self.width}."
        if self.positions == "rotary" and self.width // self.heads % 2:
            return f"Rotary positions need an even width a head, got {self.width // self.heads}."
        if self.num_buckets < 2 or self.num_buckets % 2:
            return f"--num-buckets must be an even number of at least 2, got {self.num_buckets}."
        if not 0 <= self.drop_rate < 1:
            return f"--drop-rate must be at least 0 and below 1, got {self.drop_rate}."
        return None
