"""Random cases of every operator and transformation, drawn as the soak run draws them."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import HAS_GPU
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import scfa_jax
from benchmarks import fuzz, fuzz_program, soak
from scfa_jax import reference

# One shape, so that the dense reference is compiled twice at most; the soak run draws from more.
SPACE = fuzz.Space(
    implementations=("default",) if HAS_GPU else ("xla", "triton_interpret", "xla"),
    dtypes=fuzz.DTYPES if HAS_GPU else ("float32",),
    lengths=((24, 24),),
    heads=((4, 2),),
    head_dims=(16,),
    devices=len(jax.devices()),
)
CASES = 4
SEED = 50747  # a union and decoding on meshes, `shard_map`, and gradients of a kernel in the interpreter


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
        ("exclude_self", (False, True)),
        ("tiles", ("small", "default")),
        ("implementation", ("xla", "triton")),
    ):
        assert {getattr(signature, name) for signature in signatures} == set(values), name
    assert {signature.shape[1:3] for signature in signatures} >= set(fuzz.LONG)
    assert [fuzz.parse(str(signature)) for signature in signatures] == signatures
    for text, message in (
        ("operator=hash", "shape="),
        ("operator=hash,shape=1x1x1x1x1x16,colour=red", "colour"),
        ("operator=cube,shape=1x1x1x1x1x16", "cube"),
    ):
        with pytest.raises(ValueError, match=message):
            fuzz.parse(text)


@pytest.mark.parametrize("operator", [name for name in fuzz.OPERATORS if name not in ("index", "decode", "union")])
def test_masks_are_those_of_the_reference(operator):
    """The generator works out by itself what may be attended to. The value of key s points in direction s."""
    segments = operator in ("causal", "range", "window")
    offset = "each" if operator in ("hash", "keep") else "none"
    window = operator in ("causal", "hash", "window")
    signature = fuzz.Signature(
        operator, (2, 9, 12, 4, 2, 1), offset=offset, segments=segments, window=window, exclude_self=True
    )
    if operator == "shared_hash":
        signature = dataclasses.replace(signature, shape=(2, 9, 9, 4, 4, 1))
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
    batch, query_length, key_length, heads, key_heads, _ = signature.shape
    query = np.zeros((batch, query_length, heads, key_length), np.float32)
    key = np.zeros((batch, key_length, key_heads, key_length), np.float32)
    value = np.broadcast_to(np.eye(key_length, dtype=np.float32)[None, :, None], key.shape)
    attend = getattr(reference, f"{name}_attention")
    output = jax.jit(lambda *arrays: attend(*arrays, *rows, **shared, **static))(query, key, value)
    np.testing.assert_array_equal(np.asarray(output) > 0, fuzz.dense_mask(signature, pattern).swapaxes(1, 2))


def test_cases_plant_junk_in_rows_that_take_no_part_and_nowhere_else():
    seen = set()
    for number in range(12):
        case = fuzz.draw_case(fuzz.Signature("keep", (2, 9, 12, 4, 2, 4), segments=True), number)
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
