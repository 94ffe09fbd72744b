"""Measures one case: checks its results, times it beside the baseline and its peers, counts tiles and bytes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax

from benchmarks import calls, check, profile, timing
from benchmarks.cases import Case
from benchmarks.inputs import Inputs, make_inputs

INPUT_SETS = 3


@dataclass
class Meter:
    """Measures cases; compiled peers are kept for later cases of the same shape.

    Attributes:
        repeats: Samples of each function.
        profile: Whether to list the kernels of our calls as well.
        tell: Where lines of text go.
    """

    repeats: int = 9
    profile: bool = False
    tell: Callable[[str], None] = print
    _peers: dict[tuple[Any, ...], timing.Compiled] = field(default_factory=dict)

    def measure(self, case: Case) -> dict[str, Any]:
        """Measures a case. What fails is recorded, and nothing is raised but for a user who interrupts.

        Args:
            case: The case.

        Returns:
            The row: `status` is "ok", "wrong" (results differ from the reference) or "failed", the worst of its
            passes.
        """
        start = time.perf_counter()
        row: dict[str, Any] = {"name": case.name, "case": case.as_json(), "status": "ok", "passes": {}}
        try:
            sets = [make_inputs(case, seed) for seed in range(INPUT_SETS)]
            row |= _pattern_facts(case, sets)
            for which in case.passes:
                row["passes"][which] = self._measure_pass(case, which, sets)
            statuses = [record["status"] for record in row["passes"].values()]
            row["status"] = next((s for s in ("wrong", "failed") if s in statuses), "ok")
        except Exception as error:
            row |= {"status": "failed", "error": one_line(error)}
        row["seconds"] = round(time.perf_counter() - start, 2)
        return row

    def _measure_pass(self, case: Case, which: str, sets: list[Inputs]) -> dict[str, Any]:
        record: dict[str, Any] = {"status": "ok", "times": {}, "memory": {}, "compile_s": {}}
        ours, reference = calls.ours(case), calls.baseline(case)
        functions: dict[str, Any] = {}
        for call in (ours, reference, *calls.peers(case)):
            if which not in call.passes:
                continue
            try:
                args = [call.arguments(inputs, which) for inputs in sets]
                compiled = self._compiled(call, which, args[0])
            except Exception as error:
                record["times"][call.name] = {"error": one_line(error)}
                continue
            record["compile_s"][call.name] = round(compiled.seconds, 3)
            record["memory"][call.name] = compiled.memory
            functions[call.name] = (compiled.function, args)
        if ours.name in functions:
            try:
                function, args = functions[ours.name]
                results = function(*args[0])
                results = results if isinstance(results, tuple) else (results,)
                record["check"] = check.spot_check(sets[0], results)
                del results
                if not record["check"]["ok"]:
                    record["status"] = "wrong"
            except Exception as error:
                record["times"][ours.name] = {"error": one_line(error)}
                del functions[ours.name]
        times, errors = timing.take_turns(functions, samples=self.repeats)
        record["times"] |= times | {name: {"error": one_line(error)} for name, error in errors.items()}
        if "error" in record["times"][ours.name]:
            record["status"] = "failed"
        elif "error" not in record["times"][reference.name]:
            record["speedup"] = times[reference.name]["median_ms"] / times[ours.name]["median_ms"]
        record["baseline"] = reference.name
        if self.profile and ours.name in times:
            record["kernels"] = self._kernels(*functions[ours.name])
        return record

    def _compiled(self, call: calls.Call, which: str, args: tuple[Any, ...]) -> timing.Compiled:
        if call.name == calls.OURS:
            return timing.compile_ahead(call.function(which), args)
        key = (call.name, which, *((x.shape, str(x.dtype)) for x in args))
        if key not in self._peers:
            self._peers[key] = timing.compile_ahead(call.function(which), args)
        return self._peers[key]

    def _kernels(self, function: Callable[..., Any], args: list[tuple[Any, ...]]) -> list[Any] | str:
        try:
            times = profile.kernel_times(function, *args[0])
        except Exception as error:
            return one_line(error)
        self.tell(profile.listing(times))
        return [list(row) for row in times]


def one_line(error: BaseException) -> str:
    """What went wrong in one line, without paths of this machine."""
    text = re.sub(r"(?:/[\w.+-]+){2,}/", "", str(error))
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:300]


def _pattern_facts(case: Case, sets: list[Inputs]) -> dict[str, Any]:
    """Allowed pairs (the mean over the sets), density among causal pairs, and the share of tiles visited."""
    pairs = sum(inputs.pattern.pairs() for inputs in sets) / len(sets)
    causal = case.batch * case.heads * case.length * (case.length + 1) // 2
    return {"pairs": pairs, "density": pairs / causal, "tiles": _tiles(case, sets[0])}


def _tiles(case: Case, inputs: Inputs) -> dict[str, Any]:
    """Counts of tiles in all, as the index tells them; a share is of the dense (not the causal) matrix."""
    try:
        build = calls.index(case)
        extra = inputs.extra if inputs.pattern.blocks is None else (inputs.pattern.blocks,)
        stats = jax.jit(lambda *extra: {k: v for k, v in build(*extra).stats().items() if k != "pairs"})(*extra)
        sums = {name: int(count.astype("float64").sum()) for name, count in jax.device_get(stats).items()}
        return {**sums, "share": sums["tiles"] / sums["total"]}
    except Exception as error:
        return {"error": one_line(error)}
