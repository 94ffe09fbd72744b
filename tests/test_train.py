"""`python -m train`: it learns, resumes bit for bit, and says in one line what is wrong."""

from __future__ import annotations

import functools
import json
import signal
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

import train.run
from models import ModelConfig
from train.__main__ import main
from train.checkpoint import Checkpoints
from train.config import OptimizerConfig, load_config
from train.data import load_corpus, training_batches
from train.sample import sample
from train.step import eval_step, init, make_optimizer, train_step

TINY = {"layers": 1, "width": 16, "heads": 2, "num_buckets": 2, "dtype": "float32"}
STEPS = 12


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{number} bottles of beer on the wall, " for number in range(100)))
    return path


@pytest.fixture
def start(text, tmp_path, monkeypatch):
    """Calls the command line with options for a tiny run, and returns its exit code."""
    monkeypatch.chdir(tmp_path)
    options = {**TINY, "data": text, "seq_len": 16, "batch_size": 2, "steps": STEPS, "warmup": 2, "lr": 0.01}
    options |= {"log_every": 1, "eval_every": 8, "eval_tokens": 64, "checkpoint_every": 6, "sample_length": 5}

    def call(**more) -> int:
        return main([f"--{name.replace('_', '-')}={value}" for name, value in {**options, **more}.items()])

    return call


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def last_checkpoint(folder: Path):
    """The last state of a run, and the next batch it would have read."""
    config = load_config(folder)
    corpus = load_corpus(config.data.data, config.data.held_out, config.data.seq_len)
    _, like = init(config.model, config.optimizer, vocab_size=256, max_length=config.data.seq_len)
    batches = training_batches(corpus, config.data.seq_len, config.data.batch_size, config.optimizer.seed)
    with Checkpoints(folder) as checkpoints:
        state = checkpoints.restore(like, batches)
    return state, next(batches)


@pytest.mark.parametrize("attention", ["dense", "hash", "qk"])
def test_the_loss_falls_in_one_trace(attention, text):
    corpus = load_corpus(str(text), 0.1, 16)
    optimizer = OptimizerConfig(steps=40, warmup=2, lr=0.01)
    model, state = init(ModelConfig(**TINY, attention=attention), optimizer, vocab_size=256, max_length=16)
    batches = training_batches(corpus, 16, 4, seed=0)
    chex.clear_trace_counter()
    step = chex.assert_max_traces(train_step, n=1)
    step = jax.jit(functools.partial(step, model, make_optimizer(optimizer), 0), donate_argnums=0)
    losses = []
    for _ in range(40):
        state, loss = step(state, next(batches))
        losses.append(float(loss))
    assert losses[0] == pytest.approx(np.log(256), rel=0.03)  # nothing is known yet
    assert np.mean(losses[-5:]) < 0.7 * losses[0]


def test_a_run_ended_by_sigterm_and_resumed_equals_one_that_never_stopped(start, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = {"attention": "hash,qk", "layers": 2}
    assert start(**options, out=whole) == 0

    with monkeypatch.context() as patch:
        patch.setattr(train.run, "training_batches", _terminates_at_batch(5))
        assert start(**options, out=broken) == 128 + signal.SIGTERM
    assert records(broken)[-1]["step"] == 5
    assert main(["--resume", "--out", str(broken)]) == 0

    (one, next_one), (other, next_other) = last_checkpoint(whole), last_checkpoint(broken)
    assert int(one.step) == STEPS
    jax.tree.map(np.testing.assert_array_equal, one, other)
    np.testing.assert_array_equal(next_one, next_other)
    losses = [[(r["step"], r["loss"]) for r in records(folder) if "loss" in r] for folder in (whole, broken)]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(1, STEPS + 1))


def _terminates_at_batch(count: int):
    """`training_batches` whose iterator brings a SIGTERM with its `count`-th batch."""

    def make(*arguments):
        batches = training_batches(*arguments)
        unpatched, seen = type(batches).__next__, []

        class Terminating(type(batches)):  # orbax's handler wants the real type
            def __next__(self):
                seen.append(None)
                if len(seen) == count:
                    signal.raise_signal(signal.SIGTERM)
                return unpatched(self)

        batches.__class__ = Terminating
        return batches

    return make


