"""Caches in pages: in any order, shared, absent, they give what caches in rows give."""

import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_indexer import (
    DecodeCache,
    IndexerConfig,
    Selection,
    build_index,
    decode_attention,
    empty_cache,
    prefill,
    prefill_chunk,
    rebuild,
    rebuild_gain,
    select,
    sparse_attention,
    to_physical,
)
from jax_indexer.kernels import backend, pipeline
from jax_indexer.kernels.step import Step
from jax_indexer.layout import token_axis
from jax_indexer.pages import in_rows
from jax_indexer.reference import Caches, Logits
from parity import test_cells
from parity.checked_memory import checked
from parity.lowering import an_h100, lowered
from parity.test_decode_attention import UNOPTIMIZED, Case, close, draw, layer_of
from parity.test_rest_and_rerank import with_sums

SPARE = 3  # pages of nobody


def sizes(**fields):
    return tuple(fields.items())


def paged(cache, page_size, kv_layout, *, shared=0, seed=0):
    """The same keys and values on pages in random order, and the table.

    The first `shared` pages of all rows are those of the first row. What is on no row's page, and
    behind a row's last token, is no number.
    """
    rng = np.random.default_rng(seed)
    axis = token_axis(kv_layout)
    capacity = cache.index.codes.shape[-1]
    rows, pages = cache.index.codes.shape[-4], -(-capacity // page_size)
    table = rng.permutation(rows * pages + SPARE)[: rows * pages].astype(np.int32)
    table = table.reshape(rows, pages)
    table[:, :shared] = table[0, :shared]

    def put(x):
        x = np.asarray(x)
        layers = x.ndim - 4
        tokens = np.moveaxis(x, axis + layers, 1 + layers)  # [layers, B, S, K, H]
        padding = [(0, 0)] * tokens.ndim
        padding[1 + layers] = (0, pages * page_size - capacity)
        tokens = np.pad(tokens, padding, constant_values=np.nan)
        lead, rest = tokens.shape[:layers], tokens.shape[layers + 2 :]
        tokens = tokens.reshape(*lead, rows * pages, page_size, *rest)
        found = np.full((*lead, rows * pages + SPARE, page_size, *rest), np.nan, x.dtype)
        found[(slice(None),) * layers + (table.reshape(-1)[::-1],)] = np.flip(tokens, layers)
        return jnp.asarray(np.moveaxis(found, 1 + layers, axis + layers))

    index = jax.tree.map(jnp.asarray, cache.index)
    return DecodeCache(put(cache.key), put(cache.value), index), jnp.asarray(table)


def drawn(case, rows, lengths=None):
    """A step's (query, new, cache, counts), with numbers behind the rows too.

    An absent page, and what a mask leaves out, are zeros.
    """
    query, new, cache, counts = draw(case, rows)

    def cleaned(x):
        return np.where(np.isnan(x.astype(np.float32)), np.zeros_like(x), x)

    cache = dataclasses.replace(cache, key=cleaned(cache.key), value=cleaned(cache.value))
    if lengths is not None:
        index = dataclasses.replace(cache.index, lengths=np.asarray(lengths, np.int32))
        if case.config.cells:
            sealed = test_cells.sealed_anew(jax.tree.map(jnp.asarray, index), case.config)
            index = jax.tree.map(np.asarray, sealed)
        cache = dataclasses.replace(cache, index=index)
    return query, new, with_sums(case, cache), counts


@functools.partial(
    jax.jit,
    static_argnames=("config", "kv_layout", "implementation", "selector"),
    compiler_options=UNOPTIMIZED,
)
def decode(query, new, cache, counts, layer, page_table, **static):
    return decode_attention(
        query, *new, cache, counts=counts, layer=layer, page_table=page_table, **static
    )


CASES = {
    "plain": Case(selector="threshold"),
    "three tokens, head-major": Case(selector="threshold", T=3, counts=True, kv_layout="BKSH"),
    "layers": Case(selector="threshold", layers=2, layer=1, T=2, counts=True),
    "cells": Case(selector="cells", kv_layout="BKSH", dtype="bfloat16"),
    "cells of three tokens": Case(selector="cells", T=3, counts=True, layers=2, layer=0),
    "all options": Case(
        selector="cells", T=2, counts=True, sizes=sizes(rerank=3, estimate_rest="codes")
    ),
    "all options, token by token": Case(
        selector="threshold", kv_layout="BKSH", sizes=sizes(rerank=3, estimate_rest="mean")
    ),
    "many new tokens": Case(
        selector="threshold", T=19, counts=True, sizes=sizes(estimate_rest="mean")
    ),
}


def in_both(case, page_size, implementation, rows=8, **options):
    """A step in rows and in pages: (out, cache) of each, and the table."""
    query, new, cache, counts = drawn(case, rows)
    in_pages, table = paged(cache, page_size, case.kv_layout, **options)
    query, new, cache, counts = jax.tree.map(jnp.asarray, (query, new, cache, counts))
    layer = None if case.layer is None else jnp.int32(case.layer)
    static = {"config": case.config, "kv_layout": case.kv_layout, "implementation": implementation}
    if implementation == "triton":
        static["selector"] = case.selector
    of_rows = decode(query, tuple(new), cache, counts, layer, None, **static)
    of_pages = decode(query, tuple(new), in_pages, counts, layer, table, **static)
    return of_rows, of_pages, table


def check_same(case, of_rows, of_pages, table):
    (want, rows), (got, pages) = of_rows, of_pages
    close(got, np.asarray(want, np.float64), case.dtype)  # on a GPU sums may have another order
    jax.tree.map(np.testing.assert_array_equal, pages.index, rows.index)
    for name in ("key", "value"):
        one, other = getattr(pages, name), getattr(rows, name)
        for layer in range(case.layers or 1):
            number = None if case.layers is None else jnp.int32(layer)
            seen = in_rows(one, table, case.kv_layout, number, case.S)
            seen, wanted = (seen[0], other[layer]) if case.layers else (seen, other)
            seen, wanted = (np.asarray(x, np.float32) for x in (seen, wanted))
            np.testing.assert_array_equal(seen, wanted)


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("name", CASES)
def test_a_step_in_pages_is_one_in_rows(name, page_size):
    case = CASES[name]
    check_same(case, *in_both(case, page_size, "xla"))


@pytest.mark.parametrize("name", CASES)
def test_a_step_in_pages_by_kernels(name):
    case = CASES[name]
    with backend.interpreted():
        check_same(case, *in_both(case, 16, "triton"))


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [16, 32, 256])
@pytest.mark.parametrize("name", CASES)
def test_a_step_in_pages_on_a_gpu(name, page_size):
    case = CASES[name]
    check_same(case, *in_both(case, page_size, "triton"))


