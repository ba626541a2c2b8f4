"""Rerank: candidates of a pool are ranked by their true keys, and the best of them attended to.

Two launches behind the selection of the pool. The first reads the keys, in many small programs, and
leaves ranks. In the second each program counts, for its own block of the pool, how many others are
better, and reads the values of the winners alone: nothing is sorted, and nothing moved.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jaxtyping import Float, Int32, UInt8

from jax_indexer.kernels import backend
from jax_indexer.kernels.attend import (
    Entries,
    Parts,
    block_of,
    finite,
    read_logits,
    read_query,
    read_rows,
    shapes_of_parts,
    softmax,
    vectors,
    write_part,
)
from jax_indexer.kernels.lookup_table import Tables
from jax_indexer.kernels.step import Lengths, QueryPlan, Step, plan_query
from jax_indexer.layout import power_of_2_from
from jax_indexer.reference import NOT_A_CANDIDATE, Caches, Logits, made_logits, ordered

# Entries that are compared with at once.
COMPARED_AT_ONCE = 64


class Place(NamedTuple):
    """Whose program it is."""

    part: Array
    row: Array
    token: Array
    head: Array
    kv_head: Array
    kv_row: Array
    query: Array  # among those of its kv row

    @classmethod
    def of(cls, step: Step, program: Array, num_parts: int) -> "Place":
        part, head = program % num_parts, program // num_parts % step.N
        token = program // (num_parts * step.N) % step.T
        row, kv_head = program // (num_parts * step.N * step.T), head // step.G
        kv_row, query = row * step.K + kv_head, token * step.G + head % step.G
        return cls(part, row, token, head, kv_head, kv_row, query)

    @property
    def at(self) -> tuple[Array, Array, Array]:
        """Of [B, T, N, ...]."""
        return self.row, self.token, self.head


def is_short(step: Step, plan: QueryPlan) -> Array:
    """Whether all of a context is attended to (rule 5)."""
    return plan.visible <= step.config.short_context(step.T)


def score_of(
    table: Any, place: Place, codes: Any, step: Step, token: Array, exists: Array
) -> Array:
    """Scores of some tokens."""
    total = jnp.float32(0)
    for m in range(step.config.num_subspaces):
        code = backend.load(codes.at[place.kv_row, m, token], mask=exists, other=0)
        code = code.astype(jnp.int32) & (step.config.num_centroids - 1)
        entry = m * step.config.num_centroids + code
        total += table[place.kv_row, place.query, entry].astype(jnp.float32)
    return total


def number_of(rank: Array) -> Array:
    """The float32 that has this rank: the inverse of `ordered`."""
    bits = jnp.where(rank < 0, -rank ^ np.int32(np.iinfo(np.int32).min), rank)
    return lax.bitcast_convert_type(bits, jnp.float32)


# Keys of the pool


class PoolInputs(NamedTuple):
    """Lists of the pool, and what its tokens are ranked by."""

    after: Lengths
    query: Any  # [B, T, N, H]
    key: Any
    indices: Any  # i32[B, T, N, P] of the pool
    table: Any  # [R, Q, M * C], if scores are wanted, else None
    codes: Any  # u8[R, M, S], likewise


class Pool(NamedTuple):
    """Ranks of the entries of the pool between sink and window, NOT_A_CANDIDATE for what is none.

    Attributes:
      by_key: i32[B, T, N, E], the order of true inner products.
      by_score: likewise, of scores, but none in a short context; None if they are not wanted.
    """

    by_key: Any
    by_score: Any


def rank_pool_kernel(
    program, inputs: PoolInputs, pool: Pool, *, step: Step, block: int, own: Entries
):
    """The ranks of a block of one query's pool, of what the scores decide about."""
    config = step.config
    place = Place.of(step, program, pl.cdiv(own.number, block))
    slot = place.part * block + jnp.arange(block, dtype=jnp.int32)
    exists = slot < own.number
    entry = own.first + slot
    listed = exists & (entry < inputs.indices.shape[3])
    at = inputs.indices.at[(*place.at, jnp.where(listed, entry, 0))]
    position = backend.load(at, mask=listed, other=-1)
    query = read_query(inputs.query, *place.at)

    plan = plan_query(step, inputs.after, place.kv_row, place.token)
    num_first, num_last = plan.always(config)
    short = is_short(step, plan)
    first = jnp.where(short, num_first, plan.first)
    last = jnp.where(short, plan.visible - num_last, plan.last)
    live = listed & (position >= first) & (position < last)
    position = jnp.where(live, position, 0)
    key = read_rows(inputs.key, step.kv_layout, place.row, place.kv_head, position, live)
    products = jnp.sum(key.astype(jnp.float32) * query[None, :], axis=1)

    def put(ranks: Any, x: Array, live: Array) -> None:
        into = ranks.at[(*place.at, jnp.where(exists, slot, own.number))]
        backend.store(into, jnp.where(live, ordered(x), NOT_A_CANDIDATE), mask=exists)

    put(pool.by_key, products, live)
    if pool.by_score is not None:
        live &= ~short  # which has no candidates
        score = score_of(inputs.table, place, inputs.codes, step, position, live)
        put(pool.by_score, score, live)


