"""Random cases of every operator and transformation, drawn as the soak run draws them."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import HAS_GPU
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import scfa_jax
from scfa_jax import index, reference
from tools import fuzz, fuzz_program, soak

# One shape, so that the dense reference is compiled twice at most; the soak run draws from more.
SPACE = fuzz.Space(
    implementations=("default",) if HAS_GPU else ("xla", "triton_interpret", "xla"),
    dtypes=fuzz.DTYPES if HAS_GPU else ("float32",),
    lengths=((24, 24),),
    heads=((4, 2),),
    head_dims=((16, 24),),
    devices=len(jax.devices()),
)
CASES = 4
SEED = 3830  # a list of indices in `shard_map`, decoding on a mesh, and gradients of blocks by the interpreted kernels


@pytest.mark.parametrize(
    "signature",
    fuzz.draw_signatures(60 if HAS_GPU else 4, SEED, SPACE),
    ids=lambda s: f"{s.operator}-{s.transform}-{s.implementation}",
)
def test_random_cases_are_as_exact_as_plain_attention(signature):
    run = fuzz_program.program(signature)
    for number in range(CASES):
        problems = soak.run_case(signature, number, run, twice=number == 0)
        assert not problems, f"{problems}, repeat by\n{soak.line_for(signature, number)}"


def test_signatures_cover_everything_and_are_read_back():
    space = fuzz.Space(implementations=("xla", "triton"), lengths=fuzz.LONG, tiles=("small", "default"), devices=4)
    signatures = fuzz.draw_signatures(60, 0, space)
    assert len(set(signatures)) == 60
    for name, values in (
        ("operator", fuzz.OPERATORS),
        ("transform", fuzz.TRANSFORMS),
        ("dtype", fuzz.DTYPES),
        ("offset", fuzz.OFFSETS),
        ("segments", (False, True)),
        ("window", (False, True)),
        ("broadcast", (False, True)),
        ("capped", (False, True)),
        ("sinks", (False, True)),
        ("exclude_self", (False, True)),
        ("tiles", ("small", "default")),
        ("implementation", ("xla", "triton")),
    ):
        assert {getattr(signature, name) for signature in signatures} == set(values), name
    assert {signature.shape[1:3] for signature in signatures} >= set(fuzz.LONG)
    assert any(signature.shape[-1] != signature.shape[-2] for signature in signatures)
    assert [fuzz.parse(str(signature)) for signature in signatures] == signatures
    for text, message in (
        ("operator=hash", "shape="),
        ("operator=hash,shape=1x1x1x1x1x16", "shape="),
        ("operator=hash,shape=1x1x1x1x1x16x16,colour=red", "colour"),
        ("operator=cube,shape=1x1x1x1x1x16x16", "cube"),
    ):
        with pytest.raises(ValueError, match=message):
            fuzz.parse(text)


OF_INDICES = ("index", "indices", "longformer", "strided", "fixed", "local_hash", "blocks")


@pytest.mark.parametrize("operator", [name for name in fuzz.OPERATORS if name not in (*OF_INDICES, "moba", "decode")])
def test_masks_are_those_of_the_reference(operator):
    """The generator works out by itself what may be attended to. The value of key s points in direction s."""
    segments = operator in ("causal", "range", "window")
    offset = "each" if operator in ("hash", "keep") else "none"
    window = operator in ("causal", "hash", "window")
    signature = fuzz.Signature(
        operator, (2, 9, 12, 4, 2, 1, 1), offset=offset, segments=segments, window=window, exclude_self=True
    )
    if operator == "shared_hash":
        signature = dataclasses.replace(signature, shape=(2, 9, 9, 4, 4, 1, 1))
    pattern = fuzz.draw_case(signature, 7).pattern
    shared = {
        name: pattern[name] for name in pattern if name.endswith("segment_ids") or name in ("query_offset", "window")
    }
    rows = tuple(pattern[name] for name in pattern if name not in shared and name != "is_first")
    name = {"causal": "causal", "range": "range", "window": "window", "keep": "qk_sparse", "merged": "qk_sparse"}.get(
        operator, "hash_sparse"
    )
    static = {"exclude_self": True} if name == "hash_sparse" else {}
    if operator == "window":
        static["num_sinks"] = fuzz.NUM_SINKS
    if operator != "range":
        shared.setdefault("query_offset", np.int32(signature.static_offset))
    batch, query_length, key_length, heads, key_heads, *_ = signature.shape
    query = np.zeros((batch, query_length, heads, key_length), np.float32)
    key = np.zeros((batch, key_length, key_heads, key_length), np.float32)
    value = np.broadcast_to(np.eye(key_length, dtype=np.float32)[None, :, None], key.shape)
    attend = getattr(reference, f"{name}_attention")
    output = jax.jit(lambda *arrays: attend(*arrays, *rows, **shared, **static))(query, key, value)
    np.testing.assert_array_equal(np.asarray(output) > 0, fuzz.dense_mask(signature, pattern).swapaxes(1, 2))


@pytest.mark.parametrize("operator", OF_INDICES)
def test_masks_are_those_of_the_indices_which_are_disjoint(operator):
    window = operator in (*fuzz.WINDOWS, "longformer")
    options = {"offset": "each", "segments": True, "window": window, "exclude_self": True}
    signature = fuzz.Signature(operator, (2, 9, 12, 4, 2, 16, 16), **options)

    @jax.jit
    def said_by_the_library(pattern):
        indices = fuzz_program.indices(signature, pattern)
        return index.mask(indices), index.is_disjoint(indices)

    for number in range(4):
        pattern = fuzz.draw_case(signature, number).pattern
        mask, is_disjoint = said_by_the_library(pattern)
        assert is_disjoint
        np.testing.assert_array_equal(np.broadcast_to(mask, (2, 4, 9, 12)), fuzz.dense_mask(signature, pattern))


def test_masks_of_moba_are_those_of_the_reference():
    """Of blocks that queries choose by keys, whose scores are often equal."""
    signature = fuzz.Signature("moba", (2, 60, 80, 4, 2, 4, 4), offset="each")
    sizes = {"block_size": fuzz.BLOCK_SIZES["moba"], "top_k": 1 + fuzz.NUM_CHOSEN, "num_local": fuzz.NUM_LOCAL}
    shared = {"share_in_group": False, "query_segment_ids": None, "key_segment_ids": None}
    for number in range(6):
        case = fuzz.draw_case(signature, number)
        offset = np.clip(case.pattern["query_offset"], 1 - 2**30, 2**30 - 1)
        mask = reference.moba_mask(*case.arrays[:2], **sizes, **shared, query_offset=offset)
        np.testing.assert_array_equal(np.broadcast_to(mask, case.mask.shape), case.mask)


def test_cases_plant_junk_in_rows_that_take_no_part_and_nowhere_else():
    seen = set()
    for number in range(12):
        case = fuzz.draw_case(fuzz.Signature("keep", (2, 9, 12, 4, 2, 4, 6), segments=True), number)
        for name, clean, planted in zip("qkvdl", case.arrays, case.with_junk(), strict=True):
            has_part = case.mask.any(3).swapaxes(1, 2)  # [B, T, N]
            if name in "kv":
                has_part = case.mask.any(2).reshape(2, 2, 2, 12).any(2).swapaxes(1, 2)
            np.testing.assert_array_equal(planted[has_part], clean[has_part])
            if case.junk is not None and not has_part.all():
                assert not np.isfinite(planted[~has_part]).any()
                seen.add(name)
    assert seen == set("qkvdl")


@pytest.mark.skipif(jax.device_count() < 2, reason="needs 2 devices, such as those that a CPU can simulate")
def test_segments_for_all_of_the_batch_and_offsets_for_each_of_it_on_an_explicit_mesh():
    """What fuzzing found: `where` refuses a mask that is not sharded as the values are."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    offset = jax.device_put(np.array([0, 3], np.int32), NamedSharding(mesh, PartitionSpec("data")))
    ids = np.array([[0, 0, 1, 1, -1]], np.int32)
    index = lambda offset: scfa_jax.causal_index(5, 5, query_offset=offset, query_segment_ids=ids, key_segment_ids=ids)
    with jax.set_mesh(mesh):
        assert jax.eval_shape(index, offset).high.shape == (2, 1, 5)


@pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices, such as those that a CPU can simulate")
@pytest.mark.parametrize(
    ("operator", "key_length", "options"),
    [
        ("causal", 24, {"transform": "shard_map", "mesh": (2, 2), "sinks": True}),
        ("longformer", 24, {"transform": "explicit_mesh", "mesh": (2, 2), "window": True}),
        ("causal", 24, {"transform": "explicit_mesh", "mesh": (2, 2), "implementation": "triton_interpret"}),
        ("causal", 0, {"segments": True}),
    ],
    ids=[
        "sinks in shard_map",
        "a list of indices on an explicit mesh",
        "the interpreter on an explicit mesh",
        "segments without keys",
    ],
)
def test_what_fuzzing_found(operator, key_length, options):
    signature = fuzz.Signature(operator, (2, 24, key_length, 4, 2, 16, 24), **options)
    assert not soak.run_case(signature, 0, fuzz_program.program(signature))
