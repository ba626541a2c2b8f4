"""The kernels put together: what one step launches, for arrays in the public layout."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jax import Array
from jaxtyping import Float, Int32, Shaped

from jax_indexer.cells import seal
from jax_indexer.config import Selector
from jax_indexer.kernels import backend
from jax_indexer.kernels.append import append_launch
from jax_indexer.kernels.attend import Middle, always_launch, launch_listed, write_launch
from jax_indexer.kernels.cells_select import attend_cells, select_cells
from jax_indexer.kernels.lookup_table import Tables, tables_launch
from jax_indexer.kernels.output import Lists, weights_launch
from jax_indexer.kernels.seal import seal_launch
from jax_indexer.kernels.step import Lengths, QueryPlan, Step, plan_after, plan_query
from jax_indexer.kernels.threshold import select_threshold
from jax_indexer.kernels.top_k import select_top_k
from jax_indexer.layout import by_query_head
from jax_indexer.reference import Caches, Logits
from jax_indexer.state import MOST_NEW, PQIndex, Selection, layer_of, put_layer


def append_launches(
    step: Step,
    key_new: Float[Array, "B _ _ H"],
    index: PQIndex,
    counts: Int32[Array, "B"] | None,
    layer: Array | None = None,
) -> dict[str, backend.Launch]:
    """The launches that append: codes, and what falls due in cells for a few tokens."""
    launches = {"codes": append_launch(step, key_new, index, counts, layer)}
    if index.cells is not None and step.T <= MOST_NEW:
        before, codes = Lengths(index.lengths, counts), backend.OutputOf("codes", "codes")
        launches["cells"] = seal_launch(step, index.cells, before, codes, layer)
    return launches


def query_launches(
    step: Step,
    query: Float[Array, "B T N H"],
    index: PQIndex,
    lengths: Lengths,
    layer: Array | None = None,
    plan_of: Callable[..., QueryPlan] = plan_query,
) -> dict[str, backend.Launch]:
    """The launches that a selection begins with: tables, and weights if they are asked for.

    Lengths are those of `plan_of`, of all layers if there are any.
    """
    launches = {"tables": tables_launch(step, query, index.codebooks, layer)}
    if step.weights_dtype is not None:
        launches["weights"] = weights_launch(step, lengths, layer, plan_of)
    return launches


def launched(step: Step, launches: Mapping[str, backend.Launch]) -> dict[str, Any]:
    """What such launches make, by one launch."""
    return backend.launch_together(launches, num_warps=step.tuning.codebook_warps)


def appended(
    step: Step, index: PQIndex, made: dict[str, Any], layer: Array | None = None
) -> tuple[PQIndex, Lengths]:
    """The index after an append, and its layer's lengths; XLA sorts cells of many new tokens."""
    codes, after, cells = made["codes"].codes, made["codes"].after, index.cells
    codes = codes.reshape(index.codes.shape)
    if "cells" in made:
        state = made["cells"]._asdict()
        assert cells is not None
        state = {name: x.reshape(getattr(cells, name).shape) for name, x in state.items()}
        cells = dataclasses.replace(cells, **state)
    elif cells is not None:
        one, its_codes, before = layer_of((cells, codes, index.lengths), layer)
        # A row that takes nothing keeps its length, whatever that is.
        one = seal(one, its_codes, after.lengths, after.lengths != before, step.config)
        cells = put_layer(cells, one, layer)
    lengths = put_layer(index.lengths, after.lengths, layer)
    return dataclasses.replace(index, codes=codes, lengths=lengths, cells=cells), after


def launch_append(
    step: Step,
    key_new: Float[Array, "B _ _ H"],
    index: PQIndex,
    counts: Int32[Array, "B"] | None,
    layer: Array | None = None,
) -> PQIndex:
    """What `reference.append_tokens` does, in one launch, to one layer."""
    made = launched(step, append_launches(step, key_new, index, counts, layer))
    return appended(step, index, made, layer)[0]


