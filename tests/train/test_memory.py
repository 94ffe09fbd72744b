"""A device without enough memory ends a command in one line with the remedies; what was saved stays."""

import re

import jax
import pytest

import train.run
import train.sample
from train.__main__ import main
from train.errors import TrainError
from train.memory import out_of_memory_in_one_line

SAID = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes."


def exhausted(*arguments, **options):
    raise jax.errors.JaxRuntimeError(SAID)


def one_error_line(capsys) -> str:
    said = capsys.readouterr().err
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert said.endswith(f"{line}\n")
    return line


def test_training_that_runs_out_keeps_its_checkpoints_and_can_be_continued(
    start, fake_steps, tmp_path, capsys, monkeypatch
):
    fake_steps(1.0)
    make_steps = train.run.compile_steps

    def until_step_8(*arguments):
        steps = make_steps(*arguments)
        step = lambda state, batch: exhausted() if int(state.step) == 8 else steps.train_step(state, batch)
        return steps._replace(train_step=step)

    monkeypatch.setattr(train.run, "compile_steps", until_step_8)
    assert start(attention="dense", out=tmp_path / "run") == 2
    line = one_error_line(capsys)
    for part in ("16.00 GiB more", "--batch-size", "--accumulate", "--remat", str(tmp_path / "run")):
        assert part in line
    monkeypatch.setattr(train.run, "compile_steps", make_steps)
    assert main(["--resume", "--out", str(tmp_path / "run")]) == 0
    assert "continuing from step 8" in capsys.readouterr().out
    monkeypatch.setattr(train.sample, "generate", exhausted)
    assert main(["sample", str(tmp_path / "run")]) == 2
    assert "--count" in one_error_line(capsys)


def test_a_model_that_does_not_fit_at_all(start, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.run, "init_on", exhausted)
    assert start(attention="dense", out=tmp_path / "run") == 2
    assert "checkpoint" not in one_error_line(capsys)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (SAID, ", asked for 16.00 GiB more. Buy more."),
        ("RESOURCE_EXHAUSTED: Failed to allocate 2.50GiB (2684354560 bytes)", ", asked for 2.50 GiB more. Buy more."),
        ("RESOURCE_EXHAUSTED: no room", ". Buy more."),
        ("INTERNAL: Error: Out of memory allocating 1073741824 bytes.", ", asked for 1.00 GiB more. Buy more."),
    ],
)
def test_what_was_asked_for_is_told_if_it_is_known(said, told):
    with pytest.raises(TrainError) as caught, out_of_memory_in_one_line(lambda: "Buy more."):
        raise jax.errors.JaxRuntimeError(said)
    device = r".+ ran out of memory( of [\d.]+ GiB)?"  # a GPU knows how much it has
    assert re.fullmatch(device + re.escape(told), str(caught.value))


def test_other_errors_stay_what_they_are():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), out_of_memory_in_one_line(lambda: ""):
        raise jax.errors.JaxRuntimeError("INTERNAL: broken")
