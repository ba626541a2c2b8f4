"""The sparse index: lists, counts and dense weights, from ranked scores and the cut among them."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jaxtyping import Float, Int32

from jax_indexer.config import IndexerConfig
from jax_indexer.kernels import backend
from jax_indexer.kernels.best import Ranks, find_cut, number_of
from jax_indexer.kernels.codebook import power_of_2_from
from jax_indexer.kernels.plan import RowPlan, plan_query
from jax_indexer.kernels.tuning import INDEX_BLOCK, INDEX_RUN, INDEX_WARPS
from jax_indexer.reference import NOT_A_CANDIDATE, ordered

# Two counts in one integer, so that one sum or prefix sum serves both: a block's tokens above the
# cut in the high bits, those at it in the low ones.
ABOVE_SHIFT = 16
AT_MASK = (1 << ABOVE_SHIFT) - 1


class _Program(NamedTuple):
    """What a program works on; a thread holds neighbouring tokens, INDEX_RUN of them."""

    row: Array
    query: Array
    block: Array
    position: Array  # [threads, INDEX_RUN]
    plan: RowPlan


def _program(lengths_ref, scores_ref, block: int, config, num_query_tokens: int) -> _Program:
    num_rows, num_queries, capacity = scores_ref.shape
    num_blocks = pl.cdiv(capacity, block)
    program = backend.program_id()
    query = program // num_blocks % num_queries
    row = program // (num_blocks * num_queries)
    plan = plan_query(
        lengths_ref,
        row,
        query,
        (num_rows, num_queries),
        config=config,
        num_query_tokens=num_query_tokens,
        capacity=capacity,
    )
    run = program % num_blocks * block + INDEX_RUN * jnp.arange(block // INDEX_RUN, dtype=jnp.int32)
    position = run[:, None] + jnp.arange(INDEX_RUN, dtype=jnp.int32)[None, :]
    return _Program(row, query, program % num_blocks, position, plan)


def _scores_at(scores_ref, row, query, position: Array, plan: RowPlan) -> tuple[Array, Array]:
    """Scores of the candidates among some tokens, and which these are."""
    candidate = (position >= plan.first) & (position < plan.last)
    score = backend.load(scores_ref.at[row, query, position], mask=candidate, other=0)
    return score, candidate


def _marks(score: Array, candidate: Array, cut: Array) -> list[Array]:
    """For each place of a run: 1 << ABOVE_SHIFT for candidates above the cut, 1 for those at it."""
    at = (candidate & (score == cut)).astype(jnp.int32)
    return backend.split_columns(jnp.where(candidate & (score > cut), 1 << ABOVE_SHIFT, at))


def _against_cut(scores_ref, cut_ref, p: _Program) -> list[Array]:
    score, candidate = _scores_at(scores_ref, p.row, p.query, p.position, p.plan)
    return _marks(score, candidate, cut_ref[p.row, p.query, cut_ref.shape[2] - 1])


def count_kernel(
    lengths_ref,  # i32[B]
    scores_ref,  # f32[R, Q, S]
    cut_ref,  # f32[R, Q, k], the last of which is the cut
    counts_ref,  # i32[R, Q, blocks]
    *,
    config: IndexerConfig,
    num_query_tokens: int,
    block: int,
):
    p = _program(lengths_ref, scores_ref, block, config, num_query_tokens)
    counts_ref[p.row, p.query, p.block] = jnp.sum(sum(_against_cut(scores_ref, cut_ref, p)))


def verify_cut_kernel(
    lengths_ref,  # i32[B]
    scores_ref,  # f32[R, Q, S]
    given_ref,  # f32[R, Q, k], the last of which should be the cut
    _counts_before_ref,
    counts_ref,  # i32[R, Q, blocks], for the cut given, in the memory of those before
    cut_ref,  # f32[R, Q, 1]
    *,
    config: IndexerConfig,
    num_query_tokens: int,
    block: int,
    interpret: bool,
):
    """Takes over a cut that the counts prove, or finds it and counts again."""
    num_rows, num_queries, capacity = scores_ref.shape
    num_blocks = counts_ref.shape[2]
    program = backend.program_id()
    row, query = program // num_queries, program % num_queries
    plan = plan_query(
        lengths_ref,
        row,
        query,
        (num_rows, num_queries),
        config=config,
        num_query_tokens=num_query_tokens,
        capacity=capacity,
    )
    number = jnp.arange(power_of_2_from(num_blocks), dtype=jnp.int32)
    counts = backend.load(counts_ref.at[row, query, number], mask=number < num_blocks, other=0)
    num_above, num_at = jnp.sum(counts >> ABOVE_SHIFT), jnp.sum(counts & AT_MASK)
    is_wrong = (num_above > plan.num_heavy) | (num_above + num_at < plan.num_heavy)

    @pl.when(~is_wrong)
    def _():
        cut_ref[row, query, 0] = given_ref[row, query, given_ref.shape[2] - 1]

    @pl.when(is_wrong)
    def _():
        threads = block // INDEX_RUN

        def scores_at(run) -> tuple[Array, Array]:
            position = run[:, None] + jnp.arange(INDEX_RUN, dtype=jnp.int32)[None, :]
            return _scores_at(scores_ref, row, query, position, plan)

        def read(run):
            score, candidate = scores_at(run)
            rank = jnp.where(candidate, ordered(score), NOT_A_CANDIDATE)
            return backend.split_columns(rank), run

        ranks = Ranks(read, threads, INDEX_RUN, plan.last, capacity)
        least, most = ranks.extremes()
        candidates = plan.last - plan.first
        found = find_cut(ranks, plan.num_heavy, least, most + 1, candidates, slack=0)
        cut = number_of(found.lowest)
        cut_ref[row, query, 0] = cut
        backend.barrier(interpret)

        def count(i, carry):
            marks = _marks(*scores_at(ranks.starts(i)), cut)
            counts_ref[row, query, i] = jnp.sum(sum(marks[1:], marks[0]))
            return carry

        lax.fori_loop(0, num_blocks, count, 0)


def sparse_index_kernel(
    lengths_ref,  # i32[B]
    scores_ref,  # f32[R, Q, S]
    cut_ref,  # f32[R, Q, 1]
    block_counts_ref,  # i32[R, Q, blocks]
    indices_ref,  # i32[R, Q, P]
    counts_ref,  # i32[R, Q]
    weights_ref=None,  # [R, Q, S]
    *,
    config: IndexerConfig,
    num_query_tokens: int,
    block: int,
):
    capacity, num_blocks, list_size = (
        scores_ref.shape[2],
        block_counts_ref.shape[2],
        indices_ref.shape[2],
    )
    p = _program(lengths_ref, scores_ref, block, config, num_query_tokens)
    plan = p.plan

    # All entries but the heavy ones follow from the length; each program of the row writes a share.
    # A slot that is not written lies behind the list: interpret mode writes back what it read.
    share = power_of_2_from(pl.cdiv(list_size, num_blocks))
    slot = p.block * share + jnp.arange(share, dtype=jnp.int32)
    entry = jnp.where(slot < plan.num_sink, slot, plan.visible - plan.num_listed + slot)
    entry = jnp.where(slot < plan.num_listed, entry, -1)
    is_heavy = (slot >= plan.num_sink) & (slot < plan.num_sink + plan.num_heavy)
    mine = (slot < list_size) & ~is_heavy
    slot = jnp.where(mine, slot, list_size)
    backend.store(indices_ref.at[p.row, p.query, slot], entry, mask=mine)

    @pl.when(p.block == 0)
    def _():
        counts_ref[p.row, p.query] = plan.num_listed

    def write_weights(heavy):
        if weights_ref is not None:
            window = (p.position < plan.visible) & (p.position >= plan.visible - config.window_size)
            listed = (heavy > 0) | window | (p.position < plan.num_sink)
            weights = weights_ref.at[p.row, p.query, p.position]
            backend.store(weights, listed.astype(weights_ref.dtype), mask=p.position < capacity)

    own = block_counts_ref[p.row, p.query, p.block]

    @pl.when(own > 0)
    def _():
        marks = _against_cut(scores_ref, cut_ref, p)
        other = jnp.arange(power_of_2_from(num_blocks), dtype=jnp.int32)
        packed = backend.load(
            block_counts_ref.at[p.row, p.query, other], mask=other < num_blocks, other=0
        )
        earlier = other < p.block
        num_above = jnp.sum(packed >> ABOVE_SHIFT)
        above_before = jnp.sum(jnp.where(earlier, packed >> ABOVE_SHIFT, 0))
        at_before = jnp.sum(jnp.where(earlier, packed & AT_MASK, 0))
        ties_to_take = plan.num_heavy - num_above

        of_run = sum(marks)
        within = jnp.cumsum(of_run) - of_run
        chosen = []
        for mark, position in zip(marks, backend.split_columns(p.position), strict=True):
            within += mark
            ties = at_before + (within & AT_MASK)
            heavy = (mark > 1) | ((mark == 1) & (ties <= ties_to_take))
            winner = above_before + (within >> ABOVE_SHIFT) + jnp.minimum(ties, ties_to_take) - 1
            slot = jnp.where(heavy, plan.num_sink + winner, list_size)
            backend.store(indices_ref.at[p.row, p.query, slot], position, mask=heavy)
            chosen.append(heavy.astype(jnp.int32))
        write_weights(backend.join_columns(chosen))

    @pl.when(own == 0)
    def _():
        write_weights(jnp.zeros(p.position.shape, jnp.int32))


def sparse_index(
    scores: Float[Array, "R Q S"],
    cut: Float[Array, "R Q k"],
    lengths: Int32[Array, "B"],
    config: IndexerConfig,
    num_query_tokens: int,
    weights_dtype: np.dtype | None,
    *,
    interpret: bool = False,
) -> tuple[Int32[Array, "R Q P"], Int32[Array, "R Q"], Float[Array, "R Q S"] | None]:
    """Writes lists in ascending order by counting: nothing is sorted.

    A first kernel counts, block by block, the candidates above the cut and those at it. A second
    one sees whether they are as many as they must be, and finds the cut itself where they are not.
    A third puts each winner into its slot: the number of winners before it. Ties at the cut are
    taken in the order of their positions as long as there are slots.

    Args:
      scores: as `rankable_scores` returns them.
      cut: its last entry along k should be the heavy_size-th largest score, or the smallest if
        there are fewer; any other number, NaN too, costs time only.
      lengths: tokens in the cache, clipped to 0..S.
      config: sizes.
      num_query_tokens: T.
      weights_dtype: of the dense weights; None for none.
      interpret: run on the CPU.

    Returns:
      indices, counts, and weights or None.

    Source: CONTRACT.md, rules 1, 4, 5 and 6.
    """
    rows, queries, capacity = scores.shape
    list_size = config.max_selected(num_query_tokens)
    num_blocks = pl.cdiv(capacity, INDEX_BLOCK)
    launch = functools.partial(
        backend.launch,
        programs=rows * queries * num_blocks,
        num_warps=INDEX_WARPS,
        interpret=interpret,
    )
    static = {"config": config, "num_query_tokens": num_query_tokens, "block": INDEX_BLOCK}
    (block_counts,) = launch(
        functools.partial(count_kernel, **static),
        lengths,
        scores,
        cut,
        out_shape=[jax.ShapeDtypeStruct((rows, queries, num_blocks), np.int32)],
    )
    block_counts, cut = backend.launch(
        functools.partial(verify_cut_kernel, **static, interpret=interpret),
        lengths,
        scores,
        cut,
        block_counts,
        programs=rows * queries,
        out_shape=[
            jax.ShapeDtypeStruct(block_counts.shape, np.int32),
            jax.ShapeDtypeStruct((rows, queries, 1), np.float32),
        ],
        num_warps=INDEX_WARPS,
        aliases={3: 0},
        interpret=interpret,
    )
    out_shape = [
        jax.ShapeDtypeStruct((rows, queries, list_size), np.int32),
        jax.ShapeDtypeStruct((rows, queries), np.int32),
    ]
    if weights_dtype is not None:
        out_shape.append(jax.ShapeDtypeStruct((rows, queries, capacity), weights_dtype))
    indices, counts, *weights = launch(
        functools.partial(sparse_index_kernel, **static),
        lengths,
        scores,
        cut,
        block_counts,
        out_shape=out_shape,
    )
    return indices, counts, weights[0] if weights else None
