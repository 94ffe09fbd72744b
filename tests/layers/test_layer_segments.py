"""Segment ids in layers: documents that are packed into one sequence know nothing of each other."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import scfa_jax
import scfa_jax.linen
import scfa_jax.nnx
from scfa_jax import reference
from scfa_jax.layers.attention_fn import causal_attention_fn, hash_attention_fn, qk_attention_fn
from scfa_jax.nnx import Drop, Hash, Window

TOKENS = jax.random.normal(jax.random.key(0), (1, 24, 32))
PACKED = jnp.asarray(np.repeat([4, 1, -1], (9, 11, 4)), jnp.int32)[None]

CAP_AND_SINKS = {"logits_soft_cap": 0.5, "use_sink_logits": True}
KINDS = {
    "dense": (None, {}),
    "hash": (Hash(4), {}),
    "drop": (Drop(0.3, drop_at_evaluation=True), {}),
    "window": (Window(3, num_sinks=2), {}),
    "capped hash beside a window, with sinks": (Hash(4, local_window=3), CAP_AND_SINKS),
}


@pytest.mark.parametrize(("module", "name"), [("nnx", "hash"), *(("linen", name) for name in KINDS)])
def test_modules_keep_documents_apart(module, name):
    kind, more = KINDS[name]
    options = {"sparsity": kind, "deterministic": True, **more}
    if module == "nnx":
        layer = scfa_jax.nnx.CausalSelfAttention(32, 2, **options, rngs=nnx.Rngs(0))
        draw, apply, bias = layer.draw(1, 24, rngs=jax.random.key(1)), layer, layer.out.bias[...]
    else:
        layer = scfa_jax.linen.CausalSelfAttention(32, 2, **options)
        rngs = {"params": jax.random.key(0), "sparsity": jax.random.key(1)}
        variables = jax.jit(layer.init)(rngs, TOKENS)
        draw = layer.apply(variables, 1, 24, rngs={"sparsity": rngs["sparsity"]}, method="draw")
        apply, bias = partial(layer.apply, variables), variables["params"]["out"]["bias"]
    apply = jax.jit(apply)
    packed = apply(TOKENS, segment_ids=PACKED, **draw)
    for start, stop in ((0, 9), (9, 20)):
        here = {name: x[:, start:stop] if name != "rotations" else x for name, x in draw.items()}
        np.testing.assert_allclose(packed[:, start:stop], apply(TOKENS[:, start:stop], **here), atol=1e-5)
    np.testing.assert_array_equal(packed[:, 20:], jnp.broadcast_to(bias, (1, 4, 32)))


def test_attention_functions_for_flax_keep_documents_apart():
    query, key, value = jax.random.normal(jax.random.key(2), (3, 1, 24, 2, 16))
    rotations = scfa_jax.random_rotations(jax.random.key(3), 2, 16, 4)
    hashes = [scfa_jax.lsh_hash(x, rotations) for x in (query, key)]
    keep = jax.random.bernoulli(jax.random.key(4), 0.6, (1, 24, 2))
    arguments = (query, key, value)
    segments = {"query_segment_ids": PACKED}
    for factory, want in (
        (causal_attention_fn, reference.causal_attention(*arguments, **segments)),
        (
            partial(hash_attention_fn, rotations, exclude_self=True),
            reference.hash_sparse_attention(*arguments, *hashes, exclude_self=True, **segments),
        ),
        (
            partial(qk_attention_fn, keep, keep),
            reference.qk_sparse_attention(*arguments, keep, keep, **segments),
        ),
    ):
        made, at_call, nested = factory(segment_ids=PACKED), factory(), [x[None] for x in arguments]
        results = lambda: (made(*arguments), at_call(*arguments, mask=PACKED), made(*nested)[0])  # noqa: B023
        for got in jax.jit(results)():
            np.testing.assert_allclose(got, want, atol=1e-5)
