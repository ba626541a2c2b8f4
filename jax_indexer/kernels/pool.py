"""The end of a step behind a pool: its best by true keys are attended to, the rest is estimated.

One program a query reads the keys of the pool, finds the cut among their inner products, gathers
the winners and reads their values alone. What else is known of the query is merged in.
"""

import functools
from collections.abc import Callable, Sequence
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
    Ranks,
    find_cut,
    number_of,
    reduced_together,
)
from jax_indexer.kernels.cells_select import (
    FIRST_BITS,
    Inputs,
    Outputs,
    Scores,
    Search,
    search_for,
    search_launch,
)
from jax_indexer.kernels.lookup_table import Tables
from jax_indexer.kernels.rest import (
    Estimated,
    Estimator,
    Members,
    Sources,
    Weighed,
    WeighedCells,
    by_code,
    weigh_cells,
    weigh_tokens,
)
from jax_indexer.kernels.step import Lengths, Place, QueryPlan, Step, plan_query
from jax_indexer.layout import power_of_2_from
from jax_indexer.reference import NOT_A_CANDIDATE, Attention, Caches, Logits, made_logits, ordered
from jax_indexer.state import PQIndex, Sealing

# Positions of a cache, at the most, whose weights a search adds up: it counts in float32.
MOST_COUNTED = 1 << 24
# Entries of a pool that are in no list of a cell, of which sums are made at once.
OTHERS_AT_ONCE = 64


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
    """i32[R, Q, E + 1] of the entries of a pool, the last for what has no place; else None.

    Attributes:
      by_key: ranks of true inner products; behind them what is added up by code.
      winners, winning: positions of winners, and their ranks.
    """

    by_key: Any
    winners: Any
    winning: Any


