"""What is measured: a case is an operator on a shape with a pattern; targets say how fast it should be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

FORWARD = "forward"
FORWARD_BACKWARD = "forward + backward"
PASSES = (FORWARD, FORWARD_BACKWARD)

Pattern = Literal["causal", "hash", "keep", "window", "moba", "blocks"]


@dataclass(frozen=True)
class Target:
    """A speed-up over the baseline, taken as met within 3%.

    Attributes:
        at_least: The least that is asked for.
        aim: What would be good.
    """

    at_least: float
    aim: float | None = None


@dataclass(frozen=True)
class TimeLimit:
    """A time at most, measured against another case of the same run, with no allowance.

    Attributes:
        of: Name of the other case.
        factor: The limit is the other case's time times this factor ...
        per_pair: ... and, if True, times the ratio of allowed pairs ...
        extra_ms: ... plus these milliseconds.
    """

    of: str
    factor: float = 1.0
    per_pair: bool = False
    extra_ms: float = 0.0


@dataclass(frozen=True)
class Case:
    """One operator on one shape with one pattern.

    Attributes:
        name: Unique within a suite.
        pattern: Which operator.
        length: Queries, and keys.
        batch: Batch size.
        heads: Heads of queries.
        head_dim: Width of a head.
        key_heads: Heads of keys, where they are fewer.
        parameter: Buckets, the probability of being kept, the width of the window, or the size of a block.
        chosen: Blocks that a query chooses beside its own: by MoBA, or drawn beforehand for a group of heads (blocks).
        zipf: Exponent of the skewed sizes of buckets; 0 is uniform.
        promise: Whether `num_buckets` is given.
        shared: Whether the keys' ids are those of the queries (`key_hash=None`).
        dtype: dtype of query, key and value.
        implementation: Of scfa_jax; None leaves it to the library.
        passes: Which of `PASSES` to measure.
        peers: What to measure beside the baseline, where it is installed; names as in `benchmarks.calls`.
        targets: By pass.
    """

    name: str
    pattern: Pattern
    length: int
    batch: int = 1
    heads: int = 12
    head_dim: int = 64
    key_heads: int | None = None
    parameter: float = 0
    chosen: int = 0
    zipf: float = 0
    promise: bool = True
    shared: bool = False
    dtype: str = "bfloat16"
    implementation: str | None = None
    passes: tuple[str, ...] = PASSES
    peers: tuple[str, ...] = ()
    targets: Mapping[str, Target | TimeLimit] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the query."""
        return self.batch, self.length, self.heads, self.head_dim

    @property
    def key_shape(self) -> tuple[int, int, int, int]:
        """Shape of key and value."""
        return self.batch, self.length, self.key_heads or self.heads, self.head_dim

    @property
    def label(self) -> str:
        """The pattern in words, the same at every length."""
        text = {
            "causal": "dense causal",
            "hash": f"{self.parameter:g} buckets",
            "keep": f"{self.parameter:g} kept",
            "window": f"window of {self.parameter:,g}",
            "moba": f"MoBA, {self.chosen} blocks of {self.parameter:g} and the own",
            "blocks": f"{self.chosen} blocks of {self.parameter:g} and the own, given",
        }[self.pattern]
        details = [f"Zipf {self.zipf:g}"] if self.zipf else []
        if self.pattern == "hash" and not self.promise:
            details.append("no promise")
        if self.shared:
            details.append("key_hash=None")
        if self.key_heads:
            details.append(f"{self.key_heads} key heads")
        return text + (f" ({', '.join(details)})" if details else "")

    def as_json(self) -> dict[str, Any]:
        """All of it but the targets, which go to the passes."""
        values = dataclasses.asdict(dataclasses.replace(self, targets={}))
        del values["targets"], values["name"]
        return {**values, "label": self.label}


def shape_name(length: int, batch: int, heads: int, head_dim: int) -> str:
    """A shape as the names of cases have it: `16k-2x12x64`."""
    tokens = f"{length // 1024}k" if length % 1024 == 0 else str(length)
    return f"{tokens}-{batch}x{heads}x{head_dim}"
