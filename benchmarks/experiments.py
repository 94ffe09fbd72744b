"""`python -m benchmarks.experiments NAME` trains the models of an experiment and puts them side by side.

Each run is a `python -m train` in a process of its own, one after another, or some at once, each on a GPU of its own.
Results are on disk after each; a run that is there already is not repeated, and one that a time limit or Ctrl-C ended
goes on from its checkpoint, so that an experiment can be done in parts. `python -m benchmarks.experiments list` says
what there is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks import results
from benchmarks.run import RESULTS
from train.evaluate import read_evaluation
from train.folder import load_config, load_facts
from train.metrics import read_metrics
from train.plot import plot_bucket_sizes, plot_losses, plot_speed_and_buckets
from train.report import compare, summary, table
from train.sample import SAMPLE_FILES


@dataclass(frozen=True)
class Experiment:
    """Runs that differ in what is named alone.

    Attributes:
        data: File or folder in `--data`.
        shared: Options of all runs; FOLDER in them is `--data`.
        runs: Further options of each, by its name; speeds are told relative to the first.
        has_test: Whether the best checkpoint is evaluated on a test part as well.
    """

    data: str
    shared: str
    runs: Mapping[str, str]
    has_test: bool = False


_BYTES = "--preset bytes --sample-length 0"
_LONG_TEXT = f"{_BYTES} --lr 1e-3"
_EVALUATED = "--eval-every 250 --eval-tokens 1000000 --log-every 25 --checkpoint-every 500"


def _kinds(length: int) -> dict[str, str]:
    """The options of all kinds of attention, the sparse ones with 1/16 of the causal pairs but for those that drop.

    Windows beside buckets come on top.
    """
    keys = length // 32  # of a query, in the mean
    own_keys = "share_query_key=False, normalize_key=False, exclude_self=False"
    kinds = {
        "dense": "dense",
        "hash": "hash(16)",
        "hash-window": "hash(16, local_window=128)",
        "hash-window-own-keys": f"hash(16, local_window=128, {own_keys})",
        "hash-learned": "hash(16, by=learned)",
        "hash-kmeans": "hash(16, by=kmeans)",
        "hash-permutation": "hash(16, by=permutation)",
        "reformer": "reformer(16)",
        "qk-30": "drop(0.3)",
        "qk-75": "drop(0.75)",
        "qk-75-always": "drop(0.75, drop_at_evaluation=True)",
        "sparsek": f"sparsek({keys // 2}, window={keys // 2 - 32}, chunk_size=64)",
        "window": f"window({keys}, num_sinks=4)",
        "longformer": f"longformer({keys // 2}, stride=64)",
        "bigbird": f"bigbird({keys - 64}, num_global=4, num_random=2, block_size=32)",
        "strided": f"strided({keys - 16})",
        "fixed": f"fixed({keys // 2}, num_summaries={3 * keys // 128})",
        "identity": "identity",
    }
    return {name: _with_attention(kind) for name, kind in kinds.items()}


def _with_attention(text: str) -> str:
    return f"--attention {shlex.quote(text)}"


def _with_another_seed(runs: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """The runs, and some of them once more, named `NAME-seed-1`."""
    return {**runs, **{f"{name}-seed-1": f"{runs[name]} --seed 1" for name in names}}


def _mixes(window: int, length: int) -> dict[str, str]:
    """Dense attention, and windows with one global layer in six or without: the kinds of the frontier, by name."""
    windows, own_keys = f"window({window}, num_sinks=4)", _kinds(length)["hash-window-own-keys"].split("'")[1]
    return {
        "dense": "cudnn",
        "windows-dense": f"{windows}*5, cudnn",
        "windows-moba": f"{windows}*5, moba(256, top_k=4)",
        "moba": "moba(256, top_k=4)",
        "windows-hash": f"{windows}*5, hash(16)",
        "windows-hash-own-keys": f"{windows}*5, {own_keys}",
        "windows": windows,
        "dense-shared": "cudnn(share_query_key=True, normalize_key=True)",
    }


def _frontier(kinds: Mapping[str, str], horizons: Sequence[int], seeds: Sequence[int]) -> dict[str, str]:
    """Each kind on a schedule of its own for each horizon, for each seed: the longest ones first."""
    return {
        f"{name}-{steps}" + (f"-seed-{seed}" if seed else ""): f"{_with_attention(kind)} --steps {steps}"
        f" --warmup {steps // 20}" + (f" --seed {seed}" if seed else "")
        for seed in seeds
        for steps in horizons
        for name, kind in kinds.items()
    }


_PAPERS = {name: _kinds(8192)[name] for name in ("dense", "hash", "qk-30", "reformer")}
_BPE = "--preset gpt2-small --tokenizer gpt2 --bpe FOLDER/gpt2_bpe --lr 6e-4 --warmup 150 --sample-length 0"

EXPERIMENTS = {
    "bytes-8k": Experiment(
        "wikipedia_long.jsonl.gz",
        f"{_LONG_TEXT} {_EVALUATED} --batch-size 4 --seq-len 8192 --steps 4000 --warmup 200",
        {
            **_with_another_seed(_kinds(8192), ("dense", "hash", "qk-30", "reformer", "sparsek", "qk-75")),
            "dense-shared": _with_attention("dense(share_query_key=True, normalize_key=True)"),
            "dense-hash": _with_attention("dense, hash(16)"),
            "window-hash": _with_attention("window(256, num_sinks=4), hash(16)"),
        },
    ),
    # Blocks that queries choose, beside all pairs, blocks chosen at random, and a window of as many pairs.
    "blocks-8k": Experiment(
        "wikipedia_long.jsonl.gz",
        f"{_LONG_TEXT} {_EVALUATED} --batch-size 4 --seq-len 8192 --steps 2000 --warmup 100",
        {
            name: _with_attention(kind)
            for name, kind in {
                "dense": "cudnn",
                "moba-256": "moba(256, top_k=4)",
                "random-256": "random_blocks(256, top_k=4)",
                "nsa": "nsa(block_size=64, top_k=8, window=256)",
                "moba-64": "moba(64, top_k=4)",
                "window": "window(896)",
                "random-64": "random_blocks(64, top_k=4)",
                "moba-256-before-rotary": "moba(256, top_k=4, before_rotary=True)",
                "oracle-256": "oracle_blocks(256, top_k=4)",
            }.items()
        },
    ),
    # The same time, not the same steps: each decays its learning rate over the steps that took as long in bytes-8k as
    # those of dense.
    "bytes-8k-time": Experiment(
        "wikipedia_long.jsonl.gz",
        f"{_LONG_TEXT} {_EVALUATED} --batch-size 4 --seq-len 8192 --warmup 200",
        {
            name: f"{_kinds(8192)[name]} --steps {steps}"
            for name, steps in (
                ("dense", 4000),
                ("strided", 7200),
                ("window", 6900),
                ("hash-window-own-keys", 6400),
                ("qk-30", 5250),
                ("sparsek", 4450),
                ("hash", 8450),
            )
        },
    ),
    "bytes-16k": Experiment(
        "wikipedia_long.jsonl.gz",
        f"{_LONG_TEXT} {_EVALUATED} --batch-size 2 --seq-len 16384 --steps 2000 --warmup 200",
        _kinds(16_384),
    ),
    # Final quality against time: every point is the end of a schedule of its own.
    "frontier-16k": Experiment(
        "wikipedia_long.jsonl.gz",
        f"{_LONG_TEXT} {_EVALUATED} --batch-size 2 --seq-len 16384",
        _frontier(_mixes(512, 16_384), horizons=(4000, 2000, 1000), seeds=(0, 1, 2)),
    ),
    # What learning rate suits the kinds of the frontier: a quarter of its longest horizon.
    "rates-16k": Experiment(
        "wikipedia_long.jsonl.gz",
        f"{_BYTES} {_EVALUATED} --batch-size 2 --seq-len 16384 --steps 1000 --warmup 50",
        {
            f"{name}-{rate}": f"{_with_attention(kind)} --lr {rate}"
            for name, kind in _mixes(512, 16_384).items()
            for rate in ("5e-4", "1e-3", "2e-3")
        },
    ),
    "bpe-8k": Experiment(
        "wikipedia_long.jsonl.gz",
        f"{_BPE} {_EVALUATED} --batch-size 4 --seq-len 8192 --steps 1500",
        _PAPERS,
    ),
    "bpe-16k": Experiment(
        "wikipedia_long.jsonl.gz",
        f"{_BPE} {_EVALUATED} --batch-size 2 --seq-len 16384 --steps 1000",
        _PAPERS,
    ),
    "mnist": Experiment(
        "mnist",
        "--preset mnist --seq-len 784 --batch-size 64 --lr 1e-3 --steps 5000 --warmup 200 --eval-every 500 "
        "--eval-tokens 784000 --log-every 50 --checkpoint-every 1000",
        _with_another_seed(
            {name: _PAPERS[name] for name in ("dense", "hash", "reformer")}, ("dense", "hash", "reformer")
        ),
        has_test=True,
    ),
    # The same time, not the same steps: each decays its learning rate over the steps that take three minutes.
    "enwik8": Experiment(
        "enwik8_prefix.gz",
        "--preset bytes --batch-size 8 --seq-len 4096 --lr 1e-3 --warmup 200 --eval-every 200 --eval-tokens 0 "
        "--log-every 25 --checkpoint-every 500 --sample-length 0",
        _with_another_seed(
            {"hash": f"{_PAPERS['hash']} --steps 13000", "reformer": f"{_PAPERS['reformer']} --steps 2700"},
            ("hash", "reformer"),
        ),
        has_test=True,
    ),
    "deterministic": Experiment(
        "wikipedia_long.jsonl.gz",
        f"{_LONG_TEXT} --batch-size 4 --seq-len 8192 --steps 300 --warmup 30 "
        "--eval-every 300 --eval-tokens 100000 --log-every 25",
        {
            f"{kind}{name}": f"{_PAPERS[kind]} {option}"
            for kind in ("dense", "hash")
            for name, option in (("", ""), ("-deterministic", "--deterministic"))
        },
    ),
}
# Of a line of metrics; the others are in the summary or say the same in other words.
_KEPT = ("step", "seconds", "train_seconds", "tokens_per_second", "loss")
_UNITS = ("byte", "pixel")
COMMAND = [sys.executable, "-m", "train"]


@dataclass(frozen=True)
class Options:
    """Train the models of experiments and put them side by side."""

    names: tyro.conf.Positional[tuple[str, ...]]
    """Of experiments, each followed by a colon and some of its runs, separated by commas, if not all; or list."""
    data: Path = Path()
    """Folder of the data."""
    at_once: int = 1
    """Runs at once, each on the next of the GPUs that CUDA_VISIBLE_DEVICES names, which has to be set for that."""
    time_limit: float | None = None
    """Seconds after which the runs under way are stopped, and no other begun."""
    steps: int | None = None
    """Steps of every run, in place of the experiment's, for a trial."""
    runs: Path = Path("runs")
    """Folder for the runs themselves."""
    out: Path | None = None
    """Folder of NAME.json and plots. By default benchmarks/results/DEVICE."""


