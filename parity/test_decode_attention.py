"""decode_attention: its kernels and its steps, against what it is made of.

What it is made of: new keys and values written by hand, codes and lists of the reference, and
attention in float64. Inputs are small integers, so that tables and distances are exact and lists
equal; outputs are off by float32 rounding and by one rounding to their dtype.
"""

import contextlib
import dataclasses
import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_indexer import (
    DecodeCache,
    IndexerConfig,
    PQIndex,
    append,
    decode_attention,
    indexer_next,
    prefill,
    reference,
    reset,
    sparse_attention,
)
from jax_indexer.kernels import attend as kernels
from jax_indexer.kernels import backend, pipeline
from jax_indexer.kernels.cells_select import attend_cells
from jax_indexer.kernels.lookup_table import tables_from
from jax_indexer.kernels.step import Lengths, Step
from jax_indexer.kernels.tuning import H100
from jax_indexer.layout import token_axis
from jax_indexer.reference import Caches, Logits
from parity import oracle, test_cells
from parity.test_kernels import CPU, RUNNERS, SMALL_BLOCKS, UNOPTIMIZED, Runner
from parity.test_sparse_attention import TOLERANCE

# Several parts of a list, of sink and window, and more of them than are merged at once.
SMALL = dataclasses.replace(SMALL_BLOCKS, attended_tile=256, always_tile=256)
INT32 = np.iinfo(np.int32)


