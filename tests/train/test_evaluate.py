"""`python -m train evaluate`: the loss of the checkpoint and on the part that are asked for."""

from __future__ import annotations

import json
import math
import struct

import numpy as np
import pytest
from data_cases import write_bpe

from train import evaluate
from train.__main__ import main
from train.data import evaluated_bytes, load_corpus
from train.folder import load_config


@pytest.fixture
def images(tmp_path):
    """Noise to train on, of dark greys, and white to test on."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    for name, count, greys in (("train", 10, (0, 40)), ("t10k", 4, (255, 256))):
        pixels = np.random.default_rng(0).integers(*greys, count * 784).astype(np.uint8).tobytes()
        (folder / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 2051, count, 28, 28) + pixels)
    return folder


def test_the_test_part_is_read_by_the_checkpoint_asked_for(images, start, tmp_path, capsys):
    run = tmp_path / "run"
    options = {"attention": "identity", "data": images, "seq_len": 784, "held_out": 0.2, "out": run, "eval_tokens": 0}
    # The second half, at this learning rate, does harm.
    assert start(**options, steps=6, eval_every=3, checkpoint_every=3, sample_length=0, lr=1.0) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held_out = {line["step"]: line["held_out_bits_per_pixel"] for line in lines if "held_out_loss" in line}
    capsys.readouterr()
    found = {}
    for part in ("held_out", "test"):
        for checkpoint in ("best", "last"):
            assert main(["evaluate", str(run), "--part", part, "--checkpoint", checkpoint]) == 0
            found[part, checkpoint] = evaluate.read_evaluation(run, part)
            bits, step = found[part, checkpoint]["bits_per_pixel"], found[part, checkpoint]["step"]
            said = capsys.readouterr().out.splitlines()[-1]
            assert said == f"{part}: {bits:.4f} bits per pixel, {checkpoint} checkpoint, step {step}"
    assert held_out[3] < held_out[6]
    for checkpoint, step in (("best", 3), ("last", 6)):
        assert found["held_out", checkpoint]["step"] == step
        assert found["held_out", checkpoint]["bits_per_pixel"] == pytest.approx(held_out[step], rel=1e-6)
        assert found["test", checkpoint]["bits_per_pixel"] > held_out[step] + 1
    assert evaluate.read_evaluation(run) == found["test", "last"]  # beside that of the other part
    assert not list(run.glob("*.part"))


def test_data_may_be_moved_but_another_text_is_refused(start, text, tmp_path, capsys):
    run = tmp_path / "run"
    assert start(attention="identity", out=run, steps=2, sample_length=0, eval_tokens=0) == 0
    held_out = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["held_out_bits_per_byte"]
    elsewhere = text.rename(tmp_path / "elsewhere.txt")
    assert main(["evaluate", str(run), "--part=held_out"]) == 2
    assert "text.txt does not exist" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--part=held_out", "--data", str(elsewhere)]) == 0
    found = evaluate.read_evaluation(run, "held_out")
    assert found["bits_per_byte"] == pytest.approx(held_out, rel=1e-6)
    assert main(["sample", str(run), "--data", str(elsewhere), "--length=3"]) == 0
    assert main(["--resume", "--out", str(run), "--data", str(elsewhere), "--sample-length=0"]) == 0
    text.write_bytes(elsewhere.read_bytes()[:1600])
    capsys.readouterr()
    assert main(["evaluate", str(run), "--part=held_out"]) == 2
    assert "was written for another text (text.txt) than the one found now" in capsys.readouterr().err


def test_bits_of_byte_pairs_are_of_the_bytes_that_were_read(start, tmp_path, capsys):
    run, bpe = tmp_path / "run", write_bpe(tmp_path / "bpe")
    pairs = {"tokenizer": "gpt2", "bpe": bpe, "cache": tmp_path / "cache"}
    text = tmp_path / "uneven.txt"
    text.write_text("".join(f"{number} the the the\n\n   x" if number % 3 else "0123456789" for number in range(200)))
    more = {"attention": "identity", "data": text, "held_out": 0.2, "eval_tokens": 40}
    assert start(**more, **pairs, out=run, steps=2, sample_length=0) == 0
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    config = load_config(run)
    corpus = load_corpus(config.data)
    read = evaluated_bytes(corpus, config.data, 40)
    assert abs(read / corpus.units_per_token("held_out") - 1) > 0.01
    assert last["held_out_bits_per_byte"] == pytest.approx(last["held_out_loss"] / math.log(2) / read)
    bpe.rename(tmp_path / "elsewhere")
    arguments = [str(run), "--part=held_out", "--tokens=40"]
    assert main(["evaluate", *arguments]) == 2
    assert "Name a folder that holds GPT-2's encoder.json and vocab.bpe" in capsys.readouterr().err
    assert main(["evaluate", *arguments, "--bpe", str(tmp_path / "elsewhere")]) == 0
    found = evaluate.read_evaluation(run, "held_out")
    assert found["bits_per_byte"] == pytest.approx(last["held_out_bits_per_byte"], rel=1e-6)


def test_what_cannot_be_evaluated_is_one_line(start, tmp_path, capsys):
    run = tmp_path / "run"
    assert start(attention="identity", out=run, steps=2, sample_length=0) == 0
    capsys.readouterr()
    for arguments, message in (
        ([str(run)], "has no test part"),
        ([str(run), "--tokens=-1"], "--tokens must not be negative"),
        ([str(tmp_path / "none")], "none"),
    ):
        assert main(["evaluate", *arguments]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
    assert evaluate.read_evaluation(run) is None
