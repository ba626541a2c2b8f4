"""Codebook training: k-means over subvectors, for all rows, kv heads and subspaces at once."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int32, UInt8, UInt32

from jax_indexer import reference
from jax_indexer.config import Implementation, IndexerConfig
from jax_indexer.kernels import backend
from jax_indexer.kernels.centroid_sums import centroid_sums, unsupported
from jax_indexer.layout import KVLayout, subvectors, subvectors_of, token_axis
from jax_indexer.rope import LookAhead, most_squared, positions_on, turned
from jax_indexer.state import Span, varying_as

# Tokens counted at once to find the n-th trainable one; their number fits into a uint8.
COUNTED_TOKENS = 128
# Keys whose median distances are taken from: half of them far away would be needed to move it.
ORIGIN_KEYS = 63
# Of a coordinate: what a float32 mean of keys that are equal in it may differ from it.
ROUNDING = 1e-5


class TrainingSet(NamedTuple):
    """The keys that codebooks are trained on, where they lie.

    Attributes:
      key: [B, S, K, H] ("BSKH") or [B, K, S, H] ("BKSH"): the cache, or a sample of it.
      trainable: which subvectors count: those of the row's tokens from `init_offset` on that are
        finite and not longer than arithmetic allows.
      stop: tokens of each row behind which none is trainable.
      stride: of the sample of each row; 1 where all tokens are there.
      phi: for the inner-product metric the largest squared norm of a trainable subvector, copies
        included, else None.
      begin: where in `key` the first of a row's tokens lies that is trained on.
      distance: from that token to the first that is not there yet.
      ahead: which copies of the keys are trained on too.
      number: where S is split over devices, which of a row's keys to train on, of all devices, the
        first one in `key` is; it may be one before the first. Else None.
      span: which positions the device has, likewise.
      counted: how many keys there are to train on, and how many of them are on devices before this
        one, likewise.
    """

    key: Float[Array, "B _ _ H"]
    trainable: Bool[Array, "B K M S"]
    stop: Int32[Array, "B"]
    stride: Int32[Array, "B"]
    phi: Float[Array, "B K M"] | None
    begin: int
    distance: Int32[Array, "B"]
    ahead: LookAhead | None
    number: Int32[Array, "B"] | None = None
    span: Span | None = None
    counted: tuple[Int32[Array, "B K M"], Int32[Array, "B K M"]] | None = None

    @property
    def num_trainable(self) -> Int32[Array, "B K M"]:
        """How many keys there are to train on."""
        if self.counted is not None:
            return self.counted[0]
        return jnp.sum(self.trainable, axis=-1, dtype=jnp.int32)


class StepErrors(NamedTuple):
    """What one iteration does to the squared quantization error, for each row and kv head.

    They may be added up over kv heads, those of other devices included, before `gain` sees them.

    Attributes:
      error: with the present centroids.
      left: with the means of their clusters.
      starts: how many codebooks have an error and equal centroids.
    """

    error: Float[Array, "B K"]
    left: Float[Array, "B K"]
    starts: Float[Array, "B K"]


def training_set(
    key: Float[Array, "*layers B _ _ H"],
    lengths: Int32[Array, "B"],
    config: IndexerConfig,
    kv_layout: KVLayout,
    ahead: LookAhead | None,
    span: Span | None = None,
    read: Callable[[Int32[Array, "B n"]], Float[Array, "B _ _ H"]] | None = None,
) -> TrainingSet:
    """Which keys to train on: those in [init_offset, lengths[b]), or a strided sample of them.

    Args:
      key: [B, S, K, H] ("BSKH") or [B, K, S, H] ("BKSH"); where it is not on the device, of several
        layers or of one.
      lengths: tokens in each row, in 0..S.
      config: `init_offset`, `train_tokens` and `metric` count.
      kv_layout: of `key`.
      ahead: which copies of the keys to train on too; None where S is split over devices.
      span: which positions of the rows `key` has, where others are on other devices.
      read: of keys that are not on the device, those at some positions of each row.

    Returns:
      A TrainingSet.
    """
    axis, first, augmented = token_axis(kv_layout), config.first_trained, config.metric == "ip"
    sample, size, number = config.train_tokens, key.shape[axis - 4], None
    if sample is None or sample >= (span.capacity if span else size) - first:
        position = jnp.arange(size, dtype=jnp.int32)[None]
        stop, stride, begin = lengths, jnp.ones_like(lengths), first
        if span is not None:
            stop, number = span.clip(lengths), jnp.zeros_like(lengths) + (span.offset - first)
        is_first = position >= first if number is None else position + number[:, None] >= 0
        exists = is_first & (position < stop[:, None])
        if read is not None:
            key = read(jnp.broadcast_to(position, (len(lengths), size)))
    else:
        count = jnp.maximum(lengths - first, 0)
        stride = jnp.maximum((count + sample - 1) // sample, 1)
        stop, begin = (count + stride - 1) // stride, 0
        skipped = jnp.zeros_like(stop)
        if span is not None:  # those of the sample that lie on this device, and before it
            skipped, until = (
                jnp.clip((span.offset + x - first + stride - 1) // stride, 0, stop)
                for x in (0, size)
            )
            sample, stop, number = min(sample, size), until - skipped, skipped
        position = jnp.arange(sample, dtype=jnp.int32)[None]
        exists = position < stop[:, None]
        place = first + position * stride[:, None]
        if span is not None:
            place += skipped[:, None] * stride[:, None] - span.offset
        taken = jnp.where(exists, place, 0)
        if read is None:
            taken = taken[:, :, None, None] if kv_layout == "BSKH" else taken[:, None, :, None]
            key = jnp.take_along_axis(key, taken, axis=axis)
        else:
            key = read(taken)

    distance = lengths - first
    ahead = ahead and dataclasses.replace(ahead, begin=begin)

    def inspect(row) -> tuple[Bool[Array, "K M S"], Float[Array, "K M"]]:
        key, exists, distance, stride = row
        parts = subvectors(key.astype(jnp.float32), config.num_subspaces, config.grouping)
        # The order of a sum would depend on the cache's shape, and codes depend on phi.
        norms = reference.squared_norm(parts) if augmented else jnp.sum(parts * parts, axis=-1)
        norms = jnp.moveaxis(norms, axis - 1, -1)
        trainable = exists[None, None] & (norms <= reference.LARGEST_NORM)
        phi = jnp.max(jnp.where(trainable, norms, 0), axis=-1)
        if augmented:
            for _, norms, taken in copies_of(
                key, trainable, distance, stride, ahead, config, kv_layout
            ):
                phi = jnp.maximum(phi, jnp.max(jnp.where(taken, norms, 0), axis=-1))
        return trainable, phi

    # Row by row, which keeps a row's bits from depending on the batch.
    trainable, phi = lax.map(inspect, (key, exists, distance, stride))
    phi = phi if augmented else None
    if phi is not None and span is not None:
        phi = lax.pmax(phi, span.axis)
    counted = None if span is None else _counted(trainable, span)
    places = begin, distance, ahead, number, span, counted
    return TrainingSet(key, trainable, stop, stride, phi, *places)


def copies_of(
    key: Float[Array, "_ _ H"],
    trainable: Bool[Array, "K M S"],
    distance: Int32[Array, ""],
    stride: Int32[Array, ""],
    ahead: LookAhead | None,
    config: IndexerConfig,
    kv_layout: KVLayout,
) -> Iterator[tuple[Float[Array, "K M S D"], Float[Array, "K M S"], Bool[Array, "K M S"]]]:
    """Of each copy of a row's keys: subvectors, their squared norms, and which are trained on."""
    if ahead is None:
        return
    axis = token_axis(kv_layout) - 1
    i = jnp.arange(key.shape[axis], dtype=jnp.int32)
    most = subvectors(most_squared(key, ahead), config.num_subspaces, config.grouping)
    most = jnp.moveaxis(jnp.sum(most, axis=-1), axis, -1)
    turns = trainable & (most <= reference.largest_turned(key.dtype))
    for copy in range(ahead.copies):
        on = positions_on(i, distance[None], stride[None], copy, ahead)
        parts = turned(key, on[:, None] if kv_layout == "BSKH" else on[None], ahead)
        parts = subvectors(parts, config.num_subspaces, config.grouping)
        parts = jnp.moveaxis(parts, axis, -2)
        yield parts, reference.squared_norm(parts), turns


