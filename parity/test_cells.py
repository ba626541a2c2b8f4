"""The "cells" selector: its state after every step, and its lists against the reference's.

Segments and blocks are small here, so that many are sealed. The kernels run in the interpreter, and
once on checked memory.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_indexer import (
    IndexerConfig,
    PQIndex,
    append,
    build_index,
    cells,
    indexer_next,
    rebuild,
    reference,
    reset,
    select,
    with_cells,
)
from jax_indexer.kernels import backend, pipeline
from jax_indexer.kernels import cells as kernels
from parity.checked_memory import Memory, checked

B, K, G, S = 3, 2, 2, 150
F32 = np.dtype(np.float32)


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    monkeypatch.setattr(cells, "SMALLEST_SEGMENT", 16)
    monkeypatch.setattr(cells, "SMALLEST_BLOCK", 8)
    monkeypatch.setattr(cells, "MOST_MOVES", 16)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture
def interpreted(monkeypatch):
    launch = backend.launch
    monkeypatch.setattr(backend, "launch", lambda *x, **y: launch(*x, **y | {"interpret": True}))
    monkeypatch.setattr(backend, "barrier", lambda interpret: None)


def config_of(**fields):
    sizes = {"num_bits": 2, "heavy_size": 6, "sink_size": 3, "window_size": 4, **fields}
    return IndexerConfig(cells=True, **sizes)


def start(config, lengths, *, kv_heads=K, capacity=S, seed=0):
    """An index of random codebooks and codes."""
    rng = np.random.default_rng(seed)
    shape = len(lengths), kv_heads, config.num_subspaces
    index = PQIndex(
        codebooks=jnp.asarray(rng.standard_normal((*shape, config.num_centroids, 4)), F32),
        codes=jnp.asarray(rng.integers(0, 256, (*shape, capacity), np.uint8)),
        lengths=jnp.asarray(lengths, jnp.int32),
    )
    return with_cells(index, config)


def listed(index, config):
    """{(row, kv head): the list of each cell}, read as a selection does."""
    state = index.cells
    now = cells.progress(index.lengths, state.sealed, state.plan, index.codes.shape[-1])
    found = {}
    for b, k in np.ndindex(*state.starts.shape[:2]):
        old, new = np.asarray(state.starts[b, k])
        order = np.asarray(state.order[b, k])
        entry = np.arange(old[-1])
        cell = np.searchsorted(old, entry, side="right") - 1
        moved = bool(now.begun[b]) & (entry >= int(now.still[b]))
        place = entry + np.where(moved, (new - old)[cell], 0)
        found[b, k] = [order[place[cell == c]].tolist() for c in range(config.num_cells)]
    return found


def check_state(index, config):
    """Every sealed candidate is in its cell's list, in order, and the tail is not too long."""
    codes = np.asarray(index.codes) & (config.num_centroids - 1)
    for (b, k), lists in listed(index, config).items():
        number = functools.reduce(lambda n, digit: n * config.num_centroids + digit.astype(int),
                                  codes[b, k], 0)  # fmt: skip
        sealed = int(index.cells.sealed[b])
        positions = np.arange(config.first_candidate, sealed)
        assert lists == [positions[number[positions] == c].tolist() for c in range(len(lists))]
        last = min(max(int(index.lengths[b]), 0), codes.shape[-1]) - config.window_size
        assert sealed <= max(last, config.first_candidate)
        assert last - sealed <= index.cells.plan.most_tail(codes.shape[-1])


def lists_of(tables, index, config, dtype=F32, **options):
    """What the cells kernel and the reference select from the same tables."""
    rows, queries, entries = tables.by_query.shape
    batch = index.codes.shape[0]
    weights = None
    if dtype is not None:
        (((weights,),)) = backend.launch_together(
            [
                pipeline.weights_launch(
                    index.lengths, rows, queries, index.codes.shape[-1], config, dtype
                )
            ],
            num_warps=4,
            **options,
        )
    got = pipeline.select_from_cells(
        tables, index.codes, index.lengths, index.cells, config, weights, **options
    )
    shape = batch, 1, rows // batch * queries, config.num_subspaces, config.num_centroids
    assert np.prod(shape) == rows * queries * entries
    want = reference.select_from_table(
        tables.by_query.reshape(shape), index.codes, index.lengths, config, dtype
    )
    return got, want


