"""Operators and layers under the stricter settings of JAX: ranks, dtypes, 64 bits, infinities, and checkify."""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import checkify

import scfa_jax
import scfa_jax.nnx
from scfa_jax import _checks, patterns, reference
from scfa_jax.layers import (
    NSA,
    BigBird,
    Drop,
    Fixed,
    Hash,
    KMeans,
    LearnedRotations,
    Longformer,
    MoBA,
    SparseK,
    Strided,
    Window,
)
from scfa_jax.nsa import in_compression_blocks

BATCH, LENGTH, HEADS, KEY_HEADS = 2, 32, 4, 2
HASH = np.random.default_rng(0).integers(0, 4, (2, BATCH, LENGTH, HEADS)).astype(np.int32)
SEGMENTS = np.repeat(np.arange(4, dtype=np.int32), 8)[None].repeat(BATCH, axis=0)
GLOBAL = (np.arange(LENGTH) % 8 == 0)[:, None]


def nsa(query, key, value, **options):
    """NSA with mean keys and values, and equal gates."""
    sizes = {"compression_size": 6, "compression_stride": 3, "block_size": 6, "top_k": 4}
    compressed = tuple(in_compression_blocks(x, 6, 3).mean(axis=2) for x in (key, value))
    gates = jnp.ones((*query.shape[:3], 3), query.dtype)
    return scfa_jax.nsa_attention(query, compressed, (key, value), (key, value), gates, **sizes, window=5, **options)


OPERATORS = {
    "causal": (scfa_jax.causal_attention, (), {}),
    "causal, offset of each": (scfa_jax.causal_attention, (), {"query_offset": np.array([0, 3], np.int32)}),
    "causal, window": (scfa_jax.causal_attention, (), {"window": 5}),
    "window, sinks": (scfa_jax.window_attention, (np.full(HEADS, 5, np.int32),), {"num_sinks": 2}),
    "hash": (scfa_jax.hash_sparse_attention, (HASH[0], HASH[0][..., ::2]), {}),
    "hash, promise": (scfa_jax.hash_sparse_attention, (HASH[0],), {"num_buckets": 4, "exclude_self": True}),
    "hash, rounds": (scfa_jax.hash_sparse_attention, (HASH, HASH[..., ::2]), {}),
    "keep": (scfa_jax.qk_sparse_attention, (HASH[0] > 1, HASH[1][..., ::2] > 0), {}),
    "range": (scfa_jax.range_attention, (HASH[0], HASH[1] + 10), {}),
    "moba": (scfa_jax.moba_attention, (), {"block_size": 6, "top_k": 3}),
    "moba, offsets and segments": (
        scfa_jax.moba_attention,
        (),
        {
            **{"block_size": 5, "top_k": 3, "num_local": 2, "share_in_group": True},
            **{"query_offset": np.array([0, 3], np.int32), "query_segment_ids": SEGMENTS},
        },
    ),
    "nsa": (nsa, (), {}),
    "nsa, offsets and segments": (
        nsa,
        (),
        {"query_offset": np.array([0, 3], np.int32), "query_segment_ids": SEGMENTS},
    ),
    "sinks and cap": (
        scfa_jax.causal_attention,
        (),
        {"logits_soft_cap": 2.0, "sink_logits": np.zeros(HEADS, np.float32)},
    ),
    "segments": (scfa_jax.hash_sparse_attention, (HASH[0],), {"query_segment_ids": SEGMENTS}),
    "sparsek": (scfa_jax.sparsek_attention, (HASH[0][..., ::2].astype(np.float32),), {"num_keys": 4, "window": 4}),
    "reference, hash": (reference.hash_sparse_attention, (HASH[0],), {"query_segment_ids": SEGMENTS}),
    "reference, sparsek": (
        reference.sparsek_attention,
        (HASH[0][..., ::2].astype(np.float32),),
        {"num_keys": 4, "window": 4},
    ),
}
LISTS = {
    "bigbird": lambda: patterns.bigbird_index(
        LENGTH, LENGTH, 4, jax.random.key(0), num_global=2, num_random=2, block_size=4, num_heads=HEADS
    ),
    "longformer": lambda: patterns.longformer_index(GLOBAL, GLOBAL, 4),
    "strided": lambda: patterns.strided_index(LENGTH, LENGTH, 4),
    "fixed": lambda: patterns.fixed_index(LENGTH, LENGTH, 8, 2),
    "chosen blocks": lambda: scfa_jax.block_index(HASH[..., None].swapaxes(0, -1)[0], 5),
    "window beside buckets": lambda: patterns.local_hash_index(HASH[0], None, 4),
}
KINDS = [
    *(None, Hash(4), Hash(4, by=LearnedRotations()), Hash(4, by=KMeans(), local_window=4), Drop(0.5), Window(5, 2)),
    *(Longformer(4, 8), BigBird(4, 2, 1, 4), Strided(4), Fixed(8, 2), SparseK(4, 4)),
    *(MoBA(6, 3, 2), MoBA(5, 3, share_in_group=True, before_rotary=True)),
    NSA(6, 4, 5, 6, 3),
]


