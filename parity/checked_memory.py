"""Kernels run program by program on memory that notices what a GPU would not forgive.

Pallas's own interpreter drops a store past the end of an array, starts outputs from a fixed value
and runs programs in order. Here the body of a kernel runs on numpy arrays instead, its programs in
random order, and an AssertionError names the first access that

- lies outside of its array, below 0 included;
- reads an element that nothing has written;
- writes an element that another program wrote or read, or reads one that another program wrote;
- reads an element that the same program wrote, overwrites one that it read, or writes one twice,
  with no barrier in between;
- writes an input.

Threads are not lanes: each access may be spread over a program's threads in another way, and a
vector shorter than the program is held by several. So no access is taken for a thread's own.

Lanes that are masked off may point anywhere. What a launch leaves unwritten is garbage.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jax_indexer.kernels import backend

NOBODY, SEVERAL = -1, -2
# As a number of any type large, or NaN: what reads it wins where it should not.
GARBAGE = 0x7F


class Memory:
    """An array as a kernel sees it: what Pallas calls a reference.

    Attributes:
      name: for messages.
      values: the elements.
      writes: how often each element was written.
    """

    def __init__(self, name: str, values: np.ndarray, *, writable: bool, written: bool):
        self.name = name
        self.values = values
        self.writes = np.zeros(values.shape, np.int32)
        self._writable = writable
        self._has_value = np.full(values.shape, written)
        self._writer = np.full(values.shape, NOBODY)
        self._reader = np.full(values.shape, NOBODY)
        self._written_after = np.full(values.shape, NOBODY)  # how many barriers
        self._read_after = np.full(values.shape, NOBODY)
        self.program = NOBODY
        self.barriers = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> np.dtype:
        return self.values.dtype

    @property
    def at(self) -> "_At":
        return _At(self)

    def __getitem__(self, index) -> jax.Array:
        return load(self.at[index])

    def __setitem__(self, index, value) -> None:
        store(self.at[index], value)

    def lanes(self, index, mask, access: str) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """Which lanes of an access are live, and the positions of these."""
        index = index if isinstance(index, tuple) else (index,)
        if len(index) != self.values.ndim or any(isinstance(i, slice) for i in index):
            raise NotImplementedError(f"{self.name}: only an index array for each axis is there")
        index = np.broadcast_arrays(*(np.asarray(i) for i in index))
        live = np.ones(index[0].shape, bool) if mask is None else np.asarray(mask)
        self.check(live.shape == index[0].shape, f"{access} through a mask of another shape")
        position = tuple(i[live] for i in index)
        for axis, (i, size) in enumerate(zip(position, self.shape, strict=True)):
            outside = i[(i < 0) | (i >= size)]
            self.check(not outside.size, f"{access} at {outside[:3]} of axis {axis}, size {size}")
        return live, position

    def check(self, good: bool, message: str) -> None:
        if not good:
            raise AssertionError(f"{self.name}, program {self.program}: {message}")

    def read(self, position: tuple[np.ndarray, ...]) -> np.ndarray:
        self._check_read(position)
        reader = self._reader[position]
        mine = (reader == NOBODY) | (reader == self.program)
        self._reader[position] = np.where(mine, self.program, SEVERAL)
        self._read_after[position] = self.barriers
        return self.values[position]

    def write(self, position: tuple[np.ndarray, ...], values: np.ndarray) -> None:
        flat = np.ravel_multi_index(position, self.shape)
        self.check(len(np.unique(flat)) == flat.size, "one store writes an element twice")
        self._check_write(position)
        self._writer[position] = self.program
        self._written_after[position] = self.barriers
        self._has_value[position] = True
        self.writes[position] += 1
        self.values[position] = values

    def add(self, position: tuple[np.ndarray, ...], values: np.ndarray) -> None:
        """Adds to what has a value already, atomically: a place may come more than once."""
        self._check_read(position)
        sums = self.values.copy()
        np.add.at(sums, position, values)
        flat = np.unique(np.ravel_multi_index(position, self.shape))
        once = np.unravel_index(flat, self.shape)
        self.write(once, sums[once])

    def _check_read(self, position: tuple[np.ndarray, ...]) -> None:
        self.check(self._has_value[position].all(), "read of an element that nothing has written")
        writer = self._writer[position]
        self.check(self._alone(writer), "read of an element that another program wrote")
        mine = writer == self.program
        self.check(
            not self._fresh(mine, self._written_after, position),
            "read of its own write, no barrier between",
        )

    def _check_write(self, position: tuple[np.ndarray, ...]) -> None:
        self.check(self._writable, "write of an input")
        writer, reader = self._writer[position], self._reader[position]
        self.check(self._alone(writer), "write of an element that another program wrote")
        self.check(self._alone(reader), "write of an element that another program read")
        mine = writer == self.program
        self.check(
            not self._fresh(mine, self._written_after, position), "two writes, no barrier between"
        )
        mine = reader == self.program
        self.check(
            not self._fresh(mine, self._read_after, position),
            "write over its own read, no barrier between",
        )

    def _fresh(self, mine: np.ndarray, after: np.ndarray, position) -> bool:
        """Whether this program's own access, `mine`, has no barrier behind it."""
        return bool((mine & (after[position] == self.barriers)).any())

    def _alone(self, programs: np.ndarray) -> bool:
        return bool(((programs == NOBODY) | (programs == self.program)).all())


