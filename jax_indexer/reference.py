"""Every stage in plain jnp: what "xla" runs, and what the kernels are compared with.

Letters are those of CONTRACT.md, section 2.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int32, Shaped, UInt8

from jax_indexer.cells import grow, seal
from jax_indexer.config import IndexerConfig
from jax_indexer.layout import (
    Grouping,
    KVLayout,
    by_kv_head,
    by_query_head,
    head_axis,
    head_major,
    read_tokens,
    subvectors,
    subvectors_of,
    token_axis,
)
from jax_indexer.pages import has_pages, in_rows, page_size_of, write_pages
from jax_indexer.rope import LookAhead, most_squared, positions_on, turned
from jax_indexer.state import (
    MOST_NEW,
    PQIndex,
    Rest,
    Selection,
    Span,
    ValueSums,
    layer_of,
    put_layer,
)
from jax_indexer.values import add_values, mean_values, summed_codes

# Tokens encoded at once, in distances held in memory (tokens times K * M * C).
DISTANCES_IN_MEMORY = 2**22
# Tokens assigned at once in training, in distances of one codebook: what a cache holds.
DISTANCES_AT_ONCE = 2**20

# Of a squared norm that is trained on: products of differences of such vectors stay within float32.
LARGEST_NORM = 2.0**124

# What PQ says of the mass of candidates is corrected by this factor at the most, either way.
LARGEST_CORRECTION = 4.0

# The lowest ranks: what is no candidate, then NaN; -inf follows.
NOT_A_CANDIDATE = np.int32(np.iinfo(np.int32).min)
NAN_RANK = np.int32(np.iinfo(np.int32).min + 1)


def lookup_table(
    query: Float[Array, "B T N H"],
    codebooks: Float[Array, "B K M C D_"],
    config: IndexerConfig,
) -> Float[Array, "B T N M C"]:
    """Inner products of the query's subvectors with every centroid (rule 3).

    Args:
      query: float32, bfloat16 or float16.
      codebooks: centroids; a coordinate past D = H // M, the augmented one, is not used.
      config: its `table_dtype` is what the float32 sums are rounded to, once.

    Returns:
      The table, in `table_dtype`.
    """
    parts = subvectors(query.astype(jnp.float32), codebooks.shape[2], config.grouping)
    parts = by_kv_head(parts, codebooks.shape[1])
    centroids = codebooks[..., : parts.shape[-1]].astype(jnp.float32)
    table = jnp.einsum("bkgmd,bkmcd->bkgmc", parts, centroids, precision=lax.Precision.HIGHEST)
    return by_query_head(table, query.shape[1]).astype(config.table_dtype)


def adc_scores(
    table: Float[Array, "B T N M C"], codes: UInt8[Array, "B K M S"]
) -> Float[Array, "B T N S"]:
    """Asymmetric distance computation: a key's score is the sum of its M table entries (rule 3).

    Args:
      table: look-up tables, as `lookup_table` returns them.
      codes: only the low bits, log2(C) of them, count.

    Returns:
      float32 scores of all S tokens, added in the order of the subspaces.
    """
    num_subspaces, num_centroids = table.shape[-2:]
    codes = codes & np.uint8(num_centroids - 1)

    def score(table: Float[Array, "TG M C"], codes: UInt8[Array, "M S"]) -> Float[Array, "TG S"]:
        total = jnp.float32(0)
        for m in range(num_subspaces):
            entries = jnp.take(table[:, m], codes[m].astype(jnp.int32), axis=1, mode="clip")
            total = total + entries.astype(jnp.float32)
        return total

    grouped = jax.vmap(jax.vmap(score))(by_kv_head(table, codes.shape[1]), codes)
    return by_query_head(grouped, table.shape[1])


def ordered(scores: Float[Array, "*shape"]) -> Int32[Array, "*shape"]:
    """Integers in the order of the scores: NaN below -inf, -0.0 equal to 0.0 (rule 4)."""
    bits = lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.int32)
    magnitude = bits & np.int32(0x7FFFFFFF)
    signed = jnp.where(bits < 0, -magnitude, magnitude)
    return jnp.where(magnitude > np.int32(0x7F800000), NAN_RANK, signed)


def best(rank: Int32[Array, "*batch n"], number: int) -> Int32[Array, "*batch k"]:
    """Where the highest ranks are, at most so many, in their order; ties go to the lower place.

    XLA sorts integers for that on a CPU, and searches floats in a tenth of the time.
    """
    number = min(number, rank.shape[-1])

    def by_integers(rank):
        return lax.top_k(rank, number)[1]

    def by_floats(rank):
        # Two ranks lie below that of -inf, so negative ones move up by two.
        magnitude = jnp.maximum(-2 - rank, 0)
        magnitude = jnp.where(rank == NAN_RANK, np.int32(0x7F7FFFFF), magnitude)
        magnitude = jnp.where(rank == NOT_A_CANDIDATE, np.int32(0x7F800000), magnitude)
        bits = jnp.where(rank < 0, magnitude | np.int32(-(2**31)), rank)
        return by_integers(lax.bitcast_convert_type(bits, jnp.float32))

    def on_cpu(rank):
        # The two that would become 0, of the least numbers there are, have no float of their own.
        has_floats = ~jnp.any((rank == -1) | (rank == -2))
        return lax.cond(has_floats, by_floats, by_integers, rank)

    return lax.platform_dependent(rank, cpu=on_cpu, default=by_integers)


def visible_tokens(
    lengths: Int32[Array, "B"],
    counts: Int32[Array, "B"] | None,
    capacity: int,
    num_query_tokens: int,
) -> Int32[Array, "B T"]:
    """V of every query token: lengths clipped to the capacity, less the step's later tokens.

    Each row has taken the first `counts` of the step's tokens, None for all; the others see none.
    """
    lengths = jnp.clip(lengths, 0, capacity)[:, None]
    token = jnp.arange(num_query_tokens, dtype=jnp.int32)[None]
    if counts is None:
        return jnp.maximum(lengths - (num_query_tokens - 1 - token), 0)
    counts = jnp.clip(counts, 0, num_query_tokens)[:, None]
    return jnp.where(token < counts, jnp.maximum(lengths - (counts - 1 - token), 0), 0)


def candidates(
    visible: Int32[Array, "*rows"], capacity: int, config: IndexerConfig, span: Span | None = None
) -> Bool[Array, "*rows S"]:
    """Which tokens may be chosen by score (rule 2)."""
    last = visible[..., None] - config.window_size
    position = lax.broadcasted_iota(jnp.int32, (1,) * visible.ndim + (capacity,), visible.ndim)
    position = position if span is None else position + span.offset
    return (position >= config.first_candidate) & (position < last)


def select_from_scores(
    scores: Float[Array, "B T N S"],
    lengths: Int32[Array, "B"],
    counts: Int32[Array, "B"] | None,
    config: IndexerConfig,
    span: Span | None = None,
) -> tuple[Int32[Array, "B T N P"], Int32[Array, "B T N"]]:
    """The lists of positions and their lengths (rules 1, 2, 4, 5 and 6).

    Args:
      scores: of all S tokens; those of tokens that are no candidates are not used.
      lengths: tokens in the cache; clipped to 0..S.
      counts: as in `visible_tokens`.
      config: sizes.
      span: which positions the scores are of, where others are on other devices; the lists are of
        these.

    Returns:
      Ascending positions padded with -1, and how many there are.
    """
    num_query_tokens, capacity = scores.shape[1], scores.shape[3]
    whole, offset = (capacity, 0) if span is None else (span.capacity, span.offset)
    list_size = config.max_selected(num_query_tokens)
    nowhere = np.int32(max(capacity, list_size))  # sorts behind every position

    def slots(number: int) -> np.ndarray:
        return np.arange(number, dtype=np.int32).reshape(1, 1, 1, -1)

    visible = visible_tokens(lengths, counts, whole, num_query_tokens)[..., None]
    candidate = candidates(visible, capacity, config, span)
    # Ranks have neither NaN nor two zeros, so top_k's own rule for ties (lower index first) is the
    # contract's.
    rank = jnp.where(candidate, ordered(scores), NOT_A_CANDIDATE)
    heavy = best(rank, config.heavy_size)
    if span is None:
        num_heavy = visible - config.window_size - config.first_candidate
        num_heavy = jnp.clip(num_heavy, 0, heavy.shape[-1])
        is_heavy = slots(heavy.shape[-1]) < num_heavy[..., None]
    else:
        is_heavy = best_of_devices(jnp.take_along_axis(rank, heavy, axis=-1), config, span)

    def entries(positions, exist):
        if span is not None:
            exist &= (positions >= 0) & (positions < capacity)
        positions = jnp.where(exist, positions, nowhere)
        return jnp.broadcast_to(positions, (*scores.shape[:3], positions.shape[-1]))

    visible = visible[..., None]
    sink = slots(config.sink_size)
    window = visible - config.window_size + slots(config.window_size)
    attended = jnp.concatenate(
        [
            entries(sink - offset, sink < visible),
            entries(heavy.astype(jnp.int32), is_heavy),
            entries(window - offset, window >= np.int32(config.sink_size)),
        ],
        axis=-1,
    )
    missing = list_size - attended.shape[-1]
    attended = jnp.pad(attended, ((0, 0),) * 3 + ((0, missing),), constant_values=nowhere)

    slot = slots(list_size)
    everything = entries(slot, slot + offset < visible)
    is_short = visible <= config.short_context(num_query_tokens)
    indices = jnp.sort(jnp.where(is_short, everything, attended), axis=-1)
    selected = indices < nowhere
    counts = jnp.sum(selected, axis=-1, dtype=jnp.int32)
    return jnp.where(selected, indices, -1), counts


def best_of_devices(
    rank: Int32[Array, "*batch k"], config: IndexerConfig, span: Span
) -> Bool[Array, "*batch k"]:
    """Which of a device's best candidates are among the `heavy_size` best of all devices.

    Exchanges their ranks, 4 * k bytes a device and query head, by one `all_gather`.

    Args:
      rank: of each device's best, equal ones in the order of their positions; all that could be
        among the best of all.
      config: its `heavy_size` counts.
      span: of the device.
    """
    size = rank.shape[-1]
    if not size:
        return jnp.zeros_like(rank, bool)
    everywhere = lax.all_gather(rank, span.axis, axis=rank.ndim - 1, tiled=True)
    # Devices follow one another as their positions do, so ties go to the lower position.
    place = best(everywhere, config.heavy_size) - span.number * size
    place = jnp.where(place < 0, np.int32(size), place)
    taken = jnp.zeros_like(rank, bool)
    put = jnp.vectorize(
        lambda taken, place: taken.at[place].set(True, mode="drop"), signature="(k),(n)->(k)"
    )
    return put(taken, place) & (rank != NOT_A_CANDIDATE)


def dense_weights(
    indices: Int32[Array, "B T N P"], capacity: int, dtype: np.dtype
) -> Float[Array, "B T N S"]:
    """1 at the listed positions, else 0 (rule 6)."""

    def row(indices: Int32[Array, "P"]) -> Float[Array, "S"]:
        place = jnp.where(indices < 0, np.int32(capacity), indices)
        return jnp.zeros(capacity, dtype).at[place].set(1, mode="drop")

    return jax.vmap(jax.vmap(jax.vmap(row)))(indices)


def select_from_table(
    table: Float[Array, "B T N M C"],
    codes: UInt8[Array, "B K M S"],
    lengths: Int32[Array, "B"],
    counts: Int32[Array, "B"] | None,
    config: IndexerConfig,
    weights_dtype: np.dtype | None,
    span: Span | None = None,
) -> Selection:
    """Everything of a selection that follows the table."""
    capacity = codes.shape[-1]
    found = select_from_scores(adc_scores(table, codes), lengths, counts, config, span)
    weights = None if weights_dtype is None else dense_weights(found[0], capacity, weights_dtype)
    return Selection(*found, weights, capacity)


def select_tokens(
    query: Float[Array, "B T N H"],
    index: PQIndex,
    config: IndexerConfig,
    counts: Int32[Array, "B"] | None,
    weights_dtype: np.dtype | None,
    span: Span | None = None,
    rest_by: "Logits | None" = None,
) -> Selection:
    """All of CONTRACT.md, section 3; the rest, where it is said how logits are made."""
    table = lookup_table(query, index.codebooks, config)
    found = select_from_table(
        table, index.codes, index.lengths, counts, config, weights_dtype, span
    )
    if rest_by is None:
        return found
    scores = adc_scores(table, index.codes)
    rest = rest_of(found.indices, scores, index, counts, rest_by, config)
    return dataclasses.replace(found, rest=rest)


def augment(
    parts: Float[Array, "*batch D"], phi: Float[Array, "*#batch"]
) -> Float[Array, "*batch D_"]:
    """Adds the coordinate that gives every subvector the squared norm `phi`, if it is shorter.

    Among vectors of one norm the nearest centroid is the one of largest inner product.

    Source: the reduction of maximum inner product to nearest neighbour (Bachrach et al., 2014).
    """
    extra = jnp.sqrt(jnp.maximum(phi - squared_norm(parts), 0))
    return jnp.concatenate([parts, extra[..., None]], axis=-1)


def squared_norm(parts: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
    """Added one dimension after the other, as in `encode` and for the same reason."""
    along = jnp.moveaxis(parts, -1, 0)

    def add(d, total):
        return total + along[d] * along[d]

    return lax.fori_loop(1, len(along), add, along[0] * along[0])


def encode(
    parts: Float[Array, "*batch n D_"], codebooks: Float[Array, "*batch C D_"]
) -> UInt8[Array, "*batch n"]:
    """The nearest centroid of every subvector; ties go to the lower one.

    The distance is added one dimension after the other, so that a key's code depends neither on
    the other keys nor on their number: a matrix product promises no such thing.

    Args:
      parts: float32 subvectors, augmented for the inner-product metric.
      codebooks: float32 centroids.

    Returns:
      Codes; 0 for a subvector that is not finite.
    """
    dimensions = parts.shape[-1]
    along = jnp.moveaxis(parts, -1, 0)[..., :, None]  # [D', ..., n, 1]
    centroids = jnp.moveaxis(codebooks, -1, 0)[..., None, :]  # [D', ..., 1, C]

    def add(d, total):
        difference = along[d] - centroids[d]
        return total + difference * difference

    first = along[0] - centroids[0]
    distance = lax.fori_loop(1, dimensions, add, first * first)
    distance = jnp.where(jnp.isnan(distance), jnp.inf, distance)
    finite = jnp.all(jnp.isfinite(parts), axis=-1)
    return jnp.where(finite, jnp.argmin(distance, axis=-1), 0).astype(jnp.uint8)


def encode_tokens(
    key: Float[Array, "B K t H"],
    codebooks: Float[Array, "B K M C D_"],
    phi: Float[Array, "B K M"] | None,
    taken: Int32[Array, "B"],
    config: IndexerConfig,
) -> UInt8[Array, "B K M t"]:
    """Codes of each row's tokens, in chunks that bound the distances held in memory.

    Nothing is encoded for a row that takes none of several new tokens; its codes mean nothing.
    """
    kv_heads, tokens = key.shape[1:3]
    num_subspaces, num_centroids = codebooks.shape[2:4]

    def encode_chunk(key: Float[Array, "K n H"], codebooks, phi) -> UInt8[Array, "K M n"]:
        parts = subvectors(key.astype(jnp.float32), num_subspaces, config.grouping)
        parts = jnp.moveaxis(parts, 2, 1)
        if config.metric == "ip":
            parts = augment(parts, phi[..., None])
        return encode(parts, codebooks.astype(jnp.float32))

    def encode_row(row) -> UInt8[Array, "K M t"]:
        key, codebooks, phi = row
        chunk = max(DISTANCES_IN_MEMORY // (kv_heads * num_subspaces * num_centroids), 64)
        if tokens <= chunk:
            return encode_chunk(key, codebooks, phi)
        padded = jnp.pad(key, ((0, 0), (0, -tokens % chunk), (0, 0)))
        chunks = jnp.moveaxis(padded.reshape(kv_heads, -1, chunk, key.shape[-1]), 1, 0)
        codes = lax.map(lambda key: encode_chunk(key, codebooks, phi), chunks)
        return jnp.moveaxis(codes, 0, 2).reshape(kv_heads, num_subspaces, -1)[..., :tokens]

    if tokens == 1:  # a decode step: all rows at once
        return jax.vmap(lambda *row: encode_row(row))(key, codebooks, phi)

    def none(row) -> UInt8[Array, "K M t"]:
        return jnp.zeros_like(row[1], np.uint8, shape=(kv_heads, num_subspaces, tokens))

    def wanted(row):
        taken, *row = row
        return lax.cond(taken > 0, encode_row, none, tuple(row))

    return lax.map(wanted, (taken, key, codebooks, phi))


def largest_turned(dtype: Any) -> float:
    """What a subvector and its partners may square to, to be turned: no copy is infinite."""
    return min(LARGEST_NORM, float(jnp.finfo(dtype).max) ** 2)


def assign_and_sum(
    key: Float[Array, "B _ _ H"],
    trainable: Bool[Array, "B K M S"],
    centroids: Float[Array, "B K M C D_"],
    origin: Float[Array, "B K M D_"],
    phi: Float[Array, "B K M"] | None,
    stop: Int32[Array, "B K M"],
    distance: Int32[Array, "B"],
    stride: Int32[Array, "B"],
    kv_layout: KVLayout,
    grouping: Grouping,
    ahead: LookAhead | None,
) -> tuple[Float[Array, "B K M C E"], UInt8[Array, "B K M copies S"]]:
    """One pass of k-means: assigns trainable subvectors to centroids and sums each one's members.

    Distances are matrix products, |c|^2 / 2 - x.c from the given origin, in chunks of tokens.

    Args:
      key: [B, S, K, H] ("BSKH") or [B, K, S, H] ("BKSH").
      trainable: which subvectors count.
      centroids: float32, augmented for the inner-product metric.
      origin: what distances are taken from; they are exact to a part of the distance to it.
      phi: largest squared norm of a training subvector, for the inner-product metric, else None.
      stop: 0 for codebooks whose sums are not wanted; a row without any is skipped.
      distance, stride: of the copies, as `positions_on` takes them.
      kv_layout: of `key`.
      grouping: of its dimensions.
      ahead: which copies of keys count too, if they are finite and not too long.

    Returns:
      Sums of the members of every cluster, of the augmented coordinate less its origin, and, in
      the last column, their number; and the cluster of every trainable subvector before `stop`, of
      keys and then of their copies.
    """
    _, kv_heads, num_subspaces, capacity = trainable.shape
    num_centroids, dimensions = centroids.shape[3], key.shape[-1] // num_subspaces
    chunk = min(max(DISTANCES_AT_ONCE // num_centroids, 64), capacity)
    axis = token_axis(kv_layout) - 1
    highest = lax.Precision.HIGHEST
    centroid = np.arange(num_centroids, dtype=np.int32)[:, None]
    of_each = 1 if ahead is None else 1 + ahead.copies

    def sum_codebook(row, k, m) -> tuple[Float[Array, "C E"], UInt8[Array, "copies S"]]:
        key, trainable, centroids, origin, phi, _, distance, stride = row
        centroids, origin = centroids[k, m], origin[k, m][None]
        # Where keys lie close together, far from zero, their products would hide the differences.
        offsets = centroids - origin
        bias = jnp.sum(offsets * offsets, axis=-1, keepdims=True) / 2

        def sum_chunk(first):
            start = jnp.minimum(first, capacity - chunk)  # the last chunk may overlap
            at, size = [k, k], [1, 1]
            at[axis], size[axis] = start, chunk
            parts = subvectors_of(key, at, size, m, num_subspaces, grouping)
            parts = parts.astype(jnp.float32).reshape(chunk, dimensions)
            counts = lax.dynamic_slice_in_dim(trainable[k, m], start, chunk)
            token = start + jnp.arange(chunk, dtype=jnp.int32)
            counts &= token >= first
            sums, nearest = sum_parts(parts, counts)
            if ahead is None:
                return sums, nearest[None]
            whole = lax.dynamic_slice(key, [*at, 0], [*size, key.shape[-1]])
            whole, of_all = whole.reshape(chunk, -1), [nearest]
            most = subvectors_of(
                most_squared(whole, ahead), [0], [chunk], m, num_subspaces, grouping
            )
            turns = counts & (jnp.sum(most, axis=-1) <= largest_turned(key.dtype))
            for copy in range(ahead.copies):
                on = positions_on(token, distance[None], stride[None], copy, ahead)
                parts = turned(whole, on, ahead)
                parts = subvectors_of(parts, [0], [chunk], m, num_subspaces, grouping)
                more, nearest = sum_parts(parts, turns)
                sums, of_all = sums + more, [*of_all, nearest]
            return sums, jnp.stack(of_all)

        def sum_parts(parts, counts) -> tuple[Float[Array, "C E"], UInt8[Array, "n"]]:
            parts = jnp.where(counts[:, None], parts, 0)
            if phi is not None:
                parts = augment(parts, phi[k, m])
            from_origin = parts - origin
            # Tokens along the last axis, which CPUs reduce over centroids in vectors.
            scores = jnp.dot(offsets, from_origin.T, precision=highest) - bias
            is_best = scores == jnp.max(scores, axis=0, keepdims=True)
            nearest = jnp.min(jnp.where(is_best, centroid, num_centroids), axis=0)
            member = (nearest[None] == centroid) & counts[None]
            columns = [parts[:, :dimensions], from_origin[:, dimensions:]]
            parts = jnp.concatenate([*columns, jnp.ones_like(parts[:, :1])], axis=-1)
            sums = jnp.dot(member.astype(jnp.float32), parts, precision=highest)
            return sums, nearest.astype(jnp.uint8)

        firsts = jnp.arange(0, capacity, chunk, dtype=jnp.int32)
        sums, nearest = lax.map(sum_chunk, firsts)
        tail = nearest[-1, :, len(firsts) * chunk - capacity :]
        return jnp.sum(sums, axis=0), jnp.concatenate([*nearest[:-1], tail], axis=-1)

    def sum_row(row) -> tuple[Float[Array, "K M C E"], UInt8[Array, "K M copies S"]]:
        number = jnp.arange(kv_heads * num_subspaces, dtype=jnp.int32)
        found = lax.map(lambda i: sum_codebook(row, i // num_subspaces, i % num_subspaces), number)
        return jax.tree.map(lambda x: x.reshape(kv_heads, num_subspaces, *x.shape[1:]), found)

    def none(row) -> tuple[Float[Array, "K M C E"], UInt8[Array, "K M copies S"]]:
        trainable, centroids = row[1:3]
        sums = jnp.zeros_like(jnp.concatenate([centroids, centroids[..., :1]], axis=-1))
        return sums, jnp.stack([jnp.zeros_like(trainable, np.uint8)] * of_each, axis=2)

    # Row by row, which bounds memory and keeps a row's bits from depending on the batch.
    def wanted(row):
        return lax.cond(jnp.any(row[5] > 0), sum_row, none, row)

    return lax.map(wanted, (key, trainable, centroids, origin, phi, stop, distance, stride))


class Room(NamedTuple):
    """Where each row's new tokens go: the position of the first, and how many are taken."""

    start: Int32[Array, "B"]
    taken: Int32[Array, "B"]


