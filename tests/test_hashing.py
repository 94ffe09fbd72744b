"""Angular locality-sensitive hashing."""

import checked
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import scfa_jax


def test_rotations_have_unit_columns_and_differ_by_head():
    rotations = checked.random_rotations(jax.random.key(0), 3, 16, 8)
    assert rotations.shape == (3, 16, 4)
    np.testing.assert_allclose(jnp.linalg.norm(rotations, axis=1), 1, rtol=1e-6)
    assert not np.allclose(rotations[0], rotations[1])


def test_hash_is_the_nearest_of_the_directions_and_their_opposites():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 9, 3, 16)).astype(np.float32)
    rotations = np.asarray(checked.random_rotations(jax.random.key(1), 3, 16, 6))
    got = checked.lsh_hash(jnp.asarray(x), jnp.asarray(rotations))
    for b, t, n in np.ndindex(2, 9, 3):
        angles = [x[b, t, n] @ (sign * rotations[n, :, r]) for sign in (1, -1) for r in range(3)]
        assert int(got[b, t, n]) == int(np.argmax(angles))


def test_length_does_not_matter_and_opposites_part():
    x = jax.random.normal(jax.random.key(0), (1, 50, 2, 16))
    rotations = checked.random_rotations(jax.random.key(1), 2, 16, 8)
    ids = checked.lsh_hash(x, rotations)
    np.testing.assert_array_equal(checked.lsh_hash(7 * x, rotations), ids)
    np.testing.assert_array_equal(checked.lsh_hash(-x, rotations), (ids + 4) % 8)
    assert set(np.unique(ids)) <= set(range(8))


def test_near_vectors_collide_more_often_than_far_ones():
    rotations = checked.random_rotations(jax.random.key(0), 1, 64, 16)
    x = jax.random.normal(jax.random.key(1), (1, 2000, 1, 64))
    noise = jax.random.normal(jax.random.key(2), x.shape)
    collisions = [
        float(jnp.mean(checked.lsh_hash(x, rotations) == checked.lsh_hash(x + size * noise, rotations)))
        for size in (0.1, 1.0, 10.0)
    ]
    assert collisions[0] > collisions[1] > collisions[2]
    assert collisions[0] > 0.8


def test_low_precision_and_the_default_matmul_precision_change_no_bucket():
    x = jax.random.normal(jax.random.key(0), (1, 300, 2, 64)).astype(jnp.bfloat16)
    rotations = checked.random_rotations(jax.random.key(1), 2, 64, 16)
    want = checked.lsh_hash(x.astype(jnp.float32), rotations)
    with jax.default_matmul_precision("bfloat16"):
        np.testing.assert_array_equal(checked.lsh_hash(x, rotations), want)


def test_no_gradient_flows_through_a_hash():
    rotations = checked.random_rotations(jax.random.key(0), 1, 8, 4)
    loss = lambda x: jnp.sum(scfa_jax.lsh_hash(x, rotations) * x[..., 0])
    x = jax.random.normal(jax.random.key(1), (1, 5, 1, 8))
    np.testing.assert_array_equal(jax.grad(loss)(x)[..., 1:], 0)


def test_a_learned_hash_has_the_buckets_of_its_directions_and_a_gate_of_one():
    x = jax.random.normal(jax.random.key(0), (2, 9, 3, 16))
    rotations = 3 * checked.random_rotations(jax.random.key(1), 3, 16, 6) * jnp.arange(1.0, 4.0)
    directions = rotations / jnp.linalg.norm(rotations, axis=1, keepdims=True)
    ids, gate = jax.jit(scfa_jax.learned_hash)(x, rotations)
    np.testing.assert_array_equal(ids, checked.lsh_hash(x, directions))
    np.testing.assert_array_equal(gate, 1)


def test_the_gates_gradient_is_that_of_the_log_probability_less_its_mean_in_the_bucket():
    x = jax.random.normal(jax.random.key(0), (2, 9, 1, 8))
    rotations = scfa_jax.random_rotations(jax.random.key(1), 1, 8, 4)
    weights = jax.random.normal(jax.random.key(2), (2, 9, 1))
    ids = np.asarray(checked.lsh_hash(x, rotations))

    def gain(rotations):
        unit = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
        logits = 8**0.5 * jnp.einsum("btnh,nhr->btnr", unit, rotations / jnp.linalg.norm(rotations, axis=1))
        both = jnp.concatenate([logits, -logits], axis=-1)
        chosen = both.max(axis=-1) - jax.nn.logsumexp(both, axis=-1)
        means = [[chosen[b, ids[b, :, 0] == ids[b, t, 0]].mean() for t in range(9)] for b in range(2)]
        return jnp.sum(weights * (chosen - jnp.array(means)[..., None]))

    gated = lambda x, rotations, weights: jnp.sum(weights * scfa_jax.learned_hash(x, rotations)[1])
    gradients = jax.jit(jax.grad(gated, (0, 1)))
    of_x, of_rotations = gradients(x, rotations, weights)
    np.testing.assert_array_equal(of_x, 0)
    np.testing.assert_allclose(of_rotations, jax.jit(jax.grad(gain))(rotations), rtol=1e-4, atol=1e-5)
    assert np.abs(of_rotations).max() > 0.1
    # What helps all keys of a bucket alike makes it no larger.
    np.testing.assert_allclose(gradients(x, rotations, 0 * weights + 1)[1], 0, atol=1e-5)


def test_permuted_buckets_are_balanced_in_every_prefix_and_the_same_in_every_part():
    ids = np.asarray(scfa_jax.permutation_hash(jax.random.key(0), 23, 3, 4))
    assert ids.shape == (1, 23, 3)
    for block in range(5):
        np.testing.assert_array_equal(
            np.sort(ids[0, 4 * block : 4 * block + 4], axis=0), np.arange(4)[:, None] + [0] * 3
        )
    orders = {tuple(ids[0, 4 * block : 4 * block + 4, head]) for block in range(5) for head in range(3)}
    assert len(orders) > 6  # of 15 permutations of 4
    part = jax.jit(lambda start: scfa_jax.permutation_hash(jax.random.key(0), 7, 3, 4, start=start))
    for start in (0, 3, 8, 16):
        np.testing.assert_array_equal(part(start), ids[:, start : start + 7])
    assert not np.array_equal(ids, scfa_jax.permutation_hash(jax.random.key(1), 23, 3, 4))


def test_a_permutation_of_too_few_buckets_raises():
    with pytest.raises(ValueError, match=r"num_buckets must be .*got 0"):
        scfa_jax.permutation_hash(jax.random.key(0), length=4, num_heads=2, num_buckets=0)
