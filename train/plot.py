"""Runs as pictures: losses, speed, buckets; and pictures that a model drew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

PLOT_FILE = "loss.png"
COLORS, MARKERS = 10, "osD^vPX"  # each colour with one marker after the other: so many runs can be told apart

History = Sequence[dict[str, Any]]


def plot_losses(runs: Mapping[str, History], title: str, path: Path) -> None:
    """Draws bits a byte or a pixel over the steps and over the time spent on them.

    Args:
        runs: Records of `train.metrics`, by the name of the run.
        title: Stands above.
        path: The PNG to write.
    """
    many = len(runs) > COLORS
    figure = new_figure(title, 14, 7) if many else new_figure(title, 11, 4.5)
    unit = next(unit for unit in ("byte", "pixel") for h in runs.values() if column(h, f"held_out_bits_per_{unit}")[0])
    for axes, x in zip(figure.subplots(1, 2, sharey=True), ("step", "train_seconds"), strict=True):
        ends = [column(history, f"held_out_bits_per_{unit}", x)[0][-1] for history in runs.values()]
        if 0 < 4 * min(ends) < max(ends):  # else the slowest would press the others together
            axes.set_xscale("log", nonpositive="mask")
            axes.set_xlim(min(ends) / 12, 1.2 * max(ends))
        for number, (name, history) in enumerate(runs.items()):
            style = _style(number)
            if not many:
                training = column(history, f"bits_per_{unit}", x)
                axes.plot(*training, "-", color=style["color"], linewidth=0.8, alpha=0.5)
            evaluated = column(history, f"held_out_bits_per_{unit}", x)
            axes.plot(*evaluated, "-", **style, markersize=4, label=_label(name))
        _dress(axes, x)
    what = "held out" if many else "marks held out, thin lines training"
    figure.axes[0].set_ylabel(f"bits per {unit}: {what}")
    # The first evaluation, before any training, would take up most of the height.
    held_out = [column(history, f"held_out_bits_per_{unit}")[1] for history in runs.values()]
    top = max(max(bits[1:] or bits) for bits in held_out)
    bottom = min(map(min, held_out))
    margin = 0.05 * (top - bottom) or 0.1
    figure.axes[0].set_ylim(bottom - margin, top + margin)
    _legend(figure, many)
    figure.savefig(path, dpi=120)


def plot_speed_and_buckets(runs: Mapping[str, History], tokens_per_step: Mapping[str, int], path: Path) -> None:
    """Draws the time a step takes, how even buckets are, and how many of the best blocks are chosen, over the steps.

    Args:
        runs: Records of `train.metrics`, by the name of the run.
        tokens_per_step: Of each run.
        path: The PNG to write.
    """
    figure = new_figure("Step time; buckets and blocks on a held-out batch: means over layers, with their range", 15, 7)
    panels = figure.subplots(2, 3).flat
    for axes, (name, label) in zip(
        panels,
        {
            "tokens_per_second": "ms a step",
            "bucket_effective": "effective number of buckets",
            "bucket_largest_share": "share of the largest bucket",
            "bucket_pairs": "pairs taken / pairs of dense attention",
            "bucket_coverage": "pairs taken / pairs in buckets",
            "block_recall": "blocks chosen / blocks with the most attention",
        }.items(),
        strict=True,
    ):
        for number, (run, history) in enumerate(runs.items()):
            steps, values = column(history, name)
            if not steps:
                continue
            layers = np.array(values, float).reshape(len(values), -1)
            if name == "tokens_per_second":
                layers = 1e3 * tokens_per_step[run] / layers
            style = _style(number)
            axes.plot(steps, layers.mean(1), "-", **style, markersize=3, label=_label(run))
            axes.fill_between(steps, layers.min(1), layers.max(1), color=style["color"], alpha=0.15)
        axes.set_ylabel(label, fontsize="small")
        axes.set_ylim(bottom=0)
        _dress(axes, "step")
    _legend(figure, len(runs) > COLORS)
    figure.savefig(path, dpi=120)


def plot_bucket_sizes(history: History, title: str, path: Path) -> bool:
    """Draws how much each bucket holds, the largest first, over the steps: one panel a layer.

    Args:
        history: Records of `train.metrics`.
        title: Stands above.
        path: The PNG to write, if there is anything to draw.

    Returns:
        Whether there was.
    """
    steps, values = column(history, "bucket_shares")
    if not steps:
        return False
    shares = np.array(values)  # [evaluations, layers, buckets]
    layers, buckets = shares.shape[1:]
    columns = min(4, layers)
    figure = new_figure(title, 3.2 * columns + 1, 2.6 * -(-layers // columns) + 0.6)
    panels = figure.subplots(-(-layers // columns), columns, squeeze=False, sharex=True, sharey=True)
    for layer, axes in enumerate(panels.flat):
        axes.set_visible(layer < layers)
        if layer < layers:
            mesh = axes.pcolormesh(
                range(len(steps)), range(1, buckets + 1), shares[:, layer].T, vmin=0, vmax=shares.max()
            )
            axes.set_xticks(range(len(steps)), [str(step) for step in steps], rotation=90, fontsize="x-small")
            axes.set_title(f"hash layer {layer}", fontsize="small")
    figure.supxlabel("step", fontsize="small")
    figure.supylabel("bucket, by size", fontsize="small")
    figure.colorbar(mesh, ax=panels, label=f"share of the tokens (even: {1 / buckets:.3f})")
    figure.savefig(path, dpi=120)
    return True


def draw_images(images: Sequence[np.ndarray], title: str, path: Path) -> None:
    """Draws square grey images in a grid.

    Args:
        images: uint8 `[pixels]` each, row by row; what is missing at the end is black.
        title: Stands above.
        path: The PNG to write.
    """
    columns = int(np.ceil(np.sqrt(len(images))))
    figure = new_figure(title, 1.2 * columns, 1.2 * -(-len(images) // columns) + 0.6)
    panels = figure.subplots(-(-len(images) // columns), columns, squeeze=False).flat
    side = max(1, round(max(len(image) for image in images) ** 0.5))
    for index, axes in enumerate(panels):
        axes.axis("off")
        if index < len(images):
            pixels = np.resize(np.pad(images[index], (0, max(0, side * side - len(images[index])))), (side, side))
            axes.imshow(pixels, cmap="gray", vmin=0, vmax=255)
    figure.savefig(path, dpi=120)


def column(history: History, name: str, x: str = "step") -> tuple[list[Any], list[Any]]:
    """The records that have a value: their `x` (or `seconds`, where an old record has no other), and the value."""
    found = [record for record in history if name in record]
    return [record.get(x, record["seconds"]) for record in found], [record[name] for record in found]


def new_figure(title: str, width: float, height: float) -> Figure:
    """An empty figure of so many inches; the title stands above."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: it would keep state and look for a display
    figure.suptitle(_text(title), fontsize="medium", parse_math=False)
    return figure


def _style(number: int) -> dict[str, str]:
    """How the run of this number is drawn."""
    return {"color": f"C{number % COLORS}", "marker": MARKERS[number // COLORS % len(MARKERS)]}


def _legend(figure: Figure, many: bool) -> None:
    """Names the runs: in the first panel, or beside all where they are many."""
    if many:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    else:
        figure.axes[0].legend(fontsize="small")


def _dress(axes: Axes, x: str) -> None:
    axes.set_xlabel({"step": "step", "train_seconds": "seconds spent on steps"}[x])
    axes.grid(alpha=0.3)


def _text(name: str) -> str:
    """The name of a file may hold bytes that are no text."""
    return name.encode("utf-8", "replace").decode()


def _label(name: str) -> str:
    """A name for a legend, where a $ would begin a formula."""
    return _text(name).replace("$", r"\$")
