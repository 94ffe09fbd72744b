"""The attention that keys receive, against its dense definition and loops, and what it keeps to."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SEGMENT_KINDS, SMALL_BLOCKS, segment_ids
from conftest import IMPLEMENTATIONS
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_lowering import H100

import scfa_jax
from scfa_jax import reference, remat

BATCH, LENGTH, HEADS, KEY_HEADS, SIZE = 2, 45, 4, 2, 16
WINDOWS = [jnp.int32(window) for window in (1, 6, 100)]


@cache
def arrays(dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 2)
    query = jax.random.normal(keys[0], (BATCH, LENGTH, HEADS, SIZE), dtype)
    return query, jax.random.normal(keys[1], (BATCH, LENGTH, KEY_HEADS, SIZE), dtype)


@cache
def operator(implementation):
    """A function of query, key, window and segment ids, compiled once for all windows and segments."""
    how = {"implementation": implementation, "block_sizes": SMALL_BLOCKS}
    receive = reference.attention_received
    if implementation != "reference":
        receive = partial(scfa_jax.attention_received, **how)
    return jax.jit(lambda q, k, window, ids=None: receive(q, k, window=window, segment_ids=ids))


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
def test_equals_the_dense_definition_within_segments(kind):
    """To float32 accuracy, whatever stands in padding; windows may be longer than the sequence."""
    (query, key), ids = arrays(), ids_of(kind)
    for window in WINDOWS:
        got = operator(IMPLEMENTATIONS[0])(query, key, window, ids)
        np.testing.assert_allclose(got, operator("reference")(query, key, window, ids), rtol=1e-5)
        poisoned = (jnp.where((ids < 0)[..., None, None], jnp.nan, x) for x in (query, key))
        np.testing.assert_array_equal(got, operator(IMPLEMENTATIONS[0])(*poisoned, window, ids))


def test_kernels_equal_the_dense_definition():
    query, key = arrays()
    for window in WINDOWS:
        got = operator(IMPLEMENTATIONS[-1])(query, key, window)
        np.testing.assert_allclose(got, operator("reference")(query, key, window, ids_of("one")), rtol=1e-5)


def test_a_key_is_done_when_it_leaves_the_window():
    """What is later changes the sums of the last `window - 1` keys before it, and of no earlier ones."""
    (query, key), run = arrays(), operator(IMPLEMENTATIONS[-1])
    for seen in (13, 40):
        others = (jnp.concatenate([x[:, :seen], 5 * x[:, seen:]], axis=1) for x in (query, key))
        before, after = (np.asarray(run(*x, WINDOWS[1])) for x in ((query, key), others))
        done = seen - 6 + 1
        np.testing.assert_array_equal(before[:, :done], after[:, :done])
        assert (before[:, done:seen] != after[:, done:seen]).all()


@pytest.mark.skipif(jax.device_count() < 2, reason="needs 2 devices, such as those that a CPU can simulate")
def test_sums_are_sharded_as_keys_are():
    mesh = jax.make_mesh((1, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    spec = P("data", None, "model")
    with jax.set_mesh(mesh):
        shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)) for x in arrays())
        received = jax.eval_shape(partial(scfa_jax.attention_received, window=6), *shapes)
    assert received.sharding.spec == spec


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.parametrize(("dtype", "options"), [("float32", {"precision": "tf32"}), ("bfloat16", {})])
def test_a_gpu_multiplies_16_bits_in_one_tf32_product(dtype, options):
    """Which loses nothing of them; nothing is rounded to 16 bits. And checkpoint policies can keep the sums."""
    query, key = (x[0] for x in arrays(dtype))  # without a batch axis
    receive = lambda q, k: scfa_jax.attention_received(q, k, window=6, implementation="triton", **options)
    with jax.sharding.use_abstract_mesh(H100):
        traced = jax.make_jaxpr(receive)(query, key)
    assert [(x.shape, str(x.dtype)) for x in traced.out_avals] == [((LENGTH, KEY_HEADS), "float32")]
    found = list(equations(traced.jaxpr))
    dots = [x for x in found if x.primitive.name == "dot_general"]
    dots = {(str(x.invars[0].aval.dtype), x.params["precision"]) for x in dots}
    assert dots == {("float32", jax.lax.DotAlgorithmPreset.TF32_TF32_F32)}
    names = [x for x in found if x.primitive.name == "name" and x.params["name"] == remat.INDEX]
    assert [x.invars[0].aval.shape for x in names] == [(1, LENGTH, KEY_HEADS)]


def test_bad_arrays_are_named():
    query, key = arrays()
    with pytest.raises(ValueError, match="key must have the length of query, 40, got 45"):
        scfa_jax.attention_received(query[:, :40], key, window=6)
    with pytest.raises(ValueError, match=r"segment_ids must be \[B, 45\] or \[45\], got shape \(2, 44\)"):
        scfa_jax.attention_received(query, key, window=6, segment_ids=jnp.zeros((2, 44), jnp.int32))
    with pytest.raises(ValueError, match=r"segment_ids must be \[1 or 2, 45\], got shape \(3, 45\)"):
        scfa_jax.attention_received(query, key, window=6, segment_ids=jnp.zeros((3, 45), jnp.int32))
    with pytest.raises(ValueError, match="window must be at least 0, got -1"):
        scfa_jax.attention_received(query, key, window=-1)
    with pytest.raises(TypeError, match=r"key must have the dtype of query, float32, got bfloat16"):
        scfa_jax.attention_received(query, key.astype(jnp.bfloat16), window=6)
