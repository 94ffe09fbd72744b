"""The kernels lower for CUDA on a machine without a GPU, forward and backward, and read and write in place."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Shape, make_case
from conftest import HAS_GPU
from flax import nnx
from jax.extend.core import jaxprs_in_params
from lowering import ATTENTION, BOUNDS, H100, MARKS, RANGES, SORT, gradients, lowered_for_cuda, number_of_kernels

import scfa_jax
from benchmarks import phases
from scfa_jax.nnx import (
    BigBird,
    CausalSelfAttention,
    Fixed,
    Hash,
    KMeans,
    LearnedRotations,
    Longformer,
    SparseK,
    Strided,
    Window,
)


@pytest.mark.parametrize(
    ("pattern", "number"),
    [
        ("causal", ATTENTION + BOUNDS),
        ("hash", ATTENTION + BOUNDS + RANGES + MARKS),
        ("shared_hash", ATTENTION + BOUNDS),
        ("keep", ATTENTION + BOUNDS + 2 * SORT),
        ("range", ATTENTION + MARKS),
        ("blocks", ATTENTION + BOUNDS + SORT + MARKS),
    ],
)
@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(16, jnp.float32), (80, jnp.float16), (128, jnp.bfloat16)],
    ids=str,
)
def test_gradients_lower_to_a_few_kernels(pattern, number, head_dim, dtype):
    case = make_case(pattern, np.random.default_rng(0), Shape(2, 100, 100, 4, 2, head_dim), dtype)
    text = lowered_for_cuda(*_call(gradients(case, "triton")))
    assert number_of_kernels(text) == number


# A GPU runs every size, some in each dtype (test_gpu.py): these stand for them here.
SIZES = [(size, jnp.bfloat16) for size in (16, 24, 32, 40, 64, 128, 192, 256)]
SIZES += [(80, jnp.float32), (160, jnp.float16), (240, jnp.float32)]


@pytest.mark.parametrize(("head_dim", "dtype"), SIZES, ids=str)
def test_head_sizes_lower(head_dim, dtype):
    case = make_case("hash", np.random.default_rng(0), Shape(1, 64, 64, 1, 1, head_dim), dtype)
    assert number_of_kernels(lowered_for_cuda(*_call(gradients(case, "triton")))) == ATTENTION + BOUNDS + RANGES + MARKS


def test_vmapped_kernels_lower():
    case = make_case("hash", np.random.default_rng(0), Shape(2, 64, 64, 2, 2, 32), jnp.bfloat16)
    gradient, (query, key, value, pattern) = gradients(case, "triton")
    stacked = lambda x, axis: jnp.stack([x, x], axis)
    mapped = jax.vmap(jax.vmap(gradient, (2, None, 0, 1)), (0, None, None, None))
    arguments = (stacked(stacked(query, 2), 0), key, stacked(value, 0), tuple(stacked(x, 1) for x in pattern))
    assert number_of_kernels(lowered_for_cuda(mapped, *arguments)) == ATTENTION + BOUNDS + RANGES + MARKS


def test_the_benchmark_times_bounds_as_the_kernels_take_them():
    index = scfa_jax.causal_index(200, 200)
    assert (
        number_of_kernels(lowered_for_cuda(functools.partial(phases._bounds, "triton"), index)) == 2
    )  # by either side
    assert number_of_kernels(lowered_for_cuda(functools.partial(phases._bounds, "xla"), index)) == 0


def test_the_platform_that_code_is_lowered_for_decides():
    case = make_case("hash", np.random.default_rng(0), Shape(1, 64, 64, 1, 1, 32), jnp.bfloat16)
    function, arguments = gradients(case, None)
    assert number_of_kernels(lowered_for_cuda(function, *arguments)) == ATTENTION + BOUNDS + RANGES + MARKS
    on_cpu = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cpu",)).as_text()
    assert number_of_kernels(on_cpu) == 0


def test_a_head_size_that_triton_lacks_lowers_to_plain_jax():
    case = make_case("hash", np.random.default_rng(0), Shape(1, 64, 64, 1, 1, 20), jnp.bfloat16)
    assert number_of_kernels(lowered_for_cuda(*_call(gradients(case, None)))) == RANGES
    assert number_of_kernels(lowered_for_cuda(*_call(gradients(case, "xla")))) == 0


def test_kernels_get_the_callers_arrays_and_no_sorted_copies():
    """Outside the kernels nothing but delta has the size of query, key or value: no gather, no scatter of rows."""
    case = make_case("hash", np.random.default_rng(0), Shape(1, 128, 128, 2, 2, 64), jnp.bfloat16)
    function, arguments = gradients(case, "triton")
    with jax.sharding.use_abstract_mesh(H100):
        jaxpr = jax.make_jaxpr(function)(*arguments)
    rows = {case.query.size}

    def movers(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                continue
            if equation.primitive.name in ("gather", "scatter", "sort", "transpose", "concatenate"):
                yield from (equation for v in equation.outvars if v.aval.size in rows)
            for inner in jaxprs_in_params(equation.params):
                yield from movers(inner)

    assert not list(movers(jaxpr.jaxpr))


def launches(jaxpr):
    """The names of all kernels; in the text, parts of one shape may share a function that is called twice."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield str(equation.params["name"])
        for inner in jaxprs_in_params(equation.params):
            yield from launches(inner)


