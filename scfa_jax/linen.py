"""Sparse causal self-attention for Flax Linen."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.module import merge_param

from scfa_jax.attention_fn import causal_attention_fn as causal_attention_fn
from scfa_jax.attention_fn import hash_attention_fn as hash_attention_fn
from scfa_jax.attention_fn import qk_attention_fn as qk_attention_fn
from scfa_jax.decoding import Cache, attend_cached, empty_cache
from scfa_jax.sparsity import BigBird as BigBird
from scfa_jax.sparsity import Drop as Drop
from scfa_jax.sparsity import Fixed as Fixed
from scfa_jax.sparsity import Hash as Hash
from scfa_jax.sparsity import HeavyHitters as HeavyHitters
from scfa_jax.sparsity import Implementation, Layout, Sparsity, attend, kind_of
from scfa_jax.sparsity import KeepTop as KeepTop
from scfa_jax.sparsity import KMeansHash as KMeansHash
from scfa_jax.sparsity import LearnedHash as LearnedHash
from scfa_jax.sparsity import Longformer as Longformer
from scfa_jax.sparsity import PermutationHash as PermutationHash
from scfa_jax.sparsity import SparseK as SparseK
from scfa_jax.sparsity import Strided as Strided
from scfa_jax.sparsity import Window as Window

RNG_STREAM = "sparsity"
COLLECTION = "sparsity"
CACHE = "cache"


class CausalSelfAttention(nn.Module):
    """Causal self-attention: dense, inside hash buckets, or among random subsets.

    Source: Pagliardini et al. 2023. In hash mode keys are the L2-normalised queries of their head, and a
    token does not attend to itself. In training each call draws new rotations or keep masks from the rng
    stream "sparsity", unless it is given those of `draw`. At evaluation hash mode uses the rotations kept in
    the collection "sparsity" since `init`, and drop mode keeps everything.

    With `decode=True`, `init` of tokens `[B, S, E]` also makes the collection "cache", with room for `S` tokens.
    Each `apply(..., mutable=["cache"])` adds its tokens to it and attends from them to all that it holds: first
    the prompt, whole or in parts, then one token after another. Results are those of one evaluation of the whole
    sequence.

    With fewer key heads than query heads each key head serves a group of adjacent query heads, which hash
    with its rotations; shared keys are then the mean query of the group.

    Args:
        in_features: Width `E` of the tokens.
        num_heads: Number of query heads, `N`.
        num_key_value_heads: Number of key and value heads, `K`, a divisor of `N`; `N` if None.
        head_dim: Width of a head, `H`; `in_features // num_heads` if None.
        sparsity: A kind: `Hash(num_buckets)`, `Drop(rate)`, `SparseK(num_keys, window)`; None for dense attention.
        share_query_key: Whether keys are made of the queries instead of a projection of their own; if None,
            only where the kind of sparsity asks for it, as `Hash` does.
        normalize_key: Whether keys are scaled to unit length; if None, likewise.
        rotary: Called as `rotary(x, positions)` with queries or keys `[B, T, heads, H]` and int32 positions
            `[1 or B, T]` before anything else happens to them; returns the like of `x`.
        use_bias: Whether the projections have biases.
        dtype: Of the computation; inferred from inputs and parameters if None.
        param_dtype: Of the parameters.
        kernel_init: Of the kernels.
        out_kernel_init: Of the output projection's kernel; `kernel_init` if None.
        bias_init: Of the biases.
        deterministic: Whether to evaluate rather than train; here or in the call, if there is a sparsity.
        decode: Whether to use the cache, which is to evaluate too, whatever `deterministic` says.
        implementation: As in `scfa_jax.causal_attention`.

    Raises:
        ValueError: The heads do not divide what they must.
        TypeError: `sparsity` is of another kind.

    Examples:
        >>> import jax
        >>> from scfa_jax.linen import CausalSelfAttention, Hash
        >>> layer = CausalSelfAttention(32, num_heads=2, sparsity=Hash(num_buckets=4))
        >>> x = jax.random.normal(jax.random.key(0), (1, 64, 32))
        >>> keys = {"params": jax.random.key(1), "sparsity": jax.random.key(2)}
        >>> variables = layer.init(keys, x, deterministic=True)
        >>> layer.apply(variables, x, deterministic=False, rngs={"sparsity": jax.random.key(3)}).shape
        (1, 64, 32)
    """

    in_features: int
    num_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    sparsity: Sparsity | None = None
    share_query_key: bool | None = None
    normalize_key: bool | None = None
    rotary: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    use_bias: bool = True
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    out_kernel_init: nn.initializers.Initializer | None = None
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()
    deterministic: bool | None = None
    decode: bool = False
    implementation: Implementation = None

    def setup(self):
        self.layout = Layout.of(
            self.in_features,
            self.num_heads,
            self.num_key_value_heads,
            self.head_dim,
            self.sparsity,
            self.share_query_key,
            self.normalize_key,
        )
        project = functools.partial(
            nn.DenseGeneral,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            bias_init=self.bias_init,
        )
        key_shape = (self.layout.num_key_value_heads, self.layout.head_dim)
        self.query = project((self.layout.num_heads, self.layout.head_dim), kernel_init=self.kernel_init)
        if not self.layout.share_query_key:
            self.key = project(key_shape, kernel_init=self.kernel_init)
        self.value = project(key_shape, kernel_init=self.kernel_init)
        self.out = project(self.in_features, axis=(-2, -1), kernel_init=self.out_kernel_init or self.kernel_init)
        kind = kind_of(self.sparsity)
        self.own_parameters = {
            name: self.param(name, init, shape, self.param_dtype)
            for name, (init, shape) in kind.parameters(self.layout).items()
        }
        # Training needs no kept draw: `{"params": ...}` alone is enough there.
        if self.is_initializing() and kind.kept_draw:
            drawn = self._new_draw(1, 1)
            for name in kind.kept_draw:
                self.variable(COLLECTION, name, lambda x: x, drawn[name])

    def draw(self, batch_size: int, length: int, *, deterministic: bool | None = None) -> dict[str, jax.Array]:
        """Draws what one call needs at random; pass it on as `module(x, **draw)`.

        Made before rematerialisation (`nn.remat`, `jax.checkpoint`), a draw is an input of what is computed
        twice, and not itself computed twice. From outside: `module.apply(variables, batch_size, length,
        deterministic=False, rngs={"sparsity": key}, method="draw")`.

        Args:
            batch_size: `B` of the call.
            length: `T` of the call.
            deterministic: Whether to evaluate, unless the module says so.

        Returns:
            `{}`, `{"rotations": float32 [K, H, num_buckets // 2]}`, or
            `{"query_keep": bool [B, T, N], "key_keep": bool [B, T, K]}`.

        Raises:
            ValueError: `deterministic` is given neither or both here and to the module, or the collection
                "sparsity" is missing at evaluation in hash mode.
            flax.errors.InvalidRngError: A new draw is needed and there is no stream "sparsity".
        """
        kind = kind_of(self.sparsity)
        draws = kind.draws(deterministic=False)
        if draws != kind.draws(deterministic=True):
            draws = kind.draws(self.decode or merge_param("deterministic", self.deterministic, deterministic))
        if draws:
            return self._new_draw(batch_size, length)
        for name in kind.kept_draw:
            if not self.has_variable(COLLECTION, name):
                raise ValueError(
                    f"variables must have the collection {COLLECTION!r} at evaluation, "
                    f"where init put the {name} beside 'params'."
                )
        return {name: self.get_variable(COLLECTION, name) for name in kind.kept_draw}

    def __call__(
        self,
        x: jax.Array,
        *,
        deterministic: bool | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        **draw: jax.Array,
    ) -> jax.Array:
        """Attends.

        Args:
            x: float `[B, T, E]`.
            deterministic: Whether to evaluate, unless the module says so.
            positions: int32 `[1 or B, T]` for `rotary`, without which they raise; 0 to `T - 1` if None, and what
                follows the cache in decoding.
            segment_ids: int32 `[1 or B, T]`: tokens attend to those of their own id, and not at all with an id
                below 0 (padding). Positions for `rotary` are not counted anew in each segment. Not in decoding.
            **draw: What `draw` returns, or the like: `rotations`, float32 `[K, H, num_buckets // 2]`, in hash mode;
                `query_keep`, bool `[B, T, N]`, and `key_keep`, bool `[B, T, K]`, in drop mode. Drawn here if left out.

        Returns:
            `[B, T, E]`; in decoding NaN past the cache's end.

        Raises:
            ValueError: A shape does not fit, a draw does not go with the kind of sparsity, there is no cache to decode
                with, or as in `draw`.
            TypeError: The cache has another dtype than the computation.
            NotImplementedError: There are segments in decoding.
        """
        self.layout.check_input("x", x.shape)
        draw = {name: drawn for name, drawn in draw.items() if drawn is not None}
        draw = draw or self.draw(*x.shape[:2], deterministic=deterministic)
        options: dict[str, Any] = {
            "normalize_key": self.layout.normalize_key,
            "rotary": self.rotary,
            "positions": positions,
            "segment_ids": segment_ids,
            "implementation": self.implementation,
            "tokens": x,
            **draw,
            **self.own_parameters,
        }

        query, value = self.query(x), self.value(x)
        key = None if self.layout.share_query_key else self.key(x)
        if not self.decode or self.is_initializing():
            if self.decode:
                self._put_cache(empty_cache(self.layout, self.sparsity, x.shape[0], x.shape[1], value.dtype))
            return self.out(attend(query, key, value, self.sparsity, **options))
        output, cache = attend_cached(self._cache(), query, key, value, self.sparsity, **options)
        self._put_cache(cache)
        return self.out(output)

    def _cache(self) -> Cache:
        if not self.has_variable(CACHE, "cache_index"):
            raise ValueError(
                f"variables must have the collection {CACHE!r} to decode with, which init of [B, max_length, E] makes."
            )
        return dict(self.variables[CACHE])

    def _put_cache(self, cache: Cache) -> None:
        for name, x in cache.items():
            self.put_variable(CACHE, name, x)

    def _new_draw(self, batch_size: int, length: int) -> dict[str, jax.Array]:
        return kind_of(self.sparsity).draw(self.make_rng(RNG_STREAM), batch_size, length, self.layout)
