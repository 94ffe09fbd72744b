"""Text in, batches of tokens out.

A corpus is one array of bytes: its documents one after another, each followed by `DOCUMENT_END`. Its last
part, from a document's beginning on where there is one nearby, is held out. Windows of both parts lie side by
side without overlap, so no held-out byte is ever trained on.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import platform
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grain
import numpy as np

from train.errors import TrainError

VOCAB_SIZE = 256
DOCUMENT_END = b"\0"
JSON_LINES = (".jsonl", ".ndjson")
# Left out of the default corpus: what was installed on top, and tests, which not every distribution ships.
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes to evaluate on."""

    name: str  # for people: what it is, with the Python version where that decides the text
    train: np.ndarray  # uint8
    held_out: np.ndarray  # uint8
    documents: int
    sha256: str  # of all the bytes

    @property
    def facts(self) -> dict[str, str | int]:
        """What identifies it, for `config.json`."""
        return {
            "name": self.name,
            "documents": self.documents,
            "train_bytes": len(self.train),
            "held_out_bytes": len(self.held_out),
            "sha256": self.sha256,
        }


def load_corpus(data: str | None, held_out: float, seq_len: int) -> Corpus:
    """Reads a corpus and splits it.

    Args:
        data: A file of text or of JSON lines, plain or gzipped; None for Python's standard library.
        held_out: Share of the bytes to hold out.
        seq_len: Tokens a sequence, of which both parts must hold at least one.

    Returns:
        The corpus.

    Raises:
        TrainError: It cannot be read, is empty, or is too short.
    """
    if data is None:
        name, documents = _standard_library()
    else:
        name, documents = Path(data).name, _read_file(Path(data))
    documents = [document for document in documents if document]
    if not documents:
        raise TrainError(f"{data or name} holds no text. Name another file with --data.")
    whole = DOCUMENT_END.join(documents) + DOCUMENT_END
    ends = np.cumsum([len(document) + len(DOCUMENT_END) for document in documents])
    split = _split_point(ends, held_out)
    tokens = np.frombuffer(whole, np.uint8)
    corpus = Corpus(name, tokens[:split], tokens[split:], len(documents), hashlib.sha256(whole).hexdigest())
    for part, content in (("training", corpus.train), ("held-out", corpus.held_out)):
        if len(content) < seq_len + 1:
            raise TrainError(
                f"{data or name} is too short: its {part} part has {len(content)} bytes, one sequence takes "
                f"{seq_len + 1}. Lower --seq-len (now {seq_len}), change --held-out, or name a longer text."
            )
    return corpus


def training_batches(corpus: Corpus, seq_len: int, batch_size: int, seed: int) -> grain.DatasetIterator:
    """Endless shuffled batches of training text, a new order each epoch, read ahead in threads.

    Returns:
        An iterator over uint8 `[batch_size, seq_len + 1]`, which orbax can save and restore.
    """
    windows = grain.MapDataset.source(_Windows(corpus.train, seq_len)).seed(seed)
    reading = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
    return iter(windows.shuffle().repeat().batch(batch_size).to_iter_dataset(reading))


def held_out_batches(
    corpus: Corpus, seq_len: int, batch_size: int, max_tokens: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The held-out text once, always the same windows.

    Args:
        corpus: The corpus.
        seq_len: Tokens a sequence.
        batch_size: Sequences a batch; the last batch is filled up with windows of weight 0.
        max_tokens: Read about this many at most, in windows spread evenly; 0 for all.

    Yields:
        uint8 `[batch_size, seq_len + 1]` and the float32 weights `[batch_size]` of its windows, 1 or 0.
    """
    windows = _Windows(corpus.held_out, seq_len)
    count = len(windows) if not max_tokens else max(1, min(len(windows), max_tokens // seq_len))
    chosen = np.linspace(0, len(windows) - 1, count).round().astype(int)
    for start in range(0, count, batch_size):
        part = chosen[start : start + batch_size]
        batch = np.zeros((batch_size, seq_len + 1), np.uint8)
        batch[: len(part)] = [windows[index] for index in part]
        yield batch, (np.arange(batch_size) < len(part)).astype(np.float32)


class _Windows:
    """Windows of `seq_len` tokens side by side, each with one more to predict, as grain reads them."""

    def __init__(self, tokens: np.ndarray, seq_len: int):
        self._tokens, self._seq_len = tokens, seq_len

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._seq_len

    def __getitem__(self, index: int) -> np.ndarray:
        start = index * self._seq_len
        return self._tokens[start : start + self._seq_len + 1]

    def __repr__(self) -> str:
        # grain compares this when it restores an iterator: another length would mean another data set.
        return f"Windows(tokens={len(self._tokens)}, seq_len={self._seq_len})"


def _split_point(ends: np.ndarray, held_out: float) -> int:
    """Where the held-out part begins: at the document nearest to its share, or within one if none is near."""
    total = int(ends[-1])
    wanted = total - max(1, round(total * held_out))
    nearest = int(ends[np.abs(ends - wanted).argmin()])
    near = abs(nearest - wanted) <= 0.5 * (total - wanted)
    return nearest if near else wanted


def _read_file(path: Path) -> list[bytes]:
    """The documents of a text or JSON-lines file, gunzipped by name."""
    try:
        content = path.read_bytes()
        if _is_gzip(path):
            content = gzip.decompress(content)
    except FileNotFoundError:
        raise TrainError(f"{path} does not exist. Name a text, .gz or .jsonl file with --data.") from None
    except IsADirectoryError:
        raise TrainError(f"{path} is a folder. Name a text, .gz or .jsonl file with --data.") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise TrainError(f"{path} is not a whole gzip file ({error}). Fetch it again or unpack it.") from None
    except OSError as error:
        raise TrainError(f"{path} cannot be read ({error.strerror}). Name another file with --data.") from None
    inner = path.with_suffix("") if _is_gzip(path) else path
    return _json_lines(path, content) if inner.suffix.lower() in JSON_LINES else [content]


def _is_gzip(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _json_lines(path: Path, content: bytes) -> list[bytes]:
    documents = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            # Lone surrogates are legal in JSON but not in UTF-8.
            documents.append(text.encode("utf-8", "replace"))
        except (ValueError, RecursionError) as error:
            raise TrainError(f"{path} line {number}: not valid JSON ({error}). Mend or remove the line.") from None
        except (AttributeError, KeyError, TypeError):
            raise TrainError(f'{path} line {number}: no "text" key with a string. Mend or remove the line.') from None
    return documents


def _standard_library() -> tuple[str, list[bytes]]:
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
    try:
        documents = [(root / name).read_bytes() for name in chosen]
    except OSError as error:
        raise TrainError(f"{error.filename} cannot be read ({error.strerror}). Name a text file with --data.") from None
    size = sum(map(len, documents))
    return f"Python {version} standard library, {len(chosen)} files, {size:,} bytes", documents
