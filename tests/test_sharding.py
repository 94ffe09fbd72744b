"""Sharded over batch and heads, each device attends to its own part, without communication, wherever it is called."""

import contextlib
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SMALL_BLOCKS, Shape, in_segments, make_case
from conftest import HAS_GPU
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import scfa_jax
from scfa_jax import index, patterns, reference
from scfa_jax.kmeans import member_sums, random_centroids, update_centroids
from scfa_jax.nsa import in_compression_blocks
from scfa_jax.sharding import to_heads, to_sequence

pytestmark = pytest.mark.skipif(jax.device_count() < 2, reason="needs 2 devices, such as those that a CPU can simulate")

COLLECTIVE = re.compile(r" = .*\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?\(")
IMPLEMENTATION = None if HAS_GPU else "xla"
HOW = {"implementation": IMPLEMENTATION, "block_sizes": SMALL_BLOCKS}
ON_HEADS = P("data", None, "model")
SHAPE = Shape(2, 40, 40, 8, 4, 16)
POWER_OF_2 = Shape(
    2, 32, 32, 8, 4, 16
)  # XLA divides by such lengths in its own way: see `scfa_jax.backends.ordering.divided`
SIZES = next(sizes for sizes in ((2, 4), (2, 2), (1, 2), (1, 1)) if sizes[0] * sizes[1] <= jax.device_count())


def mesh_of(kind: AxisType, sizes=SIZES):
    return jax.make_mesh(sizes, ("data", "model"), axis_types=(kind,) * 2)


def sharded(mesh, x, spec=ON_HEADS):
    """Axes of 1 stay whole."""
    spec = P(*(name if size > 1 else None for name, size in zip(spec, x.shape, strict=False)))
    return jax.device_put(x, NamedSharding(mesh, spec))


def run(mesh, function, *arguments):
    """The results of a compiled function, and the collectives in its program."""
    is_explicit = AxisType.Explicit in mesh.axis_types
    with jax.set_mesh(mesh) if is_explicit else contextlib.nullcontext():
        program = jax.jit(function).lower(*arguments).compile()
    return program(*arguments), COLLECTIVE.findall(program.as_text())


def assert_close(got, want):
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-5), got, want)


def gradients(attend):
    """Gradients of query, key and value, and the output."""

    def loss(query, key, value, *pattern):
        output = attend(query, key, value, *pattern)
        return jnp.sum(jnp.sin(output)), output

    return jax.grad(loss, (0, 1, 2), has_aux=True)


def case_of(pattern, shape=SHAPE, **options):
    return make_case(pattern, np.random.default_rng(0), shape, jnp.float32, **options)


def dense(case):
    """Gradients and output by the mask, on one device."""
    attend = lambda *qkv: reference.attention(*qkv, case.mask)[0]
    return jax.jit(gradients(attend))(case.query, case.key, case.value)


def attention_of(case, implementation=IMPLEMENTATION, **more):
    options = {k: v for k, v in case.options.items() if not isinstance(v, jax.Array)}
    return partial(case.operator, **options, **more, implementation=implementation, block_sizes=SMALL_BLOCKS)


def segmented(case):
    return in_segments(case, np.random.default_rng(1), "scattered")


def with_segments(attend):
    return lambda q, k, v, query_ids, key_ids, *pattern: attend(
        q, k, v, *pattern, query_segment_ids=query_ids, key_segment_ids=key_ids
    )


