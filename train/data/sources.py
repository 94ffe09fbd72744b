"""Documents out of files, a piece at a time: text and JSON lines, plain, gzip or zstd."""

from __future__ import annotations

import contextlib
import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import platform
import sys
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from train.errors import TrainError
from train.files import cannot_be

# Unlike the reader of the package zstandard, this one notices a file that was cut short.
if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

JSON_LINES = (".jsonl", ".ndjson")
BLOCK_BYTES = 2**20
# Left out of the default corpus: what was installed on top, and tests, which not every distribution ships.
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
REMEDY = "Name a text or JSON-lines file (also .gz, .zst), a folder or a glob with --data."


# What files begin with that are packed, by what packed them; a tar says so further on.
PACKED = {
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"\xfd7zXZ\0": "xz",
    b"BZh91AY&SY": "bzip2",
    b"\x1f\x8b\x08": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
}
TAR_AT = 257


class Piece(NamedTuple):
    """Some of a document; a long one comes in several pieces."""

    content: bytes
    opens: bool
    """It is a document's first piece."""
    path: Path
    offset: int
    """Of its first byte in the unpacked file; 0 if that is unknown."""
    read: int
    """Bytes of the files, as they lie on disk, that were read so far."""


@dataclass(frozen=True)
class Source:
    """Files that make up a corpus."""

    name: str  # for people: what it is, with the Python version where that decides the text
    place: str  # what to call it in errors
    paths: tuple[Path, ...]
    split: bool = False  # the documents are the parts to train on, to hold out and to test on, as of enwik8

    def pieces(self, whole_characters: bool) -> Iterator[Piece]:
        """Reads the documents in order; empty ones are left out.

        Args:
            whole_characters: No UTF-8 character may be cut where enwik8 is.

        Yields:
            Pieces, cut where GPT-2's pattern cuts as well: tokenised one by one they give a document's tokens.

        Raises:
            TrainError: A file cannot be read, is damaged, or a line is not a JSON object with a text.
        """
        done = 0
        for path in self.paths:
            with _opened(path) as (raw, stream):
                if self.split:
                    pieces = _enwik8(path, stream.read(), whole_characters)
                elif _is_json_lines(path):
                    pieces = _json_lines(path, stream)
                else:
                    pieces = _text(path, iter(functools.partial(stream.read, BLOCK_BYTES), b""))
                for piece in pieces:
                    yield piece._replace(read=done + raw.tell())
                done += raw.tell()


def find_source(data: str | None) -> Source:
    """Finds the files of a corpus.

    Args:
        data: A file, a folder (all files below it but hidden ones), or a glob; None for the source files of
            the running Python's standard library.

    Returns:
        The files, sorted by name.

    Raises:
        TrainError: There are none.
    """
    if data is None:
        return _standard_library()
    path = Path(data)
    if os.path.isdir(data):
        found = [file for file in path.rglob("*") if not any(part[0] == "." for part in file.relative_to(path).parts)]
        kind = "folder"
    elif not os.path.exists(data) and glob.has_magic(data):
        found = [Path(name) for name in glob.glob(data, recursive=True)]
        kind = "glob"
    else:
        # A file that is absent or cannot be read says so when it is opened.
        return Source(path.name, data, (path,), split="enwik8" in path.name.lower() and not _is_json_lines(path))
    paths = tuple(sorted(file for file in found if file.is_file()))
    if not paths:
        raise TrainError(f"The {kind} {data} holds no file. {REMEDY}")
    return Source(f"{path.name}, {len(paths)} files", data, paths)


def _standard_library() -> Source:
    """The running interpreter's own source files, in an order that is random but fixed."""
    version = platform.python_version()
    root = Path(sysconfig.get_path("stdlib"))
    relative = [path.relative_to(root) for path in root.rglob("*.py")]
    # Ordered by a hash of the name, so that the held-out end is a fair sample of the packages.
    chosen = sorted(
        (path.as_posix() for path in relative if not NOT_STDLIB.intersection(path.parts)),
        key=lambda name: hashlib.sha256(name.encode()).digest(),
    )
    if not chosen:
        raise TrainError(f"Python {version} has no source files in {root}. Name a text file with --data.")
    title = f"Python {version} standard library, {len(chosen)} files"
    return Source(title, title, tuple(root / name for name in chosen))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[io.BufferedReader, io.BufferedIOBase]]:
    """The file as it lies on disk, and unpacked as its name says; errors of reading become `TrainError`."""
    try:
        with path.open("rb") as raw:
            _refuse_packed(path, raw.peek(TAR_AT + 5))
            with _unpacked(path, raw) as stream:
                yield raw, stream
    except FileNotFoundError:
        raise TrainError(f"{path} does not exist. {REMEDY}") from None
    except (EOFError, gzip.BadGzipFile, zlib.error, zstd.ZstdError) as error:
        kind = "zstd" if path.suffix.lower() == ".zst" else "gzip"
        raise TrainError(f"{path} is not a whole {kind} file ({error}). Fetch it again or unpack it.") from None
    except OSError as error:
        raise cannot_be("read", path, error, REMEDY) from None


