"""Decoding: tokens that come in parts, or one by one, get what one pass over all of them gives."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import causal_mask, hash_mask, keep_mask
from conftest import IMPLEMENTATIONS
from flax import linen as nn
from flax import nnx

import scfa_jax.linen
import scfa_jax.nnx
from scfa_jax import reference
from scfa_jax.layers import Dense, Drop, Hash, Layout, Window, bucket_order
from scfa_jax.rotary import rotary
from tools import tolerance
from tools.tolerance import plain_attention

BATCH, LENGTH, ROOM, HEADS, HEAD_DIM = 2, 12, 15, 4, 16
FEATURES = HEADS * HEAD_DIM
PARTS = (4, 1, 1, 4, 1, 1)
SEED = jax.random.key(5)

WITHOUT_ORDER = "grouped hash"  # its tokens read the whole cache, those of other hashes their bucket
# sparsity, key heads, whether keys are the queries
KINDS = {
    "dense": (Dense(), 4, False),
    "grouped dense, unit shared keys": (Dense(), 2, True),
    "hash": (Hash(4), 4, True),
    "grouped hash": (Hash(4), 2, True),
    "grouped hash beside a window": (Hash(4, local_window=3), 2, True),
    "grouped hash of own keys, sees itself": (Hash(2, before_rotary=True), 2, False),
    "grouped drop": (Drop(0.4), 2, False),
}
# How products become weights, beside the plain way.
CAP_AND_SINKS = {"logits_soft_cap": 0.7, "sink_logits": np.linspace(-2, 3, HEADS, dtype=np.float32)}


@pytest.fixture(autouse=True)
def _small_caches_keep_an_order(monkeypatch):
    monkeypatch.setattr(bucket_order, "LEAST_ROOM", dict.fromkeys(bucket_order.LEAST_ROOM, 1))


def layout_of(name: str) -> Layout:
    sparsity, key_heads, shared = KINDS[name]
    return Layout.of(FEATURES, HEADS, key_heads, HEAD_DIM, sparsity, shared, shared)


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def inputs(name: str, dtype=np.float32) -> dict:
    """Query, key and value of all tokens, `[B, T, _, H]`, and what is kept of them in drop mode."""
    sparsity, key_heads, shared = KINDS[name]
    rows = {"query": HEADS, "key": key_heads, "value": key_heads}
    made = {
        row: random(seed, BATCH, LENGTH, heads, HEAD_DIM).astype(dtype)
        for seed, (row, heads) in enumerate(rows.items())
    }
    kept = {"query_keep": HEADS, "key_keep": key_heads} if isinstance(sparsity, Drop) else {}
    made |= {mask: random(len(mask), BATCH, LENGTH, heads) > -0.3 for mask, heads in kept.items()}
    return made | {"key": None} if shared else made


def heads_of(name: str, part: dict, start=0):
    """What attention computes on, and what was drawn."""
    rows, drawn = ({k: x for k, x in part.items() if k.endswith("keep") == is_drawn} for is_drawn in (False, True))
    sparsity, key_heads, _ = KINDS[name]
    if isinstance(sparsity, Hash):
        drawn["rotations"] = jnp.asarray(random(9, key_heads, HEAD_DIM, sparsity.num_buckets // 2))
    return layout_of(name).heads(**rows, rotary=rotary, start=start), drawn


def new_cache(name: str, dtype=jnp.float32, room: int = ROOM, batch: int = BATCH):
    layout = layout_of(name)
    cache = layout.kind.empty_cache(layout, batch, room, dtype)
    if name == WITHOUT_ORDER:
        del cache["cached_order"]
    return cache


def add(name: str, cache, part: dict, **options):
    """A step: outputs, and the cache after it."""
    return layout_of(name).kind.attend_next(cache, *heads_of(name, part, cache["cache_index"]), **options)


@functools.cache
def step_of(name: str):
    """A compiled step, `(cache, part, **options)` to outputs and the cache."""
    return jax.jit(functools.partial(add, name), static_argnames=("logits_soft_cap", "implementation"))


def in_parts(x, parts):
    """Cuts every array of a tree along the tokens."""
    stops = np.cumsum(parts)
    cut = lambda start, stop: jax.tree.map(lambda x: x[:, start:stop], x)
    return [cut(stop - size, stop) for stop, size in zip(stops, parts, strict=True)]


def decoded(step, cache, parts):
    """All outputs of the parts, and the cache that they leave."""
    outputs = []
    for part in parts:
        output, cache = step(cache, part)
        outputs.append(np.asarray(output))
    return np.concatenate(outputs, axis=1), cache


@functools.partial(jax.jit, static_argnums=0)
def defined(name: str, whole: dict):
    """Query, key and value by which all tokens attend, and the mask."""
    kind, given = layout_of(name).kind, heads_of(name, whole)
    heads, (query_marks, key_marks, _) = given[0], kind.marks(*given)
    if isinstance(kind, Hash):
        exclude_self = KINDS[name][2]  # where keys are queries
        mask = hash_mask(query_marks["hash"], key_marks["hash"], exclude_self=exclude_self)
        near = reference.window_mask(LENGTH, LENGTH, kind.local_window)
        mask |= near & causal_mask(LENGTH, LENGTH, -int(exclude_self))
    elif isinstance(kind, Drop):
        mask = keep_mask(query_marks["keep"], key_marks["keep"])
    else:
        mask = causal_mask(LENGTH, LENGTH)
    mask = jnp.broadcast_to(mask, (BATCH, HEADS, LENGTH, LENGTH))
    return (heads.rotated_query, heads.attended_key, heads.value), mask


compiled_plain, compiled_reference, compiled_terms = (
    jax.jit(function, static_argnames="logits_soft_cap")
    for function in (plain_attention, reference.attention, tolerance.rounded_terms)
)
each_case = [
    *((name, jnp.float32, {}) for name in KINDS),
    *((name, jnp.bfloat16, {}) for name in ("dense", "hash", "grouped drop")),
    *((name, jnp.float32, CAP_AND_SINKS) for name in ("dense", "hash", "grouped drop")),
    ("hash", jnp.bfloat16, CAP_AND_SINKS),
]
ids = [f"{name}-{dtype.__name__}{'-with a cap and sinks' * bool(logits)}" for name, dtype, logits in each_case]


@pytest.mark.parametrize(("name", "dtype", "logits"), each_case, ids=ids)
def test_tokens_in_parts_are_as_exact_as_plain_attention_to_all(name, dtype, logits):
    whole = inputs(name, dtype)
    step = functools.partial(step_of(name), **logits)
    got, cache = decoded(step, new_cache(name, dtype), in_parts(whole, PARTS))
    assert cache["cache_index"] == LENGTH
    assert got.dtype == dtype

    arrays, mask = defined(name, whole)
    exact, _ = compiled_reference(*(np.asarray(x, np.float32) for x in arrays), mask, **logits)
    plain, _ = compiled_plain(*arrays, mask, **logits)
    got, exact, plain = (np.asarray(x, np.float64) for x in (got, exact, plain))
    empty = ~np.any(mask, axis=3).swapaxes(1, 2)
    assert empty.any() == ("hash" in name or "drop" in name)
    np.testing.assert_array_equal(got[empty], 0)
    # The rule of `tolerance`.
    nothing = np.zeros(whole["query"].shape), np.zeros((BATCH, LENGTH, HEADS))
    _, (summed, *_) = compiled_terms(*arrays, mask, *nothing, **logits)
    floor = float(jnp.finfo(dtype).eps) / 2 * np.max(np.abs(exact)) + 2 * jnp.finfo(jnp.float32).eps * np.max(summed)
    plain_error = np.max(np.abs(plain - exact)[~empty])
    assert np.max(np.abs(got - exact)) <= 2 * plain_error + floor


@pytest.mark.parametrize("logits", [{}, CAP_AND_SINKS], ids=["plain", "with a cap and sinks"])
@pytest.mark.parametrize("size", [6, 1], ids=["several tokens", "one token"])
def test_the_kernels_take_them_too(size, logits):
    first, second = in_parts(inputs("hash"), (6, 6))
    second, _ = in_parts(second, (size, 6 - size))
    _, cache = step_of("hash")(new_cache("hash"), first, implementation="xla", **logits)
    expected, got = (
        step_of("hash")(cache, second, implementation=name, **logits)[0] for name in ("xla", IMPLEMENTATIONS[-1])
    )
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2])
def test_an_implementation_is_heeded_whether_it_is_for_one_token_or_several(size):
    part, *_ = in_parts(inputs("hash"), (size,))
    with pytest.raises(ValueError, match="implementation must be one of"):
        add("hash", new_cache("hash"), part, implementation="cuda")


@pytest.mark.parametrize("parts", [(4, 4, 1, 1, 1, 1), (4, 4, 4)], ids=["one token", "several"])
def test_places_not_yet_filled_and_keys_that_take_no_part_may_hold_anything(parts):
    step, whole = step_of("grouped drop"), inputs("grouped drop")
    whole["key_keep"][:, 2] = False
    whole["query_keep"][:, -parts[-1] :] = whole["key_keep"][:, 0] = True
    *seen, new = in_parts(whole, parts)
    _, cache = decoded(step, new_cache("grouped drop"), seen)
    outputs, _ = step(cache, new)
    assert np.all(outputs != 0)
    spoilt = {}
    for name in ("cached_key", "cached_value"):
        spoilt[name] = np.array(cache[name])
        spoilt[name][:, [2, LENGTH, ROOM - 1]] = np.nan
    np.testing.assert_array_equal(step(cache | spoilt, new)[0], outputs)


@pytest.mark.parametrize("size", [1, 4])
def test_past_the_end_outputs_are_nan(size):
    for index in (ROOM - size, ROOM - size + 1):
        cache = new_cache("dense") | {"cache_index": jnp.int32(index)}
        outputs, _ = step_of("dense")(cache, in_parts(inputs("dense"), (size,))[0])
        assert np.isnan(outputs).all() == np.isnan(outputs).any() == (index + size > ROOM)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"room": 8}, ValueError, "at most its 8 tokens, got 2 and 12"),
        ({"batch": 3}, ValueError, "batch size of the cache, 3, .* got 2 and 12"),
        ({"dtype": jnp.bfloat16}, TypeError, "dtype of the computation, float32, got bfloat16"),
    ],
)
def test_what_does_not_fit_the_cache_raises(change, error, message):
    with pytest.raises(error, match=message):
        add("dense", new_cache("dense", **change), inputs("dense"))
    with pytest.raises(ValueError, match="room for at least 1 token, got 0"):
        new_cache("dense", room=0)


def tokens() -> np.ndarray:
    return random(0, BATCH, LENGTH, FEATURES)


def in_nnx(sparsity=None, **options):
    """Evaluation, a step of decoding, and an empty cache."""
    module = scfa_jax.nnx.CausalSelfAttention(FEATURES, HEADS, sparsity=sparsity, rngs=nnx.Rngs(0), **options)
    whole = jax.jit(lambda x, draw: nnx.view(module, deterministic=True)(x, **draw))
    module.init_cache((BATCH, ROOM, FEATURES))
    graph, *states = nnx.split(module, nnx.Cache, ...)
    cache, rest = states

    def step(cache, x, draw):
        module = nnx.merge(graph, cache, rest)
        return module(x, decode=True, **draw), nnx.state(module, nnx.Cache)

    return whole, step, cache


def in_linen(sparsity=None, **options):
    """The same."""
    make = functools.partial(scfa_jax.linen.CausalSelfAttention, FEATURES, HEADS, sparsity=sparsity, **options)
    init = jax.jit(make(decode=True).init)
    variables = init({"params": SEED, "sparsity": SEED}, jnp.ones((BATCH, ROOM, FEATURES)))
    kept = {name: variables[name] for name in variables if name != "cache"}

    def step(cache, x, draw):
        output, changed = make(decode=True).apply({**kept, "cache": cache}, x, mutable=["cache"], **draw)
        return output, changed["cache"]

    return jax.jit(lambda x, draw: make(deterministic=True).apply(kept, x, **draw)), step, variables["cache"]


each_flax = pytest.mark.parametrize("flax", [in_nnx, in_linen], ids=["nnx", "linen"])


MODULES = {
    "hash": {"sparsity": Hash(4), "num_key_value_heads": 2},
    "drop": {"sparsity": Drop(0.4), "num_key_value_heads": 2},
    "hash with a cap and sinks": {"sparsity": Hash(4), "logits_soft_cap": 0.7, "use_sink_logits": True},
    "window with a cap and sinks": {"sparsity": Window(3, 2), "logits_soft_cap": 0.7, "use_sink_logits": True},
}


@each_flax
@pytest.mark.parametrize("name", MODULES)
def test_modules_decode_what_they_evaluate_in_one_compilation_a_size(flax, name):
    """Rounding could move a token near the border of its bucket into another: of these tokens it moves none."""
    whole, step, cache = flax(**MODULES[name], rotary=rotary)
    draw = {mask: kept for mask, kept in inputs("grouped drop").items() if mask.endswith("keep") and name == "drop"}
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(step, n=len(set(PARTS))))
    got, left = decoded(lambda cache, part: step(cache, *part), cache, in_parts((tokens(), draw), PARTS))
    np.testing.assert_allclose(got, whole(tokens(), draw), atol=1e-5)
    chex.assert_trees_all_equal_shapes_and_dtypes(left, cache)


@each_flax
def test_segments_in_decoding_raise(flax):
    _, step, cache = flax()
    with pytest.raises(NotImplementedError, match="segment_ids must be None in decoding: a cache holds one sequence"):
        step(cache, tokens()[:, :1], {"segment_ids": jnp.zeros((BATCH, 1), jnp.int32)})


@each_flax
def test_decoding_evaluates_whatever_deterministic_says(flax):
    """And keeps everything unless it is told otherwise."""
    whole, step, cache = flax(Drop(0.9), deterministic=False) if flax is in_nnx else flax(Drop(0.9))
    got, _ = decoded(jax.jit(lambda cache, x: step(cache, x, {})), cache, in_parts(tokens()[:, :3], (1, 1, 1)))
    np.testing.assert_allclose(got, whole(tokens()[:, :3], {}), atol=1e-5)


def test_a_cache_has_flax_names_and_must_be_there():
    token = jnp.ones((1, 1, 32))
    ours = scfa_jax.linen.CausalSelfAttention(32, 2, sparsity=Hash(4), decode=True)
    init = lambda layer: jax.eval_shape(layer.init, {"params": SEED, "sparsity": SEED}, jnp.ones((1, 3, 32)))
    variables, flax = init(ours), init(nn.MultiHeadDotProductAttention(2, decode=True))
    assert set(variables["cache"]) == {*flax["cache"], "cached_hash", "cached_order"}
    del variables["cache"]
    with pytest.raises(ValueError, match="must have the collection 'cache' to decode with, which init"):
        jax.eval_shape(lambda variables: ours.apply(variables, token, mutable=["cache"]), variables)

    module = scfa_jax.nnx.CausalSelfAttention(32, 2, sparsity=Hash(4), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"call init_cache\(\(B, max_length, E\)\) first"):
        jax.eval_shape(lambda x: nnx.view(module, decode=True)(x), token)
    with pytest.raises(ValueError, match=r"input_shape must be \[B, T, 32\], got \(1, 32\)"):
        module.init_cache((1, 32))
    module.init_cache((1, 3, 32))
    made = nnx.to_pure_dict(nnx.state(module, nnx.Cache))
    assert set(made) == {*flax["cache"], "cached_hash", "cached_order"}
    assert made["cached_key"].dtype == jnp.bfloat16
    assert made["cached_hash"].shape == (1, 3, 2)
    assert nnx.eval_shape(lambda module, x: nnx.view(module, decode=True)(x), module, token).shape == token.shape
