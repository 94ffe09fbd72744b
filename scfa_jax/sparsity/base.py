"""What a kind of sparsity is, and what both Flax modules do with one.

Nothing here imports Flax. A kind is a small frozen dataclass in a file of its own: it makes its random draws, marks
queries and keys by what decides which of them meet, and attends. `attend` and `decoding` act on any kind.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from scfa_jax.attention import causal_attention

Implementation: TypeAlias = str | Sequence[str] | None
Marks: TypeAlias = dict[str, jax.Array]  # by name, [1 or B, 1 or T, heads] each


class Projections(NamedTuple):
    """What a kind may look at."""

    tokens: jax.Array | None  # [B, T, E]: what the layer reads
    query: jax.Array  # [B, T, N, H]
    key: jax.Array  # [B, T, K, H]; the same object as `query` where queries are the keys
    rotated_query: jax.Array  # these are `query` and `key` where there is no rotary
    rotated_key: jax.Array
    start: jax.Array | int = 0  # int32 [], the place of the first token


class Operands(NamedTuple):
    """What attention computes on: `T` queries, `S` keys, and what decides which of them meet."""

    query: jax.Array  # [B, T, N, H], rotated
    key: jax.Array  # [B, S, K, H], rotated, and normalised if asked for
    value: jax.Array  # [B, S, K, H]
    query_marks: Marks
    key_marks: Marks | None  # None where they are those of the queries


class Sparsity:
    """A kind of sparsity; this one is none: dense causal attention."""

    # Whether modules share and normalise keys unless they are told otherwise.
    shares_query_key: ClassVar[bool] = False
    # What of a draw the module keeps, for evaluation.
    kept_draw: ClassVar[tuple[str, ...]] = ()
    # The keys' marks that decoding keeps in its cache, and what stands for those of keys without.
    cached_marks: ClassVar[dict[str, np.bool_ | np.number]] = {}
    # Whether that cache has a place for each token; otherwise `empty_cache` makes another, for `attend_next`.
    caches_every_token: ClassVar[bool] = True

    def draws(self, deterministic: bool) -> bool:
        """Tells whether a call draws anew.

        Args:
            deterministic: Whether it evaluates.

        Returns:
            Whether `draw` is to be called.
        """
        del deterministic
        return False

    def draw(self, key: jax.Array, batch_size: int, length: int, layout: Layout) -> dict[str, jax.Array]:
        """Draws what one call needs at random.

        Args:
            key: A JAX random key.
            batch_size: `B`.
            length: `T`.
            layout: That of the module.

        Returns:
            Arrays by name, which are keywords of `marks`.
        """
        del key, batch_size, length, layout
        return {}

    def parameters(self, layout: Layout) -> dict[str, tuple[Callable[..., jax.Array], tuple[int, ...]]]:
        """Tells what is trained beside the projections.

        Args:
            layout: That of the module.

        Returns:
            An initialiser `(key, shape, dtype)` and a shape for each name, which are keywords of `marks`.
        """
        del layout
        return {}

    def marks(self, projections: Projections) -> tuple[Marks, Marks | None]:
        """Marks queries and keys by what decides, beside their positions, which of them meet.

        Args:
            projections: Those of a call.

        Returns:
            Those of the queries `[1 or B, 1 or T, N]`, and those of the keys `[1 or B, 1 or T, K]`, or None where
            the former are the latter too. A key's `gate`, float `[B, T, K]`, is no mark: it multiplies the key's value,
            and is how gradients reach what marks are made by.
        """
        del projections
        return {}, None

    def mask(
        self, query_marks: Marks, key_marks: Marks, query_position: jax.Array, key_position: jax.Array
    ) -> jax.Array:
        """Tells which queries and keys meet: the dense definition, which decoding one token computes by.

        Args:
            query_marks: Those of `marks`, by query and then key: `[B, K, N // K, T, 1]`.
            key_marks: Likewise, `[B, K, 1, 1, S]`.
            query_position: int32 `[T, 1]`.
            key_position: int32 `[S]`.

        Returns:
            bool, which broadcasts to `[B, K, N // K, T, S]`.
        """
        del query_marks, key_marks
        return key_position <= query_position

    def places(self, position: jax.Array, length: int) -> jax.Array | None:
        """Tells which places of a cache one token can meet, so that decoding need not read the others.

        Args:
            position: int32 `[]`, where the token stands.
            length: Number of places `S`.

        Returns:
            int32, each place at most once; None for all of them.
        """
        del position, length
        return None

    def keeps_order(self, max_length: int, head_dim: int) -> bool:
        """Tells whether a cache also keeps its keys' order by their mark `hash`, for `attend_in_bucket`.

        Args:
            max_length: Number of places `S`.
            head_dim: `H`.

        Returns:
            Whether.
        """
        del max_length, head_dim
        return False

    def attend_in_bucket(
        self, cached: Operands, order: jax.Array, position: jax.Array, *, implementation: Implementation
    ) -> tuple[jax.Array, jax.Array]:
        """Attends from one token, reading the keys of its bucket alone, where the cache `keeps_order`.

        Args:
            cached: The token's query, and all keys of the cache with its own.
            order: int32 `[B, K, S]`, that of the tokens before.
            position: int32 `[]`, where the token stands.
            implementation: As in `scfa_jax.causal_attention`.

        Returns:
            `[B, 1, N, H]` in the dtype of the query, and the order with the token in it.
        """
        raise NotImplementedError(f"{self!r} has no buckets.")

    def attend(self, operands: Operands, **options: Any) -> jax.Array:
        """Calls the operator.

        Args:
            operands: What attends to what.
            **options: Of the operator: `query_offset`, `query_segment_ids`, `implementation`.

        Returns:
            `[B, T, N, H]` in the dtype of the query.
        """
        output: Any  # the operators also return pairs, with return_residual
        output = causal_attention(operands.query, operands.key, operands.value, **options)
        return output

    def empty_cache(self, layout: Layout, batch_size: int, dtype: jax.typing.DTypeLike) -> dict[str, jax.Array]:
        """Makes a cache of another sort, without tokens, if not `caches_every_token`.

        Args:
            layout: That of the module.
            batch_size: `B`.
            dtype: That of the keys and values.

        Returns:
            Arrays by name: `cached_key`, `[B, ...]`, `cache_index`, int32 `[]`, the number of tokens so far, and
            others named `cached_<name>`.
        """
        raise NotImplementedError(f"{self!r} has no cache of its own.")

    def attend_next(
        self, cache: dict[str, jax.Array], operands: Operands, *, implementation: Implementation
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Attends from tokens that follow those in such a cache.

        Args:
            cache: What the tokens before left.
            operands: Those of the new tokens alone.
            implementation: As in `scfa_jax.causal_attention`.

        Returns:
            `[B, T, N, H]` in the dtype of the query, and the cache after these tokens.
        """
        raise NotImplementedError(f"{self!r} has no cache of its own.")


