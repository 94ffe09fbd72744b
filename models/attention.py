"""The kinds of attention that a layer can have: one set of projections, and what happens between them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import ModelConfig
from models.reformer import reformer_attention
from models.rotary import rotary
from scfa_jax import lsh_hash
from scfa_jax.nnx import CausalSelfAttention, KeptDraw
from scfa_jax.sparsity import (
    BigBird,
    Drop,
    Fixed,
    Hash,
    HeavyHitters,
    KeepTop,
    KMeansHash,
    Layout,
    LearnedHash,
    Longformer,
    PermutationHash,
    SparseK,
    Sparsity,
    StaticPattern,
    Strided,
    Window,
    normalize,
)

# Kinds of hash layers by the names that `ModelConfig.hash` has for them.
HASHES = {"random": Hash, "learned": LearnedHash, "kmeans": KMeansHash, "permutation": PermutationHash}
# What one layer's attention hashes or drops by: keywords of its call, none in a dense layer.
Draw: TypeAlias = dict[str, jax.Array]


def make_attention(
    config: ModelConfig, layer: int, *, out_kernel_init: nnx.Initializer, dtype: jnp.dtype, rngs: nnx.Rngs
) -> CausalSelfAttention:
    """Makes the attention of a layer.

    Args:
        config: The model.
        layer: Its number, from 0.
        out_kernel_init: Of the output projection.
        dtype: Of the computation.
        rngs: Streams "params" and "sparsity".

    Returns:
        A module that maps `[B, T, width]` to the like. All kinds have the same projections and, unless the config
        says otherwise, treat keys alike: only hash and reformer share them with the queries and normalise them, each
        head's on its own.
    """
    buckets, before_rotary = config.num_buckets, config.hash_before_rotary
    selection = config.sparsek_keys, config.sparsek_window, config.sparsek_chunk
    kinds: dict[str, tuple[Callable[..., CausalSelfAttention], Sparsity | None]] = {
        "dense": (CausalSelfAttention, None),
        "dense-cudnn": (functools.partial(AttentionBy, cudnn_attention), None),
        "hash": (
            CausalSelfAttention,
            HASHES[config.hash](buckets, config.exclude_self, before_rotary, window=config.hash_window),
        ),
        "qk": (CausalSelfAttention, Drop(config.drop_rate, config.drop_at_evaluation)),
        "topk": (CausalSelfAttention, KeepTop(1 - config.drop_rate, config.keep_score)),
        "sparsek": (CausalSelfAttention, SparseK(*selection, slope=config.sparsek_slope)),
        "heavy": (CausalSelfAttention, HeavyHitters(*selection)),
        "reformer": (ReformerSelfAttention, Rounds(buckets, True, before_rotary, config.num_rounds, config.chunk_size)),
        "identity": (functools.partial(AttentionBy, no_attention), None),
        **{name: (CausalSelfAttention, static) for name, static in static_kinds(config, layer).items()},
    }
    make, sparsity = kinds[config.layer_kinds()[layer]]
    return make(
        config.width,
        config.heads,
        sparsity=sparsity,
        share_query_key=config.share_query_key,
        normalize_key=config.normalize_key,
        rotary=rotary if config.positions == "rotary" else None,
        out_kernel_init=out_kernel_init,
        dtype=dtype,
        rngs=rngs,
    )


def static_kinds(config: ModelConfig, layer: int) -> dict[str, Window | StaticPattern]:
    """Makes the kinds of sparsity in which a token's keys depend on its position alone, by their names.

    Args:
        config: The model.
        layer: The number of the layer that is to have one of them.

    Returns:
        One for each of `STATIC_KINDS`.
    """
    window: Any = config.window, 0.0
    if config.window_rules is not None:
        window = zip(*config.window_rules[layer], strict=True)
    windows, slopes = window
    return {
        "window": Window(windows, config.num_sinks, slopes),
        "longformer": Longformer(config.window, config.stride),
        "bigbird": BigBird(config.window, config.num_sinks, config.num_random, config.random_block, seed=layer),
        "strided": Strided(config.stride),
        "fixed": Fixed(config.stride, config.num_summaries),
    }


class AttentionBy(CausalSelfAttention):
    """The projections of `CausalSelfAttention` around another function, `[B, T, N, H]` in and out."""

    def __init__(self, function: Callable[..., jax.Array], *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.function = function

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None = None, decode: bool | None = None, **options: Any
    ) -> jax.Array:
        """Maps `[B, T, E]` to the like; `segment_ids` and `decode` as in `Transformer.features`.

        In decoding cuDNN's attention is the dense one of `CausalSelfAttention`, and no attention is what it always is.
        """
        if decode and self.function is cudnn_attention:
            return super().__call__(x, segment_ids=segment_ids, decode=True)
        query, value = self.query(x), self.value(x)
        key = query if self.layout.share_query_key else self.key(x)
        if self.rotary is not None:
            positions = jnp.arange(x.shape[1])[None]
            query, key = self.rotary(query, positions), self.rotary(key, positions)
        key = normalize(key) if self.layout.normalize_key else key
        return self.out(self.function(query, key, value, segment_ids=segment_ids))


def cudnn_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, segment_ids: jax.Array | None = None
) -> jax.Array:
    """Dense causal attention by cuDNN, `[B, T, N, H]` in and out.

    Raises:
        NotImplementedError: There is no GPU, or there are segments, which cuDNN takes as a mask of `T * T` alone.
        TypeError: The dtype is neither bfloat16 nor float16.
    """
    if jax.default_backend() != "gpu":
        raise NotImplementedError(f"dense-cudnn needs an NVIDIA GPU, and JAX runs on {jax.default_backend()}.")
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        raise TypeError(f"dense-cudnn computes in bfloat16 or float16, got {query.dtype}.")
    if segment_ids is not None:
        raise NotImplementedError("dense-cudnn takes no segment_ids: use dense, or documents that are not separate.")
    return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn")


def no_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, segment_ids: jax.Array | None = None
) -> jax.Array:
    """The values as they are: what a step takes without attention, `[B, T, N, H]` in and out.

    Queries and keys come in with a factor that is next to nothing, in place of 0: else the compiler would leave out
    their projections, forward and backward, and the bound would be too good. They come in as a product, since those
    of a sum would have one gradient, and the compiler would compute it once.
    """
    return value + 2.0**-30 * query * key


@dataclasses.dataclass(frozen=True)
class Rounds(Hash):
    """Several rounds of hashing into buckets that are cut into chunks, as in the Reformer (Kitaev et al. 2020).

    Args:
        num_rounds: How many.
        chunk_size: Tokens in a chunk, or None for the default of `reformer_attention`.

    Raises:
        ValueError: There is a `window`, which the Reformer has not; or as in `Hash`.
    """

    num_rounds: int = 1
    chunk_size: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.window:
            raise ValueError(f"window must be 0 with rounds of the Reformer, got {self.window}.")

    def draw(self, key: jax.Array, batch_size: int, length: int, layout: Layout) -> Draw:
        """Draws `rotations`, float32 `[R, K, H, num_buckets // 2]`; arguments as in `Hash.draw`."""
        draws = [
            super(Rounds, self).draw(k, batch_size, length, layout) for k in jax.random.split(key, self.num_rounds)
        ]
        return {"rotations": jnp.stack([draw["rotations"] for draw in draws])}


class ReformerSelfAttention(CausalSelfAttention):
    """The projections of `CausalSelfAttention` around `reformer_attention`; its `sparsity` is a `Rounds`.

    It cannot decode: which chunk a token is in depends on later tokens too.
    """

    rotations: KeptDraw

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None = None, rotations: jax.Array | None = None, **options: Any
    ) -> jax.Array:
        """Maps `[B, T, E]` to the like; `segment_ids` as in `Transformer.features`, `rotations` of `draw`."""
        assert isinstance(self.sparsity, Rounds)
        query, buckets = self.query_and_buckets(x, self.rotations[...] if rotations is None else rotations)
        return self.out(
            reformer_attention(
                query,
                self.value(x),
                buckets,
                num_buckets=self.sparsity.num_buckets,
                chunk_size=self.sparsity.chunk_size,
                normalize_key=self.layout.normalize_key,
                segment_ids=segment_ids,
            )
        )

    def query_and_buckets(self, x: jax.Array, rotations: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Queries `[B, T, N, H]` of `[B, T, E]`, and their buckets, int32 `[R, B, T, N]`; `rotations` of `draw`."""
        assert isinstance(self.sparsity, Rounds)
        query = hashed = self.query(x)
        if self.rotary is not None:
            query = self.rotary(query, jnp.arange(x.shape[1])[None])
            hashed = hashed if self.sparsity.before_rotary else query
        return query, jax.vmap(lsh_hash, (None, 0))(hashed, rotations)


