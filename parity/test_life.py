"""The life of an index: built, grown, reset, rebuilt, stacked, saved; a row never sees another.

On plain XLA, and on the kernels in Pallas's interpreter.
"""

import dataclasses
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_indexer import (
    IndexerConfig,
    PQIndex,
    append,
    build_index,
    indexer_next,
    rebuild,
    rebuild_gain,
    reset,
    select,
)
from jax_indexer.kernels import backend

B, S, K, H, OFFSET, C = 4, 200, 2, 8, 3, 16
CONFIG = IndexerConfig(num_bits=4, heavy_size=6, sink_size=OFFSET, window_size=4)
# Full, partly full, fewer keys to train on than centroids, none.
LENGTHS = np.array([S, 131, OFFSET + 5, 0], np.int32)


@pytest.fixture(scope="module", params=["xla", "kernels"], autouse=True)
def implementation(request):
    """What build_index, append and rebuild run on."""
    if request.param == "xla":
        yield request.param
        return
    # Compiling is most of the interpreter's time.
    jax.config.update("jax_disable_most_optimizations", True)
    with backend.interpreted():
        yield request.param
    jax.config.update("jax_disable_most_optimizations", False)


def random_keys(seed=0, batch=B):
    """Keys with some structure: twelve centres and noise."""
    rng = np.random.default_rng(seed)
    centres = 2 * rng.standard_normal((12, K, H))
    keys = centres[rng.integers(0, 12, (batch, S))] + rng.standard_normal((batch, S, K, H))
    return keys.astype(np.float32)


def build(key, lengths=LENGTHS, config=CONFIG, seed=0):
    return build_index(jnp.asarray(key), jnp.asarray(lengths, jnp.int32), config, seed=seed)


def marks(*rows):
    return jnp.asarray(np.isin(np.arange(B), rows))


def emptied(index):
    """The same codebooks, and nothing encoded."""
    return dataclasses.replace(
        index, codes=jnp.zeros_like(index.codes), lengths=jnp.zeros_like(index.lengths)
    )


def check_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def check_same_rows(got, want, rows=range(B), of=None):
    """Everything with a meaning, of rows `rows` and of rows `of` there: not codes past lengths."""
    for row, other in zip(rows, rows if of is None else of, strict=True):
        np.testing.assert_array_equal(got.lengths[row], want.lengths[other])
        np.testing.assert_array_equal(got.codebooks[row], want.codebooks[other])
        length = int(np.clip(want.lengths[other], 0, S))
        np.testing.assert_array_equal(got.codes[row, ..., :length], want.codes[other, ..., :length])
        if want.phi is not None:
            np.testing.assert_array_equal(got.phi[row], want.phi[other])


# Properties of building and growing.


def test_append_after_build_is_build_of_the_whole_given_the_codebooks():
    key = random_keys()
    first = np.array([150, 60, 9, 0], np.int32)
    index = build(key, first)
    whole = append(emptied(index), jnp.asarray(key), CONFIG)
    check_same_rows(dataclasses.replace(whole, lengths=jnp.asarray(first)), index)
    grown = append(index, jnp.asarray(key[:, :40]), CONFIG, counts=jnp.asarray([40, 3, 0, 1]))
    for row, count in enumerate([40, 3, 0, 1]):
        end = first[row] + count
        assert grown.lengths[row] == end
        np.testing.assert_array_equal(
            grown.codes[row, ..., first[row] : end], whole.codes[row, ..., :count]
        )


def test_permuted_rows_give_permuted_results():
    key, order = random_keys(), np.array([2, 0, 3, 1])
    index = build(key)
    check_same_rows(build(key[order], LENGTHS[order]), index, range(B), order)
    gain = rebuild_gain(index, jnp.asarray(key), CONFIG)
    shuffled = rebuild_gain(
        jax.tree.map(lambda x: x[order], index), jnp.asarray(key[order]), CONFIG
    )
    np.testing.assert_allclose(shuffled, gain[order], rtol=1e-5, atol=1e-6)


def test_garbage_past_the_length_has_no_effect():
    key = random_keys()
    index, gain = build(key), None
    for garbage in (0.0, 1e30, np.inf, np.nan):
        spoiled = key.copy()
        for row, length in enumerate(LENGTHS):
            spoiled[row, length:] = garbage
        check_same_rows(build(spoiled), index)
        check_same_rows(rebuild(index, jnp.asarray(spoiled), CONFIG, marks(0, 1, 2, 3)), index)
        spoiled_gain = np.asarray(rebuild_gain(index, jnp.asarray(spoiled), CONFIG))
        gain = spoiled_gain if gain is None else gain
        np.testing.assert_array_equal(spoiled_gain, gain)


