"""Bad input raises, before anything runs, an error that names the argument, what it was and what was expected."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import scfa_jax
from scfa_jax.backends.triton import _compat

pytestmark = pytest.mark.usefixtures("unchecked")

X = jnp.zeros((2, 8, 4, 16))
IDS = jnp.zeros((2, 8, 4), jnp.int32)
KEEP = jnp.ones((2, 8, 4), bool)


def causal(query=X, key=X, value=X, **options):
    return scfa_jax.causal_attention(query, key, value, **options)


def hashed(query_hash=IDS, key_hash=IDS, query=X, key=X, **options):
    return scfa_jax.hash_sparse_attention(query, key, key, query_hash, key_hash, **options)


BAD = {
    "query of rank 2": (lambda: causal(query=X[0, 0]), ValueError, ["query", r"\(4, 16\)"]),
    "query of rank 5": (lambda: causal(query=X[None]), ValueError, ["query", r"\(1, 2, 8, 4, 16\)"]),
    "key of another rank": (
        lambda: causal(key=X[0], value=X[0]),
        ValueError,
        ["key", r"\[B, S, K, H\]", r"\(8, 4, 16\)"],
    ),
    "value of another shape": (lambda: causal(value=X[:, :4]), ValueError, ["value", r"\(2, 4, 4, 16\)"]),
    "key of another batch size": (
        lambda: causal(key=X[:1], value=X[:1]),
        ValueError,
        ["key", "B = 2", r"\(1, 8, 4, 16\)"],
    ),
    "key of another head size": (
        lambda: causal(key=X[..., :8], value=X[..., :8]),
        ValueError,
        ["key", "H = 16", r"\(2, 8, 4, 8\)"],
    ),
    "heads that do not divide": (
        lambda: causal(key=X[:, :, :3], value=X[:, :, :3]),
        ValueError,
        ["key", "divides", "3 and 4"],
    ),
    "no heads": (lambda: causal(X[:, :, :0], X[:, :, :0], X[:, :, :0]), ValueError, ["heads", "0"]),
    "head size 0": (lambda: causal(X[..., :0], X[..., :0], X[..., :0]), ValueError, ["head size", "0"]),
    "float64": (lambda: causal(*(np.zeros(X.shape),) * 3), TypeError, ["query", "float64", "float32"]),
    "integers": (lambda: causal(*(X.astype(jnp.int32),) * 3), TypeError, ["query", "int32", "float32"]),
    "mixed dtypes": (lambda: causal(key=X.astype(jnp.bfloat16)), TypeError, ["key", "bfloat16", "float32"]),
    "no array": (lambda: causal(query=[1.0]), TypeError, ["query", "list"]),
    "unknown implementation": (
        lambda: causal(implementation="cuda"),
        ValueError,
        ["implementation", "cuda", "xla"],
    ),
    "empty sequence of implementations": (lambda: causal(implementation=()), ValueError, ["implementation"]),
    "head size that Triton lacks": (
        lambda: causal(*(X[..., :12],) * 3, implementation="triton_interpret"),
        NotImplementedError,
        ["head size", "12", "16 to 256"],
    ),
    "scale of no number": (lambda: causal(scale="big"), TypeError, ["scale", "big"]),
    "scale that is not finite": (lambda: causal(scale=float("nan")), ValueError, ["scale", "nan"]),
    "block sizes of no BlockSizes": (lambda: causal(block_sizes=64), TypeError, ["block_sizes", "64"]),
    "unknown precision": (lambda: causal(precision="highest"), ValueError, ["precision", "highest", "float32", "tf32"]),
    "precision of no name": (lambda: causal(precision=X), ValueError, ["precision", "tf32"]),
    "float offset": (lambda: causal(query_offset=1.5), TypeError, ["query_offset", "1.5"]),
    "offset of two axes": (lambda: causal(query_offset=IDS[0]), ValueError, ["query_offset", r"\(8, 4\)"]),
    "offset of another batch": (lambda: causal(query_offset=IDS[0, :3, 0]), ValueError, ["batch", "3", "2"]),
    "float hashes": (lambda: hashed(IDS.astype(jnp.float32)), TypeError, ["query_hash", "float32", "int32"]),
    "unsigned hashes": (lambda: hashed(IDS.astype(jnp.uint32)), TypeError, ["query_hash", "uint32", "int32"]),
    "64-bit hashes": (
        lambda: hashed(np.zeros(IDS.shape, np.int64)),
        TypeError,
        ["query_hash", "int64", "int32"],
    ),
    "boolean hashes": (lambda: hashed(key_hash=KEEP), TypeError, ["key_hash", "bool", "int32"]),
    "hash of rank 1": (lambda: hashed(IDS[0, 0]), ValueError, ["query_hash", r"\(4,\)"]),
    "hash of another length": (lambda: hashed(IDS[:, :5]), ValueError, ["query_hash", "8", r"\(2, 5, 4\)"]),
    "hash of another batch size": (
        lambda: hashed(jnp.zeros((3, 8, 4), jnp.int32)),
        ValueError,
        ["batch", "3"],
    ),
    "hash of other heads": (lambda: hashed(IDS[..., :3]), ValueError, ["heads", "3"]),
    "one hash for unequal sides": (
        lambda: hashed(IDS, None, key=X[:, :4]),
        ValueError,
        ["key_hash", r"\(2, 4, 4, 16\)"],
    ),
    "no buckets": (lambda: hashed(num_buckets=0), ValueError, ["num_buckets", "0"]),
    "traced buckets": (lambda: hashed(num_buckets=jnp.int32(4)), TypeError, ["num_buckets"]),
    "keep of integers": (
        lambda: scfa_jax.qk_sparse_attention(X, X, X, IDS, KEEP),
        TypeError,
        ["query_keep", "int32"],
    ),
    "keep of another length": (
        lambda: scfa_jax.qk_sparse_attention(X, X, X, KEEP, KEEP[:, :3]),
        ValueError,
        ["key_keep", r"\(2, 3, 4\)"],
    ),
    "float ranges": (
        lambda: scfa_jax.range_attention(X, X, X, IDS.astype(jnp.float32), IDS),
        TypeError,
        ["key_start", "float32"],
    ),
    "ranges of two shapes": (
        lambda: scfa_jax.range_attention(X, X, X, IDS, IDS[..., :3]),
        ValueError,
        ["key_start", "key_stop"],
    ),
    "no index": (lambda: scfa_jax.sparse_attention(X, X, X, IDS), TypeError, ["index", "SparseIndex"]),
    "index of another length": (
        lambda: scfa_jax.sparse_attention(X, X, X, scfa_jax.causal_index(8, 9)),
        ValueError,
        ["key", "8", "9"],
    ),
    "odd number of buckets": (
        lambda: scfa_jax.random_rotations(jax.random.key(0), 4, 16, 7),
        ValueError,
        ["num_buckets", "7", "even"],
    ),
    "rotations of other heads": (
        lambda: scfa_jax.lsh_hash(X, jnp.zeros((3, 16, 4))),
        ValueError,
        ["rotations", r"\(3, 16, 4\)"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, error, words = BAD[name]
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert caught.match(word)


@pytest.mark.parametrize("name", ["float hashes", "heads that do not divide", "keep of another length"])
def test_checks_work_while_tracing(name):
    call, error, _ = BAD[name]
    with pytest.raises(error):
        jax.jit(call)()


def test_a_traced_scale_is_refused():
    with pytest.raises(TypeError, match="scale must be a static number; multiply"):
        jax.jit(lambda s: causal(scale=s))(0.5)


def gpu(name: str, capability: str):
    return lambda: SimpleNamespace(platform="gpu", device_kind=name, compute_capability=capability)


UNSUPPORTED = [("Tesla V100-SXM2-16GB", "7.0"), ("Quadro RTX 8000", "7.5"), ("AMD Instinct MI300X", "gfx942")]


@pytest.mark.parametrize(("name", "capability"), UNSUPPORTED)
def test_triton_on_a_gpu_that_it_does_not_support_names_the_gpu(name, capability, monkeypatch):
    monkeypatch.setattr(_compat, "gpu", gpu(name, capability))
    with pytest.raises(NotImplementedError, match=rf'"triton".*capability 8\.0 or later, got {name} \({capability}\)'):
        causal(implementation="triton")
    assert not calls_kernels(hashed, num_buckets=4, implementation=("triton", "xla"))


@pytest.mark.parametrize(("name", "capability"), [*UNSUPPORTED, ("NVIDIA A100", "8.0"), ("NVIDIA B200", "10.0")])
def test_without_a_choice_such_gpus_get_plain_jax(name, capability, monkeypatch):
    monkeypatch.setattr(_compat, "gpu", gpu(name, capability))
    assert calls_kernels(hashed, num_buckets=4) == ((name, capability) not in UNSUPPORTED)


def calls_kernels(function, **options) -> bool:
    return "pallas_call" in str(jax.make_jaxpr(lambda: function(**options))())
