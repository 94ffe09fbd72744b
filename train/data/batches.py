"""Batches of windows: shuffled for training, in order for evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import grain
import numpy as np

from train.config import DataConfig
from train.data.corpus import Corpus
from train.errors import TrainError


class Batch(NamedTuple):
    """Sequences, each with one more token to predict."""

    tokens: np.ndarray
    """uint8 or uint16 `[B, T + 1]`."""
    segment_ids: np.ndarray | None
    """int32 `[B, T + 1]`: which of the sequence's documents each token belongs to, from 0 on; None with
    `--documents together`."""


def training_batches(
    corpus: Corpus, config: DataConfig, seed: int, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """Endless shuffled batches of the training part, a new order each epoch, read ahead in threads.

    Args:
        corpus: The corpus.
        config: Length and number of the sequences; `batch_size` counts those of all processes.
        seed: Decides the order.
        process_index: Which of the processes this is.
        process_count: How many there are. Process `i` reads rows `i * B / count` to `(i + 1) * B / count` of each
            batch, so the batches, and the iterator's state, are the same for any number of them.

    Returns:
        An iterator over `Batch`, which orbax can save and restore.

    Raises:
        TrainError: The processes cannot share a batch evenly.
    """
    rows, rest = divmod(config.batch_size, process_count)
    if rest:
        raise TrainError(f"--batch-size must be a multiple of the {process_count} processes, got {config.batch_size}.")
    windows = _Windows(corpus, config, "train")
    mine = slice(process_index * rows, (process_index + 1) * rows)
    # Only numbers of windows are shuffled: no process reads what others train on.
    # There is no remainder of endless data; to say so keeps grain's count of batches of one sequence within its limit.
    numbers = grain.MapDataset.source(range(len(windows))).seed(seed).shuffle().repeat()
    numbers = numbers.batch(config.batch_size, drop_remainder=True)
    reading = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
    return iter(numbers.map(lambda batch: windows.read(batch[mine])).to_iter_dataset(reading))


def held_out_batches(
    corpus: Corpus, config: DataConfig, max_tokens: int = 0, part: str = "held_out"
) -> Iterator[tuple[Batch, np.ndarray]]:
    """The held-out or another part once, always the same windows.

    Args:
        corpus: The corpus.
        config: Length and number of the sequences; the last batch is filled up with windows of weight 0.
        max_tokens: Read about this many at most, in windows spread evenly; 0 for all.
        part: "held_out", "test" or "train".

    Yields:
        A `Batch` and the float32 weights `[B]` of its windows, 1 or 0.

    Raises:
        TrainError: The corpus has no such part.
    """
    windows = _Windows(corpus, config, part)
    count = len(windows) if not max_tokens else max(1, min(len(windows), max_tokens // config.seq_len))
    chosen = np.linspace(0, len(windows) - 1, count).round().astype(int)
    for start in range(0, count, config.batch_size):
        real = chosen[start : start + config.batch_size]
        filled = np.pad(real, (0, config.batch_size - len(real)), mode="edge")
        yield windows.read(filled), (np.arange(config.batch_size) < len(real)).astype(np.float32)


def evaluated_bytes(corpus: Corpus, config: DataConfig, max_tokens: int = 0, part: str = "held_out") -> float:
    """Bytes that a token to predict stands for, in the mean over what `held_out_batches` reads: arguments as there."""
    total = count = 0.0
    for batch, weights in held_out_batches(corpus, config, max_tokens, part):
        targets = batch.tokens[:, 1:]
        total += float(weights @ corpus.tokenizer.token_bytes[targets].sum(axis=1))
        count += float(weights.sum()) * targets.shape[1]
    return total / count


class _Windows:
    """Windows of `seq_len` tokens of a part side by side, each with one more to predict; or its single images."""

    def __init__(self, corpus: Corpus, config: DataConfig, part: str):
        self._tokens = corpus.part(part)
        self._seq_len = config.seq_len
        self._starts = corpus.starts.get(part, np.zeros(0, np.int64))
        self._separate = config.documents == "separate"

    def __len__(self) -> int:
        if self._tokens.ndim == 2:
            return len(self._tokens)
        return (len(self._tokens) - 1) // self._seq_len

    def read(self, numbers: np.ndarray) -> Batch:
        """The windows of these numbers `[B]`."""
        if self._tokens.ndim == 2:
            tokens = self._tokens[numbers]
            return Batch(tokens, np.zeros(tokens.shape, np.int32) if self._separate else None)
        begins = numbers * self._seq_len
        tokens = np.stack([self._tokens[begin : begin + self._seq_len + 1] for begin in begins])
        if not self._separate:
            return Batch(tokens, None)
        places = begins[:, None] + np.arange(self._seq_len + 1)
        documents = np.searchsorted(self._starts, places, side="right")
        return Batch(tokens, (documents - documents[:, :1]).astype(np.int32))
