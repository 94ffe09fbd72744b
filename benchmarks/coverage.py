"""`python -m benchmarks.coverage` counts what the Reformer's chunks miss of their buckets, by length.

The hashes are drawn, not trained: uniform ones, and those of vectors in clusters of unequal sizes, which fall into
buckets of unequal sizes. Hash attention is counted from its index beside it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks import results
from models.coverage import coverage
from models.reformer import default_chunk_size
from scfa_jax import lsh_hash, random_rotations

HASHES = ("uniform", "clustered")
HEAD_DIM = 64
CLUSTERS, SPREAD = 64, 0.5  # a vector is its cluster's, plus so much noise in every coordinate


@dataclasses.dataclass(frozen=True)
class Options:
    """What to count.

    Attributes:
        out: Folder of the results.
        lengths: Tokens in a sequence.
        chunk_sizes: Tokens in a chunk, whatever the length.
        num_buckets: Buckets, whatever the length.
        heads: Heads, each with rotations of its own.
        seeds: Sequences.
    """

    out: Path = Path("benchmarks/results/coverage")
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16_384, 32_768)
    chunk_sizes: tuple[int, ...] = (64, 128, 256, 512)
    num_buckets: int = 16
    heads: int = 8
    seeds: int = 4


def draw_buckets(hashes: str, seed: int, length: int, heads: int, num_buckets: int) -> jax.Array:
    """Buckets of one sequence.

    Args:
        hashes: "uniform", or "clustered": the angular hashes of vectors around `CLUSTERS` centres, the `i`-th of
            which has a share of `1 / i`.
        seed: Decides all.
        length: `T`.
        heads: `N`.
        num_buckets: Number of buckets.

    Returns:
        int32 `[1, T, N]`.
    """
    keys = jax.random.split(jax.random.key(seed), 4)
    if hashes == "uniform":
        return jax.random.randint(keys[0], (1, length, heads), 0, num_buckets)
    centres = jax.random.normal(keys[0], (heads, CLUSTERS, HEAD_DIM))
    member = jax.random.categorical(keys[1], -jnp.log(jnp.arange(1, CLUSTERS + 1)), shape=(1, length, heads))
    vectors = centres[jnp.arange(heads), member] + SPREAD * jax.random.normal(keys[2], (1, length, heads, HEAD_DIM))
    return lsh_hash(vectors, random_rotations(keys[3], heads, HEAD_DIM, num_buckets))


def count(options: Options) -> list[dict[str, Any]]:
    """Counts every case.

    Args:
        options: What to count.

    Returns:
        One row for each kind of hashes, length and chunk size (None: hash attention): the mean, the least and the
        greatest coverage over sequences and heads, and the mean share of the largest bucket.
    """
    rows = []
    for hashes in HASHES:
        for length in options.lengths:
            default = default_chunk_size(length, options.num_buckets)
            drawn = [
                draw_buckets(hashes, seed, length, options.heads, options.num_buckets) for seed in range(options.seeds)
            ]
            buckets = jnp.concatenate(drawn)
            sizes = jax.nn.one_hot(buckets, options.num_buckets).sum(axis=1)  # [B, N, buckets]
            for method, chunk_size in [
                ("hash", None),
                ("reformer, chunks of 2 T / buckets", default),
                *((f"reformer, chunks of {size}", size) for size in options.chunk_sizes),
            ]:
                found = coverage(buckets, chunk_size=chunk_size)
                rows.append(
                    {
                        "hashes": hashes,
                        "length": length,
                        "method": method,
                        "chunk_size": chunk_size,
                        "coverage": round(float(found.mean()), 6),
                        "least": round(float(found.min()), 6),
                        "greatest": round(float(found.max()), 6),
                        "largest_bucket": round(float(sizes.max(axis=2).mean()) / length, 6),
                    }
                )
    return rows


def plot(record: dict[str, Any], file: Path) -> None:
    """Draws coverage against length, one panel for each kind of hashes, as means between the extremes.

    Args:
        record: What `main` writes.
        file: The picture.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, hashes in zip(figure.subplots(1, 2, sharey=True), HASHES, strict=True):
        rows = [row for row in record["rows"] if row["hashes"] == hashes]
        for method in dict.fromkeys(row["method"] for row in rows):
            _draw(axes, [row for row in rows if row["method"] == method], method)
        axes.set_title(f"{hashes} hashes, {record['num_buckets']} buckets", fontsize="medium")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1024:g}k")
        axes.set_xlabel("tokens in a sequence")
        axes.set_ylim(0, 1.05)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("share of a bucket's earlier tokens attended to")
    figure.axes[1].legend(fontsize="small")
    figure.savefig(file, dpi=120)


def _draw(axes: Axes, rows: Sequence[dict[str, Any]], method: str) -> None:
    lengths = [row["length"] for row in rows]
    (line,) = axes.plot(lengths, [row["coverage"] for row in rows], "o-", markersize=4, label=method)
    least, greatest = ([row[name] for row in rows] for name in ("least", "greatest"))
    axes.fill_between(lengths, least, greatest, color=line.get_color(), alpha=0.15)


def main(argv: Sequence[str] | None = None) -> int:
    """Counts, writes `coverage.json` and draws `coverage.png`.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        The exit code.
    """
    import tyro

    argv = sys.argv[1:] if argv is None else argv
    options = tyro.cli(Options, args=argv, prog="python -m benchmarks.coverage", description=__doc__)
    rows = count(options)
    record = {
        "format": results.FORMAT,
        "environment": results.environment(" ".join(["python -m benchmarks.coverage", *argv])),
        "num_buckets": options.num_buckets,
        "heads": options.heads,
        "seeds": options.seeds,
        "rows": rows,
    }
    file = options.out / "coverage.json"
    results.write(file, record)
    plot(record, file.with_suffix(".png"))
    for row in rows:
        print(f"{row['hashes']:10} {row['length']:6} {row['method']:34} {row['coverage']:.3f}")
    print(f"wrote {file}, {file.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
