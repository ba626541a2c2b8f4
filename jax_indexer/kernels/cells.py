"""The "cells" selector: the cut among C**M cell scores, the winners from lists of positions.

All tokens of a cell have one score, so the cut follows from the cells' scores and sizes, however
long the context is. A cell above it is taken whole, from its list; of the cells at it the tokens
of the lowest positions. Tokens behind the sealed ones, the tail, are scored one by one.

Source: CONTRACT.md, section 3; the inverted multi-index of Babenko and Lempitsky (2012).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jaxtyping import Float, Int32, UInt8

from jax_indexer.cells import Cells, SealPlan, progress, sealed_at
from jax_indexer.config import IndexerConfig
from jax_indexer.kernels import backend
from jax_indexer.kernels.best import (
    HIGHEST,
    PAIRS_AT_ONCE,
    Weighted,
    find_cut,
    read_together,
    reduced_together,
)
from jax_indexer.kernels.codebook import power_of_2_from
from jax_indexer.kernels.lookup_table import Tables
from jax_indexer.kernels.plan import always_attended, plan_row, write_settled_entries
from jax_indexer.kernels.tuning import MOST_PAIRED, cells_warps
from jax_indexer.reference import NOT_A_CANDIDATE, ordered

# Counts of tokens and of cells share an integer, and so do a cell and a place.
FIRST_BITS = 15
LARGEST_BUDGET = (1 << FIRST_BITS) - 1
# Tokens looked at at once for those that tie at the cut.
TIED_BLOCK = 1024
WORDS_AT_ONCE = 4096
# Parts that the cells are taken in: each is code of its own.
MOST_PARTS = 4
# Positions that a program of the weights writes.
WEIGHTS_BLOCK = 4096


class Part(NamedTuple):
    """Some cells: their numbers, how long their lists are, and their ranks."""

    cell: Array
    size: Array
    rank: Array


def cells_select_kernel(
    lengths_ref,  # i32[B]
    base_ref,  # i32[B]
    table_ref,  # [R, Q, M * C]
    codes_ref,  # u8[R, M, S]
    starts_ref,  # i32[R, 2, cells + 1]
    order_ref,  # i32[R, S]
    *refs,  # weights before; outputs: i32[R, Q, P], i32[R, Q], scratch, weights
    config: IndexerConfig,
    plan: SealPlan,
    num_warps: int,
    with_weights: bool,
    interpret: bool,
):
    weights_ref = None
    if with_weights:
        refs, weights_ref = refs[1:-1], refs[-1]
    # Scratch: a 1 at each place of the winners where a cell's begin; the cells that are taken from,
    # each with that place; positions; bits, if need be.
    indices_ref, counts_ref, begins_ref, cell_ref, positions_ref, *bits_refs = refs
    num_rows, num_subspaces, capacity = codes_ref.shape
    num_queries, list_size = indices_ref.shape[1:]
    num_cells, num_centroids = config.num_cells, config.num_centroids
    budget = begins_ref.shape[2]

    program = backend.program_id()
    row, query = program // num_queries, program % num_queries
    batch_row = row // (num_rows // lengths_ref.shape[0])
    listed = plan_row(
        lengths_ref[batch_row], 0, config=config, num_query_tokens=1, capacity=capacity
    )
    write_settled_entries(indices_ref, counts_ref, row, query, listed)

    def rank_of(digits) -> Array:
        total = jnp.float32(0)  # so that no score is -0.0
        for m, digit in enumerate(digits):
            entry = table_ref[row, query, m * num_centroids + digit]
            total += entry.astype(jnp.float32)
        return ordered(total)

    def ranks_of_tokens(position, exists) -> Array:
        codes = (
            backend.load(codes_ref.at[row, m, position], mask=exists, other=0)
            for m in range(num_subspaces)
        )
        rank = rank_of(code.astype(jnp.int32) & (num_centroids - 1) for code in codes)
        return jnp.where(exists, rank, NOT_A_CANDIDATE)

    def list_tokens(position, place, wanted) -> None:
        slot = jnp.where(wanted, listed.num_sink + place, list_size)
        backend.store(indices_ref.at[row, query, slot], position, mask=wanted)
        if weights_ref is not None:
            there = jnp.where(wanted, position, capacity)
            ones = jnp.ones(position.shape, weights_ref.dtype)
            backend.store(weights_ref.at[row, query, there], ones, mask=wanted)

    def count_by_pairs(position, _, count) -> Array:
        """How many of the positions in scratch are smaller, by comparing all pairs."""

        def compare(i, smaller):
            others = read_together(lambda at: positions_ref[row, query, at], i, len(position))
            # Twice the count: of ones alone the compiler would make a slower population count.
            return sum((jnp.where(other < position, 2, 0) for other in others), smaller)

        steps = lax.div(count + (PAIRS_AT_ONCE - 1), PAIRS_AT_ONCE)
        return lax.fori_loop(0, steps, compare, jnp.zeros_like(position)) >> 1

    # Words with a bit for every position, and how many bits are set before each.
    num_words = pl.cdiv(capacity, 32)
    words_at_once = min(power_of_2_from(num_words), WORDS_AT_ONCE)

    def for_each_word(visit, end, carry):
        first = lax.div(listed.first, 32)

        def step(i, carry):
            word = first + i * words_at_once + jnp.arange(words_at_once, dtype=jnp.int32)
            return visit(word, word * 32 < end, carry)

        words = lax.div(end + 31, 32) - first
        return lax.fori_loop(0, lax.div(words + (words_at_once - 1), words_at_once), step, carry)

    def clear_bits(end) -> None:
        bits_ref, _ = bits_refs

        def clear(word, exists, carry):
            backend.store(bits_ref.at[row, query, word], jnp.zeros_like(word), mask=exists)
            return carry

        for_each_word(clear, end, 0)
        bits_ref[row, query, num_words] = jnp.int32(0)  # for what has no position

    def count_by_bits(position, exists, _) -> Array:
        """How many positions are smaller, by setting a bit for each and counting bits."""
        bits_ref, before_ref = bits_refs
        word = jnp.where(exists, position >> 5, num_words)
        bit = jnp.where(exists, 1 << (position & 31), 0)
        backend.add(bits_ref, (row, query, word), bit)
        backend.barrier(interpret)

        def count(word, exists, so_far):
            bits = backend.load(bits_ref.at[row, query, word], mask=exists, other=0)
            until = jnp.cumsum(lax.population_count(bits))
            before = so_far + until - lax.population_count(bits)
            backend.store(before_ref.at[row, query, word], before, mask=exists)
            return so_far + jnp.max(until)

        for_each_word(count, listed.last, jnp.int32(0))
        backend.barrier(interpret)
        bits, before = (
            backend.load(ref.at[row, query, word], mask=exists, other=0) for ref in bits_refs
        )
        return before + lax.population_count(bits & (bit - 1))

    # A state that was made for another length, set by hand, is not used; what is not seen of it may
    # make lists wrong, but no access leaves an array.
    length = lengths_ref[batch_row]
    sealed = sealed_at(length, base_ref[batch_row], plan, capacity)
    state = progress(length, sealed, plan, capacity)
    most_tail = plan.most_tail(capacity)
    end, new_end = starts_ref[row, 0, num_cells], starts_ref[row, 1, num_cells]
    fits = (sealed >= listed.first) & (sealed <= listed.last)
    fits &= listed.last - sealed <= most_tail
    fits &= end == sealed - config.first_candidate
    fits &= (new_end - end == plan.segment) | ~state.begun
    # A place a thread, or else those that compare pairs would exchange what they read.
    place = jnp.arange(max(power_of_2_from(budget), 32 * num_warps), dtype=jnp.int32)
    part_size = max(power_of_2_from(most_tail), power_of_2_from(num_cells) // MOST_PARTS)

    @pl.when((listed.num_heavy > 0) & ~fits)
    def _():
        list_tokens(listed.first + place, place, place < listed.num_heavy)

    @pl.when((listed.num_heavy > 0) & fits)
    def _():
        # So that no place in the list is left as it was.
        slot = jnp.where(place < listed.num_heavy, listed.num_sink + place, list_size)
        backend.store(
            indices_ref.at[row, query, slot], listed.first + place, mask=place < listed.num_heavy
        )
        backend.store(begins_ref.at[row, query, place], jnp.zeros_like(place), mask=place < budget)
        if bits_refs:
            clear_bits(listed.last)

        # Cells in parts as long as the tail, so that a search takes all of them in one go.
        lane = jnp.arange(part_size, dtype=jnp.int32)
        parts = []
        for first_cell in range(0, num_cells, part_size):
            # Not known to be neighbours, as the places are not that it is put to: one layout.
            cell = jnp.minimum(first_cell + lane, num_cells - 1)
            start = starts_ref[row, 0, cell]
            size = jnp.maximum(starts_ref[row, 0, cell + 1] - start, 0)
            size = jnp.where(first_cell + lane < num_cells, size, 0)
            rank = rank_of(
                (cell >> (config.num_bits * (num_subspaces - 1 - m))) & (num_centroids - 1)
                for m in range(num_subspaces)
            )
            parts.append(Part(cell, size, jnp.where(size > 0, rank, NOT_A_CANDIDATE)))
        tail = sealed + lane
        tail_rank = ranks_of_tokens(tail, tail < listed.last)

        tokens = Weighted(
            (*(part.rank for part in parts), tail_rank),
            (*(part.size for part in parts), (tail < listed.last).astype(jnp.int32)),
        )
        least, most = tokens.extremes()
        cut = find_cut(
            tokens, listed.num_heavy, least, most + 1, listed.last - listed.first, slack=0
        )

        # Of the cells at the cut all tokens are taken, or the first of the only one; otherwise
        # their tokens are looked for in the order of their positions.
        at = [(part.rank == cut.rank).astype(jnp.int32) for part in parts]
        sizes_at = [one * part.size for one, part in zip(at, parts, strict=True)]
        cells_at_cut, tied = reduced_together(
            (sum(at[1:], at[0]), sum(sizes_at[1:], sizes_at[0])), jnp.sum
        )
        by_cell = (cells_at_cut <= 1) | (tied <= cut.ties)
        from_cells = jnp.minimum(tied, cut.ties)
        of_tied = jnp.where(by_cell, from_cells, 0)
        takes = [
            jnp.where(part.rank > cut.rank, part.size, one * jnp.minimum(part.size, of_tied))
            for one, part in zip(at, parts, strict=True)
        ]
        # Two counts share a prefix sum: cells that are taken from, and what is taken.
        marks = [jnp.where(take > 0, (1 << 16) + take, 0) for take in takes]
        own = sum(marks[1:], marks[0])
        until = jnp.cumsum(own)
        # Neither count shrinks along the cells.
        whole = jnp.minimum(jnp.max(until & 0xFFFF), listed.num_heavy)
        backend.barrier(interpret)
        before = until - own
        for part, take, mark in zip(parts, takes, marks, strict=True):
            first, number = before & 0xFFFF, before >> 16
            taken = (take > 0) & (first < budget) & (number >= 0) & (number < budget)
            into = jnp.where(taken, number, budget)
            both = part.cell << FIRST_BITS | first
            backend.store(cell_ref.at[row, query, into], both, mask=taken)
            into = jnp.where(taken, first, budget)
            backend.store(begins_ref.at[row, query, into], jnp.ones_like(lane), mask=taken)
            before += mark
        backend.barrier(interpret)

        begin = backend.load(begins_ref.at[row, query, place], mask=place < budget, other=0)
        number, exists = jnp.maximum(jnp.cumsum(begin) - 1, 0), place < whole
        both = backend.load(cell_ref.at[row, query, number], mask=exists, other=0)
        from_cell = jnp.clip(both >> FIRST_BITS, 0, num_cells - 1)
        old, new = (
            backend.load(starts_ref.at[row, which, from_cell], mask=exists, other=0)
            for which in (0, 1)
        )
        entry = old + place - (both & ((1 << FIRST_BITS) - 1))
        has_moved = state.begun & (entry >= state.still)
        entry += jnp.where(has_moved, new - old, 0)
        entry = jnp.clip(entry, 0, capacity - 1)
        position = backend.load(order_ref.at[row, entry], mask=exists, other=0)
        backend.store(positions_ref.at[row, query, place], position, mask=exists)

        def search(state):
            begin, count = state
            token = begin + jnp.arange(TIED_BLOCK, dtype=jnp.int32)
            mark = ranks_of_tokens(token, token < sealed) == cut.rank
            until = count + jnp.cumsum(mark.astype(jnp.int32))
            taken = mark & (until <= from_cells)
            into = jnp.where(taken, whole + until - 1, budget + PAIRS_AT_ONCE)
            taken &= into < budget
            backend.store(positions_ref.at[row, query, into], token, mask=taken)
            return begin + TIED_BLOCK, jnp.max(until)

        _, found = lax.while_loop(
            lambda state: ~by_cell & (state[1] < from_cells) & (state[0] < sealed),
            search,
            (listed.first, jnp.int32(0)),
        )
        count = jnp.minimum(whole + jnp.minimum(found, from_cells), listed.num_heavy)
        # So that positions are compared by loads without a mask.
        behind = count + jnp.arange(PAIRS_AT_ONCE, dtype=jnp.int32)
        positions_ref[row, query, behind] = jnp.full(PAIRS_AT_ONCE, HIGHEST)
        backend.barrier(interpret)
        exists = place < count
        position = backend.load(positions_ref.at[row, query, place], mask=exists, other=HIGHEST)
        position = jnp.where(exists, jnp.clip(position, listed.first, listed.last - 1), HIGHEST)
        smaller = (count_by_bits if bits_refs else count_by_pairs)(position, exists, count)
        list_tokens(position, smaller, exists & (smaller < listed.num_heavy))

        # The tail lies behind all that is sealed, in its order.
        ties_left = cut.ties - from_cells
        mark = jnp.where(tail_rank > cut.rank, 1 << 16, (tail_rank == cut.rank).astype(jnp.int32))
        until = jnp.cumsum(mark)
        ties = until & 0xFFFF
        taken = (mark > 1) | ((mark == 1) & (ties <= ties_left))
        behind = count + (until >> 16) + jnp.minimum(ties, ties_left) - 1
        list_tokens(tail, behind, taken & (behind >= 0) & (behind < listed.num_heavy))


def always_attended_kernel(
    lengths_ref,  # i32[B]
    weights_ref,  # [R, Q, S]
    *,
    config: IndexerConfig,
):
    num_rows, num_queries, capacity = weights_ref.shape
    num_blocks = pl.cdiv(capacity, WEIGHTS_BLOCK)
    program = backend.program_id()
    block, query = program % num_blocks, program // num_blocks % num_queries
    row = program // (num_blocks * num_queries)
    plan = plan_row(
        lengths_ref[row // (num_rows // lengths_ref.shape[0])],
        0,
        config=config,
        num_query_tokens=1,
        capacity=capacity,
    )
    position = block * WEIGHTS_BLOCK + jnp.arange(WEIGHTS_BLOCK, dtype=jnp.int32)
    weights = always_attended(plan, position, config).astype(weights_ref.dtype)
    backend.store(weights_ref.at[row, query, position], weights, mask=position < capacity)


def weights_launch(
    lengths: Int32[Array, "B"],
    rows: int,
    num_queries: int,
    capacity: int,
    config: IndexerConfig,
    dtype: np.dtype,
) -> backend.Launch:
    """The launch that writes weights of the tokens that are always attended, and 0 elsewhere.

    Args:
      lengths: tokens in the cache, clipped to 0..S.
      rows: R = B * K.
      num_queries: Q, queries of a row.
      capacity: S.
      config: sizes.
      dtype: of the weights.

    Returns:
      A launch whose output is [R, Q, S].
    """
    return backend.Launch(
        functools.partial(always_attended_kernel, config=config),
        [lengths],
        programs=rows * num_queries * pl.cdiv(capacity, WEIGHTS_BLOCK),
        out_shape=[jax.ShapeDtypeStruct((rows, num_queries, capacity), dtype)],
    )


def select_cells(
    tables: Tables,
    codes: UInt8[Array, "R M S"],
    lengths: Int32[Array, "B"],
    cells: Cells,
    config: IndexerConfig,
    num_queries: int,
    weights: Float[Array, "R Q S"] | None,
    *,
    interpret: bool = False,
) -> tuple[Int32[Array, "R Q P"], Int32[Array, "R Q"], Float[Array, "R Q S"] | None]:
    """Everything of a selection that follows the table, in one kernel, for one query token.

    Args:
      tables: look-up tables.
      codes: of all tokens; only their low bits count.
      lengths: tokens in the cache, clipped to 0..S.
      cells: the state for these lengths.
      config: sizes.
      num_queries: Q = G; queries of a row.
      weights: as `weights_launch` makes them, or None; written in place.
      interpret: run on the CPU.

    Returns:
      indices, counts, and weights or None.

    Source: CONTRACT.md, section 3.
    """
    rows, _, capacity = codes.shape
    budget = max(min(config.heavy_size, capacity), 1)
    num_warps = cells_warps(config.num_cells, budget)

    def integers(*shape):
        return jax.ShapeDtypeStruct((rows, num_queries, *shape), np.int32)

    out_shape = [
        integers(config.max_selected()),
        integers(),
        integers(budget),
        integers(budget),
        integers(budget + PAIRS_AT_ONCE),
    ]
    if budget > MOST_PAIRED:
        num_words = pl.cdiv(capacity, 32)
        out_shape += [integers(num_words + 1), integers(num_words)]
    operands = [
        lengths,
        cells.base,
        tables.by_query,
        codes,
        cells.starts.reshape(rows, *cells.starts.shape[2:]),
        cells.order.reshape(rows, capacity),
    ]
    aliases = {}
    if weights is not None:
        aliases = {len(operands): len(out_shape)}
        operands.append(weights)
        out_shape.append(jax.ShapeDtypeStruct(weights.shape, weights.dtype))
    indices, counts, *_ = outputs = backend.launch(
        functools.partial(
            cells_select_kernel,
            config=config,
            plan=cells.plan,
            num_warps=num_warps,
            with_weights=weights is not None,
            interpret=interpret,
        ),
        *operands,
        programs=rows * num_queries,
        out_shape=out_shape,
        num_warps=num_warps,
        aliases=aliases,
        interpret=interpret,
    )
    return indices, counts, None if weights is None else outputs[-1]
