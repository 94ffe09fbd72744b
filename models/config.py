"""What shape the language model has."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias, get_args

import jax
import tyro

STATIC_KINDS = ("window", "longformer", "bigbird", "strided", "fixed")
ATTENTION_KINDS = (
    *("dense", "dense-cudnn", "hash", "qk", "topk", "sparsek", "heavy", "reformer", "identity"),
    *STATIC_KINDS,
)
Remat = Literal["none", "full", "save_attention"]
# Of each layer, of each head: what `scfa_jax.nnx.Window` calls window and slope.
WindowRules: TypeAlias = tuple[tuple[tuple[int, float], ...], ...]
_AT_LEAST_1 = (
    *("layers", "width", "heads", "vocab_multiple", "num_rounds", "chunk_size"),
    *("window", "stride", "num_summaries", "random_block"),
    *("sparsek_keys", "sparsek_window", "sparsek_chunk"),
)
_AT_LEAST_0 = ("num_sinks", "num_random", "hash_window")


LARGEST = 2**29  # longer than any sequence, and sums of three such numbers fit in int32


@dataclass(frozen=True)
class ModelConfig:
    """The model."""

    preset: Literal["cpu", "bytes", "mnist", "gpt2-small"] = "cpu"
    """Where options of the model that are not given come from: a small model for a CPU, one for bytes, one for
    the pixels of MNIST, or the paper's for GPT-2's vocabulary."""
    attention: str = "hash"
    """Attention of the layers: dense, dense-cudnn (cuDNN's, on a GPU), hash (buckets), qk (dropped queries and
    keys), topk (the keys with the best scores), reformer (buckets cut into chunks), sparsek (a window, and keys that a
    learned score selects), heavy (a window, and the keys that received the most attention in it), window, longformer,
    bigbird, strided or fixed (by position alone, see docs/patterns.md) or identity (none: the bound on speed). One kind
    for all, or several separated by commas, repeated over the layers: dense,hash."""
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
    share_query_key: bool | None = None
    """Whether keys are the queries, with no projection of their own; None: in hash and reformer layers alone."""
    normalize_key: bool | None = None
    """Whether the keys of each head have unit length; None: in hash and reformer layers alone."""
    num_buckets: int = 4
    """Hash buckets of a hash or reformer layer: even."""
    hash: Literal["random", "learned", "kmeans", "permutation"] = "random"
    """What a hash layer hashes by: rotations drawn in each step, rotations that are learned, the nearest of centroids
    that follow the data, or positions drawn in each step, whatever stands there (a control)."""
    centroid_decay: float = 0.999
    """Share of the moving average of a centroid that stays in a step, with --hash kmeans."""
    exclude_self: bool = True
    """Whether a token of a hash layer may not attend to itself."""
    hash_window: int = 0
    """Positions up to its own (seen with --no-exclude-self alone) that a token of a hash layer sees whatever their
    bucket; 0 for its bucket alone."""
    hash_before_rotary: bool = False
    """Whether a hash or reformer layer hashes before it rotates, so that buckets do not depend on positions."""
    num_rounds: int = 1
    """Hash rounds of a reformer layer."""
    chunk_size: int | None = None
    """Tokens in a chunk of a reformer layer; None: twice as many as are in a bucket on average."""
    drop_rate: float = 0.3
    """Share of queries and of keys that a qk layer drops while training, and of keys that a topk layer always drops."""
    drop_at_evaluation: bool = False
    """Whether a qk layer drops as many where it is evaluated or samples; otherwise it keeps everything there."""
    drop_warmup: int = 0
    """Training steps in which the share of what is dropped grows from 0 to --drop-rate."""
    keep_score: Literal["norm", "learned"] = "norm"
    """What a topk layer keeps keys by: their length, or a learned score."""
    window: int = 64
    """Positions up to its own that a token of a window, longformer or bigbird layer sees."""
    window_rules: Annotated[WindowRules | None, tyro.conf.Suppress] = None
    """Windows of a window layer's heads in place of --window; read from the file of --window-plan."""
    num_sinks: int = 4
    """First tokens of the sequence that later ones of a window or bigbird layer see too."""
    stride: int = 32
    """Distance of the column's positions in a strided layer, of global tokens in a longformer layer, and length of a
    block in a fixed layer."""
    num_summaries: int = 1
    """Last tokens of each block that later blocks of a fixed layer see."""
    num_random: int = 2
    """Random blocks that a token of a bigbird layer sees."""
    random_block: int = 32
    """Tokens in such a block."""
    sparsek_keys: int = 64
    """Keys that a sparsek or heavy layer selects, for each chunk of queries and each head."""
    sparsek_window: int = 64
    """Keys at least of the window of a sparsek or heavy layer, the token's own among them."""
    sparsek_chunk: int = 64
    """Queries of a sparsek or heavy layer that share a selection."""
    sparsek_slope: float = 0.0
    """What each position adds to the scores of a sparsek layer, in favour of later tokens."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What it computes in (parameters are always float32); auto: float32 on a CPU, bfloat16 elsewhere."""
    remat: Remat = "none"
    """What to compute again in the backward pass, for less memory and more time: nothing, each block, or each
    block but for the attention kernels' results."""

    def layer_kinds(self) -> tuple[str, ...]:
        """The attention kind of every layer, first to last."""
        pattern = [kind.strip() for kind in self.attention.split(",")]
        return tuple(pattern[layer % len(pattern)] for layer in range(self.layers))

    def can_decode(self) -> bool:
        """Whether tokens can be kept in a cache: not in a reformer layer, whose chunks depend on later tokens."""
        return "reformer" not in self.layer_kinds()

    def problem(self) -> str | None:
        """What is wrong with these numbers, in one line; None if nothing is."""
        for name in (*_AT_LEAST_1, *_AT_LEAST_0):
            number, least = getattr(self, name), int(name in _AT_LEAST_1)
            if number is not None and number < least:
                return f"--{name.replace('_', '-')} must be at least {least}, got {number}."
        for name in (*_AT_LEAST_1, *_AT_LEAST_0, "num_buckets", "drop_warmup"):
            number = getattr(self, name)
            if number is not None and number > LARGEST:
                return f"--{name.replace('_', '-')} must be at most 2**29, got {number}."
        kinds = [kind.strip() for kind in self.attention.split(",")]
        unknown = [kind for kind in kinds if kind not in ATTENTION_KINDS]
        if unknown:
            return f"--attention takes {', '.join(ATTENTION_KINDS)} or a list of them, got {unknown[0]!r}."
        if len(kinds) > self.layers:
            return f"--attention names {len(kinds)} kinds for {self.layers} layers. Name as many as --layers at most."
        if self.remat not in get_args(Remat):
            return f"--remat takes {', '.join(get_args(Remat))}, got {self.remat!r}."
        if not 0 <= self.centroid_decay < 1:
            return f"--centroid-decay must be at least 0 and below 1, got {self.centroid_decay}."
        if self.width % self.heads:
            return f"--heads must divide --width, got {self.heads} heads for a width of {self.width}."
        if self.positions == "rotary" and self.width // self.heads % 2:
            return f"Rotary positions need an even width a head, got {self.width // self.heads}."
        if self.window_rules is not None and [len(rules) for rules in self.window_rules] != [self.heads] * self.layers:
            return f"window_rules must be {self.layers} layers of {self.heads} heads."
        if self.num_buckets < 2 or self.num_buckets % 2:
            return f"--num-buckets must be an even number of at least 2, got {self.num_buckets}."
        if "reformer" in kinds and self.share_query_key is False:
            return "--share-query-key False does not go with --attention reformer: its keys are its queries."
        if "dense-cudnn" in kinds and jax.default_backend() != "gpu":
            return f"--attention dense-cudnn needs an NVIDIA GPU, and JAX runs on {jax.default_backend()}."
        if "dense-cudnn" in kinds and self.dtype == "float32":
            return "--attention dense-cudnn needs --dtype bfloat16, got float32."
        if not 0 <= self.drop_rate < 1:
            return f"--drop-rate must be at least 0 and below 1, got {self.drop_rate}."
        if self.num_summaries > self.stride:
            return f"--num-summaries must be at most --stride, {self.stride}, got {self.num_summaries}."
        if not math.isfinite(self.sparsek_slope):
            return f"--sparsek-slope must be finite, got {self.sparsek_slope}."
        if self.drop_warmup < 0:
            return f"--drop-warmup must not be negative, got {self.drop_warmup}."
        return None
