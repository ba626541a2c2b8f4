"""Every function on arrays that are split over devices, against the same on one device.

    python -m parity.meshes Explicit    # or Auto; four devices
    python -m parity.meshes time        # two GPUs or more

Called plainly and under jit, split by batch, by kv heads, and by both. A process of its own, since
the number of host devices is fixed when JAX starts.
"""

import argparse
import dataclasses
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
    DecodeCache,
    IndexerConfig,
    PQIndex,
    append,
    build_index,
    decode_attention,
    indexer_next,
    prefill,
    rebuild,
    rebuild_gain,
    reset,
    select,
    sparse_attention,
    with_cells,
)
from jax_indexer.kernels import backend

B, K, G, H, S, LAYERS = 4, 4, 2, 16, 256, 2
TRAINED = ("build_index", "rebuild", "prefill of layers")
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
    one = DecodeCache(cache, 2 * cache, index)
    layers = jax.tree.map(lambda x: np.stack([x] * LAYERS), one)
    return {
        "cache": cache, "lengths": lengths, "index": index, "query": query, "key_new": key_new,
        "selection": selection, "rows": rows, "counts": counts, "one": one, "layers": layers,
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
        "decode_attention": lambda x: decode_attention(
            x["query"], x["key_new"], x["key_new"], x["one"], config, counts=x["counts"]
        ),
    } | {
        f"{name} of layers": function for name, function in functions_of_layers(config).items()
    }  # fmt: skip


def functions_of_layers(config: IndexerConfig) -> dict[str, Callable]:
    """Likewise, for a layer of several."""

    def decode(x):
        new = x["key_new"]
        return decode_attention(x["query"], new, new, x["layers"], config, layer=1)

    def attend(x):
        of_layer = {"layer": 1, "return_lse": True}
        caches = x["layers"].key, x["layers"].value
        return sparse_attention(x["query"], *caches, x["selection"], **of_layer)

    def fill(x):
        prompt = x["cache"][:, :150], x["cache"][:, :150]
        options = {"cache": x["layers"], "rows": x["rows"], "layer": 0}
        return prefill(*prompt, x["lengths"], config, **options)

    return {
        "decode_attention": decode,
        "sparse_attention": attend,
        "append": lambda x: append(x["layers"].index, x["key_new"], config, layer=1),
        "indexer_next": lambda x: indexer_next(
            x["query"], x["key_new"], x["layers"].index, config, layer=1
        ),
        "reset": lambda x: reset(x["layers"].index, x["rows"]),
    } | ({"with_cells": lambda x: with_cells(x["layers"].index, config)} if config.cells
         else {"prefill": fill})  # fmt: skip


def specs_of(value: Any, rows: str | None, heads: str | None, *, stacked: bool = False) -> Any:
    """How the arrays of an argument or a result are split."""
    lead = (None,) * stacked
    if isinstance(value, PQIndex):
        return jax.tree.map(
            lambda x: PartitionSpec(*lead, rows, *[heads] * (x.ndim > 1 + stacked)), value
        )
    if isinstance(value, DecodeCache):
        cache, index = PartitionSpec(*lead, rows, None, heads), value.index
        return DecodeCache(cache, cache, specs_of(index, rows, heads, stacked=stacked))
    if isinstance(value, tuple):
        return tuple(specs_of(x, rows, heads, stacked=stacked) for x in value)
    return jax.tree.map(
        lambda x: PartitionSpec(rows) if x.ndim == 1 else PartitionSpec(rows, None, heads), value
    )


def on_mesh(arguments: dict, mesh, rows: str | None, heads: str | None) -> dict:
    """The same arguments, split."""

    def put(x, spec):
        return jax.device_put(x, NamedSharding(mesh, spec))

    return {
        name: jax.tree.map(put, value, specs_of(value, rows, heads, stacked=name == "layers"))
        for name, value in arguments.items()
    }


def check_same(name: str, got, want) -> None:
    """Exact, but for what is trained or attended in floats."""
    assert jax.tree.structure(got) == jax.tree.structure(want), name
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        if jnp.issubdtype(one.dtype, jnp.floating):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5, err_msg=name)
        elif name in (
            "build_index",
            "rebuild",
            "prefill of layers",
        ):  # near ties may fall elsewhere
            assert (np.asarray(one) == np.asarray(other)).mean() > 0.99, (name, path)
        else:
            np.testing.assert_array_equal(one, other, err_msg=f"{name} {path}")


