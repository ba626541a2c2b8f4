"""Step: what is static about a step of decoding, and what follows from it for one query."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int32, Shaped

from jax_indexer.config import IndexerConfig
from jax_indexer.kernels import backend
from jax_indexer.kernels.tuning import H100, Tuning
from jax_indexer.layout import KVLayout, power_of_2_from
from jax_indexer.pages import pages_spanned
from jax_indexer.reference import Room, make_room, raised
from jax_indexer.state import PQIndex, Span


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """Sizes by the letters of CONTRACT.md, and how kernels are cut up.

    Attributes:
      config: what the index was built with.
      layers: of the index, None where it has no axis of layers.
      B, K, S: of the index.
      T: tokens of the step, of the query and of the new keys.
      N: query heads.
      kv_layout: of the new keys.
      weights_dtype: of the dense weights, None for none.
      devices: that share a row; S is what each of them has of it.
      page_size: of caches in pages, else None.
      tuning: block sizes and warps.
    """

    config: IndexerConfig
    B: int
    K: int
    S: int
    layers: int | None = None
    T: int = 1
    N: int = 0
    kv_layout: KVLayout = "BSKH"
    weights_dtype: np.dtype | None = None
    devices: int = 1
    page_size: int | None = None
    tuning: Tuning = H100

    @classmethod
    def of(cls, index: PQIndex, config: IndexerConfig, **sizes: Any) -> "Step":
        """A step of this index."""
        *layers, B, K, _, S = index.codes.shape
        return cls(config=config, B=B, K=K, S=S, layers=layers[0] if layers else None, **sizes)

    def by_rows(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """An array of the state with axes B and K in one, behind that of layers if there is one."""
        first = 0 if self.layers is None else 1
        return x.reshape(*x.shape[:first], self.R, *x.shape[first + 2 :])

    @property
    def capacity(self) -> int:
        """Tokens of a whole row."""
        return self.S * self.devices

    @property
    def R(self) -> int:
        """kv rows: a batch row and a kv head each."""
        return self.B * self.K

    @property
    def G(self) -> int:
        """Query heads that share a kv head."""
        return self.N // self.K

    @property
    def Q(self) -> int:
        """Queries of a kv row, ordered by token, then by head."""
        return self.T * self.G

    @property
    def P(self) -> int:
        """Entries of a list."""
        return self.config.max_selected(self.T)

    @property
    def num_middle(self) -> int:
        """Entries of a list between the sink and the window, at the most."""
        return self.P - self.config.sink_size - self.config.window_size

    def scratch(self, dtype: Any, *sizes: int) -> jax.ShapeDtypeStruct:
        """[R, Q, ...] of what programs put aside for each query."""
        return jax.ShapeDtypeStruct((self.R, self.Q, *sizes), dtype)

    @property
    def budget(self) -> int:
        """Heavy tokens that a list can hold, 1 if it holds none: no array is empty."""
        return max(min(self.config.heavy_size, self.S), 1)

    @property
    def of_pool(self) -> "Step":
        """The step that finds the candidates for reranking."""
        return dataclasses.replace(self, config=self.config.pool)

    @property
    def pooled(self) -> int:
        """Entries between sink and window of the lists that it makes: at least 1."""
        return max(min(self.of_pool.num_middle, self.S), 1)


class Lengths(NamedTuple):
    """Of each row: i32[B] tokens in the cache, and i32[B] new tokens among them, None for T.

    Before a step the new tokens are not among them, and `counts` is what is asked for. Where S is
    split over devices, both are of whole rows, and i32[1] `offset` is the first position of this
    one; else it is None. Plans are of the positions here, and count from there. The high water,
    i32[B], is there for those that need it, of indices that keep one; the page table,
    i32[B, pages], for those that read or write caches in pages, or take room there.
    """

    lengths: Any
    counts: Any
    offset: Any = None
    high_water: Any = None
    page_table: Any = None

    @classmethod
    def of(
        cls,
        lengths: Any,
        counts: Any,
        span: Span | None,
        high_water: Any = None,
        page_table: Any = None,
    ) -> "Lengths":
        """Those of a device."""
        offset = None if span is None else span.offset.reshape(1)
        return cls(lengths, counts, offset, high_water, page_table)

    def span(self, step: "Step") -> Span | None:
        """In a kernel: what the device holds."""
        if self.offset is None:
            return None
        return Span(self.offset[0], step.S, step.devices, "")


class QueryPlan(NamedTuple):
    """The layout of one query's list: `num_sink` positions from 0, heavy ones, then the window.

    A short context is all sink. Counts follow from the length alone, so every slot of the list but
    the heavy ones can be written without looking at a score.

    Attributes:
      visible: V, the tokens this query sees.
      first, last: candidates are the positions in [first, last).
      num_sink, num_heavy: how many entries of the list are of each kind.
      num_listed: all entries.
      num_always: how many of the first and of the last tokens are always attended to; None where
        these numbers follow from the others, as where S is whole.
    """

    visible: Int32[Array, "*queries"]
    first: Int32[Array, "*queries"]
    last: Int32[Array, "*queries"]
    num_sink: Int32[Array, "*queries"]
    num_heavy: Int32[Array, "*queries"]
    num_listed: Int32[Array, "*queries"]
    num_always: tuple[Array, Array] | None = None

    def always(self, config: IndexerConfig) -> tuple[Array, Array]:
        """How many of the first and of the last tokens are attended to whatever the scores are.

        The entries of a list between these begin behind the first if there are any.
        """
        if self.num_always is not None:
            return self.num_always
        num_first = jnp.minimum(config.sink_size, self.visible)
        return num_first, jnp.minimum(config.window_size, self.visible - num_first)

    def between(self, config: IndexerConfig) -> Array:
        """How many entries of the list lie between these."""
        return self.num_listed - sum(self.always(config))

    def always_attends(self, position: Array, config: IndexerConfig) -> Array:
        """Which positions are in the list whatever the scores are (rules 1 and 5)."""
        last = config.window_size if self.num_always is None else self.num_always[1]
        window = (position < self.visible) & (position >= self.visible - last)
        return (position < self.num_sink) | window

    def on(self, span: Span, config: IndexerConfig) -> "QueryPlan":
        """What of it is of the positions that a device holds."""
        num_first, num_last = self.always(config)
        visible, first, last, num_sink, num_first, not_last, not_window = (
            span.clip(x)
            for x in (
                self.visible,
                self.first,
                self.last,
                self.num_sink,
                num_first,
                self.visible - num_last,
                self.visible - (self.num_listed - self.num_sink - self.num_heavy),
            )
        )
        num_heavy = jnp.minimum(config.heavy_size, last - first)
        num_listed = num_sink + num_heavy + visible - not_window
        always = num_first, visible - not_last
        return QueryPlan(visible, first, last, num_sink, num_heavy, num_listed, always)


def plan_query(
    step: Step, lengths: Lengths, kv_row: Array, token: Int32[Array, "*queries"] | int
) -> QueryPlan:
    """Rules 1, 2, 4 and 5 of the contract for query token `token` of a kv row."""
    row = kv_row // step.K
    count = None if lengths.counts is None else lengths.counts[row]
    return _plan(step, lengths.lengths[row], count, token, lengths.span(step))


def room_in(step: Step, before: Lengths, row: Array) -> tuple[Room, Array]:
    """Room for a row's new tokens, and its length after them."""
    count, has_room = None if before.counts is None else before.counts[row], None
    if before.page_table is not None:
        has_room = functools.partial(_has_pages, step, before.page_table, row)
    return make_room(before.lengths[row], count, step.T, step.capacity, has_room)


