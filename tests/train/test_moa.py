"""`python -m train moa`: the plan's file, what the command writes, and training under a plan."""

from __future__ import annotations

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models.influence
import train.moa.command
from models import ModelConfig
from models.influence import hang_taps
from models.kinds import parse
from train.__main__ import main
from train.config import Config, DataConfig, OptimizerConfig
from train.data import load_corpus
from train.errors import TrainError
from train.folder import load_config
from train.moa.command import MoaOptions, _lengths
from train.moa.evaluate import held_out_loss
from train.moa.plan import Plan, load_plan, plan_of, save_plan
from train.restore import restored
from train.step import init

PLAN = plan_of(
    np.array([[[3, 0.25], [-1, 0.5]], [[16, 0.0], [0, 1.0]]]),
    num_sinks=2,
    model=ModelConfig(attention="dense, drop(0.5, share_query_key=True)", layers=2, heads=2),
)


def test_a_plan_comes_back_from_its_file(tmp_path):
    path = tmp_path / "new" / "plan.json"
    save_plan(path, PLAN, {"lengths": [8, 16]})
    assert load_plan(path, layers=2, heads=2) == PLAN
    assert json.loads(path.read_text())["lengths"] == [8, 16]
    np.testing.assert_array_equal(PLAN.windows(16), [[7, 7], [16, 16]])
    # 16 * 17 / 2 = 136 pairs, of which a window of 7 leaves out 9 * 10 / 2 = 45, and two sinks keep 9 + 8 of these.
    assert PLAN.density(16) == pytest.approx((1 + (136 - 45 + 17) / 136) / 2)


def test_a_plan_is_attention_of_the_same_projections():
    assert PLAN.attention == (
        "window(window=(3, -1), num_sinks=2, slope=(0.25, 0.5)), "
        "window(window=(16, 0), num_sinks=2, slope=(0.0, 1.0), share_query_key=True)"
    )


def test_a_plan_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(TrainError, match=r"plan\.json cannot be written \(Is a directory\)\. Name another file"):
        save_plan(tmp_path / "plan.json", PLAN, {})
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "cannot be read"),
        (lambda text: "[]", "holds no plan of this version"),
        (lambda text: text.replace("plan 2", "plan 0"), "holds no plan of this version"),
        (lambda text: text.replace("(3, -1)", "(3, nan)"), "is damaged"),
        (lambda text: text.replace("(3, -1)", "(3, 2, 1)"), "is damaged"),
        (lambda text: text.replace("(3, -1)", "far"), "is damaged"),
        (lambda text: text.replace("num_sinks=2", "num_sinks=-2"), "is damaged"),
        (lambda text: text.replace('"attention": [', '"attention": [3,'), "is damaged"),
        (lambda text: text.replace('"attention"', '"layers"'), "is damaged"),
        (lambda text: text.replace("window(window=(16, 0)", "hash(16), window(window=(16, 0)"), "is damaged"),
        (
            lambda text: text.replace("(3, -1)", "(3,)").replace("(0.25, 0.5)", "0.25"),
            "has 2 layers of 1/2 heads, this one 2 of 2",
        ),
        (
            lambda text: text.replace("(16, 0)", "(1, 16, 1)").replace("(0.0, 1.0)", "0.0"),
            "has 2 layers of 2/3 heads, this one 2 of 2",
        ),
    ],
)
def test_what_is_no_plan_for_this_model_is_one_line(damage, message, tmp_path):
    path = tmp_path / "plan.json"
    save_plan(path, PLAN, {})
    whole = path.read_text()
    path.write_text(damage(whole))
    assert path.read_text() != whole
    with pytest.raises(TrainError) as raised:
        load_plan(path, layers=2, heads=2)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_every_head_of_a_model_has_the_window_of_the_plan(monkeypatch):
    """Against dense attention under masks."""
    length = 16
    config = ModelConfig(layers=2, width=16, heads=2, attention="dense", dtype="float32")
    model, state = init(config, OptimizerConfig(), vocab_size=50, max_length=length)
    params = jax.tree.map(lambda x: 4 * x if x.ndim == 3 else x, state.params)  # so that attention is not even
    tokens = np.random.default_rng(0).integers(0, 50, (2, length)).astype(np.uint8)
    row, column = np.indices((length, length))
    windows = iter(PLAN.windows(length))

    def attend(query, key, value, tap, segment_ids=None, *, num_sinks):
        near = row - column < next(windows)[:, None, None]
        mask = (column <= row) & (near | (column < num_sinks))
        return jax.nn.dot_product_attention(query, key, value, mask=jnp.asarray(mask)[None])

    @jax.jit
    def expected(params):
        transformer = model.merge(params, state.fixed)
        hang_taps(transformer, [jnp.zeros(0)] * 2, 2)
        return transformer.features(tokens, draws=[{}, {}])

    monkeypatch.setattr(models.influence, "influential_attention", attend)
    plan = PLAN.attention.replace(", share_query_key=True", "")
    planned, _ = init(dataclasses.replace(config, attention=plan), OptimizerConfig(), vocab_size=50, max_length=length)
    found = jax.jit(lambda params: planned.merge(params, state.fixed).features(tokens))(params)
    np.testing.assert_allclose(found, expected(params), atol=1e-5)


@pytest.fixture
def trained(start, fake_steps, tmp_path, capsys):
    """The folder of a run of a dense model."""
    fake_steps(1.0)
    assert start(attention="dense", seq_len=32, out=tmp_path / "run", eval_every=12) == 0
    capsys.readouterr()
    return tmp_path / "run"


