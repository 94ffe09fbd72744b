"""The options of `python -m train`: dataclasses that tyro turns into a command line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import tyro

from models import ModelConfig
from train.errors import TrainError

CONFIG_FILE = "config.json"
RUNS_FOLDER = Path("runs")


@dataclass(frozen=True)
class DataConfig:
    """The text or the images."""

    data: str | None = None
    """A file of text or of JSON lines with a "text" key (.jsonl, .ndjson), each also as .gz or .zst; a folder or a
    quoted glob of such files; enwik8 by its name, which has its own split; or the folder of MNIST's idx files.
    Without it: the source files of the running Python's standard library."""
    tokenizer: Literal["bytes", "gpt2"] = "bytes"
    """Of text: its bytes, or GPT-2's byte pairs, made once and kept in the cache."""
    bpe: str | None = None
    """Folder with GPT-2's encoder.json and vocab.bpe."""
    documents: Literal["together", "separate"] = "together"
    """Whether attention reaches over the documents of a sequence, or each sees only itself."""
    cache: str | None = None
    """Folder for tokenised text. Default: scfa_jax in the user's folder for caches."""
    seq_len: int = 256
    """Tokens a sequence; 784 for MNIST."""
    batch_size: int = 8
    """Sequences a step."""
    held_out: float = 0.05
    """Share of the data, at its end, that is kept for evaluation; enwik8 and MNIST also have a test part."""


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer: AdamW, a warmup and then a cosine, clipping by the global norm."""

    steps: int = 600
    """Steps that the learning-rate schedule spans."""
    lr: float = 3e-3
    """Highest learning rate; the schedule ends at a tenth of it."""
    warmup: int = 50
    """Steps until the highest learning rate; at most one less than --steps."""
    weight_decay: float = 0.1
    """AdamW's weight decay, of matrices only."""
    clip: float = 1.0
    """Largest global norm of the gradients."""
    seed: int = 0
    """Decides the first parameters, the order of the data, the hashing and the dropping."""


@dataclass(frozen=True)
class RunConfig:
    """The run."""

    out: str | None = None
    """Folder of the run. Default: a new one under runs/, or with --resume the one last written to."""
    resume: bool = False
    """Continue a run from its last checkpoint, with the options that it was started with."""
    seconds: float | None = None
    """Stop, with a checkpoint, after this much time spent training."""
    stop_at: int | None = None
    """Stop, with a checkpoint, after this step; the schedule still spans --steps."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    eval_every: int = 150
    """Steps between two evaluations on held-out text."""
    eval_tokens: int = 65_536
    """Held-out tokens an evaluation reads at most, spread evenly; 0 for all."""
    checkpoint_every: int = 300
    """Steps between two checkpoints; there is always one at the end."""
    prompt: str | None = None
    """What the final sample starts from. Default: the beginning of the held-out text."""
    sample_length: int = 256
    """Bytes that the final sample generates."""
    temperature: float = 0.8
    """Of the final sample; 0 takes the likeliest byte."""


@dataclass(frozen=True)
class Config:
    """Train a language model with dense or sparse causal attention."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)


def parse(argv: Sequence[str] | None = None) -> Config:
    """Reads the command line and, with `--resume`, the options of the run to continue.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        A checked configuration whose data paths are absolute and whose dtype is decided. With `--resume`,
        `run.out` names the folder to continue.

    Raises:
        TrainError: An option makes no sense, there is no run to continue, or an option contradicts the run.
        SystemExit: tyro could not read the command line (code 2), or printed the help (code 0).
    """
    config = _read_arguments(argv, Config())
    if not config.run.resume:
        return _checked(config)
    folder = _expanded("out", config.run.out) if config.run.out else latest_run()
    stored = load_config(folder)
    # The options given now, on top of those of the run: what differs was asked for explicitly. Checked no
    # earlier, since options that do not fit the defaults may fit the run.
    asked = _checked(_read_arguments(argv, stored))
    differing = [
        f"--{name.replace('_', '-')} ({old} there, {new} here)"
        for section in ("model", "data", "optimizer")
        for name, old, new in _differences(getattr(stored, section), getattr(asked, section))
    ]
    if differing:
        raise TrainError(
            f"{folder / CONFIG_FILE} was written with other options: {', '.join(differing)}. "
            f"Leave them out to continue that run, or start a new one without --resume."
        )
    return dataclasses.replace(asked, run=dataclasses.replace(asked.run, out=str(folder), resume=True))


def save_config(folder: Path, config: Config, facts: dict[str, Any]) -> None:
    """Writes `config.json`: the options, and `facts` about the data, the versions and the device."""
    record = {"config": dataclasses.asdict(config), **facts}
    temporary = folder / (CONFIG_FILE + ".part")
    try:
        temporary.write_text(json.dumps(record, indent=2) + "\n")
        temporary.replace(folder / CONFIG_FILE)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def load_facts(folder: Path) -> dict[str, Any]:
    """Reads all that `save_config` wrote.

    Raises:
        TrainError: There is no such file, or it cannot be read.
    """
    path = folder / CONFIG_FILE
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        raise TrainError(f"{folder} holds no run: {path} is missing. Name the run's folder with --out.") from None
    except (OSError, ValueError) as error:
        raise TrainError(f"{path} cannot be read ({error}). Start a new run without --resume.") from None
    if not isinstance(record, dict):
        raise TrainError(f"{path} holds no options of a run. Start a new run without --resume.")
    return record


