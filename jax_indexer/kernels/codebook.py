"""Codebooks as kernels read them: in tiles of whole centroids by some dimensions."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax import Array

from jax_indexer.kernels import backend
from jax_indexer.kernels.tuning import Tuning
from jax_indexer.layout import power_of_2_from


def dimension_tiles(num_centroids: int, dimensions: int, tuning: Tuning) -> list[tuple[int, int]]:
    """(first dimension, size) of the tiles that cover `dimensions`.

    They depend on the codebook's shape alone, so sums over dimensions have one order of addition
    whatever else a kernel does.
    """
    size = min(power_of_2_from(dimensions), max(tuning.codebook_tile // num_centroids, 8))
    return [(start, size) for start in range(0, dimensions, size)]


def tiles(
    codebooks: Any, kv_row: Array, subspace: Array, dimensions: int, tuning: Tuning
) -> Iterator[tuple[Array, Array, Array]]:
    """Yields (dimensions, which of them exist, float32 tile [C, size]) of one codebook."""
    num_centroids = codebooks.shape[2]
    centroid = jnp.arange(num_centroids, dtype=jnp.int32)[:, None]
    for start, size in dimension_tiles(num_centroids, dimensions, tuning):
        d = start + jnp.arange(size, dtype=jnp.int32)
        exists = d < dimensions
        tile = backend.load(
            codebooks.at[kv_row, subspace, centroid, d[None, :]],
            mask=jnp.broadcast_to(exists[None, :], (num_centroids, size)),
            other=0,
        )
        yield d, exists, tile.astype(jnp.float32)
