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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jaxtyping import Float, UInt8

from jax_indexer.kernels import backend
from jax_indexer.kernels.best import PAIRS_AT_ONCE, Bounds, Ranks, cut_of_few, emit_best, find_cut
from jax_indexer.kernels.group_maxima import group_maxima
from jax_indexer.kernels.lookup_table import Tables
from jax_indexer.kernels.output import Lists, Writer, list_shapes
from jax_indexer.kernels.scores import ranks_of_runs
from jax_indexer.kernels.step import Lengths, QueryPlan, Step, plan_query
from jax_indexer.kernels.tuning import Tuning
from jax_indexer.layout import power_of_2_from
from jax_indexer.reference import NAN_RANK, NOT_A_CANDIDATE

# Neighbours that a thread takes at once of a winning group's tokens, and of more tokens than usual.
TOKEN_RUN = 8
LONG_RUN = 2


def group_sizes(capacity: int, budget: int, tuning: Tuning) -> tuple[int, ...]:
    """Sizes of groups, powers of two: one, or a coarse and a fine one.

    One near sqrt(S / heavy_size) leaves as many groups to look at as tokens. A long cache with a
    small budget would have too many of both, and a short context in it too few groups.
    """
    per_token = capacity / budget
    many, largest = tuning.many_groups, tuning.largest_group
    # Here a coarse group exceeds the largest, so that it holds whole runs of fine ones.
    if capacity > many * largest and per_token >= many:
        return min(power_of_2_from(pl.cdiv(capacity, many)), 256), 2 * tuning.group_run
    ideal = 1 << round(math.log2(math.sqrt(max(per_token, 1))))
    return (min(max(ideal, tuning.smallest_group), largest),)


def slack_of(budget: int) -> int:
    """How many groups more than the budget end the search among the maxima."""
    return budget // 4


class Inputs(NamedTuple):
    """What the second kernel reads; weights are begun elsewhere."""

    lengths: Lengths
    table: Any  # [R, Q, M * C]
    codes: Any  # u8[R, M, S]
    maxima: tuple[Any, ...]  # i32[R, Q, groups] for each size of a group
    weights: Any  # not read


class Outputs(NamedTuple):
    """Lists, and scratch: positions and ranks of tokens that are left, numbers of groups chosen."""

    indices: Any
    counts: Any
    weights: Any
    positions: Any  # i32[R, Q, tokens]
    ranks: Any  # i32[R, Q, tokens + PAIRS_AT_ONCE]
    chosen: tuple[Any, ...]  # i32[R, Q, most chosen] for each size of a group


class Groups(NamedTuple):
    """Groups that were chosen: the first `count` in scratch, or all from the first one on.

    Attributes:
      chosen: how many.
      low: a rank that all winners reach.
      high: one that none does.
    """

    chosen: Array
    low: Array
    high: Array


