"""Arrays on several devices: each works on its own rows and kv heads.

Rows and kv heads never see one another, so what is split by batch and heads needs no exchange
between devices. JAX does not know that: it would gather arrays, and cannot split a kernel. On a
mesh of Explicit axes the types of arrays say how they are split, and the work goes into a
`shard_map`; on one of Auto axes the compiler says so later, and asks by a partitioning rule.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.custom_batching
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    SdyShardingRule,
    custom_partitioning,
)
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jax_indexer._arguments import IN_HOST_MEMORY, LAYERS, annotated_arrays, check_choice
from jax_indexer.layout import KVLayout, key_letters
from jax_indexer.memory import in_host_memory, is_on_host
from jax_indexer.state import DecodeCache, PQIndex, sealing_for

HEADS = ("K", "N")
# Axes of the state of cells of which every device that shares a row has its own.
OF_CELLS = ("C**M+1", "segment", "ring")
# Axes of a mesh that an axis of an array is split over.
Axes = tuple[str, ...]


class Shard(NamedTuple):
    """What a device knows of its place: the mesh axes that kv heads are split over."""

    head_axes: Axes = ()

    def first_head(self, kv_heads: int) -> Array:
        """The number of its first kv head, of which it has this many."""
        if not self.head_axes:
            return jnp.int32(0)
        return lax.axis_index(self.head_axes) * kv_heads

    def sum_over_heads(self, x: Array) -> Array:
        """The sum over all devices that hold heads of the same rows."""
        return lax.psum(x, self.head_axes) if self.head_axes else x


class Named(NamedTuple):
    """An array, its name, and the letters of its axes."""

    name: str
    letters: Sequence[str]
    array: Any


def by_shards(
    function: Callable[..., Any],
    *,
    has_gradients: bool = False,
    results: Sequence[str | None] | None = None,
    rows_share: bool = False,
    **arguments: tuple[str | None, Any],
) -> Any:
    """Calls function(shard, *arguments) on each device for the rows and heads that are there.

    Args:
      function: its results are states, or arrays [B] or [B, T, N, H] unless `results` says others.
      has_gradients: whether gradients flow through it: then it is all jnp, which the compiler
        splits by itself on a mesh of Auto axes.
      results: for each of several results the letters of its axes, None for a state.
      rows_share: whether rows have something in common, pages of a cache: then they stay together.
      **arguments: by name, in the order that the function takes them: the letters of an array's
        axes, and the array; or None, and a state, whose letters are known. What is None stays so.

    Returns:
      The function's results, split as the arguments are.

    Raises:
      ValueError: where the types of the arguments say that another axis than B, K or N is split,
        or one of these in two ways.
    """
    values = tuple(value for _, value in arguments.values())
    values = values if has_gradients else lax.stop_gradient(values)
    named = [
        x
        for (name, (letters, _)), value in zip(arguments.items(), values, strict=True)
        for x in _named(name, letters, value)
    ]
    if rows_share:
        named = [
            x._replace(letters=["B, with page_table," if y == "B" else y for y in x.letters])
            for x in named
        ]
    meshes = [jax.typeof(x.array).sharding.mesh for x in named]
    if explicit := [mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types]:
        return _by_type(function, values, named, explicit[0], results)
    # A rule holds for a whole mesh only: of Auto axes beside Manual ones arrays are gathered.
    is_manual = AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types
    if has_gradients or is_manual or jax.device_count() == 1:
        return function(Shard(), *values)
    if any(is_on_host(x.array) for x in named):
        # A rule forgets where arrays lie; those of one device need none.
        if any(mesh.size > 1 for mesh in meshes):
            raise NotImplementedError(
                "caches in host memory are split over Explicit axes, or in a shard_map, got Auto "
                "axes; make the mesh with jax.make_mesh and axis_types of AxisType.Explicit"
            )
        return function(Shard(), *values)
    return _by_rule(function, values, named, results)


def _named(name: str, letters: str | None, value: Any) -> Iterator[Named]:
    """The arrays of an argument or a result, in the order of its leaves."""
    if value is None:
        return
    if letters is not None:
        axes = letters.split()
        # An array of a state may have an axis of layers in front.
        yield Named(name, [LAYERS] * (np.ndim(value) - len(axes)) + axes, value)
        return
    fields = annotated_arrays(type(value))
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if field.name in fields or dataclasses.is_dataclass(inner):
            of_field = fields[field.name].letters if field.name in fields else None
            yield from _named(f"{name}.{field.name}", of_field, inner)


def partition_specs(
    state: Any,
    mesh: Any,
    *,
    rows: str | None = None,
    heads: str | None = None,
    sequence: str | None = None,
    kv_layout: KVLayout = "BSKH",
) -> Any:
    """How the arrays of an index or a cache are split over the axes of a mesh, for `shard_map`.

    Args:
      state: a PQIndex or a DecodeCache of all rows, heads and tokens, with an axis of layers or
        without: arrays or their shapes, as `jax.eval_shape` gives them.
      mesh: the mesh.
      rows: the axis that rows are split over; None where they are not.
      heads: likewise, kv heads.
      sequence: likewise, tokens. The state of "cells" is then what `build_index` or `with_cells`
        makes with this `sequence_axis`: each device has its own, in the last axis of its arrays.
      kv_layout: order of the token and head axes of a cache's keys and values.

    Returns:
      The same structure, of PartitionSpecs.

    Raises:
      ValueError: for anything but an index or a cache, and a mesh, an axis that the mesh does not
        have or that is named twice, rows, heads or tokens that the devices cannot share evenly, and
        `sequence` with keys or values that have other tokens than the index, as those of another
        layout or in pages.
      NotImplementedError: for `sequence` with a cache in host memory.

    Source: CONTRACT.md, section 6.
    """
    if not isinstance(state, (PQIndex, DecodeCache)):
        raise ValueError(
            f"state: expected a PQIndex or a DecodeCache, got {type(state).__name__}; "
            "write the specs of other arrays by hand"
        )
    check_choice("kv_layout", kv_layout, get_args(KVLayout))
    if not isinstance(mesh, (Mesh, AbstractMesh)):
        raise ValueError(
            f"mesh: expected a jax.sharding.Mesh, got {type(mesh).__name__}; make one with "
            "jax.make_mesh"
        )
    used: dict[str, str] = {}
    for name, axis in {"rows": rows, "heads": heads, "sequence": sequence}.items():
        if axis is None:
            continue
        if axis not in mesh.axis_names:
            raise ValueError(
                f"{name}: expected None or one of the mesh's axes {mesh.axis_names}, got {axis!r}; "
                "use one of these"
            )
        if (other := used.setdefault(axis, name)) != name:
            raise ValueError(
                f"{name}: expected another axis of the mesh than {other} has, got {axis!r} for "
                "both; split one of them over another axis"
            )
    if sequence is not None and isinstance(state, DecodeCache) and state.recent is not None:
        raise NotImplementedError(
            f"sequence: {IN_HOST_MEMORY} needs what is recent of a device's own positions, which "
            "is not there yet; split rows or heads"
        )
    axes = {"B": rows, "K": heads, "S": sequence}
    named = [
        # Keys and values are in one of two layouts.
        x._replace(letters=[*x.letters[:-4], *key_letters(kv_layout).split()])
        if "_" in x.letters
        else x
        for x in _named("", None, state)
    ]
    index = state if isinstance(state, PQIndex) else state.index
    capacity = index.codes.shape[-1]
    for name, letters, array in named:
        for letter, size in zip(letters, array.shape, strict=True):
            axis = axes.get(letter)
            if letter == "S" and axis is not None and size != capacity:
                raise ValueError(
                    f"state{name}: expected S={capacity} tokens, as the index has, got S={size} "
                    f"with kv_layout={kv_layout!r}; mind the layout, and split pages by heads alone"
                )
            if axis is not None and size % mesh.shape[axis]:
                raise ValueError(
                    f"state{name}: expected an axis {letter} that {mesh.shape[axis]} devices "
                    f"({axis}) can share, got {letter}={size}; make it a multiple"
                )
    axes |= dict.fromkeys(OF_CELLS, sequence)
    specs = [PartitionSpec(*(axes.get(letter) for letter in x.letters)) for x in named]
    specs = jax.tree.unflatten(jax.tree.structure(state), specs)
    if sequence is None:
        return specs
    if index.cells is None:
        return specs
    own = sealing_for(capacity // mesh.shape[sequence], index.cells.sealing)

    def sealed(specs: PQIndex) -> PQIndex:
        assert specs.cells is not None
        return dataclasses.replace(specs, cells=dataclasses.replace(specs.cells, sealing=own))

    if isinstance(specs, PQIndex):
        return sealed(specs)
    return dataclasses.replace(specs, index=sealed(specs.index))


def _named_results(results: Any, letters: Sequence[str | None] | None) -> list[Named]:
    """Those of a function's results."""

    def usual(result: Any) -> str | None:
        if dataclasses.is_dataclass(result):
            return None
        return "B" if result.ndim == 1 else "B T N H"

    results = results if isinstance(results, tuple) else (results,)
    letters = letters or [usual(result) for result in results]
    return [
        x for axes, result in zip(letters, results, strict=True) for x in _named("", axes, result)
    ]


