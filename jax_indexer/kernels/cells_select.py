"""The "cells" selector: the cut among C**M cell scores, the winners from lists of positions.

All tokens of a cell have one score, so the cut follows from the cells' scores and sizes, however
long the context is. A cell above it is taken whole, from its list; of the cells at it the tokens
of the lowest positions. Tokens behind the sealed ones, the tail, are scored one by one.

Source: CONTRACT.md, section 3; the inverted multi-index of Babenko and Lempitsky (2012).
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jaxtyping import Float, Int32, UInt8

from jax_indexer.config import LARGEST_BUDGET_OF_CELLS
from jax_indexer.kernels import backend
from jax_indexer.kernels.attend import (
    KEPT_STATE,
    REACHED,
    Ended,
    Kept,
    Parts,
    attend,
    block_of,
    merge_two,
    read_caches,
    read_logits,
    read_parts,
    read_query,
    shapes_of_end,
    vectors,
    write_length,
    write_output,
)
from jax_indexer.kernels.best import (
    HIGHEST,
    PAIRS_AT_ONCE,
    STEPS_WITHOUT_TIES,
    Bounds,
    Cut,
    Entry,
    Few,
    Weighted,
    find_cut,
    narrow,
    read_together,
)
from jax_indexer.kernels.lookup_table import Tables
from jax_indexer.kernels.output import Lists, Writer, list_shapes
from jax_indexer.kernels.step import Lengths, QueryPlan, Step, plan_query
from jax_indexer.layout import power_of_2_from
from jax_indexer.reference import NOT_A_CANDIDATE, Attention, Caches, Logits, ordered
from jax_indexer.state import Cells, PQIndex, Progress, Sealing, progress, sealed_at

# Counts of tokens and of cells share an integer, and so do a cell and a place, or its size.
FIRST_BITS = 15
SIZE_BITS = 16
MOST_SIZE = (1 << SIZE_BITS) - 1  # more than a budget
assert LARGEST_BUDGET_OF_CELLS < 1 << FIRST_BITS
# Tokens looked at at once for those that tie at the cut.
TIED_BLOCK = 1024
# The cut is narrowed among all cells until half more tokens than are wanted may be above it, or one
# of so many candidates; what remains is a list that a warp goes through.
ONE_OF_CANDIDATES = 128
# Neighbours in that list that a thread takes: of four, kernels would take minutes to compile.
FEW_RUN = 2


class Inputs(NamedTuple):
    """What is searched; weights are begun elsewhere."""

    lengths: Lengths
    base: Any  # i32[B]
    table: Any  # [R, Q, M * C]
    codes: Any  # u8[R, M, S]
    starts: Any  # i32[R, 2, cells + 1]
    order: Any  # i32[R, S]
    weights: Any  # not read


class Outputs(NamedTuple):
    """Lists, and scratch of i32[R, Q, ...].

    Attributes:
      indices, counts, weights: the lists.
      few: i32[R, Q, 2, n], ranks of what may be among the best, and cells with their sizes, or the
        numbers of tokens of the tail; then, at the last place, how many they are.
      begins: 1 at each place of the winners where a cell's begin.
      cell: cells that are taken from, each with that place.
      positions: of the winners, cell by cell.
      bits: words with a bit for each position, if budgets are large, else None.
      bits_before: how many bits are set before each word, likewise.
      weighed: f32[R, Q, n], for what weighs candidates; None if nothing does.
      sizes: i32[R, n, cells], how many candidates each cell has, for each query or query token; or
        None.
      others: i32[R, Q, cells], how many winners at the cut are from no list, where
        `Taken.is_mixed`; or None.
      taken: i32[R, Q, TAKEN], `Taken` and how many winners are sealed, for those who ask later; or
        None.
    """

    indices: Any
    counts: Any
    weights: Any
    few: Any
    begins: Any
    cell: Any
    positions: Any
    bits: Any
    bits_before: Any
    weighed: Any
    sizes: Any
    others: Any
    taken: Any

    @classmethod
    def only(cls, **fields: Any) -> "Outputs":
        """Of a kernel that looks at a search, and has nothing else of it."""
        return cls(**dict.fromkeys(cls._fields) | fields)

    def without_lists(self) -> "Outputs":
        """Of a search whose winners are attended to, in any order."""
        return self._replace(indices=None, counts=None, bits=None, bits_before=None)


def cell_counts(step: Step) -> dict[str, Any]:
    """Fields of `Outputs` where one kernel searches, and weighs cells by code if it is asked to."""
    if step.config.estimate_rest != "codes":
        return {}
    return dict.fromkeys(("sizes", "others"), step.scratch(np.int32, step.config.num_cells))


class Part(NamedTuple):
    """Cells int32[n, threads], of which a thread has a column.

    Attributes:
      cell: their numbers.
      exists: which there are.
      size: lengths of their lists, 0 for none.
      rank: NOT_A_CANDIDATE for cells without tokens.
    """

    cell: Array
    exists: Array
    size: Array
    rank: Array


class Tail(NamedTuple):
    """Candidates that are not sealed, likewise, in order column by column.

    Attributes:
      number: the how-manieth behind the sealed ones.
      exists: which there are.
      rank: NOT_A_CANDIDATE for others.
    """

    number: Array
    exists: Array
    rank: Array


class Taken(NamedTuple):
    """Who is taken from the cells.

    Attributes:
      rank: the cut.
      ties: how many tokens at it are taken.
      at_cut: how many of these are sealed.
      of_lists: how many of these are taken from lists; the others are looked for in the codes.
      whole: tokens taken from lists.
      cells: how many lists these are from.
      cell: the cell that those at the cut are of, any if there are none; -1 where they may be of
        several, or from no list.
    """

    rank: Array
    ties: Array
    at_cut: Array
    of_lists: Array
    whole: Array
    cells: Array
    cell: Array

    @classmethod
    def read(cls, taken: Any, at: tuple[Array, Array]) -> tuple["Taken", Array]:
        """`Outputs.taken` of a query: who is taken, and how many are sealed."""
        *fields, count = (taken[(*at, i)] for i in range(len(cls._fields) + 1))
        return cls(*fields), count

    @property
    def to_find(self) -> Array:
        """Sealed tokens at the cut that are looked for."""
        return self.at_cut - self.of_lists

    @property
    def of_tail(self) -> Array:
        """Tokens at the cut that the tail gives, its first."""
        return self.ties - self.at_cut

    @property
    def is_mixed(self) -> Array:
        """Whether those at the cut are counted cell by cell."""
        return self.cell < 0


TAKEN = power_of_2_from(len(Taken._fields) + 1)


class Scores(NamedTuple):
    """Scores of one query, as their ranks.

    Attributes:
      step: of the launch.
      table: [R, Q, M * C].
      codes: u8[R, M, S].
      kv_row, query: whose scores.
    """

    step: Step
    table: Any
    codes: Any
    kv_row: Array
    query: Array

    def rank_of(self, digits: Iterable[Array]) -> Array:
        """The order of the score of these codes."""
        total = jnp.float32(0)  # so that no score is -0.0
        for m, digit in enumerate(digits):
            entry = m * self.step.config.num_centroids + digit
            total += self.table[self.kv_row, self.query, entry].astype(jnp.float32)
        return ordered(total)

    def codes_of(self, position: Array, exists: Array) -> Iterable[Array]:
        """Codes of some tokens, one subspace after the other."""
        config = self.step.config
        codes = (
            backend.load(self.codes.at[self.kv_row, m, position], mask=exists, other=0)
            for m in range(config.num_subspaces)
        )
        return (code.astype(jnp.int32) & (config.num_centroids - 1) for code in codes)

    def cells_of(self, position: Array, exists: Array) -> Array:
        """Cells of some tokens."""
        bits = self.step.config.num_bits
        return functools.reduce(
            lambda cell, code: cell << bits | code, self.codes_of(position, exists)
        )

    def codes_of_cells(self, cell: Array) -> Iterable[Array]:
        """The inverse of `cells_of`: codes, one subspace after the other."""
        config = self.step.config
        return (
            (cell >> (config.num_bits * (config.num_subspaces - 1 - m)))
            & (config.num_centroids - 1)
            for m in range(config.num_subspaces)
        )

    def ranks_of_tokens(self, position: Array, exists: Array) -> Array:
        """The order of the scores of some tokens."""
        rank = self.rank_of(self.codes_of(position, exists))
        return jnp.where(exists, rank, NOT_A_CANDIDATE)


class Search(NamedTuple):
    """One program's view of its query.

    Attributes:
      step, sealing, inputs, outputs: of the launch.
      kv_row, query: whose list.
      plan: of the query.
      sealed: the position up to which candidates are in lists.
      state: how far the next segment is.
      threads: of the program.
      place: int32[n] numbers of winners, one a thread: those that compare pairs would exchange
        what they read if they were fewer.
    """

    step: Step
    sealing: Sealing
    inputs: Inputs
    outputs: Outputs
    kv_row: Array
    query: Array
    plan: QueryPlan
    sealed: Array
    state: Progress
    threads: int
    place: Array

    def starts(self, which: int, cell: Array, exists: Array | None = None) -> Array:
        """Old starts (0), or new ones or counts (1)."""
        at = self.inputs.starts.at[self.kv_row, which, cell]
        return backend.load(at, mask=exists, other=None if exists is None else 0)

    def size_of(self, cell: Array, exists: Array | None = None) -> Array:
        """Tokens in the lists of some cells."""
        return jnp.maximum(self.starts(0, cell + 1, exists) - self.starts(0, cell, exists), 0)

    def state_fits(self) -> Array:
        """Whether the state was made for these lengths.

        One that was not, as lengths were set by hand, is not used. What is not seen of it here
        may make lists wrong, but no access leaves an array.
        """
        plan, cells = self.plan, self.step.config.num_cells
        end, new_end = (self.inputs.starts[self.kv_row, which, cells] for which in (0, 1))
        fits = (self.sealed >= plan.first) & (self.sealed <= plan.last)
        fits &= plan.last - self.sealed <= self.sealing.most_tail(self.step.S)
        fits &= end == self.sealed - self.sealing.first_candidate
        return fits & ((new_end - end == self.sealing.segment) | ~self.state.begun)

    def has_cut(self, fits: Array) -> Array:
        """Whether there is anything to look for, in a state that fits."""
        return fits & (self.plan.num_heavy > 0)

    @property
    def scores(self) -> "Scores":
        """What scores its tokens and cells."""
        return Scores(self.step, self.inputs.table, self.inputs.codes, self.kv_row, self.query)

    def prepare(self, fill: Callable[[Array, Array, Array], None]) -> None:
        """Fills the winners, so that no place is left as it was, and clears scratch."""
        plan, place, outputs = self.plan, self.place, self.outputs
        fill(plan.first + place, place, place < plan.num_heavy)
        into = outputs.begins.at[self.kv_row, self.query, place]
        backend.store(into, jnp.zeros_like(place), mask=place < self.step.budget)
        if outputs.bits is not None:

            def clear(word, exists, carry):
                into = outputs.bits.at[self.kv_row, self.query, word]
                backend.store(into, jnp.zeros_like(word), mask=exists)
                return carry

            self.for_each_word(clear, plan.last, 0)
            # For what has no position.
            outputs.bits[self.kv_row, self.query, outputs.bits_before.shape[2]] = jnp.int32(0)

    def rows_and_threads(self, number: int) -> tuple[Array, Array]:
        """Of so many cells or tokens: rows [n, 1] and threads [1, threads]."""
        rows = backend.lanes(power_of_2_from(pl.cdiv(number, self.threads)))
        return rows[:, None], backend.lanes(self.threads)[None, :]

    def score_all(self) -> tuple[Part, Tail]:
        """Cells and tail."""
        num_cells = self.step.config.num_cells
        row, thread = self.rows_and_threads(num_cells)
        cell = row * self.threads + thread
        exists = cell < num_cells
        cell = jnp.minimum(cell, num_cells - 1)
        size = jnp.where(exists, self.size_of(cell), 0)
        rank = self.scores.rank_of(self.scores.codes_of_cells(cell))
        rank = jnp.where(size > 0, rank, NOT_A_CANDIDATE)
        return Part(cell, exists, size, rank), self.score_tail()

    def tail(self) -> tuple[Array, Array]:
        """How-manieth tokens behind the sealed ones, in order column by column, and which exist."""
        row, thread = self.rows_and_threads(self.sealing.most_tail(self.step.S))
        number = row.shape[0] * thread + row
        return number, self.sealed + number < self.plan.last

    def score_tail(self) -> Tail:
        number, waits = self.tail()
        return Tail(number, waits, self.scores.ranks_of_tokens(self.sealed + number, waits))

    def narrow(self, cells: Part, tail: Tail) -> Bounds:
        """Bounds of the cut, above whose lower one is little: each cell is all of its tokens."""
        sizes = cells.size, tail.exists.astype(jnp.int32)
        tokens = Weighted((cells.rank, tail.rank), sizes)
        least, most = tokens.extremes()
        wanted, candidates = self.plan.num_heavy, self.plan.last - self.plan.first
        # The fewer are wanted, the nearer to the largest score the cut lies.
        share = wanted.astype(jnp.float32) / candidates.astype(jnp.float32)
        share = jnp.sqrt(jnp.sqrt(share))
        bounds = Bounds(least, most + 1, candidates, jnp.int32(0))
        enough = jnp.maximum(wanted + (wanted >> 1), lax.div(candidates, ONE_OF_CANDIDATES))
        return narrow(tokens, wanted, bounds, enough, STEPS_WITHOUT_TIES, share)

    def list_few(self, cells: Part, tail: Tail, low: Array) -> Few:
        """Lists all cells and tokens of the tail that reach a rank, the latter in their order."""
        few = self.outputs.few
        last = few.shape[3] - 1
        reach = cells.rank >= low, tail.rank >= low
        marks = [x.astype(jnp.int32) for x in reach]
        of_cells, of_tail = (jnp.sum(mark, axis=0) for mark in marks)
        until = jnp.cumsum(of_cells + of_tail)
        befores = until - of_tail - of_cells, until - of_tail

        def at(which: int, place: Array) -> Any:
            return few.at[self.kv_row, self.query, which, place]

        words = (
            cells.cell << SIZE_BITS | jnp.minimum(cells.size, MOST_SIZE),
            tail.number << SIZE_BITS,  # no size
        )
        for part, reaches, mark, before, word in zip(
            (cells, tail), reach, marks, befores, words, strict=True
        ):
            place = before[None, :] + jnp.cumsum(mark, axis=0) - mark
            place = jnp.where(reaches, place, last)
            for which, x in enumerate((part.rank, word)):
                backend.store(at(which, place), x, mask=reaches)
        lane = jnp.arange(self.threads, dtype=jnp.int32)
        is_last = lane == self.threads - 1
        backend.store(at(0, jnp.where(is_last, last, last + 1)), until, mask=is_last)
        backend.barrier()
        return self.read_few()

    def read_few(self) -> Few:
        """What `list_few` has listed."""
        few, own = self.outputs.few, (self.kv_row, self.query)
        last = few.shape[3] - 1
        number = few[(*own, 0, last)]

        def read(first: Array) -> list[Entry]:
            entries = []
            for place in (first + i for i in range(FEW_RUN)):
                exists = place < number
                where = jnp.where(exists, place, last)
                rank = few.at[(*own, 0, where)]
                rank = backend.load(rank, mask=exists, other=NOT_A_CANDIDATE)
                word = backend.load(few.at[(*own, 1, where)], mask=exists, other=0)
                entries.append(self.entry(rank, word, exists))
            return entries

        return Few.of(read, self.step.tuning.threads_for_few(self.step.budget), FEW_RUN, number)

    @staticmethod
    def entry(rank: Array, word: Array, exists: Array) -> Entry:
        """What `list_few` has written."""
        size = word & MOST_SIZE
        is_cell = size > 0
        number = (word >> SIZE_BITS) & ((1 << SIZE_BITS) - 1)
        return Entry(rank, jnp.where(exists & ~is_cell, 1, size), number, is_cell)

    def take(self, few: Few, cut: Cut) -> Taken:
        """Writes which cells are taken from, and at which place of the winners each begins.

        All tokens of the cells at the cut are taken, or the first of the only one; otherwise these
        are looked for in the order of their positions.
        """
        outputs, budget = self.outputs, self.step.budget

        def count(entries: list[Entry]) -> list[Array]:
            cells = [jnp.where(x.is_cell, x.size, 0) for x in entries]
            at = [x.is_cell & (x.rank == cut.rank) for x in entries]
            tied = [jnp.where(x, size, 0) for x, size in zip(at, cells, strict=True)]
            own = [jnp.where(is_at, x.number, 0) for is_at, x in zip(at, entries, strict=True)]
            above = [
                jnp.where(x.rank > cut.rank, size, 0)
                for x, size in zip(entries, cells, strict=True)
            ]
            at = [x.astype(jnp.int32) for x in at]
            columns = (at, tied, above, own)[:number]
            return [sum(x[1:], x[0]) for x in columns]

        number = 3 if outputs.taken is None else 4
        cells_at_cut, tied, above, *cell = few.added(count, number)
        by_cell = (cells_at_cut <= 1) | (tied <= cut.ties)
        at_cut = jnp.minimum(tied, cut.ties)
        of_lists = jnp.where(by_cell, at_cut, 0)
        # Sizes that are garbage may add up to anything.
        whole = jnp.clip(above + of_lists, 0, self.plan.num_heavy)

        def write(carry: Array, entries: list[Entry]) -> Array:
            takes = []
            for x in entries:
                tied = jnp.where(x.rank == cut.rank, jnp.minimum(x.size, of_lists), 0)
                takes.append(jnp.where(x.is_cell, jnp.where(x.rank > cut.rank, x.size, tied), 0))
            # Two counts share a prefix sum: cells that are taken from, and what is taken.
            marks = [jnp.where(take > 0, (1 << 16) + take, 0) for take in takes]
            own = sum(marks[1:], marks[0])
            until = carry + jnp.cumsum(own)
            before = until - own
            for x, take, mark in zip(entries, takes, marks, strict=True):
                first, number = before & 0xFFFF, before >> 16
                taken = (take > 0) & (first < budget) & (number >= 0) & (number < budget)
                into = outputs.cell.at[self.kv_row, self.query, jnp.where(taken, number, budget)]
                backend.store(into, x.number << FIRST_BITS | first, mask=taken)
                into = outputs.begins.at[self.kv_row, self.query, jnp.where(taken, first, budget)]
                backend.store(into, jnp.ones_like(first), mask=taken)
                before += mark
            return carry + jnp.sum(own)

        both = few.fold(write, jnp.int32(0))
        backend.barrier()
        cells = jnp.clip(both >> 16, 0, budget)
        is_one = (cells_at_cut <= 1) & (cut.ties <= of_lists)
        cell_at_cut = jnp.where(is_one, sum(cell, jnp.int32(0)), -1)
        return Taken(cut.rank, cut.ties, at_cut, of_lists, whole, cells, cell_at_cut)

    def read_lists(self, taken: Taken) -> None:
        """Writes the positions of the winners in lists to scratch, cell by cell."""
        outputs, place = self.outputs, self.place
        at = outputs.begins.at[self.kv_row, self.query, place]
        begin = backend.load(at, mask=place < self.step.budget, other=0)
        number, exists = jnp.maximum(jnp.cumsum(begin) - 1, 0), place < taken.whole
        at = outputs.cell.at[self.kv_row, self.query, number]
        both = backend.load(at, mask=exists, other=0)
        cell = jnp.clip(both >> FIRST_BITS, 0, self.step.config.num_cells - 1)
        old, new = (self.starts(which, cell, exists) for which in (0, 1))
        entry = old + place - (both & ((1 << FIRST_BITS) - 1))
        has_moved = self.state.begun & (entry >= self.state.still)
        entry += jnp.where(has_moved, new - old, 0)
        entry = jnp.clip(entry, 0, self.step.S - 1)
        position = backend.load(self.inputs.order.at[self.kv_row, entry], mask=exists, other=0)
        into = outputs.positions.at[self.kv_row, self.query, place]
        backend.store(into, position, mask=exists)

    def look_for_tied(self, taken: Taken) -> Array:
        """Writes positions of the first tokens at the cut, if need be; how many winners now."""
        budget = self.step.budget

        def look(state):
            begin, count = state
            token = begin + jnp.arange(TIED_BLOCK, dtype=jnp.int32)
            mark = self.scores.ranks_of_tokens(token, token < self.sealed) == taken.rank
            until = count + jnp.cumsum(mark.astype(jnp.int32))
            found = mark & (until <= taken.to_find)
            into = jnp.where(found, taken.whole + until - 1, budget + PAIRS_AT_ONCE)
            at = self.outputs.positions.at[self.kv_row, self.query, into]
            backend.store(at, token, mask=found & (into < budget))
            return begin + TIED_BLOCK, jnp.max(until)

        _, found = lax.while_loop(
            lambda state: (state[1] < taken.to_find) & (state[0] < self.sealed),
            look,
            (self.plan.first, jnp.int32(0)),
        )
        return jnp.minimum(taken.whole + jnp.minimum(found, taken.to_find), self.plan.num_heavy)

    def add_to_cells(
        self, counts: Any, at: tuple[Array, Array], position: Array, exists: Array
    ) -> None:
        """Adds tokens to their cells."""
        # Idle lanes add nothing, each somewhere else: at one place they wait for each other.
        lane = lax.broadcasted_iota(jnp.int32, position.shape, position.ndim - 1)
        idle = lane & (self.step.config.num_cells - 1)
        cell = jnp.where(exists, self.scores.cells_of(position, exists), idle)
        backend.barrier()
        backend.add(counts, (*at, cell), exists.astype(jnp.int32))

    @property
    def at_sizes(self) -> tuple[Array, Array]:
        """Where `Outputs.sizes` is of this query."""
        return self.kv_row, self.query * self.outputs.sizes.shape[1] // self.step.Q

    def count_candidates(self) -> None:
        """Writes `Outputs.sizes`: atomics take microseconds, and queries of a row share it."""
        sizes, at = self.outputs.sizes, self.at_sizes
        cell = jnp.arange(self.step.config.num_cells, dtype=jnp.int32)
        backend.store(sizes.at[(*at, cell)], self.size_of(cell))
        number, waits = self.tail()
        self.add_to_cells(sizes, at, self.sealed + number, waits)

    def count_others(self, taken: Taken, count: Array) -> None:
        """Writes `Outputs.others`.

        Args:
          taken: who is taken.
          count: of the winners in scratch before those of the tail.
        """
        others, at = self.outputs.others, (self.kv_row, self.query)
        cell, tail = jnp.arange(self.step.config.num_cells, dtype=jnp.int32), self.score_tail()
        backend.store(others.at[(*at, cell)], jnp.zeros_like(cell))
        mark = (tail.exists & (tail.rank == taken.rank)).astype(jnp.int32)
        own = jnp.sum(mark, axis=0)
        ties = (jnp.cumsum(own) - own)[None, :] + jnp.cumsum(mark, axis=0)
        wins = (mark > 0) & (ties <= taken.of_tail)
        self.add_to_cells(others, at, self.sealed + tail.number, wins)

        def found(i, carry):
            place = taken.whole + i * TIED_BLOCK + jnp.arange(TIED_BLOCK, dtype=jnp.int32)
            scratch = self.outputs.positions.at[(*at, place)]
            position = backend.load(scratch, mask=place < count, other=0)
            self.add_to_cells(others, at, position, place < count)
            return carry

        turns = lax.div(count - taken.whole + (TIED_BLOCK - 1), jnp.int32(TIED_BLOCK))
        lax.fori_loop(0, turns, found, jnp.int32(0))
        backend.barrier()

    def number_of(self, cell: Array, exists: Array) -> Array:
        """How many candidates some cells have, from `Outputs.sizes`."""
        sizes = self.outputs.sizes.at[(*self.at_sizes, cell)]
        return backend.load(sizes, mask=exists, other=0)

    def left_of(
        self, cell: Array, exists: Array, rank: Array, taken: Taken, *, mixed: bool
    ) -> Array:
        """How many candidates of some cells are no winners.

        All tokens of a cell have one score: of a cell above the cut all win, below it none.
        """
        number, is_at = self.number_of(cell, exists), rank == taken.rank
        if mixed:
            others = self.outputs.others.at[self.kv_row, self.query, cell]
            won = backend.load(others, mask=exists & is_at, other=0)
            won += jnp.minimum(self.size_of(cell, exists & is_at), taken.of_lists)
        else:
            won = jnp.where(cell == taken.cell, taken.of_lists, 0)
        return jnp.where(is_at, number - won, jnp.where(rank < taken.rank, number, 0))

    def list_sealed(self, count: Array, writer: Writer) -> None:
        """Puts the winners in scratch in order."""
        positions = self.outputs.positions
        # So that positions are compared by loads without a mask.
        behind = count + jnp.arange(PAIRS_AT_ONCE, dtype=jnp.int32)
        positions[self.kv_row, self.query, behind] = jnp.full(PAIRS_AT_ONCE, HIGHEST)
        backend.barrier()
        exists = self.place < count
        at = positions.at[self.kv_row, self.query, self.place]
        position = backend.load(at, mask=exists, other=HIGHEST)
        position = jnp.clip(position, self.plan.first, self.plan.last - 1)
        position = jnp.where(exists, position, HIGHEST)
        by_bits = self.outputs.bits is not None
        smaller = (self.count_by_bits if by_bits else self.count_by_pairs)(position, exists, count)
        writer.put(position, smaller, exists & (smaller < self.plan.num_heavy))

    def count_by_pairs(self, position: Array, _: Array, count: Array) -> Array:
        """How many of the positions in scratch are smaller, by comparing all pairs."""

        def compare(i, smaller):
            def read(at):
                return self.outputs.positions[self.kv_row, self.query, at]

            others = read_together(read, i, len(position))
            # Twice the count: of ones alone the compiler would make a slower population count.
            return sum((jnp.where(other < position, 2, 0) for other in others), smaller)

        turns = lax.div(count + (PAIRS_AT_ONCE - 1), PAIRS_AT_ONCE)
        return lax.fori_loop(0, turns, compare, jnp.zeros_like(position)) >> 1

    def count_by_bits(self, position: Array, exists: Array, _: Array) -> Array:
        """How many positions are smaller, by setting a bit for each and counting bits."""
        bits, before = self.outputs.bits, self.outputs.bits_before
        word = jnp.where(exists, position >> 5, before.shape[2])
        bit = jnp.where(exists, 1 << (position & 31), 0)
        backend.add(bits, (self.kv_row, self.query, word), bit)
        backend.barrier()

        def count(word, exists, so_far):
            own = backend.load(bits.at[self.kv_row, self.query, word], mask=exists, other=0)
            until = jnp.cumsum(lax.population_count(own))
            until_word = so_far + until - lax.population_count(own)
            backend.store(before.at[self.kv_row, self.query, word], until_word, mask=exists)
            return so_far + jnp.max(until)

        self.for_each_word(count, self.plan.last, jnp.int32(0))
        backend.barrier()
        own, until_word = (
            backend.load(ref.at[self.kv_row, self.query, word], mask=exists, other=0)
            for ref in (bits, before)
        )
        return until_word + lax.population_count(own & (bit - 1))

    def for_each_word(self, visit, end: Array, carry) -> None:
        """visit(words, which of them exist, carry) for all up to position `end`, some at once."""
        num_words = self.outputs.bits_before.shape[2]
        at_once = min(power_of_2_from(num_words), self.step.tuning.words_at_once)
        first = lax.div(self.plan.first, 32)

        def some(i, carry):
            word = first + i * at_once + jnp.arange(at_once, dtype=jnp.int32)
            return visit(word, word * 32 < end, carry)

        words = lax.div(end + 31, 32) - first
        lax.fori_loop(0, lax.div(words + (at_once - 1), at_once), some, carry)

    def put_tail(
        self, few: Few, taken: Taken, count: Array, put: Callable[[Array, Array, Array], None]
    ) -> None:
        """Puts the winners of the tail, which lie behind all that is sealed, in its order."""

        def visit(carry: Array, entries: list[Entry]) -> Array:
            # Two counts share a prefix sum: those above the cut, and those at it.
            marks = [
                jnp.where(
                    (x.size > 0) & ~x.is_cell & (x.rank >= taken.rank),
                    jnp.where(x.rank > taken.rank, 1 << 16, 1),
                    0,
                )
                for x in entries
            ]
            own = sum(marks[1:], marks[0])
            until = carry + jnp.cumsum(own) - own
            for x, mark in zip(entries, marks, strict=True):
                until += mark
                ties = until & 0xFFFF
                best = (mark > 1) | ((mark == 1) & (ties <= taken.of_tail))
                place = count + (until >> 16) + jnp.minimum(ties, taken.of_tail) - 1
                best &= (place >= 0) & (place < self.plan.num_heavy)
                position = self.sealed + x.number
                put(position, place, best)
            return carry + jnp.sum(own)

        few.fold(visit, jnp.int32(0))

    def put_in_scratch(self, position: Array, place: Array, mask: Array) -> None:
        """Winners in no order."""
        scratch = self.outputs.positions
        place = jnp.where(mask, place, scratch.shape[2])
        backend.store(scratch.at[self.kv_row, self.query, place], position, mask=mask)

    def find(
        self,
        fits: Array,
        fill: Callable[[Array, Array, Array], None],
        put: Callable[[Array, Array, Array], None],
        arrange: Callable[[Array], None],
        weigh: Callable[[Part, Tail, Few, Taken], None] | None = None,
    ) -> None:
        """Puts the winners, or if the state does not fit some candidates; `fill` comes before.

        Args:
          fits: what `state_fits` says.
          fill: takes positions, places and a mask, of what is written again.
          put: likewise, of winners.
          arrange: takes how many winners lie in scratch.
          weigh: takes all candidates, the few that may win, and who of them does.
        """
        plan, place = self.plan, self.place
        if self.outputs.taken is not None:

            @pl.when(~self.has_cut(fits))
            def _():
                into = self.outputs.taken.at[self.kv_row, self.query, jnp.arange(TAKEN)]
                backend.store(into, jnp.zeros(TAKEN, jnp.int32))
                few = self.outputs.few
                few[self.kv_row, self.query, 0, few.shape[3] - 1] = jnp.int32(0)

        @pl.when((plan.num_heavy > 0) & ~fits)
        def _():
            put(plan.first + place, place, place < plan.num_heavy)

        @pl.when(self.has_cut(fits))
        def _():
            self.prepare(fill)
            cells, tail = self.score_all()
            bounds = self.narrow(cells, tail)
            few = self.list_few(cells, tail, bounds.low)
            cut = find_cut(few, plan.num_heavy, bounds, steps_without_ties=0)
            taken = self.take(few, cut)
            if weigh is not None:
                weigh(cells, tail, few, taken)
            self.read_lists(taken)
            count = self.look_for_tied(taken)
            if self.outputs.taken is not None:
                for i, x in enumerate((*taken, count)):
                    self.outputs.taken[self.kv_row, self.query, i] = x
            arrange(count)
            self.put_tail(few, taken, count, put)


def search_for(
    step: Step,
    sealing: Sealing,
    num_warps: int,
    inputs: Inputs,
    outputs: Outputs,
    kv_row: Array,
    query: Array,
    plan: QueryPlan,
) -> Search:
    """A program's search."""
    row = kv_row // step.K
    high_water, base, reach = inputs.lengths.high_water[row], inputs.base[row], step.S
    span = inputs.lengths.span(step)
    if span is not None:
        high_water, base = span.length(high_water, sealing), span.clip(base)
        reach = span.reach(sealing)
        sealing = span.of_sealing(sealing)
    sealed = sealed_at(high_water, base, sealing, reach)
    state = progress(high_water, sealed, sealing, reach)
    threads = 32 * num_warps
    place = backend.lanes(max(power_of_2_from(step.budget), threads))
    return Search(
        step, sealing, inputs, outputs, kv_row, query, plan, sealed, state, threads, place
    )