class Search(NamedTuple):
    """One program's view of its query.

    Attributes:
      step, groups, inputs, outputs: of the launch.
      kv_row, query: whose list.
      plan: of the query.
      threads: of the program.
    """

    step: Step
    groups: tuple[int, ...]
    inputs: Inputs
    outputs: Outputs
    kv_row: Array
    query: Array
    plan: QueryPlan
    threads: int

    def load_maxima(self, level: int, first: Array, exists: Array) -> list[Array]:
        """A run of maxima for each thread."""
        number = first[:, None] + jnp.arange(self.step.tuning.group_run, dtype=jnp.int32)[None, :]
        found = backend.load(
            self.inputs.maxima[level].at[self.kv_row, self.query, number],
            mask=jnp.broadcast_to(exists[:, None], number.shape),
            other=NOT_A_CANDIDATE,
        )
        return backend.split_columns(found)

    def choose_groups(self, level: int, ranks: Ranks, in_play: Array) -> Groups:
        """Puts the best groups of a level into scratch.

        `in_play` is how many hold a candidate, or more than that where the budget is fewer.
        """
        ref = self.outputs.chosen[level]

        def keep(number, best, place):
            into = jnp.where(best, place, ref.shape[2])
            backend.store(ref.at[self.kv_row, self.query, into], number, mask=best)

        least, most = ranks.extremes()
        wanted = jnp.minimum(self.plan.num_heavy, in_play)
        slack = slack_of(self.step.config.heavy_size)
        cut = find_cut(ranks, wanted, Bounds(least, most + 1, in_play), slack)
        emit_best(ranks, cut, keep)
        backend.barrier()
        # With fewer groups than the budget, tokens below all maxima are needed too.
        low = jnp.where(in_play < self.plan.num_heavy, NAN_RANK, cut.lowest)
        return Groups(cut.taken, low, most + 1)

    def choose_among_all(self) -> Groups:
        """The best groups of the coarsest size."""
        plan, size, run = self.plan, self.groups[0], self.step.tuning.group_run

        def read(start):
            # By whole runs, so that a thread's loads are one: the pass has written that far.
            number, width = lax.div(start, run), size * run
            written = (number >= lax.div(plan.first, width)) & (
                number <= lax.div(plan.last - 1, width)
            )
            return self.load_maxima(0, start, written), start

        end = lax.div(plan.last + (size - 1), size)
        most = self.inputs.maxima[0].shape[2]
        ranks = Ranks(read, self.threads, run, end, most).held()
        return self.choose_groups(0, ranks, end - lax.div(plan.first, size))

    def choose_twice(self) -> Groups:
        """The best fine groups of the best coarse ones."""
        plan, (coarse_size, fine_size) = self.plan, self.groups
        ratio = coarse_size // fine_size
        first_group = lax.div(plan.first, coarse_size)
        in_play = lax.div(plan.last + (coarse_size - 1), coarse_size) - first_group
        room = self.outputs.chosen[0].shape[2]
        # A short context in a long cache has no more coarse groups than there is room for.
        all_chosen = in_play <= room
        # Not the constant alone, which has no lowering as a branch's result.
        lowest = jnp.minimum(in_play, NAN_RANK)
        chosen, low = lax.cond(
            all_chosen, lambda: (in_play, lowest), lambda: self.choose_among_all()[:2]
        )

        def read(start):
            place = lax.div(start, ratio)
            exists = place < chosen
            listed = backend.load(
                self.outputs.chosen[0].at[self.kv_row, self.query, place],
                mask=exists & ~all_chosen,
                other=0,
            )
            coarse = jnp.where(all_chosen, first_group + place, listed)
            first = coarse * ratio + lax.rem(start, ratio)
            found = self.load_maxima(1, first, exists)
            return [jnp.where(rank >= low, rank, NOT_A_CANDIDATE) for rank in found], first

        run = self.step.tuning.group_run
        ranks = Ranks(read, self.threads, run, chosen * ratio, room * ratio).held()
        # Exact if all were chosen; else too many, which the search finds out.
        finer = lax.div(plan.last + (fine_size - 1), fine_size) - lax.div(plan.first, fine_size)
        return self.choose_groups(1, ranks, jnp.minimum(finer, chosen * ratio))

    def keep_tokens(self, groups: Groups) -> Array:
        """Puts the chosen groups' tokens that may be winners into scratch; how many."""
        plan, group, outputs = self.plan, self.groups[-1], self.outputs
        most_tokens, run = outputs.positions.shape[2], min(group, TOKEN_RUN)
        runs_a_group = group // run
        groups_a_turn = self.threads // runs_a_group

        def keep(i, kept):
            thread = i * self.threads + jnp.arange(self.threads, dtype=jnp.int32)
            place = lax.div(thread, runs_a_group)
            exists = place < groups.chosen
            listed = outputs.chosen[-1].at[self.kv_row, self.query, place]
            number = backend.load(listed, mask=exists, other=0)
            start = number * group + lax.rem(thread, runs_a_group) * run
            ranks = ranks_of_runs(
                self.step,
                lambda entry: self.inputs.table[self.kv_row, self.query, entry],
                self.inputs.codes,
                kv_row=self.kv_row,
                start=start,
                wanted=exists,
                run=run,
            )
            stays = []
            for offset, rank in enumerate(ranks):
                position = start + offset
                candidate = exists & (position >= plan.first) & (position < plan.last)
                stays.append(candidate & (rank >= groups.low))
            own = sum(stay.astype(jnp.int32) for stay in stays)
            until = jnp.cumsum(own)
            into = kept + until - own
            for offset, (rank, stay) in enumerate(zip(ranks, stays, strict=True)):
                at = self.kv_row, self.query, jnp.where(stay, into, most_tokens)
                backend.store(outputs.ranks.at[at], rank, mask=stay)
                backend.store(outputs.positions.at[at], start + offset, mask=stay)
                into += stay.astype(jnp.int32)
            return kept + jnp.max(until)

        turns = lax.div(groups.chosen + (groups_a_turn - 1), groups_a_turn)
        kept = lax.fori_loop(0, turns, keep, jnp.int32(0))
        # So that pairs are compared by loads without a mask.
        behind = kept + jnp.arange(PAIRS_AT_ONCE, dtype=jnp.int32)
        outputs.ranks[self.kv_row, self.query, behind] = jnp.full(PAIRS_AT_ONCE, NOT_A_CANDIDATE)
        backend.barrier()
        return kept

    def list_best(self, kept: Array, groups: Groups, writer: Writer) -> None:
        """Lists the best of the tokens in scratch."""
        outputs, most_tokens = self.outputs, self.outputs.positions.shape[2]
        num_heavy = self.plan.num_heavy

        def tokens(run: int, most: int) -> Ranks:
            def read(start):
                ranks = [
                    backend.load(
                        outputs.ranks.at[self.kv_row, self.query, start + place],
                        mask=start + place < kept,
                        other=NOT_A_CANDIDATE,
                    )
                    for place in range(run)
                ]
                return ranks, start

            return Ranks(read, self.threads, run, kept, most).held()

        def list_token(number, best, place):
            listed = outputs.positions.at[self.kv_row, self.query, number]
            writer.put(backend.load(listed, mask=best, other=0), place, best)

        # Few tokens are left unless more than usual tie or lie together.
        @pl.when(kept <= self.threads)
        def _():
            few = tokens(1, self.threads)
            read_fours = lambda place: outputs.ranks[self.kv_row, self.query, place]  # noqa: E731
            emit_best(few, cut_of_few(few, num_heavy, read_fours), list_token)

        if self.threads < most_tokens:

            @pl.when(kept > self.threads)
            def _():
                many = tokens(LONG_RUN, most_tokens)
                cut = find_cut(many, num_heavy, Bounds(groups.low, groups.high, kept))
                emit_best(many, cut, list_token)


