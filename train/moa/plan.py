"""A plan: the windows of every head, as a file that training, evaluation and sampling read."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.config import WindowRules
from train.errors import TrainError
from train.files import cannot_be, write_whole
from train.moa.choose import densities, windows

FORMAT = "scfa_jax window plan 1"
REMEDY = "Name another file with --out."


@dataclass(frozen=True)
class Plan:
    """Elastic rules of all heads."""

    rules: WindowRules
    """Of each layer, of each head: (alpha, beta), see `train.moa.choose`."""
    num_sinks: int
    """How many keys at the beginning of a sequence every head keeps besides."""

    def windows(self, length: int) -> np.ndarray:
        """The window of each head at a length: int `[layers, heads]`."""
        return windows(np.array(self.rules, np.float64), length)

    def density(self, length: int) -> float:
        """The share of the causal pairs that the heads keep on average at a length."""
        return float(densities(self.windows(length), self.num_sinks, length).mean())


def plan_of(rules: np.ndarray, num_sinks: int) -> Plan:
    """Makes a plan of rules `[layers, heads, 2]`."""
    return Plan(tuple(tuple((int(alpha), float(beta)) for alpha, beta in layer) for layer in rules), num_sinks)


def save_plan(path: Path, plan: Plan, facts: dict[str, Any]) -> None:
    """Writes a plan and what else is known of it, one line a layer's rules.

    Raises:
        TrainError: The file cannot be written.
    """
    rules = ",\n  ".join(json.dumps(layer) for layer in plan.rules)
    head = json.dumps({"format": FORMAT, "num_sinks": plan.num_sinks, **facts}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, f'{head[:-2]},\n "rules": [\n  {rules}\n ]\n}}\n')
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
    rules, num_sinks = record.get("rules"), record.get("num_sinks")
    if not _is_rules(rules) or not _is_count(num_sinks):
        raise TrainError(f"--window-plan: {path} is damaged: its rules or its num_sinks are no such thing. {remedy}")
    assert isinstance(rules, list)
    assert isinstance(num_sinks, int)
    widths = {len(layer) for layer in rules}
    if len(rules) != layers or widths != {heads}:
        raise TrainError(
            f"--window-plan: {path} is of another model: it has {len(rules)} layers of {'/'.join(map(str, widths))} "
            f"heads, this one {layers} of {heads}. {remedy}"
        )
    return Plan(tuple(tuple((int(alpha), float(beta)) for alpha, beta in layer) for layer in rules), num_sinks)


def _is_rules(value: Any) -> bool:
    """Whether this is a list of layers, each a list of heads, each a finite (alpha, beta)."""
    return (
        isinstance(value, list)
        and all(isinstance(layer, list) for layer in value)
        and all(isinstance(rule, list) and len(rule) == 2 for layer in value for rule in layer)
        and all(
            isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
            for layer in value
            for rule in layer
            for number in rule
        )
        and all(rule[0] == int(rule[0]) and 0 <= rule[1] <= 1 for layer in value for rule in layer)
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
