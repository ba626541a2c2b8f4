"""Look-up tables: inner products of query subvectors with every centroid of a codebook."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Float

from jax_indexer.kernels import backend
from jax_indexer.kernels.codebook import tiles
from jax_indexer.kernels.tuning import CODEBOOK_WARPS


def lookup_table_kernel(
    query_ref,  # [R, Q, M, D]
    codebooks_ref,  # [R, M, C, D']
    table_ref,  # [R, Q, M * C]
):
    _, num_queries, num_subspaces, dimensions = query_ref.shape
    num_centroids = codebooks_ref.shape[2]
    program = pl.program_id(0)
    subspace = program % num_subspaces
    query = program // num_subspaces % num_queries
    row = program // (num_subspaces * num_queries)

    total = jnp.zeros(num_centroids, jnp.float32)
    for d, exists, tile in tiles(codebooks_ref, row, subspace, dimensions):
        part = backend.load(query_ref.at[row, query, subspace, d], mask=exists, other=0)
        # Elementwise, not a dot: that would be rounded to TF32.
        total += jnp.sum(tile * part.astype(jnp.float32)[None, :], axis=1)
    centroid = jnp.arange(num_centroids, dtype=jnp.int32)
    entry = subspace * num_centroids + centroid
    table_ref[row, query, entry] = total.astype(table_ref.dtype)


def lookup_table(
    query: Float[Array, "R Q M D"],
    codebooks: Float[Array, "R M C D_"],
    table_dtype: np.dtype,
    *,
    interpret: bool = False,
) -> Float[Array, "R Q MC"]:
    """Tables of all queries against the codebooks of their kv head.

    Args:
      query: subvectors, grouped by kv head: R = B * K rows of Q = T * G queries.
      codebooks: centroids, of which the first D coordinates count.
      table_dtype: what the float32 sums are rounded to, once.
      interpret: run on the CPU.

    Returns:
      Entries of subspace m at m * C and on. Their bits depend on the query and the codebook alone.

    Source: CONTRACT.md, rules 3 and 7.
    """
    rows, queries, num_subspaces, _ = query.shape
    num_centroids = codebooks.shape[2]
    (table,) = backend.launch(
        lookup_table_kernel,
        query,
        codebooks,
        programs=rows * queries * num_subspaces,
        out_shape=[
            jax.ShapeDtypeStruct((rows, queries, num_subspaces * num_centroids), table_dtype)
        ],
        num_warps=CODEBOOK_WARPS,
        interpret=interpret,
    )
    return table
