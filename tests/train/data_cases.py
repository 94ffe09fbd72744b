"""What the tests of `train.data` share: short ways to load a corpus, and a byte-pair encoding of ten merges."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from train.config import DataConfig
from train.data import Corpus, load_corpus
from train.data.tokenizer import ByteTokenizer

# Words, blanks and line ends: a text that is cut at a wrong place loses some of these tokens.
MERGES = [(b"t", b"h"), (b"th", b"e"), (b" ", b"the"), (b"\n", b"\n"), (b" ", b" "), (b"  ", b"  ")]
MERGES += [(b"\n", b" "), (b" ", b"a"), (b"a", b"a"), (b"\xc3", b"\xa9")]


def load(data: Path | str | None, **options) -> Corpus:
    """`load_corpus` with options of `DataConfig`; a few bytes are enough unless these say otherwise."""
    small = {"data": None if data is None else str(data), "seq_len": 1, "held_out": 0.3}
    return load_corpus(DataConfig(**{**small, **options}))


def text_of(corpus: Corpus) -> bytes:
    """All parts, separators included."""
    parts = [part for part in (corpus.train, corpus.held_out, corpus.test) if part is not None]
    return corpus.tokenizer.decode(np.concatenate(parts))


def corpus_of(train: np.ndarray, held_out: np.ndarray | None = None, **fields) -> Corpus:
    """A corpus of bytes that was never in a file."""
    held_out = train if held_out is None else held_out
    known = {"name": "made", "tokenizer": ByteTokenizer(), "test": None, "documents": 1, "sha256": ""}
    return Corpus(train=train, held_out=held_out, **{**known, **fields})


def write_json_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def write_bpe(folder: Path, merges: list[tuple[bytes, bytes]] = MERGES) -> Path:
    """`encoder.json` and `vocab.bpe` as GPT-2 has them, with these merges."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != 0x20]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    tokens = [bytes([byte]) for byte in (*printable, *others)] + [first + second for first, second in merges]
    encoder = {written(token): number for number, token in enumerate(tokens)} | {"<|endoftext|>": len(tokens)}
    lines = [f"{written(first)} {written(second)}" for first, second in merges]
    folder.mkdir(exist_ok=True)
    (folder / "encoder.json").write_text(json.dumps(encoder))
    (folder / "vocab.bpe").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    return folder
