"""The kernels put together: table, then a selector, for arrays in the public layout."""

from typing import Literal

import numpy as np
from jax import Array
from jaxtyping import Float, Int32, Shaped, UInt8

from jax_indexer.config import IndexerConfig
from jax_indexer.kernels.lookup_table import lookup_table
from jax_indexer.kernels.threshold import select_threshold
from jax_indexer.kernels.top_k import select_top_k
from jax_indexer.layout import by_kv_head, by_query_head, subvectors

SELECTORS = {"threshold": select_threshold, "top_k": select_top_k}


def table_of(
    query: Float[Array, "B T N H"],
    codebooks: Float[Array, "B K M C D_"],
    table_dtype: np.dtype,
    *,
    interpret: bool = False,
) -> Float[Array, "B T N M C"]:
    """Look-up tables of all query heads (rule 3), by the one kernel that computes them (rule 7)."""
    batch, kv_heads, num_subspaces, num_centroids, _ = codebooks.shape
    parts = subvectors(by_kv_head(query, kv_heads), num_subspaces)
    parts = parts.reshape(batch * kv_heads, *parts.shape[2:])
    centroids = codebooks.reshape(batch * kv_heads, *codebooks.shape[2:])
    table = lookup_table(parts, centroids, table_dtype, interpret=interpret)
    table = table.reshape(batch, kv_heads, -1, num_subspaces, num_centroids)
    return by_query_head(table, query.shape[1])


def select_from_table(
    table: Float[Array, "B T N M C"],
    codes: UInt8[Array, "B K M S"],
    lengths: Int32[Array, "B"],
    config: IndexerConfig,
    weights_dtype: np.dtype | None,
    selector: Literal["threshold", "top_k"],
    *,
    interpret: bool = False,
) -> tuple[Int32[Array, "B T N P"], Int32[Array, "B T N"], Float[Array, "B T N S"] | None]:
    """Everything of a selection that follows the table: indices, counts, weights if asked for."""
    batch, kv_heads, num_subspaces, capacity = codes.shape
    num_tokens, num_centroids = table.shape[1], table.shape[-1]
    rows = batch * kv_heads
    indices, counts, weights = SELECTORS[selector](
        by_kv_head(table, kv_heads).reshape(rows, -1, num_subspaces * num_centroids),
        codes.reshape(rows, num_subspaces, capacity),
        lengths,
        config,
        num_tokens,
        weights_dtype,
        interpret=interpret,
    )

    def ungrouped(x: Shaped[Array, "R Q *rest"]) -> Shaped[Array, "B T N *rest"]:
        return by_query_head(x.reshape(batch, kv_heads, *x.shape[1:]), num_tokens)

    return (
        ungrouped(indices),
        ungrouped(counts),
        None if weights is None else ungrouped(weights),
    )