@pytest.fixture(params=[pytest.param(name, marks=marks) for name, marks in RUNNERS.items()])
def run(request) -> Runner:
    return Runner(request.param)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A step: letters of the contract, and what else is static."""

    selector: str = "threshold"
    T: int = 1
    K: int = 2
    G: int = 3
    H: int = 8
    of_value: int = 6
    S: int = 90
    dtype: str = "float32"
    cache_dtype: str | None = None
    kv_layout: str = "BSKH"
    counts: bool = False
    layers: int | None = None
    layer: int | None = None
    tuning: Any = SMALL
    sizes: Any = ()

    @property
    def config(self):
        sizes = {"num_bits": 2, "heavy_size": 6, "sink_size": 3, "window_size": 4}
        return IndexerConfig(cells=self.selector == "cells", **sizes | dict(self.sizes))


def sizes(**fields):
    return tuple(fields.items())


APART = dataclasses.replace(SMALL, attended_at_once=1)
CASES = {
    "plain": Case(),
    "three query tokens": Case(
        T=3, counts=True, G=4, H=34, of_value=20, dtype="bfloat16", kv_layout="BKSH",
        sizes=sizes(init_offset=9, table_dtype="bfloat16"),
    ),
    "top k, without sink and window": Case(
        selector="top_k", dtype="float16", counts=True, G=1,
        sizes=sizes(sink_size=0, window_size=0),
    ),
    "no budget, and a window larger than the context": Case(
        T=3, G=7, K=1, sizes=sizes(heavy_size=0, window_size=95), cache_dtype="bfloat16"
    ),
    "candidates from the sink on": Case(
        T=3, sizes=sizes(init_offset=2, sink_size=7), kv_layout="BKSH", S=61
    ),
    "many heads share a cache": Case(G=32, K=1, dtype="bfloat16", sizes=sizes(sink_size=21)),
    "cells": Case(selector="cells", dtype="bfloat16"),
    "cells, all but the search apart": Case(
        selector="cells", tuning=APART, counts=True, kv_layout="BKSH"
    ),
    "cells of the inner product": Case(
        selector="cells", counts=True, sizes=sizes(metric="ip", window_size=0, num_bits=3)
    ),
    "cells, as tuned": Case(
        selector="cells", tuning=H100, K=1, G=16, H=16, of_value=34, S=300,
        sizes=sizes(heavy_size=33, sink_size=0), kv_layout="BKSH",
    ),
    "cells of four query tokens": Case(
        selector="cells", T=4, counts=True, dtype="bfloat16", kv_layout="BKSH"
    ),
    "cells of eight query tokens": Case(selector="cells", T=8, K=1, G=2),
    "cells of three query tokens, all but the search apart": Case(
        selector="cells", T=3, tuning=APART, counts=True, layers=2, layer=1
    ),
    "more parts than are merged at once": Case(
        S=350, K=1, G=2, sizes=sizes(heavy_size=300), tuning=SMALL
    ),
    "the middle layer": Case(layers=3, layer=1, T=2, counts=True),
    "layers of cells, from the end": Case(layers=3, layer=-7, selector="cells", counts=True),
    "layers of cells, too far": Case(
        layers=2, layer=9, selector="cells", tuning=APART, kv_layout="BKSH"
    ),
}  # fmt: skip


def interesting_lengths(case, rows):
    """Lengths before a step, at which some rule begins or ends to hold for its tokens."""
    c, T = case.config, case.T
    short = c.short_context(T)
    first = max(c.sink_size, c.first_trained)
    edges = [
        case.S - T, short, short - T, 0, case.S, first + c.window_size + c.heavy_size,
        c.sink_size, case.S - T + 1, case.S - 9, c.sink_size + c.window_size, short + 1, -5,
        case.S + 7, first + c.window_size, INT32.max, c.window_size,
    ]  # fmt: skip
    return np.array([min(x, case.S) if 0 <= x < 4 * case.S else x for x in edges[:rows]], np.int32)


def draw(case, rows, seed=0):
    """(query, new, cache, counts) of a step, in numpy, with garbage behind each row's length."""
    rng = np.random.default_rng(seed)
    config, B = case.config, rows
    M, C = config.num_subspaces, config.num_centroids
    augmented = config.metric == "ip"
    lead = () if case.layers is None else (case.layers,)
    dtype = jnp.dtype(case.dtype)
    cache_dtype = jnp.dtype(case.cache_dtype or case.dtype)

    def integers(*shape, most=2, dtype=cache_dtype):
        return rng.integers(-most, most + 1, shape).astype(dtype)

    def tokens(number, size):
        shape = (number, case.K) if case.kv_layout == "BSKH" else (case.K, number)
        return (B, *shape, size)

    query = integers(B, case.T, case.K * case.G, case.H, dtype=dtype)
    new = Caches(*(integers(*tokens(case.T, size)) for size in (case.H, case.of_value)))
    caches = Caches(*(integers(*lead, *tokens(case.S, size)) for size in (case.H, case.of_value)))
    lengths = interesting_lengths(case, rows)
    if case.layers is not None:
        lengths = np.stack([np.roll(lengths, i) for i in range(case.layers)])
    behind = np.arange(case.S) >= np.clip(lengths, 0, case.S)[..., None]
    for cache in caches:
        flat = np.moveaxis(cache, cache.ndim - 4 + token_axis(case.kv_layout), len(lead) + 1)
        flat[behind] = np.nan
    of_rows = *lead, B, case.K, M
    index = PQIndex(
        codebooks=integers(*of_rows, C, case.H // M + augmented, dtype=np.float32),
        codes=rng.integers(0, 256, (*of_rows, case.S), np.uint8),
        lengths=lengths,
        phi=np.full(of_rows, 4.0 * case.H // M, np.float32) if augmented else None,
    )
    if config.cells:
        sealing = test_cells.small_sealing(case.S, config)
        with jax.default_device(CPU):
            index = jax.tree.map(jnp.asarray, index)
            if case.layers is None:
                index = test_cells.sealed_anew(index, config, sealing)
            else:
                each = [layer_of(index, i) for i in range(case.layers)]
                each = [test_cells.sealed_anew(x, config, sealing) for x in each]
                index = jax.tree.map(lambda *x: jnp.stack(x), *each)
            index = jax.tree.map(np.asarray, index)
    # The longest rows, every fourth, take tokens.
    counts = ((np.arange(B) + 2) % (case.T + 3) - 1).astype(np.int32) if case.counts else None
    return query, new, DecodeCache(*caches, index), counts


def layer_of(state, layer):
    return jax.tree.map(lambda x: x[layer], state)


def clipped(case):
    """The layer that is meant."""
    return min(max(case.layer, 0), case.layers - 1)


def written(cache, new, lengths, taken, kv_layout):
    """A cache [B, ...] in which each row's first new tokens are written behind its others."""
    cache = cache.copy()
    tokens, new = (np.moveaxis(x, token_axis(kv_layout), 1) for x in (cache, new))
    for b, (length, count) in enumerate(zip(lengths, taken, strict=True)):
        tokens[b, length : length + count] = new[b, :count]
    return cache


@functools.partial(jax.jit, static_argnames=("config", "kv_layout"), compiler_options=UNOPTIMIZED)
def lists_of_reference(query, key_new, index, counts, *, config, kv_layout):
    """The lists and the index of a step, without a kernel and without cells."""
    plain, index = dataclasses.replace(config, cells=False), dataclasses.replace(index, cells=None)
    return indexer_next(
        query, key_new, index, plain, counts=counts, kv_layout=kv_layout, implementation="xla"
    )


def expected(case, query, new, cache, counts, *, soft_cap=None):
    """The output in float64 and the state after a step, without cells, of one layer."""
    start = np.clip(cache.index.lengths.astype(np.int64), 0, case.S)
    wanted = np.full(len(start), case.T) if counts is None else np.clip(counts, 0, case.T)
    taken = np.where(start + wanted <= case.S, wanted, 0)
    caches = (
        written(old, x, start, taken, case.kv_layout)
        for old, x in zip((cache.key, cache.value), new, strict=True)
    )
    with jax.default_device(CPU):
        arrays = jax.tree.map(jnp.asarray, (query, new.key, cache.index, counts))
        selection, index = jax.tree.map(
            np.asarray,
            lists_of_reference(*arrays, config=case.config, kv_layout=case.kv_layout),
        )
    after = DecodeCache(*caches, index)
    out, _ = oracle.attention(
        query, after.key, after.value, selection.indices, kv_layout=case.kv_layout,
        soft_cap=soft_cap,
    )  # fmt: skip
    return out, after


def same_state(got, want, config):
    """Bit for bit, and cells as the codes say."""
    got, want = jax.tree.map(np.asarray, (got, want))
    for name in ("key", "value"):
        one, other = getattr(got, name), getattr(want, name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8), err_msg=name)
    for name in ("codebooks", "codes", "lengths", "phi"):
        one, other = getattr(got.index, name), getattr(want.index, name)
        np.testing.assert_array_equal(one, other, err_msg=name)
    if config.cells:
        test_cells.check_state(jax.tree.map(jnp.asarray, got.index), config)


def close(got, want, dtype):
    """Up to float32 rounding, of exponentials above all, and one rounding to `dtype`."""
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(
        np.asarray(got, np.float64), want, rtol=tolerance, atol=2 * tolerance
    )


def decode_by_kernels(
    query, new, cache, counts, scale, soft_cap, layer, *, config, selector, kv_layout, tuning
):
    """What `decode_attention` launches, cut up in another way."""
    T, N = query.shape[1:3]
    step = Step.of(cache.index, config, T=T, N=N, kv_layout=kv_layout, tuning=tuning)
    caches, logits = Caches(cache.key, cache.value), Logits(scale, soft_cap)
    out, caches, index, _ = pipeline.launch_decode(
        step, query, new, caches, cache.index, None, counts, logits, selector, layer
    )
    return out, DecodeCache(*caches, index)


# The interpreter compiles for seconds, checked memory is slow: most cases run on one of them.
ON_CHECKED_MEMORY = {
    "plain",
    "three query tokens",
    "no budget, and a window larger than the context",
    "candidates from the sink on",
    "cells",
    "cells, all but the search apart",
    "cells of eight query tokens",
    "layers of cells, too far",
}


def runs(name, runner):
    return runner == "triton" or (runner == "checked memory") == (name in ON_CHECKED_MEMORY)


@pytest.mark.parametrize(
    ("run", "name"),
    [
        pytest.param(runner, name, id=f"{runner}-{name}", marks=marks)
        for name in CASES
        for runner, marks in RUNNERS.items()
        if runs(name, runner)
    ],
    indirect=["run"],
)
def test_a_step_writes_appends_selects_and_attends(run, name):
    """Rows full, short, empty, of lengths that are none; garbage behind them is not read."""
    case = CASES[name]
    rows = {"interpreter": 16, "checked memory": 4, "triton": 16}[run.name]
    query, new, cache, counts = draw(case, rows)
    soft_cap = np.float32(3) if case.counts else None
    layer = None if case.layer is None else np.int32(case.layer)
    out, after = run(
        decode_by_kernels, query, new, cache, counts, np.float32(case.H**-0.5), soft_cap, layer,
        config=case.config, selector=case.selector, kv_layout=case.kv_layout, tuning=case.tuning,
    )  # fmt: skip
    before = cache
    if layer is not None:
        others = [i for i in range(case.layers) if i != clipped(case)]
        for one, other in zip(
            jax.tree.leaves(layer_of(after, others)),
            jax.tree.leaves(layer_of(cache, others)),
            strict=True,
        ):
            np.testing.assert_array_equal(one, other)
        before, after = (layer_of(x, clipped(case)) for x in (cache, after))
    want, state = expected(case, query, new, before, counts, soft_cap=soft_cap)
    same_state(after, state, case.config)
    assert out.dtype == jnp.dtype(case.dtype)
    close(out, want, case.dtype)
    padding = np.arange(case.T) >= (case.T if counts is None else counts[:, None])
    assert (np.asarray(out)[np.broadcast_to(padding, out.shape[:2])] == 0).all()
    for output, writes in run.writes.items():
        is_searched = "search" in output or "cells_select" in output  # filled, then replaced
        assert writes.max() <= 1 or is_searched, output


# Data decides: lengths and counts of every kind, in one compiled step.


@functools.cache
def compiled(name):
    """The kernels of a step in the interpreter, and what they are given: query, new and cache."""
    case = CASES[name]
    run = functools.partial(
        decode_by_kernels, config=case.config, selector=case.selector, kv_layout=case.kv_layout,
        tuning=case.tuning,
    )  # fmt: skip
    query, new, cache, _ = draw(case, 4, seed=1)
    with jax.default_device(CPU), backend.interpreted():
        return jax.jit(run, compiler_options=UNOPTIMIZED), query, new, cache


@hypothesis.settings(max_examples=30)
@hypothesis.given(
    lengths=st.lists(st.integers(-3, 93) | st.sampled_from([INT32.min, INT32.max]), min_size=4,
                     max_size=4),
    counts=st.lists(st.integers(-2, 5) | st.just(INT32.max), min_size=4, max_size=4),
    cap=st.sampled_from([0.5, 30.0]),
)  # fmt: skip
def test_steps_of_any_lengths_and_counts(lengths, counts, cap):
    name = "three query tokens"
    run, query, new, cache = compiled(name)
    case = CASES[name]
    lengths, counts = np.array(lengths, np.int32), np.array(counts, np.int32)
    keys, values = (np.where(np.isnan(x), x.dtype.type(1), x) for x in (cache.key, cache.value))
    cache = DecodeCache(keys, values, dataclasses.replace(cache.index, lengths=lengths))
    with jax.default_device(CPU), backend.interpreted():
        out, after = run(query, new, cache, counts, np.float32(case.H**-0.5), np.float32(cap), None)
    want, state = expected(case, query, new, cache, counts, soft_cap=np.float32(cap))
    same_state(after, state, case.config)
    close(out, want, case.dtype)


def test_a_row_has_the_same_bits_alone_and_in_a_batch():
    """Of real numbers: any other order of a sum would show."""
    run, query, new, cache = compiled("three query tokens")
    rng = np.random.default_rng(0)

    def real(x):
        return np.where(np.isnan(x), np.nan, rng.standard_normal(x.shape)).astype(x.dtype)

    query, new = jax.tree.map(real, (query, new))
    cache = dataclasses.replace(cache, key=real(cache.key), value=real(cache.value))
    lengths = np.array([5, 70, 87, 0], np.int32)
    cache.index.lengths[:] = lengths
    counts = np.array([3, 2, 3, 1], np.int32)
    with jax.default_device(CPU), backend.interpreted():

        def decode(rows):
            arrays = jax.tree.map(lambda x: x[rows], (query, new, cache, counts))
            return jax.tree.map(np.asarray, run(*arrays, np.float32(0.3), np.float32(9), None))

        together, alone = decode(slice(None)), decode(slice(1, 2))
    assert np.asarray(alone[0]).any()
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        np.testing.assert_array_equal(one.view(np.uint8), other[1:2].view(np.uint8))


# Kernels by themselves.


def write(new, cache, counts, layer, *, case):
    step = Step.of(cache.index, case.config, T=case.T, kv_layout=case.kv_layout)
    before, caches = Lengths(cache.index.lengths, counts), Caches(cache.key, cache.value)
    launch = kernels.write_launch(step, new, caches, before, layer)
    made = backend.launch(launch, num_warps=4)
    return Caches(made.key, made.value)


@pytest.mark.parametrize("layers", [None, 2])
@pytest.mark.parametrize("kv_layout", ["BSKH", "BKSH"])
def test_new_tokens_are_written_once_and_nothing_else_is(run, kv_layout, layers):
    case = Case(T=3, counts=True, S=20, kv_layout=kv_layout, layers=layers, dtype="float16")
    _, new, cache, _ = draw(case, 5)
    lengths = np.array([0, 17, 18, 20, -4], np.int32)
    counts = np.array([2, 9, 3, 1, 1], np.int32)
    taken = np.array([2, 3, 0, 0, 1])
    start = np.clip(lengths, 0, 20)
    layer = None if layers is None else np.int32(1)
    of_layer = lengths if layers is None else np.stack([lengths * 0 + 5, lengths])
    cache = dataclasses.replace(cache, index=dataclasses.replace(cache.index, lengths=of_layer))
    found = run(write, new, cache, counts, layer, case=case)
    for got, old, x in zip(found, (cache.key, cache.value), new, strict=True):
        want = old.copy()
        into = want if layers is None else want[1]
        into[...] = written(into, x, start, taken, kv_layout)
        np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))
    for writes in run.writes.values():
        assert writes.max() == 1
        assert writes.sum() == taken.sum() * case.K * writes.shape[-1]


