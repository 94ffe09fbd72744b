"""Speed-up against density, and the density at which sparsity stops paying."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.cases import PASSES


@dataclass(frozen=True)
class Curve:
    """Speed-ups of cases that differ in their pattern alone.

    Attributes:
        shape: Length, batch, heads, head size.
        which: The pass.
        points: (density, speed-up, label of the pattern), by density.
    """

    shape: tuple[int, int, int, int]
    which: str
    points: tuple[tuple[float, float, str], ...]

    @property
    def title(self) -> str:
        """The curve in words."""
        length, batch, heads, head_dim = self.shape
        return f"{length:,} tokens, {batch}x{heads} heads of {head_dim}, {self.which}"

    def break_even(self) -> float | None:
        """The density where the speed-up falls to 1, interpolated between neighbours on logarithmic scales.

        The first such crossing, from the sparse side; None if there is none between two points.
        """
        for (x0, y0, _), (x1, y1, _) in zip(self.points, self.points[1:], strict=False):
            if y0 >= 1 > y1:
                if x0 == x1:
                    return x0
                share = math.log(y0) / (math.log(y0) - math.log(y1))
                return math.exp(math.log(x0) + share * (math.log(x1) - math.log(x0)))
        return None

    def break_even_text(self) -> str:
        """The break-even in words."""
        crossing, (first, last) = self.break_even(), (self.points[0], self.points[-1])
        if crossing is not None:
            return f"{crossing:.2f}"
        span = f"{first[0]:.3f} to {last[0]:.3f}"
        if all(y >= 1 for _, y, _ in self.points):
            return f"none, faster at all densities measured ({span})"
        if all(y < 1 for _, y, _ in self.points):
            return f"none, slower at all densities measured ({span})"
        return f"none found ({span})"


def curves(rows: Sequence[dict[str, Any]], least: int = 3) -> list[Curve]:
    """The curves of all shapes that were measured with several patterns.

    Args:
        rows: Of the results.
        least: A curve has so many points at least.
    """
    points: dict[tuple[Any, ...], list[tuple[float, float, str]]] = {}
    for row in rows:
        case = row["case"]
        shape = tuple(case[name] for name in ("length", "batch", "heads", "head_dim"))
        for which in PASSES:
            record = row["passes"].get(which, {})
            plain = case.get("promise", True) and not case.get("shared", False)
            if "speedup" in record and record["status"] == "ok" and plain:
                points.setdefault((shape, which), []).append((row["density"], record["speedup"], case["label"]))
    return [
        Curve(shape, which, tuple(sorted(found))) for (shape, which), found in points.items() if len(found) >= least
    ]


def break_evens(rows: Sequence[dict[str, Any]]) -> list[Curve]:
    """The curves that reach from sparse to dense, so that a break-even can be looked for.

    Args:
        rows: Of the results.
    """
    return [curve for curve in curves(rows) if curve.points[0][0] < 0.5 <= curve.points[-1][0]]
