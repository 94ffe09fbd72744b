"""A token that decodes in hash mode meets its bucket, as all tokens at once do, and reads nothing else of the cache."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import HAS_GPU, IMPLEMENTATIONS
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from lowering import H100, lowered_for_cuda, number_of_kernels

import scfa_jax.nnx
from scfa_jax import reference
from scfa_jax.backends import tile
from scfa_jax.backends.protocol import Call, Run
from scfa_jax.backends.tile import Logits
from scfa_jax.backends.triton import decode as triton_decode
from scfa_jax.backends.xla import decode as xla_decode
from scfa_jax.layers import Hash, bucket_order

BATCH, ROOM, LENGTH, HEADS, KEY_HEADS, HEAD_DIM = 2, 150, 148, 4, 2, 24
IDS = np.array([-(2**31), -3, 0, 7, 2**31 - 1], np.int32)
SHARES = [0.1, 0.05, 0.7, 0.0, 0.15]  # of the keys: one bucket takes three tiles, another is empty
EXACT = {"atol": 2e-6, "rtol": 1e-5}
CAP_AND_SINKS = {"logits_soft_cap": 0.7, "sink_logits": np.linspace(-2, 3, HEADS, dtype=np.float32)}


def inputs(seed: int = 0) -> dict[str, np.ndarray]:
    """All tokens of a cache that is almost full."""
    rng = np.random.default_rng(seed)
    rows = {"query": (LENGTH, HEADS), "key": (ROOM, KEY_HEADS), "value": (ROOM, KEY_HEADS)}
    made = {name: rng.normal(size=(BATCH, *shape, HEAD_DIM)).astype(np.float32) for name, shape in rows.items()}
    made["query_hash"] = rng.choice(IDS, (BATCH, LENGTH, HEADS))
    return made | {"key_hash": rng.choice(IDS, (BATCH, ROOM, KEY_HEADS), p=SHARES)}


def token(given: dict, position: int, order: jax.Array | None = None) -> tuple:
    """Arguments of `attend_from_one`; the order is that of a prompt up to the token."""
    query, query_hash = (given[name][:, position : position + 1] for name in ("query", "query_hash"))
    order = bucket_order.order_of(given["key_hash"], position) if order is None else order
    return query, given["key"], given["value"], query_hash, given["key_hash"], order, jnp.int32(position)


def step(implementation: str | None, exclude_self: bool = True, **logits):
    options = {"exclude_self": exclude_self, "implementation": implementation, **logits}
    return functools.partial(bucket_order.attend_from_one, **options)


def all_at_once(given: dict, exclude_self: bool = True, **logits) -> np.ndarray:
    seen = {name: x[:, :LENGTH] for name, x in given.items()}
    return np.asarray(reference.hash_sparse_attention(**seen, exclude_self=exclude_self, **logits))


@pytest.mark.parametrize(
    ("implementation", "exclude_self", "logits"),
    [
        (IMPLEMENTATIONS[0], True, {}),
        (IMPLEMENTATIONS[-1], False, {}),
        (IMPLEMENTATIONS[0], False, CAP_AND_SINKS),
        (IMPLEMENTATIONS[-1], True, CAP_AND_SINKS),
    ],
    ids=["others", "with itself", "with itself, a cap and sinks", "others, with a cap and sinks"],
)
def test_tokens_one_by_one_meet_what_they_meet_all_at_once(implementation, exclude_self, logits):
    """Any ids, grouped heads with hashes of their own, buckets of one key and of most; a prompt, then single tokens."""
    given, prompt = inputs(), LENGTH - 40

    @jax.jit
    def decode(given, order):
        def add(order, position):
            at = lambda name: jax.lax.dynamic_slice_in_dim(given[name], position, 1, axis=1)
            # What is not there yet may be anything.
            keys, values, hashes = (
                jnp.where(jnp.arange(ROOM).reshape(-1, *[1] * (given[name].ndim - 2)) <= position, given[name], junk)
                for name, junk in (("key", jnp.nan), ("value", jnp.nan), ("key_hash", -3))
            )
            args = at("query"), keys, values, at("query_hash"), hashes, order, position
            output, order = step(implementation, exclude_self, **logits)(*args)
            return order, output

        return jax.lax.scan(add, order, jnp.arange(prompt, LENGTH, dtype=jnp.int32))

    order, outputs = decode(given, bucket_order.order_of(given["key_hash"], prompt))
    got, exact = np.concatenate(outputs, axis=1), all_at_once(given, exclude_self, **logits)[:, prompt:]
    np.testing.assert_allclose(got, exact, **EXACT)
    assert np.any(np.all(exact == 0, axis=3))
    assert np.all(got[exact == 0] == 0)
    np.testing.assert_array_equal(order[..., :LENGTH], bucket_order.order_of(given["key_hash"], LENGTH)[..., :LENGTH])


every_size = itertools.product((16, 64, 128, 256), (jnp.float32, jnp.bfloat16))
on_gpu = [pytest.param(*case, marks=pytest.mark.gpu) for case in every_size]


@pytest.mark.parametrize(("head_dim", "dtype"), [(80, jnp.bfloat16), (24, jnp.float16), *on_gpu], ids=str)
def test_kernels_are_as_exact_as_plain_jax(head_dim, dtype):
    rng, room = np.random.default_rng(0), 700
    rows = [rng.normal(size=(1, length, heads, head_dim)) for length, heads in ((1, 4), (room, 2), (room, 2))]
    rows = [jnp.asarray(x, dtype) for x in rows]
    key_hash, position = rng.choice(IDS, (1, room, 2), p=SHARES), jnp.int32(room - 2)
    ids = IDS[[[[2, 2, 0, 3]]]], key_hash, bucket_order.order_of(key_hash, position), position
    exact, _ = jax.jit(step("xla"))(*(x.astype(jnp.float32) for x in rows), *ids)
    plain, got = (jax.jit(step(name))(*rows, *ids)[0] for name in ("xla", IMPLEMENTATIONS[-1]))
    assert got.dtype == dtype
    error = lambda x: np.max(np.abs(np.asarray(x, np.float32) - exact))
    assert error(got) <= 2 * error(plain) + 1e-6


def test_other_buckets_may_hold_anything(implementation):
    given, position = inputs(), LENGTH - 1
    given["query_hash"][:] = 0
    given["key_hash"][:, :60] = IDS[-1]  # and so most of a tile behind the bucket
    decode = jax.jit(step(implementation))
    exact, _ = decode(*token(given, position))
    other = given["key_hash"] != 0
    for name in ("key", "value"):
        given[name][other] = np.where(np.arange(HEAD_DIM) % 2, np.nan, np.inf)
    got, _ = decode(*token(given, position))
    assert np.all(got != 0)
    np.testing.assert_array_equal(got, exact)


@pytest.mark.parametrize("module", [xla_decode, triton_decode])
def test_only_the_tiles_of_a_bucket_are_visited(module, monkeypatch):
    """Each visit counts itself in place of attending."""
    count = lambda softmax, *_: tile.Softmax(softmax.acc + 1, jnp.zeros((1,)), jnp.ones((1,)))
    monkeypatch.setattr(tile, "add_keys", count)
    monkeypatch.setattr(xla_decode, "_BLOCK", 16)
    monkeypatch.setattr(triton_decode, "_ELEMENTS", 16)
    monkeypatch.setattr(triton_decode, "_PROGRAMS", 1)
    start, stop = np.array([[[0, 5, 32, 40], [0, 10, 100, 70]], [[0, 6, 48, 100], [150, 10, 147, 90]]], np.int32)
    query, key, value, _, _, order, _ = map(jnp.asarray, token(inputs(), 0))
    call = Call(HEAD_DIM, HEAD_DIM, query.dtype, Logits(1.0), output_dtype=query.dtype)
    options = {"interpret": True} if module is triton_decode else {}
    output, _ = module.forward(call, query, key, value, Run(order, *jnp.array([start, stop])), **options)
    visits = output[:, 0, :, 0]
    # The kernel's tiles are those of the whole order; the loop's begin with the bucket.
    expected = -(-stop // 16) - start // 16 if module is triton_decode else -((start - stop) // 16)
    np.testing.assert_array_equal(visits, expected)


@pytest.mark.parametrize(("implementation", "reader"), [("xla", "gather"), ("triton_interpret", "pallas_call")])
def test_nothing_else_reads_keys_and_values(implementation, reader):
    def readers(jaxpr):
        for equation in jaxpr.eqns:
            inner = [] if equation.primitive.name == "pallas_call" else list(jaxprs_in_params(equation.params))
            for part in inner:
                yield from readers(part)
            if not inner and any(v.aval.size == BATCH * ROOM * KEY_HEADS * HEAD_DIM for v in equation.invars):
                yield equation.primitive.name

    jaxpr = jax.make_jaxpr(step(implementation))(*token(inputs(), LENGTH - 1))
    assert set(readers(jaxpr.jaxpr)) == {reader}


def test_it_can_be_mapped_over_caches_of_different_lengths(implementation):
    caches = [token(inputs(seed), position) for seed, position in enumerate((LENGTH - 1, 9))]
    one = jax.jit(step(implementation))
    outputs, orders = jax.jit(jax.vmap(step(implementation)))(*map(jnp.stack, zip(*caches, strict=True)))
    for cache, output, order in zip(caches, outputs, orders, strict=True):
        alone, ordered = one(*cache)
        np.testing.assert_allclose(output, alone, **EXACT)
        np.testing.assert_array_equal(order, ordered)


@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices")
@pytest.mark.parametrize("logits", [{}, CAP_AND_SINKS], ids=["plain", "with a cap and sinks"])
def test_each_device_decodes_its_own_heads(logits):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    arguments = token(inputs(), LENGTH - 1)
    heads = [P("data", None, "model")] * 5 + [P("data", "model"), P()]
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arguments, heads, strict=True)]
    compiled = jax.jit(step("xla", **logits)).lower(*placed).compile()
    assert not any(name in compiled.as_text() for name in ("all-gather", "all-reduce", "all-to-all", "permute"))
    np.testing.assert_allclose(compiled(*placed)[0], all_at_once(inputs(), **logits)[:, -1:], **EXACT)


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(16, jnp.float32), (80, jnp.bfloat16), (128, jnp.float16), (256, jnp.float32)], ids=str
)
def test_it_lowers_to_one_kernel(head_dim, dtype):
    rows = [jnp.zeros(shape, dtype) for shape in ((1, 1, 4, head_dim), (1, 300, 2, head_dim), (1, 300, 2, head_dim))]
    ids = [jnp.zeros(shape, jnp.int32) for shape in ((1, 1, 4), (1, 300, 2), (1, 2, 300), ())]
    kernels = lambda function, *arguments: number_of_kernels(lowered_for_cuda(function, *arguments))
    assert kernels(step(None), *rows, *ids) == 1
    assert kernels(step("xla"), *rows, *ids) == 0
    some = (0, None, 0, None, 0, 0, None)
    stacked = [x if axis is None else jnp.stack([x, x]) for x, axis in zip((*rows, *ids), some, strict=True)]
    assert kernels(jax.vmap(step("triton"), some), *stacked) == 1


def test_an_order_is_kept_where_that_pays(monkeypatch):
    monkeypatch.setattr(bucket_order, "LEAST_ROOM", {"cpu": 8, "triton": 16})
    has_order = lambda head_dim=16: [bucket_order.pays(room, head_dim) for room in (7, 8, 15, 16)]
    assert has_order() == ([False, False, False, True] if HAS_GPU else [False, True, True, True])
    with jax.sharding.use_abstract_mesh(H100):
        assert has_order() == [False, False, False, True]
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        assert not any(has_order(head_dim=20))  # plain JAX on a GPU
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert any(has_order()) == HAS_GPU


def test_a_module_has_the_order_of_its_last_cache_alone(monkeypatch):
    monkeypatch.setattr(bucket_order, "LEAST_ROOM", {"cpu": 16, "triton": 16})
    module = scfa_jax.nnx.CausalSelfAttention(32, 2, sparsity=Hash(4), rngs=nnx.Rngs(0))
    for room in (16, 15):
        module.init_cache((1, room, 32))
        assert ("cached_order" in nnx.to_pure_dict(nnx.state(module, nnx.Cache))) == (room == 16)
    x = jnp.ones((1, 1, 32))
    assert nnx.eval_shape(lambda module, x: nnx.view(module, decode=True)(x), module, x).shape == x.shape
