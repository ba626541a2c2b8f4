"""How much of a step's lists earlier steps had: what a device-side cache of heavy rows would save.

`python -m benchmarks.reuse FOLDER --output FILE` decodes the second half of the real keys (layers 4
and 15 of `smollm2_8k.npz`, and of `smollm2_queries.npz`, which holds all 8192 queries) with
codebooks of the first half. Lists are those of `select`: the best by score between sink and window.
Counted are, for each step and kv head, the distinct heavy tokens of its query heads (what a kernel
reads that reads a row once), how many of them the last steps' lists had, and how many a cache of
some slots would have, of which are replaced those not listed for the longest time ("least recent"),
or those that came first ("ring").
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jax_indexer import IndexerConfig, Rope, build_index
from jax_indexer.layout import subvectors

LAYERS = (4, 15)
PROMPT = 4096
# Steps before the first that counts, so that the last ones' lists are known.
BEFORE = 256
BUDGETS = (128, 512, 1024)
LAST = (1, 4, 16, 64)
# Slots of a cache, in lists of a kv head's query heads.
SLOTS = (1, 2, 4, 8, 16)
ROPE_BASE = 100_000.0


class Head(NamedTuple):
    """A kv head of a layer, and the query heads that share it."""

    query: np.ndarray  # [tokens, G, H]
    key: np.ndarray  # [tokens, H]
    codebooks: np.ndarray  # [M, C, D]


def read_heads(folder: Path, config: IndexerConfig, look_ahead: bool) -> Iterator[Head]:
    """All kv heads, with codebooks of the prompt."""
    keys, queries = (np.load(folder / f"smollm2_{name}.npz") for name in ("8k", "queries"))
    for layer in LAYERS:
        query = queries[f"layer{layer}_query"].astype(np.float32)
        key = keys[f"layer{layer}_key"].astype(np.float32)
        options = {}
        if look_ahead:
            rope = Rope.from_base(ROPE_BASE, key.shape[-1], "interleaved")
            options = {"rope": rope, "look_ahead": len(key) - PROMPT, "copies": 3}
        lengths = jnp.array([PROMPT], jnp.int32)
        index = build_index(jnp.asarray(key[None, :PROMPT]), lengths, config, **options)
        codebooks = np.asarray(index.codebooks[0])
        group = query.shape[1] // key.shape[1]
        for head in range(key.shape[1]):
            of_group = query[:, head * group : (head + 1) * group]
            yield Head(of_group, key[:, head], codebooks[head])


def listed(head: Head, config: IndexerConfig, by: str) -> Iterator[np.ndarray]:
    """For each step from the prompt on its heavy tokens [G, largest budget], the best first."""
    parts = subvectors(head.key, config.num_subspaces, config.grouping)
    codes = [
        np.argmin(np.square(books).sum(1) - 2 * part @ books.T, axis=1)
        for books, part in zip(head.codebooks, parts.swapaxes(0, 1), strict=True)
    ]
    for position in range(PROMPT, len(head.key)):
        query = head.query[position]
        last = position + 1 - config.window_size
        if by == "true keys":
            score = query @ head.key[config.sink_size : last].T
        else:
            of_query = subvectors(query, config.num_subspaces, config.grouping)
            score = np.zeros((len(query), last - config.sink_size), np.float32)
            for m, code in enumerate(codes):
                score += (of_query[:, m] @ head.codebooks[m].T)[:, code[config.sink_size : last]]
        most = max(BUDGETS)
        best = np.argpartition(-score, most, axis=1)[:, :most]
        order = np.argsort(-np.take_along_axis(score, best, 1), axis=1, kind="stable")
        yield np.take_along_axis(best, order, 1) + config.sink_size


def reranked(head: Head, lists: Iterator[np.ndarray], position: int = PROMPT):
    """The same tokens, the best by their true keys first."""
    for tokens in lists:
        score = np.einsum("gnh,gh->gn", head.key[tokens], head.query[position])
        yield np.take_along_axis(tokens, np.argsort(-score, axis=1, kind="stable"), 1)
        position += 1


class Reuse:
    """Counts what steps list that earlier ones did."""

    def __init__(self, budget: int, group: int, tokens: int):
        self.budget, self.group = budget, group
        self.used = np.full(tokens, -1)  # the last step that listed a token
        self.counts: dict[str, float] = {}
        # Of each ring the number of rows that came before a token's, and rows that came at all.
        self.came = {slots: np.full(tokens, -(2**40)) for slots in SLOTS}
        self.rows = dict.fromkeys(SLOTS, 0)

    def step(self, number: int, lists: np.ndarray) -> None:
        tokens = np.unique(lists[:, : self.budget])
        used = self.used[tokens]
        if number >= BEFORE:
            seen = used >= 0
            # Distinct tokens listed since a step, its own among them.
            since = np.bincount(self.used[self.used >= 0], minlength=number)[::-1].cumsum()[::-1]
            self._add("steps", 1)
            self._add("distinct", len(tokens))
            for last in LAST:
                self._add(f"in the last {last}", np.sum(used >= number - last))
            for slots in SLOTS:
                fits = since[np.maximum(used, 0)] <= slots * self.group * self.budget
                self._add(f"in {slots} lists' slots, least recent", np.sum(seen & fits))
        for slots, came in self.came.items():
            gone = self.rows[slots] - slots * self.group * self.budget
            missing = tokens[came[tokens] < gone]
            if number >= BEFORE:
                self._add(f"in {slots} lists' slots, ring", len(tokens) - len(missing))
            came[missing] = self.rows[slots] + np.arange(len(missing))
            self.rows[slots] += len(missing)
        self.used[tokens] = number

    def _add(self, name: str, number: float) -> None:
        self.counts[name] = self.counts.get(name, 0) + float(number)


def measure(folder: Path, by: str) -> list[dict]:
    """Rows of the table, a budget each; `by` is what lists are made by."""
    look_ahead = by != "plain codes"
    config = IndexerConfig(grouping="strided" if look_ahead else "contiguous")
    rows: dict[int, dict[str, float]] = {budget: {} for budget in BUDGETS}
    for head in read_heads(folder, config, look_ahead):
        group = head.query.shape[1]
        counters = [Reuse(budget, group, len(head.key)) for budget in BUDGETS]
        lists = listed(head, config, by)
        if by == "reranked":
            lists = reranked(head, lists)
        for number, tokens in enumerate(lists):
            for counter in counters:
                counter.step(number, tokens)
        for counter in counters:
            row = rows[counter.budget]
            row["entries"] = row.get("entries", 0) + counter.counts["steps"] * (
                group * counter.budget
            )
            for name, number in counter.counts.items():
                row[name] = row.get(name, 0) + number
    return [
        {"lists by": by, "budget": budget, "distinct": row["distinct"] / row["entries"]}
        | {name: x / row["distinct"] for name, x in row.items() if name.startswith("in ")}
        for budget, row in rows.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="with smollm2_8k.npz and smollm2_queries.npz")
    parser.add_argument("--output", type=Path, help="JSON to write")
    options = parser.parse_args()
    rows = []
    for by in ("plain codes", "codes", "reranked", "true keys"):
        for row in measure(options.folder, by):
            rows.append(row)
            print(
                {name: x if isinstance(x, (str, int)) else round(x, 3) for name, x in row.items()},
                flush=True,
            )
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
