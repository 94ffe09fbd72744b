"""A plan as a picture: the window of every head, and what its attention is worth by distance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from train.moa.plan import Plan
from train.plot import new_figure


def plot_plan(plan: Plan, uniform: Plan, lengths: Sequence[int], profile: np.ndarray, path: Path) -> None:
    """Draws the windows at the shortest and the longest length, and the influence left beyond each distance.

    Args:
        plan: The plan.
        uniform: That of one window for all heads.
        lengths: Those that were profiled.
        profile: At the longest of them, `[layers, 3, heads, T]`.
        path: The PNG to write.
    """
    figure = new_figure("Windows of the heads, and the influence that lies beyond them", 12, 7)
    grid = figure.add_gridspec(2, 2)
    ends = [min(lengths), max(lengths)]
    for place, length in enumerate(ends):
        axes = figure.add_subplot(grid[0, place])
        windows = plan.windows(length)
        mesh = axes.imshow(windows, aspect="auto", vmin=0, vmax=length, interpolation="none")
        axes.set_title(f"{length} tokens; uniform: {uniform.windows(length)[0, 0]}", fontsize="small")
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        axes.set_xticks(range(windows.shape[1]))
        axes.set_yticks(range(windows.shape[0]))
        if windows.size <= 200:
            for (layer, head), window in np.ndenumerate(windows):
                color = "white" if window < length / 2 else "black"
                axes.text(head, layer, str(window), ha="center", va="center", fontsize=6, color=color)
        figure.colorbar(mesh, ax=axes, label="window, tokens")
    axes = figure.add_subplot(grid[1, :])
    beyond = np.cumsum(profile[:, 0, :, ::-1], axis=2)[..., ::-1]  # [layers, heads, T]
    layers, _, length = beyond.shape
    distances = np.unique(np.geomspace(1, length - 1, 400).astype(int))
    for layer in range(layers):
        color = (layer + 0.5) / layers
        for head, values in enumerate(beyond[layer]):
            axes.plot(
                distances,
                values[distances],
                linewidth=0.8,
                color=(color, 0.3, 1 - color),
                label=f"layer {layer}" if head == 0 and (layer in (0, layers - 1)) else None,
            )
            window = plan.windows(length)[layer, head]
            if window < length:
                axes.plot(window, values[window], ".", color="black", markersize=4)
    axes.set_xscale("log")
    axes.set_xlabel(f"distance, at {length} tokens; a dot is where a head's window ends")
    axes.set_ylabel("influence at this distance and beyond\nwithout sinks, nats a token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