def always(query, new, cache, counts, layer, *, case):
    step = Step.of(
        cache.index, case.config, T=case.T, N=query.shape[2], kv_layout=case.kv_layout,
        tuning=case.tuning,
    )  # fmt: skip
    before, caches = Lengths(cache.index.lengths, counts), Caches(cache.key, cache.value)
    logits = Logits(jnp.float32(case.H**-0.5), jnp.float32(7))
    launch = kernels.always_launch(step, query, new, caches, before, logits, layer)
    return backend.launch(launch, num_warps=4)


def merged(parts):
    """(output, log of the sum of exponentials) of parts, in float64."""
    largest, total, values = (np.asarray(x, np.float64) for x in parts)
    most = largest.max(-1, keepdims=True)
    weight = np.exp(largest - np.where(np.isneginf(most), 0, most))
    whole = (total * weight).sum(-1)
    empty = whole == 0
    out = (values * weight[..., None]).sum(-2) / np.where(empty, 1, whole)[..., None]
    with np.errstate(divide="ignore"):
        return out, np.where(empty, -np.inf, most[..., 0] + np.log(whole))


def always_positions(case, lengths, counts):
    """What is always attended to (rule 1), -1 elsewhere: [B, T, N, sink + window]."""
    visible = oracle.visible(lengths, case.S, case.T, counts)
    position = np.arange(case.S)
    config = case.config
    found = np.full((*visible.shape, case.S), -1)
    for row in np.ndindex(visible.shape):
        V = visible[row]
        listed = (position < config.sink_size) | (position >= V - config.window_size)
        found[row] = np.where(listed & (position < V), position, -1)
    return np.repeat(found[:, :, None], case.K * case.G, axis=2)


