"""Attention problems of every pattern, drawn at random: their inputs, their dense mask, how to call them."""

from dataclasses import dataclass, field, replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from tolerance import results_and_gradients

import scfa_jax
from scfa_jax import BlockSizes, TileShape, reference

# Small and unequal, so that short sequences have several tiles and each kernel its own shape.
SMALL_BLOCKS = BlockSizes(TileShape(16, 32), TileShape(32, 16), TileShape(16, 16))


@dataclass(frozen=True)
class Case:
    """One problem.

    Attributes:
        query, key, value: The inputs.
        mask: bool `[B or 1, N or 1, T, S]`, from the reference.
        operator: The operator to call with query, key and value.
        dense: The operator of `scfa_jax.reference` that defines it.
        pattern: Further positional arguments: hashes, masks or ranges.
        options: Keyword arguments of both.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    mask: jax.Array
    operator: object
    dense: object
    pattern: tuple = ()
    options: dict = field(default_factory=dict)

    def attend(self, query, key, value, **more):
        """Calls the operator, with the residual."""
        return self.operator(query, key, value, *self.pattern, **self.options, return_residual=True, **more)

    def compiled(self, **more):
        """The operator's results and gradients, compiled once for all cases of these static options.

        Returns:
            A function of query, key, value and the cotangents of output and log-sum-exp.
        """
        static = {k: v for k, v in {**self.options, **more}.items() if not isinstance(v, jax.Array)}
        data = {k: v for k, v in self.options.items() if isinstance(v, jax.Array)}
        function = _compiled(self.operator, tuple(sorted(static.items(), key=lambda item: item[0])))
        return lambda *arrays: function(self.pattern, data, *arrays)

    def defined(self, **more):
        """As `compiled`, by the reference."""
        return replace(self, operator=self.dense).compiled(**more)


@dataclass(frozen=True)
class Shape:
    """Axis lengths of a problem."""

    batch: int = 2
    query_length: int = 64
    key_length: int = 64
    heads: int = 2
    key_heads: int = 2
    head_dim: int = 16

    @property
    def query(self):
        return (self.batch, self.query_length, self.heads, self.head_dim)

    @property
    def key(self):
        return (self.batch, self.key_length, self.key_heads, self.head_dim)


@cache
def _compiled(operator, static):
    def results(pattern, data, *arrays):
        def attend(*qkv):
            output, logsumexp = operator(*qkv, *pattern, **data, **dict(static), return_residual=True)
            assert output.dtype == dict(static).get("output_dtype", qkv[0].dtype)
            return output, logsumexp

        return results_and_gradients(attend, *arrays)

    return jax.jit(results)


# Masks in one program each: as so many steps they would be as many programs for each shape.
causal_mask = jax.jit(reference.causal_mask, static_argnums=(0, 1))
hash_mask = jax.jit(reference.hash_mask, static_argnames="exclude_self")
keep_mask = jax.jit(reference.keep_mask)
range_mask = jax.jit(reference.range_mask, static_argnums=2)
segment_mask = jax.jit(reference.segment_mask)

PATTERNS = ("causal", "hash", "shared_hash", "keep", "range", "blocks")

# Few enough that compiled code is met again, odd enough that no length is a multiple of anything.
SHAPES = (
    Shape(1, 64, 64, 2, 2, 16),
    Shape(2, 50, 77, 4, 2, 24),
    Shape(1, 90, 33, 2, 1, 32),
    Shape(2, 33, 33, 3, 3, 16),
    Shape(1, 1, 1, 1, 1, 16),
)


def arrays(rng: np.random.Generator, shape: Shape, dtype, spread: float = 1.0):
    """Query, key and value with normal entries of a standard deviation of `spread`."""
    normal = lambda size: (rng.normal(size=size) * spread).astype(np.float32)
    return tuple(jnp.asarray(normal(size).astype(dtype)) for size in (shape.query, shape.key, shape.key))


def bucket_ids(rng: np.random.Generator, size, kind: str):
    """Bucket ids with the skew that `kind` names."""
    if kind == "one":
        return np.full(size, 3, np.int32)
    if kind == "distinct":
        return rng.permuted(np.broadcast_to(np.arange(size[1], dtype=np.int32)[:, None], size), axis=1)
    if kind == "zipf":
        return np.minimum(rng.zipf(1.5, size), 8).astype(np.int32)
    if kind == "huge":
        return rng.choice(np.array([-(2**31), -1, 0, 2**31 - 1, 2**31 - 2], np.int32), size)
    return rng.integers(0, int(kind), size, dtype=np.int32)


def hash_case(rng, shape, dtype, *, kind="4", exclude_self=False, promise=None, shared=False, offset=0):
    query, key, value = arrays(rng, shape, dtype)
    query_hash = jnp.asarray(bucket_ids(rng, shape.query[:3], kind))
    key_hash = query_hash if shared else jnp.asarray(bucket_ids(rng, shape.key[:3], kind))
    options = {"exclude_self": exclude_self, "query_offset": offset}
    mask = hash_mask(query_hash, key_hash, **options)
    if promise is not None:
        options["num_buckets"] = promise
    pattern = (query_hash,) if shared else (query_hash, key_hash)
    return Case(
        query,
        key,
        value,
        mask,
        scfa_jax.hash_sparse_attention,
        reference.hash_sparse_attention,
        pattern,
        options,
    )


def keep_case(rng, shape, dtype, *, query_density=0.5, key_density=0.5, offset=0):
    query, key, value = arrays(rng, shape, dtype)
    query_keep = jnp.asarray(rng.random(shape.query[:3]) < query_density)
    key_keep = jnp.asarray(rng.random(shape.key[:3]) < key_density)
    return Case(
        query,
        key,
        value,
        keep_mask(query_keep, key_keep, query_offset=offset),
        scfa_jax.qk_sparse_attention,
        reference.qk_sparse_attention,
        (query_keep, key_keep),
        {"query_offset": offset},
    )


def range_case(rng, shape, dtype, *, longest=1.0):
    """Ranges that start anywhere (out of bounds too), overlap, go backwards or are empty."""
    query, key, value = arrays(rng, shape, dtype)
    length = shape.key_length
    start = rng.integers(-3, length + 3, shape.query[:3], dtype=np.int32)
    stop = start + rng.integers(-4, int(longest * length) + 1, shape.query[:3], dtype=np.int32)
    start, stop = jnp.asarray(start), jnp.asarray(stop)
    return Case(
        query,
        key,
        value,
        range_mask(start, stop, length),
        scfa_jax.range_attention,
        reference.range_attention,
        (start, stop),
    )


def causal_case(rng, shape, dtype, *, offset=0):
    query, key, value = arrays(rng, shape, dtype)
    mask = causal_mask(shape.query_length, shape.key_length, offset)
    return Case(
        query,
        key,
        value,
        mask,
        scfa_jax.causal_attention,
        reference.causal_attention,
        (),
        {"query_offset": offset},
    )


def blocks_mask(blocks, query_length, key_length, *, block_size, num_local, query_offset=0):
    """What `block_index` says in words, written down: bool `[B, N, T, S]`; of arrays of numpy or JAX."""
    key = np.arange(key_length, dtype=np.int32)
    position = query_offset + np.arange(query_length, dtype=np.int32)[:, None]
    number, own = key // block_size, position // block_size
    is_chosen = (blocks.swapaxes(1, 2)[..., None] == number).any(-2)
    is_local = (number <= own) & (number > own - num_local)
    return (is_chosen | is_local) & (key <= position)


def of_each(query_offset):
    """An offset as numpy `[B or 1, 1, 1, 1]`, clipped as an index clips it."""
    return np.clip(np.asarray(query_offset, np.int32), 1 - 2**30, 2**30 - 1).reshape(-1, 1, 1, 1)


def blocks_attention(query, key, value, blocks, *, block_size, num_local, **options):
    """`sparse_attention` over a `block_index`, as an operator."""
    of_index = {name: options.pop(name) for name in (*POSITIONS, "implementation") if name in options}
    lengths = {"query_length": query.shape[-3], "key_length": key.shape[-3]}
    index = scfa_jax.block_index(blocks, block_size, num_local=num_local, **lengths, **of_index)
    return scfa_jax.sparse_attention(query, key, value, index, implementation=of_index.get("implementation"), **options)


def dense_blocks_attention(query, key, value, blocks, *, block_size, num_local, query_offset=0, **options):
    """The same by its mask, and by that of its segments."""
    lengths, offset = (query.shape[1], key.shape[1]), jnp.reshape(jnp.asarray(query_offset, jnp.int32), (-1, 1, 1, 1))
    mask = blocks_mask(blocks, *lengths, block_size=block_size, num_local=num_local, query_offset=offset)
    ids = [options.pop(f"{side}_segment_ids", None) for side in ("query", "key")]
    if ids[0] is not None:
        mask = mask & segment_mask(ids[0], ids[0] if ids[1] is None else ids[1])
    with_residual = options.pop("return_residual", False)
    results = reference.attention(query, key, value, mask, **options)
    return results if with_residual else results[0]


POSITIONS = ("query_offset", "query_segment_ids", "key_segment_ids")
CHOICES = ("any", "one", "none", "twice", "late", "extreme")


def chosen_blocks(rng: np.random.Generator, size, kind: str, num_blocks: int):
    """Numbers of blocks `[B, T, N, k]`, some of which name none, or a block behind the query's own."""
    if kind == "none":
        return np.full(size, -1, np.int32)
    if kind == "one":
        return np.full(size, num_blocks // 3, np.int32)
    if kind == "extreme":
        return rng.choice(np.array([-(2**31), -1, 0, 1, num_blocks, 2**31 - 1], np.int32), size)
    if kind == "late":  # the last two, which most queries may not see, and what is behind them
        return rng.integers(num_blocks - 2, num_blocks + 2, size, dtype=np.int32)
    # "twice": of so few that most are named again.
    return rng.integers(-1, 3 if kind == "twice" else num_blocks + 1, size, dtype=np.int32)


def blocks_case(rng, shape, dtype, *, kind="any", block_size=7, num_local=1, k=3, heads=None, offset=0):
    query, key, value = arrays(rng, shape, dtype)
    size = shape.batch, shape.query_length, heads or shape.heads, k
    blocks = chosen_blocks(rng, size, kind, -(-shape.key_length // block_size))
    options = {"block_size": block_size, "num_local": num_local}
    mask = blocks_mask(blocks, shape.query_length, shape.key_length, **options, query_offset=of_each(offset))
    mask = jnp.asarray(np.repeat(mask, shape.heads // mask.shape[1], axis=1))
    options |= {"query_offset": offset}
    return Case(query, key, value, mask, blocks_attention, dense_blocks_attention, (jnp.asarray(blocks),), options)


def make_case(pattern: str, rng, shape: Shape, dtype, **options) -> Case:
    """A case of the named pattern; options are those of its maker."""
    if pattern == "shared_hash":
        shape = Shape(shape.batch, shape.query_length, shape.query_length, shape.heads, shape.heads, shape.head_dim)
    makers = {
        "causal": causal_case,
        "hash": hash_case,
        "shared_hash": partial(hash_case, shared=True),
        "keep": keep_case,
        "range": range_case,
        "blocks": blocks_case,
    }
    return makers[pattern](rng, shape, dtype, **options)


@dataclass(frozen=True)
class Signature:
    """What decides a compilation. Few of these, so that many values run through each compiled function."""

    shape: Shape
    dtype: type
    exclude_self: bool
    promise: bool
    offset_per_batch: bool


SIGNATURES = (
    Signature(SHAPES[0], jnp.float32, False, False, False),
    Signature(SHAPES[1], jnp.bfloat16, True, False, True),
    Signature(SHAPES[2], jnp.float16, False, True, False),
    Signature(SHAPES[3], jnp.float32, True, True, True),
    Signature(SHAPES[4], jnp.bfloat16, True, False, False),
)
PROMISED_BUCKETS = 128


@st.composite
def drawn_cases(draw, pattern: str):
    """Cases of one pattern over shapes, dtypes, skews, densities and offsets."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    signature = draw(st.sampled_from(SIGNATURES))
    shape = signature.shape
    options = {}
    if pattern != "range":
        offset = draw(st.sampled_from((0, shape.key_length - shape.query_length, 7, -5, 1000)))
        per_batch = jnp.array([offset, *(3,) * (shape.batch - 1)], jnp.int32)
        options["offset"] = per_batch if signature.offset_per_batch else jnp.int32(offset)
    if pattern in ("hash", "shared_hash"):
        kinds = ("one", "2", "4", "16", "distinct", "zipf")
        options["kind"] = draw(st.sampled_from(kinds if signature.promise else (*kinds, "huge")))
        options["exclude_self"] = signature.exclude_self
        options["promise"] = PROMISED_BUCKETS if signature.promise else None
    if pattern == "keep":
        densities = st.sampled_from((0.0, 0.05, 0.3, 0.5, 0.9, 1.0))
        options["query_density"], options["key_density"] = draw(densities), draw(densities)
    if pattern == "range":
        options["longest"] = draw(st.sampled_from((0.0, 0.1, 0.5, 1.0)))
    if pattern == "blocks":
        options["kind"] = draw(st.sampled_from(CHOICES))
        options["num_local"] = 2 if signature.exclude_self else 1
        options["block_size"] = 16 if signature.promise else 7
    return make_case(pattern, rng, shape, signature.dtype, **options)


# What every machine computes: few compiled functions, each with what goes wrong most easily. Of each pattern one shape
# in float32, where two heads share a key head and errors of 1e-6 show, and another one in 16 bits.
CHOSEN = {
    ("causal", jnp.float32): (SHAPES[1], [{"offset": (27, 3)}, {"offset": (-5, 30)}]),
    ("causal", jnp.bfloat16): (SHAPES[2], [{"offset": 7}, {"offset": 1000}]),
    ("hash", jnp.float32): (
        SHAPES[1],
        [{"kind": kind, "exclude_self": True, "offset": (27, 3)} for kind in ("zipf", "huge", "16")],
    ),
    ("hash", jnp.float16): (
        SHAPES[2],
        [{"kind": kind, "exclude_self": True, "offset": 7, "promise": PROMISED_BUCKETS} for kind in ("4", "distinct")],
    ),
    ("shared_hash", jnp.float32): (
        SHAPES[1],
        [{"kind": kind, "exclude_self": True, "offset": (0, 3)} for kind in ("huge", "zipf", "distinct")],
    ),
    ("shared_hash", jnp.bfloat16): (
        SHAPES[3],
        [{"kind": kind, "promise": PROMISED_BUCKETS} for kind in ("16", "one")],
    ),
    ("keep", jnp.float32): (
        SHAPES[1],
        [
            {"query_density": 0.9, "key_density": 0.5, "offset": (27, 3)},
            {"query_density": 0.3, "key_density": 1.0, "offset": (7, 1000)},
        ],
    ),
    ("keep", jnp.float16): (
        SHAPES[2],
        [
            {"query_density": 0.5, "key_density": 0.9, "offset": -5},
            {"query_density": 1.0, "key_density": 0.05, "offset": 0},
        ],
    ),
    ("range", jnp.float32): (SHAPES[1], [{"longest": 1.0}, {"longest": 0.3}]),
    ("range", jnp.bfloat16): (SHAPES[2], [{"longest": 1.0}, {"longest": 0.1}]),
    ("blocks", jnp.float32): (
        SHAPES[1],
        [{"kind": kind, "num_local": 2, "offset": (27, 3)} for kind in ("any", "one", "twice", "extreme")],
    ),
    ("blocks", jnp.bfloat16): (
        SHAPES[2],
        [{"kind": kind, "block_size": 16, "offset": 0} for kind in ("any", "late", "none")],
    ),
}


def chosen_case(pattern: str, dtype, seed: int, choice: dict) -> Case:
    """A case with the shape of those in `CHOSEN`, and with their compiled function if the same options are given."""
    if "offset" in choice:
        choice = {**choice, "offset": jnp.array(choice["offset"], jnp.int32)}
    return make_case(pattern, np.random.default_rng(seed), CHOSEN[pattern, dtype][0], dtype, **choice)


def chosen_cases(pattern: str, dtype) -> list[Case]:
    """The cases of `CHOSEN`, which share a compiled function."""
    return [chosen_case(pattern, dtype, seed, choice) for seed, choice in enumerate(CHOSEN[pattern, dtype][1])]


SEGMENT_KINDS = ("one", "runs", "padded", "scattered", "huge", "padding")


def segment_ids(rng: np.random.Generator, size: tuple[int, int], kind: str):
    """Segment ids `[B, L]` of the kind that is named; a batch of 1 is shared by all."""
    if kind == "one":
        return np.full(size, 3, np.int32)
    if kind == "padding":
        return np.full(size, -1, np.int32)
    if kind == "huge":
        return rng.choice(np.array([-(2**31), -1, 0, 2**31 - 1, 2**31 - 2], np.int32), size)
    if kind == "scattered":
        return rng.integers(-1, 3, size, dtype=np.int32)
    runs = np.cumsum(rng.random(size) < 0.1, axis=1, dtype=np.int32)
    if kind == "padded":
        runs = np.where(np.arange(size[1]) < 0.7 * size[1], runs, -7).astype(np.int32)
    return runs


def in_segments(case: Case, rng: np.random.Generator, kind: str, *, shared: bool = False, batch: int = 0) -> Case:
    """The case within random segments; both sides have the same if `shared`, all batch elements if `batch` is 1."""
    batch = batch or case.query.shape[0]
    query_ids = jnp.asarray(segment_ids(rng, (batch, case.query.shape[1]), kind))
    key_ids = query_ids if shared else jnp.asarray(segment_ids(rng, (batch, case.key.shape[1]), kind))
    ids = {"query_segment_ids": query_ids} | ({} if shared else {"key_segment_ids": key_ids})
    mask = case.mask & segment_mask(query_ids, key_ids)
    return replace(case, mask=mask, options={**case.options, **ids})
