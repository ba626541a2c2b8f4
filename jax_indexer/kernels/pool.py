"""The end of a step behind a pool: its best by true keys are attended to, the rest is estimated.

Many programs read the keys of a pool, which takes the longest; beside them, what all candidates
weigh by PQ is added up. Then one program a query finds the cut among the true inner products,
gathers the winners and reads their values alone. What else is known of the query is merged in.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jaxtyping import Float, Int32

from jax_indexer.kernels import backend
from jax_indexer.kernels.attend import (
    KEPT_STATE,
    REACHED,
    ROWS,
    Ended,
    Kept,
    Parts,
    Softmax,
    attend,
    block_of,
    finite,
    merge_two,
    padded,
    read_caches,
    read_logits,
    read_parts,
    read_query,
    shapes_of_end,
    softmax,
    vectors,
    write_length,
    write_output,
)
from jax_indexer.kernels.best import (
    HIGHEST,
    PAIRS_AT_ONCE,
    Bounds,
    Cut,
    Ranks,
    find_cut,
    number_of,
    reduced_together,
)
from jax_indexer.kernels.cells_select import (
    FIRST_BITS,
    TAKEN,
    Inputs,
    Outputs,
    Scores,
    Search,
    TailOutputs,
    Taken,
    cell_counts,
    count_tail_kernel,
    search_for,
    search_launch,
)
from jax_indexer.kernels.lookup_table import Tables
from jax_indexer.kernels.rest import (
    NUMBERS,
    Estimated,
    Estimator,
    Means,
    Members,
    Sources,
    Weighed,
    WeighedAsCells,
    by_code,
    find_and_weigh,
    read_weighed,
    weigh_codes_launch,
    weigh_tokens_launch,
    weighed_beside,
)
from jax_indexer.kernels.step import Lengths, Place, QueryPlan, Step
from jax_indexer.layout import power_of_2_from
from jax_indexer.reference import NOT_A_CANDIDATE, Attention, Caches, Logits, made_logits, ordered
from jax_indexer.state import PQIndex, Sealing

# Positions of a cache, at the most, whose weights a search adds up: it counts in float32.
MOST_COUNTED = 1 << 24
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
      amounts, until: what is added up by code, and running sums of it.
      winners, winning: positions of winners, and their ranks.
    """

    amounts: Any
    until: Any
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

    def put(self, scratch: Any, x: Array) -> None:
        """What lanes of the pool have."""
        mask = self.slots < self.step.pooled
        into = jnp.where(mask, self.slots, self.step.pooled)
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
        self.end.put(self.end.scratch.amounts, amount)
        self.end.put(self.end.scratch.until, jnp.cumsum(amount))

    def sums(self) -> list[Array]:
        """Those of what was put aside."""
        config, scratch, read = self.end.step.config, self.end.scratch, self.end.read

        def add(sums: list[Array], run: Runs) -> list[Array]:
            of_lists = run.exists & run.is_list
            amount = read(scratch.until, run.ends - 1, of_lists)
            amount -= read(scratch.until, run.begins - 1, of_lists & (run.begins > 0))
            amount += read(scratch.amounts, run.begins, run.exists & ~run.is_list)
            return added(sums, run.codes, amount)

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
    amounts = step.scratch(np.float32, step.pooled + 1) if by_codes else None
    winners = step.scratch(np.int32, step.pooled + 1) if reranks else None
    return Scratch(amounts, amounts, winners, winners)


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


def _without_pages(after: Lengths) -> Lengths:
    """For what reads no cache."""
    return after._replace(page_table=None)


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


# The keys of a pool


class RankInputs(NamedTuple):
    """A pool, and what its entries are ranked by.

    Attributes:
      lengths: after the step.
      pool: where `position_in` finds the entries.
      query: [B, T, N, H].
      key: the cache.
      kept, page_table: as in `EndInputs`.
    """

    lengths: Lengths
    pool: Any
    query: Any
    key: Any
    kept: Kept | None
    page_table: Any


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


class RankOutputs(NamedTuple):
    """i32[R, Q, E + 1] ranks of true inner products."""

    ranks: Any


