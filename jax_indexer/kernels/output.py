"""The one writer of lists, counts and dense weights."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl

from jax_indexer.kernels import backend
from jax_indexer.kernels.step import Lengths, QueryPlan, Step, plan_query
from jax_indexer.layout import power_of_2_from


class Lists(NamedTuple):
    """i32[R, Q, P] positions, i32[R, Q] how many, and [R, Q, S] weights or None."""

    indices: Any
    counts: Any
    weights: Any


def list_shapes(step: Step) -> Lists:
    """The outputs of a kernel that writes lists."""
    queries = step.R, step.Q
    return Lists(
        jax.ShapeDtypeStruct((*queries, step.P), np.int32),
        jax.ShapeDtypeStruct(queries, np.int32),
        weights_shape(step) if step.weights_dtype else None,
    )


def weights_shape(step: Step) -> jax.ShapeDtypeStruct:
    """The dense weights."""
    return jax.ShapeDtypeStruct((step.R, step.Q, step.S), step.weights_dtype)


class Writer(NamedTuple):
    """Writes the list of one query.

    Attributes:
      lists: references.
      kv_row, query: whose list.
      plan: of the query.
    """

    lists: Lists
    kv_row: Array
    query: Array
    plan: QueryPlan

    def settle(self, part: Array | int = 0, parts: int = 1) -> None:
        """Writes the count, and all entries but the heavy ones, or one of several parts of them."""
        plan, list_size = self.plan, self.lists.indices.shape[2]
        share = power_of_2_from(pl.cdiv(list_size, parts))
        slot = part * share + jnp.arange(share, dtype=jnp.int32)
        entry = jnp.where(slot < plan.num_sink, slot, plan.visible - plan.num_listed + slot)
        entry = jnp.where(slot < plan.num_listed, entry, -1)
        is_heavy = (slot >= plan.num_sink) & (slot < plan.num_sink + plan.num_heavy)
        mine = (slot < list_size) & ~is_heavy
        # A slot that is not written lies behind the list: the interpreter writes back what it read.
        slot = jnp.where(mine, slot, list_size)
        backend.store(self.lists.indices.at[self.kv_row, self.query, slot], entry, mask=mine)

        @pl.when(part == 0)
        def _():
            self.lists.counts[self.kv_row, self.query] = plan.num_listed

    def fill(self, position: Array, place: Array, mask: Array) -> None:
        """Writes entries that heavy tokens will replace, in the list alone."""
        indices = self.lists.indices
        slot = jnp.where(mask, self.plan.num_sink + place, indices.shape[2])
        backend.store(indices.at[self.kv_row, self.query, slot], position, mask=mask)

    def put(self, position: Array, place: Array, mask: Array) -> None:
        """Writes heavy tokens: `place` counts from the first one of the list on."""
        self.fill(position, place, mask)
        weights = self.lists.weights
        if weights is not None:
            there = jnp.where(mask, position, weights.shape[2])
            ones = jnp.ones(position.shape, weights.dtype)
            backend.store(weights.at[self.kv_row, self.query, there], ones, mask=mask)


class AttendedInputs(NamedTuple):
    """For the weights of tokens that are always attended."""

    lengths: Lengths


class AttendedOutputs(NamedTuple):
    """[R, Q, S] weights."""

    weights: Any


def always_attended_kernel(
    program,
    inputs: AttendedInputs,
    outputs: AttendedOutputs,
    *,
    step: Step,
    plan_of: Callable[..., QueryPlan],
):
    block_size = step.tuning.weights_block
    num_blocks = pl.cdiv(step.S, block_size)
    block, query = program % num_blocks, program // num_blocks % step.Q
    kv_row = program // (num_blocks * step.Q)
    plan = plan_of(step, inputs.lengths, kv_row, query // step.G)
    position = block * block_size + jnp.arange(block_size, dtype=jnp.int32)
    weights = plan.always_attends(position, step.config).astype(outputs.weights.dtype)
    into = outputs.weights.at[kv_row, query, position]
    backend.store(into, weights, mask=position < step.S)


def weights_launch(
    step: Step,
    lengths: Lengths,
    layer: Array | None = None,
    plan_of: Callable[..., QueryPlan] = plan_query,
) -> backend.Launch:
    """The launch that writes 1 at tokens that are always attended, 0 elsewhere.

    Args:
      step: the step.
      lengths: of the rows; with `plan_after`, before the step.
      layer: of the lengths, None where they have no axis of layers.
      plan_of: of a query, from these lengths.

    Returns:
      A launch with outputs `AttendedOutputs`.
    """
    return backend.Launch(
        functools.partial(always_attended_kernel, step=step, plan_of=plan_of),
        AttendedInputs(lengths),
        AttendedOutputs(weights_shape(step)),
        programs=step.R * step.Q * pl.cdiv(step.S, step.tuning.weights_block),
        state=("lengths.lengths",),
        layer=layer,
    )
