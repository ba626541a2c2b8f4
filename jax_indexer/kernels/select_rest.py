"""What a selection leaves out, for those who attend to its lists by themselves."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int32

from jax_indexer.kernels import backend
from jax_indexer.kernels.attend import LeftOut, finite, read_logits, vectors, write_output
from jax_indexer.kernels.cells_select import (
    Inputs,
    Outputs,
    Scores,
    cell_counts,
    search_for,
    search_launch,
)
from jax_indexer.kernels.end import End, Scratch, in_lists, sources_of
from jax_indexer.kernels.lookup_table import Tables
from jax_indexer.kernels.output import Lists, Writer
from jax_indexer.kernels.rest import (
    Estimated,
    Estimator,
    Members,
    Sources,
    asked_later,
    weigh_tokens_launch,
    weighed_beside,
)
from jax_indexer.kernels.step import Lengths, Place, Step, plan_query
from jax_indexer.reference import Attention, Logits
from jax_indexer.state import PQIndex, Rest, Sealing


def write_rest(rest: LeftOut, place: Place, found: Estimated) -> None:
    """Writes what is left of one query."""
    write_output(Attention(rest.value, rest.log_mass), *place.at, found.rest)
    largest, total = found.of_pool
    mass = finite(largest) + jnp.log(jnp.where(total == 0, 1, total))
    rest.log_heavy_mass[place.at] = jnp.where(total == 0, -jnp.inf, mass)


def rest_shapes(step: Step, sources: Sources) -> LeftOut:
    """What `write_rest` writes."""
    queries = step.B, step.T, step.N
    mass = jax.ShapeDtypeStruct(queries, np.float32)
    value = jax.ShapeDtypeStruct((*queries, sources.sums.shape[-1]), np.float32)
    return LeftOut(value, mass, mass)


# Behind a search of cells


class SearchedInputs(NamedTuple):
    """What is searched, and what the rest is made from."""

    search: Inputs
    logits: Logits
    sources: Sources


class SearchedOutputs(NamedTuple):
    """Lists, the scratch of a search, and the rest."""

    search: Outputs
    rest: LeftOut


def cells_rest_kernel(
    program,
    inputs: SearchedInputs,
    outputs: SearchedOutputs,
    *,
    step: Step,
    sealing: Sealing,
    num_warps: int,
):
    place = Place.of(step, program)
    plan = place.plan(step, inputs.search.lengths)
    lists = Lists(outputs.search.indices, outputs.search.counts, outputs.search.weights)
    writer = Writer(lists, *place.of_kv, plan)
    writer.settle()
    search = search_for(step, sealing, num_warps, inputs.search, outputs.search, *place.of_kv, plan)
    fits, logits = search.state_fits(), read_logits(inputs.logits)

    def arrange(count: Array) -> None:
        search.list_sealed(count, writer)

    find = functools.partial(search.find, fits, writer.fill, writer.put, arrange)
    weighed, weights = weighed_beside(search, fits, logits, find)
    estimator = Estimator(step, search.scores, place, logits, inputs.sources)
    write_rest(
        outputs.rest,
        place,
        estimator.of_cells(weighed, weights, None, estimator.read_means(), None),
    )


def select_cells_with_rest(
    step: Step,
    tables: Tables,
    index: PQIndex,
    lengths: Lengths,
    logits: Logits,
    weights: Array | None,
    layer: Array | None,
) -> tuple[Lists, Rest]:
    """What `select_cells` does, and what it leaves out, in one kernel.

    Args:
      step: of a config that does not rerank.
      tables: look-up tables.
      index: whose cells and values.
      lengths: of the rows.
      logits: how to make logits.
      weights: begun elsewhere, None for none.
      layer: of the index.

    Source: CONTRACT.md, sections 3 and 4.
    """
    assert index.cells is not None
    codes, by_codes = step.by_rows(index.codes), step.config.estimate_rest == "codes"
    search, num_warps = search_launch(step, tables, codes, lengths, index.cells, weights, layer)
    num_warps = max(num_warps, step.tuning.warps_for_rest(step.config.num_cells, by_codes))
    outputs = search.outputs._replace(
        **asked_later(step),
        **cell_counts(step),
    )
    sources = sources_of(step, index)
    assert sources is not None
    what = backend.Launch(
        functools.partial(
            cells_rest_kernel, step=step, sealing=index.cells.sealing, num_warps=num_warps
        ),
        SearchedInputs(search.inputs, vectors(logits), sources),
        SearchedOutputs(outputs, rest_shapes(step, sources)),
        programs=search.programs,
        in_place=tuple(f"search.{name}" for name in search.in_place),
        state=(*(f"search.{name}" for name in search.state), "sources.sums", "sources.counts"),
        layer=layer,
    )
    made = backend.launch(what, num_warps=num_warps)
    return Lists(made.search.indices, made.search.counts, made.search.weights), Rest(*made.rest)


# Behind lists


class ListedInputs(NamedTuple):
    """Lists i32[B, T, N, P], and what the rest of them is made from."""

    indices: Any
    search: Inputs
    logits: Logits
    sources: Sources


class ListedOutputs(NamedTuple):
    """Scratch, and the rest."""

    scratch: Scratch
    rest: LeftOut


def listed_rest_kernel(program, inputs: ListedInputs, outputs: ListedOutputs, *, step: Step):
    place = Place.of(step, program)
    plan = plan_query(step, inputs.search.lengths, place.kv_row, place.token)
    number, position_of = plan.between(step.config), in_lists(inputs.indices, step, place)
    end = End(step, None, outputs.scratch, place, plan, number, position_of, None)
    position, exists = end.entries(end.slots)
    pool = Members(position, exists & ~end.is_short, None, None, None, None)
    scores = Scores(step, inputs.search.table, inputs.search.codes, *place.of_kv)
    estimator = Estimator(step, scores, place, read_logits(inputs.logits), inputs.sources)
    by_codes = functools.partial(end.by_codes, scores=scores, by=estimator.by)
    write_rest(outputs.rest, place, estimator.of_parts(pool, estimator.read_means(), by_codes))


def rest_of_lists(
    step: Step,
    tables: Tables,
    index: PQIndex,
    lengths: Lengths,
    indices: Int32[Array, "B T N P"],
    logits: Logits,
    layer: Array | None,
) -> Rest:
    """What lists leave out, token by token.

    Args:
      step: of a config that does not rerank.
      tables: look-up tables.
      index: what was selected from.
      lengths: of the rows.
      indices: the lists.
      logits: how to make logits.
      layer: of the index.

    Source: CONTRACT.md, section 4.
    """
    search = Inputs(lengths, None, tables.by_query, step.by_rows(index.codes), None, None, None)
    num_warps = step.tuning.attended_warps
    weigh = weigh_tokens_launch(step, search, indices, logits, layer)
    sources = sources_of(step, index, backend.launch(weigh, num_warps=num_warps))
    assert sources is not None
    amounts = step.scratch(np.float32, 2 * (step.pooled + 1))
    what = backend.Launch(
        functools.partial(listed_rest_kernel, step=step),
        ListedInputs(indices, search, vectors(logits), sources),
        ListedOutputs(Scratch(amounts, None, None), rest_shapes(step, sources)),
        programs=step.B * step.T * step.N,
        state=("search.codes", "sources.sums", "sources.counts"),
        layer=layer,
    )
    return Rest(*backend.launch(what, num_warps=num_warps).rest)
