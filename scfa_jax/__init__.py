"""Sparse causal flash attention for JAX: exact attention over the pairs that the data selects."""

from scfa_jax import patterns as patterns
from scfa_jax import reference as reference
from scfa_jax import remat as remat
from scfa_jax import sharding as sharding
from scfa_jax.attention import causal_attention as causal_attention
from scfa_jax.attention import hash_sparse_attention as hash_sparse_attention
from scfa_jax.attention import qk_sparse_attention as qk_sparse_attention
from scfa_jax.attention import range_attention as range_attention
from scfa_jax.attention import sparse_attention as sparse_attention
from scfa_jax.hashing import lsh_hash as lsh_hash
from scfa_jax.hashing import random_rotations as random_rotations
from scfa_jax.index import SparseIndex as SparseIndex
from scfa_jax.index import causal_index as causal_index
from scfa_jax.index import hash_index as hash_index
from scfa_jax.index import keep_index as keep_index
from scfa_jax.index import range_index as range_index
from scfa_jax.merge import merge_attention as merge_attention
from scfa_jax.patterns import union_attention as union_attention
from scfa_jax.patterns import window_attention as window_attention
from scfa_jax.sparsek import sparsek_attention as sparsek_attention
from scfa_jax.sparsek import sparsek_gates as sparsek_gates
from scfa_jax.tiling import BlockSizes as BlockSizes
from scfa_jax.tiling import Tile as Tile
