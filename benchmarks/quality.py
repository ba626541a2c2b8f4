"""`python -m benchmarks.quality --real-keys DIR`: how good the lists are, on a model's own keys.

Layers are batch rows. Errors are those of the attention output, |sparse - full| / |full|, recall is
the share of the heavy tokens by exact score that is selected; both over the model's last queries.
"""

import argparse
import dataclasses
import datetime
import functools
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from benchmarks.files import add_output_arguments, chosen_output, write
from jax_indexer import append, build_index, rebuild, rebuild_gain
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
)

Row = dict[str, Any]

BUDGETS = (128, 512)
# Starts of k-means for each: one moves an error by a tenth where codes are coarse.
STARTS = {(2, 6): 40, (4, 8): 10, (8, 8): 10, (16, 4): 40}


# What is measured.


def quantizers(
    layers: Layers,
    shapes: Sequence[tuple[int, int]] = QUANTIZERS,
    budgets: Sequence[int] = BUDGETS,
    starts: int | None = None,
    advance: Callable[[], None] = lambda: None,
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
        advance()


def drift(
    layers: Layers,
    shapes: Sequence[tuple[int, int]] = QUANTIZERS,
    budgets: Sequence[int] = BUDGETS,
    steps: int = 4,
    advance: Callable[[], None] = lambda: None,
) -> Iterator[tuple[str, Row]]:
    """Rows of the tables "drift" and "drift, attention".

    Codebooks of the first half of the tokens meet the other half, a part of it at a time.
    """
    capacity = layers.key.shape[1]
    half = capacity // 2
    for num_subspaces, num_bits in shapes:
        config = config_of(num_subspaces, num_bits)
        about = {"num_subspaces": num_subspaces, "num_bits": num_bits}
        every_row = jnp.ones(len(layers.key), bool)
        old = build_index(layers.key, full_lengths(layers, half), config)
        for length in range(half, capacity + 1, half // steps):
            end = int(old.lengths[0])
            if length > end:
                old = append(old, layers.key[:, end:length], config)
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
                    "gain after rebuild": np.asarray(rebuild_gain(new, layers.key, config)),
                    "error that rebuild removes": 1 - after / before,
                },
            )
        for budget in budgets:
            sized = config_of(num_subspaces, num_bits, heavy_size=budget)
            (error, new_error), (recall, new_recall) = quality(layers, [old, new], sized)
            yield (
                "drift, attention",
                about
                | {
                    "budget": budget,
                    "error": error,
                    "error, rebuilt": new_error,
                    "recall": recall,
                    "recall, rebuilt": new_recall,
                },
            )
        advance()


# The command line.


def as_json(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [as_json(x) for x in value.tolist()]
    return float(f"{value:.5g}") if isinstance(value, (float, np.floating)) else value


def print_table(title: str, rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        values = (x if isinstance(x, list) else [x] for x in row.values())
        table.add_row(*(" ".join(f"{x:.4g}" for x in value) for value in values))
    Console(width=140).print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line.

    Returns:
      0, or 130 if the user interrupted it.
    """
    from rich.progress import Progress

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--real-keys", type=Path, required=True, metavar="DIR")
    add_output_arguments(parser)
    arguments = parser.parse_args(argv)

    started = time.perf_counter()
    now = datetime.datetime.now(datetime.UTC)
    commit = machine.find_commit(arguments.commit)
    try:
        layers = read_layers(arguments.real_keys)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        parser.error(f"--real-keys: {error}; python -m parity.real_keys --out DIR makes that file")
    output = chosen_output(
        arguments.output, f"quality-{now.strftime('%Y%m%d-%H%M%S')}.json", parser
    )
    tables: dict[str, list[Row]] = {}
    interrupted = False
    with Progress() as progress:
        task = progress.add_task("quantizers", total=2 * len(QUANTIZERS))
        advance = functools.partial(progress.advance, task)
        try:
            for part in (quantizers, drift):
                for name, row in part(layers, advance=advance):
                    row = {column: as_json(value) for column, value in row.items()}
                    tables.setdefault(name, []).append(row)
        except KeyboardInterrupt:
            interrupted = True
    results = {
        "kind": "quality",
        "time": now.isoformat(timespec="seconds"),
        "command": "python -m benchmarks.quality --real-keys DIR",
        **commit,
        "machine": machine.describe_machine() | {"faiss": machine.version("faiss-cpu")},
        "seconds": round(time.perf_counter() - started, 1),
        "tables": tables,
    }
    write(output, results)
    for name, rows in tables.items():
        print_table(name, rows)
    print(f"{output} ({results['seconds']:.0f} s)")
    if interrupted:
        print("interrupted: what was measured until then is kept")
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
