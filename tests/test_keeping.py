"""Keys kept by their score: against the dense definition and `jax.lax.top_k` of every prefix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scfa_jax import reference
from scfa_jax.keeping import keep_top

LENGTH = 37  # no power of two
kept, dense = jax.jit(keep_top), jax.jit(reference.keep_top)


@pytest.fixture
def scores() -> jax.Array:
    """With ties in the second head, and all equal in the third."""
    drawn = jax.random.normal(jax.random.key(0), (2, LENGTH, 3))
    return drawn.at[..., 1].set(jnp.round(drawn[..., 1])).at[..., 2].set(0.5)


@pytest.mark.parametrize("fraction", [0.01, 0.3, 1.0])
def test_a_kept_key_is_in_the_top_k_of_its_prefix(scores, fraction):
    got = np.asarray(kept(scores, fraction))
    np.testing.assert_array_equal(got, dense(scores, fraction))
    for b, t, k in np.ndindex(2, LENGTH, 3):
        count = int(np.ceil(np.float32(fraction) * np.float32(t + 1)))
        best = np.argsort(-np.asarray(scores)[b, : t + 1, k], kind="stable")[:count]
        assert got[b, t, k] == (t in best)
    assert got[:, 0].all()
    assert got.all() == (fraction == 1)


def test_segments_are_sequences_of_their_own_in_whatever_order_they_stand(scores):
    ids = jax.random.randint(jax.random.key(1), (2, LENGTH), -1, 3)
    got = np.asarray(kept(scores, 0.4, segment_ids=ids))
    np.testing.assert_array_equal(got, dense(scores, 0.4, segment_ids=ids))
    chosen = np.flatnonzero(ids[1] == 2)
    np.testing.assert_array_equal(got[1, chosen], dense(scores[1:, chosen], 0.4)[0])


def test_later_scores_change_nothing(scores):
    changed = scores.at[:, 20:].set(9)
    np.testing.assert_array_equal(kept(scores, 0.3)[:, :20], kept(changed, 0.3)[:, :20])


def test_about_the_fraction_is_kept_where_scores_do_not_drift():
    scores = jax.random.normal(jax.random.key(0), (2, 5000, 3))
    # Deviation over 5,000 keys: 0.006; the early ones round up.
    np.testing.assert_allclose(kept(scores, 0.25).mean(axis=1), 0.25, atol=0.03)


def test_no_gradient_flows_and_a_new_fraction_compiles_nothing(scores):
    traces = []

    @jax.jit
    @jax.grad
    def gradient(scores, fraction):
        traces.append(fraction)
        return jnp.sum(keep_top(scores, fraction) * scores)

    for fraction in (0.2, 0.5):
        np.testing.assert_array_equal(gradient(scores, fraction), dense(scores, fraction).astype(jnp.float32))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"scores": jnp.ones((4, 2))}, ValueError, r"scores must be \[B, T, K\], got shape \(4, 2\)"),
        ({"scores": jnp.ones((1, 4, 2), int)}, TypeError, "scores must be floating point numbers, got int32"),
        ({"fraction": 0.0}, ValueError, "fraction must be above 0 and at most 1, got 0.0"),
        ({"segment_ids": jnp.ones((1, 4))}, TypeError, "segment_ids must be int32, got float32"),
        ({"segment_ids": jnp.ones((1, 5), jnp.int32)}, ValueError, r"segment_ids must be \[1 or 1, 4\], got \(1, 5\)"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        keep_top(**{"scores": jnp.ones((1, 4, 2)), "fraction": 0.5, **call})
