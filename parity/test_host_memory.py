"""Keys and values in host memory: the same outputs and state as on the device, bit by bit.

On a CPU "xla" moves them to the device and back, and kernels run in Pallas's interpreter. On a GPU
kernels read and write host memory itself: tests marked `gpu` read what the compiler says of it.
"""

import contextlib
import dataclasses
import functools
import os
import re
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_indexer import (
    DecodeCache,
    IndexerConfig,
    append,
    build_index,
    decode_attention,
    empty_cache,
    prefill,
    prefill_chunk,
    rebuild,
    rebuild_gain,
    reset,
    select,
    sparse_attention,
    truncate,
)
from jax_indexer.kernels import backend
from jax_indexer.kernels.chunks import put, take
from jax_indexer.kernels.keep import keep
from jax_indexer.kernels.step import Lengths, Step
from jax_indexer.kernels.tuning import H100
from jax_indexer.layout import head_major, token_axis
from jax_indexer.memory import in_host_memory, moved_to_device
from jax_indexer.recent import empty_recent, place_of, ring_size, write_recent
from jax_indexer.reference import Caches, Room, write_tokens
from jax_indexer.state import layer_of
from parity import oracle, test_cells
from parity.checked_memory import checked
from parity.lowering import an_h100, lowered

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
LAYERS, B, N, K, H, VALUE_H, S = 3, 2, 4, 2, 16, 8, 200
SIZES: dict[str, Any] = {
    "num_bits": 3,
    "heavy_size": 6,
    "sink_size": 3,
    "window_size": 5,
    "kmeans_iters": 2,
    "train_tokens": 64,
}
PLAIN = IndexerConfig(**SIZES)
CELLS = IndexerConfig(cells=True, **SIZES)
MANY = IndexerConfig(cells=True, **SIZES | {"heavy_size": 300})
ALL = IndexerConfig(cells=True, rerank=3, estimate_rest="codes", **SIZES)
MEAN = IndexerConfig(rerank=3, estimate_rest="mean", **SIZES)
NO_WINDOW = IndexerConfig(**SIZES | {"window_size": 0, "sink_size": 0})
LENGTHS = np.array([100, 40], np.int32)
LARGE_PLAIN, LARGE_CELLS = (IndexerConfig(cells=x, train_tokens=8192) for x in (False, True))
LARGE_POOL = dataclasses.replace(LARGE_CELLS, rerank=4, estimate_rest="codes")
LOWERED = {
    "lists": (LARGE_PLAIN, "BKSH", 3, 2),
    "cells": (LARGE_CELLS, "BSKH", 3, 1),
    "pool of cells": (LARGE_POOL, "BSKH", None, 1),
    "pool of cells, drafts": (LARGE_POOL, "BSKH", 3, 3),
    "pool": (dataclasses.replace(LARGE_POOL, cells=False), "BSKH", 3, 2),
}


class Case(NamedTuple):
    """What runs."""

    implementation: str
    config: IndexerConfig
    kv_layout: str = "BSKH"
    layer: int | None = None
    T: int = 1
    selector: str | None = None

    def runs(self):
        """Inside, "triton" is there, in the interpreter unless there is a GPU."""
        interpreted = self.implementation == "triton" and jax.default_backend() == "cpu"
        return backend.interpreted() if interpreted else contextlib.nullcontext()

    def decode(self, *arguments, **options):
        """A step."""
        options |= self.options | {"layer": self.layer, "selector": self.selector}
        return decode_attention(*arguments, self.config, **options)

    @property
    def options(self):
        return {"kv_layout": self.kv_layout, "implementation": self.implementation}


CASES = {
    "xla": Case("xla", PLAIN),
    "xla, layers, all, head-major": Case("xla", ALL, "BKSH", 1),
    "threshold": Case("triton", PLAIN),
    "threshold, layers, several tokens, head-major": Case("triton", PLAIN, "BKSH", 1, 2),
    "cells": Case("triton", CELLS, selector="cells"),
    "cells, layers": Case("triton", CELLS, layer=2, selector="cells"),
    "cells, lists": Case("triton", MANY, selector="cells"),
    "cells, drafts": Case("triton", CELLS, T=3, selector="cells"),
    "pool of cells, the rest": Case("triton", ALL),
    "pool of cells, the rest, drafts": Case("triton", ALL, T=3),
    "pool, the rest, several tokens": Case("triton", MEAN, T=2),
    "nothing is always attended": Case("triton", NO_WINDOW, T=3),
}


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def tokens(case, seed, number, size=H):
    """Keys or values of some tokens."""
    x = draw(seed, B, number, K, size)
    return x if case.kv_layout == "BSKH" else x.swapaxes(1, 2)


def prompts(case, seed, number):
    """Keys and values of prompts, zeros behind them: a prefill on the device writes these too."""
    exists = (np.arange(number) < LENGTHS[:, None])[:, :, None, None]
    exists = exists if case.kv_layout == "BSKH" else exists.swapaxes(1, 2)
    found = tokens(case, (seed, 1), number), tokens(case, (seed, 2), number, VALUE_H)
    return [jnp.where(exists, x, 0) for x in found]


def caches(case, capacity=S, kept_rows=21):
    """A cache on the device, and one in host memory."""
    layers = None if case.layer is None else LAYERS
    sizes = {"value_head_dim": VALUE_H, "dtype": jnp.float32, "layers": layers}
    sizes |= {"kv_layout": case.kv_layout}
    make = functools.partial(empty_cache, case.config, B, capacity, K, H, **sizes)
    # Few rows are kept, so that some must go.
    return [make(), make(memory_kind="pinned_host", kept_rows=kept_rows)]