def check_lists(got, want, message=""):
    for name, one, other in zip(("indices", "counts", "weights"), got, want, strict=True):
        if one is None:
            assert other is None
        else:
            np.testing.assert_array_equal(one, other, err_msg=f"{message} {name}")


# The plan


@pytest.mark.parametrize("capacity", [1, 100, 8192, 131072, 131073, 1 << 19, 1 << 20, 3 << 20])
def test_a_segment_is_done_before_the_next_begins(capacity, monkeypatch):
    monkeypatch.undo()
    plan = cells.seal_plan(capacity, IndexerConfig())
    moves = -(-capacity // plan.block)
    assert moves + 1 + cells.MOST_NEW < plan.segment
    assert moves <= cells.MOST_MOVES
    assert plan.most_tail(capacity) <= 1024 + 512


# State


@pytest.mark.parametrize("num_new", [1, 3, 8])
@pytest.mark.parametrize("window_size", [0, 12])
def test_lists_hold_what_is_sealed_after_every_append(window_size, num_new):
    config = config_of(window_size=window_size)
    rng = np.random.default_rng(num_new)
    index = start(config, [20, 0, 60])
    sealed = index.cells.sealed
    for _ in range(100 // num_new):
        key = jnp.asarray(rng.standard_normal((B, num_new, K, 8)), F32)
        counts = jnp.asarray(rng.integers(0, num_new + 1, B), jnp.int32)
        index = append(index, key, config, counts=counts)
        check_state(index, config)
    assert (index.cells.sealed > sealed).sum() >= 2


def test_many_tokens_at_once_are_all_sealed_and_other_rows_keep_their_bits():
    config = config_of()
    index = start(config, [20, 0, 60])
    key = jnp.asarray(np.random.default_rng(0).standard_normal((B, 9, K, 8)), F32)
    after = append(index, key, config, counts=jnp.asarray([9, 0, 1], jnp.int32))
    check_state(after, config)
    assert after.cells.sealed.tolist() == [21, 3, 53]
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[1], y[1]), after.cells, index.cells)


def test_built_reset_and_rebuilt_rows():
    config = config_of()
    key = jnp.asarray(np.random.default_rng(0).standard_normal((B, S, K, 8)), F32)
    index = build_index(key, jnp.asarray([S, 70, 2], jnp.int32), config)
    check_state(index, config)
    some = jnp.asarray([True, False, False])
    emptied = reset(index, some)
    check_state(emptied, config)
    assert emptied.cells.sealed.tolist() == [3, 62, 3]
    # Appended to, a row is sealed again.
    grown = emptied
    for first in range(0, 72, 8):
        counts = jnp.asarray([8, 0, 0], jnp.int32)
        grown = append(grown, key[:, first : first + 8], config, counts=counts)
        check_state(grown, config)
    assert grown.cells.sealed[0] > 3
    again = rebuild(grown, key, config, some, lengths=jnp.asarray([90, 1, 1], jnp.int32))
    check_state(again, config)
    assert again.cells.sealed.tolist() == [82, 62, 3]
    none = rebuild(grown, key, config, some, lengths=jnp.zeros(B, jnp.int32))
    check_state(none, config)


def test_with_cells_makes_what_build_index_makes():
    config = config_of()
    key = jnp.asarray(np.random.default_rng(0).standard_normal((B, S, K, 8)), F32)
    index = build_index(key, jnp.asarray([S, 70, 2], jnp.int32), config)
    without = dataclasses.replace(index, cells=None)
    jax.tree.map(np.testing.assert_array_equal, with_cells(without, config), index)
    jax.tree.map(np.testing.assert_array_equal, with_cells(index, config), index)


