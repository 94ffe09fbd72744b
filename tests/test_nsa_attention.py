"""NSA: compressed keys, the blocks that they point to, and a window, mixed by gates."""

from collections import Counter
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import IMPLEMENTATIONS
from jax.extend.core import jaxprs_in_params
from lowering import H100, number_of_kernels

import scfa_jax
from scfa_jax import _selection, reference
from scfa_jax.backends.triton import best_blocks
from scfa_jax.nsa import compressed_index, in_compression_blocks, nsa_blocks, num_compressed

BATCH, HEADS, KEY_HEADS, HEAD_DIM = 2, 4, 2, 16


def sizes(size, stride, block, top_k, initial=1, local=2):
    """Sizes of compression, of blocks, and how many are chosen, as arguments."""
    of_blocks = {"block_size": block, "top_k": top_k, "num_initial": initial, "num_local": local}
    return {"compression_size": size, "compression_stride": stride, **of_blocks}


# The number of queries, that of keys, the position of the first query, sizes, the window, and where documents end.
SETUPS = {
    "later queries, more blocks than there are": (21, 50, 29, sizes(5, 5, 10, 7, initial=0, local=1), 7, None),
    "documents": (53, 53, None, sizes(6, 2, 4, 5, local=1), 9, [0, 19, 22, 40, 53]),
    "no complete compression block": (7, 7, None, sizes(8, 4, 4, 2, initial=0, local=1), 3, None),
}
EXACT = [
    (implementation, name)
    for implementation in IMPLEMENTATIONS
    for name in SETUPS
    if implementation != "triton_interpret" or name == "documents"  # which is slow
]


def documents(stops, length):
    """Ascending segment ids `[1, T]`, the last document as padding; a dictionary of options, empty for none."""
    if stops is None:
        return {}
    ids = np.repeat(np.arange(len(stops) - 1, dtype=np.int32), np.diff(stops))
    return {"query_segment_ids": jnp.asarray(np.where(np.arange(length) < length - 4, ids, -3)[None])}


def inputs(name, seed=0):
    """Query, compressed, selected, near, gates and the query of the compressed branch: all of their own."""
    query_length, key_length, _, chosen, _, _ = SETUPS[name]
    rng = np.random.default_rng(seed)
    normal = lambda length, heads, width=HEAD_DIM: jnp.asarray(
        rng.normal(size=(BATCH, length, heads, width)), jnp.float32
    )
    count = num_compressed(key_length, chosen["compression_size"], chosen["compression_stride"])
    branches = [(normal(length, KEY_HEADS), normal(length, KEY_HEADS)) for length in (count, key_length, key_length)]
    return normal(query_length, HEADS), *branches, normal(query_length, HEADS, 3), normal(query_length, HEADS)


@cache
def compiled(name, implementation):
    """Output and gradients of all inputs, for a cotangent; of the reference if there is no implementation."""
    query_length, _, offset, chosen, window, stops = SETUPS[name]
    how = {} if implementation is None else {"implementation": implementation}
    operator = reference.nsa_attention if implementation is None else scfa_jax.nsa_attention
    attend = partial(
        operator, **chosen, **how, window=window, query_offset=offset, **documents(stops, query_length), scale=0.4
    )

    @jax.jit
    def results(given, cotangent):
        output, pull = jax.vjp(lambda *x: attend(*x[:-1], compressed_query=x[-1]), *given)
        return output, pull(cotangent)

    return results


def assert_close(got, want):
    """To float32 accuracy, for each array by its own largest entry."""
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.max(np.abs(other), initial=0.1))


@pytest.mark.parametrize(("implementation", "name"), EXACT)
def test_attention_and_gradients_are_those_of_the_definition(implementation, name):
    """The definition chooses by a mask, through which no gradient passes."""
    for seed in range(2):
        given, cotangent = inputs(name, seed), inputs(name, seed + 2)[0]
        results = compiled(name, implementation)(given, cotangent)
        assert_close(results, compiled(name, None)(given, cotangent))
        if num_compressed(SETUPS[name][1], SETUPS[name][3]["compression_size"], 1):
            assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(results))