@pytest.mark.parametrize("implementation", ["xla", "kernels"])
def test_rows_may_share_the_pages_of_a_common_prefix(implementation):
    """Two of 16 tokens each; keys and values there are the first row's."""
    case = Case(selector="threshold", T=2)
    query, new, cache, _ = drawn(case, 4, [70, 40, 88, 33])
    for x in (cache.key, cache.value):
        x[:, :32] = x[0, :32]
    in_pages, table = paged(cache, 16, case.kv_layout, shared=2)
    assert len(np.unique(table)) == table.size - 6
    static = {"config": case.config, "kv_layout": "BSKH", "implementation": "xla"}
    if implementation == "kernels":
        static["implementation"] = "triton"
    query, new, cache = jax.tree.map(jnp.asarray, (query, tuple(new), cache))
    with contextlib.nullcontext() if implementation == "xla" else backend.interpreted():
        outs = [
            decode(query, new, x, None, None, t, **static)
            for x, t in ((cache, None), (in_pages, table))
        ]
    check_same(case, *outs, table)


@pytest.mark.parametrize("implementation", ["xla", "kernels"])
@pytest.mark.parametrize("name", ["three tokens, head-major", "all options", "many new tokens"])
def test_a_row_without_a_page_for_all_its_new_tokens_takes_none(name, implementation):
    """All of its state stays, and its output is that of a row without room."""
    case = dataclasses.replace(CASES[name], counts=False)
    # Over the end of the second page, just; behind it; before it.
    lengths = np.asarray([33 - case.T, 32, 31, 32 - case.T], np.int32)
    query, new, cache, _ = drawn(case, 4, lengths)
    in_pages, table = paged(cache, 16, case.kv_layout)
    table = table.at[:, 2:].set(-1)
    static = {"config": case.config, "kv_layout": case.kv_layout, "implementation": "xla"}
    if implementation == "kernels":
        static |= {"implementation": "triton", "selector": case.selector}
    query, new = jax.tree.map(jnp.asarray, (query, tuple(new)))
    before = jax.tree.map(jnp.copy, in_pages)
    with contextlib.nullcontext() if implementation == "xla" else backend.interpreted():
        out, after = decode(query, new, in_pages, None, None, table, **static)
    assert np.isfinite(np.asarray(out, np.float32)).all()
    taken = np.asarray(lengths + case.T <= 32)
    assert taken.tolist() == [False, False, False, True]
    np.testing.assert_array_equal(after.index.lengths, np.where(taken, lengths + case.T, lengths))
    own = np.asarray(table)[3, :2]
    for name in ("key", "value"):
        one, other = (np.array(getattr(x, name)) for x in (after, before))
        assert (one[own] != other[own]).any()
        one[own] = other[own]
        np.testing.assert_array_equal(one, other)
    for one, other in zip(jax.tree.leaves(after.index), jax.tree.leaves(before.index), strict=True):
        np.testing.assert_array_equal(one[:3], other[:3])