def make_room(
    lengths: Int32[Array, "*B"],
    counts: Int32[Array, "*B"] | None,
    num_new: int,
    capacity: int,
    has_room: Callable[[Array, Array], Array] | None = None,
) -> tuple[Room, Int32[Array, "*B"]]:
    """Room for each row's new tokens: all of them, or none where they would pass the capacity.

    Args:
      lengths: tokens so far, clipped to 0..S.
      counts: how many of the new tokens each row takes, clipped to 0..num_new; None for all.
      num_new: t, the new tokens.
      capacity: S.
      has_room: of starts and numbers of tokens, what else says whether there is room; None for
        nothing.

    Returns:
      The room, and the lengths after it, which are what they were where none is taken.
    """
    start = jnp.clip(lengths, 0, capacity)
    wanted = jnp.full_like(lengths, num_new) if counts is None else jnp.clip(counts, 0, num_new)
    fits = start + wanted <= capacity
    if has_room is not None:
        fits &= has_room(start, wanted)
    taken = jnp.where(fits, wanted, 0)
    return Room(start, taken), jnp.where(taken > 0, start + taken, lengths)


def raised(
    high_water: Int32[Array, "*B"], room: Room, capacity: int
) -> tuple[Int32[Array, "*B"], Int32[Array, "*B"]]:
    """The high water of rows before their new tokens and after them, clipped to 0..S.

    One that lies below the row's length, as that was set by hand, is taken for that.
    """
    before = jnp.maximum(jnp.clip(high_water, 0, capacity), room.start)
    return before, jnp.maximum(before, room.start + room.taken)