def train(
    keys: TrainingSet,
    lengths: Int32[Array, "B"],
    seed: UInt32[Array, ""],
    first_head: Int32[Array, ""],
    config: IndexerConfig,
    kv_layout: KVLayout,
    implementation: Implementation | None,
) -> Float[Array, "B K M C D_"]:
    """Lloyd's algorithm from keys drawn evenly over the context, one codebook a subspace.

    Random numbers depend on (seed, kv head, subspace, length) only: not on the row's place in a
    batch, nor on the capacity, the number of kv heads or JAX's settings. Iterations end for a
    codebook when one moves nothing. A cluster left empty takes up a key far from its centroid.
    With fewer trainable keys than centroids those keys, in their order and repeated, are the
    codebook; with none it is zero.

    Args:
      keys: what to train on.
      lengths: tokens in each row.
      seed: of the random numbers.
      first_head: number of the first of these kv heads among all of the model's.
      config: what of it is about quantization counts.
      kv_layout: of the keys.
      implementation: "triton", "xla", or None.

    Returns:
      float32 centroids, augmented for the inner-product metric.
    """
    num_centroids = config.num_centroids
    count = keys.num_trainable  # [B, K, M]
    rank = _draw_ranks(count, lengths, seed, first_head, num_centroids)
    drawn = _at_ranks(keys, rank, config, kv_layout, _start_at)
    start = jnp.where((count > 0)[..., None, None], drawn, 0)
    origin = _origin(keys, config, kv_layout)

    def update(state):
        iteration, centroids, moving = state
        stop = jnp.where(moving, keys.stop[:, None, None], 0)
        means, sizes, nearest = cluster_means(
            keys, centroids, origin, stop, config, kv_layout, implementation
        )
        nearest = nearest[..., 0, :]  # of keys alone, which empty clusters take up
        has_keys = (sizes > 0) & moving[..., None]
        is_empty = (sizes == 0) & moving[..., None]
        new = jnp.where(has_keys[..., None], means, centroids)

        def numbers(b, k, m) -> Float[Array, "S"]:
            draw = iteration + 1  # the start is draw 0
            size = nearest.shape[-1]
            if keys.number is not None:
                head = first_head + k
                return _fractions(seed, lengths[b], head, m, draw, size, keys.number[b])
            number = max(size - keys.begin, 0)
            found = _fractions(seed, lengths[b], first_head + k, m, draw, number)
            return jnp.pad(found, (size - number, 0))

        new = _fill(new, is_empty, keys, centroids, nearest, numbers, config, kv_layout)
        # Equal keys would go round all centroids that equal them: each becomes their rounded mean.
        moved = jnp.abs(new - centroids) > ROUNDING * jnp.abs(new)
        return iteration + 1, new, jnp.any(moved, axis=(-2, -1))

    def is_moving(state):
        iteration, _, moving = state
        return (iteration < config.kmeans_iters) & jnp.any(moving)

    state = (jnp.int32(0), start, count >= num_centroids)
    _, centroids, _ = lax.while_loop(is_moving, update, state)
    return centroids