def check_split(name: str, got, mesh, rows: str | None, heads: str | None) -> None:
    """Results lie where the arguments do."""
    specs = specs_of(got, rows, heads, stacked=name.endswith("of layers"))
    for x, spec in zip(jax.tree.leaves(got), jax.tree.leaves(specs), strict=True):
        wanted = NamedSharding(mesh, spec)
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


def check_kernels(kind: AxisType, config: IndexerConfig) -> None:
    """Kernels in the interpreter, on stacked layers, inside a shard_map of the caller's own.

    The interpreter knows nothing of what varies over which axes; of that the types alone are looked
    at, of the kernels and of what they are instead of.
    """
    arguments = {name: draw(config)[name] for name in ("query", "key_new", "layers", "selection")}
    mesh = jax.make_mesh((2, 2), ("rows", "heads"), axis_types=(kind, kind))
    specs = {
        name: specs_of(value, "rows", "heads", stacked=name == "layers")
        for name, value in arguments.items()
    }
    out_specs = specs["query"], specs["query"], specs["layers"]

    def run(x, implementation, selector):
        new, by = x["key_new"], {"implementation": implementation, "layer": 1}
        caches = x["layers"].key, x["layers"].value
        attended = sparse_attention(x["query"], *caches, x["selection"], **by)
        step = x["query"], new, new, x["layers"], config
        out, cache = decode_attention(*step, selector=selector, **by)
        return out, attended, cache

    placed = on_mesh(arguments, mesh, "rows", "heads")
    whole = functools.partial(run, implementation=None, selector=None)
    jax.eval_shape(jax.shard_map(whole, mesh=mesh, in_specs=(specs,), out_specs=out_specs), placed)
    kernels = functools.partial(
        run, implementation="triton", selector="cells" if config.cells else "threshold"
    )
    with backend.interpreted():
        want = jax.jit(kernels)(arguments)
        mapped = jax.shard_map(
            kernels, mesh=mesh, in_specs=(specs,), out_specs=out_specs, check_vma=False
        )
        got = jax.jit(mapped)(placed)
    check_same("kernels", got, want)
    check_split("kernels of layers", got[2], mesh, "rows", "heads")
    print(f"checked kernels, {kind}", flush=True)


def check_attention_gradients(kind: AxisType) -> None:
    """Gradients of what is split, and of a query that is whole while caches are split."""
    arguments = draw(PLAIN)
    mesh = jax.make_mesh((2, 2), ("rows", "heads"), axis_types=(kind, kind))
    placed = on_mesh(arguments, mesh, "rows", "heads")
    names = "query", "cache", "layers", "selection"

    def loss(query, cache, layers, selection):
        of_layer = sparse_attention(query, layers.key, layers.value, selection, layer=1)
        return jnp.sum(sparse_attention(query, cache, 2 * cache, selection) ** 2 + of_layer)

    def gradient(query, cache, layers, selection):
        def of_floats(query, cache, key):
            return loss(query, cache, dataclasses.replace(layers, key=key), selection)

        return jax.grad(of_floats, (0, 1, 2))(query, cache, layers.key)

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
    print(f"checked gradients, {kind}", flush=True)


def check_messages() -> None:
    """What cannot be split is said."""
    config = IndexerConfig(num_bits=3, heavy_size=8, sink_size=4, window_size=4)
    arguments = draw(config)
    mesh = jax.make_mesh((2, 2), ("rows", "heads"))

    def put(x, *axes):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    x, index, layers = arguments, arguments["index"], arguments["layers"]
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
        (lambda: append(jax.tree.map(lambda a: put(a, "rows"), layers.index), x["key_new"], config,
                        layer=1),
         "index.codebooks: expected none but axes B, K and N .* got layers split over rows"),
        (lambda: decode_attention(
            x["query"], x["key_new"], x["key_new"],
            dataclasses.replace(layers, value=put(layers.value, "heads")), config, layer=1),
         "value: expected none but axes B, K and N .* got layers split over heads; gather it with"),
        (lambda: sparse_attention(x["query"], put(layers.key, "rows"), layers.value,
                                  x["selection"], layer=1),
         "key: expected none but axes B, K and N .* got layers split over rows"),
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
        check_kernels(kind, PLAIN if kind == AxisType.Explicit else OTHER)
        check_attention_gradients(kind)
        if kind == AxisType.Explicit:
            check_messages()
