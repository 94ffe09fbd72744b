"""A text's tokens: made once, in parallel, and kept in memory or in a memory-mapped cache."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from train.data.sources import Piece, Source
from train.data.tokenizer import InvalidUtf8, Tokenizer
from train.errors import TrainError
from train.files import cannot_be

CACHE_VERSION = 1
# Up to here the files of a corpus of bytes are read into memory at each start, which is quicker than to look after
# a copy of them.
IN_MEMORY_BYTES = 64 * 2**20
REMEDY = "Make room there, or choose another folder with --cache."
META_FILE, VALUES_FILE, STARTS_FILE, SIZES_FILE = "meta.json", "tokens.npy", "starts.npy", "sizes.npy"


@dataclass(frozen=True)
class Tokens:
    """Documents one after another, each opened by the tokenizer's separator."""

    values: np.ndarray  # uint8 or uint16 [N], perhaps memory-mapped
    starts: np.ndarray  # int64 [documents]: where each one's separator stands
    sizes: np.ndarray  # int64 [documents]: bytes of each, the separator counted as one
    sha256: str


def load_tokens(source: Source, tokenizer: Tokenizer, cache: Path) -> Tokens:
    """Tokenises a source, or takes what was made of it before.

    A cached copy counts as current while the paths, sizes and times of change of the files are the same: to look
    into them would take as long as tokenising for bytes, and minutes for a large corpus. Copies are known by the
    SHA-256 of the tokens, which is checked whenever one is opened.

    Args:
        source: The files.
        tokenizer: Makes tokens of them.
        cache: Folder of all cached copies; bytes of small files leave it alone.

    Returns:
        The tokens.

    Raises:
        TrainError: The source cannot be read, or the cache cannot be written.
    """
    if tokenizer.name == "bytes" and _stat_size(source) <= IN_MEMORY_BYTES:
        buffer = io.BytesIO()
        starts, sizes = _tokenise(source, tokenizer, buffer.write)
        values = np.frombuffer(buffer.getbuffer(), tokenizer.dtype)
        return Tokens(values, starts, sizes, _sha256(values, starts, sizes))
    wanted = _fingerprint(source, tokenizer)
    key = hashlib.sha256(json.dumps([tokenizer.identity, [name for name, *_ in wanted["files"]]]).encode())
    stem = re.sub(r"[^\w-]+", "-", source.name.split(".")[0])[:40]
    entry = cache / f"{stem}-{tokenizer.name}-{key.hexdigest()[:12]}"
    tokens = _load(entry, wanted)
    if tokens is not None:
        return tokens
    try:
        with _locked(cache):
            tokens = _load(entry, wanted)  # another process may have made it meanwhile
            if tokens is None:
                print(f"tokenising {source.name} into {entry}")
                _build(entry, wanted, source, tokenizer)
                tokens = _load(entry, wanted)
    except OSError as error:
        raise cannot_be("written", error.filename or cache, error, REMEDY) from None
    if tokens is None:
        raise TrainError(f"{entry} does not hold what was written to it. Choose another folder with --cache.")
    return tokens


