"""MNIST's idx files (http://yann.lecun.com/exdb/mnist): each image a sequence of pixels."""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from pathlib import Path

import numpy as np

from train.data.tokenizer import PixelTokenizer
from train.errors import TrainError
from train.files import cannot_be

PIXELS = 784
TRAIN_FILE, TEST_FILE = "train-images-idx3-ubyte", "t10k-images-idx3-ubyte"
IMAGES_MAGIC = 0x803  # unsigned bytes, three axes
HEADER = struct.Struct(">4I")  # magic number, images, rows, columns


def is_mnist(folder: Path) -> bool:
    """True for a folder that holds the training images."""
    return _packed_or_not(folder, TRAIN_FILE) is not None


def read_images(folder: Path, name: str) -> np.ndarray:
    """Reads images as tokens.

    Args:
        folder: Where the file is.
        name: Of the file, which may also end in `.gz`.

    Returns:
        uint16 `[images, 785]`: the token that opens an image, then its pixels by rows.

    Raises:
        TrainError: The file is missing, cut short, or holds something else.
    """
    path = _packed_or_not(folder, name)
    if path is None:
        raise TrainError(f"{folder / name} is missing, also as .gz. Put all of MNIST's files there.")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise TrainError(f"{path} is not a whole gzip file ({error}). Fetch it again.") from None
    except OSError as error:
        raise cannot_be("read", path, error, "Name another folder with --data.") from None
    if len(content) < HEADER.size:
        raise TrainError(f"{path} has {len(content)} bytes, fewer than the header of an idx file. Fetch it again.")
    magic, count, rows, columns = HEADER.unpack_from(content)
    if magic != IMAGES_MAGIC:
        raise TrainError(
            f"{path} begins with 0x{magic:08x}, not with the magic number of images, 0x{IMAGES_MAGIC:08x}. "
            f"Fetch it again."
        )
    if rows * columns != PIXELS:
        raise TrainError(
            f"{path} has images of {rows} x {columns} pixels, not 28 x 28. Name MNIST's folder with --data."
        )
    expected = HEADER.size + count * PIXELS
    if len(content) != expected:
        raise TrainError(f"{path} has {len(content):,} bytes, and {count:,} images need {expected:,}. Fetch it again.")
    tokens = np.full((count, 1 + PIXELS), PixelTokenizer.separator, PixelTokenizer.dtype)
    tokens[:, 1:] = np.frombuffer(content, np.uint8, offset=HEADER.size).reshape(count, PIXELS)
    return tokens


def _packed_or_not(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if os.path.isfile(path)), None)
