"""The Pallas backend that lowers the kernels: Triton. No other module names it.

A kernel is a function of (program, inputs, outputs): its number among the programs of its launch,
and references by name, each to a whole array in device memory.
"""

import contextlib
import contextvars
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.custom_batching
import jax.numpy as jnp
import jax.ref
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import ManualAxisType

from jax_indexer.config import Implementation
from jax_indexer.memory import in_host_memory, is_on_host, moved_to_device, moved_to_host

# Upstream announces that this backend goes; the versions it is still in are the ones we support.
warnings.filterwarnings(
    "ignore",
    message="The Pallas Triton backend is deprecated",
    category=DeprecationWarning,
)

load = plgpu.load
store = plgpu.store

_is_interpreted: contextvars.ContextVar[bool] = contextvars.ContextVar("interpreted", default=False)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Inside, kernels run on the CPU, in plain JAX, and "triton" is there and what None takes."""
    token = _is_interpreted.set(True)
    try:
        yield
    finally:
        _is_interpreted.reset(token)


def jit(function: Callable[..., Any], static_argnames: Sequence[str]) -> Callable[..., Any]:
    """`jax.jit`, whose cache also knows whether kernels are interpreted."""

    def keyed(*arguments, is_interpreted: bool, **options):
        del is_interpreted
        return function(*arguments, **options)

    keyed.__name__ = function.__name__
    jitted = jax.jit(keyed, static_argnames=(*static_argnames, "is_interpreted"))

    @functools.wraps(function)
    def call(*arguments, **options):
        return jitted(*arguments, is_interpreted=_is_interpreted.get(), **options)

    return call


def add(ref: Any, index: tuple[Any, ...], value: jax.Array) -> None:
    """Adds to elements in memory, atomically; no lane is masked off, so idle ones want a spare."""
    jax.ref.addupdate(ref, index, value)


def barrier() -> None:
    """Orders a program's earlier loads and stores before its later ones, among all its threads."""
    if not _is_interpreted.get():  # the interpreter has one thread, and no rule for this
        plgpu.debug_barrier()


def lanes(number: int) -> jax.Array:
    """int32[number]: 0, 1, and so on, which the compiler does not know to be neighbours.

    It would give a thread neighbours to load and others to store, and exchange them in between.
    """
    return jnp.minimum(jnp.arange(number, dtype=jnp.int32), number - 1)


