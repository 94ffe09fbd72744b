"""The language in which one line says what attention each layer has, as in `window(512)*5, hash(16)`.

A kind is a name with its parameters, like a call of the class that it stands for; `*5` repeats it. Parameters of a
class that begin with `num_` may leave that out. The line is read as Python's own grammar, and nothing in it is run.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from models.controls import Cudnn, Identity, OracleBlocks, Permutation, RandomBlocks
from models.reformer import Reformer
from scfa_jax.layers import (
    NSA,
    BigBird,
    Dense,
    Drop,
    Fixed,
    Hash,
    Kind,
    KMeans,
    LearnedRotations,
    Longformer,
    MoBA,
    Rotations,
    SparseK,
    Strided,
    Window,
)

KINDS: dict[str, type[Kind]] = {
    "dense": Dense,
    "cudnn": Cudnn,
    "hash": Hash,
    "drop": Drop,
    "sparsek": SparseK,
    "moba": MoBA,
    "nsa": NSA,
    "window": Window,
    "longformer": Longformer,
    "bigbird": BigBird,
    "strided": Strided,
    "fixed": Fixed,
    "reformer": Reformer,
    "identity": Identity,
    "random_blocks": RandomBlocks,
    "oracle_blocks": OracleBlocks,
}
"""The kinds of layers by their names on the command line."""

WAYS_TO_HASH: dict[str, type] = {
    "rotations": Rotations,
    "learned": LearnedRotations,
    "kmeans": KMeans,
    "permutation": Permutation,
}
"""What `by=` of a hash takes."""

EXAMPLE = "window(512)*5, hash(16)"


@dataclass(frozen=True)
class LayerKind:
    """What attention a layer has.

    Attributes:
        kind: What happens between its projections.
        share_query_key: Whether keys are the queries, with no projection of their own; None: as the kind asks for it.
        normalize_key: Whether the keys of each head have unit length; None: likewise.
    """

    kind: Kind
    share_query_key: bool | None = None
    normalize_key: bool | None = None


OF_EVERY_KIND = ("share_query_key", "normalize_key")


@functools.lru_cache
def parse(text: str) -> tuple[LayerKind, ...]:
    """Reads what `--attention` was given.

    Args:
        text: As in `EXAMPLE`.

    Returns:
        One entry for each layer that it names.

    Raises:
        ValueError: It cannot be read, or a kind refuses its parameters; in one line that says what is right.
    """
    try:
        tree = ast.parse(" ".join(text.split()), mode="eval").body
    except (SyntaxError, ValueError):
        raise ValueError(f"{text!r} cannot be read. Write kinds and their parameters, as in {EXAMPLE}.") from None
    entries = tree.elts if isinstance(tree, ast.Tuple) else [tree]
    if not entries:
        raise ValueError(f"it names no kind. Write one or more, as in {EXAMPLE}.")
    return tuple(layer for entry in entries for layer in _repeated(entry))


def text_of(layers: Sequence[LayerKind]) -> str:
    """Writes kinds so that `parse` reads them."""
    return ", ".join(
        _call_of(layer.kind, {name: getattr(layer, name) for name in OF_EVERY_KIND if getattr(layer, name) is not None})
        for layer in layers
    )


def _call_of(made: Any, more: dict[str, Any]) -> str:
    name = next(name for name, kind in {**KINDS, **WAYS_TO_HASH}.items() if kind is type(made))
    given = {
        field.name: getattr(made, field.name)
        for field in dataclasses.fields(made)
        if field.default is dataclasses.MISSING or getattr(made, field.name) != field.default
    }
    arguments = ", ".join(f"{key}={_written(value)}" for key, value in {**given, **more}.items())
    return f"{name}({arguments})" if arguments else name


def _written(value: Any) -> str:
    return _call_of(value, {}) if type(value) in WAYS_TO_HASH.values() else repr(value)


def _repeated(node: ast.expr) -> list[LayerKind]:
    count: Any = 1
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        number, node = node.right, node.left
        count = number.value if isinstance(number, ast.Constant) else None
        if type(count) is not int or count < 1:
            raise ValueError(
                f"a kind is repeated by a number of at least 1, as in {EXAMPLE}; got {ast.unparse(number)}."
            )
    name, arguments, keywords = _called(node)
    if name not in KINDS:
        raise ValueError(f"the kinds are {', '.join(KINDS)}; got {name!r}.")
    of_layer = {key: keywords.pop(key) for key in OF_EVERY_KIND if key in keywords}
    for key, value in of_layer.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}: {key} must be True or False, got {value!r}.")
    return [LayerKind(_made(name, KINDS[name], arguments, keywords), **of_layer)] * count


def _called(node: ast.expr) -> tuple[str, list[Any], dict[str, Any]]:
    """The name of a call, or of a name alone, and its arguments."""
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if not isinstance(call.func, ast.Name) or any(keyword.arg is None for keyword in call.keywords):
        raise ValueError(f"a kind is a name with its parameters, as in {EXAMPLE}; got {ast.unparse(node)!r}.")
    arguments = [_value(argument) for argument in call.args]
    return call.func.id, arguments, {str(keyword.arg): _value(keyword.value) for keyword in call.keywords}


def _value(node: ast.expr) -> Any:
    """A number, a truth value, None, a tuple of these, or a way to hash."""
    if isinstance(node, ast.Name | ast.Call):
        name, arguments, keywords = _called(node)
        if name not in WAYS_TO_HASH:
            raise ValueError(f"the ways to hash are {', '.join(WAYS_TO_HASH)}; got {name!r}.")
        return _made(name, WAYS_TO_HASH[name], arguments, keywords)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise ValueError(f"a parameter is a number, True, False, None or a tuple; got {ast.unparse(node)!r}.") from None


def _made(name: str, kind: type, arguments: list[Any], keywords: dict[str, Any]) -> Any:
    """Calls a class with what was written, or says which parameters it takes."""
    signature = inspect.signature(kind)
    full = {key if key in signature.parameters else f"num_{key}": value for key, value in keywords.items()}
    try:
        signature.bind(*arguments, **full)
    except TypeError:
        takes = ", ".join(
            key if parameter.default is parameter.empty else f"{key}={_written(parameter.default)}"
            for key, parameter in signature.parameters.items()
        )
        got = ", ".join([*map(_written, arguments), *(f"{key}={_written(value)}" for key, value in keywords.items())])
        more = f"; every kind also takes {' and '.join(OF_EVERY_KIND)}" if name in KINDS else ""
        raise ValueError(f"{name} takes ({takes}){more}; got ({got}).") from None
    try:
        return kind(*arguments, **full)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None
