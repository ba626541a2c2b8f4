"""The k-means kernels alone, against numpy and the reference, and codebooks across a batch.

Runs three times, as test_kernels does: interpreter, checked memory, and a GPU where there is one.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_indexer import reference
from jax_indexer.kernels import centroid_sums as kernels
from jax_indexer.kernels.tuning import H100
from parity.test_kernels import each, run  # noqa: F401  (run is a fixture)

LAYOUTS = {"kv_layout": "BSKH", "grouping": "contiguous", "ahead": None}
SMALL_PARTS = dataclasses.replace(H100, tokens_per_part=128)  # several of few tokens

# (S, K, M, D, C, dtype, metric, layout)
CASES = [
    (300, 2, 2, 4, 16, "float32", "euclidean", "BSKH"),
    (129, 1, 3, 5, 2, "bfloat16", "euclidean", "BKSH"),
    (257, 1, 1, 20, 64, "float16", "euclidean", "BSKH"),
    (130, 2, 2, 3, 4, "float32", "ip", "BKSH"),
    (190, 1, 2, 8, 32, "bfloat16", "ip", "BSKH"),
]


def numpy_sums(key, trainable, centroids, origin, phi, stop, layout):
    """Exact for small integers: float64, ties to the lower centroid."""
    B, K, M, C, size = centroids.shape
    total = np.zeros((B, K, M, C, size + 1))
    clusters = np.full(trainable.shape, -1)
    for b, k, m in np.ndindex(B, K, M):
        keys = np.asarray(key[b, :, k] if layout == "BSKH" else key[b, k], np.float64)
        counts = np.flatnonzero(trainable[b, k, m, : stop[b, k, m]])
        parts = keys.reshape(len(keys), M, -1)[counts, m]
        if phi is not None:
            extra = np.sqrt(np.maximum(phi[b, k, m] - np.square(parts).sum(-1), 0))
            parts = np.concatenate([parts, extra[:, None]], axis=-1)
        nearest = np.square(parts[:, None] - centroids[b, k, m]).sum(-1).argmin(-1)
        clusters[b, k, m, counts] = nearest
        parts[:, key.shape[-1] // M :] -= origin[b, k, m, key.shape[-1] // M :]
        np.add.at(
            total[b, k, m], nearest, np.concatenate([parts, np.ones((len(parts), 1))], axis=-1)
        )
    return total, clusters


@each(CASES, checked=[CASES[0], CASES[3]])
def test_sums_are_those_of_the_nearest_centroids_members(run, case):  # noqa: F811
    S, K, M, D, C, dtype, metric, layout = case
    rng = np.random.default_rng(S)
    B = 2
    shape = (B, S, K, M * D) if layout == "BSKH" else (B, K, S, M * D)
    key = rng.integers(-4, 5, shape).astype(np.float32)
    centroids = rng.integers(-4, 5, (B, K, M, C, D)).astype(np.float32)
    phi = None
    if metric == "ip":  # any real numbers: ties have no chance
        key += rng.random(shape, np.float32).astype(jnp.bfloat16).astype(np.float32)
        phi = np.full((B, K, M), 16.0 * D, np.float32)
        extra = rng.random((B, K, M, C, 1)).astype(np.float32)
        centroids = np.concatenate([centroids + 0.3 * extra, 9 * extra], axis=-1)
    origin = rng.integers(-2, 3, (B, K, M, centroids.shape[-1])).astype(np.float32)
    key = jnp.asarray(key, dtype)
    stop = np.full((B, K, M), S - 5, np.int32)
    stop[0, -1, -1], stop[1, 0, 0] = 0, 7
    trainable = (rng.random((B, K, M, S)) < 0.9) & (np.arange(S) < stop[..., None])
    # What does not count may be anything.
    counts = trainable.any((1, 2)) if K * M == 1 else np.arange(S) < S - 5
    spoiled = np.where(
        np.expand_dims(np.broadcast_to(counts, (B, S)), (2, 3) if layout == "BSKH" else (1, 3)),
        key,
        jnp.nan,
    ).astype(dtype)

    arrays = trainable, centroids, origin, phi, stop
    got, got_clusters = run(
        kernels.centroid_sums,
        spoiled,
        *arrays,
        *np.zeros((2, B), np.int32),
        kv_layout=layout,
        grouping="contiguous",
        ahead=None,
        tuning=SMALL_PARTS,
    )
    want, clusters = numpy_sums(np.asarray(key, np.float64), *arrays, layout)
    got_clusters = got_clusters[:, :, :, 0]
    np.testing.assert_array_equal(got_clusters[clusters >= 0], clusters[clusters >= 0])
    if metric == "euclidean":
        np.testing.assert_array_equal(got, want)
    else:
        np.testing.assert_array_equal(got[..., -1], want[..., -1])
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("at_once", [None, 64 * 16], ids=["one chunk", "chunks"])
def test_the_reference_gives_the_same_sums(at_once, monkeypatch):
    if at_once:  # the last of them overlaps
        monkeypatch.setattr(reference, "DISTANCES_AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    S, C, D = 700, 16, 6
    key = rng.integers(-4, 5, (2, S, 2, 2 * D)).astype(np.float32)
    centroids = rng.integers(-4, 5, (2, 2, 2, C, D)).astype(np.float32)
    trainable = rng.random((2, 2, 2, S)) < 0.9
    stop = np.full((2, 2, 2), S, np.int32)
    stop[1] = 0
    origin = rng.integers(-2, 3, (2, 2, 2, D)).astype(np.float32)
    arrays = key, trainable, centroids, origin, None, stop
    none = np.zeros(2, np.int32)  # no copies
    got, got_clusters = jax.jit(functools.partial(reference.assign_and_sum, **LAYOUTS))(
        *arrays, none, none
    )
    want, clusters = numpy_sums(*arrays, "BSKH")
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(
        np.asarray(got_clusters)[:, :, :, 0][clusters >= 0], clusters[clusters >= 0]
    )


@each([("euclidean",), ("ip",)], checked=[("ip",)])
def test_a_far_centroid_does_not_blur_the_distances_to_the_others(run, case):  # noqa: F811
    """One about as far away as a trainable key can be, and a key at it."""
    S, C, D, far = 200, 16, 6, 2.0**60
    rng = np.random.default_rng(0)
    key = rng.integers(-4, 5, (1, S, 1, D)).astype(np.float32)
    centroids = rng.integers(-4, 5, (1, 1, 1, C, D)).astype(np.float32)
    key[0, 50, 0] = centroids[0, 0, 0, 3] = far
    phi = None
    if case == ("ip",):  # that key has all of phi in itself, the others have it beside them
        phi = np.full((1, 1, 1), D * far**2, np.float32)
        beside = np.full((1, 1, 1, C, 1), np.sqrt(phi[0, 0, 0]))
        beside[0, 0, 0, 3] = 0
        centroids = np.concatenate([centroids, beside], axis=-1).astype(np.float32)
    origin = np.median(centroids, axis=-2)
    arrays = np.ones((1, 1, 1, S), bool), centroids, origin, phi, np.full((1, 1, 1), S, np.int32)
    near = np.square(key[0, :, 0, None] - centroids[0, 0, 0, :, :D].astype(np.float64)).sum(-1)
    want = np.zeros((C, D + 1))
    np.add.at(want, near.argmin(-1), np.concatenate([key[0, :, 0], np.ones((S, 1))], axis=-1))
    none = np.zeros(1, np.int32)
    for got in (
        run(kernels.centroid_sums, key, *arrays, none, none, **LAYOUTS, tuning=SMALL_PARTS),
        jax.jit(functools.partial(reference.assign_and_sum, **LAYOUTS))(key, *arrays, none, none),
    ):
        sums, clusters = got
        np.testing.assert_array_equal(sums[0, 0, 0][:, [*range(D), -1]], want)
        np.testing.assert_array_equal(clusters[0, 0, 0, 0], near.argmin(-1))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_pieces_add_up(count):
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32) * 1000
    pieces = jax.jit(functools.partial(kernels.bfloat16_pieces, count=count))(jnp.asarray(x))
    total = sum(np.asarray(piece, np.float64) for piece in pieces)
    error = np.abs(total - x) / np.abs(x)
    assert error.max() <= (0 if count == 3 else 2.0 ** (1 - 8 * count))


def test_the_largest_codebooks_are_named():
    assert kernels.unsupported(256, 64) is None
    assert kernels.unsupported(2, 3) is None
    assert "256 centroids of 65" in (kernels.unsupported(256, 65) or "")
