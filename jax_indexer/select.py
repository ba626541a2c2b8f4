"""select and indexer_next: which tokens each query head attends to."""

import dataclasses
import functools
from typing import Literal

import jax
import numpy as np
from jax import Array, lax

from jax_indexer import _arguments, reference
from jax_indexer.config import FLOAT_DTYPES, IndexerConfig
from jax_indexer.index import PQIndex, append, check_append, check_index
from jax_indexer.kernels import backend, pipeline
from jax_indexer.kernels.backend import Implementation
from jax_indexer.kernels.cells import LARGEST_BUDGET
from jax_indexer.kernels.lookup_table import Tables
from jax_indexer.kernels.tuning import CELLS_FROM, FEW_CELLS
from jax_indexer.layout import KVLayout

Selector = Literal["top_k", "threshold", "cells"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selection:
    """The tokens to attend to: a pytree, of which one spec of B, T and N does for all arrays.

    Attributes:
      indices: int32[B, T, N, P], positions in ascending order, unique, -1 past `counts`;
        P = config.max_selected(T).
      counts: int32[B, T, N], how many positions are listed.
      weights: None unless asked for: [B, T, N, S] in the query's dtype, 1 at listed tokens, else 0.
      capacity: S of the index, which a cache must have too; static; None where it is not known.
    """

    indices: Array
    counts: Array
    weights: Array | None = None
    capacity: int | None = dataclasses.field(default=None, metadata={"static": True})


def select(
    query: Array,
    index: PQIndex,
    config: IndexerConfig,
    *,
    return_weights: bool = False,
    implementation: Implementation | None = None,
    selector: Selector | None = None,
) -> Selection:
    """Selects for every query head the sink, heavy and window tokens to attend to.

    Args:
      query: [B, T, N, H], float32, bfloat16 or float16, the step's query tokens; the last one sees
        all `index.lengths` tokens, the one before it one less, and so on.
      index: the product-quantized keys, those of the step's own tokens included.
      config: what the index was built with.
      return_weights: whether to write the dense weights too.
      implementation: "triton", "xla", or None: Triton on an NVIDIA GPU where it supports the
        case, else XLA.
      selector: how the heavy tokens are found; all give the same list. "cells" needs
        `config.cells`. None: with Triton "cells" where it is possible and faster (caches of 32768
        tokens or more, C**M up to 4096, a float32 table), else "threshold".

    Returns:
      A Selection.

    Raises:
      ValueError: for arguments of wrong type, shape or dtype.
      NotImplementedError: for an implementation or a selector that is not there.

    Source: CONTRACT.md, section 3.
    """
    check_select(query, index, config, return_weights, implementation, selector)
    return _select(
        query,
        index,
        config=config,
        return_weights=return_weights,
        implementation=implementation,
        selector=selector,
    )


def indexer_next(
    query: Array,
    key_new: Array,
    index: PQIndex,
    config: IndexerConfig,
    *,
    counts: Array | None = None,
    return_weights: bool = False,
    implementation: Implementation | None = None,
    selector: Selector | None = None,
    kv_layout: KVLayout = "BSKH",
) -> tuple[Selection, PQIndex]:
    """A whole decode step: appends the step's keys, then selects for its queries.

    Args:
      query: [B, T, N, H], the step's query tokens.
      key_new: [B, T, K, H] ("BSKH") or [B, K, T, H] ("BKSH"), their keys.
      index: the index before the step; donate it to have it updated in place.
      config: what the index was built with.
      counts: int32[B], how many of the T keys each row appends, as in `append`; None for T.
      return_weights: as in `select`.
      implementation: as in `select`, of both.
      selector: as in `select`.
      kv_layout: order of the token and head axes of `key_new`.

    Returns:
      The Selection and the index after the step.

    Raises:
      ValueError: for arguments of wrong type, shape or dtype, before anything is updated.
      NotImplementedError: for an implementation or a selector that is not there.

    Source: CONTRACT.md, section 4.
    """
    _check_step(query, key_new, kv_layout)
    check_append(index, key_new, config, counts, kv_layout, implementation)
    check_select(query, index, config, return_weights, implementation, selector)
    return _step(
        query,
        key_new,
        index,
        counts,
        config=config,
        return_weights=return_weights,
        implementation=implementation,
        selector=selector,
        kv_layout=kv_layout,
    )


def _check_step(query, key_new, kv_layout) -> None:
    """Checks that queries and new keys are of the same step."""
    sizes = _arguments.Sizes()
    _arguments.check_array("query", query, "B T N H", sizes, FLOAT_DTYPES)
    _arguments.check_key("key_new", key_new, "t", kv_layout, sizes)
    _arguments.check_groups(sizes)
    if sizes["t"] != sizes["T"]:
        raise ValueError(
            f"key_new: expected t=T={sizes['T']} tokens, as many as query has, got t={sizes['t']}; "
            f"call append and select apart for other numbers{sizes.understood('key_new')}"
        )


def check_select(query, index, config, return_weights, implementation, selector) -> None:
    """Checks the arguments of `select`."""
    _arguments.check_config(config)
    sizes = _arguments.Sizes()
    _arguments.check_array("query", query, "B T N H", sizes, FLOAT_DTYPES)
    _arguments.check_subspaces("query", config, sizes)
    check_index(index, config, sizes)
    _arguments.check_groups(sizes)
    _arguments.check_choice("return_weights", return_weights, (True, False))
    _arguments.check_choice("selector", selector, (None, "top_k", "threshold", "cells"))
    if selector == "cells" and not config.cells:
        raise ValueError(
            'selector: expected another than "cells" with config.cells=False, got "cells"; '
            "build the index with cells=True, or use None"
        )
    if selector == "cells" and (reason := _beyond_cells(sizes["T"], config)):
        raise NotImplementedError(f'selector: "cells" takes {reason}; use None')
    if selector in ("cells", "threshold") and implementation == "xla":
        raise NotImplementedError('selector: "xla" has "top_k" only; use None')
    missing = _arguments.check_implementation(implementation, query, index)
    if missing and selector in ("cells", "threshold"):
        raise NotImplementedError(f'selector: "{selector}" needs "triton", and {missing}; use None')


@functools.partial(
    jax.jit, static_argnames=("config", "return_weights", "implementation", "selector")
)
def _select(
    query: Array,
    index: PQIndex,
    *,
    config: IndexerConfig,
    return_weights: bool,
    implementation: Implementation | None,
    selector: Selector | None,
) -> Selection:
    query, index = lax.stop_gradient((query, index))  # positions have none
    weights_dtype = query.dtype if return_weights else None

    def xla(query: Array, index: PQIndex) -> Selection:
        table = reference.lookup_table(query, index.codebooks, config.table_dtype)
        lists = reference.select_from_table(
            table, index.codes, index.lengths, config, weights_dtype
        )
        return Selection(*lists, capacity=index.codes.shape[-1])

    def triton(query: Array, index: PQIndex) -> Selection:
        chosen = _selector_for(selector, query, index, config)
        if chosen == "cells":
            tables, weights = pipeline.tables_and_weights(
                query,
                index.codebooks,
                index.lengths,
                index.codes.shape[-1],
                config,
                weights_dtype,
            )
            return _select_from_cells(tables, index, config, weights)
        tables = pipeline.tables_of(query, index.codebooks, config.table_dtype)
        return _select_from_tables(tables, query, index, config, weights_dtype, chosen)

    return backend.dispatch(xla, triton, query, index, implementation=implementation)


def _selector_for(
    selector: Selector | None, query: Array, index: PQIndex, config: IndexerConfig
) -> Selector:
    """The one asked for, or Triton's default."""
    if selector is not None:
        return selector
    can_cells = config.cells and not _beyond_cells(query.shape[1], config)
    # Entries of 16 bits make cells tie, and those that tie at the cut are searched for slowly.
    wins = index.codes.shape[-1] >= CELLS_FROM and config.num_cells <= FEW_CELLS
    wins &= config.table_dtype == np.float32
    return "cells" if can_cells and wins else "threshold"


def _beyond_cells(num_tokens: int, config: IndexerConfig) -> str | None:
    """What the "cells" selector takes instead of this, or None."""
    if num_tokens > 1:
        return f"one query token, not T={num_tokens}"
    if config.heavy_size > LARGEST_BUDGET:
        return f"budgets up to {LARGEST_BUDGET}, not heavy_size={config.heavy_size}"
    return None


def _select_from_tables(
    tables: Tables,
    query: Array,
    index: PQIndex,
    config: IndexerConfig,
    weights_dtype: np.dtype | None,
    selector: Literal["threshold", "top_k"],
) -> Selection:
    lists = pipeline.select_from_tables(
        tables,
        index.codes,
        index.lengths,
        config,
        query.shape[1],
        query.shape[2],
        weights_dtype,
        selector,
    )
    return Selection(*lists, capacity=index.codes.shape[-1])


def _select_from_cells(
    tables: Tables, index: PQIndex, config: IndexerConfig, weights: Array | None
) -> Selection:
    assert index.cells is not None
    lists = pipeline.select_from_cells(
        tables, index.codes, index.lengths, index.cells, config, weights
    )
    return Selection(*lists, capacity=index.codes.shape[-1])


@functools.partial(
    jax.jit,
    static_argnames=("config", "return_weights", "implementation", "selector", "kv_layout"),
)
def _step(
    query: Array,
    key_new: Array,
    index: PQIndex,
    counts: Array | None,
    *,
    config: IndexerConfig,
    return_weights: bool,
    implementation: Implementation | None,
    selector: Selector | None,
    kv_layout: KVLayout,
) -> tuple[Selection, PQIndex]:
    query, key_new, index = lax.stop_gradient((query, key_new, index))

    def xla(query, key_new, index, counts):
        index = append(
            index, key_new, config, counts=counts, kv_layout=kv_layout, implementation="xla"
        )
        options = {"return_weights": return_weights, "implementation": "xla"}
        return select(query, index, config, **options), index

    def triton(query, key_new, index, counts):
        num_new, capacity = query.shape[1], index.codes.shape[-1]
        start, taken, lengths = reference.make_room(index.lengths, counts, num_new, capacity)
        weights_dtype = query.dtype if return_weights else None
        chosen = _selector_for(selector, query, index, config)
        made = pipeline.append_tokens(
            key_new,
            index.codebooks,
            index.codes,
            index.phi if config.metric == "ip" else None,
            index.cells,
            start,
            taken,
            config,
            query=query,
            weights_dtype=weights_dtype if chosen == "cells" else None,
            kv_layout=kv_layout,
        )
        assert made.tables is not None
        index = dataclasses.replace(index, codes=made.codes, lengths=lengths, cells=made.cells)
        if chosen == "cells":
            return _select_from_cells(made.tables, index, config, made.weights), index
        selection = _select_from_tables(made.tables, query, index, config, weights_dtype, chosen)
        return selection, index

    return backend.dispatch(
        xla, triton, query, key_new, index, counts, implementation=implementation
    )
