"""What a backend is: the kernels of one compiler, and what it says of itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from scfa_jax._bounds import next_power_of_two
from scfa_jax.backends.tile import Logits, Precision

if TYPE_CHECKING:
    from scfa_jax.index import SparseIndex


@dataclass(frozen=True)
class TileShape:
    """How many queries and keys a kernel computes on at once.

    Attributes:
        block_q: Queries in a tile: a power of two, at least 16.
        block_k: Keys in a tile: a power of two, at least 16.

    Raises:
        ValueError: A size is no power of two, or below 16.

    Examples:
        >>> import scfa_jax
        >>> scfa_jax.TileShape(block_q=128, block_k=64).fit(query_length=20, key_length=100)
        TileShape(block_q=32, block_k=64)
    """

    block_q: int
    block_k: int

    def __post_init__(self):
        for name in ("block_q", "block_k"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name} must be a power of two of at least 16, got {size}.")

    def fit(self, query_length: int, key_length: int) -> TileShape:
        """Returns a shape no larger than the (padded) sequences."""
        return dataclasses.replace(
            self,
            block_q=min(self.block_q, max(16, next_power_of_two(query_length))),
            block_k=min(self.block_k, max(16, next_power_of_two(key_length))),
        )


@dataclass(frozen=True)
class BlockSizes:
    """The tiles of the three kernels.

    Attributes:
        forward: Of the forward pass.
        dq: Of the kernel for the gradients of queries.
        dkv: Of the kernel for those of keys and values.

    Examples:
        >>> import scfa_jax
        >>> tile = scfa_jax.TileShape(block_q=64, block_k=64)
        >>> scfa_jax.BlockSizes(forward=tile, dq=tile, dkv=tile).fit(query_length=20, key_length=100).dq
        TileShape(block_q=32, block_k=64)
    """

    forward: TileShape
    dq: TileShape
    dkv: TileShape

    def fit(self, query_length: int, key_length: int) -> BlockSizes:
        """Returns tiles no larger than the (padded) sequences."""
        return BlockSizes(*(tile.fit(query_length, key_length) for tile in (self.forward, self.dq, self.dkv)))


@dataclass(frozen=True)
class Call:
    """What is static in a call of attention: a backend decides by it, and each has a compilation of its own.

    Attributes:
        head_dim: `H`, of queries and keys.
        value_dim: `V`, of values.
        dtype: Of query, key and value.
        logits: How products become logits.
        output_dtype: Of the output.
        precision: How products of float32 are computed.
        block_sizes: Tiles that fit the sequences; None for the backend's own.
    """

    head_dim: int
    value_dim: int
    dtype: jnp.dtype
    logits: Logits
    output_dtype: jnp.dtype
    precision: Precision = "float32"
    block_sizes: BlockSizes | None = None


class Inputs(NamedTuple):
    """What attention is computed on; no axis is empty."""

    query: jax.Array  # [B, T, N, H]
    key: jax.Array  # [B, S, K, H]
    value: jax.Array  # [B, S, K, V]
    sparse_index: SparseIndex


class Residuals(NamedTuple):
    """What the backward pass knows of each query, of all indices that it attends by.

    Where `logsumexp` is `tile.NO_KEY`, `delta` is 0, and rows of the query and of `output_gradient` may hold anything.
    """

    logsumexp: jax.Array  # float32 [B, N, T]
    delta: jax.Array  # float32 [B, N, T]: the dot of output and its cotangent, less that of the log-sum-exp
    output_gradient: jax.Array  # [B, T, N, V]


class Run(NamedTuple):
    """The keys of one query a head: the rows that stand at `start .. stop - 1` of an order."""

    order: jax.Array  # int32 [B, K, S]
    start: jax.Array  # int32 [B, N], from 0
    stop: jax.Array  # int32 [B, N], at most S


@runtime_checkable
class Backend(Protocol):
    """Kernels that attend to one index. A backend is hashable and equal to itself alone."""

    @property
    def name(self) -> str:
        """What `implementation` calls it."""

    @property
    def platform(self) -> str | None:
        """The JAX platform that its code can be compiled for; None for any."""

    @property
    def is_default(self) -> bool:
        """Whether `implementation=None` may choose it."""

    def missing(self, *, device: bool) -> str | None:
        """Says what its code lacks; None for nothing.

        That is a JAX that compiles it, and, if there is a GPU, one that it can be compiled for. With `device` it is
        also a GPU that runs it: for who asks for it by name.
        """

    def problem(self, call: Call) -> str | None:
        """Says why it cannot compute a call; None if it can."""

    def forward(self, call: Call, inputs: Inputs, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """The output `[B, T * slots, N, V]` in a dtype, and the natural log-sum-exp, float32 `[B, N, T * slots]`.

        Each slot of a query, as the index has them, has results of its own. The log-sum-exp of one without keys is
        `tile.NO_KEY`.
        """

    def backward(
        self, call: Call, inputs: Inputs, residuals: Residuals, dtype: jnp.dtype
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Gradients of the slots of queries `[B, T * slots, N, H]`, of key and of value, in a dtype."""

    def decode(
        self, call: Call, query: jax.Array, key: jax.Array, value: jax.Array, run: Run
    ) -> tuple[jax.Array, jax.Array]:
        """The output of one query a head, float32 `[B, 1, N, V]`, and its log-sum-exp, float32 `[B, N, 1]`."""

    def sorter(self, num_buckets: int) -> Callable[[jax.Array], jax.Array] | None:
        """A kernel that sorts rows by bucket, if there is one for so many buckets.

        It takes ids, int32 `[B, N, L]` in `[0, num_buckets)`, to ascending `id * L + row`.
        """

    def range_finder(self) -> Callable[..., tuple[jax.Array, jax.Array]] | None:
        """A kernel that does what `ordering.plain_key_ranges` does, if there is one."""

    def block_chooser(
        self, head_dim: int, k: int, by: Literal["score", "importance"]
    ) -> Callable[..., jax.Array] | None:
        """A kernel that chooses `k` blocks for queries of such heads, if there is one.

        By score it does what `_selection.plain_best_blocks` does, by importance `plain_most_important_blocks`.
        """