def cluster_means(
    keys: TrainingSet,
    centroids: Float[Array, "B K M C D_"],
    origin: Float[Array, "B K M D_"],
    stop: Int32[Array, "B K M"],
    config: IndexerConfig,
    kv_layout: KVLayout,
    implementation: Implementation | None,
) -> tuple[Float[Array, "B K M C D_"], Float[Array, "B K M C"], UInt8[Array, "B K M copies S"]]:
    """One pass of k-means; its first arguments are those of `reference.assign_and_sum`.

    Returns:
      Means of the keys nearest to each centroid, their numbers, and the centroid that is nearest to
      each trainable key before `stop`, and to each of its copies.
    """
    dimensions = keys.key.shape[-1] // centroids.shape[2]
    arguments = (keys.key, keys.trainable, centroids, origin, keys.phi, stop)
    arguments += keys.distance, keys.stride
    if keys.span is not None:
        arguments = varying_as(arguments, keys.trainable)
    layouts = {"kv_layout": kv_layout, "grouping": config.grouping, "ahead": keys.ahead}

    def xla(*arguments):
        return reference.assign_and_sum(*arguments, **layouts)

    def triton(*arguments):
        return centroid_sums(*arguments, **layouts)

    if implementation is None and unsupported(centroids.shape[3], dimensions):
        implementation = "xla"
    sums, nearest = backend.dispatch(xla, triton, *arguments, implementation=implementation)
    if keys.span is not None:  # 4 * (D' + 1) bytes a centroid
        sums = keys.span.sum(sums)
    sums, sizes = sums[..., :-1], sums[..., -1]
    means = sums / jnp.maximum(sizes, 1)[..., None]
    if keys.phi is not None:
        means = means.at[..., -1].add(origin[..., None, -1])
    return means, sizes, nearest


