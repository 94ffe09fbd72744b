"""What a kind of attention layer is, and what layers of every kind have in common. Nothing here imports Flax."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from scfa_jax._checks import at_least_float32

Cache: TypeAlias = dict[str, jax.Array]
"""What decoding keeps of the tokens so far, under Flax's names: `cached_<name>`, and `cache_index`, int32 `[]`, their
number."""

State: TypeAlias = dict[str, jax.Array]
"""What a kind drew, and its parameters, by name."""


class Heads(NamedTuple):
    """What the projections of a layer give."""

    tokens: jax.Array | None  # [B, T, E]: what the layer reads
    query: jax.Array  # [B, T, N, H]
    key: jax.Array  # [B, T, K, H]; the same object as `query` where queries are the keys
    value: jax.Array  # [B, T, K, H]
    rotated_query: jax.Array  # these two are `query` and `key` where there is no rotary
    rotated_key: jax.Array
    attended_key: jax.Array  # `rotated_key` in the dtype of the query, normalised if asked for
    start: jax.Array | int = 0  # int32 [], the place of the first token
    rotate: Callable[[jax.Array], jax.Array] = lambda x: x  # rotates further keys [B, T, heads, H] like these


class Parameter(NamedTuple):
    """Something that is trained beside the projections."""

    init: Callable[..., jax.Array]  # (key, shape, dtype)
    shape: tuple[int, ...]


class Kind(abc.ABC):
    """A kind of attention layer: its parameters, its draws, and how it attends, in training and in decoding.

    A kind is a frozen dataclass, so that a layer of it can be compiled.
    """

    shares_query_key: ClassVar[bool] = False
    """Whether a layer makes its keys of the queries, and normalises them, unless it is told otherwise."""

    def in_layout(self, layout: Layout) -> Kind:
        """The kind with what depends on a layer filled in; a `ValueError` if it does not go with the layer."""
        del layout
        return self

    def parameters(self, layout: Layout) -> dict[str, Parameter]:
        """What is trained beside the projections, by name."""
        del layout
        return {}

    @property
    def drawn(self) -> tuple[str, ...]:
        """The names of what it draws at random."""
        return ()

    @property
    def kept(self) -> tuple[str, ...]:
        """The names of what a layer keeps of a first draw, for evaluation."""
        return ()

    def draws(self, deterministic: bool) -> bool:
        """Whether each call draws anew, in training or, `deterministic`, in evaluation."""
        del deterministic
        return False

    def draw(self, key: jax.Array, batch_size: int, length: int, layout: Layout) -> State:
        """Draws what one call on `[batch_size, length]` tokens needs: arrays by the names of `drawn`."""
        del key, batch_size, length, layout
        return {}

    @abc.abstractmethod
    def pairs(self, length: int, num_heads: int) -> float:
        """Counts the pairs of a query and a key that attend in a sequence, in the mean over `num_heads` heads."""

    @abc.abstractmethod
    def attend(self, heads: Heads, state: State, *, segment_ids: jax.Array | None = None, **options: Any) -> jax.Array:
        """Attends from all tokens of a sequence.

        Args:
            heads: The projections.
            state: What it drew or the layer keeps, and its parameters.
            segment_ids: int32 `[1 or B, T]`, or None for one segment.
            **options: Of `scfa_jax.sparse_attention`: `implementation`, `logits_soft_cap`, `sink_logits`.

        Returns:
            `[B, T, N, H]` in the dtype of the query.
        """

    def empty_cache(self, layout: Layout, batch_size: int, max_length: int, dtype: jax.typing.DTypeLike) -> Cache:
        """Makes a cache without tokens.

        Args:
            layout: That of the layer.
            batch_size: `B`.
            max_length: The most tokens that it can hold; it makes no difference to a kind that forgets tokens.
            dtype: Of keys and values, that of the computation.

        Returns:
            The cache.

        Raises:
            NotImplementedError: The kind cannot decode.
        """
        raise NotImplementedError(f"{self!r} cannot decode.")

    def attend_next(self, cache: Cache, heads: Heads, state: State, **options: Any) -> tuple[jax.Array, Cache]:
        """Adds tokens to a cache, and attends from them to all that it holds.

        Results are those of one pass over the whole sequence, whatever parts it comes in.

        Args:
            cache: What the tokens before left.
            heads: The projections of the new tokens.
            state: As in `attend`.
            **options: As in `attend`.

        Returns:
            `[B, T, N, H]` in the dtype of the query, and the cache after these tokens.

        Raises:
            NotImplementedError: The kind cannot decode.
        """
        raise NotImplementedError(f"{self!r} cannot decode.")


@dataclasses.dataclass(frozen=True)
class Layout:
    """The shape of a layer: what both Flax modules make of their options, checked and with the defaults filled in.

    Attributes:
        in_features: Width `E` of the tokens.
        num_heads: `N`.
        num_key_value_heads: `K`.
        head_dim: `H`.
        share_query_key: Whether keys are made of the queries.
        normalize_key: Whether keys have unit length.
        kind: What happens between the projections.
    """

    in_features: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    share_query_key: bool
    normalize_key: bool
    kind: Kind

    @classmethod
    def of(
        cls,
        in_features: int,
        num_heads: int,
        num_key_value_heads: int | None,
        head_dim: int | None,
        kind: Kind,
        share_query_key: bool | None,
        normalize_key: bool | None,
    ) -> Layout:
        """Makes the layout of a module's options, which are described there.

        Raises:
            ValueError: The heads do not divide what they must, or have no width, or the kind does not go with them.
            TypeError: `sparsity` is no kind.
        """
        if not isinstance(kind, Kind):
            raise TypeError(f"sparsity must be None, Hash(...), Drop(...) or another kind, got {kind!r}.")
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
        layout = cls(
            in_features,
            num_heads,
            key_heads,
            in_features // num_heads if head_dim is None else head_dim,
            kind.shares_query_key if share_query_key is None else share_query_key,
            kind.shares_query_key if normalize_key is None else normalize_key,
            kind,
        )
        return dataclasses.replace(layout, kind=kind.in_layout(layout))

    def check_input(self, name: str, shape: tuple[int, ...]) -> None:
        """Checks the shape of a module's input: `[B, T, in_features]`."""
        if len(shape) != 3 or shape[-1] != self.in_features:
            raise ValueError(f"{name} must be [B, T, {self.in_features}], got {shape}.")

    def checked_draw(self, draw: dict[str, Any]) -> State:
        """What a module's call was given of a draw: checks the names, and leaves out what is None."""
        given = {name: x for name, x in draw.items() if x is not None}
        if unknown := sorted(given.keys() - set(self.kind.drawn)):
            takes = f"takes {' and '.join(self.kind.drawn)}" if self.kind.drawn else "takes no draw"
            raise ValueError(f"{unknown[0]} does not go with sparsity={self.kind!r}, which {takes}.")
        return given

    def heads(
        self,
        query: jax.Array,
        key: jax.Array | None,
        value: jax.Array,
        *,
        tokens: jax.Array | None = None,
        rotary: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
        positions: jax.Array | None = None,
        start: jax.Array | int = 0,
    ) -> Heads:
        """Makes of projections what attention computes on: shares, rotates, normalises.

        Args:
            query: float `[B, T, N, H]`.
            key: float `[B, T, K, H]`, or None to make it of the query (`shared_key`).
            value: float `[B, T, K, H]`.
            tokens: float `[B, T, E]`, for kinds that look at it.
            rotary: `rotary(x, positions)` for queries and keys `[B, T, heads, H]`; or None.
            positions: int32 `[1 or B, T]` for `rotary`; if None, they go on from `start`.
            start: The place of the first token, an int or int32 `[]`.

        Returns:
            The heads.

        Raises:
            ValueError: There are positions and no `rotary`.
        """
        if positions is not None and rotary is None:
            raise ValueError(f"positions must be None without rotary, got shape {positions.shape}.")
        shared = key is None and query.shape[2] == value.shape[2]
        key = shared_key(query, value.shape[2]) if key is None else key
        rotated_query, rotated_key = query, key
        rotate: Callable[[jax.Array], jax.Array] = lambda x: x
        if rotary is not None:
            places = start + jnp.arange(query.shape[1], dtype=jnp.int32)[None] if positions is None else positions
            rotate = lambda x: rotary(x, places).astype(x.dtype)
            rotated_query = rotary(query, places).astype(value.dtype)
            rotated_key = rotated_query if shared else rotate(key)
        attended = normalize(rotated_key) if self.normalize_key else rotated_key
        attended = attended.astype(rotated_query.dtype)
        return Heads(tokens, query, key, value, rotated_query, rotated_key, attended, start, rotate)


def normalize(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """Scales vectors to length 1, computed in float32.

    Args:
        x: float `[..., H]`.
        epsilon: Added to the squared length, so that the gradient at zero is finite.

    Returns:
        `[..., H]` in the dtype of `x`.
    """
    wide = x.astype(at_least_float32(x.dtype))
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
    return grouped.astype(at_least_float32(query.dtype)).mean(axis=3)