def test_a_run_leaves_its_record_a_plot_a_sample_and_a_checkpoint(start, tmp_path, capsys):
    assert start(attention="dense", stop_at=9, prompt="99 bot") == 0
    folder = tmp_path / "runs" / "text-dense"
    config = json.loads((folder / "config.json").read_text())
    assert config["versions"].keys() >= {"python", "jax", "flax", "optax"}
    assert config["device"]["platform"] == jax.default_backend()
    assert config["corpus"]["name"] == "text.txt"
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "99 bot" in (folder / "sample.txt").read_text()
    held_out = [record for record in records(folder) if "held_out_loss" in record]
    assert [record["step"] for record in held_out] == [0, 8, 9]
    assert held_out[0]["held_out_bits_per_byte"] == pytest.approx(8, rel=0.03)
    assert held_out[0]["held_out_bits_per_byte"] == pytest.approx(held_out[0]["held_out_loss"] / np.log(2), rel=1e-6)
    assert {"loss", "bits_per_byte", "tokens_per_second", "seconds"} <= records(folder)[1].keys()
    said = capsys.readouterr().out
    assert "stopped as asked at step 9" in said
    assert "held-out" in said
    assert "text.txt" in said

    # The same run again, asked for in ways that do not fit it.
    assert main(["--resume", "--lr", "0.5", "--width=32"]) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1
    for part in (
        str(Path("runs/text-dense/config.json")),
        "--lr (0.01 there, 0.5 here)",
        "--width",
        "--resume",
    ):
        assert part in complaint
    assert start(attention="dense", out=folder) == 2
    assert "already holds a run. Add --resume" in capsys.readouterr().err

    # The text changed behind its back.
    (tmp_path / "text.txt").write_text("another text " * 200)
    assert main(["--resume"]) == 2
    assert "was written for another text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "absent.txt"}, "absent.txt does not exist"),
        ({"seq_len": 100_000}, "too short"),
        ({"heads": 3}, "--heads must divide --width"),
        ({"attention": "sparse"}, "--attention takes dense, hash, qk"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"lr": 0}, "--lr must be above 0"),
        ({"held_out": 1.5}, "--held-out must lie between 0 and 1"),
        ({"seconds": 0}, "--seconds must be above 0"),
    ],
)
def test_what_the_user_can_put_right_is_one_line_and_exit_code_2(options, message, start, tmp_path, capsys):
    assert start(**options) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "--resume found no run under runs/"),
        (["--resume", "--out=empty"], "empty holds no run"),
    ],
)
def test_resuming_nothing_says_so(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_unknown_options_end_with_exit_code_2(capsys):
    with pytest.raises(SystemExit) as raised:
        main(["--wdith=3"])
    assert raised.value.code == 2
    assert "--wdith" in capsys.readouterr().err


def test_weights_leave_padding_out_of_the_evaluation():
    optimizer = OptimizerConfig(steps=2)
    model, state = init(ModelConfig(**TINY, attention="dense"), optimizer, vocab_size=256, max_length=8)
    batch = np.arange(18, dtype=np.uint8).reshape(2, 9)
    evaluate = jax.jit(functools.partial(eval_step, model, state.params, state.fixed))
    both, first = (evaluate(batch, np.array(weights, np.float32)) for weights in ([1, 1], [1, 0]))
    repeated = evaluate(np.stack([batch[0], batch[0]]), np.array([0.5, 0.5], np.float32))
    assert float(first) == pytest.approx(float(repeated), rel=1e-5)
    assert float(first) == pytest.approx(float(both) / 2, rel=0.05)


def test_samples_are_reproducible_and_longer_than_the_window():
    optimizer = OptimizerConfig(steps=2)
    model, state = init(ModelConfig(**TINY, attention="dense"), optimizer, vocab_size=256, max_length=8)

    def draw(temperature: float, seed: int) -> bytes:
        options = {"length": 20, "window": 8, "temperature": temperature, "seed": seed}
        return sample(model, state.params, state.fixed, b"abc", **options)

    assert len(draw(1.0, 0)) == 20
    assert draw(1.0, 0) == draw(1.0, 0) != draw(1.0, 1)
    assert draw(0.0, 0) == draw(0.0, 1)
