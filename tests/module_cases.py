"""What `scfa_jax.nnx` and `scfa_jax.linen` must both do: test_nnx.py and test_linen.py run it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scfa_jax import lsh_hash, random_rotations, reference
from scfa_jax.attention_fn import causal_attention_fn, hash_attention_fn, qk_attention_fn
from scfa_jax.sparsity import Drop, Hash, normalize

BATCH, LENGTH, FEATURES, HEADS, HEAD_DIM = 2, 24, 16, 4, 4
KINDS = {"dense": None, "hash": Hash(4), "drop": Drop(0.4)}
SEED = jax.random.key(7)

each_kind = pytest.mark.parametrize("kind", KINDS)
each_random_kind = pytest.mark.parametrize("kind", ["hash", "drop"])
each_group = pytest.mark.parametrize("key_heads", [4, 2], ids=["ungrouped", "grouped"])


@dataclasses.dataclass
class Case:
    """A module as pure functions.

    apply: `(params, x, *, seed, rngs, **call)` to outputs; without a seed it evaluates.
    draw: `(seed)` to the draw of one training step.
    kept: What evaluation keeps besides parameters.
    save, load: To bytes, and from the bytes of another case to outputs of `x` in evaluation.
    """

    params: dict[str, Any]
    kept: dict[str, Any]
    apply: Callable[..., jax.Array]
    draw: Callable[[jax.Array], dict[str, jax.Array]]
    save: Callable[[], bytes]
    load: Callable[[bytes, jax.Array], jax.Array]


def tokens(seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (BATCH, LENGTH, FEATURES))


def by_hand(params, x, kind, draw, *, share=None, normalized=None, rotary=None):
    """The layer written out with the dense reference."""
    is_hash = isinstance(kind, Hash)
    share, normalized = (is_hash if option is None else option for option in (share, normalized))

    def project(name):
        head = jnp.einsum("bte,enh->btnh", x, params[name]["kernel"], precision="highest")
        head = head + params[name]["bias"]
        return rotary(head) if rotary and name != "value" else head

    query, value = project("query"), project("value")
    key_heads = value.shape[2]
    group = HEADS // key_heads
    if share:
        key = jnp.stack([query[:, :, k * group : (k + 1) * group].mean(axis=2) for k in range(key_heads)], axis=2)
    else:
        key = project("key")
    unit_key = key / jnp.sqrt(jnp.sum(key**2, axis=-1, keepdims=True) + 1e-6)
    scored_key = unit_key if normalized else key
    if is_hash:
        query_hash = jnp.stack(
            [lsh_hash(query[:, :, n : n + 1], draw["rotations"][n // group][None])[..., 0] for n in range(HEADS)],
            axis=2,
        )
        output = reference.hash_sparse_attention(
            query,
            scored_key,
            value,
            query_hash,
            lsh_hash(key, draw["rotations"]),
            exclude_self=kind.exclude_self,
        )
    elif isinstance(kind, Drop) and draw:
        output = reference.qk_sparse_attention(query, scored_key, value, draw["query_keep"], draw["key_keep"])
    else:
        output = reference.causal_attention(query, scored_key, value)
    out = jnp.einsum("btnh,nhe->bte", output, params["out"]["kernel"], precision="highest")
    return out + params["out"]["bias"]


class ModuleSpecification:
    """`make(sparsity, **options)` gives a Case, with random biases."""

    make: Callable[..., Case]

    @each_kind
    @pytest.mark.parametrize(
        ("key_heads", "share", "normalized"),
        [(4, None, None), (2, None, None), (2, True, False), (4, False, True)],
        ids=["defaults", "grouped", "shared grouped keys", "normalised keys"],
    )
    def test_equals_the_dense_definition_in_training_and_evaluation(self, kind, key_heads, share, normalized):
        options = {"share_query_key": share, "normalize_key": normalized}
        case = self.make(KINDS[kind], num_key_value_heads=key_heads, **options)
        assert ("key" in case.params) == (not (share if share is not None else kind == "hash"))
        drawn = case.draw(SEED)
        trained, evaluated = jax.jit(lambda x: (case.apply(case.params, x, **drawn), case.apply(case.params, x)))(
            tokens()
        )
        for got, draw in ((trained, drawn), (evaluated, case.kept)):
            expected = by_hand(case.params, tokens(), KINDS[kind], draw, share=share, normalized=normalized)
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)

    @each_kind
    @each_group
    def test_later_tokens_change_neither_earlier_outputs_nor_receive_their_gradients(self, kind, key_heads):
        case = self.make(KINDS[kind], num_key_value_heads=key_heads)
        draw = case.draw(SEED)
        seen = LENGTH // 2

        @jax.jit
        def outputs_and_gradient(x, cotangent):
            outputs, pull = jax.vjp(lambda x: case.apply(case.params, x, **draw), x)
            return outputs, pull(cotangent)[0]

        cotangent = tokens(1).at[:, seen:].set(0)
        outputs, gradient = outputs_and_gradient(tokens(), cotangent)
        changed, _ = outputs_and_gradient(tokens().at[:, seen:].set(tokens(2)[:, seen:]), cotangent)
        np.testing.assert_allclose(outputs[:, :seen], changed[:, :seen], rtol=1e-5, atol=1e-6)
        assert not np.array_equal(outputs[:, seen:], changed[:, seen:])
        assert np.all(gradient[:, seen:] == 0)
        assert np.all(np.any(gradient[:, : seen // 2] != 0, axis=(1, 2)))

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
        evaluated = case.apply(case.params, tokens())
        # Another hash would change whole rows; what compiles apart may still round apart.
        np.testing.assert_allclose(evaluated, case.apply(case.params, tokens()), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(evaluated, other.load(case.save(), tokens()), rtol=1e-5, atol=1e-6)
        assert not np.allclose(evaluated, case.load(other.save(), tokens()), rtol=1e-2)

    def test_evaluation_keeps_everything_unless_told_otherwise(self):
        dense, drop, always = (
            self.make(sparsity) for sparsity in (None, Drop(0.4), Drop(0.4, drop_at_evaluation=True))
        )
        evaluated = dense.apply(dense.params, tokens())
        np.testing.assert_array_equal(evaluated, drop.apply(dense.params, tokens()))
        assert not np.allclose(evaluated, always.apply(dense.params, tokens(), rngs=SEED))

    def test_keep_masks_are_independent(self):
        case = self.make(Drop(0.25), num_key_value_heads=2, draw_length=4096)
        draw = case.draw(SEED)
        chex.assert_shape(draw["query_keep"], (BATCH, 4096, HEADS))
        chex.assert_shape(draw["key_keep"], (BATCH, 4096, 2))
        columns = [np.moveaxis(np.asarray(keep), 1, -1).reshape(-1, 4096) for keep in draw.values()]
        streams = np.concatenate(columns).astype(float)  # one row per mask, batch element and head
        np.testing.assert_allclose(streams.mean(axis=1), 0.75, atol=0.03)
        np.testing.assert_allclose(np.corrcoef(streams), np.eye(len(streams)), atol=0.08)
        assert abs(np.corrcoef(streams[0][1:], streams[0][:-1])[0, 1]) < 0.08

    def test_a_token_excludes_itself_in_hash_mode_unless_told_otherwise(self):
        for sparsity, exclude_self in ((Hash(4), True), (Hash(4, exclude_self=False), False)):
            case = self.make(sparsity, use_bias=False)
            x = tokens()
            outputs = case.apply(case.params, x)
            query = jnp.einsum("bte,enh->btnh", x, case.params["query"]["kernel"], precision="highest")
            buckets = np.asarray(lsh_hash(query, case.kept["rotations"]))
            earlier = np.tril(np.ones((LENGTH, LENGTH), bool), -1)[None, :, :, None]
            first_of_its_bucket = ~np.any((buckets[:, :, None] == buckets[:, None]) & earlier, axis=2)
            alone = first_of_its_bucket.all(axis=-1)  # in every head
            assert alone[:, 0].all()
            np.testing.assert_array_equal(np.all(outputs == 0, axis=-1), alone & exclude_self)

    @each_kind
    @each_group
    def test_gradients_are_finite_where_keys_have_no_length(self, kind, key_heads):
        case = self.make(
            KINDS[kind],
            num_key_value_heads=key_heads,
            share_query_key=True,
            normalize_key=True,
            use_bias=False,
        )
        draw = case.draw(SEED)
        loss = lambda params, x: jnp.sum(jnp.sin(case.apply(params, x, **draw)))
        x = tokens().at[:, ::3].set(0)
        chex.assert_tree_all_finite(jax.jit(jax.grad(loss, argnums=(0, 1)))(case.params, x))
        assert np.all(np.isfinite(jax.grad(lambda x: normalize(x).sum())(jnp.zeros((3, 4)))))

    @each_kind
    def test_computes_in_bfloat16_with_float32_parameters(self, kind):
        case = self.make(KINDS[kind], dtype=jnp.bfloat16)
        chex.assert_trees_all_equal_shapes_and_dtypes(case.params, self.make(KINDS[kind]).params)
        draw = case.draw(SEED)
        outputs = jax.jit(lambda x: case.apply(case.params, x, **draw))(tokens())
        assert outputs.dtype == jnp.bfloat16
        assert np.all(np.isfinite(outputs.astype(jnp.float32)))
        if kind != "hash":  # there rounding may move a query to another bucket
            expected = by_hand(case.params, tokens(), KINDS[kind], draw)
            np.testing.assert_allclose(outputs.astype(jnp.float32), expected, rtol=0.05, atol=0.1)

    def test_rematerialisation_in_jax_changes_nothing(self):
        case = self.make(KINDS["hash"])
        draw = case.draw(SEED)
        attend = lambda params, x, draw: case.apply(params, x, **draw)
        gradients = [
            jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(f(params, tokens(), draw)))))(case.params)  # noqa: B023
            for f in (attend, jax.checkpoint(attend))
        ]
        chex.assert_trees_all_close(*gradients, rtol=1e-6, atol=1e-6)

    @each_kind
    def test_rotary_positions_come_before_everything_else(self, kind):
        def rotary(x, positions):
            return x * jnp.cos(positions)[..., None, None] + x[..., ::-1] * jnp.sin(positions)[..., None, None]

        case = self.make(KINDS[kind], rotary=rotary)
        draw = case.draw(SEED)
        shifted = 3 + jnp.arange(LENGTH)[None]
        for positions, call in ((jnp.arange(LENGTH)[None], {}), (shifted, {"positions": shifted})):
            outputs = case.apply(case.params, tokens(), **draw, **call)
            expected = by_hand(
                case.params,
                tokens(),
                KINDS[kind],
                draw,
                rotary=lambda x: rotary(x, positions),  # noqa: B023
            )
            np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_heads": 3}, "num_heads"),
            ({"num_key_value_heads": 3}, "num_key_value_heads"),
            ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ],
    )
    def test_heads_that_do_not_divide_raise(self, options, message):
        with pytest.raises(ValueError, match=message):
            self.make(None, **options)

    def test_other_kinds_of_sparsity_raise(self):
        with pytest.raises(TypeError, match="sparsity must be"):
            self.make("hash")

    @pytest.mark.parametrize(
        ("kind", "call", "message"),
        [
            ("dense", {"rotations": jnp.ones((4, 4, 2))}, "rotations go with"),
            ("drop", {"rotations": jnp.ones((4, 4, 2))}, "rotations go with"),
            ("hash", {"rotations": jnp.ones((2, 4, 2))}, "rotations must be"),
            ("hash", {"query_keep": jnp.ones((2, 24, 4), bool)}, "query_keep and key_keep go with"),
            ("drop", {"query_keep": jnp.ones((2, 24, 4), bool)}, "must be given together"),
        ],
    )
    def test_draws_of_another_kind_raise(self, kind, call, message):
        case = self.make(KINDS[kind])
        with pytest.raises(ValueError, match=message):
            case.apply(case.params, tokens(), **call)

    def test_inputs_of_another_shape_raise(self):
        case = self.make(None)
        for x in (tokens()[0], tokens()[..., :8]):
            with pytest.raises(ValueError, match=r"x must be \[B, T, 16\]"):
                case.apply(case.params, x)


def test_impossible_kinds_raise():
    for num_buckets in (7, 0, -2):
        with pytest.raises(ValueError, match=f"num_buckets must be an even .* got {num_buckets}"):
            Hash(num_buckets)
    for rate in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"rate must be .* got {rate}"):
            Drop(rate)


class FactorySpecification:
    """`attention(attention_fn, **options)` gives Flax's multi-head attention as a function of `x, **call`.

    flax_attention: Flax's default attention_fn.
    flax_causal: The keywords of a call that make that one causal.
    """

    attention: Callable[..., Callable[..., jax.Array]]
    flax_attention: Callable[..., jax.Array]
    flax_causal: dict[str, Any]

    def test_causal_attention_fn_equals_flax(self):
        results = []
        for attention_fn, call in ((self.flax_attention, self.flax_causal), (causal_attention_fn(), {})):
            attend = self.attention(attention_fn)
            results.append(jax.jit(jax.vjp, static_argnums=0)(lambda x: attend(x, **call), tokens())[0])  # noqa: B023
            results.append(jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(attend(x, **call)))))(tokens()))  # noqa: B023
        np.testing.assert_allclose(results[0], results[2], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(results[1], results[3], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("exclude_self", [True, False])
    def test_hash_attention_fn_equals_the_reference(self, exclude_self):
        rotations = random_rotations(SEED, HEADS, HEAD_DIM, 4)

        def dense(query, key, value):
            hashes = (lsh_hash(x, rotations) for x in (query, key))
            return reference.hash_sparse_attention(query, key, value, *hashes, exclude_self=exclude_self)

        options = {} if exclude_self else {"exclude_self": False}
        outputs = [self.attention(f)(tokens()) for f in (_named(dense), hash_attention_fn(rotations, **options))]
        np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-5)

    def test_qk_attention_fn_equals_the_reference(self):
        query_keep, key_keep = jax.random.bernoulli(SEED, 0.6, (2, BATCH, LENGTH, HEADS))
        dense = lambda query, key, value: reference.qk_sparse_attention(query, key, value, query_keep, key_keep)
        outputs = [self.attention(f)(tokens()) for f in (_named(dense), qk_attention_fn(query_keep, key_keep))]
        np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-5)

    def test_every_keyword_of_flax_is_named(self):
        parameters = inspect.signature(causal_attention_fn()).parameters
        assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())
        # Flax's modules pass on neither of these two.
        flax = set(inspect.signature(self.flax_attention).parameters) - {
            "einsum_dot_general",
            "promote_dtype",
        }
        assert flax <= set(parameters)

    def test_what_cannot_be_honoured_raises(self):
        mask = jnp.tril(jnp.ones((1, 1, LENGTH, LENGTH), bool))
        attend = self.attention(causal_attention_fn())
        with pytest.raises(NotImplementedError, match="mask must be None: causality is built in"):
            attend(tokens(), mask=mask)
        with pytest.raises(NotImplementedError, match="module must be None"):
            attend(tokens(), sow_weights=True)
        with pytest.raises(NotImplementedError, match="dropout_rate must be 0"):
            self.attention(causal_attention_fn(), dropout_rate=0.1, deterministic=False)(tokens())
        with pytest.raises(NotImplementedError, match="precision must be"):
            self.attention(causal_attention_fn(), precision=jax.lax.DotAlgorithmPreset.F32_F32_F32)(tokens())

    def test_what_changes_nothing_is_accepted(self):
        plain = self.attention(causal_attention_fn())(tokens())
        options = {"dropout_rate": 0.1, "deterministic": True, "precision": "highest"}
        outputs = self.attention(causal_attention_fn(), **options)(tokens())
        np.testing.assert_allclose(plain, outputs, rtol=1e-4, atol=1e-5)

    def test_leading_axes_and_dtype_are_honoured(self):
        half = self.attention(causal_attention_fn(), dtype=jnp.bfloat16)(tokens())
        assert half.dtype == jnp.bfloat16
        attend = self.attention(causal_attention_fn())
        expected = attend(tokens())
        np.testing.assert_allclose(attend(tokens()[:, None])[:, 0], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(attend(tokens()[0]), expected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    ["bias", "mask", "module", "qk_attn_weights_einsum", "attn_weights_value_einsum", "input_positions"],
)
def test_factories_name_what_they_refuse(name):
    x = jnp.ones((1, 8, 2, 4))
    for attention_fn in (
        causal_attention_fn(),
        hash_attention_fn(jnp.ones((2, 4, 1))),
        qk_attention_fn(*jnp.ones((2, 1, 8, 2), bool)),
    ):
        with pytest.raises(NotImplementedError, match=f"^{name} must be None"):
            attention_fn(x, x, x, **{name: jnp.ones(())})


def _named(attend):
    """Takes the keywords that nnx always passes, which change nothing here."""

    def attention_fn(
        query, key, value, mask=None, dropout_rng=None, dropout_rate=0.0, broadcast_dropout=True, **others
    ):
        assert mask is None
        return attend(query, key, value)

    return attention_fn
