"""Every kernel alone and in sequence, against the oracle and the reference.

Each test runs three times: in Pallas's interpreter, on checked memory, and on a GPU where there is
one. Outputs are poisoned beforehand, so that equality also says that all of them was written.
"""

import contextlib
import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from jax_indexer import IndexerConfig, reference
from jax_indexer.kernels import (
    backend,
    pipeline,
    scores,
    sparse_index,
    threshold,
)
from jax_indexer.kernels.lookup_table import Tables, tables_from, tables_launch
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
                return function(*arrays, interpret=interpret, **static), canaries

        options = {"compiler_options": UNOPTIMIZED} if interpret else {}
        with jax.default_device(CPU) if interpret else contextlib.nullcontext():
            outputs, canaries = jax.jit(on_poison, **options)(*jax.tree.map(jnp.asarray, arrays))
        check_canaries(canaries)
        return jax.tree.map(np.asarray, outputs)


def append_codes(key_new, codebooks, codes, phi, start, taken, **options):
    """The codes after new tokens were appended."""
    inputs = key_new, codebooks, codes, phi, None, start, taken
    return pipeline.append_tokens(*inputs, IndexerConfig(), **options).codes


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
    M, bits, D, augmented, queries, query_dtype, codebook_dtype, _ = case
    rng = np.random.default_rng(TABLES.index(case))

    def draw(*shape):
        if integers is None:
            return rng.standard_normal(shape)
        return rng.integers(-integers, integers + 1, shape).astype(np.float32)

    query = draw(2, queries, M, D).astype(jnp.dtype(query_dtype))
    codebooks = draw(2, M, 2**bits, augmented).astype(jnp.dtype(codebook_dtype))
    if augmented > D:
        codebooks[..., D:] = np.nan  # which is not to be read
    return query, codebooks


def lookup_tables(query, codebooks, *, table_dtype, **options):
    launch = tables_launch(query, codebooks, table_dtype)
    (tables,) = backend.launch_together([launch], num_warps=4, **options)
    return Tables(*tables)


def exact_tables(query, codebooks):
    """float64 [R, Q, M, C] of query [R, Q, M, D]."""
    rows, queries, M, D = query.shape
    table = oracle.exact_table(query.reshape(rows, 1, queries, M * D), codebooks[:, None])
    return table.reshape(rows, queries, M, -1)


def same_tables(got, by_query):
    with jax.default_device(CPU):
        want = tables_from(jnp.asarray(by_query.reshape(*by_query.shape[:2], -1)))
    for one, other in zip(got, want, strict=True):
        same(one, other)


@each(TABLES, checked=TABLES[2:5])
def test_tables_of_integers_are_exact(case, run):
    query, codebooks = draw_table_inputs(case, integers=3)
    dtype = jnp.dtype(case[-1])
    got = run(lookup_tables, query, codebooks, table_dtype=dtype)
    same_tables(got, exact_tables(query, codebooks).astype(np.float32).astype(dtype))


@each([case for case in TABLES if case[-1] == "float32"], checked=())
def test_tables_of_real_numbers_are_as_exact_as_float32_sums(case, run):
    """n additions in any order are off by at most n * 2**-24 of the sum of magnitudes."""
    query, codebooks = draw_table_inputs(case, integers=None)
    got = run(lookup_tables, query, codebooks, table_dtype=np.dtype(np.float32))
    same_tables(got, got.by_query)
    exact = exact_tables(query, codebooks)
    magnitude = exact_tables(np.abs(query), np.abs(codebooks))
    error = np.abs(got.by_query.reshape(exact.shape) - exact)
    assert (error <= query.shape[-1] * 2.0**-24 * magnitude).all()


def test_tables_of_infinities_and_nan(run):
    query, codebooks = draw_table_inputs(TABLES[3], integers=2)
    query[0, 1], query[1, 2, 0, 3], query[1, 0, 1, 1] = np.nan, np.inf, -np.inf
    codebooks[0, 2, 4], codebooks[1, 0, ::3, 0] = np.nan, np.inf
    got = run(lookup_tables, query, codebooks, table_dtype=np.dtype(np.float16))
    same_tables(got, exact_tables(query, codebooks).astype(np.float16))
    assert np.isnan(got.by_query).any()
    assert np.isinf(got.by_query).any()


