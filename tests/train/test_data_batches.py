"""Windows, their order, their documents, and who reads which."""

from __future__ import annotations

import itertools

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from data_cases import corpus_of
from hypothesis import given
from hypothesis import strategies as st

from train.config import DataConfig
from train.data import Batch, Corpus, evaluated_bytes, held_out_batches, training_batches
from train.data.tokenizer import PixelTokenizer
from train.errors import TrainError

FOUR = DataConfig(seq_len=4, batch_size=4)


def numbered(count: int) -> Corpus:
    tokens = (np.arange(count) % 251).astype(np.uint8)
    return corpus_of(tokens, tokens[: count // 4])


def images(count: int) -> Corpus:
    tokens = np.arange(count * 785).reshape(count, 785).astype(np.uint16) % 257
    return corpus_of(tokens, tokenizer=PixelTokenizer())


def documents_of(lengths: list[int]) -> Corpus:
    """Documents whose tokens are all their own number, less the first, which is 0."""
    tokens = np.concatenate([np.r_[0, np.full(length, number)] for number, length in enumerate(lengths, start=1)])
    starts = np.cumsum([0, *[length + 1 for length in lengths[:-1]]])
    return corpus_of(tokens.astype(np.uint8), starts={"train": starts, "held_out": starts})


@pytest.mark.parametrize("batch_size", [1, 3, 12])
def test_batches_are_windows_with_the_next_token_and_an_epoch_reads_all_of_them_once(batch_size):
    batches = training_batches(numbered(4 * 12 + 1), DataConfig(seq_len=4, batch_size=batch_size), seed=0)
    epoch = np.concatenate([next(batches).tokens for _ in range(12 // batch_size)])
    assert epoch.shape == (12, 5)
    assert epoch.dtype == np.uint8
    assert sorted(epoch[:, 0].tolist()) == list(range(0, 48, 4))
    assert (np.diff(epoch.astype(int), axis=1) == 1).all()


@given(count=st.integers(10, 200), seq_len=st.integers(1, 9), batch_size=st.integers(1, 7))
def test_windows_cover_a_part_without_overlap_but_for_a_rest(count, seq_len, batch_size):
    corpus = corpus_of(np.arange(count).astype(np.uint8))
    pairs = list(held_out_batches(corpus, DataConfig(seq_len=seq_len, batch_size=batch_size)))
    assert all(batch.tokens.shape == (batch_size, seq_len + 1) for batch, _ in pairs)
    real = np.concatenate([batch.tokens[weights > 0] for batch, weights in pairs])
    assert real[:, :-1].ravel().tolist() == list(range(len(real) * seq_len))
    assert real[:, 1:].ravel().tolist() == list(range(1, len(real) * seq_len + 1))
    assert count - 1 - seq_len < len(real) * seq_len <= count - 1


def test_the_seed_decides_the_order_and_every_epoch_has_its_own():
    def order(seed: int, count: int) -> list[list[int]]:
        batches = training_batches(numbered(4 * 12 + 1), FOUR, seed)
        return [batch.tokens[:, 0].tolist() for batch in itertools.islice(batches, count)]

    assert order(1, 6) == order(1, 6)
    assert order(1, 3) != order(2, 3)
    assert order(1, 6)[:3] != order(1, 6)[3:]


def test_a_restored_iterator_goes_on_where_the_other_stood(tmp_path):
    corpus, config = numbered(401), DataConfig(seq_len=4, batch_size=8)
    batches = training_batches(corpus, config, 0)
    for _ in range(17):
        next(batches)
    restored = training_batches(corpus, config, 0)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "data", ocp.args.Composite(data=grain.checkpoint.CheckpointSave(batches)))
        arguments = ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(restored))
        checkpointer.restore(tmp_path / "data", args=arguments)
    for _ in range(20):
        np.testing.assert_array_equal(next(batches).tokens, next(restored).tokens)


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("documents", ["together", "separate"])
def test_processes_share_each_batch_in_the_order_of_its_rows(count, documents):
    corpus, config = documents_of([7] * 40), DataConfig(seq_len=5, batch_size=6, documents=documents)
    whole = training_batches(corpus, config, 3)
    shards = [training_batches(corpus, config, 3, index, count) for index in range(count)]
    for _ in range(25):  # more than an epoch, which does not end with a batch
        parts = [next(shard) for shard in shards]
        assert {part.tokens.shape for part in parts} == {(6 // count, 6)}
        for expected, *given_parts in zip(next(whole), *parts, strict=True):
            if expected is None:
                assert given_parts == [None] * count
            else:
                np.testing.assert_array_equal(np.concatenate(given_parts), expected)


def test_a_checkpoint_of_one_process_serves_several():
    corpus = numbered(401)
    batches = training_batches(corpus, FOUR, 0)
    for _ in range(5):
        next(batches)
    shards = [training_batches(corpus, FOUR, 0, index, 2) for index in range(2)]
    for shard in shards:
        shard.set_state(batches.get_state())
    expected = next(batches).tokens
    np.testing.assert_array_equal(np.concatenate([next(shard).tokens for shard in shards]), expected)


def test_processes_that_cannot_share_a_batch_say_so():
    with pytest.raises(TrainError, match="--batch-size must be a multiple of the 3 processes, got 4"):
        training_batches(numbered(401), FOUR, 0, 0, 3)


def test_held_out_text_is_read_once_and_padding_weighs_nothing():
    corpus = numbered(4 * 4 * 10 + 4)
    pairs = list(held_out_batches(corpus, FOUR))
    assert [weights.tolist() for _, weights in pairs] == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert pairs[0][1].dtype == np.float32
    real = np.concatenate([batch.tokens[weights > 0] for batch, weights in pairs])
    np.testing.assert_array_equal(real[:, :4].ravel(), corpus.held_out[:40])


def test_a_limited_evaluation_reads_windows_spread_evenly():
    ((batch, weights),) = held_out_batches(numbered(4 * 4 * 10 + 4), FOUR, max_tokens=12)
    assert weights.sum() == 3
    assert batch.tokens[:3, 0].tolist() == [0, 16, 36]


def test_bytes_a_token_are_those_of_the_windows_that_are_read():
    corpus = corpus_of(np.arange(41).astype(np.uint8))
    corpus.tokenizer.token_bytes = np.arange(256) ** 2  # of this one alone
    for limit in (0, 12):
        read = list(held_out_batches(corpus, FOUR, limit))
        targets = np.concatenate([batch.tokens[weights > 0][:, 1:] for batch, weights in read])
        assert len(targets) == (3 if limit else 10)
        assert evaluated_bytes(corpus, FOUR, limit) == pytest.approx((targets.astype(int) ** 2).mean())


def test_another_part_is_read_by_its_name():
    corpus = corpus_of(np.zeros(9, np.uint8), np.ones(9, np.uint8), test=np.full(9, 2, np.uint8))
    for number, part in enumerate(("train", "held_out", "test")):
        ((batch, _),) = held_out_batches(corpus, FOUR, part=part)
        assert (batch.tokens == number).all()


@given(lengths=st.lists(st.integers(1, 12), min_size=3, max_size=20), seq_len=st.integers(1, 9))
def test_segment_ids_count_the_documents_of_each_window(lengths, seq_len):
    corpus, config = documents_of(lengths), DataConfig(seq_len=seq_len, batch_size=2, documents="separate")
    owner = np.repeat(np.arange(len(lengths)), np.array(lengths) + 1)
    windows = 0
    for batch, weights in held_out_batches(corpus, config):
        assert batch.segment_ids.dtype == np.int32
        assert batch.segment_ids.shape == batch.tokens.shape
        for row in range(int(weights.sum())):
            expected = owner[windows * seq_len :][: seq_len + 1]
            assert batch.segment_ids[row].tolist() == (expected - expected[0]).tolist()
            windows += 1
    for batch in itertools.islice(training_batches(corpus, config, 0), 3):
        steps = np.diff(batch.segment_ids, axis=1)
        np.testing.assert_array_equal(steps, batch.tokens[:, 1:] == 0)  # a separator opens each document
        assert (batch.segment_ids[:, 0] == 0).all()


def test_documents_together_have_no_segment_ids():
    batch = next(training_batches(documents_of([3] * 9), FOUR, 0))
    assert isinstance(batch, Batch)
    assert batch.segment_ids is None


@pytest.mark.parametrize("documents", ["together", "separate"])
def test_images_are_never_cut(documents):
    corpus = images(10)
    config = DataConfig(seq_len=784, batch_size=5, documents=documents)
    batches = training_batches(corpus, config, 0)
    read = [next(batches) for _ in range(2)]
    tokens = np.concatenate([batch.tokens for batch in read])
    assert tokens.shape == (10, 785)
    assert tokens.dtype == np.uint16
    assert sorted(tokens.tolist()) == sorted(corpus.train.tolist())
    for batch in read:
        assert (batch.segment_ids is None) if documents == "together" else not batch.segment_ids.any()
    ((batch, weights),) = held_out_batches(corpus, DataConfig(seq_len=784, batch_size=16))
    assert weights.sum() == 10
    np.testing.assert_array_equal(batch.tokens[:10], corpus.held_out)
