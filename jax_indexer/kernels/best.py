"""The k best of a list of numbers: where the cut lies, and who makes it."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jax_indexer.kernels import backend
from jax_indexer.layout import power_of_2_from
from jax_indexer.reference import NOT_A_CANDIDATE, ordered

# Steps of a search after which it looks for ties: most data need no more of them.
STEPS_WITHOUT_TIES = 4
# Loads on their way at once when all pairs are compared.
PAIRS_AT_ONCE = 16

HIGHEST = np.int32(np.iinfo(np.int32).max)


class Ranks(NamedTuple):
    """A list of ranks that a program reads in chunks: a run of neighbouring places a thread.

    Attributes:
      read: from int32[threads] first places of runs to (the ranks at each place of a run,
        int32[threads]; what is not in the list ranks as no candidate), and the number of what is
        ranked at the first place, from which those of the others follow on.
      threads: of the program.
      run: places of a run.
      size: places that the list has.
      most: what `size` may be at the most. A list of one chunk stays in registers.
    """

    read: Callable[[Array], tuple[list[Array], Array]]
    threads: int
    run: int
    size: Array
    most: int

    @property
    def chunk(self) -> int:
        """Places read at once."""
        return self.threads * self.run

    def starts(self, chunk: Array | int) -> Array:
        """First places of the runs of one chunk."""
        return chunk * self.chunk + self.run * jnp.arange(self.threads, dtype=jnp.int32)

    def fold(self, visit: Callable, state):
        """visit(state, ranks, first numbers) for chunk after chunk."""
        if self.most <= self.chunk:
            return visit(state, *self.read(self.starts(0)))

        def step(i, state):
            return visit(state, *self.read(self.starts(i)))

        return lax.fori_loop(0, lax.div(self.size + (self.chunk - 1), self.chunk), step, state)

    @classmethod
    def of(cls, rank: Array, most: int) -> "Ranks":
        """Those in registers, one a lane, of which no more than `most` are candidates."""
        (lanes,) = rank.shape
        first = jnp.arange(lanes, dtype=jnp.int32)
        return cls(lambda _: ([rank], first), lanes, 1, jnp.int32(lanes), most)

    def held(self) -> "Ranks":
        """The same list, read once if it is one chunk."""
        if self.most > self.chunk:
            return self
        contents = self.read(self.starts(0))
        return self._replace(read=lambda _: contents)

    def extremes(self) -> tuple[Array, Array]:
        """The smallest rank of a candidate and the largest."""

        def visit(state, ranks, _):
            least, most = state
            for rank in ranks:
                least = jnp.minimum(least, jnp.where(rank == NOT_A_CANDIDATE, HIGHEST, rank))
                most = jnp.maximum(most, rank)
            return least, most

        start = jnp.full(self.threads, HIGHEST), jnp.full(self.threads, NOT_A_CANDIDATE)
        least, most = self.fold(visit, start)
        return jnp.min(least), jnp.max(most)

    def largest_below(self, high: Array) -> Array:
        """The largest rank below `high`."""

        def visit(most, ranks, _):
            for rank in ranks:
                most = jnp.maximum(most, jnp.where(rank < high, rank, NOT_A_CANDIDATE))
            return most

        return jnp.max(self.fold(visit, jnp.full(self.threads, NOT_A_CANDIDATE)))

    def counts(self, thresholds: tuple[Array, Array, Array]) -> list[Array]:
        """How many ranks reach each threshold; counts share a sum where they fit into one."""
        # Twice the count: of ones alone the compiler would make a slower population count.
        bits = 10 if self.most < 1 << 10 else 15 if self.most < 1 << 15 else 30
        a_sum = 30 // bits
        packs = [thresholds[i : i + a_sum] for i in range(0, 3, a_sum)]

        def visit(totals, found, _):
            totals = list(totals)
            for pack, some in enumerate(packs):
                for place, threshold in enumerate(some):
                    for rank in found:
                        totals[pack] += jnp.where(rank >= threshold, 2 << (bits * place), 0)
            return tuple(totals)

        nothing = jnp.zeros(self.threads, jnp.int32)
        sums = [jnp.sum(total) for total in self.fold(visit, (nothing,) * len(packs))]
        return [
            (sums[pack] >> (bits * place + 1)) & ((1 << bits) - 1)
            for pack in range(len(packs))
            for place in range(len(packs[pack]))
        ]


class Weighted(NamedTuple):
    """Ranks that stand for several tokens each, in registers; what `find_cut` searches.

    Attributes:
      ranks: int32[n] each, n a power of two; NOT_A_CANDIDATE for none.
      sizes: how many tokens each stands for.
    """

    ranks: tuple[Array, ...]
    sizes: tuple[Array, ...]

    def extremes(self) -> tuple[Array, Array]:
        """The smallest rank of a candidate and the largest."""
        candidates = [jnp.where(rank == NOT_A_CANDIDATE, HIGHEST, rank) for rank in self.ranks]
        least = functools.reduce(jnp.minimum, candidates)
        most = functools.reduce(jnp.maximum, self.ranks)
        least, most = reduced_together((~least, most), jnp.max)
        return ~least, most

    def largest_below(self, high: Array) -> Array:
        """The largest rank below `high`."""
        below = [jnp.where(rank < high, rank, NOT_A_CANDIDATE) for rank in self.ranks]
        return jnp.max(functools.reduce(jnp.maximum, below))

    def counts(self, thresholds: tuple[Array, ...]) -> list[Array]:
        """How many tokens reach each threshold."""
        both = list(zip(self.ranks, self.sizes, strict=True))

        def reaching(least):
            return [jnp.where(rank >= least, size, 0) for rank, size in both]

        totals = [functools.reduce(jnp.add, reaching(least)) for least in thresholds]
        return reduced_together(totals, jnp.sum)


def reduced_together(columns: Sequence[Array], reduce: Callable) -> list[Array]:
    """Each of some int32[n] reduced; a reduction has two barriers, however many it is of."""
    count = len(columns)
    columns = [*columns, *columns[: power_of_2_from(count) - count]]
    found = reduce(backend.join_columns(columns), axis=0)
    column = jnp.arange(len(columns), dtype=jnp.int32)
    return [jnp.sum(jnp.where(column == i, found, 0)) for i in range(count)]


class Cut(NamedTuple):
    """Who is among the best: all ranks above `rank`, and the first `ties` of those at it.

    Attributes:
      rank: the cut.
      above: how many are above it.
      ties: how many at it are taken.
    """

    rank: Array
    above: Array
    ties: Array

    @property
    def taken(self) -> Array:
        """How many are among the best."""
        return self.above + self.ties

    @property
    def lowest(self) -> Array:
        """A rank that all of the best reach, and no number just below the cut does."""
        return jnp.where(self.ties > 0, self.rank, self.rank + 1)


def number_of(rank: Array) -> Array:
    """The float32 that `ordered` gave this rank."""
    bits = jnp.where(rank < 0, -rank | np.int32(-(2**31)), rank)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _thresholds(low: Array, high: Array) -> tuple[Array, Array, Array]:
    """Three ascending ranks in (low, high), or low + 1 if there are none.

    Two cut the interval of the numbers in three, which suits most data; the middle of the ranks
    is between them or beside them, so that every step halves the ranks at least.
    """
    a, b = number_of(low), number_of(high)
    third = jnp.float32(1 / 3)
    first, second = (
        jnp.clip(ordered(a * (1 - share) + b * share), low + 1, high - 1)
        for share in (third, 2 * third)
    )
    first, second = jnp.maximum(first, low + 1), jnp.maximum(second, low + 1)
    middle = (low & high) + ((low ^ high) >> 1)  # the mean without an overflow
    middle = jnp.maximum(middle, low + 1)
    return (
        jnp.minimum(first, middle),
        jnp.maximum(first, jnp.minimum(second, middle)),
        jnp.maximum(second, middle),
    )


def find_cut(
    ranks: Ranks | Weighted,
    wanted: Array,
    low: Array,
    high: Array,
    reaching_low: Array,
    slack: int,
    looks_for_ties: bool = True,
) -> Cut:
    """The cut that takes the `wanted` best ranks, or up to `slack` more where that ends the search.

    Args:
      ranks: the list.
      wanted: how many, at least 1 and at most `reaching_low`.
      low: a rank that `wanted` reach, at least.
      high: a rank that none reaches, above `low`.
      reaching_low: how many reach `low`, or more than that: then at least `wanted` do.
      slack: how many more than wanted will do.
      looks_for_ties: whether to be quick where many tie; without it there is less code to fetch.

    Returns:
      The cut; exactly `wanted` are taken where more than slack tie at it.
    """

    def unfinished(state):
        _, (low, high, reaching_low, _) = state
        return (low + 1 != high) & (reaching_low > wanted + slack)

    def early(state):
        return unfinished(state) & (state[0] < STEPS_WITHOUT_TIES)

    def narrow(state):
        step, bounds = state
        return step + 1, narrowed(bounds, _thresholds(*bounds[:2]))

    def narrow_to_ties(state):
        # The largest rank below `high` is the cut if enough tie at it.
        step, (low, high, reaching_low, reaching_high) = state
        largest = ranks.largest_below(high)
        bounds = low, largest + 1, reaching_low, reaching_high
        first, second, _ = _thresholds(low, largest + 1)
        return step + 1, narrowed(bounds, (first, second, jnp.maximum(largest, low + 1)))

    def narrowed(bounds, thresholds):
        low, high, reaching_low, reaching_high = bounds
        for threshold, count in zip(thresholds, ranks.counts(thresholds), strict=True):
            enough = count >= wanted
            # Thresholds ascend: the last with enough is the new low, the first without the high.
            is_high = ~enough & (threshold < high)
            low = jnp.where(enough, threshold, low)
            reaching_low = jnp.where(enough, count, reaching_low)
            high = jnp.where(is_high, threshold, high)
            reaching_high = jnp.where(is_high, count, reaching_high)
        return low, high, reaching_low, reaching_high

    state = jnp.int32(0), (low, high, reaching_low, jnp.int32(0))
    state = lax.while_loop(early if looks_for_ties else unfinished, narrow, state)
    if looks_for_ties:
        state = lax.while_loop(unfinished, narrow_to_ties, state)
    _, (low, _, reaching_low, reaching_high) = state
    few = reaching_low <= wanted + slack
    return Cut(
        jnp.where(few, low - 1, low),
        jnp.where(few, reaching_low, reaching_high),
        jnp.where(few, 0, wanted - reaching_high),
    )


def read_together(read: Callable[[Array], Array], step: Array, threads: int) -> list[Array]:
    """PAIRS_AT_ONCE values, int32[threads] each: every thread loads the same, four in one load.

    Args:
      read: from int32[threads, 4] places to the values there.
      step: the places are from step * PAIRS_AT_ONCE on.
      threads: of the program.
    """
    values = []
    for first in range(0, PAIRS_AT_ONCE, 4):
        place = step * PAIRS_AT_ONCE + first + jnp.arange(4, dtype=jnp.int32)[None, :]
        values += backend.split_columns(read(jnp.broadcast_to(place, (threads, 4))))
    return values


def cut_of_few(ranks: Ranks, wanted: Array, read_fours: Callable[[Array], Array]) -> Cut:
    """The cut that takes the `wanted` best ranks of a list of one chunk, by comparing all pairs.

    Args:
      ranks: the list, held.
      wanted: how many, at least 1 and at most all.
      read_fours: from int32[threads, 4] places to the ranks there; no candidate past the list.

    Returns:
      The cut.
    """
    found, _ = ranks.read(ranks.starts(0))

    def compare(i, larger):
        others = read_together(read_fours, i, ranks.threads)
        return tuple(
            sum(
                (jnp.where(others[j] > rank, 1 << (j % 4 * 8), 0) for j in range(len(others))),
                count,
            )
            for count, rank in zip(larger, found, strict=True)
        )

    # Four counts in an integer, each of every fourth other: of ones alone, the compiler would make
    # a slower population count.
    steps = lax.div(ranks.size + (PAIRS_AT_ONCE - 1), PAIRS_AT_ONCE)
    nothing = jnp.zeros(ranks.threads, jnp.int32)
    larger = [
        sum((counts >> (8 * place)) & 0xFF for place in range(4))
        for counts in lax.fori_loop(0, steps, compare, (nothing,) * ranks.run)
    ]
    # The smallest that fewer than `wanted` exceed; what is not in the list is exceeded by all.
    reached = [
        jnp.where(count < wanted, rank, HIGHEST) for count, rank in zip(larger, found, strict=True)
    ]
    cut = jnp.min(functools.reduce(jnp.minimum, reached))
    above = jnp.sum(sum((rank > cut).astype(jnp.int32) for rank in found))
    return Cut(cut, above, wanted - above)


def emit_best(ranks: Ranks, cut: Cut, emit: Callable[[Array, Array, Array], None]) -> None:
    """Hands the best of a list to `emit`, in the order of the list.

    Args:
      ranks: the list.
      cut: who is among the best.
      emit: takes numbers of what is ranked, which of it is among the best, and its place there.
    """

    # Two counts share a prefix sum: those above the cut in the high bits, those at it in the low.
    def visit(before, found, first):
        marks = [
            jnp.where(rank > cut.rank, 1 << 16, (rank == cut.rank).astype(jnp.int32))
            for rank in found
        ]
        own = sum(marks[1:], marks[0])
        until = jnp.cumsum(own)
        above_before, ties_before = before
        running = until - own
        for offset, (rank, mark) in enumerate(zip(found, marks, strict=True)):
            running += mark
            ties = ties_before + (running & 0xFFFF)
            place = above_before + (running >> 16) + jnp.minimum(ties, cut.ties) - 1
            best = (rank > cut.rank) | ((rank == cut.rank) & (ties <= cut.ties))
            emit(first + offset, best, place)
        if ranks.most <= ranks.chunk:
            return before
        # The last thread has the largest counts: neither shrinks along the list.
        return above_before + jnp.max(until >> 16), ties_before + jnp.max(until & 0xFFFF)

    ranks.fold(visit, (jnp.int32(0), jnp.int32(0)))
