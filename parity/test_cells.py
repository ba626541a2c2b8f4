"""The "cells" selector: its state after every step, and its lists against the reference's.

Segments and blocks are small here, so that many are sealed. The kernels run in the interpreter, and
once on checked memory.
"""

import contextlib
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
    state,
    with_cells,
)
from jax_indexer.kernels import backend, pipeline
from jax_indexer.kernels.lookup_table import tables_from
from jax_indexer.kernels.output import weights_launch
from jax_indexer.kernels.step import Lengths, Step
from jax_indexer.kernels.tuning import H100
from jax_indexer.layout import by_query_head
from parity.checked_memory import Memory, checked

B, K, G, S = 3, 2, 2, 300
F32 = np.dtype(np.float32)
SMALL_BLOCKS = dataclasses.replace(H100, moved_at_once=8, starts_at_once=16, filled_at_once=32)


@pytest.fixture
def interpreted():
    with backend.interpreted():
        yield


def config_of(**fields):
    sizes = {"num_bits": 2, "heavy_size": 6, "sink_size": 3, "window_size": 4, **fields}
    return IndexerConfig(cells=True, **sizes)


def small_sealing(capacity, config):
    """Segments and blocks of which a small cache has many."""
    return state.sealing_for(capacity, config, smallest_segment=16, smallest_block=8, most_moves=32)


def start(config, lengths, *, kv_heads=K, capacity=S, seed=0, sealing_for=small_sealing):
    """An index of random codebooks and codes."""
    rng = np.random.default_rng(seed)
    shape = len(lengths), kv_heads, config.num_subspaces
    index = PQIndex(
        codebooks=jnp.asarray(rng.standard_normal((*shape, config.num_centroids, 4)), F32),
        codes=jnp.asarray(rng.integers(0, 256, (*shape, capacity), np.uint8)),
        lengths=jnp.asarray(lengths, jnp.int32),
    )
    return sealed_anew(index, config, sealing_for(capacity, config))


def sealed_anew(index, config, sealing=None, *, sequence_axis=None, **changes):
    """What `with_cells` does, sealed in another way or as before."""
    index = dataclasses.replace(index, **changes)
    rows, kv_heads, _, capacity = index.codes.shape
    none = cells.no_cells(rows, kv_heads, capacity, config, sealing or index.cells.sealing)
    span = state.Span.of(sequence_axis, capacity)
    high_water = jnp.clip(index.lengths, 0, span.capacity if span else capacity)
    made = cells.seal(none, index.codes, high_water, jnp.ones(rows, bool), config, span)
    return dataclasses.replace(index, cells=made, high_water=high_water)


def check_state(index, config):
    """All of the state is what codes and lengths say, and the tail is not too long."""
    index, now = jax.tree.map(np.asarray, (index, progress_of(index)))
    capacity, sealing = index.codes.shape[-1], index.cells.sealing
    number = np.zeros((*index.codes.shape[:2], capacity), int)
    for m in range(config.num_subspaces):
        digit = index.codes[:, :, m] & (config.num_centroids - 1)
        number = number * config.num_centroids + digit
    sealed = np.asarray(index.cells.sealed(jnp.asarray(index.high_water)))
    lengths = np.clip(index.lengths, 0, capacity)
    assert (lengths <= index.high_water).all()
    assert (lengths >= index.high_water - state.MOST_BACK).all()
    last = index.high_water - config.window_size
    least = last - (state.MOST_BACK + state.MOST_NEW - 1)
    assert (sealed + now.counted <= np.maximum(least, config.first_candidate)).all()
    assert (last - sealed <= sealing.most_tail(capacity)).all()
    for b, k in np.ndindex(number.shape[:2]):
        positions = np.arange(config.first_candidate, sealed[b])
        cell = number[b, k, positions]
        by_cell = np.argsort(cell, kind="stable")
        old, new = index.cells.starts[b, k]
        np.testing.assert_array_equal(np.diff(old), np.bincount(cell, minlength=len(old) - 1))
        assert old[0] == 0
        # A list is read where its blocks are by now.
        entry = np.arange(len(positions))
        moved = now.begun[b] & (entry >= now.still[b])
        place = entry + np.where(moved, (new - old)[cell[by_cell]], 0)
        listed = index.cells.order[b, k, place]
        np.testing.assert_array_equal(listed, positions[by_cell])
        check_segment(index.cells, (b, k), now, number[b, k, sealed[b] :], listed)


