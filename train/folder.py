"""The folder of a run: where it lies, and the `config.json` that says what it is."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import typing
from pathlib import Path
from typing import Any

import jax
import typeguard

from models import ModelConfig
from train.config import Config, DataConfig, OptimizerConfig, RunConfig, problem
from train.data import Corpus
from train.errors import TrainError
from train.files import cannot_be, write_whole
from train.metrics import METRICS_FILE
from train.processes import first_does

CONFIG_FILE = "config.json"
RUNS_FOLDER = Path("runs")
SECTIONS = ("config", "corpus", "versions", "device")  # of the file
ATTENTION_IN_NAME = 64  # characters: that of a window plan has thousands
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def open_folder(config: Config, corpus: Corpus) -> Path:
    """Makes the run's folder with its `config.json`, or checks that the one to resume read the same text.

    Of several processes the first makes it, and the others find the name in `--out`.
    """
    if config.run.resume:
        folder = Path(config.run.out or "")
        facts = load_facts(folder)
        check_corpus(folder, corpus)
        changed = _changed(facts, facts_of(corpus), config)
        if changed:
            print(f"note: the run goes on, but perhaps not bit for bit: {changed}")
        return folder
    made: list[Path] = []
    first_does(lambda: made.append(_make_folder(config, corpus)))
    return made[0] if made else expanded("out", config.run.out or "")


def check_corpus(folder: Path, corpus: Corpus) -> None:
    """Fails where a corpus is not the one that a run was trained on.

    Raises:
        TrainError: It is another, or it is cut into other parts or tokens.
    """
    stored = load_facts(folder).get("corpus", {})
    if stored.get("sha256") != corpus.sha256:
        raise TrainError(
            f"{folder / CONFIG_FILE} was written for another text ({stored.get('name')}) than the one "
            f"found now ({corpus.name}). Bring that text back, or name it with --data."
        )


def moved(config: Config, data: str | None, bpe: str | None) -> Config:
    """The configuration with other paths of the data and of the byte pairs' files, where they are given."""
    paths = {"data": data, "bpe": bpe}
    given: dict[str, Any] = {
        name: str(expanded(name, path).resolve()) for name, path in paths.items() if path is not None
    }
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **given))


def _make_folder(config: Config, corpus: Corpus) -> Path:
    folder: Path | None = None
    try:
        folder = new_run_folder(config)
        folder.mkdir(parents=True, exist_ok=True)
        save_config(folder, config, facts_of(corpus))
    except OSError as error:
        if folder is not None:
            with contextlib.suppress(OSError):
                folder.rmdir()  # it is empty, unless it held something before
        name = error.filename or config.run.out
        raise cannot_be("written", name, error, "Choose another folder with --out.") from None
    return folder


def facts_of(corpus: Corpus) -> dict[str, Any]:
    """What was read, and the commit, the versions and the device that it is read with."""
    device = jax.devices()[0]
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "corpus": corpus.facts,
        "commit": commit(),
        "versions": {"python": platform.python_version(), **versions},
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "cpu_cores": os.cpu_count(),
        },
    }


def commit() -> str | None:
    """The commit of this program; SCFA_COMMIT names it where there is no repository. None where nothing does."""
    named = os.environ.get("SCFA_COMMIT")
    if named:
        return named
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _changed(old: dict[str, Any], new: dict[str, Any], config: Config) -> str:
    """Versions, devices and the mesh, where they differ, for people; empty if none does."""
    sections = {"versions": (*PACKAGES,), "device": ("kind", "cpu_cores")}
    pairs = [
        (name, old.get(section, {}).get(name), new[section][name])
        for section, names in sections.items()
        for name in names
    ]
    pairs.append(("mesh", old["config"]["run"].get("mesh"), config.run.mesh))
    return ", ".join(f"{name} was {before}, is {now}" for name, before, now in pairs if before != now)


