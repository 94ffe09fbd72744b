"""How close is close enough: that the rule finds what is just beyond it, and what its numbers rest on."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.tolerance import Dense, problems


def rounded_to_tf32(x):
    """float32 with 11 significant bits, halves away from zero."""
    return ((x.view(np.uint32) + np.uint32(1 << 12)) & np.uint32(2**32 - (1 << 13))).view(np.float32)


def test_three_tf32_products_leave_out_up_to_one_in_two_to_the_22_of_a_term():
    x, y = np.random.default_rng(0).uniform(1, 1.01, (2, 100_000)).astype(np.float32)
    second_x, second_y = x - rounded_to_tf32(x), y - rounded_to_tf32(y)
    fourth = np.abs(second_x.astype(np.float64) * second_y / (x.astype(np.float64) * y))
    assert 0.9 * 2.0**-22 < fourth.max() <= 2.0**-22


@pytest.mark.parametrize(
    ("dtype", "in_tf32_products", "roundings"),
    [("float32", False, 2**-22), ("float32", True, 2**-21), ("bfloat16", False, 2**-7 + 2**-23)],
)
def test_an_error_beyond_the_floor_is_found_and_one_below_it_is_not(dtype, in_tf32_products, roundings):
    want, terms = jnp.zeros(3), jnp.float32(4.0)
    for share, is_found in ((0.99, False), (1.01, True)):
        got = jnp.zeros(3).at[1].set(share * roundings * 4)
        dense = Dense((want,), (want,), (terms,))
        assert bool(problems([got], dense, dtype, in_tf32_products=in_tf32_products)) == is_found


def test_twice_the_error_of_the_plain_implementation_is_allowed():
    dense = Dense((jnp.zeros(3),), (jnp.full(3, 0.5),), (jnp.float32(0),))
    assert not problems([jnp.full(3, 1.0)], dense, "float32")
    assert problems([jnp.full(3, 1.001)], dense, "float32")


def test_other_empty_rows_other_shapes_and_nan_are_found_whatever_the_error():
    dense = Dense((jnp.array([0.0, -jnp.inf]),), (jnp.full(2, 9.0),), (jnp.float32(9),))
    for got, said in (
        (jnp.array([-jnp.inf, -jnp.inf]), "other rows are empty"),
        (jnp.zeros(2), "other rows are empty"),
        (jnp.array([jnp.nan, -jnp.inf]), "1 of 2 are not finite"),
        (jnp.zeros(3), "shape"),
    ):
        (problem,) = problems([got], dense, "float32")
        assert said in problem