def _spec(letters: Sequence[str], rows: Axes, heads: Axes) -> PartitionSpec:
    axes = {"B": rows} | dict.fromkeys(HEADS, heads)
    return PartitionSpec(*(axes.get(letter) or None for letter in letters))


def _split_axes(named: Iterable[Named], specs: Iterable[Any]) -> tuple[Axes, Axes]:
    """The mesh axes that rows and heads are split over, by the specs of arrays."""
    found: dict[str, tuple[Axes, str]] = {}
    for (name, letters, _), spec in zip(named, specs, strict=True):
        for letter, entry in zip(letters, spec, strict=False):
            axes = entry if isinstance(entry, tuple) else (entry,)
            if entry is None or not axes:
                continue
            kind = "heads" if letter in HEADS else letter
            if kind not in ("B", "heads"):
                raise ValueError(
                    f"{name}: expected none but axes B, K and N to be split over devices, got "
                    f"{letter} split over {', '.join(axes)}; gather it with jax.reshard"
                )
            before, other = found.setdefault(kind, (axes, name))
            if axes != before:
                raise ValueError(
                    f"{name}: expected axis {letter} to be split over {', '.join(before)}, as in "
                    f"{other}, got {', '.join(axes)}; split both alike with jax.reshard"
                )
    (rows, of_rows), (heads, of_heads) = (found.get(kind, ((), "")) for kind in ("B", "heads"))
    if both := [axis for axis in heads if axis in rows]:
        raise ValueError(
            f"{of_heads}: expected heads to be split over other axes of the mesh than rows are in "
            f"{of_rows}, got {', '.join(both)} for both; split one of them anew with jax.reshard"
        )
    return rows, heads


