"""Sparse causal self-attention for Flax Linen."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

try:
    from flax import linen as nn
    from flax.linen.module import merge_param
except ImportError as error:
    raise ImportError("scfa_jax.linen needs Flax: pip install 'scfa-jax[flax]'.") from error

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
COLLECTION = "sparsity"
CACHE = "cache"


class CausalSelfAttention(nn.Module):
    """Causal self-attention: dense, inside hash buckets, among random subsets, in a window, and other kinds.

    Source: Pagliardini et al. 2023. With `Hash`, keys are the L2-normalised queries of their head, and a token does not
    attend to itself. In training each call draws new rotations or keep masks from the rng stream "sparsity", unless it
    is given those of `draw`. At evaluation `Hash` uses the rotations kept in the collection "sparsity" since `init`,
    and `Drop` keeps everything.

    **Save the collection "sparsity" with the parameters**: a checkpoint that restores "params" alone evaluates with
    other rotations or centroids.

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
        sparsity: A kind: `Hash(num_buckets)`, `Drop(rate)`, `Window(window)`, `SparseK(num_keys, window)` and others;
            None for dense attention.
        share_query_key: Whether keys are made of the queries instead of a projection of their own; if None,
            only where the kind of sparsity asks for it, as `Hash` does.
        normalize_key: Whether keys are scaled to unit length; if None, only where the kind of sparsity asks for it.
        rotary: A rotary embedding, as `scfa_jax.linen.rotary`. It is called with queries or keys `[B, T, heads, H]` and
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
        deterministic: Whether to evaluate rather than train; here or in the call, if there is a sparsity.
        decode: Whether to use the cache, which is to evaluate too, whatever `deterministic` says.
        implementation: What computes: "triton", "triton_interpret", "xla", a sequence of these to try in order, or None
            to choose by the platform that the code is compiled for.

    Raises:
        ValueError: The heads do not divide what they must, or the kind does not go with them.
        TypeError: `sparsity` is no kind.

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
    sparsity: Kind | None = None
    share_query_key: bool | None = None
    normalize_key: bool | None = None
    rotary: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    logits_soft_cap: float | None = None
    use_sink_logits: bool = False
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
            Dense() if self.sparsity is None else self.sparsity,
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
        kind = self.layout.kind
        self.own_parameters = {
            name: self.param(name, init, shape, self.param_dtype)
            for name, (init, shape) in kind.parameters(self.layout).items()
        }
        self.sink_logits = None
        if self.use_sink_logits:
            zeros = nn.initializers.zeros_init()
            self.sink_logits = self.param("sink_logits", zeros, (self.layout.num_heads,), self.param_dtype)
        # Training needs no kept draw: `{"params": ...}` alone is enough there.
        if self.is_initializing() and kind.kept:
            drawn = self._new_draw(1, 1)
            for name in kind.kept:
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
            Arrays by name, as many as the kind draws: `{}`, `{"rotations": float32 [K, H, num_buckets // 2]}`, or
            `{"query_keep": bool [B, T, N], "key_keep": bool [B, T, K]}`.

        Raises:
            ValueError: `deterministic` is given neither or both here and to the module, or the collection
                "sparsity" is missing at evaluation where the kind keeps a draw.
            flax.errors.InvalidRngError: A new draw is needed and there is no stream "sparsity".
        """
        kind = self.layout.kind
        draws = kind.draws(deterministic=False)
        if draws != kind.draws(deterministic=True):
            draws = kind.draws(self.decode or merge_param("deterministic", self.deterministic, deterministic))
        if draws:
            return self._new_draw(batch_size, length)
        for name in kind.kept:
            if not self.has_variable(COLLECTION, name):
                raise ValueError(
                    f"variables must have the collection {COLLECTION!r} at evaluation, "
                    f"where init put the {name} beside 'params'."
                )
        return {name: self.get_variable(COLLECTION, name) for name in kind.kept}

    def __call__(
        self,
        x: Float[Array, "B T E"],
        *,
        deterministic: bool | None = None,
        positions: Int[Array, "#B T"] | None = None,
        segment_ids: Int[Array, "#B T"] | None = None,
        **draw: jax.Array,
    ) -> Float[Array, "B T E"]:
        """Attends.

        Args:
            x: The tokens.
            deterministic: Whether to evaluate, unless the module says so.
            positions: int32, for `rotary`, without which they raise; 0 to `T - 1` if None, and what follows the cache
                in decoding.
            segment_ids: int32: tokens attend to those of their own id, and not at all with an id below 0 (padding).
                Positions for `rotary` are not counted anew in each segment. Not in decoding.
            **draw: What `draw` returns, or arrays like it: `rotations`, float32 `[K, H, num_buckets // 2]`, with
                `Hash`; `query_keep`, bool `[B, T, N]`, and `key_keep`, bool `[B, T, K]`, with `Drop`. Drawn here if
                left out.

        Returns:
            An array like `x`; in decoding NaN past the cache's end.

        Raises:
            ValueError: A shape does not fit, a draw does not go with the kind, there is no cache to decode with, or
                `deterministic` is given neither or both here and to the module where it matters.
            TypeError: The cache has another dtype than the computation.
            NotImplementedError: There are segments in decoding, or the kind cannot decode.
        """
        layout = self.layout
        layout.check_input("x", x.shape)
        given = layout.checked_draw(draw) or self.draw(*x.shape[:2], deterministic=deterministic)
        state = {**given, **self.own_parameters}
        options: dict[str, Any] = {"implementation": self.implementation, "logits_soft_cap": self.logits_soft_cap}
        if self.sink_logits is not None:
            options["sink_logits"] = self.sink_logits

        query, value = self.query(x), self.value(x)
        key = None if layout.share_query_key else self.key(x)
        in_decoding = self.decode and not self.is_initializing()
        cache = self._cache() if in_decoding else {}
        start = cache.get("cache_index", 0)
        heads = layout.heads(query, key, value, tokens=x, rotary=self.rotary, positions=positions, start=start)
        if not in_decoding:
            if self.decode:
                self._put_cache(layout.kind.empty_cache(layout, x.shape[0], x.shape[1], value.dtype))
            return self.out(layout.kind.attend(heads, state, segment_ids=segment_ids, **options))
        if segment_ids is not None:
            raise NotImplementedError(
                "segment_ids must be None in decoding: a cache holds one sequence per batch element."
            )
        output, cache = layout.kind.attend_next(cache, heads, state, **options)
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

    def _new_draw(self, batch_size: int, length: int) -> State:
        return self.layout.kind.draw(self.make_rng(RNG_STREAM), batch_size, length, self.layout)
