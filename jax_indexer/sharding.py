"""Arrays on several devices: each works on its own rows and kv heads.

Rows and kv heads never see one another, so what is split by batch and heads needs no exchange
between devices. JAX does not know that: it would gather arrays, and cannot split a kernel. On a
mesh of Explicit axes the types of arrays say how they are split, and the work goes into a
`shard_map`; on one of Auto axes the compiler says so later, and asks by a partitioning rule.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.custom_batching
import jax.extend
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    CompoundFactor,
    SdyShardingRule,
    custom_partitioning,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_indexer._arguments import annotated_arrays

HEADS = ("K", "N")
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


def by_shards(function: Callable[..., Any], **arguments: tuple[str | None, Any]) -> Any:
    """Calls function(shard, *arguments) on each device for the rows and heads that are there.

    Args:
      function: its results are states, or arrays [B]; they have no gradients.
      **arguments: by name, in the order that the function takes them: the letters of an array's
        axes, and the array; or None, and a state, whose letters are known. What is None stays so.

    Returns:
      The function's results, split as the arguments are.

    Raises:
      ValueError: where the types of the arguments say that another axis than B, K or N is split,
        or one of these in two ways.
    """
    values = lax.stop_gradient(tuple(value for _, value in arguments.values()))
    named = [
        x
        for (name, (letters, _)), value in zip(arguments.items(), values, strict=True)
        for x in _named(name, letters, value)
    ]
    meshes = [jax.typeof(x.array).sharding.mesh for x in named]
    if AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types:
        return function(Shard(), *values)
    if explicit := [mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types]:
        return _by_type(function, values, named, explicit[0])
    if jax.device_count() == 1:
        return function(Shard(), *values)
    return _by_rule(function, values, named)


def _named(name: str, letters: str | None, value: Any) -> Iterator[Named]:
    """The arrays of an argument or a result, in the order of its leaves."""
    if value is None:
        return
    if letters is not None:
        yield Named(name, letters.split(), value)
        return
    fields = annotated_arrays(type(value))
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if field.name in fields or dataclasses.is_dataclass(inner):
            of_field = fields[field.name].letters if field.name in fields else None
            yield from _named(f"{name}.{field.name}", of_field, inner)


def _named_results(results: Any) -> list[Named]:
    """Those of a function's results."""
    return [
        x
        for result in (results if isinstance(results, tuple) else (results,))
        for x in _named("", None if dataclasses.is_dataclass(result) else "B", result)
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
    return found.get("B", ((), ""))[0], found.get("heads", ((), ""))[0]


def _by_type(function: Callable, values: tuple, named: Sequence[Named], mesh: Any) -> Any:
    """In a shard_map over the Explicit axes of the mesh."""
    rows, heads = _split_axes(named, (jax.typeof(x.array).sharding.spec for x in named))
    _check_divisible(named, mesh, rows, heads)
    structure = jax.tree.structure(values)
    specs = [_spec(x.letters, rows, heads) for x in named]
    # Of what is whole on each device a part is taken there, which moves nothing.
    leaves = [
        jax.reshard(x.array, NamedSharding(mesh, spec))
        for x, spec in zip(named, specs, strict=True)
    ]
    values = jax.tree.unflatten(structure, leaves)
    whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), values)
    results = jax.eval_shape(lambda *values: function(Shard(), *values), *whole)
    out_specs = (_spec(x.letters, rows, heads) for x in _named_results(results))
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
            devices = 1
            for axis in over:
                devices *= mesh.shape[axis]
            if size % devices:
                raise ValueError(
                    f"{name}: expected an axis {letter} that {devices} devices "
                    f"({', '.join(over)}) can share, got {letter}={size}; split it over fewer"
                )


def _by_rule(function: Callable, values: tuple, named: Sequence[Named]) -> Any:
    """With a rule for the compiler, which alone knows how arrays on a mesh of Auto axes are split.

    A rule has no axis for `vmap`: what is mapped goes without it.
    """
    leaves, structure = jax.tree.flatten(values)

    def on_leaves(shard: Shard, *leaves):
        return jax.tree.leaves(function(shard, *jax.tree.unflatten(structure, leaves)))

    # Traced once: kernels take a while. Constants must be arguments too.
    results = jax.eval_shape(lambda *values: function(Shard(), *values), *values)
    jaxpr = jax.make_jaxpr(lambda *leaves: on_leaves(Shard(), *leaves))(*leaves)
    inputs = [*named, *(Named("", ["constant"] * jnp.ndim(x), x) for x in jaxpr.consts)]
    outputs = _named_results(results)

    def whole(*leaves_and_constants):
        own, constants = leaves_and_constants[: len(leaves)], leaves_and_constants[len(leaves) :]
        with_constants = jax.extend.core.ClosedJaxpr(jaxpr.jaxpr, constants)
        return jax.extend.core.jaxpr_as_fun(with_constants)(*own)

    def partition(mesh, arguments, _):
        rows, heads = _split_axes_if_any(inputs, arguments)
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


def _split_axes_if_any(named: Sequence[Named], inputs: Sequence[Any]) -> tuple[Axes, Axes]:
    """The mesh axes that the first array with rows or heads that are split has them split over."""
    found: dict[str, Axes] = {}
    for (_, letters, _), value in zip(named, inputs, strict=True):
        spec = () if value.sharding is None else value.sharding.spec
        for letter, entry in zip(letters, spec, strict=False):
            if entry and letter in ("B", *HEADS):
                axes = entry if isinstance(entry, tuple) else (entry,)
                found.setdefault("B" if letter == "B" else "heads", axes)
    return found.get("B", ()), found.get("heads", ())


def _rule(inputs: Sequence[Named], outputs: Sequence[Named]) -> SdyShardingRule:
    """Axes of one letter are split alike where it is B, K or N; others have nothing in common."""
    sizes = {
        letter: size
        for _, letters, array in inputs
        for letter, size in zip(letters, array.shape, strict=True)
    }
    group = sizes.get("N", sizes["K"]) // sizes["K"] if "K" in sizes else 1
    of_letter = {"B": "b", "K": "k", "N": CompoundFactor("k", "g") if group > 1 else "k"}
    alone = iter(range(10**6))

    def mapping(x: Named) -> ArrayMapping:
        return ArrayMapping(*(of_letter.get(letter, f"x{next(alone)}") for letter in x.letters))

    of_inputs, of_outputs = (tuple(map(mapping, arrays)) for arrays in (inputs, outputs))
    factors: dict[str, Any] = {"g": group} if group > 1 else {}
    return SdyShardingRule(of_inputs, of_outputs, **factors)
