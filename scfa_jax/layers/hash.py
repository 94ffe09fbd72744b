"""Attention inside the buckets of a hash, and to a window beside them."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scfa_jax import _checks, patterns
from scfa_jax._positions import LIMIT
from scfa_jax.hashing import check_num_buckets, learned_hash, lsh_hash, random_rotations
from scfa_jax.index import SparseIndex
from scfa_jax.kmeans import kmeans_hash, member_sums, random_centroids, with_gradient
from scfa_jax.layers import bucket_order
from scfa_jax.layers.kind import Cache, Heads, Layout, Parameter, State
from scfa_jax.layers.pattern import Marked, Marks, Pattern, Rows


class Hashes(NamedTuple):
    """Buckets of queries and of keys."""

    query: jax.Array  # int32 [B, T, N]
    key: jax.Array | None  # int32 [B, T, K]; None where the keys are the queries
    gate: jax.Array | None = None  # float [B, T, K] of ones, through which what hashes gets gradients


class HashBy(abc.ABC):
    """A way to hash: what it draws, keeps and trains, and how it assigns buckets. It is a frozen dataclass."""

    @property
    def drawn(self) -> tuple[str, ...]:
        """The names of what it draws at random."""
        return ()

    @property
    def kept(self) -> tuple[str, ...]:
        """The names of what a layer keeps of a first draw, for evaluation."""
        return ()

    def draws(self, deterministic: bool) -> bool:
        """Tells whether each call draws anew; `deterministic` in evaluation."""
        del deterministic
        return False

    def draw(self, key: jax.Array, layout: Layout, num_buckets: int) -> State:
        """Draws what one call needs, with a JAX random key."""
        del key, layout, num_buckets
        return {}

    def parameters(self, layout: Layout, num_buckets: int) -> dict[str, Parameter]:
        """Tells what is trained, by name."""
        del layout, num_buckets
        return {}

    @abc.abstractmethod
    def hashes(self, query: jax.Array, key: jax.Array, num_buckets: int, state: State, start: Any) -> Hashes:
        """Assigns buckets.

        Args:
            query: float `[B, T, N, H]`.
            key: float `[B, T, K, H]`; the same object where the keys are the queries.
            num_buckets: Number of buckets.
            state: What was drawn or kept, and the parameters.
            start: The place of the first token, an int or int32 `[]`.

        Returns:
            The buckets, in `[0, num_buckets)`.
        """


@dataclasses.dataclass(frozen=True)
class Rotations(HashBy):
    """The nearest of random directions and their opposites; training draws new ones in each call.

    Source: Andoni et al. 2015, as used by Kitaev et al. 2020 (Reformer).
    """

    @property
    def drawn(self) -> tuple[str, ...]:
        return ("rotations",)

    @property
    def kept(self) -> tuple[str, ...]:
        return ("rotations",)

    def draws(self, deterministic: bool) -> bool:
        return not deterministic

    def draw(self, key: jax.Array, layout: Layout, num_buckets: int) -> State:
        return {"rotations": random_rotations(key, layout.num_key_value_heads, layout.head_dim, num_buckets)}

    def hashes(self, query: jax.Array, key: jax.Array, num_buckets: int, state: State, start: Any) -> Hashes:
        rotations = _checked("rotations", state, (*key.shape[2:], num_buckets // 2), "K, H, num_buckets // 2")
        query_hash = lsh_hash(query, _for_queries(rotations, query, key))
        return Hashes(query_hash, None if key is query else lsh_hash(key, rotations))


@dataclasses.dataclass(frozen=True)
class LearnedRotations(HashBy):
    """As `Rotations`, with directions that are parameters: `scfa_jax.learned_hash` says how they learn.

    Nothing is drawn. The gate of a key weighs it in a window beside the buckets too.
    """

    def parameters(self, layout: Layout, num_buckets: int) -> dict[str, Parameter]:
        shape = (layout.num_key_value_heads, layout.head_dim, num_buckets // 2)
        return {"rotations": Parameter(_random_directions, shape)}

    def hashes(self, query: jax.Array, key: jax.Array, num_buckets: int, state: State, start: Any) -> Hashes:
        rotations = _checked("rotations", state, (*key.shape[2:], num_buckets // 2), "K, H, num_buckets // 2")
        key_hash, gate = learned_hash(key, rotations)
        if key is query:
            return Hashes(key_hash, None, gate)
        directions = rotations / jnp.linalg.norm(rotations, axis=1, keepdims=True)
        return Hashes(lsh_hash(query, _for_queries(directions, query, key)), key_hash, gate)


@dataclasses.dataclass(frozen=True)
class KMeans(HashBy):
    """The nearest of centroids that follow the tokens: clusters, exact and causal.

    Source: Roy et al. 2021, "Efficient Content-Based Sparse Attention with Routing Transformers".

    The layer keeps `centroids`, which no optimizer trains. A call takes them as it finds them. The gradient of a loss
    with respect to them is none, but the sums that `scfa_jax.kmeans.update_centroids` moves them by after the step:
    differentiate by them too, as `train.step` does, or they stay where they are.

    Args:
        decay: Share of the moving average of a centroid that stays in a step, for `update_centroids`.

    Raises:
        ValueError: `decay` is outside `[0, 1)`.
        TypeError: `decay` is no number.
    """

    decay: float = 0.999

    def __post_init__(self):
        if not 0 <= _checks.static_number("decay", self.decay) < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {self.decay}.")

    @property
    def drawn(self) -> tuple[str, ...]:
        return ("centroids",)

    @property
    def kept(self) -> tuple[str, ...]:
        return ("centroids",)

    def draw(self, key: jax.Array, layout: Layout, num_buckets: int) -> State:
        return {"centroids": random_centroids(key, layout.num_key_value_heads, layout.head_dim, num_buckets)}

    def hashes(self, query: jax.Array, key: jax.Array, num_buckets: int, state: State, start: Any) -> Hashes:
        heads, head_dim = key.shape[2:]
        centroids = _checked("centroids", state, (heads, num_buckets, head_dim), "K, num_buckets, H")
        key_hash = kmeans_hash(key, centroids)
        sums, query_hash = member_sums(key, key_hash, num_buckets), None
        if key is not query:
            query_hash = kmeans_hash(query, _for_queries(centroids, query, key))
            of_queries = member_sums(query, query_hash, num_buckets)
            sums = sums + of_queries.reshape(heads, -1, *sums.shape[1:]).sum(axis=1)
        gate = with_gradient(jnp.ones(key_hash.shape, jnp.float32), centroids, sums.astype(centroids.dtype))
        return Hashes(key_hash, None, gate) if query_hash is None else Hashes(query_hash, key_hash, gate)


@dataclasses.dataclass(frozen=True)
class Hash(Pattern):
    """Attention inside the buckets of a hash: Hash-sparse.

    Source: Pagliardini et al. 2023, "Faster Causal Attention Over Large Sequences Through Sparse Flash Attention".

    Args:
        num_buckets: Number of buckets, even.
        exclude_self: Whether a token may not attend to itself. If None, it may not where keys are made of the queries:
            there it would mostly see itself. The first token of a bucket then attends to nothing and its output is 0.
        before_rotary: Whether to hash queries and keys before they are rotated, in modules with `rotary`: buckets
            then depend on what a token is and not on where it stands.
        by: What assigns buckets: `Rotations()`, `LearnedRotations()` or `KMeans()`.
        local_window: Positions up to its own that a token sees whatever their bucket, before which it sees those of its
            bucket. Its own is among them, and left out of both parts with `exclude_self`. 0 for the bucket alone.

    Raises:
        ValueError: `num_buckets` is odd or below 2, or `local_window` below 0.
        TypeError: A number is no static integer, or `by` no way to hash.
    """

    num_buckets: int
    exclude_self: bool | None = None
    before_rotary: bool = False
    by: HashBy = dataclasses.field(default=Rotations(), kw_only=True)
    local_window: int = dataclasses.field(default=0, kw_only=True)

    shares_query_key = True
    cached_marks: ClassVar = {"hash": np.int32(0)}

    def __post_init__(self):
        check_num_buckets(self.num_buckets)
        _checks.static_int("local_window", self.local_window, least=0)
        if not isinstance(self.by, HashBy):
            raise TypeError(f"by must be Rotations(), LearnedRotations(), KMeans(...) or another way, got {self.by!r}.")

    def in_layout(self, layout: Layout) -> Hash:
        exclude_self = layout.share_query_key if self.exclude_self is None else self.exclude_self
        return dataclasses.replace(self, exclude_self=exclude_self)

    def parameters(self, layout: Layout) -> dict[str, Parameter]:
        return self.by.parameters(layout, self.num_buckets)

    @property
    def drawn(self) -> tuple[str, ...]:
        return self.by.drawn

    @property
    def kept(self) -> tuple[str, ...]:
        return self.by.kept

    def draws(self, deterministic: bool) -> bool:
        return self.by.draws(deterministic)

    def draw(self, key: jax.Array, batch_size: int, length: int, layout: Layout) -> State:
        return self.by.draw(key, layout, self.num_buckets)

    def marks(self, heads: Heads, state: State) -> Marked:
        hashed = (heads.query, heads.key) if self.before_rotary else (heads.rotated_query, heads.rotated_key)
        query, key, gate = self.by.hashes(*hashed, self.num_buckets, state, heads.start)
        of_query = {"hash": query}
        return Marked(of_query, of_query if key is None else {"hash": key}, gate)

    def index(self, query: Marks, key: Marks, rows: Rows) -> SparseIndex | list[SparseIndex]:
        hashes = query["hash"], None if key is query else key["hash"]
        options = {"exclude_self": bool(self.exclude_self), "num_buckets": self.num_buckets, **rows.positions}
        if self.local_window:
            return patterns.local_hash_index(*hashes, self.local_window, **options)
        return patterns.hash_index(*hashes, **options)

    def example_marks(self, length: int) -> Marked:
        """Buckets of equal size."""
        even = {"hash": jnp.arange(length, dtype=jnp.int32)[None, :, None] % self.num_buckets}
        return Marked(even, even)

    def row(self, query: Marks, key: Marks, position: jax.Array, key_length: int, num_heads: int) -> jax.Array:
        place = jnp.arange(key_length, dtype=jnp.int32)[None, None]
        group = num_heads // key["hash"].shape[2]
        key_hash = jnp.repeat(key["hash"].swapaxes(1, 2), group, axis=1)
        in_bucket = query["hash"].swapaxes(1, 2) == key_hash
        near = position - place < min(self.local_window, LIMIT)
        return (in_bucket | near) & (place <= position - int(bool(self.exclude_self)))

    def empty_cache(self, layout: Layout, batch_size: int, max_length: int, dtype: jax.typing.DTypeLike) -> Cache:
        cache = super().empty_cache(layout, batch_size, max_length, dtype)
        if self.local_window == 0 and bucket_order.pays(max_length, layout.head_dim):
            cache["cached_order"] = jnp.zeros((batch_size, layout.num_key_value_heads, max_length), jnp.int32)
        return cache

    def _attend_cached(
        self, cache: Cache, heads: Heads, query: Marks, options: dict[str, Any]
    ) -> tuple[jax.Array, Cache]:
        if "cached_order" not in cache:
            return super()._attend_cached(cache, heads, query, options)
        if heads.rotated_query.shape[1] != 1:
            output, _ = super()._attend_cached(cache, heads, query, options)
            order = bucket_order.order_of(cache["cached_hash"], cache["cache_index"])
        else:
            output, order = bucket_order.attend_from_one(
                heads.rotated_query,
                cache["cached_key"],
                cache["cached_value"],
                query["hash"],
                cache["cached_hash"],
                cache["cached_order"],
                cache["cache_index"] - 1,
                exclude_self=bool(self.exclude_self),
                **options,
            )
        return output, {**cache, "cached_order": order}


def _checked(name: str, state: State, expected: tuple[int, ...], described: str) -> jax.Array:
    """What hashes, of the shape that it must have."""
    got = state.get(name)
    if got is None or got.shape != expected:
        raise ValueError(f"{name} must be [{described}] = {expected}, got {None if got is None else got.shape}.")
    return got


def _for_queries(x: jax.Array, query: jax.Array, key: jax.Array) -> jax.Array:
    """Repeats what hashes each key head, `[K, ...]`, for the query heads that read it."""
    return jnp.repeat(x, query.shape[2] // key.shape[2], axis=0)


def _random_directions(key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    heads, head_dim, half = shape
    return random_rotations(key, heads, head_dim, 2 * half).astype(dtype)
