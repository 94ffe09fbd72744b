"""One optimisation step and one evaluation, as pure functions of the training state."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from models import ModelConfig, Transformer
from models.sharding import BATCH, cut
from scfa_jax.kmeans import update_centroids
from train.config import OptimizerConfig
from train.data import Batch
from train.loss import cross_entropy

# What of a draw serves all sequences of a step.
ONE_FOR_ALL = ("rotations", "seed")


class TrainState(NamedTuple):
    """All that training changes, and the model's other variables: what a checkpoint holds."""

    step: jax.Array  # int32 []
    params: Any  # pure dict of float32 arrays
    opt_state: optax.OptState
    fixed: Any  # pure dict: what evaluation hashes with, and centroids, which move with the data


class Measured(NamedTuple):
    """What a step says of itself: float32 `[]` each."""

    loss: jax.Array  # nats a token
    gradient_norm: jax.Array  # global, before the clip
    learning_rate: jax.Array


@dataclass(frozen=True)
class LanguageModel:
    """A model without its arrays."""

    graph: nnx.GraphDef

    def merge(self, params: Any, fixed: Any) -> Transformer:
        """Puts arrays into the model."""
        return nnx.merge(self.graph, params, fixed)


def init(
    config: ModelConfig, optimizer: OptimizerConfig, *, vocab_size: int, max_length: int
) -> tuple[LanguageModel, TrainState]:
    """Makes a model and the state it starts from; the seed decides every bit of it."""
    rngs = nnx.Rngs(params=optimizer.seed, sparsity=optimizer.seed + 1)
    model = Transformer(config, vocab_size=vocab_size, max_length=max_length, rngs=rngs)
    graph, *states = nnx.split(model, nnx.Param, ...)
    params, fixed = (nnx.to_pure_dict(state) for state in states)
    opt_state = make_optimizer(optimizer).init(params)
    return LanguageModel(graph), TrainState(jnp.zeros((), jnp.int32), params, opt_state, fixed)


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """The rate of every step: it warms up, then falls along a cosine to a tenth."""
    warmup = min(config.warmup, config.steps - 1)
    return optax.warmup_cosine_decay_schedule(0.0, config.lr, warmup, config.steps, config.lr / 10)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW behind a clip by the global norm."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(learning_rate(config), b1=0.9, b2=0.95, weight_decay=config.weight_decay, mask=_decayed),
    )


def train_step(
    model: LanguageModel, config: OptimizerConfig, state: TrainState, batch: Batch
) -> tuple[TrainState, Measured]:
    """One step.

    Args:
        model: The model; fixed for a run, as is `config`.
        config: The optimizer. Its seed, with the step's number, decides the step's hashes and dropped tokens, so that
            a resumed run draws what an uninterrupted one would have drawn.
        state: The state before.
        batch: `[B, T + 1]`. With `config.accumulate` it is computed in so many parts of `B / accumulate` sequences,
            with the draws that they would have had in the whole.

    Returns:
        The state after, and what was measured.
    """
    batch_size, length = batch.tokens[:, 1:].shape
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    whole = model.merge(state.params, state.fixed)
    draws = whole.draw(batch_size, length, key)

    def loss_of(variables: tuple[Any, Any], batch: Batch, draws: Any) -> jax.Array:
        """The part's share of the mean over all tokens."""
        params, centroids = variables
        transformer = model.merge(params, _with(state.fixed, centroids))
        tokens, targets, segment_ids = inputs_and_targets(batch)
        features = _for_loss(transformer.features(tokens, draws=draws, segment_ids=segment_ids))
        return cross_entropy(features, _table(transformer), targets, jnp.full(targets.shape, 1 / (batch_size * length)))

    variables = state.params, _centroids(state.fixed)
    loss, gradients = _accumulated(jax.value_and_grad(loss_of), variables, (batch, draws), config.accumulate)
    gradients, sums = gradients  # the latter by the centroids: see `scfa_jax.kmeans.with_gradient`
    fixed = _with(state.fixed, jax.tree.map_with_path(functools.partial(_moved, whole), variables[1], sums))
    updates, opt_state = make_optimizer(config).update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    measured = Measured(loss, optax.tree.norm(gradients), jnp.asarray(learning_rate(config)(state.step), jnp.float32))
    return TrainState(state.step + 1, params, opt_state, fixed), measured


def eval_step(model: LanguageModel, params: Any, fixed: Any, batch: Batch, weights: jax.Array) -> jax.Array:
    """Summed loss of the sequences `[B, T + 1]` weighted by `[B]`: nats, float32 `[]`."""
    transformer = model.merge(params, fixed)
    tokens, targets, segment_ids = inputs_and_targets(batch)
    features = _for_loss(transformer.features(tokens, segment_ids=segment_ids))
    return cross_entropy(features, _table(transformer), targets, jnp.broadcast_to(weights[:, None], targets.shape))


def inputs_and_targets(batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """What is read, what follows it, and the documents of what is read, if they are separate: `[B, T]` each."""
    tokens = jnp.asarray(batch.tokens)
    segment_ids = None if batch.segment_ids is None else jnp.asarray(batch.segment_ids)[:, :-1]
    return tokens[:, :-1], tokens[:, 1:], segment_ids


def _accumulated(
    value_and_grad: Callable[..., tuple[jax.Array, Any]], params: Any, whole: tuple[Batch, Any], parts: int
) -> tuple[jax.Array, Any]:
    """The sum of a function's values and gradients over parts of the batch, one at a time."""
    if parts == 1:
        return value_and_grad(params, *whole)
    batch_size = whole[0].tokens.shape[0]

    def split(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        if getattr(path[-1], "key", None) in ONE_FOR_ALL:
            return jnp.broadcast_to(x, (parts, *x.shape))
        return cut(x.reshape(parts, batch_size // parts, *x.shape[1:]), None, BATCH)

    def add(sums: tuple[jax.Array, Any], part: tuple[Batch, Any]) -> tuple[tuple[jax.Array, Any], None]:
        return jax.tree.map(jnp.add, sums, value_and_grad(params, *part)), None

    zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, zeros, jax.tree.map_with_path(split, whole))[0]


def _for_loss(features: jax.Array) -> jax.Array:
    """Features `[B, T, width]` cut over all devices of a mesh: each scores its own tokens by the whole vocabulary."""
    return cut(features, BATCH, "model")


def _centroids(fixed: Any) -> Any:
    """Centroids alone, None in the place of all else."""
    return jax.tree.map_with_path(lambda path, x: x if path[-1].key == "centroids" else None, fixed)


def _moved(model: Transformer, path: tuple[Any, ...], centroids: jax.Array, sums: jax.Array) -> jax.Array:
    """The centroids of the next step, those of a layer by the decay of its own."""
    _, layer, *_ = path  # blocks, the number of the block, ...
    kind: Any = model.blocks[layer.key].attention.layout.kind
    return update_centroids(centroids, sums, kind.by.decay)


def _with(fixed: Any, centroids: Any) -> Any:
    """What is fixed in a step, with the centroids of `_centroids`."""
    take = lambda new, old: old if new is None else new
    return jax.tree.map(take, centroids, fixed, is_leaf=lambda x: x is None)


def _table(transformer: Transformer) -> jax.Array:
    """What scores the tokens, `[V, width]`."""
    return transformer.embedding.embedding[...]


def _decayed(params: Any) -> Any:
    """True for matrices. By name: a bias of several heads has two axes as well."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)
