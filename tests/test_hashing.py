"""Angular locality-sensitive hashing."""

import jax
import jax.numpy as jnp
import numpy as np

import scfa_jax


def test_rotations_have_unit_columns_and_differ_by_head():
    rotations = scfa_jax.random_rotations(jax.random.key(0), 3, 16, 8)
    assert rotations.shape == (3, 16, 4)
    np.testing.assert_allclose(jnp.linalg.norm(rotations, axis=1), 1, rtol=1e-6)
    assert not np.allclose(rotations[0], rotations[1])


def test_hash_is_the_nearest_of_the_directions_and_their_opposites():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 9, 3, 16)).astype(np.float32)
    rotations = np.asarray(scfa_jax.random_rotations(jax.random.key(1), 3, 16, 6))
    got = scfa_jax.lsh_hash(jnp.asarray(x), jnp.asarray(rotations))
    for b, t, n in np.ndindex(2, 9, 3):
        angles = [x[b, t, n] @ (sign * rotations[n, :, r]) for sign in (1, -1) for r in range(3)]
        assert int(got[b, t, n]) == int(np.argmax(angles))


def test_length_does_not_matter_and_opposites_part():
    x = jax.random.normal(jax.random.key(0), (1, 50, 2, 16))
    rotations = scfa_jax.random_rotations(jax.random.key(1), 2, 16, 8)
    ids = scfa_jax.lsh_hash(x, rotations)
    np.testing.assert_array_equal(scfa_jax.lsh_hash(7 * x, rotations), ids)
    np.testing.assert_array_equal(scfa_jax.lsh_hash(-x, rotations), (ids + 4) % 8)
    assert set(np.unique(ids)) <= set(range(8))


def test_near_vectors_collide_more_often_than_far_ones():
    rotations = scfa_jax.random_rotations(jax.random.key(0), 1, 64, 16)
    x = jax.random.normal(jax.random.key(1), (1, 2000, 1, 64))
    noise = jax.random.normal(jax.random.key(2), x.shape)
    collisions = [
        float(jnp.mean(scfa_jax.lsh_hash(x, rotations) == scfa_jax.lsh_hash(x + size * noise, rotations)))
        for size in (0.1, 1.0, 10.0)
    ]
    assert collisions[0] > collisions[1] > collisions[2]
    assert collisions[0] > 0.8


def test_low_precision_and_the_default_matmul_precision_change_no_bucket():
    x = jax.random.normal(jax.random.key(0), (1, 300, 2, 64)).astype(jnp.bfloat16)
    rotations = scfa_jax.random_rotations(jax.random.key(1), 2, 64, 16)
    want = scfa_jax.lsh_hash(x.astype(jnp.float32), rotations)
    with jax.default_matmul_precision("bfloat16"):
        np.testing.assert_array_equal(scfa_jax.lsh_hash(x, rotations), want)


def test_no_gradient_flows_through_a_hash():
    rotations = scfa_jax.random_rotations(jax.random.key(0), 1, 8, 4)
    loss = lambda x: jnp.sum(scfa_jax.lsh_hash(x, rotations) * x[..., 0])
    x = jax.random.normal(jax.random.key(1), (1, 5, 1, 8))
    np.testing.assert_array_equal(jax.grad(loss)(x)[..., 1:], 0)


def test_a_learned_hash_has_the_buckets_of_its_directions_and_a_gate_of_one():
    x = jax.random.normal(jax.random.key(0), (2, 9, 3, 16))
    rotations = 3 * scfa_jax.random_rotations(jax.random.key(1), 3, 16, 6) * jnp.arange(1.0, 4.0)
    directions = rotations / jnp.linalg.norm(rotations, axis=1, keepdims=True)
    ids, gate = jax.jit(scfa_jax.learned_hash)(x, rotations)
    np.testing.assert_array_equal(ids, scfa_jax.lsh_hash(x, directions))
    np.testing.assert_array_equal(gate, 1)


def test_the_gates_gradient_is_that_of_the_log_probability_less_its_mean_in_the_bucket():
    x = jax.random.normal(jax.random.key(0), (2, 9, 1, 8))
    rotations = scfa_jax.random_rotations(jax.random.key(1), 1, 8, 4)
    weights = jax.random.normal(jax.random.key(2), (2, 9, 1))
    ids = np.asarray(scfa_jax.lsh_hash(x, rotations))

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
