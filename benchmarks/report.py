"""Results as text: a table in Markdown, and a line for every case as it is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.breakeven import break_evens
from benchmarks.calls import OURS
from benchmarks.cases import FORWARD, FORWARD_BACKWARD, PASSES
from benchmarks.targets import milliseconds


def table(results: dict[str, Any]) -> str:
    """The results as Markdown: a row for each case, and below it what was left out or failed.

    Args:
        results: As `benchmarks.results.read` gives them.
    """
    where = results["environment"]
    heading = f"{where['device']}, JAX {where['jax']}, commit {where['commit'][:10]}{_dirty(where)}, {where['date']}"
    elsewhere = {row["environment"]["commit"][:10] for row in results["rows"] if "environment" in row}
    if elsewhere:
        heading += f"; rows taken over from earlier runs, of {', '.join(sorted(elsewhere))}"
    parts = [heading, "", *(_phase_tables(results["rows"]) if results["suite"] == "phases" else _rows(results))]
    problems = [f"- {row['name']}, {which}: {problem}" for row in results["rows"] for which, problem in _problems(row)]
    if problems:
        parts += ["", "Failed, or wrong:", "", *problems]
    if results["left_out"]:
        parts += ["", f"Left out ({results['left_out_because']}): {', '.join(results['left_out'])}."]
    return "\n".join(parts)


def line(row: dict[str, Any]) -> str:
    """One case in one line."""
    parts = [f"{row['name']}: {row['status']}"]
    for which, record in row["passes"].items():
        ours = milliseconds(record)
        if ours is not None:
            speedup = f" ({record['speedup']:.2f}x {record['baseline']})" if "speedup" in record else ""
            worst = max((float(e) for e in record["check"]["errors"].values()), default=0.0)
            parts.append(f"{which} {ours:.4g} ms{speedup}{_verdict(record)}, error {worst:.1e}")
    parts += [f"{which}: {problem}" for which, problem in _problems(row)]
    return "; ".join(parts) + f" [{row['seconds']:.0f} s]"


def _rows(results: dict[str, Any]) -> list[str]:
    rows = results["rows"]
    baseline = next((r["baseline"] for row in rows for r in row["passes"].values() if "baseline" in r), "baseline")
    head = ["work", "shape"]
    for which in PASSES:
        head += [f"{which}, ms", f"{baseline}, ms", "speed-up", "target"]
    head += ["density", "tiles", "peak MiB", f"{baseline} MiB", "error"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(_cells(row, baseline)) + " |" for row in rows]
    targets = [r["target"]["met"] for row in rows for r in row["passes"].values() if "target" in r]
    if targets:
        lines += ["", f"{targets.count(True)} of {len(targets)} targets met (speed-ups within 3%)."]
    peers = [text for row in rows for text in _peer_lines(row)]
    if peers:
        lines += ["", "Peers, on the same shapes (tokamax_ranges: the kernel alone, on ready-made ranges):", "", *peers]
    found = break_evens(rows)
    if found:
        lines += ["", "Break-even with the baseline, as a share of the causal pairs:", ""]
        lines += [f"- {curve.title}: {curve.break_even_text()}" for curve in found]
    return lines


def _cells(row: dict[str, Any], baseline: str) -> list[str]:
    case = row["case"]
    batch, heads, width = case["batch"], case["heads"], case["head_dim"]
    cells = [case["label"], f"{case['length']:,} x {batch}x{heads}x{width}"]
    errors = []
    for which in PASSES:
        record = row["passes"].get(which, {"times": {}})
        speedup = f"{record['speedup']:.2f}x" if "speedup" in record else "-"
        if record.get("status") == "wrong":
            speedup = f"WRONG ({speedup})"
        cells += [_number(milliseconds(record)), _number(milliseconds(record, baseline)), speedup, _target(record)]
        errors += [float(error) for error in record.get("check", {"errors": {}})["errors"].values()]
    last = row["passes"].get(FORWARD_BACKWARD) or row["passes"].get(FORWARD, {})
    cells += [
        f"{row['density']:.3f}" if "density" in row else "-",
        f"{row['tiles']['share']:.3f}" if "share" in row.get("tiles", {}) else "-",
        *(_mebibytes(last.get("memory", {}).get(name, {}).get("peak")) for name in (OURS, baseline)),
        f"{max(errors):.1e}" if errors else "-",
    ]
    return cells


def _peer_lines(row: dict[str, Any]) -> list[str]:
    lines = []
    for which, record in row["passes"].items():
        others = {name: milliseconds(record, name) for name in record["times"] if name != record.get("baseline")}
        ours = others.pop(OURS, None)
        known = [f"{name} {_number(time)} ms" for name, time in others.items() if time is not None]
        if known:
            lines.append(f"- {row['name']}, {which}: {OURS} {_number(ours)} ms, {', '.join(known)}")
    return lines


def _target(record: dict[str, Any]) -> str:
    target = record.get("target")
    if target is None:
        return "-"
    if "at_least" in target:
        text = f">= {target['at_least']:g}x" + (f", aim {target['aim']:g}x" if target["aim"] else "")
    else:
        text = "(not measured)" if target["limit_ms"] is None else f"<= {target['limit_ms']:.4g} ms"
    return text + _verdict(record)


def _verdict(record: dict[str, Any]) -> str:
    target = record.get("target") or {"met": None}
    if target["met"] is None:
        return ""
    return (": aim reached" if target["reached_aim"] else ": met") if target["met"] else ": MISSED"


def _problems(row: dict[str, Any]) -> list[tuple[str, str]]:
    problems = [("all", row["error"])] if "error" in row else []
    for which, record in row["passes"].items():
        if record["status"] == "wrong":
            problems.append((which, f"wrong results, errors {record['check']['errors']}"))
        problems += [(which, f"{name}: {t['error']}") for name, t in record["times"].items() if "error" in t]
    problems += [(name, r["error"]) for name, r in row.get("phases", {}).items() if "error" in r]
    return problems


def _phase_tables(rows: Sequence[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row["phases"]))
    lines = ["| ms | " + " | ".join(row["name"] for row in rows) + " |", "|" + " --- |" * (len(rows) + 1)]
    for name in names:
        times = (_number(row["phases"].get(name, {}).get("median_ms")) for row in rows)
        lines.append(f"| {name} | " + " | ".join(times) + " |")
    for which in PASSES:
        outside = (row.get("kernels", {}).get(which, {}).get("outside") for row in rows)
        cells = [_number(time) for time in outside]
        if any(cell != "-" for cell in cells):
            lines.append(f"| outside the attention kernels, {which} | " + " | ".join(cells) + " |")
    return lines


def _number(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds:.4g}"


def _mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:,.0f}"


def _dirty(where: dict[str, Any]) -> str:
    return " (with changes)" if where["dirty"] else ""
