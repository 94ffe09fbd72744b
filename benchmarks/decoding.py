"""`python -m benchmarks.decoding` times sampling with a cache beside computing the whole sequence again for each token.

For every kind of attention and length: reading a prompt of that length into the cache, each token that follows, and
one pass over the whole sequence, which is what a token costs without a cache. Weights are random; the likeliest token
is taken. `LEAST_ROOM` of `scfa_jax.layers.bucket_order` is where `hash(16)/bucket` passes `hash(16)/all`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from flax import nnx

from benchmarks import results, timing
from benchmarks.training import configuration
from models import Transformer
from models.config import DType
from scfa_jax.layers import bucket_order

VOCAB_SIZE = 256
READS = {"bucket": 1, "all": sys.maxsize}  # from how many places on a cache keeps its order by bucket


@dataclass(frozen=True)
class Options:
    """What to time."""

    preset: str = "gpt2-small"
    """The model, as `python -m train` names it."""
    kinds: tuple[str, ...] = ("dense", "hash(16)/bucket", "hash(16)/all", "drop(0.5)")
    """Kinds of attention, as `python -m benchmarks.training` takes them; hash with what a token reads of the cache."""
    lengths: tuple[int, ...] = (1024, 4096, 16_384, 32_768)
    """Tokens of the prompt."""
    tokens: int = 64
    """Tokens that follow it."""
    batch: int = 1
    """Sequences side by side."""
    samples: int = 5
    """Measurements of each, whose median counts."""
    dtype: DType | None = None
    """Of the computation; by default bfloat16 on a GPU and float32 elsewhere."""
    out: Path = Path("benchmarks/results")
    """Folder of decoding.json."""

    def problem(self) -> str | None:
        """What is wrong with these options, in one line; None if nothing is."""
        for name in ("tokens", "batch", "samples"):
            if getattr(self, name) < 1:
                return f"--{name} must be at least 1, got {getattr(self, name)}"
        return None if min(self.lengths, default=0) >= 1 else f"--lengths must be at least 1, got {self.lengths}"


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Makes hash layers read what is said of their caches, a name in `READS`; "" leaves the choice to the library."""
    if what and what not in READS:
        raise ValueError(f"--kinds must end in one of {', '.join('/' + name for name in READS)} or none, got /{what}")
    least = {name: READS[what] if what else room for name, room in bucket_order.LEAST_ROOM.items()}
    with mock.patch.dict(bucket_order.LEAST_ROOM, least):
        yield


