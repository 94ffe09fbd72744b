"""Draws which pairs of a small case each pattern allows, and which tiles its index skips: `python -m docs.draw`.

Nothing is drawn by hand: pairs come from `SparseIndex.mask`, tiles from the bounds that the kernels take.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

import scfa_jax
from scfa_jax._bounds import key_tile_bounds, num_tiles
from scfa_jax.index import as_list

LENGTH, BLOCK = 192, 16
IMAGES = Path(__file__).parent / "images"

# Shades of a pair, in the order of the colours below.
SKIPPED, UNUSED, ON_EDGE, IN_FULL, OF_ONE = range(5)
COLOURS = ("#f1f3f5", "#ffdfb8", "#e8710a", "#2f6db5", "#111111")
MEANINGS = (
    "tile outside all ranges: skipped",
    "tile on the edge: visited, masked",
    "pair in such a tile",
    "pair in a full tile: no mask",
    "pair of one query",
)


@dataclass(frozen=True)
class Picture:
    """One pattern to draw.

    Attributes:
        title: What it is.
        index: Its index, of one batch element and one head.
        one_query: The query whose pairs stand out.
    """

    title: str
    index: scfa_jax.SparseIndex
    one_query: int = LENGTH - 30


@dataclass(frozen=True)
class Data:
    """What the patterns are made of: buckets, masks and ranges `[T, 1]`, and documents `[T]`."""

    buckets: jax.Array
    query_keep: jax.Array
    key_keep: jax.Array
    start: jax.Array
    stop: jax.Array
    documents: jax.Array

    @classmethod
    def made(cls) -> Data:
        """Draws the same data each time."""
        rng = np.random.default_rng(0)
        buckets = rng.choice(4, (LENGTH, 1), p=(0.4, 0.3, 0.2, 0.1)).astype(np.int32)
        query_keep, key_keep = rng.random((2, LENGTH, 1)) < 0.5
        start = rng.integers(0, LENGTH - 70, (LENGTH, 1), dtype=np.int32)
        stop = start + rng.integers(35, 70, (LENGTH, 1), dtype=np.int32)
        documents = np.repeat(np.array([0, 1, 0, 2, 1, 2, -1], np.int32), (40, 18, 30, 34, 12, 28, 30))
        return cls(*map(jnp.asarray, (buckets, query_keep, key_keep, start, stop, documents)))


def patterns() -> dict[str, Picture]:
    """Returns the patterns that are drawn, by the name of their picture."""
    data = Data.made()
    (in_buckets,) = as_list(scfa_jax.hash_index(data.buckets, num_buckets=4))
    (in_documents,) = as_list(scfa_jax.hash_index(data.buckets, num_buckets=4, query_segment_ids=data.documents))
    return {
        "causal": Picture("Dense causal attention", scfa_jax.causal_index(LENGTH, LENGTH)),
        "hash": Picture("Hash buckets: 4, of unequal size", in_buckets),
        "keep": Picture(
            "Half of queries and keys kept",
            scfa_jax.keep_index(data.query_keep, data.key_keep),
            one_query=int(np.flatnonzero(data.query_keep)[-1]),
        ),
        "ranges": Picture("Ranges of keys that the caller names", scfa_jax.range_index(data.start, data.stop, LENGTH)),
        "documents": Picture(
            "Three documents in pieces, and padding",
            scfa_jax.causal_index(LENGTH, LENGTH, query_segment_ids=data.documents),
            one_query=155,
        ),
        "hash-in-documents": Picture("Hash buckets within these documents", in_documents, one_query=155),
    }


def orders(index: scfa_jax.SparseIndex) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the queries and of the keys, in the order of the index."""
    lengths = {"query_order": index.query_length, "key_order": index.key_length}
    given = {name: getattr(index, name) for name in lengths}
    query, key = (np.arange(n) if given[name] is None else np.asarray(given[name])[0, 0] for name, n in lengths.items())
    return query, key


def tiles_of_index(index: scfa_jax.SparseIndex) -> np.ndarray:
    """What the kernels do with each tile, `[tiles of queries, tiles of keys]`: SKIPPED, ON_EDGE or IN_FULL."""
    bounds = np.asarray(key_tile_bounds(index.ranges, BLOCK, BLOCK))[0, 0][..., None]
    start, full_start, full_stop, stop = bounds.swapaxes(0, 1)
    tile = np.arange(num_tiles(index.key_length, BLOCK))
    full, visited = (full_start <= tile) & (tile < full_stop), (start <= tile) & (tile < stop)
    return np.where(full, IN_FULL, np.where(visited, ON_EDGE, SKIPPED))