@pytest.mark.parametrize("queries", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_queries_lie_side_by_side(queries, dtype):
    table = np.random.default_rng(0).integers(-9, 9, (2, queries, 12)).astype(jnp.dtype(dtype))
    by_lane, by_query = jax.tree.map(np.asarray, tables_from(jnp.asarray(table)))
    same(by_query, table)
    lanes = by_lane.shape[-1]
    assert lanes * table.dtype.itemsize <= 16
    for row, group, lane in np.ndindex(2, by_lane.shape[1], lanes):
        query = min(group * lanes + lane, queries - 1)
        same(by_lane[row, group, :, lane], table[row, query])


def test_tables_are_grouped_as_heads_share_codebooks(run):
    """pipeline.tables_of: [B, T, N, H], with T and groups that are no powers of two."""
    rng = np.random.default_rng(0)
    query = rng.integers(-3, 4, (2, 3, 6, 15)).astype(np.float32)
    codebooks = rng.integers(-3, 4, (2, 2, 3, 8, 6)).astype(np.float32)
    got = run(pipeline.tables_of, query, codebooks, table_dtype=np.dtype(np.float32))
    same_tables(got, grouped(oracle.exact_table(query, codebooks).astype(np.float32), 2))


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


@pytest.fixture
def small_blocks(run, monkeypatch):
    """Many blocks for few tokens: tuned ones would hold all that a CPU can afford."""
    if run.name == "triton":
        return
    # Few programs, so that each has several blocks.
    monkeypatch.setattr(scores, "score_tuning", lambda num_subspaces: (16, 8, 1, 6))
    monkeypatch.setattr(sparse_index, "INDEX_BLOCK", 64)
    monkeypatch.setattr(threshold, "select_warps", lambda *_: 1)
    monkeypatch.setattr(threshold, "GROUP_RUN", 2)
    monkeypatch.setattr(threshold, "LARGEST_GROUP", 8)
    monkeypatch.setattr(threshold, "MANY_GROUPS", 64)


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


@each(PIPELINES, checked=CHECKED_PIPELINES)
def test_selections_from_adversarial_tables(case, run, request):
    """Indices, counts and weights of all rows, from given tables on: bit for bit."""
    selector, name = case
    if name not in WITH_TUNED_BLOCKS:
        request.getfixturevalue("small_blocks")
    tables, codes, lengths, config = draw_selection(name, run.rows)
    dtype = SELECTIONS[name][0][-1]
    dtype = None if dtype is None else jnp.dtype(dtype)
    indices, counts, weights = run(
        pipeline.select_from_table,
        in_table_dtype(tables, config),
        codes,
        lengths,
        config=config,
        weights_dtype=dtype,
        selector=selector,
    )
    want_indices, want_counts, want_weights = oracle.select(tables, codes, lengths, config)
    same(counts, want_counts)
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


def test_scores_have_the_order_and_the_ties_of_the_reference(run, small_blocks):
    tables, codes, lengths, config = draw_selection("three query tokens, no budget", run.rows)
    (B, T, N, M, C), K, S = tables.shape, codes.shape[1], codes.shape[-1]
    table = in_table_dtype(tables, config)
    got = run(
        scores.rankable_scores,
        tables_from(jnp.asarray(grouped(table, K).reshape(B * K, -1, M * C))),
        codes.reshape(B * K, M, S),
        lengths,
        config=config,
        num_queries=T * N // K,
        num_query_tokens=T,
    )
    with jax.default_device(CPU):
        exact = reference.adc_scores(jnp.asarray(table), jnp.asarray(codes))
        order = grouped(np.asarray(reference.ordered(exact)), K)
        visible = reference.visible_tokens(jnp.asarray(lengths), S, T)
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
def test_the_sparse_index_follows_from_scores_and_cut(T, given, run, small_blocks):
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
    got = run(
        sparse_index.sparse_index,
        ranked,
        cut,
        lengths,
        config=config,
        num_query_tokens=T,
        weights_dtype=np.dtype(np.float16),
    )
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
    for writes in run.writes.values():
        np.testing.assert_array_equal(writes.reshape(codes.shape), written)


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
        return append_codes(
            key, codebooks, codes, None, start, taken, kv_layout="BSKH", interpret=True
        )

    with jax.default_device(CPU):
        codes = jnp.zeros((1, 1, M, S), jnp.uint8)
        whole = encode(key, codes, jnp.zeros(1, jnp.int32))
        for first in range(0, S, tokens):
            if first + tokens <= S:
                codes = encode(key[:, first : first + tokens], codes, jnp.full(1, first, jnp.int32))
        count = S // tokens * tokens
        np.testing.assert_array_equal(codes[..., :count], whole[..., :count])


# What the tests above rest on: that checked memory and poison see what is wrong.


def eight(in_ref, out_ref):
    """Doubles 20 numbers in blocks of 8."""
    at = pl.program_id(0) * 8 + jnp.arange(8, dtype=jnp.int32)
    exists = at < 20
    backend.store(out_ref.at[at], 2 * backend.load(in_ref.at[at], mask=exists), mask=exists)


def store_past_the_end(in_ref, out_ref):
    at = pl.program_id(0) * 8 + jnp.arange(8, dtype=jnp.int32)
    out_ref[at] = backend.load(in_ref.at[at], mask=at < 20, other=0)


def load_past_the_end(in_ref, out_ref):
    at = pl.program_id(0) * 8 + jnp.arange(8, dtype=jnp.int32)
    backend.store(out_ref.at[at], in_ref[at], mask=at < 20)


def access_below_zero(in_ref, out_ref):
    at = pl.program_id(0) * 8 + jnp.arange(8, dtype=jnp.int32) - 1
    backend.store(out_ref.at[at], backend.load(in_ref.at[at], mask=at < 20), mask=at < 20)


def first_element_by_all(in_ref, out_ref):
    eight(in_ref, out_ref)
    backend.barrier(False)
    out_ref[0] = in_ref[0]


def sum_of_what_others_wrote(in_ref, out_ref):
    eight(in_ref, out_ref)
    backend.barrier(False)
    own = pl.program_id(0)
    out_ref[own * 8] = out_ref[0] + in_ref[0]


def read_before_it_is_written(in_ref, out_ref):
    at = pl.program_id(0) * 8 + jnp.arange(8, dtype=jnp.int32)
    backend.store(out_ref.at[at], backend.load(out_ref.at[at], mask=at < 20), mask=at < 20)
    del in_ref


def read_before_a_barrier(in_ref, out_ref):
    eight(in_ref, out_ref)
    at = pl.program_id(0) * 8 + 1
    out_ref[at] = out_ref[at] + in_ref[0]


def overwritten_before_a_barrier(in_ref, out_ref):
    eight(in_ref, out_ref)
    backend.barrier(False)
    at = pl.program_id(0) * 8 + jnp.arange(8, dtype=jnp.int32)
    value = backend.load(out_ref.at[at], mask=at < 20)
    backend.store(out_ref.at[at], jnp.zeros_like(value), mask=at < 20)


def written_twice_before_a_barrier(in_ref, out_ref):
    eight(in_ref, out_ref)
    out_ref[pl.program_id(0) * 8] = jnp.float32(0)


def added_to_before_a_barrier(in_ref, out_ref):
    eight(in_ref, out_ref)
    backend.add(out_ref, (pl.program_id(0) * 8 + jnp.zeros(2, jnp.int32),), jnp.ones(2))


def one_store_to_one_place(in_ref, out_ref):
    eight(in_ref, out_ref)
    at = jnp.zeros(8, jnp.int32) + pl.program_id(0)
    out_ref[at] = in_ref[at]


def store_to_the_input(in_ref, out_ref):
    eight(in_ref, out_ref)
    in_ref[pl.program_id(0)] = jnp.float32(1)


def launch(kernel, **options):
    return backend.launch(
        kernel,
        jnp.arange(20, dtype=jnp.float32),
        programs=3,
        out_shape=[jax.ShapeDtypeStruct((20,), np.float32)],
        num_warps=1,
        **options,
    )


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (store_past_the_end, r"out_ref, program 2: write at \[20 21 22\] of axis 0, size 20"),
        (load_past_the_end, r"in_ref, program 2: read at \[20 21 22\] of axis 0, size 20"),
        (access_below_zero, r"in_ref, program 0: read at \[-1\] of axis 0, size 20"),
        (first_element_by_all, "write of an element that another program wrote"),
        (sum_of_what_others_wrote, "an element that another program (wrote|read)|has written"),
        (read_before_it_is_written, "read of an element that nothing has written"),
        (read_before_a_barrier, "read of its own write, no barrier between"),
        (overwritten_before_a_barrier, "write over its own read, no barrier between"),
        (written_twice_before_a_barrier, "two writes, no barrier between"),
        (added_to_before_a_barrier, "read of its own write, no barrier between"),
        (one_store_to_one_place, "one store writes an element twice"),
        (store_to_the_input, "in_ref, program .: write of an input"),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_checked_memory_sees(kernel, message, seed):
    with checked(seed) as launches:
        (good,) = launch(eight)
        same(good, 2 * np.arange(20, dtype=np.float32))
        ((name, writes),) = launches[0].items()
        assert name == "eight: out_ref"
        assert (writes == 1).all()
        with pytest.raises(AssertionError, match=message):
            launch(kernel)


def rows_of_eight(in_ref, out_ref, *, rows, columns):
    for row in range(rows):
        at = jnp.arange(8, dtype=jnp.int32)
        backend.store(out_ref.at[row, at], in_ref[row % 2, at], mask=at < columns)


@pytest.mark.parametrize("interpret", [True, pytest.param(False, marks=pytest.mark.gpu)])
def test_poison_shows_what_was_not_written_and_what_should_not_be(interpret):
    def outputs(**sizes):
        with poisoned() as canaries:
            (out,) = backend.launch(
                functools.partial(rows_of_eight, **sizes),
                jnp.ones((2, 8), jnp.float32),
                programs=1,
                out_shape=[jax.ShapeDtypeStruct((2, 8), np.float32)],
                num_warps=1,
                interpret=interpret,
            )
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