def _refuse_packed(path: Path, start: bytes) -> None:
    """Fails on archives and packed files that are not read here: their bytes are no text."""
    kind = next((kind for magic, kind in PACKED.items() if start.startswith(magic)), None)
    is_unpacked = path.suffix.lower() in (".gz", ".zst")  # or found to be something else
    if start[TAR_AT : TAR_AT + 5] == b"ustar" or (is_unpacked and path.stem.lower().endswith(".tar")):
        kind = "tar"
    elif is_unpacked:
        return
    if kind is not None:
        raise TrainError(f"{path} is packed ({kind}). Unpack it, or pack its text as .gz or .zst.")


def _unpacked(path: Path, raw: io.BufferedReader) -> io.BufferedIOBase:
    if path.suffix.lower() == ".gz":
        return gzip.open(raw)
    if path.suffix.lower() == ".zst":
        # The largest window there is: files written with --long=31 can be read too.
        options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 31}
        return zstd.open(raw, options=options)
    return raw


def _is_json_lines(path: Path) -> bool:
    unpacked = path.with_suffix("") if path.suffix.lower() in (".gz", ".zst") else path
    return unpacked.suffix.lower() in JSON_LINES


def _json_lines(path: Path, lines: Iterable[bytes]) -> Iterator[Piece]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line.decode())["text"]
            # Lone surrogates are legal in JSON but not in UTF-8.
            content = text.encode("utf-8", "replace")
        except (ValueError, RecursionError) as error:
            raise TrainError(f"{path} line {number}: not valid JSON ({error}). Mend or remove the line.") from None
        except (AttributeError, KeyError, TypeError):
            raise TrainError(f'{path} line {number}: no "text" key with a string. Mend or remove the line.') from None
        if content:
            yield Piece(content, opens=True, path=path, offset=0, read=0)


def _text(path: Path, blocks: Iterable[bytes], offset: int = 0) -> Iterator[Piece]:
    """One document in pieces of about a block."""
    opens = True
    waiting: list[bytes] = []
    for block in blocks:
        cut = _last_break(block)
        if cut is None:
            waiting.append(block)
            continue
        held = b"".join([*waiting, block[:cut]])
        waiting = [block[cut:]]
        if held:
            yield Piece(held, opens, path, offset, read=0)
            opens, offset = False, offset + len(held)
    rest = b"".join(waiting)
    if rest:
        yield Piece(rest, opens, path, offset, read=0)


def _last_break(block: bytes) -> int | None:
    """The last newline before a visible ASCII character: no token of text reaches over its beginning.

    GPT-2's pattern takes the last space character before a word on its own, and joins only blanks to words.
    """
    place = block.rfind(b"\n", 0, max(0, len(block) - 1))
    while place >= 0 and not 0x21 <= block[place + 1] <= 0x7E:
        place = block.rfind(b"\n", 0, place)
    return place if place >= 0 else None


def _enwik8(path: Path, content: bytes, whole_characters: bool) -> Iterator[Piece]:
    """Three documents of 90, 5 and 5 MB, or of these shares of a prefix."""
    cuts = [0, len(content) * 90 // 100, len(content) * 95 // 100, len(content)]
    if whole_characters:
        for index in (1, 2):
            while cuts[index] < len(content) and content[cuts[index]] & 0xC0 == 0x80:
                cuts[index] += 1
    for start, stop in itertools.pairwise(cuts):
        blocks = (content[place : min(place + BLOCK_BYTES, stop)] for place in range(start, stop, BLOCK_BYTES))
        yield from _text(path, blocks, offset=start)
