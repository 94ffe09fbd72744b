"""A decoder-only transformer: pre-norm, rotary or learned positions, tied embeddings."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import ModelConfig
from models.sharding import BATCH, cut
from scfa_jax.layers import BigBird, State
from scfa_jax.nnx import CausalSelfAttention, rotary
from scfa_jax.remat import save_attention

# What each way to compute blocks again keeps of them.
POLICIES = {"full": None, "save_attention": save_attention}


class Block(nnx.Module):
    """One layer: attention, then a perceptron, each behind a layer norm and beside a residual path."""

    def __init__(self, config: ModelConfig, layer: int, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        width = config.width
        # Every residual branch starts small, so that the sum over all of them starts at the size of one.
        branch_end = nnx.initializers.normal(0.02 / (2 * config.layers) ** 0.5)
        self.norm1 = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.attention = _attention(config, layer, out_kernel_init=branch_end, dtype=dtype, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.expand = nnx.Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.shrink = nnx.Linear(4 * width, width, dtype=dtype, kernel_init=branch_end, rngs=rngs)

    def __call__(
        self, x: jax.Array, draw: State, segment_ids: jax.Array | None = None, decode: bool = False
    ) -> jax.Array:
        """Maps `[B, T, width]` to the same; `draw` is this layer's of `Transformer.draw`."""
        x = x + self.attention(self.norm1(x), deterministic=True, segment_ids=segment_ids, decode=decode, **draw)
        return x + self.shrink(nnx.gelu(self.expand(self.norm2(x))))


