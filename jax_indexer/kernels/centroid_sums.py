"""One pass of k-means over the keys: assign each to a centroid, sum the members of each."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jaxtyping import Bool, Float, Int32, UInt8

from jax_indexer.kernels import backend
from jax_indexer.kernels.tuning import H100, Tuning
from jax_indexer.layout import Grouping, KVLayout, dimension_of, power_of_2_from, token_axis
from jax_indexer.reference import largest_turned
from jax_indexer.rope import LookAhead, angles, positions_on

# Matrix products take no smaller sides.
SMALLEST_SIDE = 16
# A codebook and the sums of its clusters stay on chip while the keys go by.
LARGEST_CODEBOOK = 16384


def unsupported(num_centroids: int, dimensions: int) -> str | None:
    """Says why codebooks of this shape are not trained by this kernel, or None."""
    sides = (max(power_of_2_from(n), SMALLEST_SIDE) for n in (num_centroids, dimensions))
    if np.prod([*sides]) > LARGEST_CODEBOOK:
        return f"{num_centroids} centroids of {dimensions} dimensions do not fit on the chip"
    return None


def bfloat16_pieces(x: Array, count: int) -> list[Array]:
    """Up to `count` bfloat16 arrays whose sum is x: three hold all 24 bits of a float32.

    Products of such pieces are exact on tensor cores, at twice the rate of TF32 ones.
    """
    if x.dtype == jnp.bfloat16:
        return [x]
    x = x.astype(jnp.float32)
    pieces = []
    for _ in range(count - 1):
        # By its bits: XLA may leave out a conversion there and back.
        high = lax.bitcast_convert_type(x, jnp.int32) & np.int32(-(1 << 16))
        high = lax.bitcast_convert_type(high, jnp.float32)
        pieces.append(high.astype(jnp.bfloat16))
        x = x - high
    return [*pieces, x.astype(jnp.bfloat16)]


class Inputs(NamedTuple):
    """Keys, and the centroids they are assigned to."""

    stop: Any  # i32[R, M]  tokens to look at; 0 for a codebook that is finished
    key: Any  # [B, S, K, H] or [B, K, S, H]
    trainable: Any  # u8[R, M, S]
    centroids: Any  # f32[R, M, C, D']
    origin: Any  # f32[R, M, D']
    phi: Any  # f32[R, M] for the inner-product metric, else None
    distance: Any  # i32[B] for copies that are turned on, else None
    stride: Any  # likewise
    speed: Any  # i32[H]


class Outputs(NamedTuple):
    """Sums of the members of each cluster by part, with their numbers, and each key's cluster."""

    sums: Any  # f32[R, M, parts, C, D' + 1]
    nearest: Any  # u8[R, M, 1 + copies, S]


class Codebook(NamedTuple):
    """A codebook on the chip, for the distances of tiles of tokens to its centroids.

    argmin |x - c|^2 = argmax x.(c - o) - (o + (c - o) / 2).(c - o) for any origin o. From amid the
    keys the products are small where these lie close together, far from zero.

    Attributes:
      pieces: of the offsets [D, C] from the origin.
      bias: [C], infinite for what is no centroid.
      last: [C] offsets of the augmented coordinate, or None.
      last_origin: its origin.
    """

    pieces: list[Array]
    bias: Array
    last: Any
    last_origin: Any


def _read_codebook(inputs: Inputs, kv_row, subspace, c, d, dimensions) -> Codebook:
    is_centroid, is_dimension = c < inputs.centroids.shape[2], d < dimensions
    centroids = backend.load(
        inputs.centroids.at[kv_row, subspace, c[None, :], d[:, None]],
        mask=is_centroid[None, :] & is_dimension[:, None],
        other=0,
    )
    at = inputs.origin.at[kv_row, subspace, d]
    origin = backend.load(at, mask=is_dimension, other=0)[:, None]
    offsets = centroids - origin
    bias = jnp.sum((origin + offsets / 2) * offsets, axis=0)
    last = last_origin = None
    if inputs.phi is not None:
        last_origin = inputs.origin[kv_row, subspace, dimensions]
        at = inputs.centroids.at[kv_row, subspace, c, dimensions]
        last = backend.load(at, mask=is_centroid, other=0) - last_origin
        bias += last * last / 2
    bias = jnp.where(is_centroid, bias, jnp.inf)
    return Codebook(bfloat16_pieces(offsets, 2), bias, last, last_origin)