class _At:
    """What `reference.at` is: it waits for an index."""

    def __init__(self, memory: Memory):
        self._memory = memory

    def __getitem__(self, index) -> tuple[Memory, object]:
        return self._memory, index


def _garbage(shape: tuple[int, ...], dtype) -> np.ndarray:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return np.full(size, GARBAGE, np.uint8).view(dtype).reshape(shape)


def load(where: tuple[Memory, object], *, mask=None, other=None) -> jax.Array:
    """`backend.load`; lanes that are masked off and have no `other` read garbage."""
    memory, index = where
    live, position = memory.lanes(index, mask, "read")
    lanes = _garbage(live.shape, memory.dtype)
    if other is not None:
        lanes[...] = np.asarray(other)
    lanes[live] = memory.read(position)
    return jnp.asarray(lanes)


def store(where: tuple[Memory, object], value, *, mask=None) -> None:
    """`backend.store`."""
    memory, index = where
    live, position = memory.lanes(index, mask, "write")
    memory.write(position, np.broadcast_to(np.asarray(value), live.shape)[live])


def add(memory: Memory, index, value) -> None:
    """`backend.add`."""
    live, position = memory.lanes(index, None, "addition")
    memory.add(position, np.broadcast_to(np.asarray(value), live.shape)[live])


def _when(condition) -> Callable[[Callable[[], None]], None]:
    def run(body: Callable[[], None]) -> None:
        if condition:
            body()

    return run


def _fori_loop(lower, upper, body, carry):
    for i in range(int(lower), int(upper)):
        carry = body(jnp.int32(i), carry)
    return carry


def _cond(condition, if_true, if_false, *operands):
    return (if_true if condition else if_false)(*operands)


def _while_loop(condition, body, carry):
    while condition(carry):
        carry = body(carry)
    return carry


def _launch(
    what: backend.Launch,
    *,
    num_warps: int,
    order: np.random.Generator,
    record: list[dict[str, np.ndarray]],
) -> Any:
    """`backend.launch`."""
    del num_warps
    kernel = backend.name_of(what.kernel)
    arrays, inputs_tree = jax.tree.flatten(what.inputs)
    shapes, outputs_tree = jax.tree.flatten(what.outputs)
    inputs = {
        name: Memory(f"{kernel}: {name}", np.array(x), writable=False, written=True)
        for name, x in zip(backend.names_of(what.inputs), arrays, strict=True)
    }
    outputs = {
        name: Memory(f"{kernel}: {name}", _garbage(x.shape, x.dtype), writable=True, written=False)
        for name, x in zip(backend.names_of(what.outputs), shapes, strict=True)
    }
    for name in set(what.in_place) & set(inputs):
        values, made = inputs[name].values, outputs[name].values
        assert (values.shape, values.dtype) == (made.shape, made.dtype)
        both = Memory(f"{kernel}: {name}", values, writable=True, written=True)
        inputs[name] = outputs[name] = both
    memories = [*inputs.values(), *outputs.values()]

    def barrier():
        for memory in memories:
            memory.barriers += 1

    layer = None if what.layer is None else what.layer.reshape(1)
    arguments = (
        backend.one_layer(what, jax.tree.unflatten(tree, seen.values()), like, layer)
        for tree, seen, like in (
            (inputs_tree, inputs, what.inputs),
            (outputs_tree, outputs, what.outputs),
        )
    )
    arguments = tuple(arguments)
    for program in order.permutation(what.programs):
        for memory in memories:
            memory.program = int(program)
        with mock.patch.object(backend, "barrier", barrier):
            what.kernel(jnp.int32(program), *arguments)
    record.append({memory.name: memory.writes for memory in outputs.values()})
    made = (jnp.asarray(memory.values) for memory in outputs.values())
    return jax.tree.unflatten(outputs_tree, made)


