"""MoBA: the blocks whose mean key a query likes best, and attention to them and to its own."""

from collections import Counter
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SEGMENT_KINDS, SMALL_BLOCKS, Case, Shape, arrays, blocks_mask, of_each, segment_ids, segment_mask
from conftest import IMPLEMENTATIONS, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params
from lowering import H100, number_of_kernels
from tolerance import assert_as_exact_as_plain, cotangents

import scfa_jax
from scfa_jax import _selection, moba, reference
from scfa_jax.backends.triton import best_blocks

SIZES = ("block_size", "top_k", "num_local", "share_in_group")


def best(query, key, *, block_size, top_k, num_local=1, share_in_group=False, offset=0, ids=None):
    """`moba_blocks` in float64 loops: the chosen blocks of each query, ascending, behind as many -1 as are missing."""
    query, key = (np.asarray(x, np.float64) for x in (query, key))
    (batch, query_length, heads, _), (_, key_length, key_heads, _) = query.shape, key.shape
    group = heads // key_heads
    out_heads = key_heads if share_in_group else heads
    offset = np.broadcast_to(np.clip(np.asarray(offset), -(2**30), 2**30), (batch,))
    ids = [np.zeros((batch, length), int) for length in (query_length, key_length)] if ids is None else ids
    of_query, of_key = (np.broadcast_to(x, (batch, x.shape[-1])) for x in ids)
    chosen = np.full((batch, query_length, out_heads, top_k - 1), -1)
    for b, t, n in np.ndindex(batch, query_length, out_heads):
        of_head = range(n * group, (n + 1) * group) if share_in_group else [n]
        scored = []
        for block in range(key_length // block_size):  # complete ones
            rows = np.arange(block * block_size, (block + 1) * block_size)
            segment = of_key[b, rows[-1]]
            is_before = block <= (offset[b] + t) // block_size - num_local
            if not is_before or segment < 0 or segment != of_query[b, t]:
                continue
            rows = rows[of_key[b, rows] == segment]
            score = sum(query[b, t, h] @ key[b, rows, h // group].mean(axis=0) for h in of_head)
            if score > -np.inf:  # and no NaN
                scored.append((-score, block))
        found = [block for _, block in sorted(scored)[: top_k - 1]]
        chosen[b, t, n, top_k - 1 - len(found) :] = sorted(found)
    return chosen


@partial(jax.jit, static_argnames=(*SIZES, "implementation"))
def choose(query, key, offset=None, ids=(), **sizes):
    """`moba_blocks`, ascending."""
    segments = dict(zip(("query_segment_ids", "key_segment_ids"), ids, strict=False))
    return jnp.sort(scfa_jax.moba_blocks(query, key, query_offset=offset, **segments, **sizes), axis=-1)


SHAPE = Shape(2, 50, 77, 4, 2, 16)
SETUPS = {
    "as in the paper": {"block_size": 8, "top_k": 3},
    "that divides nothing": {"block_size": 7, "top_k": 4},
    "with more local blocks": {"block_size": 5, "top_k": 3, "num_local": 3},
    "for a group together": {"block_size": 7, "top_k": 3, "share_in_group": True},
    "more than there are": {"block_size": 16, "top_k": 9},
    "the own alone": {"block_size": 8, "top_k": 1},
    "of more keys than there are": {"block_size": 100, "top_k": 3},
}


@pytest.mark.parametrize("in_segments", [False, True], ids=["one segment", "segments"])
@pytest.mark.parametrize("name", SETUPS)
@settings(max_examples=examples(15))
@given(
    kind=st.sampled_from(SEGMENT_KINDS),
    offset=st.sampled_from((27, 0, -5, 60, 1000, 2**31 - 1)),
    seed=st.integers(0, 2**32 - 1),
)
def test_blocks_are_those_of_the_definition(name, in_segments, kind, offset, seed):
    rng, offset = np.random.default_rng(seed), np.array([offset, 3], np.int32)
    query, key, _ = arrays(rng, SHAPE, jnp.float32)
    ids = [segment_ids(rng, (2, length), kind) for length in (50, 77)] if in_segments else None
    got = choose(query, key, offset, ids or (), **SETUPS[name])
    np.testing.assert_array_equal(got, best(query, key, **SETUPS[name], offset=offset, ids=ids))


@pytest.mark.parametrize("share_in_group", [False, True])
def test_of_equal_scores_the_earlier_block_wins(share_in_group):
    """Keys and queries are small integers, so that scores are exact and often equal."""
    rng = np.random.default_rng(0)
    query, key = (rng.integers(-1, 2, size).astype(np.float32) for size in ((2, 64, 4, 4), (2, 64, 2, 4)))
    sizes = {"block_size": 4, "top_k": 4, "share_in_group": share_in_group}
    np.testing.assert_array_equal(choose(query, key, **sizes), best(query, key, **sizes))
    constant = choose(np.ones_like(query), np.ones_like(key), **sizes)
    np.testing.assert_array_equal(constant[0, 40, 0], [0, 1, 2])


def test_16_bit_inputs_are_scored_in_float32():
    """Scores differ by less than bfloat16 tells apart, in the mean key as in the product."""
    key = np.zeros((1, 24, 1, 2), np.float32)
    key[0, :8, 0], key[0, 8:16, 0] = (256, 0), (256, 0)
    key[0, 8, 0, 0] = 258  # the mean of its block is 256.25
    query = np.ones((1, 24, 1, 2), np.float32)
    chosen = scfa_jax.moba_blocks(query.astype(jnp.bfloat16), key.astype(jnp.bfloat16), block_size=8, top_k=2)
    assert (chosen[0, 16:] == 1).all()


def test_keys_that_are_no_candidates_may_be_anything():
    """In the own block, in later and incomplete ones, in padding, and in other segments. NaN keeps a block out."""
    rng = np.random.default_rng(1)
    query, key, _ = (np.asarray(x) for x in arrays(rng, Shape(1, 60, 60, 2, 1, 16), jnp.float32))
    ids = np.repeat(np.array([0, 1, -1, 2], np.int32), (13, 28, 4, 15))[None]
    sizes = {"block_size": 8, "top_k": 3}
    clean = choose(query, key, ids=(ids,), **sizes)
    assert (clean[0, 32:41] >= 0).any()
    for poison in (np.nan, np.inf, -np.inf):
        other = key.copy()
        other[0, :13] = other[0, 41:] = poison  # neither of the second segment nor of its blocks
        got = choose(query, other, ids=(ids,), **sizes)
        np.testing.assert_array_equal(got[0, 13:41], clean[0, 13:41])
        other = key.copy()
        other[0, 40:] = poison
        got = choose(query, other, **sizes)
        np.testing.assert_array_equal(got[0, :48], choose(query, key, **sizes)[0, :48])
    other = key.copy()
    other[0, 17] = np.nan
    assert not (choose(query, other, **sizes) == 2).any()


def candidates(rng, shape, num_blocks, kind):
    """Random operands of a selection, in segments and with NaN."""
    query, block_key, _ = arrays(rng, replace(shape, key_length=num_blocks), jnp.float32)
    block_key = block_key.at[0, num_blocks // 2].set(jnp.nan)
    if kind == "equal":
        query, block_key = jnp.round(query), jnp.ones_like(block_key)
    last = np.sort(rng.integers(-3, num_blocks + 2, (shape.batch, shape.query_length)), axis=1).astype(np.int32)
    number = 1 if kind == "one segment" else 3
    of_query = np.sort(rng.integers(0, number, (1, shape.query_length))).astype(np.int32) - (number > 1)
    of_block = np.sort(rng.integers(0, number, (shape.batch, num_blocks))).astype(np.int32) - (number > 1)
    return query, block_key, last, of_query, np.where(of_block < 0, -2, of_block)


@pytest.mark.parametrize(
    ("k", "num_blocks", "share_in_group"), [(1, 9, False), (3, 80, True), (5, 130, False), (16, 9, False)]
)
@pytest.mark.parametrize("kind", ["one segment", "segments", "equal"])
def test_the_kernel_chooses_what_plain_jax_chooses(kind, k, num_blocks, share_in_group):
    """As sets. Its tiles hold 64 queries and up to 64 blocks."""
    operands = candidates(np.random.default_rng(k), Shape(2, 100, 100, 4, 2, 24), num_blocks, kind)
    how = {"k": k, "share_in_group": share_in_group}
    want = jax.jit(partial(_selection.plain_best_blocks, **how))(*operands)
    got = jax.jit(partial(best_blocks.best_blocks, **how, interpret=True))(*operands)
    np.testing.assert_array_equal(*(np.sort(x, axis=-1) for x in (got, want)))
    assert got.shape == (2, 100, 2 if share_in_group else 4, k)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_memory_is_linear_in_length(implementation):
    """No array has a number for each query and block of all heads, choosing and attending in either pass."""
    length, heads, block_size = 2**16, 4, 64
    x = jax.ShapeDtypeStruct((1, length, heads, 16), jnp.bfloat16)
    attend = partial(scfa_jax.moba_attention, block_size=block_size, top_k=4, implementation=implementation)
    loss = lambda *qkv: attend(*qkv).astype(jnp.float32).sum()
    with jax.sharding.use_abstract_mesh(H100):
        jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(x, x, x)
    largest = max(v.aval.size for e in equations(jaxpr.jaxpr) for v in e.outvars if hasattr(v.aval, "size"))
    assert largest < length * (length // block_size) * heads // 8


@pytest.mark.parametrize(("heads", "share_in_group"), [(4, False), (2, True)])
def test_choosing_and_attending_lower_to_few_kernels(heads, share_in_group):
    """One to choose, two to sort, one forward and two backward, and five small ones for tiles and marks."""
    query, key = (jax.ShapeDtypeStruct((2, 1035, n, 64), jnp.bfloat16) for n in (4, 2))
    attend = partial(scfa_jax.moba_attention, block_size=128, top_k=4, share_in_group=share_in_group)
    loss = lambda *qkv: attend(*qkv, implementation="triton").astype(jnp.float32).sum()
    with jax.sharding.use_abstract_mesh(H100):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(query, key, key)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    launched = [e.params for e in equations(traced.jaxpr.jaxpr) if e.primitive.name == "pallas_call"]
    counted = {"best_blocks": 1, "count": 1, "place": 1, "forward": 1, "dq": 1, "dkv": 1, "bounds": 3, "marks": 2}
    names = Counter(str(params.get("name") or params["name_and_src_info"].name) for params in launched)
    assert names == {f"scfa_{name}": number for name, number in counted.items()}
    assert number_of_kernels(text) > 0
    assert "1035x1035" not in text


def case_of(shape, dtype, rng, *, offset=0, ids=None, **sizes):
    """A call of `moba_attention`, its mask from the loops above."""
    query, key, value = arrays(rng, shape, dtype)
    found = best(query, key, **sizes, offset=offset, ids=ids)
    local = {"block_size": sizes["block_size"], "num_local": sizes.get("num_local", 1)}
    mask = blocks_mask(found, shape.query_length, shape.key_length, **local, query_offset=of_each(offset))
    mask = jnp.asarray(np.repeat(mask, shape.heads // mask.shape[1], axis=1))
    options = {**sizes, "query_offset": jnp.asarray(offset, jnp.int32)}
    if ids is not None:
        mask = mask & segment_mask(*ids)
        options |= {"query_segment_ids": jnp.asarray(ids[0]), "key_segment_ids": jnp.asarray(ids[1])}
    return Case(query, key, value, mask, scfa_jax.moba_attention, reference.moba_attention, (), options)


ATTENTIONS = {
    "as in the paper": (Shape(2, 64, 64, 4, 4, 16), {"block_size": 16, "top_k": 3}, jnp.float32, None),
    "grouped": (SHAPE, {"block_size": 7, "top_k": 4, "num_local": 2, "offset": [27, -3]}, jnp.float32, None),
    "shared in segments": (
        SHAPE,
        {"block_size": 6, "top_k": 3, "share_in_group": True, "offset": [27, 3]},
        jnp.float32,
        "padded",
    ),
    "in bfloat16": (SHAPE, {"block_size": 7, "top_k": 4, "offset": [27, 60]}, jnp.bfloat16, "scattered"),
}


def attention_case(name, seed=0):
    shape, sizes, dtype, kind = ATTENTIONS[name]
    rng = np.random.default_rng(seed)
    ids = kind and [segment_ids(rng, (2, length), kind) for length in (shape.query_length, shape.key_length)]
    return case_of(shape, dtype, rng, ids=ids, **sizes)


EXACT = [
    (implementation, name)
    for implementation in IMPLEMENTATIONS
    for name in ATTENTIONS
    if implementation != "triton_interpret" or name in ("grouped", "shared in segments")  # which is slow
]


@pytest.mark.parametrize(("implementation", "name"), EXACT)
def test_attention_is_as_exact_as_plain_attention(implementation, name):
    for seed in range(2):
        case = attention_case(name, seed)
        results = case.compiled(implementation=implementation, block_sizes=SMALL_BLOCKS)
        assert_as_exact_as_plain(results, case.query, case.key, case.value, case.mask)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_the_reference_defines_it(name):
    """Its mask, by which it also has its gradients, is that of the loops."""
    case = attention_case(name, 2)
    arrays = case.query, case.key, case.value, *cotangents(np.random.default_rng(0), case.query)
    dense = lambda *qkv, **options: reference.attention(*qkv, case.mask)
    want = Case(case.query, case.key, case.value, case.mask, dense, dense).compiled()(*arrays)
    for got, other in zip(case.defined()(*arrays), want, strict=True):
        np.testing.assert_allclose(got.astype(jnp.float32), other.astype(jnp.float32), atol=1e-5, rtol=1e-5)


def test_it_is_its_parts_and_no_gradient_passes_the_selection(one_implementation):
    """The gradients are those with the chosen blocks held fixed, bit for bit."""
    options = {"implementation": one_implementation}
    query, key, value = arrays(np.random.default_rng(3), Shape(1, 60, 60, 4, 2, 16), jnp.float32)

    def of_parts(query, key, value):
        blocks = scfa_jax.moba_blocks(query, key, block_size=8, top_k=3, num_local=2, **options)
        index = scfa_jax.block_index(jax.lax.stop_gradient(blocks), 8, num_local=2, **options)
        return scfa_jax.sparse_attention(query, key, value, index, **options)

    whole = partial(scfa_jax.moba_attention, block_size=8, top_k=3, num_local=2, **options)
    results = [
        jax.jit(jax.value_and_grad(lambda *x: jnp.sin(f(*x)).sum(), (0, 1, 2)))(query, key, value)  # noqa: B023
        for f in (whole, of_parts)
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)
    scores = lambda q: moba.moba_blocks(q, key, block_size=8, top_k=3).astype(jnp.float32).sum()
    np.testing.assert_array_equal(jax.grad(scores)(query), 0)


def test_nothing_depends_on_what_comes_later(one_implementation):
    """By value and by gradient, at places within a block and at its borders."""
    query, key, value = arrays(np.random.default_rng(4), Shape(1, 60, 60, 2, 1, 16), jnp.float32)
    attend = jax.jit(partial(scfa_jax.moba_attention, block_size=8, top_k=3, implementation=one_implementation))
    want = attend(query, key, value)
    first = jax.jit(jax.grad(lambda qkv, is_first: jnp.sum(attend(*qkv) ** 2 * is_first[:, None, None])))
    for place in (1, 7, 8, 9, 31, 32, 50):
        later = np.arange(60) >= place
        others = (jnp.where(later[:, None, None], 7 * x[:, ::-1], x) for x in (query, key, value))
        np.testing.assert_array_equal(attend(*others)[:, :place], want[:, :place])
        for gradient in first((query, key, value), ~later):
            np.testing.assert_array_equal(gradient[:, place:], 0)


def test_later_queries_alone_see_the_same(one_implementation):
    """A chunk of queries with its offset, as in decoding."""
    query, key, value = arrays(np.random.default_rng(5), Shape(2, 60, 60, 2, 2, 16), jnp.float32)
    attend = jax.jit(partial(scfa_jax.moba_attention, block_size=8, top_k=3, implementation=one_implementation))
    whole = attend(query, key, value)
    np.testing.assert_allclose(attend(query[:, 43:], key, value, query_offset=jnp.int32(43)), whole[:, 43:], atol=2e-5)
    alone = attend(query[0, 43:], key[0], value[0], query_offset=jnp.int32(43))
    np.testing.assert_allclose(alone, whole[0, 43:], atol=2e-5)


def test_packed_documents_equal_documents_alone(one_implementation):
    """Of whole blocks: within a document, blocks are counted from the start of the sequence."""
    query, key, value = arrays(np.random.default_rng(6), Shape(1, 72, 72, 2, 2, 16), jnp.float32)
    attend = jax.jit(partial(scfa_jax.moba_attention, block_size=8, top_k=3, implementation=one_implementation))
    packed = attend(query, key, value, query_segment_ids=jnp.asarray(np.repeat([3, 5], (32, 40)), jnp.int32))
    for part in (slice(0, 32), slice(32, 72)):
        alone = attend(*(x[:, part] for x in (query, key, value)))
        np.testing.assert_allclose(packed[:, part], alone, atol=2e-5)


def test_all_blocks_are_causal_attention(one_implementation):
    query, key, value = arrays(np.random.default_rng(7), Shape(2, 60, 60, 4, 2, 16), jnp.float32)
    attend = partial(scfa_jax.moba_attention, block_size=8, top_k=8)
    got, want = (f(query, key, value, implementation=one_implementation) for f in (attend, scfa_jax.causal_attention))
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_inside_vmap_scan_and_checkpoint(one_implementation):
    x = jax.random.normal(jax.random.key(0), (3, 1, 30, 2, 16))
    attend = partial(scfa_jax.moba_attention, block_size=4, top_k=3, implementation=one_implementation)
    loss = lambda x: jnp.sin(attend(x, x + 1, x - 1)).sum()
    remat = jax.checkpoint(loss, policy=scfa_jax.remat.save_attention)

    @jax.jit
    def results(x):
        one_by_one = [jax.grad(loss)(part) for part in x]
        scanned = jax.lax.scan(lambda _, part: (None, jax.grad(remat)(part)), None, x)[1]
        return jnp.stack(one_by_one), jax.vmap(jax.grad(loss))(x), scanned

    want, *others = results(x)
    for got in others:
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


def test_with_the_definition_of_the_paper_in_pytorch():
    """Section 2.2: a gate for each block, of `-inf` behind the query and `inf` at it, and the best `top_k` of them."""
    torch = pytest.importorskip("torch")
    length, block_size, top_k = 72, 8, 3
    query, key, value = arrays(np.random.default_rng(8), Shape(1, length, length, 2, 2, 16), jnp.float32)
    by_output, _ = cotangents(np.random.default_rng(0), query)

    def by_torch(*given):
        q, k, v = (torch.tensor(np.asarray(x)[0].swapaxes(0, 1), requires_grad=True) for x in given)  # [N, T, H]
        number = torch.arange(length) // block_size
        block = torch.arange(length // block_size)
        gate = torch.einsum("nth,nmh->ntm", q, k.unflatten(1, (-1, block_size)).mean(dim=2))
        gate = gate.masked_fill(block > number[:, None], -torch.inf).masked_fill(block == number[:, None], torch.inf)
        chosen = torch.zeros_like(gate).scatter(2, gate.topk(top_k).indices, 1) * (gate > -torch.inf)
        seen = chosen[:, :, number].bool() & torch.ones(length, length).tril().bool()
        logits = torch.einsum("nth,nsh->nts", q, k) * q.shape[-1] ** -0.5
        output = torch.softmax(logits.masked_fill(~seen, -torch.inf), dim=2) @ v
        output.backward(torch.tensor(np.asarray(by_output)[0].swapaxes(0, 1)))
        return [x.detach().numpy().swapaxes(0, 1)[None] for x in (output, q.grad, k.grad, v.grad)]

    attend = partial(scfa_jax.moba_attention, block_size=block_size, top_k=top_k, implementation="xla")
    output, pull = jax.vjp(attend, query, key, value)
    for got, want in zip((output, *pull(by_output)), by_torch(query, key, value), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


X, KEY = jnp.zeros((2, 8, 4, 16)), jnp.zeros((2, 8, 2, 16))
BAD = {
    "no size": ({"block_size": 0, "top_k": 2}, ValueError, "block_size must be at least 1, got 0"),
    "no block": ({"block_size": 4, "top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
    "no local block": ({"block_size": 4, "top_k": 2, "num_local": 0}, ValueError, "num_local must be at least 1"),
    "a size that is data": ({"block_size": 4, "top_k": jnp.int32(2)}, TypeError, "top_k must be a static int"),
    "another option": ({"block_size": 4, "top_k": 2, "window": 2}, TypeError, "window is no option of moba_"),
    "ids of another length": (
        {"block_size": 4, "top_k": 2, "query_segment_ids": jnp.zeros(9, jnp.int32)},
        ValueError,
        r"query_segment_ids must be \[B, 8\] or \[8\], got shape \(9,\)",
    ),
    "offsets of floats": ({"block_size": 4, "top_k": 2, "query_offset": 1.5}, TypeError, "query_offset must be"),
    "offsets of another batch": (
        {"block_size": 4, "top_k": 2, "query_offset": jnp.zeros(3, jnp.int32)},
        ValueError,
        "query_offset must have the batch size of query, 2, or 1, got 3",
    ),
    "ids of another batch": (
        {"block_size": 4, "top_k": 2, "query_segment_ids": jnp.zeros((3, 8), jnp.int32)},
        ValueError,
        "query_segment_ids must have the batch size of query, 2, or 1, got 3",
    ),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    options, error, message = BAD[name]
    for call in (partial(scfa_jax.moba_blocks, X, KEY), partial(scfa_jax.moba_attention, X, KEY, KEY)):
        with pytest.raises(error, match=message):
            call(**options)


@pytest.mark.usefixtures("unchecked")
def test_bad_arrays_are_named():
    choose = partial(scfa_jax.moba_blocks, block_size=4, top_k=2)
    with pytest.raises(TypeError, match=r"key must have the dtype of query, float32, got bfloat16"):
        choose(X, KEY.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match=r"key must have a number of heads that divides that of query, got 3 and 4"):
        choose(X, X[:, :, :3])
    with pytest.raises(ValueError, match=r"query_offset must be given where query has 5 rows and key 8"):
        choose(X[:, :5], KEY)


@pytest.mark.parametrize("padding", [-1, -2, -7])
def test_padding_chooses_nothing(padding):
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 32, 2, 16))
    ids = jnp.where(jnp.arange(32) < 8, 0, padding).astype(jnp.int32)
    blocks = scfa_jax.moba_blocks(query, key, block_size=8, top_k=3, query_segment_ids=ids)
    assert (blocks == -1).all()  # the first document has no earlier block


def test_an_empty_batch_gives_an_empty_result():
    x = jnp.ones((0, 16, 2, 16))
    assert scfa_jax.moba_attention(x, x, x, block_size=4, top_k=2).shape == x.shape
