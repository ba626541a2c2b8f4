"""The "threshold" selector: a cut among group maxima, then the exact one among few tokens.

Cut the positions into groups of g neighbours. If `heavy_size` groups have maxima that reach some
rank, then as many tokens reach it, so the cut does too; and a token that makes the cut is in a
group whose maximum does. So one pass over the codes keeps a maximum a group; a rank that a few
more groups reach than must is soon found; and of these groups' tokens, which are scored again,
only those that reach it are left to choose from.

Where more groups tie at that rank than will do, the first of them are taken, up to `heavy_size` in
all: a token of any other group has that many groups before its own, each with a token that scores
higher, or the same at a lower position. That holds for every input; no buffer can overflow.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jaxtyping import Float, Int32, UInt8

from jax_indexer.config import IndexerConfig
from jax_indexer.kernels import backend
from jax_indexer.kernels.best import PAIRS_AT_ONCE, Ranks, cut_of_few, emit_best, find_cut
from jax_indexer.kernels.codebook import power_of_2_from
from jax_indexer.kernels.group_maxima import group_maxima
from jax_indexer.kernels.lookup_table import Tables
from jax_indexer.kernels.plan import plan_query, write_settled_entries
from jax_indexer.kernels.scores import ranks_of_runs
from jax_indexer.kernels.tuning import select_warps
from jax_indexer.reference import NAN_RANK, NOT_A_CANDIDATE

# Neighbours that a thread takes at once: of groups, of a winning group's tokens, and of more tokens
# than usual.
GROUP_RUN = 8
TOKEN_RUN = 8
LONG_RUN = 2

# Tokens of a group. More of them leave too many tokens to score again, fewer too many groups.
SMALLEST_GROUP, LARGEST_GROUP = 4, 64
# With more groups than this even so, coarser ones are looked at first, about this many.
MANY_GROUPS = 4096


def group_sizes(capacity: int, budget: int) -> tuple[int, ...]:
    """Sizes of groups, powers of two: one, or a coarse and a fine one.

    One near sqrt(S / heavy_size) leaves as many groups to look at as tokens. A long cache with a
    small budget would have too many of both, and a short context in it too few groups.
    """
    per_token = capacity / budget
    # Here a coarse group exceeds LARGEST_GROUP, so that it holds whole runs of fine ones.
    if capacity > MANY_GROUPS * LARGEST_GROUP and per_token >= MANY_GROUPS:
        return min(power_of_2_from(pl.cdiv(capacity, MANY_GROUPS)), 256), 2 * GROUP_RUN
    ideal = 1 << round(math.log2(math.sqrt(max(per_token, 1))))
    return (min(max(ideal, SMALLEST_GROUP), LARGEST_GROUP),)


def slack_of(budget: int) -> int:
    """How many groups more than the budget end the search among the maxima."""
    return budget // 4


def threshold_select_kernel(
    lengths_ref,  # i32[B]
    table_ref,  # [R, Q, M * C]
    codes_ref,  # u8[R, M, S]
    *refs,  # i32[R, Q, groups] maxima for each size of group; weights before; outputs
    config: IndexerConfig,
    num_query_tokens: int,
    groups: tuple[int, ...],
    threads: int,
    with_weights: bool,
    interpret: bool,
):
    weights_ref = None
    if with_weights:
        refs, weights_ref = (*refs[: len(groups)], *refs[len(groups) + 1 : -1]), refs[-1]
    maxima_refs, refs = refs[: len(groups)], refs[len(groups) :]
    # i32[R, Q, P] and i32[R, Q]; then scratch: numbers of tokens chosen, of their ranks, of groups
    indices_ref, counts_ref, positions_ref, ranks_ref, *chosen_refs = refs
    num_rows, _, capacity = codes_ref.shape
    num_queries, list_size = indices_ref.shape[1:]
    most_tokens, group = positions_ref.shape[2], groups[-1]

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
    write_settled_entries(indices_ref, counts_ref, row, query, plan)

    def load_maxima(level: int, first: Array, exists: Array) -> list[Array]:
        number = first[:, None] + jnp.arange(GROUP_RUN, dtype=jnp.int32)[None, :]
        found = backend.load(
            maxima_refs[level].at[row, query, number],
            mask=jnp.broadcast_to(exists[:, None], number.shape),
            other=NOT_A_CANDIDATE,
        )
        return backend.split_columns(found)

    def read_maxima(start):
        # By whole runs, so that a thread's loads are one: the pass has written that far.
        width = groups[0] * GROUP_RUN
        run = lax.div(start, GROUP_RUN)
        written = (run >= lax.div(plan.first, width)) & (run <= lax.div(plan.last - 1, width))
        return load_maxima(0, start, written), start

    def read_finer_maxima(start, *, first_group, all_chosen, chosen, low):
        ratio = groups[0] // groups[1]
        place = lax.div(start, ratio)
        exists = place < chosen
        listed = backend.load(
            chosen_refs[0].at[row, query, place], mask=exists & ~all_chosen, other=0
        )
        coarse = jnp.where(all_chosen, first_group + place, listed)
        first = coarse * ratio + lax.rem(start, ratio)
        found = load_maxima(1, first, exists)
        return [jnp.where(rank >= low, rank, NOT_A_CANDIDATE) for rank in found], first

    def choose_groups(level: int, ranks: Ranks, in_play: Array) -> tuple[Array, Array, Array]:
        """Puts the best groups into scratch; how many, what all winners reach, what none does.

        `in_play` is how many hold a candidate, or more than that where the budget is fewer.
        """
        ref = chosen_refs[level]

        def keep(number, best, place):
            into = jnp.where(best, place, ref.shape[2])
            backend.store(ref.at[row, query, into], number, mask=best)

        least, most = ranks.extremes()
        wanted = jnp.minimum(plan.num_heavy, in_play)
        slack = slack_of(config.heavy_size)
        cut = find_cut(ranks, wanted, least, most + 1, in_play, slack)
        emit_best(ranks, cut, keep)
        backend.barrier(interpret)
        # With fewer groups than the budget, tokens below all maxima are needed too.
        low = jnp.where(in_play < plan.num_heavy, NAN_RANK, cut.lowest)
        return cut.taken, low, most + 1

    run = min(group, TOKEN_RUN)
    runs_a_group = group // run
    groups_a_step = threads // runs_a_group

    def keep_tokens(i, kept, *, chosen, low):
        thread = i * threads + jnp.arange(threads, dtype=jnp.int32)
        place = lax.div(thread, runs_a_group)
        exists = place < chosen
        number = backend.load(chosen_refs[-1].at[row, query, place], mask=exists, other=0)
        start = number * group + lax.rem(thread, runs_a_group) * run
        ranks = ranks_of_runs(
            lambda entry: table_ref[row, query, entry],
            codes_ref,
            config,
            row=row,
            start=start,
            wanted=exists,
            run=run,
        )
        stays = []
        for offset, rank in enumerate(ranks):
            position = start + offset
            candidate = exists & (position >= plan.first) & (position < plan.last)
            stays.append(candidate & (rank >= low))
        own = sum(stay.astype(jnp.int32) for stay in stays)
        until = jnp.cumsum(own)
        into = kept + until - own
        for offset, (rank, stay) in enumerate(zip(ranks, stays, strict=True)):
            at = jnp.where(stay, into, most_tokens)
            backend.store(ranks_ref.at[row, query, at], rank, mask=stay)
            backend.store(positions_ref.at[row, query, at], start + offset, mask=stay)
            into += stay.astype(jnp.int32)
        return kept + jnp.max(until)

    def read_ranks(start, *, run, kept):
        ranks = [
            backend.load(
                ranks_ref.at[row, query, start + place],
                mask=start + place < kept,
                other=NOT_A_CANDIDATE,
            )
            for place in range(run)
        ]
        return ranks, start

    def list_token(number, best, place):
        position = backend.load(positions_ref.at[row, query, number], mask=best, other=0)
        slot = jnp.where(best, plan.num_sink + place, list_size)
        backend.store(indices_ref.at[row, query, slot], position, mask=best)
        if weights_ref is not None:
            there = jnp.where(best, position, capacity)
            ones = jnp.ones(position.shape, weights_ref.dtype)
            backend.store(weights_ref.at[row, query, there], ones, mask=best)

    @pl.when(plan.num_heavy > 0)
    def _():
        first_group = lax.div(plan.first, groups[0])
        end = lax.div(plan.last + (groups[0] - 1), groups[0])
        in_play = end - first_group

        def choose_coarsest():
            ranks = Ranks(read_maxima, threads, GROUP_RUN, end, maxima_refs[0].shape[2]).held()
            return choose_groups(0, ranks, in_play)

        if len(groups) == 1:
            chosen, low, high = choose_coarsest()
        else:
            # A short context in a long cache has no more coarse groups than there is room for.
            all_chosen = in_play <= chosen_refs[0].shape[2]
            # Not the constant alone, which has no lowering as a branch's result.
            lowest = jnp.minimum(in_play, NAN_RANK)
            chosen, low = lax.cond(
                all_chosen, lambda: (in_play, lowest), lambda: choose_coarsest()[:2]
            )
            read = functools.partial(
                read_finer_maxima,
                first_group=first_group,
                all_chosen=all_chosen,
                chosen=chosen,
                low=low,
            )
            ratio = groups[0] // groups[1]
            most = chosen_refs[0].shape[2] * ratio
            ranks = Ranks(read, threads, GROUP_RUN, chosen * ratio, most).held()
            # Exact if all were chosen; else too many, which the search finds out.
            finer = lax.div(plan.last + (groups[1] - 1), groups[1]) - lax.div(plan.first, groups[1])
            chosen, low, high = choose_groups(1, ranks, jnp.minimum(finer, chosen * ratio))

        kept = lax.fori_loop(
            0,
            lax.div(chosen + (groups_a_step - 1), groups_a_step),
            functools.partial(keep_tokens, chosen=chosen, low=low),
            jnp.int32(0),
        )
        # So that pairs are compared by loads without a mask.
        behind = kept + jnp.arange(PAIRS_AT_ONCE, dtype=jnp.int32)
        ranks_ref[row, query, behind] = jnp.full(PAIRS_AT_ONCE, NOT_A_CANDIDATE)
        backend.barrier(interpret)

        # Few tokens are left unless more than usual tie or lie together.
        @pl.when(kept <= threads)
        def _():
            read = functools.partial(read_ranks, run=1, kept=kept)
            tokens = Ranks(read, threads, 1, kept, threads).held()
            cut = cut_of_few(tokens, plan.num_heavy, lambda place: ranks_ref[row, query, place])
            emit_best(tokens, cut, list_token)

        if threads < most_tokens:

            @pl.when(kept > threads)
            def _():
                read = functools.partial(read_ranks, run=LONG_RUN, kept=kept)
                tokens = Ranks(read, threads, LONG_RUN, kept, most_tokens).held()
                cut = find_cut(tokens, plan.num_heavy, low, high, kept, slack=0)
                emit_best(tokens, cut, list_token)


def select_threshold(
    tables: Tables,
    codes: UInt8[Array, "R M S"],
    lengths: Int32[Array, "B"],
    config: IndexerConfig,
    num_queries: int,
    num_query_tokens: int,
    weights_dtype: np.dtype | None,
    *,
    interpret: bool = False,
) -> tuple[Int32[Array, "R Q P"], Int32[Array, "R Q"], Float[Array, "R Q S"] | None]:
    """Everything of a selection that follows the table, in two kernels.

    Args:
      tables: look-up tables.
      codes: of all tokens; only their low bits count.
      lengths: tokens in the cache, clipped to 0..S.
      config: sizes.
      num_queries: Q; queries of a row are ordered by token, then by head.
      num_query_tokens: T.
      weights_dtype: of the dense weights; None for none.
      interpret: run on the CPU.

    Returns:
      indices, counts, and weights or None.

    Source: CONTRACT.md, section 3.
    """
    rows, _, capacity = codes.shape
    budget = max(min(config.heavy_size, capacity), 1)
    groups = group_sizes(capacity, budget)
    maxima, weights = group_maxima(
        tables,
        codes,
        lengths,
        config,
        num_queries,
        num_query_tokens,
        groups,
        weights_dtype,
        interpret=interpret,
    )
    num_warps = select_warps(maxima[0].shape[2], rows * num_queries)
    # Rows of scratch start at a multiple of 16 bytes, or threads would hold scattered numbers.
    most_chosen = pl.cdiv(budget + slack_of(budget), 16) * 16
    most_tokens = most_chosen * groups[-1]

    def integers(*shape):
        return jax.ShapeDtypeStruct((rows, num_queries, *shape), np.int32)

    after = [] if weights is None else [weights]
    out_shape = [
        integers(config.max_selected(num_query_tokens)),
        integers(),
        integers(most_tokens),
        integers(most_tokens + PAIRS_AT_ONCE),
        *(integers(most_chosen) for _ in groups),
        *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in after),
    ]
    indices, counts, *_ = outputs = backend.launch(
        functools.partial(
            threshold_select_kernel,
            config=config,
            num_query_tokens=num_query_tokens,
            groups=groups,
            threads=32 * num_warps,
            with_weights=bool(after),
            interpret=interpret,
        ),
        lengths,
        tables.by_query,
        codes,
        *maxima,
        *after,
        programs=rows * num_queries,
        out_shape=out_shape,
        num_warps=num_warps,
        aliases={3 + len(maxima): len(out_shape) - 1} if after else None,
        interpret=interpret,
    )
    return indices, counts, outputs[-1] if after else None
