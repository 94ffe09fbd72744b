"""Rules, what they cost and lose, and the choice of one a head: against counting, and against trying all choices."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest

from train.errors import TrainError
from train.moa.choose import candidates, choose, densities, lost, uniform, windows


@pytest.mark.parametrize(("length", "num_sinks"), [(9, 0), (9, 3), (2, 5)])
def test_density_and_loss_are_those_of_the_mask(length, num_sinks):
    row, column = np.indices((length, length))
    influence = np.random.default_rng(0).uniform(size=(2, 3, length, length)) * (column < row)  # [layers, heads, T, T]
    profile = np.zeros((2, 3, 3, length))
    for i, j in itertools.product(range(length), repeat=2):
        profile[:, int(j < num_sinks), :, i - j] += influence[..., i, j]
    every = np.arange(1, length + 1)
    losses, costs = lost(profile, every, "pairs"), densities(every, num_sinks, length)
    for place, window in enumerate(every):
        mask = (column <= row) & ((row - column < window) | (column < num_sinks))
        assert costs[place] == pytest.approx(mask.sum() / (column <= row).sum())
        np.testing.assert_allclose(losses[..., place], influence[..., ~mask].sum(axis=2), atol=1e-12)
    profile[:, 2] = np.random.default_rng(1).uniform(size=(2, 3, length))  # what windows lose, told as such
    together = lost(profile, every, "together")
    np.testing.assert_array_equal(together[..., :-1], profile[:, 2, :, 1:])
    assert (together[..., -1] == 0).all()
    own = np.array([[1, 2, length], [2, 1, 2]])
    np.testing.assert_array_equal(
        lost(profile, own[..., None], "pairs")[..., 0],
        [[losses[a, b, own[a, b] - 1] for b in range(3)] for a in range(2)],
    )


def test_windows_follow_the_length_and_stay_within_it():
    rules = np.array([[100.0, 0.0], [0.0, 0.5], [-60.0, 0.25], [10.0, 1.0]])
    np.testing.assert_array_equal(windows(rules, 200), [100, 100, 1, 200])
    np.testing.assert_array_equal(windows(rules, 1001), [100, 500, 190, 1001])


def test_candidates_span_all_windows_and_differ_somewhere():
    lengths = (100, 400, 1000)
    rules = candidates(lengths)
    spans = np.stack([windows(rules, length) for length in lengths])
    assert len(np.unique(spans, axis=1).T) == len(rules)
    assert spans[:, spans[0] == 1].min(axis=1).tolist() == [1, 1, 1]
    assert spans.max(axis=1).tolist() == list(lengths)
    assert (rules[:, 0] == rules[:, 0].round()).all()
    assert (rules[:, 0] < 0).any()
    # Nothing had to be cut to the length to fit.
    assert (spans == np.floor(rules[:, 0] + rules[:, 1] * np.array(lengths)[:, None])).all()
    assert (candidates((64,))[:, 1] == 0).all()  # one length does not tell what follows it


@pytest.mark.parametrize("objective", ["mean", "max"])
def test_no_other_choice_within_the_budget_loses_less(objective):
    draw = np.random.default_rng(0)
    lengths, heads, rules, budget = 2, 4, 5, 0.5
    costs = np.linspace(0.05, 1, rules) ** draw.uniform(0.5, 1.5, (lengths, 1))
    losses = 1e-6 * np.sort(draw.uniform(size=(lengths, heads, rules)), axis=2)[..., ::-1]  # what solvers take for 0

    def worth(rule_of_head):
        totals = losses[:, np.arange(heads), rule_of_head].sum(axis=1)
        return totals.mean() if objective == "mean" else totals.max()

    every = [np.array(one) for one in itertools.product(range(rules), repeat=heads)]
    best = min(worth(one) for one in every if (costs[:, one].mean(axis=1) <= budget).all())
    choice = choose(losses, costs, budget, objective)
    assert (costs[:, choice.rules].mean(axis=1) <= budget).all()
    assert worth(choice.rules) == pytest.approx(best, rel=1e-6)
    assert choice.objective == pytest.approx(best, rel=1e-6)
    assert choice.bound == pytest.approx(best, rel=1e-5)
    assert best > min(map(worth, every))  # without the budget another choice would be better


def test_a_budget_that_nothing_keeps_to_and_a_missing_solver_are_one_line(monkeypatch):
    losses, costs = np.zeros((1, 2, 2)), np.array([[0.2, 0.5]])
    with pytest.raises(TrainError, match=r"--density 0\.1 is below 0\.2, the density of the smallest windows"):
        choose(losses, costs, 0.1, "mean")
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(TrainError, match="needs scipy"):
        choose(losses, costs, 0.5, "mean")


def test_the_uniform_rule_is_the_largest_window_that_keeps_to_the_budget():
    lengths = (100, 400, 1000)
    rule = uniform(0.25, 4, lengths)
    for length in lengths:
        window = windows(rule, length)
        assert densities(window, 4, length) <= 0.25 < densities(window + 2, 4, length)
    assert windows(uniform(1.0, 0, (64,)), 64) == 64
