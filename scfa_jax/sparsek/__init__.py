"""SparseK attention: the operator, its gates, and its state in decoding."""

from scfa_jax.sparsek.operator import Selection as Selection
from scfa_jax.sparsek.operator import sparsek_attention as sparsek_attention
from scfa_jax.sparsek.operator import sparsek_gates as sparsek_gates
