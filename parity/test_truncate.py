"""Drafts that are rejected: what `truncate` takes back leaves all of the state as it should be."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_indexer import (
    DecodeCache,
    IndexerConfig,
    PQIndex,
    decode_attention,
    empty_cache,
    reset,
    select,
    state,
    truncate,
    with_cells,
)
from jax_indexer.kernels import backend
from jax_indexer.pages import in_rows
from parity import oracle, test_cells
from parity.test_kernels import UNOPTIMIZED

B, K, G, H = 3, 2, 2, 8
SIZES = {"num_bits": 2, "heavy_size": 6, "sink_size": 3, "window_size": 4}
MOST = 8  # drafts of a step


def index_of(lengths, high_water=None, *, layers=None):
    lead = () if layers is None else (layers,)
    return PQIndex(
        codebooks=jnp.zeros((*lead, B, K, 2, 4, 4)),
        codes=jnp.zeros((*lead, B, K, 2, 90), jnp.uint8),
        lengths=jnp.asarray(lengths, jnp.int32),
        high_water=None if high_water is None else jnp.asarray(high_water, jnp.int32),
    )


# Which rows go back.


@pytest.mark.parametrize("kind", ["index", "cache", "jit"])
@pytest.mark.parametrize(
    ("wanted", "after"),
    [
        ([50, 60, 3], [50, 60, 3]),  # nothing
        ([42, 58, 0], [42, 58, 0]),  # as far as may be
        ([41, 51, -1], [50, 60, 3]),  # one too far
        ([51, 61, 4], [50, 60, 3]),  # above the length
        ([-(2**31), 2**31 - 1, 1], [50, 60, 1]),
    ],
)
def test_a_row_goes_back_by_8_tokens_below_its_high_water_at_the_most(kind, wanted, after):
    before = index_of([50, 60, 3], [50, 66, 3])
    wanted = jnp.asarray(wanted, jnp.int32)
    if kind == "cache":
        cache = DecodeCache(jnp.zeros((B, 90, K, H)), jnp.zeros((B, 90, K, H)), before)
        got = truncate(cache, wanted).index
    else:
        got = (jax.jit(truncate) if kind == "jit" else truncate)(before, wanted)
    assert got.lengths.tolist() == after
    for one, other in zip(
        jax.tree.leaves(dataclasses.replace(got, lengths=None)),
        jax.tree.leaves(dataclasses.replace(before, lengths=None)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_without_cells_and_sums_a_row_goes_back_as_far_as_is_wanted():
    got = truncate(index_of([50, 60, 3]), jnp.asarray([0, 61, 2], jnp.int32))
    assert got.lengths.tolist() == [0, 60, 2]


@pytest.mark.parametrize(("layer", "changed"), [(None, {0, 1, 2}), (1, {1}), (9, {2}), (-1, {0})])
def test_one_layer_or_all_of_them(layer, changed):
    index = index_of([[50, 60, 3]] * 3, [[50, 66, 3]] * 3, layers=3)
    wanted = jnp.asarray([49, 58, 2], jnp.int32)
    if layer is not None:
        layer = jnp.int32(layer)
    got = jax.jit(truncate)(index, wanted, layer=layer).lengths.tolist()
    assert got == [[49, 58, 2] if i in changed else [50, 60, 3] for i in range(3)]


def test_truncation_writes_in_place_and_reads_no_state():
    """Of a donated cache everything is passed on but the lengths."""
    config = IndexerConfig(cells=True, estimate_rest="codes", **SIZES)
    cache = jax.eval_shape(lambda: empty_cache(config, B, 4096, K, H, dtype=jnp.float32))
    lengths = jax.ShapeDtypeStruct((B,), np.int32)
    compiled = jax.jit(truncate, donate_argnums=0).lower(cache, lengths).compile()
    memory = compiled.memory_analysis()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < 1024


def test_nothing_is_compiled_again(compilations):
    index = index_of([50, 60, 3], [50, 66, 3])
    wanted = [jnp.asarray(x, jnp.int32) for x in ([49, 60, 3], [48, 59, 0], [0, 0, 0])]
    index = truncate(index, wanted[0])
    before = compilations()
    for lengths in wanted[1:]:
        index = truncate(index, lengths)
    assert index.lengths.tolist() == [48, 59, 0]
    assert compilations() == before


# Speculation is plain decoding.


def true_tokens(rng, capacity):
    """Queries, keys and values of each row, by position."""
    shapes = (B, capacity, K * G, H), (B, capacity, K, H), (B, capacity, K, H)
    return [jnp.asarray(rng.standard_normal(x), jnp.float32) for x in shapes]


def at(tokens, position):
    place = jnp.clip(position, 0, tokens.shape[1] - 1)
    return jnp.take_along_axis(tokens, place[:, :, None, None], axis=1)


def begun(config, capacity, rng, sealing=None, **pages):
    """An empty cache with codebooks; segments and blocks as they are said to be."""
    cache = empty_cache(config, B, capacity, K, H, dtype=jnp.float32, **pages)
    codebooks = jnp.asarray(rng.standard_normal(cache.index.codebooks.shape), jnp.float32)
    index = dataclasses.replace(cache.index, codebooks=codebooks)
    if config.cells:
        index = test_cells.sealed_anew(index, config, sealing)
    return dataclasses.replace(cache, index=index)


def plain_decoding(cache, tokens, decode):
    """Outputs [B, S, N, H] of one token after another, and the cache."""

    def step(cache, position):
        place = jnp.broadcast_to(position, (B, 1))
        out, cache = decode(*(at(x, place) for x in tokens), cache)
        return cache, out[:, 0]

    positions = jnp.arange(tokens[0].shape[1], dtype=jnp.int32)
    cache, outs = jax.lax.scan(step, cache, positions)
    return jnp.moveaxis(outs, 0, 1), cache


def speculation(cache, tokens, plain, decode, key, *, config, most):
    """A step of up to 8 drafts, of which the first right ones stay; then rows may end.

    Returns the cache, the largest difference of an accepted token's output from that of plain
    decoding, where not all of its context is attended to by either; and how many rows took what
    they should not have, or went back otherwise than they should.
    """
    capacity, of = tokens[0].shape[1], jax.random.split(key, 7)
    start, high_water = cache.index.lengths, cache.index.high_water
    position = start[:, None] + jnp.arange(most, dtype=jnp.int32)[None]
    is_right = jax.random.uniform(of[0], (B, most)) < 0.75
    is_right = is_right.at[:, 0].set(True)  # the model's own token, no draft
    counts = jax.random.randint(of[1], (B,), 0, most + 1, jnp.int32)

    def drafted(tokens, key):
        noise = jax.random.normal(key, (B, most, *tokens.shape[2:]))
        return jnp.where(is_right[:, :, None, None], at(tokens, position), noise)

    query, *new = tokens
    new = [drafted(x, key) for x, key in zip(new, of[2:4], strict=True)]
    out, cache = decode(at(query, position), *new, cache, counts=counts)
    took = jnp.where(start + counts <= capacity, counts, 0)
    wrong = jnp.sum(cache.index.lengths != start + took)
    accepted = jnp.minimum(jnp.cumprod(is_right.astype(jnp.int32), axis=1).sum(axis=1), took)
    known = jnp.arange(most)[None] < accepted[:, None]
    known &= position + 1 > config.pool.short_context(most)
    difference = jnp.abs(out - at(plain, position)).max(axis=(2, 3))
    difference = jnp.max(jnp.where(known, difference, 0))

    # Where none of several steps is rejected, all of them may be.
    high_water = jnp.maximum(high_water, start + took)
    wrong += jnp.sum(cache.index.high_water != high_water)
    wanted = start + accepted
    back = jax.random.randint(of[4], (B,), 0, 14)
    wanted = jnp.where(jax.random.uniform(of[5], (B,)) < 0.2, wanted - back, wanted)
    fits = (wanted >= 0) & (wanted >= high_water - state.MOST_BACK)
    # What may not go so far back goes as far as what is right.
    cache = truncate(cache, start + accepted)
    cache = truncate(cache, wanted)
    wrong += jnp.sum(cache.index.lengths != jnp.where(fits, wanted, start + accepted))
    ends = (cache.index.lengths > capacity - 4) | (jax.random.uniform(of[6], (B,)) < 1 / 300)
    return dataclasses.replace(cache, index=reset(cache.index, ends)), difference, wrong


def check_cache(cache, plain, config):
    """Keys, values and codes are those of plain decoding, and the state is what they say."""
    cache, plain = jax.tree.map(np.asarray, (cache, plain))
    index = cache.index
    for b, length in enumerate(index.lengths):
        for name in ("key", "value"):
            one, other = (getattr(x, name)[b, :length] for x in (cache, plain))
            np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(
            index.codes[b, ..., :length], plain.index.codes[b, ..., :length]
        )
    if config.cells:
        test_cells.check_state(index, config)
    if config.estimate_rest:
        sums, counts = oracle.value_sums(cache.value, index.codes, index.high_water, config)
        np.testing.assert_array_equal(index.values.counts, counts)
        np.testing.assert_allclose(index.values.sums, sums, rtol=1e-4, atol=1e-3)


def lists(query, index, config, selector):
    """Lists of the selector, and those of XLA."""
    got = select(query, index, config, selector=selector)
    bare = dataclasses.replace(index, cells=None, values=None, high_water=None)
    plain = dataclasses.replace(config, cells=False, estimate_rest=False)
    return got, select(query, bare, plain, implementation="xla")


def check_speculation(
    config, capacity, rounds, checked_every, options, sealing=None, most=MOST, page_size=None
):
    """Drafts are accepted and rejected at random, rows restart: all is as in plain decoding.

    That is by a cache in rows; with a page size speculation is by pages in random order.
    """
    rng = np.random.default_rng(0)
    tokens = true_tokens(rng, capacity)
    decode = functools.partial(decode_attention, config=config, **options)
    start = begun(config, capacity, rng, sealing)
    begun_as = start.index
    jit = functools.partial(jax.jit, compiler_options=UNOPTIMIZED)
    plain, plainly = jit(functools.partial(plain_decoding, decode=decode))(start, tokens)
    table = None
    if page_size is not None:
        number = -(-capacity // page_size)
        table = jnp.asarray(rng.permutation(B * number + 2)[: B * number], jnp.int32)
        table = table.reshape(B, number)
        decode = functools.partial(decode, page_table=table)
        pages = {"num_pages": B * number + 2, "page_size": page_size}
        start = begun(config, capacity, np.random.default_rng(0), sealing, **pages)
        start = dataclasses.replace(start, index=jax.tree.map(jnp.copy, begun_as))

    def some(cache, numbers):
        def step(carry, number):
            cache, difference, wrong = carry
            key = jax.random.fold_in(jax.random.key(0), number)
            of_all = cache, tokens, plain, decode, key
            cache, one, other = speculation(*of_all, config=config, most=most)
            return (cache, jnp.maximum(difference, one), wrong + other), cache.index.lengths

        begin = cache, jnp.float32(0), jnp.int32(0)
        return jax.lax.scan(step, begin, numbers)

    some = jit(some, donate_argnums=0)
    by_lists = jit(functools.partial(lists, config=config, selector=options.get("selector")))
    cache, sealed, lengths = start, 0, []
    for first in range(0, rounds, checked_every):
        numbers = first + jnp.arange(checked_every)
        (cache, difference, wrong), of_rounds = some(cache, numbers)
        lengths.append(np.asarray(of_rounds))
        assert int(wrong) == 0
        if not config.estimate_rest:  # of which more is in the sums than plain decoding has
            assert float(difference) < 1e-4
        in_view = cache
        if table is not None:
            rows = (in_rows(x, table, "BSKH", None, capacity) for x in (cache.key, cache.value))
            in_view = DecodeCache(*rows, cache.index)
        check_cache(in_view, plainly, config)
        if config.cells:
            sealed += int((cache.index.cells.sealed(cache.index.high_water) > 3).sum())
        query = jnp.asarray(rng.standard_normal((B, most, K * G, H)), jnp.float32)
        test_cells.check_lists(*by_lists(query, cache.index), f"after round {first}")
    steps = np.diff(np.concatenate(lengths), axis=0)
    assert (steps < 0).any()
    assert (steps > 0).any()
    assert sealed > 0 or not config.cells


@pytest.mark.parametrize(("rest", "rerank"), [(False, 1), (False, 4), ("codes", 2)])
def test_speculation_is_plain_decoding(rest, rerank):
    config = IndexerConfig(cells=True, estimate_rest=rest, rerank=rerank, **SIZES)
    sealing = test_cells.small_sealing(300, config)
    check_speculation(config, 300, 600, 30, {"implementation": "xla"}, sealing)


@pytest.mark.parametrize("implementation", ["xla", "kernels"])
def test_speculation_in_pages(implementation):
    config = IndexerConfig(cells=True, **SIZES)
    sealing = state.Sealing(config.first_candidate, config.window_size, segment=64, block=64)
    if implementation == "xla":
        options = {"implementation": "xla"}
        check_speculation(config, 200, 300, 30, options, sealing, page_size=16)
        return
    with backend.interpreted():
        options = {"implementation": "triton", "selector": "cells"}
        check_speculation(config, 200, 120, 12, options, sealing, most=5, page_size=32)


@pytest.mark.parametrize("rest", [False, "codes"])
def test_speculation_by_kernels(rest):
    config = IndexerConfig(cells=True, estimate_rest=rest, rerank=2 if rest else 1, **SIZES)
    sealing = state.Sealing(config.first_candidate, config.window_size, segment=64, block=64)
    with backend.interpreted():
        options = {"implementation": "triton", "selector": "cells"}
        check_speculation(config, 200, 120, 12, options, sealing, most=5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rerank", "rest", "selector", "page_size"),
    [
        (1, False, "cells", None),
        (1, False, "threshold", 64),
        (4, False, "cells", 16),
        (4, "codes", "cells", None),
    ],
)
def test_twenty_thousand_steps_of_speculation(rerank, rest, selector, page_size):
    config = IndexerConfig(cells=True, estimate_rest=rest, rerank=rerank, **SIZES)
    sealing = test_cells.small_sealing(2048, config)
    options = {"implementation": "triton", "selector": selector}
    check_speculation(config, 2048, 20_000, 2000, options, sealing, page_size=page_size)


def test_with_cells_keeps_a_high_water_that_sums_follow():
    config = IndexerConfig(cells=True, estimate_rest="codes", **SIZES)
    cache = empty_cache(config, B, 90, K, H, dtype=jnp.float32)
    index = dataclasses.replace(
        cache.index,
        lengths=jnp.asarray([50, 40, 30], jnp.int32),
        high_water=jnp.asarray([55, 49, 29], jnp.int32),
    )
    got = with_cells(index, config)
    assert got.high_water.tolist() == [55, 40, 30]
    without = dataclasses.replace(index, values=None)
    got = with_cells(without, dataclasses.replace(config, estimate_rest=False))
    assert got.high_water.tolist() == [50, 40, 30]


def test_bad_arguments_are_told():
    index = index_of([50, 60, 3], [50, 66, 3])
    lengths = jnp.asarray([49, 58, 2], jnp.int32)
    for arguments, options, message in (
        ((lengths, lengths), {}, "^cache: expected a DecodeCache or a PQIndex, got"),
        ((index, 5), {}, r"^lengths: expected int32\[B=3\], got int"),
        ((index, lengths[:2]), {}, r"^lengths: expected int32\[B=3\], got int32\[2\]"),
        ((index, lengths.astype(jnp.float32)), {}, "^lengths: expected int32.*cast"),
        ((index, lengths), {"layer": 0}, "^index.lengths: .*axis"),
        ((index, lengths), {"layer": 1.5}, "^index.lengths|^layer: "),
        ((dataclasses.replace(index, high_water=lengths[:1]), lengths), {}, "^index.high_water: "),
        (
            (dataclasses.replace(index, high_water=None, values="sums"), lengths),
            {},
            r"^index.high_water: expected int32\[B\] with cells or sums",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            truncate(*arguments, **options)
