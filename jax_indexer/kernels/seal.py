"""Cells are kept up to date: a segment of the tail goes into the lists, a little at every step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jaxtyping import Int32

from jax_indexer.cells import MOST_NEW, RATE, Cells, SealPlan, progress, sealed_at
from jax_indexer.config import IndexerConfig
from jax_indexer.kernels import backend

# Cells whose starts are added up at once, tokens that are counted, and that are put into lists.
STARTS_AT_ONCE = 1024
COUNTED_AT_ONCE = RATE * MOST_NEW  # all of a step
FILLED_AT_ONCE = 512
# Entries of a block that a program moves.
ENTRIES_AT_ONCE = 256


def seal_kernel(
    before_ref,  # i32[B]  tokens before the append
    after_ref,  # i32[B]   and after it
    base_ref,  # i32[B]
    _starts_before_ref,
    _order_before_ref,
    _earlier_before_ref,
    _ring_before_ref,
    starts_ref,  # i32[R, 2, cells + 1], in the memory of those before
    order_ref,  # i32[R, S], likewise, as are those that follow
    earlier_ref,  # i32[R, segment]
    ring_ref,  # i32[R, 2 * MOST_NEW * block]
    codes_ref,  # u8[R, M, S]; tokens that are being appended are not read
    *,
    plan: SealPlan,
    config: IndexerConfig,
    interpret: bool,
):
    num_rows, num_subspaces, capacity = codes_ref.shape
    num_cells, segment = config.num_cells, plan.segment
    at_once, parts = _parts(plan)
    # Of a row the first program counts and fills, some read blocks, and as many write them: what
    # one writes, no other needs in the same step (see `progress`).
    program = backend.program_id()
    row, job = program // (1 + 2 * parts), program % (1 + 2 * parts)
    batch_row = row // (num_rows // base_ref.shape[0])
    sealed = sealed_at(before_ref[batch_row], base_ref[batch_row], plan, capacity)
    was = progress(before_ref[batch_row], sealed, plan, capacity)
    now = progress(after_ref[batch_row], sealed, plan, capacity)

    def barrier():
        backend.barrier(interpret)

    def cells_at(position, exists=None) -> Array:
        number = jnp.zeros(position.shape, jnp.int32)
        for m in range(num_subspaces):
            other = None if exists is None else 0
            code = backend.load(codes_ref.at[row, m, position], mask=exists, other=other)
            digit = code.astype(jnp.int32) & (config.num_centroids - 1)
            number = number * config.num_centroids + digit
        return number

    def for_each_start(visit, carry=0):
        def step(i, carry):
            cell = i * STARTS_AT_ONCE + jnp.arange(STARTS_AT_ONCE, dtype=jnp.int32)
            return visit(cell, cell <= num_cells, carry)

        return lax.fori_loop(0, pl.cdiv(num_cells + 1, STARTS_AT_ONCE), step, carry)

    @pl.when((job == 0) & (now.counted > was.counted))
    def _():
        lane = jnp.arange(COUNTED_AT_ONCE, dtype=jnp.int32)
        token = was.counted + lane
        exists = token < now.counted
        cell = cells_at(sealed + token, exists)
        cell = jnp.where(exists, cell, num_cells)  # where nothing else is
        earlier = backend.load(starts_ref.at[row, 1, cell], mask=exists, other=0)
        same = cell[None, :] == cell[:, None]
        before, behind = lane[None, :] < lane[:, None], lane[None, :] > lane[:, None]
        earlier += jnp.sum((same & before).astype(jnp.int32), axis=1)
        later = jnp.sum((same & behind).astype(jnp.int32), axis=1)
        backend.store(earlier_ref.at[row, token], earlier, mask=exists)
        barrier()
        # The last token of a cell knows how many there are.
        is_last = exists & (later == 0)
        into = jnp.where(is_last, cell, num_cells + 1)
        backend.store(starts_ref.at[row, 1, into], earlier + 1, mask=is_last)

        @pl.when(now.begun)
        def _():
            barrier()

            def add_up(cell, exists, so_far):
                old, own = (
                    backend.load(starts_ref.at[row, which, cell], mask=exists, other=0)
                    for which in (0, 1)
                )
                new = old + so_far + jnp.cumsum(own) - own
                barrier()  # so that all threads have read what is overwritten
                backend.store(starts_ref.at[row, 1, cell], new, mask=exists)
                return so_far + jnp.sum(own)

            for_each_start(add_up, jnp.int32(0))

    def part_of(block) -> tuple[Array, Array]:
        """This program's entries of a block, and where they are in the ring."""
        offset = (job - 1) % parts * at_once + jnp.arange(at_once, dtype=jnp.int32)
        entry = was.entries - (block + 1) * plan.block + offset
        return entry, block % (2 * MOST_NEW) * plan.block + offset

    @pl.when((job > 0) & (job <= parts))
    def _():
        def read(block, carry):
            entry, slot = part_of(block)
            exists = entry >= 0
            position = backend.load(order_ref.at[row, entry], mask=exists, other=0)
            backend.store(ring_ref.at[row, slot], position)
            return carry

        lax.fori_loop(was.read, now.read, read, 0)

    @pl.when(job > parts)
    def _():
        def write(block, carry):
            entry, slot = part_of(block)
            exists = entry >= 0
            position = jnp.clip(backend.load(ring_ref.at[row, slot]), 0, capacity - 1)
            cell = cells_at(position)
            old, new = (backend.load(starts_ref.at[row, which, cell]) for which in (0, 1))
            into = jnp.where(exists, jnp.clip(entry + new - old, 0, capacity - 1), capacity)
            backend.store(order_ref.at[row, into], position, mask=exists)
            return carry

        lax.fori_loop(was.moved, now.moved, write, 0)

    @pl.when((job == 0) & now.done & ~was.done)
    def _():
        tokens = min(segment, FILLED_AT_ONCE)

        def fill(i, carry):
            token = i * tokens + jnp.arange(tokens, dtype=jnp.int32)
            cell = cells_at(sealed + token)
            old, old_end, new = (
                backend.load(starts_ref.at[row, which, cell + offset])
                for which, offset in ((0, 0), (0, 1), (1, 0))
            )
            earlier = backend.load(earlier_ref.at[row, token])
            into = jnp.clip(new + old_end - old + earlier, 0, capacity - 1)
            backend.store(order_ref.at[row, into], sealed + token)
            return carry

        lax.fori_loop(0, segment // tokens, fill, 0)
        barrier()

        def take_over(cell, exists, carry):
            new = backend.load(starts_ref.at[row, 1, cell], mask=exists, other=0)
            backend.store(starts_ref.at[row, 0, cell], new, mask=exists)
            barrier()  # or one thread's zeros would be what another reads
            backend.store(starts_ref.at[row, 1, cell], jnp.zeros_like(new), mask=exists)
            return carry

        for_each_start(take_over)


def _parts(plan: SealPlan) -> tuple[int, int]:
    """Entries of a block that a program moves, and programs that share a block."""
    at_once = min(plan.block, ENTRIES_AT_ONCE)
    return at_once, plan.block // at_once


def seal_launch(
    cells: Cells,
    before: Int32[Array, "B"],
    after: Int32[Array, "B"],
    config: IndexerConfig,
    codes: tuple[int, int],
    *,
    interpret: bool,
) -> backend.Launch:
    """The launch that does for `before` to `after` tokens what falls due; see `cells.grow`.

    Args:
      cells: the state before.
      before: tokens in each row before the append.
      after: tokens after it, MOST_NEW more at the most.
      config: what the index was built with.
      codes: the output of a launch beside this one that holds the codes uint8[R, M, S].
      interpret: run on the CPU.

    Returns:
      A launch whose outputs are starts [R, 2, C**M + 1], order [R, S], earlier [R, segment] and
      ring [R, 2 * MOST_NEW * block], in place.
    """
    rows = cells.starts.shape[0] * cells.starts.shape[1]
    state = cells.starts, cells.order, cells.earlier, cells.ring
    state = [x.reshape(rows, *x.shape[2:]) for x in state]
    _, parts = _parts(cells.plan)
    return backend.Launch(
        functools.partial(seal_kernel, plan=cells.plan, config=config, interpret=interpret),
        [before, after, cells.base, *state],
        programs=rows * (1 + 2 * parts),
        out_shape=[jax.ShapeDtypeStruct(x.shape, np.int32) for x in state],
        aliases={3: 0, 4: 1, 5: 2, 6: 3},
        borrowed=(codes,),
    )
