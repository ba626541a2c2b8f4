"""Measures how good the lists are on a model's own keys, beside those with codebooks of faiss.

`python -m parity.real_keys --out DIR` makes the keys. Layers are batch rows. Errors are those of
the attention output, |sparse - full| / |full|, recall is the share of the heavy tokens by exact
score that is selected; both over the model's last queries.
"""

import argparse
import dataclasses
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from benchmarks.results import Plan, Row
from jax_indexer import append, build_index, rebuild, rebuild_gain
from jax_indexer.layout import Grouping
from parity.progress import progress
from parity.quality import (
    BEST_OF,
    QUANTIZERS,
    Layers,
    config_of,
    decoding_error,
    faiss_codebooks,
    full_lengths,
    index_of,
    inertia,
    our_index,
    quality,
    ratio_of_means,
    read_layers,
    turned_by,
)

BUDGETS = (128, 512)
# Starts of k-means for each: one moves an error by a tenth where codes are coarse.
STARTS = {(2, 6): 40, (4, 8): 10, (8, 8): 10, (16, 4): 40}


def quantizers(
    layers: Layers,
    shapes: Sequence[tuple[int, int]] = QUANTIZERS,
    budgets: Sequence[int] = BUDGETS,
    starts: int | None = None,
    advance: Callable[[str], None] = lambda what: None,
) -> Iterator[tuple[str, Row]]:
    """Rows of the tables "inertia", "attention" and "table dtype"; STARTS of each by default."""
    for num_subspaces, num_bits in shapes:
        seeds = range(starts or STARTS[num_subspaces, num_bits])
        config = config_of(num_subspaces, num_bits)
        about = {"num_subspaces": num_subspaces, "num_bits": num_bits}
        ours = [our_index(layers, config, seed) for seed in seeds]
        theirs = [faiss_codebooks(layers.key, config, 1234 + seed) for seed in seeds]
        of_ours = np.stack([inertia(layers.key, x.codebooks, config) for x in ours])
        of_theirs = np.stack([inertia(layers.key, x, config) for x in theirs])
        best, their_best = (x[:BEST_OF].min(0).sum((1, 2)) for x in (of_ours, of_theirs))
        yield (
            "inertia",
            about
            | {
                "ours, best of 3": best.sum(),
                "faiss, best of 3": their_best.sum(),
                "ratio": best.sum() / their_best.sum(),
                "by layer": best / their_best,
                "ratio of means of all starts": of_ours.mean(0).sum() / of_theirs.mean(0).sum(),
            },
        )
        theirs = [index_of(layers, x, config) for x in theirs]
        for budget in budgets:
            sized = config_of(num_subspaces, num_bits, heavy_size=budget)
            (error, recall), (their_error, their_recall) = (
                quality(layers, indices, sized) for indices in (ours, theirs)
            )
            ratio, deviation = ratio_of_means(error, their_error)
            yield (
                "attention",
                about
                | {
                    "budget": budget,
                    "error": error.mean(),
                    "with faiss": their_error.mean(),
                    "ratio": ratio,
                    "standard error": deviation,
                    "starts": len(seeds),
                    "of 3 starts": error[:BEST_OF].mean() / their_error[:BEST_OF].mean(),
                    "exact top-k": quality(layers, [None], sized)[0, 0],
                    "recall": recall.mean(),
                    "recall with faiss": their_recall.mean(),
                },
            )
            row = about | {"budget": budget}
            for dtype in ("float32", "bfloat16", "float16"):
                rounded = dataclasses.replace(sized, table_dtype=dtype)
                error, recall = quality(layers, ours[:BEST_OF], rounded).mean(1)
                row |= {f"error, {dtype}": error, f"recall, {dtype}": recall}
            yield "table dtype", row
        advance(f"{num_subspaces} subspaces, {num_bits} bits")


