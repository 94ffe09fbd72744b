"""The command line of a run: read, checked and, with `--resume`, compared with that of the run to continue."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import tyro

from models import PRESETS
from train.config import Config, problem
from train.errors import TrainError
from train.folder import CONFIG_FILE, expanded, latest_run, load_config
from train.mesh import mesh_problem
from train.moa.plan import load_plan
from train.processes import connect

PATHS = ("data", "bpe", "cache")  # options of the data that may differ where a run goes on: they may have been moved


def parse(argv: Sequence[str] | None = None) -> Config:
    """Reads the command line and, with `--resume`, the options of the run to continue; joins other processes.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        A checked configuration whose data paths are absolute and whose dtype is decided. With `--resume`,
        `run.out` names the folder to continue.

    Raises:
        TrainError: An option makes no sense, there is no run to continue, an option contradicts the run, or other
            processes cannot be joined.
        SystemExit: tyro could not read the command line (code 2), or printed the help (code 0).
    """
    config = _read_arguments(argv, Config())
    connect(config.run.distributed)  # before anything asks JAX for its devices
    if not config.run.resume:
        # Again, with the values of the model that was named for what is not given.
        preset = PRESETS[config.model.preset]
        return _checked(_read_arguments(argv, Config(model=preset)), preset.attention)
    folder = expanded("out", config.run.out) if config.run.out else latest_run()
    stored = load_config(folder)
    # The options given now, on top of those of the run: what differs was asked for explicitly. Checked no
    # earlier, since options that do not fit the defaults may fit the run.
    asked = _checked(_read_arguments(argv, stored), stored.model.attention)
    differing = [
        f"--{name.replace('_', '-')} ({old} there, {new} here)"
        for section in ("model", "data", "optimizer")
        for name, old, new in _differences(getattr(stored, section), getattr(asked, section))
        if name not in PATHS  # the text and its tokens are compared themselves
    ]
    if differing:
        raise TrainError(
            f"{folder / CONFIG_FILE} was written with other options: {', '.join(differing)}. "
            f"Leave them out to continue that run, or start a new one without --resume."
        )
    return dataclasses.replace(asked, run=dataclasses.replace(asked.run, out=str(folder), resume=True))


def _read_arguments(argv: Sequence[str] | None, default: Config) -> Config:
    return tyro.cli(tyro.conf.OmitArgPrefixes[Config], args=argv, default=default, prog="python -m train")


def _checked(config: Config, attention: str) -> Config:
    """Fails on impossible options; makes the paths of the data absolute and decides the dtype.

    `attention` is what `--attention` is where it is not given.
    """
    wrong = config.model.problem() or problem(config) or mesh_problem(config)
    if wrong:
        raise TrainError(wrong)
    model, data = config.model, config.data
    if config.run.window_plan is not None:
        if model.attention != attention:
            raise TrainError(f"--window-plan takes the place of --attention, got {model.attention} too. Leave one out.")
        plan = load_plan(expanded("window-plan", config.run.window_plan), model.layers, model.heads)
        model = dataclasses.replace(model, attention=plan.attention)
    if model.dtype == "auto":
        on_cpu = jax.default_backend() == "cpu"
        model = dataclasses.replace(model, dtype="float32" if on_cpu else "bfloat16")
    data = dataclasses.replace(
        data, data=_absolute("data", data.data), bpe=_absolute("bpe", data.bpe), cache=_absolute("cache", data.cache)
    )
    return dataclasses.replace(config, model=model, data=data)


def _absolute(option: str, path: str | None) -> str | None:
    if path == "":  # as an unset variable of a shell gives; it would be the current folder
        raise TrainError(f"--{option} is empty. Name a path, or leave it out.")
    return None if path is None else str(expanded(option, path).resolve())


def _differences(old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    names = [entry.name for entry in dataclasses.fields(old)]
    pairs = [(name, getattr(old, name), getattr(new, name)) for name in names]
    return [pair for pair in pairs if pair[1] != pair[2]]