def filled(case, number=120):
    """Both with the same prompts."""
    key, value = prompts(case, 1, number)
    return [
        prefill(
            key, value, jnp.asarray(LENGTHS), case.config, cache=x, layer=case.layer, **case.options
        )
        for x in caches(case)
    ]


def assert_equal(one, other):
    """Of copies: pinned memory that numpy has a view of is not given away."""
    one, other = (jax.tree.leaves(moved_to_device(x)) for x in (one, other))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def without_recent(cache):
    return dataclasses.replace(cache, recent=None)


def assert_recent(case, cache):
    """What is recent is what the host's copy holds, and maps of what is kept agree.

    The ring ends with what was written last, below the high water where there is one.
    """
    written = cache.index.lengths if cache.index.high_water is None else cache.index.high_water
    recent, key, value, lengths, written = (
        jax.tree.map(np.asarray, x)
        for x in (cache.recent, cache.key, cache.value, cache.index.lengths, written)
    )
    if case.layer is not None:
        take = lambda x: x[case.layer]  # noqa: E731
        of_layers = recent, key, value, lengths, written
        recent, key, value, lengths, written = (jax.tree.map(take, x) for x in of_layers)
    if case.kv_layout == "BKSH":
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    for row in range(B):
        always = np.arange(lengths[row])
        ring, sink = ring_size(case.config), case.config.sink_size
        always = always[(always < sink) | (always >= written[row] - ring)]
        place = np.asarray(place_of(jnp.asarray(always, jnp.int32), case.config))
        np.testing.assert_array_equal(recent.key[row, place], key[row, always])
        np.testing.assert_array_equal(recent.value[row, place], value[row, always])
        for head in range(K):
            slot_of, position_in = recent.slot_of[row, head], recent.position_in[row, head]
            position = np.flatnonzero(slot_of >= 0)
            position = position[position < lengths[row]]
            np.testing.assert_array_equal(position_in[slot_of[position]], position)
            slot = slot_of[position]
            np.testing.assert_array_equal(
                recent.kept_key[row, slot, head], key[row, position, head]
            )
            np.testing.assert_array_equal(
                recent.kept_value[row, slot, head], value[row, position, head]
            )
            held = np.flatnonzero(position_in >= 0)
            np.testing.assert_array_equal(slot_of[position_in[held]], held)
    return recent


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_caches_on_the_device_bit_by_bit(name):
    case = CASES[name]
    step = jax.jit(case.decode)
    with case.runs():
        on_device, on_host = filled(case)
        query = draw(3, B, case.T, N, H)
        for i in range(12):
            # Queries that change slowly list what they listed; now and then there are others.
            query = (
                draw(4 + i, B, case.T, N, H) if i == 7 else query + draw(5 + i, *query.shape) / 9
            )
            new = (tokens(case, 30 + i, case.T), tokens(case, 60 + i, case.T, VALUE_H))
            expected, on_device = step(query, *new, on_device)
            out, on_host = step(query, *new, on_host)
            assert jax.typeof(on_host.key).memory_space == HOST
            assert jax.typeof(on_host.value).memory_space == HOST
            np.testing.assert_array_equal(np.asarray(out), np.asarray(expected))
            assert_equal(without_recent(on_host), on_device)
            recent = assert_recent(case, on_host)
    if case.implementation == "triton":
        assert (recent.slot_of >= 0).any()


DRAFTS = {
    "xla, layers, all, head-major": Case("xla", ALL, "BKSH", 1, 8),
    "cells, layers": Case("triton", CELLS, layer=2, T=4, selector="cells"),
    "pool of cells, the rest": Case("triton", ALL, T=4),
}


@pytest.mark.parametrize("name", DRAFTS)
def test_drafts_are_taken_back_as_on_the_device(name):
    """Rows go back as far as they may, and the ring has all that the next steps read there."""
    case = DRAFTS[name]
    step, rng = jax.jit(case.decode), np.random.default_rng(0)

    def one(index):
        return index if case.layer is None else layer_of(index, jnp.int32(case.layer))

    with case.runs():
        on_device, on_host = filled(case)
        for i in range(9):
            query = draw(4 + i, B, case.T, N, H)
            new = (tokens(case, 30 + i, case.T), tokens(case, 60 + i, case.T, VALUE_H))
            counts = jnp.asarray(rng.integers(case.T - 1, case.T + 1, B), jnp.int32)
            expected, on_device = step(query, *new, on_device, counts=counts)
            out, on_host = step(query, *new, on_host, counts=counts)
            np.testing.assert_array_equal(np.asarray(out), np.asarray(expected))
            index = one(on_device.index)
            lengths = index.high_water - 8 if i % 3 == 1 else index.lengths
            pair = on_device, on_host
            on_device, on_host = (truncate(x, lengths, layer=case.layer) for x in pair)
            np.testing.assert_array_equal(one(on_host.index).lengths, lengths)
            assert_equal(without_recent(on_host), on_device)
            assert_recent(case, on_host)
    # What was sealed and summed went on.
    assert (np.asarray(one(on_host.index).high_water) > LENGTHS + 8).all()


