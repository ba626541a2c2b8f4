"""Rows whose positions are split over devices, against the same on one device.

    python -m parity.sequence lists      # eight host devices: boundaries, ties, layouts, layers
    python -m parity.sequence life       # hundreds of steps, rows that end and start, cells
    python -m parity.sequence training   # codebooks
    python -m parity.sequence gradients  # of attention
    python -m parity.sequence kernels    # in the interpreter
    python -m parity.sequence programs   # collectives, copies, compiling; messages: wrong use
    python -m parity.sequence meshes --number 100
    python -m parity.sequence hosts      # two processes of two devices each

A process of its own, since the number of host devices is fixed when JAX starts. Inputs are small
integers, so that scores are exact and most of them tie.
"""

import argparse
import contextlib
import dataclasses
import functools
import math
import os
import re
import socket
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_indexer import (
    DecodeCache,
    IndexerConfig,
    PQIndex,
    append,
    build_index,
    decode_attention,
    empty_cache,
    indexer_next,
    partition_specs,
    prefill,
    prefill_chunk,
    rebuild,
    rebuild_gain,
    reset,
    select,
    sparse_attention,
    truncate,
    with_cells,
)
from jax_indexer.kernels import backend
from jax_indexer.state import MOST_NEW, Sealing
from parity.test_cells import check_state, sealed_anew

