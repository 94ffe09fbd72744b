"""Samples: reproducible, past the window, as text or as pictures, from the checkpoint asked for."""

from __future__ import annotations

import struct

import jax
import numpy as np
import pytest

from models import ModelConfig
from train.__main__ import main
from train.checkpoint import Checkpoints
from train.config import OptimizerConfig
from train.generate import _recompute, can_decode, generate
from train.step import init

TINY = {"layers": 1, "width": 16, "heads": 2, "attention": "dense", "dtype": "float32"}


def test_generation_is_reproducible_for_several_prompts_and_longer_than_the_window():
    model, state = init(ModelConfig(**TINY), OptimizerConfig(steps=2), vocab_size=250, max_length=8)
    prompts = np.array([[1, 2, 3], [4, 5, 6]], np.uint16)

    def draw(temperature: float, seed: int) -> np.ndarray:
        return generate(model, state, prompts, length=20, window=8, temperature=temperature, seed=seed)

    drawn = draw(1.0, 0)
    assert drawn.shape == (2, 23)
    assert drawn.dtype == np.uint16
    np.testing.assert_array_equal(drawn[:, :3], prompts)
    assert drawn.max() < 250
    assert (drawn[0, 3:] != drawn[1, 3:]).any()
    np.testing.assert_array_equal(draw(1.0, 0), drawn)
    assert (draw(1.0, 1) != drawn).any()
    likeliest = draw(0.0, 0)
    np.testing.assert_array_equal(draw(0.0, 2**32 - 1), likeliest)
    # Token by token the likeliest one: in the first window, then in windows that begin with half of the one before.
    best_after = jax.jit(lambda tokens: model.merge(state.params, state.fixed)(tokens).argmax(axis=2))
    first, read = 0, 3
    while first + read < 23:
        window = likeliest[:, first : first + 8]
        chosen = best_after(np.pad(window, [(0, 0), (0, 8 - window.shape[1])]))
        following = likeliest[:, first + read : first + 9]
        np.testing.assert_array_equal(chosen[:, read - 1 :][:, : following.shape[1]], following)
        first, read = first + 5, 4
    # A prompt longer than the window is read from its end.
    from_long = generate(model, state, likeliest[:, :11], length=1, window=8, temperature=0.0, seed=0)
    np.testing.assert_array_equal(from_long[:, -1], best_after(likeliest[:, 3:11])[:, -1])


@pytest.mark.parametrize("kind", ["hash(2)", "reformer(2, rounds=2)"])
def test_with_or_without_a_cache_the_same_tokens_follow(kind):
    config = ModelConfig(**{**TINY, "attention": kind})
    model, state = init(config, OptimizerConfig(steps=2), vocab_size=250, max_length=12)
    prompts = np.array([[1, 2, 3]], np.uint16)
    tokens = generate(model, state, prompts, length=9, window=12, temperature=0.9, seed=0)
    arrays = state.params, state.fixed
    np.testing.assert_array_equal(
        tokens, _recompute(model, *arrays, np.pad(prompts, [(0, 0), (0, 9)]), 3, 12, 0, 0.9, 12, None)
    )
    assert can_decode(model, state) == (kind == "hash(2)")


def test_elastic_windows_are_those_of_training_however_few_tokens_are_asked_for():
    windows = "window((-28, -12), slope=(1.0, 0.5))"  # of 32 tokens 4 and 4, of 8 none but the token itself
    config = ModelConfig(**{**TINY, "attention": windows})
    model, state = init(config, OptimizerConfig(steps=2), vocab_size=250, max_length=32)
    state = state._replace(params=jax.tree.map(lambda x: 4 * x if x.ndim == 3 else x, state.params))
    prompts = np.array([[1, 2, 3]], np.uint16)
    short, long = (
        generate(model, state, prompts, length=length, window=32, temperature=0.0, seed=0) for length in (5, 20)
    )
    np.testing.assert_array_equal(short, long[:, :8])
    shortened = generate(model, state, prompts, length=5, window=8, temperature=0.0, seed=0)
    assert (shortened != short).any()  # so the windows matter here


@pytest.mark.parametrize("kind", ["dense", "reformer(2)"])
def test_a_token_can_be_left_out(kind):
    config = ModelConfig(**{**TINY, "attention": kind})
    model, state = init(config, OptimizerConfig(steps=2), vocab_size=3, max_length=16)
    prompts = np.array([[2]], np.uint16)
    draw = lambda without: generate(
        model, state, prompts, length=40, window=16, temperature=9.0, seed=0, without=without
    )[:, 1:]
    assert set(draw(None).ravel()) == {0, 1, 2}
    assert set(draw(2).ravel()) == {0, 1}


