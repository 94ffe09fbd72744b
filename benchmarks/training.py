"""`python -m benchmarks.training` times whole training steps by kind of attention, beside the step without attention.

At every length all kinds take turns in one process. A step is data in, loss and new parameters out, as in
`python -m train`. The bound of a kind is the same step, with the same projections, that passes the values through in
place of attention.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm
import tyro

from benchmarks import results
from benchmarks.run import RESULTS
from models import ModelConfig
from models.config import DType
from models.kinds import parse
from models.presets import preset
from train.config import DataConfig, OptimizerConfig
from train.data import Batch, load_corpus, training_batches
from train.step import LanguageModel, TrainState, init, train_step

BASELINES = ("dense", "cudnn")
BOUNDS = ("identity", "identity(share_query_key=True, normalize_key=True)")


@dataclass(frozen=True)
class Options:
    """What to time."""

    preset: str = "gpt2-small"
    """The model, as `python -m train` names it."""
    lengths: tuple[int, ...] = (8192, 16_384, 32_768, 65_536)
    """Tokens a sequence."""
    tokens: int = 32_768
    """Tokens a step, or one sequence where that is longer."""
    kinds: tuple[str, ...] = ("dense", "cudnn", "hash(16)", "hash(64)", "drop(0.3)", "drop(0.5)", "drop(0.7)")
    """What attention the layers have, as --attention of python -m train takes it."""
    data: str | None = None
    """Text to train on, as `python -m train` takes it; random tokens without."""
    bpe: str | None = None
    """Folder with GPT-2's encoder.json and vocab.bpe, for --data."""
    rounds: int = 6
    """Rounds of all kinds, whose median counts."""
    steps: int = 4
    """Steps of a kind in a round."""
    out: Path | None = None
    """Folder of results and plot; by default benchmarks/results/DEVICE."""


def configuration(name: str, kind: str, dtype: DType) -> ModelConfig:
    """The model of a kind.

    Args:
        name: Of the preset that the rest comes from.
        kind: As in `Options.kinds`.
        dtype: Of the computation.

    Raises:
        ValueError: It is impossible.
    """
    config = dataclasses.replace(preset(name), attention=kind, dtype=dtype)
    if problem := config.problem():
        raise ValueError(problem)
    return config


def bound_of(kind: str) -> str:
    """The step without attention that has the projections of a kind: those of its first layer."""
    first, *_ = parse(kind)
    return BOUNDS[first.kind.shares_query_key if first.share_query_key is None else first.share_query_key]


def measure(options: Options, length: int, batches: list[Batch], vocab_size: int, dtype: DType) -> dict[str, Any]:
    """Times the steps of all kinds at one length.

    Args:
        options: What to time.
        length: Tokens a sequence.
        batches: Training data, which steps take turns with.
        vocab_size: Number of tokens.
        dtype: Of the computation.

    Returns:
        By kind: milliseconds a step, tokens a second, the loss of the last step, memory and seconds of compiling; or an
        error.
    """
    kinds = [*options.kinds, *sorted({bound_of(kind) for kind in options.kinds})]
    optimizer = OptimizerConfig(steps=10_000, warmup=100, lr=6e-4)
    initial: dict[str, tuple[LanguageModel, TrainState]] = {}

    def compile_step(kind: str) -> tuple[Any, Any]:
        model, state = initial[kind]
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state, batches[0]))
        start = time.perf_counter()
        step = jax.jit(lambda state, batch: train_step(model, optimizer, state, batch), donate_argnums=0)
        return step.lower(*shapes).compile(), time.perf_counter() - start

    for kind in kinds:
        config = configuration(options.preset, kind, dtype)
        initial[kind] = init(config, optimizer, vocab_size=vocab_size, max_length=length)
    rows: dict[str, Any] = {}
    steps: dict[str, Any] = {}
    states: dict[str, TrainState] = {}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    with ThreadPoolExecutor() as pool:
        for kind, (step, seconds) in zip(kinds, pool.map(compile_step, kinds), strict=True):
            analysis = step.memory_analysis()
            rows[kind] = {
                "compile_s": round(seconds, 1),
                "temporary_bytes": analysis.temp_size_in_bytes if analysis else None,
            }
            steps[kind], states[kind] = step, initial.pop(kind)[1]

    def run(kind: str, first: int) -> float:
        start = time.perf_counter()
        for i in range(options.steps):
            states[kind], measured = steps[kind](states[kind], batches[(first + i) % len(batches)])
        rows[kind]["loss"] = float(measured.loss)
        return (time.perf_counter() - start) / options.steps * 1e3

    for round_ in range(options.rounds + 1):
        for kind in kinds:
            milliseconds = run(kind, round_ * options.steps)
            times[kind] += [milliseconds] if round_ else []  # the first warms up
    for kind in kinds:
        median = statistics.median(times[kind])
        tokens = batches[0].tokens.shape[0] * length
        rows[kind] |= {
            "step_ms": round(median, 3),
            "samples_ms": [round(x, 3) for x in times[kind]],
            "tokens_per_second": round(tokens / median * 1e3),
        }
    for kind in options.kinds:
        row = rows[kind]
        row["bound_ms"] = rows[bound_of(kind)]["step_ms"]
        for name in BASELINES:
            if name in rows:
                row[f"speedup_over_{name}"] = round(rows[name]["step_ms"] / row["step_ms"], 3)
                row[f"bound_over_{name}"] = round(rows[name]["step_ms"] / row["bound_ms"], 3)
    return rows


