"""Where S is split over devices: which of a device's best candidates are among the best of all.

Every device finds its own `heavy_size` best as if there were no others. Only their ranks travel:
each device finds the same cut among those of all, and keeps what makes it. Devices follow one
another as their positions do, and lists ascend, so ties go to the lower position.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jaxtyping import Int32, UInt8

from jax_indexer.kernels import backend
from jax_indexer.kernels.best import Bounds, Cut, Ranks, emit_best, find_cut
from jax_indexer.kernels.lookup_table import Tables
from jax_indexer.kernels.output import Lists, Writer
from jax_indexer.kernels.scores import ranks_of_runs
from jax_indexer.kernels.step import Lengths, Step, plan_query
from jax_indexer.layout import power_of_2_from
from jax_indexer.reference import NOT_A_CANDIDATE
from jax_indexer.state import Span

# Ranks that a program holds at once: of two devices with the usual budgets, all of them.
MOST_HELD = 1024


class RankInputs(NamedTuple):
    """Lists of a device, and what their heavy tokens are scored by."""

    lengths: Lengths
    table: Any  # [R, Q, M * C]
    codes: Any  # u8[R, M, S]
    indices: Any  # i32[R, Q, P]


class RankOutputs(NamedTuple):
    """i32[R, Q, k] ranks of the heavy tokens of each list, in its order; then no candidates."""

    ranks: Any


def listed_ranks_kernel(program, inputs: RankInputs, outputs: RankOutputs, *, step: Step):
    kv_row, query = program // step.Q, program % step.Q
    plan = plan_query(step, inputs.lengths, kv_row, query // step.G)
    place = backend.lanes(power_of_2_from(step.budget))
    exists = place < plan.num_heavy
    slot = jnp.where(exists, plan.num_sink + place, 0)
    position = backend.load(inputs.indices.at[kv_row, query, slot], mask=exists, other=0)
    (rank,) = ranks_of_runs(
        step,
        lambda entry: inputs.table[kv_row, query, entry],
        inputs.codes,
        kv_row=kv_row,
        start=jnp.where(exists, position, 0),
        wanted=exists,
        run=1,
    )
    into = outputs.ranks.at[kv_row, query, jnp.minimum(place, step.budget)]
    backend.store(into, jnp.where(exists, rank, NOT_A_CANDIDATE), mask=place < step.budget)


class KeepInputs(NamedTuple):
    """A device's lists, and what all devices say of theirs."""

    lengths: Lengths
    indices: Any  # i32[R, Q, P]
    ranks: Any  # i32[devices, R, Q, k]


class KeepOutputs(NamedTuple):
    """Lists i32[R, Q, P], or what lies between sink and window of them, and i32[R, Q] counts."""

    indices: Any
    counts: Any


class Keeping(NamedTuple):
    """One program's view of its query.

    Attributes:
      step, inputs, outputs: of the launch.
      kv_row, query: whose list.
      number: of the device.
      threads: of the program.
    """

    step: Step
    inputs: KeepInputs
    outputs: KeepOutputs
    kv_row: Array
    query: Array
    number: Array
    threads: int

    def ranks(self, first: Array | int, size: int) -> Ranks:
        """Some of the ranks of all devices, in the order of their positions."""
        budget = self.step.budget

        def read(start):
            exists = start < size
            place = jnp.where(exists, first + start, 0)
            at = lax.div(place, budget), self.kv_row, self.query, lax.rem(place, budget)
            return [
                backend.load(self.inputs.ranks.at[at], mask=exists, other=NOT_A_CANDIDATE)
            ], start

        return Ranks(read, self.threads, 1, jnp.int32(size), size).held()

    def own_cut(self, num_heavy: Array) -> tuple[Ranks, Cut]:
        """The device's ranks, and which of them are among the `num_heavy` best of all."""
        budget = self.step.budget
        everywhere = self.ranks(0, self.step.devices * budget)
        own_first = self.number * budget
        own = self.ranks(own_first, budget)
        least, most = everywhere.extremes()
        number = jnp.int32(self.step.devices * budget)
        cut = find_cut(everywhere, num_heavy, Bounds(least, most + 1, number))

        def count_before(total, ranks, first):
            return total + ((ranks[0] == cut.rank) & (first < own_first)).astype(jnp.int32)

        def count_own(totals, ranks, _):
            marks = ranks[0] > cut.rank, ranks[0] == cut.rank
            return tuple(t + m.astype(jnp.int32) for t, m in zip(totals, marks, strict=True))

        nothing = jnp.zeros(self.threads, jnp.int32)
        before = jnp.sum(everywhere.fold(count_before, nothing))
        above, at = (jnp.sum(x) for x in own.fold(count_own, (nothing, nothing)))
        return own, Cut(cut.rank, above, jnp.clip(cut.ties - before, 0, at))


