"""append: codes against the oracle, and what happens to rows that do not fit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_indexer import IndexerConfig, PQIndex, append, build_index
from parity import oracle
from parity.inputs import Workload, make_inputs

S, H = 40, 12
DTYPES = ["float32", "bfloat16", "float16"]


def config_of(metric="euclidean", **changes):
    return IndexerConfig(num_subspaces=3, num_bits=4, metric=metric, **changes)


def start(lengths, *, metric="euclidean", dtype="float32", integers=6, seed=0, kv_heads=2):
    """An index with codes everywhere, and enough keys [B, S, K, H] to fill it."""
    B = len(lengths)
    workload = Workload(
        name="append", B=B, T=S, N=kv_heads, K=kv_heads, H=H, S=S, L=tuple(lengths), dtype=dtype,
        config=config_of(metric), seed=seed,
    )  # fmt: skip
    inputs = make_inputs(workload, integers=integers)
    index = PQIndex(
        codebooks=jnp.asarray(inputs.codebooks),
        codes=jnp.asarray(inputs.codes),
        lengths=jnp.asarray(inputs.lengths),
        phi=None if inputs.phi is None else jnp.asarray(inputs.phi),
    )
    return index, inputs.key_new


def check_codes(index, codes):
    """Those of the tokens in the cache; the others have no meaning."""
    for b, length in enumerate(np.asarray(index.lengths)):
        np.testing.assert_array_equal(index.codes[b, ..., :length], codes[b, ..., :length])


def check_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_new", [1, 5])
def test_codes_equal_the_oracle(num_new, dtype):
    """Small integers make distances exact and ties common: every code must be the oracle's."""
    lengths = [0, 1, 17, S - num_new]
    index, key = start(lengths, dtype=dtype, integers=2)
    got = append(index, jnp.asarray(key[:, :num_new]), config_of())
    want, margin = oracle.encode(key[:, :num_new], np.asarray(index.codebooks))
    assert (margin == 0).mean() > 0.02, "too few ties to say anything about them"
    codes = np.asarray(index.codes).copy()
    for b, length in enumerate(lengths):
        codes[b, :, :, length : length + num_new] = want[b]
    assert got.lengths.tolist() == [length + num_new for length in lengths]
    check_codes(got, codes)