def append_tokens(
    key_new: Float[Array, "B _ _ H"],
    index: PQIndex,
    room: Room,
    lengths: Int32[Array, "B"],
    config: IndexerConfig,
    kv_layout: KVLayout,
    layer: Int32[Array, ""] | None = None,
    value: Float[Array, "*layers B _ _ H_"] | None = None,
    span: Span | None = None,
) -> PQIndex:
    """The index with each row's first `room.taken` new keys, in one layer if there are several.

    `value` is the cache of values, the new ones included, if sums of them are kept; `span` says
    which positions the index has, where others are on other devices.
    """
    key_new = head_major(key_new, kv_layout)
    phi = index.phi if config.metric == "ip" else None
    codebooks, phi = layer_of((index.codebooks, phi), layer)
    new = encode_tokens(key_new, codebooks, phi, room.taken, config)
    codes, cells, high_water = index.codes, index.cells, index.high_water
    before = after = room.start
    if high_water is not None:
        capacity = span.capacity if span else codes.shape[-1]
        before, after = raised(layer_of(high_water, layer), room, capacity)
        high_water = put_layer(high_water, after, layer)
    codes = write_tokens(codes, new, room, codes.ndim - 1, layer, span)
    if cells is not None:
        one, its_codes = layer_of((cells, codes), layer)
        if key_new.shape[2] <= MOST_NEW:
            one = grow(one, its_codes, before, after, config, span)
        else:
            one = seal(one, its_codes, after, room.taken > 0, config, span)
        cells = put_layer(cells, one, layer)
    values = index.values
    if values is not None:
        assert value is not None
        values = add_values(
            values, value, codes, before, after, key_new.shape[2], config, kv_layout, layer
        )
    lengths = put_layer(index.lengths, lengths, layer)
    kept = {"cells": cells, "values": values, "high_water": high_water}
    return dataclasses.replace(index, codes=codes, lengths=lengths, **kept)


