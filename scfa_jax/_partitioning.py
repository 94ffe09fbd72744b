"""What the compiler cannot partition, taken apart along the axes on which its work is independent.

XLA knows nothing of what a kernel or a loop over tiles does with an axis, and would gather whole arrays on every
device. A function that is `split` runs on each device's own part instead, however the arrays came to be sharded: by
the compiler (auto axes of a mesh), by their types (explicit axes) or by `jax.shard_map` (manual axes). On one device
it is the function itself.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence

import jax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule, custom_partitioning
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

WHOLE = "."  # an axis that each device must have all of
SUMMED = "+"


def split(function: Callable, in_axes: Sequence[str], out_axes: Sequence[str]) -> Callable:
    """Makes a function run on parts of its arguments where these are sharded, without communication.

    Args:
        function: Takes pytrees of arrays and returns a sequence of arrays.
        in_axes: For each argument, a letter for each axis of its arrays: the work is independent along axes with the
            same letter. An axis of 1 is shared by all. `WHOLE` is an axis that the function needs all of.
        out_axes: The same for each result. It may lack a letter, being the same for all parts; with `SUMMED` behind
            the others it is the sum over such parts.

    Returns:
        A function of the same arguments and results, as a tuple. It can be mapped (`jax.vmap`, where the mapped axis
        may be sharded too) but not differentiated.
    """

    def call(*arguments):
        leaves, tree = jax.tree_util.tree_flatten(arguments)
        letters = [axes for axes, x in zip(in_axes, arguments, strict=True) for _ in jax.tree.leaves(x)]
        letters = ["".join(map(_unless_shared, axes, x.shape)) for axes, x in zip(letters, leaves, strict=True)]
        return _mappable(lambda *xs: tuple(function(*jax.tree.unflatten(tree, xs))), letters, list(out_axes))(*leaves)

    return call


def aligned(arrays: Sequence[jax.Array], in_axes: Sequence[str]) -> list[jax.Array]:
    """Gives arrays the types that work on their parts together needs, with gradients that add up again.

    Args:
        arrays: What is to be worked on.
        in_axes: As `split` takes them.

    Returns:
        The arrays, sharded alike along axes of the same letter if their types say how they are sharded, and varying
        over the same devices inside `jax.shard_map`.
    """
    mesh, explicit = _mesh(arrays)
    if explicit:
        shards = _shards_by_type(in_axes, arrays, mesh)
        arrays = [
            jax.sharding.reshard(x, NamedSharding(mesh, _spec(axes, shards)))
            for x, axes in zip(arrays, in_axes, strict=True)
        ]
    varying = frozenset().union(*(jax.typeof(x).mat.varying for x in arrays))
    return [_varying(x, varying) for x in arrays]


def varying_as(like: jax.Array, constants):
    """Arrays that may vary over devices as `like` does: what a loop begins with, where it goes on with such arrays.

    It changes types alone, and only inside `jax.shard_map` (with its default `check_vma`).
    """
    return jax.tree.map(lambda x: _varying(x, jax.typeof(like).mat.varying), constants)


def _varying(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = axes - jax.typeof(x).mat.varying
    return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


def _mesh(arrays: Sequence[jax.Array]):
    """The mesh in context, or else that of the arrays' types, and its explicit axes."""
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(x).sharding.mesh for x in arrays)]
    mesh = next((m for m in meshes if not m.empty), meshes[0])
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return mesh, {name for name, kind in kinds if kind == AxisType.Explicit}


def _unless_shared(letter: str, size: int) -> str:
    return WHOLE if size == 1 else letter


def _mappable(function: Callable, in_axes: list[str], out_axes: list[str]) -> Callable:
    """Under `vmap` the mapped axis is one more along which the work is independent."""
    run = custom_vmap(lambda *arrays: _split(function, in_axes, out_axes, arrays))

    @run.def_vmap
    def _(size, is_mapped, *arrays):
        mapped = jax.vmap(function, [0 if m else None for m in is_mapped], axis_size=size)
        letter = next(x for x in string.ascii_uppercase if not any(x in axes for axes in out_axes))
        letters = [letter + axes if m else axes for m, axes in zip(is_mapped, in_axes, strict=True)]
        results = _mappable(mapped, letters, [letter + axes for axes in out_axes])(*arrays)
        return results, (True,) * len(results)

    return run


def _split(function: Callable, in_axes: list[str], out_axes: list[str], arrays: Sequence[jax.Array]):
    mesh, explicit = _mesh(arrays)
    rest = {name: size for name, size in mesh.shape.items() if name not in mesh.manual_axes}
    arrays = aligned(arrays, in_axes)
    if explicit:
        shards = _shards_by_type(in_axes, arrays, mesh)
        function = jax.shard_map(
            _summed(function, out_axes, shards),
            in_specs=tuple(_spec(axes, shards) for axes in in_axes),
            out_specs=tuple(_spec(axes, shards) for axes in out_axes),
            mesh=mesh,
            axis_names=explicit,
            check_vma=False,  # what is inside has no types for it
        )
    elif not mesh.manual_axes or max(rest.values(), default=1) > 1:
        function = _by_compiler(function, in_axes, out_axes, rest)
    varying = frozenset().union(*(jax.typeof(x).mat.varying for x in arrays))
    return tuple(_varying(x, varying) for x in function(*arrays))


