"""Look-up tables: inner products of query subvectors with every centroid of a codebook.

Queries that share codes share look-ups too: their entries lie side by side, as many *lanes* as one
load of 16 bytes brings. Where one query is scored alone, the lines of its own table serve better:
a look-up costs by the cache lines that a warp touches. So there are tables in both forms.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Float

from jax_indexer.kernels import backend
from jax_indexer.kernels.codebook import power_of_2_from, tiles
from jax_indexer.kernels.tuning import LOOKUP_BYTES


class Tables(NamedTuple):
    """Look-up tables of R rows of Q queries; entry c of subspace m is at m * C + c.

    Attributes:
      by_lane: [R, groups, M * C, lanes], query q in lane q % lanes of group q // lanes; the lanes
        past the last query repeat it.
      by_query: [R, Q, M * C].
    """

    by_lane: Array
    by_query: Array


def lanes_of(num_queries: int, itemsize: int) -> int:
    """How many queries of a row have their table entries side by side."""
    return min(power_of_2_from(num_queries), LOOKUP_BYTES // itemsize)


def _products(query_ref, row, query, subspace, codebook_tiles, table_dtype) -> Array:
    """Entries of one query for the centroids in the tiles."""
    total = jnp.float32(0)
    for d, exists, tile in codebook_tiles:
        part = backend.load(query_ref.at[row, query, subspace, d], mask=exists, other=0)
        # Elementwise, not a dot: that would be rounded to TF32.
        total += jnp.sum(tile * part.astype(jnp.float32)[None, :], axis=1)
    return total.astype(table_dtype)


def lookup_table_kernel(
    query_ref,  # [R, Q, M, D]
    codebooks_ref,  # [R, M, C, D']
    by_lane_ref,  # [R, groups, M * C, lanes]
    by_query_ref,  # [R, Q, M * C]
):
    _, num_queries, num_subspaces, dimensions = query_ref.shape
    num_centroids, (_, lane_groups, _, lanes) = codebooks_ref.shape[2], by_lane_ref.shape
    program = backend.program_id()
    subspace = program % num_subspaces
    group = program // num_subspaces % lane_groups
    row = program // (num_subspaces * lane_groups)
    codebook = list(tiles(codebooks_ref, row, subspace, dimensions))
    entry = subspace * num_centroids + jnp.arange(num_centroids, dtype=jnp.int32)
    columns = []
    for place in range(lanes):
        query = jnp.minimum(group * lanes + place, num_queries - 1)
        products = _products(query_ref, row, query, subspace, codebook, by_lane_ref.dtype)
        real = group * lanes + place < num_queries
        into = by_query_ref.at[row, query, entry]
        backend.store(into, products, mask=jnp.broadcast_to(real, entry.shape))
        columns.append(products)
    lane = jnp.arange(lanes, dtype=jnp.int32)
    into = by_lane_ref.at[row, group, entry[:, None], lane[None, :]]
    backend.store(into, backend.join_columns(columns))


def tables_launch(
    query: Float[Array, "R Q M D"], codebooks: Float[Array, "R M C D_"], table_dtype: np.dtype
) -> backend.Launch:
    """The launch that computes tables of all queries against the codebooks of their kv head.

    Args:
      query: subvectors, grouped by kv head: R = B * K rows of Q = T * G queries.
      codebooks: centroids, of which the first D coordinates count.
      table_dtype: what the float32 sums are rounded to, once.

    Returns:
      A launch whose outputs are those of `Tables`. Their bits depend on the query and the codebook
      alone.

    Source: CONTRACT.md, rules 3 and 7.
    """
    rows, queries, num_subspaces, _ = query.shape
    entries = num_subspaces * codebooks.shape[2]
    lanes = lanes_of(queries, table_dtype.itemsize)
    groups = pl.cdiv(queries, lanes)
    shapes = (rows, groups, entries, lanes), (rows, queries, entries)
    return backend.Launch(
        lookup_table_kernel,
        (query, codebooks),
        programs=rows * groups * num_subspaces,
        out_shape=[jax.ShapeDtypeStruct(shape, table_dtype) for shape in shapes],
    )


def tables_from(by_query: Float[Array, "R Q MC"]) -> Tables:
    """Both forms, from entries made elsewhere."""
    rows, queries, entries = by_query.shape
    lanes = lanes_of(queries, by_query.dtype.itemsize)
    padded = jnp.pad(by_query, ((0, 0), (0, -queries % lanes), (0, 0)), mode="edge")
    return Tables(padded.reshape(rows, -1, lanes, entries).swapaxes(2, 3), by_query)
