"""Text or pictures from a trained model: `python -m train sample`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from train.data import Corpus, load_corpus
from train.errors import TrainError
from train.files import cannot_be
from train.folder import expanded, load_config, moved
from train.generate import can_decode, generate
from train.memory import out_of_memory_in_one_line
from train.plot import draw_images
from train.restore import restored
from train.step import LanguageModel, TrainState

SAMPLE_FILES = {"text": "sample.txt", "images": "sample.png"}
DEFAULT_PROMPT_LENGTH = 64
DEFAULT_COUNT = {"text": 1, "images": 16}


@dataclass(frozen=True)
class SampleOptions:
    """Generate from a checkpoint: text on standard output and in sample.txt, or a grid of pictures in sample.png."""

    run: tyro.conf.Positional[str]
    """Folder of the run."""
    checkpoint: Literal["best", "last"] = "best"
    """The one with the lowest held-out loss, or the last one."""
    prompt: str | None = None
    """What a text starts from. Default: the beginning of the held-out text. Pictures start from nothing."""
    length: int = 256
    """Tokens to add to a text."""
    count: int | None = None
    """How many to generate. Default: 1 text, 16 pictures."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    seed: int = 0
    """Decides the draw."""
    out: str | None = None
    """File to write. Default: in the run's folder."""
    data: str | None = None
    """Where the run's data lie now, if they were moved."""
    bpe: str | None = None
    """Likewise, of the files of its byte pairs."""

    def problem(self) -> str | None:
        """What is wrong with these options, in one line; None if nothing is."""
        if self.length < 1:
            return f"--length must be at least 1, got {self.length}."
        if self.count is not None and self.count < 1:
            return f"--count must be at least 1, got {self.count}."
        if not self.temperature >= 0:
            return f"--temperature must not be negative, got {self.temperature}."
        if not 0 <= self.seed < 2**32:
            return f"--seed must lie between 0 and 2**32 - 1, got {self.seed}."
        return None


def sample_run(options: SampleOptions) -> int:
    """Generates from a run's checkpoint.

    Args:
        options: From the command line.

    Returns:
        The exit code 0.

    Raises:
        TrainError: The folder holds no run or no checkpoint, the data is gone, or an option makes no sense.
    """
    problem = options.problem()
    if problem:
        raise TrainError(problem)
    folder = expanded("run", options.run)
    config = moved(load_config(folder), options.data, options.bpe)
    corpus = load_corpus(config.data)
    model, state = restored(folder, config, corpus, options.checkpoint)
    title = f"{folder}, step {int(state.step)}; {corpus.name}"
    print(f"wrote {write_sample(options, title, corpus, model, state, config.data.seq_len)}")
    return 0


def write_sample(
    options: SampleOptions, title: str, corpus: Corpus, model: LanguageModel, state: TrainState, window: int
) -> Path:
    """Generates from a state; prints a text.

    Args:
        options: What to generate and where to write it.
        title: Stands above it.
        corpus: What the model was trained on.
        model: The model.
        state: Its arrays.
        window: The longest context the model may see.

    Returns:
        The file that was written.

    Raises:
        TrainError: The prompt does not fit the corpus, or the file cannot be written.
    """
    kind: Literal["text", "images"] = "images" if corpus.unit == "pixel" else "text"
    folder = expanded("run", options.run)
    path = folder / SAMPLE_FILES[kind] if options.out is None else expanded("out", options.out)
    if kind == "images" and path.suffix.lower() != ".png":
        raise TrainError(f"--out must end in .png for pictures, got {path}.")
    prompt = _prompt(options, corpus)
    if not can_decode(model, state):
        print("reformer layers cannot decode with a cache: each token costs a pass over the window")
    with out_of_memory_in_one_line(lambda: "Generate fewer at once: --count, or fewer tokens: --length."):
        tokens = generate(
            model,
            state,
            np.tile(prompt, (options.count or DEFAULT_COUNT[kind], 1)),
            length=window if kind == "images" else options.length,
            window=window,
            temperature=options.temperature,
            seed=options.seed,
            without=corpus.tokenizer.separator if kind == "images" else None,  # it would be no pixel
        )
    texts = [] if kind == "images" else [_texts(corpus, row[: len(prompt)], row[len(prompt) :]) for row in tokens]
    for before, added in texts:
        print(f"--- {before!r} goes on:\n{added}\n---")
    try:
        if kind == "images":
            draw_images([np.frombuffer(corpus.tokenizer.decode(row), np.uint8) for row in tokens], title, path)
        else:
            blocks = [f"--- prompt\n{before}\n--- continuation\n{added}\n" for before, added in texts]
            path.write_text("\n".join([f"{title}\n", *blocks]), encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise cannot_be("written", path, error, "Name another file with --out.") from None
    return path


def _prompt(options: SampleOptions, corpus: Corpus) -> np.ndarray:
    """At least one token, `[P]`."""
    tokenizer = corpus.tokenizer
    nothing = np.array([tokenizer.separator], tokenizer.dtype)
    if corpus.unit == "pixel":
        if options.prompt is not None:
            raise TrainError("--prompt goes with text; pictures start from nothing. Leave it out.")
        return nothing
    if options.prompt is None:
        return corpus.held_out[:DEFAULT_PROMPT_LENGTH]
    try:
        # A command line may hold any bytes.
        tokens = tokenizer.encode(options.prompt.encode("utf-8", "surrogateescape"))
    except TrainError as error:
        raise TrainError(f"--prompt: {error}. Write it in UTF-8, or train on bytes.") from None
    return tokens if len(tokens) else nothing


def _texts(corpus: Corpus, *tokens: np.ndarray) -> tuple[str, ...]:
    """Tokens `[P]` of each part of a text, for people."""
    return tuple(corpus.tokenizer.decode(part).decode("utf-8", "replace").replace("\0", "\n") for part in tokens)
