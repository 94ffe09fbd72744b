"""The options that operators and indices share: each is said and documented once, here.

Functions take them as `**options: Unpack[...]`, which type checkers and editors spell out. `documented` does the same
for `help()` and notebooks.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, cast

import jax

from scfa_jax.backends import Implementation
from scfa_jax.backends.protocol import BlockSizes
from scfa_jax.backends.tile import Precision

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

Function = TypeVar("Function", bound=Callable[..., Any])


class ImplementationOption(TypedDict, total=False):
    """What computes.

    Attributes:
        implementation: "triton" (Pallas kernels on an NVIDIA GPU; head sizes that are a multiple of 8 from 16 to 256),
            "triton_interpret" (the same kernels in Pallas's interpreter, for tests), "xla" (plain JAX, anywhere), a
            sequence of these to try in order, or None: "triton" where the code is compiled for CUDA and the head size
            allows, else "xla".
    """

    implementation: Implementation


class SegmentOptions(ImplementationOption, total=False):
    """Which documents the rows of a sequence belong to.

    Attributes:
        query_segment_ids: int32 `[B, T]` or `[T]`. Attention stays among equal ids, and rows with an id below 0
            (padding) take no part. Ids may stand in any order. None for one segment.
        key_segment_ids: int32 `[B, S]` or `[S]`, likewise. None means those of the queries, and `S = T`.
    """

    query_segment_ids: Int[Array, "B T"] | Int[Array, " T"] | None
    key_segment_ids: Int[Array, "B S"] | Int[Array, " S"] | None


class PositionOptions(SegmentOptions, total=False):
    """Where the rows of a sequence stand.

    Attributes:
        query_offset: Position of the first query, where keys count from 0: a static int, or int32 `[]` or `[B]`, with
            an absolute value below 2**30 (beyond it an array is clipped). None means 0 and asks for `T = S`: with other
            lengths say 0, or `S - T` so that the last query sees all keys.
    """

    query_offset: int | Int[Array, ""] | Int[Array, " B"] | None


class AttentionOptions(ImplementationOption, total=False):
    """How attention is computed.

    Attributes:
        scale: Static factor of the products of queries and keys, of any sign; `H ** -0.5` if None.
        logits_soft_cap: Static cap of the logits, `cap * tanh(logit / cap)` as in Gemma 2; None for none.
        sink_logits: float `[N]`, a logit of each head that stands in the denominator of its softmax for no key, as in
            gpt-oss; differentiable. It is part of the log-sum-exp, and leaves queries without keys as they are.
        precision: How products of float32 arrays are computed, gradients included; static. "float32": to a relative
            error below 1e-5, whatever the default matmul precision; on a GPU in three TF32 products. "tf32": on a GPU
            in one, of 11 significant bits an operand; elsewhere at least as exactly. 16-bit arrays are not affected.
        block_sizes: Tiles of the kernels; None picks them by head size, dtype, device and density.
        output_dtype: float32, bfloat16 or float16; that of `query` if None. Partial results that are to be merged
            (`merge_attention`) stay exact in float32.
        return_residual: Whether to return the log-sum-exp of the logits too.
    """

    scale: float | None
    logits_soft_cap: float | None
    sink_logits: Float[Array, " N"] | None
    precision: Precision
    block_sizes: BlockSizes | None
    output_dtype: jax.typing.DTypeLike | None
    return_residual: bool


class RangeAttentionOptions(SegmentOptions, AttentionOptions, total=False):
    """Those of attention to given ranges."""


class CausalAttentionOptions(PositionOptions, AttentionOptions, total=False):
    """Those of attention by position."""


def split(options: CausalAttentionOptions | RangeAttentionOptions) -> tuple[PositionOptions, AttentionOptions]:
    """Parts the options of an operator: what its index takes, and what `sparse_attention` does."""
    of_index = {name: x for name, x in options.items() if name in PositionOptions.__annotations__}
    of_attention = {name: x for name, x in options.items() if name in AttentionOptions.__annotations__}
    return cast(PositionOptions, of_index), cast(AttentionOptions, of_attention)


def with_offset(options: PositionOptions, query_offset: Any) -> PositionOptions:
    """The options with another offset."""
    return {**options, "query_offset": query_offset}


def documented(function: Function) -> Function:
    """Spells out the `**options` of a function in its docstring and signature, from the class that they unpack.

    Unknown options raise a `TypeError` that lists the right ones.
    """
    signature = inspect.signature(function)
    *parameters, options = signature.parameters.values()
    names = globals()[re.split(r"[\[\].]", options.annotation)[-2]].__annotations__
    described = {name: text for options in _DOCUMENTED for name, text in _attributes(options.__doc__ or "")}
    text = "\n".join(f"        {name}: {described[name]}" for name in names)
    function.__doc__ = re.sub(r" {8}\*\*options: .*", lambda _: text, function.__doc__ or "", count=1)
    for name, annotation in names.items():
        default = {"precision": "float32", "return_residual": False}.get(name)
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(name, kind, default=default, annotation=annotation))
    known = {parameter.name: None for parameter in parameters}

    @functools.wraps(function)
    def checked(*arguments, **keywords):
        if unknown := keywords.keys() - known:
            raise TypeError(f"{min(unknown)} is no option of {function.__name__}. It takes {', '.join(known)}.")
        return function(*arguments, **keywords)

    checked.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return checked  # type: ignore[return-value]


_DOCUMENTED = (ImplementationOption, SegmentOptions, PositionOptions, AttentionOptions)


def _attributes(docstring: str) -> list[list[str]]:
    """The entries of the section "Attributes" of a docstring: names and what they mean."""
    section = docstring.partition("Attributes:")[2].rstrip()
    return [entry.split(": ", 1) for entry in re.split(r"\n {8}(?=\w)", section)[1:]]
