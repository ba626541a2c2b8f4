"""The state of an index and what a step returns: the ground floor, on which all else stands."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Float32, Int32, UInt8

from jax_indexer.config import MOST_TOKENS_OF_CELLS, IndexerConfig
from jax_indexer.layout import power_of_2_from

# New tokens that an update of cells takes; where more come at once, all of the row is listed anew.
MOST_NEW = MOST_TOKENS_OF_CELLS
# Tokens below a row's high water that `truncate` goes back to, at the most.
MOST_BACK = 8
# A query sees so many tokens less than the high water, at the most: what these may take back, or
# see in their window, is neither sealed nor summed.
UNSETTLED = MOST_BACK + MOST_NEW - 1
# Tokens that are counted for each new one.
RATE = 4
SMALLEST_SEGMENT = 512
# Moving all lists takes this many tokens where blocks from small to large allow it, and never more
# than the most.
MOVES, MOST_MOVES = 128, 512
SMALLEST_BLOCK, LARGE_BLOCK = 256, 4096


class Span(NamedTuple):
    """The positions of every row that a device holds, where S is split over devices.

    Lengths stay those of whole rows, the same on all devices. Positions in arrays of a device, in
    its lists and in its cells count from its first one.

    Attributes:
      offset: int32[], the first of them.
      size: how many: S of the arrays there.
      devices: that share a row, in the order of their positions.
      axis: of the mesh, that these lie along.
    """

    offset: Any
    size: int
    devices: int
    axis: str

    @classmethod
    def of(cls, axis: str | None, size: int) -> "Span | None":
        """That of this device, inside a shard_map; None where S is not split."""
        if axis is None:
            return None
        return cls(lax.axis_index(axis) * np.int32(size), size, lax.axis_size(axis), axis)

    @property
    def capacity(self) -> int:
        """Positions of a whole row."""
        return self.size * self.devices

    @property
    def number(self) -> Array:
        """Of the device, from 0 on."""
        return lax.div(self.offset, np.int32(self.size))

    def clip(self, position: Any, beyond: int = 0) -> Any:
        """Positions of a row, counted from the device's first on and clipped to those it holds."""
        return jnp.clip(position - self.offset, 0, self.size + beyond)

    def sum(self, x: Any) -> Any:
        """The sum over the devices."""
        return lax.psum(x, self.axis)

    def from_holder(self, x: Float32[Array, "*shape"], holds: Array) -> Float32[Array, "*shape"]:
        """Numbers of which each is on one device, to the bit, on all; 0 where none holds one."""
        bits = lax.bitcast_convert_type(x, jnp.int32)
        return lax.bitcast_convert_type(self.sum(jnp.where(holds, bits, 0)), jnp.float32)

    def of_sealing(self, sealing: "Sealing") -> "Sealing":
        """How the device seals what it holds: its first candidate is an array, not static."""
        return dataclasses.replace(sealing, first_candidate=self.clip(sealing.first_candidate))

    def length(self, length: Any, sealing: "Sealing") -> Any:
        """What `progress` and `sealed_at` see of a row's high water, for a capacity of `reach`."""
        return self.clip(length, sealing.margin)

    def reach(self, sealing: "Sealing") -> int:
        """Tokens behind the last one that a device holds decide when that one is sealed."""
        return self.size + sealing.margin


