"""One pass of k-means over the keys: assign each to a centroid, sum the members of each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jaxtyping import Bool, Float, Int32

from jax_indexer.kernels import backend
from jax_indexer.kernels.codebook import power_of_2_from
from jax_indexer.kernels.tuning import SUMS_BLOCK, TOKENS_PER_PART, centroid_sums_tuning
from jax_indexer.layout import KVLayout, token_axis

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


def centroid_sums_kernel(
    stop_ref,  # i32[B * K, M]       tokens to look at; 0 for a codebook that is finished
    key_ref,  # [B, S, K, H] or [B, K, S, H]
    trainable_ref,  # u8[B * K, M, S]
    centroids_ref,  # f32[B * K, M, C, D']
    *refs,  # f32[B * K, M] phi for the inner-product metric; f32[B * K, M, parts, C, D' + 1]
    kv_layout: KVLayout,
    tile: int,
):
    *maybe_phi, out_ref = refs
    num_subspaces, num_parts, num_centroids = out_ref.shape[1:4]
    kv_heads = key_ref.shape[2 if kv_layout == "BSKH" else 1]
    dimensions = key_ref.shape[3] // num_subspaces

    # Subspaces of a key share its cache lines, so they come first.
    program = backend.program_id()
    subspace = program % num_subspaces
    part = program // num_subspaces % num_parts
    row = program // (num_subspaces * num_parts)
    b, kv_head = row // kv_heads, row % kv_heads
    first_token = part * TOKENS_PER_PART
    stop = stop_ref[row, subspace]

    c = jnp.arange(max(num_centroids, SMALLEST_SIDE), dtype=jnp.int32)
    d = jnp.arange(max(power_of_2_from(dimensions), SMALLEST_SIDE), dtype=jnp.int32)
    h = subspace * dimensions + d
    is_centroid, is_dimension = c < num_centroids, d < dimensions

    @pl.when(first_token < stop)
    def _():
        # argmin |x - c|^2 = argmax x.(c - o) - (o + (c - o) / 2).(c - o) for any origin o. At the
        # centroids' mean the products are small where keys lie close together, far from zero.
        centroids = backend.load(
            centroids_ref.at[row, subspace, c[None, :], d[:, None]],
            mask=is_centroid[None, :] & is_dimension[:, None],
            other=0,
        )
        origin = jnp.sum(centroids, axis=1, keepdims=True) / num_centroids
        offsets = centroids - origin
        bias = jnp.sum((origin + offsets / 2) * offsets, axis=0)
        offset_pieces = bfloat16_pieces(offsets, 2)
        last = jnp.zeros(len(c), jnp.float32)  # coordinate of the centroids that phi stands for
        for _ in maybe_phi:
            last = backend.load(
                centroids_ref.at[row, subspace, c, dimensions], mask=is_centroid, other=0
            )
            bias += last * last / 2
        bias = jnp.where(is_centroid, bias, jnp.inf)

        def add_tile(i, carry):
            sums, sizes, *extra_sums = carry
            token = first_token + i * tile + jnp.arange(tile, dtype=jnp.int32)
            flag = backend.load(trainable_ref.at[row, subspace, token], mask=token < stop, other=0)
            trainable = flag.astype(jnp.int32) > 0
            at = (token[:, None], kv_head) if kv_layout == "BSKH" else (kv_head, token[:, None])
            keys = backend.load(
                key_ref.at[(b, *at, h[None, :])],
                mask=trainable[:, None] & is_dimension[None, :],
                other=0,
            )
            pieces = bfloat16_pieces(keys, 2 if keys.dtype == jnp.float16 else 3)

            scores = -jnp.broadcast_to(bias[None, :], (tile, len(c)))
            for n, piece in enumerate(pieces[:2]):
                for offset in offset_pieces[: 2 - n]:
                    scores += jnp.dot(piece, offset, preferred_element_type=jnp.float32)
            extra = jnp.zeros(tile, jnp.float32)
            for phi_ref in maybe_phi:
                keys = keys.astype(jnp.float32)
                norm = jnp.sum(keys * keys, axis=1)
                extra = jnp.sqrt(jnp.maximum(phi_ref[row, subspace] - norm, 0))
                scores += extra[:, None] * last[None, :]

            nearest = jnp.argmax(scores, axis=1).astype(jnp.int32)
            member = (nearest[None, :] == c[:, None]) & trainable[None, :]
            one_hot = member.astype(jnp.float32)
            for piece in pieces:
                sums += jnp.dot(
                    one_hot.astype(jnp.bfloat16), piece, preferred_element_type=jnp.float32
                )
            sizes += jnp.sum(one_hot, axis=1)
            extra_sums = [x + jnp.sum(one_hot * extra[None, :], axis=1) for x in extra_sums]
            return sums, sizes, *extra_sums

        one = jnp.zeros(len(c), jnp.float32)
        carry = (jnp.zeros((len(c), len(d)), jnp.float32), one, *(one for _ in maybe_phi))
        tokens = jnp.minimum(stop - first_token, TOKENS_PER_PART)
        tiles = (tokens + tile - 1) // tile
        sums, *columns = lax.fori_loop(0, tiles, add_tile, carry)

        place = (row, subspace, part)
        backend.store(
            out_ref.at[(*place, c[:, None], d[None, :])],
            sums,
            mask=is_centroid[:, None] & is_dimension[None, :],
        )
        for column, values in enumerate(reversed(columns), dimensions):
            backend.store(out_ref.at[(*place, c, column)], values, mask=is_centroid)


def add_parts_kernel(
    stop_ref,  # i32[B * K, M]
    parts_ref,  # f32[B * K, M, parts, C * (D' + 1)]
    out_ref,  # f32[B * K, M, C * (D' + 1)]
):
    _, num_subspaces, size = out_ref.shape
    num_blocks = pl.cdiv(size, SUMS_BLOCK)
    program = backend.program_id()
    element = program % num_blocks * SUMS_BLOCK + jnp.arange(SUMS_BLOCK, dtype=jnp.int32)
    subspace = program // num_blocks % num_subspaces
    row = program // (num_blocks * num_subspaces)
    exists = element < size

    def add(part, total):
        return total + backend.load(
            parts_ref.at[row, subspace, part, element], mask=exists, other=0
        )

    parts = (stop_ref[row, subspace] + TOKENS_PER_PART - 1) // TOKENS_PER_PART
    total = lax.fori_loop(0, parts, add, jnp.zeros(SUMS_BLOCK, jnp.float32))
    backend.store(out_ref.at[row, subspace, element], total, mask=exists)


def centroid_sums(
    key: Float[Array, "B _ _ H"],
    trainable: Bool[Array, "B K M S"],
    centroids: Float[Array, "B K M C D_"],
    phi: Float[Array, "B K M"] | None,
    stop: Int32[Array, "B K M"],
    *,
    kv_layout: KVLayout,
    interpret: bool = False,
) -> Float[Array, "B K M C E"]:
    """What `reference.centroid_sums` computes, with distances from bfloat16 pieces.

    A part of the tokens has one program and one order of addition, whatever else is in the batch;
    parts are added in their order. Sums have the error of float32 additions, distances one of
    about 2**-15 of their terms. That is enough to train: codes are given by the append kernel.

    Args:
      key: [B, S, K, H] ("BSKH") or [B, K, S, H] ("BKSH").
      trainable: which subvectors count.
      centroids: float32, augmented for the inner-product metric.
      phi: largest squared norm of a training subvector, for the inner-product metric, else None.
      stop: how many tokens to look at; where it is 0 the programs leave at once.
      kv_layout: of `key`.
      interpret: run on the CPU, in plain JAX.

    Returns:
      Sums of the members of every cluster and, in the last column, their number.
    """
    batch, kv_heads, num_subspaces, num_centroids, size = centroids.shape
    rows = batch * kv_heads
    num_parts = pl.cdiv(key.shape[token_axis(kv_layout)], TOKENS_PER_PART)
    tile, num_warps = centroid_sums_tuning(num_centroids, key.shape[3] // num_subspaces)
    stop = stop.reshape(rows, num_subspaces)
    operands = [
        stop,
        key,
        trainable.astype(jnp.uint8).reshape(rows, num_subspaces, -1),
        centroids.reshape(rows, *centroids.shape[2:]),
    ]
    if phi is not None:
        operands.append(phi.reshape(rows, num_subspaces))
    of_codebook = (rows, num_subspaces)
    (parts,) = backend.launch(
        functools.partial(centroid_sums_kernel, kv_layout=kv_layout, tile=tile),
        *operands,
        programs=rows * num_subspaces * num_parts,
        out_shape=[
            jax.ShapeDtypeStruct((*of_codebook, num_parts, num_centroids, size + 1), np.float32)
        ],
        num_warps=num_warps,
        interpret=interpret,
    )
    elements = num_centroids * (size + 1)
    (sums,) = backend.launch(
        add_parts_kernel,
        stop,
        parts.reshape(*of_codebook, num_parts, elements),
        programs=rows * num_subspaces * pl.cdiv(elements, SUMS_BLOCK),
        out_shape=[jax.ShapeDtypeStruct((*of_codebook, elements), np.float32)],
        num_warps=4,
        interpret=interpret,
    )
    return sums.reshape(*centroids.shape[:4], size + 1)
