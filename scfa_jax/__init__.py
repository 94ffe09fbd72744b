"""Sparse causal flash attention for JAX: exact attention over the pairs that the data selects."""

from scfa_jax import reference as reference
from scfa_jax.hashing import lsh_hash as lsh_hash
from scfa_jax.hashing import random_rotations as random_rotations