def rank_keys_kernel(
    program,
    inputs: RankInputs,
    outputs: RankOutputs,
    *,
    step: Step,
    position_in: PositionIn,
    block: int,
):
    blocks = pl.cdiv(step.pooled, block)
    place, first = Place.of(step, program // blocks), program % blocks * block
    plan = place.plan(step, inputs.lengths)
    number = place.plan(step.of_pool, inputs.lengths).between(step.config)
    position_of = position_in(inputs.pool, step, place)
    end = End(step, inputs, None, place, plan, number, position_of, None)

    @pl.when(first < number)
    def _():
        end.rank_keys(outputs.ranks, read_query(inputs.query, *place.at), first, block)


def rank_launch(
    step: Step,
    after: Lengths,
    query: Array,
    key: Array,
    pool: Array,
    position_in: PositionIn,
    layer: Array | None,
    kept: Kept | None,
    page_table: Array | None,
) -> backend.Launch:
    """The launch that ranks the entries of a pool by their keys."""
    most = step.tuning.ranked_bytes // (padded(query.shape[3]) * key.dtype.itemsize)
    block = min(max(most, ROWS), max(power_of_2_from(step.pooled), ROWS))
    return backend.Launch(
        functools.partial(rank_keys_kernel, step=step, position_in=position_in, block=block),
        RankInputs(after, pool, query, key, kept, page_table),
        RankOutputs(step.scratch(np.int32, step.pooled + 1)),
        programs=step.B * step.T * step.N * pl.cdiv(step.pooled, block),
        state=("key", *KEPT_STATE),
        layer=layer,
    )


class PoolInputs(NamedTuple):
    """A pool, where `position_in` finds its entries, and what is done with it."""

    pool: Any
    lists: Lists | None
    search: Inputs
    end: EndInputs
    ranked: RankOutputs | None
    lengths: Any  # not read


class PoolOutputs(NamedTuple):
    """Scratch, and what ends a step."""

    scratch: Scratch
    output: Attention
    lengths: Any


def attend_pool_kernel(
    program, inputs: PoolInputs, outputs: PoolOutputs, *, step: Step, position_in: PositionIn
):
    place = Place.of(step, program)
    is_first, plan = place.is_first(step), place.plan(step, inputs.search.lengths)
    number = place.plan(step.of_pool, inputs.search.lengths).between(step.config)
    write_length(inputs.search.lengths, outputs.lengths, place.row, is_first)
    position_of = position_in(inputs.pool, step, place)
    ranks = None if inputs.ranked is None else inputs.ranked.ranks
    end = End(step, inputs.end, outputs.scratch, place, plan, number, position_of, ranks)
    scores = Scores(step, inputs.search.table, inputs.search.codes, *place.of_kv)

    by_cell = None if inputs.lists is None else ByCell.of(end, scores, inputs.lists)
    found = None if inputs.end.rest is None else inputs.end.rest.weighed
    weighed = read_weighed(found, place) if isinstance(found, WeighedAsCells) else None

    def estimate(
        estimator: Estimator, pool: Members, means: Means, lost: list[Array] | None
    ) -> Estimated:
        if weighed is not None:
            return estimator.of_cells(*weighed, pool, means, lost)
        by_codes = functools.partial(end.by_codes, scores=scores, by=estimator.by)
        return estimator.of_parts(pool, means, by_codes)

    end.write(outputs.output, scores, estimate, by_cell)


def end_launch(
    step: Step,
    pool: "Pool",
    lists: Lists | None,
    search: Inputs,
    end: EndInputs,
    ranked: RankOutputs | None,
    lengths: Lengths,
    layer: Array | None,
) -> Ended:
    """Attends to a pool or the best of it, and merges all that is known."""
    what = backend.Launch(
        functools.partial(attend_pool_kernel, step=step, position_in=pool.position_in),
        PoolInputs(pool.entries, lists, search, end, ranked, lengths),
        PoolOutputs(
            scratch_shapes(step),
            *shapes_of_end(end.query, end.value.shape[-1], lengths, search.lengths, layer),
        ),
        programs=step.B * step.T * step.N,
        in_place=REACHED,
        state=("search.codes", *STATE),
        layer=layer,
    )
    by_codes = step.config.estimate_rest == "codes"
    num_warps = step.tuning.summed_warps if by_codes else step.tuning.pooled_warps
    made = backend.launch(what, num_warps=num_warps)
    return Ended(made.output, made.lengths)


# Behind a search of cells


class SearchedInputs(NamedTuple):
    """What is searched for a pool, and what is done with it."""

    search: Inputs
    end: EndInputs
    lengths: Any  # not read


class SearchedOutputs(NamedTuple):
    """The scratch of a search, which has no lists, that of a pool, and what ends a step."""

    search: Outputs
    scratch: Scratch
    output: Attention
    lengths: Any


def search_of_pool(
    step: Step, sealing: Sealing, num_warps: int, inputs: Inputs, outputs: Outputs, place: Place
) -> tuple[Search, Array, Callable[..., None]]:
    """A search for a pool, whether its state fits, and what puts the pool into scratch.

    Of a pool nobody asks in which order it is.
    """
    plan = place.plan(step.of_pool, inputs.lengths)
    search = search_for(step.of_pool, sealing, num_warps, inputs, outputs, *place.of_kv, plan)
    fits, put, number = search.state_fits(), search.put_in_scratch, plan.between(step.config)

    def find(weigh: Callable | None = None) -> None:
        search.find(fits, put, put, lambda count: None, weigh)

        @pl.when(plan.num_heavy == 0)  # all of a short context is listed
        def _():
            slot = jnp.arange(power_of_2_from(step.pooled), dtype=jnp.int32)
            put(step.config.sink_size + slot, slot, slot < number)

    return search, fits, find


class PoolSearchInputs(NamedTuple):
    """What is searched, and how to make logits where candidates are weighed."""

    search: Inputs
    logits: Logits | None


def search_pool_kernel(
    program,
    inputs: PoolSearchInputs,
    outputs: Outputs,
    *,
    step: Step,
    sealing: Sealing,
    num_warps: int,
):
    place = Place.of(step, program)
    search, fits, find = search_of_pool(step, sealing, num_warps, inputs.search, outputs, place)
    if inputs.logits is None:
        find()
    else:
        find_and_weigh(search, fits, read_logits(inputs.logits), find)


def cells_pool_kernel(
    program,
    inputs: SearchedInputs,
    outputs: SearchedOutputs,
    *,
    step: Step,
    sealing: Sealing,
    num_warps: int,
):
    """Searches, and attends to all that is found."""
    place = Place.of(step, program)
    is_first = place.is_first(step)
    of_search = inputs.search, outputs.search
    search, fits, find = search_of_pool(step, sealing, num_warps, *of_search, place)
    write_length(inputs.search.lengths, outputs.lengths, place.row, is_first)
    weighed, weights = weighed_beside(search, fits, read_logits(inputs.end.logits), find)
    plan = place.plan(step, inputs.search.lengths)
    number = search.plan.between(step.config)
    position_of = in_search(outputs.search.positions, step, place)
    end = End(step, inputs.end, outputs.scratch, place, plan, number, position_of, None)

    def estimate(
        estimator: Estimator, pool: Members, means: Means, lost: list[Array] | None
    ) -> Estimated:
        return estimator.of_cells(weighed, weights, pool, means, lost)

    end.write(outputs.output, search.scores, estimate)


def pool_launch(
    step: Step,
    tables: Tables,
    index: PQIndex,
    after: Lengths,
    layer: Array | None,
    *,
    by_codes: bool,
) -> backend.Launch:
    """A launch that searches cells for a pool, but for the kernel; `by_codes`: for sums by code."""
    assert index.cells is not None
    codes, after = step.by_rows(index.codes), _without_pages(after)
    search, _ = search_launch(step.of_pool, tables, codes, after, index.cells, None, layer)
    lists = dict.fromkeys(("indices", "counts", "bits", "bits_before"))
    outputs = search.outputs._replace(
        **lists,
        positions=step.scratch(np.int32, step.pooled + PAIRS_AT_ONCE),
        weighed=step.scratch(np.float32, NUMBERS) if step.config.estimate_rest else None,
        taken=step.scratch(np.int32, TAKEN) if by_codes else None,
    )
    return search._replace(outputs=outputs, in_place=())


class Searched(NamedTuple):
    """A search of cells for a pool.

    Attributes:
      sealing: of the cells.
      search: the launch.
      found: its outputs, of which others ask for some later.
      in_tail: as in `Outputs`; None where nothing is added up by code.
    """

    sealing: Sealing
    search: backend.Launch
    found: Outputs
    in_tail: Array | None


class Pool(NamedTuple):
    """Candidates of each query.

    Attributes:
      entries: where `position_in` finds them.
      position_in: `in_lists` or `in_search`.
      searched: the search that found them; None for lists.
    """

    entries: Array
    position_in: PositionIn
    searched: Searched | None

    @classmethod
    def of_lists(cls, indices: Int32[Array, "B T N P"]) -> "Pool":
        return cls(indices, in_lists, None)


def search_pool(
    step: Step, tables: Tables, index: PQIndex, after: Lengths, logits: Logits, layer: Array | None
) -> Pool:
    """Searches cells for the pool that a step reranks.

    Arguments are those of `attend_pool`.

    Source: CONTRACT.md, section 3.
    """
    assert index.cells is not None
    rest, sealing = step.config.estimate_rest, index.cells.sealing
    search = pool_launch(step, tables, index, after, layer, by_codes=rest == "codes")
    num_warps = step.tuning.warps_for_rest(step.config.num_cells, by_code=False)
    kernel = functools.partial(search_pool_kernel, step=step, sealing=sealing, num_warps=num_warps)
    what = search._replace(
        kernel=kernel,
        inputs=PoolSearchInputs(search.inputs, vectors(logits) if rest else None),
        state=tuple(f"search.{name}" for name in search.state),
    )
    launches = {"search": what}
    if rest == "codes":
        kernel = functools.partial(
            count_tail_kernel, step=step, sealing=sealing, num_warps=num_warps
        )
        counts = jax.ShapeDtypeStruct((step.R, step.T, step.config.num_cells), np.int32)
        launches["tail"] = search._replace(
            kernel=kernel, outputs=TailOutputs(counts), programs=step.R * step.T
        )
    made = backend.launch_together(launches, num_warps=num_warps)
    found, in_tail = made["search"], made["tail"].in_tail if "tail" in made else None
    return Pool(found.positions, in_search, Searched(sealing, search, found, in_tail))


def attend_pool(
    step: Step,
    tables: Tables,
    index: PQIndex,
    after: Lengths,
    pool: Pool,
    query: Float[Array, "B T N H"],
    caches: Caches,
    logits: Logits,
    known: Parts,
    lengths: Lengths,
    layer: Array | None,
    kept: Kept | None = None,
) -> Ended:
    """Attends to the best of a pool by its true keys, and estimates what is left.

    Args:
      step: of the config that reranks.
      tables: look-up tables.
      index: after the step.
      after: the lengths after it.
      pool: the pool.
      query: the queries.
      caches: keys and values, of all layers if there are any.
      logits: how to make logits.
      known: the parts of sink and window.
      lengths: of all layers, in which those of this one are replaced.
      layer: of index and caches.
      kept: of caches in host memory.

    Returns:
      The output, and the lengths.

    Source: CONTRACT.md, section 4.
    """
    searched, rest, launches = pool.searched, step.config.estimate_rest, {}
    table, after = after.page_table, _without_pages(after)
    codes = step.by_rows(index.codes)
    tokens = Inputs(after, None, tables.by_query, codes, None, None, None)
    if searched is None and rest:
        launches["weighed"] = weigh_tokens_launch(step, tokens, pool.entries, logits, layer)
    elif searched is not None and rest == "codes":
        launches["weighed"] = weigh_codes_launch(step, *searched, logits)
    if step.config.rerank > 1:
        of_keys = step, after, query, caches.key, pool.entries
        launches["ranked"] = rank_launch(*of_keys, pool.position_in, layer, kept, table)
    made = backend.launch_together(launches, num_warps=step.tuning.ranked_warps)
    weighed, lists = made.get("weighed"), None
    if searched is not None:  # it says what tokens weigh
        found = searched.found
        lists = Lists(found.taken, found.cell) if rest == "codes" else None
        tokens = tokens._replace(table=None, codes=codes if lists else None)
        weighed = WeighedAsCells(found.weighed, weighed and weighed.weights) if rest else None
    end = end_inputs(step, query, caches, logits, known, index, weighed, kept, table)
    return end_launch(step, pool, lists, tokens, end, made.get("ranked"), lengths, layer)


def attend_cells_with_rest(
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
    """Selects for a few query tokens, attends, and estimates what is left, in one kernel.

    Arguments are those of `attend_pool`. What is selected comes with the result, in an order of its
    own.

    Source: CONTRACT.md, sections 3 and 4.
    """
    assert index.cells is not None
    by_codes = step.config.estimate_rest == "codes"
    search = pool_launch(step, tables, index, after, layer, by_codes=by_codes)
    sealing, table = index.cells.sealing, after.page_table
    num_warps = step.tuning.warps_for_rest(step.config.num_cells, by_codes)
    end = end_inputs(step, query, caches, logits, known, index, None, kept, table)
    what = backend.Launch(
        functools.partial(cells_pool_kernel, step=step, sealing=sealing, num_warps=num_warps),
        SearchedInputs(search.inputs, end, lengths),
        SearchedOutputs(
            search.outputs._replace(**cell_counts(step) if by_codes else {}),
            scratch_shapes(step),
            *shapes_of_end(query, caches.value.shape[-1], lengths, _without_pages(after), layer),
        ),
        programs=search.programs,
        in_place=REACHED,
        state=(*(f"search.{name}" for name in search.state), *STATE),
        layer=layer,
    )
    made = backend.launch(what, num_warps=num_warps)
    return Ended(made.output, made.lengths), made.search.positions
