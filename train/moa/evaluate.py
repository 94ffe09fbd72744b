"""A trained model under a plan."""

from __future__ import annotations

import dataclasses
import functools

import jax
from flax import nnx

from models import Transformer
from models.kinds import LayerKind, text_of
from scfa_jax.layers import Dense
from train.config import Config
from train.data import Corpus
from train.loop import evaluate
from train.moa.plan import Plan
from train.step import LanguageModel, TrainState, eval_step


def held_out_loss(config: Config, corpus: Corpus, state: TrainState, plan: Plan | None, max_tokens: int) -> float:
    """The mean held-out loss of a model whose attention is that of a plan.

    Args:
        config: Of the run that trained it.
        corpus: Where the held-out text comes from.
        state: The model's arrays.
        plan: The plan; None for all earlier keys, also where the model would drop some at evaluation.
        max_tokens: Read about this many at most; 0 for all.

    Returns:
        Nats a token.
    """
    dense = (LayerKind(Dense(), layer.share_query_key, layer.normalize_key) for layer in config.model.layer_kinds())
    attention = text_of(tuple(dense)) if plan is None else plan.attention
    shape = dataclasses.replace(config.model, attention=attention)
    rngs = functools.partial(nnx.Rngs, params=0, sparsity=0)
    sizes = {"vocab_size": corpus.vocab_size, "max_length": config.data.seq_len}
    graph = nnx.graphdef(nnx.eval_shape(lambda: Transformer(shape, rngs=rngs(), **sizes)))
    step = jax.jit(functools.partial(eval_step, LanguageModel(graph)))
    return evaluate(step, state, corpus, config.data, max_tokens)
