"""`python -m benchmarks.tune` searches for the fastest tiles on this GPU; `--write` puts them into the library.

Every candidate runs the forward and the backward pass at one shape of each head size, dtype and density, and is
timed kernel by kernel, since the three kernels are tuned apart.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import scfa_jax
from benchmarks.profile import kernel_timeline
from scfa_jax import BlockSizes
from scfa_jax.backends.triton import tile_table
from scfa_jax.backends.triton.tile_sizes import TritonTile

KERNELS = ("scfa_forward", "scfa_dq", "scfa_dkv")
TABLE = Path(tile_table.__file__)
LENGTH, COLUMNS = 16_384, 768
CALLS = 12  # the median of the second half counts: an H100 slows down under load

Key = tuple[int, int, str]


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the search.

    Attributes:
        out: File for the times of all candidates, JSON lines.
        write: Whether to write the winners into the library's table.
        time_limit: Seconds after which no new head size is begun; the table keeps what it had for the others.
        widths: Head sizes.
        itemsizes: Bytes per number: 2 is bfloat16, 4 float32.
        densities: Share of pairs that are allowed, as a class, or "blocks" for those that queries choose.
    """

    out: Path = Path("benchmarks/results/tiles.jsonl")
    write: bool = False
    time_limit: float = 420.0
    widths: tuple[int, ...] = (64, 128, 32, 256, 16)
    itemsizes: tuple[int, ...] = (2, 4)
    densities: tuple[str, ...] = ("sparse", "middling", "dense", "blocks")


def candidates(width: int, itemsize: int) -> list[TritonTile]:
    """Tiles worth a try: all that could fit, small ones where a row is long and large ones where it is short."""
    row = width * itemsize
    sides = [(64, 64), (64, 32), (32, 64), (32, 32)]
    if row <= 256:
        sides += [(128, 64), (64, 128), (32, 128), (128, 32)]
    if row >= 1024:
        sides = [(32, 32), (16, 32), (32, 16), (16, 16)]
    elif row >= 512:
        sides += [(64, 16), (16, 64), (32, 16), (16, 32)]
    tiles = [TritonTile(q, k, 4, stages) for q, k in sides for stages in ((2, 3, 4) if row <= 256 else (1, 2, 3))]
    if row <= 512:
        tiles += [TritonTile(128, 64, 8, stages) for stages in (2, 3, 4)]
        tiles += [TritonTile(128, 128, 8, 3), TritonTile(128, 128, 8, 2), TritonTile(64, 64, 8, 2)]
    return tiles


def operator(density: str) -> tuple[Callable[..., Any], Callable[[jax.Array, tuple[int, ...]], tuple[jax.Array, ...]]]:
    """The operator of a density class, and a function that draws its pattern for the shape `[B, T, N]`."""
    if density == "dense":
        return scfa_jax.causal_attention, lambda key, shape: ()
    if density == "blocks":
        return functools.partial(scfa_jax.moba_attention, block_size=512, top_k=4), lambda key, shape: ()
    two = lambda draw: lambda key, shape: tuple(draw(k, shape) for k in jax.random.split(key))
    if density == "middling":
        return scfa_jax.qk_sparse_attention, two(lambda key, shape: jax.random.bernoulli(key, 0.5, shape))
    attend = lambda *args, **options: scfa_jax.hash_sparse_attention(*args, num_buckets=16, **options)
    return attend, two(lambda key, shape: jax.random.randint(key, shape, 0, 16))