@pytest.mark.parametrize("name", ["xla, layers, all, head-major", "pool of cells, the rest"])
def test_rebuilding_lets_no_row_go_back_behind_the_ring(name):
    """The high water stays, so what is taken back twice is refused; steps go on as they should."""
    case = DRAFTS[name]
    with case.runs():
        _, cache = filled(case)

        def one(index):
            return index if case.layer is None else layer_of(index, jnp.int32(case.layer))

        for back in (8, 16, 24):
            cache = truncate(cache, jnp.asarray(LENGTHS - back), layer=case.layer)
            options = {"value": cache.value, "layer": case.layer, **case.options}
            index = rebuild(cache.index, cache.key, case.config, jnp.ones(B, bool), **options)
            cache = dataclasses.replace(cache, index=index)
            assert one(index).lengths.tolist() == (LENGTHS - 8).tolist()
            assert one(index).high_water.tolist() == LENGTHS.tolist()
            assert_recent(case, cache)
        new = tokens(case, 3, case.T), tokens(case, 4, case.T, VALUE_H)
        step = jax.jit(case.decode)
        for i in range(10):
            cache = step(draw(5 + i, B, case.T, N, H), *new, cache)[1]
            assert_recent(case, cache)
    index, value = jax.tree.map(np.asarray, (one(cache.index), cache.value))
    value = value if case.layer is None else value[case.layer]
    of_all = value, index.codes, index.high_water, case.config, case.kv_layout
    sums, counts = oracle.value_sums(*of_all)
    np.testing.assert_array_equal(index.values.counts, counts)
    np.testing.assert_allclose(index.values.sums, sums, rtol=1e-4, atol=1e-4)
    test_cells.check_state(index, case.config)


@pytest.mark.parametrize("name", ["xla, layers, all, head-major", "pool of cells, the rest"])
def test_chunks_and_a_rebuild_make_what_a_prefill_makes(name):
    case = CASES[name]
    with case.runs():
        on_device, whole = filled(case)
        assert_equal(without_recent(whole), on_device)
        assert_recent(case, whole)
        cache = caches(case)[1]
        key, value = prompts(case, 1, 120)
        axis = case.kv_layout.index("S")
        for first in range(0, 120, 40):
            cut = functools.partial(lax.slice_in_dim, start_index=first, limit_index=first + 40)
            cache = prefill_chunk(
                cut(key, axis=axis),
                cut(value, axis=axis),
                jnp.full(B, first, jnp.int32),
                cache,
                case.config,
                counts=jnp.clip(jnp.asarray(LENGTHS) - first, 0, 40),
                layer=case.layer,
                **case.options,
            )
        index = rebuild(
            cache.index,
            cache.key,
            case.config,
            jnp.ones(B, bool),
            value=cache.value if case.config.estimate_rest else None,
            lengths=jnp.asarray(LENGTHS),
            layer=case.layer,
            **case.options,
        )
        assert_equal(without_recent(dataclasses.replace(cache, index=index)), on_device)
        assert_equal((cache.recent.key, cache.recent.value), (whole.recent.key, whole.recent.value))


@pytest.mark.parametrize("name", ["xla", "threshold"])
def test_a_chunk_may_go_into_a_cache_on_the_device(name):
    case = CASES[name]
    with case.runs():
        cache = caches(case)[0]
        key, value = tokens(case, 1, 30), tokens(case, 2, 30, VALUE_H)
        cache = prefill_chunk(
            key, value, jnp.array([5, 190], jnp.int32), cache, case.config, **case.options
        )
    expected = np.zeros((B, S, K, H), np.float32)
    expected[0, 5:35] = key[0]  # the other row would pass the capacity
    np.testing.assert_array_equal(np.asarray(cache.key), expected)


@pytest.mark.parametrize("name", ["xla", "threshold, layers, several tokens, head-major"])
def test_lists_are_read_over_the_bus_by_sparse_attention(name):
    case = CASES[name]
    with case.runs():
        on_device, on_host = filled(case)
        query = draw(3, B, 1, N, H)
        selected = select(query, on_device.index, case.config, layer=case.layer)
        for config in (None, case.config):
            attend = functools.partial(
                sparse_attention, config=config, layer=case.layer, return_lse=True, **case.options
            )
            expected = attend(query, on_device.key, on_device.value, selected)
            found = jax.jit(attend)(query, on_host.key, on_host.value, selected)
            assert_equal(found, expected)


@pytest.mark.parametrize("name", ["xla, layers, all, head-major", "pool, the rest, several tokens"])
def test_a_rest_is_added_to_lists_that_are_read_over_the_bus(name):
    case = CASES[name]
    with case.runs():
        on_device, on_host = filled(case)
        query, options = draw(3, B, 1, N, H), {"layer": case.layer}
        choose = functools.partial(select, config=case.config, return_rest=True, **options)
        selected = choose(query, on_host.index, implementation=case.implementation)
        assert np.isfinite(np.asarray(selected.rest.log_mass)).all()
        attend = functools.partial(
            sparse_attention, config=case.config, return_lse=True, **options, **case.options
        )
        expected = attend(query, on_device.key, on_device.value, selected, rest=selected.rest)
        without = attend(query, on_device.key, on_device.value, selected)
        found = jax.jit(attend)(query, on_host.key, on_host.value, selected, rest=selected.rest)
        assert_equal(found, expected)
        assert (np.asarray(found[1]) != np.asarray(without[1])).all()


def test_gradients_flow_to_queries_past_caches_in_host_memory():
    case = CASES["xla"]
    on_device, on_host = filled(case)
    query = draw(3, B, 1, N, H)
    selected = select(query, on_device.index, case.config)

    def loss(query, cache):
        return jnp.sum(sparse_attention(query, cache.key, cache.value, selected) ** 2)

    expected = jax.grad(loss)(query, on_device)
    np.testing.assert_array_equal(jax.grad(loss)(query, on_host), expected)


