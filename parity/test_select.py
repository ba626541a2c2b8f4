"""select equals the oracle bit for bit, given the same float32 table."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_indexer import IndexerConfig, PQIndex, reference, select
from parity import oracle
from parity.compare import check_selection
from parity.inputs import SMALL, Workload, make_inputs

INT32 = np.iinfo(np.int32)


def as_index(inputs, **changes):
    arrays = {"codebooks": inputs.codebooks, "codes": inputs.codes, "lengths": inputs.lengths}
    return PQIndex(**{name: jnp.asarray(a) for name, a in (arrays | changes).items()})


def table_of(query, codebooks, config):
    return oracle.rounded(oracle.exact_table(query, codebooks), config.table_dtype)


def check_exact(query, index, config, implementation, table=None):
    """Asserts indices, counts, weights and their dtypes and shapes against the oracle."""
    codes, lengths = np.asarray(index.codes), np.asarray(index.lengths)
    if table is None:
        table = table_of(np.asarray(query), np.asarray(index.codebooks), config)
    got = select(query, index, config, return_weights=True, implementation=implementation)
    indices, counts, weights = oracle.select(table, codes, lengths, config)
    assert got.weights is not None
    assert (got.indices.dtype, got.counts.dtype) == (jnp.int32, jnp.int32)
    assert got.weights.dtype == query.dtype
    np.testing.assert_array_equal(got.counts, counts)
    np.testing.assert_array_equal(got.indices, indices)
    np.testing.assert_array_equal(np.asarray(got.weights, np.float32), weights)
    return got


def boundary_lengths(config, capacity, num_query_tokens):
    """Every length at which a rule starts or stops to hold, one under, one over, and nonsense."""
    short = config.heavy_size + config.first_trained + num_query_tokens + 2**config.num_bits
    first = max(config.sink_size, config.first_trained)
    edges = {
        0,
        config.sink_size,
        config.window_size,
        config.first_trained,
        config.sink_size + config.window_size,
        config.first_trained + config.window_size,
        first + config.window_size + config.heavy_size,
        short,
        short + num_query_tokens,
        capacity,
    }
    near = {edge + d for edge in edges for d in (-1, 0, 1)}
    inside = sorted(length for length in near if 0 <= length <= capacity + 1)
    return [*inside, capacity + 77, -1, -77, INT32.max, INT32.min]


def drawn(rng, lengths, *, capacity, config, integers, dtype="float32", **shape):
    """Inputs whose rows have the given lengths, in one batch."""
    workload = Workload(
        name="drawn",
        B=len(lengths),
        L=tuple(int(length) for length in lengths),
        S=capacity,
        config=config,
        dtype=dtype,
        seed=int(rng.integers(2**31)),
        **shape,
    )
    return make_inputs(workload, integers=integers)


# (num_subspaces, num_bits, D, K, G), then the sizes; capacities leave room past the short rule.
SHAPES = [(2, 6, 16, 2, 2), (1, 8, 8, 1, 4), (4, 4, 4, 4, 1), (3, 2, 5, 1, 3), (8, 1, 2, 2, 4)]
SIZES = [
    {"heavy_size": 16, "sink_size": 8, "window_size": 8},
    {"heavy_size": 16, "sink_size": 8, "window_size": 8, "init_offset": 21},
    {"heavy_size": 9, "sink_size": 20, "window_size": 3, "init_offset": 5},
    {"heavy_size": 0, "sink_size": 4, "window_size": 4},
    {"heavy_size": 24, "sink_size": 0, "window_size": 5},
    {"heavy_size": 24, "sink_size": 5, "window_size": 0},
    {"heavy_size": 7, "sink_size": 0, "window_size": 0, "init_offset": 3},
    {"heavy_size": 1, "sink_size": 1, "window_size": 40, "init_offset": 0},
]
DTYPES = ["float32", "bfloat16", "float16"]


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "-".join(map(str, sizes.values())))
@pytest.mark.parametrize("num_query_tokens", [1, 3])
def test_select_equals_the_oracle(sizes, num_query_tokens, implementation):
    """Over 15000 rows (b, t, n), each with its own query, small-integer inputs, every boundary."""
    seed = SIZES.index(sizes) * 2 + num_query_tokens
    rng = np.random.default_rng(seed)
    (M, bits, D, K, G), dtype = SHAPES[seed % len(SHAPES)], DTYPES[seed % len(DTYPES)]
    config = IndexerConfig(
        num_subspaces=M,
        num_bits=bits,
        metric=("euclidean", "ip")[seed % 2],
        table_dtype=DTYPES[seed // 3 % len(DTYPES)],
        **sizes,
    )
    capacity = config.heavy_size + config.first_trained + 2**bits + 75
    lengths = boundary_lengths(config, capacity, num_query_tokens)
    lengths += list(rng.integers(0, capacity + 1, 40 - len(lengths) % 8))
    shape = {"capacity": capacity, "T": num_query_tokens, "N": K * G, "K": K, "H": M * D}
    # The smaller integers make ties the rule, the larger ones entries that bfloat16 rounds.
    for integers in (2, 40):
        inputs = drawn(rng, lengths, config=config, integers=integers, dtype=dtype, **shape)
        check_exact(jnp.asarray(inputs.query), as_index(inputs), config, implementation)


@hypothesis.settings(
    max_examples=30,
    # The fixture is a name: there is nothing in it to set up anew for every example.
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(data=st.data())
def test_select_equals_the_oracle_for_any_shape(implementation, data):
    draw = data.draw
    num_query_tokens = draw(st.integers(1, 3), "T")
    M, D = draw(st.integers(1, 5), "M"), draw(st.integers(1, 9), "D")
    K, G = draw(st.integers(1, 3), "K"), draw(st.integers(1, 4), "G")
    config = IndexerConfig(
        num_subspaces=M,
        num_bits=draw(st.integers(1, 5), "num_bits"),
        heavy_size=draw(st.integers(0, 40), "heavy_size"),
        sink_size=draw(st.integers(0, 20), "sink_size"),
        window_size=draw(st.integers(0, 20), "window_size"),
        init_offset=draw(st.none() | st.integers(0, 30), "init_offset"),
        metric=draw(st.sampled_from(["euclidean", "ip"]), "metric"),
        table_dtype=draw(st.sampled_from(DTYPES), "table_dtype"),
    )
    capacity = draw(st.integers(1, 200), "S")
    lengths = draw(
        st.lists(
            st.sampled_from(boundary_lengths(config, capacity, num_query_tokens))
            | st.integers(0, capacity),
            min_size=8,
            max_size=8,
        ),
        "lengths",
    )
    inputs = drawn(
        np.random.default_rng(draw(st.integers(0, 2**31), "seed")),
        lengths,
        capacity=capacity,
        config=config,
        integers=draw(st.sampled_from([1, 3, 40]), "integers"),
        dtype=draw(st.sampled_from(DTYPES), "dtype"),
        T=num_query_tokens,
        N=K * G,
        K=K,
        H=M * D,
    )
    check_exact(jnp.asarray(inputs.query), as_index(inputs), config, implementation)


@pytest.mark.parametrize("name", SMALL)
def test_small_workloads(name, implementation):
    inputs = make_inputs(SMALL[name], integers=3)
    check_exact(jnp.asarray(inputs.query), as_index(inputs), SMALL[name].config, implementation)


@pytest.mark.parametrize("codebooks_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_may_differ(dtype, codebooks_dtype, implementation):
    """A bfloat16 model with the float32 codebooks that build_index trains is the usual case."""
    workload = SMALL["small"]
    inputs = make_inputs(workload, integers=40)
    index = as_index(inputs, codebooks=inputs.codebooks.astype(jnp.dtype(codebooks_dtype)))
    query = jnp.asarray(inputs.query, dtype)
    check_exact(query, index, workload.config, implementation)


# A table of our choosing through the public API: the query is 1, a subspace has one dimension, so
# a table entry is the centroid itself.
def chosen_table(tables, codes, lengths):
    """Arguments of select for tables [rows, M, C]; codes [rows, M, S]."""
    rows, M, _ = tables.shape
    index = PQIndex(
        codebooks=jnp.asarray(tables[:, None, :, :, None]),
        codes=jnp.asarray(codes[:, None]),
        lengths=jnp.asarray(lengths, jnp.int32),
    )
    return jnp.ones((rows, 1, 1, M), jnp.float32), index, tables[:, None, None]


ADVERSARIES = {
    "all equal": lambda rng, n: np.full(n, 0.5),
    "two distinct": lambda rng, n: rng.choice([-1.0, 2.0], n),
    "one winner": lambda rng, n: np.where(np.arange(n) == rng.integers(n), 1.0, 0.0),
    "ascending": lambda rng, n: np.arange(n) - n / 3,
    "descending": lambda rng, n: n / 3 - np.arange(n),
    "neighbouring floats": lambda rng, n: 1 + rng.integers(-3, 3, n) * 2.0**-23,
    "both zeros": lambda rng, n: rng.choice([0.0, -0.0], n),
    "zeros among others": lambda rng, n: rng.choice([0.0, -0.0, 1e-30, -1e-30], n),
    "all nan": lambda rng, n: np.full(n, np.nan),
    "nan of both signs": lambda rng, n: rng.choice([np.nan, -np.nan, 0.0], n, p=[0.4, 0.4, 0.2]),
    "some nan": lambda rng, n: np.where(rng.random(n) < 0.3, np.nan, rng.standard_normal(n)),
    "mostly nan": lambda rng, n: np.where(rng.random(n) < 0.98, np.nan, rng.standard_normal(n)),
    "all -inf": lambda rng, n: np.full(n, -np.inf),
    "infinities": lambda rng, n: rng.choice([np.inf, -np.inf, 1.0, -1.0], n),
    "infinities and nan": lambda rng, n: rng.choice([np.inf, -np.inf, np.nan, 0.0, 7.0], n),
    "overflowing": lambda rng, n: rng.choice([3e38, -3e38, 1e38, 0.0], n),
    "normal": lambda rng, n: rng.standard_normal(n),
    "every magnitude": lambda rng, n: rng.choice([-1, 1], n) * 10.0 ** rng.uniform(-30, 30, n),
}


@pytest.mark.parametrize("num_subspaces", [1, 2, 5])
@pytest.mark.parametrize("kind", ADVERSARIES)
def test_adversarial_scores(kind, num_subspaces, implementation):
    rng = np.random.default_rng(len(kind) + num_subspaces)
    config = IndexerConfig(
        num_subspaces=num_subspaces, num_bits=8, heavy_size=24, sink_size=3, window_size=6
    )
    capacity, rows = 400, 6  # the short rule ends at 284 tokens
    tables = np.stack([ADVERSARIES[kind](rng, (256)) for _ in range(rows * num_subspaces)])
    tables = tables.reshape(rows, num_subspaces, 256).astype(np.float32)
    codes = rng.integers(0, 256, (rows, num_subspaces, capacity), np.uint8)
    codes[0] = np.arange(capacity) * 256 // capacity  # as the table lies, position by position
    lengths = [400, 399, 400, 300, 285, 284]
    query, index, table = chosen_table(tables, codes, lengths)
    check_exact(query, index, config, implementation, table)


def test_the_sum_runs_through_the_subspaces_in_order(implementation):
    config = IndexerConfig(num_subspaces=3, num_bits=1, heavy_size=1, sink_size=0, window_size=0)
    # 2**24 + 1 + 1 is 2**24 from the left; 2**24 + (1 + 1) would win instead of tie.
    tables = np.array([[[0, 2**24], [0, 1], [0, 1]]], np.float32)
    codes = np.zeros((1, 3, 9), np.uint8)
    codes[0, 0] = 1
    codes[0, :, 6] = 1
    query, index, table = chosen_table(tables, codes, [9])
    got = check_exact(query, index, config, implementation, table)
    assert got.indices[0, 0, 0, 0] == 0


def test_random_float_tables_with_shared_codes(implementation):
    """One-hot queries pick columns of the codebook, so each head of a group has its own table."""
    rng = np.random.default_rng(5)
    B, K, G, M, C, S = 4, 2, 4, 6, 32, 300
    config = IndexerConfig(num_subspaces=M, num_bits=5, heavy_size=30, sink_size=4, window_size=4)
    codebooks = rng.standard_normal((B, K, M, C, G)).astype(np.float32)
    codes = rng.integers(0, C, (B, K, M, S), np.uint8)
    one_hot = np.tile(np.eye(G, dtype=np.float32)[:, None], (1, M, 1)).reshape(G, M * G)
    query = np.tile(one_hot, (B, 1, K, 1))
    index = PQIndex(
        codebooks=jnp.asarray(codebooks),
        codes=jnp.asarray(codes),
        lengths=jnp.asarray([300, 299, 150, 71], jnp.int32),
    )
    table = codebooks.transpose(0, 1, 4, 2, 3).reshape(B, 1, K * G, M, C)
    check_exact(jnp.asarray(query), index, config, implementation, table)


def test_nan_queries_and_codebooks(implementation):
    workload = SMALL["small"]
    inputs = make_inputs(workload, integers=3)
    query = inputs.query.copy()
    query[0, 0, 1] = np.nan
    query[0, 0, 2, 3] = np.inf  # times 0 and times both signs: NaN and both infinities
    codebooks = inputs.codebooks.copy()
    codebooks[1, 0, 0, ::2] = np.nan
    codebooks[1, 1, 1, 3] = -np.inf
    index = as_index(inputs, codebooks=codebooks)
    check_exact(jnp.asarray(query), index, workload.config, implementation)


def test_only_the_low_bits_of_a_code_count(implementation):
    workload = SMALL["small-grouped"]
    inputs = make_inputs(workload, integers=3)
    rng = np.random.default_rng(0)
    high = rng.integers(0, 8, inputs.codes.shape, np.uint8) << 5
    query = jnp.asarray(inputs.query)
    got = check_exact(
        query, as_index(inputs, codes=inputs.codes | high), workload.config, implementation
    )
    clean = select(query, as_index(inputs), workload.config, implementation=implementation)
    np.testing.assert_array_equal(got.indices, clean.indices)


@pytest.mark.parametrize("name", ["small", "small-short", "small-three-queries"])
def test_garbage_past_the_length_has_no_influence(name, implementation):
    inputs = make_inputs(SMALL[name], integers=3)
    past = np.arange(inputs.codes.shape[-1]) >= inputs.lengths[:, None, None, None]
    query, outputs = jnp.asarray(inputs.query), []
    for garbage in (0, 7, 255):
        index = as_index(inputs, codes=np.where(past, np.uint8(garbage), inputs.codes))
        outputs.append(
            select(
                query,
                index,
                SMALL[name].config,
                return_weights=True,
                implementation=implementation,
            )
        )
    for other in outputs[1:]:
        jax.tree.map(np.testing.assert_array_equal, outputs[0], other)


def test_the_extra_coordinate_is_not_scored(implementation):
    inputs = make_inputs(SMALL["small-ip"], integers=3)
    codebooks = inputs.codebooks.copy()
    codebooks[..., -1] = np.nan
    index = as_index(inputs, codebooks=codebooks)
    check_exact(jnp.asarray(inputs.query), index, SMALL["small-ip"].config, implementation)


def test_lists_may_be_longer_than_the_cache(implementation):
    config = IndexerConfig(num_subspaces=2, num_bits=8)  # P = 513
    rng = np.random.default_rng(0)
    lengths = [0, 1, 39, 40, 41]
    inputs = drawn(rng, lengths, capacity=40, config=config, integers=3, N=2, K=1, H=8)
    got = check_exact(jnp.asarray(inputs.query), as_index(inputs), config, implementation)
    assert got.indices.shape == (5, 1, 2, 513)
    assert got.counts[:, 0, 0].tolist() == [0, 1, 39, 40, 40]


def test_earlier_query_tokens_see_less(implementation):
    workload = SMALL["small-three-queries"]
    inputs = make_inputs(workload, integers=3)
    got = select(
        jnp.asarray(inputs.query), as_index(inputs), workload.config, implementation=implementation
    )
    last = np.take_along_axis(np.asarray(got.indices), np.asarray(got.counts)[..., None] - 1, -1)
    assert last[0, :, 0, 0].tolist() == [197, 198, 199]
    assert got.counts[1, :, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_mark_the_listed_tokens_in_the_dtype_of_the_query(dtype, implementation):
    config = IndexerConfig(num_bits=4, heavy_size=12, sink_size=5, window_size=7)
    rng = np.random.default_rng(0)
    inputs = drawn(
        rng, [0, 30, 128], capacity=128, config=config, integers=3, dtype=dtype, N=4, K=2, H=8
    )
    check_exact(jnp.asarray(inputs.query), as_index(inputs), config, implementation)


def test_weights_are_none_unless_asked_for(implementation):
    inputs = make_inputs(SMALL["small"])
    got = select(
        jnp.asarray(inputs.query),
        as_index(inputs),
        SMALL["small"].config,
        implementation=implementation,
    )
    assert got.weights is None


@pytest.mark.parametrize("table_dtype", DTYPES)
@pytest.mark.parametrize("name", ["small", "small-grouped", "small-ip", "small-three-queries"])
def test_real_valued_inputs_choose_by_score(name, table_dtype, implementation):
    """No integers here, so the table is not exact: the error of a score bounds what is free.

    A sum of n float32 products is off by at most n * 2**-24 of the sum of their magnitudes; an
    entry rounded to p bits by 2**-p of itself.
    """
    workload = SMALL[name]
    sizes = {"heavy_size": 12, "sink_size": 5, "window_size": 7}
    config = IndexerConfig(
        num_subspaces=workload.config.num_subspaces,
        num_bits=workload.config.num_bits,
        metric=workload.config.metric,
        table_dtype=table_dtype,
        **sizes,
    )
    inputs = make_inputs(workload)
    got = select(jnp.asarray(inputs.query), as_index(inputs), config, implementation=implementation)
    exact = oracle.exact_table(inputs.query, inputs.codebooks)
    magnitudes = oracle.exact_table(
        np.abs(inputs.query.astype(np.float64)), np.abs(inputs.codebooks.astype(np.float64))
    )
    bits = {"float32": 24, "bfloat16": 8, "float16": 11}[table_dtype]
    products = workload.H + config.num_subspaces
    error = magnitudes.max(-1).sum(-1) * products * 2.0**-24
    if bits < 24:
        error += np.abs(exact).max(-1).sum(-1) * 2.0**-bits
    check_selection(
        got.indices,
        got.counts,
        oracle.scores(exact, inputs.codes, config.num_bits),
        np.broadcast_to(
            oracle.visible(inputs.lengths, inputs.codes.shape[-1], workload.T)[..., None],
            got.counts.shape,
        ),
        config,
        atol=2 * error,
        num_query_tokens=workload.T,
    )


def test_repeated_runs_give_the_same_bits(implementation):
    inputs = make_inputs(SMALL["small-grouped"])
    query, index, config = (
        jnp.asarray(inputs.query),
        as_index(inputs),
        SMALL["small-grouped"].config,
    )
    first = select(query, index, config, return_weights=True, implementation=implementation)
    for _ in range(3):
        again = select(query, index, config, return_weights=True, implementation=implementation)
        jax.tree.map(np.testing.assert_array_equal, first, again)


def test_rows_do_not_see_each_other(implementation):
    """A row alone, in a batch, and at another place of it gives the same list."""
    workload = SMALL["small"]
    inputs = make_inputs(workload, integers=2)
    config = workload.config
    fields = inputs.query, inputs.codebooks, inputs.codes, np.array([200, 90], np.int32)

    def run(rows):
        query, codebooks, codes, lengths = (jnp.asarray(a[rows]) for a in fields)
        index = PQIndex(codebooks=codebooks, codes=codes, lengths=lengths)
        return select(query, index, config, return_weights=True, implementation=implementation)

    together = run([0, 1])
    for rows in ([0], [1], [1, 0], [1, 1, 0]):
        want = jax.tree.map(lambda x, rows=rows: x[jnp.asarray(rows)], together)
        jax.tree.map(np.testing.assert_array_equal, run(rows), want)


@pytest.mark.parametrize("selector", ["top_k"])
def test_selectors_give_the_same_list(selector, implementation):
    workload = SMALL["small-grouped"]
    inputs = make_inputs(workload, integers=2)
    query, index = jnp.asarray(inputs.query), as_index(inputs)
    default = select(query, index, workload.config, implementation=implementation)
    named = select(query, index, workload.config, implementation=implementation, selector=selector)
    jax.tree.map(np.testing.assert_array_equal, default, named)


@pytest.mark.parametrize("step", [1, 7919])
def test_the_best_ranks_are_found_in_their_order(step):
    """Of numbers of every size, the least among them, NaN, infinities, and what is no candidate."""
    infinity = 0x7F800000
    special = [reference.NAN_RANK, reference.NOT_A_CANDIDATE, infinity, -infinity]
    rank = np.array([*(step * np.arange(-300, 301)), *special], np.int32)
    rank = np.sort(np.concatenate([rank, rank[::3]]))  # what ties by mistake comes the wrong way
    number = 700
    found = jax.jit(lambda rank: reference.best(rank, number))(jnp.asarray(rank)[None])
    want = np.argsort(-rank.astype(np.int64), kind="stable")
    np.testing.assert_array_equal(found[0], want[:number])
