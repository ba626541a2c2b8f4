"""ADC scores: sum, over subspaces, of each key's look-up table entry."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jaxtyping import Float, Int32, UInt8

from jax_indexer.kernels import backend
from jax_indexer.kernels.lookup_table import Tables
from jax_indexer.kernels.step import Lengths, QueryPlan, Step, plan_latest, plan_query
from jax_indexer.reference import NOT_A_CANDIDATE, ordered

# Subspaces whose look-ups are written out one after the other; more of them are looped over, since
# compiling takes time that grows faster than the number of loads.
UNROLLED = 4


def ranks_of_runs(
    step: Step,
    look_up: Callable[[Array], Array],
    codes: Any,
    *,
    kv_row: Array,
    start: Array,
    wanted: Array,
    run: int,
    lanes: tuple[int, ...] = (),
) -> list[Array]:
    """Order of the scores of runs of tokens, as `reference.ordered` gives it.

    Entries are added in the order of the subspaces, wherever this is called (rules 3 and 7). A
    thread loads the codes of its run at once, and keeps to itself from there.

    Args:
      step: of the launch.
      look_up: from int32[n] to the table's entries there: [n], or [n, lanes] of several queries.
      codes: uint8[R, M, S].
      kv_row: of the codes.
      start: int32[n], first tokens of the runs, multiples of `run`.
      wanted: bool[n], which runs to look at; the ranks of others have no meaning.
      run: tokens of a run, a power of two.
      lanes: (lanes,) where look_up reads entries of several queries.

    Returns:
      int32[n, *lanes] for each place of a run.
    """
    M, C = step.config.num_subspaces, step.config.num_centroids
    position = start[:, None] + jnp.arange(run, dtype=jnp.int32)[None, :]
    there = jnp.broadcast_to(wanted[:, None], position.shape)
    if step.S % run:
        there &= position < step.S

    def read_codes(m) -> list[Array]:
        code = backend.load(codes.at[kv_row, m, position], mask=there, other=0)
        return [column.astype(jnp.int32) & (C - 1) for column in backend.split_columns(code)]

    def add(m, totals: list[Array]) -> list[Array]:
        return [
            total + look_up(m * C + code).astype(jnp.float32)
            for total, code in zip(totals, read_codes(m), strict=True)
        ]

    def add_several(i, totals: list[Array]) -> list[Array]:
        for m in range(UNROLLED):
            totals = add(i * UNROLLED + m, totals)
        return totals

    # From 0.0 on, so that no score is -0.0.
    totals = [jnp.zeros((*start.shape, *lanes), jnp.float32)] * run
    looped = M // UNROLLED if M > UNROLLED else 0
    if looped:
        totals = lax.fori_loop(0, looped, add_several, totals)
    for m in range(looped * UNROLLED, M):
        totals = add(m, totals)
    return [ordered(total) for total in totals]


class Inputs(NamedTuple):
    """Of a pass over the codes."""

    lengths: Lengths
    table: Any  # [R, lane groups, M * C, lanes]
    codes: Any  # u8[R, M, S]


class Tile(NamedTuple):
    """A block of a kv row's tokens, and the queries it is scored for.

    Attributes:
      step, inputs: of the launch.
      share: of the program.
      kv_row: whose tokens.
      number: of the block.
      lane_group: of the queries.
      query: their numbers, [1, lanes].
      plan: of each query; numbers, or [1, lanes] where they differ.
      latest: of the query that sees the most, whose candidates include all others'.
    """

    step: Step
    inputs: Inputs
    share: "Share"
    kv_row: Array
    number: Array
    lane_group: Array
    query: Array
    plan: QueryPlan
    latest: QueryPlan

    @property
    def lanes(self) -> int:
        """How many queries."""
        return self.query.shape[1]

    @property
    def start(self) -> Array:
        """int32[runs], the first token of each run."""
        share = self.share
        return self.number * share.block + share.run * jnp.arange(share.runs, dtype=jnp.int32)

    @property
    def in_play(self) -> Array:
        """Whether the block holds a candidate."""
        start = self.number * self.share.block
        return (start < self.latest.last) & (start + self.share.block > self.latest.first)

    def ranks(self) -> list[Array]:
        """For each place of a run: [runs, lanes] ranks of the tokens there."""
        start, run = self.start, self.share.run
        lane = jnp.arange(self.lanes, dtype=jnp.int32)[None, :]

        def look_up(entry: Array) -> Array:
            table = self.inputs.table
            return backend.load(table.at[self.kv_row, self.lane_group, entry[:, None], lane])

        ranks = ranks_of_runs(
            self.step,
            look_up,
            self.inputs.codes,
            kv_row=self.kv_row,
            start=start,
            wanted=(start < self.latest.last) & (start + run > self.latest.first),
            run=run,
            lanes=(self.lanes,),
        )
        position = start[:, None]
        return [
            jnp.where(
                (position + place >= self.plan.first) & (position + place < self.plan.last),
                rank,
                NOT_A_CANDIDATE,
            )
            for place, rank in enumerate(ranks)
        ]


class Share(NamedTuple):
    """How blocks of tokens are shared out: a program has every `parts`-th block of a kv row.

    A table of many subspaces fills a good part of an L1 cache, so a program keeps to one kv row,
    and there are few of them.

    Attributes:
      runs: threads' runs of tokens in a block.
      run: tokens of a run.
      blocks: of a kv row.
      parts: programs that share the blocks of a kv row and a group of lanes.
      lane_groups: of a kv row.
      warps: of a program.
    """

    runs: int
    run: int
    blocks: int
    parts: int
    lane_groups: int
    warps: int

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return self.runs * self.run


def share_of(step: Step, tables: Tables) -> Share:
    """The share of each program."""
    tuned, lane_groups = step.tuning.of_scores(step.config.num_subspaces), tables.by_lane.shape[1]
    blocks = pl.cdiv(step.S, tuned.runs * tuned.run)
    each = max(round(step.R * lane_groups * blocks / tuned.programs), 1)
    parts = pl.cdiv(blocks, each)
    return Share(tuned.runs, tuned.run, blocks, parts, lane_groups, tuned.warps)


def for_each_tile(
    program,
    inputs: Inputs,
    visit: Callable[[Tile], None],
    *,
    step: Step,
    share: Share,
    all_blocks: bool,
) -> None:
    """Calls `visit` for the blocks of this program: all, or those that hold a candidate."""
    lanes, size = inputs.table.shape[3], share.block
    part = lax.rem(program, share.parts)
    lane_group = lax.rem(lax.div(program, share.parts), share.lane_groups)
    kv_row = lax.div(program, share.parts * share.lane_groups)
    query = lane_group * lanes + jnp.arange(lanes, dtype=jnp.int32)[None, :]
    last_query = jnp.minimum(lane_group * lanes + lanes, step.Q) - 1
    plan = latest = plan_latest(step, inputs.lengths, kv_row, lax.div(last_query, step.G))
    if step.T > 1:
        token = lax.div(jnp.minimum(query, step.Q - 1), step.G)
        plan = plan_query(step, inputs.lengths, kv_row, token)
    if all_blocks:
        first, end = jnp.int32(0), jnp.int32(share.blocks)
    else:
        first = lax.div(latest.first, size)
        end = jnp.where(latest.num_heavy > 0, lax.div(latest.last + (size - 1), size), first)

    def turn(i, carry):
        number = part + i * share.parts
        visit(Tile(step, inputs, share, kv_row, number, lane_group, query, plan, latest))
        return carry

    def turns(block):
        return lax.div(jnp.maximum(block - part + (share.parts - 1), 0), share.parts)

    lax.fori_loop(turns(first), turns(end), turn, 0)


def rankable(rank: Int32[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Floats in the order of the ranks, which any top-k orders alike; no candidate is -inf.

    Negative numbers move up by one unit in the last place, so that -inf becomes the lowest finite
    number, and NaN becomes -inf, as what is no candidate does. Order and ties are kept.
    """
    bits = jnp.where(rank < 0, (-rank - 1) | np.int32(-(2**31)), rank)
    number = lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(rank < -np.int32(0x7F800000), -jnp.inf, number)


