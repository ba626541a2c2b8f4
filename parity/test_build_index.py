"""build_index: codebooks, codes, and what they may depend on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_indexer import IndexerConfig, PQIndex, append, build_index, kmeans
from parity import oracle

C, OFFSET = 16, 3
METRICS = ["euclidean", "ip"]
# One shape for almost every test: compiling takes longer than training.
B, S, K, H = 4, 200, 2, 8


def with_(metric="euclidean", **changes):
    fields = {"num_subspaces": 2, "num_bits": 4, "sink_size": OFFSET, **changes}
    return IndexerConfig(metric=metric, **fields)


CONFIG = with_()


def random_keys(B=B, S=S, seed=0, dtype=np.float32):
    """Keys with some structure: twelve centres and noise."""
    rng = np.random.default_rng(seed)
    centres = 2 * rng.standard_normal((12, K, H))
    keys = centres[rng.integers(0, 12, (B, S))] + rng.standard_normal((B, S, K, H))
    return keys.astype(dtype)


def build(key, lengths, config=CONFIG, **options):
    return build_index(jnp.asarray(key), jnp.asarray(lengths, jnp.int32), config, **options)


def train(key, lengths, first_head=0):
    """Codebooks, compiled anew: JAX's cache of programs does not look at its settings."""

    @jax.jit
    def codebooks(key, lengths, first_head):
        keys = kmeans.training_set(key, lengths, CONFIG, "BSKH", None)
        return kmeans.train(keys, lengths, jnp.uint32(0), first_head, CONFIG, "BSKH", None)

    return codebooks(jnp.asarray(key), jnp.asarray(lengths, jnp.int32), jnp.int32(first_head))


def check_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def check_same_row(got, row, want, want_row, length):
    """Everything with a meaning: codes past the length have none."""
    np.testing.assert_array_equal(got.codebooks[row], want.codebooks[want_row])
    np.testing.assert_array_equal(got.codes[row, ..., :length], want.codes[want_row, ..., :length])
    assert got.lengths[row] == want.lengths[want_row]
    if want.phi is not None:
        np.testing.assert_array_equal(got.phi[row], want.phi[want_row])


def training_set(key, length, subspace, *, first=OFFSET, num_subspaces=2):
    """The finite subvectors of one kv head [S, H] that codebooks are trained on."""
    parts = key[first : max(length, first)].astype(np.float64)
    parts = parts.reshape(len(parts), num_subspaces, -1)[:, subspace]
    return parts[np.isfinite(parts).all(-1)]


def inertia(points, centroids):
    return np.square(points[:, None] - centroids).sum(-1).min(-1).sum()


def lloyd(points, num_centroids, iterations, rng):
    """Lloyd's algorithm as a textbook has it; an empty cluster stays where it is."""
    centroids = points[rng.choice(len(points), num_centroids, replace=False)]
    for _ in range(iterations):
        nearest = np.square(points[:, None] - centroids).sum(-1).argmin(-1)
        for c in range(num_centroids):
            if (nearest == c).any():
                centroids[c] = points[nearest == c].mean(0)
    return centroids


@pytest.mark.parametrize(
    ("metric", "dtype"),
    [("euclidean", "float32"), ("ip", "float32"), ("euclidean", "bfloat16"), ("ip", "float16")],
)
def test_shapes_and_dtypes(metric, dtype):
    key = random_keys(dtype=jnp.dtype(dtype))
    index = build(key, [S, 150, 40, 3], with_(metric))
    assert index.codebooks.shape == (B, K, 2, C, 4 + (metric == "ip"))
    assert index.codebooks.dtype in (jnp.float32, jnp.dtype(dtype))
    assert (index.codes.shape, index.codes.dtype) == ((B, K, 2, S), jnp.uint8)
    assert (index.lengths.tolist(), index.lengths.dtype) == ([S, 150, 40, 3], jnp.int32)
    assert index.cells is None
    if metric == "ip":
        assert (index.phi.shape, index.phi.dtype) == ((B, K, 2), jnp.float32)
    else:
        assert index.phi is None


