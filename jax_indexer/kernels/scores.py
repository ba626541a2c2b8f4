"""ADC scores: sum, over subspaces, of each key's look-up table entry."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jaxtyping import Float, Int32, UInt8

from jax_indexer.config import IndexerConfig
from jax_indexer.kernels import backend
from jax_indexer.kernels.lookup_table import Tables
from jax_indexer.kernels.plan import RowPlan, plan_row
from jax_indexer.kernels.tuning import score_tuning
from jax_indexer.reference import NOT_A_CANDIDATE, ordered

# Subspaces whose look-ups are written out one after the other; more of them are looped over, since
# compiling takes time that grows faster than the number of loads.
UNROLLED = 4


def ranks_of_runs(
    look_up: Callable[[Array], Array],
    codes_ref,
    config: IndexerConfig,
    *,
    row: Array,
    start: Array,
    wanted: Array,
    run: int,
    lanes: tuple[int, ...] = (),
) -> list[Array]:
    """Order of the scores of runs of tokens, as `reference.ordered` gives it.

    Entries are added in the order of the subspaces, wherever this is called (rules 3 and 7). A
    thread loads the codes of its run at once, and keeps to itself from there.

    Args:
      look_up: from int32[n] to the table's entries there: [n], or [n, lanes] of several queries.
      codes_ref: uint8[R, M, S].
      config: sizes.
      row: of the codes.
      start: int32[n], first tokens of the runs, multiples of `run`.
      wanted: bool[n], which runs to look at; the ranks of others have no meaning.
      run: tokens of a run, a power of two.
      lanes: (lanes,) where look_up reads entries of several queries.

    Returns:
      int32[n, *lanes] for each place of a run.
    """
    M, C, capacity = config.num_subspaces, config.num_centroids, codes_ref.shape[2]
    position = start[:, None] + jnp.arange(run, dtype=jnp.int32)[None, :]
    there = jnp.broadcast_to(wanted[:, None], position.shape)
    if capacity % run:
        there &= position < capacity

    def read_codes(m) -> list[Array]:
        codes = backend.load(codes_ref.at[row, m, position], mask=there, other=0)
        return [code.astype(jnp.int32) & (C - 1) for code in backend.split_columns(codes)]

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


class Tile(NamedTuple):
    """A block of a row's tokens, and the queries it is scored for.

    Attributes:
      row: its kv head's row.
      number: of the block in the row.
      lane_group: of the queries.
      query: their numbers in the row, [1, lanes].
      real: which of them exist, [1, lanes].
      plan: of each query; numbers, or [1, lanes] where they differ.
      latest: of the query that sees the most, whose candidates include all others'.
      runs: threads' runs of tokens in the block.
      run: tokens of a run.
    """

    row: Array
    number: Array
    lane_group: Array
    query: Array
    real: Array
    plan: RowPlan
    latest: RowPlan
    runs: int
    run: int

    @property
    def lanes(self) -> int:
        """How many queries."""
        return self.query.shape[1]

    @property
    def size(self) -> int:
        """Tokens of the block."""
        return self.runs * self.run

    @property
    def start(self) -> Array:
        """int32[runs], the first token of each run."""
        return self.number * self.size + self.run * jnp.arange(self.runs, dtype=jnp.int32)

    @property
    def in_play(self) -> Array:
        """Whether the block holds a candidate."""
        start = self.number * self.size
        return (start < self.latest.last) & (start + self.size > self.latest.first)

    def ranks(self, table_ref, codes_ref, config: IndexerConfig) -> list[Array]:
        """For each place of a run: [runs, lanes] ranks of the tokens there."""
        start = self.start
        lane = jnp.arange(self.lanes, dtype=jnp.int32)[None, :]

        def look_up(entry: Array) -> Array:
            return backend.load(table_ref.at[self.row, self.lane_group, entry[:, None], lane])

        ranks = ranks_of_runs(
            look_up,
            codes_ref,
            config,
            row=self.row,
            start=start,
            wanted=(start < self.latest.last) & (start + self.run > self.latest.first),
            run=self.run,
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

    def plan_of_lane(self, lane: int) -> RowPlan:
        """The plan of one query, in numbers."""
        if not self.plan.first.ndim:
            return self.plan
        one = jnp.arange(self.lanes, dtype=jnp.int32)[None, :] == lane
        return RowPlan(*(jnp.sum(jnp.where(one, x, 0)) for x in self.plan))


class Share(NamedTuple):
    """How blocks of tokens are shared out: a program has every `parts`-th block of a row.

    A table of many subspaces fills a good part of an L1 cache, so a program keeps to one row, and
    there are few of them.

    Attributes:
      runs: threads' runs of tokens in a block.
      run: tokens of a run.
      blocks: of a row.
      parts: programs that share the blocks of a row and a group of lanes.
    """

    runs: int
    run: int
    blocks: int
    parts: int


def share_blocks(rows: int, num_subspaces: int, capacity: int) -> tuple[Share, int]:
    """The share of each program and its warps, for `rows` rows and groups of lanes."""
    runs, run, num_warps, programs = score_tuning(num_subspaces)
    blocks = pl.cdiv(capacity, runs * run)
    each = max(round(rows * blocks / programs), 1)
    return Share(runs, run, blocks, pl.cdiv(blocks, each)), num_warps


def for_each_tile(
    visit: Callable[[Tile], None],
    lengths_ref,
    table_ref,
    codes_ref,
    *,
    config: IndexerConfig,
    num_query_tokens: int,
    num_queries: int,
    share: Share,
    all_blocks: bool,
) -> None:
    """Calls `visit` for the blocks of this program: all, or those that hold a candidate."""
    num_rows, _, capacity = codes_ref.shape
    _, lane_groups, _, lanes = table_ref.shape
    program = backend.program_id()
    part = lax.rem(program, share.parts)
    lane_group = lax.rem(lax.div(program, share.parts), lane_groups)
    row = lax.div(program, share.parts * lane_groups)
    query = lane_group * lanes + jnp.arange(lanes, dtype=jnp.int32)[None, :]
    length = lengths_ref[lax.div(row, num_rows // lengths_ref.shape[0])]
    plan_of = functools.partial(
        plan_row,
        length,
        config=config,
        num_query_tokens=num_query_tokens,
        capacity=capacity,
    )
    heads = num_queries // num_query_tokens
    last_query = jnp.minimum(lane_group * lanes + lanes, num_queries) - 1
    latest = plan_of(lax.div(last_query, heads))
    plan = latest
    if num_query_tokens > 1:
        plan = plan_of(lax.div(jnp.minimum(query, num_queries - 1), heads))
    size = share.runs * share.run
    if all_blocks:
        first, end = jnp.int32(0), jnp.int32(share.blocks)
    else:
        first = lax.div(latest.first, size)
        end = jnp.where(latest.num_heavy > 0, lax.div(latest.last + (size - 1), size), first)

    def step(i, carry):
        number = part + i * share.parts
        visit(
            Tile(
                row,
                number,
                lane_group,
                query,
                query < num_queries,
                plan,
                latest,
                share.runs,
                share.run,
            )
        )
        return carry

    def turns(block):
        return lax.div(jnp.maximum(block - part + (share.parts - 1), 0), share.parts)

    lax.fori_loop(turns(first), turns(end), step, 0)


def rankable(rank: Int32[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Floats in the order of the ranks, which any top-k orders alike; no candidate is -inf.

    Negative numbers move up by one unit in the last place, so that -inf becomes the lowest finite
    number, and NaN becomes -inf, as what is no candidate does. Order and ties are kept.
    """
    bits = jnp.where(rank < 0, (-rank - 1) | np.int32(-(2**31)), rank)
    number = lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(rank < -np.int32(0x7F800000), -jnp.inf, number)


