"""What is measured: ways to attend while decoding, from plain product quantization on."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from examples.model import Model
from jax_indexer import IndexerConfig, Rope
from parity.real_keys import Failure

BUDGET = 128
# Layers that look far back for single tokens: full attention is worth most there, by
# `python -m examples.evaluate layers`.
FULL_LAYERS: dict[str, tuple[int, ...]] = {"smollm2": (7,), "qwen": ()}
NAMES = (
    "fast",
    "balanced",
    "near-exact",
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
      copies: of each key that codebooks are trained on too, turned ahead; 0 for none. None for as
        many as what follows is worth: 3 where it is as long as the prompt, at least 1. More make
        codebooks fit what comes at the cost of what is there.
      exact: whether tokens are chosen by their true logits, which reads all keys: what product
        quantization approximates.
    """

    config: IndexerConfig
    copies: int | None = 0
    exact: bool = False

    def ahead(self, rope: Rope, prompt: int, following: int) -> dict[str, Any]:
        """Arguments of `rebuild` and `prefill`, for a prompt behind which so many tokens follow."""
        copies = self.copies
        if copies is None:
            copies = min(max(round(3 * following / prompt), 1), 8)
        return {"rope": rope, "look_ahead": following, "copies": copies} if copies else {}


def plain(budget: int = BUDGET) -> IndexerConfig:
    """The indexer's own defaults, but for sinks and a window that suit 8192 tokens."""
    return IndexerConfig(heavy_size=budget, sink_size=64, window_size=64)


def named(rope: Rope, budget: int = BUDGET) -> dict[str, Option]:
    """The recommended options.

    The two subspaces hold the cosines and the sines of RoPE's pairs, which costs nothing in a step.
    """
    apart = "strided" if rope.pairs == "interleaved" else "contiguous"
    # On a GPU lists come from cells; they are the same.
    fast = dataclasses.replace(plain(budget), grouping=apart, cells=True)
    estimating = dataclasses.replace(fast, estimate_rest="codes")
    return {
        "fast": Option(fast, copies=None),
        "balanced": Option(dataclasses.replace(estimating, rerank=8), copies=None),
        "near-exact": Option(dataclasses.replace(estimating, rerank=16), copies=None),
    }


def options(rope: Rope, budget: int = BUDGET) -> dict[str, Option]:
    """All options, each with one thing more than the one before it, and the recommended ones."""
    config = plain(budget)
    apart = named(rope, budget)["fast"].config
    estimating = dataclasses.replace(apart, estimate_rest="codes")
    return {
        "window": Option(dataclasses.replace(plain(0), window_size=config.window_size + budget)),
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


def check_layers(layers: Sequence[int], model: Model) -> None:
    """Failure for layers that there are not."""
    if wrong := [layer for layer in layers if not 0 <= layer < model.layers]:
        raise Failure(f"--full-layers: expected 0 to {model.layers - 1}, got {wrong[0]}")
