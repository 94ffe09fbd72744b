"""A decoder-only transformer: pre-norm, rotary or learned positions, tied embeddings."""

from __future__ import annotations

import functools
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import ModelConfig
from models.rotary import rotary
from scfa_jax.nnx import CausalSelfAttention
from scfa_jax.sparsity import Drop, Hash, Sparsity

# What one layer's attention hashes or drops by: keywords of `CausalSelfAttention`, none in a dense layer.
Draw: TypeAlias = dict[str, jax.Array]


class Block(nnx.Module):
    """One layer: attention, then a perceptron, each behind a layer norm and beside a residual path."""

    def __init__(self, config: ModelConfig, sparsity: Sparsity, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        width = config.width
        # Every residual branch starts small, so that the sum over all of them starts at the size of one.
        branch_end = nnx.initializers.normal(0.02 / (2 * config.layers) ** 0.5)
        self.norm1 = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.attention = CausalSelfAttention(
            width,
            config.heads,
            sparsity=sparsity,
            rotary=rotary if config.positions == "rotary" else None,
            out_kernel_init=branch_end,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm2 = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.expand = nnx.Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.shrink = nnx.Linear(4 * width, width, dtype=dtype, kernel_init=branch_end, rngs=rngs)

    def __call__(self, x: jax.Array, draw: Draw) -> jax.Array:
        """Maps `[B, T, width]` to the same; `draw` comes from `self.attention.draw`."""
        x = x + self.attention(self.norm1(x), deterministic=True, **draw)
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
        self.embedding = embed(vocab_size)
        self.position = embed(max_length) if config.positions == "learned" else None
        self.blocks = nnx.List(
            [Block(config, _sparsity(config, kind), dtype, rngs=rngs) for kind in config.layer_kinds()]
        )
        self.norm = nnx.LayerNorm(config.width, dtype=dtype, rngs=rngs)

    def draw(self, batch: int, length: int, key: jax.Array | None) -> list[Draw]:
        """What every layer hashes and drops by: a new draw from `key`, or the one of evaluation if None."""
        keys = [None if key is None else jax.random.fold_in(key, layer) for layer in range(len(self.blocks))]
        return [
            block.attention.draw(batch, length, deterministic=key is None, rngs=layer_key)
            for block, layer_key in zip(self.blocks, keys, strict=True)
        ]

    def __call__(self, tokens: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Scores the next token at every position.

        Args:
            tokens: int `[B, T]`.
            key: For training: draws new hashes and drops tokens. None for evaluation: the hashes that the
                model was made with, nothing dropped.

        Returns:
            Logits, float32 `[B, T, vocab_size]`.

        Raises:
            ValueError: The sequence is longer than the learned positions.
        """
        return self.logits(self.features(tokens, key=key))

    def features(self, tokens: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """What `logits` reads: `[B, T, width]`. Arguments as in `__call__`."""
        batch, length = tokens.shape
        tokens = tokens.astype(jnp.int32)
        x = self.embedding(tokens)
        if self.position is not None:
            if length > self.position.num_embeddings:
                raise ValueError(
                    f"tokens must be at most {self.position.num_embeddings} long with learned positions, got {length}."
                )
            x = x + self.position(jnp.arange(length))
        call = _call_again if self.config.remat else _call
        # Drawn out here: a rematerialised block must see the same draw when it is computed again.
        for block, draw in zip(self.blocks, self.draw(batch, length, key), strict=True):
            x = call(block, x, draw)
        return self.norm(x)

    def logits(self, features: jax.Array) -> jax.Array:
        """Scores every token by its embedding: `[..., width]` to float32 `[..., vocab_size]`."""
        table = self.embedding.embedding[...].astype(features.dtype)
        return jnp.einsum("...d,vd->...v", features, table, preferred_element_type=jnp.float32)


def _call(block: Block, x: jax.Array, draw: Draw) -> jax.Array:
    return block(x, draw)


def _call_again(block: Block, x: jax.Array, draw: Draw) -> jax.Array:
    """Calls a block that keeps nothing for the backward pass and computes it again there."""
    graph, state = nnx.split(block)
    return jax.checkpoint(lambda state, x, draw: nnx.merge(graph, state)(x, draw))(state, x, draw)


def _sparsity(config: ModelConfig, kind: str) -> Sparsity:
    in_buckets = Hash(config.num_buckets, config.exclude_self, config.hash_before_rotary)
    return {"dense": None, "hash": in_buckets, "qk": Drop(config.drop_rate)}[kind]
