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
    *("causal", "hash", "promised_hash", "shared_hash", "rounds", "keep", "range", "window", "merged", "index"),
    "union",  # of disjoint indices: a window and global tokens
    "decode",  # one token in hash mode, which reads its bucket of a cache
)
TRANSFORMS = ("grad", "forward", "vmap", "scan", "checkpoint", "shard_map", "auto_mesh", "explicit_mesh")
ON_A_MESH = ("shard_map", "auto_mesh", "explicit_mesh")
DTYPES = ("float32", "bfloat16", "float16")
OFFSETS = ("none", "one", "each")  # 0 and static; the same for the batch; one for each of it
PROMISE = 32
NUM_ROUNDS = 2
NUM_SINKS = 3

# T, S; heads, key heads.
SHORT = ((64, 64), (50, 77), (90, 33), (1, 40), (33, 0))
LONG = ((256, 256), (515, 640), (700, 300), (1, 600), (1024, 1024), (130, 0))
HEADS = ((4, 2), (4, 4), (4, 1), (6, 2))
HEAD_DIMS = (16, 64, 24, 128, 32, 80, 20)


@dataclass(frozen=True)
class Signature:
    """What decides a compilation.

    Attributes:
        operator: One of `OPERATORS`.
        shape: `(B, T, S, N, K, H)`.
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
        scaled: Whether the factor of the scores is given.
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

    def __str__(self) -> str:
        """As `parse` reads it."""
        written = lambda x: "x".join(map(str, x)) if isinstance(x, tuple) else str(x)
        return ",".join(f"{field.name}={written(getattr(self, field.name))}" for field in dataclasses.fields(self))

    @property
    def scale(self) -> float | None:
        """Factor of the scores."""
        return 0.3 if self.scaled else None


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
    if "operator" not in values or len(values.get("shape", ())) != 6:
        raise ValueError(f"A signature needs at least operator=... and shape=BxTxSxNxKxH, got {text!r}.")
    return Signature(**values)


@dataclass(frozen=True)
class Case:
    """One problem, on the host.

    Attributes:
        arrays: query, key, value and the cotangents of output and log-sum-exp.
        pattern: Hashes, masks, ranges, offsets and segment ids, by the names that the operators give them.
        mask: bool `[B, N, T, S]`, what may be attended to.
        junk: What stands in rows that take no part; None leaves them as they are.
    """

    arrays: tuple[np.ndarray, ...]
    pattern: dict[str, np.ndarray]
    mask: np.ndarray
    junk: float | None

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
        head_dims: `H`.
        devices: How many there are for a mesh.
    """

    implementations: tuple[str, ...] = ("default",)
    tiles: tuple[str, ...] = ("small",)
    dtypes: tuple[str, ...] = DTYPES
    lengths: tuple[tuple[int, int], ...] = SHORT
    heads: tuple[tuple[int, int], ...] = HEADS
    head_dims: tuple[int, ...] = HEAD_DIMS
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
    head_dim: int,
    options: dict[str, Any],
    devices: int,
) -> Signature:
    """The signature of what was drawn, with what does not go together put right."""
    if operator == "shared_hash":
        lengths, heads = (lengths[0],) * 2, (heads[0],) * 2
    if operator == "decode":
        lengths = 1, max(lengths)
        options |= {"offset": "one", "segments": False, "window": False, "broadcast": False, "scaled": False}
        if options["transform"] in ("grad", "checkpoint"):  # it has no derivative
            options["transform"] = "forward"
    if head_dim % 8 and options["implementation"].startswith("triton"):
        head_dim = 40
    if operator == "range":
        options["offset"] = "none"
    if operator in ("range", "window", "merged", "union"):
        options["window"] = operator in ("window", "union")
    if options["transform"] in ON_A_MESH and not min(lengths):
        options["transform"] = "grad"
    if options["transform"] == "shard_map" and options["implementation"] == "triton_interpret":
        options["transform"] = "auto_mesh"  # the interpreter's own types do not pass the checks of `shard_map`
    if options["transform"] in ON_A_MESH:
        options["mesh"] = (2 if devices > 1 else 1, 2 if devices > 3 else 1)
    return Signature(operator, (2, *lengths, *heads, head_dim), **options)


def draw_case(signature: Signature, number: int) -> Case:
    """The case of a signature with a number, the same on every machine."""
    rng = np.random.default_rng((number, zlib.crc32(str(signature).encode())))
    batch, query_length, key_length, heads, key_heads, head_dim = signature.shape
    query_shape, key_shape = (batch, query_length, heads, head_dim), (batch, key_length, key_heads, head_dim)
    spread = rng.choice([0.1, 1.0, 1.0, 4.0])
    normal = lambda shape, by=1.0: (rng.standard_normal(shape, np.float32) * np.float32(by)).astype(signature.dtype)
    arrays = (
        normal(query_shape, spread),
        normal(key_shape, spread),
        normal(key_shape),
        normal(query_shape),
        rng.standard_normal(query_shape[:3], np.float32),
    )
    pattern = _draw_pattern(rng, signature)
    mask = dense_mask(signature, pattern)
    return Case(arrays, pattern, mask, (None, math.nan, math.inf)[rng.integers(3)])


