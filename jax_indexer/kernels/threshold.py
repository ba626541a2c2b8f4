"""The "threshold" selector: the cut among group maxima, then among the winning groups' tokens.

Cut the positions into groups of g neighbours. The `heavy_size` best tokens lie in the `heavy_size`
best groups, ranked by their maxima with ties to the lower group: a token of any other group has
`heavy_size` groups before its own, each holding a token that scores higher, or the same at a lower
position. So one pass over the codes keeps a maximum a group, and only heavy_size * g tokens are
scored again. That holds for every input; no buffer can overflow, and no score row is written.
"""

import functools
import math
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
from jax_indexer.kernels.codebook import power_of_2_from
from jax_indexer.kernels.plan import RowPlan, plan_row
from jax_indexer.kernels.scores import add_entries, block_of_program, shared_queries
from jax_indexer.kernels.tuning import SCORE_BLOCK, SCORE_WARPS, select_tuning
from jax_indexer.reference import NOT_A_CANDIDATE, ordered


def group_size(capacity: int, budget: int) -> int:
    """g, a power of two near sqrt(S / heavy_size), where both rounds rank as many numbers."""
    ideal = math.sqrt(capacity / max(budget, 1))
    return min(max(1 << round(math.log2(max(ideal, 1))), 4), 64)


def group_maxima_kernel(
    lengths_ref,  # i32[B]
    table_ref,  # [R, Q, M * C]
    codes_ref,  # u8[R, M, S]
    maxima_ref,  # i32[R, Q, groups]
    weights_ref=None,  # [R, Q, S]
    *,
    config: IndexerConfig,
    group: int,
    **static,
):
    b = block_of_program(lengths_ref, table_ref, codes_ref, config=config, **static)
    capacity, num_groups = codes_ref.shape[2], maxima_ref.shape[2]

    @pl.when(b.in_play)
    def _():
        totals = b.scores(table_ref, codes_ref)
        per_block = b.position.shape[0] // group
        into = b.number * per_block + jnp.arange(per_block, dtype=jnp.int32)
        for query, total, plan in zip(b.queries, totals, b.plans, strict=True):
            rank = jnp.where(b.candidates(plan), ordered(total), NOT_A_CANDIDATE)
            maxima = jnp.max(rank.reshape(per_block, group), axis=1)
            backend.store(maxima_ref.at[b.row, query, into], maxima, mask=into < num_groups)

    if weights_ref is not None:  # 1 at sink and window tokens, else 0: the heavy ones follow
        for query, plan in zip(b.queries, b.plans, strict=True):
            window = (b.position < plan.visible) & (b.position >= plan.visible - config.window_size)
            weights = ((b.position < plan.num_sink) | window).astype(weights_ref.dtype)
            into = weights_ref.at[b.row, query, b.position]
            backend.store(into, weights, mask=b.position < capacity)


class _List(NamedTuple):
    """A list of ranks that a program chooses from, in chunks of as many places as it holds.

    Attributes:
      read: from places to (their ranks, what is to be emitted); what does not exist ranks as no
        candidate.
      chunk: places read at once.
      size: of the list.
      most: what `size` may be at the most. A list of at most `chunk` is held in registers.
    """

    read: Callable[[Array], tuple[Array, Array]]
    chunk: int
    size: Array
    most: int

    def fold(self, visit: Callable, state):
        """visit(state, ranks, payload) for chunk after chunk."""
        place = jnp.arange(self.chunk, dtype=jnp.int32)
        if self.most <= self.chunk:
            return visit(state, *self.read(place))

        def step(i, state):
            return visit(state, *self.read(i * self.chunk + place))

        return lax.fori_loop(0, pl.cdiv(self.size, self.chunk), step, state)

    def held(self) -> "_List":
        """The same list, read once if it fits."""
        if self.most <= self.chunk:
            contents = self.read(jnp.arange(self.chunk, dtype=jnp.int32))
            return self._replace(read=lambda _: contents)
        return self


