"""How good the lists are on a model's own keys, beside those with the codebooks of faiss.

Layers are batch rows. Errors are those of the attention output, |sparse - full| / |full|, recall is
the share of the heavy tokens by exact score that is selected; both over the model's last queries.
"""

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jax_indexer import (
    DecodeCache,
    IndexerConfig,
    PQIndex,
    Rope,
    Selection,
    append,
    build_index,
    decode_attention,
    empty_cache,
    reference,
    select,
    sparse_attention,
)
from parity.real_keys import FILE_NAME, LAYERS

QUANTIZERS = ((2, 6), (4, 8), (8, 8), (16, 4))  # (subspaces, bits)
BEST_OF = 3  # starts of k-means
ROPE_BASE = 100_000.0  # of the file's model, whose pairs are interleaved
EVERY = 16  # of the last 128 queries
DECODED_AT_ONCE = 16  # queries of a step, which see one another's tokens


class Layers(NamedTuple):
    """Attention of some layers; the queries are those of the last tokens.

    Attributes:
      query: [B, Q, N, H].
      key, value: [B, S, K, H].
    """

    query: Array
    key: Array
    value: Array


def read_layers(folder: Path) -> Layers:
    """The layers of the file that `python -m parity.real_keys` writes."""
    with np.load(folder / FILE_NAME) as arrays:
        parts = (
            jnp.stack([jnp.asarray(arrays[f"layer{layer}_{name}"]) for layer in LAYERS])
            for name in Layers._fields
        )
        return Layers(*parts)


def config_of(num_subspaces: int, num_bits: int, **fields) -> IndexerConfig:
    """What everything here is measured with: 64 sinks, a window of 64."""
    sizes = {"sink_size": 64, "window_size": 64, **fields}
    return IndexerConfig(num_subspaces=num_subspaces, num_bits=num_bits, **sizes)


def full_lengths(layers: Layers, length: int | None = None) -> Array:
    """The same length for every row; the capacity unless given."""
    batch, capacity = layers.key.shape[:2]
    return jnp.full(batch, capacity if length is None else length, jnp.int32)


def turned_by(layers: Layers) -> Rope:
    """How the keys were turned."""
    return Rope.from_base(ROPE_BASE, layers.key.shape[-1], "interleaved")


# k-means: ours and that of faiss.


