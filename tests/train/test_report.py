"""The report: what its table says of made-up runs, and what it does with runs that it cannot take."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys

import pytest

import train.__main__
import train.plot
import train.report
from models import ModelConfig
from train.__main__ import main
from train.config import Config, DataConfig
from train.folder import save_config


def made_up(folder, *, seconds_a_step: float, unit: str = "byte", attention: str = "hash(4)", peak: int | None = None):
    """A run of 40 steps of 2 x 100 tokens that evaluates every 10 steps, at 8, 4, 2, 3 and 1 bits."""
    folder.mkdir(parents=True)
    model = ModelConfig(attention=attention, layers=2, dtype="bfloat16")
    config = Config(model=model, data=DataConfig(batch_size=2, seq_len=100))
    facts = {"corpus": {"name": "made up"}, "device": {"kind": "NVIDIA H100 80GB HBM3"}}
    save_config(folder, config, facts)
    lines = [{"step": 0, "compile_seconds": 5.0, "flops_per_step": 989e12 * 0.1}]
    for step, bits in zip(range(0, 41, 10), (8.0, 4.0, 2.0, 3.0, 1.0), strict=True):
        times = {"step": step, "seconds": 5 + 2 * step * seconds_a_step, "train_seconds": step * seconds_a_step}
        if step:
            measured = {"loss": bits, f"bits_per_{unit}": bits, "tokens_per_second": 200 / seconds_a_step}
            lines.append({**times, **measured, **({} if peak is None else {"peak_memory_bytes": peak + step})})
        buckets = {"bucket_largest_share": [0.5, 0.4], "bucket_effective": [3.0, 3.5], "bucket_pairs": [0.3, 0.26]}
        buckets["bucket_shares"] = [[0.5, 0.3, 0.1, 0.1], [0.4, 0.2, 0.2, 0.2]]
        held_out = {"held_out_loss": bits, f"held_out_bits_per_{unit}": bits}
        lines.append({**times, **held_out, **(buckets if attention == "hash(4)" else {})})
    lines[0] |= {"seconds": 5.0, "train_seconds": 0.0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_runs_stand_side_by_side(tmp_path, capsys):
    made_up(tmp_path / "a", seconds_a_step=0.5, attention="dense", peak=2**30)
    made_up(tmp_path / "b", seconds_a_step=0.25)
    assert main(["report", "a", "b/", "--target", "3.5", "--out", "side by side"]) == 0
    out = tmp_path / "side by side"
    dense, sparse = json.loads((out / "report.json").read_text())["runs"]
    assert (dense["run"], sparse["run"], sparse["attention"]) == ("a", "b", "hash(4)")
    assert (sparse["steps"], sparse["tokens"]) == (40, 8000)
    assert (sparse["train_seconds"], sparse["seconds"], sparse["compile_seconds"]) == (10, 25, 5)
    assert (sparse["held_out_bits"], sparse["best_held_out_bits"], sparse["best_held_out_step"]) == (1, 1, 40)
    assert (sparse["tokens_per_second"], sparse["speed_up"], dense["speed_up"]) == (800, 2, 1)
    assert (dense["density"], sparse["density"]) == (1, pytest.approx((0.3 + 0.26) / 2))
    assert dense["model_flop_utilisation"] == pytest.approx(0.1 / 0.5)
    assert (dense["peak_memory_bytes"], sparse["peak_memory_bytes"]) == (2**30 + 40, None)
    # After the 10 s that b took, a was half-way through; two runs alone can be compared.
    assert (dense["held_out_bits_in_equal_time"], sparse["held_out_bits_in_equal_time"]) == (2, 1)
    # 4 bits after 2.5 s and 2 after 5 s: 3.5 a quarter of the way.
    assert sparse["seconds_to_target"] == pytest.approx(2.5 + 0.25 * 2.5)
    text = (out / "report.md").read_text()
    header, rule, *rows = text.splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")] == [
        "run",
        "attention",
        "steps",
        "tokens",
        "seconds on steps",
        "in all",
        "compiling",
        "held-out bits per byte",
        "best",
        "after 10 s on steps",
        "seconds to 3.5 bits",
        "pairs / dense",
        "tokens/s",
        "speed-up",
        "peak memory, GiB",
        "model FLOP utilisation",
    ]
    assert rows == [
        "| a | dense | 40 | 8,000 | 20.0 | 45.0 | 5.0 | 1.0000 | 1.0000 | 2.0000 "
        "| 6.2 | 1.000 | 400 | 1.00x | 1.00 | 20.0% |",
        "| b | hash(4) | 40 | 8,000 | 10.0 | 25.0 | 5.0 | 1.0000 | 1.0000 | 1.0000 "
        "| 3.1 | 0.280 | 800 | 2.00x |  | 40.0% |",
    ]
    assert rule.count("---") == 16
    assert text in capsys.readouterr().out
    pictures = {path.name for path in out.iterdir() if path.suffix == ".png"}
    assert pictures == {"loss.png", "speed-and-buckets.png", "buckets-b.png"}


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        ({"step": 40}, True),
        ({"step": 30}, False),  # of a checkpoint from before the run went on
        ({"step": 40, "tokens": 500}, False),  # of some of the test part
    ],
)
def test_test_bits_are_those_of_a_checkpoint_in_the_table(found, shown, tmp_path, capsys):
    made_up(tmp_path / "run", seconds_a_step=1.0)
    found = {"part": "test", "tokens": 0, "bits_per_byte": 0.1234, **found}
    for written in ({"test": found, "held_out": {**found, "bits_per_byte": 0.5}}, found):  # as now, and as before
        (tmp_path / "run" / "evaluation.json").write_text(json.dumps(written))
        assert main(["report", "run"]) == 0
        assert ("0.1234" in capsys.readouterr().out) == shown


def test_one_run_of_images_and_a_target_that_was_not_reached(tmp_path, capsys):
    made_up(tmp_path / "x" / "run", seconds_a_step=1.0, unit="pixel", attention="dense")
    assert main(["report", "x/run", "--target=0.5"]) == 0
    said = capsys.readouterr().out
    assert "held-out bits per pixel" in said
    assert "seconds to" not in said
    assert "on steps |" in said
    assert "after" not in said
    assert "wrote report.md, report.json, loss.png, speed-and-buckets.png to report" in said
    # Names that would be the same are told apart.
    made_up(tmp_path / "y" / "run", seconds_a_step=1.0, unit="pixel")
    assert main(["report", "x/run", "y/run"]) == 0
    assert "| y/run | hash(4) |" in capsys.readouterr().out


def test_records_of_earlier_versions_can_be_reported(tmp_path, capsys):
    made_up(tmp_path / "old", seconds_a_step=0.5)
    lines = [json.loads(line) for line in (tmp_path / "old" / "metrics.jsonl").read_text().splitlines()]
    kept = [{name: line[name] for name in line.keys() - {"train_seconds"}} for line in lines[1:]]
    (tmp_path / "old" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert main(["report", "old"]) == 0
    assert "| old | hash(4) | 40 | 8,000 | 45.0 | 45.0 |" in capsys.readouterr().out


def test_many_runs_can_be_told_apart_and_a_slow_one_leaves_room_for_the_others(tmp_path, monkeypatch):
    drawn = []

    def new_figure(*arguments):
        drawn.append(train.plot.Figure(layout="constrained"))
        return drawn[-1]

    monkeypatch.setattr(train.plot, "new_figure", new_figure)

    def history(seconds_a_step):
        bits = (8.0, 4.0, 2.0)
        return [
            {"step": step, "seconds": 0.0, "train_seconds": step * seconds_a_step, "held_out_bits_per_byte": x}
            for step, x in zip((0, 10, 20), bits, strict=True)
        ]

    train.plot.plot_losses({str(run): history(1.0) for run in range(30)}, "", tmp_path / "even.png")
    train.plot.plot_losses({str(run): history(run + 1.0) for run in range(5)}, "", tmp_path / "uneven.png")
    even, uneven = drawn
    lines = [line for line in even.axes[0].lines if not line.get_label().startswith("_")]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 30
    assert [text.get_text() for legend in even.legends for text in legend.get_texts()] == [str(x) for x in range(30)]
    assert [axes.get_xscale() for axes in (*even.axes, *uneven.axes)] == ["linear", "linear", "linear", "log"]


def test_ctrl_c_says_what_can_be_done_after_the_command(monkeypatch, capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setitem(train.__main__.COMMANDS, "report", (train.report.ReportOptions, interrupted))
    assert main(["report", "a"]) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "interrupted: python -m train report does it anew\n"


def test_a_reader_that_has_enough_ends_it_in_silence(tmp_path, monkeypatch, capsys):
    """As `head` does; `sys.stdout` is a file here, since what stands in its buffer is written when Python ends."""
    made_up(tmp_path / "a", seconds_a_step=0.5, attention="dense")
    for name in ("plot_losses", "plot_speed_and_buckets"):
        monkeypatch.setattr(train.report, name, lambda *arguments: None)
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["report", "a"]) == 128 + signal.SIGPIPE
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "report needs the folder of a run"),
        (["absent"], "absent holds no run"),
        (["bare"], "metrics.jsonl holds no metrics"),
        (["young"], "young has no training loss in its metrics"),
        (["text", "images"], "Runs on text and on images cannot be compared (text per byte, images per pixel)"),
        (["images"], "images/evaluation.json cannot be read (Expecting"),
        (["text", "--out=text/metrics.jsonl"], "text/metrics.jsonl cannot be written (File exists)"),
    ],
)
def test_what_cannot_be_reported_is_one_line(arguments, message, tmp_path, capsys):
    made_up(tmp_path / "text", seconds_a_step=1.0)
    made_up(tmp_path / "images", seconds_a_step=1.0, unit="pixel")
    for name in ("bare", "young"):
        (tmp_path / name).mkdir()
        save_config(tmp_path / name, dataclasses.replace(Config()), {})
    (tmp_path / "images" / "evaluation.json").write_text('{"part": ')
    line = {"step": 0, "seconds": 0.0, "held_out_loss": 5.0, "held_out_bits_per_byte": 8.0}
    (tmp_path / "young" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert main(["report", *arguments]) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("error: ")
    assert message in complaint
    assert complaint.count("\n") == 1
