"""What sparse attention is compared with: buckets that ignore content, and blocks at random or by an oracle."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import scfa_jax
from models.controls import OracleBlocks, Permutation, RandomBlocks, permutation_hash
from scfa_jax.layers import Hash, Layout


def test_permuted_buckets_are_balanced_in_every_prefix_and_the_same_in_every_part():
    ids = np.asarray(permutation_hash(jax.random.key(0), 23, 3, 4))
    assert ids.shape == (1, 23, 3)
    for block in range(5):
        np.testing.assert_array_equal(
            np.sort(ids[0, 4 * block : 4 * block + 4], axis=0), np.arange(4)[:, None] + [0] * 3
        )
    orders = {tuple(ids[0, 4 * block : 4 * block + 4, head]) for block in range(5) for head in range(3)}
    assert len(orders) > 6  # of 15 permutations of 4
    part = jax.jit(lambda start: permutation_hash(jax.random.key(0), 7, 3, 4, start=start))
    for start in (0, 3, 8, 16):
        np.testing.assert_array_equal(part(start), ids[:, start : start + 7])
    assert not np.array_equal(ids, permutation_hash(jax.random.key(1), 23, 3, 4))


def test_a_permutation_of_too_few_buckets_raises():
    with pytest.raises(ValueError, match=r"num_buckets must be .*got 0"):
        permutation_hash(jax.random.key(0), length=4, num_heads=2, num_buckets=0)


@pytest.mark.parametrize("key_heads", [4, 2])
def test_tokens_do_not_decide_their_buckets_and_heads_of_a_group_share_them(key_heads):
    kind = Hash(4, by=Permutation())
    query, key = jax.random.normal(jax.random.key(0), (2, 2, 9, 4, 8))
    key = key[:, :, :key_heads]
    state = {"seed": jnp.uint32(7)}
    hashes, others = (kind.by.hashes(*x, 4, state, 0) for x in ((query, key), (2 - query, -key)))
    np.testing.assert_array_equal(hashes.query, others.query)
    of_keys = hashes.query if hashes.key is None else np.repeat(hashes.key, 4 // key_heads, axis=2)
    np.testing.assert_array_equal(hashes.query, of_keys)
    np.testing.assert_array_equal(hashes.query[0], hashes.query[1])
    assert (hashes.query[..., 0] != hashes.query[..., -1]).any()


DOCUMENTS = jnp.repeat(jnp.array([3, 4, -1, 5], jnp.int32), jnp.array([8, 7, 2, 13]))[None]
each_documents = pytest.mark.parametrize("segment_ids", [None, DOCUMENTS], ids=["one document", "documents"])


def heads_of(kind, length: int = 30):
    layout = Layout.of(64, 4, 2, 16, kind, None, None)
    query, key, value = jax.random.normal(jax.random.key(0), (3, 2, length, 4, 16))
    return layout.heads(query, key[:, :, :2], value[:, :, :2])


def candidates(kind, segment_ids, length: int = 30) -> np.ndarray:
    """Which blocks a query may choose, one by one: bool `[T, length // block_size]`."""
    ids = np.zeros(length, int) if segment_ids is None else np.asarray(segment_ids[0])
    size = kind.block_size
    last = lambda block: ids[(block + 1) * size - 1]
    may = lambda t, block: block <= t // size - kind.num_local and ids[t] == last(block) >= 0
    return np.array([[may(t, block) for block in range(length // size)] for t in range(length)])


@each_documents
def test_random_blocks_are_uniform_among_the_candidates(segment_ids):
    kind = RandomBlocks(4, top_k=3, num_local=2)
    heads, may = heads_of(kind), candidates(kind, segment_ids)
    choose = jax.jit(jax.vmap(lambda seed: kind.blocks(heads, {"seed": seed}, segment_ids=segment_ids)))
    chosen = np.asarray(choose(jnp.arange(400, dtype=jnp.uint32)))[:, 0]  # [400, T, N, 2]
    shares = (chosen[..., None] == np.arange(may.shape[1])).sum(axis=3).mean(axis=(0, 2))
    count = may.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(shares, np.where(may, np.minimum(2 / np.maximum(count, 1), 1), 0), atol=0.07)
    if segment_ids is None:
        assert len({chosen[0, :, head].tobytes() for head in range(4)}) == 4
        shorter = kind.blocks(heads_of(kind, 18), {"seed": jnp.uint32(0)})
        np.testing.assert_array_equal(chosen[0, :18], shorter[0])


@each_documents
def test_the_oracle_chooses_the_blocks_of_the_largest_weight(segment_ids):
    kind = OracleBlocks(4, top_k=3)
    heads, may = heads_of(kind), candidates(kind, segment_ids)
    chosen = jax.jit(lambda: kind.blocks(heads, {}, segment_ids=segment_ids))()
    scores = np.einsum("btngh,bsnh->btngs", heads.query.reshape(2, 30, 2, 2, 16), heads.key) / 4
    ids = np.zeros((1, 30)) if segment_ids is None else np.asarray(segment_ids)
    met = np.tri(30, dtype=bool) & (ids[0, :, None] == ids[0])
    weights = np.where(met[:, None, None], np.exp(scores), 0)[..., :28].reshape(2, 30, 4, 7, 4).sum(axis=-1)
    weights = np.where(may[:, None], weights, 0)
    best = np.argsort(-weights, axis=-1)[..., :2]
    best = np.where(np.take_along_axis(weights, best, axis=-1) > 0, best, -1)
    np.testing.assert_array_equal(chosen, best)


@pytest.mark.parametrize("kind", [RandomBlocks(5, 3), OracleBlocks(9, 2)], ids=str)
def test_layers_of_chosen_blocks_are_causal_and_count_their_pairs(kind):
    draw = {"seed": jnp.uint32(3)} if kind.drawn else {}
    heads = heads_of(kind)

    @jax.jit
    def first(rows):
        given = heads._replace(rotated_query=rows[0], attended_key=rows[1], value=rows[2])
        return jnp.sum(kind.attend(given, draw, implementation="xla")[:, :17] ** 2)

    rows = heads.rotated_query, heads.attended_key, heads.value
    gradients = jax.jit(jax.grad(first))(rows)
    assert all(np.any(x[:, :17] != 0) and np.all(x[:, 17:] == 0) for x in gradients)
    assert first(rows) == first(tuple(x.at[:, 17:].multiply(-2) for x in rows))
    chosen = kind.blocks(heads, draw)
    assert scfa_jax.block_index(chosen, kind.block_size).pairs()[0, 0] == kind.pairs(30, 4)
    with pytest.raises(NotImplementedError, match="cannot decode"):
        kind.empty_cache(Layout.of(64, 4, 2, 16, kind, None, None), 2, 30, jnp.float32)


@pytest.mark.parametrize("kind", [RandomBlocks(9, 3), OracleBlocks(9, 3)], ids=str)
def test_where_no_block_is_complete_none_is_chosen(kind):
    chosen = kind.blocks(heads_of(kind, 8), {"seed": jnp.uint32(3)})
    assert chosen.shape[1:] == (8, 4, 2)
    np.testing.assert_array_equal(chosen, -1)


def test_random_blocks_need_a_seed():
    kind = RandomBlocks(4, 3)
    with pytest.raises(ValueError, match="seed must be given for RandomBlocks"):
        kind.attend(heads_of(kind), {})
