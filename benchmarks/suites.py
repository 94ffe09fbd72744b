"""The suites: lists of cases, the most telling first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.cases import FORWARD, FORWARD_BACKWARD, Case, Pattern, Target, TimeLimit, shape_name

ZIPF = 1.1  # of 16 buckets the largest then holds a third


def suite(name: str) -> list[Case]:
    """The cases of a suite.

    Args:
        name: "headline", "blocks", "full", "cpu" or "phases".
    """
    return {"headline": headline, "blocks": blocks, "full": full, "cpu": cpu, "phases": phases}[name]()


def headline() -> list[Case]:
    """The rows that have targets."""
    short, long = {"length": 16384, "batch": 2}, {"length": 65536}
    wide: dict[str, Any] = {"length": 16384, "batch": 2, "heads": 8, "head_dim": 128}
    base = _hash(16, **short, targets=_targets(4.2, 5.5, 5.3, 8))
    uniform = _hash(16, **long, targets=_targets(7.2, 10, 8.5, 12))
    zipf_limit = TimeLimit(uniform.name, factor=1.3, per_pair=True)
    more = TimeLimit(base.name, extra_ms=0.1)
    shared = _hash(16, **short, shared=True, targets=_both(TimeLimit(base.name)))
    return [
        base,
        _hash(16, **wide, targets=_targets(4, None, 5.4, 8)),
        uniform,
        _hash(64, **long, targets=_targets(15, 25, 21, 32)),
        _case("keep", 0.5, **short, targets=_targets(1.9, None, 2.1, 3.2)),
        _case("keep", 0.3, **long, targets=_targets(5.3, None, 5.9, 9)),
        _hash(16, **long, zipf=ZIPF, targets=_both(zipf_limit)),
        _case("causal", 0, **short, targets=_targets(0.75, 0.85, 0.72, 0.85)),
        _case("causal", 0, **wide, targets=_targets(0.70, 0.85, 0.70, 0.85)),
        _hash(16, length=4096, batch=8, targets=_targets(1.3, None, 1.3, None)),
        _hash(16, length=2048, batch=8, targets=_targets(1.0, None, 1.0, None)),
        _hash(16, **short, promise=False, targets=_both(more)),
        shared,
        _hash(16, **short, shared=True, promise=False, targets=_both(TimeLimit(shared.name, extra_ms=0.1))),
    ]


def blocks() -> list[Case]:
    """Blocks that queries choose: MoBA with its selection, and the selected branch of NSA with blocks given."""
    nsa: dict[str, Any] = {"chosen": 15, "heads": 32, "key_heads": 2}
    return [
        _case("moba", 512, chosen=3, length=16384, batch=2, targets=_both_passes(2.5, 3.2)),
        _case("moba", 512, chosen=3, length=16384, batch=2, heads=8, head_dim=128, targets=_both_passes(2.6, 3.3)),
        _case("moba", 128, chosen=7, length=16384, batch=2, targets=_both_passes(1.8, 2.6)),
        _case("moba", 512, chosen=7, length=65536, targets=_both_passes(4.5, 6.5)),
        # fla-core 0.6.0 takes 6.40 and 11.1 ms where dense attention takes 8.54 and 35.0 (one H200).
        _case("blocks", 64, length=16384, **nsa, targets=_both_passes(8.54 / 6.40, 2 * 8.54 / 6.40)),
        _case("blocks", 64, length=32768, **nsa, targets=_both_passes(35.0 / 11.1, 2 * 35.0 / 11.1)),
    ]


def phases() -> list[Case]:
    """The cases whose phases are worth a look."""
    names = ("hash16-16k-2x12x64", "hash16-64k-1x12x64", "keep0.5-16k-2x12x64", "causal-16k-2x12x64")
    more = ("hash16-16k-2x8x128", "hash64-64k-1x12x64", "hash16-2k-8x12x64", "keep0.3-64k-1x12x64")
    by_name = {case.name: case for case in headline()}
    return [by_name[name] for name in (*names, *more)]


def full() -> list[Case]:
    """Lengths by patterns by head sizes, trimmed; 32k tokens a call, or one sequence where that is longer."""
    peers = ("tokamax", "tokamax_ranges", "pallas_mha")
    every = [1024 << i for i in range(8)]
    cases = [_hash(16, **_tokens(length)) for length in every[::-1]]

    def densities(length: int) -> list[Case]:
        shape = _tokens(length)
        return [
            _case("causal", 0, **shape),
            _hash(4, **shape),
            _hash(64, **shape),
            *(_case("keep", p, **shape) for p in (0.5, 0.8, 0.2)),
            _case("window", 1024, **shape),
            _hash(16, **shape, zipf=ZIPF),
        ]

    cases += densities(16384) + densities(65536)
    wide = {"heads": 8, "head_dim": 128}
    for length in (16384, 65536, 4096):
        shape = {**_tokens(length), **wide}
        cases += [_hash(16, **shape), _case("causal", 0, **shape), _case("keep", 0.5, **shape)]
    cases += densities(4096)
    cases += [_case("window", 1024, **_tokens(length)) for length in (131072, 32768, 8192, 2048)]
    cases += [_case("keep", 0.5, **_tokens(length)) for length in (131072, 32768, 8192, 2048, 1024)]
    cases += [_case("causal", 0, **_tokens(length)) for length in (32768, 8192, 2048, 1024)]
    with_peers = {"causal-16k-2x12x64", "hash16-16k-2x12x64", "window1024-16k-2x12x64", "causal-4k-8x12x64"}
    return [_with(case, peers=peers) if case.name in with_peers else case for case in cases]


def cpu() -> list[Case]:
    """Plain JAX against the dense matrix, where there is no GPU."""
    shape: dict[str, Any] = {"heads": 2, "dtype": "float32", "implementation": "xla"}
    return [_hash(16, length=length, **shape) for length in (4096, 8192, 16384)]


def _tokens(length: int) -> dict[str, Any]:
    return {"length": length, "batch": max(1, 32768 // length)}


def _hash(buckets: int, **options: Any) -> Case:
    return _case("hash", buckets, **options)


def _case(pattern: Pattern, parameter: float, **options: Any) -> Case:
    case = Case("", pattern, parameter=parameter, **options)
    details = [
        f"{pattern}{parameter:g}" if parameter else pattern,
        *([f"{case.chosen}"] if case.chosen else []),
        *(["zipf"] if case.zipf else []),
        shape_name(case.length, case.batch, case.heads, case.head_dim),
        *([] if case.promise else ["no-promise"]),
        *(["shared"] if case.shared else []),
    ]
    return _with(case, name="-".join(details))


def _with(case: Case, **changes: Any) -> Case:
    return Case(**{**{name: getattr(case, name) for name in Case.__dataclass_fields__}, **changes})


def _targets(forward: float, forward_aim: float | None, both: float, both_aim: float | None) -> Mapping[str, Target]:
    return {FORWARD: Target(forward, forward_aim), FORWARD_BACKWARD: Target(both, both_aim)}


def _both_passes(at_least: float, aim: float) -> Mapping[str, Target]:
    return {FORWARD_BACKWARD: Target(at_least, aim)}


def _both(limit: TimeLimit) -> Mapping[str, TimeLimit]:
    return {FORWARD: limit, FORWARD_BACKWARD: limit}