def load_config(folder: Path) -> Config:
    """The options a run was started with, less those that hold for one session only.

    Raises:
        TrainError: `config.json` is missing or was written by another version of this program.
    """
    sections: dict[str, Any] = load_facts(folder).get("config", {})
    try:
        run = {**sections["run"], "out": str(folder), "resume": False, "seconds": None, "stop_at": None}
        return Config(
            model=ModelConfig(**sections["model"]),
            data=DataConfig(**sections["data"]),
            optimizer=OptimizerConfig(**sections["optimizer"]),
            run=RunConfig(**run),
        )
    except (KeyError, TypeError) as error:
        path = folder / CONFIG_FILE
        raise TrainError(
            f"{path} does not fit this version of the program ({error}). Start a new run without --resume."
        ) from None


def latest_run() -> Path:
    """The folder under `runs/` that was written to last.

    Raises:
        TrainError: There is none.
    """
    folders = [path.parent for path in RUNS_FOLDER.glob(f"*/{CONFIG_FILE}")]
    if not folders:
        raise TrainError(f"--resume found no run under {RUNS_FOLDER}/. Name its folder with --out.")
    return max(folders, key=lambda folder: max(path.stat().st_mtime_ns for path in folder.iterdir()))


def new_run_folder(config: Config) -> Path:
    """Where a new run goes: `--out`, or the first free name under `runs/`.

    Raises:
        TrainError: `--out` already holds a run.
    """
    if config.run.out:
        folder = _expanded("out", config.run.out)
        if (folder / CONFIG_FILE).exists():
            raise TrainError(f"{folder} already holds a run. Add --resume to continue it, or choose another --out.")
        return folder
    text = "stdlib" if config.data.data is None else Path(config.data.data).name.split(".")[0].strip("*?[]") or "texts"
    name = f"{text}-{config.model.attention.replace(',', '-').replace(' ', '')}"
    folder, count = RUNS_FOLDER / name, 1
    while folder.exists():
        count += 1
        folder = RUNS_FOLDER / f"{name}-{count}"
    return folder


def _read_arguments(argv: Sequence[str] | None, default: Config) -> Config:
    return tyro.cli(tyro.conf.OmitArgPrefixes[Config], args=argv, default=default, prog="python -m train")


def _checked(config: Config) -> Config:
    """Fails on impossible options; makes the paths of the data absolute and decides the dtype."""
    problem = config.model.problem() or _problem(config)
    if problem:
        raise TrainError(problem)
    model, data = config.model, config.data
    if model.dtype == "auto":
        on_cpu = jax.default_backend() == "cpu"
        model = dataclasses.replace(model, dtype="float32" if on_cpu else "bfloat16")
    data = dataclasses.replace(
        data, data=_absolute("data", data.data), bpe=_absolute("bpe", data.bpe), cache=_absolute("cache", data.cache)
    )
    return dataclasses.replace(config, model=model, data=data)


def _absolute(option: str, path: str | None) -> str | None:
    return None if path is None else str(_expanded(option, path).resolve())


def _expanded(option: str, path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise TrainError(f"--{option}: {path} names no home folder ({error}). Write the path in full.") from None


def _problem(config: Config) -> str | None:
    data, optimizer, run = config.data, config.optimizer, config.run
    at_least_one = {
        "seq-len": data.seq_len,
        "batch-size": data.batch_size,
        "steps": optimizer.steps,
        "log-every": run.log_every,
        "eval-every": run.eval_every,
        "checkpoint-every": run.checkpoint_every,
        "sample-length": run.sample_length,
        "stop-at": 1 if run.stop_at is None else run.stop_at,
    }
    above_zero = {
        "lr": optimizer.lr,
        "clip": optimizer.clip,
        "seconds": 1.0 if run.seconds is None else run.seconds,
    }
    not_negative = {
        "warmup": optimizer.warmup,
        "weight-decay": optimizer.weight_decay,
        "eval-tokens": run.eval_tokens,
        "temperature": run.temperature,
        "seed": optimizer.seed,
    }
    for name, number in at_least_one.items():
        if number < 1:
            return f"--{name} must be at least 1, got {number}."
    for name, amount in above_zero.items():
        if not amount > 0:
            return f"--{name} must be above 0, got {amount}."
    for name, amount in not_negative.items():
        if not amount >= 0:
            return f"--{name} must not be negative, got {amount}."
    if optimizer.seed >= 2**32:
        return f"--seed must be below 2**32, got {optimizer.seed}."
    if not 0 < data.held_out < 1:
        return f"--held-out must lie between 0 and 1, got {data.held_out}."
    return None


def _differences(old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    names = [entry.name for entry in dataclasses.fields(old)]
    pairs = [(name, getattr(old, name), getattr(new, name)) for name in names]
    return [pair for pair in pairs if pair[1] != pair[2]]
