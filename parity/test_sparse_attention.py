"""sparse_attention against float64 attention over the listed tokens."""

import contextlib
import dataclasses
import functools

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
from jax_indexer.kernels import backend
from jax_indexer.kernels.attend import Entries, launch_listed
from jax_indexer.kernels.tuning import H100
from jax_indexer.reference import Caches, Logits
from parity import oracle
from parity.test_kernels import CPU, RUNNERS, SMALL_BLOCKS, Runner, each

B, S, K, G, H = 3, 48, 2, 3, 16
N = K * G
# Of one result of magnitude about 1: the last rounding to each dtype, and before it float32 sums
# and exponentials: of x these are off by |x| 2**-24, and on a GPU by 2**-22 more.
TOLERANCE = {"float32": 2.0**-18, "bfloat16": 2.0**-8, "float16": 2.0**-11}


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
    return oracle.attention(query, key, value, np.asarray(selection.indices), scale=scale)[0]


def attend_by(way):
    """sparse_attention by one implementation."""

    def attend(*arguments, **options):
        with contextlib.ExitStack() as stack:
            if way == "interpreter":
                stack.enter_context(jax.default_device(CPU))
                stack.enter_context(backend.interpreted())
            implementation = "xla" if way == "xla" else "triton"
            return sparse_attention(*arguments, implementation=implementation, **options)

    return attend


ON_A_GPU = pytest.param("triton", marks=pytest.mark.gpu)


@pytest.fixture(params=["xla", "interpreter", ON_A_GPU])
def attend(request):
    return attend_by(request.param)


@pytest.fixture(params=["xla", ON_A_GPU])
def attend_compiled(request):
    """For what `test_kernels_attend_to_what_is_listed` interprets: that compiles for each shape."""
    return attend_by(request.param)


def close(got, want, dtype="float32"):
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("T", [1, 2])
def test_it_equals_attention_over_the_list(T, dtype, attend_compiled):
    query, key, value = inputs(T=T, dtype=dtype)
    selection = lists(T=T)
    got = attend_compiled(jnp.asarray(query), jnp.asarray(key), jnp.asarray(value), selection)
    assert (got.shape, got.dtype) == ((B, T, N, H), jnp.dtype(dtype))
    close(got, attention(query, key, value, selection, H**-0.5), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("cache_dtype", TOLERANCE)
def test_dtypes_may_differ(dtype, cache_dtype, attend_compiled):
    query, key, value = inputs()
    query, key, value = (
        x.astype(jnp.dtype(d))
        for x, d in ((query, dtype), (key, cache_dtype), (value, cache_dtype))
    )
    selection = lists()
    got = attend_compiled(query, key, value, selection)
    assert got.dtype == jnp.dtype(dtype)
    close(got, attention(query, key, value, selection, H**-0.5), dtype)


@pytest.mark.parametrize("scale", [1.0, 0.01, 3, np.int32(2), np.float16(0.5), 2**40])
def test_scale(scale, attend_compiled):
    query, key, value = inputs()
    selection = lists()
    got = attend_compiled(query, key, value, selection, scale=scale)
    # Large logits: an error of 2**-24 of one is that much of its weight.
    want = attention(query, key, value, selection, scale)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_a_list_of_everything_is_dense_attention(attend_compiled):
    query, key, value = map(jnp.asarray, inputs(T=2))
    everything = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, 2, N, S))
    selection = Selection(everything, jnp.full((B, 2, N), S, jnp.int32))
    got = attend_compiled(query, key, value, selection)
    with jax.default_matmul_precision("highest"):
        want = jax.nn.dot_product_attention(query, key, value)
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


