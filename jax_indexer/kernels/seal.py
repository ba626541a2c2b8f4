"""Cells are kept up to date: a segment of the tail goes into the lists, a little at every step."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from jax_indexer.kernels import backend
from jax_indexer.kernels.step import Lengths, Step, raised_in
from jax_indexer.state import MOST_NEW, RATE, Cells, Progress, Sealing, progress, sealed_at

# Tokens that are counted at once: all of a step.
COUNTED_AT_ONCE = RATE * MOST_NEW


class State(NamedTuple):
    """The arrays of `Cells` that a step changes: i32[R, 2, cells + 1], [R, S] and so on."""

    starts: Any
    order: Any
    earlier: Any
    ring: Any


class Inputs(NamedTuple):
    """What an append does, and the state before it, which is not read by these names."""

    before: Lengths  # the step
    base: Any  # i32[B]
    codes: Any  # u8[R, M, S]; tokens that are being appended are not read
    starts: Any
    order: Any
    earlier: Any
    ring: Any


class Sealer(NamedTuple):
    """One program's view of its kv row.

    Attributes:
      step, sealing, codes, state: of the launch.
      kv_row: the program's.
      sealed: the position up to which candidates are sealed before the step.
      was, now: how far the next segment is before the step and after it.
    """

    step: Step
    sealing: Sealing
    codes: Any
    state: State
    kv_row: Array
    sealed: Array
    was: Progress
    now: Progress

    def cells_at(self, position: Array, exists: Array | None = None) -> Array:
        """Cell numbers of tokens."""
        number = jnp.zeros(position.shape, jnp.int32)
        for m in range(self.step.config.num_subspaces):
            other = None if exists is None else 0
            code = backend.load(self.codes.at[self.kv_row, m, position], mask=exists, other=other)
            digit = code.astype(jnp.int32) & (self.step.config.num_centroids - 1)
            number = number * self.step.config.num_centroids + digit
        return number

    def starts(self, which: int, cell: Array, exists: Array | None = None) -> Array:
        """Old starts (0), or new ones or counts (1)."""
        other = None if exists is None else 0
        return backend.load(
            self.state.starts.at[self.kv_row, which, cell], mask=exists, other=other
        )

    def for_each_start(self, visit, carry=0) -> None:
        """visit(cells, which of them exist, carry) for all of them, some at once."""
        num_cells, at_once = self.step.config.num_cells, self.step.tuning.starts_at_once

        def some(i, carry):
            cell = i * at_once + jnp.arange(at_once, dtype=jnp.int32)
            return visit(cell, cell <= num_cells, carry)

        lax.fori_loop(0, pl.cdiv(num_cells + 1, at_once), some, carry)

    def count_tokens(self) -> None:
        """Counts the step's tokens of the segment: per cell, and for each those before it."""
        state, kv_row, num_cells = self.state, self.kv_row, self.step.config.num_cells
        lane = jnp.arange(COUNTED_AT_ONCE, dtype=jnp.int32)
        token = self.was.counted + lane
        exists = token < self.now.counted
        cell = self.cells_at(self.sealed + token, exists)
        cell = jnp.where(exists, cell, num_cells)  # where nothing else is
        earlier = self.starts(1, cell, exists)
        same = cell[None, :] == cell[:, None]
        before, behind = lane[None, :] < lane[:, None], lane[None, :] > lane[:, None]
        earlier += jnp.sum((same & before).astype(jnp.int32), axis=1)
        later = jnp.sum((same & behind).astype(jnp.int32), axis=1)
        backend.store(state.earlier.at[kv_row, token], earlier, mask=exists)
        backend.barrier()
        # The last token of a cell knows how many there are.
        is_last = exists & (later == 0)
        into = jnp.where(is_last, cell, num_cells + 1)
        backend.store(state.starts.at[kv_row, 1, into], earlier + 1, mask=is_last)

    def add_up(self) -> None:
        """Makes new starts of the counts."""

        def add(cell, exists, so_far):
            old, own = (self.starts(which, cell, exists) for which in (0, 1))
            new = old + so_far + jnp.cumsum(own) - own
            backend.barrier()  # so that all threads have read what is overwritten
            into = self.state.starts.at[self.kv_row, 1, cell]
            backend.store(into, new, mask=exists)
            return so_far + jnp.sum(own)

        self.for_each_start(add, jnp.int32(0))

    def entries_of(self, block: Array, part: Array) -> tuple[Array, Array]:
        """One part of a block's entries, and their places in the ring."""
        at_once, _ = parts_of(self.step, self.sealing)
        offset = part * at_once + jnp.arange(at_once, dtype=jnp.int32)
        entry = self.was.entries - (block + 1) * self.sealing.block + offset
        return entry, block % (2 * MOST_NEW) * self.sealing.block + offset

    def read_blocks(self, part: Array) -> None:
        """Reads its part of the step's blocks into the ring."""
        state, kv_row = self.state, self.kv_row

        def read(block, carry):
            entry, slot = self.entries_of(block, part)
            position = backend.load(state.order.at[kv_row, entry], mask=entry >= 0, other=0)
            backend.store(state.ring.at[kv_row, slot], position)
            return carry

        lax.fori_loop(self.was.read, self.now.read, read, 0)

    def write_blocks(self, part: Array) -> None:
        """Writes its part of the step's blocks from the ring to their new places."""
        state, kv_row, capacity = self.state, self.kv_row, self.step.S

        def write(block, carry):
            entry, slot = self.entries_of(block, part)
            exists = entry >= 0
            position = jnp.clip(backend.load(state.ring.at[kv_row, slot]), 0, capacity - 1)
            cell = self.cells_at(position)
            shift = self.starts(1, cell) - self.starts(0, cell)
            into = jnp.where(exists, jnp.clip(entry + shift, 0, capacity - 1), capacity)
            backend.store(state.order.at[kv_row, into], position, mask=exists)
            return carry

        lax.fori_loop(self.was.moved, self.now.moved, write, 0)

    def fill_in(self) -> None:
        """Writes the segment's tokens into the gaps."""
        tokens = min(self.sealing.segment, self.step.tuning.filled_at_once)

        def fill(i, carry):
            token = i * tokens + jnp.arange(tokens, dtype=jnp.int32)
            cell = self.cells_at(self.sealed + token)
            size = self.starts(0, cell + 1) - self.starts(0, cell)
            earlier = backend.load(self.state.earlier.at[self.kv_row, token])
            into = jnp.clip(self.starts(1, cell) + size + earlier, 0, self.step.S - 1)
            backend.store(self.state.order.at[self.kv_row, into], self.sealed + token)
            return carry

        lax.fori_loop(0, self.sealing.segment // tokens, fill, 0)

    def take_over(self) -> None:
        """Makes the new starts the old ones, and the counts of the next segment zero."""
        into = self.state.starts

        def move(cell, exists, carry):
            new = self.starts(1, cell, exists)
            backend.store(into.at[self.kv_row, 0, cell], new, mask=exists)
            backend.barrier()  # or one thread's zeros would be what another reads
            backend.store(into.at[self.kv_row, 1, cell], jnp.zeros_like(new), mask=exists)
            return carry

        self.for_each_start(move)


def seal_kernel(program, inputs: Inputs, outputs: State, *, step: Step, sealing: Sealing):
    # Of a kv row the first program counts and fills, some read blocks, and as many write them: what
    # one writes, no other needs in the same step (see `progress`).
    parts = parts_of(step, sealing)[1]
    kv_row, job = program // (1 + 2 * parts), program % (1 + 2 * parts)
    row = kv_row // step.K
    before, after = raised_in(step, inputs.before, row)
    base, reach, span = inputs.base[row], step.S, inputs.before.span(step)
    if span is not None:
        before, after = (span.length(x, sealing) for x in (before, after))
        base, reach, sealing = span.clip(base), span.reach(sealing), span.of_sealing(sealing)
    sealed = sealed_at(before, base, sealing, reach)
    was = progress(before, sealed, sealing, reach)
    now = progress(after, sealed, sealing, reach)
    sealer = Sealer(step, sealing, inputs.codes, outputs, kv_row, sealed, was, now)

    @pl.when((job == 0) & (now.counted > was.counted))
    def _():
        sealer.count_tokens()

        @pl.when(now.begun)
        def _():
            backend.barrier()
            sealer.add_up()

    @pl.when((job > 0) & (job <= parts))
    def _():
        sealer.read_blocks(job - 1)

    @pl.when(job > parts)
    def _():
        sealer.write_blocks(job - 1 - parts)

    @pl.when((job == 0) & now.done & ~was.done)
    def _():
        sealer.fill_in()
        backend.barrier()
        sealer.take_over()


def parts_of(step: Step, sealing: Sealing) -> tuple[int, int]:
    """Entries of a block that a program moves, and programs that share a block."""
    at_once = min(sealing.block, step.tuning.moved_at_once)
    return at_once, sealing.block // at_once


def seal_launch(
    step: Step, cells: Cells, before: Lengths, codes: backend.OutputOf, layer: Array | None = None
) -> backend.Launch:
    """The launch that does what falls due in the cells for an append; see `cells.grow`.

    Args:
      step: of which at most MOST_NEW tokens are new.
      cells: the state before.
      before: lengths and high water before the step, and how many tokens rows are to take.
      codes: the codes that a launch beside this one writes.
      layer: of the state.

    Returns:
      A launch with outputs `State`, in the memory of the state before.
    """
    state = State(cells.starts, cells.order, cells.earlier, cells.ring)
    state = State(*(step.by_rows(x) for x in state))
    parts = parts_of(step, cells.sealing)[1]
    return backend.Launch(
        functools.partial(seal_kernel, step=step, sealing=cells.sealing),
        Inputs(before, cells.base, codes, *state),
        State(*(jax.ShapeDtypeStruct(x.shape, np.int32) for x in state)),
        programs=step.R * (1 + 2 * parts),
        in_place=State._fields,
        state=("before.lengths", "before.high_water", "base", *State._fields),
        layer=layer,
    )
