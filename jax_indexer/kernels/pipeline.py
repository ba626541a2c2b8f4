"""The kernels put together: table, then a selector, for arrays in the public layout."""

from typing import Literal

import numpy as np
from jax import Array
from jaxtyping import Float, Int32, Shaped, UInt8

from jax_indexer.config import IndexerConfig
from jax_indexer.kernels import backend
from jax_indexer.kernels.append import append_launch
from jax_indexer.kernels.lookup_table import Tables, tables_from, tables_launch
from jax_indexer.kernels.threshold import select_threshold
from jax_indexer.kernels.top_k import select_top_k
from jax_indexer.kernels.tuning import CODEBOOK_WARPS
from jax_indexer.layout import KVLayout, by_kv_head, by_query_head, subvectors

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


def append_and_tables(
    query: Float[Array, "B T N H"],
    key_new: Float[Array, "B _ _ H"],
    codebooks: Float[Array, "B K M C D_"],
    codes: UInt8[Array, "B K M S"],
    phi: Float[Array, "B K M"] | None,
    start: Int32[Array, "B"],
    taken: Int32[Array, "B"],
    table_dtype: np.dtype,
    *,
    kv_layout: KVLayout,
    interpret: bool = False,
) -> tuple[UInt8[Array, "B K M S"], Tables]:
    """What `append_codes` and `tables_of` return, by one launch."""
    (new_codes,), tables = backend.launch_together(
        [
            append_launch(key_new, codebooks, codes, phi, start, taken, kv_layout),
            _tables_launch(query, codebooks, table_dtype),
        ],
        num_warps=CODEBOOK_WARPS,
        interpret=interpret,
    )
    return new_codes.reshape(codes.shape), Tables(*tables)


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

    def ungrouped(x: Shaped[Array, "R Q *rest"]) -> Shaped[Array, "B T N *rest"]:
        return by_query_head(x.reshape(batch, kv_heads, *x.shape[1:]), num_tokens)

    indices, counts, weights = lists
    return (
        ungrouped(indices),
        ungrouped(counts),
        None if weights is None else ungrouped(weights),
    )


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
