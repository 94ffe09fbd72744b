"""Whether the rows of a run meet their targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.calls import OURS
from benchmarks.cases import Case, Target, TimeLimit

TOLERANCE = 0.03


def judge(rows: Sequence[dict[str, Any]], cases: Mapping[str, Case]) -> None:
    """Writes into each pass of each row what its target says: `target`, with `met` and `reached_aim`.

    Both are None where the time, or that of the case it is compared with, was not measured, or not in the same run: of
    the rows that `--resume` takes over each has the environment of its own. A wrong result meets nothing.

    Args:
        rows: Records of `benchmarks.measure`.
        cases: The cases by name.
    """
    by_name = {row["name"]: row for row in rows}
    for row in rows:
        for which, record in row["passes"].items():
            target = cases[row["name"]].targets.get(which)
            if isinstance(target, Target):
                record["target"] = _speedup(record, target)
            elif target is not None:
                record["target"] = _limit(row, record, by_name.get(target.of), which, target)


def milliseconds(record: Mapping[str, Any], name: str = OURS) -> float | None:
    """The median time of a function in a pass, or None."""
    return record["times"].get(name, {}).get("median_ms")


def _speedup(record: dict[str, Any], target: Target) -> dict[str, Any]:
    speedup = record.get("speedup")
    met = None if speedup is None else speedup >= target.at_least * (1 - TOLERANCE)
    aim = None if speedup is None or target.aim is None else speedup >= target.aim
    return {**dataclasses.asdict(target), "met": _if_right(record, met), "reached_aim": _if_right(record, aim)}


def _limit(row, record, other: dict[str, Any] | None, which: str, target: TimeLimit) -> dict[str, Any]:
    limit = None
    if other is not None and other.get("environment") != row.get("environment"):
        other = None
    other_time = None if other is None else milliseconds(other["passes"].get(which, {"times": {}}))
    if other is not None and other_time is not None:
        pairs = row["pairs"] / other["pairs"] if target.per_pair else 1
        limit = other_time * target.factor * pairs + target.extra_ms
    time = milliseconds(record)
    met = None if time is None or limit is None else time <= limit
    return {**dataclasses.asdict(target), "limit_ms": limit, "met": _if_right(record, met), "reached_aim": None}


def _if_right(record: Mapping[str, Any], met: bool | None) -> bool | None:
    return False if met and record["status"] == "wrong" else met
