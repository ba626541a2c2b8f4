"""Group maxima: the best score of every few neighbouring tokens, in one pass over the codes."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Int32, UInt8

from jax_indexer.kernels import backend
from jax_indexer.kernels.lookup_table import Tables
from jax_indexer.kernels.scores import Inputs, Share, Tile, for_each_tile, share_of
from jax_indexer.kernels.step import Lengths, Step


class Outputs(NamedTuple):
    """i32[R, Q, groups] for each size of a group."""

    maxima: tuple[Any, ...]


def group_maxima_kernel(
    program, inputs: Inputs, outputs: Outputs, *, step: Step, share: Share, groups: tuple[int, ...]
):
    def visit(tile: Tile):
        @pl.when(tile.in_play)
        def _():
            ranks = tile.ranks()
            for group, maxima in zip(groups, outputs.maxima, strict=True):
                _write_maxima(maxima, tile, ranks, group)

    for_each_tile(program, inputs, visit, step=step, share=share, all_blocks=False)


def _write_maxima(maxima_ref: Any, tile: Tile, ranks: list[Array], group: int) -> None:
    # A thread's own tokens first, which costs no exchange.
    runs, run = tile.share.runs, tile.share.run
    own = min(group, run)
    maxima = [
        functools.reduce(jnp.maximum, ranks[place : place + own]) for place in range(0, run, own)
    ]
    if group > run:
        together = group // run
        maxima = [jnp.max(maxima[0].reshape(runs // together, together, tile.lanes), axis=1)]
    per_block = tile.share.block // group
    into = tile.number * per_block + len(maxima) * jnp.arange(
        per_block // len(maxima), dtype=jnp.int32
    )
    real = tile.query < tile.step.Q
    for place, maximum in enumerate(maxima):
        at = maxima_ref.at[tile.kv_row, tile.query, (into + place)[:, None]]
        backend.store(at, maximum, mask=jnp.broadcast_to(real, maximum.shape))


def group_maxima(
    step: Step,
    tables: Tables,
    codes: UInt8[Array, "*layers R M S"],
    lengths: Lengths,
    groups: tuple[int, ...],
    layer: Array | None = None,
) -> tuple[Int32[Array, "R Q _"], ...]:
    """The largest rank of the candidates in every group of neighbours, for some sizes of groups.

    Args:
      step: the step.
      tables: look-up tables.
      codes: of all tokens; only their low bits count.
      lengths: of the rows.
      groups: sizes of groups, powers of two that divide a block.
      layer: of the codes, None where they have no axis of layers.

    Returns:
      For each size maxima of the groups that hold a candidate, and NOT_A_CANDIDATE for the others
      of a block that holds one; the other blocks are not written.
    """
    share = share_of(step, tables)
    shapes = (
        jax.ShapeDtypeStruct((step.R, step.Q, share.blocks * (share.block // group)), np.int32)
        for group in groups
    )
    what = backend.Launch(
        functools.partial(group_maxima_kernel, step=step, share=share, groups=groups),
        Inputs(lengths, tables.by_lane, codes),
        Outputs(tuple(shapes)),
        programs=step.R * share.lane_groups * share.parts,
        state=("codes",),
        layer=layer,
    )
    return backend.launch(what, num_warps=share.warps).maxima
