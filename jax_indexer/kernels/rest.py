"""The rest: candidates that are not attended to, estimated from their scores and means of values.

What candidates outside of a pool weigh by PQ is added up by code. Where a search of cells finds the
pool, it has the scores and sizes of all, and leaves their weights, and how many tokens of each cell
are not in the pool. Elsewhere programs of their own go through all tokens. The lowest score in the
pool is the cut: below it nothing is in the pool; tokens at it are counted, so that nothing remains
where all of them are in the pool.
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
from jax_indexer.kernels.best import HIGHEST, Cut, number_of, of_threads, reduced_together
from jax_indexer.kernels.cells_select import Inputs, Part, Scores, Search, Tail
from jax_indexer.kernels.step import Place, Step, plan_query
from jax_indexer.layout import power_of_2_from
from jax_indexer.reference import NOT_A_CANDIDATE, Logits, corrected_by, made_logits
from jax_indexer.values import sums_by

# Parts that a context is weighed in, at the most, token by token.
MOST_PARTS = 64


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


class Sources(NamedTuple):
    """What the rest is made from.

    Attributes:
      sums: f32[R, M', C', H'], of values.
      counts: i32[R, M', C'].
      weighed: what candidates weigh, None where a search has left it.
    """

    sums: Any
    counts: Any
    weighed: Weighed | None


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
      largest_lost: the largest of their true logits; None, as `lost`, where all are attended to.
      largest, total: of all true logits, and of the exponentials relative to it; None where these
        are not known.
    """

    position: Array
    is_candidate: Array
    lost: Array | None
    largest_lost: Array | None
    largest: Array | None
    total: Array | None

    @classmethod
    def of(cls, position: Array, is_candidate: Array, logit: Array, lost: Array) -> "Members":
        """From true logits, and from those that are not attended to: -inf for none."""
        largest, largest_lost = reduced_together((logit, lost), jnp.max)
        total = jnp.sum(jnp.exp(logit - finite(largest)))
        lost = jnp.exp(lost - finite(largest_lost))
        return cls(position, is_candidate, lost, largest_lost, largest, total)


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
      below, at_cut, of_pool: the largest logit below the cut, that at it if tokens at it are left,
        and that in the pool; -inf for none.
      total_below, total_of_pool: totals below the cut and in the pool, relative to these.
      number_at_cut: how many are left at the cut.
      is_there: whether there is anything; else they are of nothing.
    """

    below: Array
    at_cut: Array
    of_pool: Array
    total_below: Array
    number_at_cut: Array
    total_of_pool: Array
    is_there: Array

    @classmethod
    def read(cls, search: Search, fits: Array) -> "WeighedCells":
        """What `weigh_cells` wrote; `fits`: whether the state of the search did."""
        is_there = fits & (search.plan.num_heavy > 0)

        def read(i: int, other: float) -> Array:
            at = search.outputs.weighed.at[search.kv_row, search.query, jnp.int32(i)]
            return backend.load(at, mask=is_there, other=other)

        below, at_cut, of_pool = (read(i, -jnp.inf) for i in range(3))
        total_below, number_at_cut, total_of_pool = (read(i, 0.0) for i in range(3, 6))
        return cls(below, at_cut, of_pool, total_below, number_at_cut, total_of_pool, is_there)


def weigh_cells(logits: Logits, search: Search, cells: Part, tail: Tail, cut: Cut) -> None:
    """Writes what candidates weigh by PQ, those outside of a pool and those in it."""
    ranks, sizes = (cells.rank, tail.rank), (cells.size, tail.exists.astype(jnp.int32))
    scored = [Scored.of(*x, logits) for x in zip(ranks, sizes, strict=True)]

    def reduced(columns: list[tuple[Array, ...]], add: Callable, reduce: Callable) -> list[Array]:
        own = [of_threads(column, reduce, add) for column in zip(*columns, strict=True)]
        return reduced_together(own, reduce)

    def largest_of_cells(rank: Array, x: Scored) -> tuple[Array, ...]:
        logit = jnp.where(x.size > 0, x.logit, -jnp.inf)
        sides = rank < cut.rank, rank > cut.rank
        return tuple(jnp.where(side, logit, -jnp.inf) for side in sides)

    columns = [largest_of_cells(*x) for x in zip(ranks, scored, strict=True)]
    below, above = reduced(columns, jnp.maximum, jnp.max)

    def totals_of_cells(rank: Array, x: Scored) -> tuple[Array, ...]:
        size = x.size.astype(jnp.float32)
        is_at, is_below = rank == cut.rank, rank < cut.rank
        weight = jnp.exp(x.logit - finite(jnp.where(is_below, below, above))) * size
        weight = jnp.where((x.size > 0) & ~is_at, weight, 0)
        sides = jnp.where(is_below, weight, 0), jnp.where(is_below, 0, weight)
        return *sides, jnp.where(is_at, size, 0)

    columns = [totals_of_cells(*x) for x in zip(ranks, scored, strict=True)]
    total_below, total_above, number = reduced(columns, jnp.add, jnp.sum)
    ties = jnp.where(number > 0, cut.ties.astype(jnp.float32), 0)
    left, at_cut = number - ties, made_logits(number_of(cut.rank), logits)
    of_pool = jnp.maximum(above, jnp.where(ties > 0, at_cut, -jnp.inf))
    total = total_above * jnp.exp(above - finite(of_pool))
    total += jnp.where(ties > 0, ties * jnp.exp(at_cut - finite(of_pool)), 0)
    at_cut = jnp.where(left > 0, at_cut, -jnp.inf)
    weighed = search.outputs.weighed
    for i, x in enumerate((below, at_cut, of_pool, total_below, left, total)):
        weighed[search.kv_row, search.query, i] = x


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
        return self.sources.counts.shape[1:3]

    def of_cells(
        self,
        search: Search,
        weighed: WeighedCells,
        pool: Members | None,
        put_lost: Callable[[], list[Array]] | None,
    ) -> Estimated:
        """Candidates that are not attended to, where a search left what they weigh.

        Args:
          search: the search.
          weighed: what it left.
          pool: what is known of the pool; None where no true logit is.
          put_lost: writes `lost` for most of the pool, and returns sums by code of the others; for
            a pool that loses any.
        """
        means, x = self.read_means(), weighed
        largest = jnp.maximum(x.below, x.at_cut)
        of_pool = x.of_pool, x.total_of_pool
        relative = Relative.of(pool, largest, of_pool)
        if self.by[1] > 1:
            weights = self.by_code(search, x.is_there, largest, relative, put_lost)
            return Estimated(with_values(relative.largest, weights, means), of_pool)
        weight = x.total_below * jnp.exp(x.below - finite(largest))
        weight += x.number_at_cut * jnp.exp(x.at_cut - finite(largest))
        weight *= relative.others
        if pool is not None and pool.lost is not None:
            weight += relative.lost * jnp.sum(pool.lost)
        return Estimated(with_values(relative.largest, [weight[None]], means), of_pool)

    def by_code(
        self,
        search: Search,
        usable: Array,
        largest: Array,
        relative: Relative,
        put_lost: Callable[[], list[Array]] | None,
    ) -> list[Array]:
        """What is not attended to weighs, by code; `put_lost` is as in `of_cells`."""
        config, by = self.step.config, self.by[0]
        C, M = config.num_centroids, config.num_subspaces
        code = jnp.arange(C, dtype=jnp.int32)[:, None]
        other = jnp.arange(config.num_cells // C, dtype=jnp.int32)[None, :]

        def cells(m: int) -> Array:
            """All of them, [codes of subspace m, codes of the others]."""
            below = C ** (M - 1 - m)
            return (other // below * C + code) * below + other % below

        def weights(m: int) -> Array:
            """Of what is left in them."""
            cell = cells(m)
            rank = self.scores.rank_of(
                code if digit == m else other // C ** (M - 1 - digit - (digit < m)) % C
                for digit in range(M)
            )
            left = backend.load(
                search.outputs.left.at[(*self.place.of_kv, cell)],
                mask=jnp.broadcast_to(usable, cell.shape),
                other=0,
            )
            return relative.others * Scored.of(rank, left, self.logits).weights(largest)

        def with_lost(m: int, weight: Array) -> Array:
            if put_lost is None:
                return weight
            return weight + relative.lost * search.outputs.lost[(*self.place.of_kv, cells(m))]

        first = weights(0)  # before `put_lost`, whose barriers it does not wait for
        lost = None if put_lost is None else put_lost()
        first = with_lost(0, first)
        sums = [jnp.sum(first, axis=1)]
        if M == 2:  # all others are one subspace
            sums += [jnp.sum(first, axis=0)]
        sums += [jnp.sum(with_lost(m, weights(m)), axis=1) for m in range(len(sums), by)]
        if lost is not None:
            sums = [x + relative.lost * y for x, y in zip(sums, lost, strict=True)]
        return sums

    def of_parts(self, pool: Members, by_codes: Callable[[Array], list[Array]]) -> Estimated:
        """Candidates that are not attended to, where they were weighed token by token.

        Args:
          pool: what is known of the pool.
          by_codes: sums what lanes of the pool have by code, in each of M' subspaces.
        """
        weighed, (by, number) = self.sources.weighed, self.by
        assert weighed is not None
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
        rest = with_values(relative.largest, weights, self.read_means())
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
    total = jnp.maximum(jnp.sum(weights[0]), 0)
    # Empty codes have the mean of all, of which (M' - 1) times is too much.
    empty = sum(
        jnp.sum(jnp.where(count == 0, weight, 0))
        for count, weight in zip(counts, weights, strict=True)
    )
    summed = jnp.sum(counts[0])
    of_all = (empty - (by - 1) * total) / jnp.maximum(summed, 1).astype(jnp.float32)
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


def weigh_tokens(
    step: Step, search: Inputs, indices: Array, logits: Logits, layer: Array | None
) -> Weighed:
    """Weighs all candidates token by token.

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
    what = backend.Launch(
        functools.partial(weigh_tokens_kernel, step=step),
        WeighInputs(search, indices, vectors(logits)),
        Weighed(shape(np.float32), shape(np.float32, *by), shape(np.int32, *by)),
        programs=step.B * step.T * step.N * parts,
        state=("search.codes",),
        layer=layer,
    )
    return backend.launch(what, num_warps=step.tuning.attended_warps)