def write_tokens(
    cache: Shaped[Array, "..."],
    new: Shaped[Array, "B ..."],
    room: Room,
    token_axis: int,
    layer: Int32[Array, ""] | None,
    span: Span | None = None,
) -> Shaped[Array, "..."]:
    """Puts what belongs to each row's first `room.taken` new tokens in its place.

    Args:
      cache: of B rows, behind an axis of layers if there is one.
      new: likewise, for some tokens of one layer.
      room: where they go; the others have no effect.
      token_axis: of the cache.
      layer: None where the cache has no such axis.
      span: which positions the cache has, where others are on other devices.

    Returns:
      The cache after.
    """
    tokens_first = jnp.moveaxis(new, token_axis - cache.ndim, 1)
    token = np.arange(tokens_first.shape[1], dtype=np.int32)[None]
    is_taken, position = token < room.taken[:, None], room.start[:, None] + token
    if span is not None:
        position = position - span.offset
        is_taken &= position >= 0
    place = jnp.where(is_taken, position, np.int32(cache.shape[token_axis]))
    if layer is None:

        def write(row, new, place):
            index = (slice(None),) * (token_axis - 1)
            return row.at[(*index, place)].set(jnp.moveaxis(new, 0, token_axis - 1), mode="drop")

        return jax.vmap(write)(cache, tokens_first, place)
    # One scatter into all layers, or the compiler would copy this one.
    row = np.arange(cache.shape[1], dtype=np.int32)[:, None]
    layer = jnp.clip(layer, 0, cache.shape[0] - 1)
    between = (slice(None),) * (token_axis - 2)
    return cache.at[(layer, row, *between, place)].set(tokens_first, mode="drop")


