"""Every kernel alone and in sequence, against the oracle and the reference.

Each test runs three times: in Pallas's interpreter, on checked memory, and on a GPU where there is
one. Outputs are poisoned beforehand, so that equality also says that all of them was written.
"""

import contextlib
import dataclasses
import functools
from typing import Any, NamedTuple

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_indexer import IndexerConfig, PQIndex, reference
from jax_indexer.kernels import backend, pipeline, scores, sparse_index
from jax_indexer.kernels.lookup_table import tables_from
from jax_indexer.kernels.output import weights_launch
from jax_indexer.kernels.step import Lengths, Step
from jax_indexer.kernels.tuning import H100, ScoreTuning
from parity import oracle
from parity.checked_memory import check_canaries, checked, poisoned
from parity.test_select import ADVERSARIES, boundary_lengths

CPU = jax.devices("cpu")[0]
# Compiling is most of the interpreter's time.
UNOPTIMIZED = {"xla_backend_optimization_level": 0}


class Runner:
    """One way to run a kernel function.

    Attributes:
      rows: how many batch rows a test may take; checked memory is slow.
      writes: by output, how often each element was written; checked memory only.
    """

    def __init__(self, name: str):
        self.name = name
        self.rows = {"interpreter": 40, "checked memory": 5, "triton": 64}[name]
        self.writes: dict[str, np.ndarray] = {}

    def __call__(self, function, *arrays, **static):
        """Calls function(*arrays, **static); returns its outputs in numpy."""
        if self.name == "checked memory":
            with jax.default_device(CPU), checked(seed=len(self.writes)) as launches:
                outputs = function(*jax.tree.map(jnp.asarray, arrays), **static)
            for launch in launches:
                self.writes |= launch
            return jax.tree.map(np.asarray, outputs)
        interpret = self.name == "interpreter"

        def on_poison(*arrays):
            with poisoned() as canaries:
                return function(*arrays, **static), canaries

        options = {"compiler_options": UNOPTIMIZED} if interpret else {}
        with contextlib.ExitStack() as stack:
            if interpret:
                stack.enter_context(jax.default_device(CPU))
                stack.enter_context(backend.interpreted())
            outputs, canaries = jax.jit(on_poison, **options)(*jax.tree.map(jnp.asarray, arrays))
        check_canaries(canaries)
        return jax.tree.map(np.asarray, outputs)


# Many blocks for few tokens, and few programs, so that each has several: tuned blocks would hold
# all that a CPU can afford.
SMALL_BLOCKS = dataclasses.replace(
    H100,
    scores=(ScoreTuning(np.inf, 16, 8, 1, 6),),
    index_block=64,
    threshold_warps=1,
    group_run=2,
    largest_group=8,
    many_groups=64,
)


def append_codes(key_new, codebooks, codes, phi, start, taken, *, kv_layout):
    """The codes after new tokens were appended."""
    _, _, M, C, _ = codebooks.shape
    metric = "euclidean" if phi is None else "ip"
    config = IndexerConfig(num_subspaces=M, num_bits=C.bit_length() - 1, metric=metric)
    index = PQIndex(codebooks, codes, start, phi)
    num_new = key_new.shape[kv_layout.index("S")]
    step = Step.of(index, config, T=num_new, kv_layout=kv_layout)
    return pipeline.launch_append(step, key_new, index, taken).codes


RUNNERS = {"interpreter": (), "checked memory": (), "triton": pytest.mark.gpu}


@pytest.fixture(params=[pytest.param(name, marks=marks) for name, marks in RUNNERS.items()])
def run(request) -> Runner:
    return Runner(request.param)


def each(cases, *, checked):
    """Parametrizes run and case: every case on every runner, but few on checked memory."""
    parameters = [
        pytest.param(runner, case, id=f"{runner}-{'-'.join(map(str, case))}", marks=marks)
        for case in cases
        for runner, marks in RUNNERS.items()
        if runner != "checked memory" or case in checked
    ]
    return pytest.mark.parametrize(("run", "case"), parameters, indirect=["run"])


