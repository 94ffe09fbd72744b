"""`python -m benchmarks.authors FILE` times the paper's own kernels beside ours, in one process, on an NVIDIA GPU.

FILE is `openwebtext2-experiments/src/models/hsparse_attn.py` of a clone of epfml/dynamic-sparse-flash-attention. It
needs PyTorch and Triton. Their call is given what ours is given, the hashes, and does what theirs does from there:
sort, reorder, attend, write back. Theirs is one call on PyTorch's queue with one wait at its end.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import scfa_jax
from benchmarks import results, timing
from benchmarks.cases import FORWARD, FORWARD_BACKWARD

AUTHORS, OURS = "authors", "scfa_jax"
# bfloat16 outputs of two kernels that round differently.
BOUND = 2**-6


@dataclass(frozen=True)
class Options:
    """What to time."""

    file: Annotated[Path, tyro.conf.Positional]
    """The authors' hsparse_attn.py."""
    out: Path | None = None
    """Where the JSON goes; by default authors.json beside the device's other results."""
    length: int = 16_384
    """Tokens."""
    batch: int = 2
    """Sequences."""
    heads: int = 12
    """Heads, of 64 as their kernels require."""
    buckets: int = 16
    """Uniform buckets."""
    samples: int = 9
    """Samples of each, in turns; the median counts."""


def measure(options: Options) -> dict[str, Any]:
    """Times both and compares their results.

    Args:
        options: What to time.

    Returns:
        By pass: the times of both, the ratio, and the largest difference of outputs relative to the largest output.
    """
    rng = np.random.default_rng(0)
    shape = (options.batch, options.length, options.heads, 64)
    arrays = [rng.standard_normal(shape, np.float32) for _ in range(4)]
    hashes = [rng.integers(0, options.buckets, shape[:3], np.int32) for _ in range(2)]
    query, key, value, cotangent = (jnp.asarray(x, jnp.bfloat16) for x in arrays)
    ids = tuple(jnp.asarray(x) for x in hashes)

    def forward(query, key, value, *hashes):
        output = scfa_jax.hash_sparse_attention(
            query, key, value, *hashes, num_buckets=options.buckets, exclude_self=True
        )
        assert isinstance(output, jax.Array)
        return output

    def both(cotangent, query, key, value, *hashes):
        output, pull = jax.vjp(lambda *qkv: forward(*qkv, *hashes), query, key, value)
        return output, *pull(cotangent)

    theirs = _authors(options.file, arrays, hashes)
    ours: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        FORWARD: (forward, (query, key, value, *ids)),
        FORWARD_BACKWARD: (both, (cotangent, query, key, value, *ids)),
    }
    rows: dict[str, Any] = {}
    for which, (function, args) in ours.items():
        compiled = timing.compile_ahead(function, args).function
        calls = {OURS: (compiled, [args]), AUTHORS: (theirs[which], [()])}
        times, errors = timing.take_turns(calls, samples=options.samples)
        if errors:
            raise RuntimeError(f"{which}: {errors}")
        rows[which] = {
            "times": times,
            "authors_over_ours": times[AUTHORS]["median_ms"] / times[OURS]["median_ms"],
        }
    expected = np.asarray(forward(query, key, value, *ids), np.float32)
    got = theirs[FORWARD]().float().cpu().numpy()
    rows["largest_difference"] = float(np.abs(got - expected).max() / np.abs(expected).max())
    return rows


def _authors(file: Path, arrays: list[np.ndarray], hashes: list[np.ndarray]) -> dict[str, Callable[[], Any]]:
    """Their two passes over the same numbers; each waits for its result."""
    import torch

    spec = importlib.util.spec_from_file_location("hsparse_attn", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    per_head = lambda x: torch.from_numpy(x).cuda().transpose(1, 2).contiguous()  # [B, N, T, ...], as they have it
    query, key, value, cotangent = (per_head(x).bfloat16() for x in arrays)
    query_hash, key_hash = (per_head(x).long() for x in hashes)  # as argmax gives them
    leaves = [x.requires_grad_() for x in (query, key, value)]

    def attend():
        ids_of_queries, query_order = query_hash.sort(dim=-1, stable=True)
        ids_of_keys, key_order = key_hash.sort(dim=-1, stable=True)
        rows = lambda x, order: x.gather(-2, order.unsqueeze(-1).expand_as(x)).contiguous()
        output = module.attention(
            rows(query, query_order),
            rows(key, key_order),
            rows(value, key_order),
            query_order.int(),
            key_order.int(),
            ids_of_queries.contiguous(),
            ids_of_keys.contiguous(),
            64**-0.5,
        )
        return torch.zeros_like(output).scatter(-2, query_order.unsqueeze(-1).expand_as(output), output)

    def forward():
        with torch.no_grad():
            output = attend()
        torch.cuda.synchronize()
        return output.transpose(1, 2)

    def both():
        torch.autograd.grad(attend(), leaves, cotangent)
        torch.cuda.synchronize()

    return {FORWARD: forward, FORWARD_BACKWARD: both}


def main() -> int:
    """Runs the comparison and writes its JSON."""
    options = tyro.cli(Options, description=__doc__)
    if jax.default_backend() != "gpu":
        print("error: the authors' kernels need an NVIDIA GPU, and JAX finds none", file=sys.stderr)
        return 2
    rows = measure(options)
    out = options.out or Path("benchmarks/results") / results.device_slug() / "authors.json"
    shape = {name: getattr(options, name) for name in ("length", "batch", "heads", "buckets")}
    environment = results.environment(f"python -m benchmarks.authors {options.file.name}")
    results.write(out, {"format": results.FORMAT, "environment": environment, "shape": shape, **rows})
    for which in (FORWARD, FORWARD_BACKWARD):
        theirs, ours = (rows[which]["times"][name]["median_ms"] for name in (AUTHORS, OURS))
        print(f"{which}: authors {theirs:.3f} ms, ours {ours:.3f} ms, {theirs / ours:.1f}x")
    print(f"largest difference of outputs, relative to the largest: {rows['largest_difference']:.4f}; wrote {out}")
    return 0 if rows["largest_difference"] < BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
