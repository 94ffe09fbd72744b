"""Attention over sequences that are sharded: heads for sequence and back, for use inside `jax.shard_map`.

Batch and heads need nothing from here: the operators run on each device's own part of them, under plain `jit`, on
meshes with auto or explicit axes, and inside `jax.shard_map`. A query may attend to keys anywhere in its sequence, so
that a sharded sequence must come together. Before attention each device gives away its part of the sequence of most
heads for the whole sequence of a few; afterwards it takes it back. Source: Jacobs et al. 2023, "DeepSpeed Ulysses".

What has no heads, such as segment ids `[B, T / devices]`, is gathered: `jax.lax.all_gather(x, "sequence", axis=1,
tiled=True)`.
"""

from __future__ import annotations

import jax


def to_heads(x: jax.Array, axis_name: str) -> jax.Array:
    """Exchanges a part of the sequence of all heads for the whole sequence of this device's heads.

    Source: Jacobs et al. 2023, "DeepSpeed Ulysses".

    Args:
        x: `[B, T / devices, N, ...]`: queries, keys or values, or hashes, masks or ranges of each head.
        axis_name: The mesh axis that the sequence is sharded over, manual here.

    Returns:
        `[B, T, N / devices, ...]`. Gradients go the other way.

    Raises:
        ValueError: The number of heads is no multiple of the size of the axis.

    Examples:
        >>> import jax, scfa_jax
        >>> from jax.sharding import PartitionSpec as P
        >>> from scfa_jax.sharding import to_heads, to_sequence
        >>> def attend(*arrays):  # all [B, T / devices, N, ...]
        ...     arrays = (to_heads(x, "sequence") for x in arrays)
        ...     return to_sequence(scfa_jax.hash_sparse_attention(*arrays, num_buckets=4), "sequence")
        >>> mesh = jax.make_mesh((1,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))  # or more devices
        >>> spec = P(None, "sequence")
        >>> attend = jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec))
        >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 16))
        >>> hashes = jax.random.randint(jax.random.key(1), (1, 64, 2), 0, 4)
        >>> attend(query, key, value, hashes).shape
        (1, 64, 2, 16)
    """
    return _exchange(x, axis_name, split=2, gathered=1, what="number of heads N")


def to_sequence(x: jax.Array, axis_name: str) -> jax.Array:
    """Exchanges the whole sequence of this device's heads for a part of the sequence of all heads.

    Source: as of `to_heads`, whose example has both: Jacobs et al. 2023.

    Args:
        x: `[B, T, N / devices, ...]`: the output of attention, or its log-sum-exp.
        axis_name: As `to_heads` takes it.

    Returns:
        `[B, T / devices, N, ...]`. Gradients go the other way.

    Raises:
        ValueError: The length of the sequence is no multiple of the size of the axis.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jax.sharding import PartitionSpec as P
        >>> from scfa_jax.sharding import to_heads, to_sequence
        >>> mesh = jax.make_mesh((1,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> there_and_back = lambda x: to_sequence(to_heads(x, "sequence"), "sequence")
        >>> spec, x = P(None, "sequence"), jax.random.normal(jax.random.key(0), (1, 64, 2, 16))
        >>> bool((jax.shard_map(there_and_back, mesh=mesh, in_specs=spec, out_specs=spec)(x) == x).all())
        True
    """
    return _exchange(x, axis_name, split=1, gathered=2, what="length T")


def _exchange(x: jax.Array, axis_name: str, *, split: int, gathered: int, what: str) -> jax.Array:
    """Cuts one axis among the devices and gathers the other from them."""
    size = jax.lax.axis_size(axis_name)
    if x.ndim < 3 or x.shape[split] % size:
        raise ValueError(
            f"x must be [B, T, N, ...] with a {what} that is a multiple of the {size} devices along {axis_name!r}, "
            f"got shape {x.shape}."
        )
    return jax.lax.all_to_all(x, axis_name, split_axis=split, concat_axis=gathered, tiled=True)
