"""The dense reference equals explicit float64 loops, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import Shape, make_case
from tolerance import NAMES

SHAPES = (Shape(1, 9, 9, 2, 2, 4), Shape(2, 6, 10, 4, 2, 3), Shape(1, 8, 5, 3, 1, 2), Shape(1, 1, 1, 1, 1, 1))


def rule(pattern, case):
    """The pattern's definition, written from its description, one pair at a time."""
    arrays = [np.asarray(x) for x in case.pattern]
    offset = np.broadcast_to(np.asarray(case.options.get("query_offset", 0)), (case.query.shape[0],))
    before = lambda b, t, s: s <= offset[b] + t
    if pattern == "causal":
        return lambda b, n, k, t, s: before(b, t, s)
    if pattern == "keep":
        return lambda b, n, k, t, s: arrays[0][b, t, n] and arrays[1][b, s, k] and before(b, t, s)
    if pattern == "range":
        return lambda b, n, k, t, s: arrays[0][b, t, n] <= s < arrays[1][b, t, n]
    if pattern == "blocks":
        size, num_local = case.options["block_size"], case.options["num_local"]
        is_local = lambda b, t, s: (offset[b] + t) // size - s // size < num_local
        return lambda b, n, k, t, s: before(b, t, s) and (s // size in arrays[0][b, t, n] or is_local(b, t, s))
    on_query, on_key = arrays[0], arrays[-1]
    itself = case.options["exclude_self"]
    return lambda b, n, k, t, s: (
        on_query[b, t, n] == on_key[b, s, k] and before(b, t, s) and not (itself and s == offset[b] + t)
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        ("causal", {}),
        ("causal", {"offset": 3}),
        ("causal", {"offset": -2}),
        ("hash", {"kind": "2"}),
        ("hash", {"kind": "3", "exclude_self": True, "offset": 1}),
        ("hash", {"kind": "huge"}),
        ("shared_hash", {"kind": "2", "exclude_self": True}),
        ("keep", {}),
        ("keep", {"query_density": 0.0}),
        ("keep", {"key_density": 0.2, "offset": 2}),
        ("range", {}),
        ("range", {"longest": 0.0}),
        ("blocks", {"block_size": 2, "num_local": 2, "offset": 1}),
    ],
    ids=str,
)
def test_reference_equals_float64_loops(pattern, options, shape):
    rng = np.random.default_rng(5)
    case = make_case(pattern, rng, shape, jnp.float32, **options)
    given = rng.normal(size=case.query.shape), rng.normal(size=case.query.shape[:3])
    scale = 0.7
    want = oracle.attend(case.query, case.key, case.value, rule(pattern, case), *given, scale)
    given = (jnp.asarray(x, jnp.float32) for x in given)
    got = case.defined(scale=scale)(case.query, case.key, case.value, *given)
    for name, x, y in zip(NAMES, got, want, strict=True):
        # float32 sums of at most ten terms of order one
        np.testing.assert_allclose(x, y, rtol=3e-6, atol=3e-6, err_msg=name)


def test_reference_offers_forward_mode_and_second_derivatives():
    case = make_case("hash", np.random.default_rng(0), Shape(1, 6, 6, 1, 1, 2), jnp.float32, exclude_self=True)
    loss = lambda q: jnp.sum(case.dense(q, case.key, case.value, *case.pattern, **case.options) ** 2)
    _, tangent = jax.jit(lambda q: jax.jvp(loss, (q,), (jnp.ones_like(q),)))(case.query)
    np.testing.assert_allclose(tangent, jax.jit(jax.grad(loss))(case.query).sum(), rtol=1e-4, atol=1e-6)
    assert np.isfinite(jax.jit(jax.hessian(loss))(case.query)).all()
