"""One step: what it computes in one trace, in parts as in the whole, and with the arrays it was given."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import ModelConfig
from train.config import Config, DataConfig, OptimizerConfig, RunConfig
from train.data import Batch, load_corpus, training_batches
from train.loop import compile_steps
from train.step import eval_step, init, make_optimizer, train_step

TINY = {"layers": 1, "width": 16, "heads": 2, "dtype": "float32"}


def random_batch(sequences: int, length: int, *, segments: bool = False) -> Batch:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, (sequences, length + 1)).astype(np.uint8)
    ids = np.cumsum(rng.random(tokens.shape) < 0.2, axis=1).astype(np.int32) if segments else None
    return Batch(tokens, ids)


# Dense attention: see the run that leaves a record.
@pytest.mark.parametrize(("attention", "remat"), [("hash(2)", "none"), ("drop(0.3)", "full")])
def test_the_loss_falls_in_one_trace(attention, remat, text):
    data = DataConfig(data=str(text), held_out=0.1, seq_len=16, batch_size=4)
    optimizer = OptimizerConfig(steps=40, warmup=2, lr=0.01, accumulate=2)
    model, state = init(ModelConfig(**TINY, attention=attention, remat=remat), optimizer, vocab_size=256, max_length=16)
    batches = training_batches(load_corpus(data), data, seed=0)
    chex.clear_trace_counter()
    step = functools.partial(chex.assert_max_traces(train_step, n=1), model, optimizer)
    step = jax.jit(step, donate_argnums=0)
    losses = []
    for _ in range(40):
        state, measured = step(state, next(batches))
        losses.append(float(measured.loss))
    assert losses[0] == pytest.approx(np.log(256), rel=0.03)  # nothing is known yet
    assert np.mean(losses[-5:]) < 0.7 * losses[0]


def test_a_step_in_parts_is_the_step_in_one():
    kinds = "dense, hash(4), drop(0.5), hash(4, by=permutation)"
    config = ModelConfig(**{**TINY, "layers": 4}, attention=kinds)
    batch = random_batch(4, 24, segments=True)
    results = []
    for parts in (1, 2):
        optimizer = OptimizerConfig(steps=10, lr=0.01, warmup=0, accumulate=parts)
        model, state = init(config, optimizer, vocab_size=256, max_length=24)
        with jax.default_matmul_precision("highest"):
            results.append(jax.jit(functools.partial(train_step, model, optimizer))(state, batch))
    (state, measured), (other_state, other_measured) = results
    np.testing.assert_allclose(other_measured.loss, measured.loss, rtol=1e-6)
    np.testing.assert_allclose(other_measured.gradient_norm, measured.gradient_norm, rtol=1e-5)
    assert other_measured.learning_rate == measured.learning_rate == pytest.approx(0.01)
    # Gradients, as Adam's first moments: where one is next to 0, Adam's step follows the sign of its rounding.
    moments, other = (s.opt_state[1][0].mu for s in (state, other_state))
    scale = max(np.abs(x).max() for x in jax.tree.leaves(moments))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6 * scale), moments, other)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-3), state.params, other_state.params)


def test_a_step_in_parts_needs_less_memory():
    needed = []
    for parts in (1, 4):
        optimizer = OptimizerConfig(steps=10, accumulate=parts)
        model, state = init(ModelConfig(**TINY, attention="dense"), optimizer, vocab_size=256, max_length=128)
        step = jax.jit(functools.partial(train_step, model, optimizer), donate_argnums=0)
        needed.append(step.lower(state, random_batch(512, 128)).compile().memory_analysis().temp_size_in_bytes)
    assert needed[1] < 0.5 * needed[0]


@pytest.fixture
def compiled(text):
    """What a run with the option compiles, its first state and a batch."""

    def make(**run):
        config = Config(
            ModelConfig(**TINY, attention="dense"),
            DataConfig(data=str(text), seq_len=16, batch_size=4),
            OptimizerConfig(steps=10, accumulate=2),
            RunConfig(**run),
        )
        corpus = load_corpus(config.data)
        model, state = init(config.model, config.optimizer, vocab_size=corpus.vocab_size, max_length=16)
        return compile_steps(config, corpus, model, state), state, next(training_batches(corpus, config.data, 0))

    return make


def test_a_run_compiles_once_and_donates_the_state(compiled):
    steps, state, batch = compiled()
    arrays = [x for x in jax.tree.leaves((state.params, state.opt_state)) if x.size > 1]
    new, _ = steps.train_step(state, batch)
    jax.block_until_ready(new)
    assert all(array.is_deleted() for array in arrays)
    with pytest.raises(TypeError, match=r"compiled for|Argument types differ"):
        steps.train_step(new, batch._replace(tokens=batch.tokens[:2]))
    part = batch._replace(tokens=batch.tokens[:2])  # evaluations take as many sequences as a part of the step
    assert np.isfinite(steps.eval_step(new.params, new.fixed, part, np.ones(2, np.float32)))


def test_deterministic_asks_xla_for_it(compiled, monkeypatch):
    asked = []
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda lowered, compiler_options: asked.append(compiler_options))
    for deterministic in (True, False):
        compiled(deterministic=deterministic)
    assert asked == [{"xla_gpu_deterministic_ops": True}] * 2 + [None] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["dense", "hash(4)"])
def test_deterministic_steps_give_the_same_bits_again_on_a_gpu(attention):
    config = ModelConfig(layers=2, width=128, heads=2, attention=attention, dtype="bfloat16")
    optimizer = OptimizerConfig(steps=10, accumulate=2)
    batch, ends = random_batch(4, 512), []
    for _ in range(2):
        model, state = init(config, optimizer, vocab_size=256, max_length=512)
        step = jax.jit(functools.partial(train_step, model, optimizer)).lower(state, batch)
        step = step.compile(compiler_options={"xla_gpu_deterministic_ops": True})
        for _ in range(5):
            state, _ = step(state, batch)
        ends.append(state)
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_the_optimizer_is_adamw_with_a_clip_and_a_warmup_and_a_cosine():
    config = OptimizerConfig(steps=8, lr=0.1, warmup=2, weight_decay=0.5, clip=1.0)
    params = {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([[0.5]])}  # as of a layer with heads
    optimizer = make_optimizer(config)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    expected = {name: np.array(value, np.float64) for name, value in params.items()}
    first, second = ({name: np.zeros_like(value) for name, value in expected.items()} for _ in range(2))
    for step in range(8):
        gradients = {"kernel": np.array([[0.3, 4.0 * step]]), "bias": np.array([[1.0 - step]])}
        norm = np.sqrt(sum((value**2).sum() for value in gradients.values()))
        turn = np.cos(np.pi * (step - 2) / 6)
        rate = 0.05 * step if step < 2 else 0.01 + 0.09 * (1 + turn) / 2
        for name, gradient in gradients.items():
            clipped = gradient / max(norm, 1.0)
            first[name] = 0.9 * first[name] + 0.1 * clipped
            second[name] = 0.95 * second[name] + 0.05 * clipped**2
            moved = first[name] / (1 - 0.9 ** (step + 1)) / (np.sqrt(second[name] / (1 - 0.95 ** (step + 1))) + 1e-8)
            decay = 0.5 * expected[name] if name == "kernel" else 0.0
            expected[name] = expected[name] - rate * (moved + decay)
        updates, state = update(jax.tree.map(jnp.float32, gradients), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        for name in params:
            np.testing.assert_allclose(params[name], expected[name], rtol=1e-5, atol=1e-6)


def test_weights_leave_padding_out_of_the_evaluation():
    optimizer = OptimizerConfig(steps=2)
    model, state = init(ModelConfig(**TINY, attention="dense"), optimizer, vocab_size=256, max_length=8)
    batch = Batch(np.arange(18, dtype=np.uint8).reshape(2, 9), None)
    evaluate = jax.jit(functools.partial(eval_step, model, state.params, state.fixed))
    both, first = (evaluate(batch, np.array(weights, np.float32)) for weights in ([1, 1], [1, 0]))
    twice = Batch(np.stack([batch.tokens[0], batch.tokens[0]]), None)
    repeated = evaluate(twice, np.array([0.5, 0.5], np.float32))
    assert float(first) == pytest.approx(float(repeated), rel=1e-5)
    assert float(first) == pytest.approx(float(both) / 2, rel=0.05)