def _by_compiler(function, in_axes, out_axes, axis_sizes):
    """Splits arrays that the compiler shards, as it will say when it partitions the program.

    Inside `jax.shard_map` over some axes of a mesh it shards over the rest, `axis_sizes`, and JAX tells how many parts
    there are but names no axes: no sums can be made over them there, and what asks for one stays whole.
    """

    def plan(mesh, arguments):
        if mesh.empty:
            mesh = AbstractMesh(tuple(axis_sizes.values()), tuple(axis_sizes))
            specs = [_spec_of_parts(x.shape, x.sharding.shard_shape(x.shape), mesh.shape) for x in arguments]
            shards = _shards(in_axes, arguments, specs, mesh.shape)
            summed = [axes for axes in out_axes if axes.endswith(SUMMED)]
            shards = {letter: names for letter, names in shards.items() if all(letter in axes for axes in summed)}
        else:
            shards = _shards(in_axes, arguments, [x.sharding.spec for x in arguments], mesh.shape)
        of = lambda letters: tuple(NamedSharding(mesh, _spec(axes, shards)) for axes in letters)
        return of(in_axes), of(out_axes), shards

    def partition(mesh, arguments, results):
        in_shardings, out_shardings, shards = plan(mesh, arguments)
        return mesh, _summed(function, out_axes, shards), out_shardings, in_shardings

    def infer_sharding(mesh, arguments, results):
        return plan(mesh, arguments)[1]

    def rule(mesh, argument_types, result_types):
        return _sharding_rule(in_axes, out_axes, [x.shape for x in (*argument_types, *result_types)])

    run = custom_partitioning(function)
    run.def_partition(partition, infer_sharding_from_operands=infer_sharding, sharding_rule=rule)
    return run


def _spec_of_parts(shape, part_shape, axis_sizes) -> P:
    """Names mesh axes for a sharding that is known by the shape of its parts; among axes of one size the first."""
    left, spec = dict(axis_sizes), []
    for size, part in zip(shape, part_shape, strict=True):
        parts, names = -(-size // part) if part else 1, []
        for name, count in list(left.items()):
            if parts % count == 0 and count > 1:
                parts //= count
                names.append(name)
                del left[name]
        spec.append(tuple(names))
    return P(*spec)


def _shards_by_type(in_axes, arrays, mesh) -> dict[str, tuple[str, ...]]:
    return _shards(in_axes, arrays, [jax.typeof(x).sharding.spec for x in arrays], mesh.shape)


def _shards(in_axes, arrays, specs, axis_sizes) -> dict[str, tuple[str, ...]]:
    """The mesh axes for each letter: those of the first array that has any, as far as all can have them."""
    shards: dict[str, tuple[str, ...]] = {}
    for axes, spec in zip(in_axes, specs, strict=True):
        for letter, names in zip(axes, spec, strict=False):
            if letter == WHOLE or letter in shards or names in (None, ()):
                continue
            names = names if isinstance(names, tuple) else (names,)
            taken = {name for others in shards.values() for name in others}
            sizes = [x.shape[a.index(letter)] for a, x in zip(in_axes, arrays, strict=True) if letter in a]
            fitting, count = [], 1
            for name in names:
                count *= axis_sizes[name]
                if name in taken or any(size % count for size in sizes):
                    break
                fitting.append(name)
            shards[letter] = tuple(fitting)
    return shards


def _spec(axes: str, shards: dict[str, tuple[str, ...]]) -> P:
    return P(*(shards.get(letter) or None for letter in axes.rstrip(SUMMED)))


def _summed(function, out_axes, shards):
    """Adds up, over the devices that hold parts of it, each result that asks for it."""

    def add_up(x, axes):
        names = tuple(name for letter, names in shards.items() if letter not in axes for name in names)
        return jax.lax.psum(x, names) if names and axes.endswith(SUMMED) else x

    return lambda *arrays: tuple(map(add_up, function(*arrays), out_axes))


def _sharding_rule(in_axes, out_axes, shapes) -> SdyShardingRule:
    """Which axes shard alike, for the Shardy partitioner: those of one letter and size."""
    factors: dict[tuple, str] = {}
    mappings, whole = [], []
    for i, (axes, shape) in enumerate(zip((*in_axes, *out_axes), shapes, strict=True)):
        mapping = []
        for j, (letter, size) in enumerate(zip(axes.rstrip(SUMMED), shape, strict=True)):
            key = (i, j) if letter == WHOLE else (letter, size)
            factor = factors.setdefault(key, f"f{len(factors)}")
            if letter == WHOLE:
                whole.append(factor)
            mapping.append(factor)
        mappings.append(ArrayMapping(*mapping))
    count = len(in_axes)
    return SdyShardingRule(tuple(mappings[:count]), tuple(mappings[count:]), need_replication_factors=tuple(whole))