def _emit_best(numbers: _List, k: Array, emit: Callable[[Array, Array, Array], None]) -> None:
    """Hands the k best of a list to `emit`, in the order of the list; ties go to the front.

    Args:
      numbers: the list; at least k of it exist.
      k: how many, at least 1.
      emit: takes (which are among the best, their numbers among these, what is to be emitted).
    """
    numbers = numbers.held()
    lane = jnp.zeros(numbers.chunk, jnp.int32)

    def largest(ranks_of):
        return jnp.max(
            numbers.fold(lambda m, rank, _: jnp.maximum(m, ranks_of(rank)), lane + NOT_A_CANDIDATE)
        )

    # `low` is reached by k numbers at least, `high` by fewer, `above` of them. Two thresholds cut
    # the interval in three with one sum over the program, which is what a step costs.
    low = -largest(lambda rank: jnp.where(rank > NOT_A_CANDIDATE, -rank, NOT_A_CANDIDATE))
    high = largest(lambda rank: rank) + 1

    def unfinished(state):
        low, high, _ = state
        return high - low != 1

    def narrow(state):
        low, high, above = state
        width = lax.bitcast_convert_type(high - low, jnp.uint32)
        third = lax.bitcast_convert_type(jnp.maximum(width // jnp.uint32(3), 1), jnp.int32)
        first, second = low + third, jnp.where(width > 2, low + third + third, low + third)

        def count(totals, rank, _):
            reached = (rank >= first).astype(jnp.int32), (rank >= second).astype(jnp.int32)
            return tuple(t + r for t, r in zip(totals, reached, strict=True))

        of_first, of_second = numbers.fold(count, (lane, lane))
        if numbers.most < 1 << 15:
            packed = jnp.sum(of_first + (of_second << 16))
            of_first, of_second = packed & 0xFFFF, packed >> 16
        else:
            of_first, of_second = jnp.sum(of_first), jnp.sum(of_second)
        new_low = jnp.where(of_second >= k, second, jnp.where(of_first >= k, first, low))
        new_high = jnp.where(of_second >= k, high, jnp.where(of_first >= k, second, first))
        new_above = jnp.where(of_second >= k, above, jnp.where(of_first >= k, of_second, of_first))
        # Reached by exactly k: these are the best, and the cut's exact value does not matter.
        exact = jnp.where(of_second == k, second, first)
        found = (of_second == k) | (of_first == k)
        return (
            jnp.where(found, exact - 1, new_low),
            jnp.where(found, exact, new_high),
            jnp.where(found, k, new_above),
        )

    cut, _, above = lax.while_loop(unfinished, narrow, (low, high, jnp.int32(0)))
    ties_to_take = k - above

    def emit_chunk(before, rank, payload):
        is_above, at = rank > cut, rank == cut
        within = jnp.cumsum(jnp.where(is_above, 1 << 16, at.astype(jnp.int32)))
        above_before, ties_before = before
        number, ties = above_before + (within >> 16), ties_before + (within & 0xFFFF)
        best = is_above | (at & (ties <= ties_to_take))
        emit(best, number + jnp.minimum(ties, ties_to_take) - 1, payload)
        if numbers.most <= numbers.chunk:
            return before
        return jnp.max(number), jnp.max(ties)

    numbers.fold(emit_chunk, (jnp.int32(0), jnp.int32(0)))


def threshold_select_kernel(
    lengths_ref,  # i32[B]
    table_ref,  # [R, Q, M * C]
    codes_ref,  # u8[R, M, S]
    maxima_ref,  # i32[R, Q, groups]
    *refs,  # weights before; i32[R, Q, P] indices; i32[R, Q] counts; scratch; weights after
    config: IndexerConfig,
    num_query_tokens: int,
    group: int,
    chunk: int,
    with_weights: bool,
    interpret: bool,
):
    if with_weights:
        _, indices_ref, counts_ref, groups_ref, ranks_ref, weights_ref = refs
    else:
        indices_ref, counts_ref, groups_ref, ranks_ref = refs
        weights_ref = None
    num_rows, _, capacity = codes_ref.shape
    num_queries, list_size = indices_ref.shape[1:]
    num_groups, budget = maxima_ref.shape[2], groups_ref.shape[2]

    program = pl.program_id(0)
    row, query = program // num_queries, program % num_queries
    plan: RowPlan = plan_row(
        lengths_ref[row // (num_rows // lengths_ref.shape[0])],
        query // (num_queries // num_query_tokens),
        config=config,
        num_query_tokens=num_query_tokens,
        capacity=capacity,
    )

    # All entries but the heavy ones follow from the length.
    slot = jnp.arange(power_of_2_from(list_size), dtype=jnp.int32)
    entry = jnp.where(slot < plan.num_sink, slot, plan.visible - plan.num_listed + slot)
    entry = jnp.where(slot < plan.num_listed, entry, -1)
    is_heavy = (slot >= plan.num_sink) & (slot < plan.num_sink + plan.num_heavy)
    mine = (slot < list_size) & ~is_heavy
    # A slot that is not written lies behind the list: interpret mode writes back what it read.
    slot = jnp.where(mine, slot, list_size)
    backend.store(indices_ref.at[row, query, slot], entry, mask=mine)
    counts_ref[row, query] = plan.num_listed

    first_group = plan.first // group
    end_group = pl.cdiv(plan.last, group)
    chosen = jnp.minimum(plan.num_heavy, end_group - first_group)

    def read_group(place):
        number = first_group + place
        rank = backend.load(
            maxima_ref.at[row, query, number], mask=number < end_group, other=NOT_A_CANDIDATE
        )
        return rank, number

    def keep_group(best, place, number):
        place = jnp.where(best, place, budget)
        backend.store(groups_ref.at[row, query, place], number, mask=best)

    def token_at(place):
        exists = place // group < chosen
        number = backend.load(groups_ref.at[row, query, place // group], mask=exists, other=0)
        return exists, number * group + place % group

    def score_token(place):
        exists, position = token_at(place)
        candidate = exists & (position >= plan.first) & (position < plan.last)
        (score,) = add_entries(table_ref, codes_ref, row, [query], position, candidate)
        return jnp.where(candidate, ordered(score), NOT_A_CANDIDATE), position

    def read_token(place):
        exists, position = token_at(place)
        rank = backend.load(ranks_ref.at[row, query, place], mask=exists, other=NOT_A_CANDIDATE)
        return rank, position

    def list_token(best, place, position):
        slot = jnp.where(best, plan.num_sink + place, list_size)
        backend.store(indices_ref.at[row, query, slot], position, mask=best)
        if weights_ref is not None:
            there = jnp.where(best, position, capacity)
            ones = jnp.ones(position.shape, weights_ref.dtype)
            backend.store(weights_ref.at[row, query, there], ones, mask=best)

    @pl.when(plan.num_heavy > 0)
    def _():
        groups = _List(read_group, chunk, end_group - first_group, num_groups)
        _emit_best(groups, chosen, keep_group)
        backend.barrier(interpret)

        tokens = _List(score_token, chunk, chosen * group, budget * group)
        if tokens.most > chunk:  # score them once, into scratch

            def keep_rank(i, carry):
                place = i * chunk + jnp.arange(chunk, dtype=jnp.int32)
                there = jnp.where(place < tokens.most, place, tokens.most)
                rank, _ = score_token(place)
                backend.store(ranks_ref.at[row, query, there], rank, mask=place < tokens.most)
                return carry

            lax.fori_loop(0, pl.cdiv(tokens.size, chunk), keep_rank, 0)
            backend.barrier(interpret)
            tokens = tokens._replace(read=read_token)
        _emit_best(tokens, plan.num_heavy, list_token)


def select_threshold(
    table: Float[Array, "R Q MC"],
    codes: UInt8[Array, "R M S"],
    lengths: Int32[Array, "B"],
    config: IndexerConfig,
    num_query_tokens: int,
    weights_dtype: np.dtype | None,
    *,
    interpret: bool = False,
) -> tuple[Int32[Array, "R Q P"], Int32[Array, "R Q"], Float[Array, "R Q S"] | None]:
    """Everything of a selection that follows the table, in two kernels.

    Args:
      table: look-up tables, grouped by kv head.
      codes: of all tokens; only their low bits count.
      lengths: tokens in the cache, clipped to 0..S.
      config: sizes.
      num_query_tokens: T; queries of a row are ordered by token, then by head.
      weights_dtype: of the dense weights; None for none.
      interpret: run on the CPU.

    Returns:
      indices, counts, and weights or None.

    Source: CONTRACT.md, section 3.
    """
    (rows, queries, _), capacity = table.shape, codes.shape[-1]
    list_size = config.max_selected(num_query_tokens)
    budget = max(min(config.heavy_size, capacity), 1)
    group = group_size(capacity, budget)
    num_groups = pl.cdiv(capacity, group)
    shared = shared_queries(queries)
    num_blocks = pl.cdiv(capacity, SCORE_BLOCK)
    static = {"config": config, "num_query_tokens": num_query_tokens, "group": group}

    def integers(*shape):
        return jax.ShapeDtypeStruct((rows, queries, *shape), np.int32)

    weights_shape = []
    if weights_dtype is not None:
        weights_shape = [jax.ShapeDtypeStruct((rows, queries, capacity), weights_dtype)]
    maxima, *weights = backend.launch(
        functools.partial(
            group_maxima_kernel,
            **static,
            queries_per_program=shared,
            block=SCORE_BLOCK,
        ),
        lengths,
        table,
        codes,
        programs=rows * (queries // shared) * num_blocks,
        out_shape=[integers(num_groups), *weights_shape],
        num_warps=SCORE_WARPS,
        interpret=interpret,
    )
    chunk, num_warps = select_tuning(max(num_groups, budget * group))
    scratch = budget * group if budget * group > chunk else 1
    indices, counts, _, _, *weights = backend.launch(
        functools.partial(
            threshold_select_kernel,
            **static,
            chunk=chunk,
            with_weights=bool(weights),
            interpret=interpret,
        ),
        lengths,
        table,
        codes,
        maxima,
        *weights,
        programs=rows * queries,
        out_shape=[
            integers(list_size),
            integers(),
            integers(budget),
            integers(scratch),
            *weights_shape,
        ],
        num_warps=num_warps,
        aliases={4: 4} if weights else None,
        interpret=interpret,
    )
    return indices, counts, weights[0] if weights else None