def _has_pages(step: Step, table: Any, row: Array, start: Array, number: Array) -> Array:
    """Whether a row has the pages of so many tokens."""
    assert step.page_size is not None
    shift = step.page_size.bit_length() - 1
    first, last = start >> shift, (start + number - 1) >> shift
    spanned = pages_spanned(step.T, step.page_size)
    if spanned == 1:
        return table[row, jnp.minimum(first, table.shape[1] - 1)] >= 0
    page = first + jnp.arange(power_of_2_from(spanned), dtype=jnp.int32)
    exists = (page <= last) & (page < table.shape[1])
    found = backend.load(table.at[row, page], mask=exists, other=0)
    return jnp.min(found) >= 0


def raised_in(step: Step, before: Lengths, row: Array) -> tuple[Array, Array]:
    """A row's high water before its new tokens and after them."""
    return raised(before.high_water[row], room_in(step, before, row)[0], step.capacity)


def plan_after(
    step: Step, before: Lengths, kv_row: Array, token: Int32[Array, "*queries"] | int
) -> QueryPlan:
    """As `plan_query`, for the lengths after the step, from those before it."""
    room, length = room_in(step, before, kv_row // step.K)
    count = None if before.counts is None else room.taken
    return _plan(step, length, count, token, before.span(step))


def _plan(
    step: Step, length: Array, count: Array | None, token: Array | int, span: Span | None
) -> QueryPlan:
    length = jnp.minimum(jnp.maximum(length, 0), step.capacity)
    if count is None:
        visible = jnp.maximum(length - (step.T - 1 - token), 0)
    else:
        count = jnp.minimum(jnp.maximum(count, 0), step.T)
        visible = jnp.maximum(length - (count - 1 - token), 0)
        visible = jnp.where((token >= 0) & (token < count), visible, 0)

    config = step.config
    short = visible <= config.short_context(step.T)
    first = jnp.minimum(config.first_candidate, visible)
    last = jnp.where(short, first, jnp.maximum(visible - config.window_size, first))
    num_sink = jnp.where(short, visible, jnp.minimum(config.sink_size, visible))
    num_heavy = jnp.minimum(config.heavy_size, last - first)
    num_window = jnp.minimum(config.window_size, visible - num_sink)
    num_listed = num_sink + num_heavy + num_window
    plan = QueryPlan(visible, first, last, num_sink, num_heavy, num_listed)
    return plan if span is None else plan.on(span, config)


def plan_latest(step: Step, lengths: Lengths, kv_row: Array, token: Array) -> QueryPlan:
    """The plan of the query that sees the most of those up to query token `token`."""
    if lengths.counts is not None:
        token = jnp.minimum(token, lengths.counts[kv_row // step.K] - 1)
    return plan_query(step, lengths, kv_row, token)


class Place(NamedTuple):
    """Which query a program is of.

    Attributes:
      row, token, head: in [B, T, N].
      kv_head, kv_row: of the head.
      query: among those of its kv row.
    """

    row: Array
    token: Array
    head: Array
    kv_head: Array
    kv_row: Array
    query: Array

    @classmethod
    def of(cls, step: Step, program: Array) -> "Place":
        """Of programs in the order of [B, T, N]."""
        head, token = program % step.N, program // step.N % step.T
        row, kv_head = program // (step.N * step.T), head // step.G
        return cls(
            row, token, head, kv_head, row * step.K + kv_head, token * step.G + head % step.G
        )

    @property
    def at(self) -> tuple[Array, Array, Array]:
        """Of [B, T, N, ...]."""
        return self.row, self.token, self.head

    @property
    def of_kv(self) -> tuple[Array, Array]:
        """Of [R, Q, ...]."""
        return self.kv_row, self.query

    def is_first(self, step: Step) -> Array:
        """Whether it is the first query of its row."""
        is_first = self.head == 0
        return is_first if step.T == 1 else is_first & (self.token == 0)

    def plan(self, step: Step, lengths: Lengths) -> QueryPlan:
        """The plan of the query, by the config of this step."""
        return plan_query(step, lengths, self.kv_row, 0 if step.T == 1 else self.token)
