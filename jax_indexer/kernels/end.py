"""The end of a step behind a pool: its best by true keys are attended to, the rest is estimated.

One program a query finds the cut among the true inner products, gathers the winners and reads their
values alone; what losers weigh it adds up by code. What else is known of the query is merged in.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from jax_indexer.kernels import backend
from jax_indexer.kernels.attend import (
    KEPT_STATE,
    REACHED,
    Kept,
    Parts,
    Softmax,
    attend,
    block_of,
    finite,
    merge_two,
    read_caches,
    read_logits,
    read_parts,
    read_query,
    softmax,
    vectors,
    write_output,
)
from jax_indexer.kernels.best import (
    HIGHEST,
    Bounds,
    Cut,
    Ranks,
    find_cut,
    number_of,
    reduced_together,
)
from jax_indexer.kernels.cells_select import (
    FIRST_BITS,
    Scores,
    Taken,
)
from jax_indexer.kernels.rest import (
    Estimated,
    Estimator,
    Means,
    Members,
    Sources,
    Weighed,
    WeighedAsCells,
    by_code,
)
from jax_indexer.kernels.step import Place, QueryPlan, Step
from jax_indexer.layout import power_of_2_from
from jax_indexer.reference import NOT_A_CANDIDATE, Attention, Caches, Logits, made_logits, ordered
from jax_indexer.state import PQIndex

MOST_FIRST = (1 << FIRST_BITS) - 1


class EndInputs(NamedTuple):
    """What is attended to.

    Attributes:
      query: [B, T, N, H].
      key, value: the caches.
      logits: how to make logits.
      known: the parts of sink and window.
      rest: None without the rest.
      kept: of caches in host memory.
      page_table: i32[B, pages] of caches in pages, else None.
    """

    query: Any
    key: Any
    value: Any
    logits: Logits
    known: Parts
    rest: Sources | None
    kept: Kept | None
    page_table: Any


class Scratch(NamedTuple):
    """[R, Q, E + 1] of the entries of a pool, the last for what has no place; else None.

    Attributes:
      amounts: [R, Q, 2 * (E + 1)], what is added up by code, and running sums of it.
      winners, winning: positions of winners, and their ranks.
    """

    amounts: Any
    winners: Any
    winning: Any


class Lists(NamedTuple):
    """Which lists of cells a pool is from: as in a search's `Outputs`."""

    taken: Any
    cell: Any


Estimate = Callable[[Estimator, Members, Means, list[Array] | None], Estimated]


