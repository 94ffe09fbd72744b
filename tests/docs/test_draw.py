"""The pictures of docs/idea.md show the dense definitions, and the committed ones are up to date."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from docs import draw
from scfa_jax import reference

PATTERNS = draw.patterns()


def mask_of(name: str) -> np.ndarray:
    """The pairs that the definition allows, bool `[T, S]`, from the same data as the picture."""
    data = draw.Data(*map(np.asarray, dataclasses.astuple(draw.Data.made())))
    causal = np.asarray(reference.causal_mask(draw.LENGTH, draw.LENGTH))[0, 0]
    in_documents = np.asarray(reference.segment_mask(data.documents, data.documents))[0, 0]
    same_bucket = data.buckets == data.buckets.T
    position = np.arange(draw.LENGTH)
    return {
        "causal": causal,
        "hash": causal & same_bucket,
        "keep": causal & data.query_keep & data.key_keep.T,
        "ranges": (data.start <= position) & (position < data.stop),
        "documents": causal & in_documents,
        "hash-in-documents": causal & same_bucket & in_documents,
    }[name]


@pytest.mark.parametrize("name", PATTERNS)
def test_pictures_show_the_allowed_pairs_and_no_others(name):
    picture, mask = PATTERNS[name], mask_of(name)
    by_index = mask[np.ix_(*draw.orders(picture.index))]
    shown = list(draw.panels(picture).values())
    expected = [by_index] if len(shown) == 1 else [mask, by_index]
    for shade, pairs in zip(shown, expected, strict=True):
        np.testing.assert_array_equal(shade >= draw.ON_EDGE, pairs)
        assert (shade == draw.OF_ONE).sum() == mask[picture.one_query].sum() > 0


@pytest.mark.parametrize("name", PATTERNS)
def test_skipped_tiles_hold_no_pair_and_full_tiles_nothing_else(name):
    index = PATTERNS[name].index
    pairs = mask_of(name)[np.ix_(*draw.orders(index))]
    tiles, needed = draw.tiles_of_index(index), draw.tiles_of_pairs(pairs)
    assert (needed[tiles == draw.SKIPPED] == draw.SKIPPED).all()
    assert (needed[tiles == draw.IN_FULL] == draw.IN_FULL).all()
    assert (tiles == draw.SKIPPED).sum() > tiles.size // 3


def test_the_script_writes_what_is_committed(tmp_path):
    draw.main(tmp_path, report=lambda line: None)
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == sorted(path.name for path in draw.IMAGES.iterdir()) == sorted(f"{n}.png" for n in PATTERNS)
    for name in written:
        with Image.open(tmp_path / name) as new, Image.open(draw.IMAGES / name) as committed:
            assert new.text["Description"] == committed.text["Description"], f"python -m docs.draw makes another {name}"
            assert new.size == committed.size