def cells_select_kernel(
    program, inputs: Inputs, outputs: Outputs, *, step: Step, sealing: Sealing, num_warps: int
):
    kv_row, query = program // step.Q, program % step.Q
    plan = plan_query(step, inputs.lengths, kv_row, 0 if step.T == 1 else query // step.G)
    writer = Writer(Lists(outputs.indices, outputs.counts, outputs.weights), kv_row, query, plan)
    writer.settle()
    search = search_for(step, sealing, num_warps, inputs, outputs, kv_row, query, plan)
    fits = search.state_fits()
    search.find(fits, writer.fill, writer.put, lambda count: search.list_sealed(count, writer))


class SizesOutputs(NamedTuple):
    """i32[R, T, cells] as in `Outputs`."""

    sizes: Any


def count_candidates_kernel(
    program, inputs: Inputs, outputs: SizesOutputs, *, step: Step, sealing: Sealing, num_warps: int
):
    kv_row, token = program // step.T, program % step.T
    plan = plan_query(step, inputs.lengths, kv_row, 0 if step.T == 1 else token)
    scratch = Outputs.only(sizes=outputs.sizes)
    of_query = kv_row, token * step.G, plan
    search_for(step, sealing, num_warps, inputs, scratch, *of_query).count_candidates()


class AttendInputs(NamedTuple):
    """What is attended to by the winners of a search, and the parts that are known already."""

    search: Inputs
    query: Any  # [B, T, N, H]
    key: Any
    value: Any
    logits: Logits
    known: Parts
    lengths: Any  # not read
    kept: Kept | None


class AttendOutputs(NamedTuple):
    """The scratch of a search, which has no lists, and what ends a step."""

    search: Outputs
    output: Attention
    lengths: Any


def cells_attend_kernel(
    program,
    inputs: AttendInputs,
    outputs: AttendOutputs,
    *,
    step: Step,
    sealing: Sealing,
    num_warps: int,
    block: int,
):
    """Searches, and attends to the winners as they are found: a sum needs them in no order."""
    kv_row, query = program // step.Q, program % step.Q
    row, kv_head = kv_row // step.K, kv_row % step.K
    token, head = (jnp.int32(0), query) if step.T == 1 else (query // step.G, query % step.G)
    head = kv_head * step.G + head
    plan = plan_query(step, inputs.search.lengths, kv_row, 0 if step.T == 1 else token)
    search = search_for(
        step, sealing, num_warps, inputs.search, outputs.search, kv_row, query, plan
    )
    fits = search.state_fits()
    write_length(inputs.search.lengths, outputs.lengths, row, (kv_head == 0) & (query == 0))
    search.find(fits, search.put_in_scratch, search.put_in_scratch, lambda count: None)
    backend.barrier()
    # Not before the search, which needs the registers.
    vector, logits = read_query(inputs.query, row, token, head), read_logits(inputs.logits)
    found = read_parts(inputs.known, row, token, head)
    num_listed, table = plan.between(step.config), inputs.search.lengths.page_table
    for first in range(0, step.num_middle, block):
        slot = first + jnp.arange(block, dtype=jnp.int32)
        at = search.outputs.positions.at[kv_row, query, slot]
        heavy = backend.load(at, mask=slot < plan.num_heavy, other=0)
        # Of a short context there is no heavy token: all of it is listed.
        position = jnp.where(plan.num_heavy > 0, heavy, step.config.sink_size + slot)
        live = slot < num_listed
        position = jnp.where(live, jnp.clip(position, 0, step.S - 1), 0)
        at = row, kv_head, position, live
        key, value = read_caches(inputs, Caches._fields, step.kv_layout, *at, table)
        found = merge_two(found, attend(vector, key, value, live, logits))
    write_output(outputs.output, row, token, head, found)


def select_cells(
    step: Step,
    tables: Tables,
    codes: UInt8[Array, "*layers R M S"],
    lengths: Lengths,
    cells: Cells,
    weights: Float[Array, "R Q S"] | None,
    layer: Array | None = None,
) -> Lists:
    """Everything of a selection that follows the tables, in one kernel, for a few query tokens.

    Arguments and result are those of `select_threshold`, and the state of the cells.

    Source: CONTRACT.md, section 3.
    """
    search, num_warps = search_launch(step, tables, codes, lengths, cells, weights, layer)
    outputs = backend.launch(search, num_warps=num_warps)
    return Lists(outputs.indices, outputs.counts, outputs.weights)


def search_launch(
    step: Step,
    tables: Tables,
    codes: UInt8[Array, "*layers R M S"],
    lengths: Lengths,
    cells: Cells,
    weights: Float[Array, "R Q S"] | None,
    layer: Array | None,
) -> tuple[backend.Launch, int]:
    """The launch of `cells_select_kernel`, and its warps."""
    budget = step.budget
    num_warps = step.tuning.warps_for_cells(step.config.num_cells, budget)
    num_words = pl.cdiv(step.S, 32) if budget > step.tuning.most_paired else None

    integers = functools.partial(step.scratch, np.int32)

    num_cells, most_tail = step.config.num_cells, cells.sealing.most_tail(step.S)
    assert max(num_cells, most_tail) <= 1 << SIZE_BITS

    what = backend.Launch(
        functools.partial(
            cells_select_kernel, step=step, sealing=cells.sealing, num_warps=num_warps
        ),
        Inputs(
            lengths,
            cells.base,
            tables.by_query,
            codes,
            step.by_rows(cells.starts),
            step.by_rows(cells.order),
            weights,
        ),
        Outputs(
            *list_shapes(step),
            few=integers(2, num_cells + most_tail + 1),
            begins=integers(budget),
            cell=integers(budget),
            positions=integers(budget + PAIRS_AT_ONCE),
            bits=integers(num_words + 1) if num_words else None,
            bits_before=integers(num_words) if num_words else None,
            weighed=None,
            sizes=None,
            others=None,
            taken=None,
        ),
        programs=step.R * step.Q,
        in_place=("weights",),
        state=("base", "codes", "starts", "order"),
        layer=layer,
    )
    return what, num_warps


def attend_cells(
    step: Step,
    tables: Tables,
    index: PQIndex,
    after: Lengths,
    query: Float[Array, "B T N H"],
    caches: Caches,
    logits: Logits,
    known: Parts,
    lengths: Lengths,
    layer: Array | None,
    kept: Kept | None = None,
) -> tuple[Ended, Int32[Array, "R Q E"]]:
    """Selects for a few query tokens and attends to what is selected, in one kernel.

    Args:
      step: the step.
      tables: look-up tables.
      index: after the step.
      after: the lengths after it.
      query: the queries.
      caches: keys and values, of all layers if there are any.
      logits: how to make logits.
      known: the parts of sink and window.
      lengths: of all layers, in which those of this one are replaced.
      layer: of index and caches.
      kept: of caches in host memory.

    Returns:
      The output, and the lengths; and the heavy tokens, in an order of its own.

    Source: CONTRACT.md, sections 3 and 4.
    """
    assert index.cells is not None
    codes = step.by_rows(index.codes)
    search, num_warps = search_launch(step, tables, codes, after, index.cells, None, layer)
    value_size = caches.value.shape[-1]
    what = backend.Launch(
        functools.partial(
            cells_attend_kernel,
            step=step,
            sealing=index.cells.sealing,
            num_warps=num_warps,
            block=block_of(query.shape[3], value_size, step.tuning.attended_tile, step.tuning),
        ),
        AttendInputs(search.inputs, query, *caches, vectors(logits), known, lengths, kept),
        AttendOutputs(
            search.outputs.without_lists(),
            *shapes_of_end(query, value_size, lengths, after, layer),
        ),
        programs=search.programs,
        in_place=REACHED,
        state=(
            *(f"search.{name}" for name in search.state),
            *Caches._fields,
            *REACHED,
            *KEPT_STATE,
        ),
        layer=layer,
    )
    ended = backend.launch(what, num_warps=num_warps)
    return Ended(ended.output, ended.lengths), ended.search.positions
