"""Rows of caches in host memory: kept on the device once they were listed, copied in chunks.

Steps list mostly what the steps before them listed, and the query heads of a kv head list much in
common, so what was listed is kept, and a step reads over the bus what is new.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Int32

from jax_indexer.kernels import backend
from jax_indexer.kernels.attend import Kept, padded, read_rows
from jax_indexer.kernels.step import Lengths, Step, plan_query
from jax_indexer.layout import power_of_2_from
from jax_indexer.reference import Caches
from jax_indexer.state import Recent


class KeepInputs(NamedTuple):
    """Positions that a step listed: of lists i32[B, T, N, P], or what a search leaves behind."""

    after: Lengths
    lists: Any
    positions: Any  # i32[R, Q, E]
    key: Any
    value: Any
    kept_key: Any  # the rest is not read here
    kept_value: Any
    slot_of: Any
    position_in: Any
    next_slot: Any


class KeepOutputs(NamedTuple):
    """As in `Recent`, in the memory of those before, and scratch i32[B, K, n + 1]."""

    kept_key: Any
    kept_value: Any
    slot_of: Any
    position_in: Any
    next_slot: Any
    fresh: Any


IN_PLACE = ("kept_key", "kept_value", "slot_of", "position_in", "next_slot")


def keep_kernel(program, inputs: KeepInputs, outputs: KeepOutputs, *, step: Step, block: int):
    """Of one kv head: what is listed and not kept takes the place of what came first.

    Query heads follow one another, so that what several of them list comes once. A row that is
    listed and kept may have to go: the next step that lists it reads it again.
    """
    row, kv_head = program // step.K, program % step.K
    at = row, kv_head
    number_kept = outputs.position_in.shape[2]
    begin = outputs.next_slot[at]
    entry = backend.lanes(max(power_of_2_from(step.pooled), 32))

    def in_ring(number: Array) -> Array:
        slot = begin + number
        return jnp.where(slot >= number_kept, slot - number_kept, slot)

    def add(query, count):
        token, head = lax.div(query, jnp.int32(step.G)), lax.rem(query, jnp.int32(step.G))
        plan = plan_query(step, inputs.after, program, token)
        exists = entry < plan.between(step.config)
        first = step.config.sink_size
        if inputs.lists is None:
            found = inputs.positions.at[program, query, jnp.where(exists, entry, 0)]
        else:
            place = jnp.where(exists, first + entry, 0)
            found = inputs.lists.at[row, token, kv_head * step.G + head, place]
        position = backend.load(found, mask=exists & (plan.num_heavy > 0), other=0)
        # Of a short context there is no heavy token: all of it is listed.
        position = jnp.where(plan.num_heavy > 0, position, first + entry)
        position = jnp.where(exists, jnp.clip(position, 0, step.S - 1), 0)
        slot = backend.load(outputs.slot_of.at[(*at, position)], mask=exists, other=0)
        is_new = exists & (slot < 0)
        number = count + jnp.cumsum(is_new.astype(jnp.int32)) - 1
        is_new &= number < number_kept
        backend.barrier()
        # What is not written lies outside: the interpreter writes back what it read there.
        into = jnp.where(is_new, position, step.S)
        backend.store(outputs.slot_of.at[(*at, into)], in_ring(number), mask=is_new)
        into = jnp.where(is_new, number, number_kept)
        backend.store(outputs.fresh.at[(*at, into)], position, mask=is_new)
        backend.barrier()
        return count + jnp.sum(is_new.astype(jnp.int32))

    count = lax.fori_loop(0, step.Q, add, jnp.int32(0))

    def copy(i, carry):
        number = i * block + jnp.arange(block, dtype=jnp.int32)
        is_new = number < count
        position = backend.load(
            outputs.fresh.at[(*at, jnp.where(is_new, number, 0))], mask=is_new, other=0
        )
        slot = jnp.where(is_new, in_ring(number), number_kept)
        old = backend.load(outputs.position_in.at[(*at, slot)], mask=is_new, other=-1)
        backend.barrier()
        leaves = is_new & (old >= 0)
        out = jnp.where(leaves, old, step.S)
        backend.store(outputs.slot_of.at[(*at, out)], jnp.full(block, -1), mask=leaves)
        backend.store(outputs.position_in.at[(*at, slot)], position, mask=is_new)
        rows = [
            read_rows(cache, step.kv_layout, row, kv_head, position, is_new)
            for cache in (inputs.key, inputs.value)
        ]
        for cache, found in zip((outputs.kept_key, outputs.kept_value), rows, strict=True):
            d = jnp.arange(found.shape[1], dtype=jnp.int32)[None, :]
            mask = jnp.broadcast_to(is_new[:, None] & (d < cache.shape[3]), found.shape)
            backend.store(cache.at[row, slot[:, None], kv_head, d], found, mask=mask)
        return carry

    lax.fori_loop(0, lax.div(count + (block - 1), jnp.int32(block)), copy, 0)
    outputs.next_slot[at] = in_ring(count)


def keep(
    step: Step,
    after: Lengths,
    caches: Caches,
    recent: Recent,
    layer: Array | None,
    *,
    lists: Int32[Array, "B T N P"] | None = None,
    positions: Int32[Array, "R Q E"] | None = None,
) -> Recent:
    """Keeps what a step listed between sink and window, for the steps that follow.

    Args:
      step: that listed: of the pool, if there is one.
      after: lengths after it.
      caches: in host memory.
      recent: what is kept so far, of all layers if there are any.
      layer: of caches and of what is kept.
      lists: what the step listed;
      positions: or what its search left behind.

    Returns:
      What is recent after.
    """
    own = {field: getattr(recent, field) for field in IN_PLACE}
    size = padded(max(x.shape[-1] for x in caches))
    batch, kv_heads, number_kept = recent.position_in.shape[-3:]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), own)
    fresh = jax.ShapeDtypeStruct((batch, kv_heads, number_kept + 1), np.int32)
    what = backend.Launch(
        functools.partial(keep_kernel, step=step, block=max(step.tuning.kept_tile // size, 1)),
        KeepInputs(after, lists, positions, *caches, **own),
        KeepOutputs(**shapes, fresh=fresh),
        programs=step.R,
        in_place=IN_PLACE,
        state=(*Caches._fields, *IN_PLACE),
        layer=layer,
    )
    made = backend.launch(what, num_warps=step.tuning.kept_warps)
    fields = {field: getattr(made, field) for field in IN_PLACE}
    return dataclasses.replace(recent, **fields)


def kept_of(recent: Recent | None) -> Kept | None:
    """What kernels read of it."""
    return None if recent is None else Kept(recent.kept_key, recent.kept_value, recent.slot_of)
