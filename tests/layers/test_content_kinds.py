"""Hashes of several origins, as kinds of sparsity in both Flax modules."""

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import IMPLEMENTATIONS
from flax import nnx
from module_cases import HEADS, LENGTH, assert_close, outputs_and_gradients, turned
from module_cases import WIDE_FEATURES as FEATURES
from module_cases import wide_tokens as tokens

import scfa_jax.linen
from scfa_jax import kmeans_hash, learned_hash, lsh_hash, reference
from scfa_jax.kmeans import member_sums
from scfa_jax.layers import HashBy, Hashes, bucket_order, normalize
from scfa_jax.nnx import CausalSelfAttention, Hash, KeptDraw, KMeans, LearnedRotations

COMMON = {"rotary": turned, "use_bias": False, "implementation": IMPLEMENTATIONS[0]}
GROUPED = {"num_key_value_heads": 2, "share_query_key": False}


@dataclasses.dataclass(frozen=True)
class InTurn(HashBy):
    """A way to hash that the library does not have: by place alone, in turn."""

    def hashes(self, query, key, num_buckets, state, start):
        bucket = (start + jnp.arange(query.shape[1], dtype=jnp.int32)) % num_buckets
        return Hashes(*(jnp.broadcast_to(bucket[None, :, None], x.shape[:3]) for x in (query, key)))


KINDS = {
    "learned": (Hash(4, by=LearnedRotations()), {}),
    "learned, grouped own keys, beside a window": (Hash(4, by=LearnedRotations(), local_window=3), GROUPED),
    "k-means, grouped own keys": (Hash(4, before_rotary=True, by=KMeans()), GROUPED),
    "in turn, grouped": (Hash(4, by=InTurn()), {"num_key_value_heads": 2}),
}
each_kind = pytest.mark.parametrize("name", KINDS)


@functools.cache
def case(name: str):
    """The module, what is trained and kept, and `(variables, x, cotangent)` to outputs and gradients."""
    kind, options = KINDS[name]
    module = CausalSelfAttention(FEATURES, HEADS, sparsity=kind, **COMMON, **options, rngs=nnx.Rngs(0))
    graph, params, kept = nnx.split(module, nnx.Param, KeptDraw)
    variables = nnx.to_pure_dict(params), nnx.to_pure_dict(kept)

    def apply(params, x, kept):
        module = nnx.merge(graph, nnx.State(params), nnx.State(kept))
        return module(x, deterministic=True)

    def results(params, kept, x, cotangent):
        return outputs_and_gradients(apply, params, x, cotangent, {"kept": kept})

    return module, *variables, jax.jit(results)


