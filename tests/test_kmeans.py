"""Online k-means: against loops, and on clusters that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scfa_jax.kmeans import LEAK, kmeans_hash, member_sums, random_centroids, update_centroids, with_gradient

hashed, summed = jax.jit(kmeans_hash), jax.jit(member_sums, static_argnums=2)


@pytest.fixture
def x() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (2, 9, 3, 8))


def test_the_bucket_is_the_centroid_at_the_smallest_angle(x):
    centroids = random_centroids(jax.random.key(1), 3, 8, 5)
    longer = centroids * jnp.arange(1.0, 6.0)[:, None]
    ids = np.asarray(hashed(x, longer))
    for b, t, n in np.ndindex(ids.shape):
        cosines = [x[b, t, n] @ row / np.linalg.norm(row) for row in longer[n]]
        assert ids[b, t, n] == np.argmax(cosines)
    np.testing.assert_array_equal(
        hashed((7 * x).astype(jnp.bfloat16), centroids), hashed(x.astype(jnp.bfloat16), longer)
    )
    assert ids.dtype == np.int32


def test_sums_are_those_of_the_members_directions(x):
    x = x.at[0, 0].set(0)  # without a direction
    ids = jax.random.randint(jax.random.key(1), x.shape[:3], 0, 4)
    unit = np.asarray(x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-15))
    expected = LEAK * np.broadcast_to(unit.sum((0, 1))[:, None], (3, 4, 8)).copy()
    for b, t, n in np.ndindex(ids.shape):
        expected[n, ids[b, t, n]] += unit[b, t, n]
    np.testing.assert_allclose(summed(x, ids, 4), expected, rtol=1e-5, atol=1e-5)
    assert not np.any(jax.jit(jax.grad(lambda x: jnp.sum(member_sums(x, ids, 4)[..., 0])))(x))


def test_the_decay_is_the_share_of_the_old_average():
    np.testing.assert_allclose(update_centroids(jnp.ones((1, 2, 3)), jnp.full((1, 2, 3), 3.0), 0.9), 1.2, rtol=1e-6)


def test_centroids_find_clusters_and_none_stays_empty():
    """All tokens lie on one side of the origin: most random centroids are the nearest of none."""
    means = jnp.eye(8)[:4] + 0.5
    draw = jax.random.randint(jax.random.key(0), (1, 400, 1), 0, 4)
    x = means[draw] + 0.1 * jax.random.normal(jax.random.key(1), (1, 400, 1, 8))
    centroids = random_centroids(jax.random.key(3), 1, 8, 4)
    sizes = lambda ids: np.sort(np.bincount(ids.ravel(), minlength=4))
    assert sizes(hashed(x, centroids))[0] == 0

    @jax.jit
    def step(centroids, x):
        return update_centroids(centroids, member_sums(x, kmeans_hash(x, centroids), 4), 0.9)

    for _ in range(200):
        centroids = step(centroids, x)
    ids = np.asarray(hashed(x, centroids))
    np.testing.assert_array_equal(sizes(ids), sizes(np.asarray(draw)))
    assert all(len(set(ids[draw == cluster])) == 1 for cluster in range(4))


def test_a_gradient_carries_statistics_out_of_rematerialised_parts(x):
    def loss(array, scale):
        once = jax.checkpoint(lambda total, row: (total + with_gradient(scale * row, array, row * row).sum(), None))
        return jax.lax.scan(once, 0.0, x)[0]

    value, (statistics, scale) = jax.value_and_grad(loss, (0, 1))(jnp.zeros_like(x[0]), 3.0)
    np.testing.assert_allclose(statistics, (x * x).sum(axis=0), rtol=1e-6)
    np.testing.assert_allclose((value, scale), (3 * x.sum(), x.sum()), rtol=1e-5)


def test_wrong_arguments_are_named(x):
    with pytest.raises(ValueError, match=r"centroids must be \[N, num_buckets, H\].* got centroids \(2, 5, 8\)"):
        kmeans_hash(x, jnp.ones((2, 5, 8)))
    with pytest.raises(TypeError, match="x must hold floats, got int32"):
        kmeans_hash(x.astype(jnp.int32), jnp.ones((3, 5, 8)))
    with pytest.raises(ValueError, match="num_buckets must be at least 1, got 0"):
        random_centroids(jax.random.key(0), 3, 8, 0)
    ids = np.zeros(x.shape[:3], np.int32)
    with pytest.raises(ValueError, match=r"ids must be \[B, T, N\].* got ids \(9, 3\) and x \(2, 9, 3, 8\)"):
        member_sums(x, ids[0], 5)
    with pytest.raises(TypeError, match="x must hold floats, got int32"):
        member_sums(x.astype(jnp.int32), ids, 5)
    with pytest.raises(ValueError, match=r"sums must have the shape of centroids, \(3, 5, 8\), got \(3, 4, 8\)"):
        update_centroids(jnp.ones((3, 5, 8)), jnp.ones((3, 4, 8)), 0.9)
