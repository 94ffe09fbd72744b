"""Decoding: tokens that come in parts, or one by one, get what one pass over all of them gives."""

from __future__ import annotations

import dataclasses
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
from tolerance import plain_attention, rounded_terms

import scfa_jax.linen
import scfa_jax.nnx
from models import ModelConfig, Transformer
from models.attention import make_attention
from models.rotary import rotary
from scfa_jax import bucket_cache, reference
from scfa_jax.decoding import attend_cached, empty_cache
from scfa_jax.sparsity import Drop, Hash, Layout, operands

BATCH, LENGTH, ROOM, HEADS, HEAD_DIM = 2, 12, 15, 4, 16
FEATURES = HEADS * HEAD_DIM
PARTS = (4, 1, 1, 4, 1, 1)
SEED = jax.random.key(5)

WITHOUT_ORDER = "grouped hash"  # its tokens read the whole cache, those of other hashes their bucket
# sparsity, key heads, whether keys are the queries
KINDS = {
    "dense": (None, 4, False),
    "grouped dense, unit shared keys": (None, 2, True),
    "hash": (Hash(4), 4, True),
    "grouped hash": (Hash(4), 2, True),
    "grouped hash beside a window": (Hash(4, window=3), 2, True),
    "grouped hash of own keys, sees itself": (Hash(2, exclude_self=False, before_rotary=True), 2, False),
    "grouped drop": (Drop(0.4), 2, False),
}


@pytest.fixture(autouse=True)
def _small_caches_keep_an_order(monkeypatch):
    monkeypatch.setattr(bucket_cache, "LEAST_ROOM", dict.fromkeys(bucket_cache.LEAST_ROOM, 1))


def layout_of(sparsity, key_heads: int, shared: bool) -> Layout:
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


def options_of(name: str) -> dict:
    """What is the same for all tokens."""
    sparsity, key_heads, shared = KINDS[name]
    options = {"sparsity": sparsity, "normalize_key": shared, "rotary": rotary}
    if isinstance(sparsity, Hash):
        options["rotations"] = jnp.asarray(random(9, key_heads, HEAD_DIM, sparsity.num_buckets // 2))
    return options


def new_cache(name: str, dtype=jnp.float32):
    sparsity, *_ = KINDS[name]
    cache = empty_cache(layout_of(*KINDS[name]), sparsity, BATCH, ROOM, dtype)
    if name == WITHOUT_ORDER:
        del cache["cached_order"]
    return cache


@functools.cache
def step_of(name: str):
    """A compiled step, `(cache, part)` to outputs and the cache."""
    return jax.jit(lambda cache, part: attend_cached(cache, **part, **options_of(name)))


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
    """The operands by which all tokens attend, and the mask."""
    options = options_of(name)
    sparsity, made = options["sparsity"], operands(**whole, **options)
    if isinstance(sparsity, Hash):
        query_hash, key_hash = (marks["hash"] for marks in (made.query_marks, made.key_marks or made.query_marks))
        exclude_self = sparsity.exclude_self
        mask = hash_mask(query_hash, key_hash, exclude_self=exclude_self)
        near = reference.window_mask(LENGTH, LENGTH, sparsity.window)
        mask |= near & causal_mask(LENGTH, LENGTH, -int(exclude_self))
    elif isinstance(sparsity, Drop):
        mask = keep_mask(made.query_marks["keep"], made.key_marks["keep"])
    else:
        mask = causal_mask(LENGTH, LENGTH)
    return made[:3], jnp.broadcast_to(mask, (BATCH, HEADS, LENGTH, LENGTH))


compiled_plain, compiled_reference = jax.jit(plain_attention), jax.jit(reference.attention)
each_dtype = [(name, jnp.float32) for name in KINDS] + [
    (name, jnp.bfloat16) for name in ("dense", "hash", "grouped drop")
]


@pytest.mark.parametrize(("name", "dtype"), each_dtype)
def test_tokens_in_parts_are_as_exact_as_plain_attention_to_all(name, dtype):
    whole = inputs(name, dtype)
    got, cache = decoded(step_of(name), new_cache(name, dtype), in_parts(whole, PARTS))
    assert cache["cache_index"] == LENGTH
    assert got.dtype == dtype

    arrays, mask = defined(name, whole)
    exact, _ = compiled_reference(*(np.asarray(x, np.float32) for x in arrays), mask)
    plain, _ = compiled_plain(*arrays, mask)
    got, exact, plain = (np.asarray(x, np.float64) for x in (got, exact, plain))
    empty = ~np.any(mask, axis=3).swapaxes(1, 2)
    assert empty.any() == ("hash" in name or "drop" in name)
    np.testing.assert_array_equal(got[empty], 0)
    # The rule of `tolerance`.
    nothing = np.zeros(whole["query"].shape), np.zeros((BATCH, LENGTH, HEADS))
    _, (summed, *_) = rounded_terms(*arrays, mask, *nothing)
    floor = float(jnp.finfo(dtype).eps) / 2 * np.max(np.abs(exact)) + 2 * jnp.finfo(jnp.float32).eps * np.max(summed)
    plain_error = np.max(np.abs(plain - exact)[~empty])
    assert np.max(np.abs(got - exact)) <= 2 * plain_error + floor


def test_the_kernels_take_several_tokens_too():
    first, second = in_parts(inputs("hash"), (6, 6))
    step = jax.jit(functools.partial(attend_cached, **options_of("hash")), static_argnames="implementation")
    _, cache = step(new_cache("hash"), **first, implementation="xla")
    expected, got = (step(cache, **second, implementation=name)[0] for name in ("xla", IMPLEMENTATIONS[-1]))
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2])
def test_an_implementation_is_heeded_whether_it_is_for_one_token_or_several(size):
    part, *_ = in_parts(inputs("hash"), (size,))
    with pytest.raises(ValueError, match="implementation must be one of"):
        attend_cached(new_cache("hash"), **part, **options_of("hash"), implementation="cuda")


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
        ({"segment_ids": jnp.zeros((2, 12), jnp.int32)}, NotImplementedError, "segment_ids must be None in decoding"),
        ({"room": 8}, ValueError, "at most its 8 tokens, got 2 and 12"),
        ({"batch": 3}, ValueError, "batch size of the cache, 3, .* got 2 and 12"),
        ({"dtype": jnp.bfloat16}, TypeError, "dtype of the computation, float32, got bfloat16"),
    ],
)
def test_what_does_not_fit_the_cache_raises(change, error, message):
    options = {"batch": BATCH, "room": ROOM, "dtype": jnp.float32} | change
    segment_ids = options.pop("segment_ids", None)
    cache = empty_cache(layout_of(*KINDS["dense"]), None, *options.values())
    with pytest.raises(error, match=message):
        attend_cached(cache, **inputs("dense"), segment_ids=segment_ids)
    with pytest.raises(ValueError, match="room for at least 1 token, got 0"):
        empty_cache(layout_of(*KINDS["dense"]), None, BATCH, 0, jnp.float32)


