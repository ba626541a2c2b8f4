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
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from benchmarks import machine
from benchmarks.files import add_output_arguments, chosen_output, write
from jax_indexer import (
    IndexerConfig,
    PQIndex,
    Selection,
    append,
    build_index,
    rebuild,
    rebuild_gain,
    reference,
    select,
    sparse_attention,
)

Row = dict[str, Any]

LAYERS = (4, 15, 27)
BUDGETS = (128, 512)
# Starts of k-means for each: one moves an error by a tenth where codes are coarse.
STARTS = {(2, 6): 40, (4, 8): 10, (8, 8): 10, (16, 4): 40}
QUANTIZERS = tuple(STARTS)  # (subspaces, bits)
BEST_OF = 3
EVERY = 16  # of the last 128 queries


class Layers(NamedTuple):
    """Attention of some layers; the queries are those of the last tokens.

    Attributes:
      query: [B, Q, N, H].
      key, value: [B, S, K, H].
    """

    query: Array
    key: Array
    value: Array


def read_layers(folder: Path) -> Layers:
    """The layers of `smollm2_8k.npz`, as `python -m parity.real_keys` writes it."""
    with np.load(folder / "smollm2_8k.npz") as arrays:
        parts = (
            jnp.stack([jnp.asarray(arrays[f"layer{layer}_{name}"]) for layer in LAYERS])
            for name in Layers._fields
        )
        return Layers(*parts)


def config_of(num_subspaces: int, num_bits: int, **fields) -> IndexerConfig:
    """What everything here is measured with: 64 sinks, a window of 64."""
    sizes = {"sink_size": 64, "window_size": 64, **fields}
    return IndexerConfig(num_subspaces=num_subspaces, num_bits=num_bits, **sizes)


def full_lengths(layers: Layers, length: int | None = None) -> Array:
    """The same length for every row; the capacity unless given."""
    batch, capacity = layers.key.shape[:2]
    return jnp.full(batch, capacity if length is None else length, jnp.int32)


# k-means: ours and that of faiss.


def faiss_codebooks(key: Array, config: IndexerConfig, seed: int) -> np.ndarray:
    """Codebooks [B, K, M, C, D] of faiss's product quantizer, trained on what ours are."""
    import faiss

    batch, length, kv_heads, size = key.shape
    shape = (config.num_subspaces, config.num_centroids, size // config.num_subspaces)
    codebooks = np.empty((batch, kv_heads, *shape), np.float32)
    for b, k in np.ndindex(batch, kv_heads):
        quantizer = faiss.ProductQuantizer(size, config.num_subspaces, config.num_bits)
        quantizer.cp.niter, quantizer.cp.seed = config.kmeans_iters, seed
        quantizer.cp.max_points_per_centroid = length  # or it would train on a sample
        quantizer.cp.min_points_per_centroid = 1  # or it would warn
        points = np.asarray(key[b, config.first_trained :, k], np.float32)
        quantizer.train(np.ascontiguousarray(points))
        codebooks[b, k] = faiss.vector_to_array(quantizer.centroids).reshape(shape)
    return codebooks


def our_index(layers: Layers, config: IndexerConfig, seed: int) -> PQIndex:
    return build_index(layers.key, full_lengths(layers), config, seed=seed)


def index_of(layers: Layers, codebooks: np.ndarray, config: IndexerConfig) -> PQIndex:
    """An index of given codebooks, with our codes."""
    batch, kv_heads, num_subspaces = codebooks.shape[:3]
    index = PQIndex(
        codebooks=jnp.asarray(codebooks),
        codes=jnp.zeros((batch, kv_heads, num_subspaces, layers.key.shape[1]), jnp.uint8),
        lengths=full_lengths(layers, 0),
    )
    return append(index, layers.key, config)


def inertia(key: Array, codebooks: Array | np.ndarray, config: IndexerConfig) -> np.ndarray:
    """Squared distances [B, K, M] of the keys to their centroids, summed in float64."""
    points = np.asarray(key, np.float64)[:, config.first_trained :]
    total = np.empty(codebooks.shape[:3])
    for b, k, m in np.ndindex(*total.shape):
        centroids = np.asarray(codebooks[b, k, m], np.float64)
        part = points[b, :, k].reshape(points.shape[1], total.shape[2], -1)[:, m]
        distances = np.square(centroids).sum(-1) - 2 * part @ centroids.T
        total[b, k, m] = np.square(part).sum() + distances.min(-1).sum()
    return total


# Attention and recall.


@functools.partial(jax.jit, static_argnames="config")
def measure_lists(
    layers: Layers, index: PQIndex | None, config: IndexerConfig
) -> tuple[Array, Array]:
    """Mean (error of the attention output, recall of heavy tokens); index None: exact top-k."""
    capacity, num_queries = layers.key.shape[1], layers.query.shape[1]
    key = layers.key.astype(jnp.float32)
    value = layers.value.astype(jnp.float32)
    groups = layers.query.shape[2] // key.shape[2]

    def one(query_and_length):
        query, length = query_and_length  # [B, 1, N, H]
        lengths = full_lengths(layers, length)
        scores = jnp.einsum(
            "btnh,bsnh->btns", query, jnp.repeat(key, groups, axis=2), precision="highest"
        )
        exact, counts = reference.select_from_scores(scores, lengths, None, config)
        selection = Selection(exact, counts)
        if index is not None:
            now = dataclasses.replace(index, lengths=lengths)
            selection = select(query, now, config)
        out = sparse_attention(query, key, value, selection)
        visible = jnp.where(
            jnp.arange(capacity) < length, scores * query.shape[-1] ** -0.5, -jnp.inf
        )
        weights = jax.nn.softmax(visible, axis=-1)
        full = jnp.einsum(
            "btns,bsnh->btnh", weights, jnp.repeat(value, groups, axis=2), precision="highest"
        )
        norm = functools.partial(jnp.linalg.norm, axis=-1)
        candidates = reference.candidates(
            reference.visible_tokens(lengths, None, capacity, 1)[..., None], capacity, config
        )
        chosen, best = (
            reference.dense_weights(x, capacity, np.dtype(np.float32))
            * candidates.astype(jnp.float32)
            for x in (selection.indices, exact)
        )
        recall = jnp.sum(chosen * best, axis=-1) / jnp.sum(best, axis=-1)
        return norm(out - full) / norm(full), recall

    taken = slice(EVERY - 1, None, EVERY)
    query = layers.query[:, taken].astype(jnp.float32)
    lengths = capacity - num_queries + 1 + jnp.arange(num_queries, dtype=jnp.int32)[taken]
    error, recall = lax.map(one, (jnp.moveaxis(query, 1, 0)[:, :, None], lengths))
    return jnp.mean(error), jnp.mean(recall)


def quality(layers: Layers, indices: Iterable[PQIndex | None], config: IndexerConfig) -> np.ndarray:
    """[error, recall] by index, float64 [2, indices]."""
    return np.array([measure_lists(layers, index, config) for index in indices], np.float64).T


def ratio_of_means(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """The ratio of two means and its standard error."""
    ratio = ours.mean() / theirs.mean()
    if min(len(ours), len(theirs)) < 2:
        return ratio, np.inf
    relative = (x.std(ddof=1) / x.mean() / len(x) ** 0.5 for x in (ours, theirs))
    return ratio, ratio * float(np.hypot(*relative))


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
