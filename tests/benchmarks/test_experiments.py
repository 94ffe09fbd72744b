"""The experiments: that their runs can be made, and that they are made once, in parts, with the results on disk."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import struct
import time

import jax
import pytest

from benchmarks import experiments
from benchmarks.experiments import EXPERIMENTS, Experiment, Options
from train.__main__ import main as train_main
from train.options import parse

TINY = Experiment(
    "text.txt",
    "--layers 1 --width 16 --heads 2 --seq-len 16 --batch-size 2 --warmup 1 --eval-every 2 --log-every 1 "
    "--eval-tokens 64 --checkpoint-every 2 --sample-length 0 --dtype float32",
    {"one": "--attention identity --steps 2", "two": "--attention identity --steps 4"},
)
TINY_IMAGES = dataclasses.replace(
    TINY,
    data="mnist",
    shared=TINY.shared.replace("16 --batch", "784 --batch") + " --held-out 0.3",
    runs={"one": "--attention identity --steps 2", "one-seed-1": "--attention identity --steps 2 --seed 1"},
    has_test=True,
)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_run_is_a_command_that_train_takes(name, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # for cuDNN
    experiment = EXPERIMENTS[name]
    found = {
        run: parse(experiments.arguments(experiment, run, tmp_path / run, Options((name,), data=tmp_path)))
        for run in experiment.runs
    }
    # They differ in more than their folders.
    elsewhere = {run: dataclasses.replace(config.run, out=None) for run, config in found.items()}
    assert len({(config.model, config.optimizer, elsewhere[run]) for run, config in found.items()}) == len(found)
    same = {(config.data, config.model.layers, config.model.width) for config in found.values()}
    assert len(same) == 1
    assert len({config.optimizer.lr for config in found.values()}) == (3 if name.startswith("rates") else 1)
    assert all(0 < config.optimizer.warmup < config.optimizer.steps for config in found.values())


def test_runs_are_made_once_and_in_parts_and_stand_side_by_side(tmp_path, monkeypatch, capsys):
    commands = []

    def train(command, seconds, environment, log):
        assert log is None
        assert environment.keys() - os.environ.keys() == set()
        commands.append(command)
        stopped = [] if len(commands) != 2 else ["--stop-at", "2"]  # the second, as if its time were up
        return train_main([*command, *stopped]) or (143 if stopped else 0)

    monkeypatch.setattr(experiments, "train", train)
    monkeypatch.setitem(EXPERIMENTS, "tiny", TINY)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 40)
    folders = ["--data", str(tmp_path), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert experiments.main(["tiny", *folders]) == 1
    known = json.loads((tmp_path / "out" / "tiny.json").read_text())["runs"]
    assert list(known) == ["one"]
    assert "tiny, two ended with code 143" in capsys.readouterr().err
    assert experiments.main(["tiny", *folders, "--time-limit", "1e-9"]) == 1
    assert len(commands) == 2
    assert experiments.main(["tiny", *folders]) == 0
    assert commands[2] == ["--resume", "--out", str(tmp_path / "runs" / "tiny" / "two")]
    runs = json.loads((tmp_path / "out" / "tiny.json").read_text())["runs"]
    assert list(runs) == ["one", "two"]
    assert runs["one"] == known["one"]
    assert runs["two"]["summary"]["steps"] == 4
    assert [line["step"] for line in runs["two"]["history"] if "held_out_bits_per_byte" in line] == [0, 2, 4]
    # No path of this machine is in the results.
    assert runs["two"]["environment"]["command"].endswith("--steps 4 --data text.txt --out runs/tiny/two")
    assert runs["two"]["summary"]["data"] == "text.txt"
    assert str(tmp_path) not in (tmp_path / "out" / "tiny.json").read_text()
    assert "| two | identity | 4 |" in capsys.readouterr().out
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert pictures == {"tiny-loss.png", "tiny-speed.png"}


def test_the_test_part_and_the_spread_of_seeds_stand_in_the_table(tmp_path, monkeypatch, capsys):
    (tmp_path / "mnist").mkdir()
    for name in ("train", "t10k"):
        header = struct.pack(">4I", 2051, 6, 28, 28)
        (tmp_path / "mnist" / f"{name}-images-idx3-ubyte").write_bytes(header + bytes(6 * 784))
    monkeypatch.setattr(experiments, "train", lambda command, *rest: train_main(command))
    monkeypatch.setitem(EXPERIMENTS, "tiny", TINY_IMAGES)
    folders = ["--data", str(tmp_path), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    assert experiments.main(["tiny", *folders]) == 0
    runs = json.loads((tmp_path / "tiny.json").read_text())["runs"]
    one, other = (run["summary"] for run in runs.values())
    assert 0 < one["test_bits"] < 9
    assert one["test_bits"] != other["test_bits"]
    said = capsys.readouterr().out
    assert "| of the test part |" in said
    assert (
        f"of two seeds, held-out bits per pixel: one {abs(one['held_out_bits'] - other['held_out_bits']):.4f}" in said
    )


def test_runs_at_once_have_a_gpu_each(tmp_path, monkeypatch, capsys):
    # Each ends when both have begun.
    both = f"cd {tmp_path}; touch $CUDA_VISIBLE_DEVICES; until [ -e 5 ] && [ -e 7 ]; do sleep 0.02; done"
    monkeypatch.setattr(experiments, "COMMAND", ["sh", "-c", f"echo on $CUDA_VISIBLE_DEVICES; {both}; exit 1"])
    monkeypatch.setitem(EXPERIMENTS, "tiny", TINY)
    folders = ["--runs", str(tmp_path), "--out", str(tmp_path / "out")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert experiments.main(["tiny", "--at-once", "2", *folders]) == 2
    assert "which has 1" in capsys.readouterr().err
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert experiments.main(["tiny:two", "tiny:one", "--at-once", "2", *folders, "--time-limit", "60"]) == 1
    said = {(tmp_path / "tiny" / f"{run}.log").read_text() for run in ("one", "two")}
    assert said == {"on 5\n", "on 7\n"}


def test_ctrl_c_begins_nothing_more(tmp_path, monkeypatch, capsys):
    begun = []

    def train(command, *rest):
        begun.append(command)
        time.sleep(0.1)  # the other thread waits for results by now
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        return 130

    monkeypatch.setattr(experiments, "train", train)
    monkeypatch.setitem(EXPERIMENTS, "tiny", TINY)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        assert experiments.main(["tiny", "--runs", str(tmp_path), "--out", str(tmp_path)]) == 130
    finally:
        signal.signal(signal.SIGINT, previous)
    assert len(begun) == 1
    assert "interrupted" in capsys.readouterr().err


def test_a_run_that_takes_too_long_is_stopped_by_a_signal(monkeypatch):
    monkeypatch.setattr(experiments, "COMMAND", ["sleep"])
    assert experiments.train(["60"], 0.1, os.environ, None) == -15
    assert experiments.train(["0"], float("inf"), os.environ, None) == 0


def test_mistakes_are_one_line(capsys):
    for mistake in ("none", "mnist:dense,none"):
        assert experiments.main([mistake]) == 2
        assert capsys.readouterr().err.count("\n") == 1
