"""Appending: encode new keys against the codebooks and write their codes in place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jaxtyping import Float, Int32, UInt8

from jax_indexer.config import Metric
from jax_indexer.kernels import backend
from jax_indexer.kernels.codebook import dimension_tiles, tiles
from jax_indexer.kernels.tuning import CODEBOOK_WARPS, TOKENS_PER_ENCODER
from jax_indexer.layout import KVLayout


def append_kernel(
    lengths_ref,  # i32[B]
    counts_ref,  # i32[B]
    key_ref,  # [B, t, K, H] or [B, K, t, H]
    codebooks_ref,  # [B * K, M, C, D']
    phi_ref,  # f32[B * K, M], not read for the euclidean metric
    _codes_ref,  # the codes before, in the same memory as the codes after
    codes_ref,  # u8[B * K, M, S]
    new_lengths_ref,  # i32[B]
    *,
    metric: Metric,
    kv_layout: KVLayout,
    tokens_per_program: int,
):
    num_rows, num_subspaces, capacity = codes_ref.shape
    batch = lengths_ref.shape[0]
    kv_heads = num_rows // batch
    num_new = key_ref.shape[1 if kv_layout == "BSKH" else 2]
    dimensions = key_ref.shape[3] // num_subspaces
    num_centroids = codebooks_ref.shape[2]
    num_blocks = pl.cdiv(num_new, tokens_per_program)

    program = pl.program_id(0)
    first_token = program % num_blocks * tokens_per_program
    subspace = program // num_blocks % num_subspaces
    row = program // (num_blocks * num_subspaces)
    b, kv_head = row // kv_heads, row % kv_heads

    length = lengths_ref[b]
    start = jnp.minimum(jnp.maximum(length, 0), capacity)
    count = jnp.minimum(jnp.maximum(counts_ref[b], 0), num_new)
    count = jnp.where(start + count <= capacity, count, 0)

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
        if metric == "ip":
            extra = jnp.sqrt(jnp.maximum(phi_ref[row, subspace] - norm, 0))
            last = codebooks_ref[row, subspace, centroid, dimensions].astype(jnp.float32)
            distance += (extra - last) * (extra - last)
        distance = jnp.where(distance == distance, distance, jnp.inf)
        nearest = jnp.min(jnp.where(distance == jnp.min(distance), centroid, num_centroids))
        code = jnp.where(not_finite > 0, 0, nearest)
        codes_ref[row, subspace, start + token] = code.astype(jnp.uint8)
        return carry

    lax.fori_loop(0, jnp.minimum(count - first_token, tokens_per_program), encode, 0)

    @pl.when(program % (kv_heads * num_subspaces * num_blocks) == 0)
    def _():
        new_lengths_ref[b] = jnp.where(count > 0, start + count, length)


def append_tokens(
    key_new: Float[Array, "B _ _ H"],
    codebooks: Float[Array, "B K M C D_"],
    codes: UInt8[Array, "B K M S"],
    lengths: Int32[Array, "B"],
    phi: Float[Array, "B K M"] | None,
    counts: Int32[Array, "B"] | None,
    *,
    metric: Metric,
    kv_layout: KVLayout,
    interpret: bool = False,
) -> tuple[UInt8[Array, "B K M S"], Int32[Array, "B"]]:
    """Writes the codes of each row's first `counts` new tokens behind its last, in one kernel.

    A token's distances are added in an order that depends on the codebook's shape alone, so its
    code is the same whether it comes alone or with a whole prompt.

    Args:
      key_new: [B, t, K, H] ("BSKH") or [B, K, t, H] ("BKSH"), keys to encode.
      codebooks: centroids.
      codes: codes so far; written in place where the caller gives them away.
      lengths: tokens so far, clipped to 0..S.
      phi: largest squared norm of a training subvector, for the inner-product metric.
      counts: how many of the t tokens each row takes, clipped to 0..t; None for all.
      metric: "euclidean" or "ip".
      kv_layout: of `key_new`.
      interpret: run on the CPU.

    Returns:
      codes and lengths; those of a row that would pass its capacity are what they were.

    Source: CONTRACT.md, section 4.
    """
    batch, kv_heads, num_subspaces, capacity = codes.shape
    num_new = key_new.shape[1 if kv_layout == "BSKH" else 2]
    tokens_per_program = 1 if num_new <= 8 else TOKENS_PER_ENCODER
    rows = batch * kv_heads
    kernel = functools.partial(
        append_kernel,
        metric=metric,
        kv_layout=kv_layout,
        tokens_per_program=tokens_per_program,
    )
    new_codes, new_lengths = backend.launch(
        kernel,
        lengths,
        jnp.full(batch, num_new, jnp.int32) if counts is None else counts,
        key_new,
        codebooks.reshape(rows, *codebooks.shape[2:]),
        jnp.zeros((rows, num_subspaces), jnp.float32)
        if phi is None
        else phi.reshape(rows, num_subspaces),
        codes.reshape(rows, num_subspaces, capacity),
        programs=rows * num_subspaces * pl.cdiv(num_new, tokens_per_program),
        out_shape=[
            jax.ShapeDtypeStruct((rows, num_subspaces, capacity), np.uint8),
            jax.ShapeDtypeStruct((batch,), np.int32),
        ],
        aliases={5: 0},
        num_warps=CODEBOOK_WARPS,
        interpret=interpret,
    )
    return new_codes.reshape(codes.shape), new_lengths