def _by_type(
    function: Callable,
    values: tuple,
    named: Sequence[Named],
    mesh: Any,
    letters: Sequence[str | None] | None,
) -> Any:
    """In a shard_map over the Explicit axes of the mesh."""
    rows, heads = _split_axes(named, (jax.typeof(x.array).sharding.spec for x in named))
    _check_divisible(named, mesh, rows, heads)
    structure = jax.tree.structure(values)
    specs = [_spec(x.letters, rows, heads) for x in named]
    # Of what is whole on each device a part is taken there, which moves nothing.
    hosts = [is_on_host(x.array) for x in named]
    leaves = [
        # What is in host memory has to be split already.
        x.array if on_host else jax.reshard(x.array, NamedSharding(mesh, spec))
        for x, spec, on_host in zip(named, specs, hosts, strict=True)
    ]
    values = jax.tree.unflatten(structure, leaves)

    def on_one(*leaves):
        there = [
            in_host_memory(x) if on_host else x for x, on_host in zip(leaves, hosts, strict=True)
        ]
        return function(Shard(), *jax.tree.unflatten(structure, there))

    whole = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)
    results = jax.eval_shape(on_one, *whole)
    out_specs = (_spec(x.letters, rows, heads) for x in _named_results(results, letters))
    mapped = jax.shard_map(
        lambda *values: function(Shard(heads), *values),
        mesh=mesh,
        in_specs=jax.tree.unflatten(structure, specs),
        out_specs=jax.tree.unflatten(jax.tree.structure(results), out_specs),
        axis_names={
            name
            for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
            if kind == AxisType.Explicit
        },
    )
    return mapped(*values)


def _check_divisible(named: Sequence[Named], mesh: Any, rows: Axes, heads: Axes) -> None:
    axes = {"B": rows} | dict.fromkeys(HEADS, heads)
    for name, letters, array in named:
        for letter, size in zip(letters, array.shape, strict=True):
            over = axes.get(letter, ())
            devices = math.prod(mesh.shape[axis] for axis in over)
            if size % devices:
                raise ValueError(
                    f"{name}: expected an axis {letter} that {devices} devices "
                    f"({', '.join(over)}) can share, got {letter}={size}; split it over fewer"
                )


