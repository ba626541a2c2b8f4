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
from parity.progress import progress
from parity.quality import (
    BEST_OF,
    QUANTIZERS,
    Layers,
    config_of,
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
        with progress(2 * len(QUANTIZERS)) as advance:
            for part in (
                quantizers(layers, starts=starts, advance=advance),
                drift(layers, advance=advance),
            ):
                for table, row in part:
                    rows.append({"table": table} | row)
                    yield

    return Plan("quality", "quality", lambda: rows, measured)
