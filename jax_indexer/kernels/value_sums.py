"""Sums of values by code are kept up to date: a value goes in when its token is far enough back."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl

from jax_indexer.kernels import backend
from jax_indexer.kernels.attend import in_page
from jax_indexer.kernels.step import Lengths, Step, raised_in
from jax_indexer.layout import power_of_2_from
from jax_indexer.recent import place_of
from jax_indexer.state import ValueSums, summed_until


class Sums(NamedTuple):
    """f32[R, M', C', H'] and i32[R, M', C'], in the memory of those before."""

    sums: Any
    counts: Any


class Inputs(NamedTuple):
    """What is read of caches and codes lies before the step's own tokens; the sums are not read."""

    before: Lengths  # the step
    value: Any
    codes: Any  # u8[R, M, S]
    sums: Any
    counts: Any


def sum_values_kernel(program, inputs: Inputs, outputs: Sums, *, step: Step, is_recent: bool):
    """What falls due in one subspace of one kv row: a value for each new token, or none.

    With `is_recent` values lie where what is recent of a cache in host memory does.
    """
    config, by = step.config, outputs.counts.shape[1]
    subspace, kv_row = program % by, program // by
    row, kv_head = kv_row // step.K, kv_row % step.K
    first, last = (summed_until(x, config) for x in raised_in(step, inputs.before, row))
    size = outputs.sums.shape[3]
    d = jnp.arange(power_of_2_from(size), dtype=jnp.int32)

    def add(position: Array) -> None:
        own, place, is_there = row, position, d < size
        if inputs.before.page_table is not None:
            table = inputs.before.page_table
            own, place, has_page = in_page(
                inputs.value, step.kv_layout, table, row, position, position >= 0
            )
            is_there &= has_page
        elif is_recent:
            place = place_of(position, config)
        is_by_token = is_recent or step.kv_layout == "BSKH"
        place = (place, kv_head) if is_by_token else (kv_head, place)
        value = backend.load(inputs.value.at[(own, *place, d)], mask=is_there, other=0)
        value = value.astype(jnp.float32)
        is_finite = jnp.sum(jnp.where(jnp.abs(value) < jnp.inf, 0, 1)) == 0
        code = jnp.int32(0)
        if config.estimate_rest == "codes":
            code = inputs.codes[kv_row, subspace, position].astype(jnp.int32)
            code = code & (config.num_centroids - 1)
        at = kv_row, subspace, code
        mask = (d < size) & is_finite
        so_far = backend.load(outputs.sums.at[(*at, d)], mask=mask, other=0)
        count = outputs.counts[at]
        backend.barrier()  # the next token may have the same code
        backend.store(outputs.sums.at[(*at, d)], so_far + value, mask=mask)
        outputs.counts[at] = count + is_finite.astype(jnp.int32)
        backend.barrier()

    for new in range(step.T):
        # What is not due may be written meanwhile, or lie behind the cache.
        pl.when(new < last - first)(functools.partial(add, first + new))


def sum_values_launch(
    step: Step,
    values: ValueSums,
    value: Any,
    codes: Any,
    before: Lengths,
    layer: Array | None = None,
    is_recent: bool = False,
) -> backend.Launch:
    """The launch that adds the values that are due to their sums.

    Args:
      step: of which at most MOST_NEW tokens are new: what is due was there before.
      values: the sums before.
      value: the cache of values, or what a launch beside this one writes new ones to.
      codes: likewise.
      before: lengths and high water before the step, and how many tokens rows are to take.
      layer: of the state.
      is_recent: whether `value` is what is recent of a cache in host memory.

    Returns:
      A launch with outputs `Sums`, in the memory of those before.
    """
    sums, counts = step.by_rows(values.sums), step.by_rows(values.counts)
    return backend.Launch(
        functools.partial(sum_values_kernel, step=step, is_recent=is_recent),
        Inputs(before, value, codes, sums, counts),
        Sums(
            jax.ShapeDtypeStruct(sums.shape, np.float32),
            jax.ShapeDtypeStruct(counts.shape, np.int32),
        ),
        programs=step.R * values.counts.shape[-2],
        in_place=Sums._fields,
        state=("before.lengths", "before.high_water", "value", *Sums._fields),
        layer=layer,
    )