def _draw_pattern(rng: np.random.Generator, signature: Signature) -> dict[str, np.ndarray]:
    batch, query_length, key_length, heads, key_heads, _ = signature.shape
    tokens, key_tokens = (batch, query_length, heads), (batch, key_length, key_heads)
    if signature.broadcast:
        tokens, key_tokens = (1, query_length, 1), (1, key_length, 1)
    pattern: dict[str, np.ndarray] = {}
    if signature.operator in ("hash", "promised_hash", "shared_hash", "rounds", "index", "decode"):
        rounds: tuple[int, ...] = (NUM_ROUNDS,) if signature.operator == "rounds" else ()
        kinds = ("one", "few", "many", "distinct", "skewed", "apart", "huge")
        kind = str(rng.choice(kinds[:-1] if signature.operator == "promised_hash" else kinds))
        pattern["query_hash"] = _draw_ids(rng, (*rounds, *tokens), kind)
        if signature.operator != "shared_hash":
            pattern["key_hash"] = _draw_ids(rng, (*rounds, *key_tokens), kind)
            if kind == "apart":  # no query has the bucket of a key
                pattern["key_hash"] += PROMISE // 2
    if signature.operator in ("keep", "merged"):
        for name, size in (("query_keep", tokens), ("key_keep", key_tokens)):
            pattern[name] = rng.random(size) < rng.choice([0.0, 0.05, 0.5, 0.9, 1.0])
    if signature.operator == "union":
        for name, size in (("query_global", tokens), ("key_global", key_tokens)):
            pattern[name] = rng.random(size) < rng.choice([0.0, 0.05, 0.5, 1.0])
    if signature.operator == "merged":
        pattern["is_first"] = rng.random(key_tokens) < rng.choice([0.0, 0.3, 1.0])
    if signature.operator == "range":
        longest = int(rng.choice([0, 8, key_length]))
        start = rng.integers(-3, key_length + 3, tokens)
        if rng.random() < 0.3:
            start = np.broadcast_to(np.arange(query_length)[:, None], tokens)
        stop = start + rng.integers(-4, longest + 1, tokens)
        pattern |= {"key_start": start.astype(np.int32), "key_stop": stop.astype(np.int32)}
    if signature.offset != "none":
        shape = () if signature.offset == "one" else (batch,)
        offsets: tuple[int, ...] = (0, key_length - query_length, 7, -5, 1000, -1000, 2**31 - 1, -(2**31))
        if signature.operator == "union":  # which moves them by its window
            offsets = offsets[:-2]
        if signature.operator == "decode":  # how many tokens are in the cache, which has room for one more
            offsets = (0, 1, key_length // 2, key_length - 2, key_length - 1)
        pattern["query_offset"] = rng.choice(np.array(offsets, np.int64), shape).astype(np.int32)
    if signature.window:
        windows = (0, 1, 5, key_length, 2**31 - 1)
        pattern["window"] = np.array(rng.choice(windows[: -1 if signature.operator == "union" else None]), np.int32)
    if signature.segments:
        kind = str(rng.choice(("one", "runs", "padded", "scattered", "huge", "padding")))
        for name, length in (("query_segment_ids", query_length), ("key_segment_ids", key_length)):
            pattern[name] = _draw_segments(rng, (tokens[0], length), kind)
    return pattern


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
    batch, query_length, key_length, heads, _, _ = signature.shape
    key = np.arange(key_length)

    def on_query(name: str) -> np.ndarray:  # [..., B or 1, N or 1, T, 1]
        return pattern[name].swapaxes(-1, -2)[..., None]

    def on_key(name: str) -> np.ndarray:  # [..., B or 1, N or 1, 1, S]
        x = pattern[name].swapaxes(-1, -2)[..., None, :]
        return x.repeat(heads // x.shape[-3], axis=-3)

    if signature.operator == "range":
        mask = (on_query("key_start") <= key) & (key < on_query("key_stop"))
    else:
        offset = pattern.get("query_offset", np.zeros((), np.int32)).astype(np.int64).reshape(-1, 1)
        position = (offset + np.arange(query_length))[:, None, :, None]
        mask = key <= position - int(signature.exclude_self and "query_hash" in pattern)
        if signature.window:
            seen = key > position - pattern["window"]
            if signature.operator == "window":
                seen = seen | _is_sink(pattern, key_length)
            elif signature.operator == "union":
                seen = seen | on_query("query_global") | on_key("key_global")
            mask = mask & seen
    if "query_hash" in pattern:
        same = on_query("query_hash") == on_key("key_hash" if "key_hash" in pattern else "query_hash")
        mask = mask & (same.any(0) if signature.operator == "rounds" else same)
    if "query_keep" in pattern:
        mask = mask & on_query("query_keep") & on_key("key_keep")
    if "query_segment_ids" in pattern:
        segment = pattern["query_segment_ids"][:, None, :, None]
        mask = mask & (segment >= 0) & (segment == pattern["key_segment_ids"][:, None, None, :])
    return np.broadcast_to(mask, (batch, heads, query_length, key_length))


def _is_sink(pattern: dict[str, np.ndarray], key_length: int) -> np.ndarray:
    """Whether a key is one of the first of its segment, bool `[B or 1, 1, 1, S]`."""
    segment = pattern.get("key_segment_ids", np.zeros((1, key_length), np.int32))
    number = np.tril(segment[:, :, None] == segment[:, None, :], k=-1).sum(axis=2)
    return (number < NUM_SINKS)[:, None, None]
