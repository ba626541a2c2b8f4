"""Codebook training: k-means over subvectors, for all rows, kv heads and subspaces at once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int32, UInt32

from jax_indexer import reference
from jax_indexer.config import IndexerConfig
from jax_indexer.kernels import backend
from jax_indexer.kernels import centroid_sums as kernels
from jax_indexer.layout import KVLayout, subvectors, token_axis

# Tokens counted at once to find the n-th trainable one; their number fits into a uint8.
COUNTED_TOKENS = 128


class TrainingSet(NamedTuple):
    """The keys that codebooks are trained on, where they lie.

    Attributes:
      key: [B, S, K, H] ("BSKH") or [B, K, S, H] ("BKSH"): the cache, or a sample of it.
      trainable: which subvectors count: finite ones of the row's tokens from `init_offset` on.
      stop: tokens of each row behind which none is trainable.
      stride: of the sample of each row; 1 where all tokens are there.
      phi: for the inner-product metric the largest squared norm of a trainable subvector, else
        None.
    """

    key: Float[Array, "B _ _ H"]
    trainable: Bool[Array, "B K M S"]
    stop: Int32[Array, "B"]
    stride: Int32[Array, "B"]
    phi: Float[Array, "B K M"] | None


def training_set(
    key: Float[Array, "B _ _ H"],
    lengths: Int32[Array, "B"],
    config: IndexerConfig,
    kv_layout: KVLayout,
) -> TrainingSet:
    """Which keys to train on: those in [init_offset, lengths[b]), or a strided sample of them.

    Args:
      key: [B, S, K, H] ("BSKH") or [B, K, S, H] ("BKSH").
      lengths: tokens in each row, in 0..S.
      config: `init_offset`, `train_tokens` and `metric` count.
      kv_layout: of `key`.

    Returns:
      A TrainingSet without `phi`, which `train` finds.
    """
    axis, first, augmented = token_axis(kv_layout), config.first_trained, config.metric == "ip"
    sample = config.train_tokens
    if sample is None or sample >= key.shape[axis] - first:
        position = jnp.arange(key.shape[axis], dtype=jnp.int32)
        exists = (position >= first) & (position < lengths[:, None])
        stop, stride = lengths, jnp.ones_like(lengths)
    else:
        count = jnp.maximum(lengths - first, 0)
        stride = jnp.maximum((count + sample - 1) // sample, 1)
        stop = (count + stride - 1) // stride
        position = jnp.arange(sample, dtype=jnp.int32)
        exists = position < stop[:, None]
        taken = jnp.where(exists, first + position * stride[:, None], 0)
        taken = taken[:, :, None, None] if kv_layout == "BSKH" else taken[:, None, :, None]
        key = jnp.take_along_axis(key, taken, axis=axis)

    def inspect(row) -> tuple[Bool[Array, "K M S"], Float[Array, "K M"]]:
        key, exists = row
        parts = subvectors(key.astype(jnp.float32), config.num_subspaces)
        # The order of a sum would depend on the cache's shape, and codes depend on phi.
        norms = reference.squared_norm(parts) if augmented else jnp.sum(parts * parts, axis=-1)
        norms = jnp.moveaxis(norms, axis - 1, -1)
        trainable = exists & jnp.isfinite(norms)
        return trainable, jnp.max(jnp.where(trainable, norms, 0), axis=-1)

    # Row by row, which keeps a row's bits from depending on the batch.
    trainable, phi = lax.map(inspect, (key, exists))
    return TrainingSet(key, trainable, stop, stride, phi if augmented else None)


def train(
    keys: TrainingSet,
    lengths: Int32[Array, "B"],
    seed: UInt32[Array, ""],
    config: IndexerConfig,
    kv_layout: KVLayout,
    implementation: backend.Implementation | None,
) -> Float[Array, "B K M C D_"]:
    """Lloyd's algorithm from keys drawn evenly over the context, one codebook a subspace.

    Random numbers depend on (seed, kv head, subspace, length) only: not on the row's place in a
    batch, nor on the capacity. Iterations end for a codebook when one changes nothing. A cluster
    left empty takes up a random trainable key. With fewer trainable keys than centroids those
    keys, in their order and repeated, are the codebook; with none it is zero.

    Args:
      keys: what to train on.
      lengths: tokens in each row.
      seed: of the random numbers.
      config: `num_bits` and `kmeans_iters` count.
      kv_layout: of the keys.
      implementation: of `centroid_sums`.

    Returns:
      float32 centroids, augmented for the inner-product metric.
    """
    num_centroids = config.num_centroids
    count = jnp.sum(keys.trainable, axis=-1, dtype=jnp.int32)  # [B, K, M]
    rank = _draw_ranks(count, lengths, seed, num_centroids)
    drawn = _subvectors_at(keys, _nth_trainable(keys.trainable, rank), kv_layout)
    start = jnp.where((count > 0)[..., None, None], drawn[..., :num_centroids, :], 0)
    spare = drawn[..., num_centroids:, :]

    def update(state):
        iteration, centroids, moving = state
        stop = jnp.where(moving, keys.stop[:, None, None], 0)
        sums = centroid_sums(keys, centroids, stop, kv_layout, implementation)
        sizes = sums[..., -1:]
        another = jnp.take(spare, (jnp.arange(num_centroids) + iteration) % num_centroids, axis=-2)
        new = jnp.where(sizes > 0, sums[..., :-1] / jnp.maximum(sizes, 1), another)
        new = jnp.where(moving[..., None, None], new, centroids)
        return iteration + 1, new, jnp.any(new != centroids, axis=(-2, -1))

    def is_moving(state):
        iteration, _, moving = state
        return (iteration < config.kmeans_iters) & jnp.any(moving)

    _, centroids, _ = lax.while_loop(is_moving, update, (0, start, count >= num_centroids))
    return centroids


def centroid_sums(
    keys: TrainingSet,
    centroids: Float[Array, "B K M C D_"],
    stop: Int32[Array, "B K M"],
    kv_layout: KVLayout,
    implementation: backend.Implementation | None,
) -> Float[Array, "B K M C E"]:
    """`reference.centroid_sums` by what is asked for, or by what the platform has for it."""
    dimensions = keys.key.shape[-1] // centroids.shape[2]
    arguments = (keys.key, keys.trainable, centroids, keys.phi, stop)

    def xla(*arguments):
        return reference.centroid_sums(*arguments, kv_layout=kv_layout)

    def triton(*arguments):
        return kernels.centroid_sums(*arguments, kv_layout=kv_layout)

    if kernels.unsupported(centroids.shape[3], dimensions):
        implementation = "xla"
    return backend.dispatch(xla, triton, *arguments, implementation=implementation)


def first_step_gain(
    keys: TrainingSet,
    centroids: Float[Array, "B K M C D_"],
    kv_layout: KVLayout,
    implementation: backend.Implementation | None,
) -> Float[Array, "B"]:
    """The share of each row's quantization error that one iteration from these centroids removes.

    A strided sample of a row that has grown holds other tokens than were trained on, and means of
    few tokens fit these better than any others: what chance alone removes is taken off. Centroids
    that are all equal come from fewer than two keys, and one step may not tell them apart.

    Args:
      keys: the keys whose error it is.
      centroids: in the codebooks' dtype, augmented for the inner-product metric.
      kv_layout: of the keys.
      implementation: of `centroid_sums`.

    Returns:
      A number in 0..1; 0 where the error is no more than rounding makes of equal keys, and 1 where
      it is more and all centroids of a codebook are equal.
    """
    dtype, centroids = centroids.dtype, centroids.astype(jnp.float32)
    stop = jnp.broadcast_to(keys.stop[:, None, None], centroids.shape[:3])
    sums = centroid_sums(keys, centroids, stop, kv_layout, implementation)
    sums, sizes = sums[..., :-1], sums[..., -1:]
    means = sums / jnp.maximum(sizes, 1)
    count = jnp.sum(sizes, axis=-2, keepdims=True)
    mean = jnp.sum(sums, axis=-2, keepdims=True) / jnp.maximum(count, 1)
    parts = subvectors(keys.key.astype(jnp.float32), centroids.shape[2])
    parts = jnp.moveaxis(parts, token_axis(kv_layout), -2)  # [B, K, M, S, D]
    if keys.phi is not None:
        parts = reference.augment(parts, keys.phi[..., None])
    distances = jnp.where(keys.trainable[..., None], jnp.square(parts - mean), 0)

    def over_codebook(x):
        return jnp.sum(x, axis=(-2, -1))

    variance = over_codebook(distances)
    within = jnp.maximum(variance - over_codebook(sizes * jnp.square(means - mean)), 0)
    moved = means.astype(dtype).astype(jnp.float32)
    error = within + over_codebook(sizes * jnp.square(means - centroids))
    left = within + over_codebook(sizes * jnp.square(means - moved))
    clusters = over_codebook((sizes > 0).astype(jnp.float32))
    by_chance = within * clusters / jnp.maximum(over_codebook(count) - clusters, 1)
    left += jnp.where(keys.stride[:, None, None] > 1, by_chance, 0)
    least = 1e-5 * variance + 1e-10 * over_codebook(count * jnp.square(mean))

    def over_row(x):
        return jnp.sum(x, axis=(1, 2))

    is_one = jnp.all(centroids == centroids[..., :1, :], axis=(-2, -1))
    is_start = jnp.any(is_one & (error > least), axis=(1, 2))
    error, left, least = over_row(error), over_row(left), over_row(least)
    gain = jnp.maximum(error - jnp.maximum(left, least), 0) / error
    return jnp.where(is_start, 1, jnp.where(error > least, gain, 0))


def _draw_ranks(
    count: Int32[Array, "B K M"], lengths: Int32[Array, "B"], seed: UInt32[Array, ""], number: int
) -> Int32[Array, "B K M R"]:
    """Twice `number` ranks of trainable keys, each `number` one from every equal share of them.

    So the first keys drawn are distinct. Where there are fewer keys, all of them over and over.
    """

    _, kv_heads, num_subspaces = count.shape

    def uniform(length):
        key = jax.random.fold_in(jax.random.key(seed), length)
        return jax.random.uniform(key, (kv_heads, num_subspaces, 2, number), jnp.float32)

    fractions = jax.vmap(uniform)(lengths)
    share = jnp.arange(number, dtype=jnp.int32)
    count = count[..., None]
    # Integers: a float32 does not count the tokens of a long context.
    begin = share * (count // number) + share * (count % number) // number
    end = (share + 1) * (count // number) + (share + 1) * (count % number) // number
    width = (end - begin)[..., None, :]
    within = (fractions * width.astype(jnp.float32)).astype(jnp.int32)
    spread = begin[..., None, :] + jnp.minimum(within, width - 1)
    all_keys = share % jnp.maximum(count, 1)
    rank = jnp.where((count < number)[..., None, :], all_keys[..., None, :], spread)
    return rank.reshape(*rank.shape[:3], 2 * number)


def _nth_trainable(
    trainable: Bool[Array, "B K M S"], rank: Int32[Array, "B K M R"]
) -> Int32[Array, "B K M R"]:
    """Positions of the trainable keys of these ranks, in two steps: by block, then within it."""

    def find(trainable: Bool[Array, "S"], rank: Int32[Array, "R"]) -> Int32[Array, "R"]:
        blocks = jnp.pad(trainable, (0, -len(trainable) % COUNTED_TOKENS))
        blocks = blocks.reshape(-1, COUNTED_TOKENS)
        sizes = jnp.sum(blocks, axis=1, dtype=jnp.int32)
        ends = jnp.cumsum(sizes)
        block = jnp.minimum(jnp.searchsorted(ends, rank, side="right"), len(ends) - 1)
        before = rank - (ends - sizes)[block]
        so_far = jnp.cumsum(blocks[block], axis=1, dtype=jnp.uint8)
        within = jnp.sum(so_far.astype(jnp.int32) <= before[:, None], axis=1, dtype=jnp.int32)
        return jnp.minimum(block * COUNTED_TOKENS + within, len(trainable) - 1).astype(jnp.int32)

    return jax.vmap(jax.vmap(jax.vmap(find)))(trainable, rank)


def _subvectors_at(
    keys: TrainingSet, position: Int32[Array, "B K M R"], kv_layout: KVLayout
) -> Float[Array, "B K M R D_"]:
    batch, kv_heads, num_subspaces, _ = position.shape
    parts = subvectors(keys.key, num_subspaces)
    b, k, m = jnp.ogrid[:batch, :kv_heads, :num_subspaces]
    b, k, m = b[..., None], k[..., None], m[..., None]
    at = (b, position, k, m) if kv_layout == "BSKH" else (b, k, position, m)
    taken = parts[at].astype(jnp.float32)
    return taken if keys.phi is None else reference.augment(taken, keys.phi[..., None])