def _build(entry: Path, wanted: dict[str, Any], source: Source, tokenizer: Tokenizer) -> None:
    """Writes an entry of the cache beside its place, then moves it there."""
    temporary = entry.with_name(f"{entry.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed: the lock is ours
    try:
        temporary.mkdir()
        with _writing(temporary / VALUES_FILE) as path, path.open("wb") as file:
            _write_header(file, tokenizer, 0)
            begin = file.tell()
            starts, sizes = _tokenise(source, tokenizer, file.write)
            count = (file.tell() - begin) // np.dtype(tokenizer.dtype).itemsize
            file.seek(0)
            _write_header(file, tokenizer, count)  # numpy leaves room for the number to grow
            if file.tell() != begin:
                raise AssertionError("numpy's header changed its length")
        for name, numbers in ((STARTS_FILE, starts), (SIZES_FILE, sizes)):
            buffer = io.BytesIO()
            np.save(buffer, numbers)  # in a file numpy would not see the end of the disk
            with _writing(temporary / name) as path:
                path.write_bytes(buffer.getvalue())
        values = np.load(temporary / VALUES_FILE, mmap_mode="r")
        meta = {"wanted": wanted, "sha256": _sha256(values, starts, sizes)}
        with _writing(temporary / META_FILE) as path:
            path.write_text(json.dumps(meta))
        shutil.rmtree(entry, ignore_errors=True)  # a stale one; whoever has it mapped keeps it
        temporary.replace(entry)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _load(entry: Path, wanted: dict[str, Any]) -> Tokens | None:
    """An entry of the cache, or None where it is missing, stale or damaged."""
    try:
        meta = json.loads((entry / META_FILE).read_text())
        if meta["wanted"] != wanted:
            return None
        values = np.load(entry / VALUES_FILE, mmap_mode="r")
        starts, sizes = (np.load(entry / name) for name in (STARTS_FILE, SIZES_FILE))
        whole = _sha256(values, starts, sizes) == meta["sha256"]
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    return Tokens(values, starts, sizes, meta["sha256"]) if whole else None


def _tokenise(source: Source, tokenizer: Tokenizer, write: Callable[[Any], object]) -> tuple[np.ndarray, np.ndarray]:
    """Writes the tokens in order; returns where documents start and how many bytes each has, int64."""
    starts, sizes, place = array("q"), array("q"), 0
    separator = np.full(1, tokenizer.separator, tokenizer.dtype)
    with tqdm.tqdm(
        total=_stat_size(source), desc="tokenising", unit="B", unit_scale=True, delay=1, disable=None
    ) as bar:
        for piece, tokens in _encoded(source, tokenizer):
            if piece.opens:
                starts.append(place)
                sizes.append(1)
                write(separator)
                place += 1
            write(tokens)
            place += len(tokens)
            sizes[-1] += len(piece.content)
            bar.update(piece.read - bar.n)
    if not starts:
        raise TrainError(f"{source.place} holds no text. Name another file with --data.")
    return np.array(starts, np.int64), np.array(sizes, np.int64)


def _encoded(source: Source, tokenizer: Tokenizer) -> Iterator[tuple[Piece, np.ndarray]]:
    """Pieces and their tokens in order, with a few pieces of each thread in flight."""
    workers = os.cpu_count() or 1
    waiting: deque[tuple[Piece, Future[np.ndarray]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for piece in source.pieces(whole_characters=tokenizer.unit == "token"):
            waiting.append((piece, pool.submit(tokenizer.encode, piece.content)))
            if len(waiting) > 4 * workers:
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())


def _result(piece: Piece, tokens: Future[np.ndarray]) -> tuple[Piece, np.ndarray]:
    try:
        return piece, tokens.result()
    except InvalidUtf8 as error:
        raise TrainError(
            f"{piece.path}: byte {piece.offset + error.offset:,} (0x{error.byte:02x}) is not valid UTF-8. "
            f"Mend the file, or take --tokenizer bytes."
        ) from None
    except TrainError as error:
        raise TrainError(f"{piece.path}: {error}. Mend the file, or take --tokenizer bytes.") from None


def _fingerprint(source: Source, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a cached copy was made of."""
    files = [[str(path.absolute()), *_stat(path)] for path in source.paths]
    return {"version": CACHE_VERSION, "tokenizer": tokenizer.identity, "split": source.split, "files": files}


def _stat(path: Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in nanoseconds; -1 for a file that reading will complain about."""
    try:
        status = path.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _stat_size(source: Source) -> int:
    return sum(max(0, _stat(path)[0]) for path in source.paths)


def _sha256(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for one in arrays:
        digest.update(f"{one.dtype} {one.shape} ".encode())
        digest.update(np.ascontiguousarray(one).data)
    return digest.hexdigest()


def _write_header(file: io.BufferedWriter, tokenizer: Tokenizer, count: int) -> None:
    descriptor = np.lib.format.dtype_to_descr(np.dtype(tokenizer.dtype))
    header = {"descr": descriptor, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """Names the file where there is no room to write to it: the error itself does not."""
    try:
        yield path
    except OSError as error:
        raise cannot_be("written", path, error, REMEDY) from None


@contextlib.contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """Lets one process at a time write to the cache; the others wait and then find what it made."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that is writing to {cache}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
