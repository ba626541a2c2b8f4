"""The kernels put together: table, then a selector, for arrays in the public layout."""

import dataclasses
from typing import Literal, NamedTuple

import numpy as np
from jax import Array
from jaxtyping import Float, Int32, Shaped, UInt8

from jax_indexer.cells import MOST_NEW, Cells, seal
from jax_indexer.config import IndexerConfig
from jax_indexer.kernels import backend
from jax_indexer.kernels.append import append_launch
from jax_indexer.kernels.cells import select_cells, weights_launch
from jax_indexer.kernels.lookup_table import Tables, tables_from, tables_launch
from jax_indexer.kernels.seal import seal_launch
from jax_indexer.kernels.threshold import select_threshold
from jax_indexer.kernels.top_k import select_top_k
from jax_indexer.kernels.tuning import CODEBOOK_WARPS
from jax_indexer.layout import KVLayout, by_kv_head, by_query_head, subvectors, token_axis

SELECTORS = {"threshold": select_threshold, "top_k": select_top_k}

Lists = tuple[Int32[Array, "B T N P"], Int32[Array, "B T N"], Float[Array, "B T N S"] | None]


def _tables_launch(
    query: Float[Array, "B T N H"], codebooks: Float[Array, "B K M C D_"], table_dtype: np.dtype
) -> backend.Launch:
    batch, kv_heads, num_subspaces = codebooks.shape[:3]
    parts = subvectors(by_kv_head(query, kv_heads), num_subspaces)
    parts = parts.reshape(batch * kv_heads, *parts.shape[2:])
    return tables_launch(
        parts, codebooks.reshape(batch * kv_heads, *codebooks.shape[2:]), table_dtype
    )


class Made(NamedTuple):
    """What one launch made; None for what it was not asked for.

    Attributes:
      codes: after the new tokens.
      cells: likewise.
      tables: look-up tables.
      weights: [R, Q, S], those of the tokens that are always attended.
    """

    codes: UInt8[Array, "B K M S"]
    cells: Cells | None
    tables: Tables | None
    weights: Float[Array, "R Q S"] | None


def tables_of(
    query: Float[Array, "B T N H"],
    codebooks: Float[Array, "B K M C D_"],
    table_dtype: np.dtype,
    *,
    interpret: bool = False,
) -> Tables:
    """Look-up tables of all query heads (rule 3), by the one kernel that computes them (rule 7)."""
    launch = _tables_launch(query, codebooks, table_dtype)
    (tables,) = backend.launch_together([launch], num_warps=CODEBOOK_WARPS, interpret=interpret)
    return Tables(*tables)


def append_tokens(
    key_new: Float[Array, "B _ _ H"],
    codebooks: Float[Array, "B K M C D_"],
    codes: UInt8[Array, "B K M S"],
    phi: Float[Array, "B K M"] | None,
    cells: Cells | None,
    start: Int32[Array, "B"],
    taken: Int32[Array, "B"],
    config: IndexerConfig,
    *,
    query: Float[Array, "B T N H"] | None = None,
    weights_dtype: np.dtype | None = None,
    kv_layout: KVLayout,
    interpret: bool = False,
) -> Made:
    """Encodes new tokens, keeps the cells up to date and computes tables, all by one launch.

    Args:
      key_new: [B, t, K, H] ("BSKH") or [B, K, t, H] ("BKSH"), keys to encode.
      codebooks: centroids.
      codes: codes so far; written in place where the caller gives them away.
      phi: largest squared norm of a training subvector, for the inner-product metric, else None.
      cells: state so far, or None; written in place likewise.
      start: as `reference.make_room` gives it: start + taken is at most S.
      taken: likewise, at most t.
      config: what the index was built with.
      query: what tables are wanted of, if of any.
      weights_dtype: of the weights, which need a query, if any.
      kv_layout: of `key_new`.
      interpret: run on the CPU.

    Returns:
      What was made. More than MOST_NEW tokens at once have their cells sorted by XLA.
    """
    num_new, after = key_new.shape[token_axis(kv_layout)], start + taken
    launches = {"codes": append_launch(key_new, codebooks, codes, phi, start, taken, kv_layout)}
    if query is not None:
        launches["tables"] = _tables_launch(query, codebooks, config.table_dtype)
    if query is not None and weights_dtype is not None:
        rows, num_queries = launches["tables"].out_shape[1].shape[:2]
        launches["weights"] = weights_launch(
            after, rows, num_queries, codes.shape[-1], config, weights_dtype
        )
    if cells is not None and num_new <= MOST_NEW:
        launches["cells"] = seal_launch(cells, start, after, config, (0, 0), interpret=interpret)
    outputs = backend.launch_together(
        list(launches.values()), num_warps=CODEBOOK_WARPS, interpret=interpret
    )
    made = dict(zip(launches, outputs, strict=True))
    (new_codes,) = made["codes"]
    new_codes = new_codes.reshape(codes.shape)
    if cells is not None and num_new <= MOST_NEW:
        names = "starts", "order", "earlier", "ring"
        state = {
            name: x.reshape(getattr(cells, name).shape)
            for name, x in zip(names, made["cells"], strict=True)
        }
        cells = dataclasses.replace(cells, **state)
    elif cells is not None:
        cells = seal(cells, new_codes, after, taken > 0, config)
    tables = Tables(*made["tables"]) if "tables" in made else None
    return Made(new_codes, cells, tables, made["weights"][0] if "weights" in made else None)


