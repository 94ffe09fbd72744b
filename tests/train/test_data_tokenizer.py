"""Bytes to tokens and back."""

from __future__ import annotations

import json
import socket

import numpy as np
import pytest
from data_cases import MERGES, load, write_bpe
from hypothesis import given
from hypothesis import strategies as st

import train.data.sources
from train.data.sources import find_source
from train.data.tokenizer import ByteTokenizer, Gpt2Tokenizer, InvalidUtf8, PixelTokenizer
from train.errors import TrainError


@pytest.fixture(autouse=True, scope="module")
def _no_copies():
    """tiktoken would leave copies of the small encodings in the system's folder for temporary files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")
        yield


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Gpt2Tokenizer:
    return Gpt2Tokenizer(write_bpe(tmp_path_factory.mktemp("bpe")))


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), PixelTokenizer()])
@given(content=st.binary())
def test_bytes_and_pixels_come_back(tokenizer, content):
    tokens = tokenizer.encode(content)
    assert tokens.tolist() == list(content)
    assert tokens.dtype == tokenizer.dtype
    assert tokenizer.decode(tokens) == content


@given(text=st.text())
def test_any_text_comes_back_from_byte_pairs(gpt2, text):
    tokens = gpt2.encode(text.encode())
    assert tokens.dtype == np.uint16
    assert gpt2.decode(tokens) == text.encode()
    assert gpt2.token_bytes[tokens].sum() == len(text.encode())


def test_byte_pairs_are_merged_in_order_within_words(gpt2):
    first = 256  # the numbers of single bytes come before
    assert gpt2.vocab_size == 256 + len(MERGES) + 1
    assert gpt2.encode(b"the the").tolist() == [first + 1, first + 2]
    assert gpt2.encode(b"aaa").tolist() == [first + 8, ord("a") - ord("!")]
    # GPT-2's pattern: the last line end before a word stands alone.
    line_end = gpt2.encode(b"\n").item()
    assert gpt2.encode(b"\n\n\nthe").tolist() == [first + 3, line_end, first + 1]


def test_the_separator_is_no_text(gpt2):
    assert gpt2.separator == gpt2.vocab_size - 1
    assert gpt2.separator not in gpt2.encode(b"<|endoftext|>")
    assert gpt2.decode(np.array([gpt2.separator], np.uint16)) == b"<|endoftext|>"
    assert gpt2.token_bytes[gpt2.separator] == 1
    assert PixelTokenizer().decode(np.array([256, 7, 256], np.uint16)) == b"\x07"


@given(
    text=st.text(alphabet="ath é'1!\n\t\r\x1c\x85\u2003\u2028\u3000", max_size=80),
    block=st.integers(4, 20),
)
def test_pieces_give_the_tokens_of_the_whole_text(gpt2, text, block, tmp_path_factory):
    path = tmp_path_factory.mktemp("pieces") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.data.sources, "BLOCK_BYTES", block)
        pieces = list(find_source(str(path)).pieces(whole_characters=True))
    tokens = [token for piece in pieces for token in gpt2.encode(piece.content).tolist()]
    assert tokens == gpt2.encode(text.encode()).tolist()


def test_bytes_that_are_no_text_are_refused(gpt2):
    with pytest.raises(InvalidUtf8, match=r"byte 3 \(0xff\) is not valid UTF-8"):
        gpt2.encode(b"abc\xff")


def test_a_run_of_blanks_that_its_engine_cannot_take_is_named(tmp_path):
    path = tmp_path / "blanks.txt"
    path.write_bytes(b" " * 1_000_000 + b"word")
    options = {"tokenizer": "gpt2", "bpe": str(write_bpe(tmp_path / "bpe")), "cache": str(tmp_path / "cache")}
    with pytest.raises(TrainError, match=r"blanks\.txt: it holds a run of blanks .* take --tokenizer bytes") as raised:
        load(path, **options)
    assert "\n" not in str(raised.value)


def test_another_encoding_has_another_identity(gpt2, tmp_path):
    assert Gpt2Tokenizer(write_bpe(tmp_path)).identity == gpt2.identity
    # In the same folder: no copy of what was there before is taken.
    other = Gpt2Tokenizer(write_bpe(tmp_path, MERGES[:-1]))
    assert other.identity != gpt2.identity
    assert other.vocab_size == gpt2.vocab_size - 1


def test_reading_an_encoding_opens_no_connection(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a socket was made")

    monkeypatch.setattr(socket, "socket", refuse)
    assert Gpt2Tokenizer(write_bpe(tmp_path)).encode(b"the").size == 1


def _drop_a_merge(folder):
    lines = (folder / "vocab.bpe").read_text().splitlines()
    (folder / "vocab.bpe").write_text("\n".join([*lines[:-1], ""]))


def _move_the_numbers(folder):
    encoder = json.loads((folder / "encoder.json").read_text())
    (folder / "encoder.json").write_text(json.dumps({token: number + 1 for token, number in encoder.items()}))


BREAK = {
    "absent": (lambda folder: (folder / "vocab.bpe").unlink(), "vocab.bpe does not exist"),
    "a folder": (lambda folder: [(folder / "encoder.json").unlink(), (folder / "encoder.json").mkdir()], "be read"),
    "cut": (lambda folder: (folder / "encoder.json").write_text('{"a": 1'), "no byte-pair encoding"),
    "a list": (lambda folder: (folder / "encoder.json").write_text("[1]"), "no byte-pair encoding"),
    "no number": (lambda folder: (folder / "encoder.json").write_text('{"a": "b"}'), "no byte-pair encoding"),
    "empty": (lambda folder: (folder / "vocab.bpe").write_text(""), "no byte-pair encoding"),
    "binary": (lambda folder: (folder / "vocab.bpe").write_bytes(b"\xff\xfe"), "no byte-pair encoding"),
    "one merge less": (_drop_a_merge, "they do not fit together"),
    "other numbers": (_move_the_numbers, "they do not fit together"),
    "too many": (lambda folder: write_bpe(folder, _many_merges()), "65,793 tokens, more than 65,536"),
}


def _many_merges():
    """A merge for each pair of bytes."""
    return [(bytes([first]), bytes([second])) for first in range(256) for second in range(256)]


@pytest.mark.parametrize("name", BREAK)
def test_files_that_are_no_encoding_are_named_with_a_remedy(name, tmp_path):
    damage, message = BREAK[name]
    damage(write_bpe(tmp_path / "bpe"))
    with pytest.raises(TrainError, match=message) as raised:
        Gpt2Tokenizer(tmp_path / "bpe")
    assert str(tmp_path / "bpe") in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "--bpe" in str(raised.value)
