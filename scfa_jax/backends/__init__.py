"""The backends, and the one place that chooses among them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax

from scfa_jax.backends.protocol import Backend, Call
from scfa_jax.backends.triton import Triton
from scfa_jax.backends.xla import Xla

BACKENDS: tuple[Backend, ...] = (Triton(), Triton(interpret=True), Xla())
"""All of them. Of those that can do the work, `implementation=None` takes the first for each platform."""

Implementation: TypeAlias = str | Sequence[str] | None


@dataclass(frozen=True)
class Choice:
    """Which backend computes a call.

    Attributes:
        on_cuda: Where the code is compiled for CUDA; None for no difference.
        elsewhere: On all other platforms.
    """

    on_cuda: Backend | None
    elsewhere: Backend


def choose(implementation: Implementation, call: Call) -> Choice:
    """Chooses by what was asked for, what the backends can do, and, for None, what code will be compiled for.

    Args:
        implementation: The name of a backend, names to try in order, or None.
        call: What is to be computed.

    Returns:
        The choice.

    Raises:
        ValueError: There is no such backend.
        NotImplementedError: None of those that were named can do it.
    """
    if implementation is None:
        able = [b for b in BACKENDS if b.is_default and b.missing(device=False) is None and b.problem(call) is None]
        on_cuda = [backend for backend in able if backend.platform == "cuda"]
        elsewhere = [backend for backend in able if backend.platform is None]
        return Choice(on_cuda[0] if on_cuda else None, elsewhere[0])
    problems = []
    for backend in _named(implementation):
        problem = backend.problem(call) or backend.missing(device=True)
        if problem is None:
            return Choice(None, backend)
        problems.append(f'implementation "{backend.name}" cannot do this: {problem}')
    raise NotImplementedError("; ".join(problems) + '. "xla" runs anywhere.')


def for_small_kernels(implementation: Implementation) -> Backend | None:
    """The backend whose small kernels may prepare an index where the code is compiled for CUDA; None for none."""
    candidates = [b for b in BACKENDS if b.is_default] if implementation is None else _named(implementation)
    able = (b for b in candidates if b.platform == "cuda" and b.missing(device=False) is None)
    return next(able, None)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # else each call outside of jit compiles its loops again
def by_platform(choice: Choice, function: Callable[..., Any], call: Call, *arrays: Any) -> Any:
    """Calls `function(backend, call, *arrays)` with the backend of the platform that the code is compiled for."""
    run = lambda backend: functools.partial(function, backend, call)
    if choice.on_cuda is None:
        return run(choice.elsewhere)(*arrays)
    return jax.lax.platform_dependent(*arrays, cuda=run(choice.on_cuda), default=run(choice.elsewhere))


def _named(implementation: str | Sequence[str]) -> list[Backend]:
    by_name = {backend.name: backend for backend in BACKENDS}
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    if not names or any(name not in by_name for name in names):
        raise ValueError(
            f"implementation must be one of {tuple(by_name)}, a sequence of them, or None, got {implementation!r}."
        )
    return [by_name[name] for name in names]