def threshold_select_kernel(
    program,
    inputs: Inputs,
    outputs: Outputs,
    *,
    step: Step,
    groups: tuple[int, ...],
    threads: int,
):
    kv_row, query = program // step.Q, program % step.Q
    plan = plan_query(step, inputs.lengths, kv_row, query // step.G)
    lists = Lists(outputs.indices, outputs.counts, outputs.weights)
    writer = Writer(lists, kv_row, query, plan)
    writer.settle()
    search = Search(step, groups, inputs, outputs, kv_row, query, plan, threads)

    @pl.when(plan.num_heavy > 0)
    def _():
        best = search.choose_among_all() if len(groups) == 1 else search.choose_twice()
        kept = search.keep_tokens(best)
        search.list_best(kept, best, writer)


def select_threshold(
    step: Step,
    tables: Tables,
    codes: UInt8[Array, "*layers R M S"],
    lengths: Lengths,
    weights: Float[Array, "R Q S"] | None,
    layer: Array | None = None,
) -> Lists:
    """Everything of a selection that follows the tables, in two kernels.

    Args:
      step: the step.
      tables: look-up tables.
      codes: of all tokens; only their low bits count.
      lengths: of the rows.
      weights: begun by `weights_launch`, or None; written in place.
      layer: of the codes, None where they have no axis of layers.

    Returns:
      Lists, counts, and weights or None.

    Source: CONTRACT.md, section 3.
    """
    groups = group_sizes(step.S, step.budget, step.tuning)
    maxima = group_maxima(step, tables, codes, lengths, groups, layer)
    num_warps = step.tuning.warps_for_groups(maxima[0].shape[2], step.R * step.Q)
    # Rows of scratch start at a multiple of 16 bytes, or threads would hold scattered numbers.
    most_chosen = pl.cdiv(step.budget + slack_of(step.budget), 16) * 16
    most_tokens = most_chosen * groups[-1]

    def integers(number):
        return jax.ShapeDtypeStruct((step.R, step.Q, number), np.int32)

    what = backend.Launch(
        functools.partial(
            threshold_select_kernel, step=step, groups=groups, threads=32 * num_warps
        ),
        Inputs(lengths, tables.by_query, codes, maxima, weights),
        Outputs(
            *list_shapes(step),
            positions=integers(most_tokens),
            ranks=integers(most_tokens + PAIRS_AT_ONCE),
            chosen=tuple(integers(most_chosen) for _ in groups),
        ),
        programs=step.R * step.Q,
        in_place=("weights",),
        state=("codes",),
        layer=layer,
    )
    outputs = backend.launch(what, num_warps=num_warps)
    return Lists(outputs.indices, outputs.counts, outputs.weights)
