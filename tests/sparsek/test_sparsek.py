"""SparseK: the operator against bisection, attention against its dense definition, and what selections keep to."""

from functools import cache, partial

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SEGMENT_KINDS, SMALL_BLOCKS, segment_ids
from conftest import IMPLEMENTATIONS, examples
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_sharding import COLLECTIVE

import scfa_jax
from scfa_jax import reference
from scfa_jax.sparsek import Selection, sparsek_gates
from scfa_jax.sparsek.gather import gather_rows
from scfa_jax.sparsek.operator import best_so_far

LENGTH = 24


def by_bisection(scores, k, takes_part):
    """The gates of one row in float64, from the definition: the threshold at which they sum to `k`."""
    scores = np.asarray(scores, np.float64)[takes_part]
    gates = np.zeros(takes_part.shape)
    if scores.size <= k:
        gates[takes_part] = 1
        return gates
    low, high = scores.min() - 1, scores.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(scores - middle, 0, 1).sum() > k else (low, middle)
    gates[takes_part] = np.clip(scores - high, 0, 1)
    return gates


@st.composite
def rows_of_scores(draw):
    """Rows `[3, LENGTH]` at several scales, with ties, huge numbers and entries that take no part."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = rng.normal(size=(3, LENGTH)) * draw(st.sampled_from((0.01, 0.3, 1.0, 5.0, 1e6)))
    if draw(st.booleans()):
        scores = np.round(scores)  # ties, at the edges of 0 and 1 too
    takes_part = rng.random((3, LENGTH)) < draw(st.sampled_from((0.0, 0.2, 1.0)))
    scores[1] = np.where(rng.random(LENGTH) < 0.2, -np.inf, scores[1])
    scores[2] += draw(st.sampled_from((0.0, 30.0, -4e3)))
    return scores.astype(np.float32), takes_part


@cache
def gates_and_gradients(k):
    @jax.jit
    def run(scores, where, cotangent):
        gates, pull = jax.vjp(lambda scores: sparsek_gates(scores, k, where=where), scores)
        return gates, *pull(cotangent)

    return run


@pytest.mark.parametrize("k", [0, 1, 6])
@hypothesis.given(rows=rows_of_scores())
@hypothesis.settings(max_examples=examples(120))
def test_gates_solve_the_projection(k, rows):
    """Equal to bisection; the derivative is the identity less the mean where gates are between 0 and 1."""
    scores, where = rows
    cotangent = np.random.default_rng(0).normal(size=scores.shape).astype(np.float32)
    gates, gradient = map(np.asarray, gates_and_gradients(k)(scores, where, cotangent))
    for row in range(3):
        takes_part = where[row] & (scores[row] > -np.inf)
        want = by_bisection(scores[row], k, takes_part)
        # Differences of float32 scores are exact to half a unit of their last place.
        rounding = np.spacing(np.abs(scores[row][takes_part]).max(initial=1.0)) * LENGTH
        np.testing.assert_allclose(gates[row], want, atol=2e-6 + rounding)
        between = (gates[row] > 0) & (gates[row] < 1)
        mean = cotangent[row][between].mean() if between.any() else 0
        np.testing.assert_allclose(gradient[row], np.where(between, cotangent[row] - mean, 0), atol=2e-6)


def test_the_derivative_equals_differences():
    rng = np.random.default_rng(1)
    scores, direction, cotangent = rng.normal(size=(3, 3, LENGTH)).astype(np.float32)
    run, everything = gates_and_gradients(6), np.ones((3, LENGTH), bool)
    step = 1e-3
    ahead, behind = (run(scores + sign * step * direction, everything, cotangent)[0] for sign in (1, -1))
    differences = jnp.sum((ahead - behind) * cotangent, axis=1) / (2 * step)
    gates, gradient = run(scores, everything, cotangent)
    np.testing.assert_allclose(jnp.sum(gradient * direction, axis=1), differences, rtol=2e-3, atol=2e-3)
    assert ((gates > 0) & (gates < 1)).sum(axis=1).min() > 2


def test_the_reference_is_the_same_operator():
    scores = jax.random.normal(jax.random.key(0), (4, LENGTH)).at[0, 3].set(-jnp.inf)
    where = jax.random.bernoulli(jax.random.key(1), 0.9, scores.shape).at[3, 5:].set(False)
    for x, y in zip(
        *(
            jax.jit(lambda s, f=f: jax.value_and_grad(lambda s: jnp.sum(jnp.sin(f(s, 6, where=where))))(s))(scores)
            for f in (sparsek_gates, reference.sparsek_gates)
        ),
        strict=True,
    ):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_gates_of_equal_scores_are_equal_and_half_precision_is_computed_in_float32():
    infinite = [[jnp.inf, 1.0, jnp.inf, 0.0, jnp.nan], [jnp.inf, jnp.inf, 3e38, jnp.inf, 1.0]]
    scores = jnp.array([[1.0] * 5, *infinite], jnp.bfloat16)
    gates = jax.jit(partial(sparsek_gates, k=2))(scores)
    assert gates.dtype == jnp.float32
    np.testing.assert_allclose(gates[0], 2 / 5, rtol=1e-6)
    np.testing.assert_array_equal(gates[1], [1, 0, 1, 0, 0])
    np.testing.assert_allclose(gates[2], [2 / 3, 2 / 3, 0, 2 / 3, 0], rtol=1e-6)


def test_gates_never_grow_as_scores_are_added():
    """Why a key may be forgotten: more entries raise the threshold, so that a gate of 0 is 0 for ever."""
    scores = jax.random.normal(jax.random.key(2), (40,)) * 2
    prefix = jnp.tril(jnp.ones((40, 40), bool))
    gates = np.asarray(jax.jit(partial(sparsek_gates, k=5))(jnp.broadcast_to(scores, (40, 40)), where=prefix))
    for position in range(40):
        after = gates[position:, position]
        assert (np.diff(after) <= 1e-6).all()
        assert (after[np.argmax(after == 0) :] == 0).all() or (after > 0).all()


def test_candidates_are_the_best_of_each_prefix():
    """Whatever the grouping of chunks, ties to the earlier place, and the same when it goes on from a carried set."""
    options = Selection.of(num_keys=2, window=1, chunk_size=3, num_candidates=5)
    scores = np.random.default_rng(3).integers(0, 6, (2, 1, 24)).astype(np.float32)
    scores[0, 0, ::4] = -np.inf
    found, places = map(np.asarray, jax.jit(lambda x: best_so_far(x, options))(scores))
    for batch in range(2):
        for chunk in range(9):
            seen = [(-scores[batch, 0, i], i) for i in range(3 * chunk) if scores[batch, 0, i] > -np.inf]
            want = sorted(seen)[:5]
            is_one = found[batch, 0, chunk] > -np.inf
            assert list(zip(-found[batch, 0, chunk][is_one], places[batch, 0, chunk][is_one], strict=True)) == want
    before = found[:, :, 4], np.arange(-5, 0, dtype=np.int32) + np.zeros((2, 1, 1), np.int32)
    resumed, _ = jax.jit(lambda x, b: best_so_far(x, options, b))(scores[:, :, 12:], before)
    np.testing.assert_array_equal(resumed, found[:, :, 4:])


def test_gathered_rows_add_up_their_gradients():
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.normal(size=(2, 7, 3, 4)), jnp.float32)
    rows = jnp.asarray(rng.integers(0, 7, (2, 11, 3)), jnp.int32)
    is_row = jnp.asarray(rng.random((2, 11, 3)) < 0.7)
    cotangent = jnp.asarray(rng.normal(size=(2, 11, 3, 4)), jnp.float32)
    plain = lambda x: jnp.where(is_row[..., None], jnp.take_along_axis(x, rows[..., None], axis=1), 0)

    @jax.jit
    def results(cotangent):
        return [(f(x), jax.vjp(f, x)[1](cotangent)[0]) for f in (lambda x: gather_rows(x, rows, is_row), plain)]

    (copies, gradient), (want_copies, want_gradient) = results(cotangent)
    np.testing.assert_array_equal(copies, want_copies)
    np.testing.assert_allclose(gradient, want_gradient, atol=1e-6)
    poisoned = results(jnp.where(is_row[..., None], cotangent, jnp.nan))[0][1]
    np.testing.assert_array_equal(poisoned, gradient)


# A length that is no multiple of a chunk, and grouped heads; the paper's, with chunks of one and all for candidates.
CASES = {
    "chunks": ((2, 45, 4, 2, 16), {"num_keys": 4, "window": 6, "chunk_size": 8}),
    "the paper's": ((1, 22, 2, 1, 16), {"num_keys": 3, "window": 2, "chunk_size": 1, "num_candidates": 22}),
}


@cache
def problem(name, dtype="float32"):
    (batch, length, heads, key_heads, size), options = CASES[name]
    keys = jax.random.split(jax.random.key(5), 6)
    query, out = (jax.random.normal(key, (batch, length, heads, size), dtype) for key in keys[:2])
    key, value = (jax.random.normal(key, (batch, length, key_heads, size), dtype) for key in keys[2:4])
    scores = jax.random.normal(keys[4], (batch, length, key_heads))
    return (query, key, value, scores), (out, jax.random.normal(keys[5], (batch, length, heads))), options


@cache
def results_of(name, implementation):
    *_, options = problem(name)
    blocks = {} if implementation == "reference" else {"implementation": implementation, "block_sizes": SMALL_BLOCKS}
    operator = (reference if implementation == "reference" else scfa_jax).sparsek_attention

    @jax.jit
    def run(arrays, cotangents, segment_ids):
        attend = lambda *x: operator(*x, **options, **blocks, query_segment_ids=segment_ids, return_residual=True)
        results, pull = jax.vjp(attend, *arrays)
        return *results, *pull(tuple(cotangents))

    whole = np.zeros((1, problem(name)[0][0].shape[1]), np.int32) if implementation == "reference" else None
    return lambda arrays, cotangents, segment_ids=whole: run(arrays, cotangents, segment_ids)


@pytest.mark.parametrize("operator", [reference, scfa_jax], ids=["reference", "scfa_jax"])
def test_chunks_of_one_are_the_papers(operator):
    """For each query: gates over all keys before the window, the highest `num_keys` of them, one softmax with both."""
    (query, key, value, scores), _, options = problem("the paper's")
    output = jax.jit(partial(operator.sparsek_attention, **options))(query, key, value, scores)
    query, key, value, scores = (np.asarray(x, np.float64)[0] for x in (query, key, value, scores))
    num_keys, window = options["num_keys"], options["window"]
    for t in range(query.shape[0]):
        before = max(0, t - window + 1)
        gates = np.ones(t + 1)
        gates[:before] = by_bisection(scores[:before, 0], num_keys, np.ones(before, bool))
        taken = [*np.argsort(-scores[:before, 0])[:num_keys], *range(before, t + 1)]
        for head in range(query.shape[1]):
            gated_key, gated_value = (gates[taken, None] * x[taken, 0] for x in (key, value))
            weights = np.exp(gated_key @ query[t, head] / 4)
            np.testing.assert_allclose(output[0, t, head], weights @ gated_value / weights.sum(), atol=2e-5)


def assert_equal_results(got, want):
    """Output, log-sum-exp, and the gradients of query, key, value and scores."""
    for label, x, y in zip(("output", "logsumexp", "query", "key", "value", "scores"), got, want, strict=True):
        np.testing.assert_array_equal(x == -np.inf, y == -np.inf)
        x, y = (np.maximum(x, -1e30) for x in (x, y))
        largest = np.abs(y, where=y > -1e30, out=np.zeros_like(y)).max()
        np.testing.assert_allclose(x, y, atol=1e-5 * largest, rtol=0, err_msg=label)


def test_equals_the_dense_definition():
    arrays, cotangents, _ = problem("chunks")
    want = results_of("chunks", "reference")(arrays, cotangents)
    assert_equal_results(results_of("chunks", IMPLEMENTATIONS[0])(arrays, cotangents), want)
    assert np.count_nonzero(want[-1])


def test_kernels_equal_the_dense_definition_within_segments():
    """Whatever stands in padding, and in whatever order: a query selects among the earlier keys of its segment."""
    arrays, cotangents, _ = problem("chunks")
    run, dense = (results_of("chunks", name) for name in (IMPLEMENTATIONS[-1], "reference"))
    for seed, kind in enumerate(SEGMENT_KINDS):
        ids = segment_ids(np.random.default_rng(seed), (2, 45), kind)
        got = run(arrays, cotangents, ids)
        assert_equal_results(got, dense(arrays, cotangents, ids))
        assert kind in ("huge", "padding") or np.count_nonzero(got[-1])
        poisoned = lambda x: jnp.where((ids < 0).reshape(2, 45, *(1,) * (x.ndim - 2)), jnp.nan, x)  # noqa: B023
        for x, y in zip(got, run(*jax.tree.map(poisoned, (arrays, cotangents)), ids), strict=True):
            np.testing.assert_array_equal(x, y)
            in_padding = np.asarray(x)[ids < 0]
            assert not np.any(np.isfinite(in_padding) & (in_padding != 0))


@pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices, such as those that a CPU can simulate")
def test_devices_select_for_their_own_sequences_and_heads():
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    arrays, cotangents, _ = problem("chunks")
    run = results_of("chunks", IMPLEMENTATIONS[0])
    on_heads = NamedSharding(mesh, P("data", None, "model"))
    with jax.set_mesh(mesh):
        program = jax.jit(run).lower(*jax.device_put((arrays, cotangents), on_heads)).compile()
    assert not COLLECTIVE.findall(program.as_text())
    got = program(*jax.device_put((arrays, cotangents), on_heads))
    assert all(x.sharding.is_equivalent_to(on_heads, x.ndim) for x in got)
    assert_equal_results(got, run(arrays, cotangents))


def test_repeats_bit_for_bit():
    arrays, cotangents, _ = problem("chunks")
    run = results_of("chunks", IMPLEMENTATIONS[0])
    for x, y in zip(run(arrays, cotangents), run(arrays, cotangents), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("implementation", ["reference", IMPLEMENTATIONS[0]])
def test_what_is_later_neither_changes_results_nor_gets_gradients(implementation):
    arrays, cotangents, _ = problem("chunks")
    run = results_of("chunks", implementation)
    for seen in (1, 13, 24, 40):
        replaced = lambda x, y: np.concatenate([np.asarray(x)[:, :seen], np.asarray(y)[:, seen:]], axis=1)  # noqa: B023
        cut = tuple(replaced(x, np.zeros_like(x)) for x in cotangents)
        others = tuple(replaced(x, 5 * np.roll(x, 3, axis=1)) for x in arrays)
        got, changed = (run(x, cut) for x in (arrays, others))
        for x, y in zip(got[:2], changed[:2], strict=True):
            np.testing.assert_allclose(x[:, :seen], y[:, :seen], atol=1e-6)
        for gradient in got[2:]:
            assert not np.any(gradient[:, seen:])


@pytest.mark.parametrize("implementation", ["reference", IMPLEMENTATIONS[0]])
def test_what_takes_no_part_reaches_nothing(implementation):
    """A key without a score (padding in a window that is over, say) is not selected; nor where nothing is left."""
    arrays, cotangents, options = problem("chunks")
    run = results_of("chunks", implementation)
    query, key, value, scores = arrays
    without = np.array(scores)
    without[0, :20], without[1] = -np.inf, np.nan
    output, logsumexp, *gradients = run((query, key, value, without), cotangents)
    assert np.isfinite(logsumexp).all()
    assert not np.any(gradients[-1][0, :20])
    assert not np.any(gradients[-1][1])
    missing = np.random.default_rng(0).random(scores.shape) < 0.5
    without = [(query, key, value, np.where(missing, x, scores)) for x in (np.nan, -np.inf)]
    for x, y in zip(*(run(x, cotangents) for x in without), strict=True):
        np.testing.assert_array_equal(x, y)
    position = np.arange(45)[:, None]
    first = position // options["chunk_size"] * options["chunk_size"] - options["window"] + 1
    window = jax.jit(reference.range_attention)(query[1:], key[1:], value[1:], first, position + 1)
    np.testing.assert_allclose(output[1:], window, atol=1e-5)


GOOD = {"num_keys": 4, "window": 6, "chunk_size": 8}
BAD = {
    "no keys": ({"num_keys": 0}, ValueError, "num_keys must be at least 1, got 0"),
    "no window": ({"window": 0}, ValueError, "window must be at least 1, got 0"),
    "traced": ({"chunk_size": 2.0}, TypeError, r"chunk_size must be a static int, got 2\.0"),
    "few candidates": ({"num_candidates": 3}, ValueError, "num_candidates must be at least 4, got 3"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_named(name):
    options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        scfa_jax.sparsek_attention(*problem("chunks")[0], **{**GOOD, **options})


@pytest.mark.usefixtures("unchecked")
def test_bad_arrays_are_named():
    query, key, value, scores = problem("chunks")[0]
    with pytest.raises(ValueError, match=r"scores must be \(2, 45, 2\), one of each key, got shape \(2, 45, 4\)"):
        scfa_jax.sparsek_attention(query, key, value, jnp.tile(scores, 2), **GOOD)
    with pytest.raises(TypeError, match=r"scores must be float32, .* got .*int32"):
        scfa_jax.sparsek_attention(query, key, value, scores.astype(jnp.int32), **GOOD)
    with pytest.raises(ValueError, match="key must have the length of query, 40, got 45"):
        scfa_jax.sparsek_attention(query[:, :40], key, value, scores, **GOOD)
    with pytest.raises(ValueError, match=r"query_segment_ids must be \[1 or 2, 45\], got shape \(3, 45\)"):
        scfa_jax.sparsek_attention(query, key, value, scores, **GOOD, query_segment_ids=jnp.zeros((3, 45), jnp.int32))
    with pytest.raises(ValueError, match=r"where must have the shape of scores, \(4,\), got \(3,\)"):
        sparsek_gates(jnp.ones(4), 2, where=jnp.ones(3, bool))
    with pytest.raises(TypeError, match="where must be boolean"):
        sparsek_gates(jnp.ones(4), 2, where=jnp.ones(4))
    with pytest.raises(ValueError, match="k must be at least 0, got -1"):
        sparsek_gates(jnp.ones(4), -1)


@pytest.mark.parametrize("shape", [(0, 64, 2, 16), (2, 0, 2, 16)], ids=str)
def test_nothing_gives_nothing(shape):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    attend = lambda x: scfa_jax.sparsek_attention(x, x, x, x[..., 0], num_keys=8, window=8, chunk_size=32)
    assert jax.eval_shape(attend, x).shape == shape