def check_segment(kept, row, now, waiting, listed):
    """What is known of the next segment: counts or new starts, and the blocks on their way.

    `waiting` are cells of the tokens that are not sealed, `listed` are those that are.
    """
    sealing, (b, _) = kept.sealing, row
    counted, read, moved = now.counted[b], now.read[b], now.moved[b]
    old, new = kept.starts[row]
    counts = np.bincount(waiting[:counted], minlength=len(old))
    want = counts if counted < sealing.segment else old + np.cumsum(counts) - counts
    np.testing.assert_array_equal(new, want)
    before = [(waiting[:j] == waiting[j]).sum() for j in range(counted)]
    np.testing.assert_array_equal(kept.earlier[row][:counted], before)
    ring, end = kept.ring[row].reshape(-1, sealing.block), len(listed)
    for i in range(moved, read):
        block = listed[max(end - (i + 1) * sealing.block, 0) : end - i * sealing.block]
        np.testing.assert_array_equal(ring[i % len(ring)][sealing.block - len(block) :], block)


def progress_of(index):
    sealed, capacity = index.cells.sealed(index.high_water), index.codes.shape[-1]
    return state.progress(index.high_water, sealed, index.cells.sealing, capacity)


def by_kernels(index, key, config, counts=None, *, query=None):
    """`append` by the kernels, and the table of a query [B, 1, N, M, C]."""
    step = Step.of(
        index, config, T=key.shape[1], N=0 if query is None else query.shape[2],
        weights_dtype=None if query is None else F32, tuning=SMALL_BLOCKS,
    )  # fmt: skip
    _, lengths = reference.make_room(index.lengths, counts, step.T, step.S)
    launches = pipeline.append_launches(step, key, index, counts)
    if query is not None:
        of_query = dataclasses.replace(step, T=1)
        after = Lengths(lengths, None)
        launches |= pipeline.query_launches(of_query, query, index, after)
    made = pipeline.launched(step, launches)
    index, _ = pipeline.appended(step, index, made)
    if query is None:
        return index, None
    by_query = made["tables"].by_query
    return index, by_query_head(
        by_query.reshape(step.B, step.K, -1, config.num_subspaces, config.num_centroids), 1
    )


def advanced(index, config, tokens):
    """The index with as many more tokens in each row, appended by XLA."""
    rng, left = np.random.default_rng(1), np.asarray(tokens)
    while left.any():
        key = jnp.asarray(rng.standard_normal((len(left), 8, index.codes.shape[1], 8)), F32)
        counts = np.minimum(left, 8)
        index = append(index, key, config, counts=jnp.asarray(counts, jnp.int32))
        left = left - counts
    return index


def lists_of(table, index, config, dtype=F32, tuning=SMALL_BLOCKS):
    """What the cells kernel and the reference select from the same table."""
    step = Step.of(index, config, N=table.shape[2], weights_dtype=dtype, tuning=tuning)
    lengths, weights = Lengths(index.lengths, None, high_water=index.high_water), None
    if dtype is not None:
        made = pipeline.launched(step, {"weights": weights_launch(step, lengths)})
        weights = made["weights"].weights
    tables = tables_from(table, step)
    got = pipeline.from_tables(step, tables, index, lengths, weights, "cells")
    want = reference.select_from_table(table, index.codes, index.lengths, None, config, dtype)
    return got, want


def check_lists(got, want, message=""):
    for name in ("indices", "counts", "weights"):
        one, other = getattr(got, name), getattr(want, name)
        if one is None:
            assert other is None
        else:
            np.testing.assert_array_equal(one, other, err_msg=f"{message} {name}")


# How tokens are sealed