class Logits(NamedTuple):
    """How logits are made: what inner products are multiplied by, and the soft cap or None."""

    scale: Any  # f32[]
    soft_cap: Any


class Attention(NamedTuple):
    """[B, T, N, H'], and f32[B, T, N]: the log of the sum of the logits' exponentials."""

    out: Any
    lse: Any


class Listed(NamedTuple):
    """Entries of lists, grouped by kv head.

    Attributes:
      exists: bool[B, K, T * G, P], which are positions of the cache.
      position: int32, in 0..S - 1.
      products: float32, of the query and their keys; 0 for those that do not exist.
    """

    exists: Any
    position: Any
    products: Any


class Part(NamedTuple):
    """A part of a softmax, grouped by kv head.

    Attributes:
      out: float32[B, K, T * G, H'], the mean of its values by their weights; 0 for an empty part.
      largest: float32[B, K, T * G], the largest logit; 0 for an empty part.
      total: likewise, the sum of exp(logit - largest).
    """

    out: Any
    largest: Any
    total: Any


def read_listed(
    query: Float[Array, "B T N H"],
    key: Float[Array, "*layers B _ _ H"],
    indices: Int32[Array, "B T N P"],
    kv_layout: KVLayout,
    layer: Int32[Array, ""] | None,
) -> Listed:
    """What lists name, and the inner products of each query with the keys of its list."""
    capacity, kv_heads = (key.shape[of(kv_layout) - 4] for of in (token_axis, head_axis))
    exists = by_kv_head((indices >= 0) & (indices < capacity), kv_heads)
    position = by_kv_head(jnp.clip(indices, 0, capacity - 1), kv_heads)
    grouped = by_kv_head(query.astype(jnp.float32), kv_heads)
    key = _gather(key, exists, position, kv_layout, layer)
    highest = lax.Precision.HIGHEST
    products = jnp.einsum("bkgh,bkgph->bkgp", grouped, key, precision=highest)
    return Listed(exists, position, products)