def test_layers_are_stacked_and_scanned():
    config = config_of()
    layers = [start(config, [20, 0, 60], seed=seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    key = jnp.asarray(np.random.default_rng(0).standard_normal((2, B, 8, K, 8)), F32)

    def layer(carry, x):
        return carry, append(*x, config)

    _, grown = jax.lax.scan(layer, 0, (stacked, key))
    for i, index in enumerate(layers):
        want = append(index, key[i], config)
        jax.tree.map(lambda x, y, i=i: np.testing.assert_array_equal(x[i], y), grown, want)
        check_state(jax.tree.map(lambda x, i=i: x[i], grown), config)


# Kernels


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("num_new", "window_size"), [(1, 4), (5, 0)])
def test_a_decode_keeps_state_and_lists_right(num_new, window_size):
    """Step after step: segments begin, move and end in the middle of selections."""
    config = config_of(window_size=window_size)
    rng = np.random.default_rng(0)

    @jax.jit
    def step(query, key, index, counts):
        first, taken, lengths = reference.make_room(index.lengths, counts, num_new, S)
        made = pipeline.append_tokens(
            key, index.codebooks, index.codes, None, index.cells, first, taken, config,
            query=query, weights_dtype=F32, kv_layout="BSKH", interpret=True,
        )  # fmt: skip
        index = dataclasses.replace(index, codes=made.codes, lengths=lengths, cells=made.cells)
        return index, lists_of(made.tables, index, config, interpret=True)

    index = start(config, [20, 3, 40])
    sealed, phases = index.cells.sealed, set()
    for number in range(110 // num_new):
        query = rng.standard_normal((B, 1, K * G, 8)) * (number % 10 != 9)  # zeros tie all cells
        if number % 10 == 5:
            query[:, :, 0] = np.nan
        key = jnp.asarray(rng.standard_normal((B, num_new, K, 8)), F32)
        counts = jnp.asarray(rng.integers(0, num_new + 1, B), jnp.int32)
        index, (got, want) = step(jnp.asarray(query, F32), key, index, counts)
        check_state(index, config)
        check_lists(got, want, f"step {number}")
        now = cells.progress(index.lengths, index.cells.sealed, index.cells.plan, S)
        phases |= set(zip(now.begun.tolist(), now.moved.tolist(), strict=True))
    assert (index.cells.sealed > sealed).sum() >= 2
    assert len(phases) >= 3


def tables_of(kind, config, rng):
    """Look-up tables [K * B, G, M * C] that bring about ties, no numbers, and the like."""
    shape = B * K, G, config.num_subspaces * config.num_centroids
    table = rng.standard_normal(shape).astype(F32)
    if kind == "zeros":
        table = rng.choice(np.asarray([0.0, -0.0], F32), shape)
    if kind == "two values":
        table = (table > 0).astype(F32)
    if kind == "no numbers":
        table[rng.random(shape) < 0.4] = np.nan
        table[rng.random(shape) < 0.1] = np.inf
        table[rng.random(shape) < 0.1] = -np.inf
    if kind == "rounded":
        table = np.round(table)
    return pipeline.tables_from(jnp.asarray(table))


KINDS = ["random", "zeros", "two values", "no numbers", "rounded"]
SHAPES = {
    "seed": {},
    "one subspace": {"num_subspaces": 1, "num_bits": 8},
    "three subspaces": {"num_subspaces": 3, "num_bits": 4, "init_offset": 9},
    "two cells": {"num_subspaces": 1, "num_bits": 1, "window_size": 0, "sink_size": 0},
    "no budget": {"heavy_size": 0},
    "all of them": {"heavy_size": 140, "num_bits": 1, "sink_size": 1, "window_size": 1},
    "most cells": {"num_bits": 7},
    "a bit for each position": {"heavy_size": 40},
}


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", SHAPES)
def test_lists_equal_the_references(name, monkeypatch):
    if "bit" in name:
        monkeypatch.setattr(kernels, "MOST_PAIRED", 16)
        monkeypatch.setattr(kernels, "WORDS_AT_ONCE", 2)
    config = config_of(**SHAPES[name])
    rng = np.random.default_rng(list(SHAPES).index(name))
    run = jax.jit(functools.partial(lists_of, config=config, interpret=True))
    for kind in KINDS:
        for lengths in ([S, 47, 9], [S + 5, -1, 100]):
            index = start(config, lengths, seed=len(lengths))
            for codes in (index.codes, index.codes * 0, jnp.sort(index.codes, axis=-1)):
                index = with_cells(dataclasses.replace(index, codes=codes), config)
                got, want = run(tables_of(kind, config, rng), index)
                check_lists(got, want, f"{kind}, {lengths}")


@pytest.mark.usefixtures("interpreted")
def test_winners_in_the_tail():
    """A tail that no segment was sealed of for long, empty lists, and winners in the tail alone."""
    config = config_of()
    rng = np.random.default_rng(0)
    run = jax.jit(functools.partial(lists_of, config=config, interpret=True, dtype=None))
    tables = tables_of("random", config, rng)
    best = jnp.argmax(tables.by_query[0, 0].reshape(2, 4), axis=1).astype(jnp.uint8)
    empty = start(config, [0, 0, 0])
    most = empty.cells.plan.segment - 1
    for length in (12, most):  # as if appended one by one
        for all_best in (False, True):
            codes = empty.codes
            if all_best:
                codes = jnp.broadcast_to(best[:, None], codes.shape)
            index = dataclasses.replace(
                empty, codes=codes, lengths=jnp.full(B, length + config.window_size, jnp.int32)
            )
            check_lists(*run(tables, index))


@pytest.mark.parametrize("kind", ["zeros", "no numbers"])
def test_no_access_leaves_an_array(kind, monkeypatch):
    """On checked memory, with programs in random order."""
    if kind == "no numbers":
        monkeypatch.setattr(kernels, "MOST_PAIRED", 16)
    config = config_of(heavy_size=20)
    rng = np.random.default_rng(0)
    index = start(config, [S - 1, 61, 30])
    key = jnp.asarray(rng.standard_normal((B, 1, K, 8)), F32)
    with checked(seed=0):
        for _ in range(3):
            before = index.lengths
            first, taken, lengths = reference.make_room(before, None, 1, S)
            made = pipeline.append_tokens(
                key, index.codebooks, index.codes, None, index.cells, first, taken, config,
                kv_layout="BSKH",
            )  # fmt: skip
            index = dataclasses.replace(index, codes=made.codes, lengths=lengths, cells=made.cells)
            check_state(index, config)
        got, want = lists_of(tables_of(kind, config, rng), index, config)
    check_lists(got, want)


@pytest.mark.parametrize("most_paired", [16, 512])
@pytest.mark.parametrize("made_for", [120, 20])
def test_lengths_set_by_hand_give_some_list_of_the_right_length(made_for, most_paired, monkeypatch):
    """What was sealed for another length, with segments at all stages; see the contract."""
    monkeypatch.setattr(kernels, "MOST_PAIRED", most_paired)
    # A token that is listed twice has one place.
    check = Memory.check
    monkeypatch.setattr(
        Memory, "check", lambda self, good, what: check(self, good or "twice" in what, what)
    )
    config = config_of(heavy_size=30)
    rng = np.random.default_rng(0)
    index = start(config, [made_for, made_for, made_for + 17])
    two_cells = (index.codes // 128).astype(jnp.uint8).at[..., 60:].set(3)
    key = jnp.asarray(rng.standard_normal((B, 1, K, 8)), F32)
    for codes, kind, lengths in (
        (index.codes, "random", [50, made_for - 1, made_for - 9]),
        (two_cells, "zeros", [55, 58, S]),
        (two_cells, "two values", [made_for + 40, made_for + 47, S]),
        (index.codes, "zeros", [made_for + 52, made_for + 60, -5]),
    ):
        wrong = dataclasses.replace(index, codes=codes, lengths=jnp.asarray(lengths, jnp.int32))
        with checked(seed=0):
            first, taken, grown = reference.make_room(wrong.lengths, None, 1, S)
            inputs = key, wrong.codebooks, wrong.codes, None, wrong.cells, first, taken, config
            made = pipeline.append_tokens(*inputs, kv_layout="BSKH")
            wrong = dataclasses.replace(wrong, codes=made.codes, lengths=grown, cells=made.cells)
            got, want = lists_of(tables_of(kind, config, rng), wrong, config)
        np.testing.assert_array_equal(got[1], want[1])
        listed_ones = np.arange(got[0].shape[-1]) < np.asarray(got[1])[..., None]
        visible = np.clip(np.asarray(wrong.lengths), 0, S)[:, None, None, None]
        assert ((np.asarray(got[0]) >= 0) == listed_ones).all()
        assert (np.asarray(got[0]) < np.maximum(visible, 1)).all()


@pytest.mark.parametrize("window_size", [2**31 - 254, 7])
def test_sizes_beyond_any_cache(window_size):
    config = IndexerConfig(
        cells=True, num_bits=1, heavy_size=0, sink_size=0, window_size=window_size,
        init_offset=2**31 - 250,
    )  # fmt: skip
    index = start(config, [0, 20, 32], capacity=32)
    key = jnp.zeros((B, 8, K, 8), F32)
    with checked(seed=0):
        first, taken, _ = reference.make_room(index.lengths, None, 8, 32)
        inputs = key, index.codebooks, index.codes, None, index.cells, first, taken, config
        made = pipeline.append_tokens(*inputs, kv_layout="BSKH")
    assert made.cells.sealed.tolist() == [2**31 - 250] * 3


# What is refused


def test_what_cells_cannot_do_is_said():
    config, plain = config_of(), config_of()
    plain = dataclasses.replace(plain, cells=False)
    index = start(config, [20, 3, 40])
    without = dataclasses.replace(index, cells=None)
    query = jnp.zeros((B, 1, K * G, 8), F32)
    key = jnp.zeros((B, 1, K, 8), F32)
    with pytest.raises(ValueError, match=r"^cells: expected num_centroids\*\*num_subspaces"):
        IndexerConfig(cells=True, num_subspaces=3, num_bits=5)
    for function in (
        lambda: select(query, without, config),
        lambda: append(without, key, config),
        lambda: append(index, key, plain),
    ):
        with pytest.raises(ValueError, match=r"^index\.cells: expected .* use with_cells"):
            function()
    for other in (
        dataclasses.replace(config, window_size=5),
        dataclasses.replace(config, sink_size=4),
    ):
        with pytest.raises(ValueError, match=r"^index\.cells\.plan: expected .*window_size"):
            append(index, key, other)
    with pytest.raises(ValueError, match=r"^index\.cells\.order: expected int32"):
        append(
            dataclasses.replace(
                index, cells=dataclasses.replace(index.cells, order=index.cells.order[:, :1])
            ),
            key,
            config,
        )
    for cells_like, message in (
        ("cells", "got str"),
        (dataclasses.replace(index.cells, plan=None), "got Cells with NoneType"),
        (dataclasses.replace(index.cells, starts=None), "starts: expected int32"),
        (dataclasses.replace(index.cells, sealed=index.cells.sealed[:1]), "sealed: expected int32"),
    ):
        odd = dataclasses.replace(index, cells=cells_like)
        for function in (
            lambda odd=odd: reset(odd, jnp.ones(B, bool)),
            lambda odd=odd: append(odd, key, config),
        ):
            with pytest.raises(ValueError, match=rf"^index\.cells.*{message}"):
                function()
    with pytest.raises(ValueError, match=r"^index\.codebooks: expected M=1 as in config"):
        with_cells(index, dataclasses.replace(config, num_subspaces=1))
    with pytest.raises(ValueError, match=r'^selector: .*"cells" with config\.cells=False'):
        select(query, without, plain, selector="cells")
    with pytest.raises(ValueError, match=r"^config\.cells: expected True"):
        with_cells(index, plain)
    with pytest.raises(NotImplementedError, match=r"^selector: .*T=2"):
        indexer_next(jnp.zeros((B, 2, K * G, 8), F32), jnp.zeros((B, 2, K, 8), F32), index, config,
                     selector="cells")  # fmt: skip
    with pytest.raises(NotImplementedError, match=r"^selector: "):
        select(query, index, config, selector="cells", implementation="xla")
    # Other selectors need no state, but keep it.
    selection, after = indexer_next(query, key, index, config)
    assert selection.counts.shape == (B, 1, K * G)
    check_state(after, config)
