"""Rematerialisation: what attention names for checkpoint policies, and a policy that keeps exactly that."""

from __future__ import annotations

import jax
from jax.ad_checkpoint import checkpoint_name

OUTPUT = "scfa_output"
LOGSUMEXP = "scfa_logsumexp"
INDEX = "scfa_index"

save_attention = jax.checkpoint_policies.save_only_these_names(OUTPUT, LOGSUMEXP, INDEX)
"""A policy for `jax.checkpoint`, `flax.nnx.remat` and `flax.linen.remat` that computes all twice but attention.

Queries, keys and values are computed again. Forward kernels, sorts, searches and hashes are not: the policy keeps the
output, its float32 log-sum-exp, and 4 to 12 bytes of the index per token and head, on either side.
"""


def named_index(arrays):
    """Names what sorting and searching found, from which the rest of an index follows elementwise."""
    return jax.tree.map(lambda x: checkpoint_name(x, INDEX), arrays)
