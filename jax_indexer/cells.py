"""Cells: tokens with equal codes have equal scores, so they are kept together.

With M subspaces of C centroids a key lies in one of C**M cells of the inverted multi-index. The
candidates of a kv head up to some position, the *sealed* ones, are listed cell by cell; those
behind it, the *tail*, lie in the codes as they are. Tokens leave the window in the order of their
positions, so the tail is a range of positions, and nothing needs to be done for a token but once
in a while: when the tail is long, its tokens go into the lists.

That takes many steps, a little work in each, in place:

1. when `segment` tokens are in the tail, they are counted, which gives the cells new starts;
2. the lists move up to make room, from their end on, `block` entries for each new token;
3. the segment's tokens are written into the gaps, and are sealed.

How far a row has come follows from its length and from how many tokens are sealed: `progress`.

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

# New tokens that an update takes; where more come at once, all of the row is listed anew.
MOST_NEW = 8
SMALLEST_SEGMENT = 512
SMALLEST_BLOCK = 1024
# Moving all lists takes no more tokens than this.
MOST_MOVES = 512


@dataclasses.dataclass(frozen=True)
class SealPlan:
    """How the candidates of an index are sealed: static.

    Attributes:
      first_candidate: of the config that the state was made for.
      window_size: likewise.
      segment: tokens that are sealed together.
      block: entries that move for each new token.
    """

    first_candidate: int
    window_size: int
    segment: int
    block: int

    @property
    def margin(self) -> int:
        """Tokens at the end of a row that are not sealed: the window, and what an append writes."""
        return max(self.window_size, MOST_NEW)

    def most_tail(self, capacity: int) -> int:
        """Candidates in the tail, at the most."""
        return self.segment + -(-capacity // self.block) + self.margin - self.window_size


def seal_plan(capacity: int, config: IndexerConfig) -> SealPlan:
    """The plan for a cache of this capacity."""
    moves = -(-capacity // SMALLEST_BLOCK)
    block = SMALLEST_BLOCK * _power_of_2_from(-(-moves // MOST_MOVES))
    # The next segment must not be counted in the step that seals this one.
    segment = max(_power_of_2_from(min(moves, MOST_MOVES) + 2 * MOST_NEW), SMALLEST_SEGMENT)
    return SealPlan(config.first_candidate, config.window_size, segment, block)


def _power_of_2_from(number: int) -> int:
    return 1 << (number - 1).bit_length()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cells:
    """State of the "cells" selector: 4 bytes a token and kv head, and 8 bytes a cell.

    Attributes:
      starts: int32[B, K, 2, C**M + 1], where each cell's list begins and, while a segment goes in,
        where it will; a last entry for the end.
      order: int32[B, K, S], positions of the sealed candidates cell by cell, ascending in each.
      sealed: int32[B], the position up to which candidates are sealed.
      plan: how.
    """

    starts: Array
    order: Array
    sealed: Array
    plan: SealPlan = dataclasses.field(metadata={"static": True})


class Progress(NamedTuple):
    """How far a row's next segment is.

    Attributes:
      waiting: tokens in the tail that may be sealed.
      entries: in the lists, without the segment.
      moved: blocks that have moved.
      still: entries that have not.
      begun: whether the segment is counted: new starts are there.
      done: whether the segment can be sealed: all blocks have moved, a token ago.
    """

    waiting: Array
    entries: Array
    moved: Array
    still: Array
    begun: Array
    done: Array


def progress(length: Array, sealed: Array, plan: SealPlan, capacity: int) -> Progress:
    """How far a row is, for scalars or arrays of them.

    Args:
      length: tokens in the row; clipped to 0..S.
      sealed: as in Cells.
      plan: how tokens are sealed.
      capacity: S.

    Returns:
      A Progress, the same for all heads of the row.
    """
    length = jnp.minimum(jnp.maximum(length, 0), capacity)
    # Step by step: sizes may be so large that a sum would overflow.
    waiting = jnp.maximum(jnp.maximum(length - plan.margin, 0) - sealed, 0)
    entries = jnp.maximum(sealed - plan.first_candidate, 0)
    moves = lax.div(entries + (plan.block - 1), jnp.full_like(entries, plan.block))
    moved = jnp.minimum(jnp.maximum(waiting - plan.segment, 0), moves)
    still = jnp.maximum(entries - moved * plan.block, 0)
    begun, done = waiting >= plan.segment, waiting > plan.segment + moves
    return Progress(waiting, entries, moved, still, begun, done)


def sealed_after(cells: Cells, before: Array, after: Array) -> Int32[Array, "B"]:
    """`sealed` of rows that grew from `before` tokens to `after`, by MOST_NEW at the most."""
    capacity = cells.order.shape[-1]
    was = progress(before, cells.sealed, cells.plan, capacity)
    now = progress(after, cells.sealed, cells.plan, capacity)
    return cells.sealed + jnp.where(now.done & ~was.done, cells.plan.segment, 0)


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
    return Cells(
        starts=jnp.zeros((batch, kv_heads, 2, config.num_cells + 1), jnp.int32),
        order=jnp.zeros((batch, kv_heads, capacity), jnp.int32),
        sealed=jnp.full(batch, config.first_candidate, jnp.int32),
        plan=seal_plan(capacity, config),
    )


def empty_rows(cells: Cells, rows: Array) -> Cells:
    """The state with some rows, bool[B], empty."""
    return dataclasses.replace(
        cells,
        starts=jnp.where(jnp.expand_dims(rows, (1, 2, 3)), 0, cells.starts),
        sealed=jnp.where(rows, cells.plan.first_candidate, cells.sealed),
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
    chosen = rows[:, None, None]
    return dataclasses.replace(
        cells,
        starts=jnp.where(chosen[..., None], jnp.stack([starts, starts], axis=2), cells.starts),
        order=jnp.where(chosen, order, cells.order),
        sealed=jnp.where(rows, sealed, cells.sealed),
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
      The state after. What no list holds in `order` has no meaning, nor have new starts that are
      not in use.
    """
    capacity = codes.shape[-1]
    sealed = sealed_after(cells, before, after)
    was = progress(before, cells.sealed, cells.plan, capacity)
    now = progress(after, sealed, cells.plan, capacity)
    changes = (sealed != cells.sealed) | (now.moved != was.moved) | (now.begun != was.begun)

    def listed_anew():
        old, order = _listed(codes, sealed, config)
        new, _ = _listed(codes, sealed + cells.plan.segment, config)
        entry = jnp.arange(capacity, dtype=jnp.int32)
        # The last cell that starts there or before holds the entry: those before it are empty.
        search = jax.vmap(jax.vmap(lambda old: jnp.searchsorted(old, entry, side="right")))
        cell = jnp.minimum(search(old).astype(jnp.int32), np.int32(config.num_cells)) - 1
        shift = jnp.take_along_axis(new - old, cell, axis=2)
        moves = now.begun[:, None] & (entry >= now.still[:, None])
        place = entry + jnp.where(moves[:, None], shift, 0)
        place = jnp.where(entry < now.entries[:, None, None], place, np.int32(capacity))

        def put(place, order):
            return jnp.zeros_like(order).at[place].set(order, mode="drop")

        order = jax.vmap(jax.vmap(put))(place, order)
        chosen = changes[:, None, None]
        starts = jnp.stack([old, new], axis=2)
        return (
            jnp.where(chosen[..., None], starts, cells.starts),
            jnp.where(chosen, order, cells.order),
        )

    starts, order = lax.cond(jnp.any(changes), listed_anew, lambda: (cells.starts, cells.order))
    return dataclasses.replace(cells, starts=starts, order=order, sealed=sealed)
