"""Results as pictures: time against length, and speed-up against density."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.breakeven import Curve, break_evens, curves
from benchmarks.calls import OURS
from benchmarks.cases import PASSES
from benchmarks.targets import milliseconds


def plot(results: dict[str, Any], stem: Path) -> list[Path]:
    """Draws what the results have enough points for.

    Args:
        results: As `benchmarks.results.read` gives them.
        stem: Path of the pictures without what tells them apart: `-time.png`, `-density.png`.

    Returns:
        The files written.
    """
    where = results["environment"]
    title = f"{where['device']}, JAX {where['jax']}"
    files = []
    for name, draw in (("time", _draw_time), ("density", _draw_density)):
        figure = Figure(figsize=(11, 4.8), layout="constrained")
        FigureCanvasAgg(figure)
        if draw(figure, results["rows"]):
            figure.suptitle(title, fontsize="medium")
            files.append(stem.with_name(f"{stem.name}-{name}.png"))
            figure.savefig(files[-1], dpi=120)
    return files


def _draw_time(figure: Figure, rows: Sequence[dict[str, Any]]) -> bool:
    """Milliseconds of one sequence against its length: the baseline, and each pattern with two lengths or more."""
    shape = _commonest_heads(rows)
    drawn = False
    for axes, which in zip(figure.subplots(1, 2, sharey=True), PASSES, strict=True):
        lines: dict[str, dict[int, float]] = {}
        baseline: dict[int, float] = {}
        for row in rows:
            case, record = row["case"], row["passes"].get(which)
            if record is None or (case["heads"], case["head_dim"]) != shape or record["status"] != "ok":
                continue
            ours, other = milliseconds(record), milliseconds(record, record["baseline"])
            if ours is not None:
                lines.setdefault(case["label"], {})[case["length"]] = ours / case["batch"]
            if other is not None:
                baseline[case["length"]] = other / case["batch"]
                name = record["baseline"]
        lines = {label: points for label, points in lines.items() if len(points) > 1}
        if lines and len(baseline) > 1:
            axes.plot(
                *_sorted(baseline),
                "k--o",
                markersize=4,
                label="dense causal, plain JAX" if name == "dense" else f"dense causal, {name}",
            )
        for label, points in lines.items():
            axes.plot(*_sorted(points), "-o", markersize=4, label=f"{OURS}, {label}")
        drawn = drawn or bool(lines)
        _log_scales(axes, lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}")
        axes.set_xlabel("tokens in a sequence")
        axes.set_title(which, fontsize="medium")
        if lines:
            axes.legend(fontsize="small")
    figure.axes[0].set_ylabel(f"ms for one sequence, {shape[0]} heads of {shape[1]}")
    return drawn


def _draw_density(figure: Figure, rows: Sequence[dict[str, Any]]) -> bool:
    """Speed-up over the baseline against the share of causal pairs that are allowed."""
    found, with_break_even = curves(rows), break_evens(rows)
    for axes, which in zip(figure.subplots(1, 2, sharey=True), PASSES, strict=True):
        for curve in found:
            if curve.which == which:
                _draw_curve(axes, curve, marks_break_even=curve in with_break_even)
        axes.axhline(1, color="black", linewidth=0.8)
        _log_scales(axes, lambda x, _: f"{x:g}")
        axes.set_xlabel("density: allowed pairs / causal pairs")
        axes.set_title(which, fontsize="medium")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    figure.axes[0].set_ylabel("speed-up over the dense baseline")
    return bool(found)


def _draw_curve(axes: Axes, curve: Curve, *, marks_break_even: bool) -> None:
    length, batch, heads, head_dim = curve.shape
    label = f"{length:,} tokens, {batch}x{heads} of {head_dim}"
    (line,) = axes.plot([p[0] for p in curve.points], [p[1] for p in curve.points], "o-", markersize=4, label=label)
    crossing = curve.break_even() if marks_break_even else None
    if crossing is not None:
        axes.plot([crossing], [1], "x", color=line.get_color(), markersize=9, label=f"break-even at {crossing:.2f}")


def _commonest_heads(rows: Sequence[dict[str, Any]]) -> tuple[int, int]:
    shapes = [(row["case"]["heads"], row["case"]["head_dim"]) for row in rows]
    return max(shapes, key=shapes.count, default=(0, 0))


def _sorted(points: dict[int, float]) -> tuple[list[int], list[float]]:
    lengths = sorted(points)
    return lengths, [points[length] for length in lengths]


def _log_scales(axes: Axes, x_label: Callable[[float, float], str]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(x_label)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
