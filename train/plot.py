"""The picture of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

PLOT_FILE = "loss.png"


def plot_loss(history: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draws bits per byte over the steps, of training and of held-out text.

    Args:
        history: Records of `train.metrics`.
        title: Stands above; say what the text was.
        path: The PNG to write.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: it would keep state and look for a display
    axes = figure.subplots()
    for key, label, style in (
        ("bits_per_byte", "training", "-"),
        ("held_out_bits_per_byte", "held out", "o-"),
    ):
        points = [(record["step"], record[key]) for record in history if key in record]
        axes.plot([step for step, _ in points], [bits for _, bits in points], style, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte")
    axes.set_ylim(bottom=0)
    # The name of a file may hold a $, or bytes that are no text.
    axes.set_title(title.encode("utf-8", "replace").decode(), fontsize="medium", parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