class Transformer(nnx.Module):
    """A decoder-only language model. Parameters are float32; the computation has `config.dtype`.

    Args:
        config: Its shape.
        vocab_size: Number of tokens.
        max_length: Longest sequence, for learned positions.
        rngs: Source of the parameters and of the hash that evaluation uses.

    Raises:
        ValueError: `config` is impossible, or its dtype is still "auto".
    """

    def __init__(self, config: ModelConfig, *, vocab_size: int, max_length: int, rngs: nnx.Rngs):
        problem = config.problem() or ("dtype must be decided." if config.dtype == "auto" else None)
        if problem:
            raise ValueError(problem)
        self.config = config
        dtype = jnp.dtype(config.dtype)
        normal = nnx.initializers.normal(0.02)
        embed = functools.partial(nnx.Embed, features=config.width, dtype=dtype, embedding_init=normal, rngs=rngs)
        self.vocab_size = vocab_size
        self.embedding = embed(-(-vocab_size // config.vocab_multiple) * config.vocab_multiple)
        self.position = embed(max_length) if config.positions == "learned" else None
        self.blocks = nnx.List([Block(config, layer, dtype, rngs=rngs) for layer in range(config.layers)])
        self.norm = nnx.LayerNorm(config.width, dtype=dtype, rngs=rngs)
        self.cache_index: Any = nnx.data(None)  # a variable: see `init_cache`

    def init_cache(self, batch: int, max_length: int) -> None:
        """Makes empty caches, `nnx.Cache` variables of this model and its layers, for `features(..., decode=True)`.

        Args:
            batch: `B`.
            max_length: The most tokens that they can hold.

        Raises:
            ValueError: There are fewer learned positions.
            NotImplementedError: A layer cannot decode.
        """
        if not self.config.can_decode():
            raise NotImplementedError(f"--attention {self.config.attention} cannot decode: see models.reformer.")
        self._check_length(max_length)
        self.cache_index = nnx.data(nnx.Cache(jnp.zeros((), jnp.int32)))
        for block in self.blocks:
            block.attention.init_cache((batch, max_length, self.config.width))

    def draw(self, batch: int, length: int, key: jax.Array | None, start: jax.Array | int = 0) -> list[State]:
        """What every layer hashes and drops by.

        Args:
            batch: `B`.
            length: `T`.
            key: Of a new draw; None for that of evaluation, the same every time.
            start: The first token's position, on which alone depends what evaluation drops, if a kind drops there; an
                int or int32 `[]`.

        Returns:
            One entry a layer, for `features`; an empty one where the layer takes what it keeps.
        """
        draws: list[State] = []
        for layer, block in enumerate(self.blocks):
            layout = block.attention.layout
            if not layout.kind.draws(deterministic=key is None):
                draws.append({})
                continue
            own = jax.random.fold_in(jax.random.key(0) if key is None else key, layer)
            own = jax.random.fold_in(own, start) if key is None else own
            draws.append(layout.kind.draw(own, batch, length, layout))
        return draws

    def __call__(self, tokens: jax.Array, **options: Any) -> jax.Array:
        """Scores the next token at every position: `logits(features(tokens, **options))`."""
        return self.logits(self.features(tokens, **options))

    def features(
        self,
        tokens: jax.Array,
        *,
        key: jax.Array | None = None,
        draws: list[State] | None = None,
        segment_ids: jax.Array | None = None,
        decode: bool = False,
    ) -> jax.Array:
        """What `logits` reads.

        Args:
            tokens: int `[B, T]`.
            key: For training: draws new hashes and drops tokens. None for evaluation: the hashes that the
                model was made with, and what `draw` drops then.
            draws: What `draw` returned, instead of `key`.
            segment_ids: int32 `[B, T]`: tokens attend inside their own segment alone, as when documents share a
                sequence. Positions go on counting from one segment to the next. Or None.
            decode: Whether the tokens follow those in the cache of `init_cache`, and join them there; for evaluation.

        Returns:
            `[B, T, width]`; in decoding NaN past the cache's end.

        Raises:
            ValueError: The sequence is longer than the learned positions, or there is no cache.
            NotImplementedError: There are segments, and a layer cannot keep them apart or decodes.
        """
        batch, length = tokens.shape
        if decode and self.cache_index is None:
            raise ValueError("There is no cache to decode with: call init_cache(batch, max_length) first.")
        start = self.cache_index[...] if decode else 0
        x = self.embed(tokens, start)
        # Drawn out here: a rematerialised block must see the same draw when it is computed again.
        draws = self.draw(batch, length, key, start) if draws is None else draws
        for block, draw in zip(self.blocks, draws, strict=True):
            if decode:  # writes to the block's cache, and has no backward pass
                x = block(x, draw, segment_ids, decode=True)
            else:
                x = cut(_call(block, self.config.remat, x, draw, segment_ids), BATCH)
        if decode:
            self.cache_index[...] += length
        return self.norm(x)

    def embed(self, tokens: jax.Array, start: jax.Array | int = 0) -> jax.Array:
        """What the first block reads: int `[B, T]` at positions from `start` on to `[B, T, width]`.

        Raises:
            ValueError: The sequence is longer than the learned positions.
        """
        # Whole where it is looked up, on every device of a mesh: any token may stand anywhere in it.
        # In float32 until it is looked up: the gradient of a frequent token is a sum of thousands of terms.
        table = cut(self.embedding.embedding[...])
        x = jnp.take(table, cut(tokens.astype(jnp.int32), BATCH), axis=0).astype(self.embedding.dtype)
        if self.position is None:
            return cut(x, BATCH)
        self._check_length(tokens.shape[1])
        return cut(x + cut(self.position(start + jnp.arange(tokens.shape[1]))), BATCH)

    def logits(self, features: jax.Array) -> jax.Array:
        """Scores every token by its embedding: `[..., width]` to float32 `[..., vocab_size]`."""
        table = self.embedding.embedding[...][: self.vocab_size].astype(features.dtype)
        return jnp.einsum("...d,vd->...v", features, table, preferred_element_type=jnp.float32)

    def _check_length(self, length: int) -> None:
        if self.position is not None and length > self.position.num_embeddings:
            longest = self.position.num_embeddings
            raise ValueError(f"tokens must be at most {longest} long with learned positions, got {length}.")


def _call(block: Block, remat: str, *arguments: Any) -> jax.Array:
    """Calls a block, whose parts are computed again in the backward pass as `remat` says."""
    if remat == "none":
        return block(*arguments)
    graph, state = nnx.split(block)
    again = jax.checkpoint(lambda state, *arguments: nnx.merge(graph, state)(*arguments), policy=POLICIES[remat])
    return again(state, *arguments)


def _attention(config: ModelConfig, layer: int, **options: Any) -> CausalSelfAttention:
    """The attention of a layer: all kinds have the same projections."""
    wanted = config.layer_kinds()[layer]
    kind = wanted.kind
    if isinstance(kind, BigBird):  # each layer has random blocks of its own
        kind = dataclasses.replace(kind, seed=kind.seed + layer)
    made = CausalSelfAttention(
        config.width,
        config.heads,
        sparsity=kind,
        share_query_key=wanted.share_query_key,
        normalize_key=wanted.normalize_key,
        rotary=rotary if config.positions == "rotary" else None,
        **options,
    )
    made.rngs = nnx.data(None)  # the model draws for all of its layers
    return made
