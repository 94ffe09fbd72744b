"""One elastic rule a head under a budget of density: the rules there are, what they cost and lose, and the choice.

A rule is a pair (alpha, beta): at length `T` a head's window is the last `alpha + beta * T` keys, rounded down, but at
least the token itself and at most all keys (Fu et al. 2024). The first keys, the sinks, are kept by every head besides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from train.errors import TrainError

Objective = Literal["mean", "max"]
Count = Literal["pairs", "together"]

BETAS = np.array([0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32]) / 32
STEPS = 16  # windows between 0 and the shortest length
SECONDS = 300.0  # for the integer program


def windows(rules: np.ndarray, length: int) -> np.ndarray:
    """The windows of rules `[..., 2]` at a length: int `[...]`."""
    return np.clip(np.floor(rules[..., 0] + rules[..., 1] * length), 1, length).astype(np.int64)


def densities(window: np.ndarray, num_sinks: int, length: int) -> np.ndarray:
    """The share of the causal pairs that windows `[...]` and sinks keep: float64 `[...]`."""
    window = np.asarray(window, np.float64)
    near = window * length - window * (window - 1) / 2
    sinks = np.arange(min(num_sinks, length))
    far = np.maximum(0, length - window[..., None] - sinks).sum(axis=-1)
    return (near + far) / (length * (length + 1) / 2)


def candidates(lengths: Sequence[int]) -> np.ndarray:
    """The rules to choose from.

    At the shortest length their windows are the powers of two and the sixteenths of it; `beta` is one of `BETAS`, and
    `alpha` follows, below 0 too. Of rules whose windows are the same at all lengths only the one with the least `beta`
    is there.

    Args:
        lengths: Those that are profiled.

    Returns:
        float64 `[rules, 2]`.
    """
    shortest = min(lengths)
    powers = 2 ** np.arange(int(np.log2(shortest)) + 1)
    spans = np.union1d(powers, np.ceil(shortest * np.arange(1, STEPS + 1) / STEPS).astype(int))
    rules = np.array([(span - np.floor(beta * shortest), beta) for beta in BETAS for span in spans])
    _, first = np.unique(np.stack([windows(rules, length) for length in lengths]), axis=1, return_index=True)
    return rules[np.sort(first)]


def lost(profile: np.ndarray, window: np.ndarray, count: Count) -> np.ndarray:
    """The influence of the pairs that a window leaves out: that of larger distances, but for the sinks.

    Args:
        profile: `[layers, 3, heads, T]`, of `train.moa.profile.profile`.
        window: int `[rules]`, or `[layers, heads, rules]` with rules of each head's own.
        count: Whether pairs are left out one by one, or each query's together.

    Returns:
        float64 `[layers, heads, rules]`, nats a token.
    """
    if count == "together":
        behind = np.concatenate([profile[:, 2], np.zeros_like(profile[:, 2, :, :1])], axis=2)
        return np.take_along_axis(behind, np.broadcast_to(window, (*behind.shape[:2], np.shape(window)[-1])), axis=2)
    behind = np.cumsum(profile[:, 0, :, ::-1], axis=2)[..., ::-1]  # at distance d and beyond
    behind = np.concatenate([behind, np.zeros_like(behind[..., :1])], axis=2)
    return np.take_along_axis(behind, np.broadcast_to(window, (*behind.shape[:2], np.shape(window)[-1])), axis=2)


class Choice(NamedTuple):
    """What the integer program found."""

    rules: np.ndarray  # int [heads], the rule of each
    objective: float  # what it comes to
    bound: float  # no choice comes to less


def choose(losses: np.ndarray, costs: np.ndarray, budget: float, objective: Objective) -> Choice:
    """Chooses a rule for each head by an integer program, HiGHS's by way of `scipy.optimize.milp`.

    It makes the loss least, where the mean density of the heads keeps to the budget at every length. The choice is
    exact to HiGHS's tolerance, a millionth of the largest loss of a single head and rule, or the best within `SECONDS`.

    Args:
        losses: float `[lengths, heads, rules]`.
        costs: The rules' densities, float `[lengths, rules]`.
        budget: The highest mean density.
        objective: What is made least: the mean of the lengths' losses, or the largest.

    Returns:
        The choice.

    Raises:
        TrainError: The cheapest rules are above the budget, nothing was found in time, or there is no scipy.
    """
    try:
        from scipy import optimize, sparse
    except ImportError:
        raise TrainError("python -m train moa needs scipy. Install it, or this package with [train].") from None
    least = float(costs.min(axis=1).max())
    if least > budget:
        raise TrainError(
            f"--density {budget} is below {least:.4g}, the density of the smallest windows with their sinks. "
            f"Raise it, or lower --sinks."
        )
    lengths, heads, rules = losses.shape
    # Solvers take what is next to 0 for 0: losses are told in parts of the largest.
    unit = float(losses.max()) or 1.0
    flat = losses.reshape(lengths, heads * rules) / unit
    # Variables: 0 or 1 for each head and rule, and a loss that no length's is above where the largest counts.
    is_choice = np.append(np.ones(heads * rules), 0)
    target = np.append(flat.mean(axis=0), 0) if objective == "mean" else 1 - is_choice
    one_each = sparse.kron(sparse.eye_array(heads), np.ones((1, rules)))
    limits = [
        optimize.LinearConstraint(sparse.hstack([one_each, sparse.csr_array((heads, 1))]), 1, 1),
        optimize.LinearConstraint(np.pad(np.tile(costs, heads), [(0, 0), (0, 1)]), -np.inf, heads * budget),
    ]
    if objective == "max":
        limits.append(optimize.LinearConstraint(np.pad(flat, [(0, 0), (0, 1)], constant_values=-1), -np.inf, 0))
    result: Any = optimize.milp(
        target,
        integrality=is_choice,
        bounds=optimize.Bounds(0, np.where(is_choice, 1, np.inf)),
        constraints=limits,
        options={"mip_rel_gap": 0, "time_limit": SECONDS},
    )
    if result.x is None:
        raise TrainError(f"No rules were found for --density {budget}: {result.message}")
    chosen = result.x[:-1].reshape(heads, rules).argmax(axis=1)
    return Choice(chosen, unit * float(result.fun), unit * float(result.mip_dual_bound))


def uniform(budget: float, num_sinks: int, lengths: Sequence[int]) -> np.ndarray:
    """The rule `[2]` for all heads alike that comes closest to the budget from below at every length.

    Args:
        budget: The highest density.
        num_sinks: Keys that are kept besides.
        lengths: Those that are profiled.
    """
    shortest, longest = min(lengths), max(lengths)

    def largest(length: int) -> int:
        every = np.arange(1, length + 1)
        return int(every[densities(every, num_sinks, length) <= budget].max(initial=1))

    beta = (largest(longest) - largest(shortest)) / max(1, longest - shortest)
    alpha = min(largest(length) - math.floor(beta * length) for length in lengths)
    return np.array([alpha, beta])
