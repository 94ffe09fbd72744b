"""The options of a run: dataclasses that tyro turns into a command line, and what they may be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from models import ModelConfig
from models.controls import Cudnn
from models.reformer import Reformer


@dataclass(frozen=True)
class DataConfig:
    """The text or the images."""

    data: str | None = None
    """A file of text or of JSON lines with a "text" key (.jsonl, .ndjson), each also as .gz or .zst; a folder or a
    quoted glob of such files; enwik8 by its name, which has its own split; or the folder of MNIST's idx files.
    Without it: the source files of the running Python's standard library."""
    tokenizer: Literal["bytes", "gpt2"] = "bytes"
    """Of text: its bytes, or GPT-2's byte pairs, made once and kept in the cache."""
    bpe: str | None = None
    """Folder with GPT-2's encoder.json and vocab.bpe."""
    documents: Literal["together", "separate"] = "together"
    """Whether attention reaches over the documents of a sequence, or each sees only itself."""
    cache: str | None = None
    """Folder for tokenised text. Default: scfa_jax in the user's folder for caches."""
    seq_len: int = 256
    """Tokens a sequence; 784 for MNIST."""
    batch_size: int = 8
    """Sequences a step."""
    held_out: float = 0.05
    """Share of the data, at its end, that is kept for evaluation; enwik8 and MNIST also have a test part."""


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer: AdamW, a warmup and then a cosine, clipping by the global norm."""

    steps: int = 600
    """Steps that the learning-rate schedule spans."""
    lr: float = 3e-3
    """Highest learning rate; the schedule ends at a tenth of it."""
    warmup: int = 50
    """Steps until the highest learning rate; at most one less than --steps."""
    weight_decay: float = 0.1
    """AdamW's weight decay, of matrices only."""
    clip: float = 1.0
    """Largest global norm of the gradients."""
    accumulate: int = 1
    """Parts that a step's sequences are computed in, one after the other; must divide --batch-size. Less memory, the
    same result."""
    seed: int = 0
    """Decides the first parameters, the order of the data, the hashing and the dropping."""


@dataclass(frozen=True)
class RunConfig:
    """The run."""

    out: str | None = None
    """Folder of the run. Default: a new one under runs/, or with --resume the one last written to."""
    resume: bool = False
    """Continue a run from its last checkpoint, with the options that it was started with."""
    window_plan: str | None = None
    """File of python -m train moa, in place of --attention: a window for each head, and the plan's number of sinks."""
    start_from: str | None = None
    """Folder of a run whose best parameters to start from, as to train on under a window plan; the model must have the
    like. Default: random ones."""
    seconds: float | None = None
    """Stop, with a checkpoint, once this much time was spent on steps, in all sessions together; evaluations,
    checkpoints and compiling do not count."""
    stop_at: int | None = None
    """Stop, with a checkpoint, after this step; the schedule still spans --steps."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    eval_every: int = 150
    """Steps between two evaluations on held-out text."""
    eval_tokens: int = 65_536
    """Held-out tokens an evaluation reads at most, spread evenly; 0 for all."""
    checkpoint_every: int = 300
    """Steps between two checkpoints; there is also one of the lowest held-out loss, and one at the end."""
    mesh: str | None = None
    """Axes of several devices and their sizes, as in data=2,model=2 or fsdp=4. The batch is cut over data and fsdp;
    heads, the perceptrons' width and the vocabulary over model; parameters and the optimizer's state over fsdp too.
    Without it: one device."""
    distributed: str | None = None
    """Join other processes, for several hosts: HOST:PORT,COUNT,ID with the address of the first process, how many there
    are, and which this is, from 0 on; or auto, where JAX finds them by itself (Slurm, Open MPI). All processes get the
    same options but for ID, with a --mesh of all devices and an --out that all can write to."""
    deterministic: bool = False
    """Have XLA compute the same bits in every run, on a GPU too, where this costs time; a CPU does anyway."""
    prompt: str | None = None
    """What the final sample starts from. Default: the beginning of the held-out text; for images nothing."""
    sample_length: int = 256
    """Tokens that the final sample generates; 0 for no sample."""
    temperature: float = 0.8
    """Of the final sample; 0 takes the likeliest token."""


@dataclass(frozen=True)
class Config:
    """Train a language model with dense or sparse causal attention.

    Other commands: python -m train sample --help, and likewise evaluate, report and moa.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)


def problem(config: Config) -> str | None:
    """What is wrong with the options of data, optimizer and run, or does not go together; None if nothing is."""
    data, optimizer, run = config.data, config.optimizer, config.run
    at_least_one = {
        "seq-len": data.seq_len,
        "batch-size": data.batch_size,
        "steps": optimizer.steps,
        "accumulate": optimizer.accumulate,
        "log-every": run.log_every,
        "eval-every": run.eval_every,
        "checkpoint-every": run.checkpoint_every,
        "stop-at": 1 if run.stop_at is None else run.stop_at,
    }
    above_zero = {
        "lr": optimizer.lr,
        "clip": optimizer.clip,
        "seconds": 1.0 if run.seconds is None else run.seconds,
    }
    not_negative = {
        "warmup": optimizer.warmup,
        "weight-decay": optimizer.weight_decay,
        "eval-tokens": run.eval_tokens,
        "sample-length": run.sample_length,
        "temperature": run.temperature,
        "seed": optimizer.seed,
    }
    for name, number in at_least_one.items():
        if number < 1:
            return f"--{name} must be at least 1, got {number}."
    for name, amount in above_zero.items():
        if not amount > 0:
            return f"--{name} must be above 0, got {amount}."
    for name, amount in not_negative.items():
        if not amount >= 0:
            return f"--{name} must not be negative, got {amount}."
    if data.batch_size % optimizer.accumulate:
        return f"--accumulate must divide --batch-size, got {optimizer.accumulate} for {data.batch_size} sequences."
    if optimizer.seed >= 2**32:
        return f"--seed must be below 2**32, got {optimizer.seed}."
    for layer in config.model.layer_kinds():
        if isinstance(layer.kind, Cudnn) and data.documents == "separate":
            return "--attention cudnn does not go with --documents separate. Take dense."
        if isinstance(layer.kind, Reformer) and layer.kind.num_buckets * (data.seq_len + 1) >= 2**31:
            return (
                f"--attention reformer: num_buckets times --seq-len + 1 must be below 2**31, got "
                f"{layer.kind.num_buckets} buckets for {data.seq_len} tokens."
            )
    if not 0 < data.held_out < 1:
        return f"--held-out must lie between 0 and 1, got {data.held_out}."
    return None