@pytest.mark.parametrize("G", [1, 5, 32])
@pytest.mark.parametrize("kv_layout", ["BSKH", "BKSH"])
def test_sink_and_window_are_attended_to_before_they_are_written(run, kv_layout, G):
    """Places of new tokens hold NaN: the step's own are read from where they come from."""
    if run.name != "interpreter" and (G, kv_layout) == (32, "BSKH"):
        pytest.skip("one of the two layouts is enough for many heads")
    case = Case(
        T=3, G=G, K=1 if G == 32 else 2, counts=True, S=40, kv_layout=kv_layout, H=18, of_value=33,
        sizes=sizes(sink_size=20, window_size=9), layers=2, layer=0,
    )  # fmt: skip
    query, new, cache, _ = draw(case, 4)
    counts = np.array([3, 1, 2, 0], np.int32)
    lengths = np.array([36, 7, 0, 12], np.int32)
    keys, values = (np.nan_to_num(x) for x in (cache.key, cache.value))
    for x in (keys, values):
        tokens = np.moveaxis(x, 1 + token_axis(kv_layout), 2)
        tokens[0][np.arange(40) >= lengths[:, None]] = np.nan
        tokens[1] = np.nan
    index = dataclasses.replace(cache.index, lengths=np.stack([lengths, lengths + 1]))
    parts = run(
        always, query, new, DecodeCache(keys, values, index), counts, np.int32(0), case=case
    )
    after = (
        written(x[0], of_new, lengths, counts, kv_layout)
        for x, of_new in zip((keys, values), new, strict=True)
    )
    listed = always_positions(case, lengths + counts, counts)
    want = oracle.attention(query, *after, listed, soft_cap=7.0, kv_layout=kv_layout)
    for one, other in zip(merged(parts), want, strict=True):
        close(one, other, "float32")
    for writes in run.writes.values():
        assert (writes == 1).all()


