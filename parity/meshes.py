"""Every function on arrays that are split over devices, against the same on one device.

    python -m parity.meshes Explicit    # or Auto; four devices
    python -m parity.meshes time        # two GPUs or more

Called plainly and under jit, split by batch, by kv heads, and by both. A process of its own, since
the number of host devices is fixed when JAX starts.
"""

import argparse
import functools
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_indexer import (
    IndexerConfig,
    PQIndex,
    Selection,
    append,
    build_index,
    indexer_next,
    rebuild,
    rebuild_gain,
    reset,
    select,
    sparse_attention,
    with_cells,
)

B, K, G, H, S = 4, 4, 2, 16, 256
COLLECTIVES = r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
SPLITS = {"batch": ("rows", None), "heads": (None, "heads"), "both": ("rows", "heads")}


def draw(config: IndexerConfig) -> dict[str, Any]:
    """Arguments by name, on one device."""
    rng = np.random.default_rng(0)
    cache = rng.standard_normal((B, S, K, H)).astype(np.float32)
    lengths = np.asarray([S - 1, 150, 100, 3], np.int32)
    index = jax.tree.map(np.asarray, build_index(cache, lengths, config))
    query = rng.standard_normal((B, 1, K * G, H)).astype(np.float32)
    key_new = rng.standard_normal((B, 1, K, H)).astype(np.float32)
    selection = jax.tree.map(np.asarray, select(query, index, config))
    rows, counts = np.arange(B) % 2 == 0, np.asarray([1, 0, 1, 1], np.int32)
    return {
        "cache": cache, "lengths": lengths, "index": index, "query": query, "key_new": key_new,
        "selection": selection, "rows": rows, "counts": counts,
    }  # fmt: skip


def functions(config: IndexerConfig) -> dict[str, Callable]:
    """Each takes what `draw` returns."""
    return {
        "build_index": lambda x: build_index(x["cache"], x["lengths"], config),
        "rebuild": lambda x: rebuild(
            x["index"], x["cache"], config, x["rows"], lengths=x["lengths"]
        ),
        "rebuild_gain": lambda x: rebuild_gain(x["index"], x["cache"], config),
        "append": lambda x: append(x["index"], x["key_new"], config),
        "append of many": lambda x: append(
            x["index"], x["cache"][:, :9], config, counts=9 * x["counts"]
        ),
        "select": lambda x: select(x["query"], x["index"], config, return_weights=True),
        "indexer_next": lambda x: indexer_next(
            x["query"], x["key_new"], x["index"], config, counts=x["counts"]
        ),
        "reset": lambda x: reset(x["index"], x["rows"]),
        "with_cells": lambda x: (
            with_cells(x["index"], config) if config.cells else x["index"].lengths
        ),
        "sparse_attention": lambda x: sparse_attention(
            x["query"], x["cache"], x["cache"], x["selection"]
        ),
    }


def spec_of(rows: str | None, heads: str | None, name: str, x) -> PartitionSpec:
    """How one array is split."""
    if x.ndim == 1:
        return PartitionSpec(rows)
    if name == "index":
        return PartitionSpec(rows, heads)
    return PartitionSpec(rows, None, heads)


def on_mesh(arguments: dict, mesh, rows: str | None, heads: str | None) -> dict:
    """The same arguments, split."""

    def put(name, x):
        return jax.device_put(x, NamedSharding(mesh, spec_of(rows, heads, name, x)))

    return {
        name: jax.tree.map(functools.partial(put, name), value) for name, value in arguments.items()
    }


def check_same(name: str, got, want) -> None:
    """Exact, but for what is trained or attended in floats."""
    assert jax.tree.structure(got) == jax.tree.structure(want), name
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        if jnp.issubdtype(one.dtype, jnp.floating):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5, err_msg=name)
        elif name in ("build_index", "rebuild"):  # near ties may fall elsewhere
            assert (np.asarray(one) == np.asarray(other)).mean() > 0.99, (name, path)
        else:
            np.testing.assert_array_equal(one, other, err_msg=f"{name} {path}")


def check_split(name: str, got, mesh, rows: str | None, heads: str | None) -> None:
    """Results lie where the arguments do."""
    results = got if isinstance(got, tuple) else (got,)
    for result in results:
        kind = {PQIndex: "index", Selection: "selection"}.get(type(result), "")
        for x in jax.tree.leaves(result):
            wanted = NamedSharding(mesh, spec_of(rows, heads, kind, x))
            assert x.sharding.is_equivalent_to(wanted, x.ndim), (name, x.shape, x.sharding)