def cos_and_sin(angle: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of angles in [-pi, pi], off by 2**-20 at the most: one instruction each.

    What serves angles of any size is a hundred, and a kernel that turns keys waited for it.
    """
    if _is_interpreted.get():
        return jnp.cos(angle), jnp.sin(angle)

    def approximate(name: str) -> jax.Array:
        (found,) = plgpu.elementwise_inline_asm(
            f"{name}.approx.f32 $0, $1;",
            args=[angle],
            constraints="=f,f",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(angle.shape, angle.dtype)],
        )
        return found

    return approximate("cos"), approximate("sin")


def split_columns(x: jax.Array) -> list[jax.Array]:
    """The columns of x [n, power of two], each [n]; a thread that holds a row moves nothing."""
    count = x.shape[1]
    parts = lax.split(x, (1,) * count, axis=1) if count > 1 else [x]
    return [part.reshape(x.shape[0]) for part in parts]


def join_columns(columns: Sequence[jax.Array]) -> jax.Array:
    """The inverse of `split_columns`."""
    count = len(columns)
    if count == 1:
        return columns[0].reshape(-1, 1)
    # Two arrays at a time is all that can be joined: [n, count / 2] of even and of odd columns.
    halves = [join_columns(columns[0::2]), join_columns(columns[1::2])]
    return jnp.stack(halves, axis=-1).reshape(-1, count)


@dataclasses.dataclass(frozen=True)
class OutputOf:
    """Among a launch's inputs: an output of one beside it, read where that one does not write."""

    launch: str
    field: str


class Launch(NamedTuple):
    """What is launched.

    Attributes:
      kernel: takes (program, inputs, outputs); a profile shows its name.
      inputs: a NamedTuple of arrays, None for what this launch does without.
      outputs: likewise, of shapes.
      programs: how many programs.
      in_place: fields that inputs and outputs share, and their memory with them.
      state: fields of which every layer has one, in one array; the kernel sees its layer's.
      layer: int32, clipped to the layers there are, or None where `state` has no such axis.
    """

    kernel: Callable[..., None]
    inputs: Any
    outputs: Any
    programs: int
    in_place: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    layer: Any = None


def names_of(tree: Any) -> list[str]:
    """Names of the leaves, in their order: fields, joined by dots."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]


def name_of(kernel: Callable[..., None]) -> str:
    """The name of a kernel function, as a profile shows it."""
    return (kernel.func if isinstance(kernel, functools.partial) else kernel).__name__


class OneLayer:
    """A reference to one layer of an array: like one to an array without the first axis."""

    def __init__(self, ref: Any, layer: Any):
        self._ref, self._layer = ref, layer
        self.shape, self.dtype = ref.shape[1:], ref.dtype

    @property
    def at(self) -> "_LayerAt":
        return _LayerAt(self._ref, self._layer)

    def __getitem__(self, index):
        return self._ref[_of_layer(self._layer, index)]

    def __setitem__(self, index, value):
        self._ref[_of_layer(self._layer, index)] = value


class _LayerAt:
    """What `OneLayer.at` is: it waits for an index."""

    def __init__(self, ref: Any, layer: Any):
        self._ref, self._layer = ref, layer

    def __getitem__(self, index):
        return self._ref.at[_of_layer(self._layer, index)]


def _of_layer(layer: Any, index: Any) -> tuple[Any, ...]:
    return (layer, *(index if isinstance(index, tuple) else (index,)))


def one_layer(what: Launch, references: Any, like: Any, layer: Any) -> Any:
    """References as the kernel sees them, of inputs or outputs that look like `like`."""
    if what.layer is None:
        return references
    leaves, structure = jax.tree.flatten(references)
    seen = []
    for name, ref in zip(names_of(like), leaves, strict=True):
        if name in what.state:
            ref = OneLayer(ref, jnp.clip(layer[0], 0, ref.shape[0] - 1))
        seen.append(ref)
    return jax.tree.unflatten(structure, seen)


def follows(shape: tuple[int, ...], dtype: Any, *arrays: Any) -> jax.ShapeDtypeStruct:
    """An output that differs among devices where these arrays (or None) do, and nowhere else."""
    varying = frozenset().union(*(_varying_axes(x) for x in jax.tree.leaves(arrays)))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=ManualAxisType(varying=varying))


def _varying_axes(x: jax.Array) -> frozenset:
    return jax.typeof(x).manual_axis_type.varying


def launch(what: Launch, *, num_warps: int) -> Any:
    """Runs the programs of a kernel.

    Look-ups go anywhere in an array, and a block that reaches past its end is not masked by itself
    on a GPU, so every reference is a whole array. The grid has one axis, since a launch has three
    at the most and every `vmap` adds one. Inputs may lie in host memory; what is in place stays.

    Args:
      what: the launch.
      num_warps: warps of 32 threads in a program.

    Returns:
      The outputs, by name as in `what.outputs`.
    """
    layer = None if what.layer is None else what.layer.reshape(1)
    operands = what.inputs, layer
    # Under shard_map an output varies over every mesh axis that an operand varies over.
    varying = frozenset().union(*(_varying_axes(x) for x in jax.tree.leaves(operands)))
    varies = ManualAxisType(varying=varying)

    # What has a type of its own, and memory in common with an input, has the type of that.
    typed = {
        name
        for name, x in zip(names_of(what.outputs), jax.tree.leaves(what.outputs), strict=True)
        if x.manual_axis_type is not None
    }

    def varied(x: jax.Array, name: str = "") -> jax.Array:
        missing = tuple(varying - _varying_axes(x))
        keeps = name in what.in_place and name in typed
        return lax.pcast(x, missing, to="varying") if missing and not keeps else x

    def kernel(inputs, layer, outputs):
        inputs = one_layer(what, inputs, what.inputs, layer)
        outputs = one_layer(what, outputs, what.outputs, layer)
        what.kernel(pl.program_id(0), inputs, outputs)

    def shape(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if x.manual_axis_type is not None:
            return x
        return jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varies)

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    places = {name: place for place, name in enumerate(names_of(what.outputs))}
    aliases = {
        place: places[name]
        for place, name in enumerate(names_of(what.inputs))
        if name in what.in_place
    }
    call = pl.pallas_call(
        kernel,
        grid=(what.programs,),
        in_specs=jax.tree.map(lambda _: anywhere, operands),
        # In a tuple of one, or Pallas would take the fields of a NamedTuple for several outputs.
        out_specs=(jax.tree.map(lambda _: anywhere, what.outputs),),
        out_shape=(jax.tree.map(shape, what.outputs),),
        input_output_aliases=aliases,
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=_is_interpreted.get(),
        name=name_of(what.kernel),
    )
    with jax.enable_x64(False):  # or Python's integers in a kernel would be 64 bits wide
        leaves, structure = jax.tree.flatten(what.inputs)
        inputs = jax.tree.unflatten(structure, map(varied, leaves, names_of(what.inputs)))
        if _is_interpreted.get():  # it is plain JAX, which takes arrays of one memory
            inputs = moved_to_device(inputs)
        (outputs,) = call(inputs, jax.tree.map(varied, layer))
    hosts = {
        name
        for name, x in zip(names_of(what.inputs), leaves, strict=True)
        if name in what.in_place and is_on_host(x)
    }
    if not hosts:
        return outputs
    in_place = moved_to_host if _is_interpreted.get() else in_host_memory
    leaves, structure = jax.tree.flatten(outputs)
    named = zip(names_of(what.outputs), leaves, strict=True)
    leaves = [in_place(x) if name in hosts else x for name, x in named]
    return jax.tree.unflatten(structure, leaves)


def launch_together(launches: Mapping[str, Launch], *, num_warps: int) -> dict[str, Any]:
    """Makes launches that do not depend on each other as one: each costs a microsecond or more.

    Args:
      launches: by name; what reads an `OutputOf` another reads what that one finds in place.
      num_warps: of all programs.

    Returns:
      The outputs of each, by the name of its launch.
    """
    borrowed = {
        name: {field: x for field, x in what.inputs._asdict().items() if isinstance(x, OutputOf)}
        for name, what in launches.items()
    }

    def together(program, inputs, outputs):
        number = program  # from the first program of the part on
        for name, part in launches.items():
            others = {
                field: getattr(outputs[x.launch], x.field) for field, x in borrowed[name].items()
            }
            own = inputs[name]._replace(**others)

            @pl.when((number >= 0) & (number < part.programs))
            def _(part=part, number=number, own=own, into=outputs[name]):
                part.kernel(number, own, into)

            number -= part.programs

    together.__name__ = "_and_".join(name_of(part.kernel) for part in launches.values())
    own = {
        name: part.inputs._replace(**dict.fromkeys(borrowed[name]))
        for name, part in launches.items()
    }
    everything = Launch(
        together,
        own,
        {name: part.outputs for name, part in launches.items()},
        sum(part.programs for part in launches.values()),
        tuple(f"{name}.{field}" for name, part in launches.items() for field in part.in_place),
        tuple(
            f"{name}.{field}"
            for name, part in launches.items()
            for field in part.state
            if part.layer is not None
        ),
        next((part.layer for part in launches.values() if part.layer is not None), None),
    )
    return launch(everything, num_warps=num_warps)


def unaddressable(*arrays: Any) -> str | None:
    """Says which array the backend cannot address, or None.

    Its offsets count elements, with a sign: 32 bits up to 2**32 bytes, 64 above. So arrays of one
    byte an element are beyond its reach between 2**31 and 2**32 of them, and no others.
    """
    for x in arrays:
        if x.size > 2**31 and x.size * x.dtype.itemsize <= 2**32:
            return f"{x.dtype.name}{list(x.shape)} has between 2**31 and 2**32 elements of one byte"
    return None


def dispatch(
    xla: Callable[..., Any],
    triton: Callable[..., Any],
    *arguments: Any,
    implementation: Implementation | None,
) -> Any:
    """Calls what is asked for; None: what suits the arrays' sizes and the program's platform.

    Sizes count the axes that `vmap` adds, which is why it passes through here.

    Raises:
      NotImplementedError: for "triton" where arrays are too large, those axes included.
    """
    if implementation == "xla":
        return xla(*arguments)
    if _is_interpreted.get():
        implementation = "triton"
    leaves, structure = jax.tree.flatten(arguments)
    too_large = unaddressable(*leaves)
    if too_large and implementation == "triton":
        raise NotImplementedError(f'implementation: "triton" lacks support: {too_large}; use None')
    if too_large:
        return xla(*arguments)

    @jax.custom_batching.custom_vmap
    def call(*leaves):
        arguments = jax.tree.unflatten(structure, leaves)
        if implementation == "triton":
            return triton(*arguments)
        return lax.platform_dependent(*arguments, cuda=triton, default=xla)

    @call.def_vmap
    def call_on_axis(axis_size, is_batched, *leaves):
        del axis_size
        axes = [0 if batched else None for batched in is_batched]

        def on_axis(function):
            def mapped(*leaves):
                return function(*jax.tree.unflatten(structure, leaves))

            return jax.vmap(mapped, axes)

        out = dispatch(on_axis(xla), on_axis(triton), *leaves, implementation=implementation)
        return out, jax.tree.map(lambda _: True, out)

    return call(*leaves)


def no_gpu() -> str | None:
    """Says that JAX's default device is no NVIDIA GPU, or None if it is one."""
    if _is_interpreted.get():
        return None
    device = jax.devices()[0]
    if device.platform == "gpu" and "cuda" in device.client.platform_version.lower():
        return None
    return f"the default device is {device.device_kind}, not an NVIDIA GPU"