def keep_best_kernel(
    program,
    inputs: KeepInputs,
    outputs: KeepOutputs,
    *,
    step: Step,
    threads: int,
    middle: bool,
):
    kv_row, query = program // step.Q, program % step.Q
    token = query // step.G
    plan = plan_query(step, inputs.lengths, kv_row, token)
    num_heavy = plan_query(step, inputs.lengths._replace(offset=None), kv_row, token).num_heavy
    number = lax.div(inputs.lengths.offset[0], step.S)
    keeping = Keeping(step, inputs, outputs, kv_row, query, number, threads)

    def settle(kept: Array | int) -> Writer:
        """Writes all but what is kept."""
        listed = plan._replace(
            num_heavy=plan.num_heavy * 0 + kept, num_listed=plan.num_listed - plan.num_heavy + kept
        )
        if not middle:
            writer = Writer(Lists(*outputs, None), kv_row, query, listed)
            writer.settle()
            return writer
        size = outputs.indices.shape[2]
        slot = backend.lanes(power_of_2_from(size))
        # Of a short context all is listed, from behind the sink on, and nothing is heavy.
        entry = plan.always(step.config)[0] + slot
        entry = jnp.where(slot < listed.between(step.config), entry, -1)
        mask = (slot < size) & (slot >= kept)
        into = outputs.indices.at[kv_row, query, jnp.where(mask, slot, size)]
        backend.store(into, entry, mask=mask)
        outputs.counts[kv_row, query] = listed.num_listed
        return Writer(Lists(*outputs, None), kv_row, query, listed._replace(num_sink=jnp.int32(0)))

    @pl.when(num_heavy == 0)
    def _():
        settle(0)

    @pl.when(num_heavy > 0)
    def _():
        own, cut = keeping.own_cut(num_heavy)
        writer = settle(cut.taken)

        def put(place_before, best, place):
            slot = jnp.where(best, plan.num_sink + place_before, 0)
            position = backend.load(inputs.indices.at[kv_row, query, slot], mask=best, other=0)
            writer.fill(position, place, best)

        emit_best(own, cut, put)


def best_of_devices(
    step: Step,
    tables: Tables,
    codes: UInt8[Array, "*layers R M S"],
    lengths: Lengths,
    lists: Lists,
    span: Span,
    layer: Array | None,
    *,
    middle: bool = False,
) -> Lists:
    """Of each device's lists, what is in those of one device that holds all positions.

    Exchanges 4 * k bytes a device and query head by one `all_gather`, k = min(heavy_size, S).

    Args:
      step: the step.
      tables: look-up tables.
      codes: of the device's tokens.
      lengths: of whole rows.
      lists: the best of the device's tokens, sinks and windows, without weights.
      span: of the device.
      layer: of the codes, None where they have no axis of layers.
      middle: whether to list only what lies between sink and window, for a `launch_listed`.

    Returns:
      Lists and counts.

    Source: CONTRACT.md, sections 3 and 6.
    """
    ranks = listed_ranks(step, tables, codes, lengths, lists.indices, layer)
    ranks = lax.all_gather(ranks, span.axis)
    return keep_best(step, lengths, lists.indices, ranks, middle=middle)


def listed_ranks(
    step: Step,
    tables: Tables,
    codes: UInt8[Array, "*layers R M S"],
    lengths: Lengths,
    indices: Int32[Array, "R Q P"],
    layer: Array | None,
) -> Int32[Array, "R Q k"]:
    """The order of the scores of the heavy tokens of a device's lists."""
    what = backend.Launch(
        functools.partial(listed_ranks_kernel, step=step),
        RankInputs(lengths, tables.by_query, codes, indices),
        RankOutputs(jax.ShapeDtypeStruct((step.R, step.Q, step.budget), np.int32)),
        programs=step.R * step.Q,
        state=("codes",),
        layer=layer,
    )
    return backend.launch(what, num_warps=_warps(power_of_2_from(step.budget))).ranks


def keep_best(
    step: Step,
    lengths: Lengths,
    indices: Int32[Array, "R Q P"],
    ranks: Int32[Array, "devices R Q k"],
    *,
    middle: bool,
) -> Lists:
    """A device's lists without the heavy tokens that are not among the best of all devices."""
    threads = min(power_of_2_from(step.devices * step.budget), MOST_HELD)
    list_size = max(step.num_middle, 1) if middle else step.P
    what = backend.Launch(
        functools.partial(keep_best_kernel, step=step, threads=threads, middle=middle),
        KeepInputs(lengths, indices, ranks),
        KeepOutputs(
            jax.ShapeDtypeStruct((step.R, step.Q, list_size), np.int32),
            jax.ShapeDtypeStruct((step.R, step.Q), np.int32),
        ),
        programs=step.R * step.Q,
    )
    kept = backend.launch(what, num_warps=_warps(threads))
    return Lists(kept.indices, kept.counts, None)


def _warps(lanes: int) -> int:
    """Warps of programs with so many lanes: four lanes a thread, as far as there are."""
    return min(max(lanes // 128, 1), 8)