def test_a_sample_of_every_second_token_is_what_is_trained_on():
    config = dataclasses.replace(CONFIG, train_tokens=80)
    key = random_keys()
    spoiled = key.copy()
    stride = -(-(LENGTHS - OFFSET) // 80)  # 3, 2, 1
    assert stride.tolist()[:3] == [3, 2, 1]
    for row in range(3):
        trained = np.arange(S) % max(stride[row], 1) == OFFSET % max(stride[row], 1)
        spoiled[row, ~trained] = 77
    index, other = build(key, config=config), build(spoiled, config=config)
    np.testing.assert_array_equal(other.codebooks, index.codebooks)
    # All tokens are encoded, and a short row is trained on whole.
    whole = append(emptied(index), jnp.asarray(key), config)
    check_same_rows(dataclasses.replace(whole, lengths=index.lengths), index)
    check_same_rows(index, build(key), [2, 3])
    large = dataclasses.replace(CONFIG, train_tokens=S)
    np.testing.assert_array_equal(build(key, config=large).codebooks, build(key).codebooks)


# Rows that start, end and restart.


@pytest.mark.parametrize("metric", ["euclidean", "ip"])
def test_a_rebuilt_row_is_a_built_one_and_the_others_keep_every_bit(metric):
    config = dataclasses.replace(CONFIG, metric=metric)
    index = build(random_keys(), config=config)
    later, lengths = random_keys(seed=1), np.array([S, 77, S, 40], np.int32)
    want = build(later, lengths, config, seed=5)
    rows = marks(1, 3)
    got = rebuild(index, jnp.asarray(later), config, rows, lengths=jnp.asarray(lengths), seed=5)
    check_same_rows(got, want, [1, 3])
    kept = np.array([0, 2])
    check_same(jax.tree.map(lambda x: x[kept], got), jax.tree.map(lambda x: x[kept], index))


def test_rebuild_keeps_the_length_unless_told():
    index = build(random_keys(), [S, 100, 50, 10])
    later = random_keys(seed=1)
    got = rebuild(index, jnp.asarray(later), CONFIG, marks(0, 1, 2, 3))
    check_same_rows(got, build(later, [S, 100, 50, 10]))
    head_major = jnp.asarray(later).swapaxes(1, 2)
    check_same(rebuild(index, head_major, CONFIG, marks(0, 1, 2, 3), kv_layout="BKSH"), got)


def test_no_row_marked_changes_nothing():
    index = build(random_keys())
    odd = dataclasses.replace(index, lengths=jnp.asarray([-5, S + 9, 0, 7], jnp.int32))
    key = jnp.full((B, S, K, H), jnp.nan, jnp.float32)
    check_same(rebuild(odd, key, CONFIG, marks()), odd)
    check_same(reset(odd, marks()), odd)


def test_rebuilt_codebooks_keep_their_type():
    index = build(random_keys())
    half = dataclasses.replace(index, codebooks=index.codebooks.astype(jnp.bfloat16))
    got = rebuild(half, jnp.asarray(random_keys()), CONFIG, marks(0))
    assert got.codebooks.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got.codebooks, half.codebooks)
    whole = append(emptied(got), jnp.asarray(random_keys()), CONFIG)
    np.testing.assert_array_equal(got.codes[0], whole.codes[0])


def test_a_reset_row_is_a_fresh_one():
    key, later = random_keys(), jnp.asarray(random_keys(seed=1))
    index = build(key)
    after = reset(index, marks(0, 2))
    assert after.lengths.tolist() == [0, LENGTHS[1], 0, LENGTHS[3]]
    # Grown again, it is an empty row with these codebooks, grown.
    counts = jnp.asarray([30, 0, 40, 0], jnp.int32)
    check_same_rows(
        append(after, later, CONFIG, counts=counts),
        append(emptied(index), later, CONFIG, counts=counts),
        [0, 2],
    )
    # Rebuilt, it is a new row.
    lengths = jnp.asarray([50, 0, 170, 0], jnp.int32)
    again = rebuild(after, later, CONFIG, marks(0, 2), lengths=lengths)
    check_same_rows(again, build(later, lengths), [0, 2])
    check_same_rows(again, index, [1, 3])


