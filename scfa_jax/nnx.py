"""Sparse causal self-attention for Flax NNX."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

try:
    from flax import nnx
except ImportError as error:
    raise ImportError("scfa_jax.nnx needs Flax: pip install 'scfa-jax[flax]'.") from error

from scfa_jax.backends import Implementation
from scfa_jax.layers import NSA as NSA
from scfa_jax.layers import BigBird as BigBird
from scfa_jax.layers import Cache, Dense, Kind, Layout, State
from scfa_jax.layers import Drop as Drop
from scfa_jax.layers import Fixed as Fixed
from scfa_jax.layers import Hash as Hash
from scfa_jax.layers import KMeans as KMeans
from scfa_jax.layers import LearnedRotations as LearnedRotations
from scfa_jax.layers import Longformer as Longformer
from scfa_jax.layers import MoBA as MoBA
from scfa_jax.layers import Rotations as Rotations
from scfa_jax.layers import SparseK as SparseK
from scfa_jax.layers import Strided as Strided
from scfa_jax.layers import Window as Window
from scfa_jax.layers.attention_fn import causal_attention_fn as causal_attention_fn
from scfa_jax.layers.attention_fn import hash_attention_fn as hash_attention_fn
from scfa_jax.layers.attention_fn import qk_attention_fn as qk_attention_fn
from scfa_jax.rotary import rotary as rotary

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

RNG_STREAM = "sparsity"


class KeptDraw(nnx.Variable):
    """The draw of evaluation and decoding: saved with the model, but not trained like an `nnx.Param`."""


class CausalSelfAttention(nnx.Module):
    """Causal self-attention: dense, inside hash buckets, among random subsets, in a window, and other kinds.

    Source: Pagliardini et al. 2023. With `Hash`, keys are the L2-normalised queries of their head, and a token does not
    attend to itself. In training each call draws new rotations or keep masks, from the module's own stream (a fork of
    "sparsity" in `rngs`) or from one that the call is given, unless it is given those of `draw`. At evaluation `Hash`
    uses the rotations kept in `self.rotations`, and `Drop` keeps everything.

    **Save these with the parameters**: what a kind keeps is a `KeptDraw`, not an `nnx.Param`. A checkpoint that
    restores the parameters alone evaluates with other rotations or centroids.

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
        sparsity: A kind: `Hash(num_buckets)`, `Drop(rate)`, `Window(window)`, `SparseK(num_keys, window)` and others;
            None for dense attention.
        share_query_key: Whether keys are made of the queries instead of a projection of their own; if None,
            only where the kind of sparsity asks for it, as `Hash` does.
        normalize_key: Whether keys are scaled to unit length; if None, only where the kind of sparsity asks for it.
        rotary: A rotary embedding, as `scfa_jax.nnx.rotary`. It is called with queries or keys `[B, T, heads, H]` and
            int32 positions `[1 or B, T]` before anything else happens to them, and returns an array like the first.
        logits_soft_cap: Static cap of the logits, `cap * tanh(logit / cap)` as in Gemma 2; None for none.
        use_sink_logits: Whether each head learns a logit that stands in the denominator of its softmax for no key, as
            in gpt-oss; it begins at 0.
        use_bias: Whether the projections have biases.
        dtype: Of the computation; inferred from inputs and parameters if None.
        param_dtype: Of the parameters.
        kernel_init: Of the kernels.
        out_kernel_init: Of the output projection's kernel; `kernel_init` if None.
        bias_init: Of the biases.
        deterministic: Whether to evaluate rather than train; set by `train()` and `eval()` too.
        decode: Whether to use the cache, which is to evaluate too.
        implementation: What computes: "triton", "triton_interpret", "xla", a sequence of these to try in order, or None
            to choose by the platform that the code is compiled for.
        rngs: Streams "params" and, for kinds that draw, "sparsity" (or "default").

    Raises:
        ValueError: The heads do not divide what they must, the kind does not go with them, or `rngs` lacks a stream.
        TypeError: `sparsity` is no kind.

    Examples:
        >>> import jax
        >>> from flax import nnx
        >>> from scfa_jax.nnx import CausalSelfAttention, Hash
        >>> layer = CausalSelfAttention(32, num_heads=2, sparsity=Hash(num_buckets=4), rngs=nnx.Rngs(0))
        >>> x = jax.random.normal(jax.random.key(0), (1, 64, 32))
        >>> layer(x).shape, layer(x, deterministic=True).shape
        ((1, 64, 32), (1, 64, 32))
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        *,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        sparsity: Kind | None = None,
        share_query_key: bool | None = None,
        normalize_key: bool | None = None,
        rotary: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
        logits_soft_cap: float | None = None,
        use_sink_logits: bool = False,
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
            in_features,
            num_heads,
            num_key_value_heads,
            head_dim,
            Dense() if sparsity is None else sparsity,
            share_query_key,
            normalize_key,
        )
        self.logits_soft_cap = logits_soft_cap
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
        kind = self.layout.kind
        for name, (init, shape) in kind.parameters(self.layout).items():
            setattr(self, name, nnx.Param(init(rngs.params(), shape, param_dtype)))
        self.sink_logits = nnx.data(None)
        if use_sink_logits:
            self.sink_logits = nnx.data(nnx.Param(jnp.zeros((self.layout.num_heads,), param_dtype)))
        drawn = self._new_draw(1, 1, rngs) if kind.kept else {}
        for name in kind.kept:
            setattr(self, name, KeptDraw(drawn[name]))
        # The module's own stream, as in `nnx.Dropout`; a call may be given another, or a draw.
        has_stream = kind.draws(deterministic=False) and (RNG_STREAM in rngs or "default" in rngs)
        self.rngs = nnx.data(rngs[RNG_STREAM].fork() if has_stream else None)
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
        cache = self.layout.kind.empty_cache(self.layout, input_shape[0], input_shape[1], dtype)
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
            rngs: Streams with "sparsity", one stream, or a key, for a new draw; the module's own stream if None.

        Returns:
            Arrays by name, as many as the kind draws: `{}`, `{"rotations": float32 [K, H, num_buckets // 2]}`, or
            `{"query_keep": bool [B, T, N], "key_keep": bool [B, T, K]}`.

        Raises:
            ValueError: A new draw is needed and there is no stream.
        """
        deterministic = self.deterministic if deterministic is None else deterministic
        kind = self.layout.kind
        if kind.draws(deterministic):
            return self._new_draw(batch_size, length, self.rngs if rngs is None else rngs)
        return {name: getattr(self, name)[...] for name in kind.kept}

    def __call__(
        self,
        x: Float[Array, "B T E"],
        *,
        deterministic: bool | None = None,
        decode: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
        positions: Int[Array, "#B T"] | None = None,
        segment_ids: Int[Array, "#B T"] | None = None,
        **draw: jax.Array,
    ) -> Float[Array, "B T E"]:
        """Attends.

        Args:
            x: The tokens.
            deterministic: Whether to evaluate; `self.deterministic` if None.
            decode: Whether the `T` tokens follow those in the cache, whatever `deterministic` says; `self.decode` if
                None. Past the cache's end outputs are NaN.
            rngs: Streams with "sparsity", one stream, or a key, for a new draw; the module's own stream if None.
            positions: int32, for `rotary`, without which they raise; 0 to `T - 1` if None, and what follows the cache
                in decoding.
            segment_ids: int32: tokens attend to those of their own id, and not at all with an id below 0 (padding).
                Positions for `rotary` are not counted anew in each segment. Not in decoding.
            **draw: What `draw` returns, or arrays like it: `rotations`, float32 `[K, H, num_buckets // 2]`, with
                `Hash`; `query_keep`, bool `[B, T, N]`, and `key_keep`, bool `[B, T, K]`, with `Drop`. Drawn here if
                left out.

        Returns:
            An array like `x`.

        Raises:
            ValueError: A shape does not fit, a draw does not go with the kind, there is no stream to draw from, or no
                cache to decode with.
            TypeError: The cache has another dtype than the computation.
            NotImplementedError: There are segments in decoding, or the kind cannot decode.
        """
        layout = self.layout
        layout.check_input("x", x.shape)
        in_decoding = self.decode if decode is None else decode
        given = layout.checked_draw(draw)
        given = given or self.draw(*x.shape[:2], deterministic=in_decoding or deterministic, rngs=rngs)
        state = {**given, **self.own_parameters()}
        options: dict[str, Any] = {"implementation": self.implementation, "logits_soft_cap": self.logits_soft_cap}
        if self.sink_logits is not None:
            options["sink_logits"] = self.sink_logits[...]

        query, value = self.query(x), self.value(x)
        key = None if layout.share_query_key else self.key(x)
        cache = self._cache() if in_decoding else {}
        start = cache.get("cache_index", 0)
        heads = layout.heads(query, key, value, tokens=x, rotary=self.rotary, positions=positions, start=start)
        if not in_decoding:
            return self.out(layout.kind.attend(heads, state, segment_ids=segment_ids, **options))
        if segment_ids is not None:
            raise NotImplementedError(
                "segment_ids must be None in decoding: a cache holds one sequence per batch element."
            )
        output, cache = layout.kind.attend_next(cache, heads, state, **options)
        for name, x in cache.items():
            getattr(self, name)[...] = x
        return self.out(output)

    def own_parameters(self) -> State:
        """Tells the parameters of the kind.

        Returns:
            By the names of `Kind.parameters`; none in most kinds.
        """
        return {name: getattr(self, name)[...] for name in self.layout.kind.parameters(self.layout)}

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

    def _new_draw(self, batch_size: int, length: int, rngs: Any) -> State:
        if isinstance(rngs, nnx.Rngs) and (RNG_STREAM in rngs or "default" in rngs):
            rngs = rngs[RNG_STREAM]
        if isinstance(rngs, nnx.RngStream):
            rngs = rngs()
        if not isinstance(rngs, jax.Array):
            got = f"the streams {list(rngs)}" if isinstance(rngs, nnx.Rngs) else repr(rngs)
            raise ValueError(
                f"rngs must have the stream {RNG_STREAM!r} for a draw of {self.layout.kind}, as in "
                f"nnx.Rngs({RNG_STREAM}=0); got {got}."
            )
        return self.layout.kind.draw(rngs, batch_size, length, self.layout)