@pytest.mark.parametrize(
    ("kind", "parts", "marked", "sorts"),
    [
        (Hash(4, by=LearnedRotations()), 1, 1, 2),
        (Hash(4, local_window=16), 2, 2, 2),  # the window, and the bucket before it
        (Hash(4, by=KMeans()), 1, 1, 2),
        (SparseK(8, 8, 32), 2, 2, 0),  # the window, and copies of the selected keys
        (Window((8, 16, 32, 64), num_sinks=4), 2, 2, 0),  # the sinks, and the windows whatever their lengths
        (Longformer(16, 32), 3, 1, 4),  # the window, global keys, and the other keys for global queries
        (BigBird(16, num_global=4, num_random=1, block_size=16), 3, 2, 2),  # the window, global keys, a random block
        (Strided(16), 2, 2, 1),  # the window, and the column, whose sides are sorted at once
        (Fixed(16, 2), 2, 1, 4),  # the block, likewise but by 67 buckets, which take two passes; and summaries
    ],
    ids=str,
)
def test_modules_launch_each_part_once_and_hold_nothing_of_the_square_of_the_length(kind, parts, marked, sorts):
    """Marked are the parts with keys that no query may attend to; a sort is of one side of a part."""
    options = {"sparsity": kind, "dtype": jnp.bfloat16, "implementation": "triton"}
    made = nnx.eval_shape(lambda: CausalSelfAttention(64, 4, num_key_value_heads=2, rngs=nnx.Rngs(0), **options))
    graph, params, kept = nnx.split(made, nnx.Param, ...)

    def loss(params, x, kept):
        return jnp.sum(nnx.merge(graph, params, kept)(x, deterministic=True).astype(jnp.float32))

    with jax.sharding.use_abstract_mesh(H100):
        x = jax.ShapeDtypeStruct((2, 1035, 64), jnp.bfloat16)
        traced = jax.jit(jax.grad(loss, (0, 1))).trace(params, x, kept)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    is_ascending = parts - isinstance(kind, BigBird)  # ranges of random blocks are not
    counted = {"forward": parts, "dq": parts, "dkv": parts, "bounds": BOUNDS * is_ascending, "marks": MARKS * marked}
    counted |= {"count": sorts, "place": sorts}
    assert Counter(launches(traced.jaxpr.jaxpr)) == {f"scfa_{name}": n for name, n in counted.items() if n}
    assert number_of_kernels(text) > 0
    assert "1035x1035" not in text


@pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
def test_triton_without_a_gpu_raises_while_tracing():
    x = jnp.zeros((1, 16, 1, 16))
    with pytest.raises(NotImplementedError, match="GPU"):
        jax.eval_shape(lambda x: scfa_jax.causal_attention(x, x, x, implementation="triton"), x)


def _call(function_and_arguments):
    function, arguments = function_and_arguments
    return function, *arguments