@pytest.mark.parametrize("metric", METRICS)
def test_codes_are_the_nearest_centroids_of_every_token(metric):
    """Sinks and window included."""
    key, lengths = random_keys(), np.array([S, S, 170, 30])
    index = build(key, lengths, with_(metric))
    phi = None if index.phi is None else np.asarray(index.phi)
    want, margin = oracle.encode(key, np.asarray(index.codebooks), phi)
    seen = np.broadcast_to(np.arange(S) < lengths[:, None, None, None], margin.shape)
    # Squared distances are below 1000; their float32 evaluation takes under 16 roundings.
    clear = seen & (margin > 16 * 1000 * 2.0**-24)
    assert clear.sum() > 0.97 * seen.sum()
    np.testing.assert_array_equal(np.asarray(index.codes)[clear], want[clear])


@pytest.mark.parametrize("metric", METRICS)
def test_codes_are_those_append_gives(metric):
    key, config = random_keys(), with_(metric)
    index = build(key, [S, 64, 30, 20], config)
    empty = PQIndex(
        codebooks=index.codebooks,
        codes=jnp.zeros_like(index.codes),
        lengths=jnp.zeros(B, jnp.int32),
        phi=index.phi,
    )
    one_by_one = empty
    for t in range(20):
        one_by_one = append(one_by_one, jnp.asarray(key[:, t : t + 1]), config)
    np.testing.assert_array_equal(one_by_one.codes[..., :20], index.codes[..., :20])
    at_once = append(empty, jnp.asarray(key), config)
    for b, length in enumerate([S, 64, 30, 20]):
        np.testing.assert_array_equal(at_once.codes[b, ..., :length], index.codes[b, ..., :length])


@pytest.mark.parametrize("metric", METRICS)
def test_phi_is_the_largest_norm_among_the_trained(metric):
    key, lengths = random_keys(), [S, 50, 50, 20]
    key[:, :OFFSET] *= 100  # sinks are not trained on
    key[1, 50:] *= 100  # past the length
    key[0, 9, 0, 5] = np.inf  # second subspace
    index = build(key, lengths, with_(metric))
    if metric == "euclidean":
        assert index.phi is None
        return
    for b, k, m in np.ndindex(B, K, 2):
        points = training_set(key[b, :, k], lengths[b], m)
        want = np.square(points).sum(-1).max()
        np.testing.assert_allclose(index.phi[b, k, m], want, rtol=1e-6)


def test_centroids_of_the_inner_product_metric_have_about_the_norm_phi():
    """Training keys are augmented to norm phi exactly; a mean of some is at most as long."""
    index = build(random_keys(), [S] * B, with_("ip"))
    norms = np.square(np.asarray(index.codebooks, np.float64)).sum(-1)
    phi = np.asarray(index.phi, np.float64)[..., None]
    assert (norms <= phi * (1 + 1e-5)).all()
    assert np.median(norms / phi) > 0.8
    assert (np.asarray(index.codebooks)[..., -1] >= 0).all()


def test_the_same_seed_gives_the_same_index_and_another_seed_another():
    key, lengths = random_keys(), [S, 150, 150, 30]
    first = build(key, lengths, seed=7)
    check_same(build(key, lengths, seed=7), first)
    default = build(key, lengths)
    assert (default.codebooks != first.codebooks).any()
    check_same(build(key, lengths, seed=0), default)


@pytest.mark.parametrize("metric", METRICS)
def test_rows_of_one_batch_equal_rows_alone(metric):
    key, lengths, config = random_keys(), np.array([S, 131, 40, 9]), with_(metric)
    together = build(key, lengths, config)
    for row in range(B):
        alone = build(key[row : row + 1], lengths[row : row + 1], config)
        check_same_row(alone, 0, together, row, lengths[row])


@pytest.mark.parametrize(
    "setting",
    [
        functools.partial(jax.default_prng_impl, "rbg"),
        functools.partial(jax.default_prng_impl, "unsafe_rbg"),
        functools.partial(jax.threefry_partitionable, False),
    ],
    ids=["rbg", "unsafe_rbg", "not partitionable"],
)
def test_random_numbers_follow_no_setting_of_jax(setting):
    """Some generators draw all rows' numbers from the key of the first."""
    key, lengths = random_keys(), [S, 131, 40, 9]
    with setting():
        together, alone = train(key, lengths), train(key[1:], lengths[1:])
    np.testing.assert_array_equal(alone, together[1:])
    np.testing.assert_array_equal(together, build(key, lengths).codebooks)


