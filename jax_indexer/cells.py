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

How far a row has come follows from its high water: `sealed_at` and `progress`.

Source: the inverted multi-index of Babenko and Lempitsky (2012).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Int32, UInt8

from jax_indexer.config import IndexerConfig
from jax_indexer.state import (
    MOST_NEW,
    Cells,
    Progress,
    Sealing,
    Span,
    progress,
    sealed_at,
    sealing_for,
    varying_as,
)


def cell_numbers(codes: UInt8[Array, "*batch M S"], config: IndexerConfig) -> Array:
    """int32[*batch, S]: a token's codes as the digits of one number, the first subspace's first."""
    mask = np.uint8(config.num_centroids - 1)
    number = jnp.int32(0)
    for m in range(config.num_subspaces):
        digit = (codes[..., m, :] & mask).astype(jnp.int32)
        number = number * config.num_centroids + digit
    return number


def no_cells(
    batch: int,
    kv_heads: int,
    capacity: int,
    config: IndexerConfig,
    sealing: Sealing | None = None,
) -> Cells:
    """The state of empty rows, to be sealed as is usual for this capacity, or otherwise."""
    sealing = sealing or sealing_for(capacity, config)

    def zeros(*shape):
        return jnp.zeros((batch, kv_heads, *shape), jnp.int32)

    return Cells(
        starts=zeros(2, config.num_cells + 1),
        order=zeros(capacity),
        earlier=zeros(sealing.segment),
        ring=zeros(sealing.ring),
        base=jnp.full(batch, config.first_candidate, jnp.int32),
        sealing=sealing,
    )


def empty_rows(cells: Cells, rows: Bool[Array, "B"]) -> Cells:
    """The state with some rows empty."""
    chosen = rows[:, None, None]
    return dataclasses.replace(
        cells,
        starts=jnp.where(chosen[..., None], 0, cells.starts),
        earlier=jnp.where(chosen, 0, cells.earlier),
        ring=jnp.where(chosen, 0, cells.ring),
        base=jnp.where(rows, cells.sealing.first_candidate, cells.base),
    )


def seal(
    cells: Cells,
    codes: UInt8[Array, "B K M S"],
    high_water: Int32[Array, "B"],
    rows: Bool[Array, "B"],
    config: IndexerConfig,
    span: Span | None = None,
) -> Cells:
    """Lists the tokens of some rows anew, by sorting; no token is left waiting.

    Args:
      cells: the state so far, which other rows keep.
      codes: of all tokens.
      high_water: the most tokens each row has had; clipped to 0..S.
      rows: which rows.
      config: what the index was built with.
      span: which positions the codes are of, where others are on other devices.

    Returns:
      The new state.
    """
    capacity = span.capacity if span else codes.shape[-1]
    high_water = jnp.clip(high_water, 0, capacity)
    sealed = jnp.maximum(high_water - cells.sealing.margin, cells.sealing.first_candidate)
    first = config.first_candidate
    listed = (first, sealed) if span is None else (span.clip(first), span.clip(sealed))
    starts, order = _listed(codes, *listed, config)
    starts = jnp.stack([starts, jnp.zeros_like(starts)], axis=2)
    chosen = rows[:, None, None]
    earlier, ring = varying_as((cells.earlier, cells.ring), codes)
    cells = dataclasses.replace(cells, earlier=earlier, ring=ring)
    return dataclasses.replace(
        empty_rows(cells, rows),
        starts=jnp.where(chosen[..., None], starts, cells.starts),
        order=jnp.where(chosen, order, cells.order),
        base=jnp.where(rows, sealed, cells.base),
    )


