"""Attention under JAX's transformations, and what it must not do: recompile, grow with T x S, differentiate twice."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PATTERNS, SMALL_BLOCKS, Shape, make_case
from jax.extend.core import jaxprs_in_params
from test_index import index_of

import scfa_jax
from scfa_jax.backends import tile


@pytest.fixture(autouse=True)
def _fresh_trace_counts():
    chex.clear_trace_counter()


def case_of(pattern, seed=0, shape=None, **options):
    shape = shape or Shape(2, 40, 40, 2, 2, 16)
    return make_case(pattern, np.random.default_rng(seed), shape, jnp.float32, **options)


def attention_of(case, implementation, **options):
    return partial(case.operator, implementation=implementation, block_sizes=SMALL_BLOCKS, **case.options, **options)


def dense_of(case):
    """The plain definition of a case's pattern."""
    return partial(case.dense, **case.options)


def loss_of(attend):
    return lambda *arguments: jnp.sum(jnp.sin(attend(*arguments).astype(jnp.float32)))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_vmap_over_any_axis_of_any_argument(one_implementation, pattern):
    """Each argument is mapped over another axis, or not at all; gradients too."""
    cases = [case_of(pattern, seed) for seed in range(2)]
    attend = attention_of(cases[0], one_implementation)
    first = cases[0]
    stacked = lambda name, axis: jnp.stack([getattr(c, name) for c in cases], axis)
    patterns = [jnp.stack(xs, axis) for axis, xs in enumerate(zip(*(c.pattern for c in cases), strict=True), 1)]

    axes = (1, None, 4, *range(1, 1 + len(patterns)))
    mapped = jax.vmap(jax.value_and_grad(loss_of(attend), (0, 1, 2)), axes)
    got = jax.jit(mapped)(stacked("query", 1), first.key, stacked("value", 4), *patterns)
    dense = jax.jit(jax.value_and_grad(loss_of(dense_of(first)), (0, 1, 2)))
    want = [dense(c.query, first.key, c.value, *c.pattern) for c in cases]
    want = jax.tree.map(lambda *xs: jnp.stack(xs), *want)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5), got, want)


def test_vmap_of_vmap_and_of_hashes_alone(implementation):
    case = case_of("hash")
    attend = attention_of(case, implementation)
    many = jnp.stack([jnp.stack([(case.pattern[0] + i) % (2 + j) for i in range(2)]) for j in range(2)])
    mapped = jax.vmap(jax.vmap(lambda h: attend(case.query, case.key, case.value, h, case.pattern[1])))
    got = jax.jit(mapped)(many)
    dense = jax.jit(dense_of(case))
    for j in range(2):
        for i in range(2):
            want = dense(case.query, case.key, case.value, many[j, i], case.pattern[1])
            np.testing.assert_allclose(got[j, i], want, atol=1e-5)


def test_grad_of_vmap(implementation):
    case = case_of("keep")
    attend = attention_of(case, implementation)
    queries = jnp.stack([case.query, case.query * 2])
    loss = lambda q: jnp.sum(
        jax.vmap(loss_of(attend), (0, None, None, None, None))(q, case.key, case.value, *case.pattern)
    )
    got = jax.jit(jax.grad(loss))(queries)
    dense = jax.jit(jax.grad(loss_of(dense_of(case))))
    want = jnp.stack([dense(q, case.key, case.value, *case.pattern) for q in queries])
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("pattern", ["hash", "range"])
def test_inside_scan_and_checkpoint(one_implementation, pattern):
    case = case_of(pattern)
    attend = attention_of(case, one_implementation)

    def layers(query, body):
        step = lambda x, _: (x + body(x, case.key, case.value, *case.pattern), None)
        return jnp.sum(jnp.sin(jax.lax.scan(step, query, None, length=2)[0]))

    want = jax.jit(jax.grad(partial(layers, body=dense_of(case))))(case.query)
    for body in (attend, jax.checkpoint(attend)):
        got = jax.jit(jax.grad(partial(layers, body=body)))(case.query)
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


