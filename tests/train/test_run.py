"""`python -m train`: it learns, resumes bit for bit, and says in one line what is wrong."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import HAS_GPU

import train.progress
import train.run
from train.__main__ import main
from train.checkpoint import Checkpoints
from train.data import load_corpus, training_batches
from train.folder import commit, load_config
from train.loop import compile_steps
from train.step import init

STEPS = 12  # of `start`
TIMES = {"step", "seconds", "train_seconds"}


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def last_checkpoint(folder: Path):
    """The last state of a run, the next batch it would have read, and which checkpoint was the best."""
    config = load_config(folder)
    corpus = load_corpus(config.data)
    _, like = init(config.model, config.optimizer, vocab_size=256, max_length=config.data.seq_len)
    batches = training_batches(corpus, config.data, config.optimizer.seed)
    with Checkpoints(folder) as checkpoints:
        state = checkpoints.restore(checkpoints.latest_step, like, batches)
        best = checkpoints.best_step, checkpoints.best_loss
    return state, next(batches), best


@pytest.fixture
def compile_once(monkeypatch):
    """Runs that have the same model, optimizer and data share one compilation."""
    made: dict = {}

    def compile_or_reuse(config, corpus, model, state):
        key = (config.model, config.optimizer, config.data)
        if key not in made:
            made[key] = compile_steps(config, corpus, model, state)
        return made[key]

    monkeypatch.setattr(train.run, "compile_steps", compile_or_reuse)


def test_stopped_or_crashed_and_resumed_equals_never_stopped(start, tmp_path, monkeypatch, compile_once, capsys):
    whole, broken, crashed = (tmp_path / name for name in ("whole", "broken", "crashed"))
    options = {"attention": "hash(2), drop(0.3)", "layers": 2, "accumulate": 2, "sample_length": 0}
    assert start(**options, out=whole) == 0
    # As a crash leaves it: the last checkpoint is one written beside the running training (here the best one, of the
    # evaluation after 8 steps), lines are too many.
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
    assert "continuing from step 8" in said
    assert f"perhaps not bit for bit: jax was 0.1, is {jax.__version__}\n" in said


def assert_same_run(one: Path, other: Path) -> None:
    (state, batch, best), (other_state, other_batch, other_best) = last_checkpoint(one), last_checkpoint(other)
    assert int(state.step) == STEPS
    jax.tree.map(np.testing.assert_array_equal, (state, batch), (other_state, other_batch))
    assert best == other_best
    for name in ("loss", "gradient_norm", "learning_rate", "held_out_loss", "bucket_effective"):
        values = [[(r["step"], r[name]) for r in records(folder) if name in r] for folder in (one, other)]
        assert values[0] == values[1]
        at_evaluation = name in ("held_out_loss", "bucket_effective")
        assert [step for step, _ in values[0]] == ([0, 8, STEPS] if at_evaluation else list(range(1, STEPS + 1)))


def _batches_that(act, count: int):
    """`training_batches` whose iterator calls `act` with its `count`-th batch."""

    def make(*arguments):
        batches = training_batches(*arguments)
        unpatched, seen = type(batches).__next__, []

        class Acting(type(batches)):  # orbax's handler wants the real type
            def __next__(self):
                seen.append(None)
                if len(seen) == count:
                    act()
                return unpatched(self)

        batches.__class__ = Acting
        return batches

    return make


def _stops_at_batch(count: int, number: signal.Signals):
    """`training_batches` whose iterator brings a signal with its `count`-th batch."""
    return _batches_that(lambda: signal.raise_signal(number), count)


def test_a_run_leaves_its_record_a_plot_a_sample_and_a_checkpoint(start, tmp_path, capsys):
    assert start(attention="dense", steps=50, stop_at=37, prompt="99 bot", eval_every=20) == 0
    folder = tmp_path / "runs" / "text-dense"
    config = json.loads((folder / "config.json").read_text())
    assert config["versions"].keys() >= {"python", "jax", "flax", "optax"}
    assert config["device"]["platform"] == jax.default_backend()
    assert config["corpus"]["name"] == "text.txt"
    assert config["commit"] == commit()
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "99 bot" in (folder / "sample.txt").read_text()
    held_out = [record for record in records(folder) if "held_out_loss" in record]
    assert [record["step"] for record in held_out] == [0, 20, 37]
    assert held_out[0]["held_out_bits_per_byte"] == pytest.approx(8, rel=0.03)
    assert held_out[0]["held_out_bits_per_byte"] == pytest.approx(held_out[0]["held_out_loss"] / np.log(2), rel=1e-6)
    assert held_out[2]["held_out_loss"] < 0.7 * held_out[0]["held_out_loss"]
    assert records(folder)[0].keys() == {*TIMES, "compile_seconds", "parameters", "flops_per_step"}
    trained = next(record for record in records(folder) if "loss" in record)
    measured = {"loss", "bits_per_byte", "tokens_per_second", "gradient_norm", "learning_rate"}
    assert trained.keys() >= {*TIMES, *measured}
    # Evaluations, of which there are three, and compiling are no time of training.
    last = records(folder)[-1]
    assert 0 < last["train_seconds"] < last["seconds"] - records(folder)[0]["compile_seconds"]
    assert any((folder / "tensorboard").iterdir())
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
        ({"attention": "sparse"}, "--attention: the kinds are dense,"),
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


@pytest.mark.parametrize(
    ("losses", "options", "message"),
    [
        ([1.0] * 7 + [np.nan], {}, "The loss is nan at step 8. The last good checkpoint is {}/6. Start again with"),
        ([1.0] * 3 + [np.inf], {}, "The loss is inf at step 4. No checkpoint was written before. Start again with"),
        ([1.0], {"gradient_norm": np.nan}, "The gradient's norm is nan at step 1. No checkpoint was written before."),
        (
            [1.0],
            {"held_out": lambda step: np.nan},
            "The held-out loss is nan at step 0. No checkpoint was written before.",
        ),
    ],
)
def test_what_is_not_finite_ends_the_run_and_names_the_last_good_checkpoint(
    losses, options, message, start, fake_steps, tmp_path, capsys
):
    fake_steps(*losses, **options)
    assert start(attention="dense", out=tmp_path / "run") == 2
    complaint = capsys.readouterr().err
    checkpoints = tmp_path / "run" / "checkpoints"
    assert message.format(checkpoints) in complaint
    assert "lower --lr" in complaint
    assert complaint.count("\n") == 1
    assert [path.name for path in checkpoints.iterdir()] == (["6"] if "/6" in message.format(checkpoints) else [])
    assert all(np.isfinite(record.get("loss", 0)) for record in records(tmp_path / "run"))


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(
    terminal, start, fake_steps, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(train.progress, "LINE_EVERY", 0.0)
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


def test_ctrl_c_or_sigterm_outside_training_is_one_line_and_the_run_can_still_be_resumed(
    start, fake_steps, monkeypatch, capsys
):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.run, "compile_steps", interrupt)
    assert start(attention="dense", width=18, heads=3) == 128 + signal.SIGINT
    assert capsys.readouterr().err.count("\n") == 1
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(train.run, "compile_steps", lambda *arguments: signal.raise_signal(signal.SIGTERM))
    assert main(["--resume"]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err.startswith("interrupted: ")
    assert signal.getsignal(signal.SIGTERM) is handler
    fake_steps(1.0)
    assert main(["--resume", "--heads=3"]) == 0  # which does not fit the width that is the default
    assert "no checkpoint was written yet: starting from step 0" in capsys.readouterr().out


def test_a_full_disk_at_the_start_leaves_nothing_half_written(start, tmp_path, monkeypatch, capsys):
    def no_space(path, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "replace", no_space)
    assert start(out=tmp_path / "run") == 2
    assert "cannot be written (No space left on device). Choose another folder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("taken", ["loss.png", "sample.txt"])
def test_a_plot_or_a_sample_that_cannot_be_written_takes_no_more_with_it(taken, start, fake_steps, tmp_path, capsys):
    folder = tmp_path / "run"
    (folder / taken).mkdir(parents=True)
    fake_steps(1.0)
    assert start(attention="dense", out=folder) == 2
    captured = capsys.readouterr()
    assert "goes on:" in captured.out
    assert captured.out.splitlines()[-1].startswith("held-out 1.443 bits per byte at step 12 of 12")
    assert f"{folder / taken} cannot be written (Is a directory)" in captured.err
    assert captured.err.count("\n") == 1
    assert (folder / "sample.txt").is_file() == (taken == "loss.png")


@pytest.mark.parametrize(
    ("at_step", "what"), [(4, "metrics.jsonl cannot be written"), (6, "A checkpoint in {} cannot be written")]
)
def test_no_more_room_while_training_is_one_line_and_the_run_resumes(
    at_step, what, start, fake_steps, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    no_more = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # lets no file grow any more

    fake_steps(1.0)
    with monkeypatch.context() as patch:
        patch.setattr(train.run, "training_batches", _batches_that(no_more, at_step))
        try:
            code = start(attention="dense", out=folder, log_every=4 if at_step == 4 else 100)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    complaint = capsys.readouterr().err
    assert what.format(folder / "checkpoints") in complaint
    assert complaint.count("\n") == 1
    assert main([f"--out={folder}", "--resume"]) == 0
    assert [record["step"] for record in records(folder) if "loss" in record][-1] == STEPS


@pytest.mark.skipif(HAS_GPU, reason="the limit also stops the files that XLA compiles kernels with")
def test_a_disk_that_fills_up_during_a_checkpoint_is_one_line_in_a_process_of_its_own(text, tmp_path):
    """Here TensorStore's own threads meet the limit, in the middle of many writes."""

    def run(before: str, *more: str) -> subprocess.CompletedProcess:
        options = ["--data=text.txt", "--attention=dense", "--layers=1", "--width=32", "--heads=2", "--steps=4"]
        options += ["--seq-len=16", "--batch-size=2", "--eval-every=2", "--eval-tokens=64", "--sample-length=0"]
        command = ["sh", "-c", f'{before} exec "$0" -m train "$@"', sys.executable, "--out=run", *options, *more]
        path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)

    full = run("ulimit -f 40;")  # blocks of 512 bytes
    assert full.returncode == 2, full
    assert full.stderr.startswith(f"error: A checkpoint in {tmp_path}/run/checkpoints cannot be written (")
    assert full.stderr.count("\n") == 1
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert run("", "--resume").returncode == 0