def test_the_command_plans_evaluates_and_draws_and_a_run_trains_on_under_the_plan(trained, start, tmp_path, capsys):
    arguments = ["--density=0.5", "--lengths", "16", "32", "--tokens=64", "--eval-tokens=64", "--sinks=1"]
    assert main(["moa", "run", *arguments]) == 0
    said = capsys.readouterr().out
    record = json.loads((trained / "plan.json").read_text())
    plans = {"plan": load_plan(trained / "plan.json", 1, 2), "uniform": load_plan(trained / "plan-uniform.json", 1, 2)}
    for name, plan in plans.items():
        assert record["densities"][name] == [plan.density(16), plan.density(32)]
        assert max(record["densities"][name]) <= 0.5
        bits = record["evaluation"]["held_out_bits_per_byte"][name]
        assert f"{name}: held-out {bits:.4f} bits per byte at density {plan.density(32):.4f}" in said
    assert len(set(plans["uniform"].windows(32)[0])) == 1
    assert record["objective_value"] == pytest.approx(np.mean(record["predicted_loss"]["plan"]))
    assert record["objective_bound"] <= record["objective_value"] < sum(record["influence"])
    assert len(set(record["evaluation"]["held_out_bits_per_byte"].values())) == 3
    assert (record["run"], record["step"], record["corpus"]["name"]) == ("run", 12, "text.txt")
    assert {"commit", "versions", "device"} <= record.keys()
    assert (trained / "plan.png").read_bytes().startswith(b"\x89PNG")

    on = {"seq_len": 32, "attention": "hash(4)", "window_plan": trained / "plan.json"}  # as if it were not given
    assert start(**on, start_from=trained, out=tmp_path / "on", steps=2) == 0
    (trained / "plan.json").unlink()
    assert load_config(tmp_path / "on").model.attention == plans["plan"].attention
    assert main(["sample", str(tmp_path / "on"), "--prompt=99"]) == 0


def test_the_model_beside_the_plans_drops_nothing(start, tmp_path):
    run = tmp_path / "run"
    more = {"attention": "drop(0.5, drop_at_evaluation=True)", "seq_len": 32, "steps": 2, "sample_length": 0}
    assert start(**more, out=run) == 0
    config = load_config(run)
    corpus = load_corpus(config.data)
    _, state = restored(run, config, corpus, "last")
    whole = Plan(parse("window(32)"))
    dense, planned = (held_out_loss(config, corpus, state, plan, 64) for plan in (None, whole))
    assert dense == pytest.approx(planned, rel=1e-5)


UNPLANNED = {
    "absent": "absent holds no run",
    "run --density=0": "--density must be above 0 and at most 1, got 0",
    "run --density=0.01": "--density 0.01 is below",
    "run --lengths 1": "--lengths must be at least 2, got 1",
    "run --lengths 16 100000": "--lengths must be at most",
    "run --sinks=-1": "--sinks must not be negative",
    "run --out=plan.txt": "--out must end in .json, got plan.txt",
    "run --data=absent.txt": "absent.txt",
    "run --out=run/config.json/plan.json": "config.json/plan.json cannot be written (",
    "run --out=taken.json": "taken-uniform.json cannot be written (Is a directory). Name another file",
}


def test_what_cannot_be_planned_is_one_line(trained, tmp_path, monkeypatch, capsys):
    profiled = []

    def even(model, state, corpus, data, *rest):
        profiled.append(data.seq_len)
        return np.ones((1, 3, 2, data.seq_len))

    (tmp_path / "taken-uniform.json").mkdir()
    monkeypatch.setattr(train.moa.command, "profile", even)
    for arguments, message in UNPLANNED.items():
        assert main(["moa", *arguments.split()]) == 2
        complaint = capsys.readouterr().err
        assert complaint.startswith("error: ")
        assert message in complaint
        assert complaint.count("\n") == 1
        assert bool(profiled) == ("--density 0.01" in message)  # what lies in files and options is found before
        profiled.clear()
    assert not list(tmp_path.glob("**/*.part"))


def test_a_run_without_queries_and_keys_of_its_own_is_refused(start, fake_steps, tmp_path, capsys):
    fake_steps(1.0)
    assert start(attention="dense,hash(4)", layers=2, out=tmp_path / "run", steps=2) == 0
    assert main(["moa", "run"]) == 2
    assert (
        "moa profiles layers of dense, cudnn and drop, and the run has hash(num_buckets=4)" in capsys.readouterr().err
    )


def test_a_start_from_another_model_is_one_line(trained, start, tmp_path, capsys):
    for options in ({"width": 32}, {"layers": 2}):
        assert start(attention="dense", **options, start_from=trained, out=tmp_path / "other") == 2
        assert "has other parameters than this one" in capsys.readouterr().err
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("unit", "asked", "found"),
    [
        ("byte", (), (8, 16, 32)),
        ("byte", (64, 20, 64), (20, 64)),
        ("byte", (101,), "at most 99, the training part, got 101"),
        ("pixel", (), (32,)),
        ("pixel", (16,), "must be 32, that of an image, got 16"),
    ],
)
def test_lengths_are_those_asked_for_or_follow_the_run(unit, asked, found):
    corpus = types.SimpleNamespace(unit=unit, train=np.zeros(100))
    arguments = MoaOptions("run", lengths=asked), Config(data=DataConfig(seq_len=32)), corpus
    if isinstance(found, tuple):
        assert _lengths(*arguments) == found
    else:
        with pytest.raises(TrainError, match=found):
            _lengths(*arguments)