class End(NamedTuple):
    """One program's view of its query.

    Attributes:
      step: of the config that reranks.
      inputs, scratch: of the launch; None where it needs none.
      place: of the query.
      plan: of the query, by the config that reranks.
      number: entries of the pool between sink and window.
      position_of: from int32[n] entries, and which of them exist, to positions.
      ranks: i32[R, Q, E + 1], of true inner products; None where all of them are attended to.
    """

    step: Step
    inputs: EndInputs | Any
    scratch: Scratch | Any
    place: Place
    plan: QueryPlan
    number: Array
    position_of: Callable[[Array, Array], Array]
    ranks: Any

    @property
    def slots(self) -> Array:
        """One for each entry, and more: Triton's passes fail for vectors of one element."""
        return backend.lanes(max(power_of_2_from(self.step.pooled), 32))

    @property
    def is_short(self) -> Array:
        """Whether all of the context is attended to (rule 5)."""
        return self.plan.visible <= self.step.config.short_context(self.step.T)

    def entries(self, slot: Array) -> tuple[Array, Array]:
        """Positions of some entries, and which of them exist."""
        exists = slot < self.number
        return jnp.clip(self.position_of(slot, exists), 0, self.step.S - 1), exists

    @property
    def num_winners(self) -> Array:
        """How many of the pool are attended to."""
        return jnp.where(self.is_short, self.number, self.plan.num_heavy)

    def in_pool(self, position: Array, exists: Array) -> Array:
        """Which entries are in the pool.

        Its lists may hold all of a context that is not short for the config that reranks.
        """
        num_first, num_last = self.plan.always(self.step.config)
        first = jnp.where(self.is_short, num_first, self.plan.first)
        last = jnp.where(self.is_short, self.plan.visible - num_last, self.plan.last)
        return exists & (position >= first) & (position < last)

    def rows(self, fields: Sequence[str], position: Array, exists: Array) -> list[Array]:
        inputs, at = self.inputs, (self.place.row, self.place.kv_head, position, exists)
        return read_caches(inputs, fields, self.step.kv_layout, *at, inputs.page_table)

    def all_of_pool(self, query: Array, logits: Logits, block: int) -> Softmax:
        """Attention to all of the pool."""

        def some(first) -> Softmax:
            position, exists = self.entries(first + jnp.arange(block, dtype=jnp.int32))
            key, value = self.rows(Caches._fields, position, exists)
            return attend(query, key, value, exists, logits)

        return in_blocks(some, self.number, self.step.pooled, block, some(0))

    def rank_keys(self, ranks: Any, query: Array, first: Array, block: int) -> None:
        """Writes the ranks of the true inner products of some entries; none if not in the pool."""
        slot = first + jnp.arange(block, dtype=jnp.int32)
        position, exists = self.entries(slot)
        (key,) = self.rows(("key",), position, exists)
        product = jnp.sum(key.astype(jnp.float32) * query[None, :], axis=1)
        rank = jnp.where(self.in_pool(position, exists), ordered(product), NOT_A_CANDIDATE)
        into = jnp.where(exists, slot, self.step.pooled)
        backend.store(ranks.at[(*self.place.of_kv, into)], rank, mask=exists)

    def winners(self, position: Array, rank: Array) -> tuple[Array, Cut, Bounds]:
        """Which of the pool are attended to: the best; of those at the cut the lowest positions.

        Also the cut, and between which ranks all are.
        """
        least, most = reduced_together(
            (~jnp.where(rank == NOT_A_CANDIDATE, HIGHEST, rank), rank), jnp.max
        )
        # At most so many are ranked; all have a rank where as many are wanted.
        bounds = Bounds(~least, most + 1, self.number)
        search = functools.partial(find_cut, steps_without_ties=None)
        # The least reaches no threshold.
        cut = search(Ranks.of(rank, self.step.pooled - 1), self.num_winners, bounds)
        # As ranks, the lowest positions come first.
        tied = (rank == cut.rank) & (cut.ties > 0)
        order = jnp.where(tied, ~position, NOT_A_CANDIDATE)
        low, number = jnp.int32(-(2**31) + 1), jnp.where(cut.ties > 0, self.number, 0)
        ties = search(
            Ranks.of(order, self.step.pooled), cut.ties, Bounds(low, jnp.int32(0), number)
        )
        is_best = (rank > cut.rank) | (tied & (order >= ties.lowest))
        return (rank != NOT_A_CANDIDATE) & is_best, cut, bounds

    def put(self, scratch: Any, x: Array, behind: int = 0) -> None:
        """What lanes of the pool have, behind so many other numbers."""
        mask = self.slots < self.step.pooled
        into = behind + jnp.where(mask, self.slots, self.step.pooled)
        backend.store(scratch.at[(*self.place.of_kv, into)], x, mask=mask)

    def read(self, scratch: Any, slot: Array, exists: Array) -> Array:
        """What was put there, 0 for what does not exist."""
        slot = jnp.where(exists, jnp.clip(slot, 0, self.step.pooled - 1), 0)
        return backend.load(scratch.at[(*self.place.of_kv, slot)], mask=exists, other=0)

    def best_of_pool(
        self, logits: Logits, block: int, by_cell: "ByCell | None", meanwhile: Callable[[], Any]
    ) -> tuple[Softmax, Members, list[Array], Any]:
        """Attention to the winners; what is known of all of the pool; what losers are by code.

        Also what `meanwhile` returns, which reads beside the values.
        """
        place, scratch, size = self.place, self.scratch, self.step.pooled
        slots, exists = self.slots, self.slots < self.number
        at = self.ranks.at[(*place.of_kv, jnp.where(exists, slots, 0))]
        rank = backend.load(at, mask=exists, other=NOT_A_CANDIDATE)
        position, _ = self.entries(slots)
        winner, cut, bounds = self.winners(position, rank)
        until = jnp.cumsum(winner.astype(jnp.int32))
        to = jnp.where(winner, until - 1, size)
        for into, x in ((scratch.winners, position), (scratch.winning, rank)):
            backend.store(into.at[(*place.of_kv, to)], x, mask=winner)
        live = rank != NOT_A_CANDIDATE
        is_candidate, logit = live & ~self.is_short, made_logits(number_of(rank), logits)
        # Logits rise with ranks, or fall: none is above the larger of those of two bounds.
        least, lowest, highest = (
            made_logits(number_of(x), logits) for x in (bounds.low, cut.rank, bounds.high - 1)
        )
        largest = jnp.where(bounds.low < bounds.high, jnp.maximum(least, highest), -jnp.inf)
        total = jnp.sum(jnp.where(live, jnp.exp(logit - finite(largest)), 0))
        is_lost = is_candidate & ~winner & (logit < jnp.inf)
        largest_lost = lax.cond(
            (least < jnp.inf) & (lowest < jnp.inf),  # nor NaN
            lambda: jnp.maximum(least, lowest),
            lambda: jnp.max(jnp.where(is_lost, logit, -jnp.inf)),
        )
        lost = jnp.exp(jnp.where(is_lost, logit - finite(largest_lost), -jnp.inf))
        pool = Members(position, is_candidate, lost, largest_lost, largest, total)
        if by_cell is not None:
            by_cell.put(lost)
        count = self.num_winners
        backend.barrier()

        def rows(first) -> tuple[Array, Array, Array]:
            slot = first + jnp.arange(block, dtype=jnp.int32)
            exists = slot < count
            at, ranks = (self.read(x, slot, exists) for x in (scratch.winners, scratch.winning))
            logit = jnp.where(exists, made_logits(number_of(ranks), logits), -jnp.inf)
            # Garbage in a state may leave fewer winners than there should be.
            at = jnp.clip(at, 0, self.step.S - 1)
            (value,) = self.rows(("value",), at, exists)
            return logit, exists, value

        # Values are on their way while losers are added up.
        first, read = rows(0), meanwhile()
        sums = [jnp.sum(lost)[None]] if by_cell is None else by_cell.sums()
        most = min(self.step.num_middle, size)
        found = in_blocks(lambda i: softmax(*rows(i)), count, most, block, softmax(*first))
        return found, pool, sums, read

    def by_codes(self, amount: Array, scores: Scores, by: tuple[int, int]) -> list[Array]:
        """Sums of what the pool's entries have, 0 for what is no candidate, by code."""
        number = by[1]
        if number == 1:
            return [jnp.sum(amount)[None]]
        at_once = max(self.step.tuning.pooled_tile // number, 16)
        if len(self.slots) <= at_once:
            codes = scores.codes_of(*self.entries(self.slots))
            return [by_code(code, number, amount) for code in codes]
        self.put(self.scratch.amounts, amount)
        backend.barrier()

        def some(i, sums):
            slot = i * at_once + jnp.arange(at_once, dtype=jnp.int32)
            amount = self.read(self.scratch.amounts, slot, slot < self.number)
            return added(sums, scores.codes_of(*self.entries(slot)), amount)

        turns = turns_of(self.number, at_once)
        return lax.fori_loop(0, turns, some, [jnp.zeros(number, jnp.float32)] * by[0])

    def write(
        self,
        output: Attention,
        scores: Scores,
        estimate: Estimate,
        by_cell: "ByCell | None" = None,
    ) -> None:
        """Attends, and writes the output.

        Args:
          output: of the launch.
          scores: of the query.
          estimate: takes what is known of the pool, means of values, and what losers are by code.
          by_cell: adds these up, cell by cell.
        """
        place, value_size = self.place, self.inputs.value.shape[3]
        tuning = self.step.tuning
        block = block_of(self.inputs.query.shape[3], value_size, tuning.attended_tile, tuning)
        query, logits = read_query(self.inputs.query, *place.at), read_logits(self.inputs.logits)
        estimator = None
        if self.inputs.rest is not None:
            estimator = Estimator(self.step, scores, place, logits, self.inputs.rest)
        if self.ranks is not None:
            known = read_parts(self.inputs.known, *place.at)
            read = estimator.read_means if estimator else lambda: None
            found, pool, lost, means = self.best_of_pool(logits, block, by_cell, read)
        else:
            found = self.all_of_pool(query, logits, block)
            position, exists = self.entries(self.slots)
            is_candidate = exists & ~self.is_short
            pool = Members(position, is_candidate, None, None, found.largest, found.total)
            known = read_parts(self.inputs.known, *place.at)
            means, lost = estimator and estimator.read_means(), None
        found = merge_two(known, found)
        if estimator is not None:
            assert means is not None
            found = merge_two(found, estimate(estimator, pool, means, lost).rest)
        write_output(output, *place.at, found)


class Runs(NamedTuple):
    """Some of a pool's entries that have codes in common: all from one list, or one from none.

    Attributes:
      exists: which there are.
      is_list: which are from a list.
      begins, ends: places of the first entry, and behind the last.
      codes: one subspace after the other.
    """

    exists: Array
    is_list: Array
    begins: Array
    ends: Array
    codes: list[Array]

    @classmethod
    def read(cls, end: End, scores: Scores, lists: Any, taken: Taken, i: Array | int) -> "Runs":
        """The i-th of some lists and of some entries from none."""
        at, tuning = end.place.of_kv, end.step.tuning
        lane = jnp.arange(tuning.lists_at_once + tuning.others_at_once, dtype=jnp.int32)
        is_list = lane < tuning.lists_at_once
        place = i * tuning.lists_at_once + lane
        has_list, has_next = (is_list & (x < taken.cells) for x in (place, place + 1))
        cell, following = (
            backend.load(lists.at[(*at, jnp.where(exists, x, 0))], mask=exists, other=0)
            for x, exists in ((place, has_list), (place + 1, has_next))
        )
        slot = taken.whole + i * tuning.others_at_once + lane - tuning.lists_at_once
        position, exists = end.entries(jnp.where(is_list, 0, slot))
        exists &= ~is_list
        of_token = scores.codes_of(jnp.where(exists, position, 0), exists)
        of_cell = scores.codes_of_cells(cell >> FIRST_BITS)
        ends = jnp.where(has_next, following & MOST_FIRST, taken.whole)
        return cls(
            has_list | exists,
            is_list,
            jnp.where(is_list, cell & MOST_FIRST, slot),
            jnp.where(is_list, ends, slot + 1),
            [jnp.where(is_list, x, y) for x, y in zip(of_cell, of_token, strict=True)],
        )


class ByCell(NamedTuple):
    """Sums by code of what a pool's entries have, in one program.

    Entries from the list of one cell lie side by side: of these the sums are differences of a
    running sum. What says which they are is read before all that waits for something else.

    Attributes:
      end, scores: of the program.
      lists: cells of lists, with the places where their entries begin.
      taken: how many lists there are.
      first: the first runs.
    """

    end: End
    scores: Scores
    lists: Any
    taken: Taken
    first: Runs

    @classmethod
    def of(cls, end: End, scores: Scores, lists: Lists) -> "ByCell":
        taken, _ = Taken.read(lists.taken, end.place.of_kv)
        known = end, scores, lists.cell, taken
        return cls(*known, Runs.read(*known, 0))

    def put(self, amount: Array) -> None:
        """Puts aside what is added up behind a barrier."""
        amounts = self.end.scratch.amounts
        self.end.put(amounts, amount)
        self.end.put(amounts, jnp.cumsum(amount), behind=self.end.step.pooled + 1)

    def sums(self) -> list[Array]:
        """Those of what was put aside."""
        config, size = self.end.step.config, self.end.step.pooled

        def add(sums: list[Array], run: Runs) -> list[Array]:
            # Four lanes a run, in one load: alone, each thread would load what all need. They are
            # the running sums until its end and before it, and the amount of an entry from no list.
            what = jnp.arange(4, dtype=jnp.int32)[:, None]
            row = Runs(*(x[None, :] for x in run[:4]), codes=[])
            slot = jnp.where(what == 0, row.ends, row.begins) - (what < 2).astype(jnp.int32)
            exists = row.exists & jnp.where(row.is_list, what < 2, what == 2) & (slot >= 0)
            at = jnp.clip(slot, 0, size - 1) + jnp.where(row.is_list, size + 1, 0)
            found = self.end.scratch.amounts.at[(*self.end.place.of_kv, jnp.where(exists, at, 0))]
            found = backend.load(found, mask=exists, other=0)
            return added(sums, run.codes, jnp.sum(jnp.where(what == 1, -found, found), axis=0))

        sums = [jnp.zeros(config.num_centroids, jnp.float32)] * config.num_subspaces
        tuning, others = self.end.step.tuning, self.end.number - self.taken.whole
        turns = jnp.maximum(
            turns_of(self.taken.cells, tuning.lists_at_once),
            turns_of(others, tuning.others_at_once),
        )
        sums = add(sums, self.first)
        return lax.fori_loop(1, turns, lambda i, sums: add(sums, Runs.read(*self[:4], i)), sums)


def turns_of(number: Array, at_once: int) -> Array:
    """How many turns so many take, some at once."""
    return lax.div(number + (at_once - 1), jnp.int32(at_once))


def added(sums: list[Array], codes: Iterable[Array], amount: Array) -> list[Array]:
    """Sums by code with some amounts more, whose codes are given one subspace after the other."""
    return [x + by_code(code, len(x), amount) for x, code in zip(sums, codes, strict=True)]


def in_blocks(
    some: Callable[[Any], Softmax], number: Array, most: int, block: int, found: Softmax
) -> Softmax:
    """Parts of a softmax, of a number of entries, in blocks, of which the first is found."""
    if most <= block:
        return found
    turns = turns_of(number, block)
    return lax.fori_loop(1, turns, lambda i, found: merge_two(found, some(i * block)), found)


def scratch_shapes(step: Step) -> Scratch:
    """Outputs that hold what programs put aside."""
    by_codes, reranks = step.config.estimate_rest == "codes", step.config.rerank > 1
    amounts = step.scratch(np.float32, 2 * (step.pooled + 1)) if by_codes else None
    winners = step.scratch(np.int32, step.pooled + 1) if reranks else None
    return Scratch(amounts, winners, winners)


def end_inputs(
    step: Step,
    query: Float[Array, "B T N H"],
    caches: Caches,
    logits: Logits,
    known: Parts,
    index: PQIndex,
    weighed: Weighed | WeighedAsCells | None,
    kept: Kept | None,
    page_table: Array | None,
) -> EndInputs:
    """What a kernel attends to; of sums it takes those of the index."""
    sources = sources_of(step, index, weighed)
    return EndInputs(query, *caches, vectors(logits), known, sources, kept, page_table)


def sources_of(
    step: Step, index: PQIndex, weighed: Weighed | WeighedAsCells | None = None
) -> Sources | None:
    """What the rest is made from, None without it."""
    if index.values is None:
        return None
    return Sources(step.by_rows(index.values.sums), step.by_rows(index.values.counts), weighed)


# What every layer has one of, besides what is searched.
STATE = (
    "end.key",
    "end.value",
    "end.rest.sums",
    "end.rest.counts",
    *REACHED,
    *(f"end.{field}" for field in KEPT_STATE),
)


# Where a pool is


PositionIn = Callable[[Any, Step, Place], Callable[[Array, Array], Array]]


def in_lists(indices: Any, step: Step, place: Place) -> Callable[[Array, Array], Array]:
    """What `End.position_of` is, of lists i32[B, T, N, P]: their entries behind the sink."""

    def position_of(slot: Array, exists: Array) -> Array:
        entry = jnp.where(exists, step.config.sink_size + slot, 0)
        return backend.load(indices.at[(*place.at, entry)], mask=exists, other=-1)

    return position_of


def in_search(positions: Any, step: Step, place: Place) -> Callable[[Array, Array], Array]:
    """Likewise, of what a search has put in scratch, i32[R, Q, n]."""

    def position_of(slot: Array, exists: Array) -> Array:
        return backend.load(positions.at[(*place.of_kv, slot)], mask=exists, other=0)

    return position_of
