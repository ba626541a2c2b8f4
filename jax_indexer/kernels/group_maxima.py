"""Group maxima: the best score of every few neighbouring tokens, in one pass over the codes."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Float, Int32, UInt8

from jax_indexer.config import IndexerConfig
from jax_indexer.kernels import backend
from jax_indexer.kernels.lookup_table import Tables
from jax_indexer.kernels.plan import always_attended
from jax_indexer.kernels.scores import Tile, for_each_tile, share_blocks


def group_maxima_kernel(
    lengths_ref,  # i32[B]
    table_ref,  # [R, lane groups, M * C, lanes]
    codes_ref,  # u8[R, M, S]
    *refs,  # i32[R, Q, groups] for each size of a group; [R, Q, S] weights if asked for
    config: IndexerConfig,
    groups: tuple[int, ...],
    **static,
):
    maxima_refs, weights_ref = refs[: len(groups)], None
    if len(refs) > len(groups):
        weights_ref = refs[-1]

    def visit(tile: Tile):
        if weights_ref is not None:
            _write_always_attended(weights_ref, tile, config)

        @pl.when(tile.in_play)
        def _():
            ranks = tile.ranks(table_ref, codes_ref, config)
            for group, maxima_ref in zip(groups, maxima_refs, strict=True):
                _write_maxima(maxima_ref, tile, ranks, group)

    for_each_tile(
        visit,
        lengths_ref,
        table_ref,
        codes_ref,
        config=config,
        all_blocks=weights_ref is not None,
        **static,
    )


def _write_maxima(maxima_ref, tile: Tile, ranks: list[Array], group: int) -> None:
    # A thread's own tokens first, which costs no exchange.
    own = min(group, tile.run)
    maxima = [
        functools.reduce(jnp.maximum, ranks[place : place + own])
        for place in range(0, tile.run, own)
    ]
    if group > tile.run:
        together = group // tile.run
        maxima = [jnp.max(maxima[0].reshape(tile.runs // together, together, tile.lanes), axis=1)]
    per_block = tile.size // group
    into = tile.number * per_block + len(maxima) * jnp.arange(
        per_block // len(maxima), dtype=jnp.int32
    )
    for place, maximum in enumerate(maxima):
        at = maxima_ref.at[tile.row, tile.query, (into + place)[:, None]]
        backend.store(at, maximum, mask=jnp.broadcast_to(tile.real, maximum.shape))


def _write_always_attended(weights_ref, tile: Tile, config: IndexerConfig) -> None:
    """Weights 1 at sink and window tokens, 0 at all others: the heavy ones follow."""
    position = tile.number * tile.size + jnp.arange(tile.size, dtype=jnp.int32)
    for lane in range(tile.lanes):
        attended = always_attended(tile.plan_of_lane(lane), position, config)
        weights = attended.astype(weights_ref.dtype)
        query = tile.lane_group * tile.lanes + lane
        there = (position < weights_ref.shape[2]) & (query < weights_ref.shape[1])
        backend.store(weights_ref.at[tile.row, query, position], weights, mask=there)


def group_maxima(
    tables: Tables,
    codes: UInt8[Array, "R M S"],
    lengths: Int32[Array, "B"],
    config: IndexerConfig,
    num_queries: int,
    num_query_tokens: int,
    groups: tuple[int, ...],
    weights_dtype: np.dtype | None,
    *,
    interpret: bool = False,
) -> tuple[Sequence[Int32[Array, "R Q _"]], Float[Array, "R Q S"] | None]:
    """The largest rank of the candidates in every group of neighbours, for some sizes of groups.

    Args:
      tables: look-up tables.
      codes: of all tokens; only their low bits count.
      lengths: tokens in the cache, clipped to 0..S.
      config: sizes.
      num_queries: Q; queries of a row are ordered by token, then by head.
      num_query_tokens: T.
      groups: sizes of groups, powers of two that divide a block.
      weights_dtype: of the dense weights; None for none.
      interpret: run on the CPU.

    Returns:
      For each size maxima of the groups that hold a candidate, and NOT_A_CANDIDATE for the others
      of a block that holds one; the other blocks are not written. And weights of the tokens that
      are always attended, or None.
    """
    rows, _, capacity = codes.shape
    share, num_warps = share_blocks(rows * tables.by_lane.shape[1], config.num_subspaces, capacity)
    shape = rows, num_queries
    out_shape = [
        jax.ShapeDtypeStruct((*shape, share.blocks * (share.runs * share.run // group)), np.int32)
        for group in groups
    ]
    if weights_dtype is not None:
        out_shape.append(jax.ShapeDtypeStruct((*shape, capacity), weights_dtype))
    outputs = backend.launch(
        functools.partial(
            group_maxima_kernel,
            config=config,
            num_query_tokens=num_query_tokens,
            num_queries=num_queries,
            groups=groups,
            share=share,
        ),
        lengths,
        tables.by_lane,
        codes,
        programs=rows * tables.by_lane.shape[1] * share.parts,
        out_shape=out_shape,
        num_warps=num_warps,
        interpret=interpret,
    )
    return outputs[: len(groups)], None if weights_dtype is None else outputs[-1]