@pytest.mark.parametrize("some", ["random", "rare"])
def test_a_heads_codebooks_do_not_depend_on_the_other_heads(some):
    key = random_keys() if some == "random" else rare_keys((B, S, K, H), 40)
    lengths = [S, 131, 40, 9]
    together = train(key, lengths)
    for head in range(K):
        alone = train(key[:, :, head : head + 1], lengths, first_head=head)
        np.testing.assert_array_equal(alone[:, 0], together[:, head])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("garbage", [np.nan, 1e30])
def test_padding_has_no_influence(garbage, metric):
    key, lengths, config = random_keys(), np.array([S - 1, 131, 12, 2]), with_(metric)
    want = build(key, lengths, config)
    for row, length in enumerate(lengths):
        key[row, length:] = garbage
    got = build(key, lengths, config)
    for row, length in enumerate(lengths):
        check_same_row(got, row, want, row, length)


def test_sinks_are_not_trained_on():
    key, lengths = random_keys(), [S, 150, 40, 20]
    want = build(key, lengths).codebooks
    key[:, :OFFSET] = 77
    np.testing.assert_array_equal(build(key, lengths).codebooks, want)
    key[:, OFFSET] = 77
    assert (build(key, lengths).codebooks != want).any(axis=(1, 2, 3, 4)).all()


@pytest.mark.parametrize("sizes", [(3, 11), (11, 0)])
def test_training_starts_at_init_offset(sizes):
    """Not at the end of the sinks: five keys from there on are the whole codebook."""
    sink_size, init_offset = sizes
    key = random_keys()
    config = with_(sink_size=sink_size, init_offset=init_offset)
    index = build(key, [init_offset + 5] * B, config)
    for b, k, m in np.ndindex(B, K, 2):
        points = training_set(key[b, :, k], init_offset + 5, m, first=init_offset)
        centroids = np.asarray(index.codebooks[b, k, m], np.float64)
        assert {tuple(c) for c in centroids} == {tuple(p) for p in points}


def test_both_layouts():
    key, lengths = jnp.asarray(random_keys()), [S, 150, 40, 20]
    want = build(key, lengths)
    check_same(build(key, lengths, kv_layout="BSKH"), want)
    check_same(build(key.swapaxes(1, 2), lengths, kv_layout="BKSH"), want)


def test_lengths_are_clipped():
    key = random_keys()
    got = build(key, [S + 1, 2**31 - 1, -1, -(2**31)])
    want = build(key, [S, S, 0, 0])
    assert got.lengths.tolist() == [S, S, 0, 0]
    np.testing.assert_array_equal(got.codebooks, want.codebooks)
    np.testing.assert_array_equal(got.codes[:2], want.codes[:2])


def test_fewer_keys_than_centroids_become_the_codebook():
    key, trained = random_keys(), [1, 2, 5, C - 1]
    index = build(key, [OFFSET + count for count in trained])
    for b, k, m in np.ndindex(B, K, 2):
        length = OFFSET + trained[b]
        points = training_set(key[b, :, k], length, m)
        centroids = np.asarray(index.codebooks[b, k, m], np.float64)
        assert {tuple(c) for c in centroids} == {tuple(p) for p in points}
        quantized = centroids[np.asarray(index.codes[b, k, m, OFFSET:length])]
        np.testing.assert_array_equal(quantized, points)


@pytest.mark.parametrize("metric", METRICS)
def test_no_keys_to_train_on_give_zeros(metric):
    lengths = [0, 1, OFFSET - 1, OFFSET]
    index = build(random_keys(), lengths, with_(metric))
    assert (np.asarray(index.codebooks) == 0).all()
    assert index.lengths.tolist() == lengths
    for b, length in enumerate(lengths):
        assert (np.asarray(index.codes[b, ..., :length]) == 0).all()


def test_as_many_keys_as_centroids_are_all_kept():
    key = random_keys()
    index = build(key, [OFFSET + C] * B)
    for b, k, m in np.ndindex(B, K, 2):
        points = training_set(key[b, :, k], OFFSET + C, m)
        centroids = np.asarray(index.codebooks[b, k, m], np.float64)
        np.testing.assert_array_equal(
            centroids[np.lexsort(centroids.T)], points[np.lexsort(points.T)]
        )


