"""`python -m train`: it learns, resumes bit for bit, and says in one line what is wrong."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train.run
from models import ModelConfig
from train.__main__ import main
from train.checkpoint import Checkpoints
from train.config import DataConfig, OptimizerConfig, latest_run, load_config, new_run_folder, parse
from train.data import load_corpus, training_batches
from train.loop import Compiled, compile_steps
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
    corpus = load_corpus(config.data)
    _, like = init(config.model, config.optimizer, vocab_size=256, max_length=config.data.seq_len)
    batches = training_batches(corpus, config.data, config.optimizer.seed)
    with Checkpoints(folder) as checkpoints:
        state = checkpoints.restore(like, batches)
    return state, next(batches)


# Dense attention: see the run that leaves a record.
@pytest.mark.parametrize(("attention", "remat"), [("hash", False), ("qk", True)])
def test_the_loss_falls_in_one_trace(attention, remat, text):
    data = DataConfig(data=str(text), held_out=0.1, seq_len=16, batch_size=4)
    corpus = load_corpus(data)
    optimizer = OptimizerConfig(steps=40, warmup=2, lr=0.01)
    model, state = init(ModelConfig(**TINY, attention=attention, remat=remat), optimizer, vocab_size=256, max_length=16)
    batches = training_batches(corpus, data, seed=0)
    chex.clear_trace_counter()
    step = chex.assert_max_traces(train_step, n=1)
    step = jax.jit(functools.partial(step, model, make_optimizer(optimizer), 0), donate_argnums=0)
    losses = []
    for _ in range(40):
        state, loss = step(state, next(batches).tokens)
        losses.append(float(loss))
    assert losses[0] == pytest.approx(np.log(256), rel=0.03)  # nothing is known yet
    assert np.mean(losses[-5:]) < 0.7 * losses[0]


@pytest.fixture
def compile_once(monkeypatch):
    """Runs that have the same model, optimizer and data share one compilation, and none ends with a sample."""
    made: dict = {}

    def compile_or_reuse(config, corpus, model, state):
        key = (config.model, config.optimizer, config.data)
        if key not in made:
            made[key] = compile_steps(config, corpus, model, state)
        return made[key]

    monkeypatch.setattr(train.run, "compile_steps", compile_or_reuse)
    monkeypatch.setattr(train.run, "sample", lambda *arguments, **options: b"")


def test_stopped_or_crashed_and_resumed_equals_never_stopped(start, tmp_path, monkeypatch, compile_once, capsys):
    whole, broken, crashed = (tmp_path / name for name in ("whole", "broken", "crashed"))
    options = {"attention": "hash,qk", "layers": 2}
    assert start(**options, out=whole) == 0
    # As a crash leaves it: the last checkpoint is one written beside the running training, lines are too many.
    shutil.copytree(whole, crashed)
    shutil.rmtree(crashed / "checkpoints" / str(STEPS))

    with monkeypatch.context() as patch:
        patch.setattr(train.run, "training_batches", _stops_at_batch(5, signal.SIGTERM))
        assert start(**options, out=broken) == 128 + signal.SIGTERM
        assert records(broken)[-1]["step"] == 5
        patch.setattr(train.run, "training_batches", _stops_at_batch(3, signal.SIGINT))
        assert main([f"--out={broken}", "--resume"]) == 128 + signal.SIGINT
        assert records(broken)[-1]["step"] == 8
    assert "SIGINT at step 8, checkpoint saved: python -m train --resume" in capsys.readouterr().out

    assert main([f"--out={broken}", "--resume"]) == 0
    assert_same_run(whole, broken)
    assert "continuing from step 8" in capsys.readouterr().out

    config = (crashed / "config.json").read_text()
    (crashed / "config.json").write_text(config.replace(f'"jax": "{jax.__version__}"', '"jax": "0.1"'))
    assert main([f"--out={crashed}", "--resume"]) == 0
    assert_same_run(whole, crashed)
    said = capsys.readouterr().out
    assert "continuing from step 6" in said
    assert f"perhaps not bit for bit: jax was 0.1, is {jax.__version__}\n" in said


def assert_same_run(one: Path, other: Path) -> None:
    (state, batch), (other_state, other_batch) = last_checkpoint(one), last_checkpoint(other)
    assert int(state.step) == STEPS
    jax.tree.map(np.testing.assert_array_equal, state, other_state)
    np.testing.assert_array_equal(batch.tokens, other_batch.tokens)
    for name in ("loss", "held_out_loss"):
        losses = [[(r["step"], r[name]) for r in records(folder) if name in r] for folder in (one, other)]
        assert losses[0] == losses[1]
        assert [step for step, _ in losses[0]] == (list(range(1, STEPS + 1)) if name == "loss" else [0, 8, STEPS])


def _stops_at_batch(count: int, number: signal.Signals):
    """`training_batches` whose iterator brings a signal with its `count`-th batch."""

    def make(*arguments):
        batches = training_batches(*arguments)
        unpatched, seen = type(batches).__next__, []

        class Stopping(type(batches)):  # orbax's handler wants the real type
            def __next__(self):
                seen.append(None)
                if len(seen) == count:
                    signal.raise_signal(number)
                return unpatched(self)

        batches.__class__ = Stopping
        return batches

    return make


def test_a_run_leaves_its_record_a_plot_a_sample_and_a_checkpoint(start, tmp_path, capsys):
    assert start(attention="dense", steps=50, stop_at=37, prompt="99 bot", eval_every=20) == 0
    folder = tmp_path / "runs" / "text-dense"
    config = json.loads((folder / "config.json").read_text())
    assert config["versions"].keys() >= {"python", "jax", "flax", "optax"}
    assert config["device"]["platform"] == jax.default_backend()
    assert config["corpus"]["name"] == "text.txt"
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "99 bot" in (folder / "sample.txt").read_text()
    held_out = [record for record in records(folder) if "held_out_loss" in record]
    assert [record["step"] for record in held_out] == [0, 20, 37]
    assert held_out[0]["held_out_bits_per_byte"] == pytest.approx(8, rel=0.03)
    assert held_out[0]["held_out_bits_per_byte"] == pytest.approx(held_out[0]["held_out_loss"] / np.log(2), rel=1e-6)
    assert held_out[2]["held_out_loss"] < 0.7 * held_out[0]["held_out_loss"]
    assert {"loss", "bits_per_byte", "tokens_per_second", "seconds"} <= records(folder)[1].keys()
    said = capsys.readouterr().out
    assert "stopped as asked at step 37" in said
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

    # A damaged checkpoint.
    checkpoint = folder / "checkpoints" / "37"
    for path in checkpoint.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    before = (folder / "metrics.jsonl").read_bytes()
    assert main(["--resume"]) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1
    assert f"{checkpoint} cannot be restored" in complaint
    assert "Delete that folder" in complaint
    assert (folder / "metrics.jsonl").read_bytes() == before

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
        ({"seed": 2**32}, "--seed must be below 2**32"),
        ({"data": "~nobody-of-this-name/text.txt"}, "--data: ~nobody-of-this-name/text.txt names no home folder"),
        ({"out": "text.txt"}, "text.txt cannot be written"),
    ],
)
def test_what_the_user_can_put_right_is_one_line_and_exit_code_2(options, message, start, tmp_path, capsys):
    assert start(**options) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def fake_steps(monkeypatch):
    """Puts a step in the place of the compiled one whose losses are given, the last one for ever."""

    def put(*losses: float) -> None:
        def step(state, batch):
            done = int(state.step)
            return state._replace(step=state.step + 1), jnp.float32(losses[min(done, len(losses) - 1)])

        fake = Compiled(step, lambda params, fixed, batch, weights: jnp.float32(1.0))
        monkeypatch.setattr(train.run, "compile_steps", lambda *arguments: fake)
        monkeypatch.setattr(train.run, "sample", lambda model, params, fixed, prompt, **options: prompt)

    return put


def test_a_loss_that_is_not_finite_ends_the_run_with_the_last_good_checkpoint(start, fake_steps, tmp_path, capsys):
    fake_steps(*[1.0] * 7, np.nan)
    assert start(attention="dense", out=tmp_path / "run") == 2
    complaint = capsys.readouterr().err
    assert "The loss is nan at step 8. Start again with a lower --lr" in complaint
    assert complaint.count("\n") == 1
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["6"]
    assert records(tmp_path / "run")[-1]["step"] == 7


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(
    terminal, start, fake_steps, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(train.loop, "LINE_EVERY", 0.0)
    fake_steps(*[np.log(2)] * 4, np.log(4))
    assert start(attention="dense", out=tmp_path / "run", log_every=4, stop_at=10) == 0
    captured = capsys.readouterr()
    lines = [line for line in captured.out.splitlines() if "tokens/s" in line]
    if terminal:
        assert "10/12" in captured.err
        assert "loss 1.386, 2.000 bits/byte" in captured.err
        assert lines == []
    else:
        assert captured.err == ""
        assert [line.rsplit(", ", 1)[0] for line in lines] == [
            "step 4: loss 0.693, 1.000 bits/byte",
            "step 8: loss 1.386, 2.000 bits/byte",
            "step 10: loss 1.386, 2.000 bits/byte",  # the rest
        ]


def test_names_and_prompts_may_hold_anything(start, fake_steps, text, tmp_path):
    odd = text.rename(tmp_path / "$\\odd$ \udcff.txt")
    fake_steps(1.0)
    assert start(attention="dense", data=odd, prompt="\udcff", out=tmp_path / "run") == 0
    assert (tmp_path / "run" / "loss.png").exists()
    assert "--- prompt\n\ufffd\n" in (tmp_path / "run" / "sample.txt").read_text()


def test_ctrl_c_outside_training_is_one_line_and_the_run_can_still_be_resumed(start, fake_steps, monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.run, "compile_steps", interrupt)
    assert start(attention="dense", width=18, heads=3) == 128 + signal.SIGINT
    assert capsys.readouterr().err.count("\n") == 1
    fake_steps(1.0)
    assert main(["--resume", "--heads=3"]) == 0  # which does not fit the width that is the default
    assert "no checkpoint was written yet: starting from step 0" in capsys.readouterr().out


def test_a_full_disk_leaves_nothing_half_written(start, tmp_path, monkeypatch, capsys):
    def no_space(path, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "replace", no_space)
    assert start(out=tmp_path / "run") == 2
    assert "cannot be written (No space left on device). Choose another folder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_resume_goes_on_with_the_run_last_written_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("b/config.json", "a/config.json", "b/metrics.jsonl")):
        path = tmp_path / "runs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (number, number))
    assert latest_run() == Path("runs/b")


def test_options_reach_the_model(monkeypatch):
    model = parse(["--no-exclude-self", "--positions=learned", "--num-buckets=6", "--remat", "--dtype=bfloat16"]).model
    assert (model.exclude_self, model.positions, model.num_buckets, model.remat) == (False, "learned", 6, True)
    for platform, dtype in (("cpu", "float32"), ("gpu", "bfloat16")):
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        assert parse([]).model.dtype == dtype


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "--resume found no run under runs/"),
        (["--resume", "--out=empty"], "empty holds no run"),
        (["--resume", "--out=odd"], "odd/config.json holds no options of a run. Start a new run"),
        (["--resume", "--out=cut"], "cut/config.json cannot be read"),
        (["--resume", "--out=old"], "old/config.json does not fit this version of the program"),
    ],
)
def test_resuming_nothing_says_so(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, content in (("odd", "[]"), ("cut", '{"config": '), ("old", '{"config": {"model": {"depth": 3}}}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
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


@pytest.mark.parametrize(
    ("data", "name"), [("news.jsonl.zst", "news-hash"), ("shards", "shards-hash"), ("*.jsonl", "texts-hash")]
)
def test_a_run_is_named_after_its_data_without_the_signs_of_a_glob(data, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert new_run_folder(parse([f"--data={data}", "--attention=hash"])) == Path("runs") / name
