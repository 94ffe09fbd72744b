"""`python -m train moa`: the plan's file, what the command writes, and training under a plan."""

from __future__ import annotations

import json

import numpy as np
import pytest

from train.errors import TrainError
from train.moa.plan import Plan, load_plan, save_plan

PLAN = Plan((((3, 0.25), (-1, 0.5)), ((16, 0.0), (0, 1.0))), num_sinks=2)


def test_a_plan_comes_back_from_its_file(tmp_path):
    path = tmp_path / "new" / "plan.json"
    save_plan(path, PLAN, {"lengths": [8, 16]})
    assert load_plan(path, layers=2, heads=2) == PLAN
    assert json.loads(path.read_text())["lengths"] == [8, 16]
    np.testing.assert_array_equal(PLAN.windows(16), [[7, 7], [16, 16]])
    # 16 * 17 / 2 = 136 pairs, of which a window of 7 leaves out 9 * 10 / 2 = 45, and two sinks keep 9 + 8 of these.
    assert PLAN.density(16) == pytest.approx((1 + (136 - 45 + 17) / 136) / 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "cannot be read"),
        (lambda text: "[]", "holds no plan of this version"),
        (lambda text: text.replace("plan 1", "plan 0"), "holds no plan of this version"),
        (lambda text: text.replace("[3, 0.25]", "[3, NaN]"), "is damaged"),
        (lambda text: text.replace("[3, 0.25]", "[3]"), "is damaged"),
        (lambda text: text.replace("[3, 0.25]", '"far"'), "is damaged"),
        (lambda text: text.replace('"num_sinks": 2', '"num_sinks": -2'), "is damaged"),
        (lambda text: text.replace(", [-1, 0.5]", ""), "has 2 layers of 1/2 heads, this one 2 of 2"),
        (lambda text: text.replace("[16, 0.0]", "[1, 0.0], [16, 0.0]"), "has 2 layers of 2/3 heads, this one 2 of 2"),
    ],
)
def test_what_is_no_plan_for_this_model_is_one_line(damage, message, tmp_path):
    path = tmp_path / "plan.json"
    save_plan(path, PLAN, {})
    whole = path.read_text()
    path.write_text(damage(whole))
    assert path.read_text() != whole
    with pytest.raises(TrainError) as raised:
        load_plan(path, layers=2, heads=2)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