def first_step_errors(
    keys: TrainingSet,
    centroids: Float[Array, "B K M C D_"],
    config: IndexerConfig,
    kv_layout: KVLayout,
    implementation: Implementation | None,
) -> StepErrors:
    """The quantization error before and after one iteration from these centroids.

    A strided sample of a row that has grown holds other tokens than were trained on, and means of
    few tokens fit these better than any others: what chance alone removes is left. Centroids that
    are all equal come from fewer than two keys, and one step may not tell them apart.

    Args:
      keys: the keys whose error it is.
      centroids: in the codebooks' dtype, augmented for the inner-product metric.
      config: what they were trained with.
      kv_layout: of the keys.
      implementation: "triton", "xla", or None.
    """
    dtype, centroids = centroids.dtype, centroids.astype(jnp.float32)
    stop = jnp.broadcast_to(keys.stop[:, None, None], centroids.shape[:3])
    origin = _origin(keys, config, kv_layout)
    means, sizes, nearest = cluster_means(
        keys, centroids, origin, stop, config, kv_layout, implementation
    )
    means = means.astype(dtype).astype(jnp.float32)

    def errors(row) -> tuple[Float[Array, "K M"], Float[Array, "K M"]]:
        key, trainable, phi, nearest, centroids, means, distance, stride = row
        parts = subvectors(key.astype(jnp.float32), centroids.shape[1], config.grouping)
        parts = jnp.moveaxis(parts, token_axis(kv_layout) - 1, -2)  # [K, M, S, D]

        def total(parts, counts, nearest) -> Float[Array, "2 K M"]:
            if phi is not None:
                parts = reference.augment(parts, phi[..., None])
            each = [_squared_errors(parts, x, nearest) for x in (centroids, means)]
            return jnp.stack([jnp.sum(jnp.where(counts, x, 0), axis=-1) for x in each])

        found = total(parts, trainable, nearest[:, :, 0])
        copies = copies_of(key, trainable, distance, stride, keys.ahead, config, kv_layout)
        for number, (parts, _, counts) in enumerate(copies, 1):
            found += total(parts, counts, nearest[:, :, number])
        return found[0], found[1]

    # Row by row, which bounds memory.
    rows = (keys.key, keys.trainable, keys.phi, nearest, centroids, means)
    rows += keys.distance, keys.stride
    error, left = lax.map(errors, rows)
    if keys.span is not None:
        error, left = keys.span.sum((error, left))
    clusters = jnp.sum(sizes > 0, axis=-1).astype(jnp.float32)
    # Copies that hardly turn are nothing new.
    number = jnp.sum(sizes, axis=-1) / (1 if keys.ahead is None else 1 + keys.ahead.copies)
    by_chance = left * clusters / jnp.maximum(number - clusters, 1)
    left += jnp.where(keys.stride[:, None, None] > 1, by_chance, 0)
    is_one = jnp.all(centroids == centroids[..., :1, :], axis=(-2, -1))
    starts = (is_one & (error > 0)).astype(jnp.float32)
    return StepErrors(*(jnp.sum(x, axis=-1) for x in (error, left, starts)))