def same(got, want):
    """Asserts equal values, shapes and dtypes; NaN equals NaN."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got.astype(np.float64), want.astype(np.float64))


# Look-up tables.

# (M, bits, D, D', queries a row, dtype of queries, of codebooks, of tables)
TABLES = [
    (1, 8, 256, 256, 3, "float32", "float32", "float32"),
    (32, 1, 2, 2, 2, "bfloat16", "bfloat16", "float32"),
    (2, 6, 64, 65, 1, "float16", "float32", "bfloat16"),
    (3, 5, 5, 6, 3, "float32", "bfloat16", "float16"),
    (16, 4, 2, 2, 1, "bfloat16", "float16", "bfloat16"),
    (5, 7, 33, 33, 3, "float16", "float16", "float32"),
    (8, 3, 1, 1, 2, "float32", "float32", "float32"),
    (4, 2, 13, 14, 5, "float32", "float32", "float16"),
]


def draw_table_inputs(case, integers):
    """query [2, 1, queries, H] and codebooks [2, 1, M, C, D']."""
    M, bits, D, augmented, queries, query_dtype, codebook_dtype, _ = case
    rng = np.random.default_rng(TABLES.index(case))

    def draw(*shape):
        if integers is None:
            return rng.standard_normal(shape)
        return rng.integers(-integers, integers + 1, shape).astype(np.float32)

    query = draw(2, 1, queries, M * D).astype(jnp.dtype(query_dtype))
    codebooks = draw(2, 1, M, 2**bits, augmented).astype(jnp.dtype(codebook_dtype))
    if augmented > D:
        codebooks[..., D:] = np.nan  # which is not to be read
    return query, codebooks


def tables_step(B, T, N, K, M, C, table_dtype=np.float32):
    config = IndexerConfig(num_subspaces=M, num_bits=C.bit_length() - 1, table_dtype=table_dtype)
    return Step(config=config, B=B, K=K, S=1, T=T, N=N)


def lookup_tables(query, codebooks, *, table_dtype):
    (B, T, N, _), (_, K, M, C, _) = query.shape, codebooks.shape
    step = tables_step(B, T, N, K, M, C, table_dtype)
    lengths = Lengths(jnp.zeros(B, jnp.int32), None)
    index = PQIndex(codebooks, jnp.zeros((B, K, M, 1), jnp.uint8), lengths.lengths)
    return pipeline.launched(step, pipeline.query_launches(step, query, index, lengths))["tables"]


def same_tables(got, table, kv_heads):
    """`table` is [B, T, N, M, C]."""
    with jax.default_device(CPU):
        B, T, N, M, C = table.shape
        want = tables_from(jnp.asarray(table), tables_step(B, T, N, kv_heads, M, C, table.dtype))
    for one, other in zip(got, want, strict=True):
        same(one, other)


@each(TABLES, checked=TABLES[2:5])
def test_tables_of_integers_are_exact(case, run):
    query, codebooks = draw_table_inputs(case, integers=3)
    dtype = jnp.dtype(case[-1])
    got = run(lookup_tables, query, codebooks, table_dtype=dtype)
    same_tables(got, oracle.exact_table(query, codebooks).astype(np.float32).astype(dtype), 1)


@each([case for case in TABLES if case[-1] == "float32"], checked=())
def test_tables_of_real_numbers_are_as_exact_as_float32_sums(case, run):
    """n additions in any order are off by at most n * 2**-24 of the sum of magnitudes."""
    query, codebooks = draw_table_inputs(case, integers=None)
    got = run(lookup_tables, query, codebooks, table_dtype=np.dtype(np.float32))
    exact = oracle.exact_table(query, codebooks)
    table = got.by_query.reshape(exact.shape)
    same_tables(got, table, 1)
    magnitude = oracle.exact_table(np.abs(query), np.abs(codebooks))
    dimensions = query.shape[-1] // codebooks.shape[2]
    assert (np.abs(table - exact) <= dimensions * 2.0**-24 * magnitude).all()


def test_tables_of_infinities_and_nan(run):
    query, codebooks = draw_table_inputs(TABLES[3], integers=2)
    D = TABLES[3][2]
    query[0, 0, 1], query[1, 0, 2, 3] = np.nan, np.inf
    query[1, 0, 0, D + 1] = -np.inf
    codebooks[0, 0, 2, 4], codebooks[1, 0, 0, ::3, 0] = np.nan, np.inf
    got = run(lookup_tables, query, codebooks, table_dtype=np.dtype(np.float16))
    same_tables(got, oracle.exact_table(query, codebooks).astype(np.float16), 1)
    assert np.isnan(got.by_query).any()
    assert np.isinf(got.by_query).any()


@pytest.mark.parametrize("queries", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_queries_lie_side_by_side(queries, dtype):
    rng = np.random.default_rng(0)
    table = rng.integers(-9, 9, (2, 1, queries, 3, 4)).astype(jnp.dtype(dtype))
    step = tables_step(2, 1, queries, 1, 3, 4, table.dtype)
    by_lane, by_query = jax.tree.map(np.asarray, tables_from(jnp.asarray(table), step))
    same(by_query, table.reshape(2, queries, 12))
    lanes = by_lane.shape[-1]
    assert lanes * table.dtype.itemsize <= 16
    for row, group, lane in np.ndindex(2, by_lane.shape[1], lanes):
        query = min(group * lanes + lane, queries - 1)
        same(by_lane[row, group, :, lane], by_query[row, query])


def test_tables_are_grouped_as_heads_share_codebooks(run):
    """[B, T, N, H], with T and groups that are no powers of two."""
    rng = np.random.default_rng(0)
    query = rng.integers(-3, 4, (2, 3, 6, 15)).astype(np.float32)
    codebooks = rng.integers(-3, 4, (2, 2, 3, 8, 6)).astype(np.float32)
    got = run(lookup_tables, query, codebooks, table_dtype=np.dtype(np.float32))
    same_tables(got, oracle.exact_table(query, codebooks).astype(np.float32), 2)


# Scores.

FINFO = np.finfo(np.float32)
FLOATS = st.floats(width=32, allow_subnormal=False) | st.sampled_from(
    [float(x) for x in (0.0, -0.0, np.inf, np.nan, FINFO.tiny, 2 * FINFO.tiny, FINFO.max, 1.0)]
).flatmap(lambda x: st.sampled_from([x, -x]))


@hypothesis.given(numbers=hnp.arrays(np.float32, 24, elements=FLOATS))
def test_rankable_numbers_have_the_order_and_the_ties_of_the_scores(numbers):
    order = np.asarray(reference.ordered(jnp.asarray(numbers)))
    ranked = np.asarray(scores.rankable(jnp.asarray(order)))
    assert not np.isnan(ranked).any()
    np.testing.assert_array_equal(np.isneginf(ranked), np.isnan(numbers))
    np.testing.assert_array_equal(comparisons(ranked), comparisons(order))


def comparisons(x):
    """-1, 0 or 1 for every pair."""
    return (x[:, None] > x).astype(int) - (x[:, None] < x)


def _one_run_of_winners(rng, codes, last):
    """Codes `last` side by side, some elsewhere than at a block's edge, and nowhere else."""
    capacity = codes.shape[-1]
    start, size = rng.integers(0, capacity, 2)
    position = np.arange(capacity)
    run = (position >= start) & (position < start + size)
    return np.where(run, last, codes % max(last, 1)).astype(np.uint8)


PLACEMENTS = {
    "anywhere": lambda rng, codes, last: codes,
    "ascending": lambda rng, codes, last: np.sort(codes, axis=-1),
    "descending": lambda rng, codes, last: np.sort(codes, axis=-1)[..., ::-1],
    "one run": _one_run_of_winners,
    "the last is best": lambda rng, codes, last: np.where(
        np.arange(codes.shape[-1]) == codes.shape[-1] - 1, last, 0
    ),
}

# (M, bits, K, G, T, S, table_dtype, dtype of weights), then heavy, sink, window, init_offset.
# Groups are no powers of two, capacities lie around and off the block sizes.
SELECTIONS = {
    "seed's codes": ((2, 6, 2, 1, 1, 500, "float32", "float32"), (24, 3, 6, None)),
    "one subspace": ((1, 8, 1, 3, 1, 513, "bfloat16", "bfloat16"), (40, 3, 5, 20)),
    "two query tokens, no window": ((4, 3, 1, 5, 2, 257, "float16", "float16"), (100, 8, 0, 2)),
    "three query tokens, no budget": ((5, 5, 3, 1, 3, 191, "float32", None), (0, 0, 1, 30)),
    "budget of one": ((2, 7, 1, 1, 1, 300, "float32", None), (1, 1, 1, 0)),
    "groups of two sizes": ((2, 5, 1, 2, 1, 600, "float32", "float32"), (6, 2, 3, None)),
    "fewer candidates than budget": ((6, 2, 1, 3, 1, 256, "float32", "bfloat16"), (50, 2, 60, 1)),
    "capacity of one token": ((3, 1, 1, 1, 1, 1, "float32", "float32"), (0, 0, 0, None)),
    "more than a block": ((8, 4, 1, 2, 1, 2500, "bfloat16", "float32"), (300, 0, 17, None)),
    "large budget": ((32, 6, 1, 2, 1, 1400, "float16", None), (1100, 1, 0, 0)),
}
WITH_COUNTS = (
    "seed's codes",
    "groups of two sizes",
    "two query tokens, no window",
    "three query tokens, no budget",
)
WITH_TUNED_BLOCKS = ("capacity of one token", "more than a block", "large budget")
PIPELINES = [
    *(("threshold", name) for name in SELECTIONS if name != "one subspace"),
    ("top_k", "one subspace"),
    ("top_k", "two query tokens, no window"),
    ("top_k", "three query tokens, no budget"),
    ("top_k", "fewer candidates than budget"),
    ("top_k", "more than a block"),
]
CHECKED_PIPELINES = [
    ("threshold", "seed's codes"),
    ("threshold", "three query tokens, no budget"),
    ("threshold", "groups of two sizes"),
    ("threshold", "more than a block"),
    ("top_k", "fewer candidates than budget"),
    ("top_k", "more than a block"),
]


def draw_selection(name, rows):
    """Tables [B,T,N,M,C], codes with garbage in their high bits, lengths, and the config."""
    shape, sizes = SELECTIONS[name]
    (M, bits, K, G, T, S, table_dtype, _), (heavy, sink, window, init_offset) = shape, sizes
    rng = np.random.default_rng(M)
    config = IndexerConfig(
        num_subspaces=M,
        num_bits=bits,
        heavy_size=heavy,
        sink_size=sink,
        window_size=window,
        init_offset=init_offset,
        table_dtype=table_dtype,
    )
    C, N = 2**bits, K * G
    tables = np.empty((rows, T, N, M, C), np.float32)
    codes = rng.integers(0, C, (rows, K, M, S), np.uint8)
    edges = boundary_lengths(config, S, T)
    lengths = np.full(rows, S, np.int32)
    for b in range(rows):
        kind = list(ADVERSARIES.values())[(b + 7 * M) % len(ADVERSARIES)]
        place = list(PLACEMENTS.values())[b % len(PLACEMENTS)]
        for t, n, m in np.ndindex(T, N, M):
            tables[b, t, n, m] = kind(rng, C)
        if b % len(PLACEMENTS) > 2:
            tables[b] = np.arange(C) == C - 1
        codes[b] = place(rng, codes[b], C - 1)
        if b % 2:
            lengths[b] = edges[(M + b // 2 * 7) % len(edges)]
    codes |= rng.integers(0, 256, codes.shape, np.uint8) & np.uint8(256 - C)
    return oracle.rounded(tables, table_dtype), codes, lengths, config


def in_table_dtype(tables, config):
    return tables.astype(config.table_dtype)


def small_blocks(run):
    """On a GPU as tuned."""
    return H100 if run.name == "triton" else SMALL_BLOCKS


def selection(table, codes, lengths, counts=None, *, selector, **options):
    """What follows a table, by a selector."""
    step = selecting_step(table, codes, **options)
    rows, weights = Lengths(lengths, counts), None
    if step.weights_dtype is not None:
        made = pipeline.launched(step, {"weights": weights_launch(step, rows)})
        weights = made["weights"].weights
    index = PQIndex(jnp.zeros(()), codes, lengths)
    found = pipeline.from_tables(step, tables_from(table, step), index, rows, weights, selector)
    return found.indices, found.counts, found.weights


def selecting_step(table, codes, **options):
    (B, T, N, _, _), (_, K, _, S) = table.shape, codes.shape
    return Step(B=B, K=K, S=S, T=T, N=N, **options)


@pytest.mark.parametrize("some_taken", [False, True], ids=["all taken", "some taken"])
@each(PIPELINES, checked=CHECKED_PIPELINES)
def test_selections_from_adversarial_tables(case, run, some_taken):
    """Indices, counts and weights of all rows, from given tables on: bit for bit."""
    selector, name = case
    if some_taken and name not in WITH_COUNTS:
        pytest.skip("two shapes with one query token and two with several are enough")
    tables, codes, lengths, config = draw_selection(name, run.rows)
    dtype = SELECTIONS[name][0][-1]
    dtype = None if dtype is None else jnp.dtype(dtype)
    # Of the step's tokens, less than none and more than all included.
    num_tokens = SELECTIONS[name][0][4]
    counts = (np.arange(len(lengths), dtype=np.int32) % (num_tokens + 3) - 1,) * some_taken
    indices, num_listed, weights = run(
        selection,
        in_table_dtype(tables, config),
        codes,
        lengths,
        *counts,
        config=config,
        weights_dtype=dtype,
        selector=selector,
        tuning=H100 if name in WITH_TUNED_BLOCKS else small_blocks(run),
    )
    want = oracle.select(tables, codes, lengths, config, *counts)
    want_indices, want_counts, want_weights = want
    same(num_listed, want_counts)
    same(indices, want_indices)
    if dtype is None:
        assert weights is None
    else:
        same(weights, want_weights.astype(dtype))
    for name, writes in run.writes.items():
        assert writes.max() <= 1, f"{name}: written {writes.max()} times"


def grouped(x, kv_heads):
    """[B, T, N, ...] as kernels take it: [B * K, T * G, ...]."""
    B, T, N, *rest = x.shape
    x = x.reshape(B, T, kv_heads, N // kv_heads, *rest).swapaxes(1, 2)
    return x.reshape(B * kv_heads, -1, *rest)


def rankable_scores(table, codes, lengths, **options):
    step = selecting_step(table, codes, **options)
    of_rows = codes.reshape(step.R, *codes.shape[2:])
    return scores.rankable_scores(step, tables_from(table, step), of_rows, Lengths(lengths, None))


def test_scores_have_the_order_and_the_ties_of_the_reference(run):
    tables, codes, lengths, config = draw_selection("three query tokens, no budget", run.rows)
    (B, T, N, _, _), K, S = tables.shape, codes.shape[1], codes.shape[-1]
    table = in_table_dtype(tables, config)
    got = run(rankable_scores, table, codes, lengths, config=config, tuning=small_blocks(run))
    with jax.default_device(CPU):
        exact = reference.adc_scores(jnp.asarray(table), jnp.asarray(codes))
        order = grouped(np.asarray(reference.ordered(exact)), K)
        visible = reference.visible_tokens(jnp.asarray(lengths), None, S, T)
        long = visible > config.short_context(T)
        candidate = np.asarray(reference.candidates(visible, S, config) & long[..., None])
    candidate = grouped(np.broadcast_to(candidate[:, :, None], (B, T, N, S)), K)
    assert got.dtype == np.float32
    assert np.isneginf(got[~candidate]).all()
    assert candidate.any()
    for row in np.ndindex(got.shape[:2]):
        ranks = [np.unique(x[row][candidate[row]], return_inverse=True)[1] for x in (got, order)]
        np.testing.assert_array_equal(*ranks)


# Sparse index.


@pytest.mark.parametrize("given", ["right", "wrong"])
@pytest.mark.parametrize("T", [1, 3])
def test_the_sparse_index_follows_from_scores_and_cut(T, given, run):
    """Any scores and their cut, which is the last of several numbers, the others garbage.

    Cuts that are too low, too high or not even numbers are found out.
    """
    config = IndexerConfig(num_bits=3, heavy_size=37, sink_size=4, window_size=9, init_offset=2)
    S, kv_heads, group = 271, 2, 1
    rng = np.random.default_rng(T)
    edges = boundary_lengths(config, S, T)[:: 60 // run.rows + 1]
    lengths = np.array([*edges, S, S - 1], np.int32)
    rows = len(lengths) * kv_heads
    ranked = rng.integers(-20, 20, (rows, T * group, S)).astype(np.float32)
    ranked[::3] = rng.choice([-np.inf, 0.0, np.inf], ranked[::3].shape)
    visible = np.repeat(oracle.visible(lengths, S, T), kv_heads, axis=0)  # [rows, T]
    cut = np.full((rows, T * group, 3), np.nan, np.float32)
    want = np.full((rows, T * group, config.max_selected(T)), -1, np.int32)
    counts, weights = np.zeros((rows, T * group), np.int32), np.zeros(ranked.shape, np.float32)
    for row, q in np.ndindex(rows, T * group):
        V = visible[row, q]
        first, last = config.first_candidate, max(V - config.window_size, 0)
        best = np.sort(ranked[row, q, first:last])[::-1]
        few = len(best) < config.heavy_size
        cut[row, q, -1] = -np.inf if few else best[config.heavy_size - 1]
        chosen = oracle.tokens(ranked[row, q], V, T, config)
        want[row, q, : len(chosen)] = chosen
        counts[row, q] = len(chosen)
        weights[row, q, chosen] = 1
        # Not to be looked at: what is no candidate.
        ranked[row, q, :first] = ranked[row, q, last:] = np.nan
    if given == "wrong":
        cut[..., -1] = rng.choice([-np.inf, -3, -0.5, 3, 30, np.inf, np.nan], cut.shape[:2])
    step = Step(
        config=config, B=len(lengths), K=kv_heads, S=S, T=T, N=kv_heads * group,
        weights_dtype=np.dtype(np.float16), tuning=small_blocks(run),
    )  # fmt: skip

    def lists(ranked, cut, lengths):
        rows = Lengths(lengths, None)
        begun = pipeline.launched(step, {"weights": weights_launch(step, rows)})["weights"]
        return sparse_index.sparse_index(step, ranked, cut, rows, begun.weights)

    got = run(lists, ranked, cut, lengths)
    for found, wanted in zip(got, (want, counts, weights.astype(np.float16)), strict=True):
        same(found, wanted)


# Append.

# (M, bits, D, metric, layout of keys, dtype of keys, of codebooks, new tokens)
APPENDS = [
    (3, 4, 5, "euclidean", "BSKH", "float32", "float32", 1),
    (2, 6, 64, "ip", "BKSH", "bfloat16", "float32", 3),
    (1, 8, 100, "euclidean", "BKSH", "float16", "bfloat16", 2),
    (32, 1, 2, "ip", "BSKH", "float32", "float16", 8),
    (2, 2, 7, "euclidean", "BSKH", "bfloat16", "bfloat16", 70),
]
# Rows: none, some, all of the new tokens, up to the last position.
NONE, SOME, ALL = 0.0, 0.5, 1.0


@each(APPENDS, checked=[APPENDS[i] for i in (1, 2, 4)])
def test_appended_codes_equal_the_oracle(case, run):
    """Integers make distances exact and ties common; with "ip" there is a root, so near ties.

    Centroids come in pairs of equal ones, of which the first must be taken.
    """
    M, bits, D, metric, layout, dtype, codebook_dtype, num_new = case
    rng = np.random.default_rng(APPENDS.index(case))
    S, K = num_new + 5, 2 if num_new < 10 else 1
    shares = np.array([ALL, SOME, NONE, ALL])
    taken = (shares * num_new).astype(np.int32)
    start = np.array([0, 3, S - 1, S - num_new], np.int32)
    B = len(shares)

    def draw(*shape):
        return rng.integers(-2, 3, shape).astype(np.float32)

    key = draw(B, num_new, K, M * D)
    key[0, 0, 0, 0], key[3, -1, -1, -1] = np.nan, -np.inf
    codebooks = draw(B, K, M, 2**bits, D + (metric == "ip"))
    twice = min(2, 2 ** (bits - 1))
    if twice == 2:
        codebooks[:, :, :, 1::2] = codebooks[:, :, :, ::2]
        codebooks[0, -1, -1, :2] = np.nan  # which is farther than all others
    codes = rng.integers(0, 256, (B, K, M, S), np.uint8)
    phi = np.full((B, K, M), 4.0 * D, np.float32) if metric == "ip" else None
    farther = np.where(np.isnan(codebooks), 1e6, codebooks)
    want, margin = oracle.encode(key, farther[:, :, :, ::twice], phi)
    got = run(
        append_codes,
        (key if layout == "BSKH" else key.swapaxes(1, 2)).astype(jnp.dtype(dtype)),
        codebooks.astype(jnp.dtype(codebook_dtype)),
        codes,
        phi,
        start,
        taken,
        kv_layout=layout,
    )
    clear = margin > 1e-3 if metric == "ip" else np.ones(margin.shape, bool)
    assert clear.mean() > 0.8
    written = np.zeros(codes.shape, np.int32)
    for b, (first, count) in enumerate(zip(start, taken, strict=True)):
        at = slice(first, first + count)
        written[b, ..., at] = 1
        wanted = twice * want[b, ..., :count]
        found = np.where(clear[b, ..., :count], got[b, ..., at], wanted)
        np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(got[written == 0], codes[written == 0])
    for name, writes in run.writes.items():
        want = written if name.endswith("codes") else np.ones(writes.shape)
        np.testing.assert_array_equal(writes.reshape(want.shape), want)


@pytest.mark.parametrize("tokens", [1, 9])
def test_codes_do_not_depend_on_how_many_come_at_once(tokens):
    """Centroids in pairs one float apart: any other order of a sum shows."""
    rng = np.random.default_rng(0)
    M, D, C, S = 2, 40, 256, 18
    key = jnp.asarray(rng.standard_normal((1, S, 1, M * D)), jnp.float32)
    codebooks = rng.standard_normal((1, 1, M, C, D)).astype(np.float32)
    codebooks[..., 1::2, :] = np.nextafter(codebooks[..., ::2, :], np.float32(9))
    codebooks = jnp.asarray(codebooks)

    @functools.partial(jax.jit, compiler_options=UNOPTIMIZED)
    def encode(key, codes, start):
        taken = jnp.full(1, key.shape[1], jnp.int32)
        return append_codes(key, codebooks, codes, None, start, taken, kv_layout="BSKH")

    with jax.default_device(CPU), backend.interpreted():
        codes = jnp.zeros((1, 1, M, S), jnp.uint8)
        whole = encode(key, codes, jnp.zeros(1, jnp.int32))
        for first in range(0, S, tokens):
            if first + tokens <= S:
                codes = encode(key[:, first : first + tokens], codes, jnp.full(1, first, jnp.int32))
        count = S // tokens * tokens
        np.testing.assert_array_equal(codes[..., :count], whole[..., :count])


# What the tests above rest on: that checked memory and poison see what is wrong.


class Twenty(NamedTuple):
    """Some numbers."""

    x: Any


class Doubled(NamedTuple):
    """Twice as much."""

    y: Any


def eight(program, inputs, outputs):
    """Doubles 20 numbers in blocks of 8."""
    at = program * 8 + jnp.arange(8, dtype=jnp.int32)
    exists = at < 20
    backend.store(outputs.y.at[at], 2 * backend.load(inputs.x.at[at], mask=exists), mask=exists)


def store_past_the_end(program, inputs, outputs):
    at = program * 8 + jnp.arange(8, dtype=jnp.int32)
    outputs.y[at] = backend.load(inputs.x.at[at], mask=at < 20, other=0)


def load_past_the_end(program, inputs, outputs):
    at = program * 8 + jnp.arange(8, dtype=jnp.int32)
    backend.store(outputs.y.at[at], inputs.x[at], mask=at < 20)


def access_below_zero(program, inputs, outputs):
    at = program * 8 + jnp.arange(8, dtype=jnp.int32) - 1
    backend.store(outputs.y.at[at], backend.load(inputs.x.at[at], mask=at < 20), mask=at < 20)


def first_element_by_all(program, inputs, outputs):
    eight(program, inputs, outputs)
    backend.barrier()
    outputs.y[0] = inputs.x[0]


def sum_of_what_others_wrote(program, inputs, outputs):
    eight(program, inputs, outputs)
    backend.barrier()
    outputs.y[program * 8] = outputs.y[0] + inputs.x[0]


def read_before_it_is_written(program, inputs, outputs):
    at = program * 8 + jnp.arange(8, dtype=jnp.int32)
    backend.store(outputs.y.at[at], backend.load(outputs.y.at[at], mask=at < 20), mask=at < 20)


def read_before_a_barrier(program, inputs, outputs):
    eight(program, inputs, outputs)
    at = program * 8 + 1
    outputs.y[at] = outputs.y[at] + inputs.x[0]


def overwritten_before_a_barrier(program, inputs, outputs):
    eight(program, inputs, outputs)
    backend.barrier()
    at = program * 8 + jnp.arange(8, dtype=jnp.int32)
    value = backend.load(outputs.y.at[at], mask=at < 20)
    backend.store(outputs.y.at[at], jnp.zeros_like(value), mask=at < 20)


def written_twice_before_a_barrier(program, inputs, outputs):
    eight(program, inputs, outputs)
    outputs.y[program * 8] = jnp.float32(0)


def added_to_before_a_barrier(program, inputs, outputs):
    eight(program, inputs, outputs)
    backend.add(outputs.y, (program * 8 + jnp.zeros(2, jnp.int32),), jnp.ones(2))


def one_store_to_one_place(program, inputs, outputs):
    eight(program, inputs, outputs)
    backend.barrier()
    at = jnp.zeros(8, jnp.int32) + program
    outputs.y[at] = inputs.x[at]


def store_to_the_input(program, inputs, outputs):
    eight(program, inputs, outputs)
    inputs.x[program] = jnp.float32(1)


def launch(kernel):
    inputs = Twenty(jnp.arange(20, dtype=jnp.float32))
    outputs = Doubled(jax.ShapeDtypeStruct((20,), np.float32))
    return backend.launch(backend.Launch(kernel, inputs, outputs, programs=3), num_warps=1).y


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (store_past_the_end, r"y, program 2: write at \[20 21 22\] of axis 0, size 20"),
        (load_past_the_end, r"x, program 2: read at \[20 21 22\] of axis 0, size 20"),
        (access_below_zero, r"x, program 0: read at \[-1\] of axis 0, size 20"),
        (first_element_by_all, "write of an element that another program wrote"),
        (sum_of_what_others_wrote, "an element that another program (wrote|read)|has written"),
        (read_before_it_is_written, "read of an element that nothing has written"),
        (read_before_a_barrier, "read of its own write, no barrier between"),
        (overwritten_before_a_barrier, "write over its own read, no barrier between"),
        (written_twice_before_a_barrier, "two writes, no barrier between"),
        (added_to_before_a_barrier, "read of its own write, no barrier between"),
        (one_store_to_one_place, "one store writes an element twice"),
        (store_to_the_input, "x, program .: write of an input"),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_checked_memory_sees(kernel, message, seed):
    with checked(seed) as launches:
        good = launch(eight)
        same(good, 2 * np.arange(20, dtype=np.float32))
        ((name, writes),) = launches[0].items()
        assert name == "eight: y"
        assert (writes == 1).all()
        with pytest.raises(AssertionError, match=message):
            launch(kernel)


def rows_of_eight(program, inputs, outputs, *, rows, columns):
    for row in range(rows):
        at = jnp.arange(8, dtype=jnp.int32)
        backend.store(outputs.y.at[row, at], inputs.x[row % 2, at], mask=at < columns)


@pytest.mark.parametrize("interpret", [True, pytest.param(False, marks=pytest.mark.gpu)])
def test_poison_shows_what_was_not_written_and_what_should_not_be(interpret):
    def outputs(**sizes):
        kernel = functools.partial(rows_of_eight, **sizes)
        made = Doubled(jax.ShapeDtypeStruct((2, 8), np.float32))
        what = backend.Launch(kernel, Twenty(jnp.ones((2, 8), jnp.float32)), made, programs=1)
        with backend.interpreted() if interpret else contextlib.nullcontext():
            with poisoned() as canaries:
                out = backend.launch(what, num_warps=1).y
            return np.asarray(out), canaries

    out, canaries = outputs(rows=2, columns=8)
    np.testing.assert_array_equal(out, 1)
    check_canaries(canaries)
    out, canaries = outputs(rows=2, columns=7)
    assert (out[:, 7] != 1).all()
    check_canaries(canaries)
    out, canaries = outputs(rows=3, columns=8)
    with pytest.raises(AssertionError, match="wrote past its end"):
        check_canaries(canaries)