def tokens() -> np.ndarray:
    return random(0, BATCH, LENGTH, FEATURES)


def in_nnx(sparsity, **options):
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


def in_linen(sparsity, **options):
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


@each_flax
@pytest.mark.parametrize("name", ["grouped hash", "grouped drop"])
def test_modules_decode_what_they_evaluate_in_one_compilation_a_size(flax, name):
    """Rounding could move a token near the border of its bucket into another: of these tokens it moves none."""
    sparsity, key_heads, shared = KINDS[name]
    options = {"num_key_value_heads": key_heads, "share_query_key": shared, "normalize_key": shared, "rotary": rotary}
    whole, step, cache = flax(sparsity, **options)
    draw = {mask: kept for mask, kept in inputs(name).items() if mask.endswith("keep")}
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(step, n=len(set(PARTS))))
    got, left = decoded(lambda cache, part: step(cache, *part), cache, in_parts((tokens(), draw), PARTS))
    np.testing.assert_allclose(got, whole(tokens(), draw), atol=1e-5)
    chex.assert_trees_all_equal_shapes_and_dtypes(left, cache)


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


@functools.partial(jax.jit, static_argnums=0)
def decode_tokens(graph, cache, rest, tokens):
    model = nnx.merge(graph, cache, rest)
    return model(tokens, decode=True), nnx.state(model, nnx.Cache)


@pytest.mark.parametrize(("positions", "attention"), [("rotary", "hash,identity"), ("learned", "qk")])
def test_a_transformer_decodes_what_it_evaluates(positions, attention):
    config = ModelConfig(
        **{"layers": attention.count(",") + 1, "width": 32, "heads": 2, "dtype": "float32"},
        **{"attention": attention, "positions": positions, "remat": "full"},
    )
    model = Transformer(config, vocab_size=30, max_length=LENGTH, rngs=nnx.Rngs(0, sparsity=0))
    with pytest.raises(ValueError, match="call init_cache"):
        model(jnp.zeros((1, 1), jnp.int32), decode=True)
    read = np.random.default_rng(0).integers(0, 30, (BATCH, LENGTH))
    whole = jax.jit(lambda read: model(read))(read)
    model.init_cache(BATCH, LENGTH)
    graph, *states = nnx.split(model, nnx.Cache, ...)
    cache, rest = states
    got, cache = decoded(lambda cache, part: decode_tokens(graph, cache, rest, part), cache, in_parts(read, PARTS))
    np.testing.assert_allclose(got, whole, atol=1e-5)
    assert np.isnan(decode_tokens(graph, cache, rest, read[:, :1])[0]).all()
    if positions == "learned":
        with pytest.raises(ValueError, match=rf"at most {LENGTH} long.*got {LENGTH + 1}"):
            model.init_cache(BATCH, LENGTH + 1)


def test_cudnn_layers_decode_as_dense_ones_and_reformer_layers_not_at_all():
    config = ModelConfig(attention="reformer", layers=1, width=32, heads=2, dtype="float32")
    make = functools.partial(make_attention, layer=0, out_kernel_init=nnx.initializers.ones, dtype=jnp.float32)

    @jax.jit
    def first_token(x):
        kinds = [dataclasses.replace(config, attention=kind) for kind in ("dense", "dense-cudnn")]
        attentions = [make(kind, rngs=nnx.Rngs(0)) for kind in kinds]
        for attention in attentions:
            attention.init_cache(x.shape)
        return [attention(x, decode=True) for attention in attentions]

    np.testing.assert_array_equal(*first_token(random(0, 1, 1, 32)))
    model = Transformer(config, vocab_size=5, max_length=8, rngs=nnx.Rngs(0, sparsity=0))
    with pytest.raises(NotImplementedError, match="--attention reformer cannot decode"):
        model.init_cache(1, 8)
