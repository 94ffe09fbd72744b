"""The command line: what reaches the run, what a resumed run may ask for, and what it says otherwise."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import jax
import pytest

from models import PRESETS, ModelConfig
from scfa_jax.layers import Hash, Window
from train.__main__ import main
from train.config import Config, DataConfig, problem
from train.errors import TrainError
from train.folder import latest_run, load_config, new_run_folder, save_config
from train.options import parse

LARGE = ("layers", "width", "heads", "vocab-multiple")


def test_options_reach_the_model(monkeypatch):
    model = parse(["--attention=hash(6)*2, window(8)", "--positions=learned", "--remat=full", "--dtype=bfloat16"]).model
    assert (model.positions, model.remat) == ("learned", "full")
    kinds = [layer.kind for layer in model.layer_kinds()]
    assert kinds == [Hash(6), Hash(6), Window(8), Hash(6)]
    for platform, dtype in (("cpu", "float32"), ("gpu", "bfloat16")):
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        assert parse([]).model.dtype == dtype


def test_a_preset_gives_what_is_not_given():
    model = parse(["--preset", "gpt2-small", "--attention=hash(64)"]).model
    assert (model.layers, model.width, model.vocab_multiple, model.attention) == (12, 768, 128, "hash(64)")
    assert model == dataclasses.replace(PRESETS["gpt2-small"], attention="hash(64)", dtype=model.dtype)


@pytest.mark.parametrize(
    ("data", "attention", "name"),
    [
        ("news.jsonl.zst", "hash(4)", "news-hash-4"),
        ("shards", "window(512, slope=0.5)*3, dense", "shards-window-512-slope-0.5-3-dense"),
        ("*.jsonl", "dense", "texts-dense"),
        ("a", f"window(({'1, ' * 50}))", f"a-window-{'-'.join('1' * 50)}"[: len("a-") + 64]),
    ],
)
def test_a_run_is_named_after_its_data_and_its_attention_in_letters_and_digits(
    data, attention, name, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    heads = ["--heads=50", "--width=100"] if "1, 1" in attention else []
    assert new_run_folder(parse([f"--data={data}", f"--attention={attention}", *heads])) == Path("runs") / name


def test_resume_goes_on_with_the_run_last_written_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # A sample is written to any run.
    for number, name in enumerate(("b/config.json", "a/config.json", "b/metrics.jsonl", "a/sample.txt")):
        path = tmp_path / "runs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (number, number))
    assert latest_run() == Path("runs/b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "--resume found no run under runs/"),
        (["--resume", "--out=empty"], "empty holds no run"),
        (["--resume", "--out=odd"], "odd/config.json holds no options of a run. Bring it back"),
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


DAMAGED = {
    '"layers": 4': ('"layers": "4"', "layers: str is not an instance of int"),
    '"steps": 600': ('"steps": "a"', "steps: str is not an instance of int"),
    '"seq_len": 256': ('"seq_len": null', "seq_len: None is not an instance of int"),
    '"batch_size": 8': ('"batch_size": 0', "--batch-size must be at least 1, got 0"),
    '"attention": "hash(4)"': ('"attention": "hash(4"', "'hash(4' cannot be read"),
    '"corpus": {}': ('"corpus": null', "run/config.json holds no options of a run"),
    '"device": {}': ('"device": null', "run/config.json holds no options of a run"),
}


def test_a_damaged_config_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    save_config(tmp_path / "run", Config(), {"corpus": {}, "device": {}})
    whole = (tmp_path / "run" / "config.json").read_text()
    assert load_config(tmp_path / "run").model == Config().model
    for part, (damaged, message) in DAMAGED.items():
        assert whole.count(part) == 1
        (tmp_path / "run" / "config.json").write_text(whole.replace(part, damaged))
        assert main(["--resume", "--out=run"]) == 2
        complaint = capsys.readouterr().err
        assert complaint.startswith("error: run/config.json ")
        assert message in complaint
        assert complaint.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *((f"--{name}={2**29 + 1}", f"--{name} must be at most 2**29, got {2**29 + 1}") for name in LARGE),
        ("--attention=dense,hash(4),dense --layers=2", "--attention names 3 layers, and there are 2"),
        ("--attention=hash(buckets=3)", "--attention: hash: num_buckets must be an even number of at least 2, got 3"),
        ("--attention=window((3,4,5))", "--attention: window and slope must be one, or one for each of 4 heads"),
        ("--data=", "--data is empty"),
        ("--attention=reformer(8388608)", "num_buckets times --seq-len + 1 must be below 2**31, got 8388608 buckets"),
        ("--attention=dense --window-plan=plan.json", "--window-plan takes the place of --attention, got dense too"),
    ],
)
def test_impossible_options_are_refused(arguments, message):
    with pytest.raises(TrainError) as raised:
        parse(arguments.split())
    assert message in str(raised.value)


def test_cudnn_takes_no_separate_documents():
    data = DataConfig(documents="separate")
    assert "does not go with --documents separate" in problem(Config(ModelConfig(attention="hash(2),cudnn"), data))
    assert problem(Config(ModelConfig(attention="dense"), data)) is None


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--wdith=3"], "--wdith"),
        (["--preset=gpt3"], "gpt3"),
        (["--steps=many"], "--steps"),
        (["reprot", "runs/a"], "reprot"),
        (["sample", "runs/a", "--checkpoint=worst"], "worst"),
        (["report", "runs/a", "--target=low"], "--target"),
    ],
)
def test_unknown_options_and_values_end_with_exit_code_2(arguments, named, capsys):
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert named in capsys.readouterr().err