def gain(
    error: Float[Array, "B"], left: Float[Array, "B"], starts: Float[Array, "B"]
) -> Float[Array, "B"]:
    """The share of each row's quantization error that one iteration removes, in 0..1.

    By `StepErrors` added up over kv heads. 1 where a codebook is still as it started; 0 without an
    error, and where it overflows.
    """
    share = jnp.maximum(error - left, 0) / error
    share = jnp.where((error > 0) & (error < jnp.inf), share, 0)
    return jnp.where(starts > 0, 1, share)


def _fill(
    centroids: Float[Array, "B K M C D_"],
    is_empty: Bool[Array, "B K M C"],
    keys: TrainingSet,
    assigned: Float[Array, "B K M C D_"],
    nearest: UInt8[Array, "B K M S"],
    numbers: Callable[..., Float[Array, "S"]],
    config: IndexerConfig,
    kv_layout: KVLayout,
) -> Float[Array, "B K M C D_"]:
    """Centroids whose empty clusters have taken up keys that are far from their own centroids.

    A key is drawn with a probability that is proportional to its squared error. Where too few have
    one, the other empty clusters stay where they are. Codebooks are done one by one, those that
    have such clusters, which hardly any have.

    Args:
      centroids: those to fill.
      is_empty: which clusters are to take up a key.
      keys: what there is to take up.
      assigned: the centroids of the pass that found `nearest`.
      nearest: the centroid nearest to each key.
      numbers: random numbers in [0, 1) for each key of a codebook, given its b, k and m.
      config: its grouping counts.
      kv_layout: of the keys.

    Source: the seeding of k-means++ (Arthur and Vassilvitskii, 2007), all keys of a pass at once
    (weighted sampling without replacement: Efraimidis and Spirakis, 2006).
    """
    axis, num_subspaces = token_axis(kv_layout), centroids.shape[2]

    def fill_one(state):
        centroids, waiting = state
        first = lax.argmax(waiting.reshape(-1), 0, jnp.int32)
        b, k, m = jnp.unravel_index(first, waiting.shape)
        at, size = [b, k, k], [1, 1, 1]
        at[axis], size[axis] = jnp.int32(0), nearest.shape[-1]
        parts = subvectors_of(keys.key, at, size, m, num_subspaces, config.grouping)
        parts = parts.reshape(-1, parts.shape[-1]).astype(jnp.float32)
        if keys.phi is not None:
            parts = reference.augment(parts, keys.phi[b, k, m])
        error = _squared_errors(parts, assigned[b, k, m], nearest[b, k, m])
        error = jnp.where(keys.trainable[b, k, m], error, 0)
        # An exponential variable of this rate is the smallest with a probability of its share.
        chance = jnp.where(error > 0, -jnp.log1p(-numbers(b, k, m)) / error, jnp.inf)
        order = jnp.argsort(chance, stable=True)
        number = jnp.sum(error > 0, dtype=jnp.int32)
        if keys.span is not None:
            # As many of each device's as all may take, 4 * (D' + 1) bytes each.
            own = order[: is_empty.shape[3]]
            gather = functools.partial(
                lax.all_gather, axis_name=keys.span.axis, axis=0, tiled=True, to="invarying"
            )
            chance, parts, number = gather(chance[own]), gather(parts[own]), keys.span.sum(number)
            order = jnp.argsort(chance, stable=True)
        place = jnp.cumsum(is_empty[b, k, m], dtype=jnp.int32) - 1
        takes = is_empty[b, k, m] & (place < number)
        taken = parts[order[jnp.minimum(place, len(order) - 1)]]
        filled = jnp.where(takes[:, None], taken, centroids[b, k, m])
        return centroids.at[b, k, m].set(filled), waiting.at[b, k, m].set(False)

    state = (centroids, jnp.any(is_empty, axis=-1))
    return lax.while_loop(lambda state: jnp.any(state[1]), fill_one, state)[0]