@pytest.mark.parametrize("capacity", [1, 100, 8192, 131072, 131073, 1 << 19, 1 << 20, 3 << 20])
def test_a_segment_is_done_before_the_next_begins(capacity):
    sealing = state.sealing_for(capacity, IndexerConfig())
    moves = -(-capacity // sealing.block)
    assert moves <= state.MOST_MOVES
    most = sealing.most_waiting(capacity)
    left = most + state.MOST_NEW - sealing.segment
    now = state.progress(jnp.int32(left + sealing.margin), jnp.int32(0), sealing, capacity + 4096)
    assert (now.waiting, now.counted) == (left, 0)
    assert sealing.segment == 512 or sealing.segment * 3 // 8 < moves + 3 * state.MOST_NEW


@pytest.mark.parametrize(
    ("capacity", "block", "segment", "most_tail"),
    [
        (1000, 256, 512, 547),
        (32768, 256, 512, 671),
        (131072, 1024, 512, 671),
        (1 << 20, 4096, 512, 799),
        (3 << 20, 8192, 1024, 1439),
    ],
)
def test_segments_and_blocks(capacity, block, segment, most_tail):
    sealing = state.sealing_for(capacity, IndexerConfig())
    assert (sealing.block, sealing.segment, sealing.most_tail(capacity)) == (
        block,
        segment,
        most_tail,
    )
    assert capacity < 32768 or 4 * sealing.ring <= capacity / 2


def test_a_step_writes_what_an_earlier_one_read_and_what_no_other_program_needs():
    sealing, entries = small_sealing(S, config_of()), 150
    sealed = entries + sealing.first_candidate
    waiting = jnp.arange(sealing.most_waiting(entries) + 1)[:, None]
    lengths = sealed + sealing.margin + waiting + jnp.arange(state.MOST_NEW + 1)[None]
    sealed = jnp.full_like(lengths, sealed)
    now = state.progress(lengths, sealed, sealing, 2 * S)
    was = jax.tree.map(lambda x: x[:, :1], now)
    moves = -(-entries // sealing.block)
    assert (now.counted - was.counted <= state.RATE * state.MOST_NEW).all()
    assert (now.counted <= now.waiting).all()
    assert (now.begun == (now.counted == sealing.segment)).all()
    writes = now.moved > was.moved
    assert (~writes | (was.begun & (now.moved <= was.read))).all()
    assert ((now.read - was.moved) * sealing.block <= sealing.ring).all()
    seals = now.done & ~was.done
    assert seals.any()
    assert (~seals | (was.moved == moves)).all()
    after = state.progress(lengths, sealed + sealing.segment, sealing, 2 * S)
    assert (~seals | (after.counted == 0)).all()
    assert (now.done | (now.waiting <= sealing.most_waiting(entries))).all()


@pytest.mark.parametrize("base", [3, 40, 77])
def test_what_is_sealed_follows_from_the_length_alone(base):
    capacity = 3000
    sealing = small_sealing(capacity, config_of())
    want, sealed = [], base
    for length in range(capacity + 20):
        while state.progress(jnp.int32(length), jnp.int32(sealed), sealing, capacity).done:
            sealed += sealing.segment
        want.append(sealed)
    got = state.sealed_at(jnp.arange(capacity + 20), jnp.int32(base), sealing, capacity)
    np.testing.assert_array_equal(got, want)
    assert sealed > base + 10 * sealing.segment


def test_a_base_outside_of_the_candidates_is_taken_for_the_nearest_inside():
    capacity, config = 3000, config_of()
    sealing = small_sealing(capacity, config)
    lengths = jnp.arange(capacity + 20)

    def sealed(base):
        return np.asarray(state.sealed_at(lengths, jnp.int32(base), sealing, capacity))

    for base in (-(2**31), -1, config.first_candidate - 1):
        np.testing.assert_array_equal(sealed(base), sealed(config.first_candidate))
    for base in (capacity + 1, 2**31 - 1):
        np.testing.assert_array_equal(sealed(base), np.full(len(lengths), capacity))


# State


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("num_new", [1, 3, 8])
@pytest.mark.parametrize("window_size", [0, 12])
@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_lists_hold_what_is_sealed_after_every_append(implementation, window_size, num_new):
    config = config_of(window_size=window_size)
    rng = np.random.default_rng(num_new)
    step = functools.partial(append, config=config)
    if implementation == "triton":
        step = jax.jit(lambda *x, **y: by_kernels(*x, config, **y)[0])
    index = start(config, [150, 0, 60])
    sealed = index.cells.sealed(index.lengths)
    for _ in range(240 // num_new):
        key = jnp.asarray(rng.standard_normal((B, num_new, K, 8)), F32)
        counts = jnp.asarray(np.where(rng.random(B) < 0.2, 0, rng.integers(1, num_new + 1, B)))
        index = step(index, key, counts=counts.astype(jnp.int32))
        check_state(index, config)
    assert (index.cells.sealed(index.lengths) > sealed).sum() >= 2


STAGES = ("counted", "begun", "read", "moved", "last read", "last moved", "done")


def waiting_at(stage, sealing, moves):
    """Tokens that wait in the first step of a stage."""
    return {
        "counted": sealing.segment - sealing.segment // state.RATE + 1,
        "begun": sealing.segment,
        "read": sealing.segment + 1,
        "moved": sealing.segment + state.MOST_NEW + 1,
        "last read": sealing.segment + moves,
        "last moved": sealing.segment + state.MOST_NEW + moves,
        "done": sealing.segment + 2 * state.MOST_NEW + moves + 1,
    }[stage]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("window_size", [0, 12])
def test_a_step_of_any_size_across_any_bound(window_size):
    """From some tokens before a bound to as many or fewer behind it, and then one token more."""
    config = config_of(window_size=window_size)
    step = jax.jit(lambda *x: by_kernels(*x[:2], config, x[2])[0])
    by_xla = jax.jit(lambda *x: append(*x[:2], config, counts=x[2]))
    key = jnp.asarray(np.random.default_rng(0).standard_normal((2, B, 8, K, 8)), F32)
    index = start(config, [150, 45, 77])
    first = np.asarray(progress_of(index).entries)
    sealing = index.cells.sealing
    bounds = [
        [waiting_at(stage, sealing, -(-n // sealing.block)) for n in first] for stage in STAGES
    ]
    reached = np.zeros(B, int)
    for stage, bound in zip(STAGES, np.asarray(bounds), strict=True):
        for before in (8, 3, 1):
            wanted = np.maximum(bound - before, reached)
            index, reached = advanced(index, config, wanted - reached), wanted
            for count in range(9):
                counts = jnp.asarray([count, 8 - count, count // 2], jnp.int32)
                got, want = step(index, key[0], counts), by_xla(index, key[0], counts)
                check_state(got, config)
                np.testing.assert_array_equal(
                    got.cells.sealed(got.lengths), want.cells.sealed(want.lengths), err_msg=stage
                )
                check_state(want, config)
                check_state(step(got, key[1], counts // counts.clip(1)), config)
    assert (np.asarray(progress_of(index).waiting) == reached).all()


def test_many_tokens_at_once_are_all_sealed_and_other_rows_keep_their_bits():
    config = config_of()
    index = start(config, [20, 0, 60])
    key = jnp.asarray(np.random.default_rng(0).standard_normal((B, 9, K, 8)), F32)
    after = append(index, key, config, counts=jnp.asarray([9, 0, 1], jnp.int32))
    check_state(after, config)
    assert after.cells.sealed(after.lengths).tolist() == [10, 3, 42]
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[1], y[1]), after.cells, index.cells)


def test_built_reset_and_rebuilt_rows():
    config = config_of()
    key = jnp.asarray(np.random.default_rng(0).standard_normal((B, S, K, 8)), F32)
    lengths = jnp.asarray([S, 70, 2], jnp.int32)
    index = rebuild(start(config, [0, 0, 0]), key, config, jnp.ones(B, bool), lengths=lengths)
    check_state(index, config)
    some = jnp.asarray([True, False, False])
    emptied = reset(index, some)
    check_state(emptied, config)
    assert emptied.cells.sealed(emptied.lengths).tolist() == [3, 51, 3]
    # Appended to, a row is sealed again.
    grown = emptied
    for first in range(0, 120, 8):
        counts = jnp.asarray([8, 0, 0], jnp.int32)
        grown = append(grown, key[:, first : first + 8], config, counts=counts)
        check_state(grown, config)
    assert grown.cells.sealed(grown.lengths)[0] > 3
    again = rebuild(grown, key, config, some, lengths=jnp.asarray([90, 1, 1], jnp.int32))
    check_state(again, config)
    assert again.cells.sealed(again.lengths).tolist() == [71, 51, 3]
    none = rebuild(grown, key, config, some, lengths=jnp.zeros(B, jnp.int32))
    check_state(none, config)


@pytest.mark.parametrize("implementation", ["xla", "kernels"])
def test_a_row_that_takes_none_of_many_tokens_keeps_its_cells(implementation):
    """Lengths set by hand too, past the end and before the beginning."""
    config = IndexerConfig(num_bits=2, heavy_size=4, sink_size=2, window_size=3, cells=True)
    S, tokens = 40, 9
    rng = np.random.default_rng(0)
    key = jnp.asarray(rng.standard_normal((4, S, 1, 8)), F32)
    built = build_index(key, jnp.full(4, 30, jnp.int32), config)
    index = dataclasses.replace(built, lengths=jnp.asarray([S + 5, -3, 35, 30], jnp.int32))
    with backend.interpreted() if implementation == "kernels" else contextlib.nullcontext():
        counts = jnp.asarray([tokens, 0, tokens, tokens], jnp.int32)
        after = append(index, key[:, :tokens], config, counts=counts)
    assert after.lengths.tolist() == [S + 5, -3, 35, 39]
    for name in ("starts", "order", "base"):
        got, before = getattr(after.cells, name), getattr(index.cells, name)
        np.testing.assert_array_equal(got[:3], before[:3], err_msg=name)
        assert name == "order" or (got[3] != before[3]).any()


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
@pytest.mark.parametrize(("num_new", "steps", "window_size"), [(1, 150, 4), (5, 50, 0)])
def test_a_decode_keeps_state_and_lists_right(num_new, steps, window_size):
    """Step after step: segments begin, move and end in the middle of selections."""
    config = config_of(window_size=window_size)
    rng = np.random.default_rng(0)

    @jax.jit
    def step(query, key, index, counts):
        index, table = by_kernels(index, key, config, counts, query=query)
        return index, lists_of(table, index, config)

    index = start(config, [150, 3, 40])
    sealed, phases = index.cells.sealed(index.lengths), set()
    for number in range(steps):
        query = rng.standard_normal((B, 1, K * G, 8)) * (number % 10 != 9)  # zeros tie all cells
        if number % 10 == 5:
            query[:, :, 0] = np.nan
        key = jnp.asarray(rng.standard_normal((B, num_new, K, 8)), F32)
        counts = jnp.asarray(rng.integers(0, num_new + 2, B).clip(0, num_new), jnp.int32)
        index, (got, want) = step(jnp.asarray(query, F32), key, index, counts)
        check_state(index, config)
        check_lists(got, want, f"step {number}")
        now = progress_of(index)
        phases |= set(zip(now.begun.tolist(), now.moved.tolist(), strict=True))
    assert (index.cells.sealed(index.lengths) > sealed).sum() >= 2
    assert len(phases) >= 3


def table_of(kind, config, rng):
    """A look-up table [B, 1, N, M, C] that brings about ties, no numbers, and the like."""
    shape = B, 1, K * G, config.num_subspaces, config.num_centroids
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
    return jnp.asarray(table)


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
def test_lists_equal_the_references(name):
    tuning = SMALL_BLOCKS
    if "bit" in name:
        tuning = dataclasses.replace(tuning, most_paired=16, words_at_once=2)
    config = config_of(**SHAPES[name])
    rng = np.random.default_rng(list(SHAPES).index(name))
    run = jax.jit(functools.partial(lists_of, config=config, tuning=tuning))
    for kind in KINDS:
        for lengths in ([S, 47, 9], [S + 5, -1, 100]):
            index = start(config, lengths, seed=len(lengths))
            for codes in (index.codes, index.codes * 0, jnp.sort(index.codes, axis=-1)):
                index = sealed_anew(index, config, codes=codes)
                got, want = run(table_of(kind, config, rng), index)
                check_lists(got, want, f"{kind}, {lengths}")


@pytest.mark.usefixtures("interpreted")
def test_winners_in_the_tail():
    """A tail that no segment was sealed of for long, empty lists, and winners in the tail alone."""
    config = config_of()
    rng = np.random.default_rng(0)
    run = jax.jit(functools.partial(lists_of, config=config, dtype=None))
    table = table_of("random", config, rng)
    best = jnp.argmax(table[0, 0, 0], axis=1).astype(jnp.uint8)
    empty = start(config, [0, 0, 0])
    most = empty.cells.sealing.segment - 1
    for length in (12, most):  # as if appended one by one
        for all_best in (False, True):
            codes = empty.codes
            if all_best:
                codes = jnp.broadcast_to(best[:, None], codes.shape)
            lengths = jnp.full(B, length + empty.cells.sealing.margin, jnp.int32)
            index = dataclasses.replace(empty, codes=codes, lengths=lengths, high_water=lengths)
            check_lists(*run(table, index))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("most_of_a_warp", [16, 512])
@pytest.mark.parametrize("num_bits", [3, 6])
def test_many_may_be_among_the_best(num_bits, most_of_a_warp):
    """More than a chunk of what may be taken, and a tail of which a thread has several tokens."""
    config = config_of(num_bits=num_bits, heavy_size=90)
    tuning = dataclasses.replace(SMALL_BLOCKS, most_of_a_warp=most_of_a_warp)
    rng = np.random.default_rng(num_bits)
    run = jax.jit(functools.partial(lists_of, config=config, dtype=None, tuning=tuning))
    index = start(config, [400, 90, 30], capacity=1000, sealing_for=state.sealing_for)
    index = advanced(index, config, [500, 480, 300])
    tail = index.high_water - config.window_size - index.cells.sealed(index.high_water)
    assert tail.max() > 2 * 32 * tuning.warps_for_cells(config.num_cells, config.heavy_size)
    for kind in KINDS:
        check_lists(*run(table_of(kind, config, rng), index), kind)


@pytest.mark.parametrize("kind", ["zeros", "no numbers"])
def test_no_access_leaves_an_array(kind):
    """On checked memory, with programs in random order."""
    by_bits = kind == "no numbers"
    tuning = dataclasses.replace(SMALL_BLOCKS, most_paired=16 if by_bits else 256)
    config = config_of(heavy_size=20)
    rng = np.random.default_rng(0)
    index = start(config, [S - 1, 61, 30])
    key = jnp.asarray(rng.standard_normal((B, 1, K, 8)), F32)
    with checked(seed=0):
        for _ in range(2):
            index, _ = by_kernels(index, key, config)
            check_state(index, config)
        got, want = lists_of(table_of(kind, config, rng), index, config, tuning=tuning)
    check_lists(got, want)


@pytest.mark.parametrize("num_new", [1, 8])
@pytest.mark.parametrize(
    "stages", [("counted", "begun", "read"), ("moved", "last read", "last moved"), ("done",) * 3]
)
def test_programs_that_seal_need_nothing_of_one_another(stages, num_new):
    """Every row is before a bound; on checked memory, with programs in random order."""
    config = config_of()
    index = start(config, [50, 70, 150], kv_heads=1)
    entries, sealing = progress_of(index).entries, index.cells.sealing
    moves = -(-entries // sealing.block)
    bounds = [waiting_at(stage, sealing, int(n)) for stage, n in zip(stages, moves, strict=True)]
    index = advanced(index, config, np.asarray(bounds) - num_new // 2 - 1)
    key = jnp.asarray(np.random.default_rng(0).standard_normal((B, num_new, 1, 8)), F32)
    sealed = index.cells.sealed(index.lengths)
    with checked(seed=0):
        for _ in range(2):
            index, _ = by_kernels(index, key, config)
            check_state(index, config)
    assert (index.cells.sealed(index.lengths) > sealed).all() or stages[0] != "done"


@pytest.mark.parametrize("most_paired", [16, 512])
@pytest.mark.parametrize("made_for", [120, 20])
def test_lengths_set_by_hand_give_some_list_of_the_right_length(made_for, most_paired, monkeypatch):
    """What was sealed for another length, with segments at all stages; see the contract."""
    tuning = dataclasses.replace(SMALL_BLOCKS, most_paired=most_paired)
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
            wrong, _ = by_kernels(wrong, key, config)
            got, want = lists_of(table_of(kind, config, rng), wrong, config, tuning=tuning)
        np.testing.assert_array_equal(got.counts, want.counts)
        listed_ones = np.arange(got.indices.shape[-1]) < np.asarray(got.counts)[..., None]
        visible = np.clip(np.asarray(wrong.lengths), 0, S)[:, None, None, None]
        assert ((np.asarray(got.indices) >= 0) == listed_ones).all()
        assert (np.asarray(got.indices) < np.maximum(visible, 1)).all()


@pytest.mark.usefixtures("interpreted")
def test_starts_that_are_garbage_give_some_list():
    """Their sizes overflow when they are added up; a search that minds them would not end."""
    config = config_of(heavy_size=40)
    index = start(config, [S - 1, 150, 130])
    run = jax.jit(functools.partial(lists_of, config=config, dtype=None, tuning=SMALL_BLOCKS))
    for seed in range(20):
        rng = np.random.default_rng(seed)
        starts = rng.integers(-(2**31), 2**31, index.cells.starts.shape).astype(np.int32)
        starts[..., -1] = index.cells.starts[..., -1]  # what fits the lengths is believed
        cells = dataclasses.replace(index.cells, starts=jnp.asarray(starts))
        table = table_of("random", config, rng)
        got, want = run(table, dataclasses.replace(index, cells=cells))
        np.testing.assert_array_equal(got.counts, want.counts)
        listed_ones = np.arange(got.indices.shape[-1]) < np.asarray(got.counts)[..., None]
        assert ((np.asarray(got.indices) >= 0) == listed_ones).all()
        assert (np.asarray(got.indices) < np.asarray(index.lengths)[:, None, None, None]).all()


@pytest.mark.parametrize("window_size", [2**31 - 254, 7])
def test_sizes_beyond_any_cache(window_size):
    config = IndexerConfig(
        cells=True, num_bits=1, heavy_size=0, sink_size=0, window_size=window_size,
        init_offset=2**31 - 250,
    )  # fmt: skip
    index = start(config, [0, 20, 32], capacity=32)
    key = jnp.zeros((B, 8, K, 8), F32)
    with checked(seed=0):
        after, _ = by_kernels(index, key, config)
    assert after.cells.sealed(after.lengths).tolist() == [2**31 - 250] * 3


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
    ):
        with pytest.raises(ValueError, match=r"^index\.cells: expected a state .*; use with_cells"):
            function()
    with pytest.raises(ValueError, match=r"^index\.cells: expected None .*cells=None"):
        append(index, key, plain)
    for other in (
        dataclasses.replace(config, window_size=5),
        dataclasses.replace(config, sink_size=4),
    ):
        with pytest.raises(
            ValueError, match=r"^index\.cells\.sealing\.(first_candidate|window_size): expected "
        ):
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
        (dataclasses.replace(index.cells, sealing=None), "got Cells with NoneType"),
        (dataclasses.replace(index.cells, starts=None), "starts: expected int32"),
        (dataclasses.replace(index.cells, earlier=index.cells.order), "earlier: expected int32"),
        (dataclasses.replace(index.cells, ring=index.cells.ring[..., 1:]), "ring: expected int32"),
        (dataclasses.replace(index.cells, base=index.cells.base[:1]), "base: expected int32"),
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
    with pytest.raises(NotImplementedError, match=r"^selector: .*up to 8 query tokens, not T=9"):
        indexer_next(jnp.zeros((B, 9, K * G, 8), F32), jnp.zeros((B, 9, K, 8), F32), index, config,
                     selector="cells")  # fmt: skip
    with pytest.raises(NotImplementedError, match=r"^selector: "):
        select(query, index, config, selector="cells", implementation="xla")
    # Other selectors need no state, but keep it.
    selection, after = indexer_next(query, key, index, config)
    assert selection.counts.shape == (B, 1, K * G)
    check_state(after, config)
