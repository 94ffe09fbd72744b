"""The parts of a corpus: where they begin, enwik8's own, MNIST's."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from data_cases import load, text_of, write_bpe, write_json_lines
from hypothesis import assume, given
from hypothesis import strategies as st

import train.data.corpus
import train.data.sources
from train.errors import TrainError

IMAGES_MAGIC = 0x803


@pytest.fixture
def gpt2(tmp_path, monkeypatch) -> dict:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    return {"tokenizer": "gpt2", "bpe": str(write_bpe(tmp_path / "bpe")), "cache": str(tmp_path / "cache")}


def test_whole_documents_are_held_out_where_they_are_small_enough(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", [f"document {number:03}" for number in range(100)])
    corpus = load(path, held_out=0.07)
    assert corpus.train.tobytes().endswith(b"\0document 092")
    assert corpus.held_out.tobytes().startswith(b"\0document 093")
    assert corpus.starts["train"].tolist() == list(range(0, 93 * 13, 13))
    assert corpus.starts["held_out"].tolist() == list(range(0, 7 * 13, 13))


def test_a_long_document_is_cut(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(range(1, 201)))
    corpus = load(path, held_out=0.1)
    assert corpus.held_out.tobytes() == bytes(range(181, 201))
    assert corpus.starts["held_out"].size == 0


@pytest.mark.parametrize("lengths", [[30] * 50, [400, 600, 500]])
def test_tokenizers_hold_out_the_same_text(lengths, tmp_path, gpt2, monkeypatch):
    monkeypatch.setattr(train.data.corpus, "BLOCK_TOKENS", 7)
    texts = [
        f"{number} " + "aa the thé"[: length % 11] + " the a" * (length // 6) for number, length in enumerate(lengths)
    ]
    path = write_json_lines(tmp_path / "a.jsonl", texts)
    by_bytes, by_pairs = load(path, held_out=0.1), load(path, held_out=0.1, **gpt2)
    held_out, decoded = (
        corpus.tokenizer.decode(corpus.held_out).replace(b"<|endoftext|>", b"\0") for corpus in (by_bytes, by_pairs)
    )
    if len(lengths) == 50:
        assert decoded == held_out
    else:  # cut within a document: at most a token apart
        assert held_out.endswith(decoded) or decoded.endswith(held_out)
        assert abs(len(held_out) - len(decoded)) <= 4
    assert by_pairs.units_per_token("held_out") == pytest.approx(len(decoded) / len(by_pairs.held_out))
    assert by_pairs.units_per_token("held_out") > 1.5


def test_facts_tell_corpora_apart_by_content_not_by_place(tmp_path):
    texts = ["some text", "more text"]
    one = write_json_lines(tmp_path / "one.jsonl", texts)
    moved = write_json_lines(tmp_path / "moved.jsonl", texts)
    other = write_json_lines(tmp_path / "other.jsonl", ["some text\0more text"])  # the same bytes, one document
    facts = load(one).facts
    assert facts == {**load(moved).facts, "name": "one.jsonl"}
    assert facts["sha256"] != load(other).facts["sha256"]
    assert (facts["documents"], facts["tokenizer"]) == (2, "bytes")
    assert facts["train_bytes"] + facts["held_out_bytes"] == 20


@pytest.mark.parametrize("name", ["enwik8", "enwik8_prefix.gz", "ENWIK8.txt"])
def test_enwik8_has_a_test_part_by_its_name(name, tmp_path):
    content = np.random.default_rng(0).integers(0, 256, 10_007, np.uint8).tobytes()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    corpus = load(tmp_path / name, held_out=0.5)
    # A separator opens each part, so that its first byte is predicted as well.
    assert corpus.train.tobytes() == b"\0" + content[:9006]
    assert corpus.held_out.tobytes() == b"\0" + content[9006:9506]
    assert corpus.part("test").tobytes() == b"\0" + content[9506:]
    assert corpus.documents == 1


def test_enwik8_of_full_length_is_split_into_90_and_5_and_5_megabytes(tmp_path):
    path = tmp_path / "enwik8.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for letter, megabytes in ((b"a", 90), (b"b", 5), (b"c", 5)):
            file.write(letter * (megabytes * 10**6))
    corpus = load(path)
    for part, letter, megabytes in ((corpus.train, "a", 90), (corpus.held_out, "b", 5), (corpus.part("test"), "c", 5)):
        assert len(part) == 1 + megabytes * 10**6
        assert (part[1:] == ord(letter)).all()


@pytest.mark.parametrize("shift", range(3))
def test_byte_pairs_of_enwik8_cut_no_character(shift, tmp_path, gpt2):
    content = b"a" * shift + "€".encode() * 1000
    (tmp_path / "enwik8").write_bytes(content)
    corpus = load(tmp_path / "enwik8", **gpt2)
    parts = [corpus.tokenizer.decode(part[1:]) for part in (corpus.train, corpus.held_out, corpus.part("test"))]
    assert b"".join(parts) == content
    for part, share in zip(parts, (0.9, 0.05, 0.05), strict=True):
        part.decode()
        assert abs(len(part) - share * len(content)) < 3


def test_an_enwik8_too_short_for_three_parts_says_so(tmp_path):
    (tmp_path / "enwik8").write_bytes(b"a" * 3)
    with pytest.raises(TrainError, match=r"enwik8 is too short to be split\. Name a longer one"):
        load(tmp_path / "enwik8")


def test_a_corpus_without_a_test_part_says_so(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(TrainError, match=r"a\.txt has no test part"):
        load(tmp_path / "a.txt").part("test")


@pytest.mark.parametrize(
    ("options", "part"),
    [({"seq_len": 200}, "training part has 161 bytes"), ({"seq_len": 60}, "held-out part has 40 bytes")],
)
def test_each_part_must_hold_a_sequence(options, part, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a" * 200)
    with pytest.raises(TrainError, match=f"a.txt is too short: its {part}, one sequence takes .*Lower --seq-len"):
        load(path, held_out=0.2, **options)


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=30),
    held_out=st.floats(0.05, 0.95),
)
def test_parts_never_overlap_and_hold_about_their_share(lengths, held_out, tmp_path_factory):
    texts = [chr(97 + number % 26) * length for number, length in enumerate(lengths)]
    path = write_json_lines(tmp_path_factory.mktemp("split") / "a.jsonl", texts)
    total = sum(lengths) + len(lengths)
    assume(min(total * held_out, total * (1 - held_out)) > 4)
    corpus = load(path, held_out=held_out)
    assert text_of(corpus) == "".join("\0" + text for text in texts).encode()
    assert 0.5 * total * held_out - 1 <= len(corpus.held_out) <= 1.5 * total * held_out + 1
    for part in ("train", "held_out"):
        assert (corpus.part(part)[corpus.starts[part]] == 0).all()
        assert len(corpus.starts[part]) == (corpus.part(part) == 0).sum()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good\n" * 9 + b"bad \xff", r"a\.txt: byte 49 \(0xff\) is not valid UTF-8\. .*--tokenizer bytes"),
        ("a.txt.gz", gzip.compress(b"cut \xc3"), r"a\.txt\.gz: byte 4 \(0xc3\) is not valid UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: not valid JSON"),
        ("a.jsonl", b"\n\n", "holds no text"),
        ("absent.txt", None, "does not exist"),
        ("cut.gz", gzip.compress(b"text" * 99)[:-9], "not a whole gzip file"),
    ],
    ids=["latin", "half a character", "latin in JSON", "blank", "absent", "cut"],
)
def test_bad_input_leaves_nothing_in_the_cache(name, content, message, gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr(train.data.sources, "BLOCK_BYTES", 16)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainError, match=message) as raised:
        load(tmp_path / name, **gpt2)
    assert str(tmp_path / name) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "gpt2"}, "--tokenizer gpt2 needs its files. Name a folder that holds GPT-2's encoder.json"),
        ({"bpe": "bpe"}, "--bpe bpe goes with --tokenizer gpt2, got --tokenizer bytes"),
        ({"tokenizer": "gpt2", "bpe": "absent"}, "absent/encoder.json does not exist. Name a folder"),
    ],
)
def test_options_that_do_not_fit_together_are_named(options, message, tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(TrainError, match=message):
        load(tmp_path, **options)


# MNIST


def idx(images: np.ndarray, magic: int = IMAGES_MAGIC) -> bytes:
    return struct.pack(">4I", magic, *images.shape) + images.tobytes()


@pytest.fixture
def mnist(tmp_path) -> Path:
    """A folder of 40 and 10 images of noise, some files packed, as people have them."""
    images = np.random.default_rng(0).integers(0, 256, (50, 28, 28), np.uint8)
    folder = tmp_path / "mnist"
    folder.mkdir()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images[:40])))
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(images[40:]))
    (folder / "train-labels-idx1-ubyte").write_bytes(b"not read")
    return folder


@pytest.mark.parametrize("held_out", [0.05, 0.5])
def test_each_image_is_a_sequence_that_a_token_opens(held_out, mnist):
    corpus = load(mnist, seq_len=784, held_out=held_out)
    images = np.random.default_rng(0).integers(0, 256, (50, 784), np.uint8)
    assert (corpus.vocab_size, corpus.unit, corpus.units_per_token("held_out")) == (257, "pixel", 1.0)
    cut = 40 - round(40 * held_out)
    parts = ((corpus.train, images[:cut]), (corpus.held_out, images[cut:40]), (corpus.part("test"), images[40:]))
    for part, expected in parts:
        assert part.dtype == np.uint16
        assert (part[:, 0] == 256).all()
        np.testing.assert_array_equal(part[:, 1:], expected)
    assert corpus.tokenizer.decode(corpus.train[0]) == images[0].tobytes()
    assert corpus.facts["sha256"] == load(mnist, seq_len=784, held_out=held_out).facts["sha256"]


GOOD = idx(np.zeros((3, 28, 28), np.uint8))
BAD_IMAGES = {
    "magic": (GOOD.replace(b"\x08\x03", b"\x08\x01", 1), "begins with 0x00000801, not with the magic number"),
    "cut": (GOOD[:-1], "has 2,367 bytes, and 3 images need 2,368. Fetch it again"),
    "longer": (GOOD + b"\0", "has 2,369 bytes"),
    "header": (GOOD[:10], "has 10 bytes, fewer than the header"),
    "empty": (b"", "has 0 bytes, fewer than the header"),
    "shape": (idx(np.zeros((3, 32, 32), np.uint8)), "has images of 32 x 32 pixels, not 28 x 28"),
    "cut gzip": (gzip.compress(GOOD)[:-9], "is not a whole gzip file"),
    "no gzip": (b"not gzip at all", "is not a whole gzip file"),
    "few": (idx(np.zeros((1, 28, 28), np.uint8)), "its training part has 0 pixels"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_damaged_images_are_named_with_a_remedy(name, mnist):
    content, message = BAD_IMAGES[name]
    (mnist / "train-images-idx3-ubyte.gz").unlink()
    path = mnist / ("train-images-idx3-ubyte" + ".gz" * name.endswith("gzip"))
    path.write_bytes(content)
    with pytest.raises(TrainError, match=message) as raised:
        load(mnist, seq_len=784)
    assert str(path if name != "few" else mnist) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 512}, r"each a sequence of 784 pixels\. Set --seq-len 784 \(now 512\)"),
        ({"seq_len": 784, "tokenizer": "gpt2"}, r"tokens are pixels\. Leave out --tokenizer gpt2"),
    ],
)
def test_images_ask_for_fitting_options(options, message, mnist):
    with pytest.raises(TrainError, match=message):
        load(mnist, **options)


def test_mnist_without_its_test_images_says_which_file_is_missing(mnist):
    (mnist / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(TrainError, match=r"t10k-images-idx3-ubyte is missing, also as \.gz"):
        load(mnist, seq_len=784)
