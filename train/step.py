"""One optimisation step and one evaluation, as pure functions of the training state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from models import ModelConfig, Transformer
from train.config import OptimizerConfig

BITS_PER_NAT = 1 / math.log(2)


class TrainState(NamedTuple):
    """All that training changes, and the model's other variables: what a checkpoint holds."""

    step: jax.Array  # int32 []
    params: Any  # pure dict of float32 arrays
    opt_state: optax.OptState
    fixed: Any  # pure dict: the rotations that evaluation hashes with


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


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW behind a clip by the global norm; the rate warms up, then falls along a cosine to a tenth."""
    warmup = min(config.warmup, config.steps - 1)
    rate = optax.warmup_cosine_decay_schedule(0.0, config.lr, warmup, config.steps, config.lr / 10)
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=config.weight_decay, mask=_decayed),
    )


def train_step(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    seed: int,
    state: TrainState,
    batch: jax.Array,
) -> tuple[TrainState, jax.Array]:
    """One step.

    Args:
        model: The model; with `optimizer` and `seed` fixed for a run.
        optimizer: From `make_optimizer`.
        seed: With the step's number it decides the step's hashes and dropped tokens, so that a resumed run
            draws what an uninterrupted one would have drawn.
        state: The state before.
        batch: int `[B, T + 1]`.

    Returns:
        The state after, and the loss, nats a token, float32 `[]`.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)

    def loss_of(params: Any) -> jax.Array:
        logits = model.merge(params, state.fixed)(batch[:, :-1], key=key, step=state.step)
        return _cross_entropy(logits, batch[:, 1:]).mean()

    loss, gradients = jax.value_and_grad(loss_of)(state.params)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state, state.fixed), loss


def eval_step(model: LanguageModel, params: Any, fixed: Any, batch: jax.Array, weights: jax.Array) -> jax.Array:
    """Summed loss of the sequences `[B, T + 1]` weighted by `[B]`: nats, float32 `[]`."""
    logits = model.merge(params, fixed)(batch[:, :-1])
    return (_cross_entropy(logits, batch[:, 1:]).sum(axis=1) * weights).sum()


def _cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets.astype(jnp.int32))


def _decayed(params: Any) -> Any:
    """True for matrices. By name: a bias of several heads has two axes as well."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)
