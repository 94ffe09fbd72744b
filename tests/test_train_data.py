"""Text in, batches out: the loaders, the split, the order of the data."""

from __future__ import annotations

import gzip
import itertools
import json
import platform
import sysconfig

import numpy as np
import pytest

from train.data import DOCUMENT_END, Corpus, held_out_batches, load_corpus, training_batches
from train.errors import TrainError


def text_of(corpus: Corpus) -> bytes:
    return (np.concatenate([corpus.train, corpus.held_out])).tobytes()


def numbered(count: int) -> Corpus:
    tokens = (np.arange(count) % 251).astype(np.uint8)
    return Corpus("numbers", tokens, tokens[: count // 4], 1, "")


def test_a_text_file_is_read_byte_by_byte(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xc3\xa9 \xff" * 100)
    corpus = load_corpus(str(path), 0.1, 16)
    assert text_of(corpus) == path.read_bytes() + DOCUMENT_END
    assert corpus.train.dtype == np.uint8
    assert corpus.documents == 1


def test_json_lines_become_documents_with_an_end_each(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"title": "t", "text": "z\\u00fc"}\n{"text": ""}\n')
    corpus = load_corpus(str(path), 0.4, 1)
    assert text_of(corpus) == b"one\0z\xc3\xbc\0"
    assert corpus.documents == 2


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "A.JSONL"])
def test_gzip_reads_like_the_plain_file(name, tmp_path):
    content = "".join(json.dumps({"text": str(number) * 9}) + "\n" for number in range(50)).encode()
    (tmp_path / name).write_bytes(content)
    for packed in (f"{name}.gz", f"{name}.GZ"):
        (tmp_path / packed).write_bytes(gzip.compress(content, mtime=0))
        plain, unpacked = (load_corpus(str(tmp_path / one), 0.1, 4) for one in (name, packed))
        assert plain.sha256 == unpacked.sha256
        assert plain.documents == (1 if name == "a.txt" else 50)


def test_the_standard_library_is_the_default_and_says_its_version():
    corpus = load_corpus(None, 0.05, 256)
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
    corpus, again = load_corpus(None, 0.3, 4), load_corpus(None, 0.3, 4)
    assert sorted(text_of(corpus).decode().rstrip("\0").split("\0")) == mine
    assert corpus.sha256 == again.sha256
    assert "3 files" in corpus.name


def test_whole_documents_are_held_out_where_they_are_small_enough(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {number:03}"}) + "\n" for number in range(100)))
    corpus = load_corpus(str(path), 0.07, 4)
    assert corpus.train.tobytes().endswith(DOCUMENT_END)
    assert corpus.held_out.tobytes().startswith(b"document 093")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "does not exist"),
        ("empty.txt", b"", "holds no text"),
        ("blank.jsonl", b"\n\n", "holds no text"),
        ("short.txt", b"short", "too short.*Lower --seq-len"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "bad.jsonl line 2: not valid JSON"),
        ("deep.jsonl", b"[" * 200_000, "deep.jsonl line 1: not valid JSON"),
        ("key.jsonl", b'{"body": "a"}\n', 'key.jsonl line 1: no "text" key'),
        ("number.jsonl", b'{"text": 3}\n', 'number.jsonl line 1: no "text" key'),
        ("list.jsonl", b"[1]\n", 'list.jsonl line 1: no "text" key'),
        ("broken.gz", b"not gzip", "not a whole gzip file"),
        ("cut.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], "not a whole gzip file"),
        ("folder", ..., "is a folder"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line_with_a_remedy(name, content, message, tmp_path):
    path = tmp_path / name
    if content is ...:
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(TrainError, match=message) as raised:
        load_corpus(str(path), 0.1, 64)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_batches_are_windows_with_the_next_token_and_an_epoch_reads_all_of_them_once():
    corpus = numbered(4 * 12 + 1)
    batches = training_batches(corpus, seq_len=4, batch_size=3, seed=0)
    epoch = np.concatenate([next(batches) for _ in range(4)])
    assert epoch.shape == (12, 5)
    assert epoch.dtype == np.uint8
    assert sorted(epoch[:, 0].tolist()) == list(range(0, 48, 4))
    assert (np.diff(epoch.astype(int), axis=1) == 1).all()


def test_the_seed_decides_the_order_and_every_epoch_has_its_own():
    def order(seed: int, count: int) -> list[list[int]]:
        batches = training_batches(numbered(4 * 12 + 1), 4, 4, seed)
        return [batch[:, 0].tolist() for batch in itertools.islice(batches, count)]

    assert order(1, 6) == order(1, 6)
    assert order(1, 3) != order(2, 3)
    assert order(1, 6)[:3] != order(1, 6)[3:]


def test_a_restored_iterator_goes_on_where_the_other_stood():
    corpus = numbered(401)
    batches = training_batches(corpus, 4, 8, 0)
    for _ in range(17):
        next(batches)
    restored = training_batches(corpus, 4, 8, 0)
    restored.set_state(batches.get_state())
    for _ in range(20):
        np.testing.assert_array_equal(next(batches), next(restored))


def test_held_out_text_is_read_once_and_padding_weighs_nothing():
    corpus = numbered(4 * 4 * 10 + 4)
    pairs = list(held_out_batches(corpus, seq_len=4, batch_size=4))
    assert [weights.tolist() for _, weights in pairs] == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert [batch.shape for batch, _ in pairs] == [(4, 5)] * 3
    real = np.concatenate([batch[weights > 0] for batch, weights in pairs])
    np.testing.assert_array_equal(real[:, :4].ravel(), corpus.held_out[:40])


def test_a_limited_evaluation_reads_windows_spread_evenly():
    corpus = numbered(4 * 4 * 10 + 4)
    ((batch, weights),) = held_out_batches(corpus, seq_len=4, batch_size=4, max_tokens=12)
    assert weights.sum() == 3
    assert batch[:3, 0].tolist() == [0, 16, 36]