def test_a_reset_row_selects_as_an_empty_one():
    index = reset(build(random_keys()), marks(0))
    query = jnp.ones((B, 1, 4, H), jnp.float32)
    assert select(query, index, CONFIG).counts[0].tolist() == [[0] * 4]


# Data that no model should give.


def test_bad_keys_have_defined_codebooks():
    """Constant keys, few distinct keys, fewer finite keys than centroids, and none."""
    rng = np.random.default_rng(0)
    key = random_keys()
    key[0] = 0.1
    key[1] = rng.integers(-64, 64, (5, K, H))[rng.integers(0, 5, S)]
    key[2] = np.where(np.arange(S)[:, None, None] % 20 == 5, key[2], np.inf)
    key[3] = np.nan
    lengths = [S] * B
    built = build(key, lengths)
    fresh = build(random_keys(seed=1), lengths)
    for index in (built, rebuild(fresh, jnp.asarray(key), CONFIG, marks(0, 1, 2, 3))):
        codebooks = np.asarray(index.codebooks)
        assert np.isfinite(codebooks).all()
        np.testing.assert_allclose(codebooks[0], 0.1, rtol=2.0**-18)
        assert (index.codes[0] == index.codes[0, ..., :1]).all()
        decoded = np.take_along_axis(
            codebooks, np.asarray(index.codes)[..., None].astype(int), axis=3
        )  # [B, K, M, S, D]
        parts = key.reshape(B, S, K, 2, -1).transpose(0, 2, 3, 1, 4)
        # Means of equal integers; the division rounds.
        np.testing.assert_allclose(decoded[1], parts[1], rtol=2.0**-22)
        finite = np.isfinite(parts[2]).all(-1)
        np.testing.assert_array_equal(decoded[2][finite], parts[2][finite])
        assert (np.asarray(index.codes)[2][~finite] == 0).all()
        assert (codebooks[3] == 0).all()
        assert (np.asarray(index.codes)[3] == 0).all()
    np.testing.assert_array_equal(rebuild_gain(built, jnp.asarray(key), CONFIG), 0)


def test_rare_keys_have_no_error():
    """Fewer distinct keys than centroids, and starts that are nearly all one of them."""
    key = random_keys()
    rare = np.arange(B)[:, None], np.arange(20, 20 + 12 * 15, 15)
    key, kept = np.repeat(key[:, :1], S, axis=1), key[rare]
    key[rare] = kept
    index = build(key, [S] * B)
    parts = key.reshape(B, S, K, 2, -1).transpose(0, 2, 3, 1, 4)
    codes = np.asarray(index.codes)[..., None].astype(int)
    decoded = np.take_along_axis(np.asarray(index.codebooks), codes, axis=3)
    np.testing.assert_allclose(decoded, parts, rtol=1e-5)
    np.testing.assert_array_equal(rebuild_gain(index, jnp.asarray(key), CONFIG), 0)


@pytest.mark.parametrize("metric", ["euclidean", "ip"])
def test_a_far_key_costs_the_others_one_centroid(metric):
    """However far away it is, up to what arithmetic allows: the norm is twice the coordinate."""
    config = dataclasses.replace(CONFIG, metric=metric)
    key = np.repeat(random_keys()[:1], B, axis=0)
    for row, coordinate in enumerate([1e3, 1e9, 2e18], 1):
        key[row, 17] = coordinate
    index = build(key, [S] * B, config)
    parts = key.reshape(B, S, K, 2, -1).transpose(0, 2, 3, 1, 4)
    centroids = np.asarray(index.codebooks)[..., : parts.shape[-1]]
    decoded = np.take_along_axis(centroids, np.asarray(index.codes)[..., None].astype(int), axis=3)
    errors = np.square(parts - decoded).sum(-1)
    others = np.delete(errors, 17, axis=-1).sum((1, 2, 3))
    # A start is worth some percent too.
    assert (others[1:] < (1 + 2 / C) * others[0]).all()
    np.testing.assert_allclose(decoded[1:, ..., 17, :], parts[1:, ..., 17, :], rtol=1e-6)


def test_a_row_without_room_keeps_its_state_amid_a_batch():
    key = random_keys()
    index = build(key, [S, S - 2, S - 3, 0])
    got = append(index, jnp.asarray(key[:, :3]), CONFIG)
    assert got.lengths.tolist() == [S, S - 2, S, 3]
    check_same_rows(got, index, [0, 1])


# Which rows would gain.