def tables_and_weights(
    query: Float[Array, "B T N H"],
    codebooks: Float[Array, "B K M C D_"],
    lengths: Int32[Array, "B"],
    capacity: int,
    config: IndexerConfig,
    weights_dtype: np.dtype | None,
    *,
    interpret: bool = False,
) -> tuple[Tables, Float[Array, "R Q S"] | None]:
    """Tables and, if asked for, weights of the tokens that are always attended, by one launch."""
    launches = [_tables_launch(query, codebooks, config.table_dtype)]
    if weights_dtype is not None:
        rows, num_queries = launches[0].out_shape[1].shape[:2]
        launches.append(weights_launch(lengths, rows, num_queries, capacity, config, weights_dtype))
    tables, *weights = backend.launch_together(
        launches, num_warps=CODEBOOK_WARPS, interpret=interpret
    )
    return Tables(*tables), weights[0][0] if weights else None


def select_from_tables(
    tables: Tables,
    codes: UInt8[Array, "B K M S"],
    lengths: Int32[Array, "B"],
    config: IndexerConfig,
    num_tokens: int,
    num_heads: int,
    weights_dtype: np.dtype | None,
    selector: Literal["threshold", "top_k"],
    *,
    interpret: bool = False,
) -> Lists:
    """Everything of a selection that follows the tables: indices, counts, weights if asked for."""
    batch, kv_heads, num_subspaces, capacity = codes.shape
    lists = SELECTORS[selector](
        tables,
        codes.reshape(batch * kv_heads, num_subspaces, capacity),
        lengths,
        config,
        num_tokens * num_heads // kv_heads,
        num_tokens,
        weights_dtype,
        interpret=interpret,
    )
    return _by_query_head(lists, batch, num_tokens)


def select_from_cells(
    tables: Tables,
    codes: UInt8[Array, "B K M S"],
    lengths: Int32[Array, "B"],
    cells: Cells,
    config: IndexerConfig,
    weights: Float[Array, "R Q S"] | None,
    *,
    interpret: bool = False,
) -> Lists:
    """The same for one query token from the cells, with the weights begun by `weights_launch`."""
    batch, kv_heads, num_subspaces, capacity = codes.shape
    lists = select_cells(
        tables,
        codes.reshape(batch * kv_heads, num_subspaces, capacity),
        lengths,
        cells,
        config,
        tables.by_query.shape[1],
        weights,
        interpret=interpret,
    )
    return _by_query_head(lists, batch, 1)


def _by_query_head(lists, batch: int, num_tokens: int) -> Lists:
    def ungrouped(x: Shaped[Array, "R Q *rest"]) -> Shaped[Array, "B T N *rest"]:
        return by_query_head(x.reshape(batch, -1, *x.shape[1:]), num_tokens)

    indices, counts, weights = lists
    return ungrouped(indices), ungrouped(counts), None if weights is None else ungrouped(weights)


def select_from_table(
    table: Float[Array, "B T N M C"],
    codes: UInt8[Array, "B K M S"],
    lengths: Int32[Array, "B"],
    config: IndexerConfig,
    weights_dtype: np.dtype | None,
    selector: Literal["threshold", "top_k"],
    *,
    interpret: bool = False,
) -> Lists:
    """The same from a table made elsewhere, as `reference.select_from_table` takes it."""
    grouped = by_kv_head(table, codes.shape[1])
    return select_from_tables(
        tables_from(grouped.reshape(-1, grouped.shape[2], table.shape[3] * table.shape[4])),
        codes,
        lengths,
        config,
        table.shape[1],
        table.shape[2],
        weights_dtype,
        selector,
        interpret=interpret,
    )