def centroid_sums_kernel(
    program,
    inputs: Inputs,
    outputs: Outputs,
    *,
    kv_layout: KVLayout,
    grouping: Grouping,
    ahead: LookAhead | None,
    tile: int,
    part_size: int,
):
    num_subspaces, num_parts, num_centroids = outputs.sums.shape[1:4]
    kv_heads = inputs.key.shape[2 if kv_layout == "BSKH" else 1]
    dimensions = inputs.key.shape[3] // num_subspaces

    # Subspaces of a key share its cache lines, so they come first.
    subspace = program % num_subspaces
    part = program // num_subspaces % num_parts
    kv_row = program // (num_subspaces * num_parts)
    row, kv_head = kv_row // kv_heads, kv_row % kv_heads
    first_token = part * part_size
    stop = inputs.stop[kv_row, subspace]

    c = jnp.arange(max(num_centroids, SMALLEST_SIDE), dtype=jnp.int32)
    d = jnp.arange(max(power_of_2_from(dimensions), SMALLEST_SIDE), dtype=jnp.int32)
    h = dimension_of(subspace, d, num_subspaces, dimensions, grouping)
    is_centroid, is_dimension = c < num_centroids, d < dimensions

    @pl.when(first_token < stop)
    def _():
        codebook = _read_codebook(inputs, kv_row, subspace, c, d, dimensions)

        def add_tile(i, carry):
            token = first_token + i * tile + jnp.arange(tile, dtype=jnp.int32)
            at = inputs.trainable.at[kv_row, subspace, token]
            flag = backend.load(at, mask=token < stop, other=0)
            trainable = flag.astype(jnp.int32) > 0
            at = (token[:, None], kv_head) if kv_layout == "BSKH" else (kv_head, token[:, None])

            def read(h):
                return backend.load(
                    inputs.key.at[(row, *at, h[None, :])],
                    mask=trainable[:, None] & is_dimension[None, :],
                    other=0,
                )

            keys = read(h)
            carry = add_keys(keys, trainable, token, 0, carry)
            if ahead is None:
                return carry
            own, partner = (x.astype(jnp.float32) for x in (keys, read(ahead.rope.partner(h))))
            # However far it turns, a copy is no longer than both together.
            most = largest_turned(keys.dtype)
            turns = trainable & (jnp.sum(own * own + partner * partner, axis=1) <= most)
            own, partner = (jnp.where(turns[:, None], x, 0) for x in (own, partner))
            speed = backend.load(inputs.speed.at[h], mask=is_dimension, other=0)
            partner *= jnp.where(ahead.rope.is_first(h), -1.0, 1.0)[None, :]
            distance, stride = inputs.distance[row], inputs.stride[row]

            def add_copy(copy, carry, ahead=ahead):
                on = positions_on(token, distance, stride, copy, ahead)
                cos, sin = backend.cos_and_sin(angles(on[:, None], speed[None, :]))
                copies = (own * cos + partner * sin).astype(keys.dtype)
                return add_keys(copies, turns, token, 1 + copy, carry)

            # A loop, for it is much code.
            return lax.fori_loop(0, ahead.copies, add_copy, carry)

        def add_keys(keys, trainable, token, number, carry):
            sums, sizes, extra_sums = carry
            pieces = bfloat16_pieces(keys, 2 if keys.dtype == jnp.float16 else 3)

            scores = -jnp.broadcast_to(codebook.bias[None, :], (tile, len(c)))
            for n, piece in enumerate(pieces[:2]):
                for offset in codebook.pieces[: 2 - n]:
                    scores += jnp.dot(piece, offset, preferred_element_type=jnp.float32)
            extra: Any = None
            if inputs.phi is not None:
                norm = jnp.sum(jnp.square(keys.astype(jnp.float32)), axis=1)
                extra = jnp.sqrt(jnp.maximum(inputs.phi[kv_row, subspace] - norm, 0))
                extra -= codebook.last_origin
                scores += extra[:, None] * codebook.last[None, :]

            nearest = jnp.argmax(scores, axis=1).astype(jnp.int32)
            into = outputs.nearest.at[kv_row, subspace, number, token]
            backend.store(into, nearest.astype(jnp.uint8), mask=token < stop)
            member = (nearest[None, :] == c[:, None]) & trainable[None, :]
            one_hot = member.astype(jnp.float32)
            for piece in pieces:
                sums += jnp.dot(
                    one_hot.astype(jnp.bfloat16), piece, preferred_element_type=jnp.float32
                )
            sizes += jnp.sum(one_hot, axis=1)
            if extra is not None:
                extra_sums += jnp.sum(one_hot * extra[None, :], axis=1)
            return sums, sizes, extra_sums

        none = jnp.zeros(len(c), jnp.float32)
        extra_sums = None if inputs.phi is None else none
        carry = jnp.zeros((len(c), len(d)), jnp.float32), none, extra_sums
        tokens = jnp.minimum(stop - first_token, part_size)
        sums, sizes, extra_sums = lax.fori_loop(0, (tokens + tile - 1) // tile, add_tile, carry)

        place = kv_row, subspace, part
        backend.store(
            outputs.sums.at[(*place, c[:, None], d[None, :])],
            sums,
            mask=is_centroid[:, None] & is_dimension[None, :],
        )
        columns = [sizes] if extra_sums is None else [extra_sums, sizes]
        for column, values in enumerate(columns, dimensions):
            backend.store(outputs.sums.at[(*place, c, column)], values, mask=is_centroid)


class PartsInputs(NamedTuple):
    """Sums by part."""

    stop: Any  # i32[R, M]
    parts: Any  # f32[R, M, parts, C * (D' + 1)]


class PartsOutputs(NamedTuple):
    """f32[R, M, C * (D' + 1)] sums of all."""

    sums: Any


def add_parts_kernel(
    program, inputs: PartsInputs, outputs: PartsOutputs, *, block: int, part_size: int
):
    _, num_subspaces, size = outputs.sums.shape
    num_blocks = pl.cdiv(size, block)
    element = program % num_blocks * block + jnp.arange(block, dtype=jnp.int32)
    subspace = program // num_blocks % num_subspaces
    kv_row = program // (num_blocks * num_subspaces)
    exists = element < size

    def add(part, total):
        at = inputs.parts.at[kv_row, subspace, part, element]
        return total + backend.load(at, mask=exists, other=0)

    parts = (inputs.stop[kv_row, subspace] + part_size - 1) // part_size
    total = lax.fori_loop(0, parts, add, jnp.zeros(block, jnp.float32))
    backend.store(outputs.sums.at[kv_row, subspace, element], total, mask=exists)


def centroid_sums(
    key: Float[Array, "B _ _ H"],
    trainable: Bool[Array, "B K M S"],
    centroids: Float[Array, "B K M C D_"],
    origin: Float[Array, "B K M D_"],
    phi: Float[Array, "B K M"] | None,
    stop: Int32[Array, "B K M"],
    distance: Int32[Array, "B"],
    stride: Int32[Array, "B"],
    *,
    kv_layout: KVLayout,
    grouping: Grouping,
    ahead: LookAhead | None,
    tuning: Tuning = H100,
) -> tuple[Float[Array, "B K M C E"], UInt8[Array, "B K M copies S"]]:
    """What `reference.assign_and_sum` computes, with distances from bfloat16 pieces.

    A part of the tokens has one program and one order of addition, whatever else is in the batch;
    parts are added in their order. Sums have the error of float32 additions, distances one of
    about 2**-15 of their terms, copies one of 2**-20 of a key. That is enough to train: codes are
    given by the append kernel.
    Programs leave at once where `stop` is 0.
    """
    batch, kv_heads, num_subspaces, num_centroids, size = centroids.shape
    of_codebooks = batch * kv_heads, num_subspaces
    capacity = key.shape[token_axis(kv_layout)]
    num_parts = pl.cdiv(capacity, tuning.tokens_per_part)
    of_each = 1 if ahead is None else 1 + ahead.copies
    turning = None, None, None
    if ahead is not None:
        turning = distance, stride, jnp.asarray(ahead.speed(key.shape[3]))
    tile, num_warps = tuning.for_training(num_centroids, key.shape[3] // num_subspaces)

    def by_codebook(x):
        return x.reshape(*of_codebooks, *x.shape[3:])

    inputs = Inputs(
        by_codebook(stop),
        key,
        by_codebook(trainable.astype(jnp.uint8)),
        by_codebook(centroids),
        by_codebook(origin),
        None if phi is None else by_codebook(phi),
        *turning,
    )
    sums = backend.launch(
        backend.Launch(
            functools.partial(
                centroid_sums_kernel,
                kv_layout=kv_layout,
                grouping=grouping,
                ahead=ahead,
                tile=tile,
                part_size=tuning.tokens_per_part,
            ),
            inputs,
            Outputs(
                jax.ShapeDtypeStruct(
                    (*of_codebooks, num_parts, num_centroids, size + 1), np.float32
                ),
                jax.ShapeDtypeStruct((*of_codebooks, of_each, capacity), np.uint8),
            ),
            programs=math.prod(of_codebooks) * num_parts,
        ),
        num_warps=num_warps,
    )
    elements = num_centroids * (size + 1)
    added = backend.launch(
        backend.Launch(
            functools.partial(
                add_parts_kernel, block=tuning.sums_block, part_size=tuning.tokens_per_part
            ),
            PartsInputs(inputs.stop, sums.sums.reshape(*of_codebooks, num_parts, elements)),
            PartsOutputs(jax.ShapeDtypeStruct((*of_codebooks, elements), np.float32)),
            programs=math.prod(of_codebooks) * pl.cdiv(elements, tuning.sums_block),
        ),
        num_warps=4,
    )
    return (
        added.sums.reshape(*centroids.shape[:4], size + 1),
        sums.nearest.reshape(*centroids.shape[:3], of_each, capacity),
    )