def search(key: Key, pool: ThreadPoolExecutor) -> list[dict[str, Any]]:
    """Times all candidates at one head size, dtype and density; those that do not fit the GPU are left out."""
    width, itemsize, density = key
    attend, draw = operator(density)
    dtype = jnp.bfloat16 if itemsize == 2 else jnp.float32
    shape = (2 if itemsize == 2 else 1, LENGTH, max(1, COLUMNS // width), width)
    keys = jax.random.split(jax.random.key(0), 5)
    arrays = tuple(jax.random.normal(k, shape, dtype) for k in keys[:4])
    arguments = (*arrays, *draw(keys[4], shape[:3]))

    def compiled(*tiles: TritonTile):
        def both_passes(query, key, value, cotangent, *pattern):
            run = lambda *qkv: attend(*qkv, *pattern, implementation="triton", block_sizes=BlockSizes(*tiles))
            output, pullback = jax.vjp(run, query, key, value)
            return output, pullback(cotangent)

        try:
            return jax.jit(both_passes).lower(*arguments).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                return None
            raise

    def attempts(tile: TritonTile):
        """The tile in all kernels at once, or else in each that has room for it: (kernels to time, compiled call)."""
        if run := compiled(tile, tile, tile):
            return [(tile, KERNELS, run)]
        small = TritonTile(16, 16, 4, 1)
        alone = [(tile, (name,), compiled(*(tile if n == name else small for n in KERNELS))) for name in KERNELS]
        return [attempt for attempt in alone if attempt[2]]

    tried = [attempt for found in pool.map(attempts, candidates(width, itemsize)) for attempt in found]
    for _, _, run in tried:
        jax.block_until_ready(run(*arguments))

    def all_calls():
        for _, _, run in tried:
            for _ in range(CALLS):
                jax.block_until_ready(run(*arguments))

    durations = defaultdict(list)
    for name, milliseconds in kernel_timeline(all_calls):
        durations[name].append(milliseconds)
    rows = []
    for kernel in KERNELS:
        times = durations[kernel]
        if len(times) != CALLS * len(tried):
            raise RuntimeError(f"the profiler saw {len(times)} runs of {kernel}, expected {CALLS * len(tried)}")
        for i, (tile, kernels, _) in enumerate(tried):
            if kernel in kernels:
                sustained = statistics.median(times[i * CALLS + CALLS // 2 : (i + 1) * CALLS])
                tile_as_list = dataclasses.astuple(tile)
                rows.append({"key": key, "kernel": kernel, "tile": tile_as_list, "ms": round(sustained, 5)})
    return rows


def winners(rows: list[dict[str, Any]]) -> dict[Key, tuple[tuple[int, ...], ...]]:
    """The fastest tile of each kernel, by head size, dtype and density."""
    best: dict[Key, dict[str, tuple[float, tuple[int, ...]]]] = defaultdict(dict)
    for row in rows:
        kernels = best[tuple(row["key"])]
        kernels[row["kernel"]] = min(kernels.get(row["kernel"], (float("inf"), ())), (row["ms"], tuple(row["tile"])))
    return {key: tuple(kernels[name][1] for name in KERNELS) for key, kernels in best.items()}


def source(table: dict[str, dict[Key, tuple[tuple[int, ...], ...]]]) -> str:
    """The text of the library's table, by device."""
    lines = []
    for device, tiles in sorted(table.items()):
        lines += [
            f'    "{device}": {{',
            *(f"        {key!r}: {tiles[key]!r},".replace("'", '"') for key in sorted(tiles)),
        ]
        lines.append("    },")
    return "\n".join(
        [
            '"""The tiles that were fastest in searches. Written by `python -m benchmarks.tune --write`."""',
            "",
            "# By device, and there by (padded head size, bytes per number, density):",
            "# block_q, block_k, num_warps and num_stages of the forward pass, of dq, and of dk with dv.",
            "TABLE: dict[str, dict[tuple[int, int, str], tuple[tuple[int, ...], ...]]] = {",
            *lines,
            "}",
            "",
        ]
    )


def tune(options: Options) -> Iterator[Key]:
    """Searches, and writes what was found after every head size.

    Args:
        options: What to search and where to write.

    Yields:
        Every key that is done.
    """
    rows: list[dict[str, Any]] = []
    head = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    known = _known(options.out, head)
    begin = time.monotonic()
    with ThreadPoolExecutor() as pool:
        for itemsize in options.itemsizes:
            for width in options.widths:
                if time.monotonic() - begin > options.time_limit:
                    return
                for density in options.densities:
                    key = (width, itemsize, density)
                    rows += search(key, pool)
                    yield key
                options.out.parent.mkdir(parents=True, exist_ok=True)
                searched = {row["key"] for row in rows}
                kept = [row for row in known if tuple(row["key"]) not in searched]
                options.out.write_text("".join(json.dumps(line) + "\n" for line in (head, *kept, *rows)))
                if options.write:
                    device = head["device"]
                    found = {**tile_table.TABLE.get(device, {}), **winners(rows)}
                    TABLE.write_text(source({**tile_table.TABLE, device: found}))


def _known(out: Path, head: dict[str, str]) -> list[dict[str, Any]]:
    """The rows of an earlier search on the same kind of GPU with the same JAX."""
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return lines[1:] if lines and lines[0] == head else []


def main() -> int:
    """Runs the search."""
    import tyro

    options = tyro.cli(Options, description=__doc__)
    if jax.default_backend() != "gpu":
        print("error: tiles are tuned on an NVIDIA GPU, and JAX finds none", file=sys.stderr)
        return 2
    begin = time.monotonic()
    for key in tune(options):
        print(f"{time.monotonic() - begin:6.1f} s  head size {key[0]}, {key[1]} bytes, {key[2]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