def _gather(
    cache: Array, exists: Array, position: Array, kv_layout: KVLayout, layer: Array | None
) -> Float[Array, "B K TG P H"]:
    """Keys or values of lists in float32.

    What is not listed is 0, since 0 times its NaN would be NaN, in gradients too.
    """
    batch, kv_heads, group, list_size = position.shape
    taken = read_tokens(cache, position.reshape(batch, kv_heads, -1), kv_layout, layer)
    taken = taken.reshape(batch, kv_heads, group, list_size, -1).astype(jnp.float32)
    return jnp.where(exists[..., None], taken, 0)


def made_logits(products: Float[Array, "*shape"], logits_of: Logits) -> Float[Array, "*shape"]:
    """Logits of inner products."""
    logits = products * logits_of.scale
    if logits_of.soft_cap is not None:
        logits = logits_of.soft_cap * jnp.tanh(logits / logits_of.soft_cap)
    return logits


def softmax_over(
    listed: Listed,
    attended: Bool[Array, "B K TG P"],
    value: Float[Array, "*layers B _ _ H_"],
    logits_of: Logits,
    kv_layout: KVLayout,
    layer: Int32[Array, ""] | None,
) -> Part:
    """Softmax over some of the entries of lists."""
    logits = jnp.where(attended, made_logits(listed.products, logits_of), -jnp.inf)
    largest = _largest(logits)
    weights = jnp.exp(logits - largest[..., None])
    total = jnp.sum(weights, axis=-1)
    weights = weights / jnp.where(total == 0, 1, total)[..., None]
    value = _gather(value, attended, listed.position, kv_layout, layer)
    out = jnp.einsum("bkgp,bkgph->bkgh", weights, value, precision=lax.Precision.HIGHEST)
    return Part(out, largest, total)


def _largest(logits: Float[Array, "*batch n"]) -> Float[Array, "*batch"]:
    """What to subtract from logits: where none is above -inf, nothing."""
    largest = jnp.max(logits, axis=-1, initial=-jnp.inf)
    return jnp.where(jnp.isneginf(largest), 0, largest)


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "*layers B _ _ H"],
    value: Float[Array, "*layers B _ _ H_"],
    indices: Int32[Array, "B T N P"],
    logits_of: Logits,
    kv_layout: KVLayout,
    layer: Int32[Array, ""] | None = None,
    dtype: Any = None,
    rest: Rest | None = None,
    heavy: np.ndarray | None = None,
) -> Attention:
    """Softmax attention over the listed tokens, in float32 (CONTRACT.md, section 4).

    The output has the query's dtype if `dtype` says no other. With a rest it is told which entries
    of the lists are the heavy tokens where any are left out.
    """
    listed = read_listed(query, key, indices, kv_layout, layer)
    part = softmax_over(listed, listed.exists, value, logits_of, kv_layout, layer)
    if rest is not None:
        assert heavy is not None
        is_heavy = listed.exists & heavy[None, None, None]
        true_logits = jnp.where(is_heavy, made_logits(listed.products, logits_of), -jnp.inf)
        part = merged(part, corrected(rest, true_logits))
    nothing = part.total == 0
    lse = part.largest + jnp.log(jnp.where(nothing, 1, part.total))
    lse = jnp.where(nothing, -jnp.inf, lse)
    out, lse = (by_query_head(x, query.shape[1]) for x in (part.out, lse))
    return Attention(out.astype(dtype or query.dtype), lse)


def merge_devices(found: Attention, dtype: Any, axis: str) -> Attention:
    """Attention to all that the devices along a mesh axis have attended to, alike on each of them.

    Exchanges outputs and logarithms, 4 * (H' + 1) bytes a device and query head, by one
    `all_gather`, and adds them in the order of the devices.

    Args:
      found: float32, of each device.
      dtype: of the output.
      axis: of the mesh.
    """
    both = jnp.concatenate([found.out, found.lse[..., None]], axis=-1)
    # Where types do not say what varies, the gradient of what is alike comes in parts, to be added.
    is_typed = axis in jax.typeof(lax.axis_index(axis)).manual_axis_type.varying
    both = lax.all_gather(both, axis, to="invarying" if is_typed else "varying")
    out, lse = both[..., :-1], both[..., -1]
    largest = jnp.max(lse, axis=0)
    largest = jnp.where(jnp.isneginf(largest), 0, largest)
    weights = [jnp.exp(one - largest) for one in lse]
    # A part without weight may have an output that is no number.
    total = functools.reduce(jnp.add, weights)
    parts = [jnp.where(w > 0, w, 0)[..., None] * o for w, o in zip(weights, out, strict=True)]
    is_empty = total == 0
    merged = functools.reduce(jnp.add, parts) / jnp.where(is_empty, 1, total)[..., None]
    lse = jnp.where(is_empty, -jnp.inf, largest + jnp.log(jnp.where(is_empty, 1, total)))
    return Attention(merged.astype(dtype), lse)


def corrected(rest: Rest, true_logits: Float[Array, "B K TG P"]) -> Part:
    """The rest of a selection as a part, corrected by its heavy tokens; constant to gradients."""
    rest = jax.tree.map(lambda x: by_kv_head(x, true_logits.shape[1]), rest)
    rest, true_logits = lax.stop_gradient((rest, true_logits))
    largest, total = _mass(true_logits)
    factor = corrected_by(largest, total, rest.log_heavy_mass, jnp.ones_like(total))
    is_there = rest.log_mass > -jnp.inf
    largest = jnp.where(is_there, rest.log_mass, 0)
    return Part(rest.value, largest, jnp.where(is_there, factor, 0))


def merged(one: Part, other: Part) -> Part:
    """Two parts in one; one of them, to the bit, where the other is empty."""
    largest = jnp.maximum(
        jnp.where(one.total == 0, other.largest, one.largest),
        jnp.where(other.total == 0, one.largest, other.largest),
    )
    weights = [
        jnp.where(x.total == 0, 0, x.total * jnp.exp(x.largest - largest)) for x in (one, other)
    ]
    total = weights[0] + weights[1]
    shares = [(x / jnp.where(total == 0, 1, total))[..., None] for x in weights]
    return Part(one.out * shares[0] + other.out * shares[1], largest, total)


