"""Stacked layers: every function does to one layer what it does to that layer alone.

And the life of a cache of several layers: emptied, filled with prompts, decoded, by plain XLA and
by the kernels in Pallas's interpreter.
"""

import contextlib
import dataclasses
import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_indexer import (
    DecodeCache,
    IndexerConfig,
    PQIndex,
    append,
    build_index,
    decode_attention,
    empty_cache,
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

LAYERS, B, N, K, H, VALUE_H, S, C = 3, 2, 4, 2, 8, 6, 56, 4
SIZES = {"num_bits": 2, "heavy_size": 5, "sink_size": 2, "window_size": 3, "kmeans_iters": 2}
PLAIN = IndexerConfig(**SIZES)
CELLS = IndexerConfig(metric="ip", cells=True, **SIZES)
# Between two rows of a layer, and between layers: short, long, full, empty.
LENGTHS = np.array([[40, 17], [S, 50], [0, S - 1]], np.int32)
ROWS = np.array([True, False])


class Case(NamedTuple):
    """What runs: an implementation, a config, and a selector for it."""

    implementation: str
    config: IndexerConfig
    selector: str | None

    def runs(self):
        """Inside, "triton" is there, in the interpreter."""
        kernels = self.implementation == "triton"
        return backend.interpreted() if kernels else contextlib.nullcontext()


CASES = {
    "xla": Case("xla", PLAIN, None),
    "xla, inner product, cells": Case("xla", CELLS, None),
    "kernels": Case("triton", PLAIN, "threshold"),
    "kernels, inner product, cells": Case("triton", CELLS, "cells"),
}


def draw(*shape, seed=0):
    """Small integers: all that is computed from codes and tables is exact."""
    return jnp.asarray(np.random.default_rng(seed).integers(-3, 4, shape), jnp.float32)


def stacked_cache(config):
    """A cache of several layers, of lengths that differ, each full of keys."""
    augmented = config.metric == "ip"
    codes = np.random.default_rng(1).integers(0, C, (LAYERS, B, K, 2, S), np.uint8)
    index = PQIndex(
        codebooks=draw(LAYERS, B, K, 2, C, H // 2 + augmented, seed=2),
        codes=jnp.asarray(codes),
        lengths=jnp.asarray(LENGTHS),
        phi=jnp.full((LAYERS, B, K, 2), 40.0) if augmented else None,
        capacity=S,
    )
    index = with_cells(index, config) if config.cells else index
    key, value = draw(LAYERS, B, S, K, H, seed=3), draw(LAYERS, B, S, K, VALUE_H, seed=4)
    return DecodeCache(key, value, index)


def step_inputs(tokens=1):
    return {
        "query": draw(B, tokens, N, H, seed=5),
        "key_new": draw(B, tokens, K, H, seed=6),
        "value_new": draw(B, tokens, K, VALUE_H, seed=7),
    }


def one_layer(state, layer):
    return jax.tree.map(lambda x: x[layer], state)


def check_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def everything(case, cache, layer):
    """What each function makes of a layer, None for a cache of one: results and states by name."""
    x, config, index = step_inputs(), case.config, cache.index
    query, key_new = x["query"], x["key_new"]
    by = {"layer": layer, "implementation": case.implementation}
    selecting = by | {"selector": case.selector}
    selection = select(query, index, config, **selecting)
    attention = sparse_attention(
        query, cache.key, cache.value, selection, return_lse=True, logits_soft_cap=9.0, **by
    )
    listed, stepped = indexer_next(
        query, key_new, index, config, counts=jnp.asarray([1, 0]), **selecting
    )
    out, decoded = decode_attention(**x, cache=cache, config=config, **selecting)
    results = {
        "select": selection,
        "sparse_attention": attention,
        "indexer_next": listed,
        "decode_attention": out,
    }
    states = {
        "indexer_next": (stepped, index),
        "decode_attention": (decoded, cache),
        "append": (append(index, key_new, config, **by), index),
        "reset": (reset(index, jnp.asarray(ROWS), layer=layer), index),
    }
    # What compiles longest takes a layer out before it chooses an implementation.
    if case.implementation == "xla" and not config.cells:
        results["rebuild_gain"] = rebuild_gain(index, cache.key, config, **by)
    if case.implementation == "xla" and config.cells:
        states["rebuild"] = rebuild(index, cache.key, config, jnp.asarray(ROWS), **by), index
    if config.cells:
        states["with_cells"] = with_cells(index, config, layer=layer), index
        many = step_inputs(tokens=9)["key_new"]
        states["append of many"] = append(index, many, config, **by), index
    return results, states


@functools.cache
def made(name):
    """A stacked cache, what each layer alone becomes, and what all do for one of them."""
    case = CASES[name]
    with case.runs():
        cache = stacked_cache(case.config)
        alone = jax.jit(lambda cache: everything(case, cache, None))
        alone = [alone(one_layer(cache, layer)) for layer in range(LAYERS)]
        stacked = jax.jit(lambda cache, layer: everything(case, cache, layer))
        return cache, alone, {n: stacked(cache, jnp.int32(n)) for n in (0, 2, -3, 7)}


@pytest.mark.parametrize("name", CASES)
def test_a_layer_becomes_what_it_becomes_alone_and_the_others_stay(name):
    """Numbers beside the layers that are there are clipped to them."""
    _, alone, found = made(name)
    for layer, (results, states) in found.items():
        place = min(max(layer, 0), LAYERS - 1)
        want_results, want_states = alone[place]
        check_same(results, want_results)
        for function, (after, before) in states.items():
            want, _ = want_states[function]
            for other in range(LAYERS):
                check_same(
                    one_layer(after, other),
                    want if other == place else one_layer(before, other),
                )
            # Or nothing would have been shown: a full row takes nothing.
            if place == 0 and function != "with_cells":
                changed = jax.tree.map(lambda x, y: bool((x != y).any()), after, before)
                assert any(jax.tree.leaves(changed)), function


@pytest.mark.parametrize("kind", [int, np.int32, np.int64, jnp.int32])
@pytest.mark.parametrize("layer", [1, -1, LAYERS])
def test_a_layer_may_be_any_integer(kind, layer, compilations):
    """And no two of them are compiled apart."""
    cache, x = stacked_cache(PLAIN), step_inputs()
    place = min(max(layer, 0), LAYERS - 1)
    functions = (
        lambda index, **layer: select(x["query"], index, PLAIN, **layer),
        lambda index, **layer: append(index, x["key_new"], PLAIN, **layer),
        lambda index, **layer: reset(index, ROWS, **layer),
    )
    jax.block_until_ready([f(cache.index, layer=0) for f in functions])
    before = compilations()
    selection, appended, emptied = (f(cache.index, layer=kind(layer)) for f in functions)
    assert compilations() == before
    alone = one_layer(cache.index, place)
    check_same(selection, functions[0](alone))
    check_same(one_layer(appended, place), functions[1](alone))
    check_same(one_layer(emptied, place), functions[2](alone))


@pytest.mark.parametrize("layer", [10**12, -(10**12), np.int64(2**31)], ids=str)
def test_integers_beyond_32_bits_are_clipped_too(layer):
    index = stacked_cache(PLAIN).index
    got = reset(index, ROWS, layer=layer)
    check_same(got, reset(index, ROWS, layer=LAYERS - 1 if layer > 0 else 0))


def test_reset_without_a_layer_is_reset_of_each():
    for config in (PLAIN, CELLS):
        index = stacked_cache(config).index
        got = reset(index, ROWS)
        for layer in range(LAYERS):
            check_same(one_layer(got, layer), reset(one_layer(index, layer), ROWS))
        assert got.lengths.tolist() == [[0, 17], [0, 50], [0, S - 1]]


def test_with_cells_without_a_layer_makes_those_of_each():
    index = stacked_cache(CELLS).index
    got = with_cells(dataclasses.replace(index, cells=None), CELLS)
    assert len({x.tobytes() for x in np.asarray(got.cells.order)}) == LAYERS
    for layer in range(LAYERS):
        bare = dataclasses.replace(one_layer(index, layer), cells=None)
        check_same(one_layer(got, layer), with_cells(bare, CELLS))


def test_with_cells_of_a_layer_makes_anew_what_was_spoiled():
    index = stacked_cache(CELLS).index
    cells = dataclasses.replace(index.cells, order=index.cells.order.at[1].set(-7))
    spoiled = dataclasses.replace(index, cells=cells)
    check_same(with_cells(spoiled, CELLS, layer=1), index)
    check_same(with_cells(spoiled, CELLS, layer=0), spoiled)


@pytest.mark.parametrize("name", ["xla, inner product, cells", "kernels, inner product, cells"])
def test_a_scan_over_layers_that_carries_the_cache_decodes_each(name):
    case = CASES[name]
    cache, alone, _ = made(name)

    @jax.jit
    def token(cache, x):
        def layer(cache, number):
            out, cache = decode_attention(
                **x,
                cache=cache,
                config=case.config,
                layer=number,
                implementation=case.implementation,
                selector=case.selector,
            )
            return cache, out

        return lax.scan(layer, cache, jnp.arange(LAYERS, dtype=jnp.int32))

    with case.runs():
        after, outputs = token(cache, step_inputs())
    for layer, (results, states) in enumerate(alone):
        check_same(one_layer(after, layer), states["decode_attention"][0])
        np.testing.assert_array_equal(outputs[layer], results["decode_attention"])


# The life of a cache.

PROMPT = 30


def prompts():
    """Keys, values and lengths: one prompt shorter than the others, and one said to be longer."""
    rng = np.random.default_rng(8)
    key, value = (
        jnp.asarray(rng.standard_normal((B, PROMPT, K, size)), jnp.float32) for size in (H, VALUE_H)
    )
    return key, value, jnp.asarray([PROMPT + 5, 21], jnp.int32)


def head_major(x):
    return x.swapaxes(-2, -3)


def test_prefill_without_a_cache_is_build_index():
    key, value, lengths = prompts()
    got = prefill(key, value, lengths, CELLS, seed=3)
    check_same(got, DecodeCache(key, value, build_index(key, lengths, CELLS, seed=3)))


@pytest.mark.parametrize("kv_layout", ["BSKH", "BKSH"])
@pytest.mark.parametrize("config", [PLAIN, CELLS], ids=["plain", "inner product, cells"])
def test_prefill_writes_marked_rows_of_a_layer_and_trains_on_them(config, kv_layout):
    """As rebuild does on the cache with the prompts in it; what is not marked keeps every bit."""
    key, value, lengths = prompts()
    cache = stacked_cache(config)
    written = [
        old.at[1, 0, :PROMPT].set(new[0])
        for old, new in ((cache.key, key), (cache.value, value))
    ]  # fmt: skip
    options = {"seed": 5, "kv_layout": kv_layout}
    if kv_layout == "BKSH":
        key, value, *written = map(head_major, (key, value, *written))
        cache = dataclasses.replace(cache, key=head_major(cache.key), value=head_major(cache.value))
    filling = functools.partial(prefill, config=config, rows=jnp.asarray(ROWS), **options)
    got = filling(key, value, lengths, cache=cache, layer=1)
    np.testing.assert_array_equal(got.key, written[0])
    np.testing.assert_array_equal(got.value, written[1])
    clipped = jnp.asarray([PROMPT, 21], jnp.int32)
    index = rebuild(
        cache.index, written[0], config, jnp.asarray(ROWS), lengths=clipped, layer=1, **options
    )
    check_same(got.index, index)
    assert got.index.lengths.tolist() == [LENGTHS[0].tolist(), [PROMPT, 50], LENGTHS[2].tolist()]
    for layer in (0, 2):
        check_same(one_layer(got, layer), one_layer(cache, layer))
    others = [jax.tree.map(lambda x: x[1, 1], state) for state in (got, cache)]
    check_same(*others)


def test_prefill_of_all_rows_under_jit_is_in_the_memory_that_it_was_given():
    key, value, lengths = prompts()
    cache = empty_cache(CELLS, B, S, K, H, value_head_dim=VALUE_H, dtype=jnp.float32, layers=LAYERS)
    want = prefill(key, value, lengths, CELLS, cache=cache, layer=2)
    filling = jax.jit(
        lambda cache, layer: prefill(key, value, lengths, CELLS, cache=cache, layer=layer),
        donate_argnames="cache",
    )
    old = [(x, x.unsafe_buffer_pointer()) for x in (cache.key, cache.value, cache.index.codes)]
    got = filling(cache, 2)
    for (x, place), new in zip(old, (got.key, got.value, got.index.codes), strict=True):
        assert x.is_deleted()
        assert new.unsafe_buffer_pointer() == place
    check_same(got, want)
    assert got.index.lengths.tolist() == [[0, 0], [0, 0], [PROMPT, 21]]
    built = build_index(got.key[2], jnp.asarray([PROMPT, 21], jnp.int32), CELLS)
    check_same(one_layer(got.index, 2), built)


@pytest.mark.parametrize("layers", [None, LAYERS])
def test_a_decode_follows_a_prefill(layers):
    """The step's token sees the whole of a prompt that is short, and itself."""
    config = PLAIN if layers is None else CELLS
    key, value, _ = prompts()
    lengths = jnp.asarray([config.short_context() - 1, 7], jnp.int32)
    sizes = {"value_head_dim": VALUE_H, "dtype": jnp.float32, "layers": layers}
    cache = empty_cache(config, B, S, K, H, **sizes)
    layer = None if layers is None else 1
    cache = prefill(key, value, lengths, config, cache=cache, layer=layer)
    x = step_inputs()
    out, after = decode_attention(**x, cache=cache, config=config, layer=layer)
    for row, length in enumerate(lengths.tolist()):
        keys, values = (
            jnp.concatenate([old[row : row + 1, :length], new[row : row + 1]], axis=1)
            for old, new in ((key, x["key_new"]), (value, x["value_new"]))
        )
        values = jnp.pad(values, ((0, 0),) * 3 + ((0, H - VALUE_H),))
        want = jax.nn.dot_product_attention(x["query"][row : row + 1], keys, values)
        np.testing.assert_allclose(out[row], want[0, ..., :VALUE_H], rtol=2e-6, atol=2e-6)
    grown = after.index.lengths if layer is None else after.index.lengths[layer]
    assert grown.tolist() == (lengths + 1).tolist()


@pytest.mark.parametrize("kv_layout", ["BSKH", "BKSH"])
@pytest.mark.parametrize("layers", [None, LAYERS])
@pytest.mark.parametrize("config", [PLAIN, CELLS], ids=["plain", "inner product, cells"])
def test_an_empty_cache_has_the_state_of_a_cache_that_was_emptied(config, layers, kv_layout):
    sizes = {"value_head_dim": VALUE_H, "dtype": jnp.float32, "layers": layers}
    cache = empty_cache(config, B, S, K, H, kv_layout=kv_layout, **sizes)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), stacked_cache(config))
    if kv_layout == "BKSH":
        cache = dataclasses.replace(cache, key=head_major(cache.key), value=head_major(cache.value))
    if layers is None:
        shapes = jax.tree.map(
            lambda x: (x[0][1:], x[1]), shapes, is_leaf=lambda x: isinstance(x, tuple)
        )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), cache) == shapes
    nothing = with_cells(cache.index, config) if config.cells else cache.index
    check_same(cache.index, nothing)
    check_same(reset(cache.index, np.ones(B, bool)), cache.index)