@contextlib.contextmanager
def checked(seed: int = 0) -> Iterator[list[dict[str, np.ndarray]]]:
    """Inside, launches run on checked memory, outside of any jit.

    Args:
      seed: of the order of the programs.

    Yields:
      A list that grows by one entry a launch: how often each element of each output was written.
    """
    record: list[dict[str, np.ndarray]] = []
    launch = functools.partial(_launch, order=np.random.default_rng(seed), record=record)
    with contextlib.ExitStack() as stack:
        for module, name, replacement in (
            (backend, "launch", launch),
            (backend, "load", load),
            (backend, "store", store),
            (backend, "add", add),
            (backend, "cos_and_sin", lambda angle: (jnp.cos(angle), jnp.sin(angle))),
            (pl, "when", _when),
            (lax, "fori_loop", _fori_loop),
            (lax, "while_loop", _while_loop),
            (lax, "cond", _cond),
        ):
            stack.enter_context(mock.patch.object(module, name, replacement))
        yield record


# What a poisoned output holds before the kernel runs: nothing that a kernel writes, and large.
POISON = {"i": 2_000_000_011, "u": 0xA5, "f": 57344, "V": 57344}


@contextlib.contextmanager
def poisoned() -> Iterator[list[jax.Array]]:
    """Inside, a launch's outputs hold poison beforehand, and end in a row that is no one's.

    The kernel gets outputs that lie in the memory of poisoned operands, with one row more along
    the first axis than it was made for. What it does not write is still poison after it. Outputs
    that are aliased already stay what they are.

    Yields:
      A list that grows by the extra row of each such output; `check_canaries` looks at them. Under
      jit they are traced values, to be returned.
    """
    canaries: list[jax.Array] = []
    real_launch = backend.launch

    def launch(what: backend.Launch, *, num_warps: int) -> Any:
        shapes, outputs_tree = jax.tree.flatten(what.outputs)
        names = backend.names_of(what.outputs)
        given = dict(zip(backend.names_of(what.inputs), jax.tree.leaves(what.inputs), strict=True))
        in_place = set(what.in_place) & set(given)
        taller = {
            name: x
            if name in in_place
            else jax.ShapeDtypeStruct((x.shape[0] + 1, *x.shape[1:]), x.dtype)
            for name, x in zip(names, shapes, strict=True)
        }
        poison = {
            name: jnp.full(x.shape, _poison(x.dtype))
            for name, x in taller.items()
            if name not in in_place
        }

        assert not set(poison) & set(given)

        def on_poison(program, inputs, outputs):
            inputs = jax.tree.unflatten(
                jax.tree.structure(what.inputs), [inputs[name] for name in given]
            )
            outputs = jax.tree.unflatten(outputs_tree, [outputs[name] for name in names])
            what.kernel(program, inputs, outputs)

        on_poison.__name__ = backend.name_of(what.kernel)
        made = real_launch(
            backend.Launch(
                on_poison,
                given | poison,
                taller,
                what.programs,
                tuple(names),
                what.state,
                what.layer,
            ),
            num_warps=num_warps,
        )
        canaries.extend(made[name][-1] for name in poison)
        return jax.tree.unflatten(
            outputs_tree, [made[name][:-1] if name in poison else made[name] for name in names]
        )

    with mock.patch.object(backend, "launch", launch):
        yield canaries


def _poison(dtype) -> np.ndarray:
    dtype = jnp.dtype(dtype)
    return np.asarray(POISON[np.dtype(dtype).kind], dtype)


def check_canaries(canaries: Sequence[jax.Array]) -> None:
    """Raises AssertionError if a kernel wrote into the extra row of an output."""
    for number, row in enumerate(canaries):
        row = np.asarray(row)
        touched = np.argwhere(row != _poison(row.dtype))
        if len(touched):
            raise AssertionError(f"output {number}: wrote past its end, at {touched[0]} of the row")
