"""Where arrays lie: on the device, or in pinned host memory that its kernels reach over the bus.

JAX keeps the memory of an array in its type, under `jit`, `scan` and `shard_map` too. Operations of
`jax.numpy` take arrays of one memory alone; kernels take any.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.custom_batching
import numpy as np
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import mlir

PINNED_HOST = "pinned_host"
Tree = TypeVar("Tree")


def is_on_host(x: Any) -> bool:
    """Whether an array, or what stands for one while tracing, lies in host memory."""
    if isinstance(x, (np.ndarray, np.generic)) or not isinstance(x, jax.Array):
        return False
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def moved_to_device(tree: Tree) -> Tree:
    """The arrays of a pytree, copied to the device if they are in host memory."""
    return _moved(tree, is_on_host, jax.memory.Space.Device)


def moved_to_host(tree: Tree) -> Tree:
    """The arrays of a pytree, copied to host memory."""
    return _moved(tree, lambda x: True, jax.memory.Space.Host)


def _moved(tree: Tree, if_it: Callable[[Any], bool], to: Any) -> Tree:
    return jax.tree.map(lambda x: jax.device_put(x, to) if if_it(x) else x, tree)


# A kernel that writes to an array in host memory returns it in the same memory, and Pallas types
# every result as one on the device. This says what is so, and is no operation of the program.
_in_host_memory = Primitive("in_host_memory")
_in_host_memory.def_abstract_eval(lambda x: x.update(memory_space=jax.memory.Space.Host))
mlir.register_lowering(_in_host_memory, lambda context, x: [x])


def in_host_memory(x: Array) -> Array:
    """An array that lies in host memory already, of a type that says so."""
    return _in_host_memory.bind(x)


def not_mapped(tree: Tree, name: str) -> Tree:
    """The same pytree; ValueError where `vmap` maps over it.

    Args:
      tree: arrays of which some are in host memory.
      name: of the argument that they came in.
    """

    @jax.custom_batching.custom_vmap
    def same(*leaves):
        return leaves

    @same.def_vmap
    def refuse(axis_size, is_batched, *leaves):
        raise ValueError(
            f"{name}: expected no axis of jax.vmap over arrays in host memory, got one of "
            f"{axis_size}; give them more rows, or an axis of layers"
        )

    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, same(*leaves))
