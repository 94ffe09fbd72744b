"""What sparse attention is compared with: buckets that ignore content."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.controls import Permutation, permutation_hash
from scfa_jax.layers import Hash


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