def draw_batches(options: Options, length: int, count: int) -> tuple[list[Batch], int, str]:
    """Training data of one length: the batches, the size of the vocabulary, and what it is."""
    batch_size = max(1, options.tokens // length)
    if options.data is None:
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, 50_257, (count, batch_size, length + 1)).astype(np.uint16)
        return [Batch(x, None) for x in tokens], 50_257, "random tokens"
    tokenizer: Any = "gpt2" if options.bpe else "bytes"
    config = DataConfig(options.data, tokenizer, options.bpe, seq_len=length, batch_size=batch_size)
    corpus = load_corpus(config)
    batches = training_batches(corpus, config, seed=0)
    return [next(batches) for _ in range(count)], corpus.vocab_size, corpus.name


def table(lengths: dict[str, Any]) -> str:
    """The results by length as Markdown."""
    columns = (
        "tokens",
        "attention",
        "ms a step",
        "tokens/s",
        "over dense",
        "over cudnn",
        "bound, ms",
        "bound over",
    )
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    ratio = lambda row, name: f"{row[name]:.2f}x" if name in row else "-"
    for length, entry in lengths.items():
        for kind, row in entry["kinds"].items():
            cells = (
                f"{int(length):,}",
                kind,
                f"{row['step_ms']:.1f}",
                f"{row['tokens_per_second']:,}",
                *(ratio(row, f"speedup_over_{name}") for name in BASELINES),
                f"{row['bound_ms']:.1f}" if "bound_ms" in row else "-",
                ratio(row, f"bound_over_{BASELINES[-1]}"),
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(record: dict[str, Any], path: Path) -> None:
    """Tokens a second against length, a line a kind."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    lengths = sorted(map(int, record["lengths"]))
    entries = [record["lengths"][str(length)] for length in lengths]
    for kind in entries[0]["kinds"]:
        rates = [entry["kinds"].get(kind, {}).get("tokens_per_second", math.nan) for entry in entries]
        style = dict(zip(BOUNDS, ("k:", "k--"), strict=True)).get(kind, "o-")
        axes.plot(lengths, rates, style, linewidth=1, label=kind)
    axes.set(xscale="log", xlabel="tokens a sequence", ylabel="tokens a second", ylim=(0, None))
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths], minor=False)
    axes.minorticks_off()
    axes.set_title(f"Training steps of {record['preset']}, {entries[0]['environment']['device']}", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> int:
    """Times all lengths; what was measured is on disk after each, beside what was known of other lengths."""
    options = tyro.cli(Options, description=__doc__)
    on_gpu = jax.default_backend() == "gpu"
    if not on_gpu:
        options = dataclasses.replace(options, kinds=tuple(kind for kind in options.kinds if kind != "cudnn"))
    folder = options.out or RESULTS / results.device_slug()
    path = folder / "training.json"
    record: dict[str, Any] = {"format": results.FORMAT, "preset": options.preset, "lengths": {}}
    if path.exists() and (known := results.read(path))["preset"] == options.preset:
        record = known  # of other lengths
    environment = results.environment(f"python -m benchmarks.training {' '.join(sys.argv[1:])}".strip())
    for length in tqdm.tqdm(options.lengths, unit="length", disable=None):
        batches, vocab_size, data = draw_batches(options, length, count=options.steps)
        kinds = measure(options, length, batches, vocab_size, "bfloat16" if on_gpu else "float32")
        entry = {"environment": environment, "data": data, "kinds": kinds}
        record["lengths"][str(length)] = entry
        results.write(path, record)
        tqdm.tqdm.write(table({str(length): entry}))
    plot(record, folder / "training.png")
    print(f"wrote {path}, {folder / 'training.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
