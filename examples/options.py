"""What is measured: ways to attend while decoding, from plain product quantization on."""

import dataclasses

from jax_indexer import IndexerConfig, Rope

BUDGET = 128
NAMES = (
    "window",
    "contiguous",
    "strided",
    "look-ahead",
    "rest-mean",
    "rest-codes",
    "rerank-4",
    "rerank-8",
    "rerank-16",
    "exact",
)


@dataclasses.dataclass(frozen=True)
class Option:
    """A way to attend.

    Attributes:
      config: of the indexer.
      copies: of each key that codebooks are trained on too, turned ahead; 0 for none.
      exact: whether tokens are chosen by their true logits, which reads all keys: what product
        quantization approximates.
    """

    config: IndexerConfig
    copies: int = 0
    exact: bool = False


def plain(budget: int = BUDGET) -> IndexerConfig:
    """The indexer's own defaults, but for sinks and a window that suit 8192 tokens."""
    return IndexerConfig(heavy_size=budget, sink_size=64, window_size=64)


def named(rope: Rope, budget: int = BUDGET) -> dict[str, Option]:
    """The recommended options.

    The two subspaces hold the cosines and the sines of RoPE's pairs, which costs nothing in a step.
    """
    apart = "strided" if rope.pairs == "interleaved" else "contiguous"
    fast = dataclasses.replace(plain(budget), grouping=apart)
    estimating = dataclasses.replace(fast, estimate_rest="codes")
    return {
        "fast": Option(fast),
        "balanced": Option(dataclasses.replace(estimating, rerank=8), copies=3),
        "near-exact": Option(dataclasses.replace(estimating, rerank=16), copies=3),
    }


def options(rope: Rope, budget: int = BUDGET) -> dict[str, Option]:
    """All options, each with one thing more than the one before it, and the recommended ones."""
    config = plain(budget)
    apart = named(rope, budget)["fast"].config
    estimating = dataclasses.replace(apart, estimate_rest="codes")
    return {
        "window": Option(plain(0)),
        "contiguous": Option(dataclasses.replace(config, grouping="contiguous")),
        "strided": Option(dataclasses.replace(config, grouping="strided")),
        "look-ahead": Option(apart, copies=3),
        "rest-mean": Option(dataclasses.replace(apart, estimate_rest="mean"), copies=3),
        "rest-codes": Option(estimating, copies=3),
        **{
            f"rerank-{x}": Option(dataclasses.replace(estimating, rerank=x), copies=3)
            for x in (4, 8, 16)
        },
        "exact": Option(config, exact=True),
        **named(rope, budget),
    }