@pytest.mark.parametrize("codebooks_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_may_differ(dtype, codebooks_dtype):
    index, key = start([0, 7])
    index = PQIndex(
        codebooks=index.codebooks.astype(codebooks_dtype), codes=index.codes, lengths=index.lengths
    )
    got = append(index, jnp.asarray(key[:, :5], dtype), config_of())
    want, _ = oracle.encode(key[:, :5], np.asarray(index.codebooks))
    np.testing.assert_array_equal(got.codes[0, ..., :5], want[0])
    np.testing.assert_array_equal(got.codes[1, ..., 7:12], want[1])


@pytest.mark.parametrize("metric", ["euclidean", "ip"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_of_real_valued_keys_equal_the_oracle_up_to_near_ties(dtype, metric):
    index, key = start([0] * 8, metric=metric, dtype=dtype, integers=None)
    got = append(index, jnp.asarray(key), config_of(metric))
    phi = None if index.phi is None else np.asarray(index.phi)
    want, margin = oracle.encode(key, np.asarray(index.codebooks), phi)
    # Distances are below 100 here; five terms and a square root cost under 16 float32 roundings.
    clear = margin > 16 * 100 * 2.0**-24
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(np.asarray(got.codes)[clear], want[clear])


def test_the_inner_product_metric_uses_the_extra_coordinate():
    """The shorter centroid is nearer in the real dimensions; phi says the key lacks length."""
    config = IndexerConfig(num_subspaces=1, num_bits=1, metric="ip")
    index = PQIndex(
        codebooks=jnp.asarray([[[[[1.0, 0.0], [2.0, 3.0]]]]]),
        codes=jnp.zeros((1, 1, 1, 4), jnp.uint8),
        lengths=jnp.zeros(1, jnp.int32),
        phi=jnp.full((1, 1, 1), 10.0),
    )
    # 1 and its extra coordinate 3: at distance 9 from (1, 0), and 1 from (2, 3).
    # 5 is past phi, its extra coordinate 0: at distance 16 from (1, 0), and 18 from (2, 3).
    got = append(index, jnp.asarray([1.0, 5.0]).reshape(1, 2, 1, 1), config)
    assert got.codes.ravel()[:2].tolist() == [1, 0]


def test_ties_go_to_the_lower_centroid():
    index, key = start([0, 0])
    same = jnp.broadcast_to(index.codebooks[:, :, :, :1], index.codebooks.shape)
    same = same.at[:, :, :, 4:].set(index.codebooks[:, :, :, 4:5])
    got = append(
        PQIndex(codebooks=same, codes=index.codes, lengths=index.lengths), key, config_of()
    )
    want, _ = oracle.encode(key, np.asarray(same))
    assert set(np.unique(got.codes)) == {0, 4}
    np.testing.assert_array_equal(got.codes, want)


def near_ties(metric="euclidean"):
    """Centroids in pairs one float apart, so that any change in the order of a sum shows.

    For the inner-product metric pairs lie on both sides of a key's extra coordinate, whose last
    bits come from the order in which the key's norm is added.
    """
    if metric == "euclidean":
        index, key = start([0, 0], integers=None)
        codebooks = np.array(index.codebooks)
        codebooks[..., 1::2, :] = np.nextafter(codebooks[..., ::2, :], np.float32(9))
        codebooks = jnp.asarray(codebooks)
        return (
            PQIndex(codebooks=codebooks, codes=jnp.zeros_like(index.codes), lengths=index.lengths),
            key,
            config_of(),
        )
    rng = np.random.default_rng(0)
    shape = B, K, M, C, D = 2, 2, 4, 16, 8
    key = rng.standard_normal((B, S, K, M * D)).astype(np.float32)
    codebooks = np.zeros((*shape[:-1], D + 1), np.float32)
    phi = np.float32(30)
    norms = np.square(key.astype(float).reshape(B, S, K, M, D)).sum(-1)
    # One pair a key for the first C / 2 of them.
    extra = np.sqrt(phi - norms[:, : C // 2]).transpose(0, 2, 3, 1)
    codebooks[..., :-1] = np.repeat(
        key.reshape(B, S, K, M, D)[:, : C // 2].transpose(0, 2, 3, 1, 4), 2, axis=3
    )
    codebooks[..., ::2, -1] = (extra * (1 - 1e-3)).astype(np.float32)
    codebooks[..., 1::2, -1] = (extra * (1 + 1e-3)).astype(np.float32)
    index = PQIndex(
        codebooks=jnp.asarray(codebooks),
        codes=jnp.zeros((B, K, M, S), jnp.uint8),
        lengths=jnp.zeros(B, jnp.int32),
        phi=jnp.full((B, K, M), phi),
    )
    key[:, C // 2 :] = np.resize(key[:, : C // 2], key[:, C // 2 :].shape)
    return index, key, IndexerConfig(num_subspaces=M, num_bits=4, metric="ip")


@pytest.mark.parametrize("metric", ["euclidean", "ip"])
@pytest.mark.parametrize("num_new", [1, 2, 3, 7, 16])
def test_a_key_gets_the_same_code_however_many_are_appended(num_new, metric):
    index, key, config = near_ties(metric)
    whole = append(index, jnp.asarray(key), config)
    grown = index
    for first in range(0, S - num_new + 1, num_new):
        grown = append(grown, jnp.asarray(key[:, first : first + num_new]), config)
    count = int(grown.lengths[0])
    assert count >= S - num_new
    np.testing.assert_array_equal(grown.codes[..., :count], whole.codes[..., :count])


@pytest.mark.parametrize("metric", ["euclidean", "ip"])
def test_a_key_gets_the_same_code_at_any_place(metric):
    """In another batch row, in another kv head, in another batch size, inside another jit."""
    index, key, config = near_ties(metric)
    whole = append(index, jnp.asarray(key), config)
    flip = jax.tree.map(lambda x: x[::-1], index)
    np.testing.assert_array_equal(
        append(flip, jnp.asarray(key[::-1]), config).codes[::-1], whole.codes
    )
    heads = dataclasses.replace(index, codebooks=index.codebooks[:, ::-1])
    np.testing.assert_array_equal(
        append(heads, jnp.asarray(key[:, :, ::-1]), config).codes[:, ::-1], whole.codes
    )
    alone = jax.tree.map(lambda x: x[1:], index)
    for num_new in (1, S):
        for run in (append, jax.jit(append, static_argnames="config")):
            got = run(alone, jnp.asarray(key[1:, :num_new]), config)
            np.testing.assert_array_equal(got.codes[..., :num_new], whole.codes[1:, ..., :num_new])


@pytest.mark.parametrize("metric", ["euclidean", "ip"])
def test_append_after_build_equals_build_of_the_whole(metric):
    """Given the same codebooks: the first tokens' index, grown, has the codes of all tokens."""
    config = config_of(metric, sink_size=2)
    _, key = start([0, 0, 0], metric=metric, integers=None)
    key = jnp.asarray(key)
    first = np.array([30, 25, 9], np.int32)
    index = build_index(key, jnp.asarray(first), config)
    grown = index
    for t in range(6):
        new = jnp.stack([key[b, first[b] + t] for b in range(3)])[:, None]
        grown = append(grown, new, config)
    assert grown.lengths.tolist() == (first + 6).tolist()
    np.testing.assert_array_equal(grown.codebooks, index.codebooks)
    whole = append(
        PQIndex(
            codebooks=index.codebooks,
            codes=jnp.zeros_like(index.codes),
            lengths=jnp.zeros(3, jnp.int32),
            phi=index.phi,
        ),
        key,
        config,
    )
    for b, length in enumerate(first + 6):
        np.testing.assert_array_equal(grown.codes[b, ..., :length], whole.codes[b, ..., :length])


@pytest.mark.parametrize("metric", ["euclidean", "ip"])
def test_non_finite_subvectors_get_code_0(metric):
    index, key = start([0, 0], metric=metric)
    key = key.copy()
    key[0, 0], key[0, 1, 0, 0], key[1, 2, 1, 5], key[1, 3, 0, 11] = np.nan, np.inf, -np.inf, np.nan
    got = append(index, jnp.asarray(key), config_of(metric))
    finite = np.isfinite(key).reshape(2, S, 2, 3, 4).all(-1).transpose(0, 2, 3, 1)
    assert (~finite).sum() == 2 * 3 + 3
    assert (np.asarray(got.codes)[~finite] == 0).all()
    clean = append(index, jnp.asarray(np.where(np.isfinite(key), key, 3)), config_of(metric))
    np.testing.assert_array_equal(np.asarray(got.codes)[finite], np.asarray(clean.codes)[finite])


@pytest.mark.parametrize("jitted", [False, True])
def test_a_row_that_would_pass_the_capacity_keeps_its_state(jitted):
    lengths = [S - 3, S - 2, S - 1, S, 0]
    index, key = start(lengths)
    run = jax.jit(append, static_argnames="config") if jitted else append
    got = run(index, jnp.asarray(key[:, :3]), config_of())
    assert got.lengths.tolist() == [S, S - 2, S - 1, S, 3]
    np.testing.assert_array_equal(got.codes[1:4], index.codes[1:4])
    want, _ = oracle.encode(key[:, :3], np.asarray(index.codebooks))
    np.testing.assert_array_equal(got.codes[0, ..., S - 3 :], want[0])
    np.testing.assert_array_equal(got.codes[0, ..., : S - 3], index.codes[0, ..., : S - 3])


def test_lengths_and_counts_out_of_range_are_clipped():
    """Data is not checked, but it never leads out of bounds."""
    extreme = np.iinfo(np.int32)
    index, key = start([S + 5, extreme.max, -5, extreme.min, 3, 3])
    counts = jnp.asarray([2, 2, 2, 2, -1, extreme.min], jnp.int32)
    got = append(index, jnp.asarray(key[:, :2]), config_of(), counts=counts)
    assert np.clip(got.lengths, 0, S).tolist() == [S, S, 2, 2, 3, 3]
    want, _ = oracle.encode(key[:, :2], np.asarray(index.codebooks))
    np.testing.assert_array_equal(got.codes[:2], index.codes[:2])
    np.testing.assert_array_equal(got.codes[2:4, ..., :2], want[2:4])
    np.testing.assert_array_equal(got.codes[4:, ..., :3], index.codes[4:, ..., :3])


@pytest.mark.parametrize("count", [3, 99, np.iinfo(np.int32).max])
def test_counts_past_the_tokens_given_mean_all_of_them(count):
    index, key = start([S - 3, S - 2])
    got = append(index, jnp.asarray(key[:, :3]), config_of(), counts=jnp.full(2, count, jnp.int32))
    check_same(got, append(index, jnp.asarray(key[:, :3]), config_of()))
    assert got.lengths.tolist() == [S, S - 2]


def test_more_new_tokens_than_capacity():
    """Such as a padded block."""
    index, key = start([0, 5])
    key = np.concatenate([key, key], axis=1)
    got = append(index, jnp.asarray(key), config_of(), counts=jnp.asarray([S, S - 4], jnp.int32))
    assert got.lengths.tolist() == [S, 5]
    want, _ = oracle.encode(key, np.asarray(index.codebooks))
    np.testing.assert_array_equal(got.codes[0], want[0, ..., :S])
    np.testing.assert_array_equal(got.codes[1], index.codes[1])


def test_counts_say_how_many_are_taken():
    lengths, counts = [0, 10, 20, S - 2, S - 1, S], [5, 0, 2, 2, 2, 0]
    index, key = start(lengths)
    got = append(index, jnp.asarray(key[:, :5]), config_of(), counts=jnp.asarray(counts, jnp.int32))
    assert got.lengths.tolist() == [5, 10, 22, S, S - 1, S]
    want, _ = oracle.encode(key[:, :5], np.asarray(index.codebooks))
    codes = np.asarray(index.codes).copy()
    for b in (0, 2, 3):
        codes[b, ..., lengths[b] : lengths[b] + counts[b]] = want[b, ..., : counts[b]]
    check_codes(got, codes)


def test_counts_of_all_tokens_are_the_default():
    index, key = start([0, 7])
    key = jnp.asarray(key[:, :4])
    given = append(index, key, config_of(), counts=jnp.full(2, 4, jnp.int32))
    check_same(given, append(index, key, config_of()))


def test_tokens_past_the_count_have_no_influence():
    index, key = start([3, 4])
    counts = jnp.asarray([2, 1], jnp.int32)
    got = append(index, jnp.asarray(key[:, :4]), config_of(), counts=counts)
    for b in range(2):
        key[b, int(counts[b]) :] = np.nan
    again = append(index, jnp.asarray(key[:, :4]), config_of(), counts=counts)
    assert again.lengths.tolist() == got.lengths.tolist() == [5, 5]
    check_codes(again, got.codes)


def test_both_layouts():
    index, key = start([3, 4])
    key = jnp.asarray(key[:, :4])
    token_major = append(index, key, config_of(), kv_layout="BSKH")
    check_same(append(index, key, config_of()), token_major)
    check_same(append(index, key.swapaxes(1, 2), config_of(), kv_layout="BKSH"), token_major)


def test_everything_but_codes_and_lengths_is_unchanged():
    index, key = start([3, 4], metric="ip")
    got = append(index, jnp.asarray(key[:, :4]), config_of("ip"))
    np.testing.assert_array_equal(got.codebooks, index.codebooks)
    np.testing.assert_array_equal(got.phi, index.phi)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == jax.tree.map(
        lambda x: (x.shape, x.dtype), index
    )