class Outputs(NamedTuple):
    """f32[R, Q, S] scores as `rankable` gives them."""

    scores: Any


def score_kernel(program, inputs: Inputs, outputs: Outputs, *, step: Step, share: Share):
    def write(tile: Tile, of_lane: Callable[[int], Array]):
        position = tile.start[:, None] + jnp.arange(share.run, dtype=jnp.int32)[None, :]
        for lane in range(tile.lanes):
            query = tile.lane_group * tile.lanes + lane
            there = jnp.broadcast_to((tile.start < step.S)[:, None], position.shape)
            if step.S % share.run:
                there &= position < step.S
            into = outputs.scores.at[tile.kv_row, query, position]
            backend.store(into, of_lane(lane), mask=there & (query < step.Q))

    def visit(tile: Tile):
        @pl.when(tile.in_play)
        def _():
            by_lane = [backend.split_columns(rankable(rank)) for rank in tile.ranks()]
            write(tile, lambda lane: backend.join_columns([columns[lane] for columns in by_lane]))

        @pl.when(~tile.in_play)
        def _():
            nothing = jnp.full((share.runs, share.run), -jnp.inf, jnp.float32)
            write(tile, lambda lane: nothing)

    for_each_tile(program, inputs, visit, step=step, share=share, all_blocks=True)


def rankable_scores(
    step: Step,
    tables: Tables,
    codes: UInt8[Array, "*layers R M S"],
    lengths: Lengths,
    layer: Array | None = None,
) -> Float[Array, "R Q S"]:
    """Scores of the candidates in the form that `rankable` gives them; -inf elsewhere.

    Source: CONTRACT.md, rules 2, 3 and 4.
    """
    share = share_of(step, tables)
    what = backend.Launch(
        functools.partial(score_kernel, step=step, share=share),
        Inputs(lengths, tables.by_lane, codes),
        Outputs(jax.ShapeDtypeStruct((step.R, step.Q, step.S), np.float32)),
        programs=step.R * share.lane_groups * share.parts,
        state=("codes",),
        layer=layer,
    )
    return backend.launch(what, num_warps=share.warps).scores
