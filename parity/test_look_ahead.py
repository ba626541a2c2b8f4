"""Codebooks of keys and of copies turned further on, against float64 turns and explicit copies."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_indexer import (
    IndexerConfig,
    Rope,
    append,
    build_index,
    empty_cache,
    prefill,
    rebuild,
    rebuild_gain,
    reference,
)
from jax_indexer.kernels import backend, centroid_sums
from jax_indexer.kernels.tuning import H100
from jax_indexer.layout import dimension_of
from jax_indexer.rope import LookAhead, positions_on, turned
from parity.test_kernels import each, run  # noqa: F401  (run is a fixture)

SMALL_PARTS = dataclasses.replace(H100, tokens_per_part=128)
PAIRS = ["half", "interleaved"]


def rotated(x, position, rope):
    """Vectors [..., H] as RoPE turns them at some positions, pair by pair, in float64."""
    out, half = np.array(x, np.float64), rope.dimensions // 2
    for i, frequency in enumerate(rope.frequencies):
        a, b = (2 * i, 2 * i + 1) if rope.pairs == "interleaved" else (i, i + half)
        cos, sin = np.cos(position * frequency), np.sin(position * frequency)
        out[..., a], out[..., b] = (
            x[..., a] * cos - x[..., b] * sin,
            x[..., a] * sin + x[..., b] * cos,
        )
    return out


@pytest.mark.parametrize("dimensions", [12, 8])
@pytest.mark.parametrize("pairs", PAIRS)
def test_a_copy_is_what_the_key_would_be_further_on(pairs, dimensions):
    """Of heads that turn altogether or in part, by millions of positions too."""
    rope = Rope.from_base(1000.0, dimensions, pairs)
    ahead = LookAhead(rope, horizon=500, copies=2)
    rng = np.random.default_rng(0)
    content, position = rng.standard_normal((40, 12)), np.arange(40)
    on = rng.integers(-(10**6), 10**6, 40)
    keys = rotated(content, position, rope)
    got = turned(jnp.asarray(keys, jnp.float32), jnp.asarray(on, jnp.int32), ahead)
    # Speeds are good to 2**-33 of a full turn.
    np.testing.assert_allclose(got, rotated(content, position + on, rope), rtol=0, atol=3e-3)
    near = turned(jnp.asarray(keys, jnp.float32), jnp.asarray(on % 1000, jnp.int32), ahead)
    np.testing.assert_allclose(near, rotated(content, position + on % 1000, rope), atol=1e-5)


@pytest.mark.parametrize("copies", [1, 3, 8])
@pytest.mark.parametrize("stride", [1, 7])
def test_copies_are_spread_evenly_over_the_positions_to_come(stride, copies):
    """Those of any stretch of tokens, and those of each."""
    first, length, horizon = 100, 40_000, 1024
    ahead = LookAhead(Rope((1.0,)), horizon, copies, begin=3)
    place = np.arange(4096)
    i = jnp.asarray(3 + place, jnp.int32)
    far, apart = jnp.int32([length - first]), jnp.int32([stride])
    on = np.stack([positions_on(i, far, apart, copy, ahead) for copy in range(copies)])
    to = first + stride * place + on
    assert to.min() == length
    assert to.max() == length + horizon - 1
    for of_copy in to:
        for start in (0, 1000, 4096 - 256):
            found = np.bincount((of_copy[start : start + 256] - length) // 16, minlength=64)
            assert found.min() >= 2
            assert found.max() <= 7
    gaps = np.diff(np.sort(to, axis=0), axis=0)
    assert (gaps >= horizon // copies - 1).all()


def test_places_wrap_around_as_integers_of_32_bits_do():
    place = np.asarray([0, 1, 2**16, 2**31 - 1 - 5], np.int64)
    ahead = LookAhead(Rope((1.0,)), 2**20, 1)
    zero = jnp.zeros(1, jnp.int32)
    got = positions_on(jnp.asarray(place, jnp.int32), zero, zero, 0, ahead)
    want = (place * 2654435769 % 2**32 >> 8) / 2**24 * 2**20
    np.testing.assert_allclose(got, want, atol=1)


# (S, K, M, D, C, dtype, metric, layout, grouping, pairs)
CASES = [
    (300, 2, 2, 4, 16, "float32", "euclidean", "BSKH", "contiguous", "half"),
    (129, 1, 3, 6, 5, "bfloat16", "euclidean", "BKSH", "strided", "interleaved"),
    (140, 1, 2, 8, 8, "float16", "ip", "BSKH", "contiguous", "interleaved"),
    (131, 2, 4, 2, 4, "float32", "ip", "BKSH", "strided", "half"),
]


@each(CASES, checked=[CASES[0], CASES[3]])
def test_sums_are_those_of_keys_and_their_copies(run, case):  # noqa: F811
    S, K, M, D, C, dtype, metric, layout, grouping, pairs = case
    H, B = M * D, 2
    rng = np.random.default_rng(S)
    dtype = jnp.dtype(dtype)
    key = rng.standard_normal((B, S, K, H)).astype(dtype)
    key[0, 7, 0, 1] = np.inf  # neither it nor a copy is trained on
    key[0, 9, 0, :2] = jnp.finfo(dtype).max  # copies of it might be infinite
    rope = Rope.from_base(100.0, H - 2, pairs)  # the last two dimensions do not turn
    ahead = LookAhead(rope, horizon=300, copies=2, begin=5)
    distance, stride = np.asarray([S - 5, 2 * S], np.int32), np.asarray([1, 2], np.int32)
    i, far, apart = np.arange(S, dtype=np.int32)[None], distance[:, None], stride[:, None]
    turns = [positions_on(*map(jnp.asarray, (i, far, apart)), copy, ahead) for copy in range(2)]
    copies = [np.asarray(turned(jnp.asarray(key), on[..., None], ahead)) for on in turns]
    partner = rope.partner(np.arange(H))
    most = np.square(key, dtype=np.float64) + np.square(key[..., partner], dtype=np.float64)
    everything = np.stack([key.astype(np.float32), *copies])  # [copies, B, S, K, H]
    h = dimension_of(np.arange(M)[:, None], np.arange(D)[None], M, D, grouping)
    parts = everything[..., h].astype(np.float64).transpose(1, 3, 4, 0, 2, 5)  # [B, K, M, n, S, D]
    norm = np.square(parts).sum(-1)
    # Copies, where key and partners are small enough.
    most = most[..., h].sum(-1).transpose(0, 2, 3, 1)[:, :, :, None]
    limit = min(2.0**124, float(jnp.finfo(dtype).max) ** 2)
    trained = np.isfinite(norm) & (norm <= 2.0**124)
    trained[:, :, :, 1:] &= most <= limit
    trainable = trained[:, :, :, 0] & (rng.random((B, K, M, S)) < 0.9)
    stop = np.full((B, K, M), S, np.int32)
    stop[1] = S - 9
    trainable[1, ..., S - 9 :] = False
    trained &= trainable[:, :, :, None]
    centroids = rng.standard_normal((B, K, M, C, D)).astype(np.float32)
    phi = origin = None
    if metric == "ip":
        phi = np.where(trained, norm, 0).max((-1, -2)).astype(np.float32)
        gap = np.sqrt(np.maximum(phi[..., None, None] - np.where(trained, norm, 0), 0))
        parts = np.concatenate([parts, gap[..., None]], axis=-1)
        centroids = np.concatenate([centroids, rng.random((B, K, M, C, 1))], -1).astype(np.float32)
    origin = np.zeros((B, K, M, centroids.shape[-1]), np.float32)
    laid = key if layout == "BSKH" else key.swapaxes(1, 2)
    arrays = laid, trainable, centroids, origin, phi, stop, distance, stride
    options = {"kv_layout": layout, "grouping": grouping, "ahead": ahead}

    def check(sums, nearest):
        sums, nearest = np.asarray(sums, np.float64), np.asarray(nearest)
        assert nearest.shape == (B, K, M, 3, S)
        for b, k, m in np.ndindex(B, K, M):
            taken = trained[b, k, m]
            points, own = parts[b, k, m][taken], nearest[b, k, m][taken]
            distance = np.square(points[:, None] - centroids[b, k, m]).sum(-1)
            chosen = np.take_along_axis(distance, own[:, None].astype(int), 1)[:, 0]
            assert (chosen <= distance.min(-1) + 2e-3 * (1 + distance.max(-1))).all()
            want = np.zeros((C, points.shape[1] + 1))
            np.add.at(want, own, np.concatenate([points, np.ones((len(points), 1))], axis=-1))
            # A copy may be rounded to the neighbour of the key's dtype, and what is left of phi is
            # the root of a difference.
            slack = float(jnp.finfo(dtype).eps) * len(points) + 1e-3 * (metric == "ip")
            np.testing.assert_allclose(sums[b, k, m], want, rtol=1e-4, atol=1e-4 + slack)

    check(*run(centroid_sums.centroid_sums, *arrays, **options, tuning=SMALL_PARTS))
    if run.name == "interpreter":
        check(*jax.jit(lambda *x: reference.assign_and_sum(*x, **options))(*arrays))


B, S, K, H, PROMPT = 2, 700, 1, 16, 200
CONFIG = IndexerConfig(num_bits=4, sink_size=4, window_size=4, heavy_size=8)
ROPE = Rope.from_base(10_000.0, H, "interleaved")
AHEAD = {"rope": ROPE, "look_ahead": S - PROMPT}


@pytest.fixture(params=["xla", "kernels", pytest.param("triton", marks=pytest.mark.gpu)])
def on(request):
    """The implementation that trains."""
    if request.param != "kernels":
        yield request.param
        return
    with backend.interpreted():
        yield "triton"


def turning_keys(seed=0):
    """Twelve contents and noise, each turned by its position."""
    rng = np.random.default_rng(seed)
    contents = 2 * rng.standard_normal((12, K, H))
    content = contents[rng.integers(0, 12, (B, S))] + 0.2 * rng.standard_normal((B, S, K, H))
    keys = rotated(content, np.arange(S)[None, :, None], ROPE)
    return jnp.asarray(keys, jnp.float32)


def error(key, index, first):
    """Mean squared errors of what is encoded from some position on, of each subspace."""
    parts = np.asarray(key).reshape(B, S, K, 2, -1).transpose(0, 2, 3, 1, 4)[..., first:, :]
    codes = np.asarray(index.codes)[..., first:, None].astype(int)
    return np.square(parts - np.take_along_axis(np.asarray(index.codebooks), codes, -2)).mean(
        (0, 1, 3, 4)
    )


def test_codebooks_fit_the_keys_to_come(on):
    key, lengths = turning_keys(), jnp.full(B, PROMPT, jnp.int32)

    def decoded(**options):
        index = build_index(key, lengths, CONFIG, implementation=on, **options)
        rest = append(index, key[:, PROMPT:], CONFIG, implementation=on)
        return error(key, rest, PROMPT)

    # The first subspace has the fast pairs, which go round in a prompt, the second the slow ones.
    fast, slow = decoded(**AHEAD) / decoded()
    assert fast < 1.1
    assert slow < 0.6
    np.testing.assert_array_equal(decoded(**AHEAD), decoded(**AHEAD, copies=2))
    assert (decoded(**AHEAD) != decoded(**AHEAD, copies=3)).all()


def test_a_row_is_trained_alike_alone_and_with_a_larger_capacity(on):
    key, lengths = turning_keys(), jnp.asarray([PROMPT, 90], jnp.int32)
    options = {**AHEAD, "implementation": on}
    both = build_index(key, lengths, CONFIG, **options)
    alone = build_index(key[1:, :300], lengths[1:], CONFIG, **options)
    np.testing.assert_array_equal(both.codebooks[1:], alone.codebooks)
    again = rebuild(both, key, CONFIG, jnp.asarray([False, True]), **options)
    jax.tree.map(np.testing.assert_array_equal, again, both)
    # It is what training leaves, of keys and copies: an iteration more removes little.
    gain = np.asarray(rebuild_gain(both, key, CONFIG, **options))
    assert (gain < 0.02).all()
    assert (np.asarray(rebuild_gain(both, key, CONFIG, implementation=on)) > gain).all()


@pytest.mark.parametrize("ahead", [{}, AHEAD], ids=["", "ahead"])
@pytest.mark.parametrize("sample", [PROMPT - 4, 60])
def test_a_sample_of_all_keys_is_all_keys(sample, ahead):
    """Whatever the capacity: of rows that have as many keys as are sampled, and of longer ones."""
    config = dataclasses.replace(CONFIG, train_tokens=sample)
    key = turning_keys().at[:, 20:90].set(1.0)  # equal keys leave clusters empty
    lengths = jnp.full(B, PROMPT, jnp.int32)
    got = [build_index(key[:, :size], lengths, config, **ahead) for size in (PROMPT, S)]
    np.testing.assert_array_equal(got[0].codebooks, got[1].codebooks)


@pytest.mark.parametrize("number", [1, 4, 5, 8])
def test_a_row_of_few_keys_has_these_as_centroids(number):
    lengths = jnp.full(B, 4 + number, jnp.int32)
    key = turning_keys()
    index = build_index(key, lengths, CONFIG, **AHEAD, copies=3)
    plain = build_index(key, lengths, CONFIG)
    np.testing.assert_array_equal(index.codebooks, plain.codebooks)


def test_a_prompt_gets_them_too():
    key, lengths = turning_keys().astype(jnp.bfloat16)[:, :PROMPT], jnp.full(B, PROMPT, jnp.int32)
    want = build_index(key, lengths, CONFIG, **AHEAD, copies=2)
    cache = empty_cache(CONFIG, B, S, K, H)
    for found in (
        prefill(key, key, lengths, CONFIG, **AHEAD, copies=2),
        prefill(key, key, lengths, CONFIG, cache=cache, **AHEAD, copies=2),
    ):
        np.testing.assert_array_equal(found.index.codebooks, want.codebooks)
        np.testing.assert_array_equal(found.index.codes[..., :PROMPT], want.codes)


def test_a_sample_and_the_inner_product_metric_take_copies_too():
    config = dataclasses.replace(CONFIG, metric="ip", train_tokens=100, grouping="strided")
    key, lengths = turning_keys(), jnp.full(B, PROMPT, jnp.int32)
    key = key.at[0, 50, 0, 3].set(jnp.nan)  # its pair lies in the other subspace
    plain = build_index(key, lengths, config)
    index = build_index(key, lengths, config, **AHEAD)
    assert np.isfinite(index.codebooks).all()
    # A subspace has one of each pair: turned, it may be as long as both.
    assert (np.asarray(index.phi) >= np.asarray(plain.phi)).all()
    assert (np.asarray(index.phi) > np.asarray(plain.phi)).any()


BAD = [
    ({"rope": 10_000.0, "look_ahead": 5}, "rope", "Rope", "float"),
    ({"look_ahead": 5}, "rope", "Rope", "NoneType"),
    ({"rope": ROPE}, "look_ahead", "integer", "None"),
    ({"rope": ROPE, "look_ahead": 0}, "look_ahead", "1 to", "0"),
    ({"rope": ROPE, "look_ahead": 2.5}, "look_ahead", "integer", "2.5"),
    ({"rope": ROPE, "look_ahead": True}, "look_ahead", "integer", "True"),
    ({"rope": ROPE, "look_ahead": 5, "copies": 0}, "copies", "1 to 8", "0"),
    ({"copies": 9}, "copies", "1 to 8", "9"),
    ({"rope": ROPE, "look_ahead": 5, "copies": 9}, "copies", "1 to 8", "9"),
    ({"rope": Rope.from_base(1e4, H + 2), "look_ahead": 5}, "rope", "H/2=8", "9"),
]


@pytest.mark.parametrize(("options", "name", "expected", "got"), BAD)
def test_a_wrong_argument_is_named(options, name, expected, got, compilations):
    key, lengths = jnp.zeros((B, S, K, H)), jnp.zeros(B, jnp.int32)
    index = build_index(key, lengths, CONFIG)
    rows, before = jnp.ones(B, bool), compilations()
    for call in (
        lambda: build_index(key, lengths, CONFIG, **options),
        lambda: prefill(key, key, lengths, CONFIG, **options),
        lambda: rebuild(index, key, CONFIG, rows, **options),
        lambda: rebuild_gain(index, key, CONFIG, **options),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: expected .*{expected}.*, got .*{got}.*; "):
            call()
    assert compilations() == before


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (((),), "frequencies"),
        (((1.0, np.nan),), "frequencies"),
        (("base",), "frequencies"),
        ((np.ones((2, 2)),), "frequencies"),
        ((np.array([1j]),), "frequencies"),
        (((1.0,), "halves"), "pairs"),
        (((1.0,), None), "pairs"),
    ],
)
def test_a_rope_that_is_none_is_refused(arguments, name):
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        Rope(*arguments)


def test_ropes_of_equal_numbers_are_one_static_argument():
    same = {Rope((1.0, 0.5)), Rope(np.asarray([1, 0.5])), Rope(jnp.asarray([1, 0.5]))}
    assert len(same) == 1
    assert Rope.from_base(4.0, 4, "interleaved") == Rope((1.0, 0.5), "interleaved")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [(("x", 8), "base"), ((0.0, 8), "base"), ((-1.0, 8), "base"), ((1e4, 7), "head_dim"),
     ((1e4, None), "head_dim"), ((1e4, 0), "head_dim")],
)  # fmt: skip
def test_a_base_that_is_none_is_refused(arguments, name):
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got .*; "):
        Rope.from_base(*arguments)


def test_frequencies_that_are_only_traced_are_refused():
    with pytest.raises(ValueError, match=r"^frequencies: expected .*; pass .* outside of jit"):
        jax.jit(lambda x: Rope(x).dimensions * x)(jnp.ones(2))
