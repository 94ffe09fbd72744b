"""The language model: shapes, dtypes, causality, kinds of attention, tied embeddings, rematerialisation."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import HAS_GPU
from flax import nnx
from jax.extend.core import jaxprs_in_params

from models import PRESETS, ModelConfig, Transformer, preset
from models.controls import Cudnn
from scfa_jax.layers import BigBird, Dense, Drop, Hash, KMeans

VOCAB, LENGTH = 40, 24
PARTS = (5, 1, 1, 9)  # in which tokens are decoded, and then one by one
HERE = ("dense", "hash(4)", "drop(0.5)", "reformer(4, rounds=2)", "identity", "hash(4, by=permutation)", "moba(4, 2)")
# It has parameters of its own.
NSA = "nsa(4, top_k=4, window=3, compression_size=4, compression_stride=2)"


def make(seed: int = 0, **options) -> Transformer:
    defaults = {"attention": "dense, hash(4),drop(0.3)", "layers": 3, "width": 32, "heads": 2, "dtype": "float32"}
    config = ModelConfig(**{**defaults, **options})
    return Transformer(config, vocab_size=VOCAB, max_length=LENGTH, rngs=nnx.Rngs(seed, sparsity=seed))


def with_parameters(kind: str, more: str) -> str:
    """The text of a kind with more parameters."""
    return kind[:-1] + f", {more})" if kind.endswith(")") else f"{kind}({more})"


def logits_of(model: Transformer, tokens: jax.Array, key: jax.Array | None = None, **options) -> jax.Array:
    graph, state = nnx.split(model)
    return _apply(graph, state, tokens, key, options)


@functools.partial(jax.jit, static_argnums=0)
def _apply(graph, state, tokens, key, options):
    return nnx.merge(graph, state)(tokens, key=key, **options)


@pytest.fixture
def tokens() -> jax.Array:
    return jax.random.randint(jax.random.key(3), (2, LENGTH), 0, VOCAB)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_the_order_of_earlier_tokens_counts(positions, tokens):
    model = make(attention="dense", layers=1, positions=positions)
    tokens = tokens.at[:, :2].set(jnp.array([3, 4]))
    before, after = logits_of(model, tokens), logits_of(model, tokens.at[:, :2].set(jnp.array([4, 3])))
    # Without positions one layer could not tell at the end, and does not up to the rounding of its sums.
    assert np.abs(before[:, -1] - after[:, -1]).max() > 1e-4


@pytest.mark.parametrize("key", [None, 5], ids=["evaluation", "training"])
@pytest.mark.parametrize("kind", [*HERE, NSA])
def test_no_position_sees_a_later_one(kind, key, tokens):
    """The Reformer is so wherever its chunks miss nothing, as here: see its own tests."""
    key = None if key is None else jax.random.key(key)
    model = make(attention=kind, layers=2)
    changed = tokens.at[:, 15:].set((tokens[:, 15:] + 1) % VOCAB)
    before, after = logits_of(model, tokens, key), logits_of(model, changed, key)
    assert before.shape == (2, LENGTH, VOCAB)
    assert before.dtype == jnp.float32
    assert np.isfinite(before).all()
    np.testing.assert_allclose(before[:, :15], after[:, :15], atol=1e-5)
    assert not np.allclose(before[:, 15:], after[:, 15:], atol=1e-3)


@pytest.mark.parametrize("kind", [*HERE, NSA])
def test_no_gradient_reaches_a_later_position(kind):
    block = make(attention=kind, layers=1).blocks[0]
    draw = block.attention.draw(1, LENGTH, deterministic=True)
    graph, state = nnx.split(block)
    x = jax.random.normal(jax.random.key(1), (1, LENGTH, 32))
    gradient = jax.jit(jax.grad(lambda x: nnx.merge(graph, state)(x, draw)[:, :15].sum()))(x)
    np.testing.assert_array_equal(gradient[:, 15:], 0)
    assert (gradient[:, :15] != 0).all()


@pytest.mark.parametrize("kind", [*HERE, NSA])
def test_segments_do_not_see_each_other(kind, tokens):
    model, key = make(attention=kind, layers=2), jax.random.key(0)
    segment_ids = jnp.broadcast_to(jnp.repeat(jnp.array([4, 7]), 12), tokens.shape)
    changed = tokens.at[:, :12].set((tokens[:, :12] + 1) % VOCAB)
    logits = lambda tokens, **options: logits_of(model, tokens, key, **options)
    packed, other = (logits(x, segment_ids=segment_ids) for x in (tokens, changed))
    np.testing.assert_allclose(packed[:, 12:], other[:, 12:], atol=1e-5)
    assert not np.allclose(packed[:, :12], other[:, :12], atol=1e-3)
    # The first document does not notice that another follows; without segments the second sees the first.
    np.testing.assert_allclose(packed[:, :12], logits(tokens)[:, :12], atol=1e-5)
    sees = not np.allclose(logits(tokens)[:, 12:], logits(changed)[:, 12:], atol=1e-3)
    assert sees == (kind != "identity")


def test_layers_take_the_kinds_of_attention_in_turn():
    kinds = ModelConfig(attention="dense, hash(4)", layers=5).layer_kinds()
    assert [type(layer.kind) for layer in kinds] == [Dense, Hash, Dense, Hash, Dense]


def test_layers_are_made_of_their_kind():
    kinds = "hash(6, exclude_self=False, before_rotary=True), drop(0.25), hash(buckets=6, by=kmeans(decay=0.5))"
    model = make(attention=kinds)
    assert [block.attention.layout.kind for block in model.blocks] == [
        Hash(6, exclude_self=False, before_rotary=True),
        Drop(0.25),
        Hash(6, exclude_self=True, by=KMeans(0.5)),
    ]


def test_each_layer_has_random_blocks_of_its_own():
    model = make(attention="bigbird(3, num_global=2, random=1, block_size=3, seed=5)", layers=2)
    assert [block.attention.layout.kind for block in model.blocks] == [
        BigBird(3, 2, 1, 3, seed=5),
        BigBird(3, 2, 1, 3, seed=6),
    ]


def test_kinds_have_the_same_projections_and_treat_keys_alike():
    """Like for like: sharing and normalising belong to the buckets, and to others if asked."""
    layout = lambda kind: make(attention=kind, layers=1).blocks[0].attention.layout
    shares = {kind: (layout(kind).share_query_key, layout(kind).normalize_key) for kind in HERE}
    assert shares == {kind: (kind.startswith(("hash", "reformer")),) * 2 for kind in HERE}
    for kind in HERE:
        shared = layout(with_parameters(kind, "share_query_key=True, normalize_key=False"))
        assert (shared.share_query_key, shared.normalize_key) == (True, False)
    of_kind = lambda kind: make(attention=with_parameters(kind, "share_query_key=True"), layers=1)
    parameters = [jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(of_kind(kind), nnx.Param))) for kind in HERE]
    assert all(other == parameters[0] for other in parameters)


@pytest.mark.parametrize("kind", ["dense", "hash(4)", "drop(0.5)"])
def test_a_normalised_key_may_be_of_any_length_in_every_head(kind, tokens):
    for normalize_key in (True, False):
        own_keys = with_parameters(kind, f"share_query_key=False, normalize_key={normalize_key}")
        model = make(attention=own_keys, layers=1)
        before = logits_of(model, tokens)
        for parameter in (model.blocks[0].attention.key.kernel, model.blocks[0].attention.key.bias):
            parameter[...] = parameter[...] * jnp.array([3.0, 0.5])[:, None]  # one factor a head
        assert np.allclose(before, logits_of(model, tokens), atol=1e-4) == normalize_key


def test_the_embedding_is_the_output_layer(tokens):
    model = make(attention="dense", layers=1)
    parameters = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert sorted(parameters) == ["blocks", "embedding", "norm"]  # no output layer of its own
    features = jnp.ones((2, 32))
    np.testing.assert_allclose(
        model.logits(features), features @ parameters["embedding"]["embedding"].T, rtol=1e-4, atol=1e-5
    )


def test_bfloat16_computes_on_float32_parameters(tokens):
    model = make(attention="hash(4)", layers=1, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float32")}
    features = jax.eval_shape(model.features, tokens)
    assert features.dtype == jnp.bfloat16
    logits = logits_of(model, tokens)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, logits_of(make(attention="hash(4)", layers=1), tokens), atol=0.05)


def test_gradients_in_bfloat16_are_those_in_float32_for_frequent_tokens_too():
    tokens = jnp.asarray(np.random.default_rng(0).zipf(1.3, (4, 1025)) % VOCAB, jnp.int32)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(graph, params, rest):
        def loss(params):
            logits = nnx.merge(graph, params, rest)(tokens[:, :-1])
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=2).mean()

        return nnx.to_pure_dict(jax.grad(loss)(params))

    config = ModelConfig(attention="identity", layers=1, width=32, heads=2, dtype="float32")
    exact, rounded = (
        gradients(*nnx.split(Transformer(each, vocab_size=VOCAB, max_length=1024, rngs=nnx.Rngs(0)), nnx.Param, ...))
        for each in (config, dataclasses.replace(config, dtype="bfloat16"))
    )
    errors = jax.tree.map(lambda x, y: float(jnp.linalg.norm(x - y) / (jnp.linalg.norm(x) or 1)), exact, rounded)
    for path, error in jax.tree_util.tree_leaves_with_path(errors):
        assert error < 0.03, jax.tree_util.keystr(path)


def test_rematerialisation_changes_nothing_but_memory(tokens):
    def loss_and_gradients(remat: str):
        graph, params, rest = nnx.split(make(attention="hash(4)", layers=1, remat=remat), nnx.Param, ...)

        def loss(params):
            return (nnx.merge(graph, params, rest)(tokens, key=jax.random.key(1)) ** 2).mean()

        return jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(params))

    kept = loss_and_gradients("none")
    for remat in ("full", "save_attention"):
        for one, other in zip(kept, loss_and_gradients(remat), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("remat", "runs"), [("none", 1), ("full", 2), ("save_attention", 1)])
@pytest.mark.parametrize("kind", ["dense", "hash(4)", "drop(0.5)", "reformer(4, rounds=2)"])
def test_save_attention_runs_the_forward_kernel_once_a_layer(kind, remat, runs):
    forward = "sort" if kind.startswith("reformer") else "scfa_forward"  # the former has no kernel
    model = make(attention=kind, layers=2, remat=remat)
    for block in model.blocks:
        block.attention.implementation = "triton_interpret"
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    tokens = jnp.zeros((1, LENGTH), jnp.int32)
    loss = lambda params: nnx.merge(graph, params, rest)(tokens, key=jax.random.key(1)).sum()
    assert operations(jax.make_jaxpr(jax.grad(loss))(params).jaxpr).count(forward) == 2 * runs


def operations(jaxpr) -> list[str]:
    """The names of all primitives and kernels that a computation is made of."""
    names = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            info = equation.params.get("name_and_src_info", equation.params.get("name"))  # before and after JAX 0.10.2
            names.append(getattr(info, "name", info))
        else:
            inner = jaxprs_in_params(equation.params)
            names += [equation.primitive.name, *(name for jaxpr in inner for name in operations(jaxpr))]
    return names


@pytest.mark.parametrize("attention", ["hash(4)", "drop(0.5)", "reformer(4)"])
def test_a_training_key_decides_the_draw_and_evaluation_needs_none(attention, tokens):
    model = make(attention=attention, layers=1)
    one, again, other = (logits_of(model, tokens, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other)
    draws = model.draw(2, LENGTH, jax.random.key(1))
    np.testing.assert_array_equal(one, logits_of(model, tokens, draws=draws))
    assert model.draw(2, LENGTH, None) == [{}]
    kept = {name: getattr(model.blocks[0].attention, name)[...] for name in model.blocks[0].attention.layout.kind.kept}
    assert set(kept) == (set() if attention == "drop(0.5)" else {"rotations"})
    np.testing.assert_array_equal(logits_of(model, tokens), logits_of(model, tokens, draws=[kept]))


def test_a_reformer_draws_rotations_for_every_round(tokens):
    one, other = (make(attention=f"reformer(4, {rounds})", layers=1) for rounds in (1, 3))
    (draw,) = other.draw(2, LENGTH, jax.random.key(0))
    assert draw["rotations"].shape == other.blocks[0].attention.rotations.shape == (3, 2, 16, 2)
    assert len(np.unique(draw["rotations"])) == 3 * 2 * 16 * 2
    assert not np.allclose(logits_of(one, tokens), logits_of(other, tokens), atol=1e-3)
    small_chunks = make(attention="reformer(4, chunk_size=2)", layers=1)
    assert not np.allclose(logits_of(one, tokens), logits_of(small_chunks, tokens), atol=1e-3)


def test_layers_of_a_model_hold_no_random_keys():
    """The model draws for all of them."""
    assert not jax.tree.leaves(nnx.state(make(), nnx.RngState))


def test_evaluation_drops_the_same_every_time_if_asked_to(tokens):
    model, whole = (make(attention=f"drop(0.5, drop_at_evaluation={x})") for x in (True, False))
    kept = model.draw(2, 500, None)
    assert [set(draw) for draw in kept] == [{"query_keep", "key_keep"}] * 3
    assert whole.draw(2, 500, None) == [{}] * 3
    shares = [float(keep.mean()) for draw in kept for keep in draw.values()]
    np.testing.assert_allclose(shares, 0.5, atol=0.08)
    jax.tree.map(np.testing.assert_array_equal, kept, model.draw(2, 500, None))
    assert (kept[0]["key_keep"] != kept[1]["key_keep"]).any()
    assert (kept[0]["key_keep"] != model.draw(2, 500, None, start=500)[0]["key_keep"]).any()

    logits = logits_of(model, tokens)
    np.testing.assert_array_equal(logits, logits_of(model, tokens, draws=model.draw(2, LENGTH, None)))
    assert np.abs(logits - logits_of(whole, tokens)).max() > 1e-3


def test_decoding_drops_what_evaluation_may(tokens):
    """Every token draws anew, so that one pass over the whole with what they drew gives the same."""
    model = make(attention="drop(0.5, drop_at_evaluation=True)", layers=2)
    drawn = [model.draw(2, 1, None, start=place) for place in range(LENGTH)]
    draws = jax.tree.map(lambda *keeps: jnp.concatenate(keeps, axis=1), *drawn)
    whole = logits_of(model, tokens, draws=draws)
    model.init_cache(2, LENGTH)
    step = nnx.jit(lambda model, token: model(token, decode=True))
    for place in range(LENGTH):
        np.testing.assert_allclose(step(model, tokens[:, place : place + 1])[:, 0], whole[:, place], atol=1e-5)


@pytest.mark.skipif(HAS_GPU, reason="for a GPU XLA merges small products, and they cannot be counted")
def test_without_attention_values_pass_and_the_other_projections_still_run():
    attention = make(attention="identity", layers=1).blocks[0].attention
    x = jax.random.normal(jax.random.key(0), (1, LENGTH, 32))
    np.testing.assert_allclose(attention(x), attention.out(attention.value(x)), atol=1e-6)
    graph, state = nnx.split(attention)
    gradient = jax.grad(lambda state, x: (nnx.merge(graph, state)(x) ** 2).sum(), (0, 1))
    products = jax.jit(gradient).lower(state, x).compile().as_text().count(" dot(")
    assert products == 4 * 3  # four projections, each one product forward and two backward


def test_cudnn_says_what_it_cannot_do(monkeypatch):
    layout = make(attention="dense", layers=1).blocks[0].attention.layout

    def attend(dtype, **options):
        return Cudnn().attend(layout.heads(*[jnp.zeros((1, 8, 2, 16), dtype)] * 3), {}, **options)

    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    with pytest.raises(NotImplementedError, match="cudnn needs an NVIDIA GPU, and JAX runs on cpu"):
        attend(jnp.bfloat16)
    assert "needs an NVIDIA GPU" in ModelConfig(attention="hash(2),cudnn").problem()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(TypeError, match="computes in bfloat16 or float16, got float32"):
        attend(jnp.float32)
    with pytest.raises(NotImplementedError, match="takes no segment_ids"):
        attend(jnp.bfloat16, segment_ids=jnp.zeros((1, 8), jnp.int32))
    for option in ("logits_soft_cap", "sink_logits"):
        with pytest.raises(NotImplementedError, match=f"takes no {option}"):
            attend(jnp.bfloat16, **{option: 1.0})
    assert ModelConfig(attention="cudnn", dtype="float32").problem() == (
        "--attention cudnn needs --dtype bfloat16, got float32."
    )
    assert ModelConfig(attention="cudnn", dtype="bfloat16").problem() is None


@pytest.mark.gpu
def test_cudnn_computes_what_our_dense_attention_does(tokens):
    ours, cudnn = (make(attention=kind, layers=2, dtype="bfloat16") for kind in ("dense", "cudnn"))
    np.testing.assert_allclose(logits_of(ours, tokens), logits_of(cudnn, tokens), atol=0.05)


def test_rows_that_pad_the_vocabulary_score_no_token(tokens):
    model = make(attention="dense", layers=1, vocab_multiple=16)
    assert model.embedding.num_embeddings == 48
    assert logits_of(model, tokens).shape == (2, LENGTH, VOCAB)


def test_layers_draw_independently():
    first, second = make(attention="hash(4)", layers=2).draw(1, LENGTH, jax.random.key(0))
    assert not np.allclose(first["rotations"], second["rotations"])


def test_learned_positions_end_somewhere():
    model = make(attention="dense", layers=1, positions="learned")
    with pytest.raises(ValueError, match=rf"at most {LENGTH} long.*got {LENGTH + 1}"):
        model(jnp.zeros((1, LENGTH + 1), jnp.int32))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"heads": 3}, "--heads must divide --width, got 3"),
        ({"attention": "hash(4),sparse"}, "--attention: the kinds are .*'sparse'"),
        ({"layers": 2}, "--attention names 3 layers, and there are 2"),
        ({"layers": 0}, "--layers must be at least 1"),
        ({"width": 6, "heads": 2}, "even width a head"),
        ({"dtype": "auto"}, "dtype must be decided"),
        ({"vocab_multiple": 0}, "--vocab-multiple must be at least 1"),
        ({"remat": True}, "--remat takes none, full, save_attention, got True"),
    ],
)
def test_impossible_models_say_what_is_wrong(options, named):
    with pytest.raises(ValueError, match=named):
        make(**options)


@pytest.mark.parametrize(("name", "vocabulary", "millions"), [("gpt2-small", 50_257, 123.7), ("bytes", 256, 19.0)])
def test_presets_are_models_that_can_be_made(name, vocabulary, millions):
    config = dataclasses.replace(preset(name), attention="dense", dtype="float32")
    make = lambda: Transformer(config, vocab_size=vocabulary, max_length=8, rngs=nnx.Rngs(0, sparsity=0))
    shapes = nnx.state(nnx.eval_shape(make), nnx.Param)
    parameters = sum(x.size for x in jax.tree.leaves(shapes))
    assert parameters / 1e6 == pytest.approx(millions, abs=0.1)


def test_presets_have_their_names_and_the_default_is_for_a_cpu():
    assert {name: config.preset for name, config in PRESETS.items()} == {name: name for name in PRESETS}
    assert all(config.problem() is None for config in PRESETS.values())
    assert preset("cpu") == ModelConfig()
    assert -(-50_257 // preset("gpt2-small").vocab_multiple) * preset("gpt2-small").vocab_multiple == 50_304
    with pytest.raises(ValueError, match=r"--preset takes cpu, bytes, mnist, gpt2-small, got 'gpt3'"):
        preset("gpt3")


@functools.partial(jax.jit, static_argnums=0)
def decode_tokens(graph, cache, rest, tokens):
    model = nnx.merge(graph, cache, rest)
    return model(tokens, decode=True), nnx.state(model, nnx.Cache)


@pytest.mark.parametrize(("positions", "attention"), [("rotary", "hash(4),identity"), ("learned", "drop(0.5)")])
def test_a_transformer_decodes_what_it_evaluates(positions, attention, tokens):
    model = make(attention=attention, layers=2, positions=positions, remat="full")
    with pytest.raises(ValueError, match="call init_cache"):
        model(tokens[:, :1], decode=True)
    whole = logits_of(model, tokens)
    model.init_cache(2, LENGTH)
    graph, *states = nnx.split(model, nnx.Cache, ...)
    (cache, rest), place = states, 0
    for part in (*PARTS, *[1] * (LENGTH - sum(PARTS))):
        got, cache = decode_tokens(graph, cache, rest, tokens[:, place : place + part])
        np.testing.assert_allclose(got, whole[:, place : place + part], atol=1e-5)
        place += part
    assert np.isnan(decode_tokens(graph, cache, rest, tokens[:, :1])[0]).all()
    if positions == "learned":
        with pytest.raises(ValueError, match=rf"at most {LENGTH} long.*got {LENGTH + 1}"):
            model.init_cache(2, LENGTH + 1)


def test_cudnn_layers_decode_as_dense_ones_and_reformer_layers_not_at_all(tokens):
    @jax.jit
    def first_token(tokens):
        models = [make(attention="dense", layers=1) for _ in range(2)]
        attention = models[1].blocks[0].attention
        attention.layout = dataclasses.replace(attention.layout, kind=Cudnn())
        for model in models:
            model.init_cache(2, LENGTH)
        return [model(tokens[:, :1], decode=True) for model in models]

    np.testing.assert_array_equal(*first_token(tokens))
    with pytest.raises(NotImplementedError, match=r"--attention reformer\(4\) cannot decode"):
        make(attention="reformer(4)", layers=1).init_cache(1, 8)