@pytest.mark.parametrize("metric", METRICS)
def test_constant_keys(metric):
    """A mean of equal numbers is that number, up to XLA's division, which rounds twice."""
    index = build(np.full((B, S, K, H), 4.0, np.float32), [S, 100, 20, 4], with_(metric))
    np.testing.assert_allclose(np.asarray(index.codebooks)[..., :4], 4.0, rtol=2.0**-23)
    if metric == "ip":
        np.testing.assert_array_equal(np.asarray(index.codebooks)[..., 4], 0.0)
    for b, length in enumerate([S, 100, 20, 4]):
        codes = np.asarray(index.codes[b, ..., :length])
        assert (codes == codes[..., :1]).all()


def test_few_distinct_keys_are_quantized_without_error():
    rng = np.random.default_rng(0)
    distinct = rng.integers(-64, 64, (5, K, H)).astype(np.float32)
    key = distinct[rng.integers(0, 5, (B, S))]
    index = build(key, [S] * B)
    for b, k, m in np.ndindex(B, K, 2):
        centroids = np.asarray(index.codebooks[b, k, m], np.float64)
        quantized = centroids[np.asarray(index.codes[b, k, m])]
        # Sums of equal integers are exact; XLA's division rounds twice.
        want = key[b, :, k].reshape(S, 2, 4)[:, m]
        np.testing.assert_allclose(quantized, want, rtol=2.0**-23)


@pytest.mark.parametrize("metric", METRICS)
def test_non_finite_subvectors_are_not_trained_on_and_get_code_0(metric):
    config = with_(metric)
    key = random_keys()
    bad = key.copy()
    # Token 10 loses both subspaces of kv head 0, token 20 the second one, token 30 the first one.
    bad[:, 10, 0], bad[:, 20, 0, 6], bad[:, 30, 0, 1] = np.nan, np.inf, -np.inf
    index = build(bad, [S] * B, config)
    finite = np.isfinite(bad).reshape(B, S, K, 2, 4).all(-1).transpose(0, 2, 3, 1)
    codes = np.asarray(index.codes)
    assert (codes[~finite] == 0).all()
    assert np.isfinite(np.asarray(index.codebooks)).all()
    # The other coordinates of a bad subvector cannot matter either.
    bad[:, 20, 0, 4:] = np.nan
    bad[:, 30, 0, :4] = np.nan
    check_same(build(bad, [S] * B, config), index)
    phi = None if index.phi is None else np.asarray(index.phi)
    want, margin = oracle.encode(bad, np.asarray(index.codebooks), phi)
    clear = margin > 16 * 1000 * 2.0**-24
    np.testing.assert_array_equal(codes[clear], want[clear])
    # The other kv head is as if nothing had happened.
    clean = build(key, [S] * B, config)
    np.testing.assert_array_equal(index.codebooks[:, 1], clean.codebooks[:, 1])


@pytest.mark.parametrize("metric", METRICS)
def test_keys_too_long_for_float32s_products_are_not_trained_on(metric):
    key, config = random_keys(), with_(metric)
    key[:, 10] = np.nan
    want = build(key, [S] * B, config)
    key[:, 10] = np.sqrt(2.0**122)  # four of it square to 2**124
    assert (build(key, [S] * B, config).codebooks != want.codebooks).any()
    key[:, 10] *= 1.001
    np.testing.assert_array_equal(build(key, [S] * B, config).codebooks, want.codebooks)


def test_only_non_finite_keys_give_zeros():
    lengths = [S, S, 20, 4]
    index = build(np.full((B, S, K, H), np.nan, np.float32), lengths)
    assert (np.asarray(index.codebooks) == 0).all()
    for b, length in enumerate(lengths):
        assert (np.asarray(index.codes[b, ..., :length]) == 0).all()


def test_non_finite_keys_count_as_missing():
    """More keys than centroids, of which too few are finite."""
    key = np.full((B, S, K, H), np.inf, np.float32)
    good = np.arange(5 * H, dtype=np.float32).reshape(5, H)
    key[:, [4, 11, 30, 31, 59]] = good[:, None]
    index = build(key, [60] * B)
    for b, k, m in np.ndindex(B, K, 2):
        centroids = np.asarray(index.codebooks[b, k, m])
        assert {tuple(c) for c in centroids} == {tuple(p[4 * m : 4 * m + 4]) for p in good}


def total_inertia(key, index):
    return [
        inertia(training_set(key[b, :, k], key.shape[1], m), np.asarray(index.codebooks[b, k, m]))
        for b, k, m in np.ndindex(*index.codebooks.shape[:3])
    ]


