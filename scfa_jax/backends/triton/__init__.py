"""Pallas kernels for Triton: NVIDIA GPUs of compute capability 8.0 and later, or Pallas's interpreter."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from scfa_jax.backends.protocol import Call
from scfa_jax.backends.triton import _compat

MAX_BUCKETS = 256  # for sorting by counting
MAX_CHOSEN = 64  # blocks that a query may choose, which a program keeps in registers


@dataclass(frozen=True)
class Triton:
    """See `Backend`. Modules with kernels are imported when they are called, so that a JAX without Triton has the rest.

    Attributes:
        interpret: Whether to run the kernels as plain JAX, for tests.
    """

    interpret: bool = False

    @property
    def name(self) -> str:
        return "triton_interpret" if self.interpret else "triton"

    @property
    def platform(self) -> str | None:
        return None if self.interpret else "cuda"

    @property
    def is_default(self) -> bool:
        return not self.interpret

    def problem(self, call: Call) -> str | None:
        for size in (call.head_dim, call.value_dim):
            if size % 8 or not 16 <= size <= 256:
                return f"the head size must be a multiple of 8 from 16 to 256, got {size}"
        return None

    def missing(self, *, device: bool) -> str | None:
        return _compat.missing_in_jax() if self.interpret else _compat.missing(device=device)

    def forward(self, call, inputs, dtype):
        from scfa_jax.backends.triton import forward

        return forward.forward(call, inputs, dtype, self.interpret)

    def backward(self, call, inputs, residuals, dtype):
        from scfa_jax.backends.triton import backward

        return backward.backward(call, inputs, residuals, dtype, self.interpret)

    def decode(self, call, query, key, value, run):
        from scfa_jax.backends.triton import decode

        return decode.forward(call, query, key, value, run, self.interpret)

    def sorter(self, num_buckets):
        if num_buckets > MAX_BUCKETS:
            return None
        from scfa_jax.backends.triton import order

        return functools.partial(order.sorted_codes, num_buckets=num_buckets, interpret=self.interpret)

    def range_finder(self):
        from scfa_jax.backends.triton import order

        return functools.partial(order.key_ranges, interpret=self.interpret)

    def block_chooser(self, head_dim, k, by):
        if k > MAX_CHOSEN or head_dim % 8 or not 16 <= head_dim <= 128:
            return None
        from scfa_jax.backends.triton import best_blocks

        if by == "score":
            return functools.partial(best_blocks.best_blocks, interpret=self.interpret)
        return functools.partial(best_blocks.most_important_blocks, interpret=self.interpret)