def _squared_errors(
    parts: Float[Array, "*batch n D_"],
    centroids: Float[Array, "*batch C D_"],
    nearest: UInt8[Array, "*batch n"],
) -> Float[Array, "*batch n"]:
    """Squared distances from the given centroids, without differences that rounding explains.

    Sums of squares less the square of a sum would lose all of them beside one far key.
    """
    place = nearest.astype(jnp.int32)[..., None]
    difference = parts - jnp.take_along_axis(centroids, place, axis=-2, mode="clip")
    is_real = jnp.abs(difference) > ROUNDING * jnp.abs(parts)
    return jnp.sum(jnp.where(is_real, jnp.square(difference), 0), axis=-1)


def _origin(
    keys: TrainingSet, config: IndexerConfig, kv_layout: KVLayout
) -> Float[Array, "B K M D_"]:
    """Where distances are taken from: in each coordinate the median of some keys.

    It is where most keys are, wherever a few others may be.
    """
    count = keys.num_trainable[..., None]
    # Multiples of the golden ratio: no period of the keys agrees with them.
    fraction = np.arange(ORIGIN_KEYS) * (np.sqrt(5) - 1) / 2 % 1
    fraction = fraction.astype(np.float32)[None, None, None]
    rank = (fraction * count.astype(jnp.float32)).astype(jnp.int32)
    rank = jnp.clip(rank, 0, jnp.maximum(count - 1, 0))
    some = _at_ranks(keys, rank, config, kv_layout, _subvectors_at)
    return jnp.where(count > 0, jnp.sort(some, axis=-2)[..., ORIGIN_KEYS // 2, :], 0)


def _counted(
    trainable: Bool[Array, "B K M S"], span: Span
) -> tuple[Int32[Array, "B K M"], Int32[Array, "B K M"]]:
    """How many keys of all devices there are to train on, and how many on those before this one."""
    own = jnp.sum(trainable, axis=-1, dtype=jnp.int32)
    counts = lax.all_gather(own, span.axis, to="invarying")
    device = jnp.arange(len(counts), dtype=jnp.int32)[:, None, None, None]
    before = jnp.sum(jnp.where(device < span.number, counts, 0), axis=0)
    return jnp.sum(counts, axis=0), before


def _at_ranks(
    keys: TrainingSet,
    rank: Int32[Array, "B K M R"],
    config: IndexerConfig,
    kv_layout: KVLayout,
    read: Callable[..., Float[Array, "B K M R D_"]],
) -> Float[Array, "B K M R D_"]:
    """What `read` gives of the trainable keys of these ranks, wherever they are."""
    if keys.span is None or keys.counted is None:
        return read(keys, _nth_trainable(keys.trainable, rank), config, kv_layout)
    own = jnp.sum(keys.trainable, axis=-1, dtype=jnp.int32)[..., None]
    place = rank - keys.counted[1][..., None]
    holds = (place >= 0) & (place < own)
    place = jnp.clip(place, 0, jnp.maximum(own - 1, 0))
    found = read(keys, _nth_trainable(keys.trainable, place), config, kv_layout)
    return keys.span.from_holder(found, holds[..., None])


def _draw_ranks(
    count: Int32[Array, "B K M"],
    lengths: Int32[Array, "B"],
    seed: UInt32[Array, ""],
    first_head: Int32[Array, ""],
    number: int,
) -> Int32[Array, "B K M R"]:
    """Ranks of trainable keys, one from every of `number` equal shares of them.

    So the keys drawn are distinct. Where there are fewer keys, all of them over and over.
    """
    _, kv_heads, num_subspaces = count.shape
    head = first_head + jnp.arange(kv_heads, dtype=jnp.int32)
    subspace = jnp.arange(num_subspaces, dtype=jnp.int32)

    def of_codebook(length, head, subspace) -> Float[Array, "n"]:
        return _fractions(seed, length, head, subspace, jnp.int32(0), number)

    of_head = jax.vmap(of_codebook, (None, None, 0))
    of_row = jax.vmap(of_head, (None, 0, None))
    fractions = jax.vmap(of_row, (0, None, None))(lengths, head, subspace)
    share = jnp.arange(number, dtype=jnp.int32)[None, None, None]
    count = count[..., None]
    # Integers: a float32 does not count the tokens of a long context.
    begin = share * (count // number) + share * (count % number) // number
    end = (share + 1) * (count // number) + (share + 1) * (count % number) // number
    width = end - begin
    within = (fractions * width.astype(jnp.float32)).astype(jnp.int32)
    spread = begin + jnp.minimum(within, width - 1)
    return jnp.where(count < number, share % jnp.maximum(count, 1), spread)


def _fractions(
    seed: UInt32[Array, ""],
    length: Int32[Array, ""],
    head: Int32[Array, ""],
    subspace: Int32[Array, ""],
    draw: Int32[Array, ""],
    number: int,
    first: int | Int32[Array, ""] = 0,
) -> Float[Array, "n"]:
    """Random numbers in [0, 1) for one codebook from the `first` on, other ones for each draw.

    The i-th does not depend on how many there are. `jax.random.uniform` would follow
    `jax_threefry_partitionable`, and other generators the batch under vmap.
    """
    key = jax.random.key(seed, impl="threefry2x32")
    for x in (length, head, subspace, draw):
        key = jax.random.fold_in(key, x)
    own_number = first + jnp.arange(number, dtype=jnp.int32)
    own_keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(own_number)
    bits = jax.random.key_data(own_keys)[:, 0]
    return (bits >> 8).astype(jnp.float32) * 2.0**-24


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
    keys: TrainingSet,
    position: Int32[Array, "B K M R"],
    config: IndexerConfig,
    kv_layout: KVLayout,
) -> Float[Array, "B K M R D_"]:
    batch, kv_heads, num_subspaces, _ = position.shape
    parts = subvectors(keys.key, num_subspaces, config.grouping)
    b, k, m = jnp.ogrid[:batch, :kv_heads, :num_subspaces]
    b, k, m = b[..., None], k[..., None], m[..., None]
    at = (b, position, k, m) if kv_layout == "BSKH" else (b, k, position, m)
    taken = parts[at].astype(jnp.float32)
    return taken if keys.phi is None else reference.augment(taken, keys.phi[..., None])


def _start_at(
    keys: TrainingSet,
    position: Int32[Array, "B K M C"],
    config: IndexerConfig,
    kv_layout: KVLayout,
) -> Float[Array, "B K M C D_"]:
    """Subvectors of the keys at some positions, or of their copies, in turn if there are enough."""
    start = _subvectors_at(keys, position, config, kv_layout)
    if keys.ahead is None:
        return start
    batch, kv_heads, num_subspaces, number = position.shape
    b, k = jnp.ogrid[:batch, :kv_heads]
    b, k = b[..., None, None], k[..., None, None]
    whole = keys.key[(b, position, k) if kv_layout == "BSKH" else (b, k, position)]
    m = jnp.arange(num_subspaces, dtype=jnp.int32)[None, None, :, None, None, None]
    enough = jnp.sum(keys.trainable, axis=-1, dtype=jnp.int32) >= number
    which = np.arange(number) % (1 + keys.ahead.copies)
    distance, stride = (x[:, None, None, None] for x in (keys.distance, keys.stride))

    def own(x: Array) -> Array:  # [B, K, M, C, H] to subvectors [B, K, M, C, D]
        parts = subvectors(x, num_subspaces, config.grouping)
        return jnp.take_along_axis(parts, m, axis=-2)[..., 0, :]

    most = jnp.sum(own(most_squared(whole, keys.ahead)), axis=-1)
    turns = most <= reference.largest_turned(whole.dtype)
    for copy in range(keys.ahead.copies):
        on = positions_on(position, distance, stride, copy, keys.ahead)
        parts = own(turned(whole, on, keys.ahead))
        if keys.phi is not None:
            parts = reference.augment(parts, keys.phi[..., None])
        taken = turns & enough[..., None] & (which == 1 + copy)[None, None, None]
        start = jnp.where(taken[..., None], parts, start)
    return start
