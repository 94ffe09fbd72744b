"""Random cases of every operator, one generator for the tests and for the soak run.

A `Signature` is what decides a compilation: operator, shape, dtype, transformation, mesh. Many cases, drawn by number,
go through each: hashes of any skew, offsets, segments, empty sides, and NaN in rows that take no part. What may be
attended to is worked out here, in plain numpy, and owes nothing to scfa_jax.

To fuzz another operator: its name in `OPERATORS`, what it draws in `_draw_pattern`, its mask in `dense_mask`, its call
in `fuzz_program`.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

OPERATORS = (
    *("causal", "hash", "promised_hash", "shared_hash", "rounds", "keep", "range", "window", "merged"),
    "index",  # `sparse_attention` over an index of a hash
    "indices",  # and over several of all kinds, no two with the same pair
    *("longformer", "strided", "fixed", "local_hash"),  # lists of indices as well, each from one function
    *("blocks", "moba"),  # blocks that queries choose: given, and by the mean of their keys
    "decode",  # one token in hash mode, which reads its bucket of a cache
)
HASHES = ("hash", "promised_hash", "shared_hash", "rounds", "index", "indices", "local_hash", "decode")
WINDOWS = ("causal", "hash", "promised_hash", "shared_hash", "rounds", "keep", "index", "indices")  # where one is drawn
TRANSFORMS = ("grad", "forward", "vmap", "scan", "checkpoint", "shard_map", "auto_mesh", "explicit_mesh")
ON_A_MESH = ("shard_map", "auto_mesh", "explicit_mesh")
DTYPES = ("float32", "bfloat16", "float16")
OFFSETS = ("none", "static", "one", "each")  # 0; an int; one array for all of the batch; one for each of it
PROMISE = 32
NUM_ROUNDS = 2
NUM_SINKS = 3
STRIDE, NUM_SUMMARIES = 7, 2
LOCAL_WINDOW = 5
BLOCK_SIZES = {"blocks": 7, "moba": 8}  # so that the means of MoBA are exact
NUM_CHOSEN, NUM_LOCAL = 3, 2
NOBODY = 2**30  # the bucket of keys that no query hashes to

# T, S; heads, key heads.
SHORT = ((64, 64), (50, 77), (90, 33), (1, 40), (33, 0))
LONG = ((256, 256), (515, 640), (700, 300), (1, 600), (1024, 1024), (130, 0))
HEADS = ((4, 2), (4, 4), (4, 1), (6, 2))
HEAD_DIMS = ((16, 16), (64, 64), (24, 40), (128, 64), (32, 32), (80, 80), (20, 20), (64, 128))  # of keys, of values


@dataclass(frozen=True)
class Signature:
    """What decides a compilation.

    Attributes:
        operator: One of `OPERATORS`.
        shape: `(B, T, S, N, K, H, V)`.
        dtype: One of `DTYPES`.
        transform: One of `TRANSFORMS`.
        mesh: Devices along batch and heads, where the transformation has a mesh.
        implementation: As the operators take it; "default" for None.
        tiles: "small" or "default".
        offset: One of `OFFSETS`.
        segments: Whether there are segment ids.
        window: Whether attention ends so many positions before the query's own; for operators that know windows.
        exclude_self: Whether a query may not attend to its own position; for hashes.
        broadcast: Whether all heads, and all of the batch, share one pattern.
        scaled: Whether the factor of the products is given.
        capped: Whether the logits have a soft cap.
        sinks: Whether each head has a sink logit.
    """

    operator: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    transform: str = "grad"
    mesh: tuple[int, ...] = (1, 1)
    implementation: str = "default"
    tiles: str = "small"
    offset: str = "none"
    segments: bool = False
    window: bool = False
    exclude_self: bool = False
    broadcast: bool = False
    scaled: bool = False
    capped: bool = False
    sinks: bool = False

    def __str__(self) -> str:
        """As `parse` reads it."""
        written = lambda x: "x".join(map(str, x)) if isinstance(x, tuple) else str(x)
        return ",".join(f"{field.name}={written(getattr(self, field.name))}" for field in dataclasses.fields(self))

    @property
    def scale(self) -> float | None:
        """Factor of the products."""
        return 0.3 if self.scaled else None

    @property
    def logits_soft_cap(self) -> float | None:
        """Cap of the logits."""
        return 5.0 if self.capped else None

    @property
    def static_offset(self) -> int:
        """The position of the first query, where it is no data."""
        _, query_length, key_length, *_ = self.shape
        return 0 if self.offset == "none" else (key_length - query_length or 3)


def parse(text: str) -> Signature:
    """Reads what `str(signature)` wrote.

    Raises:
        ValueError: It is no signature.
    """
    fields = {field.name: field for field in dataclasses.fields(Signature)}
    values: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in fields:
            raise ValueError(f"{part!r} is no part of a signature: give name=value of {', '.join(fields)}.")
        kind = str(fields[name].type)
        if kind == "bool":
            values[name] = value == "True"
        else:
            values[name] = tuple(int(x) for x in value.split("x")) if kind.startswith("tuple") else value
    allowed = {"operator": OPERATORS, "dtype": DTYPES, "transform": TRANSFORMS, "offset": OFFSETS}
    for name, choices in allowed.items():
        if values.get(name, choices[0]) not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {values[name]!r}.")
    if "operator" not in values or len(values.get("shape", ())) != 7:
        raise ValueError(f"A signature needs at least operator=... and shape=BxTxSxNxKxHxV, got {text!r}.")
    return Signature(**values)


@dataclass(frozen=True)
class Case:
    """One problem, on the host.

    Attributes:
        arrays: query, key, value and the cotangents of output and log-sum-exp.
        pattern: Hashes, masks, ranges, offsets and segment ids, by the names that the operators give them.
        mask: bool `[B, N, T, S]`, what may be attended to.
        junk: What stands in rows that take no part; None leaves them as they are.
        sink_logits: `[N]`; None for none.
    """

    arrays: tuple[np.ndarray, ...]
    pattern: dict[str, np.ndarray]
    mask: np.ndarray
    junk: float | None
    sink_logits: np.ndarray | None

    def with_junk(self) -> tuple[np.ndarray, ...]:
        """The arrays, with `junk` in the rows that take no part: it must change nothing."""
        if self.junk is None:
            return self.arrays
        query, key, value, *cotangents = (x.copy() for x in self.arrays)
        batch, heads, _, key_length = self.mask.shape
        groups = batch, key.shape[2], heads // key.shape[2], key_length
        reads = np.any(self.mask, axis=3)  # [B, N, T]
        is_read = np.any(np.any(self.mask, axis=2).reshape(groups), axis=2)  # [B, K, S]
        for x in (query, *cotangents):
            x[~np.swapaxes(reads, 1, 2)] = self.junk
        for x in (key, value):
            x[~np.swapaxes(is_read, 1, 2)] = self.junk
        return (query, key, value, *cotangents)


@dataclass(frozen=True)
class Space:
    """What signatures are drawn from, but for the fields that always take all of their values.

    Attributes:
        implementations: As in a signature, and so are `tiles` and `dtypes`.
        tiles: See there.
        dtypes: See there.
        lengths: `(T, S)`.
        heads: `(N, K)`.
        head_dims: `(H, V)`.
        devices: How many there are for a mesh.
    """

    implementations: tuple[str, ...] = ("default",)
    tiles: tuple[str, ...] = ("small",)
    dtypes: tuple[str, ...] = DTYPES
    lengths: tuple[tuple[int, int], ...] = SHORT
    heads: tuple[tuple[int, int], ...] = HEADS
    head_dims: tuple[tuple[int, int], ...] = HEAD_DIMS
    devices: int = 1


def draw_signatures(count: int, seed: int, space: Space) -> list[Signature]:
    """Draws signatures; every operator, transformation, dtype and so on as often as any other.

    Args:
        count: How many.
        seed: Decides all.
        space: What to draw from.
    """
    rng = np.random.default_rng(seed)

    def column(options: Sequence[Any]) -> list[Any]:
        shuffled = rng.permutation(len(options))
        return [options[shuffled[i % len(options)]] for i in rng.permutation(count)]

    columns = {
        "transform": column(TRANSFORMS),
        "dtype": column(space.dtypes),
        "implementation": column(space.implementations),
        "tiles": column(space.tiles),
        "offset": column(OFFSETS),
        "segments": column((False, True, False)),
        "window": column((False, True, False)),
        "exclude_self": column((False, True)),
        "broadcast": column((False, False, True)),
        "scaled": column((False, False, True)),
        "capped": column((False, False, True)),
        "sinks": column((False, True)),
    }
    shapes = zip(column(space.lengths), column(space.heads), column(space.head_dims), strict=True)
    rest = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    return [
        _possible(operator, *shape, options, space.devices)
        for operator, shape, options in zip(column(OPERATORS), shapes, rest, strict=True)
    ]


def _possible(
    operator: str,
    lengths: tuple[int, int],
    heads: tuple[int, int],
    head_dims: tuple[int, int],
    options: dict[str, Any],
    devices: int,
) -> Signature:
    """The signature of what was drawn, with what does not go together put right."""
    if operator == "shared_hash":
        lengths, heads = (lengths[0],) * 2, (heads[0],) * 2
    if operator == "decode":
        lengths, head_dims = (1, max(lengths)), (head_dims[0],) * 2
        options |= {"offset": "one", "segments": False, "broadcast": False, "scaled": False}
        if options["transform"] in ("grad", "checkpoint"):  # it has no derivative
            options["transform"] = "forward"
    if options["implementation"].startswith("triton"):
        head_dims = 40 if head_dims[0] % 8 else head_dims[0], 40 if head_dims[1] % 8 else head_dims[1]
    if operator == "range":
        options["offset"] = "none"
    if operator == "moba":  # means of whole blocks, which are exact
        options["segments"] = False
    if operator == "merged":  # each part would have the sinks
        options["sinks"] = False
    if operator not in WINDOWS:
        options["window"] = operator in ("window", "longformer")
    if options["transform"] in ON_A_MESH and not min(lengths):
        options["transform"] = "grad"
    if options["transform"] == "shard_map" and options["implementation"] == "triton_interpret":
        options["transform"] = "auto_mesh"  # the interpreter's own types do not pass the checks of `shard_map`
    if options["transform"] in ON_A_MESH:
        options["mesh"] = (2 if devices > 1 else 1, 2 if devices > 3 else 1)
    return Signature(operator, (2, *lengths, *heads, *head_dims), **options)


def draw_case(signature: Signature, number: int) -> Case:
    """The case of a signature with a number, the same on every machine."""
    rng = np.random.default_rng((number, zlib.crc32(str(signature).encode())))
    batch, query_length, key_length, heads, key_heads, head_dim, value_dim = signature.shape
    queries, keys = (batch, query_length, heads), (batch, key_length, key_heads)
    spread = rng.choice([0.1, 1.0, 1.0, 4.0])
    normal = lambda shape, by=1.0: (rng.standard_normal(shape, np.float32) * np.float32(by)).astype(signature.dtype)
    arrays = (
        normal((*queries, head_dim), spread),
        normal((*keys, head_dim), spread),
        normal((*keys, value_dim)),
        normal((*queries, value_dim)),
        rng.standard_normal(queries, np.float32),
    )
    pattern = _draw_pattern(rng, signature)
    junk = (None, math.nan, math.inf)[rng.integers(3)]
    chosen = {}
    if signature.operator == "moba":
        halves = (np.round(2 * x.astype(np.float32)) / 2 for x in arrays[:2])  # scores are exact, and often equal
        arrays = (*(x.astype(signature.dtype) for x in halves), *arrays[2:])
        chosen["blocks"] = _best_blocks(signature, arrays[0], arrays[1], pattern)
        junk = junk and math.nan  # which keeps a block from being chosen, where `inf` would have it chosen
    mask = dense_mask(signature, pattern | chosen)
    return Case(arrays, pattern, mask, junk, normal(heads, rng.choice([1.0, 8.0])) if signature.sinks else None)


def _draw_pattern(rng: np.random.Generator, signature: Signature) -> dict[str, np.ndarray]:
    batch, query_length, key_length, heads, key_heads, *_ = signature.shape
    tokens, key_tokens = (batch, query_length, heads), (batch, key_length, key_heads)
    if signature.broadcast:
        tokens, key_tokens = (1, query_length, 1), (1, key_length, 1)
    pattern: dict[str, np.ndarray] = {}
    if signature.operator in HASHES:
        rounds: tuple[int, ...] = (NUM_ROUNDS,) if signature.operator in ("rounds", "indices") else ()
        kinds = ("one", "few", "many", "distinct", "skewed", "apart", "huge")
        kind = str(rng.choice(kinds[:-1] if signature.operator == "promised_hash" else kinds))
        pattern["query_hash"] = _draw_ids(rng, (*rounds, *tokens), kind)
        if signature.operator != "shared_hash":
            pattern["key_hash"] = _draw_ids(rng, (*rounds, *key_tokens), kind)
            if kind == "apart":  # no query has the bucket of a key
                pattern["key_hash"] += PROMISE // 2
    if signature.operator in ("keep", "merged", "indices"):
        for name, size in (("query_keep", tokens), ("key_keep", key_tokens)):
            pattern[name] = rng.random(size) < rng.choice([0.0, 0.05, 0.5, 0.9, 1.0])
    if signature.operator == "longformer":
        for name, size in (("query_global", tokens), ("key_global", key_tokens)):
            pattern[name] = rng.random(size) < rng.choice([0.0, 0.05, 0.5, 1.0])
    if signature.operator == "merged":
        pattern["is_first"] = rng.random(key_tokens) < rng.choice([0.0, 0.3, 1.0])
    if signature.operator in ("range", "indices"):
        longest = int(rng.choice([0, 8, key_length]))
        start = rng.integers(-3, key_length + 3, tokens)
        if rng.random() < 0.3:
            start = np.broadcast_to(np.arange(query_length)[:, None], tokens)
        stop = start + rng.integers(-4, longest + 1, tokens)
        pattern |= {"key_start": start.astype(np.int32), "key_stop": stop.astype(np.int32)}
    if signature.operator == "blocks":
        pattern["blocks"] = _draw_blocks(rng, (*tokens, NUM_CHOSEN), -(-key_length // BLOCK_SIZES["blocks"]))
    if signature.operator == "indices":
        _make_disjoint(pattern, int(rng.choice([0, key_length // 3, key_length // 2])))
    if signature.offset in ("one", "each"):
        shape = () if signature.offset == "one" else (batch,)
        offsets: tuple[int, ...] = (0, key_length - query_length, 7, -5, 1000, -1000, 2**31 - 1, -(2**31))
        if signature.operator == "decode":  # how many tokens are in the cache, which has room for one more
            offsets = (0, 1, key_length // 2, key_length - 2, key_length - 1)
        pattern["query_offset"] = rng.choice(np.array(offsets, np.int64), shape).astype(np.int32)
    if signature.window:
        windows = (0, 1, 5, key_length, 2**30, 2**31 - 1)
        # The last one may be cut short, which shows where an offset is as large.
        pattern["window"] = np.array(rng.choice(windows[: -1 if "query_offset" in pattern else None]), np.int32)
    if signature.segments:
        kind = str(rng.choice(("one", "runs", "padded", "scattered", "huge", "padding")))
        for name, length in (("query_segment_ids", query_length), ("key_segment_ids", key_length)):
            pattern[name] = _draw_segments(rng, (tokens[0], length), kind)
    return pattern


def _make_disjoint(pattern: dict[str, np.ndarray], border: int) -> None:
    """Leaves the keys before a border to ranges, and of the others those that are kept to what keeps, not to hashes."""
    pattern["key_stop"] = np.minimum(pattern["key_stop"], np.int32(border))
    is_in_ranges = (np.arange(pattern["key_keep"].shape[1]) < border)[:, None]
    pattern["key_hash"] = np.where(is_in_ranges | pattern["key_keep"], np.int32(NOBODY), pattern["key_hash"])
    pattern["key_keep"] = pattern["key_keep"] & ~is_in_ranges


_HUGE = np.array([-(2**31), -1, 0, 2**31 - 1, 2**31 - 2], np.int32)


def _draw_ids(rng: np.random.Generator, size: tuple[int, ...], kind: str) -> np.ndarray:
    """Bucket ids below `PROMISE`, but for the kind "huge"."""
    if kind == "one":
        return np.full(size, 3, np.int32)
    if kind == "huge":
        return rng.choice(_HUGE, size)
    if kind == "skewed":
        return np.minimum(rng.zipf(1.5, size), PROMISE - 1).astype(np.int32)
    if kind == "distinct":
        return rng.permuted(np.broadcast_to(np.arange(size[-2])[:, None] % PROMISE, size), axis=-2).astype(np.int32)
    return rng.integers(0, {"few": 3, "many": PROMISE, "apart": PROMISE // 2}[kind], size, dtype=np.int32)


def _draw_blocks(rng: np.random.Generator, size: tuple[int, ...], num_blocks: int) -> np.ndarray:
    """Numbers of blocks, of which some name none."""
    if rng.random() < 0.2:
        return rng.choice(_HUGE, size)
    few = int(rng.choice([1, 3, num_blocks + 2]))  # so that they are named again, or lie behind a query
    return rng.integers(-1, few, size, dtype=np.int32)


def _position(signature: Signature, pattern: dict[str, np.ndarray]) -> np.ndarray:
    """The positions of queries, int64 `[B or 1, 1, T, 1]`."""
    # As documented, arrays are clipped.
    offset = np.clip(pattern.get("query_offset", signature.static_offset), 1 - 2**30, 2**30 - 1, dtype=np.int64)
    return offset.reshape(-1, 1, 1, 1) + np.arange(signature.shape[1])[:, None]


def _best_blocks(
    signature: Signature, query: np.ndarray, key: np.ndarray, pattern: dict[str, np.ndarray]
) -> np.ndarray:
    """What MoBA chooses, `[B, T, N, NUM_CHOSEN]`."""
    batch, _, key_length, heads, key_heads, head_dim, _ = signature.shape
    size = BLOCK_SIZES["moba"]
    num_blocks = key_length // size
    query, key = (x.astype(np.float64).swapaxes(1, 2) for x in (query, key))  # [B, N, T, H]
    means = key[:, :, : num_blocks * size].reshape(batch, key_heads, num_blocks, size, head_dim).mean(axis=3)
    scores = query @ means.repeat(heads // key_heads, axis=1).swapaxes(2, 3)
    block = np.arange(num_blocks)
    is_candidate = np.broadcast_to(block <= _position(signature, pattern) // size - NUM_LOCAL, scores.shape)
    order = np.argsort(np.where(is_candidate, -scores, np.inf), axis=3, kind="stable")[..., :NUM_CHOSEN]
    chosen = np.where(np.take_along_axis(is_candidate, order, axis=3), order, -1)
    return chosen.swapaxes(1, 2).astype(np.int32)


def _draw_segments(rng: np.random.Generator, size: tuple[int, int], kind: str) -> np.ndarray:
    if kind in ("one", "padding"):
        return np.full(size, 3 if kind == "one" else -1, np.int32)
    if kind == "huge":
        return rng.choice(_HUGE, size)
    if kind == "scattered":
        return rng.integers(-1, 3, size, dtype=np.int32)
    runs = np.cumsum(rng.random(size) < 0.1, axis=1, dtype=np.int32)
    return np.where(np.arange(size[1]) < 0.7 * size[1], runs, -7).astype(np.int32) if kind == "padded" else runs


def dense_mask(signature: Signature, pattern: dict[str, np.ndarray]) -> np.ndarray:
    """What may be attended to, bool `[B, N, T, S]`."""
    batch, query_length, key_length, heads, *_ = signature.shape
    key, position = np.arange(key_length), _position(signature, pattern)

    def on_query(name: str) -> np.ndarray:  # [..., B or 1, N or 1, T, 1]
        return pattern[name].swapaxes(-1, -2)[..., None]

    def on_key(name: str) -> np.ndarray:  # [..., B or 1, N or 1, 1, S]
        x = pattern[name].swapaxes(-1, -2)[..., None, :]
        return x.repeat(heads // x.shape[-3], axis=-3)

    def near(window: int | np.ndarray) -> np.ndarray:
        return key > position - window

    causal, seen = key <= position, near(pattern["window"]) if signature.window else np.ones((), bool)
    in_bucket = in_range = both_kept = np.zeros((), bool)
    if "query_hash" in pattern:
        same = on_query("query_hash") == on_key("key_hash" if "key_hash" in pattern else "query_hash")
        in_bucket = (same.any(0) if same.ndim == 5 else same) & (key <= position - int(signature.exclude_self))
    if "key_start" in pattern:
        in_range = (on_query("key_start") <= key) & (key < on_query("key_stop"))
    if "query_keep" in pattern:
        both_kept = causal & on_query("query_keep") & on_key("key_keep")
    match signature.operator:
        case "causal":
            mask = causal & seen
        case "window":
            mask = causal & (seen | _is_sink(pattern, key_length))
        case "longformer":
            mask = causal & (seen | on_query("query_global") | on_key("key_global"))
        case "strided":
            mask = causal & (near(STRIDE) | ((position - key) % STRIDE == 0))
        case "fixed":
            mask = causal & ((position // STRIDE == key // STRIDE) | (key % STRIDE >= STRIDE - NUM_SUMMARIES))
        case "blocks" | "moba":
            number, own = (x // BLOCK_SIZES[signature.operator] for x in (key, position))
            is_chosen = np.any(pattern["blocks"].swapaxes(1, 2)[..., None] == number, axis=-2)
            mask = causal & (is_chosen | (number > own - NUM_LOCAL))
        case "local_hash":
            mask = in_bucket | (near(LOCAL_WINDOW) & (key <= position - int(signature.exclude_self)))
        case _:
            mask = in_range | (seen & (in_bucket | both_kept))
    if "query_segment_ids" in pattern:
        segment = pattern["query_segment_ids"][:, None, :, None]
        mask = mask & (segment >= 0) & (segment == pattern["key_segment_ids"][:, None, None, :])
    return np.broadcast_to(mask, (batch, heads, query_length, key_length))


def _is_sink(pattern: dict[str, np.ndarray], key_length: int) -> np.ndarray:
    """Whether a key is one of the first of its segment, bool `[B or 1, 1, 1, S]`."""
    segment = pattern.get("key_segment_ids", np.zeros((1, key_length), np.int32))
    number = np.tril(segment[:, :, None] == segment[:, None, :], k=-1).sum(axis=2)
    return (number < NUM_SINKS)[:, None, None]