def test_a_model_without_a_cache_says_that_it_is_slow(start, fake_steps, tmp_path, capsys):
    fake_steps(1.0)
    for kind in ("dense", "reformer(2)"):
        assert start(attention=kind, out=tmp_path / kind, steps=2, eval_tokens=0) == 0
        assert ("reformer layers cannot decode with a cache" in capsys.readouterr().out) == (kind == "reformer(2)")


@pytest.fixture
def trained(start, fake_steps, tmp_path, capsys):
    """The folder of a run whose checkpoints are of steps 6 and 12, the first one the better."""
    fake_steps(1.0, held_out=lambda step: 1 + step / 100)
    assert start(attention="dense", out=tmp_path / "run", eval_every=6) == 0
    capsys.readouterr()
    return tmp_path / "run"


def test_the_command_continues_a_prompt_from_the_best_or_the_last_checkpoint(trained, tmp_path, monkeypatch, capsys):
    restored = []
    unpatched = Checkpoints.restore

    def restore(self, step, *arguments):
        restored.append(step)
        return unpatched(self, step, *arguments)

    monkeypatch.setattr(Checkpoints, "restore", restore)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["sample", "~/run", "--prompt", "99 bot", "--count", "2"]) == 0
    assert capsys.readouterr().out.startswith("--- '99 bot' goes on:\n")
    written = (trained / "sample.txt").read_text()
    assert f"{trained}, step 6; text.txt" in written
    assert written.count("--- prompt\n99 bot\n--- continuation\n") == 2
    assert main(["sample", str(trained), "--checkpoint=last", "--prompt=", "--out", str(tmp_path / "other.txt")]) == 0
    assert "step 12" in (tmp_path / "other.txt").read_text()
    assert restored == [6, 12]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "absent holds no run"),
        (["run", "--length=0"], "--length must be at least 1, got 0"),
        (["run", "--count=0"], "--count must be at least 1, got 0"),
        (["run", "--temperature=-1"], "--temperature must not be negative"),
        (["run", "--seed=-1"], "--seed must lie between 0 and"),
        (["run", "--out=absent/sample.txt"], "absent/sample.txt cannot be written (No such file or directory)"),
    ],
)
def test_what_cannot_be_sampled_is_one_line(arguments, message, trained, capsys):
    assert main(["sample", *arguments]) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("error: ")
    assert message in complaint
    assert complaint.count("\n") == 1


def test_a_run_without_a_checkpoint_or_of_another_model_says_so(trained, capsys):
    config = (trained / "config.json").read_text()
    (trained / "config.json").write_text(config.replace('"attention": "dense"', '"attention": "cudnn"'))
    assert main(["sample", str(trained)]) == 2
    assert "config.json: --attention cudnn needs" in capsys.readouterr().err
    for here, other, said in (
        ('"width": 16', '"width": 32', "there and"),
        # Parameters of the same shapes.
        ('"attention": "dense"', '"attention": "strided(4)"', "attention is dense there and strided(4) here"),
    ):
        (trained / "config.json").write_text(config.replace(here, other))
        assert main(["sample", str(trained)]) == 2
        complaint = capsys.readouterr().err
        assert "is a checkpoint of another configuration" in complaint
        assert said in complaint
    (trained / "config.json").write_text(config.replace('"dtype": "float32"', '"dtype": "bfloat16"'))
    assert main(["sample", str(trained), "--length=2"]) == 0  # they mean the same
    (trained / "config.json").write_text(config)
    for checkpoint in (trained / "checkpoints").iterdir():
        checkpoint.rename(trained / checkpoint.name)
    assert main(["sample", str(trained)]) == 2
    assert "holds no checkpoint yet" in capsys.readouterr().err


def test_images_become_a_grid(start, fake_steps, tmp_path, capsys):
    folder = tmp_path / "mnist"
    folder.mkdir()
    for name, count in (("train", 20), ("t10k", 4)):
        pixels = np.arange(count * 784, dtype=np.uint8).tobytes()
        (folder / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 2051, count, 28, 28) + pixels)
    fake_steps(1.0)
    run = tmp_path / "run"
    assert start(attention="dense", data=folder, seq_len=784, held_out=0.2, out=run, steps=2, eval_tokens=0) == 0
    assert (run / "sample.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "bits per pixel" in said
    assert "bits per byte" not in said
    assert main(["sample", str(run), "--count=5", "--out", str(tmp_path / "five.png")]) == 0
    assert (tmp_path / "five.png").read_bytes().startswith(b"\x89PNG")
    assert main(["sample", str(run), "--out", str(tmp_path / "five.txt")]) == 2
    assert "--out must end in .png for pictures" in capsys.readouterr().err
    assert main(["sample", str(run), "--prompt=7"]) == 2
    assert "--prompt goes with text" in capsys.readouterr().err
