"""Cells are kept up to date: a segment of the tail goes into the lists, a little at every step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jaxtyping import Int32

from jax_indexer.cells import Cells, SealPlan, progress
from jax_indexer.config import IndexerConfig
from jax_indexer.kernels import backend

# Cells whose starts are added up at once, and tokens that are compared with others at once.
STARTS_AT_ONCE = 1024
TOKENS_AT_ONCE = 128
OTHERS_AT_ONCE = 32


def seal_kernel(
    before_ref,  # i32[B]  tokens before the append
    after_ref,  # i32[B]   and after it
    sealed_ref,  # i32[B]
    _starts_before_ref,
    _order_before_ref,
    starts_ref,  # i32[R, 2, cells + 1], in the memory of those before
    order_ref,  # i32[R, S], likewise
    codes_ref,  # u8[R, M, S]; tokens that are being appended are not read
    *,
    plan: SealPlan,
    config: IndexerConfig,
    interpret: bool,
):
    num_rows, num_subspaces, capacity = codes_ref.shape
    num_cells, segment = config.num_cells, plan.segment
    row = backend.program_id()
    batch_row = row // (num_rows // sealed_ref.shape[0])
    sealed = sealed_ref[batch_row]
    was = progress(before_ref[batch_row], sealed, plan, capacity)
    now = progress(after_ref[batch_row], sealed, plan, capacity)

    def barrier():
        backend.barrier(interpret)

    def cells_at(position, exists) -> Array:
        number = jnp.zeros(position.shape, jnp.int32)
        for m in range(num_subspaces):
            code = backend.load(codes_ref.at[row, m, position], mask=exists, other=0)
            digit = code.astype(jnp.int32) & (config.num_centroids - 1)
            number = number * config.num_centroids + digit
        return number

    def earlier_and_later(first) -> tuple[Array, Array, Array, Array]:
        """Of some tokens of the segment: which there are, their cells, and how many others of the
        segment are in these cells before and behind them."""
        token = first + jnp.arange(TOKENS_AT_ONCE, dtype=jnp.int32)
        exists = token < segment
        cell = cells_at(sealed + token, exists)

        def count(i, counts):
            other = i * OTHERS_AT_ONCE + jnp.arange(OTHERS_AT_ONCE, dtype=jnp.int32)
            there = other < segment
            # What is not there is in no cell.
            of_other = jnp.where(there, cells_at(sealed + other, there), num_cells)
            same = of_other[None, :] == cell[:, None]
            earlier = same & (other[None, :] < token[:, None])
            later = same & (other[None, :] > token[:, None])
            return (
                counts[0] + jnp.sum(earlier.astype(jnp.int32), axis=1),
                counts[1] + jnp.sum(later.astype(jnp.int32), axis=1),
            )

        nothing = jnp.zeros(TOKENS_AT_ONCE, jnp.int32)
        steps = pl.cdiv(segment, OTHERS_AT_ONCE)
        return exists, cell, *lax.fori_loop(0, steps, count, (nothing, nothing))

    def for_each_start(visit, carry=0):
        def step(i, carry):
            cell = i * STARTS_AT_ONCE + jnp.arange(STARTS_AT_ONCE, dtype=jnp.int32)
            return visit(cell, cell <= num_cells, carry)

        return lax.fori_loop(0, pl.cdiv(num_cells + 1, STARTS_AT_ONCE), step, carry)

    @pl.when(now.begun & ~was.begun)
    def _():
        def clear(cell, exists, carry):
            backend.store(starts_ref.at[row, 1, cell], jnp.zeros_like(cell), mask=exists)
            return carry

        for_each_start(clear)
        barrier()

        def count(i, carry):
            # The last token of a cell knows how many there are.
            exists, cell, earlier, later = earlier_and_later(i * TOKENS_AT_ONCE)
            is_last = exists & (later == 0)
            into = jnp.where(is_last, cell + 1, num_cells + 1)
            backend.store(starts_ref.at[row, 1, into], earlier + 1, mask=is_last)
            return carry

        lax.fori_loop(0, pl.cdiv(segment, TOKENS_AT_ONCE), count, 0)
        barrier()

        def add_up(cell, exists, so_far):
            own = backend.load(starts_ref.at[row, 1, cell], mask=exists, other=0)
            old = backend.load(starts_ref.at[row, 0, cell], mask=exists, other=0)
            backend.store(starts_ref.at[row, 1, cell], old + so_far + jnp.cumsum(own), mask=exists)
            return so_far + jnp.sum(own)

        for_each_start(add_up, jnp.int32(0))
        barrier()

    def move(i, carry):
        stop = was.entries - i * plan.block
        entry = stop - 1 - jnp.arange(plan.block, dtype=jnp.int32)
        exists = entry >= 0
        position = backend.load(order_ref.at[row, entry], mask=exists, other=0)
        position = jnp.clip(position, 0, capacity - 1)
        cell = cells_at(position, exists)
        old, new = (
            backend.load(starts_ref.at[row, which, cell], mask=exists, other=0) for which in (0, 1)
        )
        barrier()
        into = jnp.where(exists, jnp.clip(entry + new - old, 0, capacity - 1), capacity)
        backend.store(order_ref.at[row, into], position, mask=exists)
        barrier()
        return carry

    lax.fori_loop(was.moved, now.moved, move, 0)

    @pl.when(now.done & ~was.done)
    def _():
        def fill(i, carry):
            exists, cell, earlier, _ = earlier_and_later(i * TOKENS_AT_ONCE)
            old, old_end, new = (
                backend.load(starts_ref.at[row, which, cell + offset], mask=exists, other=0)
                for which, offset in ((0, 0), (0, 1), (1, 0))
            )
            into = jnp.clip(new + old_end - old + earlier, 0, capacity - 1)
            into = jnp.where(exists, into, capacity)
            token = i * TOKENS_AT_ONCE + jnp.arange(TOKENS_AT_ONCE, dtype=jnp.int32)
            backend.store(order_ref.at[row, into], sealed + token, mask=exists)
            return carry

        lax.fori_loop(0, pl.cdiv(segment, TOKENS_AT_ONCE), fill, 0)
        barrier()

        def take_over(cell, exists, carry):
            new = backend.load(starts_ref.at[row, 1, cell], mask=exists, other=0)
            backend.store(starts_ref.at[row, 0, cell], new, mask=exists)
            return carry

        for_each_start(take_over)


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
      A launch whose outputs are starts [R, 2, C**M + 1] and order [R, S], in place.
    """
    rows = cells.starts.shape[0] * cells.starts.shape[1]
    lists = [x.reshape(rows, *x.shape[2:]) for x in (cells.starts, cells.order)]
    return backend.Launch(
        functools.partial(seal_kernel, plan=cells.plan, config=config, interpret=interpret),
        [before, after, cells.sealed, *lists],
        programs=rows,
        out_shape=[jax.ShapeDtypeStruct(x.shape, np.int32) for x in lists],
        aliases={3: 0, 4: 1},
        borrowed=(codes,),
    )
