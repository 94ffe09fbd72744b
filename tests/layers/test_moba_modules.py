"""MoBA as a kind of sparsity of both Flax modules."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import IMPLEMENTATIONS
from flax import nnx
from jax.extend.core import jaxprs_in_params
from module_cases import BATCH, HEADS, LENGTH, SEED, assert_close, turned, with_sinks
from module_cases import WIDE_FEATURES as FEATURES
from module_cases import wide_tokens as tokens

import scfa_jax.linen
import scfa_jax.nnx
from scfa_jax import reference
from scfa_jax.layers import Layout, normalize
from scfa_jax.nnx import MoBA

COMMON = {"rotary": turned, "num_key_value_heads": 2, "implementation": IMPLEMENTATIONS[0]}
LAYERS = {
    "grouped": {"sparsity": MoBA(5, top_k=3)},
    "chosen before rotary": {"sparsity": MoBA(4, 2, num_local=2, share_in_group=True, before_rotary=True)},
    "chosen before rotary, shared unit keys": {
        "sparsity": MoBA(3, 4, before_rotary=True),
        **{"share_query_key": True, "normalize_key": True},
    },
    "with a cap and sinks": {
        "sparsity": MoBA(7, 2),
        **{"num_key_value_heads": HEADS, "logits_soft_cap": 0.3, "use_sink_logits": True},
    },
}
DOCUMENTS = jnp.repeat(jnp.array([3, 4, -1, 5], jnp.int32), jnp.array([8, 6, 2, 8]))[None]
each_layer = pytest.mark.parametrize("name", LAYERS)


@functools.cache
def parts(name: str):
    """The module's graph, its parameters as NNX makes them, but sinks that weigh something, and the rest."""
    module = scfa_jax.nnx.CausalSelfAttention(FEATURES, HEADS, rngs=nnx.Rngs(0), **COMMON | LAYERS[name])
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    return graph, with_sinks(nnx.to_pure_dict(params)), rest


@functools.partial(jax.jit, static_argnums=0)
def outputs_and_gradients(name, x, cotangent, segment_ids=None):
    graph, params, rest = parts(name)
    apply = lambda params, x: nnx.merge(graph, nnx.State(params), rest)(x, segment_ids=segment_ids)
    outputs, pull = jax.vjp(apply, params, x)
    return outputs, *pull(cotangent)


