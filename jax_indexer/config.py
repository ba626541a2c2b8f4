"""IndexerConfig: what is static about an index and a selection."""

import dataclasses
import operator
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np

from jax_indexer.layout import Grouping

Metric = Literal["euclidean", "ip"]
Implementation = Literal["triton", "xla"]
Selector = Literal["top_k", "threshold", "cells"]
# How candidates that are not attended to are estimated.
Estimate = Literal[False, "mean", "codes"]

# Limits of the "cells" selector: a program holds all cells, and a place and a cell share a word.
MOST_CELLS = 16384
LARGEST_BUDGET_OF_CELLS = (1 << 15) - 1
# Query tokens of a step that searches cells: what is sealed is a candidate of each of them.
MOST_TOKENS_OF_CELLS = 8
# Where it is faster than the "threshold" selector: tokens of a cache from which on, and cells up to
# which.
CELLS_FROM = 32768
FEW_CELLS = 4096

FLOAT_DTYPES = (np.dtype(jnp.float32), np.dtype(jnp.bfloat16), np.dtype(jnp.float16))


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexerConfig:
    """Static parameters of the indexer: frozen, hashable, checked when built.

    Attributes:
      num_subspaces: M, the number of PQ subspaces a key is cut into; it divides H.
      num_bits: bits of a code, 1 to 8; a subspace has C = 2**num_bits centroids.
      grouping: which dimensions form a subspace: "contiguous", D neighbours each, or "strided",
        every M-th dimension.
      heavy_size: the budget, in tokens chosen by score for each query head.
      sink_size: tokens at the start that are always attended.
      window_size: tokens at the end that are always attended.
      init_offset: first position that may be chosen by score, and the first that codebooks are
        trained on; None means `sink_size`, whatever that is: `first_trained` is the number.
      metric: "euclidean", or "ip" for codebooks trained on keys augmented by one coordinate, which
        turns the largest inner product into the nearest neighbour. Scores are inner products of
        the H real dimensions for both.
      kmeans_iters: the most Lloyd iterations of `build_index` and `rebuild`, which end earlier
        where one moves nothing.
      train_tokens: train on a strided sample of at most this many tokens of a row; None for all.
      table_dtype: float32, bfloat16 or float16: what look-up table entries are rounded to, once.
      cells: keep the state that the "cells" selector needs: for C**M up to 16384, 4 bytes a token
        and kv head, and some more (`Cells`).
      rerank: of `rerank` times `heavy_size` candidates by score `decode_attention` attends to the
        `heavy_size` best by their true logits; 1 for the best by score.
      estimate_rest: whether `decode_attention` estimates the candidates that it does not attend to
        instead of dropping them: their part of the softmax from their scores, their values by the
        mean of all values, "mean", or by means of the values of each code, "codes" (`ValueSums`).

    Raises:
      ValueError: for a value out of its range, naming the field.

    Source: CONTRACT.md, section 4.
    """

    num_subspaces: int = 2
    num_bits: int = 6
    grouping: Grouping = "contiguous"
    heavy_size: int = 128
    sink_size: int = 128
    window_size: int = 128
    init_offset: int | None = None
    metric: Metric = "euclidean"
    kmeans_iters: int = 10
    train_tokens: int | None = None
    table_dtype: Any = jnp.float32
    cells: bool = False
    rerank: int = 1
    estimate_rest: Estimate = False

    def __post_init__(self):
        for name, low, high in (
            ("num_subspaces", 1, None),
            ("num_bits", 1, 8),
            ("heavy_size", 0, None),
            ("sink_size", 0, None),
            ("window_size", 0, None),
            ("kmeans_iters", 0, None),
            ("rerank", 1, None),
        ):
            object.__setattr__(self, name, _integer(name, getattr(self, name), low, high))
        if self.init_offset is not None:
            init_offset = _integer("init_offset", self.init_offset, 0, None)
            object.__setattr__(self, "init_offset", init_offset)
        if self.train_tokens is not None:
            train_tokens = _integer("train_tokens", self.train_tokens, 1, None)
            object.__setattr__(self, "train_tokens", train_tokens)
        if not isinstance(self.metric, str) or self.metric not in get_args(Metric):
            raise ValueError(
                f"metric: expected one of {get_args(Metric)}, got {self.metric!r}; "
                'use "euclidean" unless the codebooks were trained on augmented keys'
            )
        if not isinstance(self.grouping, str) or self.grouping not in get_args(Grouping):
            raise ValueError(
                f"grouping: expected one of {get_args(Grouping)}, got {self.grouping!r}; "
                'use "contiguous" for subspaces of neighbouring dimensions'
            )
        fix = "use jnp.float32 for exact table entries"
        object.__setattr__(self, "table_dtype", float_dtype("table_dtype", self.table_dtype, fix))
        if not isinstance(self.cells, bool):
            raise ValueError(f"cells: expected True or False, got {self.cells!r}; pass a bool")
        if self.cells and self.num_cells > MOST_CELLS:
            raise ValueError(
                f"cells: expected num_centroids**num_subspaces of at most {MOST_CELLS}, "
                f"got {self.num_centroids}**{self.num_subspaces}; use cells=False, or fewer bits"
            )
        is_estimate = isinstance(self.estimate_rest, (bool, str))
        if not is_estimate or self.estimate_rest not in get_args(Estimate):
            raise ValueError(
                f"estimate_rest: expected one of {get_args(Estimate)}, got {self.estimate_rest!r}; "
                "use False to drop what is not attended to"
            )
        longest = self.max_selected() + (self.rerank - 1) * self.heavy_size
        if longest > np.iinfo(np.int32).max:
            raise ValueError(
                "heavy_size, rerank, sink_size, window_size, init_offset: expected lists shorter "
                f"than 2**31, got up to {longest} tokens; make the sizes smaller"
            )

    @property
    def num_centroids(self) -> int:
        """C, the number of centroids of a subspace."""
        return 2**self.num_bits

    @property
    def num_cells(self) -> int:
        """C**M, the different codes that a key can have."""
        return self.num_centroids**self.num_subspaces

    @property
    def pool(self) -> "IndexerConfig":
        """The config that `select` finds the candidates for reranking with."""
        return dataclasses.replace(self, heavy_size=self.rerank * self.heavy_size, rerank=1)

    @property
    def has_pool(self) -> bool:
        """Whether `decode_attention` reranks candidates, or estimates those it does not list."""
        return self.rerank > 1 or bool(self.estimate_rest)

    @property
    def first_trained(self) -> int:
        """The lowest position that codebooks are trained on: `init_offset`, or `sink_size`."""
        return self.sink_size if self.init_offset is None else self.init_offset

    @property
    def first_candidate(self) -> int:
        """The lowest position that may be chosen by score: below it sinks or nothing."""
        return max(self.sink_size, self.first_trained)

    def short_context(self, num_query_tokens: int = 1) -> int:
        """The largest number of visible tokens of which all are selected (rule 5)."""
        return self.heavy_size + self.first_trained + num_query_tokens + self.num_centroids

    def max_selected(self, num_query_tokens: int = 1) -> int:
        """P, the length of a list of positions.

        Args:
          num_query_tokens: T, query tokens of one step.

        Returns:
          max(sink_size + heavy_size + window_size, heavy_size + init_offset + T + C); it may
          exceed the capacity S.
        """
        attended = self.sink_size + self.heavy_size + self.window_size
        return max(attended, self.short_context(num_query_tokens))


