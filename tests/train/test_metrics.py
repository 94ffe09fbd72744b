"""The record of a run: lines, times, units, TensorBoard's file."""

from __future__ import annotations

import json
import math
import time
from types import SimpleNamespace

import pytest
from tensorboardX.proto.event_pb2 import Event

from train.errors import TrainError
from train.metrics import Clock, Metrics, Units, read_metrics

DAMAGED = ('{"step": [1], "seconds": 1}\n', '{"step": 1, "loss": 2}\n', '{"step": 1, "seconds": 2, "loss": "low"}\n')


def events(folder) -> list[Event]:
    """What TensorBoard reads: records of a length, its checksum, an event and its checksum."""
    found = []
    for path in sorted((folder / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        content, place = path.read_bytes(), 0
        while place < len(content):
            size = int.from_bytes(content[place : place + 8], "little")
            found.append(Event.FromString(content[place + 12 : place + 12 + size]))
            place += 12 + size + 4
    return found


def test_lines_say_when_and_go_to_tensorboard_too(tmp_path):
    with Metrics(tmp_path, 0) as metrics:
        metrics.write(
            0, {"held_out_loss": 2.5, "bucket_pairs": [0.25, 0.5], "bucket_shares": [[0.6, 0.4]], "peak": None}
        )
        metrics.clock.start()
        time.sleep(0.02)
        metrics.clock.stop()
        metrics.write(7, {"loss": 1.5})
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert read_metrics(tmp_path) == metrics.history == [first, second]
    assert first["bucket_shares"] == [[0.6, 0.4]]
    assert "peak" not in first
    assert first["train_seconds"] == 0
    assert 0.02 <= second["train_seconds"] <= second["seconds"]
    scalars = [
        (event.step, value.tag, value.simple_value) for event in events(tmp_path) for value in event.summary.value
    ]
    assert scalars == [
        (0, "held_out_loss", 2.5),
        (0, "bucket_pairs/0", 0.25),
        (0, "bucket_pairs/1", 0.5),
        (7, "loss", 1.5),
    ]


def test_a_resumed_run_drops_later_and_cut_lines_and_goes_on_with_the_times(tmp_path):
    lines = [{"step": step, "seconds": 10.0 * step, "train_seconds": 8.0 * step, "loss": 1.0} for step in (1, 2, 3)]
    content = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(content + '{"step": 2, "lo')  # as a crash leaves it
    with Metrics(tmp_path, 2) as metrics:
        assert metrics.history == lines[:2]
        record = metrics.write(3, {"loss": 0.5})
    assert record["seconds"] == pytest.approx(20, abs=0.5)
    assert record["train_seconds"] == 16
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    assert [event.step for event in events(tmp_path) if event.HasField("session_log")] == [3]  # hides later ones
    with Metrics(tmp_path, 0) as metrics:
        assert metrics.history == []


def test_the_clock_counts_only_while_it_runs():
    clock = Clock(5.0)
    time.sleep(0.02)
    assert clock.seconds == 5.0
    clock.start()
    time.sleep(0.02)
    running = clock.seconds
    clock.stop()
    time.sleep(0.02)
    assert 5.02 <= running <= clock.seconds < running + 0.02


@pytest.mark.parametrize(
    ("unit", "per_token", "bits", "perplexity"),
    [
        ("byte", 1.0, "bits_per_byte", None),
        ("token", 4.0, "bits_per_byte", 8.0),
        ("pixel", 1.0, "bits_per_pixel", None),
    ],
)
def test_losses_are_told_in_bits_of_what_people_count(unit, per_token, bits, perplexity):
    units = Units(SimpleNamespace(unit=unit, units_per_token=lambda part: per_token))
    nats = math.log(8)
    assert units.training(nats) == {"loss": nats, bits: pytest.approx(3 / per_token)}
    held_out = {"held_out_loss": nats, f"held_out_{bits}": pytest.approx(3 / per_token)}
    assert units.held_out(nats) == {**held_out, "held_out_perplexity": perplexity and pytest.approx(perplexity)}


@pytest.mark.parametrize("content", [None, "", "[]\n", '{"loss": 1}\n', *DAMAGED])
def test_a_folder_without_metrics_says_so(content, tmp_path):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(TrainError, match=r"metrics\.jsonl holds no metrics. Name the folder of a run"):
        read_metrics(tmp_path)


def test_a_loss_gone_wild_does_not_end_the_run():
    held_out = Units(SimpleNamespace(unit="token", units_per_token=lambda part: 1.0)).held_out(1e4)
    assert math.isfinite(held_out["held_out_perplexity"])