@pytest.mark.parametrize("name", ["plain", "cells of three tokens", "all options"])
def test_a_table_of_any_numbers_is_safe(name):
    """On checked memory: absent pages read as zeros, and those beyond the last are the last."""
    case = dataclasses.replace(CASES[name], S=48, layers=None, layer=None)
    query, new, cache, _ = drawn(case, 3, [40, 20, 45])
    in_pages, table = paged(cache, 16, case.kv_layout)
    table = jnp.asarray([[0, -1, 2**31 - 1], [-5, 3, -(2**31)], [1, 0, 2]], jnp.int32)
    clipped = jnp.minimum(table, len(in_pages.key) - 1)
    static = {"config": case.config, "kv_layout": case.kv_layout}
    query, new = jax.tree.map(jnp.asarray, (query, tuple(new)))
    in_pages = dataclasses.replace(
        in_pages, key=jnp.nan_to_num(in_pages.key), value=jnp.nan_to_num(in_pages.value)
    )
    want, after = decode(query, new, in_pages, None, None, clipped, implementation="xla", **static)
    step = Step.of(
        in_pages.index, case.config, T=case.T, N=query.shape[2], kv_layout=case.kv_layout,
        page_size=16,
    )  # fmt: skip
    logits = Logits(np.float32(case.H**-0.5), None)
    with checked(seed=0):
        got, caches, index, _ = pipeline.launch_decode(
            step, query, Caches(*new), Caches(in_pages.key, in_pages.value), in_pages.index, None,
            None, logits, case.selector, page_table=table,
        )  # fmt: skip
    seen = DecodeCache(*caches, index)
    np.testing.assert_array_equal(seen.index.lengths, after.index.lengths)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    for name in ("key", "value"):
        np.testing.assert_array_equal(getattr(seen, name), getattr(after, name))


# Attention to lists, and lists for others.