def by_hand(name, params, x, segment_ids):
    """The layer written out with the dense reference."""
    options, kind = COMMON | LAYERS[name], LAYERS[name]["sparsity"]
    turn = lambda x: turned(x, jnp.arange(LENGTH)[None])

    def project(name):
        return jnp.einsum("bte,enh->btnh", x, params[name]["kernel"], precision="highest") + params[name]["bias"]

    query, value = project("query"), project("value")
    is_shared = options.get("share_query_key", False)
    key = query.reshape(*query.shape[:2], -1, 2, query.shape[3]).mean(axis=3) if is_shared else project("key")
    attended = normalize(turn(key)) if is_shared else turn(key)
    chooses = (query, key) if kind.before_rotary else (turn(query), attended)
    of_kind = kind.block_size, kind.top_k, kind.num_local, kind.share_in_group
    mask = reference.moba_mask(*chooses, *of_kind, 0, segment_ids, segment_ids)
    mask = jnp.repeat(mask, HEADS // mask.shape[1], axis=1)
    mask = mask if segment_ids is None else mask & reference.segment_mask(segment_ids, segment_ids)
    logits = {"logits_soft_cap": options.get("logits_soft_cap"), "sink_logits": params.get("sink_logits")}
    output, _ = reference.attention(turn(query), attended, value, mask, **logits)
    return jnp.einsum("btnh,nhe->bte", output, params["out"]["kernel"], precision="highest") + params["out"]["bias"]


@each_layer
@pytest.mark.parametrize("segment_ids", [None, DOCUMENTS], ids=["one document", "documents"])
def test_equals_the_dense_definition(name, segment_ids):
    @jax.jit
    def defined(params, x, cotangent):
        outputs, pull = jax.vjp(lambda params, x: by_hand(name, params, x, segment_ids), params, x)
        return outputs, *pull(cotangent)

    _, params, _ = parts(name)
    expected = defined(params, tokens(), tokens(1))
    assert_close(outputs_and_gradients(name, tokens(), tokens(1), segment_ids), expected)


@each_layer
def test_later_tokens_change_neither_earlier_outputs_nor_receive_their_gradients(name):
    for seen in (1, 10, 11, LENGTH - 1):
        cotangent = tokens(1).at[:, seen:].set(0)
        outputs, _, gradient = outputs_and_gradients(name, tokens(), cotangent)
        changed, *_ = outputs_and_gradients(name, tokens().at[:, seen:].set(tokens(2)[:, seen:]), cotangent)
        np.testing.assert_allclose(outputs[:, :seen], changed[:, :seen], rtol=1e-5, atol=1e-6)
        assert not np.allclose(outputs[:, seen:], changed[:, seen:])
        np.testing.assert_array_equal(gradient[:, seen:], 0)
        assert np.any(gradient[:, :seen] != 0)


def in_nnx(name: str):
    """A step of decoding, and an empty cache."""
    graph, params, rest = parts(name)
    module = nnx.merge(graph, nnx.State(params), rest)
    module.init_cache((BATCH, LENGTH + 2, FEATURES))
    graph, cache, rest = nnx.split(module, nnx.Cache, ...)

    def step(cache, x):
        module = nnx.merge(graph, cache, rest)
        return module(x, decode=True), nnx.state(module, nnx.Cache)

    return step, cache


def in_linen(name: str):
    """The same."""
    _, params, _ = parts(name)
    module = scfa_jax.linen.CausalSelfAttention(FEATURES, HEADS, decode=True, **COMMON | LAYERS[name])
    made = jax.jit(module.init)(SEED, jnp.ones((BATCH, LENGTH + 2, FEATURES)))
    assert jax.tree.map(jnp.shape, made["params"]) == jax.tree.map(jnp.shape, params)

    def step(cache, x):
        outputs, changed = module.apply({"params": params, "cache": cache}, x, mutable=["cache"])
        return outputs, changed["cache"]

    return step, made["cache"]


@pytest.mark.parametrize("flax", [in_nnx, in_linen], ids=["nnx", "linen"])
@each_layer
def test_a_prompt_single_tokens_and_more_at_once_equal_one_pass(name, flax):
    whole, *_ = outputs_and_gradients(name, tokens(), tokens(1))
    step, cache = flax(name)
    step, outputs = jax.jit(step), []
    for start, stop in itertools.pairwise(np.cumsum([0, 6, *[1] * 6, 6, 6])):
        output, cache = step(cache, tokens()[:, start:stop])
        outputs.append(output)
    assert_close(jnp.concatenate(outputs, axis=1), whole)
    for past_the_end in (False, False, True):
        output, cache = step(cache, tokens()[:, :1])
        assert np.isnan(output).all() == np.isnan(output).any() == past_the_end


def kind_and_rows(kind, length, key_heads=2, dtype=jnp.float32):
    layout = Layout.of(64, HEADS, key_heads, 16, kind, None, None)
    shapes = [(BATCH, length, heads, 16) for heads in (HEADS, key_heads, key_heads)]
    return layout, [jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("share_in_group", [False, True])
def test_a_single_token_reads_its_blocks_alone(share_in_group):
    kind, room = MoBA(8, 3, num_local=2, share_in_group=share_in_group), 1024
    layout, rows = kind_and_rows(kind, 1)
    cache = kind.empty_cache(layout, BATCH, room, jnp.float32)
    jaxpr = jax.make_jaxpr(lambda cache, *rows: kind.attend_next(cache, layout.heads(*rows), {})[0])(cache, *rows)

    def shapes(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                yield from (v.aval.shape for v in equation.invars)
            for inner in jaxprs_in_params(equation.params):
                yield from shapes(inner)

    found = list(shapes(jaxpr.jaxpr))
    assert any(4 * 8 in shape for shape in found)
    assert not any(room in shape for shape in found)


@pytest.mark.parametrize("kind", [MoBA(4, 3), MoBA(4, 1), MoBA(30, 2), MoBA(1, 9, num_local=3)], ids=str)
def test_a_token_is_as_in_one_pass_whatever_places_not_yet_filled_hold(kind):
    layout, rows = kind_and_rows(kind, 14)
    whole = jax.jit(lambda *rows: kind.attend(layout.heads(*rows), {}, implementation="xla"))(*rows)
    step = jax.jit(lambda cache, *rows: kind.attend_next(cache, layout.heads(*rows), {}, implementation="xla"))
    _, cache = step(kind.empty_cache(layout, BATCH, 24, jnp.float32), *(x[:, :13] for x in rows))
    spoilt = {name: cache[name].at[:, 14:].set(jnp.nan) for name in ("cached_key", "cached_value")}
    output, _ = step(cache | spoilt, *(x[:, 13:] for x in rows))
    assert_close(output, whole[:, 13:])


def test_what_does_not_fit_the_cache_raises():
    kind = MoBA(4, 3)
    layout, rows = kind_and_rows(kind, 12)
    for (batch, room, dtype), error, message in (
        ((BATCH, 8, jnp.float32), ValueError, "at most its 8 tokens, got 2 and 12"),
        ((3, 12, jnp.float32), ValueError, "batch size of the cache, 3, .* got 2 and 12"),
        ((BATCH, 12, jnp.bfloat16), TypeError, "dtype of the computation, float32, got bfloat16"),
    ):
        with pytest.raises(error, match=message):
            kind.attend_next(kind.empty_cache(layout, batch, room, dtype), layout.heads(*rows), {})
    with pytest.raises(ValueError, match="room for at least 1 token, got 0"):
        kind.empty_cache(layout, BATCH, 0, jnp.float32)


@pytest.mark.parametrize("kind", [MoBA(5, 3), MoBA(4, 2, num_local=3), MoBA(30, 2), MoBA(1, 100)], ids=str)
def test_pairs_are_those_of_the_mask(kind):
    _, (query, key, _) = kind_and_rows(kind, LENGTH)
    mask = reference.moba_mask(query, key, kind.block_size, kind.top_k, kind.num_local, False, 0, None, None)
    np.testing.assert_array_equal(mask.sum(axis=(2, 3)), kind.pairs(LENGTH, HEADS))


def test_impossible_options_raise():
    for name in ("block_size", "top_k", "num_local"):
        options = {"block_size": 4, "top_k": 2}
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            MoBA(**options | {name: 0})
        with pytest.raises(TypeError, match=rf"{name} must be a static int, got 2\.0"):
            MoBA(**options | {name: 2.0})
