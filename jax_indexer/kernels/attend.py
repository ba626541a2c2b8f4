"""Attention over listed tokens: parts of a list side by side, then merged.

A program attends to one block of tokens and leaves what softmax needs of it: the largest logit, the
sum of the exponentials relative to it, and the values weighted by them. How tokens are cut into
blocks depends on the length of lists and the head dimensions alone, and parts are merged in their
order, so the bits of a row do not depend on the batch.

Query heads that share a kv head list different tokens, so each has a program that multiplies
element by element. Sink and window they have in common: these are read once, for all of them, and
multiplied by tensor cores.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jaxtyping import Float, Int32

from jax_indexer.config import IndexerConfig
from jax_indexer.kernels import backend
from jax_indexer.kernels.step import Lengths, Step, plan_after, plan_query, room_in
from jax_indexer.kernels.tuning import H100, Tuning
from jax_indexer.layout import KVLayout, head_axis, power_of_2_from, token_axis
from jax_indexer.pages import page_and_slot
from jax_indexer.recent import place_of
from jax_indexer.reference import Attention, Caches, Logits, corrected_by, made_logits
from jax_indexer.state import Recent, Rest

# Queries that share what they attend to, at the most: what a tensor core takes at the least.
ROWS = 16
# What a step replaces last, in the memory of what was before.
REACHED = ("lengths.lengths", "lengths.high_water")
# Parts that are merged at once.
MERGED_AT_ONCE = 16


class Parts(NamedTuple):
    """What is known of each part of a softmax.

    Attributes:
      largest: f32[B, T, N, parts], the largest logit.
      total: likewise, the sum of exp(logit - largest).
      values: f32[B, T, N, parts, H'], values with these weights.
    """

    largest: Any
    total: Any
    values: Any


class Softmax(NamedTuple):
    """A part of one query, or of several, in registers: f32[] and f32[H'], or f32[16] and so on."""

    largest: Array
    total: Array
    values: Array


def padded(head_dim: int) -> int:
    """Elements that a key or value takes in registers."""
    return max(power_of_2_from(head_dim), ROWS)


def block_of(key_size: int, value_size: int, tile: int, tuning: Tuning) -> int:
    """Tokens that a program attends to at once, which depends on the head dimensions alone."""
    tokens = tile // padded(max(key_size, value_size))
    return min(max(tokens, ROWS), tuning.most_attended)


def in_page(
    cache: Any, kv_layout: KVLayout, table: Any, row: Array, position: Array, wanted: Array
) -> tuple[Array, Array, Array]:
    """Pages of a row's positions, their slots there, and which of those wanted have a page.

    A page beyond those there are is taken for the last.
    """
    number, slot = page_and_slot(position, cache.shape[token_axis(kv_layout)])
    wanted &= number < table.shape[1]
    page = backend.load(table.at[row, number], mask=wanted, other=-1)
    return jnp.clip(page, 0, cache.shape[0] - 1), slot, wanted & (page >= 0)


def read_rows(
    cache: Any,
    kv_layout: KVLayout,
    row: Array,
    kv_head: Array,
    token: Array,
    wanted: Array,
    page_table: Any = None,
) -> Float[Array, "block H"]:
    """Some tokens' keys or values; 0 for those that are not wanted, or have no page."""
    if page_table is not None:
        row, token, wanted = in_page(cache, kv_layout, page_table, row, token, wanted)
        row = row[:, None]
    size = cache.shape[3]
    d = jnp.arange(padded(size), dtype=jnp.int32)[None, :]
    mask = jnp.broadcast_to(wanted[:, None] & (d < size), (wanted.shape[0], d.size))
    place = (token[:, None], kv_head) if kv_layout == "BSKH" else (kv_head, token[:, None])
    return backend.load(cache.at[(row, *place, d)], mask=mask, other=0)


class Kept(NamedTuple):
    """What was listed lately of caches in host memory: rows on the device.

    Attributes:
      key, value: [B, n, K, H].
      slot_of: i32[B, K, S], which of the n rows a position is, -1 for none.
    """

    key: Any
    value: Any
    slot_of: Any


# A launch's state, of which every layer has one.
KEPT_STATE = tuple(f"kept.{field}" for field in Kept._fields)


def read_caches(
    inputs: Any,
    fields: Sequence[str],
    kv_layout: KVLayout,
    row: Array,
    kv_head: Array,
    token: Array,
    wanted: Array,
    page_table: Any = None,
) -> list[Array]:
    """`read_rows` of caches, from what is kept on the device where it is there.

    Args:
      inputs: with `kept`, None for caches on the device, and the caches.
      fields: which caches.
      kv_layout: of the caches.
      row, kv_head, token, wanted, page_table: as in `read_rows`; rows that are kept have no pages.
    """
    kept, at = inputs.kept, (row, kv_head)
    if kept is None:
        place = kv_layout, *at, token, wanted, page_table
        return [read_rows(getattr(inputs, x), *place) for x in fields]
    slot = backend.load(kept.slot_of.at[(*at, token)], mask=wanted, other=-1)
    is_near = slot >= 0
    slot = jnp.where(is_near, slot, 0)

    def read(field: str) -> Array:
        far = read_rows(getattr(inputs, field), kv_layout, *at, token, wanted & ~is_near)
        near = read_rows(getattr(kept, field), "BSKH", *at, slot, is_near)
        return jnp.where(is_near[:, None], near, far)

    return [read(field) for field in fields]


def read_query(query: Any, row: Array, token: Array, head: Array) -> Float[Array, "H"]:
    """One query, as float32."""
    size = query.shape[3]
    d = jnp.arange(padded(size), dtype=jnp.int32)
    found = backend.load(query.at[row, token, head, d], mask=d < size, other=0)
    return found.astype(jnp.float32)


def read_logits(logits: Logits) -> Logits:
    """Scale and cap, read before all that waits for memory: what is read later waits again."""
    return jax.tree.map(lambda ref: ref[0], logits)


def _logits(products: Array, live: Array, logits: Logits) -> Array:
    return jnp.where(live, made_logits(products, logits), -jnp.inf)


def finite(largest: Array) -> Array:
    """What to subtract from logits: where none is above -inf, nothing."""
    return jnp.where(largest == -jnp.inf, 0, largest)


def attend(
    query: Float[Array, "H"],
    key: Float[Array, "block H"],
    value: Float[Array, "block H_"],
    live: Array,
    logits: Logits,
) -> Softmax:
    """Softmax of one query over a block of tokens, of those that are live."""
    products = jnp.sum(key.astype(jnp.float32) * query[None, :], axis=1)
    return softmax(_logits(products, live, logits), live, value)


def softmax(logit: Array, live: Array, value: Float[Array, "block H_"]) -> Softmax:
    """Softmax of one query over a block of tokens, by their logits: -inf if they are not live."""
    largest = jnp.max(logit)
    weight = jnp.where(live, jnp.exp(logit - finite(largest)), 0)
    values = jnp.sum(weight[:, None] * value.astype(jnp.float32), axis=0)
    return Softmax(largest, jnp.sum(weight), values)


def attend_together(
    query: Float[Array, "16 H"],
    key: Float[Array, "block H"],
    value: Float[Array, "block H_"],
    live: Array,
    logits: Logits,
) -> Softmax:
    """Softmax of several queries over a block of tokens, of those live: bool[1 or 16, block]."""
    if len({query.dtype, key.dtype, value.dtype}) > 1 or query.dtype == jnp.float32:
        query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    multiply = functools.partial(
        lax.dot_general,
        precision=lax.Precision.HIGHEST if query.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    logit = _logits(multiply(query, key, (((1,), (1,)), ((), ()))), live, logits)
    largest = jnp.max(logit, axis=1)
    weight = jnp.where(live, jnp.exp(logit - finite(largest)[:, None]), 0)
    # Tensor cores take weights of the values' dtype: in two parts these are good to float32.
    high = weight.astype(value.dtype)
    values = multiply(high, value, (((1,), (0,)), ((), ())))
    if value.dtype != jnp.float32:
        low = (weight - high.astype(jnp.float32)).astype(value.dtype)
        values += multiply(low, value, (((1,), (0,)), ((), ())))
    return Softmax(largest, jnp.sum(weight, axis=1), values)


def merge_two(one: Softmax, other: Softmax) -> Softmax:
    """Two parts of one query in one."""
    largest = jnp.maximum(one.largest, other.largest)
    of_one, of_other = (jnp.exp(x.largest - finite(largest)) for x in (one, other))
    return Softmax(
        largest,
        one.total * of_one + other.total * of_other,
        one.values * of_one + other.values * of_other,
    )


class Queries(NamedTuple):
    """Up to 16 queries of a row and a kv head: where they are in [B, T, N], and which exist."""

    row: Array
    token: Array
    head: Array
    exists: Array

    @classmethod
    def of(cls, row: Array, token: Array, head: Array, heads: int, tokens: int = 1) -> "Queries":
        """Those of some heads from `head` on; or of some tokens, of each the same heads."""
        number = jnp.arange(ROWS, dtype=jnp.int32)
        exists = number < heads * tokens
        place = jnp.where(exists, number, 0)
        if tokens > 1:
            token, place = token + place // heads, place % heads
        return cls(row, token, head + place, exists)

    def read(self, query: Any) -> Float[Array, "16 H"]:
        """Their vectors, zeros for those that do not exist."""
        size = query.shape[3]
        d = jnp.arange(padded(size), dtype=jnp.int32)[None, :]
        mask = jnp.broadcast_to(self.exists[:, None] & (d < size), (ROWS, d.size))
        token = self.token[:, None] if self.token.ndim else self.token
        at = query.at[self.row, token, self.head[:, None], d]
        return backend.load(at, mask=mask, other=0)

    def write(self, parts: Parts, part: Array, found: Softmax) -> None:
        """Writes a part of each."""
        # What is not written lies outside: the interpreter writes back what it read there.
        head = jnp.where(self.exists, self.head, parts.largest.shape[2])
        at = self.row, self.token, head, part
        backend.store(parts.largest.at[at], found.largest, mask=self.exists)
        backend.store(parts.total.at[at], found.total, mask=self.exists)
        d = jnp.arange(found.values.shape[1], dtype=jnp.int32)[None, :]
        mask = self.exists[:, None] & (d < parts.values.shape[4])
        mask = jnp.broadcast_to(mask, found.values.shape)
        token = self.token[:, None] if self.token.ndim else self.token
        at = parts.values.at[self.row, token, head[:, None], part, d]
        backend.store(at, found.values, mask=mask)


def write_part(parts: Parts, at: tuple[Array, ...], found: Softmax) -> None:
    """Writes a part of one query, at its place [B, T, N, parts]."""
    d = jnp.arange(found.values.shape[0], dtype=jnp.int32)
    mask = d < parts.values.shape[4]
    backend.store(parts.values.at[(*at, d)], found.values, mask=mask)
    parts.largest[at] = found.largest
    parts.total[at] = found.total


def read_parts(parts: Parts, row: Array, token: Array, head: Array) -> Softmax:
    """All parts of a query in one, in their order."""
    num_parts, size = parts.values.shape[3:]
    at_once = min(power_of_2_from(num_parts), MERGED_AT_ONCE)
    d = jnp.arange(padded(size), dtype=jnp.int32)

    def read(i) -> Softmax:
        part = i * at_once + jnp.arange(at_once, dtype=jnp.int32)
        exists = part < num_parts
        at = row, token, head, part
        largest_of = backend.load(parts.largest.at[at], mask=exists, other=-jnp.inf)
        total_of = backend.load(parts.total.at[at], mask=exists, other=0)
        values_of = backend.load(
            parts.values.at[row, token, head, part[:, None], d[None, :]],
            mask=exists[:, None] & (d < size)[None, :],
            other=0,
        )
        largest = jnp.max(largest_of)
        weight = jnp.where(exists, jnp.exp(largest_of - finite(largest)), 0)
        values = jnp.sum(values_of * weight[:, None], axis=0)
        return Softmax(largest, jnp.sum(total_of * weight), values)

    if at_once >= num_parts:
        return read(0)
    turns = pl.cdiv(num_parts, at_once)
    return lax.fori_loop(1, turns, lambda i, so_far: merge_two(so_far, read(i)), read(0))


def write_output(output: Attention, row: Array, token: Array, head: Array, found: Softmax) -> None:
    """Writes the attention of one query: zeros if it attends to nothing."""
    d = jnp.arange(found.values.shape[0], dtype=jnp.int32)
    total = jnp.where(found.total == 0, 1, found.total)
    values = (found.values / total).astype(output.out.dtype)
    backend.store(output.out.at[row, token, head, d], values, mask=d < output.out.shape[3])
    lse = finite(found.largest) + jnp.log(total)
    output.lse[row, token, head] = jnp.where(found.total == 0, -jnp.inf, lse)


# What is listed for each query head


class ListedInputs(NamedTuple):
    """Lists i32[B, T, N, P]; what is no position of the caches is left out."""

    query: Any  # [B, T, N, H]
    key: Any
    value: Any
    indices: Any
    logits: Logits
    after: Lengths | None  # the step that made the lists
    kept: Kept | None
    page_table: Any  # i32[B, pages] of caches in pages, else None


class Entries(NamedTuple):
    """Entries of lists: those from `first` on, before `last`."""

    first: int
    last: int

    @classmethod
    def of(cls, config: IndexerConfig) -> "Entries":
        """Those that differ between query heads of a kv head, in lists that `select` makes.

        A list that holds fewer heavy tokens than a config says holds all there are.
        """
        return cls(config.sink_size, config.sink_size + config.heavy_size)

    @property
    def number(self) -> int:
        return self.last - self.first


def read_listed(
    inputs: ListedInputs,
    kv_layout: KVLayout,
    row: Array,
    kv_head: Array,
    position: Array,
    exists: Array,
) -> tuple[Array, Float[Array, "block H"], Float[Array, "block H_"]]:
    """Which entries of a list are positions of the caches, and their keys and values."""
    capacity, table = inputs.key.shape[token_axis(kv_layout)], inputs.page_table
    capacity *= 1 if table is None else table.shape[1]
    live = exists & (position >= 0) & (position < capacity)
    position = jnp.where(live, position, 0)
    of_row = row, kv_head, position, live
    key, value = read_caches(inputs, Caches._fields, kv_layout, *of_row, table)
    return live, key, value


def listed_kernel(
    program,
    inputs: ListedInputs,
    parts: Parts,
    *,
    kv_layout: KVLayout,
    block: int,
    own: Entries,
    step: Step | None,
):
    """A block of what one query head lists for itself, for the lists of a step where they end."""
    _, num_tokens, num_heads, _ = inputs.indices.shape
    kv_heads = inputs.key.shape[head_axis(kv_layout)]
    num_parts = parts.largest.shape[3]
    part, head = program % num_parts, program // num_parts % num_heads
    token = program // (num_parts * num_heads) % num_tokens
    row = program // (num_parts * num_heads * num_tokens)
    kv_head = head // (num_heads // kv_heads)

    logits = read_logits(inputs.logits)
    slot = part * block + jnp.arange(block, dtype=jnp.int32)
    entry = own.first + slot
    exists = entry < own.last
    at = inputs.indices.at[row, token, head, jnp.where(exists, entry, 0)]
    position = backend.load(at, mask=exists, other=-1)
    query = read_query(inputs.query, row, token, head)
    if step is not None:
        assert inputs.after is not None
        plan = plan_query(step, inputs.after, row * kv_heads + kv_head, token)
        exists &= slot < plan.between(step.config)
    live, key, value = read_listed(inputs, kv_layout, row, kv_head, position, exists)
    write_part(parts, (row, token, head, part), attend(query, key, value, live, logits))


def shared_kernel(
    program,
    inputs: ListedInputs,
    parts: Parts,
    *,
    kv_layout: KVLayout,
    block: int,
    own: Entries,
):
    """A block of what query heads of one kv head all list, by the list of the first of them."""
    _, num_tokens, num_heads, list_size = inputs.indices.shape
    kv_heads, num_parts = inputs.key.shape[head_axis(kv_layout)], parts.largest.shape[3]
    together = sharing(num_heads // kv_heads)
    groups = num_heads // together
    part, head = program % num_parts, program // num_parts % groups * together
    token = program // (num_parts * groups) % num_tokens
    row = program // (num_parts * groups * num_tokens)
    kv_head = head // (num_heads // kv_heads)

    logits = read_logits(inputs.logits)
    slot = part * block + jnp.arange(block, dtype=jnp.int32)
    exists = slot < list_size - own.number
    entry = jnp.where(slot < own.first, slot, own.number + slot)
    at = inputs.indices.at[row, token, head, jnp.where(exists, entry, 0)]
    position = backend.load(at, mask=exists, other=-1)
    queries = Queries.of(row, token, head, together)
    query = queries.read(inputs.query)
    live, key, value = read_listed(inputs, kv_layout, row, kv_head, position, exists)
    queries.write(parts, part, attend_together(query, key, value, live[None, :], logits))


class LeftOut(NamedTuple):
    """A `Rest`: f32[B, T, N, H'], and f32[B, T, N] each."""

    value: Any
    log_mass: Any
    log_heavy_mass: Any


class MergeInputs(NamedTuple):
    """What an attention is merged from, and what a step leaves to its last kernel.

    Attributes:
      parts: in the order they are added.
      rest: what the lists leave out, or None.
      after: lengths after the step, or None.
      lengths: `Lengths` of all layers, or None; not read.
    """

    parts: tuple[Parts, ...]
    rest: LeftOut | None
    after: Lengths | None
    lengths: Any


class Ended(NamedTuple):
    """An output, and `Lengths` in the memory of those before a step, if it is one."""

    output: Attention
    lengths: Any


def write_length(after: Lengths | None, lengths: Any, row: Array, is_first: Array) -> None:
    """A step's first kernel reads what its last one replaces."""
    if after is not None:

        @pl.when(is_first)
        def _():
            lengths.lengths[row] = after.lengths[row]
            if lengths.high_water is not None:
                lengths.high_water[row] = after.high_water[row]


def read_rest(
    rest: LeftOut, row: Array, token: Array, head: Array, heavy: Softmax | None
) -> Softmax:
    """What is left out of a list, corrected by what its heavy tokens weigh."""
    at = row, token, head
    largest, total = rest.log_mass[at], jnp.float32(1)
    if heavy is not None:
        total = corrected_by(heavy.largest, heavy.total, rest.log_heavy_mass[at], total)
    total = jnp.where(largest == -jnp.inf, 0, total)
    size = rest.value.shape[3]
    d = jnp.arange(padded(size), dtype=jnp.int32)
    value = backend.load(rest.value.at[(*at, d)], mask=d < size, other=0)
    return Softmax(largest, total, total * value)


def merge_kernel(program, inputs: MergeInputs, outputs: Ended):
    _, num_tokens, num_heads, _ = outputs.output.out.shape
    head, token = program % num_heads, program // num_heads % num_tokens
    row = program // (num_heads * num_tokens)
    found = [read_parts(parts, row, token, head) for parts in inputs.parts]
    if inputs.rest is not None:  # of two parts the heavy tokens are the first
        heavy = found[0] if len(found) > 1 else None
        found.append(read_rest(inputs.rest, row, token, head, heavy))
    write_output(outputs.output, row, token, head, functools.reduce(merge_two, found))
    write_length(inputs.after, outputs.lengths, row, (token == 0) & (head == 0))


# What a decode step does beside its append


class Written(NamedTuple):
    """Keys and values, in the memory of those before: of caches, or what is recent of these.

    Of the latter also which rows hold which positions, as in `Recent`; else None.
    """

    key: Any
    value: Any
    slot_of: Any = None
    position_in: Any = None


class WriteInputs(NamedTuple):
    """Keys and values of the step's tokens, and where they go, which is not read."""

    before: Lengths  # the step
    key_new: Any  # [B, T, K, H], or head-major
    value_new: Any
    key: Any
    value: Any
    slot_of: Any
    position_in: Any
    behind: Any  # not read: made by what comes first


def write_kernel(program, inputs: WriteInputs, outputs: Written, *, step: Step, is_recent: bool):
    """One new token of one kv head goes into the caches, if its row takes it."""
    token, kv_head = program % step.T, program // step.T % step.K
    row = program // (step.T * step.K)
    room, span = room_in(step, inputs.before, row)[0], inputs.before.span(step)
    start, is_mine = room.start, token < room.taken
    if span is not None:
        start = start - span.offset
        is_mine &= (start + token >= 0) & (start + token < step.S)
    table, of_row, slot = inputs.before.page_table, row, None
    if table is not None:  # of a page that is there, or the row would take nothing
        size = outputs.key.shape[token_axis(step.kv_layout)]
        number, slot = page_and_slot(start + token, size)
        page = table[row, jnp.minimum(number, table.shape[1] - 1)]
        of_row = jnp.clip(page, 0, outputs.key.shape[0] - 1)

    @pl.when(is_mine)
    def _():
        for new, cache in ((inputs.key_new, outputs.key), (inputs.value_new, outputs.value)):
            size = cache.shape[3]
            d = jnp.arange(power_of_2_from(size), dtype=jnp.int32)
            of_new, of_cache = (
                (x, kv_head) if step.kv_layout == "BSKH" else (kv_head, x)
                for x in (token, start + token if slot is None else slot)
            )
            if is_recent:
                of_cache = place_of(room.start + token, step.config), kv_head
            found = backend.load(new.at[(row, *of_new, d)], mask=d < size, other=0)
            backend.store(cache.at[(of_row, *of_cache, d)], found, mask=d < size)
        if is_recent:
            forget(outputs, row, kv_head, room.start + token)


def forget(outputs: Any, row: Array, kv_head: Array, position: Array) -> None:
    """What is kept of a position that is written over is so no more."""
    slot = outputs.slot_of[row, kv_head, position]
    backend.barrier()
    outputs.slot_of[row, kv_head, position] = -1

    @pl.when(slot >= 0)
    def _():
        outputs.position_in[row, kv_head, slot] = -1


class AlwaysInputs(NamedTuple):
    """What is always attended lies in the caches; the step's own tokens are read from `*_new`."""

    before: Lengths  # the step
    query: Any
    key_new: Any
    value_new: Any
    key: Any
    value: Any
    logits: Logits


def always_kernel(
    program, inputs: AlwaysInputs, parts: Parts, *, step: Step, block: int, is_recent: bool
):
    """A block of sinks and windows, for queries of some tokens and heads that share most of it.

    Where the caches are in host memory, `is_recent`, what is recent stands for them.
    """
    num_parts, together, tokens = parts.largest.shape[3], sharing(step.G), tokens_at_once(step)
    groups, blocks_of_tokens = step.N // together, pl.cdiv(step.T, tokens)
    part, group = program % num_parts, program // num_parts % groups
    token = program // (num_parts * groups) % blocks_of_tokens * tokens
    row, head = program // (num_parts * groups * blocks_of_tokens), group * together
    kv_head = head // step.G

    logits = read_logits(inputs.logits)
    queries = Queries.of(row, token, head, together, tokens)
    if tokens > 1:
        queries = queries._replace(exists=queries.exists & (queries.token < step.T))
    query = queries.read(inputs.query)

    plan = plan_after(step, inputs.before, row * step.K + kv_head, queries.token)
    num_first, num_last = plan.always(step.config)
    begin, end = plan.visible - num_last, plan.visible
    slot = part * block + jnp.arange(block, dtype=jnp.int32)
    most_first, least_begin, most_end = num_first, begin, end
    if tokens > 1:  # the sinks of all, then their windows, each of which begins behind a whole sink
        most_first = jnp.max(jnp.where(queries.exists, num_first, 0))
        has_window = queries.exists & (num_last > 0)
        most_end = jnp.max(jnp.where(has_window, end, 0))
        least_begin = jnp.min(jnp.where(has_window, begin, most_end))
        num_first, begin, end = (x[:, None] for x in (num_first, begin, end))
    wanted = slot < most_first + (most_end - least_begin)
    position = jnp.where(slot < most_first, slot, least_begin - most_first + slot)
    position = jnp.where(wanted, position, 0)
    seen, in_sinks = position[None, :], (slot < most_first)[None, :]
    live = (slot[None, :] < num_first) | (~in_sinks & (seen >= begin) & (seen < end))
    live &= wanted[None, :]
    room, span = room_in(step, inputs.before, row)[0], inputs.before.span(step)
    new = (position if span is None else position + span.offset) - room.start
    is_new = wanted & (new >= 0) & (new < room.taken)
    new = jnp.where(is_new, new, 0)

    place = place_of(position, step.config) if is_recent else position
    kv_layout = "BSKH" if is_recent else step.kv_layout
    table = inputs.before.page_table

    def read(cache, new_ones):
        old = read_rows(cache, kv_layout, row, kv_head, place, wanted & ~is_new, table)
        own = read_rows(new_ones, step.kv_layout, row, kv_head, new, is_new)
        return jnp.where(is_new[:, None], own, old)

    key, value = read(inputs.key, inputs.key_new), read(inputs.value, inputs.value_new)
    queries.write(parts, part, attend_together(query, key, value, live, logits))


def sharing(group: int) -> int:
    """How many of the query heads of a kv head are attended for together."""
    return max(number for number in range(1, ROWS + 1) if group % number == 0)


def tokens_at_once(step: Step) -> int:
    """Query tokens that share what they always attend to, but for the ends of their windows."""
    return min(step.T, ROWS // sharing(step.G))


# Launches


def vectors(logits: Logits) -> Logits:
    """Scalars as kernels take them."""
    return jax.tree.map(lambda x: x.reshape(1), logits)


def shapes_of_parts(query: Any, value_size: int, num_parts: int) -> Parts:
    """The outputs of a launch that attends in parts."""
    of_part = *query.shape[:3], num_parts
    return Parts(
        jax.ShapeDtypeStruct(of_part, np.float32),
        jax.ShapeDtypeStruct(of_part, np.float32),
        jax.ShapeDtypeStruct((*of_part, value_size), np.float32),
    )


def shapes_of_end(
    query: Any,
    value_size: int,
    lengths: Lengths | None,
    after: Lengths | None,
    layer: Array | None,
    dtype: Any = None,
) -> Ended:
    """The outputs of a launch that ends an attention, and a step if there are lengths."""
    out = jax.ShapeDtypeStruct((*query.shape[:3], value_size), dtype or query.dtype)
    output = Attention(out, jax.ShapeDtypeStruct(query.shape[:3], np.float32))
    if lengths is None:
        return Ended(output, None)
    after = after and after._replace(offset=None, page_table=None)  # which no length depends on
    return Ended(
        output,
        jax.tree.map(lambda x: backend.follows(x.shape, np.int32, lengths, after, layer), lengths),
    )


def write_launch(
    step: Step,
    new: Caches,
    into: Caches | Recent,
    before: Lengths,
    layer: Array | None,
    behind: Array | None = None,
) -> backend.Launch:
    """The launch that writes the keys and values that each row takes into the caches.

    Or, of caches in host memory, into what is recent of them. Into these themselves goes a launch
    of its own, since XLA may take all that a launch writes in place for what one array of it is;
    and it waits for `behind`, since XLA copies a cache that others may still read.
    """
    is_recent = isinstance(into, Recent)
    places = (into.slot_of, into.position_in) if is_recent else ()
    old = Written(into.key, into.value, *places)
    return backend.Launch(
        functools.partial(write_kernel, step=step, is_recent=is_recent),
        WriteInputs(before, *new, old.key, old.value, old.slot_of, old.position_in, behind),
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), old),
        programs=step.B * step.K * step.T,
        in_place=Written._fields,
        state=("before.lengths", *Written._fields),
        layer=layer,
    )


def always_launch(
    step: Step,
    query: Float[Array, "B T N H"],
    new: Caches,
    caches: Caches,
    before: Lengths,
    logits: Logits,
    layer: Array | None,
    is_recent: bool = False,
) -> backend.Launch:
    """The launch that attends to sink and window, which the query heads of a kv head share.

    It needs nothing of a selection, and the caches, or what is recent of those in host memory, may
    be written beside it.
    """
    value_size = new.value.shape[3]
    tile = step.tuning.before_pool_tile if step.config.has_pool else step.tuning.always_tile
    block = block_of(query.shape[3], value_size, tile, step.tuning)
    tokens = tokens_at_once(step)
    most = min(step.config.sink_size + step.config.window_size + tokens - 1, step.S)
    num_parts = max(pl.cdiv(most, block), 1)
    groups = step.N // sharing(step.G) * pl.cdiv(step.T, tokens)
    return backend.Launch(
        functools.partial(always_kernel, step=step, block=block, is_recent=is_recent),
        AlwaysInputs(before, query, *new, *caches, vectors(logits)),
        shapes_of_parts(query, value_size, num_parts),
        programs=step.B * groups * num_parts,
        state=("before.lengths", *Caches._fields),
        layer=layer,
    )


class Middle(NamedTuple):
    """Lists whose sink and window are attended to already.

    Attributes:
      step: that made the lists; where several devices share a row, these have only what lies
        between sink and window.
      after: lengths after it.
      known: parts of sink and window.
      lengths: of all layers, in which those of this one are replaced.
      kept: of caches in host memory.
    """

    step: Step
    after: Lengths
    known: Parts
    lengths: Lengths
    kept: Kept | None = None


def launch_listed(
    query: Float[Array, "B T N H"],
    caches: Caches,
    indices: Int32[Array, "B T N P"],
    logits: Logits,
    layer: Array | None,
    kv_layout: KVLayout,
    *,
    own: Entries | None = None,
    rest: Rest | None = None,
    middle: Middle | None = None,
    tuning: Tuning = H100,
    dtype: Any = None,
    page_table: Int32[Array, "B pages"] | None = None,
) -> Ended:
    """Attends to lists.

    Args:
      query: the queries.
      caches: keys and values, of all layers if there are any.
      indices: the lists; what is not a position of the caches is left out.
      logits: how to make logits.
      layer: of the caches.
      kv_layout: of the caches.
      own: entries that differ between query heads of a kv head; None for all.
      rest: what the lists leave out, or None; then `own` are their heavy tokens.
      middle: of the lists of a step, what the other entries give.
      tuning: block sizes.
      dtype: of the output; None for the query's.
      page_table: of caches in pages; None for caches in rows.

    Returns:
      The output, and lengths for those of `middle`.

    Source: CONTRACT.md, section 4.
    """
    step, after, known, lengths, kept = middle or (None, None, None, None, None)
    list_size, value_size = indices.shape[3], caches.value.shape[-1]
    together = sharing(query.shape[2] // caches.key.shape[head_axis(kv_layout) - 4])
    of_devices = after is not None and after.offset is not None
    of_lists = after and after._replace(high_water=None, page_table=None)
    if step is not None and not of_devices:
        own = Entries(step.config.sink_size, list_size - step.config.window_size)
    elif own is None or (together == 1 and rest is None):
        own = Entries(0, list_size)

    def in_parts(
        kernel: Callable, number: int, tile: int, heads: int = 1, **options: Any
    ) -> backend.Launch:
        """The launch that attends to a number of entries in parts, for some heads together."""
        block = block_of(query.shape[3], value_size, tile, tuning)
        num_parts = max(pl.cdiv(number, block), 1)
        return backend.Launch(
            functools.partial(kernel, kv_layout=kv_layout, block=block, own=own, **options),
            ListedInputs(query, *caches, indices, vectors(logits), of_lists, kept, page_table),
            shapes_of_parts(query, value_size, num_parts),
            programs=math.prod(query.shape[:3]) // heads * num_parts,
            state=(*Caches._fields, *KEPT_STATE),
            layer=layer,
        )

    ends = None if of_devices else step
    listed = in_parts(listed_kernel, own.number, tuning.attended_tile, step=ends)
    warps = tuning.attended_warps
    if step is not None or (own.number == list_size and rest is None):
        found = backend.launch(listed, num_warps=warps)
        parts = (found,) if known is None else (known, found)
    else:
        number = list_size - own.number
        shared = in_parts(shared_kernel, number, tuning.always_tile, together)
        launches = {"shared": shared} | ({"listed": listed} if own.number else {})
        made = backend.launch_together(launches, num_warps=warps)
        parts = tuple(made[name] for name in ("listed", "shared") if name in made)
    left_out = rest and LeftOut(rest.value, rest.log_mass, rest.log_heavy_mass)
    merge = backend.Launch(
        merge_kernel,
        MergeInputs(parts, left_out, after and after._replace(page_table=None), lengths),
        shapes_of_end(query, value_size, lengths, after, layer, dtype),
        programs=math.prod(query.shape[:3]),
        in_place=REACHED,
        state=REACHED,
        layer=layer,
    )
    num_parts = sum(part.largest.shape[3] for part in parts)
    num_warps = 1 if num_parts <= MERGED_AT_ONCE else tuning.merged_warps
    return backend.launch(merge, num_warps=num_warps)
