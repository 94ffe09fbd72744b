"""Sparse causal flash attention for JAX: exact attention over the pairs that the data selects."""

import importlib
from typing import Any

from scfa_jax import patterns as patterns
from scfa_jax import reference as reference
from scfa_jax import remat as remat
from scfa_jax import sharding as sharding
from scfa_jax.attention import causal_attention as causal_attention
from scfa_jax.attention import hash_sparse_attention as hash_sparse_attention
from scfa_jax.attention import qk_sparse_attention as qk_sparse_attention
from scfa_jax.attention import range_attention as range_attention
from scfa_jax.attention import sparse_attention as sparse_attention
from scfa_jax.attention import window_attention as window_attention
from scfa_jax.backends.protocol import BlockSizes as BlockSizes
from scfa_jax.backends.protocol import TileShape as TileShape
from scfa_jax.hashing import learned_hash as learned_hash
from scfa_jax.hashing import lsh_hash as lsh_hash
from scfa_jax.hashing import random_rotations as random_rotations
from scfa_jax.index import SparseIndex as SparseIndex
from scfa_jax.kmeans import kmeans_hash as kmeans_hash
from scfa_jax.merge import merge_attention as merge_attention
from scfa_jax.moba import moba_attention as moba_attention
from scfa_jax.moba import moba_blocks as moba_blocks
from scfa_jax.nsa import nsa_attention as nsa_attention
from scfa_jax.patterns import block_index as block_index
from scfa_jax.patterns import causal_index as causal_index
from scfa_jax.patterns import hash_index as hash_index
from scfa_jax.patterns import keep_index as keep_index
from scfa_jax.patterns import local_hash_index as local_hash_index
from scfa_jax.patterns import range_index as range_index
from scfa_jax.patterns import window_index as window_index
from scfa_jax.sparsek import sparsek_attention as sparsek_attention


def __getattr__(name: str) -> Any:
    """Imports `scfa_jax.nnx` and `scfa_jax.linen` when they are first asked for: they need Flax."""
    if name in ("linen", "nnx"):
        return importlib.import_module(f"scfa_jax.{name}")
    raise AttributeError(f"module 'scfa_jax' has no attribute {name!r}")