@pytest.mark.parametrize("implementation", ["xla", "kernels"])
@pytest.mark.parametrize("kv_layout", ["BSKH", "BKSH"])
@pytest.mark.parametrize("with_config", [False, True])
def test_attention_to_lists_in_pages(with_config, kv_layout, implementation):
    case = Case(kv_layout=kv_layout, T=2)
    query, _, cache, _ = drawn(case, 8)
    in_pages, table = paged(cache, 16, kv_layout)
    query, cache = jax.tree.map(jnp.asarray, (query, cache))
    selection = select(query, cache.index, case.config, implementation="xla")
    config = case.config if with_config else None

    def loss(query, key, value, page_table):
        out, lse = sparse_attention(
            query, key, value, selection, config=config, kv_layout=kv_layout, return_lse=True,
            page_table=page_table, implementation="xla" if implementation == "xla" else "triton",
        )  # fmt: skip
        return jnp.sum(out * query[..., : out.shape[-1]]), (out, lse)

    with contextlib.nullcontext() if implementation == "xla" else backend.interpreted():
        grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
        want, outs = grad(query, cache.key, cache.value, None)
        got, in_other = grad(query, jnp.nan_to_num(in_pages.key), in_pages.value, table)
    jax.tree.map(np.testing.assert_array_equal, in_other, outs)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-5)
    for one, other in zip(got[1:], want[1:], strict=True):
        seen = in_rows(one, table, kv_layout, None, case.S)
        np.testing.assert_allclose(seen, other, rtol=1e-5, atol=1e-5)


