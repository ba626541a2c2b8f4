"""The sparse index: lists, counts and dense weights, from ranked scores and the cut among them.

Lists are written in ascending order by counting: nothing is sorted. A first kernel counts, block by
block, the candidates above the cut and those at it. A second one sees whether they are as many as
they must be, and finds the cut itself where they are not. A third puts each winner into its slot:
the number of winners before it. Ties at the cut are taken in the order of their positions as long
as there are slots.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jaxtyping import Float

from jax_indexer.kernels import backend
from jax_indexer.kernels.best import Bounds, Ranks, find_cut, number_of
from jax_indexer.kernels.output import Lists, Writer, list_shapes
from jax_indexer.kernels.step import Lengths, QueryPlan, Step, plan_query
from jax_indexer.layout import power_of_2_from
from jax_indexer.reference import NOT_A_CANDIDATE, ordered

# Two counts in one integer, so that one sum or prefix sum serves both: a block's tokens above the
# cut in the high bits, those at it in the low ones.
ABOVE_SHIFT = 16
AT_MASK = (1 << ABOVE_SHIFT) - 1


class CountInputs(NamedTuple):
    """What is counted."""

    lengths: Lengths
    scores: Any  # f32[R, Q, S]
    cut: Any  # f32[R, Q, k], the last of which is the cut


class CountOutputs(NamedTuple):
    """i32[R, Q, blocks], two counts in each."""

    block_counts: Any


class VerifyInputs(NamedTuple):
    """What is verified."""

    lengths: Lengths
    scores: Any  # f32[R, Q, S]
    given: Any  # f32[R, Q, k], the last of which should be the cut
    block_counts: Any  # not read by this name


class VerifyOutputs(NamedTuple):
    """The cut f32[R, Q, 1], and counts for it in the memory of those for the given one."""

    block_counts: Any
    cut: Any


class IndexInputs(NamedTuple):
    """What lists are written from; weights are begun elsewhere."""

    lengths: Lengths
    scores: Any  # f32[R, Q, S]
    cut: Any  # f32[R, Q, 1]
    block_counts: Any  # i32[R, Q, blocks]
    weights: Any  # not read


class Block(NamedTuple):
    """One program's tokens; a thread holds some neighbouring ones.

    Attributes:
      kv_row, query: whose scores.
      number: of the block.
      position: int32[threads, tokens of a thread].
      plan: of the query.
    """

    kv_row: Array
    query: Array
    number: Array
    position: Array
    plan: QueryPlan

    def marks(self, scores: Any, cut: Array) -> list[Array]:
        """For each place of a run: 1 << ABOVE_SHIFT above the cut, 1 at it, 0 if no candidate."""
        score, candidate = _scores_at(scores, self.kv_row, self.query, self.position, self.plan)
        return _marks(score, candidate, cut)


def _block_of(program: Array, lengths: Lengths, step: Step) -> Block:
    block = step.tuning.index_block
    num_blocks = pl.cdiv(step.S, block)
    query = program // num_blocks % step.Q
    kv_row = program // (num_blocks * step.Q)
    plan = plan_query(step, lengths, kv_row, query // step.G)
    number = program % num_blocks
    return Block(kv_row, query, number, _positions(number * block, step), plan)


def _positions(first: Array, step: Step) -> Array:
    run, block = step.tuning.index_run, step.tuning.index_block
    start = first + run * jnp.arange(block // run, dtype=jnp.int32)
    return start[:, None] + jnp.arange(run, dtype=jnp.int32)[None, :]


def _scores_at(scores: Any, kv_row, query, position, plan: QueryPlan) -> tuple[Array, Array]:
    """Scores of the candidates among some tokens, and which these are."""
    candidate = (position >= plan.first) & (position < plan.last)
    return backend.load(scores.at[kv_row, query, position], mask=candidate, other=0), candidate


def _marks(score: Array, candidate: Array, cut: Array) -> list[Array]:
    at = (candidate & (score == cut)).astype(jnp.int32)
    return backend.split_columns(jnp.where(candidate & (score > cut), 1 << ABOVE_SHIFT, at))


def count_kernel(program, inputs: CountInputs, outputs: CountOutputs, *, step: Step):
    block = _block_of(program, inputs.lengths, step)
    cut = inputs.cut[block.kv_row, block.query, inputs.cut.shape[2] - 1]
    marks = block.marks(inputs.scores, cut)
    outputs.block_counts[block.kv_row, block.query, block.number] = jnp.sum(sum(marks))


def verify_cut_kernel(program, inputs: VerifyInputs, outputs: VerifyOutputs, *, step: Step):
    """Takes over a cut that the counts prove, or finds it and counts again."""
    num_blocks = outputs.block_counts.shape[2]
    kv_row, query = program // step.Q, program % step.Q
    plan = plan_query(step, inputs.lengths, kv_row, query // step.G)
    number = jnp.arange(power_of_2_from(num_blocks), dtype=jnp.int32)
    counted = outputs.block_counts.at[kv_row, query, number]
    counts = backend.load(counted, mask=number < num_blocks, other=0)
    num_above, num_at = jnp.sum(counts >> ABOVE_SHIFT), jnp.sum(counts & AT_MASK)
    is_wrong = (num_above > plan.num_heavy) | (num_above + num_at < plan.num_heavy)

    @pl.when(~is_wrong)
    def _():
        outputs.cut[kv_row, query, 0] = inputs.given[kv_row, query, inputs.given.shape[2] - 1]

    @pl.when(is_wrong)
    def _():
        run, block = step.tuning.index_run, step.tuning.index_block

        def scores_at(start) -> tuple[Array, Array]:
            position = start[:, None] + jnp.arange(run, dtype=jnp.int32)[None, :]
            return _scores_at(inputs.scores, kv_row, query, position, plan)

        def read(start):
            score, candidate = scores_at(start)
            rank = jnp.where(candidate, ordered(score), NOT_A_CANDIDATE)
            return backend.split_columns(rank), start

        ranks = Ranks(read, block // run, run, plan.last, step.S)
        least, most = ranks.extremes()
        candidates = plan.last - plan.first
        found = find_cut(ranks, plan.num_heavy, Bounds(least, most + 1, candidates))
        cut = number_of(found.lowest)
        outputs.cut[kv_row, query, 0] = cut
        backend.barrier()  # all threads have read the counts that are overwritten

        def count(i, carry):
            marks = _marks(*scores_at(ranks.starts(i)), cut)
            outputs.block_counts[kv_row, query, i] = jnp.sum(sum(marks[1:], marks[0]))
            return carry

        lax.fori_loop(0, num_blocks, count, 0)


def sparse_index_kernel(program, inputs: IndexInputs, outputs: Lists, *, step: Step):
    num_blocks = inputs.block_counts.shape[2]
    block = _block_of(program, inputs.lengths, step)
    plan, kv_row, query = block.plan, block.kv_row, block.query
    writer = Writer(outputs, kv_row, query, plan)
    writer.settle(block.number, num_blocks)

    @pl.when(inputs.block_counts[kv_row, query, block.number] > 0)
    def _():
        cut = inputs.cut[kv_row, query, 0]
        marks = block.marks(inputs.scores, cut)
        other = jnp.arange(power_of_2_from(num_blocks), dtype=jnp.int32)
        counted = inputs.block_counts.at[kv_row, query, other]
        packed = backend.load(counted, mask=other < num_blocks, other=0)
        earlier = other < block.number
        num_above = jnp.sum(packed >> ABOVE_SHIFT)
        above_before = jnp.sum(jnp.where(earlier, packed >> ABOVE_SHIFT, 0))
        at_before = jnp.sum(jnp.where(earlier, packed & AT_MASK, 0))
        ties_to_take = plan.num_heavy - num_above

        of_run = sum(marks)
        within = jnp.cumsum(of_run) - of_run
        for mark, position in zip(marks, backend.split_columns(block.position), strict=True):
            within += mark
            ties = at_before + (within & AT_MASK)
            heavy = (mark > 1) | ((mark == 1) & (ties <= ties_to_take))
            place = above_before + (within >> ABOVE_SHIFT) + jnp.minimum(ties, ties_to_take) - 1
            writer.put(position, place, heavy)


def sparse_index(
    step: Step,
    scores: Float[Array, "R Q S"],
    cut: Float[Array, "R Q k"],
    lengths: Lengths,
    weights: Float[Array, "R Q S"] | None,
) -> Lists:
    """Writes the lists of the best.

    Args:
      step: the step.
      scores: as `rankable_scores` returns them.
      cut: its last entry along k should be the heavy_size-th largest score, or the smallest if
        there are fewer; any other number, NaN too, costs time only.
      lengths: of the rows.
      weights: begun by `weights_launch`, or None; written in place.

    Returns:
      Lists, counts, and weights or None.

    Source: CONTRACT.md, rules 1, 4, 5 and 6.
    """
    num_blocks, queries = pl.cdiv(step.S, step.tuning.index_block), step.R * step.Q
    of_blocks = jax.ShapeDtypeStruct((step.R, step.Q, num_blocks), np.int32)
    of_queries = jax.ShapeDtypeStruct((step.R, step.Q, 1), np.float32)

    def launch(kernel, inputs, outputs, programs, in_place=()):
        what = backend.Launch(functools.partial(kernel, step=step), inputs, outputs, programs)
        return backend.launch(what._replace(in_place=in_place), num_warps=step.tuning.index_warps)

    counted = launch(
        count_kernel,
        CountInputs(lengths, scores, cut),
        CountOutputs(of_blocks),
        queries * num_blocks,
    )
    verified = launch(
        verify_cut_kernel,
        VerifyInputs(lengths, scores, cut, counted.block_counts),
        VerifyOutputs(of_blocks, of_queries),
        queries,
        in_place=("block_counts",),
    )
    return launch(
        sparse_index_kernel,
        IndexInputs(lengths, scores, verified.cut, verified.block_counts, weights),
        list_shapes(step),
        queries * num_blocks,
        in_place=("weights",),
    )
