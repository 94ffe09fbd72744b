"""What `import scfa_jax` brings, and what it must not."""

import subprocess
import sys
from importlib.metadata import requires, version

import scfa_jax

PUBLIC = {
    "BlockSizes",
    "SparseIndex",
    "Tile",
    "causal_attention",
    "causal_index",
    "hash_index",
    "hash_sparse_attention",
    "keep_index",
    "lsh_hash",
    "qk_sparse_attention",
    "random_rotations",
    "range_attention",
    "range_index",
    "reference",
    "sparse_attention",
}


def test_every_public_name_is_there_and_documented():
    for name in PUBLIC:
        assert getattr(scfa_jax, name).__doc__, name


def test_reference_defines_every_operator():
    for name in PUBLIC:
        if name.endswith("_attention") and name != "sparse_attention":
            assert callable(getattr(scfa_jax.reference, name))


def test_importing_the_core_imports_nothing_but_jax_and_numpy():
    code = (
        "import sys, scfa_jax; "
        "print([m for m in ('flax', 'chex', 'optax', 'jaxtyping', 'beartype', "
        "'jax.experimental.pallas') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_core_depends_on_jax_and_numpy_alone():
    core = {r.split(">")[0] for r in requires("scfa-jax") if "extra" not in r}
    assert core == {"jax", "jaxlib", "numpy"}
    assert version("scfa-jax")
