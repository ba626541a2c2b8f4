"""The kernels put together: what one step launches, for arrays in the public layout."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int32, Shaped

from jax_indexer.cells import seal
from jax_indexer.config import Selector
from jax_indexer.kernels import backend
from jax_indexer.kernels.append import append_launch
from jax_indexer.kernels.attend import (
    Middle,
    always_launch,
    launch_listed,
    write_launch,
)
from jax_indexer.kernels.cells_select import attend_cells, select_cells
from jax_indexer.kernels.exchange import best_of_devices
from jax_indexer.kernels.keep import keep, kept_of
from jax_indexer.kernels.lookup_table import Tables, tables_launch
from jax_indexer.kernels.output import Lists, weights_launch
from jax_indexer.kernels.pool import (
    MOST_COUNTED,
    Pool,
    attend_cells_with_rest,
    attend_pool,
    search_pool,
)
from jax_indexer.kernels.seal import seal_launch
from jax_indexer.kernels.select_rest import rest_of_lists, select_cells_with_rest
from jax_indexer.kernels.step import Lengths, QueryPlan, Step, plan_after, plan_query
from jax_indexer.kernels.threshold import select_threshold
from jax_indexer.kernels.top_k import select_top_k
from jax_indexer.kernels.value_sums import sum_values_launch
from jax_indexer.layout import by_query_head
from jax_indexer.pages import in_rows
from jax_indexer.reference import (
    Caches,
    Logits,
    Room,
    dense_weights,
    merge_devices,
    raised,
)
from jax_indexer.state import MOST_NEW, PQIndex, Recent, Selection, Span, layer_of, put_layer
from jax_indexer.values import add_values


def append_launches(
    step: Step,
    key_new: Float[Array, "B _ _ H"],
    index: PQIndex,
    counts: Int32[Array, "B"] | None,
    layer: Array | None = None,
    value: Any = None,
    span: Span | None = None,
    page_table: Int32[Array, "B pages"] | None = None,
    is_recent: bool = False,
) -> dict[str, backend.Launch]:
    """The launches that append: codes, and what falls due in cells and sums for a few tokens.

    With `is_recent` the value is what is recent of a cache in host memory.
    """
    before = Lengths.of(index.lengths, counts, span, index.high_water, page_table)
    launches = {"codes": append_launch(step, key_new, index, before, layer)}
    codes = backend.OutputOf("codes", "codes")
    if step.T > MOST_NEW:
        return launches
    if index.cells is not None:
        launches["cells"] = seal_launch(step, index.cells, before, codes, layer)
    if index.values is not None:
        launches["values"] = sum_values_launch(
            step, index.values, value, codes, before, layer, is_recent
        )
    return launches


def query_launches(
    step: Step,
    query: Float[Array, "B T N H"],
    index: PQIndex,
    lengths: Lengths,
    layer: Array | None = None,
    plan_of: Callable[..., QueryPlan] = plan_query,
    selector: Selector | None = None,
) -> dict[str, backend.Launch]:
    """The launches that a selection begins with: tables, and weights if they are asked for.

    Lengths are those of `plan_of`, of all layers if there are any.
    """
    by_lane = selector != "cells"
    launches = {"tables": tables_launch(step, query, index.codebooks, layer, by_lane=by_lane)}
    if step.weights_dtype is not None:
        launches["weights"] = weights_launch(step, lengths, layer, plan_of)
    return launches


def launched(step: Step, launches: Mapping[str, backend.Launch]) -> dict[str, Any]:
    """What such launches make, by one launch."""
    return backend.launch_together(launches, num_warps=step.tuning.codebook_warps)


def appended(
    step: Step,
    index: PQIndex,
    made: dict[str, Any],
    layer: Array | None = None,
    value: Array | None = None,
    span: Span | None = None,
    page_table: Int32[Array, "B pages"] | None = None,
) -> tuple[PQIndex, Lengths]:
    """The index after an append, and its layer's lengths; what many new tokens change is XLA's."""
    codes, after, cells = made["codes"].codes, made["codes"].after, index.cells
    codes = codes.reshape(index.codes.shape)

    def replaced(state: Any, new: Any) -> Any:
        fields = {name: x.reshape(getattr(state, name).shape) for name, x in new._asdict().items()}
        return dataclasses.replace(state, **fields)

    if "cells" in made:
        cells = replaced(cells, made["cells"])
    elif cells is not None:
        one, its_codes, before = layer_of((cells, codes, index.lengths), layer)
        # A row that takes nothing keeps its length, whatever that is.
        taking = after.lengths != before
        one = seal(one, its_codes, after.high_water, taking, step.config, span)
        cells = put_layer(cells, one, layer)
    values = index.values
    if "values" in made:
        values = replaced(values, made["values"])
    elif values is not None:
        assert value is not None
        lengths, high_water = layer_of((index.lengths, index.high_water), layer)
        start = jnp.clip(lengths, 0, step.S)
        room = Room(start, jnp.where(after.lengths != lengths, after.lengths - start, 0))
        value = in_rows(value, page_table, step.kv_layout, layer, step.S)
        grown = *raised(high_water, room, step.S), step.T
        values = add_values(values, value, codes, *grown, step.config, step.kv_layout, layer)
    reached = index.lengths, index.high_water
    lengths, high_water = put_layer(reached, (after.lengths, after.high_water), layer)
    kept = {"cells": cells, "values": values, "high_water": high_water}
    index = dataclasses.replace(index, codes=codes, lengths=lengths, **kept)
    reached = after.lengths, after.counts, span, after.high_water, page_table
    return index, Lengths.of(*reached)


def of_devices(step: Step, span: Span | None) -> Step:
    """The step of a device that shares rows with others: weights are made of its lists."""
    if span is None:
        return step
    return dataclasses.replace(step, devices=span.devices, weights_dtype=None)


def launch_append(
    step: Step,
    key_new: Float[Array, "B _ _ H"],
    index: PQIndex,
    counts: Int32[Array, "B"] | None,
    layer: Array | None = None,
    value: Float[Array, "*layers B _ _ H_"] | None = None,
    span: Span | None = None,
) -> PQIndex:
    """What `reference.append_tokens` does, in one launch, to one layer."""
    step = of_devices(step, span)
    made = launched(step, append_launches(step, key_new, index, counts, layer, value, span))
    return appended(step, index, made, layer, value, span)[0]


def launch_select(
    step: Step,
    query: Float[Array, "B T N H"],
    index: PQIndex,
    counts: Int32[Array, "B"] | None,
    selector: Selector,
    layer: Array | None = None,
    span: Span | None = None,
    rest_by: Logits | None = None,
) -> Selection:
    """What `reference.select_tokens` does, in one layer."""
    weights_dtype, step = step.weights_dtype, of_devices(step, span)
    lengths = Lengths.of(index.lengths, counts, span)
    made = launched(step, query_launches(step, query, index, lengths, layer, selector=selector))
    reached = layer_of((index.lengths, index.high_water), layer)
    lengths = lengths._replace(lengths=reached[0], high_water=reached[1])
    if rest_by is None:
        selection = selected(step, made, index, lengths, selector, layer, span)
        return with_weights(selection, weights_dtype, span)
    known = step, made["tables"], index, lengths
    if weighs_cells(step, selector):
        weights = made["weights"].weights if "weights" in made else None
        lists, rest = select_cells_with_rest(*known, rest_by, weights, layer)
        return dataclasses.replace(selection_of(step, lists), rest=rest)
    selection = selected(step, made, index, lengths, selector, layer)
    rest = rest_of_lists(*known, selection.indices, rest_by, layer)
    return dataclasses.replace(selection, rest=rest)


def weighs_cells(step: Step, selector: str | None) -> bool:
    """Whether a search of cells leaves what candidates weigh: it needs a token to look for."""
    return selector == "cells" and step.config.heavy_size > 0 and step.S <= MOST_COUNTED


def launch_step(
    step: Step,
    query: Float[Array, "B T N H"],
    key_new: Float[Array, "B _ _ H"],
    index: PQIndex,
    counts: Int32[Array, "B"] | None,
    selector: Selector,
    layer: Array | None = None,
    value: Float[Array, "*layers B _ _ H_"] | None = None,
    span: Span | None = None,
) -> tuple[Selection, PQIndex]:
    """Both, with all that does not depend on a selection in one launch."""
    weights_dtype, step = step.weights_dtype, of_devices(step, span)
    # The longest programs last: they would hold up what comes behind them.
    others = append_launches(step, key_new, index, counts, layer, value, span)
    first = {"codes": others.pop("codes")}
    before = Lengths.of(index.lengths, counts, span)
    of_query = query_launches(step, query, index, before, layer, plan_after, selector)
    made = launched(step, first | of_query | others)
    index, after = appended(step, index, made, layer, value, span)
    selection = selected(step, made, index, after, selector, layer, span)
    return with_weights(selection, weights_dtype, span), index


def launch_decode(
    step: Step,
    query: Float[Array, "B T N H"],
    new: Caches,
    caches: Caches,
    index: PQIndex,
    recent: Recent | None,
    counts: Int32[Array, "B"] | None,
    logits: Logits,
    selector: Selector,
    layer: Array | None = None,
    span: Span | None = None,
    page_table: Int32[Array, "B pages"] | None = None,
) -> tuple[Float[Array, "B T N H_"], Caches, PQIndex, Recent | None]:
    """What `reference.decode` does: the step's tokens into the caches, and attention over them.

    What is always attended needs no selection: it goes beside what a selection begins with. Of
    caches in host memory, with `recent`, that is read on the device, and so is what is kept.
    """
    step, is_recent = of_devices(step, span), recent is not None
    before = Lengths.of(index.lengths, counts, span, page_table=page_table)
    written = Caches(*(backend.OutputOf("caches", field) for field in Caches._fields))
    appends = step, new.key, index, counts, layer, written.value, span, page_table
    others = append_launches(*appends, is_recent)
    first = {
        "caches": write_launch(step, new, recent or caches, before, layer),
        "always": always_launch(step, query, new, written, before, logits, layer, is_recent),
        "codes": others.pop("codes"),
    }
    of_query = query_launches(step, query, index, before, layer, plan_after, selector)
    made = launched(step, first | of_query | others)
    into, always = made["caches"], made["always"]
    if recent is None:
        caches = Caches(into.key, into.value)
    else:
        recent = dataclasses.replace(recent, **into._asdict())
        # Earlier steps read the caches until what they keep is written, which this one's first
        # launch goes on with.
        behind = made["codes"].after.lengths
        to_host = write_launch(step, new, caches, before, layer, behind)
        into = backend.launch(to_host, num_warps=step.tuning.written_warps)
        caches = Caches(into.key, into.value)
    kept, indices, positions = kept_of(recent), None, None
    lengths = Lengths(index.lengths, None, high_water=index.high_water)
    index, after = appended(step, index, made, layer, caches.value, span, page_table)
    known = step, made["tables"], index, after
    of_end = query, caches, logits, always, lengths, layer, kept
    if step.config.has_pool and not weighs_cells(step, selector):
        indices = selected(step.of_pool, made, index, after, selector, layer).indices
        ended = attend_pool(*known, Pool.of_lists(indices), *of_end)
    elif step.config.rerank > 1:
        pool = search_pool(*known, logits, layer)
        positions = pool.entries
        ended = attend_pool(*known, pool, *of_end)
    elif step.config.has_pool:
        ended, positions = attend_cells_with_rest(*known, *of_end)
    elif span is None and selector == "cells" and step.num_middle <= step.tuning.attended_at_once:
        assert index.cells is not None
        ended, positions = attend_cells(*known, *of_end)
    else:
        lists = selected(step, made, index, after, selector, layer, span, middle=True)
        indices = lists.indices
        ended = launch_listed(
            query,
            caches,
            indices,
            logits,
            layer,
            step.kv_layout,
            middle=Middle(step, after, always, lengths, kept),
            tuning=step.tuning,
            dtype=None if span is None else np.float32,
            page_table=page_table,
        )
    output = ended.output
    if span is not None:
        output = merge_devices(output, query.dtype, span.axis)
    if recent is not None:
        listed = {"lists": indices, "positions": positions}
        recent = keep(step.of_pool, after, caches, recent, layer, **listed)
    reached = {"lengths": ended.lengths.lengths, "high_water": ended.lengths.high_water}
    return output.out, caches, dataclasses.replace(index, **reached), recent


def selected(
    step: Step,
    made: dict[str, Any],
    index: PQIndex,
    lengths: Lengths,
    selector: Selector,
    layer: Array | None = None,
    span: Span | None = None,
    *,
    middle: bool = False,
) -> Selection:
    """Everything of a selection that follows the first launch.

    With `span` and `middle` lists have what lies between sink and window alone.
    """
    weights = made["weights"].weights if "weights" in made else None
    tables, lengths = made["tables"], lengths._replace(page_table=None)
    lists = lists_from(step, tables, index, lengths, weights, selector, layer)
    if span is not None and step.config.heavy_size:
        codes = step.by_rows(index.codes)
        lists = best_of_devices(step, tables, codes, lengths, lists, span, layer, middle=middle)
    return selection_of(step, lists)


def with_weights(selection: Selection, dtype: Any, span: Span | None) -> Selection:
    """With dense weights if they are asked for: of a device's lists; others have them already."""
    if span is None or dtype is None:
        return selection
    weights = dense_weights(selection.indices, span.size, dtype)
    return dataclasses.replace(selection, weights=weights)


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
    return selection_of(step, lists_from(step, tables, index, lengths, weights, selector, layer))


def lists_from(
    step: Step,
    tables: Tables,
    index: PQIndex,
    lengths: Lengths,
    weights: Float[Array, "R Q S"] | None,
    selector: Selector,
    layer: Array | None,
) -> Lists:
    """Likewise, as kernels write them."""
    arguments = step, tables, step.by_rows(index.codes), lengths
    if selector == "cells":
        assert index.cells is not None
        return select_cells(*arguments, index.cells, weights, layer)
    select = {"threshold": select_threshold, "top_k": select_top_k}[selector]
    return select(*arguments, weights, layer)


def selection_of(step: Step, lists: Lists) -> Selection:
    """Lists in the public layout."""

    def ungrouped(x: Shaped[Array, "R Q *rest"]) -> Shaped[Array, "B T N *rest"]:
        return by_query_head(x.reshape(step.B, step.K, *x.shape[1:]), step.T)

    weights = None if lists.weights is None else ungrouped(lists.weights)
    return Selection(ungrouped(lists.indices), ungrouped(lists.counts), weights, step.S)
