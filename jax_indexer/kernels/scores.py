"""ADC scores: sum, over subspaces, of each key's look-up table entry."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jaxtyping import Float, Int32, UInt8

from jax_indexer.config import IndexerConfig
from jax_indexer.kernels import backend
from jax_indexer.kernels.plan import RowPlan, plan_row
from jax_indexer.kernels.tuning import SCORE_BLOCK, SCORE_QUERIES, SCORE_WARPS


def rankable(scores: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Scores as floats that any top-k orders by rule 4, leaving -inf for what ranks below -inf.

    Negative numbers move up by one unit in the last place, so that -inf becomes the lowest finite
    number, and NaN becomes -inf. -0.0 becomes 0.0. Order and ties are kept.
    """
    bits = lax.bitcast_convert_type(scores, jnp.int32)
    magnitude = bits & 0x7FFFFFFF
    moved = jnp.where(bits < 0, bits - 1, bits)
    moved = jnp.where(magnitude == 0, 0, moved)
    ranked = lax.bitcast_convert_type(moved, jnp.float32)
    return jnp.where(magnitude > 0x7F800000, -jnp.inf, ranked)


class Block(NamedTuple):
    """A program's block of tokens and the queries it serves.

    Attributes:
      row: its kv head's row.
      number: of the block in the row.
      position: of its tokens.
      queries: their numbers in the row.
      plans: of each query.
      in_play: whether the block holds a candidate of any query.
    """

    row: Array
    number: Array
    position: Array
    queries: list[Array]
    plans: list[RowPlan]
    in_play: Array

    def candidates(self, plan: RowPlan) -> Array:
        """Which tokens are candidates of the query with this plan."""
        return (self.position >= plan.first) & (self.position < plan.last)

    def scores(self, table_ref, codes_ref) -> list[Array]:
        """Scores of all the queries, which share the loads of the codes."""
        # Later query tokens see more, so the last one's candidates include the others'.
        seen = self.candidates(self.plans[-1])
        return add_entries(table_ref, codes_ref, self.row, self.queries, self.position, seen)


def block_of_program(
    lengths_ref,
    table_ref,
    codes_ref,
    *,
    config: IndexerConfig,
    num_query_tokens: int,
    queries_per_program: int,
    block: int,
) -> Block:
    """What this program is to score: a block of a row, for some of the row's queries."""
    num_rows, _, capacity = codes_ref.shape
    num_queries, num_blocks = table_ref.shape[1], pl.cdiv(capacity, block)
    query_groups = num_queries // queries_per_program
    program = pl.program_id(0)
    number = program % num_blocks
    row = program // (num_blocks * query_groups)
    first_query = program // num_blocks % query_groups * queries_per_program
    queries = [first_query + q for q in range(queries_per_program)]
    length = lengths_ref[row // (num_rows // lengths_ref.shape[0])]
    plans = [
        plan_row(
            length,
            query // (num_queries // num_query_tokens),
            config=config,
            num_query_tokens=num_query_tokens,
            capacity=capacity,
        )
        for query in queries
    ]
    start = number * block
    position = start + jnp.arange(block, dtype=jnp.int32)
    in_play = (start < plans[-1].last) & (start + block > plans[-1].first)
    return Block(row, number, position, queries, plans, in_play)


def add_entries(table_ref, codes_ref, row, queries: list[Array], position, mask) -> list[Array]:
    """Scores of the tokens at `position` for some queries of a row.

    Entries are added in the order of the subspaces, wherever this is called (rules 3 and 7).
    """
    num_subspaces = codes_ref.shape[1]
    num_centroids = table_ref.shape[2] // num_subspaces
    totals = [jnp.zeros(position.shape, jnp.float32)] * len(queries)
    for m in range(num_subspaces):
        code = backend.load(codes_ref.at[row, m, position], mask=mask, other=0)
        entry = m * num_centroids + (code.astype(jnp.int32) & (num_centroids - 1))
        for i, query in enumerate(queries):
            totals[i] += table_ref[row, query, entry].astype(jnp.float32)
    return totals


def score_kernel(
    lengths_ref,  # i32[B]
    table_ref,  # [R, Q, M * C]
    codes_ref,  # u8[R, M, S]
    out_ref,  # f32[R, Q, S]
    **static,
):
    b = block_of_program(lengths_ref, table_ref, codes_ref, **static)
    capacity = codes_ref.shape[2]

    def write(query, scores):
        out = out_ref.at[b.row, query, b.position]
        backend.store(out, scores, mask=b.position < capacity)

    @pl.when(b.in_play)
    def _():
        totals = b.scores(table_ref, codes_ref)
        for query, total, plan in zip(b.queries, totals, b.plans, strict=True):
            write(query, jnp.where(b.candidates(plan), rankable(total), -jnp.inf))

    @pl.when(~b.in_play)
    def _():
        for query in b.queries:
            write(query, jnp.full(b.position.shape, -jnp.inf, jnp.float32))


def shared_queries(num_queries: int) -> int:
    """How many of a row's queries one program serves."""
    return max(q for q in range(1, SCORE_QUERIES + 1) if num_queries % q == 0)


def rankable_scores(
    table: Float[Array, "R Q MC"],
    codes: UInt8[Array, "R M S"],
    lengths: Int32[Array, "B"],
    config: IndexerConfig,
    num_query_tokens: int,
    *,
    interpret: bool = False,
) -> Float[Array, "R Q S"]:
    """Scores of the candidates, in the form that `rankable` gives them; -inf elsewhere.

    Args:
      table: look-up tables, grouped by kv head.
      codes: of all tokens; only their low bits count.
      lengths: tokens in the cache, clipped to 0..S.
      config: sizes.
      num_query_tokens: T; queries of a row are ordered by token, then by head.
      interpret: run on the CPU.

    Returns:
      float32 numbers in the order of the scores, with the same ties.

    Source: CONTRACT.md, rules 2, 3 and 4.
    """
    (rows, queries, _), capacity = table.shape, codes.shape[-1]
    shared = shared_queries(queries)
    kernel = functools.partial(
        score_kernel,
        config=config,
        num_query_tokens=num_query_tokens,
        queries_per_program=shared,
        block=SCORE_BLOCK,
    )
    (scores,) = backend.launch(
        kernel,
        lengths,
        table,
        codes,
        programs=rows * (queries // shared) * pl.cdiv(capacity, SCORE_BLOCK),
        out_shape=[jax.ShapeDtypeStruct((rows, queries, capacity), np.float32)],
        num_warps=SCORE_WARPS,
        interpret=interpret,
    )
    return scores
