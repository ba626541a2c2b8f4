"""The "top_k" selector: table, scores, `jax.lax.top_k` for the cut, sparse index."""

import inspect

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int32, UInt8

from jax_indexer.config import IndexerConfig
from jax_indexer.kernels.lookup_table import lookup_table
from jax_indexer.kernels.scores import rankable_scores
from jax_indexer.kernels.sparse_index import sparse_index
from jax_indexer.layout import by_kv_head, by_query_head, subvectors

# Only the cut is taken from top_k, not which of several equal scores it chose, so the faster
# unstable mode will do where this JAX has it.
UNSTABLE = {"is_stable": False} if "is_stable" in inspect.signature(lax.top_k).parameters else {}


def select_from_table(
    table: Float[Array, "B T N M C"],
    codes: UInt8[Array, "B K M S"],
    lengths: Int32[Array, "B"],
    config: IndexerConfig,
    weights_dtype: np.dtype | None,
    *,
    interpret: bool = False,
) -> tuple[Int32[Array, "B T N P"], Int32[Array, "B T N"], Float[Array, "B T N S"] | None]:
    """Everything of a selection that follows the table: indices, counts, weights if asked for."""
    batch, kv_heads, num_subspaces, capacity = codes.shape
    num_tokens = table.shape[1]
    rows = batch * kv_heads
    grouped = by_kv_head(table, kv_heads).reshape(rows, -1, num_subspaces * table.shape[-1])
    scores = rankable_scores(
        grouped,
        codes.reshape(rows, num_subspaces, capacity),
        lengths,
        config,
        num_tokens,
        interpret=interpret,
    )
    budget = min(config.heavy_size, capacity)
    if budget:
        cut, _ = lax.top_k(scores, budget, **UNSTABLE)
    else:
        cut = jnp.full((*scores.shape[:2], 1), jnp.inf, jnp.float32)
    indices, counts, weights = sparse_index(
        scores, cut, lengths, config, num_tokens, weights_dtype, interpret=interpret
    )

    def ungrouped(x):
        x = x.reshape(batch, kv_heads, *x.shape[1:])
        return by_query_head(x, num_tokens)

    return (
        ungrouped(indices),
        ungrouped(counts),
        None if weights is None else ungrouped(weights),
    )


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