def launch_select(
    step: Step,
    query: Float[Array, "B T N H"],
    index: PQIndex,
    counts: Int32[Array, "B"] | None,
    selector: Selector,
    layer: Array | None = None,
) -> Selection:
    """What `reference.select_tokens` does, in one layer."""
    lengths = Lengths(index.lengths, counts)
    made = launched(step, query_launches(step, query, index, lengths, layer))
    lengths = lengths._replace(lengths=layer_of(index.lengths, layer))
    return selected(step, made, index, lengths, selector, layer)


def launch_step(
    step: Step,
    query: Float[Array, "B T N H"],
    key_new: Float[Array, "B _ _ H"],
    index: PQIndex,
    counts: Int32[Array, "B"] | None,
    selector: Selector,
    layer: Array | None = None,
) -> tuple[Selection, PQIndex]:
    """Both, with all that does not depend on a selection in one launch."""
    # The longest programs last: they would hold up what comes behind them.
    others = append_launches(step, key_new, index, counts, layer)
    first = {"codes": others.pop("codes")}
    before = Lengths(index.lengths, counts)
    of_query = query_launches(step, query, index, before, layer, plan_after)
    made = launched(step, first | of_query | others)
    index, after = appended(step, index, made, layer)
    return selected(step, made, index, after, selector, layer), index


def launch_decode(
    step: Step,
    query: Float[Array, "B T N H"],
    new: Caches,
    caches: Caches,
    index: PQIndex,
    counts: Int32[Array, "B"] | None,
    logits: Logits,
    selector: Selector,
    layer: Array | None = None,
) -> tuple[Float[Array, "B T N H_"], Caches, PQIndex]:
    """What `reference.decode` does: the step's tokens into the caches, and attention over them.

    What is always attended needs no selection: it goes beside what a selection begins with.
    """
    before = Lengths(index.lengths, counts)
    others = append_launches(step, new.key, index, counts, layer)
    written = Caches(*(backend.OutputOf("caches", field) for field in Caches._fields))
    first = {
        "caches": write_launch(step, new, caches, before, layer),
        "always": always_launch(step, query, new, written, before, logits, layer),
        "codes": others.pop("codes"),
    }
    of_query = query_launches(step, query, index, before, layer, plan_after)
    made = launched(step, first | of_query | others)
    caches, always = made["caches"], made["always"]
    lengths = index.lengths
    index, after = appended(step, index, made, layer)
    if selector == "cells" and step.num_middle <= step.tuning.attended_at_once:
        assert index.cells is not None
        ended = attend_cells(
            step, made["tables"], index, after, query, caches, logits, always, lengths, layer
        )
    else:
        indices = selected(step, made, index, after, selector, layer).indices
        ended = launch_listed(
            query,
            caches,
            indices,
            logits,
            layer,
            step.kv_layout,
            middle=Middle(step, after, always, lengths),
            tuning=step.tuning,
        )
    return ended.output.out, caches, dataclasses.replace(index, lengths=ended.lengths)


def selected(
    step: Step,
    made: dict[str, Any],
    index: PQIndex,
    lengths: Lengths,
    selector: Selector,
    layer: Array | None = None,
) -> Selection:
    """Everything of a selection that follows the first launch."""
    weights = made["weights"].weights if "weights" in made else None
    return from_tables(step, made["tables"], index, lengths, weights, selector, layer)


def from_tables(
    step: Step,
    tables: Tables,
    index: PQIndex,
    lengths: Lengths,
    weights: Float[Array, "R Q S"] | None,
    selector: Selector,
    layer: Array | None = None,
) -> Selection:
    """Everything of a selection that follows the tables."""
    arguments = step, tables, step.by_rows(index.codes), lengths
    if selector == "cells":
        assert index.cells is not None
        lists = select_cells(*arguments, index.cells, weights, layer)
    else:
        lists = {"threshold": select_threshold, "top_k": select_top_k}[selector](
            *arguments, weights, layer
        )
    return selection_of(step, lists)


def selection_of(step: Step, lists: Lists) -> Selection:
    """Lists in the public layout."""

    def ungrouped(x: Shaped[Array, "R Q *rest"]) -> Shaped[Array, "B T N *rest"]:
        return by_query_head(x.reshape(step.B, step.K, *x.shape[1:]), step.T)

    weights = None if lists.weights is None else ungrouped(lists.weights)
    return Selection(ungrouped(lists.indices), ungrouped(lists.counts), weights, step.S)
