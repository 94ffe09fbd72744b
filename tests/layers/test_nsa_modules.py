"""NSA as a kind of sparsity of both Flax modules."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import IMPLEMENTATIONS
from flax import nnx
from module_cases import BATCH, HEADS, LENGTH, SEED, assert_close, turned
from module_cases import WIDE_FEATURES as FEATURES
from module_cases import wide_tokens as tokens

import scfa_jax.linen
import scfa_jax.nnx
from scfa_jax import reference
from scfa_jax.layers import NSA

COMMON = {"rotary": turned, "num_key_value_heads": 2, "implementation": IMPLEMENTATIONS[0]}
KINDS = {
    "grouped": NSA(4, top_k=3, window=5, compression_size=4, compression_stride=2, num_local=1),
    "longer compression blocks than the cache": NSA(6, 2, 3, 39, 3, num_initial=0, num_local=1),
}
DOCUMENTS = jnp.repeat(jnp.array([3, 4, -1, 5], jnp.int32), jnp.array([8, 6, 2, 8]))[None]


@functools.cache
def parts(name: str):
    """The module's graph, its parameters, random where they begin at 0, and the rest."""
    module = scfa_jax.nnx.CausalSelfAttention(FEATURES, HEADS, rngs=nnx.Rngs(0), sparsity=KINDS[name], **COMMON)
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    leaves, tree = jax.tree.flatten(nnx.to_pure_dict(params))
    rng = np.random.default_rng(0)
    leaves = [x if np.any(x != 0) else jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in leaves]
    return graph, jax.tree.unflatten(tree, leaves), rest


@functools.partial(jax.jit, static_argnums=0)
def outputs_and_gradients(name, x, cotangent, segment_ids):
    graph, params, rest = parts(name)
    apply = lambda params, x: nnx.merge(graph, nnx.State(params), rest)(x, segment_ids=segment_ids)
    outputs, pull = jax.vjp(apply, params, x)
    return outputs, *pull(cotangent)


@functools.partial(jax.jit, static_argnums=0)
def outputs(name, x):
    graph, params, rest = parts(name)
    return nnx.merge(graph, nnx.State(params), rest)(x)


ONE_DOCUMENT = jnp.zeros((1, LENGTH), jnp.int32)


def by_hand(kind, params, x, segment_ids):
    """The layer written out with the dense reference, one compression block after the other."""
    turn = lambda x: turned(x, jnp.arange(LENGTH)[None])
    multiply = functools.partial(jnp.einsum, precision="highest")
    project = lambda name: multiply("bte,enh->btnh", x, params[name]["kernel"]) + params[name]["bias"]
    of_branch = lambda name: multiply("bte,eskh->sbtkh", x, params[f"{name}_kernel"])

    def compressed(rows, i):
        size, stride = kind.compression_size, kind.compression_stride
        made = []
        for start in range(0, LENGTH - size + 1, stride):
            block = rows[:, start : start + size] + params["place_in_block"][i][:, None]
            block = block.swapaxes(1, 2).reshape(BATCH, rows.shape[2], -1)
            hidden = jax.nn.gelu(multiply("bkf,fh->bkh", block, params["compression_hidden"][i]))
            made.append(multiply("bkh,hg->bkg", hidden, params["compression_out"][i]))
        return jnp.stack(made, axis=1)

    query, (near_key, near_value) = project("query"), of_branch("near")
    rows = of_branch("compressed")
    gates = jax.nn.sigmoid(multiply("bte,eng->btng", x, params["gate_kernel"]) + params["gate_bias"])
    output = reference.nsa_attention(
        turn(query),
        (compressed(rows[0], 0), compressed(rows[1], 1)),
        (turn(project("key")), project("value")),
        (turn(near_key), near_value),
        gates,
        compression_size=kind.compression_size,
        compression_stride=kind.compression_stride,
        block_size=kind.block_size,
        top_k=kind.top_k,
        window=kind.window,
        num_initial=kind.num_initial,
        num_local=kind.num_local,
        compressed_query=query,
        query_segment_ids=segment_ids,
    )
    return multiply("btnh,nhe->bte", output, params["out"]["kernel"]) + params["out"]["bias"]


defined = jax.jit(by_hand, static_argnums=0)


@pytest.mark.parametrize("segment_ids", [ONE_DOCUMENT, DOCUMENTS], ids=["one document", "documents"])
def test_equals_the_dense_definition_and_every_parameter_learns(segment_ids):
    _, params, _ = parts("grouped")
    expected = defined(KINDS["grouped"], params, tokens(), segment_ids)
    got, gradients, _ = outputs_and_gradients("grouped", tokens(), tokens(1), segment_ids)
    assert_close(got, expected)
    for path, gradient in jax.tree.leaves_with_path(gradients):
        assert np.any(np.abs(gradient) > 1e-4), path


def test_one_document_is_no_document():
    got, *_ = outputs_and_gradients("grouped", tokens(), tokens(1), ONE_DOCUMENT)
    assert_close(got, outputs("grouped", tokens()))


