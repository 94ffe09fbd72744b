"""Kinds of sparsity by position alone: masks are what indices say, decoding is one pass, and models take them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from test_index import as_mask

import scfa_jax.linen
from models import ModelConfig, Transformer
from models.config import STATIC_KINDS
from scfa_jax import patterns
from scfa_jax.decoding import attend_cached, empty_cache
from scfa_jax.sparsity import BigBird, Fixed, Layout, Longformer, Strided, Window, attend
from train.flops import model_flops

BATCH, LENGTH, HEADS, HEAD_DIM = 2, 24, 4, 16
KINDS = {
    "window": Window((3, 1, 30, 8), num_sinks=2),
    "growing window": Window((4, -7, 1, 2), num_sinks=3, slope=(0.0, 0.5, 0.25, 0.2)),
    "longformer": Longformer(4, 7),
    "big bird": BigBird(4, num_global=3, num_random=2, block=3),
    "strided": Strided(5),
    "fixed": Fixed(5, 2),
}
LAYOUT = Layout.of(HEADS * HEAD_DIM, HEADS, 2, HEAD_DIM, None, None, None)


def indices_of(kind):
    """The parts that a kind attends to."""
    if isinstance(kind, Window):
        lengths = jnp.array(kind.lengths(LENGTH), jnp.int32)
        return patterns.window_and_sinks(LENGTH, LENGTH, lengths, kind.num_sinks)
    return kind.indices(LENGTH, LENGTH, HEADS)


@pytest.mark.parametrize("name", KINDS)
def test_the_mask_is_what_the_indices_say(name):
    kind, position = KINDS[name], jnp.arange(LENGTH)
    head = {"head": jnp.arange(HEADS).reshape(1, 2, 2, 1, 1)}
    indices, mask = jax.jit(lambda: (indices_of(kind), kind.mask(head, {}, position[:, None], position)))()
    count = sum(as_mask(index).astype(int) for index in indices)
    mask = np.broadcast_to(mask, (1, 2, 2, LENGTH, LENGTH)).reshape(1, HEADS, LENGTH, LENGTH)
    np.testing.assert_array_equal(*np.broadcast_arrays(count, mask))
    assert kind.pairs(LENGTH) == mask.sum() / HEADS


def test_windows_follow_the_length():
    kind = KINDS["growing window"]
    assert kind.lengths(8) == (4, 1, 3, 3)  # rounded down, at least 1
    assert kind.lengths(24) == (4, 5, 7, 6)
    assert Window(100).lengths(24) == (24,)


def rows(seed: int) -> tuple[jax.Array, ...]:
    shapes = ((BATCH, LENGTH, heads, HEAD_DIM) for heads in (HEADS, 2, 2))
    return tuple(jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32) for shape in shapes)


@pytest.mark.parametrize("kind", [KINDS["growing window"], BigBird(4, num_global=0, num_random=1, block=3)])
def test_prefill_and_decoding_give_what_one_pass_gives(kind):
    whole = jax.jit(functools.partial(attend, sparsity=kind, implementation="xla"))(*rows(0))
    step = jax.jit(functools.partial(attend_cached, sparsity=kind, implementation="xla"))
    cache, outputs, start = empty_cache(LAYOUT, kind, BATCH, LENGTH, jnp.float32), [], 0
    for size in (9, *(1,) * 6, 9):
        output, cache = step(cache, *(x[:, start : start + size] for x in rows(0)))
        outputs.append(output)
        start += size
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), whole, atol=2e-6)


def test_a_step_reads_only_the_window_and_the_sinks():
    kind, room = Window((5, 2, 5, 8), num_sinks=3), 1024
    cache = empty_cache(LAYOUT, kind, BATCH, room, jnp.float32)
    one = [x[:, :1] for x in rows(0)]
    jaxpr = jax.make_jaxpr(lambda cache, *one: attend_cached(cache, *one, kind)[0])(cache, *one)

    def shapes(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                yield from (v.aval.shape for v in equation.invars)
            for inner in jaxprs_in_params(equation.params):
                yield from shapes(inner)

    found = list(shapes(jaxpr.jaxpr))
    assert any(11 in shape for shape in found)
    assert not any(room in shape for shape in found)


def model_of(attention: str, layers: int) -> Transformer:
    config = ModelConfig(
        **{"attention": attention, "layers": layers, "width": 32, "heads": 2, "dtype": "float32"},
        **{"window": 3, "num_sinks": 2, "stride": 5, "num_summaries": 2, "num_random": 1, "random_block": 3},
    )
    return Transformer(config, vocab_size=40, max_length=LENGTH, rngs=nnx.Rngs(0))


def test_models_take_every_kind():
    model = model_of(",".join(STATIC_KINDS), layers=5)
    kinds = [block.attention.sparsity for block in model.blocks]
    assert kinds == [Window(3, 2), Longformer(3, 5), BigBird(3, 2, 1, 3, seed=2), Strided(5), Fixed(5, 2)]
    pairs = sum(kind.pairs(LENGTH) for kind in kinds)
    dense = dataclasses.replace(model.config, attention="identity")
    assert model_flops(model.config, {}, 1, LENGTH) - model_flops(dense, {}, 1, LENGTH) == 12 * pairs * 32


@pytest.mark.parametrize("kind", ["windows of heads, in linen", *(kind for kind in STATIC_KINDS if kind != "window")])
def test_later_tokens_change_nothing_and_receive_no_gradient(kind, one_implementation):
    x, later = jax.random.normal(jax.random.key(0), (2, 1, LENGTH, 32))
    if kind in STATIC_KINDS:
        apply = model_of(kind, layers=1).blocks[0].attention
        apply.implementation = one_implementation
    else:
        options = {"sparsity": Window((3, 7), num_sinks=2), "implementation": one_implementation}
        layer = scfa_jax.linen.CausalSelfAttention(32, 2, **options)
        apply = functools.partial(layer.apply, jax.jit(layer.init)(jax.random.key(1), x))
    first = jax.jit(jax.value_and_grad(lambda x: jnp.sum(apply(x)[:, :15] ** 2)))
    value, gradient = first(x)
    assert value == first(x.at[:, 15:].set(later[:, 15:]))[0]
    assert (gradient[:, 15:] == 0).all()
    assert (gradient[:, :15] != 0).all()


BAD = {
    "no window": (lambda: Window(0), ValueError, "window must be at least 1, got 0"),
    "a float": (lambda: Window(2.5), TypeError, r"window must be a static int, got 2\.5"),
    "a steep slope": (lambda: Window(2, slope=1.5), ValueError, r"slope must be from 0 to 1, got 1\.5"),
    "too many slopes": (
        lambda: Window((2, 3), slope=(0.1, 0.2, 0.3)),
        ValueError,
        "slope must be one number, or one for each of 2 windows, got 3",
    ),
    "too many windows": (
        lambda: attend(*rows(0), Window((2, 3))),
        ValueError,
        "window and slope must be one, or one for each of 4 heads, got 2",
    ),
    "summaries": (lambda: Fixed(4, 5), ValueError, "num_summaries must be at most stride, 4, got 5"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
