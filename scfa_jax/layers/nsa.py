"""Native sparse attention: compressed keys, the blocks that they point to, and a window, mixed by gates."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers

from scfa_jax import _checks
from scfa_jax.layers import token_cache
from scfa_jax.layers.kind import Cache, Heads, Kind, Layout, Parameter, State
from scfa_jax.nsa import in_compression_blocks, nsa_attention, num_compressed

BRANCHES = 3  # compressed, selected, near


@dataclasses.dataclass(frozen=True)
class NSA(Kind):
    """Native sparse attention: to compressed keys, to the blocks that they point to, and to a window.

    Each branch has keys and values of its own, and a gate for each token and head, the sigmoid of a projection. The
    layer's own keys and values are those of the selected branch. Compressed keys and values are two-layer perceptrons
    of the rows of a block, each with a learned offset for its place there; this branch knows no rotary embedding.

    Source: Yuan et al. 2025, "Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention".

    Args:
        block_size: Keys in a block that is chosen; a multiple of `compression_stride`.
        top_k: Blocks that a token attends to, first and last ones among them.
        window: Positions up to its own that a token sees in the window.
        compression_size: Keys that are compressed to one.
        compression_stride: Keys from the start of a compression block to that of the next; a divisor of
            `compression_size`.
        num_initial: First blocks that are chosen always.
        num_local: Last blocks, the token's own among them, that are chosen always.

    Raises:
        ValueError: A number is too small, or does not divide what it must.
        TypeError: A number is no static integer.
    """

    block_size: int = 64
    top_k: int = 16
    window: int = 512
    compression_size: int = 32
    compression_stride: int = 16
    num_initial: int = 1
    num_local: int = 2

    def __post_init__(self):
        for name in ("block_size", "window", "compression_size", "compression_stride", "num_local"):
            _checks.static_int(name, getattr(self, name), least=1)
        _checks.static_int("num_initial", self.num_initial, least=0)
        _checks.static_int("top_k", self.top_k, least=self.num_initial + self.num_local)
        for name in ("block_size", "compression_size"):
            if getattr(self, name) % self.compression_stride:
                raise ValueError(
                    f"{name} must be a multiple of compression_stride = {self.compression_stride}, "
                    f"got {getattr(self, name)}."
                )

    def in_layout(self, layout: Layout) -> Kind:
        if layout.normalize_key:
            raise ValueError("normalize_key must be False with NSA, whose branches have keys of their own, got True.")
        return self

    def parameters(self, layout: Layout) -> dict[str, Parameter]:
        width, key_heads, size = layout.in_features, layout.num_key_value_heads, layout.head_dim
        project = initializers.lecun_normal(in_axis=0, out_axis=(1, 2, 3))
        combine = initializers.lecun_normal(in_axis=1, out_axis=2, batch_axis=0)
        return {
            "compressed_kernel": Parameter(project, (width, 2, key_heads, size)),
            "near_kernel": Parameter(project, (width, 2, key_heads, size)),
            "place_in_block": Parameter(initializers.normal(0.02), (2, self.compression_size, size)),
            "compression_hidden": Parameter(combine, (2, self.compression_size * size, size)),
            "compression_out": Parameter(combine, (2, size, size)),
            "gate_kernel": Parameter(
                initializers.lecun_normal(in_axis=0, out_axis=(1, 2)), (width, layout.num_heads, BRANCHES)
            ),
            "gate_bias": Parameter(initializers.zeros, (layout.num_heads, BRANCHES)),
        }

    def pairs(self, length: int, num_heads: int) -> float:
        """Counts the pairs of a query and a key in a sequence, compressed keys among them."""
        place = np.arange(length)
        compressed = np.maximum((place + 1 - self.compression_size) // self.compression_stride + 1, 0)
        candidates = np.maximum(place // self.block_size + 1 - self.num_local, 0)
        local = place + 1 - candidates * self.block_size
        chosen = np.minimum(candidates, self.top_k - self.num_local) * self.block_size
        return float(np.sum(compressed + local + chosen + np.minimum(place + 1, self.window)))

    def attend(self, heads: Heads, state: State, *, segment_ids: jax.Array | None = None, **options: Any) -> jax.Array:
        rows = _projected(heads, state["compressed_kernel"])
        near_key, near_value = _projected(heads, state["near_kernel"])
        return self._attend(
            heads,
            state,
            self._compressed(rows, state),
            (heads.attended_key, heads.value),
            (heads.rotate(near_key), near_value),
            options,
            query_segment_ids=segment_ids,
        )

    def empty_cache(self, layout: Layout, batch_size: int, max_length: int, dtype: jax.typing.DTypeLike) -> Cache:
        cache = token_cache.empty(layout, batch_size, max_length, dtype, {})
        count = num_compressed(max_length, self.compression_size, self.compression_stride)
        zeros = lambda length: jnp.zeros((batch_size, length, *cache["cached_key"].shape[2:]), dtype)
        lengths = {"near": max_length, "row": max_length, "compressed": count}
        more = {f"cached_{name}_{side}": zeros(size) for name, size in lengths.items() for side in ("key", "value")}
        return {**cache, **more}

    def attend_next(self, cache: Cache, heads: Heads, state: State, **options: Any) -> tuple[jax.Array, Cache]:
        start, length = cache["cache_index"], heads.rotated_query.shape[1]
        cache = token_cache.extended(cache, heads.attended_key, heads.value, {})
        near_key, near_value = _projected(heads, state["near_kernel"])
        rows = _projected(heads, state["compressed_kernel"])
        for name, x in {
            "near_key": heads.rotate(near_key),
            "near_value": near_value,
            "row_key": rows[0],
            "row_value": rows[1],
        }.items():
            cache[f"cached_{name}"] = _written(cache[f"cached_{name}"], x, start)
        cache = self._with_compressed(cache, state, start, length)
        pair = lambda name: (cache[f"cached_{name}key"], cache[f"cached_{name}value"])
        # Places behind the new tokens are later than they are: causality hides them.
        output = self._attend(heads, state, pair("compressed_"), pair(""), pair("near_"), options, query_offset=start)
        return token_cache.nan_past_the_end(output, cache), cache

    def _with_compressed(self, cache: Cache, state: State, start: jax.Array, length: int) -> Cache:
        """The cache with the compression blocks that new tokens complete, and perhaps later ones, which nobody sees."""
        size, stride = self.compression_size, self.compression_stride
        count = cache["cached_compressed_key"].shape[1]
        completed = min(length // stride + 1, count)
        if count == 0:
            return cache
        first = jnp.clip((start - size) // stride + 1, 0, count - completed)
        taken = (completed - 1) * stride + size
        key, value = (
            jax.lax.dynamic_slice_in_dim(cache[f"cached_row_{side}"], first * stride, taken, axis=1)
            for side in ("key", "value")
        )
        made = dict(zip(("key", "value"), self._compressed((key, value), state), strict=True))
        written = {
            f"cached_compressed_{side}": _written(cache[f"cached_compressed_{side}"], x, first)
            for side, x in made.items()
        }
        return {**cache, **written}

    def _compressed(self, rows: tuple[jax.Array, jax.Array], state: State) -> tuple[jax.Array, jax.Array]:
        """Compresses keys and values `[B, S, K, H]` to `[B, M, K, H]`."""
        made = []
        for i, x in enumerate(rows):
            blocks = in_compression_blocks(x, self.compression_size, self.compression_stride)
            blocks = blocks + state["place_in_block"][i][None, None, :, None].astype(x.dtype)
            batch, count, size, heads, width = blocks.shape
            flat = blocks.swapaxes(2, 3).reshape(batch, count, heads, size * width)
            hidden = jax.nn.gelu(flat @ state["compression_hidden"][i].astype(x.dtype))
            made.append(hidden @ state["compression_out"][i].astype(x.dtype))
        return made[0], made[1]

    def _attend(
        self,
        heads: Heads,
        state: State,
        compressed: tuple[jax.Array, jax.Array],
        selected: tuple[jax.Array, jax.Array],
        near: tuple[jax.Array, jax.Array],
        options: dict[str, Any],
        **positions: Any,
    ) -> jax.Array:
        for name in ("logits_soft_cap", "sink_logits"):
            if options.get(name) is not None:
                raise NotImplementedError(f"{self!r} knows no {name}.")
        tokens = heads.tokens
        assert tokens is not None
        query = heads.rotated_query
        gates = jnp.einsum("bte,eng->btng", tokens.astype(query.dtype), state["gate_kernel"].astype(query.dtype))
        gates = jax.nn.sigmoid(gates.astype(jnp.float32) + state["gate_bias"].astype(jnp.float32)[None, None])
        return nsa_attention(
            query,
            compressed,
            selected,
            near,
            gates,
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            compressed_query=heads.query.astype(query.dtype),
            implementation=options.get("implementation"),
            **positions,
        )


def _projected(heads: Heads, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values `[B, T, K, H]` of a branch, in the dtype of the query."""
    assert heads.tokens is not None
    dtype = heads.rotated_query.dtype
    both = jnp.einsum("bte,eskh->sbtkh", heads.tokens.astype(dtype), kernel.astype(dtype))
    return both[0], both[1]


def _written(cached: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(cached, rows.astype(cached.dtype), start, axis=1)
