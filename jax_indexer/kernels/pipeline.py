"""The kernels put together: what one step launches, for arrays in the public layout."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax import Array
from jaxtyping import Float, Int32, Shaped

from jax_indexer.cells import seal
from jax_indexer.config import Selector
from jax_indexer.kernels import backend
from jax_indexer.kernels.append import append_launch
from jax_indexer.kernels.cells_select import select_cells
from jax_indexer.kernels.lookup_table import Tables, tables_launch
from jax_indexer.kernels.output import Lists, weights_launch
from jax_indexer.kernels.seal import seal_launch
from jax_indexer.kernels.step import Lengths, Step
from jax_indexer.kernels.threshold import select_threshold
from jax_indexer.kernels.top_k import select_top_k
from jax_indexer.layout import by_query_head
from jax_indexer.reference import Room
from jax_indexer.state import MOST_NEW, PQIndex, Selection


def append_launches(
    step: Step, key_new: Float[Array, "B _ _ H"], index: PQIndex, room: Room
) -> dict[str, backend.Launch]:
    """The launches that append: codes, and what falls due in cells for a few tokens."""
    launches = {"codes": append_launch(step, key_new, index, room)}
    if index.cells is not None and step.T <= MOST_NEW:
        codes = backend.OutputOf("codes", "codes")
        launches["cells"] = seal_launch(step, index.cells, room, codes)
    return launches


def query_launches(
    step: Step, query: Float[Array, "B T N H"], index: PQIndex, lengths: Lengths
) -> dict[str, backend.Launch]:
    """The launches that a selection begins with: tables, and weights if they are asked for."""
    launches = {"tables": tables_launch(step, query, index.codebooks)}
    if step.weights_dtype is not None:
        launches["weights"] = weights_launch(step, lengths)
    return launches


def launched(step: Step, launches: Mapping[str, backend.Launch]) -> dict[str, Any]:
    """What such launches make, by one launch."""
    return backend.launch_together(launches, num_warps=step.tuning.codebook_warps)


def appended(
    step: Step, index: PQIndex, room: Room, lengths: Int32[Array, "B"], made: dict[str, Any]
) -> PQIndex:
    """The index after an append; cells of many tokens at once are sorted by XLA."""
    codes, cells = made["codes"].codes.reshape(index.codes.shape), index.cells
    if "cells" in made:
        state = made["cells"]._asdict()
        assert cells is not None
        state = {name: x.reshape(getattr(cells, name).shape) for name, x in state.items()}
        cells = dataclasses.replace(cells, **state)
    elif cells is not None:
        cells = seal(cells, codes, room.start + room.taken, room.taken > 0, step.config)
    return dataclasses.replace(index, codes=codes, lengths=lengths, cells=cells)


def launch_append(
    step: Step,
    key_new: Float[Array, "B _ _ H"],
    index: PQIndex,
    room: Room,
    lengths: Int32[Array, "B"],
) -> PQIndex:
    """What `reference.append_tokens` does, in one launch."""
    made = launched(step, append_launches(step, key_new, index, room))
    return appended(step, index, room, lengths, made)


def launch_select(
    step: Step,
    query: Float[Array, "B T N H"],
    index: PQIndex,
    counts: Int32[Array, "B"] | None,
    selector: Selector,
) -> Selection:
    """What `reference.select_tokens` does."""
    lengths = Lengths(index.lengths, counts)
    made = launched(step, query_launches(step, query, index, lengths))
    return selected(step, made, index, lengths, selector)


def launch_step(
    step: Step,
    query: Float[Array, "B T N H"],
    key_new: Float[Array, "B _ _ H"],
    index: PQIndex,
    room: Room,
    lengths: Int32[Array, "B"],
    counts: Int32[Array, "B"] | None,
    selector: Selector,
) -> tuple[Selection, PQIndex]:
    """Both, with all that does not depend on a selection in one launch."""
    after = Lengths(lengths, counts)
    # The longest programs last: they would hold up what comes behind them.
    others = append_launches(step, key_new, index, room)
    first = {"codes": others.pop("codes")}
    made = launched(step, first | query_launches(step, query, index, after) | others)
    index = appended(step, index, room, lengths, made)
    return selected(step, made, index, after, selector), index


def selected(
    step: Step, made: dict[str, Any], index: PQIndex, lengths: Lengths, selector: Selector
) -> Selection:
    """Everything of a selection that follows the first launch."""
    weights = made["weights"].weights if "weights" in made else None
    return from_tables(step, made["tables"], index, lengths, weights, selector)


def from_tables(
    step: Step,
    tables: Tables,
    index: PQIndex,
    lengths: Lengths,
    weights: Float[Array, "R Q S"] | None,
    selector: Selector,
) -> Selection:
    """Everything of a selection that follows the tables."""
    codes = index.codes.reshape(step.R, *index.codes.shape[2:])
    arguments = step, tables, codes, lengths
    if selector == "cells":
        assert index.cells is not None
        lists = select_cells(*arguments, index.cells, weights)
    else:
        lists = {"threshold": select_threshold, "top_k": select_top_k}[selector](
            *arguments, weights
        )
    return selection_of(step, lists)


def selection_of(step: Step, lists: Lists) -> Selection:
    """Lists in the public layout."""

    def ungrouped(x: Shaped[Array, "R Q *rest"]) -> Shaped[Array, "B T N *rest"]:
        return by_query_head(x.reshape(step.B, step.K, *x.shape[1:]), step.T)

    weights = None if lists.weights is None else ungrouped(lists.weights)
    return Selection(ungrouped(lists.indices), ungrouped(lists.counts), weights, step.S)
