"""Runs side by side: a table, its numbers as JSON, and plots; `python -m train report`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from models.buckets import HASHING
from train.config import Config
from train.errors import TrainError
from train.evaluate import read_evaluation
from train.files import cannot_be
from train.flops import layer_densities, peak_flops
from train.folder import expanded, load_config, load_facts
from train.mesh import axis_sizes
from train.metrics import read_metrics
from train.plot import PLOT_FILE, History, column, plot_bucket_sizes, plot_losses, plot_speed_and_buckets

TABLE_FILE, JSON_FILE, SPEED_FILE = "report.md", "report.json", "speed-and-buckets.png"


@dataclass(frozen=True)
class ReportOptions:
    """Put runs side by side: a table on standard output and in report.md, report.json, and plots."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Folders of runs. Speeds are told relative to the first."""
    target: float | None = None
    """Also tell when each run reached this many held-out bits per byte or pixel, between evaluations by a line."""
    out: str = "report"
    """Folder to write to."""


def report(options: ReportOptions) -> int:
    """Reports on runs.

    Args:
        options: From the command line.

    Returns:
        The exit code 0.

    Raises:
        TrainError: A folder holds no run or no metrics, runs cannot be compared, or a file cannot be written.
    """
    if not options.runs:
        raise TrainError("report needs the folder of a run. Name one or more.")
    folders = {_name(run, options.runs): expanded("runs", run) for run in options.runs}
    facts = {name: load_facts(folder) for name, folder in folders.items()}
    histories = {name: read_metrics(folder) for name, folder in folders.items()}
    unit = _unit(histories)
    rows = []
    for name, folder in folders.items():
        device = str(facts[name].get("device", {}).get("kind", ""))
        evaluation = read_evaluation(folder)
        rows.append(summary(name, load_config(folder), device, histories[name], unit, evaluation, options.target))
    compare(rows, histories, unit)
    text = table(rows, unit, options.target)
    out = expanded("out", options.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / TABLE_FILE).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
        (out / JSON_FILE).write_text(
            json.dumps({"unit": unit, "target": options.target, "runs": rows}, indent=2) + "\n"
        )
        plot_losses(histories, "", out / PLOT_FILE)
        plot_speed_and_buckets(histories, {row["run"]: row["tokens_per_step"] for row in rows}, out / SPEED_FILE)
        files = [TABLE_FILE, JSON_FILE, PLOT_FILE, SPEED_FILE]
        for name, history in histories.items():
            file = f"buckets-{name.replace('/', '-')}.png"
            if plot_bucket_sizes(history, name, out / file):
                files.append(file)
    except OSError as error:
        raise cannot_be("written", out, error, "Choose another folder with --out.") from None
    print(text)
    print(f"\nwrote {', '.join(files)} to {out}")
    return 0


def summary(
    name: str,
    config: Config,
    device: str,
    history: History,
    unit: str,
    evaluation: dict[str, Any] | None = None,
    target: float | None = None,
) -> dict[str, Any]:
    """What the table says of a run, and a little more.

    Args:
        name: Of the run.
        config: Its options.
        device: The kind of device that it ran on.
        history: Its metrics.
        unit: "byte" or "pixel".
        evaluation: What `python -m train evaluate` found on the test part, if it was called.
        target: Held-out bits whose time is asked for.

    Returns:
        A row; what was not recorded or is not known is None.
    """
    tokens_per_step = config.data.batch_size * config.data.seq_len
    steps, losses = column(history, "loss")
    held_out_steps, held_out = column(history, f"held_out_bits_per_{unit}")
    seconds, _ = column(history, "loss", "train_seconds")
    if not steps or not held_out:
        raise TrainError(f"{name} has trained too little: no loss or no evaluation in its metrics. Leave it out.")
    flops, peak = _last(history, "flops_per_step"), peak_flops(device, config.model.dtype)
    devices = math.prod(axis_sizes(config.run.mesh).values()) if config.run.mesh else 1
    rate = steps[-1] * tokens_per_step / seconds[-1]
    best = min(range(len(held_out)), key=held_out.__getitem__)
    # Not of a checkpoint from before the run went on, nor of a part of the test part.
    tested = evaluation or {}
    if tested.get("step") not in (held_out_steps[best], held_out_steps[-1]) or tested.get("tokens"):
        tested = {}
    return {
        "run": name,
        "attention": config.model.attention,
        "device": device,
        "data": config.data.data,
        "steps": steps[-1],
        "tokens_per_step": tokens_per_step,
        "tokens": steps[-1] * tokens_per_step,
        "seconds": history[-1]["seconds"],
        "train_seconds": seconds[-1],
        "compile_seconds": _last(history, "compile_seconds"),
        "loss": losses[-1],
        "held_out_bits": held_out[-1],
        "held_out_step": held_out_steps[-1],
        "held_out_perplexity": _last(history, "held_out_perplexity"),
        "best_held_out_bits": held_out[best],
        "best_held_out_step": held_out_steps[best],
        "test_bits": tested.get(f"bits_per_{unit}"),
        "density": _density(config, history),
        "coverage": _least(history, "bucket_coverage"),
        "recall": _least(history, "block_recall"),
        "tokens_per_second": rate,
        "peak_memory_bytes": max(column(history, "peak_memory_bytes")[1], default=None),
        "model_flop_utilisation": flops * steps[-1] / seconds[-1] / peak / devices if flops and peak else None,
        "seconds_to_target": None if target is None else _seconds_to(target, history, unit),
    }


