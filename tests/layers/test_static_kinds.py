"""Kinds of sparsity by position alone: their indices are what the papers say, and decoding is one pass."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import scfa_jax.linen
from scfa_jax import index
from scfa_jax.layers import BigBird, Dense, Fixed, Layout, Longformer, Strided, Window
from scfa_jax.layers.pattern import Rows

BATCH, LENGTH, HEADS, HEAD_DIM = 2, 24, 4, 16
KINDS = {
    "dense": Dense(),
    "window": Window((3, 1, 30, 8), num_sinks=2),
    "one window": Window(5),
    "growing window": Window((4, -7, 1, 2), num_sinks=3, slope=(0.0, 0.5, 0.25, 0.2)),
    "longformer": Longformer(4, 7),
    "big bird": BigBird(4, num_global=3, num_random=2, block_size=3),
    "big bird of few blocks": BigBird(1, num_global=0, num_random=3, block_size=8),
    "strided": Strided(5),
    "fixed": Fixed(5, 2),
}
each_kind = pytest.mark.parametrize("name", KINDS)


def layout_of(kind, key_heads: int = 2) -> Layout:
    return Layout.of(HEADS * HEAD_DIM, HEADS, key_heads, HEAD_DIM, kind, None, None)


def mask_of(kind, queries: int = LENGTH, offset: int = 0, segment_ids=None) -> np.ndarray:
    """What the index of a kind allows the queries from a position on: bool `[N, T, S]`."""
    positions = {"query_offset": offset, "query_segment_ids": segment_ids}
    mask = jax.jit(lambda: index.mask(kind.index({}, {}, Rows(queries, LENGTH, HEADS, positions))))()
    return np.broadcast_to(mask[0], (HEADS, queries, LENGTH))


def of_window(kind, query, key, rank):
    """Each head sees its last positions, and the first of all, as in MoA and with attention sinks."""
    windows = np.array(kind.lengths(LENGTH)).reshape(-1, 1, 1)
    return (query - key < windows) | (rank < kind.num_sinks)


def of_longformer(kind, query, key, rank):
    """A window, and global tokens, which see all and are seen by all."""
    return (query - key < kind.window) | (query % kind.stride == 0) | (key % kind.stride == 0)


def of_bigbird(kind, query, key, rank):
    """A window and the first tokens; the random blocks have a test of their own."""
    return (query - key < kind.window) | (key < kind.num_global)


def of_strided(kind, query, key, rank):
    """The last positions, and every one that is a multiple of the stride away."""
    return (query - key < kind.stride) | ((query - key) % kind.stride == 0)


def of_fixed(kind, query, key, rank):
    """The own block, and the last positions of every block."""
    return (query // kind.stride == key // kind.stride) | (key % kind.stride >= kind.stride - kind.num_summaries)


def of_dense(kind, query, key, rank):
    return key <= query


DEFINITIONS = {Dense: of_dense, Window: of_window, Longformer: of_longformer, BigBird: of_bigbird}
DEFINITIONS |= {Strided: of_strided, Fixed: of_fixed}


def defined(kind, queries: int = LENGTH, offset: int = 0, segment_ids=None) -> np.ndarray:
    """The mask `[N, T, S]` by the papers, made causal, without random blocks."""
    query, key = offset + np.arange(queries)[:, None], np.arange(LENGTH)
    ids = np.zeros(LENGTH, int) if segment_ids is None else np.asarray(segment_ids)
    rank = np.array([np.sum(ids[:i] == ids[i]) for i in range(LENGTH)])  # of a position in its segment
    in_segment = (ids[offset : offset + queries, None] == ids) & (ids >= 0)
    mask = DEFINITIONS[type(kind)](kind, query, key, rank) & (key <= query) & in_segment
    return np.broadcast_to(mask, (HEADS, queries, LENGTH))


SEGMENT_IDS = jnp.asarray(np.repeat([7, 2, -1, 2], (9, 8, 3, 4)), jnp.int32)


@each_kind
def test_the_index_is_what_the_papers_say(name):
    kind = KINDS[name]
    for given in ({}, {"queries": 7, "offset": 9}, {"segment_ids": SEGMENT_IDS}):
        got, want = mask_of(kind, **given), defined(kind, **given)
        if isinstance(kind, BigBird):
            got = got & want  # what is drawn comes on top of it
        np.testing.assert_array_equal(got, want)


@each_kind
def test_pairs_are_those_of_the_mask_in_the_mean_over_heads(name):
    kind = KINDS[name]
    mask = drawn_blocks(kind) if isinstance(kind, BigBird) else defined(kind)
    assert kind.pairs(LENGTH, HEADS) == mask.sum() / HEADS


def drawn_blocks(kind) -> np.ndarray:
    """The mask with as many random blocks as there must be: of those after the first tokens, before all windows."""
    mask, width = np.array(defined(kind)), kind.block_size
    first = -(-kind.num_global // width)
    for start in range(0, LENGTH, width):
        stop = max(first, (start - kind.window + 1) // width)
        count = min(kind.num_random, stop - first)
        mask[:, start : start + width, first * width : (first + count) * width] = True
    return mask


def test_random_blocks_are_whole_and_different_for_each_head():
    kind = KINDS["big bird"]
    width, mask, base = kind.block_size, mask_of(kind), defined(kind)
    drawn, number = mask & ~base, (drawn_blocks(kind) & ~base).sum(axis=2)
    np.testing.assert_array_equal(drawn.sum(axis=2), number)  # of keys for each query
    assert number.max() == 2 * width
    of_blocks = drawn.reshape(HEADS, LENGTH // width, width, LENGTH // width, width)
    np.testing.assert_array_equal(of_blocks, np.broadcast_to(of_blocks[:, :, :1, :, :1], of_blocks.shape))
    assert len({head.tobytes() for head in drawn}) == HEADS
    assert not np.array_equal(mask, mask_of(dataclasses.replace(kind, seed=1)))
    # They are the same at every call, whatever part of the sequence it is about.
    np.testing.assert_array_equal(mask_of(kind, queries=7, offset=9), mask[:, 9:16])
    in_segment = defined(Dense(), segment_ids=SEGMENT_IDS)
    np.testing.assert_array_equal(mask_of(kind, segment_ids=SEGMENT_IDS), mask & in_segment)


def test_where_random_blocks_are_few_all_are_drawn():
    kind = KINDS["big bird of few blocks"]
    np.testing.assert_array_equal(mask_of(kind), drawn_blocks(kind))


def test_windows_follow_the_length():
    kind = KINDS["growing window"]
    assert kind.lengths(8) == (4, 1, 3, 3)  # rounded down, at least 1
    assert kind.lengths(24) == (4, 5, 7, 6)
    assert Window(100).lengths(24) == (24,)


def rows(seed: int) -> tuple[jax.Array, ...]:
    shapes = ((BATCH, LENGTH, heads, HEAD_DIM) for heads in (HEADS, 2, 2))
    return tuple(jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32) for shape in shapes)


@each_kind
def test_prefill_and_decoding_give_what_one_pass_gives(name):
    kind = KINDS[name]
    layout = layout_of(kind)
    whole = jax.jit(lambda *rows: kind.attend(layout.heads(*rows), {}, implementation="xla"))(*rows(0))
    step = jax.jit(lambda cache, *rows: kind.attend_next(cache, layout.heads(*rows), {}, implementation="xla"))
    cache, outputs, start = kind.empty_cache(layout, BATCH, LENGTH, jnp.float32), [], 0
    for size in (9, *(1,) * 6, 9):
        output, cache = step(cache, *(x[:, start : start + size] for x in rows(0)))
        outputs.append(output)
        start += size
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), whole, atol=2e-6)


def test_a_step_reads_only_the_window_and_the_sinks():
    kind, room = Window((5, 2, 5, 8), num_sinks=3), 1024
    layout = layout_of(kind)
    cache = kind.empty_cache(layout, BATCH, room, jnp.float32)
    one = [x[:, :1] for x in rows(0)]
    jaxpr = jax.make_jaxpr(lambda cache, *one: kind.attend_next(cache, layout.heads(*one), {})[0])(cache, *one)

    def shapes(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                yield from (v.aval.shape for v in equation.invars)
            for inner in jaxprs_in_params(equation.params):
                yield from shapes(inner)

    found = list(shapes(jaxpr.jaxpr))
    assert any(11 in shape for shape in found)
    assert not any(room in shape for shape in found)


@pytest.mark.parametrize(
    "kind",
    [Window((3, 7), num_sinks=2), Longformer(3, 5), BigBird(3, 2, 1, 3, seed=2), Strided(5), Fixed(5, 2)],
    ids=lambda kind: type(kind).__name__,
)
def test_later_tokens_change_nothing_and_receive_no_gradient(kind, one_implementation):
    x, later = jax.random.normal(jax.random.key(0), (2, 1, LENGTH, 32))
    layer = scfa_jax.linen.CausalSelfAttention(32, 2, sparsity=kind, implementation=one_implementation)
    apply = functools.partial(layer.apply, jax.jit(layer.init)(jax.random.key(1), x))
    first = jax.jit(jax.value_and_grad(lambda x: jnp.sum(apply(x)[:, :15] ** 2)))
    value, gradient = first(x)
    assert value == first(x.at[:, 15:].set(later[:, 15:]))[0]
    assert (gradient[:, 15:] == 0).all()
    assert (gradient[:, :15] != 0).all()


BAD = {
    "no window": (lambda: Window(0), ValueError, "window must be at least 1, got 0"),
    "a float": (lambda: Window(2.5), TypeError, r"window must be a static int, got 2\.5"),
    "a steep slope": (lambda: Window(2, slope=1.5), ValueError, r"slope must be from 0 to 1, got 1\.5"),
    "no slope": (lambda: Window(2, slope="1"), TypeError, "slope must be a number, got '1'"),
    "too many slopes": (
        lambda: Window((2, 3), slope=(0.1, 0.2, 0.3)),
        ValueError,
        "slope must be one number, or one for each of 2 windows, got 3",
    ),
    "too many windows": (
        lambda: layout_of(Window((2, 3))),
        ValueError,
        "window and slope must be one, or one for each of 4 heads, got 2",
    ),
    "too many growing windows": (
        lambda: layout_of(Window(2, slope=(0.1, 0.2, 0.3))),
        ValueError,
        "window and slope must be one, or one for each of 4 heads, got 3",
    ),
    "no global tokens": (lambda: Longformer(4, 0), ValueError, "stride must be at least 1, got 0"),
    "no blocks": (lambda: BigBird(4, 0, 1, 0), ValueError, "block_size must be at least 1, got 0"),
    "fewer than no blocks": (lambda: BigBird(4, 0, -1), ValueError, "num_random must be at least 0, got -1"),
    "no stride": (lambda: Strided(0), ValueError, "stride must be at least 1, got 0"),
    "a float of a stride": (lambda: Strided(2.0), TypeError, r"stride must be a static int, got 2\.0"),
    "summaries": (lambda: Fixed(4, 5), ValueError, "num_summaries must be at most stride, 4, got 5"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
