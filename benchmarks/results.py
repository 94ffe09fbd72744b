"""Results as JSON: what ran where, written whole after every case."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax
import jaxlib

FORMAT = 1
_ROOT = Path(__file__).resolve().parent.parent


def environment(command: str) -> dict[str, Any]:
    """What the results depend on besides the code, and which code it was.

    Args:
        command: The command line.
    """
    device = jax.devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else _cpu_name(),
        "platform": device.platform,
        "cpus": os.cpu_count(),
        "driver": _driver(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        **_commit(),
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def device_slug() -> str:
    """The device's name as a folder: `nvidia-h100-80gb-hbm3`."""
    device = jax.devices()[0]
    name = "cpu" if device.platform == "cpu" else device.device_kind
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "device"


def write(path: Path, results: dict[str, Any]) -> None:
    """Replaces a file by the results, in one step.

    Args:
        path: The file.
        results: What to write; numbers that are not finite become text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(results), indent=1, allow_nan=False)
    # Lists of plain numbers take one line.
    text = re.sub(r"\[[^\[\]{}\"]*\]", lambda m: re.sub(r"\s+", " ", m[0]).replace("[ ", "[").replace(" ]", "]"), text)
    part = path.with_suffix(".part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)


def read(path: Path) -> dict[str, Any]:
    """Reads results.

    Args:
        path: A file of `write`.

    Raises:
        ValueError: It is none.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as results: {error}") from None
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        raise ValueError(f"{path} holds no results of this version of the benchmarks")
    return results


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _commit() -> dict[str, Any]:
    """The commit, and whether the tree differs from it; SCFA_COMMIT names it where there is no repository."""
    named = os.environ.get("SCFA_COMMIT")
    head = _output("git", "rev-parse", "HEAD")
    if named or head is None:
        return {"commit": named or "unknown", "dirty": None}
    # Results themselves are no part of the code.
    changes = _output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {"commit": head, "dirty": None if changes is None else bool(changes)}


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    lines = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return lines.splitlines()[0].strip() if lines else None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "cpu"


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
