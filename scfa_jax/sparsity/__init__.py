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
