"""`python -m train --mesh`: a run on several devices, and in several processes, is the run on one."""

from __future__ import annotations

import functools
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from models import ModelConfig
from models.sharding import parameter_spec
from train.checkpoint import Checkpoints
from train.config import Config, DataConfig, OptimizerConfig, RunConfig
from train.data import load_corpus, training_batches
from train.mesh import gathered, init_on, lower_step, make_mesh, place_rows, rows_to_read
from train.options import parse
from train.progress import LAG
from train.report import summary
from train.step import train_step

SEVERAL = pytest.mark.skipif(jax.device_count() < 2, reason="needs 2 devices, such as those that a CPU can simulate")
LENGTH = 24  # no other array has an axis of this size
KERNELS = {jax.tree_util.DictKey(name) for name in ("kernel", "embedding")}
GATHERED = re.compile(r" = (?:f32|bf16)\[([\d,]*)\]\S* all-gather(?:-start)?\(")


def mesh_of_all() -> str:
    """All three axes, as far as there are devices."""
    return {2: "model=2", 4: "fsdp=2,model=2"}.get(jax.device_count(), "data=2,fsdp=2,model=2")


@SEVERAL
def test_hashes_drops_and_losses_do_not_depend_on_the_mesh(text):
    config = Config(
        ModelConfig(layers=2, width=16, heads=2, attention="hash(2), drop(0.3)", dtype="float32"),
        DataConfig(data=str(text), seq_len=LENGTH, batch_size=8),
        OptimizerConfig(steps=8, warmup=2, lr=0.01, accumulate=2),
    )
    corpus, found = load_corpus(config.data), []
    for mesh in (None, make_mesh(mesh_of_all())):
        model, state = init_on(mesh, config, corpus.vocab_size)
        batches = training_batches(corpus, config.data, 0, *rows_to_read(mesh, 8))
        placed = [place_rows(mesh, next(batches), 8) for _ in range(6)]
        step = lower_step(mesh, model, config.optimizer, state, placed[0]).compile()
        curve = []
        for batch in placed:
            state, measured = step(state, batch)
            curve.append([*map(float, measured)])
        found.append((curve, gathered(mesh, state.params)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), *found)

    # Each device holds its own part of parameters and of what Adam keeps of them, after a step too.
    parts = mesh.shape["fsdp"] * mesh.shape["model"]
    for path, x in jax.tree_util.tree_leaves_with_path((state.params, state.opt_state)):
        if path[-1] in KERNELS:
            assert x.addressable_shards[0].data.size * parts == x.size, path
    # Attention gathers no activations: those of several tokens come together in the loss alone.
    activations = [shape for shape in GATHERED.findall(step.as_text()) if str(LENGTH) in shape.split(",")]
    assert activations == [f"{4 * mesh.shape['model'] // mesh.size},{LENGTH},16"]


@SEVERAL
def test_two_processes_stop_as_one_and_another_mesh_may_go_on(text, tmp_path):
    """Process 1 has no more time at once, which process 0 is told `LAG` steps later."""
    folder = tmp_path / "run"
    options = [f"--data={text}", "--attention=dense", "--layers=1", "--width=16", "--heads=2", "--dtype=float32"]
    options += ["--seq-len=16", "--batch-size=2", "--steps=6", "--warmup=2", "--log-every=1", "--eval-tokens=64"]
    options += ["--sample-length=0", f"--out={folder}"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    flags = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "train", *options, "--mesh=fsdp=2"]
    processes = [
        subprocess.Popen(
            [*command, f"--distributed={address},2,{number}", *more],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, more in enumerate(([], ["--seconds=1e-9"]))
    ]
    config = parse(options)
    corpus = load_corpus(config.data)
    model, state = init_on(None, config, corpus.vocab_size)
    batches = training_batches(corpus, config.data, 0)
    step, losses = jax.jit(functools.partial(train_step, model, config.optimizer)), []
    for _ in range(LAG):
        state, measured = step(state, next(batches))
        losses.append(float(measured.loss))
    try:
        said = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said

    assert f"stopped as asked at step {LAG}" in said[0][0]
    assert "step" not in said[1][0]
    assert len([*(folder / "tensorboard").iterdir()]) == 1
    assert (folder / "loss.png").exists()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    np.testing.assert_allclose(trained, [*enumerate(losses, start=1)], rtol=1e-5)
    assert [line["step"] for line in lines if "held_out_loss" in line] == [0, LAG]
    assert lines[1]["held_out_loss"] == pytest.approx(np.log(256), rel=0.03)

    # One process, and two devices along another axis.
    _, like = init_on(make_mesh("model=2"), config, corpus.vocab_size)
    again = training_batches(corpus, config.data, 0)
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore(LAG, like, again)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, like)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), restored.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, next(again), next(batches))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh": "model"}, "--mesh takes sizes of data, fsdp, model, as in data=2,model=2; got 'model'"),
        ({"mesh": "data=2,heads=2"}, "got 'heads=2'"),
        ({"mesh": "data=2,data=2"}, "got 'data=2'"),
        ({"mesh": "data=64"}, f"--mesh data=64 asks for 64 devices, and JAX finds {jax.device_count()}"),
        ({"distributed": "host:1,2,2"}, "--distributed takes auto or HOST:PORT,COUNT,ID with an ID below COUNT"),
    ],
)
def test_a_mesh_that_cannot_be_is_one_line(options, message, start, tmp_path, capsys):
    assert start(**options) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@SEVERAL
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh": "model=2", "heads": 1}, "--mesh: model must divide --heads, got 2 for 1"),
        ({"mesh": "fsdp=2", "width": 15, "heads": 1, "positions": "learned"}, "fsdp must divide --width, got 2 for 15"),
        (
            {"mesh": "data=2", "accumulate": 2},
            "data times fsdp must divide --batch-size over --accumulate, got 2 for 1",
        ),
    ],
)
def test_what_does_not_divide_is_named(options, message, start, capsys):
    assert start(**options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        (("embedding", "embedding"), (256, 16), P("model", "fsdp")),
        (("embedding", "embedding"), (257, 16), P(None, "fsdp")),
        (("blocks", "query", "kernel"), (16, 2, 8), P("fsdp", "model")),
        (("blocks", "norm1", "scale"), (16,), P()),
    ],
)
def test_parameters_are_cut_by_name_and_a_vocabulary_that_does_not_divide_stays_whole(path, shape, spec):
    keys = tuple(map(jax.tree_util.DictKey, path))
    assert parameter_spec(keys, shape, {"data": 1, "fsdp": 2, "model": 2}) == spec


def test_utilisation_is_that_of_all_devices():
    line = {"step": 10, "seconds": 9.0, "train_seconds": 5.0, "loss": 1.0, "held_out_bits_per_byte": 1.4}
    history = [line | {"flops_per_step": 989e12}]
    for mesh, expected in ((None, 2.0), ("data=2,model=4", 0.25)):
        config = Config(ModelConfig(dtype="bfloat16"), run=RunConfig(mesh=mesh))
        row = summary("run", config, "NVIDIA H100 80GB HBM3", history, "byte", None)
        assert row["model_flop_utilisation"] == pytest.approx(expected)
