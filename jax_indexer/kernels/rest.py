"""The rest: candidates that are not attended to, estimated from their scores and means of values.

Beside attention to the winners of a pool, programs add up what all the candidates outside of it
weigh by PQ, by code: cells with their sizes where there are cells, tokens one by one elsewhere. The
lowest score in the pool is the cut: below it nothing is in the pool; of those at it tokens are
counted, as integers, so that nothing remains where all of them are. The last kernel corrects these
weights by what the pool weighs by its keys and by PQ, and multiplies them with the means.
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
from jax_indexer.kernels.attend import (
    MERGED_AT_ONCE,
    Ended,
    Parts,
    Softmax,
    finite,
    merge_two,
    padded,
    read_logits,
    read_parts,
    shapes_of_end,
    vectors,
    write_length,
    write_output,
)
from jax_indexer.kernels.rerank import (
    Losers,
    Place,
    Pool,
    by_code,
    number_of,
    over_pool,
    score_of,
)
from jax_indexer.kernels.step import Lengths, QueryPlan, Step, plan_query
from jax_indexer.layout import power_of_2_from
from jax_indexer.reference import NOT_A_CANDIDATE, Logits, corrected_by, made_logits, ordered
from jax_indexer.state import Cells, PQIndex, Sealing, sealed_at

HIGHEST_RANK = np.int32(np.iinfo(np.int32).max)
# Parts that a context without cells is weighed in, at the most.
MOST_PARTS = 64


class WeighInputs(NamedTuple):
    """A pool, and all candidates: the arrays of the index, of cells if they are used, else None."""

    after: Lengths
    by_score: Any  # of the pool
    indices: Any  # its lists
    table: Any  # [R, Q, M * C]
    codes: Any  # u8[R, M, S]
    base: Any  # i32[B]
    starts: Any  # i32[R, 2, cells + 1]
    logits: Logits


class Weights(NamedTuple):
    """What the candidates outside of a pool weigh by PQ, in parts.

    Attributes:
      cut: f32[B, T, N], the logit of the lowest score in the pool.
      largest: f32[B, T, N, parts], the largest logit below the cut.
      weights: f32[B, T, N, parts, M', C'], the sums of exp(logit - largest) below it, by code.
      at_cut: i32[B, T, N, parts, M', C'], how many tokens outside of the pool are at the cut; only
        the sum over all parts is that.
    """

    cut: Any
    largest: Any
    weights: Any
    at_cut: Any


class Weigher(NamedTuple):
    """One program's view of its query.

    Attributes:
      step, inputs, outputs: of the launch.
      place, plan: of the query.
      cut: the rank of the lowest score in the pool.
      logits: how to make logits.
    """

    step: Step
    inputs: WeighInputs
    outputs: Weights
    place: Place
    plan: QueryPlan
    cut: Array
    logits: Logits

    def weigh(self, score: Array, size: Array, so_far: Array) -> tuple[Array, Array, Array, Array]:
        """Sizes of what is below the cut and at it, and the logits and their largest so far."""
        rank, logit = ordered(score), made_logits(score, self.logits)
        below = jnp.where(rank < self.cut, size, 0)
        at = jnp.where(rank == self.cut, size, 0)
        weighs = (below > 0) & (logit < jnp.inf)
        largest = jnp.maximum(so_far, jnp.max(jnp.where(weighs, logit, -jnp.inf)))
        weight = jnp.exp(logit - finite(largest)) * below.astype(jnp.float32)
        return jnp.where(weighs, weight, 0), at, largest, jnp.exp(so_far - finite(largest))

    def put(self, m: int, largest: Array, weights: Array, at_cut: Array) -> None:
        """Writes the part of a subspace."""
        at = (*self.place.at, self.place.part)
        code = jnp.arange(len(weights), dtype=jnp.int32)
        backend.store(self.outputs.weights.at[(*at, m, code)], weights)
        backend.store(self.outputs.at_cut.at[(*at, m, code)], at_cut)
        if m == 0:  # it is the same for all
            self.outputs.largest[at] = largest

    def cells(self, sealing: Sealing) -> None:
        """The sealed candidates, cell by cell, less those of the pool that are at the cut."""
        config, place = self.step.config, self.place
        C, M = config.num_centroids, config.num_subspaces
        by, number = self.outputs.weights.shape[4:]
        others = config.num_cells // number
        at_once = min(max(self.step.tuning.weighed_tile // number, 1), power_of_2_from(others))
        for m in range(by):
            below_digit = C ** (M - 1 - m) if number > 1 else others
            code = jnp.arange(number, dtype=jnp.int32)[:, None]

            def weigh(i, carry, code=code, below_digit=below_digit):
                largest, weights, at_cut = carry
                other = (i * at_once + jnp.arange(at_once, dtype=jnp.int32))[None, :]
                exists = other < others
                other = jnp.where(exists, other, 0)
                high, low = other // below_digit, other % below_digit
                cell = (high * number + code) * below_digit + low
                begin = self.inputs.starts[place.kv_row, 0, cell]
                size = jnp.maximum(self.inputs.starts[place.kv_row, 0, cell + 1] - begin, 0)
                # In a short context there are no candidates.
                size = jnp.where(exists & (self.plan.last > self.plan.first), size, 0)
                score = jnp.float32(0)
                for digit in range(M):
                    entry = (cell >> (config.num_bits * (M - 1 - digit))) & (C - 1)
                    entry = self.inputs.table[place.kv_row, place.query, digit * C + entry]
                    score += entry.astype(jnp.float32)
                weight, at, largest, scale = self.weigh(score, size, largest)
                weights = weights * scale + jnp.sum(weight, axis=1)
                return largest, weights, at_cut + jnp.sum(at, axis=1)

            zeros = jnp.zeros(number, jnp.float32), jnp.zeros(number, jnp.int32)
            turns = pl.cdiv(others, at_once)
            largest, weights, at_cut = lax.fori_loop(
                0, turns, weigh, (jnp.float32(-jnp.inf), *zeros)
            )
            self.put(m, largest, weights, at_cut - self.pool_at_cut(m, number))

    def pool_at_cut(self, m: int, number: int) -> Array:
        """How many tokens of the pool are at the cut, by code."""

        def count(slot, rank, so_far):
            mine = rank == self.cut  # which no entry is that is no candidate
            at = (*self.place.at, jnp.where(mine, self.step.config.sink_size + slot, 0))
            token = jnp.where(mine, backend.load(self.inputs.indices.at[at], mask=mine, other=0), 0)
            return so_far + self.by_code(m, number, token, mine, mine.astype(jnp.int32))

        start = jnp.zeros(number, jnp.int32)
        return over_pool(self.inputs.by_score, self.place, count, start)

    def by_code(self, m: int, number: int, token: Array, exists: Array, amount: Array) -> Array:
        return by_code(self.inputs.codes, self.place, self.step, m, number, token, exists, amount)

    def tokens(self, first: Array, last: Array, pool: Array | None = None) -> None:
        """Candidates in [first, last), one by one, less those of the pool if `pool` says so."""
        step = self.step
        by, number = self.outputs.weights.shape[4:]
        at_once = min(max(2 * step.tuning.weighed_tile // number, 16), step.tuning.weighed_tokens)

        def weigh(i, carry):
            largest, weights, at_cut = carry
            token = first + i * at_once + jnp.arange(at_once, dtype=jnp.int32)
            exists = token < last
            token = jnp.where(exists, token, 0)
            score = score_of(self.inputs.table, self.place, self.inputs.codes, step, token, exists)
            weight, at, largest, scale = self.weigh(score, exists.astype(jnp.int32), largest)
            of_code = functools.partial(self.by_code, number=number, token=token, exists=exists)
            weights = [
                so_far * scale + of_code(m, amount=weight) for m, so_far in enumerate(weights)
            ]
            at_cut = [so_far + of_code(m, amount=at) for m, so_far in enumerate(at_cut)]
            return largest, weights, at_cut

        turns = lax.div(jnp.maximum(last - first, 0) + (at_once - 1), jnp.int32(at_once))
        zeros = [[jnp.zeros(number, dtype)] * by for dtype in (jnp.float32, jnp.int32)]
        largest, weights, at_cut = lax.fori_loop(0, turns, weigh, (jnp.float32(-jnp.inf), *zeros))
        for m in range(by):
            of_pool = 0 if pool is None else jnp.where(pool, self.pool_at_cut(m, number), 0)
            self.put(m, largest, weights[m], at_cut[m] - of_pool)


def tokens_of_part(step: Step, sealing: Sealing | None) -> int:
    """Tokens that a program weighs one by one; all of a context are in few parts."""
    if sealing is not None:
        return step.tuning.weighed_tokens
    return max(step.tuning.weighed_tokens, power_of_2_from(pl.cdiv(step.S, MOST_PARTS)))


def weigh_rest_kernel(
    program, inputs: WeighInputs, outputs: Weights, *, step: Step, sealing: Sealing | None
):
    """What some of the candidates of a query weigh that are not in its pool."""
    num_parts = outputs.largest.shape[3]
    place = Place.of(step, program, num_parts)
    logits = read_logits(inputs.logits)

    def lowest(_, rank, so_far):
        return jnp.minimum(so_far, jnp.min(jnp.where(rank == NOT_A_CANDIDATE, HIGHEST_RANK, rank)))

    cut = over_pool(inputs.by_score, place, lowest, HIGHEST_RANK)
    plan = plan_query(step, inputs.after, place.kv_row, place.token)
    weigher = Weigher(step, inputs, outputs, place, plan, cut, logits)

    @pl.when(place.part == 0)
    def _():
        outputs.cut[place.at] = made_logits(number_of(cut), logits)

    size = tokens_of_part(step, sealing)
    if sealing is None:
        first = plan.first + place.part * size
        last = jnp.minimum(first + size, plan.last)
        weigher.tokens(first, last, pool=place.part == 0)
        return
    sealed = sealed_at(inputs.after.lengths[place.row], inputs.base[place.row], sealing, step.S)
    first = jnp.maximum(sealed, plan.first) + (place.part - 1) * size
    last = jnp.minimum(first + size, plan.last)

    @pl.when(place.part == 0)
    def _():
        weigher.cells(sealing)

    @pl.when(place.part > 0)
    def _():
        weigher.tokens(first, last)


# The end


class EndInputs(NamedTuple):
    """All that is known of each query's attention."""

    parts: tuple[Parts, ...]
    losers: Losers
    rest: Weights
    sums: Any  # f32[R, M', C', H']
    counts: Any  # i32[R, M', C']
    after: Lengths
    lengths: Any  # not read