def run_experiments(options: Options) -> int:
    """Makes the runs that are missing, and writes results after each.

    Args:
        options: From the command line.

    Returns:
        0 if all runs are there, 1 otherwise.

    Raises:
        ValueError: There is no such experiment or run, there are too few GPUs, or a file holds other results.
    """
    chosen = [chosen_runs(name) for name in options.names]
    lanes = _lanes(options.at_once)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # this process leaves the memory to the runs
    results_of = {name: Results(name, options) for name, _ in chosen}
    start, stopped = time.monotonic(), threading.Event()

    def make(name: str, run: str) -> None:
        left = math.inf if options.time_limit is None else options.time_limit - (time.monotonic() - start)
        if left <= 0 or stopped.is_set():
            return
        environment = lanes.get()
        try:
            results_of[name].add(run, left, environment)
        finally:
            lanes.put(environment)

    with ThreadPoolExecutor(options.at_once) as pool:
        try:
            todo = [pool.submit(make, name, run) for name, runs in chosen for run in results_of[name].missing(runs)]
            for made in todo:
                made.result()
        except BaseException:  # Ctrl-C, which the runs got too
            stopped.set()
            raise
    for found in results_of.values():
        found.show()
    return int(any(results_of[name].missing(runs) for name, runs in chosen))