def test_gain_is_small_after_training_and_large_after_drift():
    config = dataclasses.replace(CONFIG, kmeans_iters=100)  # ends when nothing changes
    key = random_keys()
    lengths = np.array([S, S, S, 0], np.int32)
    index = build(key, lengths, config)
    key[1, 100:] += 3
    key[2, 100:] = random_keys(seed=9)[2, 100:]
    gain = np.asarray(jax.jit(rebuild_gain, static_argnames="config")(index, key, config=config))
    assert gain.dtype == np.float32
    assert 0 <= gain[0] < 1e-5
    assert (gain[1:3] > 0.05).all()
    assert (gain[1:3] < 1).all()
    assert gain[3] == 0
    better = rebuild(index, jnp.asarray(key), config, jnp.asarray(gain > 0.02))
    assert (np.asarray(rebuild_gain(better, jnp.asarray(key), config)) < 1e-5).all()
    check_same_rows(better, index, [0, 3])


def test_gain_does_not_mistake_another_sample_for_drift():
    """A row that grows by tokens like those before has other tokens in its sample, no drift.

    On average over starts: what is left of chance is noise.
    """
    config = dataclasses.replace(CONFIG, train_tokens=80)
    key, gains = random_keys(), []
    for seed in range(8):
        index = build(key, [80 + OFFSET] * B, config, seed)
        index = append(index, jnp.asarray(key[:, 80 + OFFSET :]), config)
        assert index.lengths.tolist() == [S] * B
        gains.append(rebuild_gain(index, jnp.asarray(key), config))
        trained = rebuild_gain(build(key, [S] * B, config, seed), jnp.asarray(key), config)
        assert (np.asarray(trained) == 0).all()
    assert (np.mean(gains, axis=0) < 0.06).all()
    key[0, 80 + OFFSET :] += 3
    assert rebuild_gain(index, jnp.asarray(key), config)[0] > 0.2


@pytest.mark.parametrize("metric", ["euclidean", "ip"])
def test_a_far_key_is_no_drift_and_hides_none(metric):
    """Its own error is rounding, and large beside the others' errors."""
    config = dataclasses.replace(CONFIG, metric=metric, kmeans_iters=100)
    key = np.repeat(random_keys()[:1], B, axis=0)
    for row, coordinate in enumerate([1e3 / 3, 1e9 / 3, 5e18 / 3], 1):
        key[row, 17] = coordinate
    index = build(key, [S] * B, config)
    assert (np.asarray(rebuild_gain(index, jnp.asarray(key), config)) < 1e-5).all()
    key[:, 100:] += 3
    gain = np.asarray(rebuild_gain(index, jnp.asarray(key), config))
    assert (gain > 0.05).all()
    assert (gain < 1).all()
    np.testing.assert_allclose(gain[1:], gain[1], rtol=0.01)


def test_codebooks_of_no_keys_gain_everything():
    """One step leaves zeros as they are where keys have a mean of zero."""
    key = random_keys()
    key[:, 1::2] = -key[:, 0:-1:2]
    index = build(key, [OFFSET, OFFSET, OFFSET + 1, S])
    index = append(index, jnp.asarray(key), CONFIG, counts=jnp.asarray([0, 60, 60, 0], jnp.int32))
    gain = np.asarray(rebuild_gain(index, jnp.asarray(key), CONFIG))
    assert gain[:3].tolist() == [0, 1, 1]
    assert gain[3] < 0.1


def test_gain_of_rounded_codebooks_is_what_rounded_means_gain():
    """Far from zero a bfloat16 centroid is never the mean, and no rebuild makes it so."""
    config = dataclasses.replace(CONFIG, kmeans_iters=100)
    key = random_keys() / 8 + 100
    index = build(key, [S] * B, config)
    index = dataclasses.replace(index, codebooks=index.codebooks.astype(jnp.bfloat16))
    index = rebuild(index, jnp.asarray(key), config, marks(0, 1, 2, 3))
    assert (np.asarray(rebuild_gain(index, jnp.asarray(key), config)) < 0.02).all()


def test_training_ends_when_nothing_changes():
    """A hundred iterations or a thousand: the same bits, alone or beside rows that go on."""
    configs = [dataclasses.replace(CONFIG, kmeans_iters=n) for n in (100, 1000)]
    key = random_keys()
    few, many = (build(key, config=config) for config in configs)
    check_same_rows(many, few)