def merge_rest_kernel(program, inputs: EndInputs, outputs: Ended, *, step: Step):
    place = Place.of(step, program, 1)
    found = [read_parts(parts, *place.at) for parts in inputs.parts]
    found = functools.reduce(merge_two, found)
    rest = Rest.of(inputs, place)
    found = merge_two(found, rest.estimate(step))
    write_output(outputs.output, *place.at, found)
    write_length(inputs.after, outputs.lengths, place.row, (place.token == 0) & (place.head == 0))


class Rest(NamedTuple):
    """One program's view of its query.

    Attributes:
      inputs, place: of the program.
      correction: of what PQ says.
      largest: the largest logit of the rest.
    """

    inputs: EndInputs
    place: Place
    correction: Array
    largest: Array

    @classmethod
    def of(cls, inputs: EndInputs, place: Place) -> "Rest":
        losers, rest = inputs.losers, inputs.rest
        largest_true, total_true = total_of_parts(losers.largest_true, losers.total_true, place)
        largest_by_pq, total_by_pq = total_of_parts(losers.largest_by_pq, losers.total_by_pq, place)
        cut = rest.cut[place.at]
        largest = jnp.maximum(largest_of(rest.largest, place), largest_of(losers.largest, place))
        at_cut = sum_of_parts(
            rest.at_cut, place, 0, jnp.arange(rest.at_cut.shape[5], dtype=jnp.int32)
        )
        largest = jnp.where(
            (jnp.sum(at_cut) > 0) & (cut < jnp.inf), jnp.maximum(largest, cut), largest
        )
        correction = corrected_by(largest_true, total_true, largest_by_pq, total_by_pq)
        return cls(inputs, place, correction, largest)

    def weights(self, m: int, code: Array) -> Array:
        """What each of some codes weighs, relative to the largest logit."""
        losers, rest, largest = self.inputs.losers, self.inputs.rest, finite(self.largest)
        by_pq = sum_of_parts(rest.weights, self.place, m, code, rest.largest, largest)
        at_cut = sum_of_parts(rest.at_cut, self.place, m, code).astype(jnp.float32)
        cut = rest.cut[self.place.at]
        weighs = (at_cut > 0) & (cut < jnp.inf)
        by_pq += jnp.where(weighs, at_cut * jnp.exp(cut - largest), 0)
        lost = sum_of_parts(losers.weights, self.place, m, code, losers.largest, largest)
        return by_pq * self.correction + lost

    def estimate(self, step: Step) -> Softmax:
        """The rest as a part of the softmax."""
        place, (_, by, number, size) = self.place, self.inputs.sums.shape
        code = jnp.arange(number, dtype=jnp.int32)

        def counts(m: int, code: Array) -> Array:
            return self.inputs.counts[place.kv_row, m, code]

        all_weights = [self.weights(m, code) for m in range(by)]
        total = jnp.sum(all_weights[0])
        # Empty codes have the mean of all, of which (M' - 1) times is too much.
        empty = sum(
            jnp.sum(jnp.where(counts(m, code) == 0, weights, 0))
            for m, weights in enumerate(all_weights)
        )
        summed = jnp.sum(counts(0, code))
        number_of_all = jnp.maximum(summed, 1).astype(jnp.float32)
        of_all = (empty - (by - 1) * total) / number_of_all
        d = jnp.arange(padded(size), dtype=jnp.int32)
        at_once = min(max(step.tuning.weighed_tile // d.size, 1), number)
        values = jnp.zeros(d.size, jnp.float32)
        for m in range(by):

            def add(i, values, m=m):
                code = i * at_once + jnp.arange(at_once, dtype=jnp.int32)
                count = counts(m, code)
                share = self.weights(m, code) / jnp.maximum(count, 1).astype(jnp.float32)
                share = jnp.where(count > 0, share, 0) + (of_all if m == 0 else 0)
                sums = backend.load(
                    self.inputs.sums.at[place.kv_row, m, code[:, None], d[None, :]],
                    mask=jnp.broadcast_to((d < size)[None, :], (at_once, d.size)),
                    other=0,
                )
                return values + jnp.sum(share[:, None] * sums, axis=0)

            values = lax.fori_loop(0, number // at_once, add, values)
        is_there = (total > 0) & (summed > 0)
        return Softmax(
            jnp.where(is_there, self.largest, -jnp.inf),
            jnp.where(is_there, total, 0),
            jnp.where(is_there, values, 0),
        )


def parts_at_once(num_parts: int) -> int:
    return min(power_of_2_from(num_parts), MERGED_AT_ONCE)


def read_part(x: Any, place: Place, i: Array, other: float) -> tuple[Array, Array]:
    """Some numbers of parts, and which of them exist."""
    at_once = parts_at_once(x.shape[3])
    part = i * at_once + jnp.arange(at_once, dtype=jnp.int32)
    exists = part < x.shape[3]
    at = (*place.at, jnp.where(exists, part, 0))
    return backend.load(x.at[at], mask=exists, other=other), exists


def turns_of(x: Any) -> int:
    return pl.cdiv(x.shape[3], parts_at_once(x.shape[3]))


def largest_of(x: Any, place: Place) -> Array:
    """The largest number of all parts."""

    def one(i, so_far):
        return jnp.maximum(so_far, jnp.max(read_part(x, place, i, -jnp.inf)[0]))

    return lax.fori_loop(0, turns_of(x), one, jnp.float32(-jnp.inf))


def total_of_parts(largest: Any, total: Any, place: Place) -> tuple[Array, Array]:
    """The largest logit of all parts, 0 if there is none, and the total relative to it."""
    of_all = finite(largest_of(largest, place))

    def one(i, so_far):
        scale = jnp.exp(read_part(largest, place, i, -jnp.inf)[0] - of_all)
        return so_far + jnp.sum(scale * read_part(total, place, i, 0.0)[0])

    return of_all, lax.fori_loop(0, turns_of(largest), one, jnp.float32(0))


def sum_of_parts(
    x: Any, place: Place, m: int, code: Array, largest: Any = None, of_all: Any = 0
) -> Array:
    """Sums by code over all parts; each scaled from its largest logit, if given, to that of all."""
    at_once = parts_at_once(x.shape[3])

    def one(i, so_far):
        part = i * at_once + jnp.arange(at_once, dtype=jnp.int32)
        exists = part < x.shape[3]
        part = jnp.where(exists, part, 0)
        found = backend.load(
            x.at[(*place.at, part[:, None], m, code[None, :])],
            mask=jnp.broadcast_to(exists[:, None], (at_once, code.size)),
            other=0,
        )
        if largest is not None:
            scale = jnp.exp(read_part(largest, place, i, -jnp.inf)[0] - of_all)
            found = found * jnp.where(exists, scale, 0)[:, None]
        return so_far + jnp.sum(found, axis=0)

    return lax.fori_loop(0, pl.cdiv(x.shape[3], at_once), one, jnp.zeros(code.size, x.dtype))


# Launches


def weigh_launch(
    step: Step,
    pool: Pool,
    indices: Array,
    table: Float[Array, "R Q MC"],
    index: PQIndex,
    after: Lengths,
    logits: Logits,
    by: tuple[int, int],
    uses_cells: bool,
    layer: Array | None,
) -> backend.Launch:
    """The launch that weighs the candidates outside of a pool.

    Args:
      step: of the config that reranks.
      pool: its ranks.
      indices: its lists.
      table: look-up tables by query.
      index: after the step.
      after: the lengths after it.
      logits: how to make logits.
      by: M' and C'.
      uses_cells: whether to take sealed candidates by their cells.
      layer: of the index.
    """
    cells: Cells | None = index.cells if uses_cells else None
    size = tokens_of_part(step, None if cells is None else cells.sealing)
    if cells is None:
        num_parts = max(pl.cdiv(step.S - step.config.window_size, size), 1)
    else:
        num_parts = 1 + max(pl.cdiv(min(cells.sealing.most_tail(step.S), step.S), size), 1)
    queries = step.B, step.T, step.N

    def of_parts(dtype: Any, *rest: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*queries, num_parts, *rest), dtype)

    return backend.Launch(
        functools.partial(
            weigh_rest_kernel, step=step, sealing=None if cells is None else cells.sealing
        ),
        WeighInputs(
            after,
            pool.by_score,
            indices,
            table,
            step.by_rows(index.codes),
            None if cells is None else cells.base,
            None if cells is None else step.by_rows(cells.starts),
            vectors(logits),
        ),
        Weights(
            jax.ShapeDtypeStruct(queries, np.float32),
            of_parts(np.float32),
            of_parts(np.float32, *by),
            of_parts(np.int32, *by),
        ),
        programs=step.B * step.T * step.N * num_parts,
        state=("codes", "base", "starts"),
        layer=layer,
    )


def merge_rest(
    step: Step,
    query: Float[Array, "B T N H"],
    parts: tuple[Parts, ...],
    losers: Losers,
    rest: Weights,
    index: PQIndex,
    after: Lengths,
    lengths: Array,
    layer: Array | None,
) -> Ended:
    """The output of a step, and its lengths in place of those before."""
    values = index.values
    assert values is not None
    what = backend.Launch(
        functools.partial(merge_rest_kernel, step=step),
        EndInputs(
            parts,
            losers,
            rest,
            step.by_rows(values.sums),
            step.by_rows(values.counts),
            after,
            lengths,
        ),
        shapes_of_end(query, values.sums.shape[-1], lengths, after, layer),
        programs=step.B * step.T * step.N,
        in_place=("lengths",),
        state=("sums", "counts", "lengths"),
        layer=layer,
    )
    return backend.launch(what, num_warps=step.tuning.merged_warps)