def drift(
    layers: Layers,
    shapes: Sequence[tuple[int, int]] = QUANTIZERS,
    budgets: Sequence[int] = BUDGETS,
    steps: int = 4,
    advance: Callable[[str], None] = lambda what: None,
) -> Iterator[tuple[str, Row]]:
    """Rows of the tables "drift" and "drift, attention".

    Codebooks of the first half of the tokens meet the other half, a part of it at a time; others
    looked ahead at so many tokens.
    """
    capacity = layers.key.shape[1]
    half = capacity // 2
    for num_subspaces, num_bits in shapes:
        config = config_of(num_subspaces, num_bits)
        about = {"num_subspaces": num_subspaces, "num_bits": num_bits}
        every_row = jnp.ones(len(layers.key), bool)
        ahead = {"rope": turned_by(layers), "look_ahead": capacity - half}
        start = layers.key, full_lengths(layers, half), config
        old, wise = build_index(*start), build_index(*start, **ahead)
        for length in range(half, capacity + 1, half // steps):
            end = int(old.lengths[0])
            if length > end:
                old, wise = (append(x, layers.key[:, end:length], config) for x in (old, wise))
            new = rebuild(old, layers.key, config, every_row)
            seen = layers.key[:, :length]
            before = inertia(seen, old.codebooks, config).sum((1, 2))
            after = inertia(seen, new.codebooks, config).sum((1, 2))
            yield (
                "drift",
                about
                | {
                    "tokens": length,
                    "gain": np.asarray(rebuild_gain(old, layers.key, config)),
                    "gain, looking ahead": np.asarray(
                        rebuild_gain(wise, layers.key, config, **ahead)
                    ),
                    "gain after rebuild": np.asarray(rebuild_gain(new, layers.key, config)),
                    "error that rebuild removes": 1 - after / before,
                },
            )
        for budget in budgets:
            sized = config_of(num_subspaces, num_bits, heavy_size=budget)
            errors, recalls = quality(layers, [old, wise, new], sized)
            kinds = ("", ", looking ahead", ", rebuilt")
            yield (
                "drift, attention",
                about
                | {
                    "budget": budget,
                    **{f"error{kind}": x for kind, x in zip(kinds, errors, strict=True)},
                    **{f"recall{kind}": x for kind, x in zip(kinds, recalls, strict=True)},
                },
            )
        advance(f"{num_subspaces} subspaces, {num_bits} bits, drift")


# Tokens of the prompt that codebooks are of, where the others are decoded.
PROMPTS = (2048, 4096, 6144)
GROUPINGS = ("contiguous", "strided")


def decoding(
    layers: Layers,
    prompts: Sequence[int] = PROMPTS,
    budgets: Sequence[int] = BUDGETS,
    groupings: Sequence[Grouping] = GROUPINGS,
    advance: Callable[[str], None] = lambda what: None,
) -> Iterator[tuple[str, Row]]:
    """Rows of the table "decoding": errors of `decode_attention` far behind a prompt."""
    capacity = layers.key.shape[1]
    for prompt in prompts:
        ahead = {"rope": turned_by(layers), "look_ahead": capacity - prompt}
        lengths = full_lengths(layers, prompt)
        for grouping in groupings:
            base = config_of(2, 6, grouping=grouping)
            plain, wise = (
                build_index(layers.key, lengths, base, **options).codebooks
                for options in ({}, ahead)
            )
            kinds = {
                "plain": (plain, {}),
                "looking ahead": (wise, {}),
                "and the rest": (wise, {"estimate_rest": "codes"}),
                "by the mean": (wise, {"estimate_rest": "mean"}),
                "and rerank 4": (wise, {"rerank": 4}),
                "and both": (wise, {"rerank": 4, "estimate_rest": "codes"}),
            }
            for budget in budgets:
                row = {"prompt": prompt, "budget": budget, "grouping": grouping}
                of_all = {"rerank": -(-capacity // budget)}
                for kind, (codebooks, fields) in (kinds | {"exact top-k": (plain, of_all)}).items():
                    config = dataclasses.replace(base, heavy_size=budget, **fields)
                    row[kind] = decoding_error(layers, codebooks, config)
                yield "decoding", row
        advance(f"behind {prompt} tokens")


# The command line.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `quality`."""
    parser.add_argument("--real-keys", type=Path, required=True, metavar="DIR")


def plan(arguments: argparse.Namespace) -> Plan:
    """What a command line of `quality` asks for; ValueError if it cannot be."""
    try:
        layers = read_layers(arguments.real_keys)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        advice = "python -m parity.real_keys --out DIR makes that file"
        raise ValueError(f"--real-keys: {error}; {advice}") from None
    rows: list[Row] = []
    starts = BEST_OF if arguments.quick else None

    def measured(plan: Plan) -> Iterator[None]:
        with progress(2 * len(QUANTIZERS) + len(PROMPTS)) as advance:
            for part in (
                decoding(layers, advance=advance),
                quantizers(layers, starts=starts, advance=advance),
                drift(layers, advance=advance),
            ):
                for table, row in part:
                    rows.append({"table": table} | row)
                    yield

    return Plan("quality", "quality", lambda: rows, measured)