def faiss_codebooks(key: Array, config: IndexerConfig, seed: int) -> np.ndarray:
    """Codebooks [B, K, M, C, D] of faiss's product quantizer, trained on what ours are."""
    import faiss

    batch, length, kv_heads, size = key.shape
    shape = (config.num_subspaces, config.num_centroids, size // config.num_subspaces)
    codebooks = np.empty((batch, kv_heads, *shape), np.float32)
    for b, k in np.ndindex(batch, kv_heads):
        quantizer = faiss.ProductQuantizer(size, config.num_subspaces, config.num_bits)
        quantizer.cp.niter, quantizer.cp.seed = config.kmeans_iters, seed
        quantizer.cp.max_points_per_centroid = length  # or it would train on a sample
        quantizer.cp.min_points_per_centroid = 1  # or it would warn
        points = np.asarray(key[b, config.first_trained :, k], np.float32)
        quantizer.train(np.ascontiguousarray(points))
        codebooks[b, k] = faiss.vector_to_array(quantizer.centroids).reshape(shape)
    return codebooks


def our_index(layers: Layers, config: IndexerConfig, seed: int) -> PQIndex:
    return build_index(layers.key, full_lengths(layers), config, seed=seed)


def index_of(layers: Layers, codebooks: np.ndarray, config: IndexerConfig) -> PQIndex:
    """An index of given codebooks, with our codes."""
    batch, kv_heads, num_subspaces = codebooks.shape[:3]
    index = PQIndex(
        codebooks=jnp.asarray(codebooks),
        codes=jnp.zeros((batch, kv_heads, num_subspaces, layers.key.shape[1]), jnp.uint8),
        lengths=full_lengths(layers, 0),
    )
    return append(index, layers.key, config)


def inertia(key: Array, codebooks: Array | np.ndarray, config: IndexerConfig) -> np.ndarray:
    """Squared distances [B, K, M] of the keys to their centroids, summed in float64."""
    points = np.asarray(key, np.float64)[:, config.first_trained :]
    total = np.empty(codebooks.shape[:3])
    for b, k, m in np.ndindex(*total.shape):
        centroids = np.asarray(codebooks[b, k, m], np.float64)
        part = points[b, :, k].reshape(points.shape[1], total.shape[2], -1)[:, m]
        distances = np.square(centroids).sum(-1) - 2 * part @ centroids.T
        total[b, k, m] = np.square(part).sum() + distances.min(-1).sum()
    return total


# Attention and recall.


@functools.partial(jax.jit, static_argnames="config")
def measure_lists(
    layers: Layers, index: PQIndex | None, config: IndexerConfig
) -> tuple[Array, Array]:
    """Mean (error of the attention output, recall of heavy tokens); index None: exact top-k."""
    capacity, num_queries = layers.key.shape[1], layers.query.shape[1]
    key = layers.key.astype(jnp.float32)
    value = layers.value.astype(jnp.float32)
    groups = layers.query.shape[2] // key.shape[2]

    def one(query_and_length):
        query, length = query_and_length  # [B, 1, N, H]
        lengths = full_lengths(layers, length)
        scores = jnp.einsum(
            "btnh,bsnh->btns", query, jnp.repeat(key, groups, axis=2), precision="highest"
        )
        exact, counts = reference.select_from_scores(scores, lengths, None, config)
        selection = Selection(exact, counts)
        if index is not None:
            now = dataclasses.replace(index, lengths=lengths)
            selection = select(query, now, config)
        out = sparse_attention(query, key, value, selection, config=config)
        visible = jnp.where(
            jnp.arange(capacity) < length, scores * query.shape[-1] ** -0.5, -jnp.inf
        )
        weights = jax.nn.softmax(visible, axis=-1)
        full = jnp.einsum(
            "btns,bsnh->btnh", weights, jnp.repeat(value, groups, axis=2), precision="highest"
        )
        norm = functools.partial(jnp.linalg.norm, axis=-1)
        candidates = reference.candidates(
            reference.visible_tokens(lengths, None, capacity, 1)[..., None], capacity, config
        )
        chosen, best = (
            reference.dense_weights(x, capacity, np.dtype(np.float32))
            * candidates.astype(jnp.float32)
            for x in (selection.indices, exact)
        )
        recall = jnp.sum(chosen * best, axis=-1) / jnp.sum(best, axis=-1)
        return norm(out - full) / norm(full), recall

    taken = slice(EVERY - 1, None, EVERY)
    query = layers.query[:, taken].astype(jnp.float32)
    lengths = capacity - num_queries + 1 + jnp.arange(num_queries, dtype=jnp.int32)[taken]
    error, recall = lax.map(one, (jnp.moveaxis(query, 1, 0)[:, :, None], lengths))
    return jnp.mean(error), jnp.mean(recall)


def quality(layers: Layers, indices: Iterable[PQIndex | None], config: IndexerConfig) -> np.ndarray:
    """[error, recall] by index, float64 [2, indices]."""
    return np.array([measure_lists(layers, index, config) for index in indices], np.float64).T


def decoding_error(layers: Layers, codebooks: Array, config: IndexerConfig) -> float:
    """Mean error of `decode_attention` over the last queries, by layers, heads and queries.

    Args:
      layers: whose last tokens are decoded.
      codebooks: of some of the tokens.
      config: what these were trained with, and its rerank and rest.

    Returns:
      The mean of |sparse - full| / |full|.
    """
    batch, capacity, kv_heads, size = layers.key.shape
    num_queries = layers.query.shape[1]
    start = capacity - num_queries
    index = empty_cache(config, batch, capacity, kv_heads, size).index
    index = dataclasses.replace(index, codebooks=codebooks)
    value = layers.value if config.estimate_rest else None
    index = append(index, layers.key[:, :start], config, value=value)
    cache, errors = DecodeCache(layers.key, layers.value, index), []
    for first in range(0, num_queries, DECODED_AT_ONCE):
        query = layers.query[:, first : first + DECODED_AT_ONCE]
        new = (
            x[:, start + first : start + first + query.shape[1]] for x in (layers.key, layers.value)
        )
        out, cache = decode_attention(query.astype(jnp.float32), *new, cache, config)
        errors.append(relative_error(layers, query, out, jnp.int32(start + first)))
    return float(jnp.mean(jnp.stack(errors)))


@jax.jit
def relative_error(layers: Layers, query: Array, out: Array, first: Array) -> Array:
    """Mean error of outputs of the queries from token `first` on."""
    groups = layers.query.shape[2] // layers.key.shape[2]
    key, value = (jnp.repeat(x.astype(jnp.float32), groups, axis=2) for x in layers[1:])
    logits = jnp.einsum("btnh,bsnh->bnts", query.astype(jnp.float32), key, precision="highest")
    token = jnp.arange(key.shape[1], dtype=jnp.int32)[None]
    seen = token <= first + jnp.arange(query.shape[1], dtype=jnp.int32)[:, None]
    logits = jnp.where(seen[None, None], logits * query.shape[-1] ** -0.5, -jnp.inf)
    full = jnp.einsum(
        "bnts,bsnh->btnh", jax.nn.softmax(logits, axis=-1), value, precision="highest"
    )
    norm = functools.partial(jnp.linalg.norm, axis=-1)
    return jnp.mean(norm(out - full) / norm(full))


def ratio_of_means(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """The ratio of two means and its standard error."""
    ratio = ours.mean() / theirs.mean()
    if min(len(ours), len(theirs)) < 2:
        return ratio, np.inf
    relative = (x.std(ddof=1) / x.mean() / len(x) ** 0.5 for x in (ours, theirs))
    return ratio, ratio * float(np.hypot(*relative))
