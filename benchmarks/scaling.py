"""`python -m benchmarks.scaling` times training steps on 1, 2 and 4 devices, in one process.

Weak scaling: every device brings its own sequences, and the ideal is as many times the tokens a second as there are
devices. Strong scaling: the sequences stay the same in all, and the ideal is a step that many times as fast. One device
is the ordinary step of `python -m train`, without a mesh. All cases take turns, from the same parameters on the same
random tokens; the losses of their first steps show whether they compute the same.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
import tyro
from jax.sharding import Mesh

from benchmarks import results
from benchmarks.run import RESULTS
from benchmarks.training import configuration
from models.config import DType
from train.config import OptimizerConfig
from train.data import Batch
from train.mesh import axis_sizes, lower_step, make_mesh, place_rows, shardings
from train.step import LanguageModel, TrainState, init

ONE = "one"  # device, without a mesh
VOCABULARY = 50_257
OPTIMIZER = OptimizerConfig(steps=10_000, warmup=100, lr=6e-4)


@dataclass(frozen=True)
class Options:
    """What to time."""

    meshes: tuple[str, ...] = ("data=2", "data=4", "fsdp=2", "fsdp=4", "model=2", "data=2,model=2")
    """Meshes beside the one device, as --mesh of python -m train takes them; those of too many devices are left out."""
    kind: str = "hash(16)"
    """What attention the layers have, as --attention of python -m train takes it."""
    preset: str = "gpt2-small"
    """The model, as python -m train names it."""
    length: int = 16_384
    """Tokens a sequence."""
    weak: int = 2
    """Sequences of each device in weak scaling."""
    strong: int = 4
    """Sequences in all in strong scaling."""
    rounds: int = 5
    """Rounds of all cases, whose median counts."""
    steps: int = 4
    """Steps of a case in a round."""
    compile_seconds: float = 240.0
    """What is not compiled by then, or cannot be, is left out, and the results say so."""
    seconds: float = 420.0
    """No round begins after so many seconds in all."""
    dtype: DType | None = None
    """Of the computation; by default bfloat16 on a GPU and float32 elsewhere."""
    out: Path | None = None
    """Folder of results and plot; by default benchmarks/results/DEVICE."""


class Case(NamedTuple):
    """A mesh, or `ONE`, and the sequences of a step."""

    mesh: str
    devices: int
    sequences: int


class Ready(NamedTuple):
    """What a case calls."""

    step: Any
    state: TrainState
    batches: list[Batch]
    compile_seconds: float


def cases(options: Options, devices: int) -> list[Case]:
    """What there is to time on so many devices, each once."""
    found: dict[Case, None] = {}
    for mesh in (ONE, *options.meshes):
        sizes = {} if mesh == ONE else axis_sizes(mesh)
        count = math.prod(sizes.values())
        batch_parts = sizes.get("data", 1) * sizes.get("fsdp", 1)
        for sequences in (options.weak * count, options.strong):
            if count <= devices and sequences % batch_parts == 0:
                found[Case(mesh, count, sequences)] = None
    return list(found)


def measure(options: Options, dtype: DType) -> tuple[list[dict[str, Any]], list[str]]:
    """Times all cases.

    Args:
        options: What to time.
        dtype: Of the computation.

    Returns:
        A row for each case, with the ratios to one device, and the names of the cases that were not compiled, with why.
    """
    begin = time.monotonic()
    config = configuration(options.preset, options.kind, dtype)
    model, state = init(config, OPTIMIZER, vocab_size=VOCABULARY, max_length=options.length)
    todo = cases(options, jax.device_count())
    pool = ThreadPoolExecutor()
    futures: dict[Case, Future[Ready]] = {case: pool.submit(prepare, case, options, model, state) for case in todo}
    wait(futures.values(), timeout=options.compile_seconds)
    pool.shutdown(wait=False, cancel_futures=True)
    left_out, ready = [], {}
    for case, future in futures.items():
        if not future.done() or future.cancelled():
            left_out.append(f"{_name(case)}: not compiled within {options.compile_seconds:.0f} s")
        elif error := future.exception():
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            left_out.append(f"{_name(case)}: {said[:200]}")
        else:
            ready[case] = future.result()
    return _with_ratios(_take_turns(options, ready, begin + options.seconds), options), left_out


def prepare(case: Case, options: Options, model: LanguageModel, state: TrainState) -> Ready:
    """Compiles the step of a case and puts its arrays where they belong."""
    mesh = _mesh(case)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCABULARY, (options.steps, case.sequences, options.length + 1)).astype(np.uint16)
    batches = [place_rows(mesh, Batch(x, None), case.sequences) for x in tokens]
    # From the host, since each case donates its own: device_put may share what is on a device already.
    own = jax.device_put(jax.device_get(state), None if mesh is None else shardings(mesh, state))
    start = time.monotonic()
    step = lower_step(mesh, model, OPTIMIZER, own, batches[0]).compile()
    return Ready(step, own, batches, time.monotonic() - start)


def _mesh(case: Case) -> Mesh | None:
    return None if case.mesh == ONE else make_mesh(case.mesh)


def _name(case: Case) -> str:
    return f"{case.mesh}, {case.sequences} sequences"


def _take_turns(options: Options, ready: dict[Case, Ready], stop: float) -> list[dict[str, Any]]:
    """Rounds of all cases, the first of which warms up."""
    states = {case: one.state for case, one in ready.items()}
    losses: dict[Case, list[float]] = {case: [] for case in ready}
    times: dict[Case, list[float]] = {case: [] for case in ready}
    for round_ in tqdm.trange(options.rounds + 1, unit="round", disable=None):
        if round_ > 1 and time.monotonic() > stop:
            break
        for case, one in ready.items():
            start, measured = time.perf_counter(), []
            for batch in one.batches:
                states[case], found = one.step(states[case], batch)
                measured.append(found.loss)
            losses[case] += map(float, measured)
            times[case] += [(time.perf_counter() - start) / options.steps * 1e3] if round_ else []
    rows = []
    for case, one in ready.items():
        median, analysis = statistics.median(times[case]), one.step.memory_analysis()
        rows.append(
            {
                **case._asdict(),
                "step_ms": round(median, 3),
                "samples_ms": [round(x, 3) for x in times[case]],
                "tokens_per_second": round(case.sequences * options.length / median * 1e3),
                "first_losses": [round(x, 6) for x in losses[case][: options.steps]],
                "compile_s": round(one.compile_seconds, 1),
                "temporary_bytes": analysis.temp_size_in_bytes if analysis else None,
            }
        )
    return rows


def _with_ratios(rows: list[dict[str, Any]], options: Options) -> list[dict[str, Any]]:
    """Adds `weak`, tokens a second over those of one device, and `strong`, its time over that of a step."""
    one = {row["sequences"]: row for row in rows if row["mesh"] == ONE}
    for row in rows:
        if row["sequences"] == options.weak * row["devices"] and options.weak in one:
            row["weak"] = round(row["tokens_per_second"] / one[options.weak]["tokens_per_second"], 3)
        if row["sequences"] == options.strong and options.strong in one:
            row["strong"] = round(one[options.strong]["step_ms"] / row["step_ms"], 3)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    columns = ("mesh", "devices", "sequences", "ms a step", "tokens/s", "weak", "strong", "first loss")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    ratio = lambda row, name: f"{row[name]:.2f}x of {row['devices']}" if name in row else "-"
    for row in rows:
        cells = (
            row["mesh"],
            str(row["devices"]),
            str(row["sequences"]),
            f"{row['step_ms']:.1f}",
            f"{row['tokens_per_second']:,}",
            ratio(row, "weak"),
            ratio(row, "strong"),
            f"{row['first_losses'][0]:.5f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(record: dict[str, Any], path: Path) -> None:
    """Weak and strong scaling against the number of devices, a line for each set of axes, and the ideal."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    rows, options = record["rows"], record["options"]
    counts = sorted({row["devices"] for row in rows})
    says = {
        "weak": ("tokens a second over one device", f"weak: {options['weak']} sequences a device"),
        "strong": ("speed of a step over one device", f"strong: {options['strong']} sequences in all"),
    }
    for axes, (name, (label, title)) in zip(panels, says.items(), strict=True):
        axes.plot(counts, counts, "k:", linewidth=1, label="ideal")
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            if name in row and row["mesh"] != ONE:
                kind = ", ".join(part.partition("=")[0] for part in row["mesh"].split(","))
                lines.setdefault(kind, [(1, 1.0)]).append((row["devices"], row[name]))
        for kind, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), "o-", linewidth=1, label=kind)
        axes.set(xlabel="devices", ylabel=label, title=title, ylim=(0, None))
        axes.set_xticks(counts)
        axes.legend(fontsize=8)
    where = record["environment"]["device"]
    figure.suptitle(f"Training steps of {options['preset']}, {options['kind']}, {options['length']:,} tokens, {where}")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> int:
    """Times all cases, writes scaling.json and scaling.png, and prints a table."""
    options = tyro.cli(Options, description=__doc__)
    dtype: DType = options.dtype or ("bfloat16" if jax.default_backend() == "gpu" else "float32")
    rows, left_out = measure(options, dtype)
    folder = options.out or RESULTS / results.device_slug()
    record = {
        "format": results.FORMAT,
        "environment": results.environment(f"python -m benchmarks.scaling {' '.join(sys.argv[1:])}".strip()),
        "options": {name: value for name, value in vars(options).items() if name != "out"} | {"dtype": dtype},
        "rows": rows,
        "left_out": left_out,
    }
    results.write(folder / "scaling.json", record)
    plot(record, folder / "scaling.png")
    print(table(rows))
    for said in left_out:
        print(f"left out: {said}")
    print(f"wrote {folder / 'scaling.json'}, {folder / 'scaling.png'}")
    return int(bool(left_out))


if __name__ == "__main__":
    sys.exit(main())
