"""Kinds that the library does not have: one class, most of it an index, makes a layer of both Flax modules."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import causal_mask, segment_mask
from flax import nnx
from module_cases import BATCH, HEADS, LENGTH, SEED, assert_close, outputs_and_gradients, with_sinks
from module_cases import WIDE_FEATURES as FEATURES
from module_cases import wide_tokens as tokens

import scfa_jax
import scfa_jax.linen
import scfa_jax.nnx
from scfa_jax import reference
from scfa_jax.layers import Heads, Kind, Layout, Marked, Marks, Pattern, State
from scfa_jax.layers.pattern import Rows


@dataclasses.dataclass(frozen=True)
class OwnParity(Pattern):
    """Each query attends to the keys at places of its own parity, by an index alone."""

    def index(self, query: Marks, key: Marks, rows: Rows):
        first = rows.positions.get("query_offset", 0)
        places = first + jnp.arange(rows.query_length), jnp.arange(rows.key_length)
        parities = (place[None, :, None] % 2 for place in places)
        return scfa_jax.hash_index(*parities, num_buckets=2, **rows.positions)


@dataclasses.dataclass(frozen=True)
class MarkedParity(Pattern):
    """The same by marks, which are shared by all sequences and heads."""

    cached_marks: ClassVar = {"parity": np.int32(0)}

    def marks(self, heads: Heads, state: State) -> Marked:
        parity = {"parity": ((heads.start + jnp.arange(heads.query.shape[1])) % 2)[None, :, None]}
        return Marked(parity, parity)

    def index(self, query: Marks, key: Marks, rows: Rows):
        return scfa_jax.hash_index(query["parity"], key["parity"], num_buckets=2, **rows.positions)


@dataclasses.dataclass(frozen=True)
class OwnSign(Pattern):
    """Each query attends to the keys with the sign of its first feature, and to the last two places."""

    cached_marks: ClassVar = {"sign": np.int32(0)}

    def marks(self, heads: Heads, state: State) -> Marked:
        return Marked(*({"sign": (x[..., 0] > 0).astype(jnp.int32)} for x in (heads.query, heads.key)))

    def index(self, query: Marks, key: Marks, rows: Rows):
        return scfa_jax.local_hash_index(query["sign"], key["sign"], 2, num_buckets=2, **rows.positions)


KINDS = {"parity": OwnParity(), "marked parity": MarkedParity(), "sign": OwnSign()}
OPTIONS = {"num_key_value_heads": 2, "logits_soft_cap": 0.5, "use_sink_logits": True, "implementation": "xla"}
SEGMENT_IDS = jnp.asarray(np.repeat([3, 0], (10, LENGTH - 10)), jnp.int32)[None]


def in_nnx(kind):
    """Parameters, `(params, x, segment_ids)` to outputs, an empty cache, and `(params, cache, x)` to both."""
    module = scfa_jax.nnx.CausalSelfAttention(FEATURES, HEADS, sparsity=kind, **OPTIONS, rngs=nnx.Rngs(0))
    module.init_cache((BATCH, LENGTH, FEATURES))
    graph, params, cache = nnx.split(module, nnx.Param, nnx.Cache)

    def step(params, cache, x):
        module = nnx.merge(graph, nnx.State(params), nnx.State(cache))
        return module(x, decode=True), nnx.to_pure_dict(nnx.state(module, nnx.Cache))

    def apply(params, x, segment_ids=None):
        return nnx.merge(graph, nnx.State(params), cache)(x, segment_ids=segment_ids)

    return nnx.to_pure_dict(params), apply, nnx.to_pure_dict(cache), step


def in_linen(kind):
    """The same."""
    make = functools.partial(scfa_jax.linen.CausalSelfAttention, FEATURES, HEADS, sparsity=kind, **OPTIONS)
    variables = jax.jit(make(decode=True).init)(SEED, tokens())

    def step(params, cache, x):
        output, changed = make(decode=True).apply({"params": params, "cache": cache}, x, mutable=["cache"])
        return output, changed["cache"]

    def apply(params, x, segment_ids=None):
        return make().apply({"params": params}, x, segment_ids=segment_ids)

    return variables["params"], apply, variables["cache"], step


def by_hand(params, x, segment_ids=None, *, kind):
    """The layer written out with the dense reference."""
    query, key, value = (
        jnp.einsum("bte,enh->btnh", x, params[name]["kernel"], precision="highest") + params[name]["bias"]
        for name in ("query", "key", "value")
    )
    place = jnp.arange(LENGTH)
    if isinstance(kind, OwnSign):
        of_query, of_key = query[..., 0] > 0, jnp.repeat(key[..., 0] > 0, HEADS // 2, axis=2)
        meets = of_query.swapaxes(1, 2)[..., None] == of_key.swapaxes(1, 2)[:, :, None]
        meets |= place[:, None] - place < 2
    else:
        meets = ((place[:, None] - place) % 2 == 0)[None, None]
    mask = meets & causal_mask(LENGTH, LENGTH)
    mask = mask if segment_ids is None else mask & segment_mask(segment_ids, segment_ids)
    attended, _ = reference.attention(query, key, value, mask, logits_soft_cap=0.5, sink_logits=params["sink_logits"])
    return jnp.einsum("btnh,nhe->bte", attended, params["out"]["kernel"], precision="highest") + params["out"]["bias"]


# One of them in Linen: kinds do not know which module they are in.
each = pytest.mark.parametrize(
    ("name", "flax"), [*((name, in_nnx) for name in KINDS), ("sign", in_linen)], ids=[*KINDS, "sign in linen"]
)


@each
def test_an_index_is_enough_to_train(name, flax):
    params, apply, *_ = flax(KINDS[name])
    params = with_sinks(params)
    given = params, tokens(), tokens(1), {"segment_ids": SEGMENT_IDS}
    dense = functools.partial(by_hand, kind=KINDS[name])
    got, expected = (jax.jit(functools.partial(outputs_and_gradients, f))(*given) for f in (apply, dense))
    assert_close(got[0], expected[0])
    assert_close(got[1], expected[1])


@each
def test_an_index_is_enough_to_decode(name, flax):
    """A prompt, single tokens, several tokens."""
    params, _, cache, step = flax(KINDS[name])
    params = with_sinks(params)
    step, outputs = jax.jit(step), []
    for start, stop in itertools.pairwise((0, 9, *range(10, 18), LENGTH)):
        output, cache = step(params, cache, tokens()[:, start:stop])
        outputs.append(output)
    expected = jax.jit(functools.partial(by_hand, kind=KINDS[name]))(params, tokens())
    assert_close(jnp.concatenate(outputs, axis=1), expected)


def test_an_index_is_enough_to_count_pairs():
    place = np.arange(LENGTH)
    assert OwnParity().pairs(LENGTH, HEADS) == np.sum(np.tri(LENGTH) * ((place[:, None] - place) % 2 == 0))


@dataclasses.dataclass(frozen=True)
class OwnValue(Kind):
    """Each token attends to itself alone, by no index."""

    def pairs(self, length: int, num_heads: int) -> float:
        return float(length)

    def attend(self, heads: Heads, state: State, *, segment_ids=None, **options):
        return jnp.repeat(heads.value, HEADS // heads.value.shape[2], axis=2)


def test_a_kind_without_an_index_trains_but_decodes_only_if_it_says_how():
    kind = OwnValue()
    layer = scfa_jax.linen.CausalSelfAttention(FEATURES, HEADS, num_key_value_heads=2, sparsity=kind)
    params = layer.init(SEED, tokens())["params"]
    value = jnp.einsum("bte,enh->btnh", tokens(), params["value"]["kernel"], precision="highest")
    value = jnp.repeat(value, 2, axis=2)
    expected = jnp.einsum("btnh,nhe->bte", value, params["out"]["kernel"], precision="highest")
    assert_close(layer.apply({"params": params}, tokens()), expected)
    layout = Layout.of(FEATURES, HEADS, 2, None, kind, None, None)
    with pytest.raises(NotImplementedError, match=r"OwnValue\(\) cannot decode"):
        kind.empty_cache(layout, BATCH, LENGTH, jnp.float32)
    with pytest.raises(NotImplementedError, match=r"OwnValue\(\) cannot decode"):
        kind.attend_next({}, layout.heads(value, None, value), {})
    with pytest.raises(NotImplementedError, match=r"OwnValue\(\) cannot decode"):
        layer.clone(decode=True).init(SEED, tokens())
    module = scfa_jax.nnx.CausalSelfAttention(FEATURES, HEADS, sparsity=kind, rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match=r"OwnValue\(\) cannot decode"):
        module.init_cache(tokens().shape)