def tiles_of_pairs(pairs: np.ndarray) -> np.ndarray:
    """What the pairs `[T, S]` ask for, tile by tile: SKIPPED, ON_EDGE or IN_FULL."""
    rows, columns = (n // BLOCK for n in pairs.shape)
    tiles = pairs.reshape(rows, BLOCK, columns, BLOCK)
    return np.where(tiles.all((1, 3)), IN_FULL, np.where(tiles.any((1, 3)), ON_EDGE, SKIPPED))


def shades(pairs: np.ndarray, tiles: np.ndarray, one_query: int) -> np.ndarray:
    """The shade of each pair `[T, S]`; allowed pairs have ON_EDGE or a higher one."""
    tile = np.kron(tiles, np.ones((BLOCK, BLOCK), int))
    shade = np.where(pairs, np.maximum(tile, ON_EDGE), np.where(tile == SKIPPED, SKIPPED, UNUSED))
    shade[one_query, pairs[one_query]] = OF_ONE
    return shade


def panels(picture: Picture) -> dict[str, np.ndarray]:
    """Shades `[T, S]` by title: in the order of the sequence, and of the index if that is another."""
    index, total = picture.index, num_tiles(LENGTH, BLOCK) ** 2
    query_order, key_order = orders(index)
    pairs, tiles = np.asarray(index.mask())[0, 0], tiles_of_index(index)
    visited = f"{np.sum(tiles != SKIPPED)} of {total} tiles visited, {np.sum(tiles == IN_FULL)} full"
    row = int(np.flatnonzero(query_order == picture.one_query)[0])
    by_index = shades(pairs[np.ix_(query_order, key_order)], tiles, row)
    if (query_order == np.arange(LENGTH)).all() and (key_order == np.arange(LENGTH)).all():
        return {f"in the order of the sequence: {visited}": by_index}
    tiles = tiles_of_pairs(pairs)
    before = f"in the order of the sequence: {np.sum(tiles != SKIPPED)} of {total} tiles hold pairs"
    return {
        before: shades(pairs, tiles, picture.one_query),
        f"in the order of the index: {visited}": by_index,
    }


def digest(picture: Picture) -> str:
    """A fingerprint of what is drawn, kept in the file: it tells whether a picture is up to date."""
    drawn = b"".join(title.encode() + shade.astype(np.uint8).tobytes() for title, shade in panels(picture).items())
    return hashlib.sha256(drawn).hexdigest()


def draw(picture: Picture, path: Path) -> None:
    """Writes the picture as PNG."""
    shown = panels(picture)
    figure = Figure(figsize=(5.0 * len(shown) if len(shown) > 1 else 7.2, 5.7), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, shade) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        _draw_panel(axes, title, shade)
    figure.suptitle(picture.title, fontsize=13, fontweight="bold")
    patches = [Patch(facecolor=c, edgecolor="#9aa0a6", label=m) for c, m in zip(COLOURS, MEANINGS, strict=True)]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Description": digest(picture), "Software": None})


def _draw_panel(axes: Axes, title: str, shade: np.ndarray) -> None:
    axes.imshow(shade, cmap=ListedColormap(COLOURS), vmin=SKIPPED, vmax=OF_ONE, interpolation="nearest")
    axes.set_title(title, fontsize=9.5)
    axes.set_xlabel("keys")
    axes.set_ylabel("queries")
    axes.set_xticks(np.arange(0, LENGTH, BLOCK) - 0.5, labels=[])
    axes.set_yticks(np.arange(0, LENGTH, BLOCK) - 0.5, labels=[])
    axes.grid(color="white", linewidth=0.8)
    axes.tick_params(length=0)


def main(folder: Path = IMAGES, report: Callable[[str], None] = print) -> None:
    """Draws all patterns.

    Args:
        folder: Where to.
        report: Called with a line for each file written.
    """
    for name, picture in patterns().items():
        draw(picture, folder / f"{name}.png")
        report(str(folder / f"{name}.png"))


if __name__ == "__main__":
    main()