def test_nothing_depends_on_what_comes_later():
    """By value and by gradient, at borders of blocks and within them. A compressed key counts as of its last token."""
    name = "later queries, more blocks than there are"
    results, (query_length, key_length, offset, chosen, *_) = compiled(name, IMPLEMENTATIONS[0]), SETUPS[name]
    ends = np.arange(inputs(name)[1][0].shape[1]) * chosen["compression_stride"] + chosen["compression_size"] - 1
    given, cotangent = inputs(name), inputs(name, 2)[0]
    want, _ = results(given, cotangent)
    for place in (30, 34, 35, 39, 40, 47):
        positions = offset + np.arange(query_length), np.arange(key_length), ends
        is_later = {x.size: x >= place for x in positions}
        changed = jax.tree.map(lambda x: jnp.where(is_later[x.shape[1]][:, None, None], 7 * x[:, ::-1], x), given)  # noqa: B023
        output, gradients = results(changed, jnp.where(is_later[query_length][:, None, None], 0, cotangent))
        np.testing.assert_array_equal(output[:, : place - offset], want[:, : place - offset])
        assert not np.allclose(output[:, place - offset :], want[:, place - offset :])
        for gradient in jax.tree.leaves(gradients):
            np.testing.assert_array_equal(gradient[:, is_later[gradient.shape[1]]], 0)
            assert np.any(gradient != 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_batch_axis_may_be_omitted_and_the_dtype_is_that_of_the_query(dtype):
    name = "no complete compression block"
    given = jax.tree.map(lambda x: x.astype(dtype), inputs(name))
    attend = lambda *x: scfa_jax.nsa_attention(*x[:-1], compressed_query=x[-1], **SETUPS[name][3], window=3)
    whole, alone = (jax.eval_shape(attend, *x) for x in (given, jax.tree.map(lambda x: x[1], given)))
    assert whole.dtype == alone.dtype == dtype
    assert whole.shape[1:] == alone.shape == given[0].shape[1:]


def seen_blocks(position, segment, of_key, count, size, stride):
    """Which compressed keys a query sees: those whose keys are all before it or at it, and of its document."""
    rows = [of_key[i * stride : i * stride + size] for i in range(count)]
    return [
        i
        for i in range(count)
        if i * stride + size <= position + 1 and segment >= 0 and all(other == segment for other in rows[i])
    ]


def best(query, compressed_key, key_length, chosen, *, offset, ids, scale):
    """Equations 8 to 10 in float64 loops, and `logsumexp` of equation 8.

    The paper writes the index of equation 9 with both signs negative. A block of `l'` keys has the compressed keys from
    its first stride on, and each of those begins up to `l / d - 1` strides before: one sign is positive.
    """
    query, compressed_key = (np.asarray(x, np.float64) for x in (query, compressed_key))
    (batch, query_length, heads, _), (_, count, key_heads, _) = query.shape, compressed_key.shape
    size, stride, block = (chosen[name] for name in ("compression_size", "compression_stride", "block_size"))
    initial, local, group = chosen["num_initial"], chosen["num_local"], heads // key_heads
    found = np.full((batch, query_length, key_heads, chosen["top_k"] - local), -1)
    found[..., :initial] = np.arange(initial)
    logsumexp = np.full((batch, query_length, heads), -np.inf, np.float32)
    for b, t, k in np.ndindex(batch, query_length, key_heads):
        position = np.broadcast_to(offset, batch)[b] + t
        seen = seen_blocks(position, ids[0][b, t], ids[1][b], count, size, stride)
        of_group = np.zeros(count)
        for n in range(k * group, (k + 1) * group):
            products = scale * compressed_key[b, seen, k] @ query[b, t, n]
            if seen:
                logsumexp[b, t, n] = np.log(np.sum(np.exp(products)))
            of_group[seen] += np.exp(products - logsumexp[b, t, n])  # equations 8 and 10, which is a sum
        scored = []
        for j in range(initial, max(initial, position // block - local + 1)):
            indices = [block // stride * j + m - n for m in range(block // stride) for n in range(size // stride)]
            importance = sum(of_group[i] for i in indices if 0 <= i < count)  # equation 9
            if importance > 0 and j * block < key_length:
                scored.append((-importance, j))
        numbers = [j for _, j in sorted(scored)[: chosen["top_k"] - local - initial]]
        found[b, t, k, initial : initial + len(numbers)] = numbers
    return np.sort(found, axis=-1), logsumexp


CHOICES = {
    "as in the paper": (37, 37, None, sizes(8, 4, 8, 4), False),
    "offsets of each": (11, 50, [30, -4], sizes(6, 2, 4, 6, initial=2, local=1), False),
    "past the end": (11, 40, [29, 100], sizes(4, 4, 8, 4, initial=0, local=1), False),
    "documents": (41, 41, None, sizes(4, 2, 6, 4, initial=0, local=1), True),
    "blocks of one stride": (33, 33, None, sizes(9, 3, 3, 5, local=1), False),
    "more than there are": (30, 30, None, sizes(4, 4, 4, 30, local=3), False),
    "the first and last alone": (20, 20, None, sizes(4, 4, 4, 3), False),
    "no compressed key": (9, 9, None, sizes(16, 8, 8, 4), False),
}


@pytest.mark.parametrize("name", CHOICES)
def test_blocks_are_those_of_equations_8_to_10(name):
    query_length, key_length, offset, chosen, in_documents = CHOICES[name]
    rng = np.random.default_rng(1)
    count = num_compressed(key_length, chosen["compression_size"], chosen["compression_stride"])
    normal = lambda length, heads: rng.normal(size=(BATCH, length, heads, HEAD_DIM)).astype(np.float32)
    query, compressed_key = normal(query_length, HEADS), normal(count, KEY_HEADS)
    ids, options = [np.zeros((BATCH, length), np.int32) for length in (query_length, key_length)], {}
    if in_documents:
        runs = np.repeat(np.array([1, 0, 5, -2], np.int32), [9, 4, 22, 6])
        ids = [np.stack([runs, np.roll(runs, 7)])] * 2
        options = {"query_segment_ids": ids[0]}
    want, logsumexp = best(query, compressed_key, key_length, chosen, offset=offset or 0, ids=ids, scale=HEAD_DIM**-0.5)
    where = None if offset is None else jnp.asarray(offset, jnp.int32)
    choose = jax.jit(partial(nsa_blocks, key_length=key_length, **chosen, query_offset=where, **options))
    got = choose(query, compressed_key, logsumexp)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(np.sort(got, axis=-1), want)


def test_of_equal_importance_the_earlier_block_wins():
    """Queries of zeros give all compressed keys the same weight."""
    chosen = sizes(4, 4, 4, 4, initial=0, local=1)
    query, compressed_key = jnp.zeros((1, 32, 2, 4)), jnp.ones((1, 8, 1, 4))
    logsumexp = jnp.log(jnp.maximum(jnp.arange(1, 33) // 4, 1e-30))[None, :, None].repeat(2, axis=2)
    found = jax.jit(partial(nsa_blocks, key_length=32, **chosen))(query, compressed_key, logsumexp)
    np.testing.assert_array_equal(np.sort(found[0, 12:, 0], axis=-1), np.broadcast_to([0, 1, 2], (20, 3)))


def test_no_gradient_passes_the_choice():
    query, compressed_key, logsumexp = jnp.ones((1, 16, 2, 4)), jnp.ones((1, 4, 1, 4)), jnp.zeros((1, 16, 2))
    chosen = sizes(4, 4, 4, 3, initial=0, local=1)
    score = lambda *x: nsa_blocks(*x, 16, **chosen).astype(jnp.float32).sum()
    for gradient in jax.jit(jax.grad(score, (0, 1, 2)))(query, compressed_key, logsumexp):
        np.testing.assert_array_equal(gradient, 0)


OVERLAPS = {
    "as in the paper": (2, 4, 3, 90, 1),
    "side by side": (1, 1, 1, 70, 0),
    "of one stride": (3, 1, 5, 20, 2),
    "more than there are": (2, 3, 16, 9, 0),
}


@pytest.mark.parametrize("name", OVERLAPS)
def test_the_kernel_chooses_what_plain_jax_chooses(name):
    """As sets. Its tiles hold 64 queries and up to 64 blocks."""
    of_key, of_block, k, num_blocks, first = OVERLAPS[name]
    length, head_dim, count = 100, 24, num_blocks * of_block - of_key + 1
    rng = np.random.default_rng(k)
    normal = lambda length, heads: rng.normal(size=(BATCH, length, heads, head_dim)).astype(np.float32)
    query, key = normal(length, HEADS), normal(count, KEY_HEADS)
    last = np.sort(rng.integers(-3, count + 2, (BATCH, length)), axis=1).astype(np.int32)
    # With documents in a second batch element, and padding, of which queries see no key.
    of_query = np.sort(rng.integers(-1, 3, (BATCH, length)), axis=1).astype(np.int32)
    of_compressed = np.sort(rng.integers(-1, 3, (BATCH, count)), axis=1).astype(np.int32)
    of_query[0] = of_compressed[0] = 0
    of_compressed = np.where(of_compressed < 0, -2, of_compressed)
    seen = (np.arange(count) <= last[..., None]) & (of_query[..., None] == of_compressed[:, None])
    products = 0.3 * np.einsum("btnh,bmnh->btnm", query, key.repeat(HEADS // KEY_HEADS, axis=2))
    logsumexp = np.log(np.sum(np.exp(products), axis=-1, where=seen[:, :, None]) + 1e-30)
    logsumexp = np.where(seen.any(-1)[..., None], logsumexp, -np.inf).astype(np.float32)
    operands = query, key, logsumexp, last, of_query, of_compressed, last // of_block - 1
    how = {"overlap": _selection.Overlap(of_key, of_block), "first": first, "num_blocks": num_blocks, "k": k}
    want = jax.jit(partial(_selection.plain_most_important_blocks, **how, scale=0.3))(*operands)
    got = jax.jit(partial(best_blocks.most_important_blocks, **how, scale=0.3, interpret=True))(*operands)
    np.testing.assert_array_equal(*(np.sort(x, axis=-1) for x in (got, want)))
    assert got.shape == (BATCH, length, KEY_HEADS, k)
    assert (want >= 0).any()


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_both_passes_lower_for_cuda_and_choose_once():
    length, chosen = 1035, sizes(32, 16, 64, 6)
    count = num_compressed(length, 32, 16)
    of = lambda length, heads, width=64: jax.ShapeDtypeStruct((BATCH, length, heads, width), jnp.bfloat16)
    branches = [(of(rows, KEY_HEADS), of(rows, KEY_HEADS)) for rows in (count, length, length)]
    given = of(length, HEADS), *branches, of(length, HEADS, 3)
    attend = partial(scfa_jax.nsa_attention, **chosen, window=128, implementation="triton")
    gradients = jax.grad(lambda *x: attend(*x).astype(jnp.float32).sum(), tuple(range(len(given))))
    with jax.sharding.use_abstract_mesh(H100):
        traced = jax.jit(gradients).trace(*given)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    launched = [e.params for e in equations(traced.jaxpr.jaxpr) if e.primitive.name == "pallas_call"]
    names = Counter(str(params.get("name") or params["name_and_src_info"].name) for params in launched)
    wanted = {"most_important_blocks": 1, "forward": 3, "dq": 3, "dkv": 3}
    assert {name: names[f"scfa_{name}"] for name in wanted} == wanted
    assert number_of_kernels(text) > 0
    assert "1035x1035" not in text


@pytest.mark.parametrize(
    ("length", "size", "stride"), [(23, 6, 2), (24, 4, 4), (5, 6, 2), (6, 6, 3), (1, 4, 2), (0, 2, 1)]
)
def test_compression_blocks_are_slices(length, size, stride):
    assert in_compression_blocks(jnp.ones((0, length, 3, 5)), size, stride).size == 0
    x = np.random.default_rng(0).normal(size=(2, length, 3, 5)).astype(np.float32)
    blocks = in_compression_blocks(jnp.asarray(x), size, stride)
    starts = [i for i in range(0, length, stride) if i + size <= length]
    assert blocks.shape == (2, len(starts), size, 3, 5)
    assert num_compressed(length, size, stride) == len(starts)
    for number, start in enumerate(starts):
        np.testing.assert_array_equal(blocks[:, number], x[:, start : start + size])


@pytest.mark.parametrize(
    ("lengths", "size", "stride", "offset", "in_documents"),
    [
        ((23, 23), 6, 2, None, False),
        ((9, 23), 5, 5, 14, False),
        ((9, 23), 4, 2, [-3, 40], False),
        ((7, 23), 4, 1, 16, True),
        ((5, 5), 6, 3, None, False),
    ],
)
def test_the_mask_of_compressed_keys(lengths, size, stride, offset, in_documents):
    ids, options = [np.zeros((2, length), np.int32) for length in lengths], {}
    if in_documents:
        runs = np.repeat(np.array([2, 4, 7, -1], np.int32), [5, 2, 13, 3])
        ids = [np.stack([runs, np.roll(runs, 3)])[:, -length:] for length in lengths]
        options = {"query_segment_ids": jnp.asarray(ids[0]), "key_segment_ids": jnp.asarray(ids[1])}
    count = num_compressed(lengths[1], size, stride)
    want = np.zeros((2, lengths[0], count), bool)
    for b, t in np.ndindex(2, lengths[0]):
        position = np.broadcast_to(offset or 0, 2)[b] + t
        want[b, t, seen_blocks(position, ids[0][b, t], ids[1][b], count, size, stride)] = True
    where = jnp.asarray(offset, jnp.int32) if isinstance(offset, list) else offset
    index = compressed_index(*lengths, compression_size=size, compression_stride=stride, query_offset=where, **options)
    np.testing.assert_array_equal(np.broadcast_to(index.mask()[:, 0], want.shape), want)


X, KEY, COMPRESSED = jnp.zeros((2, 16, 4, 16)), jnp.zeros((2, 16, 2, 16)), jnp.zeros((2, 7, 2, 16))
GOOD = sizes(4, 2, 4, 3, local=1)
BAD = {
    "no compression": ({"compression_size": 0}, ValueError, "compression_size must be at least 1, got 0"),
    "no stride": ({"compression_stride": 0}, ValueError, "compression_stride must be at least 1, got 0"),
    "a stride that does not divide": (
        {"compression_stride": 3},
        ValueError,
        "compression_stride must divide compression_size, got 3 and 4",
    ),
    "no size": ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
    "half a stride": (
        {"block_size": 5},
        ValueError,
        "block_size must be a multiple of compression_stride, got 5 and 2",
    ),
    "fewer than are chosen always": ({"top_k": 1}, ValueError, "top_k must be at least 2, got 1"),
    "a number below 0": ({"num_initial": -1}, ValueError, "num_initial must be at least 0, got -1"),
    "no local block": ({"num_local": 0}, ValueError, "num_local must be at least 1, got 0"),
    "a size that is data": ({"top_k": jnp.int32(3)}, TypeError, "top_k must be a static int"),
    "offsets of floats": ({"query_offset": 1.5}, TypeError, "query_offset must be"),
    "ids of another length": (
        {"query_segment_ids": jnp.zeros(9, jnp.int32)},
        ValueError,
        r"query_segment_ids must be \[B, 16\] or \[16\], got shape \(9,\)",
    ),
    "ids of another batch": (
        {"query_segment_ids": jnp.zeros((3, 16), jnp.int32)},
        ValueError,
        "query_segment_ids must have the batch size of query, 2, or 1, got 3",
    ),
    "offsets of another batch": (
        {"query_offset": jnp.zeros(3, jnp.int32)},
        ValueError,
        "query_offset must have the batch size of query, 2, or 1, got 3",
    ),
    "a scale that is data": ({"scale": jnp.float32(1)}, TypeError, "scale must be"),
    "another option": ({"chunk": 2}, TypeError, "chunk is no option of nsa_"),
}


def attend_to(compressed=COMPRESSED, **options):
    return scfa_jax.nsa_attention(
        X, (compressed, compressed), (KEY, KEY), (KEY, KEY), X[..., :3], **{"window": 4, **options}
    )


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    options, error, message = BAD[name]
    for call in (attend_to, partial(nsa_blocks, X, COMPRESSED, X[..., 0], 16)):
        with pytest.raises(error, match=message):
            call(**GOOD | options)


@pytest.mark.usefixtures("unchecked")
def test_bad_arrays_are_named():
    for shape in ((2, 16, 4, 2), (2, 16, 4, 4), (2, 16, 1, 3), (1, 16, 4, 3), (16, 4, 3)):
        pairs = [(x, x) for x in (COMPRESSED, KEY, KEY)]
        with pytest.raises(ValueError, match=r"gates must have shape \(2, 16, 4, 3\), got"):
            scfa_jax.nsa_attention(X, *pairs, jnp.ones(shape), window=4, **GOOD)
    with pytest.raises(ValueError, match="compressed_query must have the shape of query"):
        attend_to(COMPRESSED, **GOOD, compressed_query=X[:, :, :1])
    for compressed in (COMPRESSED[:, :6], KEY):
        message = rf"must have a row for each of the 7 compression blocks of 16 keys, got {compressed.shape[1]}"
        with pytest.raises(ValueError, match=f"compressed {message}"):
            attend_to(compressed, **GOOD)
        with pytest.raises(ValueError, match=f"compressed_key {message}"):
            nsa_blocks(X, compressed, X[..., 0], 16, **GOOD)
    with pytest.raises(ValueError, match=r"logsumexp must be \[B, T, N\] = \(2, 16, 4\), got \(2, 16, 2\)"):
        nsa_blocks(X, COMPRESSED, KEY[..., 0], 16, **GOOD)
    with pytest.raises(TypeError, match=r"key must have the dtype of query, float32, got bfloat16"):
        nsa_blocks(X, COMPRESSED.astype(jnp.bfloat16), X[..., 0], 16, **GOOD)
    with pytest.raises(ValueError, match=r"query_offset must be given where query has 5 rows and key 16"):
        nsa_blocks(X[:, :5], COMPRESSED, X[:, :5, :, 0], 16, **GOOD)
    with pytest.raises(ValueError, match=r"stride must divide size, got 3 and 4"):
        in_compression_blocks(KEY, 4, 3)