def test_slots_are_where_listed_tokens_lie():
    rng = np.random.default_rng(0)
    indices = rng.integers(-1, 64, (3, 2, 4, 20)).astype(np.int32)
    table = rng.permutation(30)[:12].reshape(3, 4).astype(np.int32)
    table[1, 2] = -1
    got = to_physical(Selection(jnp.asarray(indices), None), jnp.asarray(table), page_size=16)
    for place, position in np.ndenumerate(indices):
        page = -1 if position < 0 else table[place[0], position // 16]
        assert got[place] == (-1 if page < 0 else page * 16 + position % 16)
    beyond = Selection(jnp.asarray(indices + 64), None)
    found = np.asarray(to_physical(beyond, jnp.asarray(table), page_size=16))
    assert (found[indices >= 0] == -1).all()


@pytest.mark.parametrize("num_pages", [None, 1, 9])
def test_slots_of_pages_beyond_the_last_are_of_the_last(num_pages):
    rng = np.random.default_rng(0)
    indices = rng.integers(-1, 64, (3, 2, 4, 20)).astype(np.int32)
    table = rng.integers(-3, 14, (3, 4)).astype(np.int32)
    lists, static = Selection(jnp.asarray(indices), None), {"page_size": 16, "num_pages": num_pages}
    got = np.asarray(to_physical(lists, jnp.asarray(table), **static))
    page = table[np.arange(3)[:, None, None, None], indices // 16]
    clipped = page if num_pages is None else np.minimum(page, num_pages - 1)
    want = np.where((indices < 0) | (page < 0), -1, clipped * 16 + indices % 16)
    np.testing.assert_array_equal(got, want)
    assert (got >= 9 * 16).any() == (num_pages is None)


def test_no_page_is_beyond_the_last_of_any_number():
    lists, table = Selection(jnp.full((1, 1, 1, 1), 5), None), jnp.full((1, 1), 2**31 - 1)
    assert to_physical(lists, table, page_size=16, num_pages=3).tolist() == [[[[37]]]]
    for wrong in (0, 2.0, True, 2**31):
        with pytest.raises(ValueError, match=f"^num_pages: expected an integer .* got {wrong}"):
            to_physical(lists, table, page_size=16, num_pages=wrong)
    with pytest.raises(ValueError, match=f"^page_size: expected an integer .* got {2**31}"):
        to_physical(lists, table, page_size=2**31)


# Prompts.


@pytest.mark.parametrize("kv_layout", ["BSKH", "BKSH"])
@pytest.mark.parametrize("layers", [None, 2])
def test_prompts_and_training_in_pages(layers, kv_layout):
    """Of rows that have pages for all of their prompt; the others keep every bit."""
    config = IndexerConfig(
        num_bits=2, heavy_size=6, sink_size=3, window_size=4, cells=True, estimate_rest="codes"
    )
    B, K, S, H, s = 4, 2, 96, 8, 60
    rng = np.random.default_rng(0)
    shape = (B, s, K) if kv_layout == "BSKH" else (B, K, s)
    key, value = (jnp.asarray(rng.standard_normal((*shape, x)), jnp.float32) for x in (H, 6))
    lengths = jnp.asarray([60, 17, 50, 33], jnp.int32)
    options = {"layers": layers, "kv_layout": kv_layout, "value_head_dim": 6, "dtype": jnp.float32}
    in_rows_of = empty_cache(config, B, S, K, H, **options)
    in_pages = empty_cache(config, B, S, K, H, num_pages=30, page_size=16, **options)
    assert in_pages.key.shape[-4] == 30
    table = jnp.asarray(rng.permutation(30)[:24].reshape(B, 6), jnp.int32)
    table = table.at[2, 3].set(-1)  # of the 4 pages it needs
    rows, layer = jnp.asarray([True, False, True, True]), None if layers is None else jnp.int32(1)
    of_rows = jnp.asarray([True, False, False, True])
    static = {"layer": layer, "kv_layout": kv_layout}
    want = prefill(key, value, lengths, config, cache=in_rows_of, rows=of_rows, **static)
    got = prefill(
        key, value, lengths, config, cache=in_pages, rows=rows, page_table=table, **static
    )
    jax.tree.map(np.testing.assert_array_equal, got.index, want.index)
    own, other = got, want
    if layers is not None:
        own, other = layer_of(got, 1), layer_of(want, 1)
    for name in ("key", "value"):
        seen = in_rows(getattr(own, name), table, kv_layout, None, S)
        wanted = getattr(other, name)
        seen, wanted = (x if kv_layout == "BSKH" else x.swapaxes(1, 2) for x in (seen, wanted))
        for b, length in ((0, 60), (3, 33)):
            np.testing.assert_array_equal(seen[b, :length], wanted[b, :length])
    of_pages = static | {"page_table": table}
    again = rebuild(got.index, got.key, config, of_rows, value=got.value, **of_pages)
    jax.tree.map(np.testing.assert_array_equal, again, want.index)
    gains = [
        rebuild_gain(x.index, x.key, config, **o) for x, o in ((got, of_pages), (want, static))
    ]
    np.testing.assert_array_equal(gains[0][jnp.asarray([0, 3])], gains[1][jnp.asarray([0, 3])])
    if layers is None:
        lengths = want.index.lengths
        built = [
            build_index(x.key, lengths, config, value=x.value, kv_layout=kv_layout, page_table=t)
            for x, t in ((got, table), (want, None))
        ]
        jax.tree.map(np.testing.assert_array_equal, *built)


# What is compiled.


@pytest.mark.parametrize("rest", [False, "codes"])
def test_a_step_in_pages_touches_caches_by_kernels_alone(rest):
    """No gather and no copy of them in the program for CUDA, in which they are aliased."""
    config = IndexerConfig(cells=True, estimate_rest=rest, rerank=2 if rest else 1, num_bits=4)
    B, K, S, H, T = 2, 2, 4096, 64, 2
    cache = jax.eval_shape(
        lambda: empty_cache(config, B, S, K, H, layers=3, num_pages=300, page_size=32)
    )
    bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    query, new = bf16((B, T, 4, H)), bf16((B, T, K, H))
    table, layer = jax.ShapeDtypeStruct((B, 128), np.int32), jax.ShapeDtypeStruct((), np.int32)

    def step(query, key, value, cache, page_table, layer):
        options = {"layer": layer, "page_table": page_table}
        return decode_attention(query, key, value, cache, config, **options)

    with an_h100():
        text = lowered(step, query, new, new, cache, table, layer, donate_argnums=3)
    kind = f"tensor<3x300x32x{K}x{H}xbf16>"
    lines = [line.strip() for line in text.splitlines() if kind in line]
    lines = [line for line in lines if line.startswith("%")]
    assert lines
    for line in lines:
        assert re.search(r"custom_call|call @", line), line[:200]


# What is refused.


def test_bad_pages_are_told():
    config = IndexerConfig(num_bits=2, heavy_size=4, sink_size=2, window_size=2)
    B, K, S, H = 2, 2, 64, 8
    options = {"num_pages": 9, "page_size": 16, "dtype": jnp.float32}
    cache = empty_cache(config, B, S, K, H, **options)
    query, new = jnp.zeros((B, 1, 4, H)), jnp.zeros((B, 1, K, H))
    table = jnp.zeros((B, 4), jnp.int32)

    def step(cache, table):
        return decode_attention(query, new, new, cache, config, page_table=table)

    def shaped(*shape):
        return dataclasses.replace(cache, key=jnp.zeros(shape), value=jnp.zeros(shape))

    for function, message in (
        (lambda: step(cache, 3), r"^page_table: expected int32\[B=2, pages\], got int"),
        (lambda: step(cache, table[0]), r"^page_table: expected int32\[B=2, pages\], got int32"),
        (lambda: step(cache, table.astype(jnp.float32)), "^page_table: expected int32.*cast"),
        (lambda: step(cache, table[:1]), r"^page_table: expected int32\[B=2"),
        (lambda: step(cache, table[:, :3]), "^page_table: expected pages for S=64 tokens .*wider"),
        (lambda: step(shaped(9, 24, K, H), table), "^cache.key: expected a page_size that is"),
        (lambda: step(shaped(9, 16, K + 1, H), table), "^cache.key: expected .*K=2"),
        (lambda: step(shaped(16, K, H), table), "^cache.key: expected .*num_pages, page_size"),
        (lambda: step(cache, None), "^cache.key: expected .*B=2"),
        (lambda: empty_cache(config, B, S, K, H, num_pages=3), "^num_pages, page_size: expected"),
        (
            lambda: prefill(jnp.zeros((B, S + 1, K, H)), jnp.zeros((B, S + 1, K, H)),
                            jnp.zeros(B, jnp.int32), config, cache=cache, page_table=table),
            "^key: .*key understood as .*s=65.* swaps s and K$",
        ),
        (
            lambda: empty_cache(config, B, S, K, H, num_pages=3, page_size=20),
            "^page_size: expected a power of two, got 20",
        ),
        (
            lambda: prefill(new, new, jnp.zeros(B, jnp.int32), config, page_table=table),
            "^page_table: expected None without a cache",
        ),
        (
            lambda: to_physical(Selection(jnp.zeros((B, 1, 4, 5), jnp.int32), None, capacity=65),
                                table, page_size=16),
            "^page_table: expected pages for S=65",
        ),
        (
            lambda: to_physical(Selection(jnp.zeros((B, 1, 4, 5), jnp.int32), None), table,
                                page_size=24),
            "^page_size: expected a page_size that is a power of two, got 24",
        ),
        (lambda: to_physical(table, table, page_size=16), "^selection: expected a Selection"),
        (
            lambda: sparse_attention(
                query, cache.key, cache.value,
                Selection(jnp.zeros((B, 1, 4, 5), jnp.int32), None, capacity=65),
                page_table=table,
            ),
            "^page_table: expected pages for S=65 tokens .*wider",
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            function()


@pytest.mark.parametrize("kv_layout", ["BSKH", "BKSH"])
@pytest.mark.parametrize("layer", [None, 1])
def test_a_cache_in_pages_without_its_table_is_told_of_it(layer, kv_layout):
    """As the first thing to do, before the axes are said to be swapped."""
    config = IndexerConfig(num_bits=2, heavy_size=4, sink_size=2, window_size=2)
    B, K, S, H = 2, 2, 64, 8
    options = {"dtype": jnp.float32, "kv_layout": kv_layout}
    options |= {} if layer is None else {"layers": 2}
    cache = empty_cache(config, B, S, K, H, num_pages=9, page_size=16, **options)
    query, every, lengths = jnp.zeros((B, 1, 4, H)), jnp.ones(B, bool), jnp.zeros(B, jnp.int32)
    new = jnp.zeros((B, 1, K, H) if kv_layout == "BSKH" else (B, K, 1, H))
    lists = Selection(jnp.zeros((B, 1, 4, 5), jnp.int32), None)
    options = {"layer": layer, "kv_layout": kv_layout}
    calls = {
        "cache.key": [
            lambda cache: decode_attention(query, new, new, cache, config, **options),
            lambda cache: prefill(new, new, lengths, config, cache=cache, **options),
        ],
        "key": [
            lambda cache: sparse_attention(query, cache.key, cache.value, lists, **options),
            lambda cache: rebuild(cache.index, cache.key, config, every, **options),
            lambda cache: rebuild_gain(cache.index, cache.key, config, **options),
        ],
    }
    if layer is None:
        calls["key"].append(
            lambda cache: build_index(cache.key, lengths, config, kv_layout=kv_layout)
        )
    for name, functions in calls.items():
        for function in functions:
            advice = rf"; if {name} is in pages, pass page_table=\.\.\.; .*{name} understood as"
            with pytest.raises(ValueError, match=r"axis B must be \d, as in \w+" + advice):
                function(cache)
    told = "; if cache.key is in pages, prefill takes it with page_table=.*, prefill_chunk takes no"
    with pytest.raises(ValueError, match=f"^cache.key: expected .*B=2.*{told}"):
        prefill_chunk(new, new, lengths, cache, config, **options)


def test_a_cache_that_cannot_be_in_pages_is_not_said_to_be():
    """Pages are of a power of two, and not in host memory."""
    config = IndexerConfig(num_bits=2, heavy_size=4, sink_size=2, window_size=2)
    query, new = jnp.zeros((2, 1, 4, 8)), jnp.zeros((2, 1, 2, 8))
    for tokens, memory_kind in ((24, None), (32, "pinned_host")):
        options = {"dtype": jnp.float32, "memory_kind": memory_kind}
        cache = empty_cache(config, 9, tokens, 2, 8, **options)
        with pytest.raises(ValueError, match=r"axis B must be 2, as in query; cache\.key under"):
            decode_attention(query, new, new, cache, config)


@pytest.mark.parametrize("memory_kind", [None, "pinned_host"])
def test_a_cache_in_rows_takes_no_page_table(memory_kind):
    config = IndexerConfig(num_bits=2, heavy_size=4, sink_size=2, window_size=2)
    B, K, S, H = 2, 2, 200, 8
    cache = empty_cache(config, B, S, K, H, dtype=jnp.float32, memory_kind=memory_kind)
    query, new, table = jnp.zeros((B, 1, 4, H)), jnp.zeros((B, 1, K, H)), jnp.zeros((B, 13), int)
    told = "expected a page_size that .*, got 200; .*; a cache in rows takes no page_table$"
    with pytest.raises(ValueError, match=f"^cache.key: {told}"):
        decode_attention(query, new, new, cache, config, page_table=table)
    with pytest.raises(ValueError, match=f"^key: {told}"):
        rebuild(cache.index, cache.key, config, jnp.ones(B, bool), page_table=table)