@each_kind
def test_later_tokens_change_neither_earlier_outputs_nor_receive_their_gradients(name):
    _, params, kept, results = case(name)
    for seen in (1, LENGTH // 2):
        cotangent = tokens(1).at[:, seen:].set(0)
        outputs, (_, gradient) = results(params, kept, tokens(), cotangent)
        x = tokens().at[:, seen:].set(tokens(2)[:, seen:])
        changed, _ = results(params, kept, x, cotangent)
        np.testing.assert_allclose(outputs[:, :seen], changed[:, :seen], rtol=1e-5, atol=1e-6)
        assert not np.allclose(outputs[:, seen:], changed[:, seen:])
        np.testing.assert_array_equal(gradient[:, seen:], 0)
    assert np.any(gradient[:, : LENGTH // 2] != 0)


@each_kind
@pytest.mark.parametrize("least_room", [1, LENGTH + 1], ids=["by buckets", "by a mask"])
def test_a_prompt_and_one_token_at_a_time_equal_attention_to_all(name, least_room, monkeypatch):
    monkeypatch.setattr(bucket_order, "LEAST_ROOM", dict.fromkeys(bucket_order.LEAST_ROOM, least_room))
    module, params, kept, results = case(name)
    expected, _ = results(params, kept, tokens(), tokens(1))
    module.init_cache(tokens().shape)
    assert hasattr(module, "cached_order") == (least_room == 1 and "window" not in name)
    step = nnx.jit(lambda module, x: module(x, decode=True))
    parts = np.cumsum([0, 9, *[1] * 6, 9])
    outputs = [step(module, tokens()[:, start:stop]) for start, stop in itertools.pairwise(parts)]
    assert_close(jnp.concatenate(outputs, axis=1), expected)


def by_hand(params, x, name):
    """The layer with learned rotations written out with the dense reference and the pure functions."""
    kind, options = KINDS[name]
    turn = lambda x: turned(x, jnp.arange(LENGTH)[None])
    project = lambda part: jnp.einsum("bte,enh->btnh", x, params[part]["kernel"], precision="highest")
    query, value = turn(project("query")), project("value")
    key = turn(project("key")) if options else query
    ids, gate = learned_hash(key, params["rotations"])
    query_ids = lsh_hash(query, jnp.repeat(params["rotations"], HEADS // key.shape[2], axis=0))
    exclude_self = not options  # where keys are queries
    near = reference.window_mask(LENGTH, LENGTH, kind.local_window) & reference.causal_mask(LENGTH, LENGTH)
    mask = near | reference.hash_mask(query_ids, ids, exclude_self=exclude_self)
    output, _ = reference.attention(query, normalize(key), value * gate[..., None], mask)
    return jnp.einsum("btnh,nhe->bte", output, params["out"]["kernel"], precision="highest")


@pytest.mark.parametrize("name", [name for name in KINDS if "learned" in name])
def test_equals_the_dense_definition_and_learns(name):
    _, params, kept, results = case(name)
    dense = lambda params, x: by_hand(params, x, name)
    expected = jax.jit(functools.partial(outputs_and_gradients, dense))(params, tokens(), tokens(1), {})
    outputs, (gradients, of_x) = results(params, kept, tokens(), tokens(1))
    assert_close(outputs, expected[0])
    assert_close((gradients, of_x), expected[1])
    assert np.any(gradients["rotations"] != 0, axis=-1).all()


def test_only_rotations_that_are_learned_are_parameters():
    assert {name for name in KINDS if "rotations" in case(name)[1]} == {name for name in KINDS if "learned" in name}
    assert {name: set(case(name)[2]) for name in KINDS if case(name)[2]} == {"k-means, grouped own keys": {"centroids"}}


def linen(name: str):
    kind, options = KINDS[name]
    options = {"sparsity": kind, "deterministic": False, **COMMON, **options}
    return scfa_jax.linen.CausalSelfAttention(FEATURES, HEADS, **options)


@each_kind
def test_linen_keeps_and_computes_the_same(name):
    _, params, kept, results = case(name)
    variables = {"params": params, **({"sparsity": kept} if kept else {})}
    keys = {"params": jax.random.key(0), "sparsity": jax.random.key(1)}
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(linen(name).init, keys, tokens()), variables)
    outputs = jax.jit(linen(name).clone(deterministic=True).apply)(variables, tokens())
    assert_close(outputs, results(params, kept, tokens(), tokens(1))[0])


def test_centroids_in_linen_get_sums_for_a_gradient():
    name = "k-means, grouped own keys"
    _, params, kept, results = case(name)

    @jax.jit
    def by_variables(variables, x, cotangent):
        return jax.grad(lambda variables: jnp.sum(linen(name).apply(variables, x) * cotangent))(variables)

    gradients = by_variables({"params": params, "sparsity": kept}, tokens(), tokens(1))
    _, (expected, _) = results(params, kept, tokens(), tokens(1))
    assert_close(gradients["params"], expected)

    @jax.jit
    def sums(x, centroids):  # both queries of a group count for its key head
        query, key = (
            jnp.einsum("bte,enh->btnh", x, params[part]["kernel"], precision="highest") for part in ("query", "key")
        )
        all_three = query[:, :, ::2], query[:, :, 1::2], key
        return sum(member_sums(x, kmeans_hash(x, centroids), 4) for x in all_three)

    expected = sums(tokens(), kept["centroids"])
    np.testing.assert_allclose(gradients["sparsity"]["centroids"], expected, rtol=1e-5, atol=1e-5)


def test_centroids_of_another_shape_raise():
    module, *_ = case("k-means, grouped own keys")
    shape = rf"\(2, 4, {FEATURES // HEADS}\)"
    with pytest.raises(ValueError, match=rf"centroids must be \[K, num_buckets, H\] = {shape}, got \(1, 4, 4\)"):
        module(tokens(), centroids=jnp.ones((1, 4, 4)))