def compare(rows: Sequence[dict[str, Any]], histories: Mapping[str, History], unit: str) -> None:
    """Adds what a run is beside the others: `speed_up` over the first, and its bits when the first to end had ended.

    Args:
        rows: From `summary`.
        histories: Their metrics, by the name of the run.
        unit: "byte" or "pixel".
    """
    timed = [row for row in rows if row["attention"] != "identity"] or rows  # a bound is not to be compared with
    shortest = min(row["train_seconds"] for row in timed)
    for row in rows:
        seconds, bits = column(histories[row["run"]], f"held_out_bits_per_{unit}", "train_seconds")
        row["speed_up"] = row["tokens_per_second"] / rows[0]["tokens_per_second"]
        row["equal_seconds"] = shortest
        row["held_out_bits_in_equal_time"] = float(np.interp(shortest, seconds, bits)) if len(rows) > 1 else None


def table(rows: Sequence[dict[str, Any]], unit: str, target: float | None) -> str:
    """The rows as Markdown; columns that no run fills are left out.

    Args:
        rows: From `summary`, after `compare`.
        unit: "byte" or "pixel".
        target: As there.
    """
    columns: dict[str, tuple[str, Callable[[Any], str]]] = {
        "run": ("run", str),
        "attention": ("attention", str),
        "steps": ("steps", "{:,}".format),
        "tokens": ("tokens", "{:,}".format),
        "train_seconds": ("seconds on steps", "{:,.1f}".format),
        "seconds": ("in all", "{:,.1f}".format),
        "compile_seconds": ("compiling", "{:,.1f}".format),
        "held_out_bits": (f"held-out bits per {unit}", "{:.4f}".format),
        "best_held_out_bits": ("best", "{:.4f}".format),
        "test_bits": ("of the test part", "{:.4f}".format),
        "held_out_bits_in_equal_time": (f"after {rows[0]['equal_seconds']:,.0f} s on steps", "{:.4f}".format),
        "held_out_perplexity": ("held-out perplexity", "{:.2f}".format),
        "seconds_to_target": (f"seconds to {target} bits", "{:,.1f}".format),
        "density": ("pairs / dense", "{:.3f}".format),
        "coverage": ("coverage of buckets", "{:.3f}".format),
        "recall": ("recall of blocks", "{:.3f}".format),
        "tokens_per_second": ("tokens/s", "{:,.0f}".format),
        "speed_up": ("speed-up", "{:.2f}x".format),
        "peak_memory_bytes": ("peak memory, GiB", lambda size: f"{size / 2**30:.2f}"),
        "model_flop_utilisation": ("model FLOP utilisation", "{:.1%}".format),
    }
    shown = [name for name in columns if any(row[name] is not None for row in rows)]
    lines = [[columns[name][0] for name in shown], ["---"] * len(shown)]
    lines += [["" if row[name] is None else columns[name][1](row[name]) for name in shown] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _name(run: str, runs: Sequence[str]) -> str:
    """The last part of a folder's path, or all of it where that would not tell the runs apart."""
    last = Path(run).name
    return run if last == "" or [Path(other).name for other in runs].count(last) > 1 else last


def _unit(histories: Mapping[str, History]) -> str:
    """What all runs tell their losses by: "byte" or "pixel"."""
    found = {
        name: next((unit for unit in ("byte", "pixel") if column(history, f"bits_per_{unit}")[0]), None)
        for name, history in histories.items()
    }
    for name, unit in found.items():
        if unit is None:
            raise TrainError(f"{name} has no training loss in its metrics. Leave it out.")
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{name} per {unit}" for name, unit in found.items())
        raise TrainError(f"Runs on text and on images cannot be compared ({listed}). Report on them apart.")
    return str(next(iter(found.values())))


def _density(config: Config, history: History) -> float:
    """Pairs taken over those of dense attention, the mean over layers; where they hash, as last measured, if it was."""
    densities = layer_densities(config.model, config.data.seq_len)
    hashed = [layer for layer, of in enumerate(config.model.layer_kinds()) if isinstance(of.kind, HASHING)]
    for layer, measured in zip(hashed, _last(history, "bucket_pairs") or [], strict=False):
        densities[layer] = measured
    return sum(densities) / len(densities)


def _least(history: History, name: str) -> float | None:
    """What the last evaluation measured of the layers: the least of them."""
    return min(_last(history, name) or [], default=None)


def _last(history: History, name: str) -> Any:
    _, values = column(history, name)
    return values[-1] if values else None


def _seconds_to(target: float, history: History, unit: str) -> float | None:
    """Seconds spent on steps until held-out bits fell to `target`: on a line between two evaluations; None if never."""
    seconds, bits = column(history, f"held_out_bits_per_{unit}", "train_seconds")
    for place, reached in enumerate(bits):
        if reached <= target:
            if place == 0:
                return seconds[0]
            share = (bits[place - 1] - target) / (bits[place - 1] - reached)
            return seconds[place - 1] + share * (seconds[place] - seconds[place - 1])
    return None
