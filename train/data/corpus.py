"""A corpus: tokens to train on, to hold out and to test on.

A text is one array of tokens: its documents one after another, each opened by the tokenizer's separator. Its last
part, from a document's beginning on where there is one nearby, is held out; enwik8 has parts of its own. Where the
parts begin is decided in bytes, so that tokenizers can be compared. Windows of the parts lie side by side without
overlap, so no held-out token is ever trained on.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from train.config import DataConfig
from train.data.mnist import PIXELS, TEST_FILE, TRAIN_FILE, is_mnist, read_images
from train.data.sources import Source, find_source
from train.data.tokenizer import BPE_REMEDY, ByteTokenizer, Gpt2Tokenizer, PixelTokenizer, Tokenizer
from train.data.tokens import Tokens, load_tokens
from train.errors import TrainError

BLOCK_TOKENS = 2**20


@dataclass(frozen=True)
class Corpus:
    """Tokens, uint8 or uint16: `[N]` of a text, or `[images, T + 1]` where each sequence stands for itself."""

    name: str  # for people: what it is
    tokenizer: Tokenizer
    train: np.ndarray
    held_out: np.ndarray
    test: np.ndarray | None
    documents: int
    sha256: str  # of all the tokens and of where documents start
    starts: Mapping[str, np.ndarray] = field(default_factory=dict)
    """For each part of a text: int64 `[documents]`, where those that begin in it start."""

    @property
    def vocab_size(self) -> int:
        """How many tokens there are."""
        return self.tokenizer.vocab_size

    @property
    def unit(self) -> str:
        """What people count: "byte", "token" or "pixel"."""
        return self.tokenizer.unit

    def units_per_token(self, part: str) -> float:
        """Bytes a token on a part of the text, a separator counted as one: what a loss is divided by for bits a byte.

        1.0 for bytes and pixels.
        """
        tokens = self.part(part)
        return max(int(block[-1]) for block in _byte_ends(self.tokenizer, tokens.ravel())) / tokens.size

    @property
    def facts(self) -> dict[str, str | int]:
        """What identifies it, for `config.json`."""
        parts = {"train": self.train, "held_out": self.held_out, "test": self.test}
        return {
            "name": self.name,
            "tokenizer": self.tokenizer.identity,
            "documents": self.documents,
            **{f"{name}_{self.unit}s": part.size for name, part in parts.items() if part is not None},
            "sha256": self.sha256,
        }

    def part(self, name: str) -> np.ndarray:
        """The tokens of "train", "held_out" or "test".

        Raises:
            TrainError: The corpus has no test part.
        """
        tokens: np.ndarray | None = getattr(self, name)
        if tokens is None:
            raise TrainError(f"{self.name} has no {name} part. Take enwik8 or MNIST, or the held-out part.")
        return tokens


def load_corpus(config: DataConfig) -> Corpus:
    """Reads a corpus and splits it.

    Args:
        config: Which, in which tokens, and how much of it is held out.

    Returns:
        The corpus; each part is at least one sequence long.

    Raises:
        TrainError: It cannot be read, is empty, or is too short.
    """
    if config.data is not None and is_mnist(Path(config.data)):
        corpus = _mnist(Path(config.data), config)
    else:
        source, tokenizer = find_source(config.data), _tokenizer(config)
        tokens = load_tokens(source, tokenizer, _cache(config))
        corpus = _split(source, tokenizer, tokens, config.held_out)
    _check_lengths(corpus, config)
    return corpus


def _tokenizer(config: DataConfig) -> Tokenizer:
    if config.tokenizer == "gpt2":
        if config.bpe is None:
            raise TrainError(f"--tokenizer gpt2 needs its files. {BPE_REMEDY}")
        return Gpt2Tokenizer(Path(config.bpe))
    if config.bpe is not None:
        raise TrainError(f"--bpe {config.bpe} goes with --tokenizer gpt2, got --tokenizer {config.tokenizer}.")
    return ByteTokenizer()


def _cache(config: DataConfig) -> Path:
    if config.cache is not None:
        return Path(config.cache)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scfa_jax"
    except RuntimeError as error:
        raise TrainError(f"There is no folder for caches ({error}). Name one with --cache.") from None


def _split(source: Source, tokenizer: Tokenizer, tokens: Tokens, held_out: float) -> Corpus:
    values, starts = tokens.values, tokens.starts
    if source.split:
        if len(starts) < 3:
            raise TrainError(f"{source.place} is too short to be split. Name a longer one with --data.")
        cuts = [int(start) for start in starts[1:]]
    else:
        cuts = [_held_out_start(tokens, tokenizer, held_out), len(values)]
    edges = {"train": (0, cuts[0]), "held_out": (cuts[0], cuts[1]), "test": (cuts[1], len(values))}
    return Corpus(
        name=source.name,
        tokenizer=tokenizer,
        train=values[: cuts[0]],
        held_out=values[cuts[0] : cuts[1]],
        test=values[cuts[1] :] if source.split else None,
        documents=1 if source.split else len(starts),
        sha256=tokens.sha256,
        starts={
            part: starts[np.searchsorted(starts, start) : np.searchsorted(starts, stop)] - start
            for part, (start, stop) in edges.items()
        },
    )


def _held_out_start(tokens: Tokens, tokenizer: Tokenizer, held_out: float) -> int:
    """The token where the held-out part begins: at the document nearest to its share, or within one if none is near."""
    begins = np.cumsum(tokens.sizes) - tokens.sizes  # in bytes
    total = int(tokens.sizes.sum())
    wanted = total - max(1, round(total * held_out))
    nearest = int(np.abs(begins - wanted).argmin())
    if nearest > 0 and abs(int(begins[nearest]) - wanted) <= 0.5 * (total - wanted):
        return int(tokens.starts[nearest])
    document = int(np.searchsorted(begins, wanted, side="right")) - 1
    start, stop = tokens.starts[document], [*tokens.starts[document + 1 :][:1], len(tokens.values)][0]
    ends = _byte_ends(tokenizer, tokens.values[start:stop])
    return int(start + sum(np.searchsorted(block, wanted - begins[document], side="right") for block in ends))


def _byte_ends(tokenizer: Tokenizer, tokens: np.ndarray) -> Iterator[np.ndarray]:
    """Bytes up to and with each token, int64, in blocks: a large corpus would not fit."""
    done = 0
    for start in range(0, len(tokens), BLOCK_TOKENS):
        ends = done + np.cumsum(tokenizer.token_bytes[tokens[start : start + BLOCK_TOKENS]])
        done = int(ends[-1])
        yield ends


def _mnist(folder: Path, config: DataConfig) -> Corpus:
    if config.tokenizer != "bytes":
        raise TrainError(f"{folder} holds images, whose tokens are pixels. Leave out --tokenizer {config.tokenizer}.")
    if config.seq_len != PIXELS:
        raise TrainError(
            f"{folder} holds images, each a sequence of {PIXELS} pixels. Set --seq-len {PIXELS} (now {config.seq_len})."
        )
    images, test = (read_images(folder, name) for name in (TRAIN_FILE, TEST_FILE))
    split = len(images) - max(1, round(len(images) * config.held_out))
    digest = hashlib.sha256(images.data)
    digest.update(test.data)
    return Corpus(
        name=f"{folder.name}, {len(images):,} and {len(test):,} images",
        tokenizer=PixelTokenizer(),
        train=images[:split],
        held_out=images[split:],
        test=test,
        documents=len(images) + len(test),
        sha256=digest.hexdigest(),
    )


def _check_lengths(corpus: Corpus, config: DataConfig) -> None:
    needed = config.seq_len + 1
    for title, part in (("training", corpus.train), ("held-out", corpus.held_out), ("test", corpus.test)):
        if part is not None and part.size < needed:
            raise TrainError(
                f"{config.data or corpus.name} is too short: its {title} part has {part.size} {corpus.unit}s, one "
                f"sequence takes {needed}. Lower --seq-len (now {config.seq_len}), change --held-out, or name a "
                f"longer text."
            )
