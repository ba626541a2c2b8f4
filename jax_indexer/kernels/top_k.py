"""The "top_k" selector: scores, `jax.lax.top_k` for the cut, sparse index."""

import inspect

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int32, UInt8

from jax_indexer.config import IndexerConfig
from jax_indexer.kernels.lookup_table import Tables
from jax_indexer.kernels.scores import rankable_scores
from jax_indexer.kernels.sparse_index import sparse_index

# Only the cut is taken from top_k, not which of several equal scores it chose, so the faster
# unstable mode will do where this JAX has it.
UNSTABLE = {"is_stable": False} if "is_stable" in inspect.signature(lax.top_k).parameters else {}


def select_top_k(
    tables: Tables,
    codes: UInt8[Array, "R M S"],
    lengths: Int32[Array, "B"],
    config: IndexerConfig,
    num_queries: int,
    num_query_tokens: int,
    weights_dtype: np.dtype | None,
    *,
    interpret: bool = False,
) -> tuple[Int32[Array, "R Q P"], Int32[Array, "R Q"], Float[Array, "R Q S"] | None]:
    """Everything of a selection that follows the table, around a library's top-k.

    Args:
      tables: look-up tables.
      codes: of all tokens; only their low bits count.
      lengths: tokens in the cache, clipped to 0..S.
      config: sizes.
      num_queries: Q; queries of a row are ordered by token, then by head.
      num_query_tokens: T.
      weights_dtype: of the dense weights; None for none.
      interpret: run on the CPU.

    Returns:
      indices, counts, and weights or None.

    Source: CONTRACT.md, section 3.
    """
    scores = rankable_scores(
        tables, codes, lengths, config, num_queries, num_query_tokens, interpret=interpret
    )
    budget = min(config.heavy_size, codes.shape[-1])
    if budget:
        cut, _ = lax.top_k(scores, budget, **UNSTABLE)
    else:
        cut = jnp.full((*scores.shape[:2], 1), jnp.inf, jnp.float32)
    return sparse_index(
        scores, cut, lengths, config, num_query_tokens, weights_dtype, interpret=interpret
    )
