"""sparse_attention against float64 attention over the listed tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_indexer import (
    IndexerConfig,
    Selection,
    build_index,
    indexer_next,
    select,
    sparse_attention,
)

B, S, K, G, H = 3, 48, 2, 3, 16
N = K * G
# Of one result of magnitude about 1: the last rounding to each dtype, and float32 sums before it.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def inputs(*, T=1, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(B, T, N, H), (B, S, K, H), (B, S, K, H)]
    return [rng.standard_normal(s).astype(jnp.dtype(dtype)) for s in shapes]


def lists(*, T=1, P=20, seed=1):
    """Random ascending lists of every length, the empty and the full one among them."""
    rng = np.random.default_rng(seed)
    indices = np.full((B, T, N, P), -1, np.int32)
    counts = rng.integers(0, P + 1, (B, T, N)).astype(np.int32)
    counts[0, 0, 0], counts[0, 0, 1], counts[0, 0, 2] = 0, 1, P
    for row in np.ndindex(B, T, N):
        indices[row][: counts[row]] = np.sort(rng.choice(S, counts[row], replace=False))
    return Selection(jnp.asarray(indices), jnp.asarray(counts))


def attention(query, key, value, selection, scale):
    """Float64, one row at a time."""
    query, key, value = (x.astype(np.float64) for x in (query, key, value))
    out = np.zeros((*query.shape[:3], value.shape[3]))
    for b, t, n in np.ndindex(query.shape[:3]):
        listed = np.asarray(selection.indices[b, t, n][: selection.counts[b, t, n]])
        if len(listed):
            logits = key[b, listed, n // G] @ query[b, t, n] * scale
            weights = np.exp(logits - logits.max())
            out[b, t, n] = weights @ value[b, listed, n // G] / weights.sum()
    return out


def close(got, want, dtype="float32"):
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("T", [1, 2])
def test_it_equals_attention_over_the_list(T, dtype):
    query, key, value = inputs(T=T, dtype=dtype)
    selection = lists(T=T)
    got = sparse_attention(jnp.asarray(query), jnp.asarray(key), jnp.asarray(value), selection)
    assert (got.shape, got.dtype) == ((B, T, N, H), jnp.dtype(dtype))
    close(got, attention(query, key, value, selection, H**-0.5), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("cache_dtype", TOLERANCE)
def test_dtypes_may_differ(dtype, cache_dtype):
    query, key, value = inputs()
    query, key, value = (
        x.astype(jnp.dtype(d))
        for x, d in ((query, dtype), (key, cache_dtype), (value, cache_dtype))
    )
    selection = lists()
    got = sparse_attention(query, key, value, selection)
    assert got.dtype == jnp.dtype(dtype)
    close(got, attention(query, key, value, selection, H**-0.5), dtype)


@pytest.mark.parametrize("scale", [1.0, 0.01, 3, np.int32(2), np.float16(0.5), 2**40])
def test_scale(scale):
    query, key, value = inputs()
    selection = lists()
    got = sparse_attention(query, key, value, selection, scale=scale)
    # Large logits: an error of 2**-24 of one is that much of its weight.
    want = attention(query, key, value, selection, scale)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_a_list_of_everything_is_dense_attention():
    query, key, value = map(jnp.asarray, inputs(T=2))
    everything = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, 2, N, S))
    selection = Selection(everything, jnp.full((B, 2, N), S, jnp.int32))
    got = sparse_attention(query, key, value, selection)
    want = jax.nn.dot_product_attention(query, key, value)
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


def test_an_empty_list_gives_zeros():
    query, key, value = inputs()
    nothing = Selection(jnp.full((B, 1, N, 7), -1), jnp.zeros((B, 1, N), jnp.int32))
    got = sparse_attention(query, key, value, nothing)
    np.testing.assert_array_equal(got, np.zeros((B, 1, N, H)))
    assert not np.signbit(np.asarray(got)).any()


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_tokens_that_are_not_listed_have_no_influence(garbage):
    """Those a -1 could be mistaken for among them: the first and the last."""
    query, key, value = inputs()
    indices = np.full((B, 1, N, 8), -1, np.int32)
    indices[..., :5] = [1, 4, 9, 20, S - 2]
    indices[1, :, :, :] = -1
    selection = Selection(jnp.asarray(indices), jnp.asarray((indices >= 0).sum(-1), jnp.int32))
    want = sparse_attention(query, key, value, selection)
    for array in (key, value):
        unlisted = np.ones(S, bool)
        unlisted[[1, 4, 9, 20, S - 2]] = False
        array[:, unlisted] = garbage
        array[1] = garbage
    np.testing.assert_array_equal(sparse_attention(query, key, value, selection), want)
    assert (np.asarray(want)[1] == 0).all()


def test_nan_stays_in_its_row():
    query, key, value = inputs()
    selection = lists()
    want = sparse_attention(query, key, value, selection)
    query[0, 0, 2, 3] = np.nan
    key[2, :, 1, 0] = np.nan
    got = np.asarray(sparse_attention(query, key, value, selection))
    touched = np.zeros((B, 1, N), bool)
    touched[0, 0, 2] = touched[2, :, G:] = True
    np.testing.assert_array_equal(got[~touched], np.asarray(want)[~touched])
    hit = touched & (np.asarray(selection.counts) > 0)
    assert np.isnan(got[hit]).any(-1).all()


def test_large_logits_do_not_overflow():
    query, key, value = inputs()
    selection = lists()
    got = sparse_attention(query * 1e4, key * 1e4, value, selection)
    want = attention(query * 1e4, key * 1e4, value, selection, H**-0.5)
    # The softmax is a maximum here: one value each, unless two logits of 1e8 nearly agree.
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_both_layouts():
    query, key, value = map(jnp.asarray, inputs(T=2))
    selection = lists(T=2)
    want = sparse_attention(query, key, value, selection)
    token_major = sparse_attention(query, key, value, selection, kv_layout="BSKH")
    np.testing.assert_array_equal(token_major, want)
    head_major = sparse_attention(
        query, key.swapaxes(1, 2), value.swapaxes(1, 2), selection, kv_layout="BKSH"
    )
    np.testing.assert_allclose(head_major, want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("size", [1, 12, 24])
def test_values_may_have_another_head_dimension(size):
    query, key, value = inputs(T=2)
    value = np.resize(value, (B, S, K, size))
    selection = lists(T=2)
    want = attention(query, key, value, selection, H**-0.5)
    close(sparse_attention(query, key, value, selection), want)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    close(sparse_attention(query, key, value, selection, kv_layout="BKSH"), want)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_gradients_come_from_what_is_listed_alone(garbage):
    """Token 0, where a -1 is read, is not listed; row 1 is empty, and so is a list of row 0."""
    query, key, value = inputs()
    listed = [1, 4, 9, 20, S - 2]
    indices = np.full((B, 1, N, 8), -1, np.int32)
    indices[..., :5] = listed
    indices[1] = indices[0, 0, 2] = -1
    selection = Selection(jnp.asarray(indices), jnp.asarray((indices >= 0).sum(-1), jnp.int32))

    def loss(*arrays):
        return jnp.sum(sparse_attention(*arrays, selection) ** 2)

    differentiate = jax.grad(loss, argnums=(0, 1, 2))
    want = differentiate(query, key, value)
    unlisted = np.ones((B, S), bool)
    unlisted[:, listed] = False
    unlisted[1] = True
    key[unlisted] = value[unlisted] = garbage
    got = differentiate(query, key, value)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    of_query, of_key, of_value = got
    assert (of_query[1] == 0).all()
    assert (of_query[0, 0, 2] == 0).all()
    assert (of_key[unlisted] == 0).all()
    assert (of_value[unlisted] == 0).all()
    assert (of_query[2] != 0).all()
    assert (of_key[2, listed] != 0).all()
    assert (of_value[2, listed] != 0).all()


def test_it_consumes_what_select_returns():
    query, key, value = inputs()
    config = IndexerConfig(num_bits=2, heavy_size=5, sink_size=2, window_size=3)
    index = build_index(jnp.asarray(key), jnp.asarray([S, 20, 0], jnp.int32), config)
    selection = select(jnp.asarray(query), index, config)
    assert selection.counts[:, 0, 0].tolist() == [10, 10, 0]
    got = sparse_attention(query, key, value, selection)
    close(got, attention(query, key, value, selection, H**-0.5))


@pytest.mark.parametrize("kv_layout", ["BSKH", "BKSH"])
@pytest.mark.parametrize("other", [S - 1, S + 1, 20])
def test_a_cache_of_another_capacity_than_the_index_is_refused(other, kv_layout):
    query, key, _ = inputs()
    config = IndexerConfig(num_bits=2, heavy_size=5, sink_size=2, window_size=3)
    index = build_index(jnp.asarray(key), jnp.asarray([S, 20, 0], jnp.int32), config)
    cache = np.resize(key, (B, other, K, H))
    cache = cache if kv_layout == "BSKH" else cache.swapaxes(1, 2)
    for selection in (
        select(query, index, config),
        indexer_next(query, key[:, :1], index, config)[0],
    ):
        with pytest.raises(ValueError, match=rf"^key: expected S={S} tokens, .* got S={other}; "):
            sparse_attention(query, cache, cache, selection, kv_layout=kv_layout)
    by_hand = Selection(selection.indices, selection.counts)
    sparse_attention(query, cache, cache, by_hand, kv_layout=kv_layout)


def test_lists_longer_than_the_cache():
    query, key, value = inputs()
    config = IndexerConfig(num_bits=8)  # P = 513
    index = build_index(jnp.asarray(key), jnp.asarray([S, 20, 1], jnp.int32), config)
    selection = select(jnp.asarray(query), index, config)
    got = sparse_attention(query, key, value, selection)
    close(got, attention(query, key, value, selection, H**-0.5))
    close(got[2], value[2, 0].repeat(G, axis=0)[None])