def _by_rule(
    function: Callable,
    values: tuple,
    named: Sequence[Named],
    letters: Sequence[str | None] | None,
) -> Any:
    """With a rule for the compiler, which alone knows how arrays on a mesh of Auto axes are split.

    A rule has no axis for `vmap`: what is mapped goes without it.
    """
    leaves, structure = jax.tree.flatten(values)

    def on_leaves(shard: Shard, *leaves):
        return jax.tree.leaves(function(shard, *jax.tree.unflatten(structure, leaves)))

    # Traced here, so that constants can be arguments too.
    on_one = functools.partial(function, Shard())
    jaxpr, results = jax.make_jaxpr(on_one, return_shape=True)(*values)
    inputs = [*named, *(Named("", ["constant"] * jnp.ndim(x), x) for x in jaxpr.consts)]
    outputs = _named_results(results, letters)

    def whole(*leaves_and_constants):
        own, constants = leaves_and_constants[: len(leaves)], leaves_and_constants[len(leaves) :]
        with_constants = jax.extend.core.ClosedJaxpr(jaxpr.jaxpr, constants)
        return jax.extend.core.jaxpr_as_fun(with_constants)(*own)

    def partition(mesh, arguments, _):
        rows, heads = _shared_axes(inputs, arguments, mesh)
        ins, outs = (
            [NamedSharding(mesh, _spec(x.letters, rows, heads)) for x in arrays]
            for arrays in (inputs, outputs)
        )
        return mesh, lambda *own: on_leaves(Shard(heads), *own[: len(leaves)]), outs, tuple(ins)

    partitioned = custom_partitioning(whole)
    partitioned.def_partition(partition=partition, sharding_rule=_rule(inputs, outputs))

    @jax.custom_batching.custom_vmap
    def call(*leaves):
        return partitioned(*leaves, *jaxpr.consts)

    @call.def_vmap
    def call_on_axis(axis_size, is_batched, *leaves):
        del axis_size
        on_axis = jax.vmap(
            jax.extend.core.jaxpr_as_fun(jaxpr),
            [0 if batched else None for batched in is_batched],
        )
        out = on_axis(*leaves)
        return out, [True] * len(out)

    return jax.tree.unflatten(jax.tree.structure(results), call(*leaves))


def _shared_axes(named: Sequence[Named], inputs: Sequence[Any], mesh: Any) -> tuple[Axes, Axes]:
    """The mesh axes that rows and heads are split over, as the first array with such axes has them.

    Where devices cannot share rows or heads evenly, these stay whole.
    """
    found: dict[str, Axes] = {"B": (), "heads": ()}
    sizes: dict[str, int] = {"B": 0, "heads": 0}
    for (_, letters, array), value in zip(named, inputs, strict=True):
        spec = () if value.sharding is None else tuple(value.sharding.spec)
        entries = (*spec, *[None] * (len(letters) - len(spec)))
        for letter, size, entry in zip(letters, array.shape, entries, strict=True):
            kind = "heads" if letter in HEADS else letter
            if kind not in found:
                continue
            sizes[kind] = math.gcd(sizes[kind], size)
            if entry and not found[kind]:
                found[kind] = entry if isinstance(entry, tuple) else (entry,)
    # A mesh axis has one use: where arrays disagree, rows keep it.
    found["heads"] = tuple(axis for axis in found["heads"] if axis not in found["B"])
    for kind, axes in found.items():
        while sizes[kind] % math.prod(mesh.shape[axis] for axis in axes):
            axes = axes[:-1]
        found[kind] = axes
    return found["B"], found["heads"]


def _rule(inputs: Sequence[Named], outputs: Sequence[Named]) -> SdyShardingRule:
    """Axes of one letter are split alike where it is B, K or N; others have nothing in common.

    Nothing is said of K and N together: a part of a mesh axis, as K has where N is split further,
    is more than JAX can name.
    """
    alone = iter(range(10**6))

    def mapping(x: Named) -> ArrayMapping:
        own = (letter if letter in ("B", *HEADS) else f"x{next(alone)}" for letter in x.letters)
        return ArrayMapping(*own)

    of_inputs, of_outputs = (tuple(map(mapping, arrays)) for arrays in (inputs, outputs))
    return SdyShardingRule(of_inputs, of_outputs)