def test_a_token_appended_to_an_empty_cache_is_attended_to():
    for config, layers, layer in ((PLAIN, None, None), (CELLS, LAYERS, 1)):
        sizes = {"value_head_dim": VALUE_H, "dtype": jnp.float32, "layers": layers}
        cache, x = empty_cache(config, B, S, K, H, **sizes), step_inputs()
        out, after = decode_attention(**x, cache=cache, config=config, layer=layer)
        lengths = [1, 1] if layer is None else [[0, 0], [1, 1], [0, 0]]
        assert after.index.lengths.tolist() == lengths
        # One token has all of the weight.
        want = jnp.repeat(x["value_new"], N // K, axis=2)
        np.testing.assert_allclose(out, want, rtol=1e-6)


def test_the_values_have_the_keys_head_dimension_where_none_is_said():
    cache = empty_cache(PLAIN, B, S, K, H)
    assert cache.value.shape == cache.key.shape == (B, S, K, H)
    assert cache.value.dtype == cache.key.dtype == jnp.bfloat16


# What is compiled.


@pytest.fixture
def optimized():
    """Compiled as users have it, in the one place where that is looked at."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", jax.default_backend() == "cpu")


@pytest.mark.parametrize("kv_layout", ["BSKH", "BKSH"])
@pytest.mark.parametrize("layers", [None, LAYERS])
def test_scans_over_steps_and_layers_copy_no_cache(layers, kv_layout, optimized):
    """Of caches, and of a layer of them, there is one memory: tokens are scattered into it."""
    sizes = {"value_head_dim": 24, "layers": layers, "kv_layout": kv_layout}
    cache = empty_cache(PLAIN, B, 600, K, 32, dtype=jnp.float32, **sizes)

    def step(cache, x, layer=None):
        out, cache = decode_attention(
            **x, cache=cache, config=PLAIN, layer=layer, kv_layout=kv_layout, implementation="xla"
        )
        return cache, out

    def token(cache, x):
        if layers is None:
            return step(cache, x)
        numbers = jnp.arange(layers, dtype=jnp.int32)
        return lax.scan(lambda cache, layer: step(cache, x, layer), cache, numbers)

    new = (1, K) if kv_layout == "BSKH" else (K, 1)
    shapes = {"query": (1, N, 32), "key_new": (*new, 32), "value_new": (*new, 24)}
    tokens = {name: draw(4, B, *shape) for name, shape in shapes.items()}
    decode = jax.jit(lambda cache, tokens: lax.scan(token, cache, tokens), donate_argnums=0)
    compiled = decode.lower(cache, tokens).compile()

    of_layer = min(x.size for x in (cache.key, cache.value)) // (layers or 1)
    found = []
    for line in compiled.as_text().splitlines():
        operation = re.match(r"\s*(?:ROOT )?%?[\w.-]+ = f32\[([\d,]*)\]\S* ([\w-]+)\(", line)
        if operation and np.prod([int(n) for n in operation[1].split(",") if n]) >= of_layer:
            found.append(operation[2])
    handed_on = {"parameter", "get-tuple-element", "bitcast"}
    assert sorted(x for x in found if x not in handed_on) == ["fusion"] * 2 + ["scatter"] * 2
    assert compiled.memory_analysis().temp_size_in_bytes < cache.key.nbytes
    assert compiled.memory_analysis().alias_size_in_bytes >= cache.key.nbytes + cache.value.nbytes


# Of what has an axis of the capacity: nothing but kernels makes any, and these in place.
HANDED_ON = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "call", "custom-call"}


@pytest.mark.gpu
@pytest.mark.parametrize("layers", [None, 4])
@pytest.mark.parametrize("selector", ["cells", "threshold"])
@pytest.mark.parametrize("heavy_size", [128, 300])
def test_scans_on_a_gpu_move_nothing_of_the_size_of_a_cache(heavy_size, selector, layers):
    """As the program was compiled: over steps, and over the layers of each."""
    capacity, heads, size = 5003, 2, 64  # no other size is the capacity
    config = IndexerConfig(cells=selector == "cells", heavy_size=heavy_size)

    def step(cache, x, layer=None):
        query, new = x
        out, cache = decode_attention(
            query, new, new, cache, config, layer=layer, selector=selector, implementation="triton"
        )
        return cache, out

    def token(cache, x):
        if layers is None:
            return step(cache, x)
        numbers = jnp.arange(layers, dtype=jnp.int32)
        return lax.scan(lambda cache, layer: step(cache, x, layer), cache, numbers, unroll=2)

    def decode(cache, tokens):
        return lax.scan(token, cache, tokens, unroll=2)

    make = functools.partial(empty_cache, config, 2, capacity, heads, size, layers=layers)
    shapes = (4, 2, 1, 4 * heads, size), (4, 2, 1, heads, size)
    tokens = tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    cache = jax.eval_shape(make)
    compiled = jax.jit(decode, donate_argnums=0).lower(cache, tokens).compile()
    made = set()
    for line in compiled.as_text().splitlines():
        operation = re.match(r"\s*(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([\w-]+)\(", line)
        if operation and re.search(rf"[\[,]{capacity}[\],]", operation[1]):
            made.add(operation[2])
    assert "custom-call" in made
    assert made <= HANDED_ON, compiled.as_text()
    bytes_of = {
        name: x.size * x.dtype.itemsize for name, x in vars(cache).items() if name != "index"
    }
    assert compiled.memory_analysis().temp_size_in_bytes < min(bytes_of.values()) // (layers or 1)
    assert compiled.memory_analysis().alias_size_in_bytes >= sum(bytes_of.values())
