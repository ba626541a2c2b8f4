"""A growing context compiles nothing anew."""

import dataclasses
import functools

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
    decode_attention,
    empty_cache,
    indexer_next,
    rebuild,
    rebuild_gain,
    reset,
    select,
)

B, N, K, H, S, STEPS = 3, 4, 2, 8, 128, 100
# Steps pass through the short rule's end at 31 tokens, and one row fills up.
CONFIG = IndexerConfig(num_bits=4, heavy_size=6, sink_size=8, window_size=4)
START = np.array([0, 20, S - STEPS // 2], np.int32)


def inputs():
    rng = np.random.default_rng(0)
    index = PQIndex(
        codebooks=jnp.asarray(rng.standard_normal((B, K, 2, 16, H // 2)), jnp.float32),
        codes=jnp.zeros((B, K, 2, S), jnp.uint8),
        lengths=jnp.asarray(START),
    )
    query = rng.standard_normal((STEPS, B, 1, N, H)).astype(np.float32)
    key_new = rng.standard_normal((STEPS, B, 1, K, H)).astype(np.float32)
    return index, query, key_new


def test_the_counter_counts(compilations):
    x = np.float32(1)
    jax.jit(lambda x: x * 3 + 1)(x)
    assert compilations() == 1
    jax.jit(lambda x: x * 3 - 1)(x)
    assert compilations() == 2


def test_a_scan_of_100_steps_compiles_once(compilations):
    index, query, key_new = inputs()
    jax.block_until_ready(index)
    before, traces = compilations(), []

    @jax.jit
    def decode(index, query, key_new):
        def step(index, x):
            traces.append(1)
            selection, index = indexer_next(*x, index, CONFIG)
            return index, selection.counts

        return lax.scan(step, index, (query, key_new))

    after, counts = decode(index, query, key_new)
    assert compilations() - before == 1
    assert after.lengths.tolist() == [STEPS, 20 + STEPS, S]
    # All of a short context, then sinks, heavy ones and window.
    seen = np.minimum(START + np.arange(1, STEPS + 1)[:, None], S)
    want = np.where(seen <= 6 + 8 + 1 + 16, seen, 8 + 6 + 4)
    np.testing.assert_array_equal(counts, np.broadcast_to(want[..., None, None], counts.shape))
    traced = len(traces)
    decode(after, query, key_new)
    assert compilations() - before == 1
    assert len(traces) == traced


def test_100_calls_compile_once(compilations):
    index, query, key_new = inputs()
    jax.block_until_ready(index)
    before, traces = compilations(), []

    @functools.partial(jax.jit, donate_argnames="index")
    def step(query, key_new, index):
        traces.append(1)
        return indexer_next(query, key_new, index, CONFIG)

    for t in range(STEPS):
        _, index = step(query[t], key_new[t], index)
    assert compilations() - before == 1
    assert len(traces) == 1
    assert index.lengths.tolist() == [STEPS, 20 + STEPS, S]


def test_donated_state_is_updated_in_place():
    index, query, key_new = inputs()

    @functools.partial(jax.jit, donate_argnames="index")
    def step(query, key_new, index):
        return indexer_next(query, key_new, index, CONFIG)[1]

    index = step(query[0], key_new[0], index)
    old, place = index, index.codes.unsafe_buffer_pointer()
    index = step(query[1], key_new[1], index)
    assert old.codes.is_deleted()
    assert index.codes.unsafe_buffer_pointer() == place
    assert index.lengths.tolist() == [2, 22, START[2] + 2]


@pytest.mark.parametrize("function", ["select", "append", "build_index", "rebuild", "gain"])
def test_other_lengths_and_data_compile_nothing(function, compilations):
    index, query, key_new = inputs()
    key = np.random.default_rng(1).standard_normal((B, S, K, H)).astype(np.float32)

    def call(lengths, t):
        state = PQIndex(codebooks=index.codebooks, codes=index.codes, lengths=lengths)
        if function == "select":
            return select(query[t], state, CONFIG, return_weights=True)
        if function == "append":
            return append(state, key_new[t], CONFIG, counts=lengths % 2)
        if function == "rebuild":
            state = reset(state, lengths == 31)
            return rebuild(state, key, CONFIG, lengths > t, lengths=lengths, seed=t)
        if function == "gain":
            return rebuild_gain(state, key * (t + 1), CONFIG)
        return build_index(key * (t + 1), lengths, CONFIG)

    jax.block_until_ready(call(START, 0))
    before = compilations()
    for t, length in enumerate([0, 1, 30, 31, 32, S - 1, S, S + 1, -1]):
        jax.block_until_ready(call(np.array([length, t, S - t], np.int32), t))
    assert compilations() == before


def test_equal_configs_share_a_program(compilations):
    index, query, _ = inputs()
    jax.block_until_ready(select(query[0], index, CONFIG))
    before = compilations()
    same = IndexerConfig(num_bits=4, heavy_size=np.int64(6), sink_size=8, window_size=4)
    jax.block_until_ready(select(query[0], index, same))
    assert compilations() == before


def test_a_whole_decode_of_all_layers_compiles_one_program(compilations):
    """Called from Python, layer by layer, while rows grow; one fills up."""
    layers, steps = 3, 6
    config = IndexerConfig(num_bits=2, heavy_size=4, sink_size=2, window_size=3, cells=True)
    cache = empty_cache(config, B, 8, K, H, dtype=jnp.float32, layers=layers)
    lengths = jnp.asarray(np.array([[0, 2, 5], [1, 0, 0], [0, 8, 0]]), jnp.int32)
    cache = dataclasses.replace(cache, index=dataclasses.replace(cache.index, lengths=lengths))
    _, query, key_new = inputs()
    query, key_new = jnp.asarray(query[0]), jnp.asarray(key_new[0])
    jax.block_until_ready((cache, query, key_new))
    before = compilations()
    for _ in range(steps):
        for layer in range(layers):
            out, cache = decode_attention(query, key_new, key_new, cache, config, layer=layer)
    jax.block_until_ready((out, cache))
    assert compilations() - before == 1
    assert cache.index.lengths.tolist() == [[6, 8, 8], [7, 6, 6], [6, 8, 6]]