def _listed(
    codes: UInt8[Array, "B K M S"],
    first: int | Int32[Array, ""],
    sealed: Int32[Array, "B"],
    config: IndexerConfig,
) -> tuple[Array, Array]:
    """Starts int32[B, K, C**M + 1] and order int32[B, K, S] of candidates in [first, sealed)."""
    batch, kv_heads, _, capacity = codes.shape
    position = jnp.arange(capacity, dtype=jnp.int32)[None]
    listed = (position >= first) & (position < sealed[:, None])
    nowhere = np.int32(config.num_cells)
    cell = jnp.where(listed[:, None], cell_numbers(codes, config), nowhere)
    positions = jnp.broadcast_to(position[None], (batch, kv_heads, capacity))
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
    span: Span | None = None,
) -> Cells:
    """The state of rows that grew by MOST_NEW tokens at the most: what the kernel does, by sorting.

    Args:
      cells: the state before.
      codes: of all tokens, the new ones included.
      before: the high water of each row before, in 0..S.
      after: and after.
      config: what the index was built with.
      span: which positions the codes are of, where others are on other devices.

    Returns:
      The state after. What no list holds in `order` has no meaning, nor has what is not counted
      in `earlier`, or what is written again in `ring`.
    """
    sealing, capacity, base = cells.sealing, codes.shape[-1], cells.base
    reach = capacity
    if span is not None:
        before, after = (span.length(x, sealing) for x in (before, after))
        base, reach = span.clip(base), span.reach(sealing)
        sealing = span.of_sealing(sealing)
    sealed_before, sealed = (sealed_at(x, base, sealing, reach) for x in (before, after))
    was = progress(before, sealed_before, sealing, reach)
    now = progress(after, sealed, sealing, reach)
    changes = (sealed != sealed_before) | (now.counted != was.counted)
    changes |= (now.read != was.read) | (now.moved != was.moved)

    def listed_anew():
        first = sealing.first_candidate
        old, order = _listed(codes, first, sealed, config)
        new, _ = _listed(codes, first, sealed + now.counted, config)
        counts = jnp.diff(new - old, axis=-1, append=(new - old)[..., -1:])
        starts = jnp.stack([old, jnp.where(now.begun[:, None, None], new, counts)], axis=2)

        # The last cell that starts there or before holds the entry: those before it are empty.
        entry = jnp.arange(capacity, dtype=jnp.int32)
        search = jax.vmap(jax.vmap(lambda old: jnp.searchsorted(old, entry, side="right")))
        cell = jnp.minimum(search(old).astype(jnp.int32), np.int32(config.num_cells)) - 1
        shift = jnp.take_along_axis(new - old, cell, axis=2)
        entry = entry[None, None]
        moves = now.begun[:, None, None] & (entry >= now.still[:, None, None])
        place = entry + jnp.where(moves, shift, 0)
        place = jnp.where(entry < now.entries[:, None, None], place, np.int32(capacity))

        def put(place, order):
            return jnp.zeros_like(order).at[place].set(order, mode="drop")

        chosen = changes[:, None, None]
        return dataclasses.replace(
            cells,
            starts=jnp.where(chosen[..., None], starts, cells.starts),
            order=jnp.where(chosen, jax.vmap(jax.vmap(put))(place, order), cells.order),
            earlier=jnp.where(chosen, _earlier(codes, sealed, sealing, config), cells.earlier),
            ring=jnp.where(chosen, _ring(order, now, sealing), cells.ring),
        )

    return lax.cond(jnp.any(changes), listed_anew, lambda: cells)


def _earlier(
    codes: UInt8[Array, "B K M S"],
    sealed: Int32[Array, "B"],
    sealing: Sealing,
    config: IndexerConfig,
) -> Array:
    """int32[B, K, segment]: tokens of the segment before each in its cell, counted or not."""
    token = jnp.arange(sealing.segment, dtype=jnp.int32)
    position = jnp.minimum(sealed[:, None] + token[None], np.int32(codes.shape[-1] - 1))
    cell = cell_numbers(jnp.take_along_axis(codes, position[:, None, None], axis=3), config)
    earlier = (token[None] < token[:, None])[None, None]
    same = (cell[..., None, :] == cell[..., None]) & earlier
    return jnp.sum(same, axis=-1, dtype=jnp.int32)


def _ring(order: Int32[Array, "B K S"], now: Progress, sealing: Sealing) -> Array:
    """int32[B, K, ring]: the blocks of lists that have been read and not written yet."""
    place = jnp.arange(sealing.ring, dtype=jnp.int32)
    slot, offset = (place // sealing.block)[None], (place % sealing.block)[None]
    moved = now.moved[:, None]
    block = moved + (slot - moved) % (2 * MOST_NEW)
    entry = now.entries[:, None] - (block + 1) * sealing.block + offset
    is_live = (block < now.read[:, None]) & (entry >= 0)
    entry = jnp.clip(entry, 0, order.shape[-1] - 1)
    positions = jnp.take_along_axis(order, entry[:, None], axis=2)
    return jnp.where(is_live[:, None], positions, 0)