def test_later_tokens_change_neither_earlier_outputs_nor_receive_their_gradients():
    for seen in (1, 10, 11, 12, LENGTH - 1):
        cotangent = tokens(1).at[:, seen:].set(0)
        outputs, _, gradient = outputs_and_gradients("grouped", tokens(), cotangent, ONE_DOCUMENT)
        changed = tokens().at[:, seen:].set(tokens(2)[:, seen:])
        changed, *_ = outputs_and_gradients("grouped", changed, cotangent, ONE_DOCUMENT)
        np.testing.assert_allclose(outputs[:, :seen], changed[:, :seen], rtol=1e-5, atol=1e-6)
        assert not np.allclose(outputs[:, seen:], changed[:, seen:])
        np.testing.assert_array_equal(gradient[:, seen:], 0)
        assert np.all(np.any(gradient[:, :seen] != 0, axis=(1, 2)))


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
    module = scfa_jax.linen.CausalSelfAttention(FEATURES, HEADS, decode=True, sparsity=KINDS[name], **COMMON)
    made = jax.eval_shape(module.init, SEED, jnp.ones((BATCH, LENGTH + 2, FEATURES)))
    assert jax.tree.map(jnp.shape, made["params"]) == jax.tree.map(jnp.shape, params)

    def step(cache, x):
        outputs, changed = module.apply({"params": params, "cache": cache}, x, mutable=["cache"])
        return outputs, changed["cache"]

    return step, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), made["cache"])


DECODED = {
    "single tokens": (in_nnx, "grouped", [6, *[1] * 6, 6, 6]),
    "calls that complete several blocks": (in_linen, "grouped", [6, 6, 6, 6]),
    "no block that is complete": (in_nnx, "longer compression blocks than the cache", [8, 8, 8]),
}


@pytest.mark.parametrize("name", DECODED)
def test_a_prompt_single_tokens_and_more_at_once_equal_one_pass(name):
    """Both modules decode. Each call of 6 tokens completes up to three compression blocks."""
    flax, kind, lengths = DECODED[name]
    step, cache = flax(kind)
    step, found = jax.jit(step), []
    for start, stop in itertools.pairwise(np.cumsum([0, *lengths])):
        output, cache = step(cache, tokens()[:, start:stop])
        found.append(output)
    assert_close(jnp.concatenate(found, axis=1), outputs(kind, tokens()))
    more = min(lengths)
    for filled in range(LENGTH + more, LENGTH + 3 * more + 1, more):
        output, cache = step(cache, tokens()[:, :more])
        assert np.isnan(output).all() == np.isnan(output).any() == (filled > LENGTH + 2)


def test_what_does_not_fit_the_cache_raises():
    step, cache = in_nnx("grouped")
    with pytest.raises(ValueError, match=f"at most its {LENGTH + 2} tokens, got {BATCH} and {LENGTH + 3}"):
        jax.eval_shape(step, cache, jnp.ones((BATCH, LENGTH + 3, FEATURES)))


@pytest.mark.parametrize("shape", [(0, LENGTH), (0, 3), (2, 0), (2, 1)], ids=str)
def test_few_or_no_tokens(shape):
    graph, params, rest = parts("grouped")
    loss = lambda params, x: nnx.merge(graph, nnx.State(params), rest)(x).sum()
    jax.eval_shape(jax.value_and_grad(loss), params, jnp.ones((*shape, FEATURES)))


@pytest.mark.parametrize("options", [{"logits_soft_cap": 0.3}, {"use_sink_logits": True}], ids=str)
def test_caps_and_sinks_are_refused(options):
    message = "knows no logits_soft_cap" if "logits_soft_cap" in options else "knows no sink_logits"
    module = scfa_jax.nnx.CausalSelfAttention(
        FEATURES, HEADS, rngs=nnx.Rngs(0), sparsity=KINDS["grouped"], **COMMON | options
    )
    module.init_cache((BATCH, LENGTH, FEATURES))
    for decode in (False, True):
        with pytest.raises(NotImplementedError, match=message):
            module(tokens(), decode=decode)
    other = scfa_jax.linen.CausalSelfAttention(FEATURES, HEADS, sparsity=KINDS["grouped"], **COMMON | options)
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(other.init, SEED, tokens())


@pytest.mark.parametrize("kind", [*KINDS.values(), NSA(4, 9, 30, 8, 4), NSA(5, 3, 1, 5, 5, num_local=2)], ids=str)
def test_pairs_are_those_of_three_masks(kind):
    """Of positions whose importance is never 0."""
    place = np.arange(LENGTH)
    count = 0
    for t in place:
        starts = np.arange(0, LENGTH, kind.compression_stride)
        count += np.sum(starts + kind.compression_size <= t + 1)
        count += np.sum(place[place <= t] > t - kind.window)
        blocks = np.arange(t // kind.block_size + 1)
        local = blocks[blocks > t // kind.block_size - kind.num_local]
        others = len(blocks) - len(local)
        chosen = min(others, kind.top_k - kind.num_local)
        count += chosen * kind.block_size + np.sum(np.isin(place[: t + 1] // kind.block_size, local))
    assert kind.pairs(LENGTH, HEADS) == count


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        *(
            ({name: 0}, ValueError, f"{name} must be at least 1, got 0")
            for name in ("block_size", "window", "compression_size", "compression_stride", "num_local")
        ),
        ({"num_initial": -1}, ValueError, "num_initial must be at least 0, got -1"),
        ({"top_k": 2}, ValueError, "top_k must be at least 3, got 2"),
        ({"block_size": 24}, ValueError, "block_size must be a multiple of compression_stride = 16, got 24"),
        ({"compression_size": 24}, ValueError, "compression_size must be a multiple of compression_stride = 16"),
        ({"window": 2.0}, TypeError, r"window must be a static int, got 2\.0"),
        ({"top_k": 4.0}, TypeError, r"top_k must be a static int, got 4\.0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_impossible_numbers_raise(options, error, message):
    with pytest.raises(error, match=message):
        NSA(**options)


def test_unit_keys_are_refused():
    with pytest.raises(ValueError, match="normalize_key must be False with NSA"):
        scfa_jax.nnx.CausalSelfAttention(
            FEATURES, HEADS, sparsity=KINDS["grouped"], rngs=nnx.Rngs(0), **COMMON | {"normalize_key": True}
        )