def merge(parts, lengths, after):
    query = jax.ShapeDtypeStruct((*parts[0].largest.shape[:3], 1), np.float32)
    shapes = kernels.shapes_of_end(query, parts[0].values.shape[-1], lengths, after, None)
    inputs = kernels.MergeInputs(parts, None, after, lengths)
    programs = parts[0].total[..., 0].size
    merge = backend.Launch(kernels.merge_kernel, inputs, shapes, programs, kernels.REACHED)
    return backend.launch(merge, num_warps=4)


@pytest.mark.parametrize("numbers", [(1,), (3, 1), (2, 35)], ids=str)
def test_parts_are_merged_and_lengths_replaced(run, numbers):
    """Empty parts, and queries of empty parts alone; logits far apart."""
    rng = np.random.default_rng(0)

    def draw_parts(number):
        shape = (3, 2, 2, number)
        largest = (rng.standard_normal(shape) * 30).astype(np.float32)
        total = rng.uniform(1, 9, shape).astype(np.float32)
        values = rng.standard_normal((*shape, 19)).astype(np.float32) * total[..., None]
        empty = rng.random(shape) < 0.3
        empty[0] = True
        largest[empty], total[empty], values[empty] = -np.inf, 0, 0
        return kernels.Parts(largest, total, values)

    parts = tuple(draw_parts(number) for number in numbers)
    before, after = (
        Lengths(np.array(x, np.int32), None, high_water=np.array(y, np.int32))
        for x, y in (([3, 0, 9], [4, 5, 9]), ([4, 0, 7], [4, 8, 9]))
    )
    ended = run(merge, parts, before, after)
    jax.tree.map(np.testing.assert_array_equal, ended.lengths, after)
    together = (np.concatenate(x, axis=3) for x in zip(*parts, strict=True))
    for one, other in zip(ended.output, merged(together), strict=True):
        close(one, other, "float32")
    assert (np.asarray(ended.output.out[0]) == 0).all()
    assert np.isneginf(np.asarray(ended.output.lse[0])).all()