def test_integer_arguments_have_no_gradient(implementation):
    case = case_of("hash")
    attend = attention_of(case, implementation)
    gradient = jax.jit(jax.grad(loss_of(attend), (0, 3, 4), allow_int=True))
    gradients = gradient(case.query, case.key, case.value, *case.pattern)
    assert gradients[0].dtype == jnp.float32
    assert all(g.dtype == jax.dtypes.float0 for g in gradients[1:])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_one_trace_while_values_hashes_and_masks_change(one_implementation, pattern):
    """New data of the same shapes never traces again, however many tiles it touches; offsets are data as well."""
    options = {"kind": "4"} if "hash" in pattern else {}
    cases = [case_of(pattern, seed, **options) for seed in range(3)]
    attend = attention_of(cases[0], one_implementation)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(query, key, value, *pattern):
        return jax.grad(loss_of(attend), (0, 1, 2))(query, key, value, *pattern)

    for case in cases:
        step(case.query, case.key, case.value, *case.pattern)
    if pattern == "hash":  # from sixteen buckets to a single one
        case = cases[0]
        step(case.query, case.key, case.value, *(jnp.zeros_like(x) for x in case.pattern))


def test_offsets_are_data(implementation):
    case = case_of("causal")

    @jax.jit
    @chex.assert_max_traces(n=1)
    def attend(offset):
        return scfa_jax.causal_attention(
            case.query, case.key, case.value, query_offset=offset, implementation=implementation
        )

    for offset in (0, 5, -7):
        attend(jnp.int32(offset))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_forward_mode_and_second_derivatives_raise(one_implementation, pattern):
    """What has the derivatives is one function for all implementations."""
    case = case_of(pattern)
    loss = lambda q: loss_of(attention_of(case, one_implementation))(q, case.key, case.value, *case.pattern)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(loss, (case.query,), (case.query,))
    with pytest.raises((TypeError, NotImplementedError), match=r"forward-mode|reference"):
        jax.hessian(loss)(case.query)
    with pytest.raises(NotImplementedError, match=r"scfa_jax\.reference"):
        jax.grad(lambda q: jnp.sum(jax.grad(loss)(q)))(case.query)


def all_shapes(jaxpr):
    """The shapes of every value in a jaxpr and in those nested within, kernels included."""
    for equation in jaxpr.eqns:
        for variable in (*equation.invars, *equation.outvars):
            yield tuple(getattr(variable.aval, "shape", ()))
        for inner in jaxprs_in_params(equation.params):
            yield from all_shapes(inner)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_array_grows_with_the_square_of_the_length(implementation, pattern):
    """Neither `T x S` nor `T x num_buckets x H` exists in either pass: doubling T at most doubles any array."""

    def largest(length):
        shape = Shape(1, length, length, 2, 2, 16)
        case = case_of(pattern, shape=shape, **({"kind": "16", "promise": 16} if "hash" in pattern else {}))
        attend = partial(case.operator, implementation=implementation, **case.options)
        jaxpr = jax.make_jaxpr(jax.grad(loss_of(attend), (0, 1, 2)))(case.query, case.key, case.value, *case.pattern)
        return max(int(np.prod(s)) for s in all_shapes(jaxpr.jaxpr))

    small, large = largest(1024), largest(2048)
    assert large <= 2 * small
    assert large < 2048 * 2048 / 8


@pytest.mark.parametrize("pattern", ["causal", "hash", "keep", "range"])
def test_both_passes_visit_exactly_the_tiles_that_the_bounds_name(pattern, monkeypatch):
    """Counts the tiles as they are computed, in plain JAX, where a callback can see them."""
    case = case_of(pattern, shape=Shape(1, 100, 120, 2, 1, 16))
    visits = []

    def counted(name, function):
        def wrapper(*arguments):
            jax.debug.callback(lambda: visits.append(name))
            return function(*arguments)

        return wrapper

    for name in ("add_keys", "weights_and_score_gradient"):
        monkeypatch.setattr(tile, name, counted(name, getattr(tile, name)))
    blocks = scfa_jax.BlockSizes(*(scfa_jax.TileShape(16, 16),) * 3)
    attend = partial(case.operator, **case.options, implementation="xla", block_sizes=blocks)
    with jax.default_device(jax.devices("cpu")[0]):
        arguments = jax.device_put((case.query, case.key, case.value, *case.pattern), jax.devices("cpu")[0])
        jax.block_until_ready(jax.jit(jax.grad(loss_of(attend), (0, 1, 2)))(*arguments))
    jax.effects_barrier()
    tiles = np.broadcast_to(index_of(pattern, case).stats(16, 16)["tiles"], (1, 2)).sum()
    assert visits.count("add_keys") == tiles
    assert visits.count("weights_and_score_gradient") == tiles
