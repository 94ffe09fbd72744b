"""What shape the language model has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import jax

from models.controls import Cudnn
from models.kinds import LayerKind, parse
from scfa_jax.layers import Kind, Layout

Remat = Literal["none", "full", "save_attention"]
DType = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class ModelConfig:
    """The model."""

    preset: Literal["cpu", "bytes", "mnist", "gpt2-small"] = "cpu"
    """A model by name, for the options that are not given: a small one for a CPU, one for bytes, one for the pixels of
    MNIST, or the paper's for GPT-2's vocabulary."""
    attention: str = "hash(4)"
    """Attention of the layers, first to last: kinds with their parameters, repeated over the layers, as in
    "window(512)*5, hash(16)" or dense. The kinds are dense, cudnn (dense by cuDNN's kernels, on a GPU),
    hash(num_buckets, by=rotations | learned | kmeans | permutation, local_window=0), drop(rate), sparsek(num_keys,
    window), moba(block_size, top_k, num_local=1), window(window, num_sinks=0), longformer(window, stride),
    bigbird(window, num_global, num_random), strided(stride), fixed(stride), reformer(num_buckets, num_rounds=1),
    identity (no attention: the bound on speed), and two to compare moba with: random_blocks(block_size, top_k) and
    oracle_blocks(block_size, top_k). Every kind also takes share_query_key and normalize_key. A wrong parameter is
    answered with the right ones."""
    layers: int = 4
    """Number of transformer blocks."""
    width: int = 128
    """Width of the residual stream."""
    heads: int = 4
    """Attention heads a layer; must divide the width."""
    positions: Literal["rotary", "learned"] = "rotary"
    """How the model knows where a token stands."""
    vocab_multiple: int = 1
    """The embedding gets rows that stand for no token, until their number is a multiple of this."""
    dtype: DType = "auto"
    """What it computes in (parameters are always float32); auto: float32 on a CPU, bfloat16 elsewhere."""
    remat: Remat = "none"
    """What to compute again in the backward pass, for less memory and more time: nothing, each block, or each
    block but for the attention kernels' results."""

    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The attention of every layer, first to last."""
        pattern = parse(self.attention)
        return tuple(pattern[layer % len(pattern)] for layer in range(self.layers))

    def layouts(self) -> tuple[Layout, ...]:
        """The shape of every layer's attention, first to last, with its kind in it.

        Raises:
            ValueError: A kind does not go with the heads of a layer.
        """
        return tuple(
            Layout.of(self.width, self.heads, None, None, layer.kind, layer.share_query_key, layer.normalize_key)
            for layer in self.layer_kinds()
        )

    def can_decode(self) -> bool:
        """Whether tokens can be kept in a cache: not in a reformer layer, whose chunks depend on later tokens."""
        return all(type(layer.kind).empty_cache is not Kind.empty_cache for layer in self.layer_kinds())

    def problem(self) -> str | None:
        """What is wrong with these options, in one line; None if nothing is."""
        for name in ("layers", "width", "heads", "vocab_multiple"):
            number = getattr(self, name)
            if number < 1:
                return f"--{name.replace('_', '-')} must be at least 1, got {number}."
            if number > 2**29:
                return f"--{name.replace('_', '-')} must be at most 2**29, got {number}."
        if self.remat not in get_args(Remat):
            return f"--remat takes {', '.join(get_args(Remat))}, got {self.remat!r}."
        if self.width % self.heads:
            return f"--heads must divide --width, got {self.heads} heads for a width of {self.width}."
        if self.positions == "rotary" and self.width // self.heads % 2:
            return f"Rotary positions need an even width a head, got {self.width // self.heads}."
        try:
            kinds = parse(self.attention)
            self.layouts()
        except ValueError as error:
            return f"--attention: {error}"
        if len(kinds) > self.layers:
            return (
                f"--attention names {len(kinds)} layers, and there are {self.layers}. Name as many as --layers at most."
            )
        if any(isinstance(layer.kind, Cudnn) for layer in kinds):
            if jax.default_backend() != "gpu":
                return f"--attention cudnn needs an NVIDIA GPU, and JAX runs on {jax.default_backend()}."
            if self.dtype == "float32":
                return "--attention cudnn needs --dtype bfloat16, got float32."
        return None