# The winners


class WinnersInputs(NamedTuple):
    """The pool, and the values of its tokens."""

    after: Lengths
    by_key: Any
    by_score: Any
    indices: Any
    value: Any
    codes: Any  # u8[R, M, S], if losers are wanted, else None
    logits: Logits


class Losers(NamedTuple):
    """What the rest takes from each part of a pool.

    Attributes:
      largest: f32[B, T, N, parts], the largest true logit of those that are not attended to.
      weights: f32[B, T, N, parts, M', C'], the sums of exp(logit - largest), by code.
      largest_true, total_true: f32[B, T, N, parts], of all of the pool.
      largest_by_pq, total_by_pq: likewise, of the logits of PQ.
    """

    largest: Any
    weights: Any
    largest_true: Any
    total_true: Any
    largest_by_pq: Any
    total_by_pq: Any


class Attended(NamedTuple):
    """Parts of a softmax, and of the rest; None where that is not wanted."""

    parts: Parts
    losers: Losers | None


def attend_winners_kernel(
    program, inputs: WinnersInputs, outputs: Attended, *, step: Step, block: int, own: Entries
):
    """Attention of one query to the winners of a block of its pool."""
    config = step.config
    place = Place.of(step, program, outputs.parts.largest.shape[3])
    logits_of = read_logits(inputs.logits)
    slot = place.part * block + jnp.arange(block, dtype=jnp.int32)
    exists = slot < own.number
    at = (*place.at, jnp.where(exists, slot, 0))
    rank = backend.load(inputs.by_key.at[at], mask=exists, other=NOT_A_CANDIDATE)
    live = rank != NOT_A_CANDIDATE
    entry = inputs.indices.at[(*place.at, jnp.where(live, own.first + slot, 0))]
    position = jnp.where(live, backend.load(entry, mask=live, other=0), 0)

    plan = plan_query(step, inputs.after, place.kv_row, place.token)
    winner = live
    if config.rerank > 1:
        better = count_better(inputs.by_key, place, rank, slot)
        winner &= (better < config.heavy_size) | is_short(step, plan)
    value = read_rows(inputs.value, step.kv_layout, place.row, place.kv_head, position, winner)
    logit = made_logits(number_of(rank), logits_of)
    found = softmax(jnp.where(winner, logit, -jnp.inf), winner, value)
    write_part(outputs.parts, (*place.at, place.part), found)
    if outputs.losers is not None:
        score = backend.load(inputs.by_score.at[at], mask=exists, other=NOT_A_CANDIDATE)
        by_pq = made_logits(number_of(score), logits_of)
        live = score != NOT_A_CANDIDATE
        write_losers(inputs, outputs.losers, place, step, position, live, winner, logit, by_pq)


def over_pool(
    ranks: Any, place: Place, body: Callable[[Array, Array, Any], Any], start: Any
) -> Any:
    """Calls body(slots, ranks, so far) for some entries of a pool after the other."""
    number = ranks.shape[3]
    at_once = min(power_of_2_from(number), COMPARED_AT_ONCE)

    def some(i, so_far):
        slot = i * at_once + jnp.arange(at_once, dtype=jnp.int32)
        exists = slot < number
        at = ranks.at[(*place.at, jnp.where(exists, slot, 0))]
        return body(slot, backend.load(at, mask=exists, other=NOT_A_CANDIDATE), so_far)

    return lax.fori_loop(0, pl.cdiv(number, at_once), some, start)


def count_better(ranks: Any, place: Place, rank: Array, slot: Array) -> Array:
    """How many entries of a pool are better: of a higher rank, or of the same and before."""

    def count(other_slot, other, better):
        is_before = other_slot[None, :] < slot[:, None]
        is_equal = other[None, :] == rank[:, None]
        beats = (other[None, :] > rank[:, None]) | (is_equal & is_before)
        return better + jnp.sum(beats.astype(jnp.int32), axis=1)

    return over_pool(ranks, place, count, jnp.zeros_like(rank))


