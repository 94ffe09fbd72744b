"""How close is close enough: that the rule finds what is just beyond it, and what its numbers rest on."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from cases import Shape, make_case
from tolerance import cotangents

from tools.tolerance import NAMES, SINKS, Dense, dense_results, plain_attention, problems, results_and_gradients


def rounded_to_tf32(x):
    """float32 with 11 significant bits, halves away from zero."""
    return ((x.view(np.uint32) + np.uint32(1 << 12)) & np.uint32(2**32 - (1 << 13))).view(np.float32)


def test_three_tf32_products_leave_out_up_to_one_in_two_to_the_22_of_a_term():
    x, y = np.random.default_rng(0).uniform(1, 1.01, (2, 100_000)).astype(np.float32)
    second_x, second_y = x - rounded_to_tf32(x), y - rounded_to_tf32(y)
    fourth = np.abs(second_x.astype(np.float64) * second_y / (x.astype(np.float64) * y))
    assert 0.9 * 2.0**-22 < fourth.max() <= 2.0**-22


NOTHING, OFF = jnp.zeros(3), jnp.array([0, 1.0, 0])


@pytest.mark.parametrize(("dtype", "in_tf32_products"), [("float32", False), ("float32", True), ("bfloat16", False)])
def test_an_error_beyond_the_floor_is_found_and_one_below_it_is_not(dtype, in_tf32_products):
    floor = {"float32": 2**-24, "bfloat16": 2**-8}[dtype] * 3 + 2**-22 * 4 + (2**-22 * 4 if in_tf32_products else 0)
    for share, is_found in ((0.99, False), (1.01, True)):
        dense = Dense((NOTHING,), (NOTHING,), (3 * OFF,), (4 * OFF,))
        assert bool(problems([share * floor * OFF], dense, dtype, in_tf32_products=in_tf32_products)) == is_found


def test_twice_the_error_of_the_plain_implementation_is_allowed():
    dense = Dense((NOTHING,), (jnp.full(3, 0.5),), (NOTHING,), (NOTHING,))
    assert not problems([jnp.full(3, 1.0)], dense, "float32")
    assert problems([jnp.full(3, 1.001)], dense, "float32")


def test_many_errors_are_found_where_the_plain_implementation_has_one_as_large():
    dense = Dense((NOTHING,), (OFF,), (NOTHING,), (NOTHING,))
    assert not problems([2 * OFF], dense, "float32")
    (problem,) = problems([jnp.full(3, 2.0)], dense, "float32")
    assert "root mean square" in problem


def test_other_empty_rows_other_shapes_and_nan_are_found_whatever_the_error():
    want = jnp.array([0.0, -jnp.inf])
    dense = Dense((want,), *[(jnp.full(2, 9.0),)] * 3)
    for got, said in (
        (jnp.array([-jnp.inf, -jnp.inf]), "other rows are empty"),
        (jnp.zeros(2), "other rows are empty"),
        (jnp.array([jnp.nan, -jnp.inf]), "1 of 2 are not finite"),
        (jnp.zeros(3), "shape"),
    ):
        (problem,) = problems([got], dense, "float32")
        assert said in problem


WRONG = [
    ("dkey", 0),
    ("dkey", -1),
    ("dkey", 0.5),
    ("dquery", 0.9),
    ("dvalue", 0.98),
    ("output", 1.01),
    ("output", 0.99),
]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
def test_wrong_results_are_found_in_every_dtype(dtype, head_dim):
    """The floor is far below the results themselves, of gradients too, whose terms cancel each other."""
    case = make_case("hash", np.random.default_rng(head_dim), Shape(1, 50, 60, 4, 2, head_dim), dtype)
    arrays = case.query, case.key, case.value
    given = cotangents(np.random.default_rng(1), case.query)
    dense = dense_results(*arrays, case.mask, *given)
    right = dict(zip(NAMES, dense.rough, strict=True))
    assert not problems(list(right.values()), dense, dtype)
    for name, factor in WRONG:
        wrong = right | {name: np.asarray(right[name], np.float32) * np.float32(factor)}
        (problem,) = problems(list(wrong.values()), dense, dtype)
        assert problem.startswith(f"{name}: error"), factor


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
def test_wrong_results_are_found_with_a_soft_cap_sinks_and_values_of_another_head_size(dtype):
    rng = np.random.default_rng(0)
    case = make_case("hash", rng, Shape(1, 50, 60, 4, 2, 64), dtype)
    wider = [jnp.asarray(rng.normal(size=(*x.shape[:3], 80)), dtype) for x in (case.key, case.query)]
    value, cotangent = wider
    given = cotangent, cotangents(rng, case.query)[1]
    sinks = jnp.asarray(rng.normal(size=4), dtype)
    dense = dense_results(case.query, case.key, value, case.mask, *given, logits_soft_cap=5.0, sink_logits=sinks)
    assert [x.shape for x in dense.stored] == [x.shape for x in dense.summed] == [x.shape for x in dense.want]
    right = dict(zip((*NAMES, SINKS), dense.rough, strict=True))
    assert not problems(list(right.values()), dense, dtype)
    for name, factor in [*WRONG, (SINKS, 0), (SINKS, -1), (SINKS, 0.98)]:
        wrong = right | {name: np.asarray(right[name], np.float32) * np.float32(factor)}
        (problem,) = problems(list(wrong.values()), dense, dtype)
        assert problem.startswith(f"{name}: error"), factor
    for left_out in ({"logits_soft_cap": 5.0}, {"sink_logits": sinks}):
        attend = partial(plain_attention, mask=case.mask, **left_out)
        found = problems(results_and_gradients(attend, case.query, case.key, value, *given), dense, dtype)
        assert [problem.split(":")[0] for problem in found] == list(NAMES)
