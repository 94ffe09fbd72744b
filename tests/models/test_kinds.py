"""The language of `--attention`: what it means, that it comes back, and what it says of what it cannot read."""

from __future__ import annotations

import dataclasses
import re

import pytest

import scfa_jax.layers
from models.controls import OracleBlocks, Permutation, RandomBlocks
from models.kinds import KINDS, WAYS_TO_HASH, LayerKind, parse, text_of
from models.reformer import Reformer
from scfa_jax.layers import (
    NSA,
    BigBird,
    Dense,
    Drop,
    Hash,
    HashBy,
    Kind,
    KMeans,
    LearnedRotations,
    MoBA,
    Rotations,
    Window,
)


def of_layers(text: str) -> list[Kind]:
    return [layer.kind for layer in parse(text)]


MEANINGS = {
    "dense": [Dense()],
    "dense()": [Dense()],
    " window(512)*2 ,\n hash(buckets=16) ": [Window(512), Window(512), Hash(16)],
    "hash(num_buckets=16, exclude_self=False)": [Hash(16, exclude_self=False)],
    "hash(4, by=learned, local_window=3)": [Hash(4, by=LearnedRotations(), local_window=3)],
    "hash(4, by=kmeans(0.5)), hash(4, by=rotations())": [Hash(4, by=KMeans(0.5)), Hash(4, by=Rotations())],
    "hash(4, by=permutation)": [Hash(4, by=Permutation())],
    "window((-3, 16), sinks=4, slope=(0.25, 0.0))": [Window((-3, 16), 4, (0.25, 0.0))],
    "bigbird(8, num_global=2, random=1),": [BigBird(8, 2, 1)],
    "drop(0.5)*1": [Drop(0.5)],
    "reformer(8, rounds=4)": [Reformer(8, 4)],
    "moba(256, top_k=4), moba(64, 8, local=2, before_rotary=True)": [
        MoBA(256, 4),
        MoBA(64, 8, num_local=2, before_rotary=True),
    ],
    "nsa, nsa(32, top_k=8, window=64, compression_size=16, compression_stride=8, initial=0, local=1)": [
        NSA(),
        NSA(32, 8, 64, compression_size=16, compression_stride=8, num_initial=0, num_local=1),
    ],
    "random_blocks(256, top_k=4), oracle_blocks(256, 4)": [RandomBlocks(256, 4), OracleBlocks(256, 4)],
}


@pytest.mark.parametrize("text", MEANINGS)
def test_a_text_means_these_kinds(text):
    assert of_layers(text) == MEANINGS[text]


@pytest.mark.parametrize("text", [*MEANINGS, "dense(share_query_key=True)", "hash(2, normalize_key=False)*3"])
def test_kinds_are_written_as_they_are_read(text):
    assert parse(text_of(parse(text))) == parse(text)


def test_every_kind_takes_how_its_keys_are_made():
    assert parse("dense(share_query_key=True), hash(2, normalize_key=False)") == (
        LayerKind(Dense(), share_query_key=True),
        LayerKind(Hash(2), normalize_key=False),
    )


def test_every_kind_and_way_to_hash_of_the_library_has_a_name():
    public = [getattr(scfa_jax.layers, name) for name in dir(scfa_jax.layers)]
    concrete = [x for x in public if dataclasses.is_dataclass(x) and isinstance(x, type)]
    for base, named in ((Kind, KINDS), (HashBy, WAYS_TO_HASH)):
        there = {x for x in concrete if issubclass(x, base)}
        assert len(there) > 2
        assert there <= set(named.values())


FAULTS = {
    "": "'' cannot be read. Write kinds and their parameters, as in window(512)*5, hash(16).",
    "hash(16": "'hash(16' cannot be read.",
    "()": "it names no kind",
    "hashing(16)": "the kinds are dense, cudnn, hash,",
    "hash(bucket=16)": "hash takes (num_buckets, exclude_self=None, before_rotary=False, by=rotations, "
    "local_window=0); every kind also takes share_query_key and normalize_key; got (bucket=16).",
    "hash": "hash takes (num_buckets,",
    "hash(3)": "hash: num_buckets must be an even number of at least 2, got 3.",
    "hash(2.0)": "hash: num_buckets must be",
    "hash(4, by=sorting)": "the ways to hash are rotations, learned, kmeans, permutation; got 'sorting'.",
    "hash(4, by=kmeans(2))": "kmeans: decay must be at least 0 and below 1, got 2.",
    "hash(4, by=kmeans(speed=2))": "kmeans takes (decay=0.999); got (speed=2).",
    "hash(4, by=3)": "hash: by must be Rotations(),",
    "dense(share_query_key=1)": "dense: share_query_key must be True or False, got 1.",
    "window(512)*0": "a kind is repeated by a number of at least 1, as in window(512)*5, hash(16); got 0.",
    "window(512)*x": "got x.",
    "window(2**9)": "a parameter is a number, True, False, None or a tuple; got '2 ** 9'.",
    "window(open('x'))": "the ways to hash are",
    "window(*[3])": "a parameter is a number",
    "window(**{})": "a kind is a name with its parameters",
    "a.b(3)": "a kind is a name with its parameters, as in window(512)*5, hash(16); got 'a.b(3)'.",
    "drop(1.0)": "drop: rate must be at least 0 and below 1, got 1.0.",
    "3": "a kind is a name with its parameters",
    "moba(256, 0)": "moba: top_k must be at least 1, got 0.",
    "moba(256)": "moba takes (block_size, top_k, num_local=1, share_in_group=False, before_rotary=False);",
    "nsa(20)": "nsa: block_size must be a multiple of compression_stride = 16, got 20.",
    "nsa(64, 2)": "nsa: top_k must be at least 3, got 2.",
    "reformer(4, rounds=0)": "reformer: num_rounds must be at least 1, got 0.",
}


@pytest.mark.parametrize("text", FAULTS)
def test_what_cannot_be_read_says_what_is_right(text):
    with pytest.raises(ValueError, match=re.escape(FAULTS[text])) as raised:
        parse(text)
    assert "\n" not in str(raised.value)