def test_an_empty_list_gives_zeros(attend):
    query, key, value = inputs()
    nothing = Selection(jnp.full((B, 1, N, 7), -1), jnp.zeros((B, 1, N), jnp.int32))
    got = attend(query, key, value, nothing)
    np.testing.assert_array_equal(got, np.zeros((B, 1, N, H)))
    assert not np.signbit(np.asarray(got)).any()


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_tokens_that_are_not_listed_have_no_influence(garbage, attend):
    """Those a -1 could be mistaken for among them: the first and the last."""
    query, key, value = inputs()
    indices = np.full((B, 1, N, 8), -1, np.int32)
    indices[..., :5] = [1, 4, 9, 20, S - 2]
    indices[1, :, :, :] = -1
    selection = Selection(jnp.asarray(indices), jnp.asarray((indices >= 0).sum(-1), jnp.int32))
    want = attend(query, key, value, selection)
    for array in (key, value):
        unlisted = np.ones(S, bool)
        unlisted[[1, 4, 9, 20, S - 2]] = False
        array[:, unlisted] = garbage
        array[1] = garbage
    np.testing.assert_array_equal(attend(query, key, value, selection), want)
    assert (np.asarray(want)[1] == 0).all()


def test_nan_stays_in_its_row(attend):
    query, key, value = inputs()
    selection = lists()
    want = attend(query, key, value, selection)
    query[0, 0, 2, 3] = np.nan
    key[2, :, 1, 0] = np.nan
    got = np.asarray(attend(query, key, value, selection))
    touched = np.zeros((B, 1, N), bool)
    touched[0, 0, 2] = touched[2, :, G:] = True
    np.testing.assert_array_equal(got[~touched], np.asarray(want)[~touched])
    hit = touched & (np.asarray(selection.counts) > 0)
    assert np.isnan(got[hit]).any(-1).all()


