"""What a program knows of its row before it has seen a score: which tokens are in play."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int32

from jax_indexer.config import IndexerConfig


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