def float_dtype(name: str, value: Any, fix: str) -> np.dtype:
    """A dtype of FLOAT_DTYPES; ValueError for anything else."""
    try:
        dtype = np.dtype(value)
    except Exception:  # numpy reads strings as types in more ways than one
        dtype = None
    if dtype is None or dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name}: expected float32, bfloat16 or float16, got {value!r}; {fix}")
    return dtype


def beyond_cells(config: IndexerConfig, num_query_tokens: int) -> str | None:
    """What the "cells" selector takes instead of this, or None."""
    if num_query_tokens > MOST_TOKENS_OF_CELLS:
        return f"up to {MOST_TOKENS_OF_CELLS} query tokens, not T={num_query_tokens}"
    if config.heavy_size > LARGEST_BUDGET_OF_CELLS:
        return f"budgets up to {LARGEST_BUDGET_OF_CELLS}, not heavy_size={config.heavy_size}"
    return None


def default_selector(
    config: IndexerConfig, capacity: int, num_query_tokens: int, goes_on: bool = False
) -> Selector:
    """The selector that "triton" takes where none is named.

    With `config.cells` it is "cells" for up to 8 query tokens, where reranking or the rest
    `goes_on` in the same kernel, or for caches of 32768 tokens or more, up to 4096 cells and a
    float32 table; otherwise "threshold".
    """
    if not config.cells or beyond_cells(config, num_query_tokens):
        return "threshold"
    if goes_on:
        return "cells"
    # Entries of 16 bits make cells tie, and those that tie at the cut are searched for slowly.
    wins = config.num_cells <= FEW_CELLS and config.table_dtype == np.float32
    return "cells" if wins and capacity >= CELLS_FROM else "threshold"


def _integer(name: str, value: Any, low: int, high: int | None) -> int:
    wanted = f"an integer of at least {low}" if high is None else f"an integer in {low}..{high}"
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if isinstance(value, (bool, np.bool_)) or number is None:
        raise ValueError(
            f"{name}: expected {wanted}, got {value!r} ({type(value).__name__}); "
            "pass a Python int, since it is static"
        )
    if number < low or (high is not None and number > high):
        raise ValueError(f"{name}: expected {wanted}, got {number}; choose a value in that range")
    return number