def search_and_attend(table, query, caches, index, known, *, config, tuning):
    """What follows a table by cells, as the last kernel of a step."""
    step = Step.of(index, config, N=query.shape[2], tuning=tuning)
    logits = Logits(jnp.float32(0.5), None)
    tables = tables_from(table, step)
    after, before = (
        Lengths(index.lengths + x, None, high_water=index.high_water + x) for x in (0, 1)
    )
    of_cells = step, tables, index, after, query, caches, logits, known
    ended, _ = attend_cells(*of_cells, before, None)
    return ended


def nothing_known(query, of_value):
    shape = (*query.shape[:3], 1)
    largest, total = np.full(shape, -np.inf, np.float32), np.zeros(shape, np.float32)
    return kernels.Parts(largest, total, np.zeros((*shape, of_value), np.float32))


def cells_and_caches(config, lengths):
    rng = np.random.default_rng(0)
    index = test_cells.start(config, lengths)
    B, K, _, S = index.codes.shape
    query = rng.standard_normal((B, 1, K * test_cells.G, 8)).astype(np.float32)
    caches = Caches(*(rng.standard_normal((B, S, K, H)).astype(np.float32) for H in (8, 5)))
    return index, query, caches


@pytest.mark.parametrize("kind", ["random", "zeros", "no numbers"])
def test_the_winners_among_cells_are_attended_to_once_each(run, kind):
    """All but sink and window, which would come from elsewhere."""
    config = test_cells.config_of(heavy_size=20)
    index, query, caches = cells_and_caches(config, [150, 61, 30])
    table = test_cells.table_of(kind, config, np.random.default_rng(1))
    ended = run(
        search_and_attend, table, query, caches, index, nothing_known(query, 5), config=config,
        tuning=SMALL,
    )  # fmt: skip
    with jax.default_device(CPU):
        want = reference.select_from_table(table, index.codes, index.lengths, None, config, None)
    listed, lengths = np.array(want.indices), np.asarray(index.lengths)[:, None, None, None]
    is_always = (listed < config.sink_size) | (listed >= lengths - config.window_size)
    listed[is_always] = -1
    for one, other in zip(
        ended.output, oracle.attention(query, *caches, listed, scale=0.5), strict=True
    ):
        close(one, other, "float32")
    np.testing.assert_array_equal(ended.lengths.lengths, index.lengths)
    np.testing.assert_array_equal(ended.lengths.high_water, index.high_water)
    for name, writes in run.writes.items():
        if "output" in name:
            assert (writes == 1).all(), name


