"""What all tests share: the implementations that this machine can run, and when GPU tests are left out."""

import gc
import importlib.metadata
import os
import pathlib
import shutil
import subprocess

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several test processes share a GPU
# The suite compiles thousands of small functions and runs each once: no time for optimisation or autotuning.
if shutil.which("nvidia-smi"):
    # Deterministic: else XLA sums an embedding's gradient in any order, and no run continues bit for bit.
    os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0 --xla_gpu_deterministic_ops=true")
    # The projections of Flax's layers are compared to float32 accuracy; the library's own dots never ask for this.
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    # Each process begins with another GPU, and sees the others for the tests of several devices.
    gpus = [str(i) for i in range(subprocess.check_output(["nvidia-smi", "-L"]).count(b"\n"))]
    first = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % len(gpus)
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", ",".join(gpus[first:] + gpus[:first]))
else:
    # In one piece: each part that a program is cut into for several cores is compiled with a cost of its own.
    cheap = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    cheap += " --xla_cpu_parallel_codegen_split_count=1"
    if importlib.metadata.version("jaxlib") < "0.11":  # unknown to later ones; each compiles in a third of the time
        cheap += " --xla_cpu_use_fusion_emitters=false"
    several_devices = "--xla_force_host_platform_device_count=8"  # for meshes; all else runs on the first
    os.environ.setdefault("XLA_FLAGS", f"{cheap} {several_devices}")

import typing

import beartype  # noqa: F401  (before TYPE_CHECKING is set below)
import hypothesis
import jax
import jaxtyping
import pytest

# Shapes stand in the library's signatures, for typing alone. Here they are imported, and checked at every call.
ROOT = pathlib.Path(__file__).parents[1]
WITH_SHAPES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "scfa_jax").rglob("*.py")
    if "from jaxtyping import" in path.read_text() and path.stem != "index"  # JAX makes pytrees of any objects
]
typing.TYPE_CHECKING = True
with jaxtyping.install_import_hook(WITH_SHAPES, "beartype.beartype"):
    pass
typing.TYPE_CHECKING = False

MAPS = pathlib.Path("/proc/self/maps")
HAS_GPU = jax.default_backend() == "gpu"
# Options of `jax.jit` where two programs are to agree bit for bit: XLA's own choice, which a flag above takes from it.
AS_USERS_COMPILE = {"xla_cpu_use_fusion_emitters": True} if "fusion_emitters=false" in os.environ["XLA_FLAGS"] else {}
IMPLEMENTATIONS = ("triton",) if HAS_GPU else ("xla", "triton_interpret")


def examples(number: int) -> int:
    """How many examples to draw: all of them on the many cores beside a GPU, a fifth but at least three elsewhere."""
    return number if HAS_GPU else min(number, max(3, number // 5))


hypothesis.settings.register_profile(
    "scfa",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=examples(12),
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


def pytest_collection_finish():
    """Spares Python's garbage collector the modules, which stay, and many of its rounds over traces."""
    gc.freeze()
    gc.set_threshold(200_000, 20, 20)


compilations = 0  # since memory maps were last counted


def _count_compilations(event: str, *_, **__) -> None:
    global compilations
    compilations += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_count_compilations)


@pytest.fixture(autouse=True)
def _few_compiled_functions():
    """A function compiled for a CPU holds memory maps, of which Linux gives a process 65,530: XLA crashes beyond."""
    global compilations
    yield
    if compilations > 100 and MAPS.exists():  # counting takes up to 40 ms
        compilations = 0
        if MAPS.read_bytes().count(b"\n") > 45_000:
            jax.clear_caches()
            gc.collect()


@pytest.fixture
def unchecked():
    """Turns the checks of signatures off, for what is meant to fail in the library's own."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request) -> str:
    """Each implementation that runs here."""
    return request.param


@pytest.fixture
def one_implementation() -> str:
    """The fastest of them: for what is built around the kernels, and no kernel knows of."""
    return IMPLEMENTATIONS[0]


@pytest.fixture
def text(tmp_path):
    """A file to train on."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{number} bottles of beer on the wall, " for number in range(100)))
    return path


@pytest.fixture
def start(text, tmp_path, monkeypatch):
    """Calls `python -m train` with options for a tiny run of 12 steps, and returns its exit code."""
    from train.__main__ import main

    monkeypatch.chdir(tmp_path)
    options = {"layers": 1, "width": 16, "heads": 2, "attention": "hash(2)", "dtype": "float32"}
    options |= {"data": text, "seq_len": 16, "batch_size": 2, "steps": 12, "warmup": 2, "lr": 0.01}
    options |= {"log_every": 1, "eval_every": 8, "eval_tokens": 64, "checkpoint_every": 6, "sample_length": 5}

    def call(**more) -> int:
        return main([f"--{name.replace('_', '-')}={value}" for name, value in {**options, **more}.items()])

    return call


@pytest.fixture
def fake_steps(monkeypatch):
    """Puts a step in the place of the compiled one that tells the losses given, the last one for ever.

    The held-out loss is a function of the steps done; samples are empty.
    """
    import jax.numpy as jnp

    import train.run
    import train.sample
    from train.loop import Compiled
    from train.step import Measured

    def put(*losses: float, gradient_norm: float = 1.0, held_out=lambda step: 1.0) -> None:
        done = 0

        def step(state, batch):
            nonlocal done
            done = int(state.step) + 1
            measured = Measured(*map(jnp.float32, (losses[min(done, len(losses)) - 1], gradient_norm, 0.1)))
            return state._replace(step=state.step + 1), measured

        def evaluation(params, fixed, batch, weights):
            return jnp.float32(held_out(done) * weights.sum() * (batch.tokens.shape[1] - 1))

        monkeypatch.setattr(train.run, "compile_steps", lambda *arguments: Compiled(step, evaluation, None))
        monkeypatch.setattr(train.sample, "generate", lambda model, state, prompts, **options: prompts)

    return put