AXES = "rows", "heads", "tokens"
SMALL = {"num_bits": 2, "heavy_size": 8, "sink_size": 4, "window_size": 4, "kmeans_iters": 3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes by the letters of CONTRACT.md, and how arrays are split.

    Attributes:
      config, kv_layout: of the index and the cache.
      B, T, K, G, H, S: sizes; G query heads share a kv head.
      steps: of decoding.
      layers: that share the arrays, of which the last is used; None for one without an axis.
      mesh: devices along rows, heads and tokens.
      with_counts: whether rows take some of a step's tokens.
      ended: how often a row ends before a step.
      sealing: of cells, where it is another than a cache of this size has.
    """

    config: IndexerConfig
    kv_layout: str = "BSKH"
    B: int = 2
    T: int = 1
    K: int = 2
    G: int = 2
    H: int = 8
    S: int = 128
    steps: int = 2
    layers: int | None = None
    mesh: tuple[int, int, int] = (1, 1, 4)
    with_counts: bool = False
    ended: float = 0.2
    sealing: Sealing | None = None

    def devices(self) -> jax.sharding.Mesh:
        devices = np.asarray(jax.devices()[: math.prod(self.mesh)]).reshape(self.mesh)
        return jax.sharding.Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)

    @property
    def layer(self) -> int | None:
        return None if self.layers is None else self.layers - 1


def boundaries(case: Case, rng: np.random.Generator) -> np.ndarray:
    """Lengths of rows: 0, 1, full, short contexts, and about where one device ends."""
    part, short = case.S // case.mesh[2], case.config.short_context(case.T)
    edges = [e * part + d for e in range(1, case.mesh[2] + 1) for d in (-case.T, -1, 0, 1)]
    edges += [0, 1, case.S, short, short + 1, short + case.T, case.S - case.T]
    return rng.choice(np.clip(edges, 0, case.S), case.B).astype(np.int32)


def draw(case: Case, seed: int) -> dict[str, Any]:
    """A cache, without cells, and what its steps bring: all small integers."""
    rng = np.random.default_rng(seed)
    config, (B, T, K, S, H) = case.config, (case.B, case.T, case.K, case.S, case.H)
    M, augmented = config.num_subspaces, config.metric == "ip"

    def integers(*shape):
        return rng.integers(-1, 2, shape).astype(np.float32)

    def tokens(number):
        return (B, number, K, H) if case.kv_layout == "BSKH" else (B, K, number, H)

    index = PQIndex(
        codebooks=integers(B, K, M, config.num_centroids, H // M + augmented),
        codes=rng.integers(0, 256, (B, K, M, S)).astype(np.uint8),
        lengths=boundaries(case, rng),
        phi=np.full((B, K, M), 64, np.float32) if augmented else None,
    )
    cache = DecodeCache(integers(*tokens(S)), integers(*tokens(S)), index)
    if case.layers is not None:
        cache = jax.tree.map(lambda x: np.stack([x] * case.layers), cache)
    counts = rng.integers(-1, T + 2, (case.steps, B)).astype(np.int32)
    return {
        "cache": cache,
        "query": integers(case.steps, B, T, K * case.G, H),
        "key": integers(case.steps, *tokens(T)),
        "value": integers(case.steps, *tokens(T)),
        "counts": counts if case.with_counts else None,
        "ended": rng.random((case.steps, B)) < case.ended,
    }


def made(index: PQIndex, case: Case, axis: str | None) -> PQIndex:
    """The index with cells, sealed as the case says."""
    if case.sealing is None:
        return with_cells(index, case.config, sequence_axis=axis)
    return sealed_anew(index, case.config, case.sealing, sequence_axis=axis)


def decode(x: dict[str, Any], case: Case, axis: str | None, **options: Any) -> dict[str, Any]:
    """Steps of decoding, and what each of them selects and attends to, in a scan."""
    config, by = case.config, {"layer": case.layer, "sequence_axis": axis}
    cache = x["cache"]
    if config.cells:
        cache = dataclasses.replace(cache, index=made(cache.index, case, axis))

    def step(cache, x):
        index = reset(cache.index, x["ended"], **by)
        cache = dataclasses.replace(cache, index=index)
        layout, counts = {"kv_layout": case.kv_layout}, x["counts"]
        before, of_index = cache, {k: v for k, v in options.items() if k != "attends"}
        out, cache = decode_attention(
            x["query"], x["key"], x["value"], cache, config, counts=counts,
            **layout, **by, **of_index,
        )  # fmt: skip
        found, index = indexer_next(
            x["query"], x["key"], before.index, config, counts=counts, return_weights=True,
            **layout, **by, **of_index,
        )  # fmt: skip
        attended, lse = sparse_attention(
            x["query"], cache.key, cache.value, found, config=config, return_lse=True,
            **layout, **by, implementation=options.get("implementation"),
        )  # fmt: skip
        offset = jnp.int32(0) if axis is None else lax.axis_index(axis) * found.capacity
        indices = jnp.where(found.indices >= 0, found.indices + offset, -1)
        same = jnp.all(index.codes == cache.index.codes) & jnp.all(
            index.lengths == cache.index.lengths
        )
        found = {
            "indices": indices,
            "counts": found.counts[..., None],
            "weights": found.weights,
            "same": same.reshape(1),
            "out": out,
            "attended": attended,
            "lse": lse,
        }
        return cache, found

    steps = {name: x[name] for name in ("query", "key", "value", "counts", "ended")}
    cache, found = lax.scan(step, cache, steps)
    bare = dataclasses.replace(
        cache, index=dataclasses.replace(cache.index, cells=None, high_water=None)
    )
    return found | {"cache": bare}


def specs(case: Case, x: dict[str, Any]) -> tuple[Any, Any]:
    """How arguments and results of `decode` are split."""
    rows, heads, tokens = AXES
    of_new = P(None, rows, None, heads) if case.kv_layout == "BSKH" else P(None, rows, heads)
    by = {"rows": rows, "heads": heads, "sequence": tokens, "kv_layout": case.kv_layout}
    cache = partition_specs(x["cache"], case.devices(), **by)
    ins = {
        "cache": cache,
        "query": P(None, rows, None, heads),
        "key": of_new,
        "value": of_new,
        "counts": P(None, rows),
        "ended": P(None, rows),
    }
    lists, whole = P(None, rows, None, heads, tokens), P(None, rows, None, heads)
    outs = dict.fromkeys(("indices", "counts", "weights"), lists)
    outs |= dict.fromkeys(("out", "attended", "lse"), whole)
    return ins, outs | {"same": P(None, AXES), "cache": cache}


def check(case: Case, seed: int = 0, *, kernels: bool = False, **options: Any) -> None:
    """Lists of the devices together are those of one, and so is all else."""
    x = draw(case, seed)
    with backend.interpreted() if kernels else contextlib.nullcontext():
        want = jax.jit(functools.partial(decode, case=case, axis=None, **options))(x)
        got = on_devices(case, x, kernels, **options)
    lists, wanted = np.asarray(got["indices"]), np.asarray(want["indices"])
    *shape, P_ = wanted.shape
    together = lists.reshape(-1, case.mesh[2], P_)
    for number, (one, other) in enumerate(zip(together, wanted.reshape(-1, P_), strict=True)):
        at = case, seed, np.unravel_index(number, shape)
        assert one[one >= 0].tolist() == other[other >= 0].tolist(), at
        counts = np.asarray(got["counts"]).reshape(-1, case.mesh[2])[number]
        for of_device, count in zip(one, counts, strict=True):
            assert ((of_device >= 0) == (np.arange(P_) < count)).all(), at
    assert np.asarray(got["same"]).all()
    np.testing.assert_array_equal(got["weights"], want["weights"])
    for name in ("out", "attended", "lse"):  # sums of float32 in another order
        np.testing.assert_allclose(got[name], want[name], rtol=2e-5, atol=2e-5, err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, got["cache"], want["cache"])


def on_devices(case: Case, x: dict[str, Any], kernels: bool, **options: Any) -> dict[str, Any]:
    """The same in a shard_map."""
    in_specs, out_specs = specs(case, x)
    run = functools.partial(decode, case=case, axis="tokens", **options)
    # The interpreter knows nothing of what varies over which axes.
    mapped = jax.shard_map(
        run, mesh=case.devices(), in_specs=(in_specs,), out_specs=out_specs, check_vma=not kernels
    )
    found = jax.jit(mapped)(x)
    if jax.process_count() > 1:
        found = multihost_utils.process_allgather(found, tiled=True)
    return found


def config_of(**changes: Any) -> IndexerConfig:
    return IndexerConfig(**(SMALL | changes))


def check_lists() -> None:
    """Every boundary, ties, several tokens, layouts, layers, and meshes of one to three axes."""
    for number, (changes, case) in enumerate((
        ({}, {"B": 8, "steps": 3}),
        ({"window_size": 0, "init_offset": 20}, {"B": 8, "T": 3, "with_counts": True}),
        ({"heavy_size": 40, "num_bits": 1}, {"B": 8, "mesh": (2, 1, 4), "layers": 2}),
        ({"heavy_size": 0, "sink_size": 0}, {"B": 4, "mesh": (2, 2, 2), "kv_layout": "BKSH"}),
        ({"cells": True, "metric": "ip"}, {"B": 4, "mesh": (1, 2, 4), "steps": 4}),
        ({"cells": True, "window_size": 40}, {"B": 4, "T": 9, "mesh": (1, 1, 8), "layers": 2,
                                              "kv_layout": "BKSH", "with_counts": True}),
    )):  # fmt: skip
        check(Case(config=config_of(**changes), **case), number)
    print("checked lists", flush=True)


def check_kernels() -> None:
    """The same by kernels in the interpreter, with every selector."""
    for number, (selector, changes, case) in enumerate((
        ("threshold", {}, {"B": 4}),
        ("threshold", {"window_size": 40, "heavy_size": 20}, {"B": 4, "T": 3, "with_counts": True}),
        ("top_k", {"table_dtype": jnp.bfloat16}, {"B": 4, "layers": 2, "kv_layout": "BKSH"}),
        ("cells", {"cells": True}, {"B": 4, "mesh": (2, 2, 2), "steps": 3}),
        ("cells", {"cells": True, "heavy_size": 200}, {"B": 2, "layers": 2, "S": 1024}),
    )):  # fmt: skip
        case = Case(config=config_of(**changes), **case)
        check(case, number, kernels=True, selector=selector)
    print("checked kernels", flush=True)


def check_life(
    steps: int = 406, *, devices: int = 4, ended: float = 0.005, every: int = 7,
    kernels: bool = False,
) -> None:  # fmt: skip
    """Rows grow, end and start again; the state of cells is always what codes and lengths say."""
    config = config_of(cells=True)
    # With 3 tokens a step, and up to 64 in lists, no segment is counted before the last is sealed.
    sealing = Sealing(config.first_candidate, config.window_size, segment=32, block=16)
    case = Case(
        config=config, B=3, K=1, T=3, S=128 * devices, steps=steps, with_counts=True,
        mesh=(1, 1, devices), ended=ended, sealing=sealing,
    )  # fmt: skip
    x = draw(case, 0)
    lengths = np.asarray([0, case.S // 3, 3 * case.S // 4 - 14], np.int32)
    index = dataclasses.replace(x["cache"].index, lengths=lengths)
    mesh = jax.make_mesh((devices,), ("tokens",), axis_types=(AxisType.Auto,))

    def step(index, x):
        by = {"sequence_axis": "tokens"}
        index = append(reset(index, x["ended"], **by), x["key"], config, counts=x["counts"], **by)
        return index, None

    def run(index, x):
        # Some steps at once, of which the last leaves a state that is looked at.
        of_some = lambda index, x: (lax.scan(step, index, x)[0],) * 2  # noqa: E731
        return lax.scan(of_some, made(index, case, "tokens"), x)[1]

    steps_of = {name: x[name] for name in ("key", "counts", "ended")}
    steps_of = jax.tree.map(lambda a: a.reshape(-1, every, *a.shape[1:]), steps_of)
    shapes = jax.eval_shape(lambda i: with_cells(i, config), index)
    one = partition_specs(shapes, mesh, sequence="tokens")
    one = dataclasses.replace(one, cells=dataclasses.replace(one.cells, sealing=sealing))
    outs = jax.tree.map(lambda spec: P(None, *spec), one)
    with backend.interpreted() if kernels else contextlib.nullcontext():
        mapped = jax.shard_map(
            run, mesh=mesh, in_specs=(partition_specs(index, mesh, sequence="tokens"), P()),
            out_specs=outs, check_vma=not kernels,
        )  # fmt: skip
        states = jax.device_get(jax.jit(mapped)(index, steps_of))
    sealed = [0] * devices
    for number in range(len(states.lengths)):
        whole = jax.tree.map(lambda a: a[number], states)  # noqa: B023
        for device in range(devices):
            local = view_of(whole, config, device, devices)
            check_state(*local)
            cells = local[0].cells
            sealed[device] += int(np.sum(cells.sealed(local[0].high_water) > cells.base))
    # On every device rows have sealed more than was listed when they were made.
    assert min(sealed) > 0, sealed
    assert (np.diff(states.lengths, axis=0) < 0).any()
    print("checked life", flush=True)


def check_empty() -> None:
    """A cache that begins empty on each device, as the docstring of `empty_cache` says."""
    config = config_of(cells=True)
    case = Case(config=config, B=2, steps=3, mesh=(1, 1, 4))
    x = draw(case, 0)
    whole = empty_cache(config, case.B, case.S, case.K, case.H, dtype=jnp.float32)
    mesh = jax.make_mesh((4,), ("tokens",), axis_types=(AxisType.Auto,))
    specs = partition_specs(whole, mesh, sequence="tokens")

    def begin():
        zeros = jnp.zeros((case.B, case.S // 4, case.K, case.H), jnp.float32)
        lengths = jnp.zeros(case.B, jnp.int32)
        index = build_index(zeros, lengths, config, sequence_axis="tokens")
        return DecodeCache(zeros, zeros, index)

    def step(cache, new, axis=None):
        out, cache = decode_attention(*new, cache, config, sequence_axis=axis)
        return cache, out

    def run(cache, new):
        return lax.scan(functools.partial(step, axis="tokens"), cache, new)[1]

    new = x["query"], x["key"], x["value"]
    want = jax.jit(lambda cache, new: lax.scan(step, cache, new)[1])(whole, new)
    cache = jax.jit(jax.shard_map(begin, mesh=mesh, in_specs=(), out_specs=specs))()
    bare, of_whole = (dataclasses.replace(c.index, cells=None) for c in (cache, whole))
    jax.tree.map(np.testing.assert_array_equal, bare, of_whole)
    got = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(specs, P()), out_specs=P()))(cache, new)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    print("checked empty", flush=True)


def view_of(
    index: PQIndex, config: IndexerConfig, device: int, devices: int
) -> tuple[PQIndex, IndexerConfig]:
    """What a device holds, as an index of one device: behind its last token there are none."""
    cells, kept = index.cells, index.cells.sealing
    part = index.codes.shape[-1] // devices
    offset, first = device * part, int(np.clip(config.first_candidate - device * part, 0, part))
    own = {
        name: np.split(getattr(cells, name), devices, axis=-1)[device]
        for name in ("starts", "order", "earlier", "ring")
    }
    longer = ((0, 0),) * 2 + ((0, kept.margin),)
    own["order"] = np.pad(own["order"], longer)
    cells = dataclasses.replace(
        cells, **own,
        base=np.clip(cells.base - offset, 0, part),
        sealing=dataclasses.replace(kept, first_candidate=first),
    )  # fmt: skip
    codes = np.split(index.codes, devices, axis=-1)[device]
    codes = np.pad(codes, ((0, 0),) * 3 + ((0, kept.margin),))
    lengths, high_water = (
        np.clip(x - offset, 0, part + kept.margin).astype(np.int32)
        for x in (index.lengths, index.high_water)
    )
    local = PQIndex(index.codebooks, codes, lengths, cells=cells, high_water=high_water)
    return local, dataclasses.replace(config, sink_size=first, init_offset=first)


def check_training(split: tuple[int, int] = (2, 4), *, kernels: bool = False) -> None:
    """Codebooks are those of one device: to the bit where sums are exact, else to rounding.

    `split` says over how many devices heads and tokens are.
    """
    mesh = jax.make_mesh(split, ("heads", "tokens"), axis_types=(AxisType.Auto,) * 2)
    rng, shape = np.random.default_rng(0), (4, 256, 2, 8)
    lengths, rows = np.asarray([256, 130, 66, 9], np.int32), np.arange(4) != 1

    def train(key, config, axis):
        by = {"sequence_axis": axis}
        index = build_index(key, lengths, config, **by)
        other = jnp.roll(key, 1, axis=3)
        gain = rebuild_gain(index, other, config, **by)[:, None]
        again = rebuild(index, other, config, rows, **by)
        return [dataclasses.replace(x, cells=None, high_water=None) for x in (index, again)], gain

    for exact in (True, False):
        for changes in (
            {"num_bits": 3, "cells": True},
            {"num_bits": 3, "train_tokens": 40, "grouping": "strided"},
            {"num_bits": 5, "metric": "ip"},
        ):
            config = config_of(**changes)
            # Few different keys leave clusters empty. Sums of integers are exact; the coordinate
            # that "ip" adds is none.
            key = rng.integers(-1, 2, shape) if exact else rng.standard_normal(shape)
            key, exact_now = key.astype(np.float32), exact and config.metric != "ip"
            with backend.interpreted() if kernels else contextlib.nullcontext():
                # Inside a shard_map of one's own heads are counted from 0 on each device.
                want = [
                    jax.jit(lambda key, config=config: train(key, config, None))(half)
                    for half in np.split(key, 2 if split[0] > 1 else 1, axis=2)
                ]
                shapes = jax.eval_shape(lambda key, config=config: train(key, config, None), key)
                of_index = partition_specs(shapes[0][0], mesh, heads="heads", sequence="tokens")
                mapped = jax.shard_map(
                    functools.partial(train, config=config, axis="tokens"),
                    mesh=mesh,
                    in_specs=P(None, "tokens", "heads"),
                    out_specs=([of_index] * 2, P(None, "heads")),
                    check_vma=not kernels,
                )
                got = jax.jit(mapped)(key)
            for number, (indexes, gain) in enumerate(want):
                heads = slice(number, number + 1) if len(want) > 1 else slice(None)
                np.testing.assert_allclose(got[1][:, number, None], gain, atol=1e-5)
                for one, other in zip(got[0], indexes, strict=True):
                    assert one.lengths.tolist() == other.lengths.tolist()
                    own = one.codebooks[:, heads]
                    if exact_now:
                        np.testing.assert_array_equal(own, other.codebooks, err_msg=str(config))
                        np.testing.assert_array_equal(one.codes[:, heads], other.codes)
                        continue
                    np.testing.assert_allclose(own, other.codebooks, rtol=1e-4, atol=1e-5)
                    assert (one.codes[:, heads] == other.codes).mean() > 0.99
    print("checked training", flush=True)


def check_gradients() -> None:
    """Of attention, with types that say what varies and without: those of one device."""
    case = Case(config=config_of(), B=2, mesh=(2, 1, 4))
    x = draw(case, 0)
    cache, query = x["cache"], x["query"][0]
    scale, cap = np.float32(0.3), np.float32(5)

    def attend(query, key, value, scale, cap, index, axis):
        by = {"sequence_axis": axis}
        found = select(query, index, case.config, **by)
        options = {"scale": scale, "logits_soft_cap": cap, "return_lse": True}
        return sparse_attention(query, key, value, found, **options, **by)

    def slopes(attend):
        def loss(*arguments):
            out, lse = attend(*arguments, cache.index)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

        arguments = query, cache.key, cache.value, scale, cap
        return jax.jit(jax.grad(loss, argnums=range(5)))(*arguments)

    want = slopes(functools.partial(attend, axis=None))
    mesh = case.devices()
    of_cache = partition_specs(cache, mesh, rows="rows", sequence="tokens")
    whole, one = P("rows"), P()
    for check_vma in (True, False):
        mapped = jax.shard_map(
            functools.partial(attend, axis="tokens"),
            mesh=mesh,
            in_specs=(whole, of_cache.key, of_cache.value, one, one, of_cache.index),
            out_specs=whole,
            check_vma=check_vma,
        )
        for name, got, wanted in zip(
            ("query", "key", "value", "scale", "cap"), slopes(mapped), want, strict=True
        ):
            at = f"{name} check_vma={check_vma}"
            np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5, err_msg=at)
            assert np.any(got), at
    print("checked gradients", flush=True)


def check_meshes(number: int, *, kernels: bool = False) -> None:
    """Random sizes, configs and lengths on random meshes of up to eight devices."""
    for seed in range(number):
        rng = np.random.default_rng(seed)
        sizes = [
            (a, b, c) for a in (1, 2) for b in (1, 2) for c in (1, 2, 4, 8) if 1 < a * b * c <= 8
        ]
        mesh = sizes[rng.integers(len(sizes))]
        T = int(rng.choice([1, 1, 2, 9]))
        config = config_of(
            num_bits=int(rng.integers(1, 4)),
            heavy_size=int(rng.integers(0, 30)),
            sink_size=int(rng.integers(0, 12)),
            window_size=int(rng.integers(0, 40)),
            init_offset=[None, 0, 21][rng.integers(3)],
            metric=["euclidean", "ip"][rng.integers(2)],
            cells=bool(rng.integers(2)),
        )
        case = Case(
            config=config,
            kv_layout=["BSKH", "BKSH"][rng.integers(2)],
            B=2 * int(rng.integers(1, 4)),
            T=T,
            G=int(rng.integers(1, 4)),
            S=mesh[2] * int(rng.integers(9, 40)),
            layers=[None, 2][rng.integers(2)],
            mesh=mesh,
            with_counts=bool(rng.integers(2)),
        )
        if kernels:
            by = "cells" if config.cells and T <= MOST_NEW else "threshold"
            check(case, seed, kernels=True, selector=by)
        else:
            check(case, seed)
        jax.clear_caches()
    print(f"checked {number} meshes", flush=True)


COLLECTIVE = re.compile(
    r"= \(?(\w+)\[([\d,]*)\]\S*(?:, \S+\))? "
    r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


def check_programs() -> None:
    """What is exchanged is what docstrings say; nothing is copied, and one program does for all."""
    config = config_of()
    case = Case(config=config, B=2, steps=1, mesh=(1, 1, 4))
    x, part = draw(case, 0), case.S // 4
    mesh = jax.make_mesh((4,), ("tokens",), axis_types=(AxisType.Auto,))
    cache = partition_specs(x["cache"], mesh, sequence="tokens")
    queries, whole = case.B * case.K * case.G, P()

    def step(cache, query, key, value):
        return decode_attention(query, key, value, cache, config, sequence_axis="tokens")

    def choose(cache, query):
        return select(query, cache.index, config, sequence_axis="tokens").counts[..., None]

    def grow(cache, key):
        return append(cache.index, key, config, sequence_axis="tokens")

    def start(cache, rows):
        return reset(cache.index, rows, sequence_axis="tokens")

    def compiled(function, outs, *arguments):
        mapped = jax.shard_map(
            function, mesh=mesh, in_specs=(cache, *[whole] * len(arguments)), out_specs=outs
        )
        put = lambda a, s: jax.device_put(a, NamedSharding(mesh, s))  # noqa: E731
        placed = jax.tree.map(put, x["cache"], cache)
        program = jax.jit(mapped, donate_argnums=0)
        text = program.lower(placed, *arguments).compile().as_text()
        return program, placed, text

    def exchanged(text: str) -> list[tuple[str, int]]:
        """Collectives, and the bytes that a device gives to each."""
        return [
            (name, 4 * math.prod(map(int, sizes.split(","))) // 4)  # numbers, of four devices
            for dtype, sizes, name in COLLECTIVE.findall(text)
            if dtype in ("f32", "s32")
        ]

    new = x["query"][0], x["key"][0], x["value"][0]
    program, placed, text = compiled(step, (whole, cache), *new)
    cut, merge = 4 * queries * config.heavy_size, 4 * queries * (case.H + 1)
    assert sorted(exchanged(text)) == sorted([("all-gather", cut), ("all-gather", merge)])
    # A CPU's scatter copies codes; keys and values, which take the memory, stay where they are.
    of_cache = rf"f32\[{case.B},{part},{case.K},{case.H}\]"
    assert re.search(of_cache, text)
    assert not re.findall(rf"{of_cache}\S* copy\(", text)
    sizes = []
    for _ in range(4):  # the first step's arrays are written otherwise than its results
        _, placed = program(placed, *new)
        sizes.append(program._cache_size())
    assert sizes[1:] == [sizes[1]] * 3
    found = exchanged(compiled(choose, P(None, None, None, "tokens"), new[0])[2])
    assert found == [("all-gather", cut)], found
    for function, argument in ((grow, new[1]), (start, np.ones(case.B, bool))):
        assert not COLLECTIVE.findall(compiled(function, cache.index, argument)[2])

    # What trains: a loop's body counts once.
    books, C, D = case.B * case.K * config.num_subspaces, config.num_centroids, case.H // 2
    counts, origin, iteration = 4 * books, 4 * D * 63 * books, 4 * C * (D + 1)

    def train(cache):
        return build_index(cache.key, cache.index.lengths, config, sequence_axis="tokens").codebooks

    def gain(cache):
        return rebuild_gain(cache.index, cache.key, config, sequence_axis="tokens")

    first, of_empty = 4 * D * C * books, iteration + 4
    for function, want in (
        (train, counts + first + origin + books * iteration + of_empty),
        (gain, counts + origin + books * iteration + 8 * books),
    ):
        text = compiled(function, whole)[2]
        assert given(text) == want, (function.__name__, given(text), want)
    print("checked programs", flush=True)


def given(text: str) -> int:
    """Bytes that one of four devices gives to the collectives of a program, of 32-bit numbers."""
    total = 0
    for line in text.splitlines():
        if found := COLLECTIVE.search(line):
            shapes = re.findall(r"[fs]32\[([\d,]*)\]", found[0])
            sizes = (math.prod(int(n) for n in shape.split(",") if n) for shape in shapes)
            total += 4 * sum(sizes) // (4 if found[3] == "all-gather" else 1)
    return total


def check_messages() -> None:
    """Wrong use is said, before anything is compiled."""
    config, cells = config_of(), config_of(cells=True)
    case = Case(config=config, steps=1)
    x = draw(case, 0)
    cache, query, key = x["cache"], x["query"][0], x["key"][0]
    mesh = jax.make_mesh((2, 4), ("rows", "tokens"), axis_types=(AxisType.Auto,) * 2)
    specs_of_cache = partition_specs(cache, mesh, sequence="tokens")
    selection = select(query, dataclasses.replace(cache.index, codes=cache.index.codes[..., :32]),
                       config)  # fmt: skip

    def on(function, **options):
        return jax.eval_shape(
            jax.shard_map(
                function, mesh=mesh, in_specs=(specs_of_cache,), out_specs=P(), **options
            ),
            cache,
        )

    def decode_(cache, axis, config=config, query=query):
        return decode_attention(query, key, key, cache, config, sequence_axis=axis)[0]

    def apart(cache):
        lengths = cache.index.lengths + lax.axis_index("tokens")
        return dataclasses.replace(cache, index=dataclasses.replace(cache.index, lengths=lengths))

    split = "differs over 'tokens'; pass sequence_axis='tokens' if its tokens are split over that"
    for function, error, message in (
        # S sharded without saying so.
        (lambda c: decode_(c, None), ValueError, f"cache.key: .*{split}"),
        (lambda c: select(query, c.index, config), ValueError, f"index.codes: .*query.*{split}"),
        (lambda c: append(c.index, key, config), ValueError, f"index.codes: .*key_new.*{split}"),
        (lambda c: indexer_next(query, key, c.index, config), ValueError, split),
        (lambda c: sparse_attention(query, c.key, c.value, selection), ValueError,
         f"key: .*{split}"),
        (lambda c: prefill_chunk(key, key, c.index.lengths, c, config).key, ValueError,
         "cache.key: .*differs over 'tokens'; make the cache as DecodeCache.*build_index"),
        # An axis that is not there.
        (lambda c: decode_(c, "heads"), ValueError,
         r"sequence_axis: .*there are \['rows', 'tokens'\], got 'heads'; use one of these"),
        (lambda c: reset(c.index, np.ones(2, bool), sequence_axis=3), ValueError,
         "sequence_axis: .*got 3"),
        (lambda c: build_index(c.key, c.index.lengths, config, sequence_axis="heads"), ValueError,
         "sequence_axis: .*got 'heads'"),
        (lambda c: with_cells(c.index, cells, sequence_axis=("tokens",)), ValueError,
         r"sequence_axis: .*got \('tokens',\)"),
        # What is to be whole differs.
        (lambda c: decode_(c, "tokens", query=lax.pcast(query, "tokens", to="varying")), ValueError,
         "query: expected the same on all devices along sequence_axis='tokens'"),
        (lambda c: build_index(c.key, c.index.lengths + lax.axis_index("tokens"), config,
                               sequence_axis="tokens"), ValueError, "lengths: expected the same"),
        (lambda c: decode_(apart(c), "tokens"), ValueError,
         "cache.index.lengths: expected the same on all devices along sequence_axis='tokens'"),
        *(
            (f, ValueError, "^index.lengths: expected the same on all devices along seq.*in_specs")
            for f in (
                lambda c: select(query, apart(c).index, config, sequence_axis="tokens"),
                lambda c: append(apart(c).index, key, config, sequence_axis="tokens"),
                lambda c: indexer_next(query, key, apart(c).index, config, sequence_axis="tokens"),
                lambda c: rebuild_gain(apart(c).index, c.key, config, sequence_axis="tokens"),
                lambda c: rebuild(apart(c).index, c.key, config, np.ones(2, bool),
                                  sequence_axis="tokens"),
                lambda c: reset(apart(c).index, np.ones(2, bool), sequence_axis="tokens"),
                lambda c: with_cells(apart(c).index, cells, sequence_axis="tokens"),
            )
        ),
        *(
            (f, ValueError, "^lengths: expected the same on all devices that share rows, as .*"
             "index.lengths.* differ over 'tokens'")
            for f in (
                lambda c: truncate(c, apart(c).index.lengths),
                lambda c: truncate(c.index, apart(c).index.lengths),
            )
        ),
        # What is not there yet.
        (lambda c: decode_(c, "tokens", dataclasses.replace(config, rerank=2)), NotImplementedError,
         "sequence_axis: rerank=2 needs an exchange of true logits, .* do without rerank, or"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            on(function)
    with pytest.raises(ValueError, match="call it inside a jax"):
        decode_(cache, "tokens")
    with pytest.raises(ValueError, match="state: expected a PQIndex"):
        partition_specs(key, mesh)
    for wrong in (None, "tokens"):
        with pytest.raises(ValueError, match=r"^mesh: expected a .*Mesh, got .*make_mesh"):
            partition_specs(cache, wrong, sequence="tokens")
    abstract = jax.sharding.AbstractMesh((2, 4), ("rows", "tokens"))
    assert partition_specs(cache, abstract, sequence="tokens") == specs_of_cache
    with pytest.raises(ValueError, match=r"sequence: .* axes \('rows', 'tokens'\), got 'heads'"):
        partition_specs(cache, mesh, sequence="heads")
    with pytest.raises(ValueError, match=r"sequence: .* than rows has, got 'tokens' for both"):
        partition_specs(cache, mesh, rows="tokens", sequence="tokens")
    with pytest.raises(ValueError, match="kv_layout: expected one of"):
        partition_specs(cache, mesh, sequence="tokens", kv_layout="BHSK")
    head_first = dataclasses.replace(cache, key=np.swapaxes(cache.key, 1, 2))
    in_pages = dataclasses.replace(cache, key=np.zeros((8, 32, case.K, case.H), np.float32))
    for other, size in ((head_first, case.K), (in_pages, 32)):
        with pytest.raises(ValueError, match=rf"state\.key: .*S=128 .*got S={size} with kv_layout"):
            partition_specs(other, mesh, sequence="tokens")
    uneven = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct([126 if n == 128 else n for n in x.shape], x.dtype), cache
    )
    with pytest.raises(ValueError, match=r"state\.key: .* axis S that 4 devices \(tokens\) can"):
        partition_specs(uneven, mesh, sequence="tokens")
    uneven = dataclasses.replace(cache, key=cache.key[:, :126])
    # Without types an index that was made whole knows.
    known = dataclasses.replace(cache, index=dataclasses.replace(cache.index, capacity=case.S))
    specs_of_cache = partition_specs(known, mesh, sequence="tokens")
    of_part = r"codes: expected S=128 .* got S=32; pass sequence_a"
    lists = lambda c: select(query, c.index, config, sequence_axis="tokens")  # noqa: E731
    for function, message in (
        (lambda c: decode_(c, None), of_part),
        (lambda c: select(query, c.index, config), of_part),
        (lambda c: append(c.index, key, config), of_part),
        (lambda c: rebuild(c.index, c.key, config, np.ones(2, bool)), of_part),
        (lambda c: rebuild_gain(c.index, c.key, config), of_part),
        (lambda c: reset(c.index, np.ones(2, bool)), of_part),
        (lambda c: with_cells(c.index, cells), of_part),
        (lambda c: sparse_attention(query, c.key, c.value, lists(c)),
         r"sequence_axis: expected 'tokens', over which .* None"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(
                jax.shard_map(
                    function, mesh=mesh, in_specs=(specs_of_cache,), out_specs=P(), check_vma=False
                ),
                known,
            )
    # A part of a prompt goes into no cache: there is no sequence_axis to advise.
    built = "make the cache as DecodeCache.*build_index.*sequence_axis"
    for function in (
        lambda c: prefill(key, key, c.index.lengths, config, cache=c).key,
        lambda c: prefill(x["cache"].key, x["cache"].value, c.index.lengths, config, cache=c).key,
        lambda c: prefill_chunk(key, key, c.index.lengths, c, config).key,
    ):
        with pytest.raises(ValueError, match=f"cache.index.codes: expected S=128 .*; {built}"):
            jax.eval_shape(
                jax.shard_map(
                    function, mesh=mesh, in_specs=(specs_of_cache,), out_specs=P(), check_vma=False
                ),
                known,
            )
    # An index that knows another split: of a device's part, or over another axis.
    alone = lambda c: build_index(c.key, c.index.lengths, config)  # noqa: E731
    for make, axis, got in (
        (alone, "tokens", "S=32/4 .* got S=32"),
        (lambda c: c.index, "rows", "S=128/2 .* got S=32"),
    ):
        advice = rf"codes: expected {got}; split S over '{axis}' .*sequence_axis='{axis}' too"
        with pytest.raises(ValueError, match=advice):
            jax.eval_shape(
                jax.shard_map(
                    lambda c, make=make, axis=axis: select(
                        query, make(c), config, sequence_axis=axis
                    ),
                    mesh=mesh, in_specs=(specs_of_cache,), out_specs=P(), check_vma=False,
                ),
                known,
            )  # fmt: skip
    specs_of_cache = partition_specs(cache, mesh, sequence="tokens")
    # S that the devices cannot share is refused by shard_map itself too.
    with pytest.raises(ValueError, match="evenly divisible"):
        jax.shard_map(lambda c: c.key, mesh=mesh, in_specs=(specs_of_cache,),
                      out_specs=P(None, "tokens"))(uneven)  # fmt: skip
    # On Explicit axes a split S is refused without a shard_map.
    explicit = jax.make_mesh((8,), ("tokens",))
    codes = jax.device_put(
        cache.index.codes, NamedSharding(explicit, P(None, None, None, "tokens"))
    )
    with pytest.raises(ValueError, match="expected none but axes B, K and N"):
        select(query, dataclasses.replace(cache.index, codes=codes), config)
    print("checked messages", flush=True)


def run_host(rank: int, port: int) -> None:
    """One of two processes that share a row."""
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
    assert (jax.device_count(), jax.local_device_count()) == (4, 2)
    for number, mesh in enumerate([(1, 1, 4), (2, 1, 2), (1, 2, 2)]):
        check(Case(config=config_of(cells=number == 2), B=4, mesh=mesh, steps=3), number)
    if rank == 0:
        print("checked hosts", flush=True)
    jax.distributed.shutdown()


def check_hosts() -> None:
    """Two processes, of which each has two devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    command = [sys.executable, "-m", "parity.sequence", "host", "--port", str(port)]
    hosts = [
        subprocess.Popen([*command, "--rank", str(rank)], env=environment) for rank in range(2)
    ]
    try:
        codes = [host.wait(timeout=300) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert codes == [0, 0], codes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    whats = ["lists", "life", "training", "gradients", "kernels", "programs", "messages"]
    whats += ["meshes", "hosts"]
    parser.add_argument("what", choices=[*whats, "host"])
    parser.add_argument("--number", type=int, default=100, help="of random meshes")
    parser.add_argument("--rank", type=int, help="of a process that `hosts` starts")
    parser.add_argument("--port", type=int, help="of such a process")
    options = parser.parse_args()
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    if options.what == "host":
        run_host(options.rank, options.port)
    elif options.what == "meshes":
        check_meshes(options.number)
    elif options.what == "life":
        check_empty()
        check_life()
        check_life(kernels=True)
    elif options.what == "training":
        check_training()
        check_training(kernels=True)
    else:
        globals()[f"check_{options.what}"]()
