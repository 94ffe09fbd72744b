"""`python -m benchmarks.experiments NAME` trains the models of an experiment and puts them side by side.

Each run is a `python -m train` in a process of its own, one after another. Results are on disk after each; a run that
is there already is not repeated, and one that a time limit or Ctrl-C ended goes on from its checkpoint, so that an
experiment can be done in parts. `python -m benchmarks.experiments list` says what there is.
"""

from __future__ import annotations

import math
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks import results
from benchmarks.run import RESULTS
from train.folder import load_config, load_facts
from train.metrics import read_metrics
from train.plot import plot_bucket_sizes, plot_losses, plot_speed_and_buckets
from train.report import summary, table
from train.sample import SAMPLE_FILES


@dataclass(frozen=True)
class Experiment:
    """Runs that differ in what is named alone.

    Attributes:
        data: File or folder in `--data`.
        shared: Options of all runs.
        runs: Further options of each, by its name; speeds are told relative to the first.
    """

    data: str
    shared: str
    runs: Mapping[str, str]


_LONG_TEXT = "--preset bytes --batch-size 4 --lr 1e-3 --sample-length 0"
_EVALUATED = "--eval-every 250 --eval-tokens 1000000 --log-every 25 --checkpoint-every 500"


def _kinds(length: int) -> dict[str, str]:
    """All kinds of attention, the sparse ones with 1/16 of the causal pairs, but for the paper's share of dropping."""
    keys = length // 32  # of a query, in the mean
    return {
        "dense": "--attention dense",
        "hash": "--attention hash",
        "hash-learned": "--attention hash --hash learned",
        "hash-kmeans": "--attention hash --hash kmeans",
        "hash-permutation": "--attention hash --hash permutation",
        "reformer": "--attention reformer",
        "qk-30": "--attention qk --drop-rate 0.3",
        "qk-75": "--attention qk --drop-rate 0.75",
        "topk-norm": "--attention topk --drop-rate 0.9375",
        "topk-learned": "--attention topk --drop-rate 0.9375 --keep-score learned",
        "sparsek": f"--attention sparsek --sparsek-keys {keys // 2} --sparsek-window {keys // 2 - 32}",
        "window": f"--attention window --window {keys}",
        "longformer": f"--attention longformer --window {keys // 2} --stride 64",
        "bigbird": f"--attention bigbird --window {keys - 64} --num-random 2",
        "strided": f"--attention strided --stride {keys - 16}",
        "fixed": f"--attention fixed --stride {keys // 2} --num-summaries {3 * keys // 128}",
        "identity": "--attention identity",
    }


