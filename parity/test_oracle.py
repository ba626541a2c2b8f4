"""The oracle against cases worked by hand from the contract."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_indexer import IndexerConfig
from parity import oracle

NAN, INF = np.nan, np.inf


def chosen(scores, visible, *, num_query_tokens=1, **sizes):
    config = IndexerConfig(num_subspaces=1, num_bits=1, **sizes)
    return oracle.tokens(np.array(scores, np.float32), visible, num_query_tokens, config).tolist()


SIZES = {"heavy_size": 2, "sink_size": 1, "window_size": 2}  # short up to 2 + 1 + 1 + 2 = 6


def test_best_candidates_between_sink_and_window():
    assert chosen([9, 1, 5, 3, 4, 2, 9, 9], 8, **SIZES) == [0, 2, 4, 6, 7]


def test_ties_go_to_the_lower_position():
    assert chosen([0, 1, 3, 3, 3, 3, 0, 0], 8, **SIZES) == [0, 2, 3, 6, 7]


def test_both_zeros_are_one_score():
    assert chosen([0, -1, -0.0, 0.0, 0.0, -1, 0, 0], 8, **SIZES) == [0, 2, 3, 6, 7]


def test_nan_ranks_below_minus_infinity_and_by_position():
    assert chosen([0, NAN, -INF, NAN, NAN, -INF, 0, 0], 8, **SIZES) == [0, 2, 5, 6, 7]
    assert chosen([0, -NAN, NAN, NAN, NAN, -INF, 0, 0], 8, **SIZES) == [0, 1, 5, 6, 7]


def test_tokens_between_sink_and_init_offset_are_no_candidates():
    sizes = {"heavy_size": 1, "sink_size": 1, "window_size": 2, "init_offset": 3}
    assert chosen([0, 9, 9, 1, 2, 1, 9, 9], 8, **sizes) == [0, 4, 6, 7]


def test_sinks_past_init_offset_are_no_candidates():
    sizes = {"heavy_size": 1, "sink_size": 3, "window_size": 1, "init_offset": 0}
    assert chosen([9, 9, 9, 1, 2, 1, 9], 7, **sizes) == [0, 1, 2, 4, 6]


def test_window_reaches_into_the_gap_before_init_offset():
    sizes = {"heavy_size": 0, "sink_size": 1, "window_size": 4, "init_offset": 4}
    assert chosen([0] * 8, 8, **sizes) == [0, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("queries", "visible", "short"), [(1, 6, True), (1, 7, False), (3, 8, True)]
)
def test_short_contexts_are_taken_whole(queries, visible, short):
    got = chosen([0, 1, 1, 1, 1, 1, 1, 1], visible, num_query_tokens=queries, **SIZES)
    assert (got == list(range(visible))) == short


def test_fewer_candidates_than_budget():
    sizes = {"heavy_size": 3, "sink_size": 5, "window_size": 2, "init_offset": 0}
    assert chosen([0] * 8, 8, **sizes) == list(range(8))
    assert chosen([0] * 9, 9, **sizes) == list(range(9))


def test_lengths_are_clipped_and_earlier_queries_see_less():
    lengths = np.array([-5, 0, 1, 4, 10, 99, np.iinfo(np.int32).max, np.iinfo(np.int32).min])
    got = oracle.visible(lengths, 10, 3)
    assert got.tolist() == [
        [0, 0, 0], [0, 0, 0], [0, 0, 1], [2, 3, 4],
        [8, 9, 10], [8, 9, 10], [8, 9, 10], [0, 0, 0],
    ]  # fmt: skip


def test_scores_add_the_subspaces_in_order_and_mask_codes():
    table = np.array([[2**24, 1], [1, 0], [1, -(2**24)]], np.float32)[None, None, None]
    codes = np.array([[0, 1, 0], [0, 2, 1], [0, 0, 255]], np.uint8)[None, None]
    # (2**24 + 1) + 1 loses both ones in float32; any other order keeps some of it.
    assert oracle.scores(table, codes, 1)[0, 0, 0].tolist() == [2**24, 3, 0]


def test_query_heads_read_the_codes_of_their_kv_head():
    table = np.broadcast_to(np.array([0, 1], np.float32), (1, 1, 4, 1, 2))
    codes = np.array([0, 1], np.uint8)[None, :, None, None]
    assert oracle.scores(table, codes, 1)[0, 0, :, 0].tolist() == [0, 0, 1, 1]


def test_the_table_ignores_the_extra_coordinate():
    codebooks = np.array([1, 10, NAN])[None, None, None, None]  # D = 2, and one more
    query = np.array([3, 4])[None, None, None]
    assert oracle.exact_table(query, codebooks).ravel().tolist() == [43]


@pytest.mark.parametrize(
    ("dtype", "entry", "want"),
    [("float32", 257, 257), ("bfloat16", 257, 256), ("bfloat16", 259, 260),
     ("float16", 2049, 2048), ("float16", 70000, INF)],
)  # fmt: skip
def test_table_entries_are_rounded_to_nearest_even(dtype, entry, want):
    assert oracle.rounded(np.array([entry], np.float64), jnp.dtype(dtype)).tolist() == [want]


def test_select_pads_and_counts():
    config = IndexerConfig(num_subspaces=1, num_bits=1, init_offset=4, **SIZES)
    table = np.array([0, 1], np.float32)[None, None, None, None]
    codes = np.zeros((1, 1, 1, 12), np.uint8)
    codes[..., [6, 7, 8]] = 1
    indices, counts, weights = oracle.select(table, codes, np.array([12]), config)
    assert indices.ravel().tolist() == [0, 6, 7, 10, 11, -1, -1, -1, -1]
    assert counts.ravel().tolist() == [5]
    assert np.flatnonzero(weights).tolist() == [0, 6, 7, 10, 11]
    assert weights.sum() == 5


def test_encode_takes_the_nearest_and_the_lower_of_two():
    codebooks = np.array([[0, 0], [2, 0], [0, 2]], np.float32)[None, None, None]
    key = np.array([[0, 1], [1.5, 0], [1, 1], [9, NAN], [INF, 0]], np.float32)[None, :, None]
    codes, margin = oracle.encode(key, codebooks)
    assert codes.ravel().tolist() == [0, 1, 0, 0, 0]
    assert margin.ravel().tolist() == [0, 2, 0, INF, INF]


def test_encode_with_phi_finds_the_largest_inner_product():
    rng = np.random.default_rng(0)
    phi = np.full((1, 1, 1), 4.0)
    plain = rng.uniform(-1, 1, (1, 1, 1, 8, 3))
    centroids = np.concatenate(
        [plain, np.sqrt(4 - np.square(plain).sum(-1, keepdims=True))], axis=-1
    )
    # Key and centroids have one norm, so nearest means largest inner product of all D + 1.
    key = rng.uniform(-1, 1, (1, 50, 1, 3))
    codes, _ = oracle.encode(key, centroids, phi)
    extra = np.sqrt(4 - np.square(key).sum(-1, keepdims=True))
    want = (np.concatenate([key, extra], axis=-1)[0, :, 0] @ centroids[0, 0, 0].T).argmax(-1)
    assert codes.ravel().tolist() == want.tolist()
