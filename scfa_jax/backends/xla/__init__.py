"""Tile loops in plain JAX: for CPUs, TPUs, and GPUs and head sizes that no kernel takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from scfa_jax.backends.xla import attention, decode


@dataclass(frozen=True)
class Xla:
    """See `Backend`."""

    name: ClassVar[str] = "xla"
    platform: ClassVar[str | None] = None
    is_default: ClassVar[bool] = True

    def problem(self, call):
        return None

    def missing(self, *, device):
        return None

    def forward(self, call, inputs, dtype):
        return attention.forward(call, inputs, dtype)

    def backward(self, call, inputs, residuals, dtype):
        return attention.backward(call, inputs, residuals, dtype)

    def decode(self, call, query, key, value, run):
        return decode.forward(call, query, key, value, run)

    def sorter(self, num_buckets):
        return None

    def range_finder(self):
        return None

    def block_chooser(self, head_dim, k, by):
        return None
