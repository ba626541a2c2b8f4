"""Subspaces of every M-th dimension: those of neighbours, of keys whose dimensions are permuted."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_indexer import (
    DecodeCache,
    IndexerConfig,
    build_index,
    decode_attention,
    indexer_next,
    rebuild_gain,
)
from jax_indexer.kernels import backend
from jax_indexer.layout import subvectors
from parity.test_kernels import CPU

B, S, K, G, M, D, BITS = 2, 150, 2, 2, 4, 6, 3
H = M * D
LENGTHS = np.array([S - 12, 70], np.int32)
# Neighbours in this order are a subspace of every M-th dimension each.
ORDER = np.arange(H).reshape(D, M).T.ravel()


@pytest.fixture
def implementation(request):
    if request.param != "interpreter":
        yield request.param
        return
    with jax.default_device(CPU), backend.interpreted():
        yield "triton"


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def of(grouping, **changes):
    sizes = {"num_subspaces": M, "num_bits": BITS, "heavy_size": 9, "sink_size": 5}
    return IndexerConfig(grouping=grouping, window_size=7, **sizes, **changes)


def test_dimensions_are_dealt_to_subspaces_in_turn():
    found = {x: subvectors(jnp.arange(6.0), 2, x) for x in ("strided", "contiguous")}
    np.testing.assert_array_equal(found["strided"], [[0, 2, 4], [1, 3, 5]])
    np.testing.assert_array_equal(found["contiguous"], [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize(
    ("implementation", "metric", "kv_layout"),
    [
        ("xla", "euclidean", "BSKH"),
        ("xla", "ip", "BKSH"),
        ("interpreter", "ip", "BSKH"),
        pytest.param("triton", "euclidean", "BSKH", marks=pytest.mark.gpu),
        pytest.param("triton", "ip", "BKSH", marks=pytest.mark.gpu),
    ],
    indirect=["implementation"],
)
def test_it_is_the_other_grouping_of_permuted_keys(metric, kv_layout, implementation):
    """To the bit: codebooks, codes, lists, and gains; but a GPU adds up norms in another order."""
    cells = metric == "euclidean"
    key, query, new = draw(0, B, S, K, H), draw(1, B, 1, K * G, H), draw(2, B, 1, K, H)
    options = {"kv_layout": kv_layout, "implementation": implementation}

    def life(grouping, order):
        config = of(grouping, metric=metric, cells=cells)
        ours = lambda x: x[..., order]  # noqa: E731
        laid = lambda x: x if kv_layout == "BSKH" else x.swapaxes(1, 2)  # noqa: E731
        cache = laid(ours(key))
        index = build_index(cache, jnp.asarray(LENGTHS), config, **options)
        selection, index = indexer_next(ours(query), laid(ours(new)), index, config, **options)
        return selection, index, rebuild_gain(index, cache, config, **options)

    got = life("strided", np.arange(H))
    want, codes = life("contiguous", ORDER), np.asarray(got[1].codes)
    if metric == "ip" and jax.default_backend() == "gpu":
        # A root near 0 has half the digits of what it is taken of.
        close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3)
        books = [dataclasses.replace(x[1], codes=None) for x in (got, want)]
        jax.tree.map(close, (*books[:1], got[2]), (*books[1:], want[2]))
        got, want = ((x[0], x[1].codes) for x in (got, want))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    other = build_index(key, jnp.asarray(LENGTHS), of("contiguous", metric=metric))
    assert (np.asarray(other.codes) != codes).any()


@pytest.mark.parametrize("implementation", ["xla", pytest.param("triton", marks=pytest.mark.gpu)])
def test_decoding_attends_by_it(implementation):
    config = of("strided", cells=True)
    key, value, query = draw(0, B, S, K, H), draw(3, B, S, K, H), draw(1, B, 1, K * G, H)

    def step(config, order):
        index = build_index(key[..., order], jnp.asarray(LENGTHS), config)
        cache = DecodeCache(key[..., order], value, index)
        new = draw(4, B, 1, K, H)[..., order], draw(5, B, 1, K, H)
        return decode_attention(
            query[..., order], *new, cache, config, implementation=implementation
        )

    out, cache = step(config, np.arange(H))
    want, permuted = step(dataclasses.replace(config, grouping="contiguous"), ORDER)
    jax.tree.map(np.testing.assert_array_equal, cache.index, permuted.index)
    # Logits are added in another order.
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