def check(
    kind: AxisType, config: IndexerConfig, splits: Sequence[str], *, plainly: Sequence[str]
) -> None:
    """All functions under jit on meshes of this kind of axes, and some called plainly too."""
    arguments = draw(config)
    want = {name: function(arguments) for name, function in functions(config).items()}
    devices = jax.device_count()
    for split in splits:
        rows, heads = SPLITS[split]
        sizes = {"batch": (devices, 1), "heads": (1, devices), "both": (2, devices // 2)}[split]
        mesh = jax.make_mesh(sizes, ("rows", "heads"), axis_types=(kind, kind))
        placed = on_mesh(arguments, mesh, rows, heads)
        for name, function in functions(config).items():
            # A function of its own for each mesh: jit knows what it has compiled by that.
            compiled = jax.jit(lambda x, function=function: function(x)).lower(placed).compile()
            found = set(re.findall(COLLECTIVES, compiled.as_text()))
            allowed = {"all-reduce"} if name == "rebuild_gain" and heads else set()
            assert found <= allowed, (split, name, found)
            for got in (compiled(placed), *([function(placed)] if name in plainly else [])):
                check_same(name, got, want[name])
                check_split(name, got, mesh, rows, heads)
    print(f"checked {kind}, {', '.join(splits)}, {config}", flush=True)


def check_uneven(kind: AxisType) -> None:
    """Heads that the devices cannot share: whole on Auto axes, refused on Explicit ones.

    Rows are split all the same, with one kv head too.
    """
    config = IndexerConfig(num_bits=1, heavy_size=2, sink_size=1, window_size=1, kmeans_iters=2)
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("all",), axis_types=(kind,))

    def put(x, *axes):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    for rows, kv_heads, heads in ((1, 2, 8), (1, 3, 12), (4, 1, 4), (4, 4, 8)):
        keys = jax.random.split(jax.random.key(heads), 2)
        cache = jax.random.normal(keys[0], (rows, 24, kv_heads, 4))
        query = jax.random.normal(keys[1], (rows, 1, heads, 4))
        index = build_index(cache, jnp.full(rows, 20, jnp.int32), config)
        want = indexer_next(query, cache[:, :1], index, config)

        def step(query, key_new, index):
            return indexer_next(query, key_new, index, config)

        own = "all" if rows > 1 else None
        arguments = jax.tree.map(lambda x: put(x, own), (query, cache[:, :1], index))  # noqa: B023
        if own is None:
            arguments = put(query, None, None, "all"), *arguments[1:]
            if kind == AxisType.Explicit:
                with pytest.raises(ValueError, match="expected an axis K that 4 devices"):
                    step(*arguments)
                continue
        check_same("indexer_next", jax.jit(step)(*arguments), want)
        if own and kv_heads > 1 and kind == AxisType.Auto:  # one mesh axis for rows and for heads
            arguments = put(query, None, None, "all"), *arguments[1:]
            check_same("indexer_next", jax.jit(step)(*arguments), want)
    print(f"checked uneven heads, {kind}", flush=True)


def check_attention_gradients() -> None:
    """Gradients of what is split, and of a query that is whole while caches are split."""
    arguments = draw(PLAIN)
    mesh = jax.make_mesh((2, 2), ("rows", "heads"))
    placed = on_mesh(arguments, mesh, "rows", "heads")
    names = "query", "cache", "selection"

    def loss(query, cache, selection):
        return jnp.sum(sparse_attention(query, cache, 2 * cache, selection) ** 2)

    gradient = jax.grad(loss, (0, 1))
    want = gradient(*(arguments[name] for name in names))
    for whole in ((), ("query", "selection")):
        on_devices = placed | {
            name: jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec())),
                               arguments[name])
            for name in whole
        }  # fmt: skip
        with jax.set_mesh(mesh):  # which the backward pass of a sum needs
            got = gradient(*(on_devices[name] for name in names))
        for one, other in zip(got, want, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    print("checked gradients", flush=True)


def check_messages() -> None:
    """What cannot be split is said."""
    config = IndexerConfig(num_bits=3, heavy_size=8, sink_size=4, window_size=4)
    arguments = draw(config)
    mesh = jax.make_mesh((2, 2), ("rows", "heads"))

    def put(x, *axes):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    x, index = arguments, arguments["index"]
    of_tokens = jax.tree.map(lambda x: put(x, *[None] * (x.ndim - 1), "rows"), index.codes)
    for call, message in (
        (lambda: build_index(put(x["cache"], None, "rows"), x["lengths"], config),
         "key: expected none but axes B, K and N to be split over devices, got S split over rows"),
        (lambda: select(x["query"], PQIndex(index.codebooks, of_tokens, index.lengths), config),
         r"index.codes: expected none but axes B, K and N .* got S split"),
        (lambda: sparse_attention(x["query"], put(x["cache"], None, "rows"), x["cache"],
                                  x["selection"]),
         "key: expected none but axes B, K and N .* got S split"),
        (lambda: select(put(x["query"], None, None, "rows"), jax.tree.map(
            lambda a: put(a, "rows"), index), config),
         "query: expected heads to be split over other axes of the mesh than rows are in index"),
        (lambda: append(index, put(x["key_new"], "rows"), config, counts=put(x["counts"], "heads")),
         "counts: expected axis B to be split over rows, as in key_new, got heads"),
        (lambda: select(put(x["query"][:, :, :1], None, None, None), jax.tree.map(
            lambda a: put(a[:, :1] if a.ndim > 1 else a), index), config), None),
    ):  # fmt: skip
        if message is None:
            call()
            continue
        with pytest.raises(ValueError, match=message):
            call()
    print("checked messages", flush=True)


SIZES = {"heavy_size": 8, "sink_size": 4, "window_size": 4, "kmeans_iters": 3}
PLAIN = IndexerConfig(num_bits=3, **SIZES)
OTHER = IndexerConfig(num_bits=2, cells=True, metric="ip", train_tokens=64, **SIZES)


def print_times(steps: int = 200) -> None:
    """Microseconds a step by the wall clock, in a scan over steps of a 128k context, 4 rows."""
    config = IndexerConfig(cells=True)
    rows, kv_heads, heads, dimensions, capacity = 4, 8, 32, 128, 131072
    keys = jax.random.split(jax.random.key(0), 4)
    codes = jax.random.randint(keys[0], (rows, kv_heads, 2, capacity), 0, 64).astype(jnp.uint8)
    index = PQIndex(
        codebooks=jax.random.normal(keys[1], (rows, kv_heads, 2, 64, dimensions // 2)),
        codes=codes,
        lengths=jnp.full(rows, capacity - 20 * steps, jnp.int32),
    )
    arguments = {
        "index": with_cells(index, config),
        "query": jax.random.normal(keys[2], (rows, 1, heads, dimensions), jnp.bfloat16),
        "key_new": jax.random.normal(keys[3], (rows, 1, kv_heads, dimensions), jnp.bfloat16),
    }

    def decode(x):
        def step(index, _):
            selection, index = indexer_next(x["query"], x["key_new"], index, config)
            return index, selection.counts

        index, _ = jax.lax.scan(step, x["index"], None, steps)
        return x | {"index": index}

    def time_of(function, x) -> float:
        run = jax.jit(function, donate_argnums=0)
        x, best = jax.block_until_ready(run(x)), np.inf
        for _ in range(5):
            start = time.perf_counter()
            x = jax.block_until_ready(run(x))
            best = min(best, time.perf_counter() - start)
        return 1e6 * best / steps

    one = jax.tree.map(jnp.copy, arguments)  # which are given away
    print(f"{jax.devices()[0].device_kind}, one device: {time_of(decode, one):.1f} us a step")
    devices = jax.device_count()
    for split in ("batch", "heads"):
        rows, heads = SPLITS[split]
        for kind in (AxisType.Explicit, AxisType.Auto):
            sizes = {"batch": (devices, 1), "heads": (1, devices)}[split]
            mesh = jax.make_mesh(sizes, ("rows", "heads"), axis_types=(kind, kind))
            placed = on_mesh(arguments, mesh, rows, heads)
            found = time_of(lambda x: decode(x), jax.tree.map(jnp.copy, placed))
            print(f"{devices} devices by {split}, {kind} axes, jit: {found:.1f} us a step")
        specs = jax.tree.map(lambda x: x.sharding.spec, placed)
        mapped = jax.shard_map(decode, mesh=mesh, in_specs=(specs,), out_specs=specs)
        found = time_of(mapped, jax.tree.map(jnp.copy, placed))
        print(f"{devices} devices by {split}, shard_map: {found:.1f} us a step")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("Explicit", "Auto", "time"))
    what = parser.parse_args().what
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    if what == "time":
        print_times()
    else:
        kind = getattr(AxisType, what)
        # On Auto axes a plain call is one under the function's own jit.
        plainly = functions(PLAIN) if kind == AxisType.Explicit else ("build_index", "indexer_next")
        check(kind, PLAIN, ("both",), plainly=tuple(plainly))
        check(kind, OTHER, ("heads",), plainly=())
        check_uneven(kind)
        if kind == AxisType.Explicit:
            check_attention_gradients()
            check_messages()
