"""What both Flax modules share: the kinds of sparsity and one attention call over them.

Nothing here imports Flax. A kind of sparsity is a small dataclass that makes its random draws, and `operands`
and `Operands.attend` are the one place that acts on them; `decoding` goes through it too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from scfa_jax.attention import causal_attention, hash_sparse_attention, qk_sparse_attention
from scfa_jax.hashing import check_num_buckets, lsh_hash, random_rotations

Implementation: TypeAlias = str | Sequence[str] | None


@dataclasses.dataclass(frozen=True)
class Hash:
    """Attention inside the buckets of an angular hash: Hash-sparse of Pagliardini et al. 2023.

    Args:
        num_buckets: Number of buckets, even.
        exclude_self: Whether a token may not attend to itself. With shared queries and keys it should not: it
            would mostly see itself. The first token of a bucket then attends to nothing and its output is 0.
        before_rotary: Whether to hash queries and keys before they are rotated, in modules with `rotary`: buckets
            then depend on what a token is and not on where it stands.

    Raises:
        ValueError: `num_buckets` is odd or below 2.
        TypeError: `num_buckets` is no static integer.
    """

    num_buckets: int
    exclude_self: bool = True
    before_rotary: bool = False

    def __post_init__(self):
        check_num_buckets(self.num_buckets)

    def draw(self, key: jax.Array, batch_size: int, length: int, layout: Layout) -> dict[str, jax.Array]:
        """Draws what one call needs.

        Args:
            key: A JAX random key.
            batch_size: Ignored: all batch elements share the rotations.
            length: Ignored, likewise.
            layout: That of the module.

        Returns:
            `rotations`, float32 `[K, H, num_buckets // 2]`.
        """
        del batch_size, length
        heads, head_dim = layout.num_key_value_heads, layout.head_dim
        return {"rotations": random_rotations(key, heads, head_dim, self.num_buckets)}


@dataclasses.dataclass(frozen=True)
class Drop:
    """Attention among random subsets of queries and keys: QK-sparse of Pagliardini et al. 2023.

    Args:
        rate: Probability in `[0, 1)` with which each query and each key is dropped, independently for each
            batch element, position and head.
        drop_at_evaluation: Whether to drop at evaluation too; otherwise everything is kept there.

    Raises:
        ValueError: `rate` is outside `[0, 1)`.
        TypeError: `rate` is no static number.
    """

    rate: float
    drop_at_evaluation: bool = False

    def __post_init__(self):
        if isinstance(self.rate, bool) or not isinstance(self.rate, int | float | np.number):
            raise TypeError(f"rate must be a static number, got {self.rate!r}.")
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate must be at least 0 and below 1, got {self.rate}.")

    def draw(self, key: jax.Array, batch_size: int, length: int, layout: Layout) -> dict[str, jax.Array]:
        """Draws what one call needs.

        Args:
            key: A JAX random key.
            batch_size: `B`.
            length: `T`.
            layout: That of the module.

        Returns:
            `query_keep`, bool `[B, T, N]`, and `key_keep`, bool `[B, T, K]`.
        """
        heads = {"query_keep": layout.num_heads, "key_keep": layout.num_key_value_heads}
        return {
            name: jax.random.bernoulli(one_key, 1 - self.rate, (batch_size, length, count))
            for one_key, (name, count) in zip(jax.random.split(key), heads.items(), strict=True)
        }


Sparsity: TypeAlias = Hash | Drop | None


@dataclasses.dataclass(frozen=True)
class Layout:
    """What both modules make of their options of these names: checked and with the defaults filled in."""

    in_features: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    share_query_key: bool
    normalize_key: bool

    @classmethod
    def of(
        cls,
        in_features: int,
        num_heads: int,
        num_key_value_heads: int | None,
        head_dim: int | None,
        sparsity: Sparsity,
        share_query_key: bool | None,
        normalize_key: bool | None,
    ) -> Layout:
        """Makes the layout of a module's options.

        Args:
            in_features: As in the modules, like all that follow.
            num_heads: `N`.
            num_key_value_heads: `K` or None.
            head_dim: `H` or None.
            sparsity: None, `Hash` or `Drop`.
            share_query_key: Or None.
            normalize_key: Or None.

        Returns:
            The layout, with nothing left at None.

        Raises:
            ValueError: The heads do not divide what they must, or have no width.
            TypeError: `sparsity` is of another kind.
        """
        if sparsity is not None and not isinstance(sparsity, Hash | Drop):
            raise TypeError(f"sparsity must be None, Hash(...) or Drop(...), got {sparsity!r}.")
        if num_heads < 1 or (head_dim is None and in_features % num_heads):
            raise ValueError(
                f"num_heads must be positive and, unless head_dim is given, divide in_features, "
                f"got num_heads={num_heads} and in_features={in_features}."
            )
        if in_features < 1 or (head_dim is not None and head_dim < 1):
            raise ValueError(
                f"in_features and head_dim must be positive, got in_features={in_features} and head_dim={head_dim}."
            )
        key_heads = num_heads if num_key_value_heads is None else num_key_value_heads
        if key_heads < 1 or num_heads % key_heads:
            raise ValueError(f"num_key_value_heads must divide num_heads = {num_heads}, got {key_heads}.")
        in_hash_mode = isinstance(sparsity, Hash)
        return cls(
            in_features,
            num_heads,
            key_heads,
            in_features // num_heads if head_dim is None else head_dim,
            in_hash_mode if share_query_key is None else share_query_key,
            in_hash_mode if normalize_key is None else normalize_key,
        )

    def check_input(self, name: str, shape: tuple[int, ...]) -> None:
        """Checks the shape of a module's input.

        Args:
            name: Of the argument.
            shape: What was given.

        Raises:
            ValueError: It is not `[B, T, in_features]`.
        """
        if len(shape) != 3 or shape[-1] != self.in_features:
            raise ValueError(f"{name} must be [B, T, {self.in_features}], got {shape}.")


def normalize(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """Scales vectors to length 1, computed in float32.

    Args:
        x: float `[..., H]`.
        epsilon: Added to the squared length, so that the gradient at zero is finite.

    Returns:
        `[..., H]` in the dtype of `x`.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + epsilon)).astype(x.dtype)


