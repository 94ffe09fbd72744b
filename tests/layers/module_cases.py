"""What `scfa_jax.nnx` and `scfa_jax.linen` must both do: test_nnx.py and test_linen.py run it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import HAS_GPU

from scfa_jax import lsh_hash, reference
from scfa_jax.layers import Drop, Hash, KMeans, normalize

BATCH, LENGTH, FEATURES, HEADS, HEAD_DIM = 2, 24, 16, 4, 4
WIDE_FEATURES = 64 if HAS_GPU else FEATURES  # in heads of 16, the smallest that an implementation on a GPU takes
KINDS = {"dense": None, "hash": Hash(4), "drop": Drop(0.4)}
SEED = jax.random.key(7)

UNIT_QUERIES = {"share_query_key": True, "normalize_key": True}  # as keys; the default in hash mode
CAP_AND_SINKS = {"logits_soft_cap": 0.3, "use_sink_logits": True}
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "hash": ("hash", {}),
    "drop": ("drop", {}),
    "grouped dense, shared unit keys": ("dense", {"num_key_value_heads": 2, **UNIT_QUERIES}),
    "grouped hash": ("hash", {"num_key_value_heads": 2}),
    "grouped drop": ("drop", {"num_key_value_heads": 2}),
    "drop, shared unit keys": ("drop", UNIT_QUERIES),
    "hash, own unit keys": ("hash", {"share_query_key": False}),
    "grouped hash, shared raw keys": ("hash", {"num_key_value_heads": 2, "normalize_key": False}),
    "grouped hash with a cap and sinks": ("hash", {"num_key_value_heads": 2, **CAP_AND_SINKS}),
    "grouped drop with sinks": ("drop", {"num_key_value_heads": 2, "use_sink_logits": True}),
}

PUBLIC = (
    "CausalSelfAttention",
    *("Hash", "Rotations", "LearnedRotations", "KMeans", "Drop"),
    *("Window", "Longformer", "BigBird", "Strided", "Fixed", "SparseK", "MoBA", "NSA"),
    *("causal_attention_fn", "hash_attention_fn", "qk_attention_fn", "rotary"),
)

each_kind = pytest.mark.parametrize("kind", KINDS)
each_configuration = pytest.mark.parametrize("name", CONFIGURATIONS)
each_random_kind = pytest.mark.parametrize("kind", ["hash", "drop"])


@dataclasses.dataclass
class Case:
    """A module as pure functions. Those of equal options are made and compiled once, whatever the test.

    apply: `(params, x, *, kept, seed, rngs, **call)` to outputs; without a seed it evaluates.
    draw: `(seed, length)` to the draw of one training step.
    kept: What evaluation keeps besides parameters.
    save, load: To bytes, and from the bytes of another case to its parameters and what it keeps.
    """

    params: dict[str, Any]
    kept: dict[str, Any]
    apply: Callable[..., jax.Array]
    draw: Callable[..., dict[str, jax.Array]]
    save: Callable[[], bytes]
    load: Callable[[bytes], tuple[dict[str, Any], dict[str, Any]]]

    def __post_init__(self):
        self.outputs_and_gradients = jax.jit(functools.partial(outputs_and_gradients, self.apply))


def outputs_and_gradients(apply, params, x, cotangent, draw):
    """Outputs, and the gradients of parameters and inputs."""
    outputs, pull = jax.vjp(lambda params, x: apply(params, x, **draw), params, x)
    return outputs, pull(cotangent.astype(outputs.dtype))


def tokens(seed: int = 0, features: int = FEATURES) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (BATCH, LENGTH, features))


wide_tokens = functools.partial(tokens, features=WIDE_FEATURES)


def turned(x, positions):
    """A rotary embedding of sorts."""
    return x * jnp.cos(positions)[..., None, None] + x[..., ::-1] * jnp.sin(positions)[..., None, None]


def by_hand(
    params,
    x,
    draw,
    *,
    kind,
    share_query_key=None,
    normalize_key=None,
    logits_soft_cap=None,
    positions=None,
    hashed_in=jnp.float32,
):
    """The layer written out with the dense reference, in the dtype of `x`."""
    is_hash = isinstance(kind, Hash)
    share, normalized = (is_hash if option is None else option for option in (share_query_key, normalize_key))

    def project(name, dtype=x.dtype, rotated=True):
        kernel, bias = (params[name][leaf].astype(dtype) for leaf in ("kernel", "bias"))
        head = jnp.einsum("bte,enh->btnh", x.astype(dtype), kernel, precision="highest") + bias
        return turned(head, positions) if rotated and positions is not None and name != "value" else head

    def keys(dtype=x.dtype, rotated=True):
        if not share:
            return project("key", dtype, rotated)
        query = project("query", dtype, rotated).astype(jnp.float32)
        return jnp.stack([query[:, :, k * group : (k + 1) * group].mean(axis=2) for k in range(key_heads)], axis=2)

    query, value = project("query"), project("value")
    key_heads = value.shape[2]
    group = HEADS // key_heads
    key = keys().astype(jnp.float32)
    logits = {"logits_soft_cap": logits_soft_cap, "sink_logits": params.get("sink_logits")}
    scored_key = (key / jnp.sqrt(jnp.sum(key**2, axis=-1, keepdims=True) + 1e-6) if normalized else key).astype(x.dtype)
    if is_hash:
        rotations = draw["rotations"]
        hashed_as = (hashed_in, not kind.before_rotary)
        hashed = project("query", *hashed_as)
        one_head = lambda n: lsh_hash(hashed[:, :, n : n + 1], rotations[n // group][None])[..., 0]
        query_hash = jnp.stack([one_head(n) for n in range(HEADS)], axis=2)
        output = reference.hash_sparse_attention(
            query,
            scored_key,
            value,
            query_hash,
            lsh_hash(keys(*hashed_as), rotations),
            exclude_self=share if kind.exclude_self is None else kind.exclude_self,
            **logits,
        )
    elif isinstance(kind, Drop) and draw:
        keep = draw["query_keep"], draw["key_keep"]
        output = reference.qk_sparse_attention(query, scored_key, value, *keep, **logits)
    else:
        output = reference.causal_attention(query, scored_key, value, **logits)
    kernel, bias = (params["out"][leaf].astype(x.dtype) for leaf in ("kernel", "bias"))
    return jnp.einsum("btnh,nhe->bte", output, kernel, precision="highest") + bias


OPTIONS = ("kind", "share_query_key", "normalize_key", "logits_soft_cap", "hashed_in")
compiled_by_hand = jax.jit(by_hand, static_argnames=OPTIONS)


@functools.partial(jax.jit, static_argnames=OPTIONS)
def gradients_by_hand(params, x, cotangent, draw, **options):
    apply = lambda params, x, **draw: by_hand(params, x, draw, **options)
    return outputs_and_gradients(apply, params, x, cotangent, draw)


def assert_close(got, expected):
    """To float32 accuracy: 1e-5 of the largest entry of all."""
    largest = max(float(np.max(np.abs(leaf))) for leaf in jax.tree.leaves(expected))
    chex.assert_trees_all_close(got, expected, rtol=0, atol=1e-5 * largest)


def without_biases(params):
    return {name: {**leaves, "bias": jnp.zeros_like(leaves["bias"])} for name, leaves in params.items()}


def with_sinks(params):
    """With sinks that weigh something, in layers that have any: they begin at 0."""
    return params | {name: jnp.linspace(-1, 2, HEADS) for name in ("sink_logits",) if name in params}


class ModuleSpecification:
    """`make(sparsity, **options)` gives a Case, with random biases, and the same Case for the same options."""

    make: Callable[..., Case]

    @each_configuration
    def test_equals_the_dense_definition(self, name):
        kind, options = CONFIGURATIONS[name]
        case = self.make(KINDS[kind], **options)
        assert ("key" in case.params) == (not options.get("share_query_key", kind == "hash"))
        assert ("sink_logits" in case.params) == options.get("use_sink_logits", False)
        given = with_sinks(case.params), tokens(), tokens(1), case.draw(SEED)
        of_arrays = ("num_key_value_heads", "use_sink_logits")  # whose shapes and names tell
        others = {option: value for option, value in options.items() if option not in of_arrays}
        expected = gradients_by_hand(*given, kind=KINDS[kind], **others)
        for one_got, one_expected in zip(case.outputs_and_gradients(*given), expected, strict=True):
            assert_close(one_got, one_expected)

    def test_sinks_are_a_parameter_that_begins_at_0_and_learns(self):
        case = self.make(None, use_sink_logits=True, param_dtype=jnp.bfloat16)
        np.testing.assert_array_equal(case.params["sink_logits"], jnp.zeros((HEADS,), jnp.bfloat16))
        assert case.params["sink_logits"].dtype == jnp.bfloat16
        case = self.make(None, **CAP_AND_SINKS)
        _, (gradient, _) = case.outputs_and_gradients(case.params, tokens(), tokens(1), {})
        assert np.all(gradient["sink_logits"] != 0)
        plain = self.make(None, logits_soft_cap=0.3)
        without = {name: leaves for name, leaves in case.params.items() if name != "sink_logits"}
        assert not np.allclose(case.apply(case.params, tokens()), plain.apply(without, tokens()), rtol=1e-2)

    @pytest.mark.parametrize("name", ["dense", "hash", "grouped hash"])
    def test_evaluation_equals_the_dense_definition(self, name):
        kind, options = CONFIGURATIONS[name]
        case = self.make(KINDS[kind], **options)
        expected = compiled_by_hand(case.params, tokens(), case.kept, kind=KINDS[kind])
        assert_close(case.apply(case.params, tokens()), expected)

    @each_configuration
    def test_later_tokens_change_neither_earlier_outputs_nor_receive_their_gradients(self, name):
        kind, options = CONFIGURATIONS[name]
        case = self.make(KINDS[kind], **options)
        draw = case.draw(SEED)
        for seen in (1, LENGTH // 2, LENGTH - 1):
            cotangent = tokens(1).at[:, seen:].set(0)
            outputs, (_, gradient) = case.outputs_and_gradients(case.params, tokens(), cotangent, draw)
            x = tokens().at[:, seen:].set(tokens(2)[:, seen:])
            changed, _ = case.outputs_and_gradients(case.params, x, cotangent, draw)
            np.testing.assert_allclose(outputs[:, :seen], changed[:, :seen], rtol=1e-5, atol=1e-6)
            assert not np.array_equal(outputs[:, seen:], changed[:, seen:])
            assert np.all(gradient[:, seen:] == 0)
        assert np.all(np.any(gradient[:, : LENGTH // 4] != 0, axis=(1, 2)))

    @each_random_kind
    def test_each_training_step_draws_anew_without_a_new_trace(self, kind):
        chex.clear_trace_counter()
        case = self.make(KINDS[kind])

        @jax.jit
        @chex.assert_max_traces(n=1)
        def step(params, x, seed):
            return jax.value_and_grad(lambda params: jnp.sum(case.apply(params, x, seed=seed) ** 2))(params)

        losses, gradients = zip(*(step(case.params, tokens(), jax.random.key(i)) for i in (0, 1, 2, 2)), strict=True)
        assert len(set(map(float, losses))) == 3
        assert losses[2] == losses[3]
        chex.assert_tree_all_finite(gradients)
        assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(gradients[0]["query"]["kernel"]))

    def test_evaluation_keeps_one_draw_that_survives_saving(self):
        case, other = self.make(KINDS["hash"]), self.make(KINDS["hash"], seed=1)
        assert case.kept["rotations"].shape == (HEADS, HEAD_DIM, 2)
        assert not np.array_equal(case.kept["rotations"], other.kept["rotations"])
        params, kept = other.load(case.save())
        chex.assert_trees_all_equal((params, kept), (case.params, case.kept))
        evaluated = case.apply(case.params, tokens())
        np.testing.assert_array_equal(evaluated, case.apply(params, tokens(), kept=kept))
        assert not np.allclose(evaluated, case.apply(params, tokens(), kept=other.kept), rtol=1e-2)

    def test_evaluation_keeps_everything_unless_told_otherwise(self):
        dense, drop, always = (
            self.make(sparsity) for sparsity in (None, KINDS["drop"], Drop(0.4, drop_at_evaluation=True))
        )
        evaluated = dense.apply(dense.params, tokens())
        np.testing.assert_array_equal(evaluated, drop.apply(dense.params, tokens()))
        assert not np.allclose(evaluated, always.apply(dense.params, tokens(), rngs=SEED))

    def test_keep_masks_are_independent(self):
        draw = self.make(Drop(0.25), num_key_value_heads=2).draw(SEED, 4096)
        chex.assert_shape(draw["query_keep"], (BATCH, 4096, HEADS))
        chex.assert_shape(draw["key_keep"], (BATCH, 4096, 2))
        columns = [np.moveaxis(np.asarray(keep), 1, -1).reshape(-1, 4096) for keep in draw.values()]
        streams = np.concatenate(columns).astype(float)  # one row per mask, batch element and head
        np.testing.assert_allclose(streams.mean(axis=1), 0.75, atol=0.03)
        np.testing.assert_allclose(np.corrcoef(streams), np.eye(len(streams)), atol=0.08)
        assert abs(np.corrcoef(streams[0][1:], streams[0][:-1])[0, 1]) < 0.08

    @pytest.mark.parametrize(
        ("exclude_self", "share_query_key", "excluded"),
        [(None, None, True), (None, False, False), (False, None, False), (True, False, True)],
    )
    def test_a_token_excludes_itself_where_keys_are_queries_unless_told_otherwise(
        self, exclude_self, share_query_key, excluded
    ):
        case = self.make(Hash(4, exclude_self), share_query_key=share_query_key)
        outputs = case.apply(without_biases(case.params), tokens())
        hashed = {
            name: lsh_hash(
                jnp.einsum("bte,enh->btnh", tokens(), case.params[name]["kernel"], precision="highest"),
                case.kept["rotations"],
            )
            for name in ("query", "key")
            if name in case.params
        }
        query, key = (np.asarray(hashed.get(name, hashed["query"])) for name in ("query", "key"))
        meets = (query[:, :, None] == key[:, None]) & np.tri(LENGTH, k=-int(excluded), dtype=bool)[None, :, :, None]
        alone = ~meets.any(axis=(2, 3))  # in every head
        assert alone[:, 0].all() == excluded
        np.testing.assert_array_equal(np.all(outputs == 0, axis=-1), alone)

    @pytest.mark.parametrize("name", [name for name in CONFIGURATIONS if "unit" in name or name.endswith("hash")])
    def test_gradients_are_finite_where_keys_have_no_length(self, name):
        kind, options = CONFIGURATIONS[name]
        case = self.make(KINDS[kind], **options)
        given = without_biases(case.params), tokens().at[:, ::3].set(0), tokens(1), case.draw(SEED)
        chex.assert_tree_all_finite(case.outputs_and_gradients(*given))

    def test_shared_keys_are_hashed_once(self):
        for name, times in (("hash", 1), ("grouped hash", 2)):  # the mean of a group has a hash of its own
            kind, options = CONFIGURATIONS[name]
            case = self.make(KINDS[kind], **options)
            jaxpr = jax.make_jaxpr(lambda x: case.apply(case.params, x))(tokens())  # noqa: B023
            assert str(jaxpr).count(" argmax[") == times

    @each_kind
    def test_computes_in_bfloat16_with_float32_parameters(self, kind):
        case = self.make(KINDS[kind], dtype=jnp.bfloat16)
        chex.assert_trees_all_equal_shapes_and_dtypes(case.params, self.make(KINDS[kind]).params)
        draw = case.draw(SEED)
        outputs, gradients = jax.eval_shape(case.outputs_and_gradients, case.params, tokens(), tokens(1), draw)
        assert outputs.dtype == jnp.bfloat16
        chex.assert_trees_all_equal_dtypes(gradients, (case.params, tokens()))
        got = case.apply(case.params, tokens(), **draw)
        exact, plain = (
            np.asarray(compiled_by_hand(case.params, x, draw, kind=KINDS[kind], hashed_in=jnp.bfloat16), np.float32)
            for x in (tokens(), tokens().astype(jnp.bfloat16))
        )
        # As exact as the dense definition in the same dtype: the rule of `tolerance`.
        allowed = 2 * np.max(np.abs(plain - exact)) + float(jnp.finfo(jnp.bfloat16).eps) * np.max(np.abs(exact))
        assert np.max(np.abs(np.asarray(got, np.float32) - exact)) <= allowed

    def test_rematerialisation_in_jax_changes_nothing_and_draws_nothing(self):
        case = self.make(KINDS["hash"])
        draw = case.draw(SEED)
        given = case.params, tokens(), tokens(1)
        random = lambda traced: "random_bits" in str(traced.jaxpr)
        remat = jax.jit(functools.partial(outputs_and_gradients, jax.checkpoint(case.apply)))
        traced = remat.trace(*given, draw)
        assert not random(traced)
        assert random(remat.trace(*given, {"seed": SEED}))  # such a draw is made twice
        got = traced.lower().compile()(*given, draw)
        chex.assert_trees_all_close(got, case.outputs_and_gradients(*given, draw), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize(
        ("kind", "options"),
        [
            (None, {}),
            (Hash(4), {}),
            (Hash(4, before_rotary=True), {}),
            (Hash(4, before_rotary=True), {"share_query_key": False, "num_key_value_heads": 2}),
        ],
        ids=["dense", "hash", "hashed before", "own grouped keys hashed before"],
    )
    def test_rotary_positions_come_before_all_but_the_hash_that_asks(self, kind, options):
        case = self.make(kind, rotary=turned, **options)
        share = {"share_query_key": options.get("share_query_key")}
        draw = case.draw(SEED)
        shifted = 3 + jnp.arange(LENGTH)[None]
        for positions, call in ((jnp.arange(LENGTH)[None], {}), (shifted, {"positions": shifted})):
            outputs = case.apply(case.params, tokens(), **draw, **call)
            expected = compiled_by_hand(case.params, tokens(), draw, kind=kind, positions=positions, **share)
            assert_close(outputs, expected)

    def test_positions_without_rotary_raise(self):
        case = self.make(None)
        with pytest.raises(ValueError, match=r"positions must be None.*got shape \(1, 24\)"):
            case.apply(case.params, tokens(), positions=jnp.arange(LENGTH)[None])

    @pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1, 1)], ids=["no batch", "no tokens", "one token"])
    def test_few_or_no_tokens(self, shape):
        case = self.make(KINDS["hash"])
        outputs = case.apply(case.params, jnp.ones((*shape, FEATURES)))
        # A first token attends to nothing.
        np.testing.assert_array_equal(outputs, jnp.broadcast_to(case.params["out"]["bias"], (*shape, FEATURES)))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_heads": 3}, "num_heads"),
            ({"num_key_value_heads": 3}, "num_key_value_heads"),
            ({"num_key_value_heads": 0}, "num_key_value_heads must divide num_heads = 4, got 0"),
            ({"head_dim": 0}, "head_dim must be positive, got .*head_dim=0"),
        ],
    )
    def test_impossible_heads_raise(self, options, message):
        with pytest.raises(ValueError, match=message):
            self.make(None, **options)

    @pytest.mark.usefixtures("unchecked")
    def test_other_kinds_of_sparsity_raise(self):
        with pytest.raises(TypeError, match="sparsity must be"):
            self.make("hash")

    @pytest.mark.parametrize(
        ("kind", "call", "message"),
        [
            ("dense", {"rotations": jnp.ones((4, 4, 2))}, "rotations does not go with"),
            ("drop", {"rotations": jnp.ones((4, 4, 2))}, "rotations does not go with"),
            ("hash", {"rotations": jnp.ones((2, 4, 2))}, r"rotations must be .* = \(4, 4, 2\), got \(2, 4, 2\)"),
            ("hash", {"rotations": jnp.ones((4, 4, 4))}, r"rotations must be .* = \(4, 4, 2\), got \(4, 4, 4\)"),
            ("hash", {"query_keep": jnp.ones((2, 24, 4), bool)}, "query_keep does not go with"),
            ("drop", {"query_keep": jnp.ones((2, 24, 4), bool)}, "must be given together"),
        ],
    )
    def test_draws_of_another_kind_raise(self, kind, call, message):
        case = self.make(KINDS[kind])
        with pytest.raises(ValueError, match=message):
            case.apply(case.params, tokens(), **call)

    @pytest.mark.usefixtures("unchecked")
    def test_inputs_of_another_shape_raise(self):
        case = self.make(None)
        for x in (tokens()[0], tokens()[..., :8]):
            with pytest.raises(ValueError, match=r"x must be \[B, T, 16\]"):
                case.apply(case.params, x)


@pytest.mark.usefixtures("unchecked")
def test_impossible_kinds_raise():
    for num_buckets in (7, 0, -2):
        with pytest.raises(ValueError, match=f"num_buckets must be an even .* got {num_buckets}"):
            Hash(num_buckets)
    with pytest.raises(ValueError, match="local_window must be at least 0, got -1"):
        Hash(4, local_window=-1)
    for rate in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"rate must be .* got {rate}"):
            Drop(rate)
    with pytest.raises(TypeError, match=r"num_buckets must be a static int, got 4\.0"):
        Hash(4.0)
    with pytest.raises(TypeError, match=r"local_window must be a static int, got 2\.0"):
        Hash(4, local_window=2.0)
    with pytest.raises(TypeError, match=r"by must be Rotations\(\), .* or another way, got 'rotations'"):
        Hash(4, by="rotations")
    with pytest.raises(TypeError, match=r"rate must be a number, got '0\.1'"):
        Drop("0.1")
    with pytest.raises(ValueError, match=r"decay must be at least 0 and below 1, got 1\.0"):
        KMeans(decay=1.0)
    with pytest.raises(TypeError, match="decay must be a number, got 'slow'"):
        KMeans(decay="slow")


def test_normalised_vectors():
    x = tokens()
    np.testing.assert_allclose(np.linalg.norm(jax.jit(normalize)(x), axis=-1), 1, rtol=1e-5)
    assert jax.eval_shape(normalize, x.astype(jnp.float16)).dtype == jnp.float16
    gradient = jax.jit(jax.grad(lambda x: normalize(x).sum()))(jnp.zeros((3, 4)))
    np.testing.assert_allclose(gradient, 1e3, rtol=1e-5)  # 1 / sqrt(epsilon)
