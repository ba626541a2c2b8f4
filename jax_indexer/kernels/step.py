"""Step: what is static about a step of decoding, and what follows from it for one query."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int32

from jax_indexer.config import IndexerConfig
from jax_indexer.kernels.tuning import H100, Tuning
from jax_indexer.layout import KVLayout
from jax_indexer.state import PQIndex


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """Sizes by the letters of CONTRACT.md, and how kernels are cut up.

    Attributes:
      config: what the index was built with.
      B, K, S: of the index.
      T: tokens of the step, of the query and of the new keys.
      N: query heads.
      kv_layout: of the new keys.
      weights_dtype: of the dense weights, None for none.
      tuning: block sizes and warps.
    """

    config: IndexerConfig
    B: int
    K: int
    S: int
    T: int = 1
    N: int = 0
    kv_layout: KVLayout = "BSKH"
    weights_dtype: np.dtype | None = None
    tuning: Tuning = H100

    @classmethod
    def of(cls, index: PQIndex, config: IndexerConfig, **sizes: Any) -> "Step":
        """A step of this index."""
        B, K, _, S = index.codes.shape
        return cls(config=config, B=B, K=K, S=S, **sizes)

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
    def budget(self) -> int:
        """Heavy tokens that a list can hold, 1 if it holds none: no array is empty."""
        return max(min(self.config.heavy_size, self.S), 1)


class Lengths(NamedTuple):
    """Of each row: i32[B] tokens in the cache, and i32[B] new tokens among them, None for T."""

    lengths: Any
    counts: Any


class QueryPlan(NamedTuple):
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

    def always_attends(self, position: Array, config: IndexerConfig) -> Array:
        """Which positions are in the list whatever the scores are (rules 1 and 5)."""
        window = (position < self.visible) & (position >= self.visible - config.window_size)
        return (position < self.num_sink) | window


def plan_query(
    step: Step, lengths: Lengths, kv_row: Array, token: Int32[Array, "*queries"] | int
) -> QueryPlan:
    """Rules 1, 2, 4 and 5 of the contract for query token `token` of a kv row."""
    row = kv_row // step.K
    length = jnp.minimum(jnp.maximum(lengths.lengths[row], 0), step.S)
    if lengths.counts is None:
        visible = jnp.maximum(length - (step.T - 1 - token), 0)
    else:
        count = jnp.minimum(jnp.maximum(lengths.counts[row], 0), step.T)
        visible = jnp.maximum(length - (count - 1 - token), 0)
        visible = jnp.where((token >= 0) & (token < count), visible, 0)

    config = step.config
    short = visible <= config.short_context(step.T)
    first = jnp.minimum(config.first_candidate, visible)
    last = jnp.where(short, first, jnp.maximum(visible - config.window_size, first))
    num_sink = jnp.where(short, visible, jnp.minimum(config.sink_size, visible))
    num_heavy = jnp.minimum(config.heavy_size, last - first)
    num_window = jnp.minimum(config.window_size, visible - num_sink)
    return QueryPlan(visible, first, last, num_sink, num_heavy, num_sink + num_heavy + num_window)


def plan_latest(step: Step, lengths: Lengths, kv_row: Array, token: Array) -> QueryPlan:
    """The plan of the query that sees the most of those up to query token `token`."""
    if lengths.counts is not None:
        token = jnp.minimum(token, lengths.counts[kv_row // step.K] - 1)
    return plan_query(step, lengths, kv_row, token)