@dataclasses.dataclass(frozen=True)
class Sealing:
    """How the candidates of an index are sealed: static.

    Attributes:
      first_candidate: of the config that the state was made for.
      window_size: likewise.
      segment: tokens that are sealed together, a power of two.
      block: entries that move for each new token, a power of two.
    """

    first_candidate: int
    window_size: int
    segment: int
    block: int

    @property
    def margin(self) -> int:
        """Tokens below the high water that are not sealed: windows, and what is taken back."""
        return min(self.window_size + UNSETTLED, np.iinfo(np.int32).max)

    @property
    def ring(self) -> int:
        """Entries of the ring: a step may read as many blocks as others wait to be written."""
        return 2 * MOST_NEW * self.block

    def most_waiting(self, capacity: int) -> int:
        """Tokens that wait to be sealed, at the most: one more, and the segment is sealed."""
        return self.segment + -(-capacity // self.block) + 2 * MOST_NEW

    def most_tail(self, capacity: int) -> int:
        """Candidates in the tail, at the most."""
        return self.most_waiting(capacity) + UNSETTLED


def sealing_for(
    capacity: int,
    config: IndexerConfig | Sealing,
    *,
    smallest_segment: int = SMALLEST_SEGMENT,
    smallest_block: int = SMALLEST_BLOCK,
    most_moves: int = MOST_MOVES,
) -> Sealing:
    """How a cache of this capacity is sealed."""
    block = max(
        min(power_of_2_from(-(-capacity // MOVES)), LARGE_BLOCK),
        power_of_2_from(-(-capacity // most_moves)),
        smallest_block,
    )
    moves = -(-capacity // block)
    # The next segment must not be counted in the step that seals this one, which is the first with
    # more than segment + moves + 2 * MOST_NEW tokens waiting, by MOST_NEW at the most. So up to
    # moves + 3 * MOST_NEW are left, and counting must begin with more: behind
    # segment - segment / RATE.
    least = -(-(moves + 3 * MOST_NEW) * RATE // (RATE - 1))
    segment = max(power_of_2_from(least), smallest_segment)
    return Sealing(config.first_candidate, config.window_size, segment, block)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cells:
    """State of the "cells" selector: the tokens of a kv head by the codes they have.

    With M subspaces a key lies in one of C**M cells of the inverted multi-index, and all keys of a
    cell have one score. Candidates before some position, the *sealed* ones, are listed cell by
    cell; those from there on, the *tail*, need no lists, since candidates become such in the order
    of their positions.

    For each kv head it takes 4 bytes a token, 8 a cell, 4 a token of a segment, and the ring: less
    than about a byte a token where there are 32768 or more, else 16 KiB.

    Attributes:
      starts: where each cell's list begins, with a last entry for the end; and, while a segment
        goes in, where it will. Before that, how many counted tokens of the segment lie in each
        cell.
      order: positions of the sealed candidates cell by cell, ascending in each.
      earlier: how many tokens of the segment before a counted one are in its cell.
      ring: positions that were read from `order` and are not written to their new place yet;
        2 * MOST_NEW * block of them.
      base: the position up to which candidates were sealed when all were listed at once; where S
        is split over devices, that of the whole row.
      sealing: how tokens are sealed since.

    Source: the inverted multi-index of Babenko and Lempitsky (2012).
    """

    starts: Int32[Array, "B K 2 C**M+1"]
    order: Int32[Array, "B K S"]
    earlier: Int32[Array, "B K segment"]
    ring: Int32[Array, "B K ring"]
    base: Int32[Array, "B"]
    sealing: Sealing = dataclasses.field(metadata={"static": True})

    def sealed(self, high_water: Int32[Array, "B"]) -> Int32[Array, "B"]:
        """The position up to which candidates are sealed, in rows with this high water."""
        return sealed_at(high_water, self.base, self.sealing, self.order.shape[-1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ValueSums:
    """Sums of candidates' values by code, which those that are not attended are estimated from.

    With `config.estimate_rest="codes"` M' is M and C' is C; with "mean" both are 1, as if all keys
    had the one code. They cover the candidates up to UNSETTLED tokens before the window of the
    high water's last token; a value that is not finite is left out.

    Attributes:
      sums: of the values of each code.
      counts: how many values these are.
    """

    sums: Float32[Array, "B K M' C' H'"]
    counts: Int32[Array, "B K M' C'"]


def summed_until(high_water: Int32[Array, "B"], config: IndexerConfig) -> Int32[Array, "B"]:
    """The position up to which candidates' values are summed in rows with this high water."""
    until = jnp.maximum(high_water - UNSETTLED, 0) - config.window_size
    return jnp.maximum(until, config.first_candidate)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PQIndex:
    """The product-quantized keys of a cache: a pytree whose shapes never change while decoding.

    Attributes:
      codebooks: centroids, float32, bfloat16 or float16; D' = H // M, and one more for the
        inner-product metric.
      codes: the nearest centroid of every subvector; only the low bits count.
      lengths: tokens in the cache; what lies past them has no meaning.
      phi: inner-product metric only, else None: the largest squared norm of a training subvector.
      cells: state of the "cells" selector with `config.cells`, else None.
      values: sums of values with `config.estimate_rest`, else None.
      high_water: the most tokens a row has had since it began, which `cells` and `values` follow;
        None where there are neither.
      capacity: S of whole rows, static, by which a part of them is known for one; None where it is
        not known, as in an index that was made by hand.

    Source: CONTRACT.md, section 4.
    """

    codebooks: Float[Array, "B K M C D'"]
    codes: UInt8[Array, "B K M S"]
    lengths: Int32[Array, "B"]
    phi: Float[Array, "B K M"] | None = None
    cells: Cells | None = None
    values: ValueSums | None = None
    high_water: Int32[Array, "B"] | None = None
    capacity: int | None = dataclasses.field(default=None, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recent:
    """What of a cache in host memory is on the device too.

    R is `sink_size` and the tokens of a ring, window_size + 23: position p of the sink is row p,
    any other row sink_size + p mod (window_size + 23). n rows of each kv head were listed lately:
    a new one takes the place of that which came first.

    Attributes:
      key: of the sink and of the newest tokens, in this order of axes with any `kv_layout`.
      value: likewise.
      kept_key: of tokens that were listed.
      kept_value: likewise.
      slot_of: which of the n rows holds a position, -1 for none.
      position_in: which position it holds, -1 for none.
      next_slot: the row that is taken next.
      sink_size: static, of the config that they were made for: R is the same of others.
    """

    key: Float[Array, "B R K H"]
    value: Float[Array, "B R K H'"]
    kept_key: Float[Array, "B n K H"]
    kept_value: Float[Array, "B n K H'"]
    slot_of: Int32[Array, "B K S"]
    position_in: Int32[Array, "B K n"]
    next_slot: Int32[Array, "B K"]
    sink_size: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeCache:
    """What a layer of attention decodes with: a pytree whose shapes never change.

    Attributes:
      key: [B, S, K, H] or [B, K, S, H], as `kv_layout` says.
      value: likewise, with a head dimension of its own.
      index: of the keys.
      recent: None for keys and values on the device; with those in host memory what of them is on
        the device too.
    """

    key: Float[Array, "B _ _ H"]
    value: Float[Array, "B _ _ H'"]
    index: PQIndex
    recent: Recent | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rest:
    """Candidates that are not listed, estimated by their codes, for `sparse_attention` to add.

    Attributes:
      value: the mean of their estimated values, by the exponentials of their logits by PQ; 0 where
        nothing is left.
      log_mass: the log of the sum of these exponentials; -inf where nothing is left.
      log_heavy_mass: likewise for the heavy tokens that are listed, whose true logits say how far
        PQ is off.

    Source: CONTRACT.md, section 4.
    """

    value: Float32[Array, "B T N H'"]
    log_mass: Float32[Array, "B T N"]
    log_heavy_mass: Float32[Array, "B T N"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selection:
    """The tokens to attend to: a pytree, of which one spec of B, T and N does for all arrays.

    Attributes:
      indices: positions in ascending order, unique, -1 past `counts`; P = config.max_selected(T).
      counts: how many positions are listed.
      weights: None unless asked for: in the query's dtype, 1 at listed tokens, else 0.
      capacity: S of the index, which a cache must have too; static; None where it is not known.
      rest: None unless asked for: what is not listed.
      sequence_axis: over which the devices that made it share its rows, of which each lists its own
        positions; static; None where none do.
    """

    indices: Int32[Array, "B T N P"]
    counts: Int32[Array, "B T N"]
    weights: Float[Array, "B T N S"] | None = None
    capacity: int | None = dataclasses.field(default=None, metadata={"static": True})
    rest: Rest | None = None
    sequence_axis: str | None = dataclasses.field(default=None, metadata={"static": True})


def varying_as(tree: Any, like: Array) -> Any:
    """The same, with types by which it differs among devices where `like` does.

    Branches and loops inside a shard_map want that of constants.
    """
    axes = jax.typeof(like).manual_axis_type.varying

    def one(x: Array) -> Array:
        missing = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, tree)


def layer_of(state: Any, layer: Array | None) -> Any:
    """One layer of a pytree whose arrays have an axis of layers, or all of it for None."""
    if layer is None:
        return state

    def one(x: Array) -> Array:
        return lax.dynamic_index_in_dim(x, jnp.clip(layer, 0, x.shape[0] - 1), keepdims=False)

    return jax.tree.map(one, state)


def put_layer(state: Any, of_layer: Any, layer: Array | None) -> Any:
    """The pytree with one layer replaced, or `of_layer` itself for None."""
    if layer is None:
        return of_layer

    def put(x: Array, one: Array) -> Array:
        place = jnp.clip(layer, 0, x.shape[0] - 1)
        return lax.dynamic_update_index_in_dim(x, one, place, axis=0)

    return jax.tree.map(put, state, of_layer)


class Progress(NamedTuple):
    """How far a row's next segment is.

    Attributes:
      waiting: tokens in the tail that may be sealed.
      entries: in the lists, without the segment.
      counted: tokens of the segment that are counted.
      read: blocks that were read into the ring, block i from i * block entries before the end on.
      moved: blocks that were written to their new place.
      still: entries that were not.
      begun: whether the segment is counted: new starts are there.
      done: whether the segment can be sealed: all blocks have moved, in an earlier step.
    """

    waiting: Array
    entries: Array
    counted: Array
    read: Array
    moved: Array
    still: Array
    begun: Array
    done: Array


def progress(high_water: Array, sealed: Array, sealing: Sealing, capacity: int) -> Progress:
    """How far a row is, for scalars or arrays of them.

    Args:
      high_water: the most tokens the row has had; clipped to 0..S.
      sealed: the position up to which its candidates are sealed.
      sealing: how tokens are sealed.
      capacity: S.

    Returns:
      A Progress, the same for all heads of the row.
    """
    high_water = jnp.minimum(jnp.maximum(high_water, 0), capacity)
    # Step by step: sizes may be so large that a sum would overflow.
    waiting = jnp.maximum(jnp.maximum(high_water - sealing.margin, 0) - sealed, 0)
    entries = jnp.maximum(sealed - sealing.first_candidate, 0)
    moves = _moves(entries, sealing)
    missing = jnp.maximum(sealing.segment - waiting, 0)
    counted = jnp.maximum(sealing.segment - RATE * jnp.minimum(missing, sealing.segment), 0)
    # A step writes what an earlier one read: no two programs of a launch need the same entry.
    read = jnp.minimum(jnp.maximum(waiting - sealing.segment, 0), moves)
    moved = jnp.minimum(jnp.maximum(waiting - (sealing.segment + MOST_NEW), 0), moves)
    still = jnp.maximum(entries - moved * sealing.block, 0)
    begun, done = missing == 0, waiting - (sealing.segment + 2 * MOST_NEW) > moves
    return Progress(waiting, entries, counted, read, moved, still, begun, done)


def _moves(entries: Array, sealing: Sealing) -> Array:
    """Blocks of the lists."""
    return lax.div(entries + (sealing.block - 1), jnp.full_like(entries, sealing.block))


def sealed_at(high_water: Array, base: Array, sealing: Sealing, capacity: int) -> Array:
    """The position up to which candidates are sealed, for scalars or arrays of them.

    A segment is sealed at a high water that follows from how many were before it, so that nothing
    but that need be kept.

    Args:
      high_water: the most tokens the row has had; clipped to 0..S.
      base: as in Cells.
      sealing: how tokens are sealed.
      capacity: S.

    Returns:
      base plus the segments that were sealed since; base is clipped to the cache.
    """
    # No position before the first is read, whatever is set by hand.
    first = sealing.first_candidate
    most = max(capacity, first) if isinstance(first, int) else jnp.maximum(first, capacity)
    base = jnp.minimum(jnp.maximum(base, first), most)
    now = progress(high_water, base, sealing, capacity)
    # Of segments before it a segment needs so many tokens: i * segment + moves(i) < behind. It is
    # the last with i * segment < behind, or the one before, since moves take less than a segment.
    behind = now.waiting - (sealing.segment + 2 * MOST_NEW)
    last = lax.div(jnp.maximum(behind - 1, 0), jnp.full_like(behind, sealing.segment))
    entries = now.entries + last * sealing.segment
    moves = _moves(entries, sealing)
    is_sealed = last * sealing.segment + moves < behind
    more = jnp.where(behind > 0, last + is_sealed.astype(jnp.int32), 0)
    return base + more * sealing.segment