@pytest.mark.parametrize("lengths", [[50, 119, 300], [172, 180, 9]])
def test_lengths_set_by_hand_attend_to_some_tokens_and_leave_no_array(lengths):
    """As many as there should be: of values that are all one nothing else is left."""
    config = test_cells.config_of(heavy_size=20)
    index, query, caches = cells_and_caches(config, [120, 120, 137])
    index = dataclasses.replace(index, lengths=jnp.asarray(lengths, jnp.int32))
    caches = caches._replace(value=np.ones_like(caches.value))
    table = test_cells.table_of("zeros", config, np.random.default_rng(1))
    ended = Runner("checked memory")(
        search_and_attend, table, query * 0, caches, index, nothing_known(query, 5),
        config=config, tuning=SMALL,
    )  # fmt: skip
    np.testing.assert_allclose(ended.output.out, 1, rtol=1e-6)
    is_short = np.asarray(lengths) <= config.short_context(1)
    always = config.sink_size + config.window_size
    number = np.where(is_short, np.asarray(lengths) - always, config.heavy_size)
    want = np.broadcast_to(np.log(np.maximum(number, 1))[:, None, None], ended.output.lse.shape)
    np.testing.assert_allclose(ended.output.lse[number > 0], want[number > 0], rtol=1e-6)


# Many steps.


@contextlib.contextmanager
def on(implementation):
    """Kernels run in the interpreter where there is no GPU."""
    with backend.interpreted() if implementation == "kernels" else contextlib.nullcontext():
        yield "triton" if implementation == "kernels" else "xla"


DECODES = {
    "one token, by cells": Case(selector="cells", S=160, counts=True, K=1, G=2),
    "three tokens, in the last of two layers": Case(
        T=3, layers=2, layer=1, S=70, counts=True, kv_layout="BKSH", K=1, G=2
    ),
}


