"""Windows for the heads of a trained model: `python -m train moa`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from models import ModelConfig
from models.kinds import text_of
from scfa_jax.layers import Dense, Drop
from train.config import Config
from train.data import Corpus, load_corpus
from train.errors import TrainError
from train.files import cannot_be, try_to_write
from train.folder import check_corpus, expanded, facts_of, load_config, moved
from train.metrics import Units
from train.moa import choose, plot
from train.moa.evaluate import held_out_loss
from train.moa.plan import REMEDY, Plan, plan_of, save_plan
from train.moa.profile import calibration, profile
from train.restore import restored
from train.step import LanguageModel, TrainState

# Layers of these kinds have queries, keys and values, and attend to all earlier keys when they are evaluated.
PROFILED = (Dense, Drop)  # Cudnn is Dense as well


@dataclass(frozen=True)
class MoaOptions:
    """Give each head of a trained dense model a window of its own (MoA, Fu et al. 2024), and evaluate it.

    Writes the plan, the plan of one window for all heads at the same density (-uniform.json) and a plot (.png).
    """

    run: tyro.conf.Positional[str]
    """Folder of the run."""
    out: str | None = None
    """File for the plan. Default: plan.json in the run's folder."""
    data: str | None = None
    """Text to profile and evaluate on, as in training. Default: what the run was trained on."""
    checkpoint: Literal["best", "last"] = "best"
    """The one with the lowest held-out loss, or the last one."""
    density: float = 0.25
    """Share of the causal pairs that the heads may keep on average, at each of the lengths."""
    lengths: tuple[int, ...] = ()
    """Lengths to profile, in tokens; windows follow the length by what they differ in. Default: a quarter, a half and
    all of the run's sequences."""
    sinks: int = 4
    """Tokens at the beginning of a sequence that every head keeps in sight."""
    objective: choose.Objective = "mean"
    """What the plan makes least: the mean over the lengths of the predicted losses, or the largest."""
    count: choose.Count = "together"
    """What is predicted: the loss where each query loses all that lies beyond its window, or, as in the paper, where it
    loses these pairs one by one."""
    tokens: int = 65_536
    """Tokens of the training part to profile on at each length, about; 0 for all."""
    eval_tokens: int = 65_536
    """Held-out tokens an evaluation reads at most, spread evenly; 0 for all."""

    def problem(self) -> str | None:
        """What is wrong with these options, in one line; None if nothing is."""
        if not 0 < self.density <= 1:
            return f"--density must be above 0 and at most 1, got {self.density}."
        for name, number in (("sinks", self.sinks), ("tokens", self.tokens), ("eval-tokens", self.eval_tokens)):
            if number < 0:
                return f"--{name} must not be negative, got {number}."
        for length in self.lengths:
            if length < 2:
                return f"--lengths must be at least 2, got {length}."
        if self.out is not None and not self.out.endswith(".json"):
            return f"--out must end in .json, got {self.out}."
        return None


