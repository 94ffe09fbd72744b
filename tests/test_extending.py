"""What a stranger adds: a pattern by one function, a kind of layer by one class and one line, a backend likewise.

CONTRIBUTING.md shows the same.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Shape, make_case
from flax import nnx
from tolerance import assert_as_exact_as_plain

import scfa_jax
from models import ModelConfig, Transformer
from models.kinds import KINDS, parse, text_of
from scfa_jax import backends
from scfa_jax.backends import Backend
from scfa_jax.backends.tile import NO_KEY
from scfa_jax.backends.xla import Xla
from scfa_jax.layers import Marks, Pattern
from scfa_jax.layers.pattern import Rows

LENGTH = 48


def dilated_index(query_length: int, key_length: int, window: int, stride: int, **positions) -> scfa_jax.SparseIndex:
    """A pattern: every `stride`-th position, of the last `window`."""
    offset = jnp.asarray(positions.get("query_offset", 0), jnp.int32).reshape(-1, 1, 1)
    place = lambda length: jnp.arange(length, dtype=jnp.int32)[None, :, None]
    hashes = (offset + place(query_length)) % stride, place(key_length) % stride
    return scfa_jax.hash_index(*hashes, num_buckets=stride, window=window, **positions)


@dataclasses.dataclass(frozen=True)
class Dilated(Pattern):
    """A kind of layer."""

    window: int
    stride: int

    def index(self, query: Marks, key: Marks, rows: Rows) -> scfa_jax.SparseIndex:
        return dilated_index(*rows.lengths, self.window, self.stride, **rows.positions)


@dataclasses.dataclass(frozen=True)
class Densely:
    """A backend that keeps the scores of all pairs, and knows no soft cap."""

    name: ClassVar[str] = "densely"
    platform: ClassVar[str | None] = None
    is_default: ClassVar[bool] = False

    def missing(self, *, device):
        return None

    def problem(self, call):
        return None if call.logits.soft_cap is None else "it knows no soft cap"

    def forward(self, call, inputs, dtype):
        logits, value, mask = self._logits(call, inputs)
        has_key = mask.any(axis=3)
        logsumexp = jnp.where(has_key, jax.nn.logsumexp(logits, axis=3, where=mask), NO_KEY)
        weights = jnp.where(mask, jnp.exp(logits - logsumexp[..., None]), 0)
        return jnp.einsum("bnts,bsnh->btnh", weights, value, precision="highest").astype(dtype), logsumexp

    def backward(self, call, inputs, residuals, dtype):
        logits, value, mask = self._logits(call, inputs)
        by_output = residuals.output_gradient.astype(jnp.float32)
        weights = jnp.where(mask, jnp.exp(logits - residuals.logsumexp[..., None]), 0)
        by_weights = jnp.einsum("btnh,bsnh->bnts", by_output, value, precision="highest")
        by_products = call.logits.scale * weights * (by_weights - residuals.delta[..., None])
        query, key, _, _ = inputs
        group = query.shape[2] // key.shape[2]
        wide_query, wide_key = query.astype(jnp.float32), jnp.repeat(key.astype(jnp.float32), group, axis=2)
        by_query = jnp.einsum("bnts,bsnh->btnh", by_products, wide_key, precision="highest")
        of_group = lambda x: x.reshape(*x.shape[:2], -1, group, x.shape[3]).sum(axis=3)
        by_key = of_group(jnp.einsum("bnts,btnh->bsnh", by_products, wide_query, precision="highest"))
        by_value = of_group(jnp.einsum("bnts,btnh->bsnh", weights, by_output, precision="highest"))
        return by_query.astype(dtype), by_key.astype(dtype), by_value.astype(dtype)

    def decode(self, call, query, key, value, run):
        return Xla().decode(call, query, key, value, run)

    def sorter(self, num_buckets):
        return None

    def range_finder(self):
        return None

    def block_chooser(self, head_dim, k, by):
        return None

    def _logits(self, call, inputs):
        query, key, value, index = inputs
        group = query.shape[2] // key.shape[2]
        key, value = (jnp.repeat(x.astype(jnp.float32), group, axis=2) for x in (key, value))
        mask = index.mask()
        mask = jnp.repeat(mask, query.shape[2] // mask.shape[1], axis=1)
        products = jnp.einsum("btnh,bsnh->bnts", query.astype(jnp.float32), key, precision="highest")
        return call.logits.scale * products, value, jnp.broadcast_to(mask, products.shape)


def dilated_mask(window: int, stride: int) -> np.ndarray:
    distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    return (distance >= 0) & (distance < window) & (distance % stride == 0)


def test_a_pattern_is_one_function(implementation):
    index = dilated_index(LENGTH, LENGTH, window=12, stride=3)
    mask = dilated_mask(12, 3)[None, None]
    np.testing.assert_array_equal(index.mask(), mask)
    assert index.pairs() == mask.sum()
    query, key, value = jax.random.normal(jax.random.key(0), (3, 1, LENGTH, 2, 16))

    def results(query, key, value, *cotangents):
        attend = lambda *x: scfa_jax.sparse_attention(*x, index, implementation=implementation, return_residual=True)
        found, pull_back = jax.vjp(attend, query, key, value)
        return *found, *pull_back(cotangents)

    assert_as_exact_as_plain(jax.jit(results), query, key, value, jnp.asarray(mask))


def test_a_kind_of_layer_is_one_class_and_one_line(monkeypatch):
    monkeypatch.setitem(KINDS, "dilated", Dilated)
    parse.cache_clear()
    assert text_of(parse("dilated(12, stride=3), dense")) == "dilated(window=12, stride=3), dense"
    config = ModelConfig(attention="dilated(12, 3)", layers=1, width=32, heads=2, dtype="float32")
    model = Transformer(config, vocab_size=9, max_length=LENGTH, rngs=nnx.Rngs(0))
    assert Dilated(12, 3).pairs(LENGTH, num_heads=2) == dilated_mask(12, 3).sum()
    tokens = jax.random.randint(jax.random.key(1), (1, LENGTH), 0, 9)
    graph, state = nnx.split(model)
    logits = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))(state, tokens)
    seen = dilated_mask(12, 3)[-1]
    for place in (LENGTH - 2, LENGTH - 4, LENGTH - 12, LENGTH - 15):  # one layer: what the last token sees directly
        changed = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))(
            state, tokens.at[0, place].set((tokens[0, place] + 1) % 9)
        )
        assert np.allclose(changed[0, -1], logits[0, -1], atol=1e-5) != seen[place]
    model.init_cache(1, LENGTH)
    step = nnx.jit(lambda model, token: model(token, decode=True))
    decoded = jnp.concatenate([step(model, tokens[:, i : i + 1]) for i in range(LENGTH)], axis=1)
    np.testing.assert_allclose(decoded, logits, atol=1e-4)


@pytest.fixture
def with_densely(monkeypatch):
    monkeypatch.setattr(backends, "BACKENDS", (*backends.BACKENDS, Densely()))


@pytest.mark.parametrize("pattern", ["causal", "hash", "keep", "range"])
def test_a_backend_is_one_folder_and_one_line(pattern, with_densely):
    case = make_case(pattern, np.random.default_rng(0), Shape(2, 50, 77, 4, 2, 24), jnp.float32)
    arrays = case.query, case.key, case.value
    assert_as_exact_as_plain(case.compiled(implementation="densely"), *arrays, case.mask, in_kernels=False)


def test_a_backend_takes_lists_and_says_what_it_cannot_do(with_densely):
    query, key, value = jax.random.normal(jax.random.key(0), (3, 1, LENGTH, 2, 16))
    one, other = (
        scfa_jax.window_attention(query, key, value, 8, num_sinks=2, implementation=name) for name in ("densely", "xla")
    )
    np.testing.assert_allclose(one, other, atol=2e-6)
    with pytest.raises(NotImplementedError, match='implementation "densely" cannot do this: it knows no soft cap'):
        scfa_jax.causal_attention(query, key, value, logits_soft_cap=1.0, implementation="densely")
    with pytest.raises(ValueError, match=r"implementation must be one of \('triton', .*'densely'\)"):
        scfa_jax.causal_attention(query, key, value, implementation="dense")


def test_backends_keep_to_the_protocol():
    for backend in (*backends.BACKENDS, Densely()):
        assert isinstance(backend, Backend)
        assert hash(backend) == hash(dataclasses.replace(backend))
    names = [backend.name for backend in backends.BACKENDS]
    assert len(set(names)) == len(names)