def shared_key(query: jax.Array, num_key_heads: int) -> jax.Array:
    """Makes keys of queries: each key head is the mean of the query heads that read it.

    With as many key heads as query heads this is the query itself. The mean treats the heads of a group
    alike, as where Ainslie et al. 2023 pool key heads into grouped ones.

    Args:
        query: float `[B, T, N, H]`.
        num_key_heads: `K`, a divisor of `N`.

    Returns:
        `[B, T, K, H]`: `query`, or a float32 mean.
    """
    batch, length, num_heads, head_dim = query.shape
    if num_heads == num_key_heads:
        return query
    grouped = query.reshape(batch, length, num_key_heads, num_heads // num_key_heads, head_dim)
    return grouped.astype(jnp.promote_types(query.dtype, jnp.float32)).mean(axis=3)


class Operands(NamedTuple):
    """What attention computes on: `T` queries, `S` keys, and what decides which of them meet."""

    query: jax.Array  # [B, T, N, H], rotated
    key: jax.Array  # [B, S, K, H], rotated, and normalised if asked for
    value: jax.Array  # [B, S, K, H]
    query_hash: jax.Array | None  # int32 [B, T, N], in hash mode
    key_hash: jax.Array | None  # int32 [B, S, K]; None where it is `query_hash`
    query_keep: jax.Array | None  # bool [B, T, N], where some are dropped
    key_keep: jax.Array | None  # bool [B, S, K], likewise

    def attend(self, sparsity: Sparsity, **options: Any) -> jax.Array:
        """Calls the operator of a kind of sparsity.

        Args:
            sparsity: None, `Hash` or `Drop`.
            **options: Of the operator.

        Returns:
            `[B, T, N, H]` in the dtype of the query.
        """
        output: Any  # the operators also return pairs, with return_residual
        arrays = self.query, self.key, self.value
        if isinstance(sparsity, Hash):
            assert self.query_hash is not None
            options |= {"exclude_self": sparsity.exclude_self, "num_buckets": sparsity.num_buckets}
            output = hash_sparse_attention(*arrays, self.query_hash, self.key_hash, **options)
        elif self.query_keep is not None and self.key_keep is not None:
            output = qk_sparse_attention(*arrays, self.query_keep, self.key_keep, **options)
        else:
            output = causal_attention(*arrays, **options)
        return output


def operands(
    query: jax.Array,
    key: jax.Array | None,
    value: jax.Array,
    sparsity: Sparsity = None,
    *,
    normalize_key: bool = False,
    rotary: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    positions: jax.Array | None = None,
    rotations: jax.Array | None = None,
    query_keep: jax.Array | None = None,
    key_keep: jax.Array | None = None,
) -> Operands:
    """Makes of projections what attention computes on: rotates, normalises, hashes.

    Args:
        query: float `[B, T, N, H]`.
        key: float `[B, T, K, H]`, or None to make it of the query (`shared_key`).
        value: float `[B, T, K, H]`.
        sparsity: None, `Hash` or `Drop`.
        normalize_key: Whether to scale keys to unit length. Buckets do not depend on it.
        rotary: As in the modules: `rotary(x, positions)` for queries and keys `[B, T, _, H]`; or None.
        positions: int32 `[1 or B, T]` for `rotary`; 0 to `T - 1` if None.
        rotations: float `[K, H, num_buckets // 2]`, for `Hash` and needed there.
        query_keep: bool `[B, T, N]`, for `Drop`; everything is kept if None.
        key_keep: bool `[B, T, K]`, given if and only if `query_keep` is.

    Returns:
        The operands.

    Raises:
        ValueError: The random draws do not go with `sparsity`, or have other shapes than it, `query` and
            `value` ask for.
    """
    if positions is not None and rotary is None:
        raise ValueError(f"positions must be None without rotary, got shape {positions.shape}.")
    if rotations is not None and not isinstance(sparsity, Hash):
        raise ValueError(f"rotations go with sparsity=Hash(...), got sparsity={sparsity!r}.")
    if (query_keep is not None or key_keep is not None) and not isinstance(sparsity, Drop):
        raise ValueError(f"query_keep and key_keep go with sparsity=Drop(...), got sparsity={sparsity!r}.")
    if (query_keep is None) != (key_keep is None):
        missing = "query_keep" if query_keep is None else "key_keep"
        raise ValueError(f"query_keep and key_keep must be given together, got {missing}=None.")

    one_hash = key is None and query.shape[2] == value.shape[2]
    raw_key = shared_key(query, value.shape[2]) if key is None else key
    hashed_query, hashed_key = query, raw_key
    if rotary is not None:
        positions = jnp.arange(query.shape[1], dtype=jnp.int32)[None] if positions is None else positions
        query = rotary(query, positions).astype(value.dtype)
        raw_key = query if one_hash else rotary(raw_key, positions).astype(raw_key.dtype)
        if not (isinstance(sparsity, Hash) and sparsity.before_rotary):
            hashed_query, hashed_key = query, raw_key
    key = (normalize(raw_key) if normalize_key else raw_key).astype(query.dtype)

    query_hash = key_hash = None
    if isinstance(sparsity, Hash):
        expected = (value.shape[2], query.shape[3], sparsity.num_buckets // 2)
        if rotations is None or rotations.shape != expected:
            got = None if rotations is None else rotations.shape
            raise ValueError(f"rotations must be [K, H, num_buckets // 2] = {expected}, got {got}.")
        group = query.shape[2] // value.shape[2]
        query_hash = lsh_hash(hashed_query, jnp.repeat(rotations, group, axis=0))
        key_hash = None if one_hash else lsh_hash(hashed_key, rotations)
    return Operands(query, key, value, query_hash, key_hash, query_keep, key_keep)


def attend(
    query: jax.Array,
    key: jax.Array | None,
    value: jax.Array,
    sparsity: Sparsity = None,
    *,
    segment_ids: jax.Array | None = None,
    implementation: Implementation = None,
    **options: Any,
) -> jax.Array:
    """Causal self-attention under a kind of sparsity.

    Args:
        query: float `[B, T, N, H]`.
        key: float `[B, T, K, H]`, or None to make it of the query (`shared_key`).
        value: float `[B, T, K, H]`.
        sparsity: None, `Hash` or `Drop`.
        segment_ids: int32 `[1 or B, T]`: attention stays among equal ids, and rows with an id below 0 (padding) take
            no part; None for one segment.
        implementation: As in `scfa_jax.causal_attention`.
        **options: Of `operands`.

    Returns:
        `[B, T, N, H]` in the dtype of `query`.

    Raises:
        ValueError: As in `operands`.
    """
    made = operands(query, key, value, sparsity, **options)
    return made.attend(sparsity, query_segment_ids=segment_ids, implementation=implementation)
