"""A plan: the windows of every head, as a file that training reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models import ModelConfig
from models.kinds import LayerKind, parse, text_of
from scfa_jax.layers import Window
from train.errors import TrainError
from train.files import cannot_be, write_whole
from train.moa.choose import densities

FORMAT = "scfa_jax window plan 2"
REMEDY = "Name another file with --out."


@dataclass(frozen=True)
class Plan:
    """The attention of all layers: windows of each head's own, and sinks."""

    layers: tuple[LayerKind, ...]
    """First to last; the kind of each is a `Window`."""

    @property
    def attention(self) -> str:
        """As `--attention` takes it."""
        return text_of(self.layers)

    def windows(self, length: int) -> np.ndarray:
        """The window of each head at a length: int `[layers, heads]`."""
        return np.array([_window(layer).lengths(length) for layer in self.layers])

    def density(self, length: int) -> float:
        """The share of the causal pairs that the heads keep on average at a length."""
        return float(densities(self.windows(length), _window(self.layers[0]).num_sinks, length).mean())


def plan_of(rules: np.ndarray, num_sinks: int, model: ModelConfig) -> Plan:
    """Makes a plan of rules `[layers, heads, 2]`, see `train.moa.choose`, for the projections of a model."""
    windows = [
        Window(tuple(int(alpha) for alpha, _ in heads), num_sinks, tuple(float(beta) for _, beta in heads))
        for heads in rules
    ]
    layers = model.layer_kinds()
    return Plan(
        tuple(
            LayerKind(window, layer.share_query_key, layer.normalize_key)
            for window, layer in zip(windows, layers, strict=True)
        )
    )


def save_plan(path: Path, plan: Plan, facts: dict[str, Any]) -> None:
    """Writes a plan and what else is known of it, one line a layer.

    Raises:
        TrainError: The file cannot be written.
    """
    record = {"format": FORMAT, **facts, "attention": [text_of((layer,)) for layer in plan.layers]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise cannot_be("written", path, error, REMEDY) from None


def load_plan(path: Path, layers: int, heads: int) -> Plan:
    """Reads a plan for a model.

    Args:
        path: A file of `save_plan`.
        layers: Of the model.
        heads: Of each of its layers.

    Returns:
        The plan.

    Raises:
        TrainError: There is no such file, it is damaged or none of these, or it is of another model.
    """
    remedy = "Make one with python -m train moa."
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        raise TrainError(f"--window-plan: there is no {path}. {remedy}") from None
    except (OSError, ValueError) as error:
        raise TrainError(f"--window-plan: {path} cannot be read ({error}). {remedy}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise TrainError(f"--window-plan: {path} holds no plan of this version of the program. {remedy}")
    try:
        plan = Plan(parse(", ".join(record["attention"])))
        widths = {len(_window(layer).lengths(1)) for layer in plan.layers}
    except (KeyError, TypeError, ValueError) as error:
        raise TrainError(f"--window-plan: {path} is damaged: its attention is no windows ({error}). {remedy}") from None
    if len(plan.layers) != layers or widths != {heads}:
        raise TrainError(
            f"--window-plan: {path} is of another model: it has {len(plan.layers)} layers of "
            f"{'/'.join(map(str, sorted(widths)))} heads, this one {layers} of {heads}. {remedy}"
        )
    return plan


def _window(layer: LayerKind) -> Window:
    if not isinstance(layer.kind, Window):
        raise TypeError(f"expected a window, got {text_of((layer,))}")
    return layer.kind