@pytest.mark.parametrize(
    ("kind", "pattern", "options"),
    [
        (AxisType.Auto, "hash", {}),
        (AxisType.Auto, "hash", {"promise": 4, "shape": POWER_OF_2}),
        (AxisType.Auto, "keep", {}),
        (AxisType.Auto, "blocks", {"shape": POWER_OF_2, "block_size": 8}),
        (AxisType.Explicit, "blocks", {"num_local": 2}),
        (AxisType.Explicit, "causal", {}),
        (AxisType.Explicit, "range", {}),
    ],
    ids=str,
)
def test_each_device_attends_to_its_own_part(kind, pattern, options):
    """Grouped heads, forward and backward, with segments where the mesh is explicit."""
    mesh, case = mesh_of(kind), case_of(pattern, **options)
    arrays = [sharded(mesh, x) for x in (case.query, case.key, case.value)]
    rest = [sharded(mesh, x) for x in case.pattern]
    attend = attention_of(case)
    if kind == AxisType.Explicit:
        case = segmented(case)
        ids = [case.options[f"{side}_segment_ids"] for side in ("query", "key")]
        rest = [*(sharded(mesh, x, P("data")) for x in ids), *rest]
        attend = with_segments(attend)
    got, collectives = run(mesh, gradients(attend), *arrays, *rest)
    assert_close(got, dense(case))
    assert not collectives
    assert all(x.sharding.is_equivalent_to(arrays[0].sharding, 4) for x in jax.tree.leaves(got))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_each_device_chooses_blocks_for_its_own_part(kind):
    """MoBA in segments, forward and backward."""
    mesh, case = mesh_of(kind), segmented(case_of("causal"))
    ids = [case.options[f"{side}_segment_ids"] for side in ("query", "key")]
    attend = partial(scfa_jax.moba_attention, block_size=6, top_k=3, **HOW)
    dense = partial(reference.moba_attention, block_size=6, top_k=3)
    arrays = case.query, case.key, case.value
    given = *(sharded(mesh, x) for x in arrays), *(sharded(mesh, x, P("data")) for x in ids)
    got, collectives = run(mesh, gradients(with_segments(attend)), *given)
    assert_close(got, jax.jit(gradients(with_segments(dense)))(*arrays, *ids))
    assert not collectives


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_each_device_mixes_the_branches_of_nsa_for_its_own_part(kind):
    mesh, case = mesh_of(kind), case_of("causal")
    sizes = {"compression_size": 4, "compression_stride": 2, "block_size": 4, "top_k": 4, "window": 5}
    gates = jax.random.uniform(jax.random.key(0), (*case.query.shape[:3], 3))

    def loss(attend, query, key, value, gates):
        compressed = [in_compression_blocks(x, 4, 2).mean(axis=2) for x in (key, value)]
        return (attend(query, compressed, (key, value), (key, value), gates, **sizes) ** 2).sum()

    arrays = case.query, case.key, case.value, gates
    gradients_of = lambda attend: jax.grad(partial(loss, attend), (0, 1, 2, 3))
    attend = partial(scfa_jax.nsa_attention, implementation=IMPLEMENTATION)
    got, _ = run(mesh, gradients_of(attend), *(sharded(mesh, x) for x in arrays))
    assert_close(got, jax.jit(gradients_of(reference.nsa_attention))(*arrays))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_each_device_hashes_its_own_part(kind):
    """By rotations that every device has, too."""
    mesh, x = mesh_of(kind), case_of("hash").query
    rotations = scfa_jax.random_rotations(jax.random.key(0), SHAPE.heads, SHAPE.head_dim, num_buckets=4)
    got, collectives = run(mesh, scfa_jax.lsh_hash, sharded(mesh, x), sharded(mesh, rotations, P()))
    np.testing.assert_array_equal(got, scfa_jax.lsh_hash(x, rotations))
    assert not collectives


@pytest.mark.parametrize(("kind", "num_sinks"), [(AxisType.Auto, 2), (AxisType.Explicit, 0)])
def test_windows_of_each_head_on_parts(kind, num_sinks):
    """In segments, with sinks and without."""
    mesh, case = mesh_of(kind), segmented(case_of("causal"))
    arrays, windows = (case.query, case.key, case.value), jnp.arange(3, 3 + SHAPE.heads, dtype=jnp.int32)
    ids = [case.options[f"{side}_segment_ids"] for side in ("query", "key")]
    windowed = with_segments(partial(scfa_jax.window_attention, num_sinks=num_sinks, **HOW))
    given = *(sharded(mesh, x) for x in arrays), *(sharded(mesh, x, P("data")) for x in ids)
    got, collectives = run(mesh, windowed, *given, sharded(mesh, windows, P("model")))

    position, of_key = np.arange(SHAPE.query_length), np.asarray(ids[1])
    is_earlier = (of_key[:, :, None] == of_key[:, None]) & (position < position[:, None])
    is_sink = np.sum(is_earlier, axis=-1) < num_sinks  # the first of its segment
    is_near = position[:, None] - position < np.asarray(windows)[:, None, None]
    mask = np.asarray(case.mask) & (is_near | is_sink[:, None, None])
    assert_close(got, jax.jit(reference.attention)(*arrays, mask)[0])
    assert not collectives


