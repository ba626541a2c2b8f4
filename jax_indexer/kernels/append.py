"""Appending: encode new keys against the codebooks and write their codes in place."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jaxtyping import Float

from jax_indexer.kernels import backend
from jax_indexer.kernels.codebook import dimension_tiles, tiles
from jax_indexer.kernels.step import Lengths, Step, raised_in, room_in
from jax_indexer.layout import dimension_of
from jax_indexer.state import PQIndex


class Inputs(NamedTuple):
    """New keys, and what they are encoded by."""

    before: Lengths  # the step
    key: Any  # [B, t, K, H] or [B, K, t, H]
    codebooks: Any  # [R, M, C, D']
    phi: Any  # f32[R, M] for the inner-product metric, else None
    codes: Any  # not read


class Outputs(NamedTuple):
    """u8[R, M, S] codes, in the memory of those before, and lengths after the step."""

    codes: Any
    after: Lengths


def append_kernel(program, inputs: Inputs, outputs: Outputs, *, step: Step, at_once: int):
    num_subspaces, num_centroids = step.config.num_subspaces, step.config.num_centroids
    dimensions = inputs.key.shape[3] // num_subspaces
    num_blocks = pl.cdiv(step.T, at_once)
    first_token = program % num_blocks * at_once
    subspace = program // num_blocks % num_subspaces
    kv_row = program // (num_blocks * num_subspaces)
    row, kv_head = kv_row // step.K, kv_row % step.K
    room, length = room_in(step, inputs.before, row)
    span = inputs.before.span(step)
    start = room.start if span is None else room.start - span.offset

    @pl.when((first_token == 0) & (subspace == 0) & (kv_head == 0))
    def _():
        outputs.after.lengths[row] = length
        if outputs.after.counts is not None:
            outputs.after.counts[row] = room.taken
        if outputs.after.high_water is not None:
            outputs.after.high_water[row] = raised_in(step, inputs.before, row)[1]

    centroid = jnp.arange(num_centroids, dtype=jnp.int32)
    one_tile = len(dimension_tiles(num_centroids, dimensions, step.tuning)) == 1
    read_tiles = functools.partial(
        tiles, inputs.codebooks, kv_row, subspace, dimensions, step.tuning
    )
    kept = list(read_tiles()) if one_tile else None  # in registers, for all tokens

    def squared_norm_and_distances(token: Array) -> tuple[Array, Array, Array]:
        norm = jnp.float32(0)
        not_finite = jnp.int32(0)
        distance = jnp.zeros(num_centroids, jnp.float32)
        for d, exists, tile in kept or read_tiles():
            h = dimension_of(subspace, d, num_subspaces, dimensions, step.config.grouping)
            place = (token, kv_head) if step.kv_layout == "BSKH" else (kv_head, token)
            part = backend.load(inputs.key.at[(row, *place, h)], mask=exists, other=0)
            part = part.astype(jnp.float32)
            difference = part[None, :] - tile
            distance += jnp.sum(difference * difference, axis=1)
            norm += jnp.sum(part * part)
            not_finite += jnp.sum(jnp.where(jnp.abs(part) < jnp.inf, 0, 1))
        return norm, not_finite, distance

    def encode(i, carry):
        token = first_token + i
        norm, not_finite, distance = squared_norm_and_distances(token)
        if inputs.phi is not None:
            extra = jnp.sqrt(jnp.maximum(inputs.phi[kv_row, subspace] - norm, 0))
            last = inputs.codebooks[kv_row, subspace, centroid, dimensions].astype(jnp.float32)
            distance += (extra - last) * (extra - last)
        distance = jnp.where(distance == distance, distance, jnp.inf)
        nearest = jnp.min(jnp.where(distance == jnp.min(distance), centroid, num_centroids))
        code = jnp.where(not_finite > 0, 0, nearest).astype(jnp.uint8)
        outputs.codes[kv_row, subspace, start + token] = code
        return carry

    tokens, not_mine = jnp.minimum(room.taken - first_token, at_once), 0
    if span is not None:  # other devices hold the tokens before and behind
        not_mine = jnp.maximum(-start - first_token, 0)
        tokens = jnp.minimum(tokens, step.S - start - first_token)
    lax.fori_loop(not_mine, tokens, encode, 0)


def append_launch(
    step: Step,
    key_new: Float[Array, "B _ _ H"],
    index: PQIndex,
    before: Lengths,
    layer: Array | None = None,
) -> backend.Launch:
    """The launch that encodes the new keys that each row takes and writes their codes.

    A token's distances are added in an order that depends on the codebook's shape alone, so its
    code is the same whether it comes alone or with a whole prompt.

    Source: CONTRACT.md, section 4.
    """
    at_once = 1 if step.T <= 8 else step.tuning.tokens_per_encoder
    num_subspaces, phi = step.config.num_subspaces, index.phi
    if step.config.metric != "ip":
        phi = None  # which is not read
    phi = None if phi is None else step.by_rows(phi)
    codes = step.by_rows(index.codes)
    followed = before.lengths, before.counts, before.page_table, layer
    of_rows = backend.follows((step.B,), np.int32, *followed)
    return backend.Launch(
        functools.partial(append_kernel, step=step, at_once=at_once),
        Inputs(
            before,
            key_new,
            step.by_rows(index.codebooks),
            phi,
            codes,
        ),
        Outputs(
            jax.ShapeDtypeStruct(codes.shape, np.uint8),
            Lengths(
                of_rows,
                None if before.counts is None else of_rows,
                high_water=None if before.high_water is None else of_rows,
            ),
        ),
        programs=step.R * num_subspaces * pl.cdiv(step.T, at_once),
        in_place=("codes",),
        state=("before.lengths", "before.high_water", "codebooks", "phi", "codes"),
        layer=layer,
    )
