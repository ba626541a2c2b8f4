"""Look-up tables: inner products of query subvectors with every centroid of a codebook.

Queries that share codes share look-ups too: their entries lie side by side, as many *lanes* as one
load of 16 bytes brings. Where one query is scored alone, the lines of its own table serve better:
a look-up costs by the cache lines that a warp touches. So there are tables in both forms.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Float

from jax_indexer.kernels import backend
from jax_indexer.kernels.codebook import tiles
from jax_indexer.kernels.step import Step
from jax_indexer.kernels.tuning import Tuning
from jax_indexer.layout import by_kv_head, dimension_of, power_of_2_from


class Tables(NamedTuple):
    """Look-up tables of the queries of each kv row; entry c of subspace m is at m * C + c.

    Attributes:
      by_lane: [R, groups, M * C, lanes], query q in lane q % lanes of group q // lanes; the lanes
        past the last query repeat it. None where nothing scores all tokens.
      by_query: [R, Q, M * C].
    """

    by_lane: Any
    by_query: Any


class Inputs(NamedTuple):
    """What tables are made of."""

    query: Any  # [B, T, N, H]
    codebooks: Any  # [R, M, C, D'], of which the first D coordinates count


def lanes_of(num_queries: int, itemsize: int, tuning: Tuning) -> int:
    """How many queries of a kv row have their table entries side by side."""
    return min(power_of_2_from(num_queries), tuning.lookup_bytes // itemsize)


def lookup_table_kernel(program, inputs: Inputs, tables: Tables, *, step: Step, lanes: int):
    num_subspaces, num_centroids = inputs.codebooks.shape[1:3]
    dimensions = inputs.query.shape[3] // num_subspaces
    lane_groups = pl.cdiv(step.Q, lanes)
    subspace = program % num_subspaces
    group = program // num_subspaces % lane_groups
    kv_row = program // (num_subspaces * lane_groups)
    row, kv_head = kv_row // step.K, kv_row % step.K
    codebook = list(tiles(inputs.codebooks, kv_row, subspace, dimensions, step.tuning))
    entry = subspace * num_centroids + jnp.arange(num_centroids, dtype=jnp.int32)

    def products(query: Array) -> Array:
        total = jnp.float32(0)
        token, head = (0, query) if step.T == 1 else (query // step.G, query % step.G)
        head = kv_head * step.G + head
        for d, exists, tile in codebook:
            h = dimension_of(subspace, d, num_subspaces, dimensions, step.config.grouping)
            at = inputs.query.at[row, token, head, h]
            part = backend.load(at, mask=exists, other=0).astype(jnp.float32)
            # Elementwise, not a dot: that would be rounded to TF32.
            total += jnp.sum(tile * part[None, :], axis=1)
        return total.astype(tables.by_query.dtype)

    columns = []
    for place in range(lanes):
        query = jnp.minimum(group * lanes + place, step.Q - 1)
        columns.append(products(query))
        real = jnp.broadcast_to(group * lanes + place < step.Q, entry.shape)
        backend.store(tables.by_query.at[kv_row, query, entry], columns[-1], mask=real)
    if tables.by_lane is None:
        return
    lane = jnp.arange(lanes, dtype=jnp.int32)
    into = tables.by_lane.at[kv_row, group, entry[:, None], lane[None, :]]
    backend.store(into, backend.join_columns(columns))


def tables_launch(
    step: Step,
    query: Float[Array, "B T N H"],
    codebooks: Float[Array, "*layers B K M C D_"],
    layer: Array | None = None,
    *,
    by_lane: bool = True,
) -> backend.Launch:
    """The launch that makes `Tables` of all queries against the codebooks of their kv heads.

    Their bits depend on the query and the codebook alone.

    Source: CONTRACT.md, rules 3 and 7.
    """
    config, dtype = step.config, step.config.table_dtype
    entries = config.num_subspaces * config.num_centroids
    lanes = lanes_of(step.Q, dtype.itemsize, step.tuning)
    if not by_lane and step.T == 1:  # programs are few enough for one a query
        lanes = 1
    groups = pl.cdiv(step.Q, lanes)
    shape = step.R, groups, entries, lanes
    return backend.Launch(
        functools.partial(lookup_table_kernel, step=step, lanes=lanes),
        Inputs(query, step.by_rows(codebooks)),
        Tables(
            jax.ShapeDtypeStruct(shape, dtype) if by_lane else None,
            jax.ShapeDtypeStruct((step.R, step.Q, entries), dtype),
        ),
        programs=step.R * groups * config.num_subspaces,
        state=("codebooks",),
        layer=layer,
    )


def tables_from(table: Float[Array, "B T N M C"], step: Step) -> Tables:
    """Both forms, from entries made elsewhere, as `reference.lookup_table` gives them."""
    by_query = by_kv_head(table, step.K).reshape(step.R, step.Q, -1)
    lanes = lanes_of(step.Q, np.dtype(table.dtype).itemsize, step.tuning)
    padded = jnp.pad(by_query, ((0, 0), (0, -step.Q % lanes), (0, 0)), mode="edge")
    by_lane = padded.reshape(step.R, -1, lanes, by_query.shape[-1]).swapaxes(2, 3)
    return Tables(by_lane, by_query)
