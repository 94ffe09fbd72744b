"""Patterns: functions that return an index, or several whose pairs make the pattern together."""

from scfa_jax.patterns.blocks import block_index as block_index
from scfa_jax.patterns.causal import causal_index as causal_index
from scfa_jax.patterns.causal import range_index as range_index
from scfa_jax.patterns.causal import window_index as window_index
from scfa_jax.patterns.hash import hash_index as hash_index
from scfa_jax.patterns.hash import local_hash_index as local_hash_index
from scfa_jax.patterns.keep import keep_index as keep_index
from scfa_jax.patterns.published import bigbird_index as bigbird_index
from scfa_jax.patterns.published import check_fixed as check_fixed
from scfa_jax.patterns.published import fixed_index as fixed_index
from scfa_jax.patterns.published import longformer_index as longformer_index
from scfa_jax.patterns.published import strided_index as strided_index
