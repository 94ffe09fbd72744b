"""Several devices: the mesh that `--mesh` asks for, and which part of each array every device holds.

Without a mesh all of this leaves arrays as they are, on one device.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from models.sharding import AXES, BATCH, parameter_spec
from train.config import Config, OptimizerConfig
from train.data import Batch
from train.errors import TrainError
from train.step import LanguageModel, TrainState, init, train_step

Tree = TypeVar("Tree")


def axis_sizes(mesh: str) -> dict[str, int]:
    """The size of every axis, 1 for those that `--mesh` does not name.

    Raises:
        TrainError: It is no list of axes and sizes.
    """
    sizes: dict[str, int] = {}
    for part in mesh.split(","):
        name, _, size = (text.strip() for text in part.partition("="))
        if name not in AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise TrainError(f"--mesh takes sizes of {', '.join(AXES)}, as in data=2,model=2; got {part.strip()!r}.")
        sizes[name] = int(size)
    return {name: sizes.get(name, 1) for name in AXES}


def mesh_problem(config: Config) -> str | None:
    """Why a run cannot have the mesh that it asks for, in one line; None if it can."""
    if config.run.mesh is None:
        return f"--mesh must be given with {jax.process_count()} processes." if jax.process_count() > 1 else None
    if config.run.out is None and jax.process_count() > 1:
        return "--out must be given with several processes: they all write to one folder."
    if config.run.start_from is not None and jax.process_count() > 1:
        return "--start-from goes with one process: train a step in one, then --resume in several."
    sizes = axis_sizes(config.run.mesh)
    asked, there = math.prod(sizes.values()), jax.device_count()
    if asked > there or (asked < there and jax.process_count() > 1):
        return f"--mesh {config.run.mesh} asks for {asked} devices, and JAX finds {there}."
    at_once = config.data.batch_size // config.optimizer.accumulate
    divided = [
        (("model",), "--heads", config.model.heads),
        (("fsdp",), "--width", config.model.width),
        (BATCH, "--batch-size over --accumulate", at_once),
    ]
    for axes, what, number in divided:
        size = math.prod(sizes[name] for name in axes)
        if number % size:
            return f"--mesh: {' times '.join(axes)} must divide {what}, got {size} for {number}."
    return None


def make_mesh(mesh: str | None, devices: Sequence[jax.Device] | None = None) -> Mesh | None:
    """The first devices as a mesh with the axes of `models.sharding`.

    Args:
        mesh: As `--mesh` has it, or None.
        devices: Those to take the first of; all if None.

    Returns:
        The mesh, whose axes the compiler deals with, or None for None.

    Raises:
        TrainError: `mesh` cannot be read.
    """
    if mesh is None:
        return None
    sizes = tuple(axis_sizes(mesh).values())
    devices = jax.devices() if devices is None else devices
    chosen = np.array(devices[: math.prod(sizes)]).reshape(sizes)
    return Mesh(chosen, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def init_on(mesh: Mesh | None, config: Config, vocab_size: int) -> tuple[LanguageModel, TrainState]:
    """`train.step.init`, where each device makes the part that it holds."""
    models = []

    def make() -> TrainState:
        model, state = init(config.model, config.optimizer, vocab_size=vocab_size, max_length=config.data.seq_len)
        models.append(model)
        return state

    state = make() if mesh is None else jax.jit(make, out_shardings=shardings(mesh, jax.eval_shape(make)))()
    return models[0], state


def shardings(mesh: Mesh, state: Tree) -> Tree:
    """How each array of a training state is cut: parameters, and the optimizer's alike, as their names say."""
    return jax.tree.map_with_path(lambda path, x: NamedSharding(mesh, parameter_spec(path, x.shape, mesh.shape)), state)


def lower_step(
    mesh: Mesh | None, model: LanguageModel, optimizer: OptimizerConfig, state: TrainState, batch: Batch
) -> jax.stages.Lowered:
    """`train.step.train_step` for states and batches like these, ready to be compiled; it donates the state."""
    step = functools.partial(train_step, model, optimizer)
    outputs = None if mesh is None else (shardings(mesh, state), on_all(mesh))
    return lower(mesh, step, state, batch, out_shardings=outputs, donate_argnums=0)


def lower(mesh: Mesh | None, function: Callable[..., Any], *arguments: Any, **options: Any) -> jax.stages.Lowered:
    """`jax.jit(function, **options).lower(*arguments)`, where `models.sharding.cut` knows the mesh."""
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        return jax.jit(function, **options).lower(*arguments)


def on_all(mesh: Mesh) -> NamedSharding:
    """For what every device has all of."""
    return NamedSharding(mesh, P())


def over_batch(mesh: Mesh) -> NamedSharding:
    """For what is cut along its first axis, the batch."""
    return NamedSharding(mesh, P(BATCH))


def rows_to_read(mesh: Mesh | None, batch_size: int) -> tuple[int, int]:
    """Which part of each batch this process has to read, and of how many equal parts.

    Raises:
        TrainError: Processes would need parts that are not equal.
    """
    if mesh is None:
        return 0, 1
    slices = over_batch(mesh).addressable_devices_indices_map((batch_size,)).values()
    bounds = [index[0].indices(batch_size)[:2] for index in slices if index is not None]
    start, stop = min(bound[0] for bound in bounds), max(bound[1] for bound in bounds)
    rows = stop - start
    if start % rows or batch_size % rows:
        raise TrainError(
            f"--mesh: model={mesh.shape['model']} and the {len(mesh.local_devices)} devices of a process must divide "
            f"one another."
        )
    return start // rows, batch_size // rows


def place_rows(mesh: Mesh | None, batch: Batch, batch_size: int) -> Batch:
    """Puts the rows that `rows_to_read` names, of a batch of `batch_size`, on the devices that need them."""
    if mesh is None:
        return batch
    sharding = over_batch(mesh)
    place = lambda x: jax.make_array_from_process_local_data(sharding, x, (batch_size, *x.shape[1:]))
    return jax.tree.map(place, batch)


def place(mesh: Mesh | None, arrays: Tree) -> Tree:
    """Puts arrays that every process has whole, cut along their first axis, on the devices."""
    if mesh is None:
        return arrays
    sharding = over_batch(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), arrays)


def gathered(mesh: Mesh | None, arrays: Tree) -> Tree:
    """Whole arrays on one device of each process; all processes must call it."""
    if mesh is None:
        return arrays
    whole: Callable[[Tree], Tree] = jax.jit(lambda tree: tree, out_shardings=on_all(mesh))
    return jax.tree.map(lambda x: x.addressable_data(0), whole(arrays))
