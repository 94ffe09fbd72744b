"""Tokens in the cache: made once, current, whole, and nothing half-written beside them."""

from __future__ import annotations

import errno
import fcntl
import gzip
import io
import os
import resource
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from data_cases import MERGES, load, text_of, write_bpe, write_json_lines

import train.data.tokens
from train.__main__ import main
from train.data.tokenizer import Gpt2Tokenizer
from train.errors import TrainError

TEXTS = [f"the {number} aaa thé\n\nthe end" for number in range(200)]
WHOLE = "".join("<|endoftext|>" + text for text in TEXTS).encode()


@pytest.fixture(autouse=True)
def _no_copies(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")


@pytest.fixture
def path(tmp_path) -> Path:
    return write_json_lines(tmp_path / "text.jsonl", TEXTS)


@pytest.fixture
def options(tmp_path) -> dict:
    return {"tokenizer": "gpt2", "bpe": str(write_bpe(tmp_path / "bpe")), "cache": str(tmp_path / "cache")}


@pytest.fixture
def encoded(monkeypatch) -> list[bytes]:
    """What the tokenizer is given, in any order."""
    calls, encode = [], Gpt2Tokenizer.encode

    def count(self, content):
        calls.append(content)
        return encode(self, content)

    monkeypatch.setattr(Gpt2Tokenizer, "encode", count)
    return calls


def entries(options) -> list[str]:
    folder = Path(options["cache"])
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock") if folder.exists() else []


def test_text_is_tokenised_once_into_a_memory_map(path, options, encoded, capsys):
    first = load(path, **options)
    assert sorted(encoded) == sorted(text.encode() for text in TEXTS)
    assert f"tokenising text.jsonl into {options['cache']}" in capsys.readouterr().out
    again = load(path, **options)
    assert len(encoded) == len(TEXTS)
    assert capsys.readouterr().out == ""
    for corpus in (first, again):
        assert text_of(corpus) == WHOLE
        assert isinstance(corpus.train.base, np.memmap)
        assert (corpus.train.dtype, corpus.unit, corpus.vocab_size) == ("uint16", "token", 256 + len(MERGES) + 1)
    assert first.facts == again.facts
    (entry,) = entries(options)
    assert entry.startswith("text-gpt2-")


def test_many_threads_keep_the_order(path, options, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    encode, seen = Gpt2Tokenizer.encode, set()

    def slow_for_some(self, content):
        seen.add(threading.get_ident())
        if content.endswith(TEXTS[3].encode()):
            threading.Event().wait(0.05)
        return encode(self, content)

    monkeypatch.setattr(Gpt2Tokenizer, "encode", slow_for_some)
    assert text_of(load(path, **options)) == WHOLE
    assert len(seen) > 1


def test_another_tokenizer_and_another_split_do_not_share_or_repeat(path, options, encoded, tmp_path):
    one = load(path, **options)
    load(path, **options, held_out=0.1)
    assert len(encoded) == len(TEXTS)
    other = load(path, **{**options, "bpe": str(write_bpe(tmp_path / "other", MERGES[:4]))})
    assert len(encoded) == 2 * len(TEXTS)
    assert len(entries(options)) == 2
    assert one.sha256 != other.sha256


@pytest.mark.parametrize("change", ["content", "time", "size"])
def test_a_source_that_changed_is_tokenised_again_in_place(change, path, options, encoded):
    before = load(path, **options)
    status = path.stat()
    if change == "time":
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    else:
        write_json_lines(path, [text.replace("aaa", "bbb" if change == "content" else "bb") for text in TEXTS])
        if change == "size":
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = load(path, **options)
    assert len(encoded) == 2 * len(TEXTS)
    assert (text_of(after) == WHOLE) == (change == "time")
    assert (after.sha256 == before.sha256) == (change == "time")
    assert len(entries(options)) == 1
    assert text_of(before) == WHOLE  # a run that still trains on it


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def _make_signed(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"<u2", b"<i2", 1))


DAMAGE = {
    "a bit of the tokens": lambda entry: _flip(entry / "tokens.npy", 1000),
    "the type of the tokens": lambda entry: _make_signed(entry / "tokens.npy"),
    "the tokens' end": lambda entry: os.truncate(entry / "tokens.npy", 1000),
    "all tokens": lambda entry: os.truncate(entry / "tokens.npy", 0),
    "no tokens": lambda entry: (entry / "tokens.npy").unlink(),
    "a bit of the starts": lambda entry: _flip(entry / "starts.npy", 200),
    "the sizes' end": lambda entry: os.truncate(entry / "sizes.npy", 130),
    "no record": lambda entry: (entry / "meta.json").unlink(),
    "half a record": lambda entry: os.truncate(entry / "meta.json", 30),
    "another record": lambda entry: (entry / "meta.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_copy_is_made_again(damage, path, options, encoded):
    load(path, **options)
    (entry,) = Path(options["cache"]).glob("text-*")
    DAMAGE[damage](entry)
    assert text_of(load(path, **options)) == WHOLE
    assert len(encoded) == 2 * len(TEXTS)
    load(path, **options)
    assert len(encoded) == 2 * len(TEXTS)


def test_bytes_of_a_small_text_leave_the_cache_alone_and_of_a_large_one_do_not(path, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    in_memory = load(path, cache=str(cache))
    assert not cache.exists()
    monkeypatch.setattr(train.data.tokens, "IN_MEMORY_BYTES", 1000)
    mapped = load(path, cache=str(cache))
    assert isinstance(mapped.train.base, np.memmap)
    assert text_of(mapped) == text_of(in_memory) == WHOLE.replace(b"<|endoftext|>", b"\0")
    assert mapped.facts == in_memory.facts


def test_the_cache_stands_in_the_users_folder_for_caches(path, options, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    load(path, **{**options, "cache": None})
    assert len(list((tmp_path / "mine" / "scfa_jax").glob("text-gpt2-*"))) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    load(path, **{**options, "cache": None})
    assert len(list((tmp_path / "home" / ".cache" / "scfa_jax").glob("text-gpt2-*"))) == 1


def test_progress_counts_the_bytes_of_the_source(path, options, monkeypatch):
    bars, make = [], train.data.tokens.tqdm.tqdm

    def shown(**given):
        bars.append(make(**{**given, "disable": False, "delay": 0, "file": io.StringIO()}))
        return bars[-1]

    monkeypatch.setattr(train.data.tokens.tqdm, "tqdm", shown)
    load(path, **options)
    (bar,) = bars
    assert bar.n == bar.total == path.stat().st_size
    assert "tokenising: 100%" in bar.fp.getvalue()


def _interrupt(monkeypatch):
    def interrupt(self, content):
        raise KeyboardInterrupt

    monkeypatch.setattr(Gpt2Tokenizer, "encode", interrupt)


def _full_disk(monkeypatch):
    def no_space(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")  # a write does not name the file

    monkeypatch.setattr(Path, "write_bytes", no_space)


@pytest.mark.parametrize(("fail", "expected"), [(_interrupt, KeyboardInterrupt), (_full_disk, TrainError)])
@pytest.mark.parametrize("existing", [False, True])
def test_what_ends_early_leaves_the_cache_as_it_was(fail, expected, existing, path, options, monkeypatch):
    if existing:
        load(path, **options)
        os.utime(path, ns=(0, 0))
    before = entries(options)
    with monkeypatch.context() as patch:
        fail(patch)
        with pytest.raises(expected):
            load(path, **options)
    assert entries(options) == before
    assert text_of(load(path, **options)) == WHOLE


@pytest.fixture
def small_disk():
    """Files cannot grow past 2,000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_is_one_line_with_a_remedy(path, options, small_disk):
    with pytest.raises(
        TrainError, match=r"tokens\.npy cannot be written \(File too large\)\. Make room.*--cache"
    ) as raised:
        load(path, **options)
    assert "\n" not in str(raised.value)
    assert entries(options) == []


def test_the_file_that_found_no_room_is_named(options, tmp_path, small_disk):
    path = tmp_path / "text.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 300))  # 600 tokens of 2 bytes, and 300 starts of 8
    with pytest.raises(TrainError, match=r"starts\.npy cannot be written \(File too large\)\. Make"):
        load(path, **options)
    assert entries(options) == []


def test_the_command_line_says_it_in_one_line(path, options, monkeypatch, tmp_path, capsys):
    _full_disk(monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert main([f"--data={path}", *(f"--{name}={value}" for name, value in options.items())]) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("error: ")
    assert "starts.npy cannot be written (No space left on device). Make room there" in complaint
    assert complaint.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_cache_that_is_no_folder_is_named(path, options, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(TrainError, match=r"cache cannot be written \(File exists\)"):
        load(path, **options)


def test_what_a_killed_process_left_is_cleared_away(path, options):
    load(path, **options)
    (name,) = entries(options)
    shutil.rmtree(Path(options["cache"]) / name)
    (Path(options["cache"]) / f"{name}.part").mkdir()
    (Path(options["cache"]) / f"{name}.part" / "tokens.npy").write_text("half")
    assert text_of(load(path, **options)) == WHOLE
    assert entries(options) == [name]


def test_a_second_process_waits_for_the_first_and_takes_what_it_made(path, options, encoded, capsys):
    load(path, **options)
    (entry,) = Path(options["cache"]).glob("text-*")
    entry.rename(entry.with_name("away"))
    with (Path(options["cache"]) / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        corpora = []
        second = threading.Thread(target=lambda: corpora.append(load(path, **options)))
        second.start()
        second.join(0.3)
        assert second.is_alive()
        entry.with_name("away").rename(entry)
    second.join()
    assert text_of(corpora[0]) == WHOLE
    assert len(encoded) == len(TEXTS)
    assert "waiting for another process that is writing to" in capsys.readouterr().out


def test_a_cache_that_can_only_be_read_still_serves(path, options, encoded):
    load(path, **options)
    (Path(options["cache"]) / ".lock").unlink()
    (Path(options["cache"]) / ".lock").mkdir()  # cannot be opened for writing, not even by root
    assert text_of(load(path, **options)) == WHOLE
    assert len(encoded) == len(TEXTS)