EXPERIMENTS = {
    "bytes-8k": Experiment(
        "wikipedia_long.jsonl.gz",
        f"{_LONG_TEXT} {_EVALUATED} --seq-len 8192 --steps 2000 --warmup 200",
        {
            "dense": "--attention dense",
            "hash": "--attention hash",
            "qk": "--attention qk --drop-rate 0.3",
            "reformer": "--attention reformer",
            "hash-seed-1": "--attention hash --seed 1",
            "dense-seed-1": "--attention dense --seed 1",
            "dense-shared": "--attention dense --share-query-key True --normalize-key True",
            "dense-hash": "--attention dense,hash",
        },
    ),
    "mnist": Experiment(
        "mnist",
        "--preset mnist --seq-len 784 --batch-size 64 --lr 1e-3 --steps 2500 --warmup 200 --eval-every 500 "
        "--eval-tokens 784000 --log-every 50 --checkpoint-every 1000",
        {
            "dense": "--attention dense",
            "hash": "--attention hash",
            "reformer": "--attention reformer",
            "hash-seed-1": "--attention hash --seed 1",
        },
    ),
    # The same time, not the same steps: each decays its learning rate over the steps that take three minutes.
    "enwik8": Experiment(
        "enwik8_prefix.gz",
        "--preset bytes --batch-size 8 --seq-len 4096 --lr 1e-3 --warmup 200 --eval-every 200 --eval-tokens 0 "
        "--log-every 25 --checkpoint-every 500 --sample-length 0 --seconds 240",
        {"hash": "--attention hash --steps 2400", "reformer": "--attention reformer --steps 1300"},
    ),
    "deterministic": Experiment(
        "wikipedia_long.jsonl.gz",
        f"{_LONG_TEXT} --seq-len 8192 --steps 300 --warmup 30 --eval-every 300 --eval-tokens 100000 --log-every 25",
        {
            f"{kind}{name}": f"--attention {kind} {option}"
            for kind in ("dense", "hash")
            for name, option in (("", ""), ("-deterministic", "--deterministic"))
        },
    ),
    "kinds-8k": Experiment(
        "wikipedia_long.jsonl.gz", f"{_LONG_TEXT} {_EVALUATED} --seq-len 8192 --steps 1000 --warmup 100", _kinds(8192)
    ),
    "kinds-16k": Experiment(
        "wikipedia_long.jsonl.gz",
        f"{_LONG_TEXT} {_EVALUATED} --seq-len 16384 --steps 500 --warmup 50".replace("size 4", "size 2"),
        _kinds(16_384),
    ),
}
# Of a line of metrics; the others are in the summary or say the same in other words.
_KEPT = ("step", "seconds", "train_seconds", "tokens_per_second", "loss")
_UNITS = ("byte", "pixel")
COMMAND = [sys.executable, "-m", "train"]


@dataclass(frozen=True)
class Options:
    """Train the models of an experiment, one after another, and put them side by side."""

    name: tyro.conf.Positional[str]
    """Of the experiment, or list."""
    data: Path = Path()
    """Folder of the data."""
    only: str | None = None
    """Runs to make, separated by commas; by default all."""
    time_limit: float | None = None
    """Seconds after which the run under way is stopped, and no other begun."""
    steps: int | None = None
    """Steps of every run, in place of the experiment's, for a trial."""
    runs: Path = Path("runs")
    """Folder for the runs themselves."""
    out: Path | None = None
    """Folder of NAME.json and plots. By default benchmarks/results/DEVICE."""


def run_experiment(options: Options) -> int:
    """Makes the runs that are missing, and writes results after each.

    Args:
        options: From the command line.

    Returns:
        0 if all runs are there, 1 otherwise.

    Raises:
        ValueError: There is no such experiment or run, or the results are of another device.
    """
    if options.name not in EXPERIMENTS:
        raise ValueError(f"there is no experiment {options.name!r}: {', '.join(EXPERIMENTS)}")
    experiment = EXPERIMENTS[options.name]
    chosen = list(experiment.runs) if options.only is None else options.only.split(",")
    if unknown := [name for name in chosen if name not in experiment.runs]:
        raise ValueError(f"{options.name} has no run {unknown[0]!r}: {', '.join(experiment.runs)}")
    folder = options.out or RESULTS / results.device_slug()
    file = folder / f"{options.name}.json"
    record: dict[str, Any] = {"format": results.FORMAT, "experiment": options.name, "runs": {}}
    if file.exists():
        record = results.read(file)
    start = time.monotonic()
    for name in chosen:
        if name in record["runs"]:
            continue
        left = math.inf if options.time_limit is None else options.time_limit - (time.monotonic() - start)
        if left <= 0:
            break
        run, command = options.runs / options.name / name, arguments(experiment, name, options)
        print(f"== {name}: python -m train {shlex.join(command)}", flush=True)
        code = train(command if not (run / "checkpoints").exists() else ["--resume", "--out", str(run)], left)
        if code:
            print(f"{name} ended with code {code}: not in the results", file=sys.stderr)
            continue
        record["runs"][name] = result(name, run, shlex.join(command))
        record["runs"] = {known: record["runs"][known] for known in experiment.runs if known in record["runs"]}
        write(record, file)
        if (run / SAMPLE_FILES["images"]).exists():
            shutil.copy(run / SAMPLE_FILES["images"], folder / f"{options.name}-{name}.png")
    if record["runs"]:
        print(side_by_side(record))
        print(f"results: {file}")
    return int(not set(chosen) <= set(record["runs"]))