def kind_of(sparsity: Sparsity | None) -> Sparsity:
    """Checks a module's `sparsity`.

    Args:
        sparsity: A kind, or None for none.

    Returns:
        The kind.

    Raises:
        TypeError: It is something else.
    """
    if sparsity is None:
        return Sparsity()
    if not isinstance(sparsity, Sparsity):
        raise TypeError(f"sparsity must be None, Hash(...), Drop(...) or another kind, got {sparsity!r}.")
    return sparsity


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
        sparsity: Sparsity | None,
        share_query_key: bool | None,
        normalize_key: bool | None,
    ) -> Layout:
        """Makes the layout of a module's options.

        Args:
            in_features: As in the modules, like all that follow.
            num_heads: `N`.
            num_key_value_heads: `K` or None.
            head_dim: `H` or None.
            sparsity: A kind, or None.
            share_query_key: Or None.
            normalize_key: Or None.

        Returns:
            The layout, with nothing left at None.

        Raises:
            ValueError: The heads do not divide what they must, or have no width.
            TypeError: `sparsity` is of another kind.
        """
        shared = kind_of(sparsity).shares_query_key
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
        return cls(
            in_features,
            num_heads,
            key_heads,
            in_features // num_heads if head_dim is None else head_dim,
            shared if share_query_key is None else share_query_key,
            shared if normalize_key is None else normalize_key,
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


def operands(
    query: jax.Array,
    key: jax.Array | None,
    value: jax.Array,
    sparsity: Sparsity | None = None,
    *,
    tokens: jax.Array | None = None,
    normalize_key: bool = False,
    rotary: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    positions: jax.Array | None = None,
    start: jax.Array | int = 0,
    **draw: jax.Array | None,
) -> Operands:
    """Makes of projections what attention computes on: rotates, normalises, marks.

    Args:
        query: float `[B, T, N, H]`.
        key: float `[B, T, K, H]`, or None to make it of the query (`shared_key`).
        value: float `[B, T, K, H]`.
        sparsity: A kind, or None.
        tokens: float `[B, T, E]`, what the layer reads, for kinds that look at it.
        normalize_key: Whether to scale keys to unit length. Marks do not depend on it.
        rotary: As in the modules: `rotary(x, positions)` for queries and keys `[B, T, _, H]`; or None.
        positions: int32 `[1 or B, T]` for `rotary`; if None, they go on from `start`.
        start: The place of the first token, an int or int32 `[]`.
        **draw: What the kind drew, and its parameters: keywords of its `marks`. None is as good as left out.

    Returns:
        The operands.

    Raises:
        ValueError: The draw does not go with `sparsity`, or has other shapes than it, `query` and `value` ask for.
    """
    if positions is not None and rotary is None:
        raise ValueError(f"positions must be None without rotary, got shape {positions.shape}.")
    kind, drawn = kind_of(sparsity), {name: x for name, x in draw.items() if x is not None}
    known = inspect.signature(kind.marks).parameters
    if unknown := sorted(drawn.keys() - known.keys()):
        raise ValueError(f"{unknown[0]} does not go with sparsity={sparsity!r}, whose draws have no such name.")

    shared = key is None and query.shape[2] == value.shape[2]
    key = shared_key(query, value.shape[2]) if key is None else key
    rotated_query, rotated_key = query, key
    if rotary is not None:
        positions = start + jnp.arange(query.shape[1], dtype=jnp.int32)[None] if positions is None else positions
        rotated_query = rotary(query, positions).astype(value.dtype)
        rotated_key = rotated_query if shared else rotary(key, positions).astype(key.dtype)
    projections = Projections(tokens, query, key, rotated_query, rotated_key, start)
    query_marks, key_marks = kind.marks(projections, **drawn)
    gate = (query_marks if key_marks is None else key_marks).pop("gate", None)
    if gate is not None:
        value = (value.astype(gate.dtype) * gate[..., None]).astype(value.dtype)
    key = (normalize(rotated_key) if normalize_key else rotated_key).astype(rotated_query.dtype)
    return Operands(rotated_query, key, value, query_marks, key_marks)


def attend(
    query: jax.Array,
    key: jax.Array | None,
    value: jax.Array,
    sparsity: Sparsity | None = None,
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
        sparsity: A kind, or None.
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
    return kind_of(sparsity).attend(made, query_segment_ids=segment_ids, implementation=implementation)
