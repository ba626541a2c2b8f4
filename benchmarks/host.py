"""Times decode steps over keys and values in host memory, beside the same on the device.

A layer of a million tokens: how long a step takes follows from how much of what it lists the steps
before it listed, so queries walk at several speeds. And a model of 16 such layers with random
weights, all steps in one jit, which needs XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB=70.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from benchmarks import results
from benchmarks.clock import summary
from benchmarks.measure import say
from benchmarks.results import Plan
from jax_indexer import (
    DecodeCache,
    IndexerConfig,
    decode_attention,
    empty_cache,
    prefill_chunk,
    rebuild,
)

N, K, H = 32, 8, 128  # a layer of Llama 3 8B
LENGTH, LAYERS, HIDDEN, CHUNK = 2**20, 16, 4096, 8192
STEPS, ROUNDS = 64, 7
CONFIGS = {
    "cells": IndexerConfig(cells=True, train_tokens=65536),
    "cells, rerank 4, rest": IndexerConfig(
        cells=True, rerank=4, estimate_rest="codes", train_tokens=65536
    ),
}
# How much of a query the next one keeps: the same, a slow and a quicker walk, nothing.
WALKS = (1.0, 0.9995, 0.998, 0.99, 0.0)
PICTURE = "host-memory.png"


def walk(keeps: float, steps: int, *shape: int, seed: int = 0) -> Array:
    """Normal numbers [steps, *shape], each with this correlation with the one before it."""
    noise = jax.random.normal(jax.random.key(seed), (steps, *shape))

    def step(x, noise):
        x = keeps * x + np.sqrt(1 - keeps**2) * noise
        return x, x

    return lax.scan(step, noise[0], noise)[1].astype(jnp.bfloat16)


def filled(config: IndexerConfig, kind: str | None, length: int, layers: int | None) -> DecodeCache:
    """A cache of random tokens, put there chunk by chunk, with room for the steps."""
    cache = empty_cache(config, 1, LENGTH, K, H, layers=layers, memory_kind=kind)

    @functools.partial(jax.jit, donate_argnums=0)
    def put(cache, first, layer):
        number = jax.random.fold_in(jax.random.key(first), 0 if layer is None else layer)
        key, value = jax.random.normal(number, (2, 1, CHUNK, K, H), jnp.bfloat16)
        counts = jnp.clip(length - first, 0, CHUNK)[None]
        return prefill_chunk(key, value, first[None], cache, config, counts=counts, layer=layer)

    @functools.partial(jax.jit, donate_argnums=0)
    def index_of(index, key, value, layer):
        value = value if config.estimate_rest else None
        lengths, rows = jnp.full(1, length, jnp.int32), jnp.ones(1, bool)
        return rebuild(index, key, config, rows, value=value, lengths=lengths, layer=layer)

    for number in range(layers or 1):
        layer = None if layers is None else jnp.int32(number)
        for first in range(0, length, CHUNK):
            cache = put(cache, jnp.int32(first), layer)
        index = index_of(cache.index, cache.key, cache.value, layer)
        cache = dataclasses.replace(cache, index=index)
    return jax.block_until_ready(cache)


def timed(call: Callable[[Any], Any], state: Any, steps: int) -> tuple[dict[str, float], Any, Any]:
    """Microseconds a step of calls that take and give back a state, by the wall clock."""
    state, out = jax.block_until_ready(call(state))
    samples = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        state, out = jax.block_until_ready(call(state))
        samples.append((time.perf_counter() - start) * 1e6 / steps)
    return summary(samples), state, out


def layer_steps(config: IndexerConfig, cache: DecodeCache, queries: Array) -> tuple[Any, Any]:
    """Steps of one layer: the cache, and outputs and where rows are kept, of each step."""
    new = walk(0.0, len(queries), 2, 1, 1, K, H, seed=5)

    def step(cache, x):
        query, new = x
        out, cache = decode_attention(query, *new, cache, config)
        kept = None if cache.recent is None else cache.recent.next_slot
        return cache, (out, kept)

    return lax.scan(step, cache, (queries, new))


def layer_row(config: IndexerConfig, cache: DecodeCache, keeps: float) -> tuple[dict, DecodeCache]:
    """A layer's time with queries that walk at some speed."""
    queries = walk(keeps, STEPS, 1, 1, N, H)
    run = jax.jit(functools.partial(layer_steps, config), donate_argnums=0)
    compiled = run.lower(cache, queries).compile()
    memory = compiled.memory_analysis()
    times, cache, (_, kept) = timed(lambda cache: compiled(cache, queries), cache, STEPS)
    row = {
        "keeps": keeps,
        "call": times,
        "temp_bytes": memory.temp_size_in_bytes,
        "host_temp_bytes": memory.host_temp_size_in_bytes,
    }
    if kept is not None:
        kept = np.asarray(kept)[:, 0]
        slots = cache.recent.position_in.shape[-1]
        new = np.diff(kept, axis=0) % slots
        row["new_rows"] = float(new.sum(axis=1).mean())
        row["kept"] = 1 - row["new_rows"] / (N * config.pool.heavy_size)
    return row, cache