def test_more_iterations_fit_better():
    key, error = random_keys(), []
    for iterations in (1, 25):
        index = build(key, [S] * B, with_(kmeans_iters=iterations))
        error.append(sum(total_inertia(key, index)))
    assert error == sorted(error, reverse=True)
    assert error[-1] < 0.95 * error[0]


@pytest.mark.parametrize("num_bits", [5])
def test_the_fit_is_that_of_textbook_lloyd(num_bits):
    """On average over 32 codebooks; a single one may start badly in either version."""
    key = random_keys(B=8, S=600, seed=3)
    index = build(key, [600] * 8, with_(num_bits=num_bits))
    ours = np.array(total_inertia(key, index))
    rng = np.random.default_rng(0)
    textbook = []
    for b, k, m in np.ndindex(8, K, 2):
        points = training_set(key[b, :, k], 600, m)
        runs = [inertia(points, lloyd(points, 2**num_bits, 10, rng)) for _ in range(3)]
        textbook.append(np.mean(runs))
    ratio = ours / textbook
    assert abs(np.median(ratio) - 1) < 0.03
    assert abs(np.mean(ratio) - 1) < 0.05


def test_empty_clusters_take_up_other_keys():
    """Half of the keys are one point: without that, each second start dies there."""
    rng = np.random.default_rng(1)
    key = rng.standard_normal((B, 259, K, H)).astype(np.float32)
    key[:, OFFSET::2] = 0.5
    index = build(key, [259] * B, with_(num_bits=6))
    for b, k, m in np.ndindex(B, K, 2):
        points = training_set(key[b, :, k], 259, m)
        stuck = lloyd(points, 64, 10, rng)
        assert len(np.unique(np.square(points[:, None] - stuck).sum(-1).argmin(-1))) < 50
        assert len(np.unique(index.codes[b, k, m, OFFSET:])) == 64


def rare_keys(shape, distinct, seed=0):
    """Keys of integers, all of them one but for `distinct` - 1 others, each in one place."""
    batch, tokens, heads, size = shape
    rng = np.random.default_rng(seed)
    points = rng.integers(-64, 64, (batch, distinct, heads, size)).astype(np.float32)
    which = np.zeros((batch, tokens), int)
    for row in which:
        row[OFFSET + rng.choice(tokens - OFFSET, distinct - 1, replace=False)] = range(1, distinct)
    return np.take_along_axis(points, which[:, :, None, None], axis=1)


@pytest.mark.parametrize("metric", METRICS)
def test_rare_keys_are_quantized_without_error(metric):
    """Starts are drawn from 4096 keys, of which all but 19 are equal."""
    key = rare_keys((2, 4096, 1, H), 20)
    index = build(key, [4096] * 2, with_(metric, num_bits=6))
    for b, m in np.ndindex(2, 2):
        points = key[b, :, 0].reshape(4096, 2, 4)[:, m]
        quantized = np.asarray(index.codebooks)[b, 0, m][np.asarray(index.codes)[b, 0, m], :4]
        np.testing.assert_allclose(quantized, points, rtol=2.0**-22)


@pytest.mark.parametrize("metric", METRICS)
def test_what_empty_clusters_take_up_depends_on_their_row_alone(metric):
    key, lengths, config = rare_keys((B, S, K, H), 40), [S, S, S - 9, 70], with_(metric)
    together = build(key, lengths, config)
    for row in range(B):
        alone = build(key[row : row + 1], lengths[row : row + 1], config)
        check_same_row(alone, 0, together, row, lengths[row])
    longer = np.pad(key, ((0, 0), (0, 50), (0, 0), (0, 0)), constant_values=np.nan)
    longer = build(longer, lengths, config)
    np.testing.assert_array_equal(longer.codebooks, together.codebooks)
    head_major = build(key.swapaxes(1, 2), lengths, config, kv_layout="BKSH")
    check_same(head_major, together)


def test_heads_and_subspaces_draw_different_random_numbers():
    """Equal keys in every head and subspace still start from different tokens."""
    part = random_keys()[:, :, :1, :4]
    index = build(np.tile(part, (1, 1, K, 2)), [S] * B)
    books = np.asarray(index.codebooks)[0].reshape(2 * K, C, 4)
    assert len({book.tobytes() for book in books}) == 2 * K
