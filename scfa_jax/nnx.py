"""Sparse causal self-attention for Flax NNX."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

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


class KeptDraw(nnx.Variable):
    """The draw of evaluation and decoding: saved with the model, but not trained like an `nnx.Param`."""


class CausalSelfAttention(nnx.Module):
    """Causal self-attention: dense, inside hash buckets, or among random subsets.

    Source: Pagliardini et al. 2023. In hash mode keys are the L2-normalised queries of their head, and a
    token does not attend to itself. In training each call draws new rotations or keep masks from the rng
    stream "sparsity", unless it is given those of `draw`. At evaluation hash mode uses the rotations kept in
    `self.rotations`, and drop mode keeps everything.

    For decoding, `init_cache` makes a cache of `nnx.Cache` variables, and each call with `decode=True` adds its
    tokens to it and attends from them to all that it holds: first the prompt, whole or in parts, then one token
    after another. Results are those of one evaluation of the whole sequence.

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
        deterministic: Whether to evaluate rather than train; set by `train()` and `eval()` too.
        decode: Whether to use the cache, which is to evaluate too.
        implementation: As in `scfa_jax.causal_attention`.
        rngs: Streams "params" and, in hash mode, "sparsity" for the rotations of evaluation.

    Raises:
        ValueError: The heads do not divide what they must, or `rngs` lacks a stream.
        TypeError: `sparsity` is of another kind.

    Examples:
        >>> import jax
        >>> from flax import nnx
        >>> from scfa_jax.nnx import CausalSelfAttention, Hash
        >>> layer = CausalSelfAttention(32, num_heads=2, sparsity=Hash(num_buckets=4), rngs=nnx.Rngs(0, sparsity=1))
        >>> x = jax.random.normal(jax.random.key(0), (1, 64, 32))
        >>> layer(x, rngs=nnx.Rngs(sparsity=2)).shape, layer(x, deterministic=True).shape
        ((1, 64, 32), (1, 64, 32))
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        *,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        sparsity: Sparsity | None = None,
        share_query_key: bool | None = None,
        normalize_key: bool | None = None,
        rotary: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
        use_bias: bool = True,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer = nnx.initializers.lecun_normal(),  # noqa: B008
        out_kernel_init: nnx.Initializer | None = None,
        bias_init: nnx.Initializer = nnx.initializers.zeros_init(),  # noqa: B008
        deterministic: bool = False,
        decode: bool = False,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        self.layout = Layout.of(
            in_features, num_heads, num_key_value_heads, head_dim, sparsity, share_query_key, normalize_key
        )
        self.sparsity = sparsity
        self.rotary = rotary
        self.deterministic = deterministic
        self.decode = decode
        self.implementation = tuple(implementation) if isinstance(implementation, list) else implementation

        project = functools.partial(
            nnx.LinearGeneral,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            bias_init=bias_init,
            rngs=rngs,
        )
        query_shape = (self.layout.num_heads, self.layout.head_dim)
        key_shape = (self.layout.num_key_value_heads, self.layout.head_dim)
        self.query = project(in_features, query_shape, kernel_init=kernel_init)
        if not self.layout.share_query_key:
            self.key = project(in_features, key_shape, kernel_init=kernel_init)
        self.value = project(in_features, key_shape, kernel_init=kernel_init)
        self.out = project(query_shape, in_features, axis=(-2, -1), kernel_init=out_kernel_init or kernel_init)
        kind = kind_of(sparsity)
        for name, (init, shape) in kind.parameters(self.layout).items():
            setattr(self, name, nnx.Param(init(rngs.params(), shape, param_dtype)))
        drawn = self._new_draw(1, 1, rngs) if kind.kept_draw else {}
        for name in kind.kept_draw:
            setattr(self, name, KeptDraw(drawn[name]))
        self._cache_names: tuple[str, ...] = ()  # of variables: see `init_cache`

    def init_cache(self, input_shape: tuple[int, ...], dtype: jax.typing.DTypeLike | None = None) -> None:
        """Makes an empty cache for decoding, in place of any other.

        Args:
            input_shape: `(B, S, E)`, `S` the most tokens it can hold.
            dtype: Of its keys and values, that of the computation; if None, the module's, or that of its parameters.

        Raises:
            ValueError: `input_shape` is no such shape.
        """
        self.layout.check_input("input_shape", input_shape)
        dtype = dtype or self.value.dtype or self.value.param_dtype
        cache = empty_cache(self.layout, self.sparsity, input_shape[0], input_shape[1], dtype)
        for name in set(self._cache_names) - cache.keys():  # only a cache with enough room keeps an order
            delattr(self, name)
        for name, x in cache.items():
            setattr(self, name, nnx.Cache(x))
        self._cache_names = tuple(cache)

    def draw(
        self,
        batch_size: int,
        length: int,
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """Draws what one call needs at random; pass it on as `module(x, **draw)`.

        Made before rematerialisation (`nnx.remat`, `jax.checkpoint`), a draw is an input of what is computed
        twice, and not itself computed twice.

        Args:
            batch_size: `B` of the call.
            length: `T` of the call.
            deterministic: Whether to evaluate; `self.deterministic` if None.
            rngs: Streams with "sparsity", one stream, or a key. Needed for a new draw.

        Returns:
            `{}`, `{"rotations": float32 [K, H, num_buckets // 2]}`, or
            `{"query_keep": bool [B, T, N], "key_keep": bool [B, T, K]}`.

        Raises:
            ValueError: A new draw is needed and `rngs` lacks the stream.
        """
        deterministic = self.deterministic if deterministic is None else deterministic
        kind = kind_of(self.sparsity)
        if not kind.draws(deterministic):
            return {name: getattr(self, name)[...] for name in kind.kept_draw}
        return self._new_draw(batch_size, length, rngs)

    def __call__(
        self,
        x: jax.Array,
        *,
        deterministic: bool | None = None,
        decode: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        **draw: jax.Array,
    ) -> jax.Array:
        """Attends.

        Args:
            x: float `[B, T, E]`.
            deterministic: Whether to evaluate; `self.deterministic` if None.
            decode: Whether the `T` tokens follow those in the cache, whatever `deterministic` says; `self.decode` if
                None. Past the cache's end outputs are NaN.
            rngs: As in `draw`, which is called if none of the next three is given.
            positions: int32 `[1 or B, T]` for `rotary`, without which they raise; 0 to `T - 1` if None, and what
                follows the cache in decoding.
            segment_ids: int32 `[1 or B, T]`: tokens attend to those of their own id, and not at all with an id
                below 0 (padding). Positions for `rotary` are not counted anew in each segment. Not in decoding.
            **draw: What `draw` returns, or the like: `rotations`, float32 `[K, H, num_buckets // 2]`, in hash mode;
                `query_keep`, bool `[B, T, N]`, and `key_keep`, bool `[B, T, K]`, in drop mode. Drawn here if left out.

        Returns:
            `[B, T, E]`.

        Raises:
            ValueError: A shape does not fit, a draw does not go with the sparsity, `rngs` lacks a stream, or there
                is no cache to decode with.
            TypeError: The cache has another dtype than the computation.
            NotImplementedError: There are segments in decoding.
        """
        self.layout.check_input("x", x.shape)
        draw = {name: drawn for name, drawn in draw.items() if drawn is not None}
        in_decoding = self.decode if decode is None else decode
        draw = draw or self.draw(*x.shape[:2], deterministic=in_decoding or deterministic, rngs=rngs)
        options: dict[str, Any] = {
            "normalize_key": self.layout.normalize_key,
            "rotary": self.rotary,
            "positions": positions,
            "segment_ids": segment_ids,
            "implementation": self.implementation,
            "tokens": x,
            **draw,
            **self.own_parameters(),
        }

        query, value = self.query(x), self.value(x)
        key = None if self.layout.share_query_key else self.key(x)
        if not in_decoding:
            return self.out(attend(query, key, value, self.sparsity, **options))
        output, cache = attend_cached(self._cache(), query, key, value, self.sparsity, **options)
        for name, x in cache.items():
            getattr(self, name)[...] = x
        return self.out(output)

    def own_parameters(self) -> dict[str, jax.Array]:
        """Tells the parameters of the kind of sparsity.

        Returns:
            By the names of `Sparsity.parameters`; none in most kinds.
        """
        return {name: getattr(self, name)[...] for name in kind_of(self.sparsity).parameters(self.layout)}

    def set_view(self, deterministic: bool | None = None, decode: bool | None = None):
        """Class method used by `nnx.view`.

        Args:
            deterministic: Whether to evaluate rather than train.
            decode: Whether to use the cache.
        """
        self.deterministic = self.deterministic if deterministic is None else deterministic
        self.decode = self.decode if decode is None else decode

    def _cache(self) -> Cache:
        if not self._cache_names:
            raise ValueError("There is no cache to decode with: call init_cache((B, max_length, E)) first.")
        return {name: getattr(self, name)[...] for name in self._cache_names}

    def _new_draw(
        self, batch_size: int, length: int, rngs: nnx.Rngs | nnx.RngStream | jax.Array | None
    ) -> dict[str, jax.Array]:
        if isinstance(rngs, nnx.Rngs) and (RNG_STREAM in rngs or "default" in rngs):
            rngs = rngs[RNG_STREAM]
        if isinstance(rngs, nnx.RngStream):
            rngs = rngs()
        if not isinstance(rngs, jax.Array):
            got = f"the streams {list(rngs)}" if isinstance(rngs, nnx.Rngs) else repr(rngs)
            raise ValueError(
                f"rngs must have the stream {RNG_STREAM!r} for a draw of {self.sparsity}, as in "
                f"nnx.Rngs({RNG_STREAM}=0); got {got}."
            )
        return kind_of(self.sparsity).draw(rngs, batch_size, length, self.layout)