def chosen_runs(text: str) -> tuple[str, list[str]]:
    """An experiment and the runs of it that a name on the command line means.

    Args:
        text: NAME or NAME:RUN,RUN.

    Raises:
        ValueError: There is no such experiment or run.
    """
    name, _, some = text.partition(":")
    if name not in EXPERIMENTS:
        raise ValueError(f"there is no experiment {name!r}: {', '.join(EXPERIMENTS)}")
    known = EXPERIMENTS[name].runs
    runs = some.split(",") if some else list(known)
    if unknown := [run for run in runs if run not in known]:
        raise ValueError(f"{name} has no run {unknown[0]!r}: {', '.join(known)}")
    return name, runs


def _lanes(number: int) -> queue.SimpleQueue[dict[str, str]]:
    """The environments of runs at once: each has a GPU of its own, unless it is one run."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if number > 1 and len(visible) < number:
        raise ValueError(f"--at-once {number} needs as many GPUs in CUDA_VISIBLE_DEVICES, which has {len(visible)}")
    lanes: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for lane in [{"CUDA_VISIBLE_DEVICES": name} for name in visible[:number]] if number > 1 else [{}]:
        lanes.put({**os.environ, **lane})
    return lanes


class Results:
    """The results of an experiment and their file, to which runs are added from several threads.

    Args:
        name: Of the experiment.
        options: From the command line.

    Raises:
        ValueError: The file holds something else.
    """

    def __init__(self, name: str, options: Options):
        self._name, self._experiment, self._options = name, EXPERIMENTS[name], options
        self._folder = options.out or RESULTS / results.device_slug()
        self._file = self._folder / f"{name}.json"
        self._lock = threading.Lock()
        self._record: dict[str, Any] = {"format": results.FORMAT, "experiment": name, "runs": {}}
        if self._file.exists():
            self._record = results.read(self._file)

    def missing(self, runs: Sequence[str]) -> list[str]:
        """Those that the results do not hold."""
        return [run for run in runs if run not in self._record["runs"]]

    def add(self, run: str, seconds: float, environment: Mapping[str, str]) -> None:
        """Makes a run, or goes on with it, and adds it to the results if it came to its end.

        Args:
            run: Its name.
            seconds: After which it is stopped; may be infinite.
            environment: That it runs in. What it prints goes to a file beside its folder if it is not the only one.
        """
        folder = self._options.runs / self._name / run
        command = arguments(self._experiment, run, folder, self._options)
        print(f"== {self._name}, {run}: python -m train {shlex.join(command)}", flush=True)
        begun = (folder / "checkpoints").exists()
        log = Path(f"{folder}.log") if self._options.at_once > 1 else None
        code = train(["--resume", "--out", str(folder)] if begun else command, seconds, environment, log)
        if not code and self._experiment.has_test:
            code = train(["evaluate", str(folder)], math.inf, environment, log)
        if code:
            print(f"{self._name}, {run} ended with code {code}: not in the results", file=sys.stderr, flush=True)
            return
        with self._lock:
            # As one would give it beside the data: where these lie here is no part of the results.
            told = arguments(
                self._experiment, run, Path("runs", self._name, run), dataclasses.replace(self._options, data=Path())
            )
            runs = {**self._record["runs"], run: result(run, folder, shlex.join(told))}
            # In the experiment's order, and behind these what earlier versions of it found.
            self._record["runs"] = {name: runs[name] for name in [*self._experiment.runs, *runs] if name in runs}
            write(self._record, self._file)
            if (folder / SAMPLE_FILES["images"]).exists():
                shutil.copy(folder / SAMPLE_FILES["images"], self._folder / f"{self._name}-{run}.png")

    def show(self) -> None:
        """Prints a table."""
        if self._record["runs"]:
            print(f"\n{side_by_side(self._record)}\n\nresults: {self._file}")


def arguments(experiment: Experiment, name: str, out: Path, options: Options) -> list[str]:
    """The arguments of `python -m train` for a run, whose folder is `out`."""
    shared = experiment.shared.replace("FOLDER", shlex.quote(str(options.data)))
    parts = [*shlex.split(shared), *shlex.split(experiment.runs[name])]
    if options.steps is not None:
        parts += ["--steps", str(options.steps), "--warmup", str(options.steps // 10)]
        parts += ["--eval-every", str(options.steps), "--log-every", str(max(1, options.steps // 4))]
        parts += ["--eval-tokens", "1"]
    return [*parts, "--data", str(options.data / experiment.data), "--out", str(out)]


def train(command: Sequence[str], seconds: float, environment: Mapping[str, str], log: Path | None) -> int:
    """Calls `python -m train`, and stops it with a checkpoint after so many seconds.

    Args:
        command: Its arguments.
        seconds: May be infinite.
        environment: That it runs in.
        log: A file to which what it prints is added.

    Returns:
        Its exit code, above 128 where it was stopped and saved a checkpoint.
    """
    with contextlib.ExitStack() as stack:
        output = None
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            output = stack.enter_context(log.open("a", encoding="utf-8"))
        child = subprocess.Popen([*COMMAND, *command], stdout=output, stderr=output, env=environment)
        try:
            return child.wait(None if math.isinf(seconds) else seconds)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGTERM)
            return child.wait()


def result(name: str, run: Path, command: str) -> dict[str, Any]:
    """What the results hold of a run.

    Args:
        name: Of the run.
        run: Its folder.
        command: What made it.
    """
    config, facts, history, evaluation = load_config(run), load_facts(run), read_metrics(run), read_evaluation(run)
    unit = next(unit for unit in _UNITS if f"held_out_bits_per_{unit}" in history[-1])
    kept = [*_KEPT, f"bits_per_{unit}", f"held_out_bits_per_{unit}"]
    lines = [
        {key: x for key, x in line.items() if key in kept or key.startswith("bucket_")}
        for line in history
        if "compile_seconds" not in line
    ]
    told = summary(name, config, facts.get("device", {}).get("kind", ""), history, unit, evaluation)
    return {
        "environment": results.environment(f"python -m train {command}"),
        "unit": unit,
        "summary": {**told, "data": Path(config.data.data or "").name},
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
    """The results as a table in Markdown, and what a seed changes, below which a difference is a tie."""
    runs = record["runs"]
    rows, unit = [dict(run["summary"]) for run in runs.values()], next(iter(runs.values()))["unit"]
    compare(rows, {name: run["history"] for name, run in runs.items()}, unit)
    bits = {row["run"]: row["held_out_bits"] for row in rows}
    spreads = [f"{name} {abs(bits[name] - bits[other]):.4f}" for name in bits if (other := f"{name}-seed-1") in bits]
    said = f"\n\nDifference of two seeds, held-out bits per {unit}: {', '.join(spreads)}" if spreads else ""
    return table(rows, unit, None) + said


def _rounded(x: Any) -> Any:
    if isinstance(x, dict):
        return {name: _rounded(entry) for name, entry in x.items()}
    if isinstance(x, list):
        return [_rounded(entry) for entry in x]
    return float(f"{x:.6g}") if isinstance(x, float) else x


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; 2 for a mistake in the arguments, 130 if interrupted."""
    options = tyro.cli(Options, args=argv, prog="python -m benchmarks.experiments", description=__doc__)
    if options.names == ("list",):
        for name, experiment in EXPERIMENTS.items():
            print(f"{name}: {experiment.data}, {experiment.shared}")
            print("".join(f"  {run}: {more}\n" for run, more in experiment.runs.items()), end="")
        return 0
    try:
        return run_experiments(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