@pytest.mark.parametrize(
    ("implementation", "name"),
    [("xla", next(iter(DECODES))), *(("kernels", name) for name in DECODES)],
)
def test_every_step_of_a_decode_is_what_it_is_made_of(implementation, name):
    """Rows are emptied and get prompts in between; another layer keeps its bits."""
    case, steps = DECODES[name], 70
    config, T, rows = case.config, case.T, 3
    rng = np.random.default_rng(0)
    _, _, drawn, _ = draw(case, rows)
    lengths = np.array([40, 0, case.S - 30], np.int32)
    layer = None if case.layers is None else jnp.int32(case.layer)
    lengths = lengths if layer is None else np.stack([lengths[::-1], lengths])
    index = jax.tree.map(jnp.asarray, dataclasses.replace(drawn.index, lengths=lengths))
    if config.cells:
        index = test_cells.sealed_anew(index, config)
    key, value = (jnp.zeros_like(x) for x in (drawn.key, drawn.value))
    start = cache = DecodeCache(key, value, index)
    static = {"config": config, "kv_layout": case.kv_layout}

    def one(state):
        return state if layer is None else layer_of(state, layer)

    @functools.partial(jax.jit, compiler_options=UNOPTIMIZED)
    def decode(query, new, cache, counts):
        return decode_attention(
            query, *new, cache, counts=counts, layer=layer, implementation=chosen,
            selector=case.selector if chosen == "triton" else None, **static,
        )  # fmt: skip

    @functools.partial(jax.jit, compiler_options=UNOPTIMIZED)
    def appended(new, index, counts):
        return append(index, new.key, counts=counts, layer=layer, implementation=chosen, **static)

    @functools.partial(jax.jit, compiler_options=UNOPTIMIZED)
    def attended(query, key, value, index, before, counts):
        room, _ = reference.make_room(before, counts, T, case.S)
        lists = reference.select_tokens(query, index, config, room.taken, None)
        return sparse_attention(
            query, key, value, lists, kv_layout=case.kv_layout, implementation="xla"
        )

    @jax.jit
    def restarted(cache, prompt, rows, lengths):
        # As few trainable keys as centroids, which are these keys then: integers, as they were.
        return prefill(
            *prompt, lengths, cache=cache, rows=rows, layer=layer, implementation="xla", **static
        )

    with on(implementation) as chosen:
        for number in range(steps):
            query, new, _, _ = draw(dataclasses.replace(case, layers=None), rows, seed=number)
            counts = jnp.asarray(rng.integers(0, T + 3, rows).clip(0, T), jnp.int32)
            if number % 20 == 10:
                empty = jnp.asarray(rng.random(rows) < 0.5)
                index = reset(cache.index, empty, layer=layer)
                cache = dataclasses.replace(cache, index=index)
            if number % 20 == 19:
                prompt = Caches(cache.key, cache.value)
                prompt = jax.tree.map(lambda x: rng.integers(-2, 3, x.shape[-4:]), prompt)
                prompt = jax.tree.map(lambda x: jnp.asarray(x, np.float32), prompt)
                lengths = jnp.asarray(rng.integers(0, config.first_trained + 5, rows), jnp.int32)
                cache = restarted(cache, prompt, jnp.asarray([True, number > 30, False]), lengths)
            before, its_lengths = one(cache), np.asarray(one(cache.index.lengths))
            out, cache = decode(query, new, cache, counts)
            taken = np.where(its_lengths + counts <= case.S, counts, 0)
            key, value = (
                written(np.asarray(old), x, its_lengths, taken, case.kv_layout)
                for old, x in zip((before.key, before.value), new, strict=True)
            )
            np.testing.assert_array_equal(one(cache.key), key)
            np.testing.assert_array_equal(one(cache.value), value)
            index = appended(new, start_of_step(cache, before.index, layer), counts)
            jax.tree.map(np.testing.assert_array_equal, one(cache.index), one(index))
            if config.cells:
                test_cells.check_state(one(cache.index), config)
            plain = dataclasses.replace(one(index), cells=None)
            want = attended(query, key, value, plain, its_lengths, counts)
            close(out, want, "float32")
    if layer is not None:
        jax.tree.map(np.testing.assert_array_equal, layer_of(cache, 0), layer_of(start, 0))


def start_of_step(cache, index, layer):
    """The index before a step, behind an axis of layers if there is one."""
    if layer is None:
        return index
    return jax.tree.map(lambda x, one: x.at[layer].set(one), cache.index, index)