def test_a_scan_carries_them_and_donation_leaves_one():
    case = CASES["xla"]
    on_device, on_host = filled(case)

    def steps(cache, queries):
        def one(cache, query):
            new = query[:, :, :K], query[:, :, :K, :VALUE_H]
            out, cache = decode_attention(query, *new, cache, case.config)
            return cache, out

        return lax.scan(one, cache, queries)

    queries = draw(3, 5, B, 1, N, H)
    expected, out_of_device = jax.jit(steps)(on_device, queries)
    cache, out = jax.jit(steps, donate_argnums=0)(on_host, queries)
    assert on_host.key.is_deleted()
    assert jax.typeof(cache.key).memory_space == HOST
    assert_equal((without_recent(cache), out), (expected, out_of_device))


def life(case, steps, seed=0):
    """(out, expected) of many steps of both caches, rows restarting, and the caches."""
    step = jax.jit(case.decode, donate_argnums=3)
    restart = jax.jit(functools.partial(reset, layer=case.layer))
    rng = np.random.default_rng(seed)
    pair = filled(case)
    for i in range(steps):
        query = draw((seed, i // 5), B, case.T, N, H)
        new = tokens(case, (seed, i, 1), case.T), tokens(case, (seed, i, 2), case.T, VALUE_H)
        counts = jnp.asarray(rng.integers(0, case.T + 1, B), jnp.int32)
        outs = []
        for which, cache in enumerate(pair):
            out, pair[which] = step(query, *new, cache, counts=counts)
            outs.append(np.asarray(out))
        np.testing.assert_array_equal(*outs, err_msg=f"step {i}")
        if rng.random() < 0.05:
            rows = jnp.asarray(rng.random(B) < 0.5)
            pair = [dataclasses.replace(x, index=restart(x.index, rows)) for x in pair]
        elif rng.random() < 0.02:
            rows, number = jnp.asarray(rng.random(B) < 0.5), jnp.asarray(LENGTHS)
            key, value = prompts(case, i + 2, 100)
            options = {"rows": rows, "layer": case.layer, **case.options}
            pair = [prefill(key, value, number, case.config, cache=x, **options) for x in pair]
        yield i, pair


@pytest.mark.parametrize("name", ["cells, layers", "threshold, layers, several tokens, head-major"])
def test_rows_that_restart_see_nothing_of_what_was_kept(name):
    case = CASES[name]
    with case.runs():
        for i, (on_device, on_host) in life(case, 60):
            if i % 20 == 19:
                assert_equal(without_recent(on_host), on_device)
                assert_recent(case, on_host)


def run_on_two_devices(program):
    """Runs a program that ends with "split", where JAX sees two CPUs."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "split\n", done.stderr[-3000:]


MESHES = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax_indexer import decode_attention
from jax_indexer.sharding import _named, _spec
from parity import test_host_memory as here

case = here.CASES["xla"]
_, cache = here.filled(case)
query = here.draw(3, here.B, 1, here.N, here.H)
key, value = here.tokens(case, 4, 1), here.tokens(case, 5, 1, here.VALUE_H)
step = jax.jit(lambda *arguments: decode_attention(*arguments, case.config))
expected, after = step(query, key, value, cache)
for rows, heads in ((("x",), ()), ((), ("x",))):
    for kind in (AxisType.Explicit, AxisType.Auto):
        mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))

        def split(letters, state):
            def put(x):
                on_host = jax.typeof(x.array).memory_space == here.HOST
                spec = _spec(x.letters, rows, heads)
                where = "pinned_host" if on_host else "device"
                return jax.device_put(x.array, NamedSharding(mesh, spec, memory_kind=where))
            leaves, structure = jax.tree.flatten(state)
            return jax.tree.unflatten(structure, [put(x) for x in _named("", letters, state)])

        parts = type(cache)(
            split("B S K H", cache.key), split("B S K H'", cache.value),
            split(None, cache.index), split(None, cache.recent),
        )
        arguments = split("B T N H", query), split("B T K H", key), split("B T K H'", value), parts
        if kind == AxisType.Auto:
            try:
                step(*arguments)
            except NotImplementedError as error:
                assert "in host memory are split over Explicit axes" in str(error)
                continue
            raise AssertionError("Auto axes were not refused")
        out, parts = step(*arguments)
        np.testing.assert_array_equal(np.asarray(out), np.asarray(expected))
        assert parts.key.sharding.memory_kind == "pinned_host"
        assert len(parts.key.addressable_shards) == 2
        here.assert_equal(parts, after)
print("split")
"""


def test_rows_and_heads_are_split_over_explicit_axes():
    run_on_two_devices(MESHES)


TOKENS = r"""
import contextlib
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jax_indexer import (
    build_index, decode_attention, partition_specs, prefill_chunk, rebuild, select,
    sparse_attention,
)
from jax_indexer.kernels import backend
import parity.test_host_memory as here

case, part, axis = here.CASES["xla"], P(None, "tokens"), {"sequence_axis": "tokens"}
config, mesh = case.config, jax.make_mesh((2,), ("tokens",), axis_types=(AxisType.Auto,))
where = NamedSharding(mesh, part)
key, value = here.tokens(case, 1, here.S), here.tokens(case, 2, here.S, here.VALUE_H)
query, lengths = here.draw(3, here.B, 1, here.N, here.H), jnp.array([180, 40], jnp.int32)
index = build_index(key, lengths, config)
selected = select(query, index, config)
expected = sparse_attention(query, key, value, selected, return_lse=True)
split = partition_specs(index, mesh, sequence="tokens")

# Lists of a device's own positions, of caches in the one memory and in the other.
for kernels in (False, True):
    by = axis | {"implementation": "triton" if kernels else "xla"}

    def attend(query, key, value, index):
        own = select(query, index, config, **by)
        return sparse_attention(query, key, value, own, return_lse=True, **by)

    specs = {"in_specs": (P(), part, part, split), "out_specs": P()}
    attend = jax.jit(jax.shard_map(attend, mesh=mesh, check_vma=not kernels, **specs))
    with backend.interpreted() if kernels else contextlib.nullcontext():
        of_device, of_host = (
            attend(query, *jax.device_put((key, value), where.with_memory_kind(kind)), index)
            for kind in ("device", "pinned_host")
        )
    here.assert_equal(of_host, of_device)
    for one, other in zip(of_host, expected):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=2e-5, atol=2e-5)

# What is not there yet is refused, before anything compiles.
_, cache = here.filled(case)
new = here.tokens(case, 4, 1), here.tokens(case, 5, 1, here.VALUE_H)
rows = jnp.ones(here.B, bool)
missing = 'sequence_axis: memory_kind="pinned_host" needs'
for function, error, message in (
    (lambda c: decode_attention(query, *new, c, config, **axis), NotImplementedError, missing),
    (lambda c: rebuild(c.index, c.key, config, rows, **axis), NotImplementedError, missing),
):
    try:
        jax.jit(jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P())).trace(cache)
    except error as refused:
        assert message in str(refused), refused
    else:
        raise AssertionError(message)
try:
    partition_specs(cache, mesh, sequence="tokens")
except NotImplementedError as refused:
    assert "sequence: memory_kind=" in str(refused)
else:
    raise AssertionError("tokens of a cache in host memory were split")
specs = partition_specs(cache, mesh, rows="tokens")
assert specs.key == P("tokens", None, None, None) and specs.recent.next_slot == P("tokens", None)
print("split")
"""


def test_tokens_are_split_for_sparse_attention_alone():
    run_on_two_devices(TOKENS)


# Kernels


def kept_by_an_oracle(recent, lists, key, value):
    """Rows kept after a step that listed these heavy tokens, [Q, n] of one kv head."""
    slot_of, position_in, kept_key, kept_value, begin = recent
    number = len(position_in)
    fresh = list(dict.fromkeys(p for each in lists for p in each if slot_of[p] < 0))[:number]
    for i, position in enumerate(fresh):
        slot = (begin + i) % number
        if position_in[slot] >= 0 and slot_of[position_in[slot]] == slot:
            slot_of[position_in[slot]] = -1
        slot_of[position], position_in[slot] = slot, position
        kept_key[slot], kept_value[slot] = key[position], value[position]
    return (begin + len(fresh)) % number


@pytest.mark.parametrize("runner", ["interpreter", "checked memory"])
@pytest.mark.parametrize("number", [7, 16])
def test_rows_are_kept_as_an_oracle_keeps_them(runner, number):
    kv_heads, capacity, group = 2, 40, 3
    config = IndexerConfig(**SIZES)
    step = Step(config=config, B=1, K=kv_heads, S=capacity, N=kv_heads * group)
    full = np.full((1,), capacity, np.int32)
    key, value = draw(1, 1, capacity, kv_heads, H), draw(2, 1, capacity, kv_heads, VALUE_H)
    recent = empty_recent(1, capacity, kv_heads, H, VALUE_H, config, np.float32, number)
    want = [
        [np.array(x[0, k]) for x in (recent.slot_of, recent.position_in)]
        + [np.array(x[0, :, k]) for x in (recent.kept_key, recent.kept_value)]
        + [0]
        for k in range(kv_heads)
    ]
    rng = np.random.default_rng(number)
    before = range(config.sink_size, capacity - config.window_size)
    for i in range(6):
        # The first steps list few tokens, of which several heads have some in common.
        among = before[: 8 + 6 * i]
        heavy = [np.sort(rng.choice(among, config.heavy_size, replace=False)) for _ in range(6)]
        lists = np.full((1, 1, step.N, step.P), -1, np.int32)
        lists[0, 0, :, config.sink_size : config.sink_size + config.heavy_size] = heavy
        arguments = Lengths(jnp.asarray(full), None), Caches(key, value), recent, None
        with checked(i) if runner == "checked memory" else backend.interpreted():
            recent = keep(step, *arguments, lists=jnp.asarray(lists))
        for k in range(kv_heads):
            own = heavy[k * group : (k + 1) * group]
            want[k][4] = kept_by_an_oracle(want[k], own, key[0, :, k], value[0, :, k])
            slot_of, position_in, kept_key, kept_value, begin = want[k]
            np.testing.assert_array_equal(recent.slot_of[0, k], slot_of)
            np.testing.assert_array_equal(recent.position_in[0, k], position_in)
            np.testing.assert_array_equal(recent.kept_key[0, :, k], kept_key)
            np.testing.assert_array_equal(recent.kept_value[0, :, k], kept_value)
            assert recent.next_slot[0, k] == begin


@pytest.mark.parametrize("name", ["threshold", "threshold, layers, several tokens, head-major"])
def test_kernels_that_copy_tokens_run_on_checked_memory(name):
    case = CASES[name]
    layer = None if case.layer is None else jnp.int32(case.layer)
    config, kv_layout = case.config, case.kv_layout
    cache = caches(case, 60, kept_rows=30)[1]
    old = Caches(*(jax.device_put(x, DEVICE) for x in (cache.key, cache.value)))
    # Of what is kept, some is written over.
    kept = jnp.arange(30, dtype=jnp.int32)
    recent = dataclasses.replace(
        cache.recent,
        slot_of=cache.recent.slot_of.at[..., :30].set(kept),
        position_in=cache.recent.position_in.at[..., :30].set(kept),
    )
    new = Caches(tokens(case, 1, 45), tokens(case, 2, 45, VALUE_H))
    room = Room(jnp.array([10, 3], jnp.int32), jnp.array([45, 20], jnp.int32))
    tuning = dataclasses.replace(H100, copied_tile=128)
    arguments = config, kv_layout, layer, tuning
    with checked(0):
        written, recent_after = put(new, room, old, *arguments), put(new, room, recent, *arguments)
        position = jnp.array([[12, 3, 54, 9], [0, 4, 22, 21]], jnp.int32)
        taken = take(written.key, position, kv_layout, layer, tuning)
    axis = token_axis(kv_layout) - 4
    expected = Caches(
        *(write_tokens(x, y, room, x.ndim + axis, layer) for x, y in zip(old, new, strict=True))
    )
    assert_equal(written, expected)
    want = write_recent(recent, new, room, config, kv_layout, layer)
    assert_equal((recent_after.key, recent_after.value), (want.key, want.value))
    one = layer_of(recent_after, layer)
    for row, (start, count) in enumerate(zip(*room, strict=True)):
        gone = np.arange(start, start + count)
        stays = np.setdiff1d(np.arange(30), gone)
        assert (np.asarray(one.slot_of)[row, :, gone] == -1).all()
        np.testing.assert_array_equal(one.slot_of[row, 0, stays], stays)
        held = np.asarray(one.position_in)[row, 0, :30]
        np.testing.assert_array_equal(np.flatnonzero(held >= 0), stays)
    key = head_major(layer_of(expected.key, layer), kv_layout)
    for row in range(B):
        found = head_major(taken, kv_layout)[row]
        np.testing.assert_array_equal(found, key[row][:, position[row]])


@pytest.mark.parametrize("name", LOWERED)
def test_kernels_over_host_memory_lower_for_cuda(name):
    config, kv_layout, layers, T = LOWERED[name]
    make = functools.partial(empty_cache, config, 1, 40000, 2, 64, layers=layers)
    cache = jax.eval_shape(functools.partial(make, kv_layout=kv_layout))
    recent = jax.eval_shape(lambda: empty_recent(1, 40000, 2, 64, 64, config, jnp.bfloat16, 99))
    if layers is not None:
        stack = lambda x: jax.ShapeDtypeStruct((layers, *x.shape), x.dtype)  # noqa: E731
        recent = jax.tree.map(stack, recent)
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16)  # noqa: E731
    new = lambda t: shape(1, t, 2, 64) if kv_layout == "BSKH" else shape(1, 2, t, 64)  # noqa: E731
    options = {"kv_layout": kv_layout, "implementation": "triton"}
    options["layer"] = None if layers is None else jnp.int32(1)

    def on_host(cache, recent):
        caches = (in_host_memory(x) for x in (cache.key, cache.value))
        return DecodeCache(*caches, cache.index, recent)

    def step(query, new, *cache):
        return decode_attention(query, new, new, on_host(*cache), config, **options)[0]

    def fill(new, *cache):
        start = jnp.zeros(1, jnp.int32)
        return prefill_chunk(new, new, start, on_host(*cache), config, **options).recent

    def again(*cache):
        cache = on_host(*cache)
        value = cache.value if config.estimate_rest else None
        return rebuild(cache.index, cache.key, config, jnp.ones(1, bool), value=value, **options)

    for function, arguments, kernels in (
        (step, (shape(1, T, 8, 64), new(T)), ("keep_kernel", "write_kernel")),
        (fill, (new(300),), ("put_kernel",)),
        (again, (), ("take_kernel", "append_kernel")),
    ):
        with an_h100():
            text = lowered(function, *arguments, cache, recent)
        for kernel in kernels:
            assert re.search(rf'name = \\?"{kernel}', text), kernel


# Bad input


def an_index_and_caches():
    case = CASES["xla"]
    on_device, on_host = filled(case)
    return case, on_device, on_host


def test_bad_input_is_refused_before_anything_compiles():
    case, on_device, on_host = an_index_and_caches()
    query, config = draw(3, B, 1, N, H), case.config
    new = tokens(case, 4, 1), tokens(case, 5, 1, VALUE_H)
    decode = functools.partial(decode_attention, query, *new, config=config)
    half = dataclasses.replace(on_host, value=on_device.value)
    where = r"where cache\.key does, in pinned_host memory, got it on the device; move one of them"
    with pytest.raises(ValueError, match=rf"cache\.value: expected it to lie {where}"):
        decode(half)
    wider = dataclasses.replace(config, window_size=config.window_size + 1)
    with pytest.raises(ValueError, match=r"cache\.recent\.key: .* the cache was made with"):
        decode_attention(query, *new, on_host, wider)
    as_many = dataclasses.replace(wider, sink_size=config.sink_size - 1)
    with pytest.raises(ValueError, match=r"cache\.recent\.sink_size: expected 2, got 3; .* config"):
        decode_attention(query, *new, on_host, as_many)
    chunk = tokens(case, 4, S + 1), tokens(case, 5, S + 1, VALUE_H), jnp.zeros(B, jnp.int32)
    with pytest.raises(ValueError, match=rf"^key: expected at most s=S={S} .*or counts"):
        prefill_chunk(*chunk, on_host, config)
    with pytest.raises(ValueError, match=r"cache\.recent: expected Recent"):
        decode(dataclasses.replace(on_host, recent=None))
    with pytest.raises(ValueError, match=r"cache\.recent: expected None"):
        decode(dataclasses.replace(on_device, recent=on_host.recent))
    with pytest.raises(ValueError, match="query: expected an array on the device"):
        decode_attention(jax.device_put(query, HOST), *new, on_host, config)
    selected = select(query, on_device.index, config)
    with pytest.raises(ValueError, match="value: expected it to lie where key does"):
        sparse_attention(query, on_host.key, on_device.value, selected)
    many = tokens(case, 4, 9), tokens(case, 5, 9, VALUE_H)
    with pytest.raises(NotImplementedError, match="up to 8 tokens a step"):
        decode_attention(draw(3, B, 9, N, H), *many, on_host, config)
    every, number = jnp.ones(B, bool), jnp.asarray(LENGTHS)
    with pytest.raises(NotImplementedError, match=r"cache: .* go back as far as their high water"):
        truncate(on_host, number)
    with pytest.raises(ValueError, match="key: expected an array on the device"):
        build_index(on_host.key, number, config)
    with pytest.raises(ValueError, match="key: expected an array on the device"):
        rebuild_gain(on_host.index, on_host.key, config)
    with pytest.raises(ValueError, match=r"config\.train_tokens: expected a number"):
        rebuild(on_host.index, on_host.key, dataclasses.replace(config, train_tokens=None), every)
    with pytest.raises(ValueError, match="key: expected an array on the device"):
        prefill(on_host.key, on_host.value, number, config)
    rest = IndexerConfig(estimate_rest="mean", **SIZES)
    index = empty_cache(rest, B, S, K, H, value_head_dim=VALUE_H).index
    with pytest.raises(ValueError, match="value: expected an array on the device"):
        append(index, new[0], rest, value=on_host.value)


def test_pages_in_host_memory_are_not_there_yet():
    with pytest.raises(NotImplementedError, match=r"num_pages, page_size: .* not there yet"):
        empty_cache(PLAIN, B, S, K, H, memory_kind="pinned_host", num_pages=26, page_size=16)
    case, on_device, on_host = an_index_and_caches()
    key, value = (jax.device_put(jnp.zeros((26, 16, K, x)), HOST) for x in (H, VALUE_H))
    paged, config = dataclasses.replace(on_host, key=key, value=value), case.config
    table = {"page_table": jnp.zeros((B, 13), jnp.int32)}
    query, new = draw(3, B, 1, N, H), (tokens(case, 4, 1), tokens(case, 5, 1, VALUE_H))
    selected, every = select(query, on_device.index, config), jnp.ones(B, bool)
    prompt = *prompts(case, 1, 120), jnp.asarray(LENGTHS), config
    for function in (
        lambda: decode_attention(query, *new, paged, config, **table),
        lambda: sparse_attention(query, key, value, selected, **table),
        lambda: rebuild(paged.index, key, config, every, **table),
        lambda: prefill(*prompt, cache=paged, **table),
    ):
        with pytest.raises(NotImplementedError, match=r"page_table: .* not there yet"):
            function()


@pytest.mark.parametrize("implementation", ["xla", None])
def test_vmap_over_them_is_refused(implementation):
    case, _, on_host = an_index_and_caches()
    new = tokens(case, 4, 1), tokens(case, 5, 1, VALUE_H)

    def one(query):
        return decode_attention(query, *new, on_host, case.config, implementation=implementation)[0]

    with pytest.raises(ValueError, match=r"cache: expected no axis of jax\.vmap"):
        jax.jit(jax.vmap(one))(draw(3, 4, B, 1, N, H))


def test_a_device_without_pinned_memory_is_told(monkeypatch):
    monkeypatch.setattr("jax_indexer._arguments.kinds_of_memory", lambda: ("gpu", ["device"]))
    with pytest.raises(ValueError, match="memory_kind: expected a kind of memory that gpu has"):
        empty_cache(PLAIN, B, S, K, H, memory_kind="pinned_host")
    with pytest.raises(ValueError, match="kept_rows: expected None for a cache on the device"):
        empty_cache(PLAIN, B, S, K, H, kept_rows=8)
    with pytest.raises(ValueError, match="kept_rows: expected an integer of at least 1"):
        empty_cache(PLAIN, B, S, K, H, memory_kind="pinned_host", kept_rows=0)
    with pytest.raises(ValueError, match="memory_kind: expected one of"):
        empty_cache(PLAIN, B, S, K, H, memory_kind="unpinned_host")


# On a GPU

KERNELS = [name for name, case in CASES.items() if case.implementation == "triton"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNELS)
def test_a_gpus_steps_are_those_of_caches_on_the_device_bit_by_bit(name):
    test_steps_are_those_of_caches_on_the_device_bit_by_bit(name)


@pytest.mark.gpu
def test_a_gpu_fills_reads_and_restarts_them():
    for name in ("pool of cells, the rest", "threshold, layers, several tokens, head-major"):
        test_chunks_and_a_rebuild_make_what_a_prefill_makes(name)
        test_lists_are_read_over_the_bus_by_sparse_attention(name)
        test_rows_that_restart_see_nothing_of_what_was_kept(name)


@pytest.mark.gpu
def test_a_gpu_refuses_vmap_over_them():
    test_vmap_over_them_is_refused(None)


LLAMA = {"N": 32, "K": 8, "H": 128}
LARGE = {
    "cells": (LARGE_CELLS, "cells"),
    "threshold": (LARGE_PLAIN, "threshold"),
    "pool, the rest": (LARGE_POOL, "cells"),
}


def random_tokens(seed, number, dtype=jnp.bfloat16, heads=LLAMA["K"]):
    return jax.random.normal(jax.random.key(seed), (1, number, heads, LLAMA["H"]), dtype)


def decoder(config, selector, layers=None):
    """Decodes with random tokens, and queries that change slowly: through all layers, if any."""

    def step(cache, number, layer=None):
        draw = lambda i, heads: jax.random.normal(  # noqa: E731
            jax.random.fold_in(jax.random.key(i), number), (1, 1, heads, LLAMA["H"])
        )
        slow = jax.random.normal(
            jax.random.fold_in(jax.random.key(9), number // 8), (1, 1, LLAMA["N"], LLAMA["H"])
        )
        query = (slow + draw(0, LLAMA["N"]) / 4).astype(jnp.bfloat16)
        new = (draw(i, LLAMA["K"]).astype(jnp.bfloat16) for i in (1, 2))
        out, cache = decode_attention(query, *new, cache, config, selector=selector, layer=layer)
        return cache, out

    def steps(cache, first, *, number):
        if layers is None:
            return lax.scan(step, cache, first + jnp.arange(number, dtype=jnp.int32))

        def of_all(cache, number):
            one = lambda cache, layer: step(cache, number, layer)  # noqa: E731
            return lax.scan(one, cache, jnp.arange(layers, dtype=jnp.int32))

        return lax.scan(of_all, cache, first + jnp.arange(number, dtype=jnp.int32))

    return steps


def large_caches(config, length, capacity, **options):
    """Of a Llama-3-8B's layer, with random tokens: on the device, and in host memory."""
    pair = []
    for kind in (None, "pinned_host"):
        cache = empty_cache(
            config, 1, capacity, LLAMA["K"], LLAMA["H"], memory_kind=kind, **options
        )
        put = jax.jit(functools.partial(prefill_chunk, config=config), donate_argnums=3)
        for first in range(0, length, 8192):
            number = min(8192, length - first)
            chunk = random_tokens(first, number), random_tokens(first + 1, number)
            cache = put(*chunk, jnp.array([first], jnp.int32), cache)
        options_of_rebuild = {
            "value": cache.value if config.estimate_rest else None,
            "lengths": jnp.array([length], jnp.int32),
        }
        rows = jnp.ones(1, bool)
        index = rebuild(cache.index, cache.key, config, rows, **options_of_rebuild)
        pair.append(dataclasses.replace(cache, index=index))
    return pair


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGE)
def test_at_128k_tokens_a_gpus_outputs_are_those_of_caches_on_the_device(name):
    config, selector = LARGE[name]
    on_device, on_host = large_caches(config, 2**17 - 64, 2**17)
    # The sums that the rest begins with are added up in chunks of another size.
    on_device = dataclasses.replace(on_device, index=on_host.index)
    steps = jax.jit(functools.partial(decoder(config, selector), number=48))
    on_device, expected = steps(on_device, jnp.int32(0))
    on_host, out = steps(on_host, jnp.int32(0))
    assert_equal(without_recent(on_host), on_device)
    np.testing.assert_array_equal(np.asarray(out, np.float32), np.asarray(expected, np.float32))
    assert (np.asarray(on_host.recent.slot_of) >= 0).sum() > 1000


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGE)
def test_a_gpu_makes_nothing_of_the_caches_size(name):
    config, selector = LARGE[name]
    layers, capacity = 4, 2**17
    cache = empty_cache(
        config, 1, capacity, LLAMA["K"], LLAMA["H"], layers=layers, memory_kind="pinned_host"
    )
    size = cache.key.nbytes
    steps = jax.jit(
        functools.partial(decoder(config, selector, layers), number=4), donate_argnums=0
    )
    compiled = steps.lower(cache, jnp.int32(0)).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < size / 20, memory
    assert memory.host_temp_size_in_bytes < 2**20, memory
    assert memory.host_alias_size_in_bytes == 2 * size, memory
    before = cache.key.unsafe_buffer_pointer(), cache.value.unsafe_buffer_pointer()
    cache, _ = compiled(cache, jnp.int32(0))
    assert (cache.key.unsafe_buffer_pointer(), cache.value.unsafe_buffer_pointer()) == before
    assert cache.key.sharding.memory_kind == "pinned_host"
    chunk = random_tokens(0, 4096), random_tokens(1, 4096)
    put = jax.jit(functools.partial(prefill_chunk, config=config), donate_argnums=3)
    arguments = *chunk, jnp.zeros(1, jnp.int32), cache
    memory = put.lower(*arguments, layer=jnp.int32(1)).compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.host_temp_size_in_bytes < 2**20, memory


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGE)
def test_ten_thousand_steps_on_a_gpu_leave_what_was_written(name):
    config, selector = LARGE[name]
    pair = large_caches(config, 1000, 4096)
    pair[0] = dataclasses.replace(pair[0], index=jax.tree.map(jnp.copy, pair[1].index))
    steps = jax.jit(functools.partial(decoder(config, selector), number=500), donate_argnums=0)
    for i in range(20):
        outs = []
        for which, cache in enumerate(pair):
            pair[which], out = steps(cache, jnp.int32(500 * i))
            outs.append(np.asarray(out, np.float32))
        np.testing.assert_array_equal(*outs, err_msg=f"before step {500 * (i + 1)}")
        assert_equal(without_recent(pair[1]), pair[0])
        if int(pair[0].index.lengths[0]) > 3500 or i % 5 == 4:
            rows = jnp.ones(1, bool)
            pair = [dataclasses.replace(x, index=reset(x.index, rows)) for x in pair]
        elif i % 5 == 2:
            new, number = (random_tokens(i, 3000), random_tokens(100 + i, 3000)), jnp.array([2900])
            pair = [prefill(*new, number, config, cache=x) for x in pair]
            pair[0] = dataclasses.replace(pair[0], index=jax.tree.map(jnp.copy, pair[1].index))
            key, value = moved_to_device((pair[1].key, pair[1].value))
            pair[0] = dataclasses.replace(pair[0], key=key, value=value)
