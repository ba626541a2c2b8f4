"""The rest: candidates that are not attended to, estimated from their scores and means of values.

What candidates outside of a pool weigh by PQ is added up by code. Where a search of cells finds the
pool, it follows from how many tokens each cell has and who of them wins: all together the search
adds it up, by code another program does. Elsewhere programs go through all tokens. The lowest score
in the pool is the cut: below it nothing is in the pool; tokens at it are counted, so that nothing
remains where all of them are in the pool.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from jax_indexer.kernels import backend
from jax_indexer.kernels.attend import MERGED_AT_ONCE, Softmax, finite, padded, read_logits, vectors
from jax_indexer.kernels.best import HIGHEST, Entry, Few, number_of, of_threads, reduced_together
from jax_indexer.kernels.cells_select import (
    MOST_SIZE,
    TAKEN,
    Inputs,
    Outputs,
    Part,
    Scores,
    Search,
    Tail,
    Taken,
    search_for,
)
from jax_indexer.kernels.step import Place, Step, plan_query
from jax_indexer.layout import power_of_2_from
from jax_indexer.reference import NOT_A_CANDIDATE, Logits, corrected_by, made_logits
from jax_indexer.state import Sealing
from jax_indexer.values import sums_by

# Parts that a context is weighed in, at the most, token by token.
MOST_PARTS = 64
# Codes of other subspaces whose cells are looked at at once in turns, which few searches take.
OTHERS_IN_TURN = 16


class Weighed(NamedTuple):
    """What candidates weigh by PQ, token by token, in parts.

    Attributes:
      largest: f32[B, T, N, parts], the largest logit below the cut.
      weights: f32[B, T, N, parts, M', C'], the sums of exp(logit - largest) below it, by code.
      at_cut: i32[B, T, N, parts, M', C'], how many tokens are at the cut.
    """

    largest: Any
    weights: Any
    at_cut: Any


class WeighedAsCells(NamedTuple):
    """What candidates weigh by PQ, cell by cell.

    Attributes:
      numbers: f32[R, Q, NUMBERS], those of `WeighedCells`.
      weights: f32[R, Q, M', C'], the sums of exp(logit - largest) outside of the pool by code;
        None where the numbers say it.
    """

    numbers: Any
    weights: Any


class Sources(NamedTuple):
    """What the rest is made from.

    Attributes:
      sums: f32[R, M', C', H'], of values.
      counts: i32[R, M', C'].
      weighed: what candidates weigh, None where a search has left it.
    """

    sums: Any
    counts: Any
    weighed: Weighed | WeighedAsCells | None


class Scored(NamedTuple):
    """Tokens, or cells of them, in registers: how many each stands for, and its logit by PQ."""

    size: Array
    logit: Array

    @classmethod
    def of(cls, rank: Array, size: Array, logits: Logits) -> "Scored":
        """Of ranks of scores; what has no finite weight stands for nothing."""
        logit = made_logits(number_of(rank), logits)
        return cls(jnp.where(logit < jnp.inf, size, 0), logit)

    def largest(self) -> Array:
        return jnp.max(jnp.where(self.size > 0, self.logit, -jnp.inf))

    def weights(self, largest: Array) -> Array:
        """What each weighs, relative to the largest logit."""
        weight = jnp.exp(self.logit - finite(largest)) * self.size.astype(jnp.float32)
        return jnp.where(self.size > 0, weight, 0)


class Members(NamedTuple):
    """A pool in registers, a lane for each entry.

    Attributes:
      position: in the cache.
      is_candidate: which lanes are candidates.
      lost: what candidates weigh that are not attended to, relative to `largest_lost`.
      largest_lost: no less than their true logits, and no more than the largest of all; None, as
        `lost`, where all are attended to.
      largest, total: of all true logits, and of the exponentials relative to it; None where these
        are not known.
    """

    position: Array
    is_candidate: Array
    lost: Array | None
    largest_lost: Array | None
    largest: Array | None
    total: Array | None


class Relative(NamedTuple):
    """What weights of the rest are made relative to the same logit by.

    Attributes:
      largest: that logit.
      others: factor of candidates outside of the pool, with the correction of what PQ says.
      lost: factor of `Members.lost`, 0 without them.
    """

    largest: Array
    others: Array | float
    lost: Array | float

    @classmethod
    def of(cls, pool: Members | None, largest: Array, of_pool: tuple[Array, Array]) -> "Relative":
        """From the largest logit by PQ of others, and the pool's, with the total relative to it."""
        if pool is None or pool.largest is None or pool.total is None:
            return cls(largest, 1.0, 0.0)
        others, lost = largest, 0.0
        if pool.largest_lost is not None:
            largest = jnp.maximum(largest, pool.largest_lost)
            lost = jnp.exp(pool.largest_lost - finite(largest))
        correction = corrected_by(pool.largest, pool.total, *of_pool)
        return cls(largest, correction * jnp.exp(others - finite(largest)), lost)


class Estimated(NamedTuple):
    """Candidates that are not attended to.

    Attributes:
      rest: what they are, as a part of a softmax.
      of_pool: what the pool weighs by PQ: its largest logit, and the total relative to it.
    """

    rest: Softmax
    of_pool: tuple[Array, Array]


def asked_later(step: Step) -> dict[str, Any]:
    """Fields of a search's `Outputs` that the rest is made from."""
    rest = step.config.estimate_rest
    return {
        "weighed": step.scratch(np.float32, NUMBERS) if rest == "mean" else None,
        "taken": step.scratch(np.int32, TAKEN) if rest == "codes" else None,
    }


def by_code(code: Array, number: int, amount: Array) -> Array:
    """Sums of amounts by code."""
    if number == 1:
        return jnp.sum(amount)[None]
    each = jnp.arange(number, dtype=jnp.int32)
    zero = jnp.zeros((), amount.dtype)
    # This way round a warp has all codes, and adds up its tokens by itself.
    return jnp.sum(jnp.where(each[None, :] == code[:, None], amount[:, None], zero), axis=0)


class WeighedCells(NamedTuple):
    """What candidates weigh by PQ, of a search of cells.

    Attributes:
      largest, of_pool: the largest logit outside of the pool, and that in it; -inf for none.
      total, total_of_pool: the sums of exp(logit - largest) outside and in it; the former is 0
        where there are sums by code.
    """

    largest: Array
    of_pool: Array
    total: Array
    total_of_pool: Array

    @classmethod
    def read(cls, numbers: Any, at: tuple[Array, Array]) -> "WeighedCells":
        """What is known of a query."""
        return cls(*(numbers[(*at, i)] for i in range(len(cls._fields))))

    @staticmethod
    def write_nothing(numbers: Any, at: tuple[Array, Array]) -> None:
        """Writes that there is no candidate."""
        number = jnp.arange(NUMBERS, dtype=jnp.int32)
        is_logit = number < WeighedCells._fields.index("total")
        backend.store(numbers.at[(*at, number)], jnp.where(is_logit, -jnp.inf, 0))

    def write(self, numbers: Any, at: tuple[Array, Array]) -> None:
        for i, x in enumerate(self):
            numbers[(*at, i)] = x


NUMBERS = len(WeighedCells._fields)


class WeighedFew(NamedTuple):
    """What the few that may win weigh by PQ: the pool, and most that is asked of others.

    Attributes:
      below: the largest rank outside of the pool that is below the cut, if it is among few.
      at_cut: the logit of the cut.
      left: how many at it are outside of the pool.
      of_pool, total_of_pool: as in `WeighedCells`.
    """

    below: Array
    at_cut: Array
    left: Array
    of_pool: Array
    total_of_pool: Array

    @classmethod
    def of(cls, search: Search, logits: Logits, few: Few, taken: Taken) -> "WeighedFew":
        """From a search, how to make logits, the few, and who of them is in the pool."""

        def above(x: Entry, logit: Array) -> Array:
            return (x.size > 0) & (x.rank > taken.rank) & (logit < jnp.inf)

        def look(so_far: tuple[Array, ...], entries: list[Entry]) -> tuple[Array, ...]:
            largest, below, number = so_far
            for x in entries:
                logit = logit_of(x.rank, logits)
                largest = jnp.maximum(largest, jnp.where(above(x, logit), logit, -jnp.inf))
                is_below = x.rank < lowest_of(taken)
                below = jnp.maximum(below, jnp.where(is_below, x.rank, NOT_A_CANDIDATE))
                is_at = (x.size > 0) & (x.rank == taken.rank) & (taken.ties > 0)
                large = search.size_of(x.number, is_at & x.is_cell & (x.size == MOST_SIZE))
                number += jnp.where(is_at, jnp.maximum(x.size, large), 0)
            return largest, below, number

        none = jnp.full(few.threads, -jnp.inf, jnp.float32)
        nobody = jnp.full(few.threads, NOT_A_CANDIDATE, jnp.int32)
        largest, below, number = few.fold(look, (none, nobody, jnp.zeros_like(nobody)))
        largest, below, number = jnp.max(largest), jnp.max(below), jnp.sum(number)
        at_cut = logit_of(taken.rank, logits)
        ties, left = (
            jnp.where(at_cut < jnp.inf, x, 0).astype(jnp.float32)
            for x in (taken.ties, number - taken.ties)
        )
        of_pool = jnp.maximum(largest, jnp.where(ties > 0, at_cut, -jnp.inf))

        def add(so_far: Array, entries: list[Entry]) -> Array:
            for x in entries:
                logit = logit_of(x.rank, logits)
                weight = x.size.astype(jnp.float32) * jnp.exp(logit - finite(of_pool))
                so_far += jnp.where(above(x, logit), weight, 0)
            return so_far

        total = jnp.sum(few.fold(add, jnp.zeros_like(none)))
        return cls(below, at_cut, left, of_pool, with_cut(total, ties, at_cut, of_pool))

    def largest(self, logits: Logits, look_at_all: Callable[[], Array]) -> Array:
        """The largest logit outside of the pool, if need be that of all below the cut."""
        of_below = logit_of(self.below, logits)
        rise = logits.scale >= 0  # with ranks
        is_known = rise & (self.below != NOT_A_CANDIDATE) & (of_below < jnp.inf)
        below = lax.cond(is_known, lambda: of_below, look_at_all)
        return jnp.maximum(below, jnp.where(self.left > 0, self.at_cut, -jnp.inf))


def logit_of(rank: Array, logits: Logits) -> Array:
    return made_logits(number_of(rank), logits)


def lowest_of(taken: Taken) -> Array:
    """Who is below it need not be among few: of a cut that takes none at it, so are those at it."""
    return jnp.where(taken.ties > 0, taken.rank, taken.rank + 1)


def with_cut(total: Array, number: Array, at_cut: Array, largest: Array) -> Array:
    """A total with a number of tokens more, at the cut."""
    return total + jnp.where(number > 0, number * jnp.exp(at_cut - finite(largest)), 0)


def weigh_cells(
    search: Search, logits: Logits, cells: Part, tail: Tail, few: Few, taken: Taken
) -> WeighedCells:
    """What candidates weigh by PQ, those outside of a pool and those in it, all together.

    Args:
      search: the search.
      logits: how to make logits.
      cells, tail: all candidates.
      few: those that may win.
      taken: who of them does.
    """
    of_few, lowest = WeighedFew.of(search, logits, few, taken), lowest_of(taken)
    scored = [
        Scored.of(part.rank, jnp.where(part.rank < lowest, size, 0), logits)
        for part, size in ((cells, cells.size), (tail, tail.exists.astype(jnp.int32)))
    ]

    def look_at_all() -> Array:
        found = [jnp.where(x.size > 0, x.logit, -jnp.inf) for x in scored]
        return jnp.max(of_threads(found, jnp.max, jnp.maximum))

    largest = of_few.largest(logits, look_at_all)
    total = jnp.sum(of_threads([x.weights(largest) for x in scored], jnp.sum, jnp.add))
    total = with_cut(total, of_few.left, of_few.at_cut, largest)
    return WeighedCells(largest, of_few.of_pool, total, of_few.total_of_pool)


class CellsByCode(NamedTuple):
    """What is left of a query's cells, a row for each code of a subspace.

    Attributes:
      search: of the query.
      usable: whether it had anything to look for.
      logits: how to make logits.
    """

    search: Search
    usable: Array
    logits: Logits

    @property
    def others(self) -> int:
        """Cells of a row: codes of the other subspaces."""
        return self.search.step.config.num_cells // self.search.step.config.num_centroids

    def read(self, m: int, first: Array | int, at_once: int, left_of: Callable) -> Scored:
        """Some cells by their codes of subspace m, [C, at_once]; see `Search.left_of`."""
        config = self.search.step.config
        by, bits, C = config.num_subspaces, config.num_bits, config.num_centroids
        code = jnp.arange(C, dtype=jnp.int32)[:, None]
        other = first + jnp.arange(at_once, dtype=jnp.int32)[None, :]
        low = bits * (by - 1 - m)
        # Plain at the ends, so that loads are seen to lie side by side.
        before, behind = (other >> low if m else 0), (other & ((1 << low) - 1) if m else other)
        cell = ((before << bits) + code << low) + behind
        digits = [(other >> bits * i) & (C - 1) for i in reversed(range(by - 1))]
        rank = self.search.scores.rank_of([*digits[:m], code, *digits[m:]])
        exists = jnp.broadcast_to(self.usable, cell.shape)
        return Scored.of(rank, left_of(cell, exists, rank), self.logits)

    def all(self, m: int, left_of: Callable) -> Scored:
        """All of them."""
        return self.read(m, 0, self.others, left_of)

    def fold(self, m: int, left_of: Callable, visit: Callable, state: float) -> Array:
        """visit(state, some of them) in turns, which take few registers."""
        at_once = min(self.others, OTHERS_IN_TURN)

        def turn(i: Array, state: Array) -> Array:
            return visit(state, self.read(m, i * at_once, at_once, left_of))

        begin = jnp.full((self.search.step.config.num_centroids, at_once), state, jnp.float32)
        return lax.fori_loop(0, self.others // at_once, turn, begin)


def weigh_codes(
    search: Search, fits: Array, logits: Logits, taken: Taken, count: Array
) -> tuple[WeighedCells, list[Array]]:
    """What candidates weigh by PQ, and sums by code of those outside of the pool.

    Args:
      search: of the pool.
      fits: whether its state fits.
      logits: how to make logits.
      taken, count: what it found, as `Search.count_others` takes it.
    """
    usable, by = search.has_cut(fits), search.step.config.num_subspaces
    cells = CellsByCode(search, usable, logits)

    def look_at_all() -> Array:
        def below(cell: Array, exists: Array, rank: Array) -> Array:
            return jnp.where(rank < lowest_of(taken), search.number_of(cell, exists), 0)

        def look(so_far: Array, x: Scored) -> Array:
            return jnp.maximum(so_far, jnp.where(x.size > 0, x.logit, -jnp.inf))

        return jnp.max(cells.fold(0, below, look, -jnp.inf))

    of_few = WeighedFew.of(search, logits, search.read_few(), taken)
    largest = of_few.largest(logits, look_at_all)

    def together() -> list[Array]:
        left_of = functools.partial(search.left_of, taken=taken, mixed=False)
        first = cells.all(0, left_of).weights(largest)
        sums = [jnp.sum(first, axis=1)]
        if by == 2:  # all others are one subspace
            sums += [jnp.sum(first, axis=0)]
        others = (cells.all(m, left_of).weights(largest) for m in range(len(sums), by))
        return sums + [jnp.sum(x, axis=1) for x in others]

    def in_turns() -> list[Array]:
        """What few searches need."""
        search.count_others(taken, count)

        def add(so_far: Array, x: Scored) -> Array:
            return so_far + x.weights(largest)

        left_of = functools.partial(search.left_of, taken=taken, mixed=True)
        return [jnp.sum(cells.fold(m, left_of, add, 0.0), axis=1) for m in range(by)]

    sums = lax.cond(usable & taken.is_mixed, in_turns, together)
    total = jnp.float32(0)  # sums by code say it
    return WeighedCells(largest, of_few.of_pool, total, of_few.total_of_pool), sums


def weighed_beside(
    search: Search, fits: Array, logits: Logits, find: Callable[..., None]
) -> tuple[WeighedCells, list[Array]]:
    """What candidates weigh, of a search that `find` makes, and sums by code outside of its pool.

    Args:
      search: the search.
      fits: whether its state fits.
      logits: how to make logits.
      find: makes it, and takes what `Search.find` does as `weigh`.
    """
    at = search.kv_row, search.query
    if search.outputs.taken is None:
        find_and_weigh(search, fits, logits, find)
        backend.barrier()
        weighed = WeighedCells.read(search.outputs.weighed, at)
        return weighed, [weighed.total[None]]
    pl.when(search.has_cut(fits))(search.count_candidates)
    find()
    backend.barrier()
    return weigh_codes(search, fits, logits, *Taken.read(search.outputs.taken, at))


def find_and_weigh(search: Search, fits: Array, logits: Logits, find: Callable[..., None]) -> None:
    """Writes what candidates weigh all together; arguments are those of `weighed_beside`."""
    at, numbers = (search.kv_row, search.query), search.outputs.weighed

    @pl.when(~search.has_cut(fits))
    def _():
        WeighedCells.write_nothing(numbers, at)

    find(weigh=lambda *found: weigh_cells(search, logits, *found).write(numbers, at))


def read_weighed(found: WeighedAsCells, place: Place) -> tuple[WeighedCells, list[Array]]:
    """What another launch has weighed, and sums by code outside of the pool."""
    at = place.of_kv
    weighed = WeighedCells.read(found.numbers, at)
    if found.weights is None:
        return weighed, [weighed.total[None]]
    by, number = found.weights.shape[2:]
    code = jnp.arange(number, dtype=jnp.int32)
    return weighed, [backend.load(found.weights.at[(*at, m, code)]) for m in range(by)]


class Estimator(NamedTuple):
    """One program's view of its query.

    Attributes:
      step: of the config that reranks.
      scores: of the query.
      place: of the query.
      logits: how to make logits.
      sources: means of values, and what is weighed.
    """

    step: Step
    scores: Scores
    place: Place
    logits: Logits
    sources: Sources

    @property
    def by(self) -> tuple[int, int]:
        """M' and C'."""
        return sums_by(self.step.config)

    def of_cells(
        self,
        weighed: WeighedCells,
        weights: list[Array],
        pool: Members | None,
        means: "Means",
        lost: list[Array] | None,
    ) -> Estimated:
        """Candidates that are not attended to, where they were weighed cell by cell.

        Args:
          weighed: what they weigh.
          weights: the same by code, outside of the pool, relative to the largest there.
          pool: what is known of the pool; None where no true logit is.
          means: of values.
          lost: sums of `Members.lost` by code; None for a pool that loses nothing.
        """
        of_pool = weighed.of_pool, weighed.total_of_pool
        relative = Relative.of(pool, weighed.largest, of_pool)
        weights = [relative.others * x for x in weights]
        if lost is not None:
            weights = [x + relative.lost * y for x, y in zip(weights, lost, strict=True)]
        return Estimated(with_values(relative.largest, weights, means), of_pool)

    def of_parts(
        self, pool: Members, means: "Means", by_codes: Callable[[Array], list[Array]]
    ) -> Estimated:
        """Candidates that are not attended to, where they were weighed token by token.

        Args:
          pool: what is known of the pool.
          means: of values.
          by_codes: sums what lanes of the pool have by code, in each of M' subspaces.
        """
        weighed, (by, number) = self.sources.weighed, self.by
        assert isinstance(weighed, Weighed)
        score = self.scores.ranks_of_tokens(pool.position, pool.is_candidate)
        of_pool = Scored.of(score, pool.is_candidate.astype(jnp.int32), self.logits)
        cut = jnp.min(jnp.where(pool.is_candidate, score, HIGHEST))
        logit = made_logits(number_of(cut), self.logits)
        code = jnp.arange(number, dtype=jnp.int32)
        at_cut = [sum_of_parts(weighed.at_cut, self.place, m, code) for m in range(by)]
        in_pool = (score == cut) & (of_pool.size > 0)
        is_left = jnp.sum(at_cut[0]) > jnp.sum(in_pool.astype(jnp.int32))
        largest = largest_of(weighed.largest, self.place)
        largest = jnp.maximum(largest, jnp.where(is_left, logit, -jnp.inf))
        weight = jnp.where(is_left, jnp.exp(logit - finite(largest)), 0)
        below = (
            sum_of_parts(weighed.weights, self.place, m, code, weighed.largest, finite(largest))
            for m in range(by)
        )
        weights = [x + weight * at.astype(jnp.float32) for x, at in zip(below, at_cut, strict=True)]
        most = of_pool.largest()
        weight_of_pool = most, jnp.sum(of_pool.weights(most))
        relative = Relative.of(pool, largest, weight_of_pool)
        # The pool's own tokens at the cut are among those counted there.
        amount = jnp.where(in_pool, -relative.others * weight, 0)
        if pool.lost is not None:
            amount += relative.lost * pool.lost
        sums = zip(weights, by_codes(amount), strict=True)
        weights = [relative.others * x + y for x, y in sums]
        rest = with_values(relative.largest, weights, means)
        return Estimated(rest, weight_of_pool)

    def read_means(self) -> "Means":
        """Read before all that waits for something else."""
        sums, kv_row = self.sources.sums, self.place.kv_row
        _, by, number, size = sums.shape
        code = jnp.arange(number, dtype=jnp.int32)
        d = jnp.arange(padded(size), dtype=jnp.int32)
        mask = jnp.broadcast_to((d < size)[None, :], (number, d.size))
        return Means(
            [self.sources.counts[kv_row, m, code] for m in range(by)],
            [
                backend.load(sums.at[kv_row, m, code[:, None], d[None, :]], mask=mask, other=0)
                for m in range(by)
            ],
        )


class Means(NamedTuple):
    """What values' means are made from, in registers: i32[C'] and f32[C', H'] for each of M'."""

    counts: list[Array]
    sums: list[Array]


def with_values(largest: Array, weights: list[Array], means: Means) -> Softmax:
    """Weights by code, relative to the largest logit, with the means of the codes' values."""
    counts, by = means.counts, len(means.counts)
    empty = [jnp.where(x == 0, weight, 0) for x, weight in zip(counts, weights, strict=True)]
    of_codes = weights[0], sum(empty[1:], empty[0]), counts[0].astype(jnp.float32)
    total, of_empty, summed = reduced_together(of_codes, jnp.sum)
    total = jnp.maximum(total, 0)
    # Empty codes have the mean of all, of which (M' - 1) times is too much.
    of_all = (of_empty - (by - 1) * total) / jnp.maximum(summed, 1)
    values = jnp.zeros(means.sums[0].shape[1], jnp.float32)
    for m, (count, weight) in enumerate(zip(counts, weights, strict=True)):
        share = weight / jnp.maximum(count, 1).astype(jnp.float32)
        share = jnp.where(count > 0, share, 0) + (of_all if m == 0 else 0)
        values += jnp.sum(share[:, None] * means.sums[m], axis=0)
    is_there = (total > 0) & (summed > 0)
    return Softmax(
        jnp.where(is_there, largest, -jnp.inf),
        jnp.where(is_there, total, 0),
        jnp.where(is_there, values, 0),
    )


# Behind a search of cells


class CodesInputs(NamedTuple):
    """What a search of cells went through, and what it found: as in `Outputs`."""

    search: Inputs
    logits: Logits
    taken: Any
    few: Any
    positions: Any
    sizes: Any


class CodesOutputs(NamedTuple):
    """What candidates weigh; and scratch, as in `Outputs`."""

    weighed: WeighedAsCells
    others: Any


def weigh_codes_kernel(
    program,
    inputs: CodesInputs,
    outputs: CodesOutputs,
    *,
    step: Step,
    sealing: Sealing,
    num_warps: int,
):
    """What the candidates of a query weigh by code, from scores as its search had them."""
    place, of_pool, logits = Place.of(step, program), step.of_pool, read_logits(inputs.logits)
    plan = place.plan(of_pool, inputs.search.lengths)
    scratch = Outputs.only(
        few=inputs.few, positions=inputs.positions, sizes=inputs.sizes, others=outputs.others
    )
    search = search_for(of_pool, sealing, num_warps, inputs.search, scratch, *place.of_kv, plan)
    found = Taken.read(inputs.taken, place.of_kv)
    weighed, sums = weigh_codes(search, search.state_fits(), logits, *found)
    weighed.write(outputs.weighed.numbers, place.of_kv)
    code = jnp.arange(step.config.num_centroids, dtype=jnp.int32)
    for m, x in enumerate(sums):
        backend.store(outputs.weighed.weights.at[(*place.of_kv, m, code)], x)


def weigh_codes_launch(
    step: Step, sealing: Sealing, search: backend.Launch, found: Outputs, logits: Logits
) -> backend.Launch:
    """The launch that weighs all candidates by code.

    Args:
      step: of the config that reranks.
      sealing: of the cells.
      search: for a pool.
      found: what it has found.
      logits: how to make logits.
    """
    warps = step.tuning.ranked_warps
    return backend.Launch(
        functools.partial(weigh_codes_kernel, step=step, sealing=sealing, num_warps=warps),
        CodesInputs(
            search.inputs,
            vectors(logits),
            found.taken,
            found.few,
            found.positions,
            found.sizes,
        ),
        CodesOutputs(
            WeighedAsCells(
                step.scratch(np.float32, NUMBERS),
                step.scratch(np.float32, *sums_by(step.config)),
            ),
            step.scratch(np.int32, step.config.num_cells),
        ),
        programs=search.programs,
        state=tuple(f"search.{name}" for name in search.state),
        layer=search.layer,
    )


# Parts that were weighed before


def parts_at_once(num_parts: int) -> int:
    return min(power_of_2_from(num_parts), MERGED_AT_ONCE)


def read_part(x: Any, place: Place, i: Array, other: float) -> tuple[Array, Array]:
    """Some numbers of parts, and which of them exist."""
    at_once = parts_at_once(x.shape[3])
    part = i * at_once + jnp.arange(at_once, dtype=jnp.int32)
    exists = part < x.shape[3]
    at = (*place.at, jnp.where(exists, part, 0))
    return backend.load(x.at[at], mask=exists, other=other), exists


def largest_of(x: Any, place: Place) -> Array:
    """The largest number of all parts."""

    def one(i, so_far):
        return jnp.maximum(so_far, jnp.max(read_part(x, place, i, -jnp.inf)[0]))

    turns = pl.cdiv(x.shape[3], parts_at_once(x.shape[3]))
    return lax.fori_loop(0, turns, one, jnp.float32(-jnp.inf))


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


class WeighInputs(NamedTuple):
    """Lists of a pool, i32[B, T, N, P], and what all candidates are scored by."""

    search: Inputs
    indices: Any
    logits: Logits


def weigh_tokens_kernel(program, inputs: WeighInputs, outputs: Weighed, *, step: Step):
    """What some of the candidates of a query weigh."""
    num_parts, by, number = outputs.weights.shape[3:]
    place, part = Place.of(step, program // num_parts), program % num_parts
    logits = read_logits(inputs.logits)
    plan = plan_query(step, inputs.search.lengths, place.kv_row, place.token)
    scores = Scores(step, inputs.search.table, inputs.search.codes, place.kv_row, place.query)

    slot = jnp.arange(power_of_2_from(step.pooled), dtype=jnp.int32)
    plan_of_pool = plan_query(step.of_pool, inputs.search.lengths, place.kv_row, place.token)
    listed = slot < plan_of_pool.between(step.config)
    entry = jnp.where(listed, step.config.sink_size + slot, 0)
    position = backend.load(inputs.indices.at[(*place.at, entry)], mask=listed, other=-1)
    exists = (position >= plan.first) & (position < plan.last)
    cut = scores.ranks_of_tokens(jnp.where(exists, position, 0), exists)
    cut = jnp.min(jnp.where(cut == NOT_A_CANDIDATE, HIGHEST, cut))

    at_once = min(max(2 * step.tuning.weighed_tile // number, 16), step.tuning.weighed_tokens)
    first = plan.first + part * tokens_of_part(step)
    last = jnp.minimum(first + tokens_of_part(step), plan.last)

    def weigh(i, carry):
        so_far, weights, at_cut = carry
        token = first + i * at_once + jnp.arange(at_once, dtype=jnp.int32)
        exists = token < last
        token = jnp.where(exists, token, 0)
        rank = scores.ranks_of_tokens(token, exists)
        found = Scored.of(rank, exists.astype(jnp.int32), logits)
        at = jnp.where(rank == cut, found.size, 0)
        found = found._replace(size=jnp.where(rank < cut, found.size, 0))
        largest = jnp.maximum(so_far, found.largest())
        weight = found.weights(largest)
        scale = jnp.exp(so_far - finite(largest))
        codes = [token] if number == 1 else list(scores.codes_of(token, exists))
        weights = [
            x * scale + by_code(code, number, weight)
            for x, code in zip(weights, codes, strict=True)
        ]
        at_cut = [x + by_code(code, number, at) for x, code in zip(at_cut, codes, strict=True)]
        return largest, weights, at_cut

    turns = lax.div(jnp.maximum(last - first, 0) + (at_once - 1), jnp.int32(at_once))
    zeros = [[jnp.zeros(number, dtype)] * by for dtype in (jnp.float32, jnp.int32)]
    largest, weights, at_cut = lax.fori_loop(0, turns, weigh, (jnp.float32(-jnp.inf), *zeros))
    outputs.largest[(*place.at, part)] = largest
    code = jnp.arange(number, dtype=jnp.int32)
    for m in range(by):
        backend.store(outputs.weights.at[(*place.at, part, m, code)], weights[m])
        backend.store(outputs.at_cut.at[(*place.at, part, m, code)], at_cut[m])


def tokens_of_part(step: Step) -> int:
    """Tokens that a program weighs."""
    return max(step.tuning.weighed_tokens, power_of_2_from(pl.cdiv(step.S, MOST_PARTS)))


def weigh_tokens_launch(
    step: Step, search: Inputs, indices: Array, logits: Logits, layer: Array | None
) -> backend.Launch:
    """The launch that weighs all candidates token by token.

    Args:
      step: of the config that reranks.
      search: tables, codes and lengths.
      indices: lists of the pool.
      logits: how to make logits.
      layer: of the codes.
    """
    parts = max(pl.cdiv(step.S - step.config.window_size, tokens_of_part(step)), 1)
    of_parts = step.B, step.T, step.N, parts

    def shape(dtype: Any, *rest: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*of_parts, *rest), dtype)

    by = sums_by(step.config)
    return backend.Launch(
        functools.partial(weigh_tokens_kernel, step=step),
        WeighInputs(search, indices, vectors(logits)),
        Weighed(shape(np.float32), shape(np.float32, *by), shape(np.int32, *by)),
        programs=step.B * step.T * step.N * parts,
        state=("search.codes",),
        layer=layer,
    )
