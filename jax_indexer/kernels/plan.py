"""What a program knows of its row before it has seen a score: which tokens are in play."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int32

from jax_indexer.config import IndexerConfig
from jax_indexer.kernels import backend
from jax_indexer.kernels.codebook import power_of_2_from


class RowPlan(NamedTuple):
    """The layout of one query's list: `num_sink` positions from 0, heavy ones, then the window.

    A short context is all sink. Counts follow from the length alone, so every slot of the list but
    the heavy ones can be written without looking at a score.

    Attributes:
      visible: V, the tokens this query sees.
      first, last: candidates are the positions in [first, last).
      num_sink, num_heavy: how many entries of the list are of each kind.
      num_listed: all entries.
    """

    visible: Int32[Array, "*queries"]
    first: Int32[Array, "*queries"]
    last: Int32[Array, "*queries"]
    num_sink: Int32[Array, "*queries"]
    num_heavy: Int32[Array, "*queries"]
    num_listed: Int32[Array, "*queries"]


def always_attended(plan: RowPlan, position: Array, config: IndexerConfig) -> Array:
    """Which positions are in the list whatever the scores are (rules 1 and 5)."""
    window = (position < plan.visible) & (position >= plan.visible - config.window_size)
    return (position < plan.num_sink) | window


def plan_row(
    length: Int32[Array, ""],
    token: Int32[Array, "*queries"] | int,
    *,
    config: IndexerConfig,
    num_query_tokens: int,
    capacity: int,
) -> RowPlan:
    """Rules 1, 2, 4 and 5 of the contract for query token `token` of a row of `length` tokens."""
    later = num_query_tokens - 1 - token
    visible = jnp.maximum(jnp.minimum(jnp.maximum(length, 0), capacity) - later, 0)
    short = visible <= config.short_context(num_query_tokens)

    first = jnp.minimum(config.first_candidate, visible)
    last = jnp.where(short, first, jnp.maximum(visible - config.window_size, first))
    num_sink = jnp.where(short, visible, jnp.minimum(config.sink_size, visible))
    num_heavy = jnp.minimum(config.heavy_size, last - first)
    num_window = jnp.minimum(config.window_size, visible - num_sink)
    return RowPlan(visible, first, last, num_sink, num_heavy, num_sink + num_heavy + num_window)


def plan_query(
    lengths_ref,
    row: Int32[Array, ""],
    query: Int32[Array, ""],
    shape: tuple[int, int],
    *,
    config: IndexerConfig,
    num_query_tokens: int,
    capacity: int,
) -> RowPlan:
    """The plan of one query of one row, of shape = (R, Q) of them.

    R = B * K; queries of a row are ordered by token, then by head.
    """
    num_rows, num_queries = shape
    return plan_row(
        lengths_ref[row // (num_rows // lengths_ref.shape[0])],
        query // (num_queries // num_query_tokens),
        config=config,
        num_query_tokens=num_query_tokens,
        capacity=capacity,
    )


def write_settled_entries(indices_ref, counts_ref, row, query, plan: RowPlan) -> None:
    """Writes what follows from the length: the count, and all entries but the heavy ones."""
    list_size = indices_ref.shape[2]
    slot = jnp.arange(power_of_2_from(list_size), dtype=jnp.int32)
    entry = jnp.where(slot < plan.num_sink, slot, plan.visible - plan.num_listed + slot)
    entry = jnp.where(slot < plan.num_listed, entry, -1)
    is_heavy = (slot >= plan.num_sink) & (slot < plan.num_sink + plan.num_heavy)
    mine = (slot < list_size) & ~is_heavy
    # A slot that is not written lies behind the list: interpret mode writes back what it read.
    slot = jnp.where(mine, slot, list_size)
    backend.store(indices_ref.at[row, query, slot], entry, mask=mine)
    counts_ref[row, query] = plan.num_listed
