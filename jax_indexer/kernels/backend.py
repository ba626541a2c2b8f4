"""The Pallas backend that lowers the kernels: Triton. No other module names it."""

import contextvars
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import jax.ref
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import ManualAxisType

# Upstream announces that this backend goes; the versions it is still in are the ones we support.
warnings.filterwarnings(
    "ignore",
    message="The Pallas Triton backend is deprecated",
    category=DeprecationWarning,
)

Implementation = Literal["triton", "xla"]

load = plgpu.load
store = plgpu.store


def add(ref: Any, index: tuple[Any, ...], value: jax.Array) -> None:
    """Adds to elements in memory, atomically; no lane is masked off, so idle ones want a spare."""
    jax.ref.addupdate(ref, index, value)


def _varying_axes(x: jax.Array) -> frozenset:
    return jax.typeof(x).manual_axis_type.varying


def barrier(interpret: bool) -> None:
    """Orders a program's earlier stores before its later loads, among all of its threads."""
    if not interpret:  # which has one thread, and no rule for this
        plgpu.debug_barrier()


_program: contextvars.ContextVar = contextvars.ContextVar("program", default=None)


def program_id() -> jax.Array:
    """The number of this program, among those of its kernel."""
    number = _program.get()
    return pl.program_id(0) if number is None else number


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


def launch(
    kernel: Callable[..., None],
    *operands: jax.Array,
    programs: int,
    out_shape: Sequence[jax.ShapeDtypeStruct],
    num_warps: int,
    aliases: Mapping[int, int] | None = None,
    interpret: bool = False,
) -> Any:
    """Runs `programs` programs of a kernel on whole arrays.

    Every reference is the whole array in device memory: look-ups go anywhere in it, and a block
    that reaches past its end is not masked by itself on a GPU. The grid has one axis, since a
    launch has three at the most and every `vmap` adds one.

    Args:
      kernel: takes a reference for each operand and each output; a profile shows its name.
      *operands: arrays.
      programs: number of programs.
      out_shape: shape and dtype of each output.
      num_warps: warps of 32 threads in a program.
      aliases: operand number to output number, for outputs written in place.
      interpret: run on the CPU, in plain JAX.

    Returns:
      The outputs, in a list.
    """
    # Under shard_map an output varies over every mesh axis that an operand varies over.
    varying = frozenset().union(*(_varying_axes(x) for x in operands))
    varies = ManualAxisType(varying=varying)
    operands = tuple(
        lax.pcast(x, tuple(varying - _varying_axes(x)), to="varying")
        if varying - _varying_axes(x)
        else x
        for x in operands
    )
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    call = pl.pallas_call(
        kernel,
        grid=(programs,),
        in_specs=[anywhere] * len(operands),
        out_specs=[anywhere] * len(out_shape),
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varies) for x in out_shape
        ],
        input_output_aliases=dict(aliases or {}),
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=interpret,
        name=name_of(kernel),
    )
    with jax.enable_x64(False):  # or Python's integers in a kernel would be 64 bits wide
        return call(*operands)


class Launch(NamedTuple):
    """What `launch` takes, for launches that are made together.

    `borrowed` are outputs of others of them, (number of the launch, number of the output), that
    this one reads where the other does not write: their references follow its own.
    """

    kernel: Callable[..., None]
    operands: Sequence[jax.Array]
    programs: int
    out_shape: Sequence[jax.ShapeDtypeStruct]
    aliases: Mapping[int, int] = MappingProxyType({})
    borrowed: Sequence[tuple[int, int]] = ()


def launch_together(
    launches: Sequence[Launch], *, num_warps: int, interpret: bool = False
) -> list[list[jax.Array]]:
    """Makes launches that do not depend on each other as one: each costs a microsecond or more.

    Args:
      launches: of kernels that ask `program_id` for their number.
      num_warps: of all programs.
      interpret: run on the CPU, in plain JAX.

    Returns:
      The outputs of each, in a list.
    """
    operands = [x for part in launches for x in part.operands]
    out_shape = [x for part in launches for x in part.out_shape]

    def together(*refs):
        inputs, outputs = iter(refs[: len(operands)]), iter(refs[len(operands) :])
        written = [[next(outputs) for _ in part.out_shape] for part in launches]
        number = pl.program_id(0)  # from the first program of the part on
        for part, own_outputs in zip(launches, written, strict=True):
            own = [next(inputs) for _ in part.operands] + own_outputs
            own += [written[launch][output] for launch, output in part.borrowed]

            @pl.when((number >= 0) & (number < part.programs))
            def _(kernel=part.kernel, own=own, number=number):
                token = _program.set(number)
                kernel(*own)
                _program.reset(token)

            number -= part.programs

    together.__name__ = "_and_".join(name_of(part.kernel) for part in launches)
    aliases, inputs_before, outputs_before = {}, 0, 0
    for part in launches:
        aliases |= {inputs_before + i: outputs_before + o for i, o in part.aliases.items()}
        inputs_before += len(part.operands)
        outputs_before += len(part.out_shape)
    outputs = iter(
        launch(
            together,
            *operands,
            programs=sum(part.programs for part in launches),
            out_shape=out_shape,
            num_warps=num_warps,
            aliases=aliases,
            interpret=interpret,
        )
    )
    return [[next(outputs) for _ in part.out_shape] for part in launches]


def name_of(kernel: Callable[..., None]) -> str:
    """The name of a kernel function, as a profile shows it."""
    return (kernel.func if isinstance(kernel, functools.partial) else kernel).__name__


def unaddressable(*arrays: Any) -> str | None:
    """Says which array is too large for the 32-bit offsets that the backend computes, or None.

    It changes to 64 bits above 2**32 bytes, but bytes from 2**31 on already need them.
    """
    for x in arrays:
        if x.size >= 2**31 and x.size * x.dtype.itemsize <= 2**32:
            return f"{x.dtype.name}{list(x.shape)} has between 2**31 and 2**32 bytes"
    return None


def dispatch(
    xla: Callable[..., Any],
    triton: Callable[..., Any],
    *arguments: Any,
    implementation: Implementation | None,
) -> Any:
    """Calls what is asked for; None: what suits the arrays' sizes and the program's platform."""
    if implementation is None and unaddressable(*jax.tree.leaves(arguments)):
        implementation = "xla"
    if implementation is None:
        return lax.platform_dependent(*arguments, cuda=triton, default=xla)
    return {"xla": xla, "triton": triton}[implementation](*arguments)


def no_gpu() -> str | None:
    """Says that JAX's default device is no NVIDIA GPU, or None if it is one."""
    device = jax.devices()[0]
    if device.platform == "gpu" and "cuda" in device.client.platform_version.lower():
        return None
    return f"the default device is {device.device_kind}, not an NVIDIA GPU"
