"""How float32 is multiplied: to float32 accuracy, or in TF32 on a GPU if asked; `precision` reaches every dot."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SMALL_BLOCKS, Shape, make_case
from conftest import HAS_GPU
from jax.extend.core import jaxprs_in_params
from lowering import H100, gradients, lowered_for_cuda

import scfa_jax
from scfa_jax import attention, patterns

HIGH, HIGHEST = jax.lax.Precision.HIGH, jax.lax.Precision.HIGHEST
ONCE, THRICE = jax.lax.DotAlgorithmPreset.TF32_TF32_F32, jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
SHAPE = (1, 32, 2, 16)

# Each operator, and what it takes besides query, key and value.
OPERATORS = {
    "causal": (scfa_jax.causal_attention, dict),
    "hash": (scfa_jax.hash_sparse_attention, lambda: {"query_hash": ids(SHAPE[:3])}),
    "rounds of hashes": (scfa_jax.hash_sparse_attention, lambda: {"query_hash": ids((2, *SHAPE[:3]))}),
    "keep": (
        scfa_jax.qk_sparse_attention,
        lambda: dict.fromkeys(("query_keep", "key_keep"), jnp.ones(SHAPE[:3], bool)),
    ),
    "range": (scfa_jax.range_attention, lambda: {"key_start": ids(SHAPE[:3]), "key_stop": ids(SHAPE[:3])}),
    "index": (scfa_jax.sparse_attention, lambda: {"index": scfa_jax.causal_index(32, 32)}),
    "several indices": (scfa_jax.sparse_attention, lambda: {"index": patterns.strided_index(32, 32, 4)}),
    "moba": (scfa_jax.moba_attention, lambda: {"block_size": 8, "top_k": 1}),  # it chooses in float32 always
    "window": (scfa_jax.window_attention, lambda: {"window": 4, "num_sinks": 2}),
    "sparsek": (
        scfa_jax.sparsek_attention,
        lambda: {"scores": jnp.zeros(SHAPE[:3]), "num_keys": 4, "window": 4, "chunk_size": 16},
    ),
}


def ids(shape):
    return jnp.zeros(shape, jnp.int32)


def dots(jaxpr, kernel=None):
    """(kernel, dtype of the first operand, precision) of every dot."""
    for equation in jaxpr.eqns:
        inside = str(equation.params["name"]) if equation.primitive.name == "pallas_call" else kernel
        if equation.primitive.name == "dot_general":
            yield kernel, str(equation.invars[0].aval.dtype), equation.params["precision"]
        for inner in jaxprs_in_params(equation.params):
            yield from dots(inner, inside)


@pytest.mark.parametrize(
    ("implementation", "dtype", "of_default", "of_tf32"),
    [
        ("triton", "float32", THRICE, ONCE),
        ("triton", "bfloat16", None, None),
        ("triton_interpret", "float32", (HIGHEST, HIGHEST), (HIGH, HIGH)),
        ("xla", "float32", (HIGHEST, HIGHEST), (HIGH, HIGH)),
    ],
)
def test_all_dots_forward_and_backward_obey(implementation, dtype, of_default, of_tf32):
    case = make_case("causal", np.random.default_rng(0), Shape(1, 32, 32, 1, 1, 16), dtype)
    kernels = (None,) if implementation == "xla" else ("scfa_forward", "scfa_dq", "scfa_dkv")
    for options, expected in (({}, of_default), ({"precision": "tf32"}, of_tf32)):
        function, arguments = gradients(case, implementation, block_sizes=SMALL_BLOCKS, **options)
        with jax.sharding.use_abstract_mesh(H100), jax.default_matmul_precision(None):  # what `conftest` sets aside
            found = dots(jax.make_jaxpr(function)(*arguments).jaxpr)
        assert set(found) == {(kernel, dtype, expected) for kernel in kernels}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_gpu_gets_differs_in_float32_alone(dtype):
    case = make_case("causal", np.random.default_rng(0), Shape(1, 32, 32, 1, 1, 16), dtype)
    made = (gradients(case, "triton", block_sizes=SMALL_BLOCKS, precision=name) for name in ("float32", "tf32"))
    in_float32, in_tf32 = (lowered_for_cuda(function, *arguments) for function, arguments in made)
    assert (in_float32 == in_tf32) == (dtype == "bfloat16")


def test_every_operator_is_here():
    takers = {f for name, f in inspect.getmembers(scfa_jax, callable) if name.endswith("_attention")}
    takers = {f for f in takers if "block_sizes" in inspect.signature(f).parameters}
    assert takers == {operator for operator, _ in OPERATORS.values()}


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_hands_it_on(name):
    operator, pattern = OPERATORS[name]
    attend = lambda x: operator(x, x, x, **pattern(), implementation="xla", precision="tf32")
    found = {precision for *_, precision in dots(jax.make_jaxpr(attend)(jnp.zeros(SHAPE)).jaxpr)}
    assert found == {(HIGH, HIGH)}


@pytest.mark.skipif(HAS_GPU, reason="this machine has TF32")
@pytest.mark.parametrize("implementation", ["xla", "triton_interpret"])
def test_a_cpu_computes_both_alike(implementation):
    case = make_case("causal", np.random.default_rng(1), Shape(1, 32, 32, 1, 1, 16), jnp.float32)
    attend = partial(case.attend, implementation=implementation, block_sizes=SMALL_BLOCKS)
    results = [
        jax.jit(partial(attend, precision=precision))(case.query, case.key, case.value)
        for precision in ("float32", "tf32")
    ]
    for x, y in zip(*results, strict=True):
        np.testing.assert_array_equal(x, y)


def test_each_is_traced_once(monkeypatch):
    traced = []
    forward = attention._forward

    def counted(backend, call, *arrays):
        traced.append(call.precision)
        return forward(backend, call, *arrays)

    monkeypatch.setattr(attention, "_forward", counted)
    for precision in ("float32", "tf32", "float32", "tf32"):
        attend = partial(scfa_jax.causal_attention, precision=precision, implementation="xla")
        jax.eval_shape(attend, *[jnp.zeros(SHAPE)] * 3)
    assert traced == ["float32", "tf32"]
