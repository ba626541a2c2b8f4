"""Cells: tokens with equal codes have equal scores, so they are kept together.

With M subspaces of C centroids a key lies in one of C**M cells of the inverted multi-index. The
candidates of a kv head up to some position, the *sealed* ones, are listed cell by cell; those
behind it, the *tail*, lie in the codes as they are. Tokens leave the window in the order of their
positions, so the tail is a range of positions, and nothing needs to be done for a token but once
in a while: when the tail is long, its tokens go into the lists.

That takes many steps, a little work in each, in place:

1. the first `segment` tokens of the tail are counted, some for each new one, until all are there
   and counted, which gives the cells new starts;
2. the lists move up to make room, from their end on, `block` entries for each new token: a block is
   read into a ring, and written from there MOST_NEW tokens later;
3. the segment's tokens are written into the gaps, and are sealed.

How far a row has come follows from its length: `sealed_at` and `progress`.

Source: the inverted multi-index of Babenko and Lempitsky (2012).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Int32, UInt8

from jax_indexer.config import IndexerConfig
from jax_indexer.kernels.codebook import power_of_2_from

# New tokens that an update takes; where more come at once, all of the row is listed anew.
MOST_NEW = 8
# Tokens that are counted for each new one.
RATE = 4
SMALLEST_SEGMENT = 512
# Moving all lists takes this many tokens where blocks from small to large allow it, and never more
# than the most.
MOVES, MOST_MOVES = 128, 512
SMALLEST_BLOCK, LARGE_BLOCK = 256, 4096


@dataclasses.dataclass(frozen=True)
class SealPlan:
    """How the candidates of an index are sealed: static.

    Attributes:
      first_candidate: of the config that the state was made for.
      window_size: likewise.
      segment: tokens that are sealed together, a power of two.
      block: entries that move for each new token, a power of two.
    """

    first_candidate: int
    window_size: int
    segment: int
    block: int

    @property
    def margin(self) -> int:
        """Tokens at the end of a row that are not sealed: the window, and what an append writes."""
        return max(self.window_size, MOST_NEW)

    @property
    def ring(self) -> int:
        """Entries of the ring: a step may read as many blocks as others wait to be written."""
        return 2 * MOST_NEW * self.block

    def most_waiting(self, capacity: int) -> int:
        """Tokens that wait to be sealed, at the most: one more, and the segment is sealed."""
        return self.segment + -(-capacity // self.block) + 2 * MOST_NEW

    def most_tail(self, capacity: int) -> int:
        """Candidates in the tail, at the most."""
        return self.most_waiting(capacity) + self.margin - self.window_size


def seal_plan(capacity: int, config: IndexerConfig) -> SealPlan:
    """The plan for a cache of this capacity."""
    block = max(
        min(power_of_2_from(-(-capacity // MOVES)), LARGE_BLOCK),
        power_of_2_from(-(-capacity // MOST_MOVES)),
        SMALLEST_BLOCK,
    )
    moves = -(-capacity // block)
    # The next segment must not be counted in the step that seals this one, which is the first with
    # more than segment + moves + 2 * MOST_NEW tokens waiting, by MOST_NEW at the most. So up to
    # moves + 3 * MOST_NEW are left, and counting must begin with more: behind
    # segment - segment / RATE.
    least = -(-(moves + 3 * MOST_NEW) * RATE // (RATE - 1))
    segment = max(power_of_2_from(least), SMALLEST_SEGMENT)
    return SealPlan(config.first_candidate, config.window_size, segment, block)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cells:
    """State of the "cells" selector.

    For each kv head 4 bytes a token, 8 a cell, 4 a token of a segment, and the ring: half a byte a
    token at the most where there are 32768 or more, else 16 KiB.

    Attributes:
      starts: int32[B, K, 2, C**M + 1], where each cell's list begins, with a last entry for the
        end; and, while a segment goes in, where it will. Before that, how many counted tokens of
        the segment lie in each cell.
      order: int32[B, K, S], positions of the sealed candidates cell by cell, ascending in each.
      earlier: int32[B, K, segment], how many tokens of the segment before a counted one are in its
        cell.
      ring: int32[B, K, 2 * MOST_NEW * block], positions that were read from `order` and are not
        written to their new place yet.
      base: int32[B], the position up to which candidates were sealed when all were listed at once.
      plan: how tokens are sealed since.
    """

    starts: Array
    order: Array
    earlier: Array
    ring: Array
    base: Array
    plan: SealPlan = dataclasses.field(metadata={"static": True})

    def sealed(self, lengths: Int32[Array, "B"]) -> Int32[Array, "B"]:
        """The position up to which candidates are sealed, in rows of these lengths."""
        return sealed_at(lengths, self.base, self.plan, self.order.shape[-1])


class Progress(NamedTuple):
    """How far a row's next segment is.

    Attributes:
      waiting: tokens in the tail that may be sealed.
      entries: in the lists, without the segment.
      counted: tokens of the segment that are counted.
      read: blocks that were read into the ring, block i from i * block entries before the end on.
      moved: blocks that were written to their new place.
      still: entries that were not.
      begun: whether the segment is counted: new starts are there.
      done: whether the segment can be sealed: all blocks have moved, in an earlier step.
    """

    waiting: Array
    entries: Array
    counted: Array
    read: Array
    moved: Array
    still: Array
    begun: Array
    done: Array


def progress(length: Array, sealed: Array, plan: SealPlan, capacity: int) -> Progress:
    """How far a row is, for scalars or arrays of them.

    Args:
      length: tokens in the row; clipped to 0..S.
      sealed: the position up to which its candidates are sealed.
      plan: how tokens are sealed.
      capacity: S.

    Returns:
      A Progress, the same for all heads of the row.
    """
    length = jnp.minimum(jnp.maximum(length, 0), capacity)
    # Step by step: sizes may be so large that a sum would overflow.
    waiting = jnp.maximum(jnp.maximum(length - plan.margin, 0) - sealed, 0)
    entries = jnp.maximum(sealed - plan.first_candidate, 0)
    moves = _moves(entries, plan)
    missing = jnp.maximum(plan.segment - waiting, 0)
    counted = jnp.maximum(plan.segment - RATE * jnp.minimum(missing, plan.segment), 0)
    # A step writes what an earlier one read: no two programs of a launch need the same entry.
    read = jnp.minimum(jnp.maximum(waiting - plan.segment, 0), moves)
    moved = jnp.minimum(jnp.maximum(waiting - (plan.segment + MOST_NEW), 0), moves)
    still = jnp.maximum(entries - moved * plan.block, 0)
    begun, done = missing == 0, waiting - (plan.segment + 2 * MOST_NEW) > moves
    return Progress(waiting, entries, counted, read, moved, still, begun, done)


def _moves(entries: Array, plan: SealPlan) -> Array:
    """Blocks of the lists."""
    return lax.div(entries + (plan.block - 1), jnp.full_like(entries, plan.block))


def sealed_at(length: Array, base: Array, plan: SealPlan, capacity: int) -> Array:
    """The position up to which candidates are sealed, for scalars or arrays of lengths.

    A segment is sealed at a length that follows from how many were before it, so that nothing but
    the length need be kept.

    Args:
      length: tokens in the row; clipped to 0..S.
      base: as in Cells.
      plan: how tokens are sealed.
      capacity: S.

    Returns:
      base plus the segments that were sealed since; base is clipped to the cache.
    """
    # No position before the first is read, whatever is set by hand.
    base = jnp.minimum(jnp.maximum(base, plan.first_candidate), max(capacity, plan.first_candidate))
    now = progress(length, base, plan, capacity)
    # Of segments before it a segment needs so many tokens: i * segment + moves(i) < behind. It is
    # the last with i * segment < behind, or the one before, since moves take less than a segment.
    behind = now.waiting - (plan.segment + 2 * MOST_NEW)
    last = lax.div(jnp.maximum(behind - 1, 0), jnp.full_like(behind, plan.segment))
    entries = now.entries + last * plan.segment
    moves = _moves(entries, plan)
    is_sealed = last * plan.segment + moves < behind
    return base + jnp.where(behind > 0, last + is_sealed.astype(jnp.int32), 0) * plan.segment


def cell_numbers(codes: UInt8[Array, "*batch M S"], config: IndexerConfig) -> Array:
    """int32[*batch, S]: a token's codes as the digits of one number, the first subspace's first."""
    mask = np.uint8(config.num_centroids - 1)
    number = jnp.int32(0)
    for m in range(config.num_subspaces):
        digit = (codes[..., m, :] & mask).astype(jnp.int32)
        number = number * config.num_centroids + digit
    return number


def no_cells(batch: int, kv_heads: int, capacity: int, config: IndexerConfig) -> Cells:
    """The state of empty rows."""
    plan = seal_plan(capacity, config)

    def zeros(*shape):
        return jnp.zeros((batch, kv_heads, *shape), jnp.int32)

    return Cells(
        starts=zeros(2, config.num_cells + 1),
        order=zeros(capacity),
        earlier=zeros(plan.segment),
        ring=zeros(plan.ring),
        base=jnp.full(batch, config.first_candidate, jnp.int32),
        plan=plan,
    )


def empty_rows(cells: Cells, rows: Array) -> Cells:
    """The state with some rows, bool[B], empty."""
    chosen = rows[:, None, None]
    return dataclasses.replace(
        cells,
        starts=jnp.where(chosen[..., None], 0, cells.starts),
        earlier=jnp.where(chosen, 0, cells.earlier),
        ring=jnp.where(chosen, 0, cells.ring),
        base=jnp.where(rows, cells.plan.first_candidate, cells.base),
    )


def seal(
    cells: Cells,
    codes: UInt8[Array, "B K M S"],
    lengths: Int32[Array, "B"],
    rows: Array,
    config: IndexerConfig,
) -> Cells:
    """Lists the tokens of some rows anew, by sorting; no token is left waiting.

    Args:
      cells: the state so far, which other rows keep.
      codes: of all tokens.
      lengths: tokens in each row; clipped to 0..S.
      rows: bool[B], which rows.
      config: what the index was built with.

    Returns:
      The new state.
    """
    capacity = codes.shape[-1]
    lengths = jnp.clip(lengths, 0, capacity)
    sealed = jnp.maximum(lengths - cells.plan.margin, cells.plan.first_candidate)
    starts, order = _listed(codes, sealed, config)
    starts = jnp.stack([starts, jnp.zeros_like(starts)], axis=2)
    chosen = rows[:, None, None]
    return dataclasses.replace(
        empty_rows(cells, rows),
        starts=jnp.where(chosen[..., None], starts, cells.starts),
        order=jnp.where(chosen, order, cells.order),
        base=jnp.where(rows, sealed, cells.base),
    )


def _listed(
    codes: UInt8[Array, "B K M S"], sealed: Int32[Array, "B"], config: IndexerConfig
) -> tuple[Array, Array]:
    """Starts int32[B, K, C**M + 1] and order int32[B, K, S] of the candidates before `sealed`."""
    batch, kv_heads, _, capacity = codes.shape
    position = jnp.arange(capacity, dtype=jnp.int32)
    listed = (position >= config.first_candidate) & (position < sealed[:, None])
    nowhere = np.int32(config.num_cells)
    cell = jnp.where(listed[:, None], cell_numbers(codes, config), nowhere)
    positions = jnp.broadcast_to(position, (batch, kv_heads, capacity))
    cell, order = lax.sort((cell, positions), num_keys=1, is_stable=True)
    number = jnp.arange(config.num_cells + 1, dtype=jnp.int32)
    starts = jax.vmap(jax.vmap(lambda cell: jnp.searchsorted(cell, number).astype(jnp.int32)))(cell)
    return starts, jnp.where(cell < nowhere, order, 0)


def grow(
    cells: Cells,
    codes: UInt8[Array, "B K M S"],
    before: Int32[Array, "B"],
    after: Int32[Array, "B"],
    config: IndexerConfig,
) -> Cells:
    """The state of rows that grew by MOST_NEW tokens at the most: what the kernel does, by sorting.

    Args:
      cells: the state before.
      codes: of all tokens, the new ones included.
      before: tokens in each row before, in 0..S.
      after: and after.
      config: what the index was built with.

    Returns:
      The state after. What no list holds in `order` has no meaning, nor has what is not counted
      in `earlier`, or what is written again in `ring`.
    """
    plan, capacity = cells.plan, codes.shape[-1]
    sealed_before, sealed = cells.sealed(before), cells.sealed(after)
    was = progress(before, sealed_before, plan, capacity)
    now = progress(after, sealed, plan, capacity)
    changes = (sealed != sealed_before) | (now.counted != was.counted)
    changes |= (now.read != was.read) | (now.moved != was.moved)

    def listed_anew():
        old, order = _listed(codes, sealed, config)
        new, _ = _listed(codes, sealed + now.counted, config)
        counts = jnp.diff(new - old, axis=-1, append=(new - old)[..., -1:])
        starts = jnp.stack([old, jnp.where(now.begun[:, None, None], new, counts)], axis=2)

        # The last cell that starts there or before holds the entry: those before it are empty.
        entry = jnp.arange(capacity, dtype=jnp.int32)
        search = jax.vmap(jax.vmap(lambda old: jnp.searchsorted(old, entry, side="right")))
        cell = jnp.minimum(search(old).astype(jnp.int32), np.int32(config.num_cells)) - 1
        shift = jnp.take_along_axis(new - old, cell, axis=2)
        moves = now.begun[:, None] & (entry >= now.still[:, None])
        place = entry + jnp.where(moves[:, None], shift, 0)
        place = jnp.where(entry < now.entries[:, None, None], place, np.int32(capacity))

        def put(place, order):
            return jnp.zeros_like(order).at[place].set(order, mode="drop")

        chosen = changes[:, None, None]
        return dataclasses.replace(
            cells,
            starts=jnp.where(chosen[..., None], starts, cells.starts),
            order=jnp.where(chosen, jax.vmap(jax.vmap(put))(place, order), cells.order),
            earlier=jnp.where(chosen, _earlier(codes, sealed, plan, config), cells.earlier),
            ring=jnp.where(chosen, _ring(order, now, plan), cells.ring),
        )

    return lax.cond(jnp.any(changes), listed_anew, lambda: cells)


def _earlier(
    codes: UInt8[Array, "B K M S"], sealed: Int32[Array, "B"], plan: SealPlan, config: IndexerConfig
) -> Array:
    """int32[B, K, segment]: tokens of the segment before each in its cell, counted or not."""
    token = jnp.arange(plan.segment, dtype=jnp.int32)
    position = jnp.minimum(sealed[:, None] + token, np.int32(codes.shape[-1] - 1))
    cell = cell_numbers(jnp.take_along_axis(codes, position[:, None, None], axis=3), config)
    same = (cell[..., None, :] == cell[..., None]) & (token < token[:, None])
    return jnp.sum(same, axis=-1, dtype=jnp.int32)


def _ring(order: Int32[Array, "B K S"], now: Progress, plan: SealPlan) -> Array:
    """int32[B, K, ring]: the blocks of lists that have been read and not written yet."""
    place = jnp.arange(plan.ring, dtype=jnp.int32)
    slot, offset = place // plan.block, place % plan.block
    moved = now.moved[:, None]
    block = moved + (slot - moved) % (2 * MOST_NEW)
    entry = now.entries[:, None] - (block + 1) * plan.block + offset
    is_live = (block < now.read[:, None]) & (entry >= 0)
    entry = jnp.clip(entry, 0, order.shape[-1] - 1)
    positions = jnp.take_along_axis(order, entry[:, None], axis=2)
    return jnp.where(is_live[:, None], positions, 0)
