"""Documents out of files: what can be read, and what is said of files that cannot."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import platform
import sys
import sysconfig
import tracemalloc

import pytest
from data_cases import load, text_of, write_json_lines
from hypothesis import given
from hypothesis import strategies as st

import train.data.sources
from train.data.sources import find_source
from train.errors import TrainError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


def test_a_text_file_is_one_document_read_byte_by_byte(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xc3\xa9 \xff\0" * 100)
    corpus = load(path)
    assert text_of(corpus) == b"\0" + path.read_bytes()
    assert (corpus.train.dtype, corpus.documents, corpus.unit, corpus.vocab_size) == ("uint8", 1, "byte", 256)
    assert corpus.units_per_token("held_out") == 1.0


def test_json_lines_become_documents_that_a_separator_opens(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"title": "t", "text": "z\\u00fc"}\n{"text": ""}\n{"text": "\\ud800"}')
    corpus = load(path)
    assert text_of(corpus) == b"\0one\0z\xc3\xbc\0?"  # half a surrogate pair has no UTF-8
    assert corpus.documents == 3


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstd.compress), (".ZST", zstd.compress)])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.ndjson", "A.JSONL"])
def test_packed_files_read_like_plain_ones(name, suffix, pack, tmp_path):
    lines = [json.dumps({"text": str(number) * 9}).encode() + b"\n" for number in range(50)]
    (tmp_path / name).write_bytes(b"".join(lines))
    # In two members, or frames, as tools that append to a file leave them.
    (tmp_path / f"{name}{suffix}").write_bytes(pack(b"".join(lines[:20])) + pack(b"".join(lines[20:])))
    plain, unpacked = load(tmp_path / name), load(tmp_path / f"{name}{suffix}")
    assert plain.sha256 == unpacked.sha256
    assert plain.documents == unpacked.documents == (1 if name == "a.txt" else 50)


def test_a_folder_and_a_glob_are_read_in_the_order_of_their_names(tmp_path):
    folder = tmp_path / "shards"
    for name in ("b/2.jsonl", "a.txt", "b/1.jsonl.gz", ".hidden", "b/.git/notes", "c.md"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"text": name}).encode()
        path.write_bytes(gzip.compress(line) if name.endswith(".gz") else line if "json" in name else name.encode())
    assert text_of(load(folder)) == b"\0a.txt\0b/1.jsonl.gz\0b/2.jsonl\0c.md"
    assert text_of(load(folder / "b" / "*.jsonl*")) == b"\0b/1.jsonl.gz\0b/2.jsonl"
    assert text_of(load(folder / "**" / "*.[jt]*")) == b"\0a.txt\0b/1.jsonl.gz\0b/2.jsonl"
    assert load(folder).name == "shards, 4 files"


def test_a_text_about_an_archive_is_a_text(tmp_path):
    path = tmp_path / "notes.tar.txt"
    path.write_bytes(b"BZh and PK begin what is packed")
    assert text_of(load(path)).endswith(path.read_bytes())


def test_a_name_with_the_signs_of_a_glob_is_still_a_name(tmp_path):
    path = tmp_path / "a[1]*.txt"
    path.write_text("some text")
    assert text_of(load(path)) == b"\0some text"


def test_the_standard_library_is_the_default_and_says_its_version():
    corpus = load(None, held_out=0.05)
    assert corpus.name.startswith(f"Python {platform.python_version()} standard library")
    assert corpus.documents > 100
    assert 0.02 < len(corpus.held_out) / len(corpus.train) < 0.1
    assert b"def " in text_of(corpus)


def test_the_standard_library_is_read_without_what_was_installed_on_top(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    mine = ["ast.py", "json/decoder.py", "json/encoder.py"]
    for name in (*mine, "site-packages/flax.py", "dist-packages/flax.py", "test/test_ast.py", "json/tests/a.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "notes.txt").write_text("no source")
    corpus, again = load(None), load(None)
    assert sorted(text_of(corpus).decode().lstrip("\0").split("\0")) == mine
    assert corpus.sha256 == again.sha256
    assert "3 files" in corpus.name


@given(st.binary(max_size=60).map(lambda text: bytes(b"\n \xe2\x80\x83ab"[byte % 7] for byte in text)))
def test_pieces_of_a_text_make_it_up_and_know_their_offsets(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("pieces") / "a.txt"
    path.write_bytes(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.data.sources, "BLOCK_BYTES", 8)
        pieces = list(find_source(str(path)).pieces(whole_characters=True))
    assert b"".join(piece.content for piece in pieces) == text
    assert [piece.opens for piece in pieces] == [True, *[False] * (len(pieces) - 1)][: len(pieces)]
    for piece in pieces:
        assert text[piece.offset :].startswith(piece.content)
        assert piece.opens or piece.content[:1] == b"\n"


@pytest.mark.parametrize("name", ["a.txt.zst", "a.jsonl.gz"])
def test_a_large_file_is_read_a_piece_at_a_time(name, tmp_path):
    path = tmp_path / name
    line = (json.dumps({"text": "words " * 1000}) + "\n").encode()
    with (zstd if name.endswith("zst") else gzip).open(path, "wb") as file:
        for _ in range(4000):
            file.write(line)
    tracemalloc.start()
    try:
        size = sum(len(piece.content) for piece in find_source(str(path)).pieces(whole_characters=True))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size > 20e6
    assert peak < 6e6


def test_progress_is_told_in_bytes_on_disk(tmp_path):
    for name in ("a", "b"):
        write_json_lines(tmp_path / f"{name}.jsonl", [str(number) for number in range(2000)])
    read = [piece.read for piece in find_source(str(tmp_path)).pieces(whole_characters=True)]
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 0 < read[0] < total / 2 < read[2000] < read[-1] == total
    assert read == sorted(read)


CUT = gzip.compress(b"text" * 99)[:-9]
BAD_FILES = [
    ("absent.txt", None, "does not exist. Name a text"),
    ("empty.txt", b"", "holds no text. Name another"),
    ("empty.jsonl.gz", b"", "holds no text"),
    ("blank.jsonl", b'\n\n{"text": ""}\n', "holds no text"),
    ("short.txt", b"short", "too short.*Lower --seq-len"),
    ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "bad.jsonl line 2: not valid JSON.*Mend or remove"),
    ("latin.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "latin.jsonl line 2: not valid JSON.*'utf-8' codec"),
    ("deep.jsonl", b"[" * 200_000, "deep.jsonl line 1: not valid JSON"),
    ("key.jsonl", b'{"body": "a"}\n', 'key.jsonl line 1: no "text" key'),
    ("number.jsonl", b'{"text": 3}\n', 'number.jsonl line 1: no "text" key'),
    ("list.jsonl", b"[1]\n", 'list.jsonl line 1: no "text" key'),
    ("broken.gz", b"not gzip", "not a whole gzip file.*Fetch it again"),
    ("cut.txt.gz", CUT, "not a whole gzip file"),
    ("flipped.txt.gz", CUT[:12] + b"\xff" * 9 + CUT[21:], "not a whole gzip file"),
    ("broken.zst", b"not zstd", "not a whole zstd file.*Fetch it again"),
    ("cut.jsonl.zst", zstd.compress(b'{"text": "a"}\n' * 99)[:-9], "not a whole zstd file"),
    ("joined.jsonl.zst", zstd.compress(b'{"text": "a"}\n') + b"rest", "not a whole zstd file"),
    ("enwik8.zip", b"PK\x03\x04" + b"text" * 99, r"is packed \(zip\)\. Unpack it"),
    ("text.xz", lzma.compress(b"text" * 99), r"is packed \(xz\)"),
    ("text.bz2", bz2.compress(b"text" * 99), r"is packed \(bzip2\)"),
    ("packed.txt", gzip.compress(b"text" * 99), r"is packed \(gzip\)"),
    ("packed.jsonl", zstd.compress(b"text" * 99), r"is packed \(zstd\)"),
    ("text.tar", b"a.txt".ljust(257, b"\0") + b"ustar" + b"text" * 99, r"is packed \(tar\)"),
    ("text.tar.gz", gzip.compress(b"text" * 99), r"is packed \(tar\)"),
    ("none*.txt", None, "The glob .* holds no file"),
    ("folder", ..., "The folder .* holds no file"),
    ("long" * 99, None, "cannot be read .File name too long"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES, ids=[name[:20] for name, *_ in BAD_FILES])
def test_what_cannot_be_read_is_named_in_one_line_with_a_remedy(name, content, message, tmp_path):
    path = tmp_path / name
    if content is ...:
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(TrainError, match=message) as raised:
        load(path, seq_len=64)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.symlink_to(path)  # also for root
    with pytest.raises(TrainError, match=r"a\.txt cannot be read \(Too many levels"):
        load(path)
    assert os.path.lexists(path)