def test_training_ends_soon_with_more_centroids_than_distinct_keys():
    """Most centroids equal one key, and would take turns at being its rounded mean."""
    key = random_keys()
    key[:, 30:] = key[:, 30:31]
    key[:, :28] = key[:, 30:31]
    few, many = (build(key, [S] * B, dataclasses.replace(CONFIG, kmeans_iters=n)) for n in (4, 100))
    check_same_rows(many, few)


# As a pytree.


def test_an_index_per_layer_goes_through_scan():
    keys = np.stack([random_keys(seed) for seed in range(3)])
    lengths = jnp.asarray([100, 50, 20, 5], jnp.int32)
    layers = [build(key, lengths) for key in keys]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    new = jnp.asarray(keys[:, :, 100:101])

    @jax.jit
    def step(stacked, new):
        def layer(carry, x):
            index, key_new = x
            return carry + 1, append(index, key_new, CONFIG)

        return lax.scan(layer, jnp.int32(0), (stacked, new))

    count, grown = step(stacked, new)
    assert int(count) == 3
    for i, index in enumerate(layers):
        check_same(jax.tree.map(lambda x, i=i: x[i], grown), append(index, new[i], CONFIG))


@pytest.mark.parametrize("metric", ["euclidean", "ip"])
def test_saved_and_loaded_by_numpy(metric):
    index = build(random_keys(), config=dataclasses.replace(CONFIG, metric=metric))
    leaves, structure = jax.tree.flatten(index)
    file = io.BytesIO()
    np.savez(file, *leaves)
    file.seek(0)
    with np.load(file) as arrays:
        loaded = jax.tree.unflatten(structure, [jnp.asarray(arrays[name]) for name in arrays])
    assert isinstance(loaded, PQIndex)
    check_same(loaded, index)


def test_a_bfloat16_array_from_numpy_is_said_to_need_a_view():
    """savez keeps its bytes and forgets its type."""
    index = build(random_keys())
    index = dataclasses.replace(index, codebooks=index.codebooks.astype(jnp.bfloat16))
    file = io.BytesIO()
    np.savez(file, codebooks=index.codebooks)
    file.seek(0)
    with np.load(file) as arrays:
        codebooks = arrays["codebooks"]
    loaded = dataclasses.replace(index, codebooks=codebooks)
    key = jnp.asarray(random_keys()[:, :1])
    with pytest.raises(ValueError, match=r"index\.codebooks: .*\.view\(jnp\.bfloat16\)"):
        append(loaded, key, CONFIG)
    loaded = dataclasses.replace(index, codebooks=jnp.asarray(codebooks.view(jnp.bfloat16)))
    check_same(append(loaded, key, CONFIG), append(index, key, CONFIG))


def test_saved_and_loaded_by_orbax(tmp_path):
    orbax = pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint is not installed")
    index = build(random_keys())
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "index", index)
        checkpointer.wait_until_finished()
        check_same(checkpointer.restore(tmp_path / "index", index), index)


# A long decode.


def test_ten_thousand_steps_with_restarting_rows_compile_nothing_anew(implementation, compilations):
    if implementation == "kernels":
        pytest.skip("the interpreter takes minutes for so many steps")
    rng = np.random.default_rng(0)
    cache = jnp.asarray(random_keys())
    new = jnp.asarray(rng.standard_normal((B, 1, K, H)), jnp.float32)
    query = jnp.asarray(rng.standard_normal((B, 1, 4, H)), jnp.float32)

    @functools.partial(jax.jit, donate_argnums=0)
    def decode(index, new, stop):
        selection, index = indexer_next(query, new, index, CONFIG)
        return reset(index, index.lengths >= stop), selection.counts

    @functools.partial(jax.jit, donate_argnums=0)
    def restart(index, lengths):
        rows = index.lengths == 0
        return rebuild(index, cache, CONFIG, rows, lengths=lengths), rebuild_gain(
            index, cache, CONFIG
        )

    lengths = LENGTHS.copy()
    index = build(cache, lengths)
    before, restarts = None, np.zeros(B, int)
    for step in range(10_000):
        stop = np.int32(100 + step % 101)  # at most S
        index, _ = decode(index, new, stop)
        lengths = np.minimum(lengths + 1, S)
        ended = lengths >= stop
        lengths[ended] = 0
        restarts += ended
        if step % 100 == 0:
            prompts = rng.integers(0, S, B).astype(np.int32)
            index, _ = restart(index, prompts)
            lengths = np.where(lengths == 0, prompts, lengths)
        if step == 100:
            before = compilations()
    assert index.lengths.tolist() == lengths.tolist()
    assert (restarts > 20).all()
    assert compilations() == before