class Candidates(NamedTuple):
    """Which tokens are candidates of each query, and what PQ says of them, grouped by kv head.

    In a short context there are none: all of it is attended to (rule 5).

    Attributes:
      sink_until: int32[B, K, T * G]: positions before it are attended to whatever the scores are,
      window_from: and those from there on.
      first, last: candidates are the positions in [first, last).
      logits: float32[B, K, T * G, S], made of scores as true logits are of inner products.
    """

    sink_until: Any
    window_from: Any
    first: Any
    last: Any
    logits: Any

    def has(self, position: Int32[Array, "#B #K #TG n"]) -> Bool[Array, "B K TG n"]:
        """Which positions are candidates."""
        return (position >= self.first[..., None]) & (position < self.last[..., None])

    def always(self, position: Int32[Array, "B K TG n"]) -> Bool[Array, "B K TG n"]:
        """Which positions are attended to whatever the scores are."""
        return (position < self.sink_until[..., None]) | (position >= self.window_from[..., None])


def candidates_of(
    scores: Float[Array, "B T N S"],
    visible: Int32[Array, "B T"],
    logits_of: Logits,
    config: IndexerConfig,
    kv_heads: int,
) -> Candidates:
    """The candidates of each query (rules 1, 2 and 5)."""
    num_tokens, num_heads = scores.shape[1:3]
    is_short = visible <= config.short_context(num_tokens)
    window_from = visible - config.window_size
    first = jnp.full_like(visible, config.first_candidate)
    sink_until = jnp.where(is_short, visible, np.int32(config.sink_size))
    last = jnp.where(is_short, first, window_from)

    def of_heads(x: Int32[Array, "B T"]) -> Int32[Array, "B K TG"]:
        return by_kv_head(jnp.broadcast_to(x[..., None], (*x.shape, num_heads)), kv_heads)

    return Candidates(
        of_heads(sink_until),
        of_heads(window_from),
        of_heads(first),
        of_heads(last),
        by_kv_head(made_logits(scores, logits_of), kv_heads),
    )


def best_of_pool(listed: Listed, of: Candidates, config: IndexerConfig) -> Bool[Array, "B K TG P"]:
    """Which entries are the `heavy_size` best candidates by their keys; ties go to the lower."""
    is_candidate = listed.exists & of.has(listed.position)
    rank = jnp.where(is_candidate, ordered(listed.products), NOT_A_CANDIDATE)
    # Entries ascend, so that top_k's rule for ties is the contract's.
    place = best(rank, config.heavy_size)
    return is_candidate & jnp.put_along_axis(
        jnp.zeros_like(is_candidate), place, True, axis=-1, inplace=False
    )


def estimated(
    listed: Listed,
    attended: Bool[Array, "B K TG P"],
    of: Candidates,
    codes: UInt8[Array, "B K M S"],
    values: ValueSums,
    logits_of: Logits,
    config: IndexerConfig,
) -> Part:
    """The candidates that are not attended to, as one part of the softmax (CONTRACT.md, section 4).

    Those of the pool have their true logits, the others those of PQ, corrected by what is known of
    the pool; values are means by codes.
    """
    in_pool, outside, of_pool = by_pq(listed, of)
    true_logits = made_logits(listed.products, logits_of)
    true_logits = jnp.where(in_pool, true_logits, -jnp.inf)
    is_known = ~attended & (true_logits < jnp.inf)
    known = jnp.where(is_known, true_logits, -jnp.inf)
    known = _put(jnp.full_like(outside, -jnp.inf), listed.position, in_pool, known)

    largest = _largest(jnp.maximum(outside, known))
    weights = jnp.exp(outside - largest[..., None]) * correction(true_logits, of_pool)[..., None]
    weights += jnp.exp(known - largest[..., None])
    return _with_values(weights, largest, codes, values, config)


def rest_of(
    indices: Int32[Array, "B T N P"],
    scores: Float[Array, "B T N S"],
    index: PQIndex,
    counts: Int32[Array, "B"] | None,
    logits_of: Logits,
    config: IndexerConfig,
) -> Rest:
    """What lists leave out, by PQ alone (CONTRACT.md, section 4)."""
    assert index.values is not None
    num_tokens = indices.shape[1]
    _, kv_heads, _, capacity = index.codes.shape
    visible = visible_tokens(index.lengths, counts, capacity, num_tokens)
    of = candidates_of(scores, visible, logits_of, config, kv_heads)
    exists = by_kv_head(indices >= 0, kv_heads)
    position = by_kv_head(jnp.clip(indices, 0, capacity - 1), kv_heads)
    _, outside, of_pool = by_pq(Listed(exists, position, None), of)
    largest = _largest(outside)
    weights = jnp.exp(outside - largest[..., None])
    part = _with_values(weights, largest, index.codes, index.values, config)
    masses = (
        jnp.where(total == 0, -jnp.inf, largest + jnp.log(jnp.where(total == 0, 1, total)))
        for largest, total in ((part.largest, part.total), _mass(of_pool))
    )
    return Rest(*(by_query_head(x, num_tokens) for x in (part.out, *masses)))


def by_pq(listed: Listed, of: Candidates) -> tuple[Array, Array, Array]:
    """Which entries of lists are candidates; logits by PQ of candidates not listed, and of these.

    Returns:
      bool[B, K, T * G, P], float32[B, K, T * G, S] and [B, K, T * G, P]; NaN weighs nothing.
    """
    in_pool = listed.exists & of.has(listed.position)
    position = jnp.arange(of.logits.shape[-1], dtype=jnp.int32)[None, None, None]
    weighs = of.has(position) & (of.logits < jnp.inf)
    logits = jnp.where(weighs, of.logits, -jnp.inf)
    of_pool = jnp.take_along_axis(logits, listed.position, axis=-1)
    of_pool = jnp.where(in_pool, of_pool, -jnp.inf)
    outside = _put(logits, listed.position, in_pool, jnp.full_like(of_pool, -jnp.inf))
    return in_pool, outside, of_pool


def _put(array: Array, position: Array, wanted: Array, new: Array) -> Array:
    """The array [B, K, T * G, S] with some of it replaced."""
    place = jnp.where(wanted, position, np.int32(array.shape[-1]))
    row = lambda array, place, new: array.at[place].set(new, mode="drop")  # noqa: E731
    return jax.vmap(jax.vmap(jax.vmap(row)))(array, place, new)


