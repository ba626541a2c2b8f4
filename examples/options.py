"""Named configs of the indexer: how much is read at each step, and how close it comes."""

import dataclasses
from typing import NamedTuple

from jax_indexer import IndexerConfig, Rope


class Recipe(NamedTuple):
    """How a cache is decoded with.

    Attributes:
      config: of the indexer.
      copies: of each key that codebooks are trained on, turned ahead; 0 for none.
    """

    config: IndexerConfig
    copies: int


def plain(budget: int = 128, **changes) -> IndexerConfig:
    """The fastest config, with sinks and a window that suit contexts of 8192 tokens."""
    return IndexerConfig(heavy_size=budget, sink_size=64, window_size=64, **changes)


def named(rope: Rope, budget: int = 128) -> dict[str, Recipe]:
    """ "fast", "balanced" and "near-exact", from what `python -m examples.evaluate` measures.

    In all of them cosines and sines of RoPE's pairs are in different subspaces, which costs
    nothing in a step.
    """
    apart = plain(budget, grouping="strided" if rope.pairs == "interleaved" else "contiguous")
    return {
        "fast": Recipe(apart, copies=3),
        "balanced": Recipe(dataclasses.replace(apart, rerank=8, estimate_rest="codes"), copies=3),
        "near-exact": Recipe(
            dataclasses.replace(apart, rerank=16, estimate_rest="codes"), copies=3
        ),
    }