@contextlib.contextmanager
def strict_promotion():
    """JAX's own test case sets the first by default; the second is stricter than any default."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


STRICT = {"strict promotion": strict_promotion, "64 bits": lambda: jax.enable_x64(True)}


def arrays(dtype, name: str = "hash, promise") -> list[jax.Array]:
    """Query, key and value, with as many key heads as an operator needs."""
    shared = ("hash, promise", "segments", "reference, hash", "window beside buckets")
    key_heads = HEADS if name in shared else KEY_HEADS
    keys = jax.random.split(jax.random.key(1), 3)
    return [
        jax.random.normal(key, (BATCH, LENGTH, heads, 16), jnp.float32).astype(dtype)
        for key, heads in zip(keys, (HEADS, key_heads, key_heads), strict=True)
    ]


def total(x) -> jax.Array:
    return x.astype(jnp.float32).sum()


def operator_of(name: str):
    if name in LISTS:
        return lambda *arrays: scfa_jax.sparse_attention(*arrays, LISTS[name]())
    operator, arguments, options = OPERATORS[name]
    return lambda *arrays: operator(*arrays, *arguments, **options)


@pytest.mark.parametrize("mode", STRICT)
@pytest.mark.parametrize("name", [*OPERATORS, *LISTS])
def test_operators_trace_forward_and_backward(name, mode):
    """What these settings forbid shows while tracing, for both platforms at once."""
    given = arrays(jnp.bfloat16, name)
    with STRICT[mode]():
        results = jax.eval_shape(jax.grad(lambda *x: total(operator_of(name)(*x)), (0, 1, 2)), *given)
    assert [x.dtype for x in results] == [jnp.bfloat16] * 3


@pytest.mark.parametrize("mode", STRICT)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_layers_train_evaluate_and_decode(kind, mode):
    def train_and_decode():
        x = jnp.zeros((BATCH, LENGTH, 32), jnp.bfloat16)
        layer = scfa_jax.nnx.CausalSelfAttention(
            *(32, HEADS),
            num_key_value_heads=KEY_HEADS,
            sparsity=kind,
            dtype=jnp.bfloat16,
            rotary=scfa_jax.nnx.rotary,
            **({} if isinstance(kind, NSA) else {"logits_soft_cap": 5.0, "use_sink_logits": True}),
            rngs=nnx.Rngs(0),
        )
        gradients = nnx.grad(lambda layer: total(layer(x)))(layer)
        evaluated = layer(x, deterministic=True)
        layer.init_cache((BATCH, LENGTH, 32))
        return gradients, evaluated, layer(x[:, :5], decode=True), layer(x[:, :1], decode=True)

    with STRICT[mode]():
        _, *outputs = jax.eval_shape(train_and_decode)
    assert {x.dtype for x in outputs} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("name", ["hash, rounds", "bigbird"])
def test_64_bits_change_no_result(name):
    given = arrays(jnp.float32, name)
    before = operator_of(name)(*given)
    with jax.enable_x64(True):
        after = operator_of(name)(*given)
    assert after.dtype == jnp.float32
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("name", ["hash, promise", "hash, rounds", "range", "moba, offsets and segments"])
def test_empty_rows_are_no_infinities_to_be_warned_of(name):
    """Outside of jit `jax_debug_infs` looks at every result, the log-sum-exp of an empty row among them."""
    attend = functools.partial(operator_of(name))
    given = arrays(jnp.float32, name)
    with jax.debug_infs(True), jax.debug_nans(True):
        output = attend(*given)
        gradients = jax.grad(lambda *x: total(attend(*x)), (0, 1, 2))(*given)
    assert any((np.asarray(x) == 0).any() for x in (output, *gradients))  # there are such rows


def checked(function, *arguments) -> str | None:
    """What checkify finds in a call."""
    error, _ = checkify.checkify(jax.jit(function), errors=checkify.user_checks)(*arguments)
    return error.get()


def test_a_broken_promise_of_buckets_raises_in_debugging():
    """Elsewhere its results are undefined and finite."""
    given = arrays(jnp.float32)
    attend = lambda ids, *x: scfa_jax.hash_sparse_attention(*x, ids, num_buckets=3)
    for ids, found in (
        (HASH[0] % 3, None),
        (HASH[0], "got 0 to 3"),
        (HASH[0] % 3 - 1, "got -1 to 1"),
    ):
        said = checked(attend, ids, *given)
        assert (
            (said is None)
            if found is None
            else (found in said and "must lie in [0, 3), as num_buckets promises" in said)
        )
        assert np.isfinite(attend(ids, *given)).all()


def test_indices_that_share_a_pair_raise_in_debugging():
    given = arrays(jnp.float32)
    window, sinks = scfa_jax.window_index(LENGTH, LENGTH, 4, 2)
    everything = scfa_jax.causal_index(LENGTH, LENGTH)
    attend = lambda index, *x: scfa_jax.sparse_attention(*x, index)
    assert checked(attend, [window, sinks], *given) is None
    assert checked(attend, scfa_jax.hash_index(HASH), *given) is None  # rounds that share pairs take them away again
    assert "index must be disjoint" in checked(attend, [window, everything], *given)
    assert "index must be disjoint" in checked(attend, [everything, everything, window], *given)


def test_debugging_checks_go_through_gradients_and_layers():
    given = arrays(jnp.float32)
    attend = lambda ids, *x: scfa_jax.hash_sparse_attention(*x, ids, num_buckets=3).sum()
    assert "as num_buckets promises" in checked(jax.grad(attend, 1), HASH[0], *given)


def test_checks_cost_nothing_elsewhere(monkeypatch):
    """Without checkify no part of them is compiled."""
    given = arrays(jnp.float32)
    attend = lambda *x: scfa_jax.hash_sparse_attention(*x, HASH[0] % 3, num_buckets=3)
    with_checks = jax.jit(attend).lower(*given).compile().as_text()
    monkeypatch.setattr(_checks, "in_debugging", lambda *_: None)
    without = jax.jit(lambda *x: attend(*x)).lower(*given).compile().as_text()
    assert with_checks.count(" = ") == without.count(" = ")