def _mass(logits: Float[Array, "*batch n"]) -> tuple[Array, Array]:
    """The largest of some logits, and the sum of their exponentials relative to it."""
    largest = _largest(logits)
    return largest, jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1)


def _with_values(
    weights: Float[Array, "B K TG S"],
    largest: Float[Array, "B K TG"],
    codes: UInt8[Array, "B K M S"],
    values: ValueSums,
    config: IndexerConfig,
) -> Part:
    """Tokens with weights relative to a largest logit, and values by their codes."""
    # Without a value there is nothing to estimate from.
    summed = jnp.sum(values.counts[:, :, 0], axis=-1)[:, :, None, None]
    weights = jnp.where(summed > 0, weights, 0)
    total = jnp.sum(weights, axis=-1)
    of_codes, of_all = mean_values(values)
    num_codes = of_codes.shape[3]
    codes = summed_codes(codes, config)

    def by_code(code: Array, weights: Array) -> Array:  # [S], [TG, S] -> [C', TG]
        zeros = jnp.zeros((num_codes, len(weights)), jnp.float32)
        return zeros.at[code.astype(jnp.int32)].add(weights.T)

    of_head = jax.vmap(by_code, in_axes=(0, None))
    by_codes = jax.vmap(jax.vmap(of_head))(codes, weights)  # [B, K, M', C', TG]
    highest = lax.Precision.HIGHEST
    out = jnp.einsum("bkmcg,bkmch->bkgh", by_codes, of_codes, precision=highest)
    out -= (codes.shape[2] - 1) * total[..., None] * of_all[:, :, None]
    nothing = total == 0
    out = jnp.where(nothing[..., None], 0, out / jnp.where(nothing, 1, total)[..., None])
    return Part(out, largest, total)


def correction(
    true_logits: Float[Array, "*batch n"], by_pq: Float[Array, "*batch n"]
) -> Float[Array, "*batch"]:
    """How much more candidates weigh by their keys than by PQ, within bounds; 1 where not known."""
    return corrected_by(*_mass(true_logits), *_mass(by_pq))


def corrected_by(largest: Array, total: Array, largest_by_pq: Array, total_by_pq: Array) -> Array:
    """`correction`, from largest logits and the totals relative to them."""
    log = (largest - largest_by_pq) + (jnp.log(total) - jnp.log(total_by_pq))
    limit = np.float32(np.log(LARGEST_CORRECTION))
    is_known = (log < jnp.inf) & (log > -jnp.inf)
    return jnp.exp(jnp.where(is_known, jnp.minimum(jnp.maximum(log, -limit), limit), 0))


def attend_selected(
    query: Float[Array, "B T N H"],
    caches: "Caches",
    index: PQIndex,
    counts: Int32[Array, "B"] | None,
    logits_of: Logits,
    config: IndexerConfig,
    kv_layout: KVLayout,
    layer: Int32[Array, ""] | None,
    span: Span | None = None,
) -> Float[Array, "B T N H_"]:
    """Attention over what is selected by the index of a layer, reranked, and with the rest."""
    num_tokens = query.shape[1]
    _, kv_heads, _, capacity = index.codes.shape
    scores = adc_scores(lookup_table(query, index.codebooks, config), index.codes)
    indices, _ = select_from_scores(scores, index.lengths, counts, config.pool, span)
    if span is not None:
        part = attend(query, *caches, indices, logits_of, kv_layout, layer, np.float32)
        return merge_devices(part, query.dtype, span.axis).out
    if config.rerank == 1 and not config.estimate_rest:
        return attend(query, *caches, indices, logits_of, kv_layout, layer).out
    visible = visible_tokens(index.lengths, counts, capacity, num_tokens)
    listed = read_listed(query, caches.key, indices, kv_layout, layer)
    of = candidates_of(scores, visible, logits_of, config, kv_heads)
    attended = listed.exists
    if config.rerank > 1:
        attended &= of.always(listed.position) | best_of_pool(listed, of, config)
    part = softmax_over(listed, attended, caches.value, logits_of, kv_layout, layer)
    if index.values is not None:
        rest = estimated(listed, attended, of, index.codes, index.values, logits_of, config)
        part = merged(part, rest)
    return by_query_head(part.out, num_tokens).astype(query.dtype)


class Caches(NamedTuple):
    """Keys [*layers, B, S, K, H] or head-major, and values likewise, or what stands for them."""

    key: Any
    value: Any


def decode(
    query: Float[Array, "B T N H"],
    new: Caches,
    caches: Caches,
    index: PQIndex,
    counts: Int32[Array, "B"] | None,
    logits_of: Logits,
    config: IndexerConfig,
    kv_layout: KVLayout,
    layer: Int32[Array, ""] | None = None,
    span: Span | None = None,
    page_table: Int32[Array, "B pages"] | None = None,
) -> tuple[Float[Array, "B T N H_"], Caches, PQIndex]:
    """A layer's decode step: new keys and values are written, then the selected are attended to.

    Caches in pages are written in place, and read by a copy in rows.
    """
    axis, num_tokens = token_axis(kv_layout) - 4, query.shape[1]
    capacity = span.capacity if span else index.codes.shape[-1]
    before, has_room = layer_of(index.lengths, layer), None
    if page_table is not None:
        has_room = has_pages(page_table, num_tokens, page_size_of(caches.key, kv_layout))
    room, lengths = make_room(before, counts, num_tokens, capacity, has_room)

    def write(cache: Array, x: Array) -> Array:
        if page_table is not None:
            return write_pages(cache, x, *room, page_table, kv_layout, layer)
        return write_tokens(cache, x, room, cache.ndim + axis, layer, span)

    caches = Caches(*(write(cache, x) for cache, x in zip(caches, new, strict=True)))
    rows = Caches(*(in_rows(x, page_table, kv_layout, layer, capacity) for x in caches))
    index = append_tokens(new.key, index, room, lengths, config, kv_layout, layer, rows.value, span)
    taken = None if counts is None else room.taken
    one = layer_of(index, layer)
    out = attend_selected(query, rows, one, taken, logits_of, config, kv_layout, layer, span)
    return out, caches, index
