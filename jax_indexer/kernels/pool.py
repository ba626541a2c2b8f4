"""A pool of candidates: found by a search, ranked by true keys, and attended to.

Many programs read the keys of a pool, which takes the longest; beside them, what all candidates
weigh by PQ is added up. Then one program a query ends the step (`end.py`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
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
    padded,
    read_logits,
    read_query,
    shapes_of_end,
    vectors,
    write_length,
)
from jax_indexer.kernels.best import PAIRS_AT_ONCE
from jax_indexer.kernels.cells_select import (
    Inputs,
    Outputs,
    Scores,
    Search,
    SizesOutputs,
    cell_counts,
    count_candidates_kernel,
    search_for,
    search_launch,
)
from jax_indexer.kernels.end import (
    STATE,
    ByCell,
    End,
    EndInputs,
    Lists,
    PositionIn,
    Scratch,
    end_inputs,
    in_lists,
    in_search,
    scratch_shapes,
)
from jax_indexer.kernels.lookup_table import Tables
from jax_indexer.kernels.rest import (
    Estimated,
    Estimator,
    Means,
    Members,
    WeighedAsCells,
    asked_later,
    find_and_weigh,
    read_weighed,
    weigh_codes_launch,
    weigh_tokens_launch,
    weighed_beside,
)
from jax_indexer.kernels.step import Lengths, Place, Step
from jax_indexer.layout import power_of_2_from
from jax_indexer.reference import Attention, Caches, Logits
from jax_indexer.state import PQIndex, Sealing

# Positions of a cache, at the most, whose weights a search adds up: it counts in float32.
MOST_COUNTED = 1 << 24


def _without_pages(after: Lengths) -> Lengths:
    """For what reads no cache."""
    return after._replace(page_table=None)


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
) -> backend.Launch:
    """A launch that searches cells for a pool, but for the kernel."""
    assert index.cells is not None
    codes, after = step.by_rows(index.codes), _without_pages(after)
    search, _ = search_launch(step.of_pool, tables, codes, after, index.cells, None, layer)
    positions = step.scratch(np.int32, step.pooled + PAIRS_AT_ONCE)
    outputs = search.outputs.without_lists()._replace(positions=positions, **asked_later(step))
    return search._replace(outputs=outputs, in_place=())


class Searched(NamedTuple):
    """A search of cells for a pool.

    Attributes:
      sealing: of the cells.
      search: the launch.
      found: its outputs, of which others ask for some later.
    """

    sealing: Sealing
    search: backend.Launch
    found: Outputs


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
    search = pool_launch(step, tables, index, after, layer)
    num_warps = step.tuning.warps_for_rest(step.config.num_cells, by_code=False)
    kernel = functools.partial(search_pool_kernel, step=step, sealing=sealing, num_warps=num_warps)
    what = search._replace(
        kernel=kernel,
        inputs=PoolSearchInputs(search.inputs, vectors(logits) if rest == "mean" else None),
        state=tuple(f"search.{name}" for name in search.state),
    )
    launches = {"search": what}
    if rest == "codes":
        kernel = functools.partial(
            count_candidates_kernel, step=step, sealing=sealing, num_warps=num_warps
        )
        counts = jax.ShapeDtypeStruct((step.R, step.T, step.config.num_cells), np.int32)
        launches["sizes"] = search._replace(
            kernel=kernel, outputs=SizesOutputs(counts), programs=step.R * step.T
        )
    made = backend.launch_together(launches, num_warps=num_warps)
    found = made["search"]
    if "sizes" in made:
        found = found._replace(sizes=made["sizes"].sizes)
    return Pool(found.positions, in_search, Searched(sealing, search, found))


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
    if searched is not None:  # what tokens weigh is known
        found = searched.found
        lists = Lists(found.taken, found.cell) if rest == "codes" else None
        tokens = tokens._replace(table=None, codes=codes if lists else None)
        weighed = made["weighed"].weighed if lists else WeighedAsCells(found.weighed, None)
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
    search = pool_launch(step, tables, index, after, layer)
    sealing, table = index.cells.sealing, after.page_table
    num_warps = step.tuning.warps_for_rest(step.config.num_cells, by_codes)
    end = end_inputs(step, query, caches, logits, known, index, None, kept, table)
    what = backend.Launch(
        functools.partial(cells_pool_kernel, step=step, sealing=sealing, num_warps=num_warps),
        SearchedInputs(search.inputs, end, lengths),
        SearchedOutputs(
            search.outputs._replace(**cell_counts(step)),
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
