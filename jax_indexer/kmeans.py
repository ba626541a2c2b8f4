"""Codebook training: k-means over the subvectors of one batch row, every subspace at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int32, UInt32

# Distances held at once: chunks of tokens are cut so that no more than this many exist.
DISTANCES_IN_MEMORY = 2**24


def train_codebooks(
    parts: Float[Array, "K M S D_"],
    trainable: Bool[Array, "K M S"],
    length: Int32[Array, ""],
    seed: UInt32[Array, ""],
    *,
    num_centroids: int,
    iterations: int,
) -> Float[Array, "K M C D_"]:
    """Lloyd's algorithm from randomly chosen keys, one codebook a (kv head, subspace).

    Random numbers depend on (seed, kv head, subspace, length) and the token's position only: not
    on the row's place in a batch, nor on the capacity S. A cluster left empty takes up a random
    trainable key. With fewer trainable keys than centroids those keys,
    in their order and repeated, are the codebook; with none it is zero.

    Args:
      parts: float32 subvectors, augmented for the inner-product metric, zero where not trainable.
      trainable: which of them to train on.
      length: tokens in the row.
      seed: of the random numbers.
      num_centroids: C.
      iterations: assignments and updates, none for the starting points themselves.

    Returns:
      float32 centroids.
    """
    kv_heads, num_subspaces, capacity, _ = parts.shape

    def generator(kv_head, subspace):
        key = jax.random.key(seed)
        for number in (kv_head, subspace, length):
            key = jax.random.fold_in(key, number)
        return key

    generators = jax.vmap(jax.vmap(generator, (None, 0)), (0, None))(
        jnp.arange(kv_heads), jnp.arange(num_subspaces)
    )
    per_step = DISTANCES_IN_MEMORY // (kv_heads * num_subspaces * num_centroids)
    chunk = min(max(per_step, 256), capacity)
    train = functools.partial(
        _train_one, num_centroids=num_centroids, iterations=iterations, chunk=chunk
    )
    return jax.vmap(jax.vmap(train))(parts, trainable, generators)


def _train_one(
    parts: Float[Array, "S D_"],
    trainable: Bool[Array, "S"],
    generator: Array,
    *,
    num_centroids: int,
    iterations: int,
    chunk: int,
) -> Float[Array, "C D_"]:
    capacity = parts.shape[0]
    count = jnp.sum(trainable, dtype=jnp.int32)
    few = count < num_centroids

    # A random order of the trainable tokens (their own order where all are used): the first C are
    # the starting points, the next C stand in for clusters that become empty.
    shuffled = jax.random.uniform(generator, (capacity,))
    by_position = -jnp.arange(capacity, dtype=jnp.float32)
    priority = jnp.where(trainable, jnp.where(few, by_position, shuffled), -jnp.inf)
    _, order = lax.top_k(priority, min(2 * num_centroids, capacity))
    usable = jnp.clip(count, 1, len(order))

    def drawn(first):
        return parts[order[(first + jnp.arange(num_centroids)) % usable]]

    start = jnp.where(count > 0, drawn(0), 0)

    padding = -capacity % chunk
    chunks = jnp.pad(parts, ((0, padding), (0, 0))).reshape(-1, chunk, parts.shape[1])
    weights = jnp.pad(trainable, (0, padding)).astype(jnp.float32).reshape(-1, chunk)
    highest = lax.Precision.HIGHEST

    def lloyd(iteration, centroids):
        half_norms = jnp.sum(centroids * centroids, axis=1) / 2

        def assign(batch):
            x, weight = batch
            nearest = jnp.argmax(jnp.dot(x, centroids.T, precision=highest) - half_norms, axis=1)
            member = nearest[:, None] == np.arange(num_centroids)
            member = jnp.where(member, weight[:, None], 0)
            return jnp.dot(member.T, x, precision=highest), jnp.sum(member, axis=0)

        sums, sizes = (jnp.sum(x, axis=0) for x in lax.map(assign, (chunks, weights)))
        means = sums / jnp.maximum(sizes, 1)[:, None]
        return jnp.where(sizes[:, None] > 0, means, drawn(num_centroids + iteration))

    trained = lax.fori_loop(0, iterations, lloyd, start)
    return jnp.where(few, start, trained)