class End(NamedTuple):
    """One program's view of its query.

    Attributes:
      step: of the config that reranks.
      inputs, scratch: of the launch; no inputs where nothing is attended to.
      place: of the query.
      plan: of the query, by the config that reranks.
      number: entries of the pool between sink and window.
      position_of: from int32[n] entries, and which of them exist, to positions.
    """

    step: Step
    inputs: EndInputs | Any
    scratch: Scratch
    place: Place
    plan: QueryPlan
    number: Array
    position_of: Callable[[Array, Array], Array]

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

        return in_blocks(some, self.number, self.step.pooled, block)

    def rank_keys(self, query: Array) -> None:
        """Writes the ranks of true inner products to scratch."""
        place, by_key, cache = self.place, self.scratch.by_key, self.inputs.key
        most = self.step.tuning.pooled_bytes // (padded(cache.shape[3]) * cache.dtype.itemsize)
        block = max(min(most, power_of_2_from(self.step.pooled) // 4), ROWS)

        def slots(i):
            return i * block + jnp.arange(block, dtype=jnp.int32)

        def positions(i):
            return self.entries(slots(i))[0]

        def keys(i, position):
            return self.rows(("key",), position, slots(i) < self.number)[0]

        def rank(i, key):
            product = jnp.sum(key.astype(jnp.float32) * query[None, :], axis=1)
            slot = slots(i)
            mask = slot < self.step.pooled
            into = jnp.where(mask, slot, self.step.pooled)
            backend.store(by_key.at[(*place.of_kv, into)], ordered(product), mask=mask)

        # Positions are read one block further ahead, so that no load of keys waits for them.
        def two(i, ahead):
            # While one block is multiplied the next is on its way, in registers of its own: to move
            # keys from one to another is to wait for them.
            first, position = ahead
            second, position = keys(2 * i + 1, position), positions(2 * i + 2)
            rank(2 * i, first)
            following, position = keys(2 * i + 2, position), positions(2 * i + 3)
            rank(2 * i + 1, second)
            return following, position

        def one(i, ahead):
            first, position = ahead
            following, position = keys(i + 1, position), positions(i + 2)
            rank(i, first)
            return following, position

        at_once, some = (1, one) if block < most else (2, two)  # less code for a small pool
        turns = lax.div(self.number + (at_once * block - 1), jnp.int32(at_once * block))
        lax.fori_loop(0, turns, some, (keys(0, positions(0)), positions(1)))

    def winners(self, position: Array, rank: Array) -> Array:
        """Which of the pool are attended to: the best; of those at the cut the lowest positions."""
        live = rank != NOT_A_CANDIDATE
        lowest, most = reduced_together((~jnp.where(live, rank, HIGHEST), rank), jnp.max)
        search = functools.partial(find_cut, steps_without_ties=None)
        ranks = Ranks.of(rank, self.step.pooled)
        # At most so many are ranked; all have a rank where as many are wanted.
        cut = search(ranks, self.num_winners, Bounds(~lowest, most + 1, self.number))
        # As ranks, the lowest positions come first.
        tied = (rank == cut.rank) & (cut.ties > 0)
        order = jnp.where(tied, ~position, NOT_A_CANDIDATE)
        low, number = jnp.int32(-(2**31) + 1), jnp.where(cut.ties > 0, self.number, 0)
        bounds = Bounds(low, jnp.int32(0), number)
        ties = search(Ranks.of(order, self.step.pooled), cut.ties, bounds)
        return live & ((rank > cut.rank) | (tied & (order >= ties.lowest)))

    def best_of_pool(self, query: Array, logits: Logits, block: int) -> tuple[Softmax, Members]:
        """Attention to the winners, and what is known of all of the pool."""
        place, scratch, size = self.place, self.scratch, self.step.pooled
        self.rank_keys(query)
        backend.barrier()
        position, exists = self.entries(self.slots)
        live = self.in_pool(position, exists)
        rank = backend.load(scratch.by_key.at[(*place.of_kv, self.slots)], mask=exists, other=0)
        rank = jnp.where(live, rank, NOT_A_CANDIDATE)
        winner = self.winners(position, rank)
        until = jnp.cumsum(winner.astype(jnp.int32))
        to = jnp.where(winner, until - 1, size)
        for into, x in ((scratch.winners, position), (scratch.winning, rank)):
            backend.store(into.at[(*place.of_kv, to)], x, mask=winner)
        count = self.num_winners
        backend.barrier()

        def some(first) -> Softmax:
            slot = first + jnp.arange(block, dtype=jnp.int32)
            exists = slot < count
            at, ranks = (
                backend.load(x.at[(*place.of_kv, slot)], mask=exists, other=0)
                for x in (scratch.winners, scratch.winning)
            )
            logit = jnp.where(exists, made_logits(number_of(ranks), logits), -jnp.inf)
            return softmax(logit, exists, *self.rows(("value",), at, exists))

        found = in_blocks(some, count, min(self.step.num_middle, size), block)
        logit = jnp.where(live, made_logits(number_of(rank), logits), -jnp.inf)
        is_candidate = live & ~self.is_short
        lost = jnp.where(is_candidate & ~winner & (logit < jnp.inf), logit, -jnp.inf)
        return found, Members.of(position, is_candidate, logit, lost)

    def put_lost(self, pool: Members, search: Search, by: tuple[int, int]) -> list[Array]:
        """What losers weigh: by cell to `lost`, for those from the list of one; else by code.

        Listed winners of a cell lie side by side, so what they weigh is a difference of a running
        sum: no two lanes write to one cell.
        """
        assert pool.lost is not None
        at, slot, config = self.place.of_kv, self.slots, self.step.config
        own_of = search.outputs.own
        own = backend.load(own_of.at[(*at, slot)], mask=pool.is_candidate, other=-1)
        following = jnp.minimum(slot + 1, self.step.pooled)
        following_of = backend.load(
            own_of.at[(*at, following)], mask=following < self.number, other=-1
        )
        # They lie before all others.
        is_listed = own >= 0
        until = jnp.cumsum(jnp.where(is_listed, pool.lost, 0))
        mask = slot < self.step.pooled
        into = jnp.where(mask, slot, self.step.pooled)
        backend.barrier()
        for scratch, x in ((self.scratch.by_key, until), (self.scratch.winning, pool.lost)):
            bits = lax.bitcast_convert_type(jnp.where(pool.is_candidate, x, 0), jnp.int32)
            backend.store(scratch.at[(*at, into)], bits, mask=mask)
        listed = jnp.max(jnp.where(is_listed, slot + 1, 0))
        cell, begin = (own >> FIRST_BITS), own & ((1 << FIRST_BITS) - 1)
        ends = is_listed & ((following_of < 0) | (following_of >> FIRST_BITS != cell))
        ends &= (cell < config.num_cells) & (begin <= slot)
        backend.barrier()

        def read(scratch: Any, place: Array, wanted: Array) -> Array:
            bits = backend.load(scratch.at[(*at, place)], mask=wanted, other=0)
            return lax.bitcast_convert_type(bits, jnp.float32)

        before = read(self.scratch.by_key, jnp.maximum(begin - 1, 0), ends & (begin > 0))
        # Not to a cell: an interpreter writes back what lies there, in any order.
        into = jnp.where(ends, cell, np.int32(config.num_cells))
        backend.store(search.outputs.lost.at[(*at, into)], until - before, mask=ends)

        def some(i, sums):
            slot = listed + i * OTHERS_AT_ONCE + jnp.arange(OTHERS_AT_ONCE, dtype=jnp.int32)
            exists = slot < self.number
            slot = jnp.where(exists, slot, 0)
            cell = ~backend.load(own_of.at[(*at, slot)], mask=exists, other=-1)
            amount = read(self.scratch.winning, slot, exists)
            codes = search.scores.codes_of_cells(cell)
            return [x + by_code(code, by[1], amount) for x, code in zip(sums, codes, strict=True)]

        turns = lax.div(self.number - listed + (OTHERS_AT_ONCE - 1), jnp.int32(OTHERS_AT_ONCE))
        others = lax.fori_loop(0, turns, some, [jnp.zeros(by[1], jnp.float32)] * by[0])
        backend.barrier()
        return others

    def by_codes(self, amount: Array, scores: Scores, by: tuple[int, int]) -> list[Array]:
        """Sums of what the pool's entries have, 0 for what is no candidate, by code."""
        number = by[1]
        if number == 1:
            return [jnp.sum(amount)[None]]
        at_once = max(self.step.tuning.pooled_tile // number, 16)
        if len(self.slots) <= at_once:
            codes = scores.codes_of(*self.entries(self.slots))
            return [by_code(code, number, amount) for code in codes]
        bits = lax.bitcast_convert_type(amount, jnp.int32)
        mask = self.slots < self.step.pooled
        into = jnp.where(mask, self.slots, self.step.pooled)
        by_key = self.scratch.by_key
        backend.store(by_key.at[(*self.place.of_kv, into)], bits, mask=mask)
        backend.barrier()

        def some(i, sums):
            slot = i * at_once + jnp.arange(at_once, dtype=jnp.int32)
            position, exists = self.entries(slot)
            bits = backend.load(by_key.at[(*self.place.of_kv, slot)], mask=exists, other=0)
            amount = lax.bitcast_convert_type(bits, jnp.float32)
            codes = scores.codes_of(position, exists)
            return [x + by_code(code, number, amount) for x, code in zip(sums, codes, strict=True)]

        turns = lax.div(self.number + (at_once - 1), jnp.int32(at_once))
        return lax.fori_loop(0, turns, some, [jnp.zeros(number, jnp.float32)] * by[0])

    def write(
        self,
        output: Attention,
        scores: Scores,
        estimate: Callable[[Estimator, Members], Estimated],
    ) -> None:
        """Attends, and writes the output; `estimate` takes what is known of the pool."""
        place, value_size = self.place, self.inputs.value.shape[3]
        tuning = self.step.tuning
        block = block_of(self.inputs.query.shape[3], value_size, tuning.attended_tile, tuning)
        query, logits = read_query(self.inputs.query, *place.at), read_logits(self.inputs.logits)
        if self.step.config.rerank > 1:
            found, pool = self.best_of_pool(query, logits, block)
        else:
            found = self.all_of_pool(query, logits, block)
            position, exists = self.entries(self.slots)
            is_candidate = exists & ~self.is_short
            pool = Members(position, is_candidate, None, None, found.largest, found.total)
        found = merge_two(read_parts(self.inputs.known, *place.at), found)
        if self.inputs.rest is not None:
            estimator = Estimator(self.step, scores, place, logits, self.inputs.rest)
            found = merge_two(found, estimate(estimator, pool).rest)
        write_output(output, *place.at, found)


def in_blocks(some: Callable[[Any], Softmax], number: Array, most: int, block: int) -> Softmax:
    """Parts of a softmax, of a number of entries, in blocks; of one block at the least."""
    found = some(0)
    if most <= block:
        return found
    turns = lax.div(number + (block - 1), jnp.int32(block))
    return lax.fori_loop(1, turns, lambda i, found: merge_two(found, some(i * block)), found)


def scratch_shapes(step: Step) -> Scratch:
    """Outputs that hold what programs put aside."""
    shape = jax.ShapeDtypeStruct((step.R, step.Q, step.pooled + 1), np.int32)
    of_winners = shape if step.config.rerank > 1 else None
    return Scratch(shape, of_winners, of_winners)


def end_inputs(
    step: Step,
    query: Float[Array, "B T N H"],
    caches: Caches,
    logits: Logits,
    known: Parts,
    index: PQIndex,
    weighed: Weighed | None,
    kept: Kept | None,
    page_table: Array | None,
) -> EndInputs:
    """What a kernel attends to; of sums it takes those of the index."""
    sources = sources_of(step, index, weighed)
    return EndInputs(query, *caches, vectors(logits), known, sources, kept, page_table)


def _without_pages(after: Lengths) -> Lengths:
    """For what reads no cache."""
    return after._replace(page_table=None)


def sources_of(step: Step, index: PQIndex, weighed: Weighed | None = None) -> Sources | None:
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


def cells_pool_kernel(
    program,
    inputs: SearchedInputs,
    outputs: SearchedOutputs,
    *,
    step: Step,
    sealing: Sealing,
    num_warps: int,
):
    """Searches, and ends the step: of a pool nobody asks in which order it is."""
    place, of_pool = Place.of(step, program), step.of_pool
    token, is_first = 0, place.head == 0
    if step.T > 1:
        token, is_first = place.token, is_first & (place.token == 0)
    plan, plan_of_pool = (
        plan_query(x, inputs.search.lengths, place.kv_row, token) for x in (step, of_pool)
    )
    search = search_for(
        of_pool, sealing, num_warps, inputs.search, outputs.search, *place.of_kv, plan_of_pool
    )
    fits = search.state_fits()
    write_length(inputs.search.lengths, outputs.lengths, place.row, is_first)
    if outputs.search.lost is not None:
        cell = jnp.arange(step.config.num_cells, dtype=jnp.int32)
        backend.store(outputs.search.lost.at[(*place.of_kv, cell)], jnp.zeros(cell.size))
    weigh, fill, put = None, search.put_in_scratch, search.put_member
    if inputs.end.rest is not None:
        weigh = functools.partial(weigh_cells, read_logits(inputs.end.logits), search)
    search.find(fits, fill, put, lambda count: None, weigh)
    number = plan_of_pool.between(step.config)

    @pl.when(plan_of_pool.num_heavy == 0)  # all of a short context is listed
    def _():
        slot = jnp.arange(power_of_2_from(step.pooled), dtype=jnp.int32)
        put(step.config.sink_size + slot, slot, slot < number)

    backend.barrier()
    # Early, and few numbers: nothing waits for them.
    weighed = None if inputs.end.rest is None else WeighedCells.read(search, fits)

    def position_of(slot: Array, exists: Array) -> Array:
        return backend.load(outputs.search.positions.at[(*place.of_kv, slot)], mask=exists, other=0)

    end = End(step, inputs.end, outputs.scratch, place, plan, number, position_of)

    def estimate(estimator: Estimator, pool: Members) -> Estimated:
        assert weighed is not None
        put_lost = None
        if pool.lost is not None:
            put_lost = functools.partial(end.put_lost, pool, search, estimator.by)
        return estimator.of_cells(search, weighed, pool, put_lost)

    end.write(outputs.output, search.scores, estimate)


def attend_pool_of_cells(
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
    """Selects a pool for a few query tokens and does the rest of a step, in one kernel.

    Arguments and result are those of `attend_pool`, which takes lists. The pool comes with it, in
    an order of its own.

    Source: CONTRACT.md, sections 3 and 4.
    """
    assert index.cells is not None
    codes, table, after = step.by_rows(index.codes), after.page_table, _without_pages(after)
    search, _ = search_launch(step.of_pool, tables, codes, after, index.cells, None, layer)
    rest, reranks = step.config.estimate_rest, step.config.rerank > 1
    num_warps = step.tuning.warps_for_pool(step.config.num_cells, reranks or rest == "codes")

    def integers(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((step.R, step.Q, *sizes), np.int32)

    lost = None
    if rest == "codes" and reranks:
        lost = jax.ShapeDtypeStruct((step.R, step.Q, step.config.num_cells), np.float32)
    scratch = search.outputs._replace(
        indices=None,
        counts=None,
        bits=None,
        bits_before=None,
        positions=integers(step.pooled + PAIRS_AT_ONCE),
        weighed=jax.ShapeDtypeStruct((step.R, step.Q, 6), np.float32) if rest else None,
        left=integers(step.config.num_cells + 1) if rest == "codes" else None,
        lost=lost,
        own=None if lost is None else integers(step.pooled + 1),
    )
    output, lengths_after = shapes_of_end(query, caches.value.shape[-1], lengths, after, layer)
    what = backend.Launch(
        functools.partial(
            cells_pool_kernel, step=step, sealing=index.cells.sealing, num_warps=num_warps
        ),
        SearchedInputs(
            search.inputs,
            end_inputs(step, query, caches, logits, known, index, None, kept, table),
            lengths,
        ),
        SearchedOutputs(
            scratch,
            scratch_shapes(step),
            output,
            lengths_after,
        ),
        programs=search.programs,
        in_place=REACHED,
        state=(*(f"search.{name}" for name in search.state), *STATE),
        layer=layer,
    )
    made = backend.launch(what, num_warps=num_warps)
    return Ended(made.output, made.lengths), made.search.positions


# Behind lists


class PoolInputs(NamedTuple):
    """Lists of a pool, i32[B, T, N, P], and what is done with them."""

    indices: Any
    search: Inputs
    end: EndInputs
    lengths: Any  # not read


class PoolOutputs(NamedTuple):
    """Scratch, and what ends a step."""

    scratch: Scratch
    output: Attention
    lengths: Any


def position_in(indices: Any, step: Step, place: Place) -> Callable[[Array, Array], Array]:
    """What `End.position_of` is, for a list: its entries behind the sink."""

    def position_of(slot: Array, exists: Array) -> Array:
        entry = jnp.where(exists, step.config.sink_size + slot, 0)
        return backend.load(indices.at[(*place.at, entry)], mask=exists, other=-1)

    return position_of


def attend_pool_kernel(program, inputs: PoolInputs, outputs: PoolOutputs, *, step: Step):
    place, of_pool = Place.of(step, program), step.of_pool
    plan, plan_of_pool = (
        plan_query(x, inputs.search.lengths, place.kv_row, place.token) for x in (step, of_pool)
    )
    is_first = (place.token == 0) & (place.head == 0)
    write_length(inputs.search.lengths, outputs.lengths, place.row, is_first)

    number, position_of = (
        plan_of_pool.between(step.config),
        position_in(inputs.indices, step, place),
    )
    end = End(step, inputs.end, outputs.scratch, place, plan, number, position_of)
    scores = Scores(step, inputs.search.table, inputs.search.codes, *place.of_kv)

    def estimate(estimator: Estimator, pool: Members) -> Estimated:
        by_codes = functools.partial(end.by_codes, scores=scores, by=estimator.by)
        return estimator.of_parts(pool, by_codes)

    end.write(outputs.output, scores, estimate)


def attend_pool(
    step: Step,
    tables: Tables,
    index: PQIndex,
    after: Lengths,
    query: Float[Array, "B T N H"],
    caches: Caches,
    indices: Int32[Array, "B T N P"],
    logits: Logits,
    known: Parts,
    lengths: Lengths,
    layer: Array | None,
    kept: Kept | None = None,
) -> Ended:
    """Attends to the best of a pool by their true keys, and estimates what is left.

    Args:
      step: of the config that reranks.
      tables: look-up tables.
      index: after the step.
      after: the lengths after it.
      query: the queries.
      caches: keys and values, of all layers if there are any.
      indices: lists of the pool.
      logits: how to make logits.
      known: the parts of sink and window.
      lengths: of all layers, in which those of this one are replaced.
      layer: of index and caches.
      kept: of caches in host memory.

    Returns:
      The output, and the lengths.

    Source: CONTRACT.md, section 4.
    """
    codes, table, after = step.by_rows(index.codes), after.page_table, _without_pages(after)
    search = Inputs(after, None, tables.by_query, codes, None, None, None)
    weighed = None
    if step.config.estimate_rest:
        weighed = weigh_tokens(step, search, indices, logits, layer)
    what = backend.Launch(
        functools.partial(attend_pool_kernel, step=step),
        PoolInputs(
            indices,
            search,
            end_inputs(step, query, caches, logits, known, index, weighed, kept, table),
            lengths,
        ),
        PoolOutputs(
            scratch_shapes(step),
            *shapes_of_end(query, caches.value.shape[-1], lengths, after, layer),
        ),
        programs=step.B * step.T * step.N,
        in_place=REACHED,
        state=("search.codes", *STATE),
        layer=layer,
    )
    made = backend.launch(what, num_warps=step.tuning.attended_warps)
    return Ended(made.output, made.lengths)
