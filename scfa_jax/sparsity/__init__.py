"""Kinds of sparsity for Flax modules: one file each, and what they share in `base`."""

from scfa_jax.sparsity.base import Implementation as Implementation
from scfa_jax.sparsity.base import Layout as Layout
from scfa_jax.sparsity.base import Operands as Operands
from scfa_jax.sparsity.base import Sparsity as Sparsity
from scfa_jax.sparsity.base import attend as attend
from scfa_jax.sparsity.base import kind_of as kind_of
from scfa_jax.sparsity.base import normalize as normalize
from scfa_jax.sparsity.base import operands as operands
from scfa_jax.sparsity.drop import Drop as Drop
from scfa_jax.sparsity.hash import Hash as Hash
from scfa_jax.sparsity.heavy_hitters import HeavyHitters as HeavyHitters
from scfa_jax.sparsity.keep_top import KeepTop as KeepTop
from scfa_jax.sparsity.kmeans_hash import KMeansHash as KMeansHash
from scfa_jax.sparsity.learned_hash import LearnedHash as LearnedHash
from scfa_jax.sparsity.permutation_hash import PermutationHash as PermutationHash
from scfa_jax.sparsity.sparsek import SparseK as SparseK
from scfa_jax.sparsity.static_patterns import BigBird as BigBird
from scfa_jax.sparsity.static_patterns import Fixed as Fixed
from scfa_jax.sparsity.static_patterns import Longformer as Longformer
from scfa_jax.sparsity.static_patterns import StaticPattern as StaticPattern
from scfa_jax.sparsity.static_patterns import Strided as Strided
from scfa_jax.sparsity.window import Window as Window
