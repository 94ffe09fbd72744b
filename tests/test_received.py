"""The attention that keys receive, against its dense definition and loops, and what it keeps to."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SEGMENT_KINDS, SMALL_BLOCKS, segment_ids
from conftest import HAS_GPU
from jax.extend.core import jaxprs_in_params
from test_lowering import H100

import scfa_jax
from benchmarks.tolerance import Dense, dense_results, problems
from scfa_jax import reference

BATCH, LENGTH, HEADS, KEY_HEADS, SIZE = 2, 45, 4, 2, 16
WINDOWS = [jnp.int32(window) for window in (1, 6, 100)]


@cache
def arrays(dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 2)
    query = jax.random.normal(keys[0], (BATCH, LENGTH, HEADS, SIZE), dtype)
    return 2 * query, jax.random.normal(keys[1], (BATCH, LENGTH, KEY_HEADS, SIZE), dtype)


@cache
def operator(implementation):
    """A function of query, key, window and segment ids, compiled once for all windows and segments."""
    if implementation == "reference":
        return jax.jit(lambda q, k, w, ids: reference.attention_received(q, k, window=w, segment_ids=ids))
    how = {"implementation": implementation, "block_sizes": SMALL_BLOCKS}
    return jax.jit(lambda q, k, w, ids: scfa_jax.attention_received(q, k, window=w, segment_ids=ids, **how))


def ids_of(kind):
    return segment_ids(np.random.default_rng(SEGMENT_KINDS.index(kind)), (BATCH, LENGTH), kind)


def test_the_reference_equals_loops():
    (query, key), ids = arrays(), ids_of("scattered")
    want = np.zeros((BATCH, LENGTH, KEY_HEADS))
    for b, t, n in np.ndindex(BATCH, LENGTH, HEADS):
        seen = [s for s in range(max(0, t - 5), t + 1) if ids[b, s] == ids[b, t] >= 0]
        scores = np.asarray(key, np.float64)[b, seen, n // 2] @ np.asarray(query, np.float64)[b, t, n] / 4
        want[b, seen, n // 2] += np.exp(scores) / np.exp(scores).sum()
    got = operator("reference")(query, key, WINDOWS[1], ids)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(got.sum(), HEADS * (ids >= 0).sum(), rtol=1e-5)


@pytest.mark.parametrize("kind", SEGMENT_KINDS)
def test_equals_the_dense_definition(kind, implementation):
    """By the rule of `benchmarks.tolerance`, as the derivative by a value that it is; for grouped heads."""
    (query, key), ids = arrays(), ids_of(kind)
    for window in WINDOWS:
        mask = reference.causal_mask(LENGTH, LENGTH) & reference.window_mask(LENGTH, LENGTH, window)
        mask = mask & reference.segment_mask(ids, ids)
        dense = dense_results(query, key, key, mask, jnp.ones_like(query), jnp.zeros(query.shape[:3]))
        dense = Dense(*((x[-1][..., 0],) for x in dense))._replace(
            want=(operator("reference")(query, key, window, ids),)
        )
        got = operator(implementation)(query, key, window, ids)
        assert got.dtype == jnp.float32
        found = problems([got], dense, jnp.float32, in_tf32_products=HAS_GPU)
        assert not found, found
        poisoned = (jnp.where((ids < 0)[..., None, None], jnp.nan, x) for x in (query, key))
        np.testing.assert_array_equal(got, operator(implementation)(*poisoned, window, ids))


def test_a_key_is_done_when_it_leaves_the_window(one_implementation):
    """What is later changes the sums of the last `window - 1` keys before it, and of no earlier ones."""
    (query, key), ids, run = arrays(), ids_of("one"), operator(one_implementation)
    for seen in (13, 40):
        others = (jnp.concatenate([x[:, :seen], 5 * x[:, seen:]], axis=1) for x in (query, key))
        before, after = (np.asarray(run(*x, WINDOWS[1], ids)) for x in ((query, key), others))
        done = seen - 6 + 1
        np.testing.assert_array_equal(before[:, :done], after[:, :done])
        assert (before[:, done:seen] != after[:, done:seen]).all()


def test_no_gradient_flows_through_it(one_implementation):
    """Nor need there be segments."""

    @jax.jit
    def receive(query, key):
        f = lambda q, k: scfa_jax.attention_received(q, k, window=6, implementation=one_implementation)
        received, pull = jax.vjp(f, query, key)
        return received, pull(jnp.cos(received))

    received, gradients = receive(*arrays())
    np.testing.assert_allclose(received, operator("reference")(*arrays(), WINDOWS[1], ids_of("one")), rtol=1e-5)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)


def dots(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield str(equation.invars[0].aval.dtype), equation.params["precision"]
        for inner in jaxprs_in_params(equation.params):
            yield from dots(inner)


@pytest.mark.parametrize(
    ("dtype", "options", "preset"),
    [("float32", {}, "X3"), ("float32", {"precision": "tf32"}, ""), ("bfloat16", {}, "")],
)
def test_a_gpu_multiplies_16_bits_in_one_tf32_product(dtype, options, preset):
    """Which loses nothing of them; and nothing is rounded to 16 bits."""
    query, key = (x[0] for x in arrays(dtype))  # without a batch axis
    receive = lambda q, k: scfa_jax.attention_received(q, k, window=6, implementation="triton", **options)
    with jax.sharding.use_abstract_mesh(H100):
        traced = jax.make_jaxpr(receive)(query, key)
    assert [(x.shape, str(x.dtype)) for x in traced.out_avals] == [((LENGTH, KEY_HEADS), "float32")]
    suffix = f"_{preset}" if preset else ""
    preset = jax.lax.DotAlgorithmPreset[f"TF32_TF32_F32{suffix}"]
    assert set(dots(traced.jaxpr)) == {("float32", preset)}


def test_bad_arrays_are_named():
    query, key = arrays()
    with pytest.raises(ValueError, match="key must have the length of query, 40, got 45"):
        scfa_jax.attention_received(query[:, :40], key, window=6)
    with pytest.raises(ValueError, match=r"segment_ids must be \[B, 45\] or \[45\], got shape \(2, 44\)"):
        scfa_jax.attention_received(query, key, window=6, segment_ids=jnp.zeros((2, 44), jnp.int32))
    with pytest.raises(ValueError, match="window must be at least 0, got -1"):
        scfa_jax.attention_received(query, key, window=-1)
    with pytest.raises(TypeError, match=r"key must have the dtype of query, float32, got bfloat16"):
        scfa_jax.attention_received(query, key.astype(jnp.bfloat16), window=6)