def measure(options: Options, kind: str, length: int) -> dict[str, Any]:
    """Times one kind at one length.

    Args:
        options: What to time.
        kind: Of attention.
        length: Tokens of the prompt.

    Returns:
        Milliseconds of the prompt, of a token with the cache and of one without, tokens a second of both, seconds of
        compiling, and whether both ways take the same first token.

    Raises:
        ValueError: The kind is impossible, or cannot decode.
    """
    dtype: DType = options.dtype or ("bfloat16" if jax.default_backend() == "gpu" else "float32")
    attention, _, reads = kind.partition("/")
    config = configuration(options.preset, attention, dtype)
    if not config.can_decode():
        raise ValueError(f"--kinds must be able to decode with a cache, got {kind}")
    size = length + options.tokens
    model = Transformer(config, vocab_size=VOCAB_SIZE, max_length=size, rngs=nnx.Rngs(params=0, sparsity=1))
    graph, weights = nnx.split(model)
    prompt = np.random.default_rng(0).integers(0, VOCAB_SIZE, (options.batch, length), np.int32)

    def next_token(model: Transformer, tokens: jax.Array, **how: Any) -> jax.Array:
        features = model.features(tokens, **how)[:, -1]
        return model.logits(features).argmax(axis=1).astype(jnp.int32)

    def read(weights: nnx.State, prompt: jax.Array) -> tuple[nnx.State, jax.Array]:
        model = nnx.merge(graph, weights)
        model.init_cache(options.batch, size)
        token = next_token(model, prompt, decode=True)
        return nnx.state(model, nnx.Cache), token

    def follow(weights: nnx.State, cache: nnx.State, token: jax.Array) -> jax.Array:
        """So many tokens more: `[tokens, B]`."""
        model = nnx.merge(graph, weights)
        model.init_cache(options.batch, size)
        with_cache, *states = nnx.split(model, nnx.Cache, ...)

        def step(carry: tuple[nnx.State, jax.Array], _: None) -> tuple[tuple[nnx.State, jax.Array], jax.Array]:
            model = nnx.merge(with_cache, carry[0], states[1])
            token = next_token(model, carry[1][:, None], decode=True)
            return (nnx.state(model, nnx.Cache), token), token

        return jax.lax.scan(step, (cache, token), None, length=options.tokens)[1]

    def whole(weights: nnx.State, prompt: jax.Array) -> jax.Array:
        return next_token(nnx.merge(graph, weights), prompt)

    with reading(reads):
        prompting = timing.compile_ahead(read, (weights, prompt))
        cache, token = prompting.function(weights, prompt)
        following = timing.compile_ahead(follow, (weights, cache, token))
    again = timing.compile_ahead(whole, (weights, prompt))
    times, errors = timing.take_turns(
        {
            "prompt": (prompting.function, [(weights, prompt)]),
            "cached": (following.function, [(weights, cache, token)]),
            "recomputed": (again.function, [(weights, prompt)]),
        },
        samples=options.samples,
    )
    if errors:
        raise next(iter(errors.values()))
    cached, recomputed = times["cached"]["median_ms"] / options.tokens, times["recomputed"]["median_ms"]
    return {
        "kind": kind,
        "length": length,
        "prompt_ms": times["prompt"]["median_ms"],
        "cached_ms_per_token": cached,
        "recomputed_ms_per_token": recomputed,
        "cached_tokens_per_second": 1e3 * options.batch / cached,
        "recomputed_tokens_per_second": 1e3 * options.batch / recomputed,
        "cache_bytes": sum(x.nbytes for x in jax.tree.leaves(cache)),
        "compile_s": {
            name: round(one.seconds, 2)
            for name, one in (("prompt", prompting), ("cached", following), ("recomputed", again))
        },
        "same_first_token": bool((np.asarray(again.function(weights, prompt)) == np.asarray(token)).all()),
        "times": times,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = ["| attention | tokens | prompt, ms | ms a token | without a cache | |", "|---|---|---|---|---|---|"]
    for row in rows:
        cached, recomputed = row["cached_ms_per_token"], row["recomputed_ms_per_token"]
        cells = [row["kind"], f"{row['length']:,}", f"{row['prompt_ms']:.4g}", f"{cached:.4g}", f"{recomputed:.4g}"]
        lines.append(f"| {' | '.join(cells)} | {recomputed / cached:.1f}x |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Times all, writes `decoding.json` after each and prints the table.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        The exit code: 0, 2 for a mistake in the arguments.
    """
    import tyro

    argv = sys.argv[1:] if argv is None else argv
    options = tyro.cli(Options, args=argv, prog="python -m benchmarks.decoding", description=__doc__)
    rows: list[dict[str, Any]] = []
    record = {
        "format": results.FORMAT,
        "environment": results.environment(" ".join(["python -m benchmarks.decoding", *argv])),
        "preset": options.preset,
        "batch": options.batch,
        "tokens": options.tokens,
        "rows": rows,
    }
    file = options.out / "decoding.json"
    try:
        if problem := options.problem():
            raise ValueError(problem)
        cases = [(kind, length) for length in options.lengths for kind in options.kinds]
        for kind, length in tqdm.tqdm(cases, unit="case", disable=None):
            rows.append(measure(options, kind, length))
            results.write(file, record)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{table(rows)}\nwrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