def test_unions_on_parts():
    """A window, global tokens and random blocks of each head, on explicit axes, where types must fit each other."""
    mesh, case = mesh_of(AxisType.Explicit), case_of("causal")
    arrays, length = (case.query, case.key, case.value), SHAPE.query_length
    numbers = {"num_global": 2, "num_random": 1, "block_size": 4, "num_heads": SHAPE.heads}
    indices = partial(patterns.bigbird_index, length, length, 5, jax.random.key(0), **numbers)
    attend = lambda *arrays: scfa_jax.sparse_attention(*arrays, indices(), implementation=IMPLEMENTATION)
    got, collectives = run(mesh, gradients(attend), *(sharded(mesh, x) for x in arrays))
    mask = index.mask(jax.jit(indices)())
    want = jax.jit(gradients(lambda *arrays: reference.attention(*arrays, mask)[0]))(*arrays)
    assert_close(got, want)
    assert not collectives


@pytest.mark.skipif(HAS_GPU, reason="for the interpreter")
def test_kernels_run_on_each_devices_part():
    mesh, case = mesh_of(AxisType.Auto), case_of("hash")
    arguments = (sharded(mesh, x) for x in (case.query, case.key, case.value, *case.pattern))
    got, collectives = run(mesh, gradients(attention_of(case, "triton_interpret")), *arguments)
    assert_close(got, dense(case))
    assert not collectives