def save_config(folder: Path, config: Config, facts: dict[str, Any]) -> None:
    """Writes `config.json`: the options, and `facts` about the data, the program and the device."""
    record = {"config": dataclasses.asdict(config), **facts}
    write_whole(folder / CONFIG_FILE, json.dumps(record, indent=2) + "\n")


def load_facts(folder: Path) -> dict[str, Any]:
    """Reads all that `save_config` wrote.

    Raises:
        TrainError: There is no such file, or it cannot be read.
    """
    path = folder / CONFIG_FILE
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        raise TrainError(f"{folder} holds no run: {path} is missing. Name the folder of a run.") from None
    except (OSError, ValueError) as error:
        raise TrainError(f"{path} cannot be read ({error}). Bring it back, or start a new run.") from None
    if not isinstance(record, dict) or not all(isinstance(record.get(name, {}), dict) for name in SECTIONS):
        raise TrainError(f"{path} holds no options of a run. Bring it back, or start a new run.")
    return record


def load_config(folder: Path) -> Config:
    """The options a run was started with, less those that hold for one session only.

    Raises:
        TrainError: `config.json` is missing, damaged, or was written by another version of this program.
    """
    sections: dict[str, Any] = load_facts(folder).get("config", {})
    try:
        of_session = {"out": str(folder), "resume": False, "seconds": None, "stop_at": None, "window_plan": None}
        of_session["distributed"] = None
        run = {**sections["run"], **of_session}
        config = Config(
            model=ModelConfig(**sections["model"]),
            data=DataConfig(**sections["data"]),
            optimizer=OptimizerConfig(**sections["optimizer"]),
            run=RunConfig(**run),
        )
        for section in (config.model, config.data, config.optimizer, config.run):
            _check_types(section)
        wrong = problem(config)
        if wrong:
            raise ValueError(wrong)
    except (KeyError, TypeError, ValueError) as error:
        path = folder / CONFIG_FILE
        raise TrainError(
            f"{path} does not fit this version of the program ({error}). Start a new run, or use that version."
        ) from None
    return config


def _check_types(section: Any) -> None:
    """Fails where a field is not of the type that its dataclass says: JSON may hold anything."""
    for name, kind in typing.get_type_hints(type(section)).items():
        try:
            typeguard.check_type(getattr(section, name), kind)
        except typeguard.TypeCheckError as error:
            raise TypeError(f"{name}: {' '.join(str(error).split())}") from None


def latest_run() -> Path:
    """The folder under `runs/` whose training began or went on last.

    Raises:
        TrainError: There is none.
    """
    folders = [path.parent for path in RUNS_FOLDER.glob(f"*/{CONFIG_FILE}")]
    if not folders:
        raise TrainError(f"--resume found no run under {RUNS_FOLDER}/. Name its folder with --out.")
    # Samples and evaluations write to a run's folder as well.
    trained = lambda folder: [folder / name for name in (CONFIG_FILE, METRICS_FILE) if (folder / name).exists()]
    return max(folders, key=lambda folder: max(path.stat().st_mtime_ns for path in trained(folder)))


def new_run_folder(config: Config) -> Path:
    """Where a new run goes: `--out`, or the first free name under `runs/`.

    Raises:
        TrainError: `--out` already holds a run.
    """
    if config.run.out:
        folder = expanded("out", config.run.out)
        if (folder / CONFIG_FILE).exists():
            raise TrainError(f"{folder} already holds a run. Add --resume to continue it, or choose another --out.")
        return folder
    text = "stdlib" if config.data.data is None else Path(config.data.data).name.split(".")[0].strip("*?[]") or "texts"
    attention = re.sub(r"[^\w.]+", "-", config.model.attention).strip("-")[:ATTENTION_IN_NAME]
    name = f"{text}-{attention}"
    folder, count = RUNS_FOLDER / name, 1
    while folder.exists():
        count += 1
        folder = RUNS_FOLDER / f"{name}-{count}"
    return folder


def expanded(option: str, path: str) -> Path:
    """A path with `~` written out.

    Raises:
        TrainError: It names no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise TrainError(f"--{option}: {path} names no home folder ({error}). Write the path in full.") from None