def write_losers(
    inputs: WinnersInputs,
    losers: Losers,
    place: Place,
    step: Step,
    position: Array,
    live: Array,
    winner: Array,
    logit: Array,
    by_pq: Array,
) -> None:
    """What the rest takes from a block of a pool."""
    at = (*place.at, place.part)
    losers.largest_true[at], losers.total_true[at] = total_of(jnp.where(live, logit, -jnp.inf))
    weighs = live & (by_pq < jnp.inf)
    losers.largest_by_pq[at], losers.total_by_pq[at] = total_of(jnp.where(weighs, by_pq, -jnp.inf))
    lost = live & ~winner & (logit < jnp.inf)
    largest = jnp.max(jnp.where(lost, logit, -jnp.inf))
    weight = jnp.where(lost, jnp.exp(logit - finite(largest)), 0)
    losers.largest[at] = largest
    by, number = losers.weights.shape[4:]
    code = jnp.arange(number, dtype=jnp.int32)
    for m in range(by):
        sums = by_code(inputs.codes, place, step, m, number, position, lost, weight)
        backend.store(losers.weights.at[(*at, m, code)], sums)


def by_code(
    codes: Any,
    place: Place,
    step: Step,
    m: int,
    number: int,
    token: Array,
    exists: Array,
    amount: Array,
) -> Array:
    """Sums of amounts of tokens by their codes in a subspace; there may be one code for all."""
    if number == 1:
        return jnp.sum(amount)[None]
    own = backend.load(codes.at[place.kv_row, m, token], mask=exists, other=0)
    own = own.astype(jnp.int32) & (step.config.num_centroids - 1)
    code = jnp.arange(number, dtype=jnp.int32)
    zero = jnp.zeros((), amount.dtype)
    return jnp.sum(jnp.where(code[:, None] == own[None, :], amount[None, :], zero), axis=1)


def total_of(logits: Array) -> tuple[Array, Array]:
    """The largest of some logits, and the sum of exponentials relative to it."""
    largest = jnp.max(logits)
    return largest, jnp.sum(jnp.exp(logits - finite(largest)))


# Launches


def rank_pool(
    step: Step,
    query: Float[Array, "B T N H"],
    caches: Caches,
    indices: Int32[Array, "B T N P"],
    after: Lengths,
    tables: Tables,
    codes: UInt8[Array, "*layers R M S"],
    layer: Array | None,
) -> tuple[Pool, Entries, int]:
    """Ranks of what the lists of a pool have between sink and window.

    Args:
      step: of the config that reranks.
      query: the queries.
      caches: keys, and values, which are not read.
      indices: lists of the pool.
      after: lengths after the step.
      tables: look-up tables.
      codes: of all tokens.
      layer: of caches and codes.

    Returns:
      The ranks, which entries of the lists they are of, and the size of a block.
    """
    first = step.config.sink_size
    last = min(indices.shape[3] - step.config.window_size, first + step.S)
    own = Entries(first, max(last, first + 1))  # no array is empty
    value_size = caches.value.shape[-1]
    block = block_of(query.shape[3], value_size, step.tuning.attended_tile, step.tuning)
    shape = jax.ShapeDtypeStruct((*query.shape[:3], own.number), np.int32)
    has_rest = bool(step.config.estimate_rest)
    table, codes_ = (tables.by_query, codes) if has_rest else (None, None)
    what = backend.Launch(
        functools.partial(rank_pool_kernel, step=step, block=block, own=own),
        PoolInputs(after, query, caches.key, indices, table, codes_),
        Pool(shape, shape if has_rest else None),
        programs=step.B * step.T * step.N * pl.cdiv(own.number, block),
        state=("key", "codes"),
        layer=layer,
    )
    return backend.launch(what, num_warps=step.tuning.attended_warps), own, block


def winners_launch(
    step: Step,
    query: Float[Array, "B T N H"],
    caches: Caches,
    indices: Int32[Array, "B T N P"],
    pool: Pool,
    own: Entries,
    block: int,
    after: Lengths,
    codes: UInt8[Array, "*layers R M S"],
    logits: Logits,
    by: tuple[int, int] | None,
    layer: Array | None,
) -> backend.Launch:
    """The launch that attends to the best of a pool.

    Args:
      step, query, caches, indices, after, codes, layer: as in `rank_pool`.
      pool, own, block: what that returned.
      logits: how to make logits.
      by: M' and C' of the rest, or None without one.
    """
    num_parts = pl.cdiv(own.number, block)
    value_size = caches.value.shape[-1]
    losers = None
    if by is not None:
        of_part = jax.ShapeDtypeStruct((*query.shape[:3], num_parts), np.float32)
        weights = jax.ShapeDtypeStruct((*of_part.shape, *by), np.float32)
        losers = Losers(of_part, weights, of_part, of_part, of_part, of_part)
    return backend.Launch(
        functools.partial(attend_winners_kernel, step=step, block=block, own=own),
        WinnersInputs(
            after,
            pool.by_key,
            pool.by_score,
            indices,
            caches.value,
            None if by is None else codes,
            vectors(logits),
        ),
        Attended(shapes_of_parts(query, value_size, num_parts), losers),
        programs=step.B * step.T * step.N * num_parts,
        state=("value", "codes"),
        layer=layer,
    )
