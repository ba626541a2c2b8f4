"""The Pallas backend that lowers the kernels: Triton. No other module names it."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
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

load = plgpu.load
store = plgpu.store


def _varying_axes(x: jax.Array) -> frozenset:
    return jax.typeof(x).manual_axis_type.varying


def barrier(interpret: bool) -> None:
    """Orders a program's earlier stores before its later loads, among all of its threads."""
    if not interpret:  # which has one thread, and no rule for this
        plgpu.debug_barrier()


def launch(
    kernel: Callable[..., None],
    *operands: jax.Array,
    programs: int,
    out_shape: Sequence[jax.ShapeDtypeStruct],
    num_warps: int,
    aliases: dict[int, int] | None = None,
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
        input_output_aliases=aliases or {},
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=interpret,
    )
    with jax.enable_x64(False):  # or Python's integers in a kernel would be 64 bits wide
        return call(*operands)


def unaddressable(*arrays: Any) -> str | None:
    """Says which array is too large for the 32-bit offsets that the backend computes, or None.

    It changes to 64 bits above 2**32 bytes, but bytes from 2**31 on already need them.
    """
    for x in arrays:
        if x.size >= 2**31 and x.size * x.dtype.itemsize <= 2**32:
            return f"{x.dtype.name}{list(x.shape)} has between 2**31 and 2**32 bytes"
    return None


def no_gpu() -> str | None:
    """Says that JAX's default device is no NVIDIA GPU, or None if it is one."""
    device = jax.devices()[0]
    if device.platform == "gpu" and "cuda" in device.client.platform_version.lower():
        return None
    return f"the default device is {device.device_kind}, not an NVIDIA GPU"