def full_row(cache: DecodeCache, implementation: str, is_on_host: bool) -> dict[str, Any]:
    """Full attention over all of a layer's cache, which is moved first if it is in host memory."""

    @jax.jit
    def full(query, key, value):
        if is_on_host:
            key, value = (jax.device_put(x, jax.memory.Space.Device) for x in (key, value))
        return jax.nn.dot_product_attention(query, key, value, implementation=implementation)

    query = walk(0.0, 1, 1, 1, N, H)[0]
    call = lambda state: (state, full(query, cache.key, cache.value))  # noqa: E731
    return {"call": timed(call, None, 1)[0]}


# The model


def weights() -> dict[str, Array]:
    """Of attention layers alone, at random."""

    def of(number: int, rows: int, columns: int) -> Array:
        shape = LAYERS, rows, columns
        return jax.random.normal(jax.random.key(number), shape, jnp.bfloat16) * rows**-0.5

    return {
        "query": of(1, HIDDEN, N * H),
        "key": of(2, HIDDEN, K * H),
        "value": of(3, HIDDEN, K * H),
        "out": of(4, N * H, HIDDEN),
    }


def model_steps(
    config: IndexerConfig, attends: bool, weights: dict, tokens: Array, cache: DecodeCache
) -> tuple[DecodeCache, Array]:
    """Steps of the model, through all layers; without attention what else it does."""

    def layer(carry, x):
        hidden, cache = carry
        weight, number = x
        normed = hidden * lax.rsqrt(jnp.mean(jnp.square(hidden.astype(jnp.float32)))).astype(
            hidden.dtype
        )
        query, key, value = (
            (normed @ weight[name]).reshape(1, 1, -1, H) for name in ("query", "key", "value")
        )
        if attends:
            out, cache = decode_attention(query, key, value, cache, config, layer=number)
        else:
            out = query + jnp.repeat(key + value, N // K, axis=2)
        return (hidden + out.reshape(1, N * H) @ weight["out"], cache), None

    def step(cache, token):
        number = jnp.arange(LAYERS, dtype=jnp.int32)
        (hidden, cache), _ = lax.scan(layer, (token, cache), (weights, number))
        return cache, hidden

    return lax.scan(step, cache, tokens)


def model_rows(device: Any) -> Iterator[dict[str, Any]]:
    """The model's time a token, with and without its attention, and its memory."""
    config, of_model, steps = CONFIGS["cells"], weights(), 32
    tokens = walk(0.998, steps, 1, HIDDEN, seed=7)
    start = time.perf_counter()
    cache = filled(config, "pinned_host", LENGTH - 1024, LAYERS)
    seconds, found = time.perf_counter() - start, {}
    say(f"filled {2 * cache.key.nbytes / 1e9:.0f} GB in {seconds:.0f} s")
    for attends in (False, True):
        run = jax.jit(functools.partial(model_steps, config, attends), donate_argnums=2)
        compiled = run.lower(of_model, tokens, cache).compile()
        memory = compiled.memory_analysis()
        call = functools.partial(compiled, of_model, tokens)
        found[attends], cache, _ = timed(call, cache, steps)
        yield {
            "workload": "model",
            "implementation": "pinned_host" if attends else "no attention",
            "status": "ok",
            "call": found[attends],
            "temp_bytes": memory.temp_size_in_bytes,
            "host_temp_bytes": memory.host_temp_size_in_bytes,
            "host_bytes": 2 * cache.key.nbytes,
            "device_peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
            "fill_seconds": seconds,
            "attention_us": found[True]["median"] - found[False]["median"] if attends else None,
        }


def layer_rows() -> Iterator[dict[str, Any]]:
    """The rows of one layer."""
    for name, config in CONFIGS.items():
        for kind in ("pinned_host", None):
            start = time.perf_counter()
            cache = filled(config, kind, LENGTH - 16384, None)
            say(f"a layer, {name}, {kind}: filled in {time.perf_counter() - start:.1f} s")
            for keeps in WALKS:
                row, cache = layer_row(config, cache, keeps)
                where = kind or "device"
                yield {"workload": "layer", "implementation": f"{name}, {where}"} | row
            if name == "cells":
                for implementation in ("cudnn", "xla") if kind is None else ("cudnn",):
                    row = full_row(cache, implementation, kind is not None)
                    full = f"full attention ({implementation}), {kind or 'device'}"
                    yield {"workload": "layer", "implementation": full} | row
            del cache


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `host`."""
    parser.add_argument(
        "--workload", nargs="+", choices=("model", "layer"), default=["model", "layer"]
    )


def plan(arguments: argparse.Namespace) -> Plan:
    """What a command line of `host` asks for; ValueError if it cannot be."""
    if not results.has_gpu():
        raise ValueError("no NVIDIA GPU: its bus is what is measured")
    rows: list[dict[str, Any]] = []

    def measured(plan: Plan) -> Iterator[None]:
        parts = {"model": lambda: model_rows(jax.devices()[0]), "layer": layer_rows}
        for name, part in parts.items():  # the model first: its memory is what is reported
            if name not in arguments.workload:
                continue
            try:
                for row in part():
                    rows.append({"status": "ok"} | row)
                    times = row["call"]["median"]
                    say(f"{name}: {row['implementation']} {row.get('keeps', '')}: {times:.0f} us")
                    yield
            except Exception as error:
                plan.failed(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            jax.clear_caches()

    about = {"workloads": {"layer": {"N": N, "K": K, "H": H, "L": LENGTH}, "model": LAYERS}}
    return Plan("host", "host", lambda: rows, measured, about)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time of a layer against how much of what is listed is kept."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    of_layer = [row for row in rows if row["workload"] == "layer"]
    for row in of_layer:
        if row["implementation"].startswith("full"):
            ax.axhline(row["call"]["median"], color="0.6", linestyle="--", linewidth=1)
            ax.text(0.01, row["call"]["median"] * 1.05, row["implementation"], fontsize=8)
    kept = {row["keeps"]: row["kept"] for row in of_layer if "kept" in row}
    names = dict.fromkeys(row["implementation"] for row in of_layer if "keeps" in row)
    for number, name in enumerate(names):
        points = sorted(
            (row.get("kept", kept[row["keeps"]]), row["call"]["median"])
            for row in of_layer
            if row["implementation"] == name
        )
        look = {"marker": "osD^"[number % 4], "linestyle": "-" if "host" in name else ":"}
        ax.plot(*zip(*points, strict=True), label=name, **look)
    ax.axvspan(0.92, 0.99, color="0.93", label="real keys")
    ax.set_yscale("log")
    ax.set_xlabel("of what a step lists: rows that are kept already, or that two heads share")
    ax.set_ylabel("a layer, wall clock, µs")
    ax.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
