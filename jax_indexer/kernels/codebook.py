"""Codebooks as kernels read them: in tiles of whole centroids by some dimensions."""

from collections.abc import Iterator

import jax.numpy as jnp
from jax import Array

from jax_indexer.kernels import backend
from jax_indexer.kernels.tuning import CODEBOOK_TILE


def power_of_2_from(number: int) -> int:
    """The least power of two that is at least `number`: blocks have no other sizes."""
    return 1 << (number - 1).bit_length()


def dimension_tiles(num_centroids: int, dimensions: int) -> list[tuple[int, int]]:
    """(first dimension, size) of the tiles that cover `dimensions`.

    They depend on the codebook's shape alone, so sums over dimensions have one order of addition
    whatever else a kernel does.
    """
    size = min(power_of_2_from(dimensions), max(CODEBOOK_TILE // num_centroids, 8))
    return [(start, size) for start in range(0, dimensions, size)]


def tiles(
    codebooks_ref, row: Array, subspace: Array, dimensions: int
) -> Iterator[tuple[Array, Array, Array]]:
    """Yields (dimensions, which of them exist, float32 tile [C, size]) of one codebook."""
    num_centroids = codebooks_ref.shape[2]
    centroid = jnp.arange(num_centroids, dtype=jnp.int32)[:, None]
    for start, size in dimension_tiles(num_centroids, dimensions):
        d = start + jnp.arange(size, dtype=jnp.int32)
        exists = d < dimensions
        tile = backend.load(
            codebooks_ref.at[row, subspace, centroid, d[None, :]],
            mask=jnp.broadcast_to(exists[None, :], (num_centroids, size)),
            other=0,
        )
        yield d, exists, tile.astype(jnp.float32)