def arguments(experiment: Experiment, name: str, options: Options) -> list[str]:
    """The arguments of `python -m train` for a run."""
    parts = [*experiment.shared.split(), *experiment.runs[name].split()]
    if options.steps is not None:
        parts += ["--steps", str(options.steps), "--warmup", str(options.steps // 10)]
        parts += ["--eval-every", str(options.steps), "--log-every", str(max(1, options.steps // 4))]
        parts += ["--eval-tokens", "1"]
    out = options.runs / options.name / name
    return [*parts, "--data", str(options.data / experiment.data), "--out", str(out)]


def train(command: Sequence[str], seconds: float) -> int:
    """Calls `python -m train`, and stops it with a checkpoint after so many seconds.

    Args:
        command: Its arguments.
        seconds: May be infinite.

    Returns:
        Its exit code, above 128 where it was stopped and saved a checkpoint.
    """
    child = subprocess.Popen([*COMMAND, *command])
    try:
        return child.wait(None if math.isinf(seconds) else seconds)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGTERM)
        return child.wait()
    except KeyboardInterrupt:  # which the child got too
        return child.wait()


def result(name: str, run: Path, command: str) -> dict[str, Any]:
    """What the results hold of a run.

    Args:
        name: Of the run.
        run: Its folder.
        command: What made it.
    """
    config, facts, history = load_config(run), load_facts(run), read_metrics(run)
    unit = next(unit for unit in _UNITS if f"held_out_bits_per_{unit}" in history[-1])
    kept = [*_KEPT, f"bits_per_{unit}", f"held_out_bits_per_{unit}"]
    lines = [
        {key: x for key, x in line.items() if key in kept or key.startswith("bucket_")}
        for line in history
        if "compile_seconds" not in line
    ]
    return {
        "environment": results.environment(f"python -m train {command}"),
        "unit": unit,
        "summary": summary(name, config, facts.get("device", {}).get("kind", ""), history, unit, None),
        "history": [_rounded(line) for line in lines],
    }


def write(record: dict[str, Any], file: Path) -> None:
    """Writes the results and draws them.

    Args:
        record: The results.
        file: Where to; plots stand beside it, under its name.
    """
    results.write(file, record)
    histories = {name: run["history"] for name, run in record["runs"].items()}
    tokens = {name: run["summary"]["tokens_per_step"] for name, run in record["runs"].items()}
    plot_losses(histories, "", file.with_name(f"{file.stem}-loss.png"))
    plot_speed_and_buckets(histories, tokens, file.with_name(f"{file.stem}-speed.png"))
    if "hash" in histories:
        plot_bucket_sizes(histories["hash"], "hash", file.with_name(f"{file.stem}-buckets.png"))


def side_by_side(record: dict[str, Any]) -> str:
    """The results as a table in Markdown."""
    runs = list(record["runs"].values())
    rows = [dict(run["summary"]) for run in runs]
    for row in rows:
        row["speed_up"] = row["tokens_per_second"] / rows[0]["tokens_per_second"]
    return table(rows, runs[0]["unit"], None)


def _rounded(x: Any) -> Any:
    if isinstance(x, dict):
        return {name: _rounded(entry) for name, entry in x.items()}
    if isinstance(x, list):
        return [_rounded(entry) for entry in x]
    return float(f"{x:.6g}") if isinstance(x, float) else x


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; 2 for a mistake in the arguments."""
    options = tyro.cli(Options, args=argv, prog="python -m benchmarks.experiments", description=__doc__)
    if options.name == "list":
        for name, experiment in EXPERIMENTS.items():
            print(f"{name}: {experiment.data}, {experiment.shared}")
            print("".join(f"  {run}: {more}\n" for run, more in experiment.runs.items()), end="")
        return 0
    try:
        return run_experiment(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
