"""Bytes to tokens and back: single bytes, GPT-2's byte pairs, pixels."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

from train.errors import TrainError
from train.files import cannot_be

END_OF_TEXT = "<|endoftext|>"
BPE_FILES = ("encoder.json", "vocab.bpe")
BPE_REMEDY = "Name a folder that holds GPT-2's encoder.json and vocab.bpe with --bpe."


class InvalidUtf8(TrainError):
    """Bytes that a tokenizer of text cannot take."""

    def __init__(self, offset: int, byte: int):
        super().__init__(f"byte {offset} (0x{byte:02x}) is not valid UTF-8")
        self.offset, self.byte = offset, byte


class Tokenizer(Protocol):
    """What a corpus knows of its tokens."""

    name: str
    identity: str
    """Differs between tokenizers that differ."""
    unit: str
    """What people count: "byte", "token" or "pixel"."""
    vocab_size: int
    separator: int
    """The token that opens each document."""
    dtype: type[np.unsignedinteger]
    token_bytes: np.ndarray
    """int64 `[vocab_size]`: bytes that each token stands for, the separator counted as one."""

    def encode(self, content: bytes) -> np.ndarray:
        """Tokens of a text or image, `[N]`, without a separator."""

    def decode(self, tokens: np.ndarray) -> bytes:
        """What tokens `[N]` stand for; the inverse of `encode`."""


class ByteTokenizer:
    """Every byte is a token; byte 0 opens a document."""

    name = identity = "bytes"
    unit = "byte"
    vocab_size = 256
    separator = 0
    dtype = np.uint8
    token_bytes = np.ones(256, np.int64)

    def encode(self, content: bytes) -> np.ndarray:
        return np.frombuffer(content, np.uint8)

    def decode(self, tokens: np.ndarray) -> bytes:
        return np.asarray(tokens).astype(np.uint8).tobytes()


class PixelTokenizer:
    """Every pixel, 0 to 255, is a token; 256 opens an image."""

    name = identity = "pixels"
    unit = "pixel"
    vocab_size = 257
    separator = 256
    dtype = np.uint16
    token_bytes = np.ones(257, np.int64)

    def encode(self, content: bytes) -> np.ndarray:
        return np.frombuffer(content, np.uint8).astype(np.uint16)

    def decode(self, tokens: np.ndarray) -> bytes:
        """The pixels, without separators."""
        tokens = np.asarray(tokens)
        return tokens[tokens != self.separator].astype(np.uint8).tobytes()


class Gpt2Tokenizer:
    """The byte-pair encoding of Radford et al. 2019, by tiktoken; `<|endoftext|>` opens a document.

    Args:
        folder: Holds `encoder.json` and `vocab.bpe`.

    Raises:
        TrainError: A file is missing, cannot be read, or they do not fit together.
    """

    name = "gpt2"
    unit = "token"
    dtype = np.uint16

    def __init__(self, folder: Path):
        encoder, merges = (folder / name for name in BPE_FILES)
        hashes = [_sha256(path) for path in (encoder, merges)]
        try:
            # tiktoken keeps copies of what it read; the hashes keep it from taking one that is out of date.
            ranks = data_gym_to_mergeable_bpe_ranks(str(merges), str(encoder), hashes[1], hashes[0])
            if sorted(ranks.values()) != list(range(len(ranks))):
                raise ValueError("its numbers have gaps")
        except OSError as error:
            raise cannot_be("read", error.filename or folder, error, BPE_REMEDY) from None
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[:1] or ["they do not fit together"]
            raise TrainError(
                f"{encoder} and {merges} are no byte-pair encoding ({reason[0]:.100}). {BPE_REMEDY}"
            ) from None
        self.separator = len(ranks)
        self.vocab_size = len(ranks) + 1
        if self.vocab_size > 2**16:
            raise TrainError(f"{encoder} has {self.vocab_size:,} tokens, more than 65,536. {BPE_REMEDY}")
        self.identity = f"gpt2 {hashes[0][:16]} {hashes[1][:16]}"
        self._encoding = tiktoken.Encoding(
            "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: self.separator}
        )
        self._content = [content for content, _ in sorted(ranks.items(), key=lambda entry: entry[1])]
        self._content.append(END_OF_TEXT.encode())
        self.token_bytes = np.array([len(content) for content in self._content], np.int64)
        self.token_bytes[self.separator] = 1

    def encode(self, content: bytes) -> np.ndarray:
        """Tokens of a text, uint16 `[N]`; `<|endoftext|>` in it is text like any other.

        Raises:
            InvalidUtf8: It is not UTF-8.
        """
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise InvalidUtf8(error.start, content[error.start]) from None
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
        except ValueError as error:  # of the pattern's engine, whose stack ends
            raise TrainError(f"it holds a run of blanks that is too long for byte pairs ({error})") from None

    def decode(self, tokens: np.ndarray) -> bytes:
        return b"".join(self._content[token] for token in np.asarray(tokens).tolist())


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        raise TrainError(f"{path} does not exist. {BPE_REMEDY}") from None
    except OSError as error:
        raise cannot_be("read", path, error, BPE_REMEDY) from None
