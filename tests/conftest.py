"""What all tests share: the implementations that this machine can run, and when GPU tests are left out."""

import os
import shutil

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several test processes share a GPU
# The suite compiles thousands of small functions and runs each once: no time for optimisation or autotuning.
if shutil.which("nvidia-smi"):
    # Deterministic: else XLA sums an embedding's gradient in any order, and no run continues bit for bit.
    os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0 --xla_gpu_deterministic_ops=true")
    # The projections of Flax's layers are compared to float32 accuracy; the library's own dots never ask for this.
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
else:
    cheap = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    os.environ.setdefault("XLA_FLAGS", cheap)

import hypothesis
import jax
import pytest

HAS_GPU = jax.default_backend() == "gpu"
IMPLEMENTATIONS = ("triton",) if HAS_GPU else ("xla", "triton_interpret")

hypothesis.settings.register_profile(
    "scfa",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=12,
    # The fixture that trips this check is `implementation`, a name.
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("scfa")


def pytest_collection_modifyitems(items):
    if HAS_GPU:
        return
    no_gpu = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_gpu)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request) -> str:
    """Each implementation that runs here."""
    return request.param