def drop_rate(config: ModelConfig, step: jax.Array | int | None) -> jax.Array | float:
    """The share of queries and of keys that a qk layer drops at a training step, and of keys that a topk layer does.

    Args:
        config: The model.
        step: The step's number, from 0; an int or int32 `[]`, which does not recompile. None is allowed where the
            rate is constant.

    Returns:
        The rate: it grows linearly from 0 and is `config.drop_rate` from step `config.drop_warmup` on.

    Raises:
        ValueError: The rate depends on the step, and there is none.
    """
    if config.drop_warmup == 0:
        return config.drop_rate
    if step is None:
        raise ValueError(f"step must be given where drop_warmup is not 0, got None and {config.drop_warmup}.")
    return config.drop_rate * jnp.minimum(jnp.asarray(step, jnp.float32) / config.drop_warmup, 1)


def draw_kept(key: jax.Array, rate: jax.Array | float, batch: int, length: int, heads: int) -> Draw:
    """Draws what a qk layer keeps, with a rate that may be traced; `scfa_jax.nnx.Drop` takes a static one.

    Args:
        key: A JAX random key.
        rate: Probability with which each query and each key is dropped.
        batch: `B`.
        length: `T`.
        heads: `N`.

    Returns:
        `query_keep` and `key_keep`, bool `[B, T, N]`.
    """
    keys = dict(zip(("query_keep", "key_keep"), jax.random.split(key), strict=True))
    return {name: jax.random.bernoulli(one, 1 - rate, (batch, length, heads)) for name, one in keys.items()}
