"""`jax.export`: artefacts for a CPU and for CUDA, forward and backward, through bytes and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SMALL_BLOCKS, Shape, make_case
from conftest import HAS_GPU
from jax import export
from lowering import H100, number_of_kernels

KERNELS = [export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
HERE = "cuda" if HAS_GPU else "cpu"


def exported(case, platform: str) -> tuple[export.Exported, tuple]:
    """The case's operator with its log-sum-exp, written to bytes with its gradients and read again."""

    def attend(query, key, value, pattern):
        options = {**case.options, "return_residual": True, "block_sizes": SMALL_BLOCKS}
        return case.operator(query, key, value, *pattern, **options)

    arguments = (case.query, case.key, case.value, case.pattern)
    made = export.export(jax.jit(attend), platforms=(platform,), disabled_checks=KERNELS)(*arguments)
    return export.deserialize(made.serialize(vjp_order=1)), arguments


def case_of(pattern: str):
    return make_case(pattern, np.random.default_rng(0), Shape(1, 40, 40, 2, 2, 16), jnp.float32)


@pytest.mark.parametrize("pattern", ["hash", "keep"])
def test_an_artefact_computes_what_the_operator_does_and_its_gradients(pattern):
    case = case_of(pattern)
    loaded, (*arrays, made) = exported(case, HERE)

    def results(attend):
        def loss(*arrays):
            output, logsumexp = attend(*arrays)
            total = jnp.sum(jnp.sin(output)) + jnp.sum(jnp.where(jnp.isfinite(logsumexp), logsumexp, 0))
            return total, (output, logsumexp)

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arrays)

    ours = results(lambda *arrays: loaded.call(*arrays, made))
    expected = results(lambda *arrays: case.attend(*arrays, block_sizes=SMALL_BLOCKS))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert jnp.abs(other).max() > 0
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_an_artefact_for_cuda_is_made_without_a_gpu_and_holds_kernels():
    with jax.sharding.use_abstract_mesh(H100):
        loaded, arguments = exported(case_of("hash"), "cuda")
    assert loaded.platforms == ("cuda",)
    assert loaded.in_avals == tuple(jax.typeof(x) for x in jax.tree.leaves(arguments))
    forward, backward = (number_of_kernels(x.mlir_module()) for x in (loaded, loaded.vjp()))
    assert 0 < forward < backward
    if not HAS_GPU:
        with pytest.raises(ValueError, match="exported for platforms"):
            loaded.call(*arguments)