def test_several_rounds_on_parts():
    mesh, case = mesh_of(AxisType.Auto), case_of("hash")
    rounds = [jnp.stack([x, (3 * x) % 4 // 2]) for x in case.pattern]
    on_rounds = P(None, *ON_HEADS)
    arguments = [sharded(mesh, x) for x in (case.query, case.key, case.value)]
    attend = partial(scfa_jax.hash_sparse_attention, implementation=IMPLEMENTATION)
    got, collectives = run(mesh, attend, *arguments, *(sharded(mesh, x, on_rounds) for x in rounds))
    want = jax.jit(case.dense)(case.query, case.key, case.value, *rounds)
    assert_close(got, want)
    assert not collectives


def moved_centroids(query, key, value, scores):
    centroids = random_centroids(jax.random.key(0), 2, 16, 4)
    return update_centroids(centroids, member_sums(key, scfa_jax.kmeans_hash(key, centroids), 4), 0.9)


def test_keys_are_chosen_on_parts():
    """By centroids, whose sums go over the batch; SparseK's selection is in test_sparsek."""
    mesh, case = mesh_of(AxisType.Auto, (2, SIZES[0])), case_of("causal", Shape(2, 29, 29, 4, 2, 16))
    arrays = case.query, case.key, case.value, jax.random.normal(jax.random.key(0), (2, 29, 2))
    got, collectives = run(mesh, moved_centroids, *(sharded(mesh, x) for x in arrays))
    assert_close(got, jax.jit(moved_centroids)(*arrays))
    assert {name for name, _ in collectives} == {"all-reduce"}


def test_one_index_for_all_heads_and_batch_elements():
    mesh, case = mesh_of(AxisType.Auto), case_of("hash")
    query_hash, key_hash = (x[:1, :, :1] for x in case.pattern)

    def attend(query, key, value):
        index = scfa_jax.hash_index(query_hash, key_hash, implementation=IMPLEMENTATION)
        return scfa_jax.sparse_attention(query, key, value, index, implementation=IMPLEMENTATION)

    got, collectives = run(mesh, attend, *(sharded(mesh, x) for x in (case.query, case.key, case.value)))
    want = jax.jit(case.dense)(case.query, case.key, case.value, query_hash, key_hash)
    assert_close(got, want)
    assert not collectives


def test_a_shared_key_head_gets_the_sum_of_its_gradients():
    """One key head on all devices: the forward pass needs nothing, the backward pass one sum each for dk and dv."""
    mesh, case = mesh_of(AxisType.Auto), case_of("hash", Shape(2, 40, 40, 4, 1, 16))
    arguments = [sharded(mesh, x) for x in (case.query, case.key, case.value, *case.pattern)]
    attend = attention_of(case)
    _, collectives = run(mesh, attend, *arguments)
    assert not collectives
    got, collectives = run(mesh, gradients(attend), *arguments)
    assert_close(got, dense(case))
    assert {name for name, _ in collectives} == {"all-reduce"}


@pytest.mark.parametrize("spec", [P(None, "model"), P(None, None, None, "model"), P("model", None, "data")], ids=str)
def test_what_cannot_be_split_comes_together(spec):
    """A sharded sequence or feature axis is gathered; 4 devices do not divide 2 batch elements."""
    mesh, case = mesh_of(AxisType.Auto), case_of("hash")
    if spec[0] == "model":
        case = case_of("hash", Shape(4, 40, 40, 6, 2, 16))
    arguments = [sharded(mesh, x, spec) for x in (case.query, case.key, case.value)]
    got, _ = run(mesh, attention_of(case), *arguments, *case.pattern)
    assert_close(got, dense(case)[1])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_grad_of_vmap_on_parts(kind):
    mesh, case = mesh_of(kind), case_of("hash")
    stacked = jnp.stack([case.query, 2 * case.query])
    mapped = jax.vmap(attention_of(case), (0, None, None, None, None))
    arguments = [sharded(mesh, x) for x in (case.key, case.value, *case.pattern)]
    got, collectives = run(mesh, gradients(mapped), sharded(mesh, stacked, P(None, *ON_HEADS)), *arguments)
    attend = lambda *qkv: reference.attention(*qkv, case.mask)[0]
    want = jax.jit(gradients(jax.vmap(attend, (0, None, None))))(stacked, case.key, case.value)
    assert_close(got, want)
    assert not collectives


@pytest.mark.parametrize("axes", [{"data", "model"}, {"data"}], ids=["wholly", "partly"])
def test_inside_shard_map_with_its_default_checks(axes):
    """Keys that all devices share are cast to vary, and their gradients add up."""
    mesh, case = (
        mesh_of(AxisType.Auto, SIZES if len(axes) == 2 else (2, 1)),
        case_of("hash", Shape(2, 40, 40, 4, 4, 16)),
    )
    key, value = case.key[:1], case.value[:1]
    spec = P("data", None, "model" if "model" in axes else None)
    on_key = P(None, *spec[1:])
    attend = attention_of(case)
    repeated = lambda q, k, v, *pattern: attend(q, *(jnp.broadcast_to(x, q.shape) for x in (k, v)), *pattern)
    mapped = jax.shard_map(
        repeated, mesh=mesh, in_specs=(spec, on_key, on_key, spec, spec), out_specs=spec, axis_names=axes
    )
    got = jax.jit(gradients(mapped))(case.query, key, value, *case.pattern)
    dense = lambda q, k, v: reference.attention(q, *(jnp.broadcast_to(x, q.shape) for x in (k, v)), case.mask)[0]
    assert_close(got, jax.jit(gradients(dense))(case.query, key, value))


def test_a_sharded_sequence_exchanged_for_heads():
    """The helper's example: forward and backward, between the sequence and the heads."""
    mesh, case = mesh_of(AxisType.Auto), case_of("hash", Shape(2, 40, 40, 8, 4, 16))
    spec = P("data", "model")

    def attend(*arrays):
        return to_sequence(attention_of(case)(*(to_heads(x, "model") for x in arrays)), "model")

    mapped = jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec)
    arguments = [sharded(mesh, x, spec) for x in (case.query, case.key, case.value, *case.pattern)]
    got, collectives = run(mesh, gradients(mapped), *arguments)
    assert_close(got, dense(case))
    assert {name for name, _ in collectives} == {"all-to-all"}


def test_the_helper_says_which_numbers_of_heads_will_do():
    mesh = mesh_of(AxisType.Auto)
    exchange = jax.shard_map(partial(to_heads, axis_name="model"), mesh=mesh, in_specs=P(), out_specs=P())
    message = rf"multiple of the {SIZES[1]} devices along 'model', got shape \(2, 8, 3, 16\)"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(exchange, jnp.zeros((2, 8, 3, 16)))