def score_kernel(
    lengths_ref,  # i32[B]
    table_ref,  # [R, lane groups, M * C, lanes]
    codes_ref,  # u8[R, M, S]
    out_ref,  # f32[R, Q, S]
    *,
    config: IndexerConfig,
    **static,
):
    capacity = codes_ref.shape[2]

    def write(tile: Tile, of_lane: Callable[[int], Array]):
        position = tile.start[:, None] + jnp.arange(tile.run, dtype=jnp.int32)[None, :]
        for lane in range(tile.lanes):
            query = tile.lane_group * tile.lanes + lane
            there = jnp.broadcast_to((tile.start < capacity)[:, None], position.shape)
            if capacity % tile.run:
                there &= position < capacity
            into = out_ref.at[tile.row, query, position]
            backend.store(into, of_lane(lane), mask=there & (query < out_ref.shape[1]))

    def visit(tile: Tile):
        @pl.when(tile.in_play)
        def _():
            ranks = tile.ranks(table_ref, codes_ref, config)
            by_lane = [backend.split_columns(rankable(rank)) for rank in ranks]
            write(tile, lambda lane: backend.join_columns([columns[lane] for columns in by_lane]))

        @pl.when(~tile.in_play)
        def _():
            nothing = jnp.full((tile.runs, tile.run), -jnp.inf, jnp.float32)
            write(tile, lambda lane: nothing)

    for_each_tile(
        visit, lengths_ref, table_ref, codes_ref, config=config, all_blocks=True, **static
    )


def rankable_scores(
    tables: Tables,
    codes: UInt8[Array, "R M S"],
    lengths: Int32[Array, "B"],
    config: IndexerConfig,
    num_queries: int,
    num_query_tokens: int,
    *,
    interpret: bool = False,
) -> Float[Array, "R Q S"]:
    """Scores of the candidates, in the form that `rankable` gives them; -inf elsewhere.

    Args:
      tables: look-up tables.
      codes: of all tokens; only their low bits count.
      lengths: tokens in the cache, clipped to 0..S.
      config: sizes.
      num_queries: Q; queries of a row are ordered by token, then by head.
      num_query_tokens: T.
      interpret: run on the CPU.

    Returns:
      float32 numbers in the order of the scores, with the same ties.

    Source: CONTRACT.md, rules 2, 3 and 4.
    """
    rows, _, capacity = codes.shape
    share, num_warps = share_blocks(rows * tables.by_lane.shape[1], config.num_subspaces, capacity)
    (scores,) = backend.launch(
        functools.partial(
            score_kernel,
            config=config,
            num_query_tokens=num_query_tokens,
            num_queries=num_queries,
            share=share,
        ),
        lengths,
        tables.by_lane,
        codes,
        programs=rows * tables.by_lane.shape[1] * share.parts,
        out_shape=[jax.ShapeDtypeStruct((rows, num_queries, capacity), np.float32)],
        num_warps=num_warps,
        interpret=interpret,
    )
    return scores
