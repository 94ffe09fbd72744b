"""`python -m benchmarks.scaling`: what it times, that all cases compute the same, and what it says of them."""

from __future__ import annotations

import json
import sys

import jax
import numpy as np
import pytest

from benchmarks import scaling
from benchmarks.training import configuration
from models import PRESETS, ModelConfig
from train.step import init


def test_weak_cases_grow_with_the_devices_and_strong_ones_do_not():
    options = scaling.Options(meshes=("data=2", "fsdp=8", "data=2,model=2"), weak=2, strong=4)
    found = {tuple(case) for case in scaling.cases(options, devices=4)}
    assert found == {("one", 1, 2), ("one", 1, 4), ("data=2", 2, 4), ("data=2,model=2", 4, 8), ("data=2,model=2", 4, 4)}


@pytest.mark.skipif(jax.device_count() < 2, reason="needs 2 devices, such as those that a CPU can simulate")
def test_a_tiny_run_writes_its_table_results_and_plot(tmp_path, monkeypatch, capsys):
    tiny = ModelConfig(layers=1, width=16, heads=2, attention="identity")
    monkeypatch.setitem(PRESETS, "cpu", tiny)
    monkeypatch.setattr(scaling, "VOCABULARY", 64)
    arguments = (
        "--preset cpu --kind identity --length 16 --weak 1 --strong 2 --meshes model=2 data=2 --rounds 1 --steps 2"
    )
    arguments += " --dtype float32"  # sums in bfloat16 differ where devices share them
    prepare = scaling.prepare

    def prepare_all_but_one(case, *rest):
        if case.mesh == "data=2":
            raise RuntimeError("cannot be compiled\nfor many reasons")
        return prepare(case, *rest)

    monkeypatch.setattr(scaling, "prepare", prepare_all_but_one)
    monkeypatch.setattr(sys, "argv", ["scaling", *arguments.split(), "--out", str(tmp_path)])
    assert scaling.main() == 1
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "scaling.json").read_text())
    one, two, both = record["rows"]
    assert [(row["mesh"], row["sequences"]) for row in record["rows"]] == [("one", 1), ("one", 2), ("model=2", 2)]
    assert record["left_out"] == ["data=2, 2 sequences: RuntimeError: cannot be compiled"]
    assert (one["weak"], two["strong"]) == (1, 1)
    assert both["weak"] == pytest.approx(both["tokens_per_second"] / one["tokens_per_second"], abs=1e-3)
    assert both["strong"] == pytest.approx(two["step_ms"] / both["step_ms"], abs=1e-3)
    assert both["first_losses"] == pytest.approx(two["first_losses"], rel=1e-5)
    assert f"| model=2 | 2 | 2 | {both['step_ms']:.1f} |" in said
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(jax.device_count() < 2, reason="needs 2 devices, such as those that a CPU can simulate")
def test_a_case_donates_no_array_of_another(monkeypatch):
    monkeypatch.setitem(PRESETS, "cpu", ModelConfig(layers=1, width=16, heads=2))
    monkeypatch.setattr(scaling, "VOCABULARY", 64)
    options = scaling.Options(preset="cpu", length=16, steps=1)
    model, state = init(
        configuration("cpu", "identity", "float32"), scaling.OPTIMIZER, vocab_size=64, max_length=options.length
    )
    before = jax.tree.map(np.array, state)
    cases = [scaling.Case(mesh, devices, 2) for mesh, devices in (("one", 1), ("model=2", 2), ("data=2", 2))]
    ready = [scaling.prepare(case, options, model, state) for case in cases]
    losses = []
    for i, one in enumerate(ready):
        losses.append(float(one.step(one.state, one.batches[0])[1].loss))
        for other in (state, *(x.state for x in ready[i + 1 :])):
            jax.tree.map(np.testing.assert_array_equal, other, before)
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
