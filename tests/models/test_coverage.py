"""Coverage, against attention weights: with one-hot values the output of attention is its weights."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import scfa_jax
from benchmarks import coverage as benchmark
from benchmarks import results
from models.coverage import coverage
from models.reformer import reformer_attention

LENGTH, BUCKETS = 32, 4
counted = jax.jit(coverage, static_argnames="chunk_size")


def drawn_buckets(seed: int = 0, most: int = BUCKETS) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (2, LENGTH, 3), 0, most)


def weights(attend, buckets) -> np.ndarray:
    """Attention weights `[B, N, T, T]` of random queries, which are keys too."""
    query = jax.random.normal(jax.random.key(1), (*buckets.shape, LENGTH))
    one_hot = jnp.broadcast_to(jnp.eye(LENGTH)[:, None], query.shape)
    return np.asarray(jax.jit(attend)(query, one_hot).swapaxes(1, 2))


def share_attended(attend, buckets) -> np.ndarray:
    """The share of pairs in a bucket that have a weight: `[B, N]`."""
    by_head = np.asarray(buckets).swapaxes(1, 2)
    pairs = (by_head[..., :, None] == by_head[..., None, :]) & np.tri(LENGTH, k=-1, dtype=bool)
    attended = weights(attend, buckets) > 0
    assert not (attended & ~pairs & ~np.eye(LENGTH, dtype=bool)).any()
    return (attended & pairs).sum((2, 3)) / pairs.sum((2, 3))


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 8, 40])
def test_coverage_of_the_reformer_is_the_share_of_pairs_with_a_weight(chunk_size):
    buckets = drawn_buckets()
    attend = lambda query, value: reformer_attention(
        query, value, buckets[None], num_buckets=BUCKETS, chunk_size=chunk_size
    )
    share = share_attended(attend, buckets)
    assert (share < 1).all() == (chunk_size < 8)
    np.testing.assert_allclose(counted(buckets, chunk_size=chunk_size), share, rtol=1e-6)


def test_hash_attention_covers_all():
    buckets = drawn_buckets()
    attend = lambda query, value: scfa_jax.hash_sparse_attention(query, query, value, buckets, exclude_self=True)
    np.testing.assert_array_equal(share_attended(attend, buckets), 1)
    np.testing.assert_array_equal(counted(buckets), 1)


def test_coverage_of_hash_attention_is_counted_from_its_index(monkeypatch):
    """And would fall if the index allowed less."""
    monkeypatch.setattr("models.coverage.hash_index", lambda ids, **options: scfa_jax.hash_index(2 * ids, 2 * ids))
    buckets = drawn_buckets()
    pairs = lambda index: np.asarray(index.stats()["pairs"])
    with_itself, without = (pairs(scfa_jax.hash_index(buckets, exclude_self=x)) for x in (False, True))
    np.testing.assert_allclose(coverage(buckets), with_itself / without, rtol=1e-6)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_tokens_that_are_alone_in_their_buckets_are_covered(chunk_size):
    buckets = jnp.broadcast_to(jnp.arange(LENGTH)[:, None], (1, LENGTH, 2))
    np.testing.assert_array_equal(counted(buckets, chunk_size=chunk_size), 1)


def test_at_a_fixed_chunk_coverage_falls_with_the_length():
    lengths = (256, 1024, 4096)
    found = [
        float(counted(benchmark.draw_buckets("uniform", 0, length, 2, 16), chunk_size=32).mean()) for length in lengths
    ]
    assert found[0] > 0.99 > 0.95 > found[1] > found[2]
    seen = 1.5 * 32 / (4096 / 16)  # chunks in sight of a token, on average, as a share of its bucket
    assert found[2] == pytest.approx(2 * seen - seen**2, rel=0.05)


def test_memory_is_linear_in_the_length():
    buckets = jnp.zeros((1, 4096, 1), jnp.int32)
    for chunk_size in (None, 64):
        compiled = jax.jit(functools.partial(coverage, chunk_size=chunk_size)).lower(buckets).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 200 * 4096


def test_the_benchmark_writes_what_it_counted(tmp_path, capsys):
    argv = [f"--out={tmp_path}", "--lengths", "64", "256", "--chunk-sizes", "8", "--heads=2", "--seeds=1"]
    assert benchmark.main(argv) == 0
    record = results.read(tmp_path / "coverage.json")
    assert record["environment"]["command"] == " ".join(["python -m benchmarks.coverage", *argv])
    assert len(record["rows"]) == 2 * 2 * 3
    for row in record["rows"]:
        assert 0 < row["least"] <= row["coverage"] <= row["greatest"] <= 1
        assert row["coverage"] == 1 or row["method"] != "hash"
    assert (tmp_path / "coverage.png").stat().st_size > 10_000
    assert "uniform" in capsys.readouterr().out


def test_clustered_vectors_fall_into_unequal_buckets():
    share = lambda hashes: np.bincount(np.asarray(benchmark.draw_buckets(hashes, 0, 4096, 1, 16)).ravel()).max() / 4096
    assert share("clustered") > 1.5 * share("uniform")
    again = benchmark.draw_buckets("clustered", 0, 4096, 1, 16)
    np.testing.assert_array_equal(again, benchmark.draw_buckets("clustered", 0, 4096, 1, 16))


def test_an_impossible_chunk_size_is_named():
    with pytest.raises(ValueError, match="chunk_size must be at least 1 or None, got 0"):
        coverage(drawn_buckets(), chunk_size=0)
