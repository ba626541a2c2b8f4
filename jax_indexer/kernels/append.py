"""Appending: encode new keys against the codebooks and write their codes in place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jaxtyping import Float, Int32, UInt8

from jax_indexer.kernels import backend
from jax_indexer.kernels.codebook import dimension_tiles, tiles
from jax_indexer.kernels.tuning import TOKENS_PER_ENCODER
from jax_indexer.layout import KVLayout, token_axis


def append_kernel(
    start_ref,  # i32[B]
    taken_ref,  # i32[B]
    key_ref,  # [B, t, K, H] or [B, K, t, H]
    codebooks_ref,  # [B * K, M, C, D']
    *refs,  # f32[B * K, M] phi for the inner-product metric; u8[B * K, M, S] codes before and after
    kv_layout: KVLayout,
    tokens_per_program: int,
):
    # Codes before and after are the same memory; those before are not read.
    *maybe_phi, _, codes_ref = refs
    num_rows, num_subspaces, _ = codes_ref.shape
    kv_heads = num_rows // start_ref.shape[0]
    dimensions = key_ref.shape[3] // num_subspaces
    num_centroids = codebooks_ref.shape[2]
    num_blocks = pl.cdiv(key_ref.shape[token_axis(kv_layout)], tokens_per_program)

    program = backend.program_id()
    first_token = program % num_blocks * tokens_per_program
    subspace = program // num_blocks % num_subspaces
    row = program // (num_blocks * num_subspaces)
    b, kv_head = row // kv_heads, row % kv_heads

    centroid = jnp.arange(num_centroids, dtype=jnp.int32)
    one_tile = len(dimension_tiles(num_centroids, dimensions)) == 1
    read_tiles = functools.partial(tiles, codebooks_ref, row, subspace, dimensions)
    kept = list(read_tiles()) if one_tile else None  # in registers, for all tokens

    def squared_norm_and_distances(token: Array) -> tuple[Array, Array, Array]:
        norm = jnp.float32(0)
        not_finite = jnp.int32(0)
        distance = jnp.zeros(num_centroids, jnp.float32)
        for d, exists, tile in kept or read_tiles():
            h = subspace * dimensions + d
            at = (b, token, kv_head, h) if kv_layout == "BSKH" else (b, kv_head, token, h)
            part = backend.load(key_ref.at[at], mask=exists, other=0).astype(jnp.float32)
            difference = part[None, :] - tile
            distance += jnp.sum(difference * difference, axis=1)
            norm += jnp.sum(part * part)
            not_finite += jnp.sum(jnp.where(jnp.abs(part) < jnp.inf, 0, 1))
        return norm, not_finite, distance

    def encode(i, carry):
        token = first_token + i
        norm, not_finite, distance = squared_norm_and_distances(token)
        for phi_ref in maybe_phi:
            extra = jnp.sqrt(jnp.maximum(phi_ref[row, subspace] - norm, 0))
            last = codebooks_ref[row, subspace, centroid, dimensions].astype(jnp.float32)
            distance += (extra - last) * (extra - last)
        distance = jnp.where(distance == distance, distance, jnp.inf)
        nearest = jnp.min(jnp.where(distance == jnp.min(distance), centroid, num_centroids))
        code = jnp.where(not_finite > 0, 0, nearest)
        codes_ref[row, subspace, start_ref[b] + token] = code.astype(jnp.uint8)
        return carry

    lax.fori_loop(0, jnp.minimum(taken_ref[b] - first_token, tokens_per_program), encode, 0)


def append_launch(
    key_new: Float[Array, "B _ _ H"],
    codebooks: Float[Array, "B K M C D_"],
    codes: UInt8[Array, "B K M S"],
    phi: Float[Array, "B K M"] | None,
    start: Int32[Array, "B"],
    taken: Int32[Array, "B"],
    kv_layout: KVLayout,
) -> backend.Launch:
    """The launch that encodes each row's first `taken` new keys and writes them from `start` on.

    A token's distances are added in an order that depends on the codebook's shape alone, so its
    code is the same whether it comes alone or with a whole prompt.

    Args:
      key_new: [B, t, K, H] ("BSKH") or [B, K, t, H] ("BKSH"), keys to encode.
      codebooks: centroids.
      codes: codes so far; written in place where the caller gives them away.
      phi: largest squared norm of a training subvector, for the inner-product metric, else None.
      start: as `reference.make_room` gives it: start + taken is at most S.
      taken: likewise, at most t.
      kv_layout: of `key_new`.

    Returns:
      A launch whose output is the codes [B * K, M, S], in the memory of the given ones.

    Source: CONTRACT.md, section 4.
    """
    batch, kv_heads, num_subspaces, capacity = codes.shape
    rows, num_new = batch * kv_heads, key_new.shape[token_axis(kv_layout)]
    tokens_per_program = 1 if num_new <= 8 else TOKENS_PER_ENCODER
    operands = [start, taken, key_new, codebooks.reshape(rows, *codebooks.shape[2:])]
    if phi is not None:
        operands.append(phi.reshape(rows, num_subspaces))
    return backend.Launch(
        functools.partial(
            append_kernel, kv_layout=kv_layout, tokens_per_program=tokens_per_program
        ),
        [*operands, codes.reshape(rows, num_subspaces, capacity)],
        programs=rows * num_subspaces * pl.cdiv(num_new, tokens_per_program),
        out_shape=[jax.ShapeDtypeStruct((rows, num_subspaces, capacity), np.uint8)],
        aliases={len(operands): 0},
    )
