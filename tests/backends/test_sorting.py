"""The counting sort orders rows by bucket and then by position, as a comparison sort of the packed codes does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st

import scfa_jax
from scfa_jax.backends.triton import order


@functools.partial(jax.jit, static_argnums=1)
def sorted_codes(ids, num_buckets):
    return order.sorted_codes(ids, num_buckets, interpret=True)


@settings(max_examples=examples(12))
@given(
    length=st.sampled_from([1, 127, 700, 1024, 2100]),
    num_buckets=st.sampled_from([1, 2, 5, 16, 40, 256]),
    skew=st.sampled_from([0.0, 0.9]),
    seed=st.integers(0, 2**16),
)
def test_codes_are_sorted(length, num_buckets, skew, seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, num_buckets, (2, 3, length), dtype=np.int32)
    ids = np.where(rng.random(ids.shape) < skew, num_buckets // 2, ids).astype(np.int32)
    want = np.sort(ids * np.int32(length) + np.arange(length, dtype=np.int32))
    np.testing.assert_array_equal(sorted_codes(ids, num_buckets), want)


@pytest.mark.parametrize("axis", [0, 2])
def test_it_maps_over_any_axis(axis):
    ids = np.random.default_rng(0).integers(0, 4, (2, 1, 130, 3), dtype=np.int32)
    moved = jnp.moveaxis(jnp.asarray(ids), 3, axis)
    got = jax.vmap(functools.partial(order.sorted_codes, num_buckets=4, interpret=True), axis)(moved)
    np.testing.assert_array_equal(got, np.sort(np.moveaxis(ids * 130 + np.arange(130)[:, None], 3, 0)))


def test_under_x64():
    ids = np.arange(300, dtype=np.int32)[None, None] % 3
    with jax.enable_x64(True):
        codes = order.sorted_codes(jnp.asarray(ids), 3, interpret=True)
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, np.sort(ids * 300 + np.arange(300)))


def test_codes_are_taken_apart_where_they_are_split():
    """On a mesh XLA for GPUs fails to compile what divides them by a power of two elsewhere (JAX 0.11.2)."""
    ids = jax.ShapeDtypeStruct((2, 64, 4), jnp.int32)
    traced = jax.make_jaxpr(lambda ids: scfa_jax.hash_index(ids, num_buckets=4))(ids)
    assert not {equation.primitive.name for equation in traced.eqns} & {"div", "rem"}