def test_large_logits_do_not_overflow(attend_compiled):
    query, key, value = inputs()
    selection = lists()
    got = attend_compiled(query * 1e4, key * 1e4, value, selection)
    want = attention(query * 1e4, key * 1e4, value, selection, H**-0.5)
    # The softmax is a maximum here: one value each, unless two logits of 1e8 nearly agree.
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_both_layouts(attend):
    query, key, value = map(jnp.asarray, inputs(T=2))
    selection = lists(T=2)
    want = attend(query, key, value, selection)
    token_major = attend(query, key, value, selection, kv_layout="BSKH")
    np.testing.assert_array_equal(token_major, want)
    head_major = attend(
        query, key.swapaxes(1, 2), value.swapaxes(1, 2), selection, kv_layout="BKSH"
    )
    np.testing.assert_allclose(head_major, want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("size", [1, 12, 24])
def test_values_may_have_another_head_dimension(size, attend):
    query, key, value = inputs(T=2)
    value = np.resize(value, (B, S, K, size))
    selection = lists(T=2)
    want = attention(query, key, value, selection, H**-0.5)
    close(attend(query, key, value, selection), want)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    close(attend(query, key, value, selection, kv_layout="BKSH"), want)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_gradients_come_from_what_is_listed_alone(garbage, attend):
    """Token 0, where a -1 is read, is not listed; row 1 is empty, and so is a list of row 0."""
    query, key, value = inputs()
    listed = [1, 4, 9, 20, S - 2]
    indices = np.full((B, 1, N, 8), -1, np.int32)
    indices[..., :5] = listed
    indices[1] = indices[0, 0, 2] = -1
    selection = Selection(jnp.asarray(indices), jnp.asarray((indices >= 0).sum(-1), jnp.int32))

    def loss(*arrays):
        return jnp.sum(attend(*arrays, selection) ** 2)

    differentiate = jax.grad(loss, argnums=(0, 1, 2))
    want = differentiate(query, key, value)
    unlisted = np.ones((B, S), bool)
    unlisted[:, listed] = False
    unlisted[1] = True
    key[unlisted] = value[unlisted] = garbage
    got = differentiate(query, key, value)
    # A GPU adds what falls on one token in no order.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, got, want)
    of_query, of_key, of_value = got
    assert (of_query[1] == 0).all()
    assert (of_query[0, 0, 2] == 0).all()
    assert (of_key[unlisted] == 0).all()
    assert (of_value[unlisted] == 0).all()
    assert (of_query[2] != 0).all()
    assert (of_key[2, listed] != 0).all()
    assert (of_value[2, listed] != 0).all()


def test_it_consumes_what_select_returns(attend_compiled):
    query, key, value = inputs()
    config = IndexerConfig(num_bits=2, heavy_size=5, sink_size=2, window_size=3)
    index = build_index(jnp.asarray(key), jnp.asarray([S, 20, 0], jnp.int32), config)
    selection = select(jnp.asarray(query), index, config)
    assert selection.counts[:, 0, 0].tolist() == [10, 10, 0]
    got = attend_compiled(query, key, value, selection)
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


def test_lists_longer_than_the_cache(attend):
    query, key, value = inputs()
    config = IndexerConfig(num_bits=8)  # P = 513
    index = build_index(jnp.asarray(key), jnp.asarray([S, 20, 1], jnp.int32), config)
    selection = select(jnp.asarray(query), index, config)
    got = attend(query, key, value, selection)
    close(got, attention(query, key, value, selection, H**-0.5))
    close(got[2], value[2, 0].repeat(G, axis=0)[None])


# The kernels, on odd shapes.

# (dtype, of caches, layout, K, G, T, H, H', P, S, soft cap, layers, tuned)
LISTED = [
    ("float32", "float32", "BSKH", 2, 1, 1, 8, 8, 1, 50, False, None, True),
    ("bfloat16", "bfloat16", "BKSH", 1, 3, 3, 34, 130, 127, 140, True, None, True),
    ("float16", "float16", "BSKH", 2, 4, 1, 64, 64, 129, 300, False, 2, True),
    ("float32", "bfloat16", "BKSH", 1, 7, 1, 130, 34, 700, 720, True, None, True),
    ("float16", "float16", "BSKH", 1, 16, 1, 256, 256, 40, 90, True, None, True),
    ("bfloat16", "float32", "BSKH", 1, 32, 1, 8, 3, 33, 64, False, 3, False),
    ("bfloat16", "bfloat16", "BKSH", 1, 4, 1, 576, 512, 20, 40, False, None, True),
    ("float32", "float32", "BKSH", 1, 2, 1, 18, 5, 300, 310, False, None, False),
]
# As small as lets lists have several parts, more than are merged at once.
SMALL = dataclasses.replace(SMALL_BLOCKS, attended_tile=256)


def by_kernels(query, caches, indices, scale, soft_cap, layer, *, kv_layout, tuning):
    logits = Logits(scale, soft_cap)
    return launch_listed(query, caches, indices, logits, layer, kv_layout, tuning=tuning).output


def draw_listed(case, rows):
    """Lists in no order, of any length, with -1 within and positions past the caches."""
    dtype, cache_dtype, layout, heads, group, tokens, size, of_value, P, capacity, *_ = case
    rng = np.random.default_rng(LISTED.index(case))
    lead = () if case[-2] is None else (case[-2],)

    def real(*shape, dtype):
        return rng.standard_normal(shape).astype(jnp.dtype(dtype))

    shape = (capacity, heads) if layout == "BSKH" else (heads, capacity)
    caches = Caches(*(real(*lead, rows, *shape, x, dtype=cache_dtype) for x in (size, of_value)))
    indices = np.full((rows, tokens, heads * group, P), -1, np.int32)
    for number, place in enumerate(np.ndindex(indices.shape[:3])):
        count = min([P, 0, P - 1, rng.integers(0, P + 1)][number % 4], capacity)
        indices[place][:count] = rng.permutation(capacity)[:count]
        if number % 3 == 2:
            rng.shuffle(indices[place])
        if number % 5 == 4:
            indices[place][::7] = capacity + number
    indices[0, 0, -1, 0] = np.iinfo(np.int32).max
    query = real(rows, tokens, heads * group, size, dtype=dtype)
    return query, caches, indices


@pytest.fixture(params=[pytest.param(name, marks=marks) for name, marks in RUNNERS.items()])
def run(request):
    return Runner(request.param)


@each(LISTED, checked=[LISTED[i] for i in (1, 2, 7)])
def test_kernels_attend_to_what_is_listed(case, run):
    dtype, _, layout, *_, capped, layers, tuned = case
    query, caches, indices = draw_listed(case, 2)
    scale, soft_cap = np.float32(query.shape[3] ** -0.5), np.float32(2) if capped else None
    layer = None if layers is None else np.int32(1)
    out, lse = run(
        by_kernels, query, caches, indices, scale, soft_cap, layer, kv_layout=layout,
        tuning=H100 if tuned else SMALL,
    )  # fmt: skip
    if layers is not None:
        caches = jax.tree.map(lambda x: x[1], caches)
    want = oracle.attention(query, *caches, indices, kv_layout=layout, soft_cap=soft_cap)
    assert (out.dtype, lse.dtype) == (jnp.dtype(dtype), np.float32)
    close(out, want[0], dtype)
    close(lse, want[1])
    nothing = np.isneginf(lse)
    np.testing.assert_array_equal(nothing, np.isneginf(want[1]))
    assert (out[nothing] == 0).all()
    assert indices.shape[-1] == 1 or (nothing.any() and not nothing.all())
    for writes in run.writes.values():
        assert (writes == 1).all()


# Lists as select makes them: (dtype, of caches, layout, K, G, T, H, H', config, S, layers, tuned)
SHARED = [
    ("bfloat16", "bfloat16", "BSKH", 2, 4, 1, 64, 64, (33, 70, 40), 300, None, True),
    ("float32", "float32", "BKSH", 1, 32, 2, 34, 130, (3, 9, 0), 90, 2, True),
    ("float16", "float32", "BSKH", 1, 17, 1, 8, 3, (0, 5, 30), 120, None, True),
    ("bfloat16", "bfloat16", "BKSH", 2, 7, 3, 18, 5, (20, 0, 11), 100, None, False),
    ("float32", "bfloat16", "BKSH", 1, 1, 1, 16, 16, (4, 40, 4), 100, None, False),
]


def draw_shared(case):
    """Sink, heavy tokens of each head, window; then a row that lists all of its few tokens."""
    dtype, cache_dtype, layout, heads, group, tokens, size, of_value, budget, capacity, *_ = case
    rng = np.random.default_rng(SHARED.index(case))
    sink, heavy, window = budget
    config = IndexerConfig(
        num_bits=2, num_subspaces=1, sink_size=sink, heavy_size=heavy, window_size=window
    )
    lead = () if case[-2] is None else (case[-2],)

    def real(*shape, dtype):
        return rng.standard_normal(shape).astype(jnp.dtype(dtype))

    shape = (capacity, heads) if layout == "BSKH" else (heads, capacity)
    caches = Caches(*(real(*lead, 3, *shape, x, dtype=cache_dtype) for x in (size, of_value)))
    indices = np.full((3, tokens, heads * group, config.max_selected(tokens)), -1, np.int32)
    for token in range(tokens):
        for head in range(heads * group):
            visible = capacity - tokens + token
            chosen = rng.choice(np.arange(sink, visible - window), heavy, replace=False)
            last = np.arange(visible - window, visible)
            found = np.concatenate([np.arange(sink), np.sort(chosen), last])
            indices[0, token, head, : found.size] = found
        few = config.short_context(tokens) - tokens + token
        indices[1, token, :, :few] = np.arange(few)
    query = real(3, tokens, heads * group, size, dtype=dtype)
    return query, caches, indices, config


def by_shared_entries(query, caches, indices, scale, layer, *, config, kv_layout, tuning):
    own, logits = Entries.of(config), Logits(scale, None)
    return launch_listed(
        query, caches, indices, logits, layer, kv_layout, own=own, tuning=tuning
    ).output


@each(SHARED, checked=SHARED[1::2])
def test_sink_and_window_are_attended_to_for_all_heads_of_a_kv_head(case, run):
    dtype, _, layout, *_, layers, tuned = case
    query, caches, indices, config = draw_shared(case)
    scale, layer = np.float32(query.shape[3] ** -0.5), None if layers is None else np.int32(1)
    out, lse = run(
        by_shared_entries, query, caches, indices, scale, layer, config=config, kv_layout=layout,
        tuning=H100 if tuned else SMALL,
    )  # fmt: skip
    if layers is not None:
        caches = jax.tree.map(lambda x: x[1], caches)
    want = oracle.attention(query, *caches, indices, kv_layout=layout)
    close(out, want[0], dtype)
    close(lse, want[1])
    assert (out[2] == 0).all()
    assert np.isneginf(lse[2]).all()
    for writes in run.writes.values():
        assert (writes == 1).all()


@pytest.mark.parametrize("T", [1, 3])
def test_lists_of_select_are_attended_to_alike_with_its_config(T, attend):
    """Of rows that are long, short, empty and partly padding."""
    query, key, value = map(jnp.asarray, inputs(T=T))
    config = IndexerConfig(num_bits=2, heavy_size=5, sink_size=3, window_size=7)
    index = build_index(key, jnp.asarray([S, 12, 0], jnp.int32), config)
    for counts in (None, jnp.asarray([T - 1, T, 0], jnp.int32)):
        selection = select(query, index, config, counts=counts)
        got = attend(query, key, value, selection, config=config, return_lse=True)
        want = attend(query, key, value, selection, return_lse=True)
        close(got[0], want[0])
        close(got[1], want[1])


def test_listed_keys_that_are_no_numbers_give_what_the_reference_gives(attend):
    """NaN, both infinities, one token alone and beside others, and all of a list at -inf."""
    query, key, value = inputs()
    key[0, 3, 0], key[0, 4, 0], key[0, 5, 0] = np.nan, np.inf, -np.inf
    key[1, 3, :, 0], value[1, 4, 1, 2], value[1, 5] = -np.inf, np.nan, np.inf
    query[1, :, :, 0] = 1
    indices = np.full((B, 1, N, 4), -1, np.int32)
    indices[:, :, 0, :2], indices[:, :, 1, :2] = (3, 9), (9, 4)
    indices[:, :, 2, :1], indices[:, :, 3, :3] = 3, (5, 9, 10)
    indices[:, :, 4, :1], indices[:, :, 5, :] = 4, (3, 4, 5, 6)
    selection = Selection(jnp.asarray(indices), jnp.asarray((indices >= 0).sum(-1), jnp.int32))
    got = attend(query, key, value, selection, return_lse=True)
    want = sparse_attention(query, key, value, selection, return_lse=True, implementation="xla")
    assert np.isnan(np.asarray(want[0])).any()
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("cap", [0.5, np.float32(20)])
def test_the_soft_cap_and_the_log_of_the_sum(cap, attend):
    query, key, value = inputs(T=2, dtype="bfloat16")
    selection = lists(T=2)
    out, lse = attend(query, key, value, selection, logits_soft_cap=cap, scale=2.0, return_lse=True)
    indices = np.asarray(selection.indices)
    want = oracle.attention(query, key, value, indices, scale=2.0, soft_cap=float(cap))
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    close(out, want[0], "bfloat16")
    close(lse, want[1])


def test_parts_of_a_list_merge_by_their_sums(attend):
    query, key, value = inputs()
    selection = lists()
    halves = []
    for own in (slice(0, 7), slice(7, None)):
        indices = np.full(selection.indices.shape, -1, np.int32)
        indices[..., own] = selection.indices[..., own]
        half = dataclasses.replace(selection, indices=jnp.asarray(indices))
        halves.append(attend(query, key, value, half, return_lse=True))
    weight = np.exp([lse - np.logaddexp(halves[0][1], halves[1][1]) for _, lse in halves])
    merged = sum(
        np.nan_to_num(w)[..., None] * out for w, (out, _) in zip(weight, halves, strict=True)
    )
    close(merged, attend(query, key, value, selection))


@pytest.mark.parametrize("kv_layout", ["BSKH", "BKSH"])
def test_a_layer_of_stacked_caches_is_as_it_is_alone(kv_layout, attend):
    """Traced, negative and too large: clipped to those there are."""
    query, _, _ = inputs()
    caches = [inputs(seed=seed)[1:] for seed in range(3)]
    if kv_layout == "BKSH":
        caches = [[x.swapaxes(1, 2) for x in of_layer] for of_layer in caches]
    key, value = (jnp.stack(x) for x in zip(*caches, strict=True))
    selection = lists()

    @jax.jit
    def traced(layer):
        return attend(query, key, value, selection, layer=layer, kv_layout=kv_layout)

    for layer, meant in ((0, 0), (1, 1), (2, 2), (-1, 0), (-(2**31), 0), (3, 2), (2**31 - 1, 2)):
        want = attend(query, *caches[meant], selection, kv_layout=kv_layout)
        np.testing.assert_allclose(traced(jnp.int32(layer)), want, rtol=1e-6, atol=1e-6)
    got = attend(query, key, value, selection, layer=1, kv_layout=kv_layout)
    np.testing.assert_allclose(got, traced(jnp.int32(1)), rtol=1e-6, atol=1e-6)
