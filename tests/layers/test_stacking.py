"""Layers stacked by Flax's own scan and vmap, in training and evaluation: outputs and gradients of a plain loop."""

import functools

import jax
import numpy as np
import pytest
from conftest import IMPLEMENTATIONS
from flax import linen as nn
from flax import nnx
from module_cases import BATCH, HEADS, LENGTH, SEED, assert_close, outputs_and_gradients
from module_cases import WIDE_FEATURES as FEATURES
from module_cases import wide_tokens as tokens

import scfa_jax.linen
import scfa_jax.nnx
from scfa_jax.nnx import Hash, KeptDraw

LAYERS = 2
OPTIONS = {"sparsity": Hash(4), "implementation": IMPLEMENTATIONS[0]}
SPLIT = {"variable_axes": {"params": 0, "sparsity": 0}, "split_rngs": {"params": True, "sparsity": True}}


@nnx.jit
@nnx.split_rngs(splits=LAYERS)
@nnx.vmap
def make(rngs):
    return scfa_jax.nnx.CausalSelfAttention(FEATURES, HEADS, **OPTIONS, rngs=rngs)


@functools.cache
def stacked():
    """Parameters and kept rotations of all layers, as NNX stacks them, and the layers made of them."""
    graph, params, kept, streams = nnx.split(make(nnx.Rngs(0)), nnx.Param, KeptDraw, ...)
    streams = nnx.to_pure_dict(streams)
    merge = lambda params, kept: nnx.merge(graph, *map(nnx.State, (params, kept, streams)))
    return merge, nnx.to_pure_dict(params), nnx.to_pure_dict(kept)


def scanned_by_nnx(params, x):
    merge, _, kept = stacked()

    @nnx.scan(in_axes=(0, 0, nnx.Carry), out_axes=(nnx.Carry, 0))
    def through(layer, rngs, x):
        draw = layer.draw(BATCH, LENGTH, rngs=rngs)
        return x + layer(x, **draw), draw

    rngs = nnx.Rngs(sparsity=SEED)
    nnx.split_rngs(rngs, splits=LAYERS)
    return through(merge(params, kept), rngs, x)


def scanned_by_nnx_with_streams_of_their_own(params, x):
    merge, _, kept = stacked()

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=(nnx.Carry, 0))
    def through(layer, x):
        draw = nnx.clone(layer).draw(BATCH, LENGTH)
        return x + layer(x), draw

    return through(merge(params, kept), x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = scfa_jax.linen.CausalSelfAttention(FEATURES, HEADS, deterministic=False, **OPTIONS, name="layer")
        draw = layer.draw(BATCH, LENGTH)
        return x + layer(x, **draw), draw


def scanned_by_linen(params, x):
    _, _, kept = stacked()
    blocks = nn.scan(Block, **SPLIT, length=LAYERS)()
    return blocks.apply({"params": {"layer": params}, "sparsity": {"layer": kept}}, x, rngs={"sparsity": SEED})


def mapped_by_nnx(params, x):
    merge, _, kept = stacked()
    evaluate = nnx.vmap(lambda layer, x: layer(x, deterministic=True), in_axes=(0, None))
    return evaluate(merge(params, kept), x)


def mapped_by_linen(params, x):
    _, _, kept = stacked()
    layers = nn.vmap(scfa_jax.linen.CausalSelfAttention, **SPLIT, in_axes=None, axis_size=LAYERS)
    return layers(FEATURES, HEADS, deterministic=True, **OPTIONS).apply({"params": params, "sparsity": kept}, x)


@jax.jit
def one_layer(params, x, cotangent, draw):
    """Outputs and gradients of one layer."""
    layer = scfa_jax.linen.CausalSelfAttention(FEATURES, HEADS, **OPTIONS)
    return outputs_and_gradients(
        lambda params, x, **draw: layer.apply({"params": params}, x, **draw), params, x, cotangent, draw
    )


def each(*stacked):
    return [jax.tree.map(lambda leaf: np.asarray(leaf)[i], stacked) for i in range(LAYERS)]  # noqa: B023


def stack(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


@pytest.mark.parametrize("scanned", [scanned_by_nnx, scanned_by_nnx_with_streams_of_their_own, scanned_by_linen])
def test_scanned_layers_train_as_in_a_loop(scanned):
    """Each with a draw of its own, beside a residual path."""

    @jax.jit
    def results(params, x, cotangent):
        outputs, pull, draws = jax.vjp(scanned, params, x, has_aux=True)
        return outputs, pull(cotangent), draws

    (_, params, _), inputs, cotangent = stacked(), [np.asarray(tokens())], np.asarray(tokens(1))
    outputs, gradients, draws = results(params, inputs[0], cotangent)
    assert not np.array_equal(*draws["rotations"])
    layers = each(params, draws)
    for layer, draw in layers:
        inputs.append(inputs[-1] + one_layer(layer, inputs[-1], cotangent, draw)[0])
    assert_close(outputs, inputs.pop())
    of_params = []
    for (layer, draw), x in zip(reversed(layers), reversed(inputs), strict=True):
        _, (of_layer, of_x) = one_layer(layer, x, cotangent, draw)
        of_params.append(of_layer)
        cotangent = cotangent + of_x
    assert_close(gradients, (stack(reversed(of_params)), cotangent))


@pytest.mark.parametrize("mapped", [mapped_by_nnx, mapped_by_linen])
def test_mapped_layers_evaluate_as_in_a_loop(mapped):
    """Each with the rotations that it keeps, on the same tokens."""
    (_, params, kept), cotangents = stacked(), np.stack([tokens(1), tokens(2)])
    assert not np.array_equal(*kept["rotations"])
    results = jax.jit(functools.partial(outputs_and_gradients, mapped))
    outputs, gradients = results(params, tokens(), cotangents, {})
    loop = [
        one_layer(layer, tokens(), cotangent, draw)
        for (layer, draw), cotangent in zip(each(params, kept), cotangents, strict=True)
    ]
    expected, (of_params, of_x) = stack(loop)
    assert_close(outputs, expected)
    assert_close(gradients, (of_params, of_x.sum(axis=0)))