def moa(options: MoaOptions) -> int:
    """Makes a plan for a run's model.

    Args:
        options: From the command line.

    Returns:
        The exit code 0.

    Raises:
        TrainError: The folder holds no run or no checkpoint, its model has no such attention, a length does not fit, or
            an option makes no sense.
    """
    problem = options.problem()
    if problem:
        raise TrainError(problem)
    folder = expanded("run", options.run)
    config = load_config(folder)
    path = folder / "plan.json" if options.out is None else expanded("out", options.out)
    _check_model(config.model)
    # In batches that fit where a part of a training step does.
    data = dataclasses.replace(config.data, batch_size=config.data.batch_size // config.optimizer.accumulate)
    config = moved(dataclasses.replace(config, data=data), options.data, None)
    data = config.data
    corpus = load_corpus(data)
    if options.data is None:
        check_corpus(folder, corpus)
    lengths = _lengths(options, config, corpus)
    files = _files(path)
    model, state = restored(folder, config, corpus, options.checkpoint)
    profiles = []
    for length in lengths:
        print(f"profiling {length} tokens a sequence")
        cut = calibration(data, length)
        profiles.append(profile(model, state, corpus, cut, options.sinks, options.tokens))
    plans, record = _choose(options, config.model, lengths, profiles)
    record |= {"run": folder.name, "step": int(state.step), **facts_of(corpus)}
    record["evaluation"] = _evaluate(options, config, corpus, model, state, plans)
    _write(files, plans, record, lengths, profiles)
    print(f"wrote {', '.join(map(str, files))}")
    return 0


def _check_model(model: ModelConfig) -> None:
    unknown = [layer for layer in model.layer_kinds() if not isinstance(layer.kind, PROFILED)]
    if unknown:
        raise TrainError(
            f"moa profiles layers of dense, cudnn and drop, and the run has {text_of(unknown[:1])}. Name another run."
        )


def _lengths(options: MoaOptions, config: Config, corpus: Corpus) -> tuple[int, ...]:
    """The lengths to profile, in ascending order."""
    whole = config.data.seq_len
    lengths = set(options.lengths)
    if corpus.unit == "pixel":
        if lengths - {whole}:
            raise TrainError(f"--lengths must be {whole}, that of an image, got {max(lengths - {whole})}.")
        return (whole,)
    if not lengths:
        return tuple(length for length in (whole // 4, whole // 2, whole) if length >= 2)
    longest = corpus.train.size - 1
    if max(lengths) > longest:
        raise TrainError(f"--lengths must be at most {longest}, the training part, got {max(lengths)}.")
    if config.model.positions == "learned" and max(lengths) > whole:
        raise TrainError(f"--lengths must be at most {whole}, the learned positions, got {max(lengths)}.")
    return tuple(sorted(lengths))


def _choose(
    options: MoaOptions, model: ModelConfig, lengths: Sequence[int], profiles: Sequence[np.ndarray]
) -> tuple[dict[str, Plan], dict[str, Any]]:
    """The plan and the uniform one, and what to record of them."""
    uniform = choose.uniform(options.density, options.sinks, lengths)
    # With the uniform rule among them, no plan is predicted to lose more than it.
    rules = np.concatenate([choose.candidates(lengths), uniform[None]])
    windows = [choose.windows(rules, length) for length in lengths]
    losses = np.stack(
        [
            choose.lost(p, window, options.count).reshape(-1, len(rules))
            for p, window in zip(profiles, windows, strict=True)
        ]
    )
    costs = np.stack(
        [choose.densities(window, options.sinks, length) for window, length in zip(windows, lengths, strict=True)]
    )
    choice = choose.choose(losses, costs, options.density, options.objective)
    shape = model.layers, model.heads, 2
    plans = {
        "plan": plan_of(rules[choice.rules].reshape(shape), options.sinks, model),
        "uniform": plan_of(np.broadcast_to(uniform, shape), options.sinks, model),
    }
    predicted = {
        name: [
            float(choose.lost(p, plan.windows(length)[..., None], options.count).sum())
            for p, length in zip(profiles, lengths, strict=True)
        ]
        for name, plan in plans.items()
    }
    record = {
        "density": options.density,
        "objective": options.objective,
        "count": options.count,
        "rules_to_choose_from": len(rules),
        "objective_value": choice.objective,
        "objective_bound": choice.bound,
        "lengths": list(lengths),
        "densities": {name: [plan.density(length) for length in lengths] for name, plan in plans.items()},
        "predicted_loss": predicted,
        "influence": [float(p[:, 0].sum()) for p in profiles],
        "influence_of_sinks": [float(p[:, 1].sum()) for p in profiles],
    }
    return plans, record


def _evaluate(
    options: MoaOptions, config: Config, corpus: Corpus, model: LanguageModel, state: TrainState, plans: dict[str, Plan]
) -> dict[str, Any]:
    """Held-out bits of the dense model and under each plan, at the length of the run's sequences."""
    units = Units(corpus, read=(config.data, options.eval_tokens))
    bits = {}
    for name, plan in {"dense": None, **plans}.items():
        nats = held_out_loss(config, corpus, state, plan, options.eval_tokens)
        bits[name] = units.bits(nats)
        density = 1.0 if plan is None else plan.density(config.data.seq_len)
        print(f"{name}: held-out {bits[name]:.4f} bits per {units.name} at density {density:.4f}")
    return {"length": config.data.seq_len, f"held_out_bits_per_{units.name}": bits}


def _files(path: Path) -> list[Path]:
    """Those of the plan, the uniform one and the plot, which can be written: to profile takes long."""
    files = [path, path.with_name(f"{path.stem}-uniform.json"), path.with_suffix(".png")]
    for file in files:
        try:
            try_to_write(file)
        except OSError as error:
            raise cannot_be("written", file, error, REMEDY) from None
    return files


def _write(
    files: Sequence[Path],
    plans: dict[str, Plan],
    record: dict[str, Any],
    lengths: Sequence[int],
    profiles: Sequence[np.ndarray],
) -> None:
    save_plan(files[0], plans["plan"], record)
    save_plan(files[1], plans["uniform"], record)
    try:
        plot.plot_plan(plans["plan"], plans["uniform"], lengths, profiles[-1], files[2])
    except OSError as error:
        raise cannot_be("written", files[2], error, REMEDY) from None
