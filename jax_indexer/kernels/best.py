"""The k best of a list of numbers: where the cut lies, and who makes it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jax_indexer.kernels import backend
from jax_indexer.layout import power_of_2_from
from jax_indexer.reference import NOT_A_CANDIDATE, ordered

# Steps of a search after which it looks for ties: most data need no more of them.
STEPS_WITHOUT_TIES = 4
THIRD = np.float32(1 / 3)
# Where a search begins that expects its cut near the top: parts of the expected share.
NEAR_THE_TOP = np.float32(0.8), np.float32(0.4)
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
        sums = reduced_together(self.fold(visit, (nothing,) * len(packs)), jnp.sum)
        return [
            (sums[pack] >> (bits * place + 1)) & ((1 << bits) - 1)
            for pack in range(len(packs))
            for place in range(len(packs[pack]))
        ]


class Weighted(NamedTuple):
    """Ranks that stand for several tokens each, in registers.

    Attributes:
      ranks: int32[n, threads] each, of which a thread has a column; NOT_A_CANDIDATE for none.
      sizes: how many tokens each stands for.
    """

    ranks: tuple[Array, ...]
    sizes: tuple[Array, ...]

    def extremes(self) -> tuple[Array, Array]:
        """The smallest rank of a candidate and the largest."""
        lowest = [~jnp.where(rank == NOT_A_CANDIDATE, HIGHEST, rank) for rank in self.ranks]
        least, most = reduced_together(
            [of_threads(x, jnp.max, jnp.maximum) for x in (lowest, self.ranks)], jnp.max
        )
        return ~least, most

    def counts(self, thresholds: tuple[Array, ...]) -> list[Array]:
        """How many tokens reach each threshold."""
        both = list(zip(self.ranks, self.sizes, strict=True))

        def reaching(least):
            return [jnp.where(rank >= least, size, 0) for rank, size in both]

        totals = [of_threads(reaching(least), jnp.sum, jnp.add) for least in thresholds]
        return reduced_together(totals, jnp.sum)


def of_threads(columns: Sequence[Array], reduce: Callable, two: Callable) -> Array:
    """What threads have of some [n, threads], reduced."""
    return functools.reduce(two, [reduce(x, axis=0) for x in columns])


class Entry(NamedTuple):
    """Of a list in memory: ranks, how many tokens each stands for, and what is ranked.

    Attributes:
      rank: int32[n]; NOT_A_CANDIDATE for none.
      size: 0 for none.
      number: of what is ranked.
      is_cell: whether that is a cell; else it is a token, which stands for itself.
    """

    rank: Array
    size: Array
    number: Array
    is_cell: Array


class Few(NamedTuple):
    """Cells and tokens that may be among the best, which are few: a list in memory, of any length.

    Where a program's threads are more than a warp's, `threads` of a warp have each warp go through
    all of the list, and wait for no other.

    Attributes:
      read: from int32[threads] first places of runs to the entries at each place of a run.
      threads: that share the list.
      run: places of a run, of neighbours.
      number: entries of the list.
      first: its first chunk, in registers.
    """

    read: Callable[[Array], list[Entry]]
    threads: int
    run: int
    number: Array
    first: list[Entry]

    @classmethod
    def of(
        cls, read: Callable[[Array], list[Entry]], threads: int, run: int, number: Array
    ) -> "Few":
        return cls(read, threads, run, number, read(cls.starts(threads, run, 0)))

    @staticmethod
    def starts(threads: int, run: int, chunk: Array | int) -> Array:
        """First places of the runs of one chunk."""
        return chunk * threads * run + run * jnp.arange(threads, dtype=jnp.int32)

    def fold(self, visit: Callable, state):
        """visit(state, entries) for chunk after chunk."""
        chunk = self.threads * self.run

        def step(i, state):
            return visit(state, self.read(self.starts(self.threads, self.run, i)))

        turns = lax.div(self.number + (chunk - 1), jnp.int32(chunk))
        return lax.fori_loop(1, turns, step, visit(state, self.first))

    def added(self, amounts: Callable[[list[Entry]], Sequence[Array]], count: int) -> list[Array]:
        """Sums of some amounts of entries, int32[threads] each."""

        def visit(totals, entries):
            return tuple(x + y for x, y in zip(totals, amounts(entries), strict=True))

        nothing = jnp.zeros(self.threads, jnp.int32)
        return reduced_together(self.fold(visit, (nothing,) * count), jnp.sum)

    def largest_below(self, high: Array) -> Array:
        """The largest rank below `high`."""

        def visit(most, entries):
            below = [jnp.where(x.rank < high, x.rank, NOT_A_CANDIDATE) for x in entries]
            return functools.reduce(jnp.maximum, below, most)

        return jnp.max(self.fold(visit, jnp.full(self.threads, NOT_A_CANDIDATE)))

    def counts(self, thresholds: tuple[Array, ...]) -> list[Array]:
        """How many tokens reach each threshold."""

        def reaching(entries):
            return [
                sum(
                    (jnp.where(x.rank >= least, x.size, 0) for x in entries[1:]),
                    jnp.where(entries[0].rank >= least, entries[0].size, 0),
                )
                for least in thresholds
            ]

        return self.added(reaching, len(thresholds))


def reduced_together(columns: Sequence[Array], reduce: Callable) -> list[Array]:
    """Each of some int32[n] reduced; beyond a warp a reduction has two barriers, of many or one."""
    count = len(columns)
    if columns[0].size <= 32 or count == 1:
        return [reduce(column) for column in columns]
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


class Bounds(NamedTuple):
    """Between which ranks a cut lies.

    Attributes:
      low: a rank that as many reach as are wanted, at least.
      high: a rank that fewer reach, above `low`.
      reaching_low: how many reach `low`, or more than that: then at least as many as are wanted do.
      reaching_high: how many reach `high`.
    """

    low: Array
    high: Array
    reaching_low: Array
    reaching_high: Array | np.int32 = np.int32(0)

    def is_open(self, enough: Array) -> Array:
        """Whether more than `enough` reach `low`, and a rank lies between the bounds."""
        # No more where counts that overflowed, of a state that holds garbage, have them cross.
        return (self.low + 1 < self.high) & (self.reaching_low > enough)

    def narrowed(
        self, ranks: Ranks | Weighted | Few, wanted: Array, thresholds: tuple[Array, Array, Array]
    ) -> "Bounds":
        """By counts of those that reach some ascending thresholds."""
        low, high, reaching_low, reaching_high = self
        for threshold, count in zip(thresholds, ranks.counts(thresholds), strict=True):
            enough = count >= wanted
            # Thresholds ascend: the last with enough is the new low, the first without the high.
            is_high = ~enough & (threshold < high)
            low = jnp.where(enough, threshold, low)
            reaching_low = jnp.where(enough, count, reaching_low)
            high = jnp.where(is_high, threshold, high)
            reaching_high = jnp.where(is_high, count, reaching_high)
        return Bounds(low, high, reaching_low, reaching_high)


def _thresholds(
    low: Array, high: Array, shares: tuple[Any, Any] = (THIRD, 2 * THIRD)
) -> tuple[Array, Array, Array]:
    """Three ascending ranks in (low, high), or low + 1 if there are none.

    Two cut the interval of the numbers in three, which suits most data, or at other shares of it;
    the middle of the ranks is between them or beside them, so that every step halves the ranks at
    least.
    """
    a, b = number_of(low), number_of(high)
    first, second = (
        jnp.clip(ordered(a * (1 - share) + b * share), low + 1, high - 1) for share in shares
    )
    first, second = jnp.maximum(first, low + 1), jnp.maximum(second, low + 1)
    middle = (low & high) + ((low ^ high) >> 1)  # the mean without an overflow
    middle = jnp.maximum(middle, low + 1)
    return (
        jnp.minimum(first, middle),
        jnp.maximum(first, jnp.minimum(second, middle)),
        jnp.maximum(second, middle),
    )


def narrow(
    ranks: Ranks | Weighted | Few,
    wanted: Array,
    bounds: Bounds,
    enough: Array,
    steps: int | None,
    share: Array | None = None,
) -> Bounds:
    """Bounds between which fewer lie.

    Args:
      ranks: the list.
      wanted: how many, at least 1.
      bounds: of the cut.
      enough: how many may reach the lower bound.
      steps: most counts of the list; None for as many as it takes.
      share: how far from the top, in the interval of the numbers, a cut is likely to lie: there a
        search begins. None for anywhere.

    Returns:
      The bounds.
    """

    def unfinished(state):
        step, bounds = state
        is_open = bounds.is_open(enough)
        return is_open if steps is None else is_open & (step < steps)

    def visit(state):
        step, bounds = state
        shares: tuple[Any, Any] = THIRD, 2 * THIRD
        if share is not None:
            first, second = (1 - part * share for part in NEAR_THE_TOP)
            shares = jnp.where(step == 0, first, shares[0]), jnp.where(step == 0, second, shares[1])
        thresholds = _thresholds(bounds.low, bounds.high, shares)
        return step + 1, bounds.narrowed(ranks, wanted, thresholds)

    return lax.while_loop(unfinished, visit, (jnp.int32(0), bounds))[1]


def find_cut(
    ranks: Ranks | Few,
    wanted: Array,
    bounds: Bounds,
    slack: int = 0,
    steps_without_ties: int | None = STEPS_WITHOUT_TIES,
) -> Cut:
    """The cut that takes the `wanted` best ranks, or up to `slack` more where that ends the search.

    Args:
      ranks: the list.
      wanted: how many, at least 1.
      bounds: of the cut.
      slack: how many more than wanted will do.
      steps_without_ties: after so many the search is quick where many tie, which takes more code to
        fetch; None for never.

    Returns:
      The cut; exactly `wanted` are taken where more than slack tie at it.
    """
    if steps_without_ties != 0:
        bounds = narrow(ranks, wanted, bounds, wanted + slack, steps_without_ties)

    def narrow_to_ties(bounds):
        # The largest rank below `high` is the cut if enough tie at it.
        largest = ranks.largest_below(bounds.high)
        bounds = bounds._replace(high=largest + 1)
        first, second, _ = _thresholds(bounds.low, bounds.high)
        last = jnp.maximum(largest, bounds.low + 1)
        return bounds.narrowed(ranks, wanted, (first, second, last))

    if steps_without_ties is not None:
        bounds = lax.while_loop(
            lambda bounds: bounds.is_open(wanted + slack), narrow_to_ties, bounds
        )
    low, _, reaching_low, reaching_high = bounds
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
